//! Things that are worked on one by one, each again when it changed or its time has come, several side by side but none twice at a time.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

use crate::world::{Key, World};

/// How many are worked on side by side.
const CONCURRENCY: usize = 16;

/// When something is to be looked at again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Next {
    In(Duration),
    /// Nothing is left of it.
    Gone,
}

/// When each is to be looked at next.
#[derive(Debug, Default)]
struct Due {
    at: BTreeMap<Key, Instant>,
    /// Those that are being worked on, and those of them that have changed meanwhile.
    under_way: BTreeMap<Key, bool>,
}

impl Due {
    fn put(&mut self, service: Key, at: Instant) {
        if let Some(again) = self.under_way.get_mut(&service) {
            *again = true;
            return;
        }
        let known = self.at.entry(service).or_insert(at);
        *known = (*known).min(at);
    }

    /// One whose time has come.
    fn take(&mut self, now: Instant) -> Option<Key> {
        let due = self.at.iter().find(|(_, at)| **at <= now)?.0.clone();
        self.at.remove(&due);
        self.under_way.insert(due.clone(), false);
        Some(due)
    }

    fn next(&self) -> Option<Instant> {
        self.at.values().min().copied()
    }

    fn done(&mut self, service: &Key, next: Option<Instant>) {
        let again = self.under_way.remove(service).unwrap_or_default();
        let at = if again { Some(Instant::now()) } else { next };
        if let Some(at) = at {
            self.put(service.clone(), at);
        }
    }
}

/// Wakes whatever a change of the world concerns, at first all there is, for as long as it is polled. Changes wait for each other for so long.
pub(crate) async fn wake_changed(
    mut world: watch::Receiver<Arc<World>>,
    wake: &mpsc::UnboundedSender<Key>,
    coalesce: Duration,
    all: impl Fn(&World) -> BTreeSet<Key>,
    concerned: impl Fn(&World, &World) -> BTreeSet<Key>,
) {
    let mut then: Option<Arc<World>> = None;
    loop {
        let now = Arc::clone(&world.borrow_and_update());
        let changed = match &then {
            None => all(&now),
            Some(then) => concerned(then, &now),
        };
        for key in changed {
            // Nobody works on it once this replica no longer leads.
            let _ = wake.send(key);
        }
        then = Some(now);
        if world.changed().await.is_err() {
            return;
        }
        tokio::time::sleep(coalesce).await;
    }
}

/// Works on whatever `woken` names, for as long as it is polled.
pub(crate) async fn run(
    mut woken: mpsc::UnboundedReceiver<Key>,
    reconcile: impl AsyncFn(&Key) -> Next,
) {
    let mut due = Due::default();
    let mut working = futures::stream::FuturesUnordered::new();
    loop {
        while working.len() < CONCURRENCY
            && let Some(key) = due.take(Instant::now())
        {
            let reconcile = &reconcile;
            working.push(async move {
                let next = reconcile(&key).await;
                (key, next)
            });
        }
        let next = due.next();
        let timer = async {
            match next {
                Some(at) => tokio::time::sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            key = woken.recv() => match key {
                Some(key) => due.put(key, Instant::now()),
                None => return,
            },
            Some((key, next)) = working.next(), if !working.is_empty() => {
                let at = match next {
                    Next::Gone => None,
                    Next::In(time) => Some(Instant::now() + time),
                };
                due.done(&key, at);
            }
            () = timer, if working.len() < CONCURRENCY => {}
        }
    }
}
