//! Holding a first call until its host is in the caller's scope.
//!
//! When to answer: no fixed sleep. A call waits until the Sidecar that gives its host routes is stored, and then until the
//! caller's own proxy says that its listeners changed and that nothing warms ([`super::proxy`]); then it goes back. (Such a
//! Sidecar always changes a listener: [`crate::fence::stage`].) Whether the routes are there too is told by the replay
//! itself: if it was early it returns, and waits again. Where a proxy cannot be asked, time must do.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use fenceline_crds::FirstCall;
use tokio::sync::watch;

use super::first_call::Hold;
use super::proxy::{Eyes, Seen, State};
use crate::fence::plan::object_key;
use crate::fence::redirect::REDIRECTS;
use crate::fence::stage::routed;
use crate::metrics::Metrics;
use crate::world::World;

/// How often a proxy is looked at.
const LOOK: Duration = Duration::from_millis(5);
/// How long a stored Sidecar takes to be in force, where nobody can tell: istiod's debounce of 100 ms, and some.
const SETTLE: Duration = Duration::from_millis(250);
/// A call that returned goes back at once when its proxy changes a listener, and otherwise after a fourth of the time that
/// it has waited, so that any delay takes few attempts.
const AGAIN: Duration = Duration::from_millis(20);
/// Calls that were sent back and may return; more are taken for new ones if they do.
const REMEMBERED_CALLS: usize = 4096;

/// Holds calls, within bounds.
pub struct Holder {
    world: watch::Receiver<Arc<World>>,
    metrics: Arc<Metrics>,
    limits: Limits,
    eyes: Arc<Eyes>,
    held: Mutex<Held>,
}

/// How many calls may be held at any moment.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    pub per_caller: usize,
    pub in_all: usize,
}

#[derive(Default)]
struct Held {
    /// How many calls of each caller, and what they know of its proxy.
    callers: HashMap<IpAddr, (usize, Arc<Seen>)>,
    in_all: usize,
    /// Calls that were sent back unmarked, and when.
    answered: HashMap<u64, (Attempt, Instant)>,
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
    /// Which call it is.
    pub journey: u64,
}

impl Attempt {
    /// As the header `x-fenceline` carries it.
    pub fn parse(text: &str) -> Option<Self> {
        let mut parts = text.strip_prefix("again-")?.split('-');
        let attempt = Self {
            number: parts.next()?.parse().ok()?,
            until: parts.next()?.parse().ok()?,
            journey: u64::from_str_radix(parts.next()?, 16).ok()?,
        };
        parts.next().is_none().then_some(attempt)
    }
}

impl std::fmt::Display for Attempt {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self {
            number,
            until,
            journey,
        } = self;
        write!(f, "again-{number}-{until}-{journey:016x}")
    }
}

