//! Holding a first call until its host is in the caller's scope.
//!
//! When to answer: no fixed sleep, and nobody to ask. istiod knows what it sent, not what the caller's Envoy routes by; the
//! replay itself is the one true test. So a call waits until the Sidecar with its host is stored, then as long as such
//! changes lately took to arrive, and goes back. If that was too early it returns, a few milliseconds later, and we are
//! more patient with the next. How long changes take is learnt from that: up when a call returns, down when it does not.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::watch;

use super::first_call::Hold;
use crate::fence::plan::object_name;
use crate::fence::redirect::REDIRECTS;
use crate::metrics::Metrics;
use crate::world::{Host, Key, World};

/// istiod's own debounce: what to expect before anything was seen.
const EXPECTED: Duration = Duration::from_millis(100);
const LEAST: Duration = Duration::from_millis(5);
const MOST: Duration = Duration::from_secs(2);
/// Of three calls, one may return too early: that costs it some milliseconds, and patience costs all of them.
const EARLIER: Duration = Duration::from_millis(2);
const LATER: Duration = Duration::from_millis(4);
/// A call that returned is sent back after a fourth of the time it has waited, so that any delay takes few attempts.
const AGAIN: Duration = Duration::from_millis(8);
/// When a host came into scope is remembered this long.
const REMEMBERED: Duration = Duration::from_secs(30);

/// Holds calls, within bounds.
pub struct Holder {
    world: watch::Receiver<Arc<World>>,
    metrics: Arc<Metrics>,
    limits: Limits,
    held: Mutex<Held>,
    expected_us: AtomicU64,
}

/// How many calls may be held at any moment.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    pub per_caller: usize,
    pub in_all: usize,
}

#[derive(Default)]
struct Held {
    callers: HashMap<IpAddr, usize>,
    in_all: usize,
    /// When Sidecars with these hosts were first seen.
    in_scope: HashMap<(Key, Host), Instant>,
}

/// How holding ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// Send the call back.
    InScope,
    TooLate,
    TooMany,
}

/// Where a call stands that has come back: how often it was sent back, and until when it may be held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attempt {
    pub number: u32,
    /// Milliseconds since 1970.
    pub until: u64,
}

impl Attempt {
    /// As the header `x-fenceline` carries it.
    pub fn parse(text: &str) -> Option<Self> {
        let (number, until) = text.strip_prefix("again-")?.split_once('-')?;
        let (number, until) = (number.parse().ok()?, until.parse().ok()?);
        Some(Self { number, until })
    }
}

impl std::fmt::Display for Attempt {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "again-{}-{}", self.number, self.until)
    }
}

