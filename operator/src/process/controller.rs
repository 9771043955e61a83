//! What the leader alone does, each controller on a thread of its own, so that one that computes for ever takes nobody's.

use std::sync::Arc;
use std::time::Duration;

use futures::future::LocalBoxFuture;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use super::Pulse;

/// The pause before a controller that ended by itself begins again.
const PAUSE: Duration = Duration::from_secs(1);

/// Work that the leader alone does.
pub trait Controller: Send + Sync {
    /// Its name in metrics and log lines.
    fn name(&self) -> &'static str;

    /// Works for as long as the future is polled. Where it is at an object it says so to `pulse`.
    fn run<'a>(&'a self, pulse: &'a Pulse) -> LocalBoxFuture<'a, ()>;

    /// What is to be done while another replica leads.
    fn rest(&self) -> LocalBoxFuture<'_, ()> {
        Box::pin(std::future::pending())
    }
}

/// When controllers work.
#[derive(Clone)]
pub(crate) struct When {
    /// Once the mesh is listed,
    pub(crate) synced: watch::Receiver<bool>,
    /// while this replica leads,
    pub(crate) leads: watch::Receiver<bool>,
    /// until the process ends.
    pub(crate) stop: CancellationToken,
}

/// Says that a thread ended, also where it panicked.
struct Ended(&'static str, mpsc::UnboundedSender<&'static str>);

impl Drop for Ended {
    fn drop(&mut self) {
        // Nobody listens once the process ends.
        let _ = self.1.send(self.0);
    }
}

/// Starts a controller's thread. `ended` hears of its end.
///
/// # Errors
/// Fails when there can be no thread.
pub(crate) fn start(
    controller: Arc<dyn Controller>,
    when: When,
    pulse: Pulse,
    ended: mpsc::UnboundedSender<&'static str>,
) -> std::io::Result<()> {
    let runtime = tokio::runtime::Handle::current();
    let name = controller.name();
    let thread = std::thread::Builder::new().name(name.to_owned());
    thread.spawn(move || {
        let _ended = Ended(name, ended);
        let stop = when.stop.clone();
        let work = lead(controller, when, pulse);
        runtime.block_on(stop.run_until_cancelled(work));
    })?;
    Ok(())
}

/// Lets a controller work whenever this replica leads and knows the mesh.
async fn lead(controller: Arc<dyn Controller>, when: When, pulse: Pulse) {
    let When {
        mut synced,
        mut leads,
        stop: _,
    } = when;
    wait_for(&mut synced).await;
    loop {
        tokio::select! {
            () = wait_for(&mut leads) => {}
            () = controller.rest() => {}
        }
        tokio::select! {
            () = wait_until_not(&mut leads) => {}
            () = pulse.during(controller.run(&pulse)) => {
                tracing::error!(task = controller.name(), "a controller ended by itself; it begins again");
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}

pub(crate) async fn wait_for(flag: &mut watch::Receiver<bool>) {
    if flag.wait_for(|set| *set).await.is_err() {
        std::future::pending::<()>().await;
    }
}

pub(crate) async fn wait_until_not(flag: &mut watch::Receiver<bool>) {
    // A sender that is gone cannot renew the lease either.
    let _ = flag.wait_for(|set| !*set).await;
}
