//! A thread with a runtime of its own, so that it works whatever stalls: it counts the tasks' [beats](super::pulse), serves `/livez`,
//! `/readyz` and `/metrics`, and takes the signals that end the process.

use std::collections::BTreeMap;
use std::net::TcpListener;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Context as _;
use axum::Router;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use super::quarantine::Object;
use super::{Pulse, Pulses};
use crate::admin;
use crate::apply::Gate;
use crate::clock::Clock;
use crate::metrics::Metrics;
use crate::status::StatusWriter;

/// How often beats are counted.
const LOOK: Duration = Duration::from_secs(1);
/// How long a process with a stalled task goes on to answer `/livez` and `/metrics` before it ends itself.
const LAST_WORDS: Duration = Duration::from_secs(60);
/// How long the process may take to end once it was asked to.
const FAREWELL: Duration = Duration::from_secs(25);
/// How long the mark on the object at fault may take.
const MARK: Duration = Duration::from_secs(10);

/// Whether the process is well; once it is not, it does not get well again.
#[derive(Clone, Debug, Default)]
pub struct Health {
    stalled: Arc<Mutex<Option<String>>>,
}

impl Health {
    /// What is wrong.
    pub fn trouble(&self) -> Option<String> {
        self.stalled
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    fn stalls(&self, what: String) {
        *self.stalled.lock().unwrap_or_else(PoisonError::into_inner) = Some(what);
    }
}

/// What the watchdog works with.
pub struct Watchdog {
    pub pulses: Pulses,
    pub health: Health,
    pub metrics: Arc<Metrics>,
    /// Shut when a task stalls: whatever it does once it comes back, it writes nothing.
    pub gate: Gate,
    /// Gives the Lease back.
    pub resign: CancellationToken,
    /// Asks the process to end.
    pub stop: CancellationToken,
    pub replica: String,
    /// A task that did not come back for so long stalls.
    pub patience: Duration,
    pub clock: Clock,
}

/// A task that does not come back.
#[derive(Debug)]
struct Stall {
    task: &'static str,
    object: Option<Arc<Object>>,
}

/// Counts how often each task was looked at since it last came back. The count is of looks, not of time: a machine that slept, or a
/// process that was stopped, had no time to beat either.
#[derive(Debug, Default)]
struct Counts {
    of: BTreeMap<&'static str, (u64, u32)>,
}

impl Counts {
    /// The first task that has not come back for `patience` looks.
    fn look(&mut self, pulses: &[Pulse], patience: u32) -> Option<Stall> {
        for pulse in pulses {
            let Some(beats) = pulse.beats() else {
                self.of.remove(pulse.task());
                continue;
            };
            let (before, looks) = self.of.entry(pulse.task()).or_insert((beats, 0));
            if *before == beats {
                *looks += 1;
            } else {
                (*before, *looks) = (beats, 0);
            }
            if *looks >= patience {
                return Some(Stall {
                    task: pulse.task(),
                    object: pulse.object(),
                });
            }
        }
        None
    }
}

impl Watchdog {
    /// Starts the thread. `admin` is where `routes` are served.
    ///
    /// # Errors
    /// Fails when the thread cannot be made.
    pub fn start(self, admin: TcpListener, routes: Router) -> anyhow::Result<()> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .context("the watchdog's runtime")?;
        admin.set_nonblocking(true)?;
        let thread = std::thread::Builder::new().name("watchdog".to_owned());
        thread.spawn(move || {
            if let Err(error) = runtime.block_on(self.run(admin, routes)) {
                // Without it nothing would be noticed any more.
                tracing::error!(error = format!("{error:#}"), "the watchdog ended");
                std::process::exit(1);
            }
        })?;
        Ok(())
    }

