//! A write budget: each object that is written makes istiod work out and push configuration, so a change that concerns
//! thousands of fences is written no faster than this.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use prometheus_client::metrics::gauge::Gauge;

/// A second's worth may be written at once after a quiet time, divided by this.
const BURST: u32 = 10;

/// So many writes a second, in the order in which they were asked for.
#[derive(Debug)]
pub struct Budget {
    /// Between two writes.
    pause: Duration,
    next: Mutex<Instant>,
    waiting: Gauge,
}

impl Budget {
    /// `waiting` counts the writes that wait.
    pub fn new(per_second: u32, waiting: Gauge) -> Self {
        Self {
            pause: Duration::from_secs(1) / per_second.max(1),
            next: Mutex::new(Instant::now()),
            waiting,
        }
    }

    /// When the next write may be made; that moment is taken.
    fn take(&self, now: Instant) -> Instant {
        let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        let burst = Duration::from_secs(1) / BURST;
        let earliest = now.checked_sub(burst).unwrap_or(now);
        let slot = (*next).max(earliest);
        *next = slot + self.pause;
        slot
    }

    /// Waits until a write may be made.
    pub async fn wait(&self) {
        let now = Instant::now();
        let slot = self.take(now);
        if slot > now {
            self.waiting.inc();
            tokio::time::sleep_until(slot.into()).await;
            self.waiting.dec();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_storm_is_spread_and_a_few_are_not() {
        let budget = Budget::new(100, Gauge::default());
        let start = Instant::now() + Duration::from_secs(10);
        let slots: Vec<Instant> = (0..110).map(|_| budget.take(start)).collect();
        let at_once = slots.iter().filter(|slot| **slot <= start).count();
        assert!((10..=11).contains(&at_once), "{at_once}");
        let last = slots[109] - start;
        assert!(
            (Duration::from_millis(980)..=Duration::from_millis(1000)).contains(&last),
            "{last:?}"
        );
        // After a quiet time there is no more to spend than before.
        let later = start + Duration::from_secs(60);
        let slots: Vec<Instant> = (0..20).map(|_| budget.take(later)).collect();
        assert!(slots[9] <= later && slots[12] > later);
    }
}