impl Holder {
    pub fn new(world: watch::Receiver<Arc<World>>, metrics: Arc<Metrics>, limits: Limits) -> Self {
        Self {
            world,
            metrics,
            limits,
            held: Mutex::default(),
            expected_us: AtomicU64::new(micros(EXPECTED)),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Holds a call for at most `rest`. `attempt` counts how often it was sent back before.
    pub async fn hold(&self, caller: IpAddr, hold: &Hold, attempt: u32, rest: Duration) -> Ended {
        let Some(_place) = self.take_place(caller) else {
            return Ended::TooMany;
        };
        if attempt == 1 {
            self.expect(LATER, true);
        }
        // The last answer is a redirect as well.
        if attempt + 2 > REDIRECTS {
            return Ended::TooLate;
        }
        let started = Instant::now();
        let ready = async {
            let since = self.until_stored(hold).await;
            tokio::time::sleep(self.patience(hold, attempt, rest, since)).await;
        };
        match tokio::time::timeout(rest, ready).await {
            Ok(()) => {
                if attempt == 0 {
                    self.expect(EARLIER, false);
                }
                self.metrics
                    .held_for
                    .observe(started.elapsed().as_secs_f64());
                Ended::InScope
            }
            Err(_) => Ended::TooLate,
        }
    }

    /// Waits until every fence's Sidecar has the host. Returns when that was first seen, if it was seen to happen.
    async fn until_stored(&self, hold: &Hold) -> Option<Instant> {
        let mut world = self.world.clone();
        let mut waited = false;
        while !in_scope(&world.borrow_and_update(), hold) {
            waited = true;
            if world.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
        let fence = hold.fences.first()?;
        let mut held = self.lock();
        let Held { in_scope, .. } = &mut *held;
        let key = (fence.clone(), hold.host.clone());
        if waited {
            in_scope.retain(|_, since| since.elapsed() < REMEMBERED);
            in_scope.entry(key).or_insert_with(Instant::now);
            return in_scope.get(&(fence.clone(), hold.host.clone())).copied();
        }
        in_scope.get(&key).copied()
    }

    /// How much longer a call waits whose host is in a stored Sidecar.
    fn patience(
        &self,
        hold: &Hold,
        attempt: u32,
        rest: Duration,
        since: Option<Instant>,
    ) -> Duration {
        let expected = Duration::from_micros(self.expected_us.load(Ordering::Relaxed));
        match (attempt, since) {
            (0, Some(since)) => expected.saturating_sub(since.elapsed()),
            // Nothing to be stored, or it was stored before we looked: the replay tells.
            (0, None) if !hold.fences.is_empty() => Duration::ZERO,
            (0, None) => expected,
            _ => AGAIN.max(hold.hold_for.saturating_sub(rest) / 4),
        }
    }

    fn expect(&self, step: Duration, later: bool) {
        let step = micros(step);
        let adjust = |expected: u64| {
            let next = if later {
                expected.saturating_add(step)
            } else {
                expected.saturating_sub(step)
            };
            Some(next.clamp(micros(LEAST), micros(MOST)))
        };
        // The closure never declines.
        let _ = self
            .expected_us
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, adjust);
    }

    fn take_place(&self, caller: IpAddr) -> Option<Place<'_>> {
        let mut held = self.lock();
        let Held {
            callers, in_all, ..
        } = &mut *held;
        let of_caller = callers.get(&caller).copied().unwrap_or_default();
        if of_caller >= self.limits.per_caller || *in_all >= self.limits.in_all {
            return None;
        }
        callers.insert(caller, of_caller + 1);
        *in_all += 1;
        self.metrics.held.inc();
        Some(Place {
            holder: self,
            caller,
        })
    }
}

/// A call's place among those that are held; given back when the call is answered or its caller hangs up.
struct Place<'a> {
    holder: &'a Holder,
    caller: IpAddr,
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        let mut held = self.holder.lock();
        held.in_all -= 1;
        if let Some(of_caller) = held.callers.get_mut(&self.caller) {
            *of_caller -= 1;
            if *of_caller == 0 {
                held.callers.remove(&self.caller);
            }
        }
        self.holder.metrics.held.dec();
    }
}

/// Whether every fence's stored Sidecar has the host.
fn in_scope(world: &World, hold: &Hold) -> bool {
    let host = hold.host.to_string();
    hold.fences.iter().all(|fence| {
        let key = Key::new(&*fence.namespace, object_name(&fence.name));
        // No Sidecar: the fence is on its way out, or in; the replay tells.
        world.sidecars.get(&key).is_none_or(|sidecar| {
            sidecar
                .spec
                .egress
                .iter()
                .flat_map(|listener| &listener.hosts)
                .any(|known| *known == host)
        })
    })
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mark_survives_the_journey() {
        let attempt = Attempt {
            number: 3,
            until: 1_800_000_000_123,
        };
        assert_eq!(Attempt::parse(&attempt.to_string()), Some(attempt));
        for junk in [
            "",
            "again",
            "again-",
            "again-x-1",
            "again-1",
            "again--1-1",
            "pass",
        ] {
            assert_eq!(Attempt::parse(junk), None, "{junk}");
        }
    }

    fn holder(per_caller: usize, in_all: usize) -> Holder {
        let (_, world) = watch::channel(Arc::new(World::new("cluster.local")));
        let limits = Limits { per_caller, in_all };
        Holder::new(world, Arc::default(), limits)
    }

    #[test]
    fn one_caller_cannot_take_every_place() {
        let holder = holder(2, 3);
        let (a, b) = ("10.0.0.1".parse().unwrap(), "10.0.0.2".parse().unwrap());
        let first = holder.take_place(a);
        let second = holder.take_place(a);
        assert!(first.is_some() && second.is_some());
        assert!(holder.take_place(a).is_none());
        let third = holder.take_place(b);
        assert!(third.is_some());
        assert!(holder.take_place(b).is_none(), "three in all");
        drop(first);
        assert!(holder.take_place(b).is_some());
        drop((second, third));
        assert!(holder.lock().callers.is_empty() && holder.lock().in_all == 0);
    }

    #[test]
    fn patience_follows_what_happens_and_has_its_bounds() {
        let holder = holder(1, 1);
        let expected = || Duration::from_micros(holder.expected_us.load(Ordering::Relaxed));
        holder.expect(LATER, true);
        assert_eq!(expected(), EXPECTED + LATER);
        for _ in 0..1000 {
            holder.expect(EARLIER, false);
        }
        assert_eq!(expected(), LEAST);
        for _ in 0..1000 {
            holder.expect(LATER, true);
        }
        assert_eq!(expected(), MOST);
    }
}
