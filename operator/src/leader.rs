//! Leadership: one replica acts, by a Lease. Every replica learns.

use std::time::Duration;

use futures::{StreamExt, pin_mut};
use k8s_openapi::api::coordination::v1::Lease;
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::watch_object;
use kube::{Api, Client};
use kube_lease_manager::{LeaseManager, LeaseManagerBuilder};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::apply::MANAGER;

/// How long a leader that does not answer stays one, in seconds.
const DURATION: u64 = 15;
/// How long before that it renews, in seconds.
const GRACE: u64 = 5;
/// The pause after the API refused or did not answer.
const PAUSE: Duration = Duration::from_secs(1);

/// A replica's part in the election.
pub struct Candidate {
    /// Whether this replica leads.
    pub leads: watch::Receiver<bool>,
    /// Gives the Lease back once it is cancelled.
    pub resign: CancellationToken,
    task: JoinHandle<()>,
}

impl Candidate {
    /// Stands for election, as soon as the API lets it.
    pub fn stand(client: Client, namespace: String, identity: String) -> Self {
        let (sender, leads) = watch::channel(false);
        let resign = CancellationToken::new();
        let election = Election {
            client,
            namespace,
            identity,
        };
        let task = tokio::spawn(election.run(sender, resign.clone()));
        Self {
            leads,
            resign,
            task,
        }
    }

    /// Gives the lease back, so that another replica acts at once.
    pub async fn resign(self) {
        self.resign.cancel();
        if let Err(error) = self.task.await {
            tracing::warn!(%error, "the election's task");
        }
    }
}

struct Election {
    client: Client,
    namespace: String,
    identity: String,
}

impl Election {
    async fn run(self, leads: watch::Sender<bool>, resign: CancellationToken) {
        let leases: Api<Lease> = Api::namespaced(self.client.clone(), &self.namespace);
        let lease = watch_object(leases, MANAGER).default_backoff();
        pin_mut!(lease);
        let Some(mut manager) = resign.run_until_cancelled(self.manager()).await else {
            return;
        };
        loop {
            tokio::select! {
                () = resign.cancelled() => break,
                changed = manager.changed() => match changed {
                    Ok(state) => drop(leads.send_replace(state)),
                    Err(error) => {
                        tracing::warn!(%error, "the lease");
                        tokio::time::sleep(PAUSE).await;
                    }
                },
                // The library sleeps until the lease that it last saw would run out. A lease that was given back is
                // free at once, so it is made to look again.
                Some(Ok(lease)) = lease.next() => {
                    if !*leads.borrow() && lease.as_ref().is_none_or(is_free) {
                        manager = self.manager().await;
                    }
                }
            }
        }
        leads.send_replace(false);
        match manager.release().await {
            Ok(()) => tracing::info!("lease released"),
            Err(error) => tracing::warn!(%error, "lease not released; it will expire"),
        }
    }

    async fn manager(&self) -> LeaseManager {
        loop {
            let builder = LeaseManagerBuilder::new(self.client.clone(), MANAGER)
                .with_namespace(&self.namespace)
                .with_identity(&self.identity)
                .with_field_manager(MANAGER)
                .with_duration(DURATION)
                .with_grace(GRACE);
            match builder.build().await {
                Ok(manager) => return manager,
                Err(error) => {
                    tracing::warn!(%error, namespace = self.namespace, "no election yet");
                    tokio::time::sleep(PAUSE).await;
                }
            }
        }
    }
}

fn is_free(lease: &Lease) -> bool {
    let holder = lease
        .spec
        .as_ref()
        .and_then(|spec| spec.holder_identity.as_deref());
    holder.is_none_or(str::is_empty)
}
