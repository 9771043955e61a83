//! What one service account may cost us by what it reports: so many streams, and so many connections a second, for each pod that it
//! has. Streams come by our own sidecar, which does not say of which pod they are.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::identity::Identity;
use crate::fence::select::pods_in;
use crate::world::World;

/// A proxy has a stream for each of its threads, of which there are as many as processors where nobody says otherwise.
pub const STREAMS_PER_POD: usize = 16;
/// For how long what was spent is remembered of those who are gone.
const REMEMBERED: Duration = Duration::from_secs(2);

/// Everybody who reports.
#[derive(Debug)]
pub struct Reporters {
    /// For each pod.
    per_second: u32,
    all: Mutex<HashMap<Identity, Reporter>>,
}

#[derive(Debug)]
struct Reporter {
    streams: usize,
    bucket: Bucket,
}

/// Tokens for one second at most.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Bucket {
    tokens: f64,
    at: Instant,
}

impl Bucket {
    fn full(per_second: f64, now: Instant) -> Self {
        Self {
            tokens: per_second,
            at: now,
        }
    }

    /// As many of those that are wanted as there are tokens.
    #[expect(
        clippy::cast_precision_loss,
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "entries of a message, and tokens that are no fewer than none"
    )]
    fn take(&mut self, wanted: usize, per_second: f64, now: Instant) -> usize {
        let passed = now.saturating_duration_since(self.at).as_secs_f64();
        self.tokens = (self.tokens + passed * per_second).min(per_second);
        self.at = now;
        let taken = (wanted as f64).min(self.tokens.floor());
        self.tokens -= taken;
        taken as usize
    }
}

/// One stream; it is counted until it is dropped.
#[derive(Debug)]
pub struct Pass {
    reporters: Arc<Reporters>,
    who: Identity,
}

impl Drop for Pass {
    fn drop(&mut self) {
        if let Some(reporter) = self.reporters.lock().get_mut(&self.who) {
            reporter.streams = reporter.streams.saturating_sub(1);
        }
    }
}

impl Reporters {
    pub fn new(per_second: u32) -> Self {
        Self {
            per_second,
            all: Mutex::default(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Identity, Reporter>> {
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }

    #[expect(clippy::cast_precision_loss, reason = "a number of pods")]
    fn rate(&self, pods: usize) -> f64 {
        f64::from(self.per_second) * pods.max(1) as f64
    }

    /// A stream of somebody's who has so many pods; nothing where there are too many already.
    pub fn enter(self: &Arc<Self>, who: &Identity, pods: usize, now: Instant) -> Option<Pass> {
        let mut all = self.lock();
        all.retain(|_, reporter| {
            reporter.streams > 0 || now.saturating_duration_since(reporter.bucket.at) < REMEMBERED
        });
        let reporter = all.entry(who.clone()).or_insert_with(|| Reporter {
            streams: 0,
            bucket: Bucket::full(self.rate(pods), now),
        });
        if reporter.streams >= STREAMS_PER_POD * pods.max(1) {
            return None;
        }
        reporter.streams += 1;
        Some(Pass {
            reporters: Arc::clone(self),
            who: who.clone(),
        })
    }
}

impl Pass {
    /// How many of so many entries are looked at.
    pub fn admits(&self, entries: usize, pods: usize, now: Instant) -> usize {
        let rate = self.reporters.rate(pods);
        let mut all = self.reporters.lock();
        all.get_mut(&self.who)
            .map_or(0, |reporter| reporter.bucket.take(entries, rate, now))
    }
}

/// How many pods run as somebody.
pub fn pods_of(world: &World, who: &Identity) -> usize {
    pods_in(world, &who.namespace)
        .filter(|pod| pod.runs && pod.service_account == who.service_account)
        .count()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn cart() -> Identity {
        Identity::parse("spiffe://cluster.local/ns/shop/sa/cart").unwrap()
    }

    #[test]
    fn each_pod_reports_so_much_and_no_more() {
        let reporters = Arc::new(Reporters::new(100));
        let now = Instant::now();
        let pass = reporters.enter(&cart(), 2, now).unwrap();
        assert_eq!(pass.admits(150, 2, now), 150);
        assert_eq!(pass.admits(51, 2, now), 50, "two pods have 200");
        assert_eq!(pass.admits(1, 2, now), 0);
        assert_eq!(pass.admits(1000, 2, now + SECOND / 4), 50);
        assert_eq!(
            pass.admits(1000, 2, now + SECOND * 60),
            200,
            "no more is saved up"
        );
        let other = Identity {
            namespace: "bank".to_owned(),
            ..cart()
        };
        let other = reporters.enter(&other, 1, now).unwrap();
        assert_eq!(other.admits(100, 1, now), 100, "nobody pays for another");
    }

    #[test]
    fn streams_are_counted_and_a_new_one_brings_no_new_tokens() {
        let reporters = Arc::new(Reporters::new(100));
        let now = Instant::now();
        let mut passes: Vec<Pass> = (0..STREAMS_PER_POD)
            .filter_map(|_| reporters.enter(&cart(), 1, now))
            .collect();
        assert_eq!(passes.len(), STREAMS_PER_POD);
        assert!(reporters.enter(&cart(), 1, now).is_none());
        assert!(
            reporters.enter(&cart(), 2, now).is_some(),
            "another pod, more streams"
        );
        assert_eq!(passes[0].admits(100, 1, now), 100);
        passes.clear();
        let again = reporters.enter(&cart(), 1, now).unwrap();
        assert_eq!(again.admits(100, 1, now), 0);
        drop(again);
        let later = reporters.enter(&cart(), 1, now + SECOND * 3).unwrap();
        assert_eq!(later.admits(100, 1, now + SECOND * 3), 100);
        assert_eq!(reporters.lock().len(), 1);
    }
}
