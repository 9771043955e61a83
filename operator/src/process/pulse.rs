//! Heartbeats. A task beats whenever it comes back to the runtime, at least every [`BEAT`]; one that computes for ever does not, and nor
//! does any while nothing polls it.

use std::future::Future;
use std::pin::pin;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::Poll;
use std::time::Duration;

use super::quarantine::Object;

/// A task that waits for something comes back this often all the same.
pub const BEAT: Duration = Duration::from_secs(2);

/// The pulses of the process's tasks.
#[derive(Clone, Debug, Default)]
pub struct Pulses {
    tasks: Arc<Mutex<Vec<Pulse>>>,
}

impl Pulses {
    /// The pulse of a new task.
    pub fn of(&self, task: &'static str) -> Pulse {
        let pulse = Pulse(Arc::new(Inner {
            task,
            beats: AtomicU64::new(0),
            running: AtomicUsize::new(0),
            at: Mutex::default(),
        }));
        let mut tasks = self.tasks.lock().unwrap_or_else(PoisonError::into_inner);
        tasks.push(pulse.clone());
        pulse
    }

    pub(super) fn all(&self) -> Vec<Pulse> {
        let tasks = self.tasks.lock().unwrap_or_else(PoisonError::into_inner);
        tasks.clone()
    }
}

/// One task's heartbeat.
#[derive(Clone, Debug)]
pub struct Pulse(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    task: &'static str,
    beats: AtomicU64,
    /// How many futures of it there are: none, and it need not beat.
    running: AtomicUsize,
    /// The object that it is at while it computes.
    at: Mutex<Option<Arc<Object>>>,
}

/// Something that need not beat once this is dropped.
struct Running<'a>(&'a Inner);

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.0.running.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Pulse {
    /// The task's name, in metrics and log lines.
    pub fn task(&self) -> &'static str {
        self.0.task
    }

    /// How often it has come back; `None` while it has nothing to do.
    pub(super) fn beats(&self) -> Option<u64> {
        let runs = self.0.running.load(Ordering::Relaxed) > 0;
        runs.then(|| self.0.beats.load(Ordering::Relaxed))
    }

    /// The object that the task is at, while it computes.
    pub(super) fn object(&self) -> Option<Arc<Object>> {
        self.at().clone()
    }

    fn at(&self) -> std::sync::MutexGuard<'_, Option<Arc<Object>>> {
        self.0.at.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does `work` with a heartbeat.
    pub async fn during<F: Future>(&self, work: F) -> F::Output {
        self.beating(BEAT, work).await
    }

    async fn beating<F: Future>(&self, every: Duration, work: F) -> F::Output {
        self.0.running.fetch_add(1, Ordering::Relaxed);
        let _running = Running(&self.0);
        let mut work = pin!(work);
        let mut tick = tokio::time::interval(every);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        std::future::poll_fn(|cx| {
            while tick.poll_tick(cx).is_ready() {}
            let polled = work.as_mut().poll(cx);
            self.0.beats.fetch_add(1, Ordering::Relaxed);
            polled
        })
        .await
    }

    /// Does `work` of the task, and says which object it is at whenever it computes.
    pub async fn at_object<F: Future>(&self, object: Object, work: F) -> F::Output {
        let object = Arc::new(object);
        let mut work = pin!(work);
        std::future::poll_fn(|cx| {
            *self.at() = Some(Arc::clone(&object));
            let polled: Poll<F::Output> = work.as_mut().poll(cx);
            *self.at() = None;
            polled
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::world::Key;

    #[tokio::test]
    async fn a_task_that_waits_beats_and_one_that_is_gone_need_not() {
        let pulses = Pulses::default();
        let pulse = pulses.of("idle");
        assert_eq!(pulse.beats(), None);
        let task = tokio::spawn({
            let pulse = pulse.clone();
            let every = Duration::from_millis(5);
            async move { pulse.beating(every, std::future::pending::<()>()).await }
        });
        while pulse.beats().is_none_or(|beats| beats < 3) {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        task.abort();
        assert!(task.await.is_err());
        assert_eq!(pulse.beats(), None);
    }

    #[tokio::test]
    async fn the_object_is_known_while_the_task_computes_and_not_while_it_waits() {
        let pulse = Pulses::default().of("task");
        let object = Object::Fence(Key::new("shop", "cart"));
        let seen = pulse.at_object(object.clone(), async {
            let while_computing = pulse.object();
            tokio::task::yield_now().await;
            while_computing
        });
        let mut seen = pin!(seen);
        let waits = futures::poll!(seen.as_mut()).is_pending();
        assert!(waits && pulse.object().is_none());
        assert_eq!(seen.await.as_deref(), Some(&object));
    }
}
