//! A write budget: each object that is written makes istiod work out and push configuration, so a change that concerns
//! thousands of fences is written no faster than this. Where writes wait, namespaces take turns, so that one with thousands of
//! them delays another's by one write.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Bound::{Excluded, Unbounded};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use prometheus_client::metrics::gauge::Gauge;
use tokio::sync::oneshot;
use tokio::time::Instant;

/// A second's worth may be written at once after a quiet time, divided by this.
const BURST: u32 = 10;

/// So many writes a second.
#[derive(Clone, Debug)]
pub struct Budget(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    state: Mutex<State>,
    waiting: Gauge,
}

#[derive(Debug)]
struct State {
    slots: Slots,
    /// The writes that wait, in their order, of each namespace.
    queues: BTreeMap<String, VecDeque<oneshot::Sender<()>>>,
    /// The namespace that had its turn last.
    last: String,
    /// Whether somebody gives turns.
    giving: bool,
}

/// The moments at which writes may be made.
#[derive(Debug)]
struct Slots {
    /// Between two writes.
    pause: Duration,
    next: Instant,
}

impl Slots {
    /// When the next write may be made; that moment is taken.
    fn take(&mut self, now: Instant) -> Instant {
        let burst = Duration::from_secs(1) / BURST;
        let earliest = now.checked_sub(burst).unwrap_or(now);
        let slot = self.next.max(earliest);
        self.next = slot + self.pause;
        slot
    }

    fn is_free(&self, now: Instant) -> bool {
        self.next <= now
    }
}

impl State {
    /// The first write of the namespace whose turn is next, of those that somebody still wants.
    fn pop(&mut self) -> Option<oneshot::Sender<()>> {
        loop {
            let after = (Excluded(self.last.clone()), Unbounded);
            let next = self.queues.range(after).next();
            let namespace = next.or_else(|| self.queues.iter().next())?.0.clone();
            let queue = self.queues.get_mut(&namespace)?;
            let write = queue.pop_front();
            if queue.is_empty() {
                self.queues.remove(&namespace);
            }
            self.last = namespace;
            if let Some(write) = write.filter(|write| !write.is_closed()) {
                return Some(write);
            }
        }
    }
}

/// Counts a write that waits.
struct Waits<'a>(&'a Gauge);

impl Drop for Waits<'_> {
    fn drop(&mut self) {
        self.0.dec();
    }
}

impl Budget {
    /// `waiting` counts the writes that wait.
    pub fn new(per_second: u32, waiting: Gauge) -> Self {
        let slots = Slots {
            pause: Duration::from_secs(1) / per_second.max(1),
            next: Instant::now(),
        };
        Self(Arc::new(Inner {
            state: Mutex::new(State {
                slots,
                queues: BTreeMap::new(),
                last: String::new(),
                giving: false,
            }),
            waiting,
        }))
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until a write for `namespace` may be made.
    pub async fn wait(&self, namespace: &str) {
        let Some(turn) = self.queue(namespace) else {
            return;
        };
        self.0.waiting.inc();
        let _waits = Waits(&self.0.waiting);
        // Whoever gives turns ends with the process.
        let _ = turn.await;
    }

    /// A place in the queue, unless the write may be made at once.
    fn queue(&self, namespace: &str) -> Option<oneshot::Receiver<()>> {
        let mut state = self.state();
        let now = Instant::now();
        if state.queues.is_empty() && state.slots.is_free(now) {
            state.slots.take(now);
            return None;
        }
        let (give, turn) = oneshot::channel();
        let queue = state.queues.entry(namespace.to_owned()).or_default();
        queue.push_back(give);
        if !state.giving {
            state.giving = true;
            tokio::spawn(self.clone().give());
        }
        Some(turn)
    }

    /// Gives turns until nobody waits.
    async fn give(self) {
        loop {
            let slot = {
                let mut state = self.state();
                if state.queues.is_empty() {
                    state.giving = false;
                    return;
                }
                state.slots.take(Instant::now())
            };
            tokio::time::sleep_until(slot).await;
            if let Some(write) = self.state().pop() {
                // Nobody waits for it any more.
                let _ = write.send(());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_storm_is_spread_and_a_few_are_not() {
        let start = Instant::now() + Duration::from_secs(10);
        let mut slots = Slots {
            pause: Duration::from_millis(10),
            next: Instant::now(),
        };
        let taken: Vec<Instant> = (0..110).map(|_| slots.take(start)).collect();
        let at_once = taken.iter().filter(|slot| **slot <= start).count();
        assert!((10..=11).contains(&at_once), "{at_once}");
        let last = taken[109] - start;
        assert!(
            (Duration::from_millis(980)..=Duration::from_millis(1000)).contains(&last),
            "{last:?}"
        );
        // After a quiet time there is no more to spend than before.
        let later = start + Duration::from_secs(60);
        let taken: Vec<Instant> = (0..20).map(|_| slots.take(later)).collect();
        assert!(taken[9] <= later && taken[12] > later);
    }

    #[tokio::test]
    async fn a_namespace_with_thousands_of_writes_delays_another_by_one() {
        let budget = Budget::new(100, Gauge::default());
        let storm: Vec<_> = (0..2000)
            .map(|_| {
                let budget = budget.clone();
                tokio::spawn(async move { budget.wait("evil").await })
            })
            .collect();
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert!(budget.0.waiting.get() > 1800);
        let started = Instant::now();
        budget.wait("shop").await;
        assert!(
            started.elapsed() < Duration::from_secs(2),
            "two turns of 10 ms"
        );
        // Nor does one that nobody waits for any more take a slot.
        storm.iter().for_each(tokio::task::JoinHandle::abort);
        tokio::time::sleep(Duration::from_millis(20)).await;
        let started = Instant::now();
        budget.wait("shop").await;
        assert!(started.elapsed() < Duration::from_secs(2));
        assert_eq!(budget.0.waiting.get(), 0);
    }
}
