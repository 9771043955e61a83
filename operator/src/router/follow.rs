//! What was written last for a service, and how far it has come.

use std::sync::Arc;
use std::time::{Duration, Instant};

use fenceline_crds::Change;
use tokio::sync::{mpsc, watch};

use super::arrival::{Expectation, Known, Outcome, until_arrived, until_fewer};
use super::istiod::Istiods;
use super::votes::Skipped;
use crate::world::{Key, World};

/// Longer than any request may take to end.
const LONG_AGO: Duration = Duration::from_secs(3600);

/// One object on its way.
#[derive(Debug)]
pub(super) struct Followed {
    /// What it says, to tell it from what comes after.
    pub(super) content: String,
    outcome: watch::Receiver<Option<(Outcome, Instant)>>,
    says: watch::Receiver<String>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Followed {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Followed {
    /// Follows what is being written; `wake` gets the service once it has ended.
    pub(super) fn start(
        content: String,
        expectation: Expectation,
        change: Change,
        istiods: Arc<Istiods>,
        world: watch::Receiver<Arc<World>>,
        wake: mpsc::UnboundedSender<Key>,
    ) -> Self {
        let (ended, outcome) = watch::channel(None);
        let (say, says) = watch::channel(String::new());
        let task = tokio::spawn(async move {
            let service = expectation.service.clone();
            let mut outcome = if expectation.wanted.is_empty() {
                Outcome::Arrived(Known::Nothing)
            } else {
                until_arrived(&istiods, &world, &expectation, &change, &say).await
            };
            let at = Instant::now();
            loop {
                ended.send_replace(Some((outcome.clone(), at)));
                // Nobody listens once this replica no longer leads.
                let _ = wake.send(service.clone());
                let Outcome::Arrived(Known::But(skipped)) = outcome else {
                    return;
                };
                let known = until_fewer(&istiods, &world, &expectation, skipped).await;
                outcome = Outcome::Arrived(known);
            }
        });
        Self {
            content,
            outcome,
            says,
            task,
        }
    }

    /// What has arrived long ago.
    pub(super) fn arrived(content: String) -> Self {
        let long_ago = Instant::now().checked_sub(LONG_AGO);
        let outcome = (
            Outcome::Arrived(Known::AsSaid),
            long_ago.unwrap_or_else(Instant::now),
        );
        Self {
            content,
            outcome: watch::channel(Some(outcome)).1,
            says: watch::channel(String::new()).1,
            task: tokio::spawn(std::future::ready(())),
        }
    }

    /// How it ended, and when.
    pub(super) fn outcome(&self) -> Option<(Outcome, Instant)> {
        self.outcome.borrow().clone()
    }

    /// The proxies that do not have it and were not waited for.
    pub(super) fn skipped(&self) -> Skipped {
        match self.outcome() {
            Some((Outcome::Arrived(Known::But(skipped)), _)) => skipped,
            _ => Skipped::default(),
        }
    }

    /// What it waits for.
    pub(super) fn says(&self) -> String {
        self.says.borrow().clone()
    }
}