impl Holder {
    pub fn new(
        world: watch::Receiver<Arc<World>>,
        metrics: Arc<Metrics>,
        limits: Limits,
        eyes: Arc<Eyes>,
    ) -> Self {
        Self {
            world,
            metrics,
            limits,
            eyes,
            held: Mutex::default(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A call was sent back unmarked; it may return.
    pub fn remember(&self, next: Attempt) {
        let answered = &mut self.lock().answered;
        if answered.len() >= REMEMBERED_CALLS {
            answered.retain(|_, (_, since)| since.elapsed() < FirstCall::LONGEST);
        }
        if answered.len() < REMEMBERED_CALLS {
            answered.insert(next.journey, (next, Instant::now()));
        }
    }

    /// Where a call stands that has returned unmarked.
    pub fn answered(&self, journey: u64) -> Option<Attempt> {
        let (attempt, since) = self.lock().answered.remove(&journey)?;
        (since.elapsed() < FirstCall::LONGEST).then_some(attempt)
    }

    /// Holds a call for at most `rest`. `attempt` counts how often it was sent back before.
    pub async fn hold(&self, caller: IpAddr, hold: &Hold, attempt: u32, rest: Duration) -> Ended {
        let Some(place) = self.take_place(caller) else {
            return Ended::TooMany;
        };
        // The last answer is a redirect as well.
        if attempt + 2 > REDIRECTS {
            return Ended::TooLate;
        }
        let started = Instant::now();
        let patience = match attempt {
            0 => SETTLE,
            _ => AGAIN.max(hold.hold_for.saturating_sub(rest) / 4),
        };
        let ready = async {
            let mut before = place.look().await;
            if self.until_stored(hold).await {
                before = place.look().await;
            }
            place.until_arrived(before, patience).await;
        };
        match tokio::time::timeout(rest, ready).await {
            Ok(()) => {
                let took = started.elapsed().as_secs_f64();
                self.metrics.held_for.observe(took);
                Ended::InScope
            }
            Err(_) => Ended::TooLate,
        }
    }

    /// Whether it was necessary to wait.
    async fn until_stored(&self, hold: &Hold) -> bool {
        let mut world = self.world.clone();
        let mut waited = false;
        while !in_scope(&world.borrow_and_update(), hold) {
            waited = true;
            if world.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
        waited
    }

    fn take_place(&self, caller: IpAddr) -> Option<Place<'_>> {
        let mut held = self.lock();
        let Held {
            callers, in_all, ..
        } = &mut *held;
        let of_caller = callers.get(&caller).map_or(0, |(count, _)| *count);
        if of_caller >= self.limits.per_caller || *in_all >= self.limits.in_all {
            return None;
        }
        let (count, seen) = callers.entry(caller).or_default();
        *count += 1;
        *in_all += 1;
        self.metrics.held.inc();
        Some(Place {
            holder: self,
            caller,
            seen: Arc::clone(seen),
        })
    }
}

/// A call's place among those that are held; given back when the call is answered or its caller hangs up.
struct Place<'a> {
    holder: &'a Holder,
    caller: IpAddr,
    seen: Arc<Seen>,
}

impl Place<'_> {
    async fn look(&self) -> Option<State> {
        self.holder.eyes.look(self.caller, &self.seen).await
    }

    /// Waits until the listeners of the caller's proxy have changed since `before`, or `patience` is over; and until nothing
    /// warms that did not before.
    async fn until_arrived(&self, before: Option<State>, patience: Duration) {
        let since = Instant::now();
        while let (Some(before), Some(now)) = (before, self.look().await) {
            let patient = since.elapsed() < patience;
            let warm = now.warming == 0 || (!patient && now.warming <= before.warming);
            if warm && (now.listeners > before.listeners || !patient) {
                return;
            }
            tokio::time::sleep(LOOK).await;
        }
        // It cannot be asked.
        tokio::time::sleep(patience.saturating_sub(since.elapsed())).await;
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        let mut held = self.holder.lock();
        held.in_all -= 1;
        if let Some((count, _)) = held.callers.get_mut(&self.caller) {
            *count -= 1;
            if *count == 0 {
                held.callers.remove(&self.caller);
            }
        }
        self.holder.metrics.held.dec();
    }
}

/// Whether every fence's stored Sidecar gives the host routes.
fn in_scope(world: &World, hold: &Hold) -> bool {
    let host = hold.host.to_string();
    hold.fences.iter().all(|fence| {
        let key = object_key(fence);
        // No Sidecar: the fence is on its way out, or in; the replay tells.
        let sidecar = world.sidecars.get(&key);
        sidecar.is_none_or(|sidecar| routed(&sidecar.spec).contains(&host))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mark_survives_the_journey() {
        let attempt = Attempt {
            number: 3,
            until: 1_800_000_000_123,
            journey: 0xfeed,
        };
        assert_eq!(Attempt::parse(&attempt.to_string()), Some(attempt));
        for junk in [
            "",
            "again",
            "again-",
            "again-x-1",
            "again-1",
            "again-1-2",
            "again-1-2-3-4",
            "again--1-1",
            "pass",
        ] {
            assert_eq!(Attempt::parse(junk), None, "{junk}");
        }
    }

    fn holder(per_caller: usize, in_all: usize) -> Holder {
        let (_, world) = watch::channel(Arc::new(World::new("cluster.local")));
        let limits = Limits { per_caller, in_all };
        Holder::new(world, Arc::default(), limits, Arc::default())
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
    fn a_call_that_returns_is_known_once() {
        let holder = holder(1, 1);
        let attempt = Attempt {
            number: 1,
            until: 9,
            journey: 7,
        };
        holder.remember(attempt);
        assert_eq!(holder.answered(7), Some(attempt));
        assert_eq!(holder.answered(7), None);
    }
}