    async fn run(self, admin: TcpListener, routes: Router) -> anyhow::Result<()> {
        let admin = tokio::net::TcpListener::from_std(admin)?;
        tokio::spawn(admin::serve(admin, routes));
        // A client of this runtime: the other's connections may stall with it.
        let client = kube::Client::try_default().await?;
        let status = StatusWriter::new(client, Arc::clone(&self.metrics), &self.replica);
        tokio::select! {
            signal = ended() => tracing::info!(signal = signal?, "ending"),
            () = self.stop.cancelled() => {}
            stall = self.stalled() => {
                self.give_up(stall, &status).await;
                tokio::time::sleep(LAST_WORDS).await;
                tracing::error!("ending, since a task stalls");
                std::process::exit(1);
            }
        }
        self.stop.cancel();
        tokio::time::sleep(FAREWELL).await;
        tracing::error!("not ended in time; ending at once");
        std::process::exit(1);
    }

    /// The first task that stalls.
    async fn stalled(&self) -> Stall {
        let patience = u32::try_from(self.patience.as_secs() / LOOK.as_secs()).unwrap_or(u32::MAX);
        let mut counts = Counts::default();
        let mut tick = tokio::time::interval(LOOK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tick.tick().await;
            if let Some(stall) = counts.look(&self.pulses.all(), patience) {
                return stall;
            }
        }
    }

    /// Gives up the Lease and names what stalls, everywhere where it is looked for.
    async fn give_up(&self, stall: Stall, status: &StatusWriter) {
        let Stall { task, object } = stall;
        let at = object
            .as_ref()
            .map_or_else(String::new, |object| format!(" at {object}"));
        let seconds = self.patience.as_secs();
        let what = format!("task {task} has not come back for {seconds} s{at}");
        self.health.stalls(what.clone());
        self.metrics.stalls(task);
        self.gate.shut();
        tracing::error!(task, object = %at.trim_start_matches(" at "), seconds, "a task stalls: this replica gives up its Lease and fails /livez");
        if let Some(object) = object {
            self.mark(&object, status).await;
        }
        // After the mark: the next leader begins at once, and looks for it.
        self.resign.cancel();
    }

    async fn mark(&self, object: &Object, status: &StatusWriter) {
        let marked = status.quarantine(object, self.patience, (self.clock)());
        match tokio::time::timeout(MARK, marked).await {
            Ok(Ok(())) => tracing::warn!(%object, "quarantined"),
            Ok(Err(error)) => {
                tracing::error!(%object, error = crate::chain(&error), "not quarantined; the next leader will stall at it");
            }
            Err(_) => {
                tracing::error!(%object, "not quarantined in time; the next leader will stall at it")
            }
        }
    }
}

/// The first signal that asks the process to end; a second one ends it at once.
async fn ended() -> anyhow::Result<&'static str> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let first = tokio::select! {
        _ = terminate.recv() => "SIGTERM",
        _ = interrupt.recv() => "SIGINT",
    };
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        std::process::exit(130);
    });
    Ok(first)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn only_a_task_that_does_not_come_back_stalls() {
        let pulses = Pulses::default();
        let (well, stuck, idle) = (pulses.of("well"), pulses.of("stuck"), pulses.of("idle"));
        let mut counts = Counts::default();
        let mut working = std::pin::pin!(well.during(std::future::pending::<()>()));
        let mut never = std::pin::pin!(stuck.during(std::future::pending::<()>()));
        assert!(futures::poll!(never.as_mut()).is_pending());
        for look in 0..29 {
            assert!(futures::poll!(working.as_mut()).is_pending());
            assert!(counts.look(&pulses.all(), 30).is_none(), "{look}");
        }
        assert!(futures::poll!(working.as_mut()).is_pending());
        let stall = counts.look(&pulses.all(), 30).expect("one stalls");
        assert_eq!((stall.task, idle.beats()), ("stuck", None));
        // It comes back.
        assert!(futures::poll!(never.as_mut()).is_pending());
        assert!(futures::poll!(working.as_mut()).is_pending());
        assert!(counts.look(&pulses.all(), 30).is_none());
    }
}
