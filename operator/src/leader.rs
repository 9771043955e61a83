//! Leadership: one replica acts, by a Lease. Every replica learns.

use std::time::Duration;

use kube::Client;
use kube_lease_manager::{LeaseManager, LeaseManagerBuilder};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::apply::MANAGER;

/// How long a leader that does not answer stays one, in seconds.
const DURATION: u64 = 15;
/// How long before that it renews, in seconds.
const GRACE: u64 = 5;

/// A replica's part in the election.
pub struct Candidate {
    /// Whether this replica leads.
    pub leads: watch::Receiver<bool>,
    task: JoinHandle<kube_lease_manager::Result<LeaseManager>>,
}

impl Candidate {
    /// Stands for election, as soon as the API lets it.
    pub async fn stand(client: &Client, namespace: &str, identity: &str) -> Self {
        loop {
            let builder = LeaseManagerBuilder::new(client.clone(), MANAGER)
                .with_namespace(namespace)
                .with_identity(identity)
                .with_field_manager(MANAGER)
                .with_duration(DURATION)
                .with_grace(GRACE);
            match builder.build().await {
                Ok(manager) => {
                    let (leads, task) = manager.watch().await;
                    return Self { leads, task };
                }
                Err(error) => {
                    tracing::warn!(%error, namespace, "cannot stand for election yet");
                    tokio::time::sleep(Duration::from_secs(1)).await;
                }
            }
        }
    }

    /// Gives the lease back, so that another replica acts at once.
    pub async fn resign(self) {
        drop(self.leads);
        match self.task.await {
            Ok(Ok(_)) => tracing::info!("lease released"),
            Ok(Err(error)) => tracing::warn!(%error, "lease not released; it will expire"),
            Err(error) => tracing::warn!(%error, "the election's task"),
        }
    }
}
