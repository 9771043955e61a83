//! Learning: what was seen becomes durable in the fence's status, whichever replica saw it.
//!
//! Nothing polls: the first new host of a fence starts a short wait for company ([`COALESCE`]), then one write takes
//! all of them. What cannot be written is kept and tried again.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use fenceline_crds::{
    Evidence, LearntDependency, ServiceFence, ServiceFenceStatus, UnresolvedHost,
};
use jiff::{SignedDuration, Timestamp, Unit};
use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;

use super::Settings;
use super::retain::unused_for;
use super::said::foreseen;
use crate::clock::Clock;
use crate::metrics::Metrics;
use crate::observe::resolve::{Unresolved, host_of};
use crate::status::StatusWriter;
use crate::world::{Key, World};

/// How long the first new host of a fence waits for others.
pub const COALESCE: Duration = Duration::from_millis(20);
/// `lastSeen` is kept to the hour: it costs a write.
const FRESH: SignedDuration = SignedDuration::from_hours(1);
/// Where nothing is ever forgotten, to the day.
const RARELY: SignedDuration = SignedDuration::from_hours(24);
/// How many unresolved names a fence shows.
const SHOWN: usize = 8;
/// Unresolved names alone are written at most this often for each fence: whoever forges names must not make us write.
const UNRESOLVED_EVERY: Duration = Duration::from_secs(60);
/// How long a failed write waits for its next attempt.
const RETRY: Duration = Duration::from_millis(500);
/// Hosts whose learning is timed at any moment; more are learnt untimed.
const TIMED: usize = 16_384;

/// When a host was called, and who says so.
#[derive(Clone, Debug)]
struct Sighting {
    at: Timestamp,
    evidence: BTreeSet<Evidence>,
}

/// What there is to write for one fence.
#[derive(Clone, Debug, Default)]
struct Pending {
    hosts: BTreeMap<String, Sighting>,
    /// The youngest last; bounded.
    unresolved: VecDeque<UnresolvedHost>,
}

#[derive(Default)]
struct Inbox {
    pending: HashMap<Key, Pending>,
    /// When unresolved names of a fence were last written.
    shown: HashMap<Key, Instant>,
    /// When each host that is being learnt was first reported.
    since: HashMap<(Key, String), Instant>,
}

/// Takes in what was seen and writes it.
pub struct Learner {
    inbox: Mutex<Inbox>,
    wake: Notify,
    status: Arc<StatusWriter>,
    world: watch::Receiver<Arc<World>>,
    settings: Settings,
    metrics: Arc<Metrics>,
    clock: Clock,
}

/// What became of an observation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Noted {
    /// New, or seen again after an hour: it will be written.
    Learnt,
    /// Nothing to write.
    Known,
}

impl Noted {
    /// The outcome, as metrics show it.
    pub fn outcome(self) -> &'static str {
        match self {
            Self::Learnt => "learnt",
            Self::Known => "known",
        }
    }
}

impl Learner {
    pub fn new(
        status: Arc<StatusWriter>,
        world: watch::Receiver<Arc<World>>,
        settings: Settings,
        metrics: Arc<Metrics>,
        clock: Clock,
    ) -> Arc<Self> {
        let (inbox, wake) = (Mutex::default(), Notify::new());
        Arc::new(Self {
            inbox,
            wake,
            status,
            world,
            settings,
            metrics,
            clock,
        })
    }

    fn inbox(&self) -> std::sync::MutexGuard<'_, Inbox> {
        self.inbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The workloads of all these fences called a host. It is new if it is to one of them.
    pub fn all_saw<'a>(
        &self,
        world: &World,
        fences: impl IntoIterator<Item = &'a Key>,
        fqdn: &str,
        evidence: Evidence,
        received: Instant,
    ) -> Noted {
        let mut all = Noted::Known;
        for fence in fences {
            if self.saw(world, fence, fqdn, evidence, received) == Noted::Learnt {
                all = Noted::Learnt;
            }
        }
        all
    }

    /// A fence's workload called a host; `received` is when we were told.
    pub fn saw(
        &self,
        world: &World,
        fence: &Key,
        fqdn: &str,
        evidence: Evidence,
        received: Instant,
    ) -> Noted {
        // Seconds are enough for people to read.
        let now = (self.clock)().round(Unit::Second).unwrap_or_default();
        let known = world.fences.get(fence).is_none_or(|fence| {
            !fence.spec.believes(evidence) || is_known(fence, fqdn, evidence, now)
        });
        if known {
            return Noted::Known;
        }
        let mut inbox = self.inbox();
        inbox
            .pending
            .entry(fence.clone())
            .or_default()
            .hosts
            .entry(fqdn.to_owned())
            .or_insert_with(|| Sighting {
                at: now,
                evidence: BTreeSet::new(),
            })
            .evidence
            .insert(evidence);
        if inbox.since.len() >= TIMED {
            // Of fences that are not in force; nobody will ask.
            inbox
                .since
                .retain(|_, since| since.elapsed() < UNRESOLVED_EVERY);
        }
        if inbox.since.len() < TIMED {
            inbox
                .since
                .entry((fence.clone(), fqdn.to_owned()))
                .or_insert(received);
        }
        drop(inbox);
        self.wake.notify_one();
        Noted::Learnt
    }

    /// A fence's workload called a name that nothing answers to. Bounded, whatever is called.
    pub fn saw_unresolved(&self, fence: &Key, name: &str, why: Unresolved) {
        let name = host_of(name).unwrap_or_else(|| name.to_owned());
        let host: String = name.chars().filter(|c| !c.is_control()).take(253).collect();
        let entry = UnresolvedHost {
            host,
            reason: why.reason().to_owned(),
        };
        let mut inbox = self.inbox();
        let unresolved = &mut inbox.pending.entry(fence.clone()).or_default().unresolved;
        unresolved.retain(|old| *old != entry);
        unresolved.push_back(entry);
        while unresolved.len() > SHOWN {
            unresolved.pop_front();
        }
        drop(inbox);
        self.wake.notify_one();
    }

    /// A Sidecar with these hosts was stored: the clock of those that were just learnt stops.
    pub fn stored<'a>(&self, fence: &Key, hosts: impl Iterator<Item = &'a str>) {
        let mut inbox = self.inbox();
        if inbox.since.is_empty() {
            return;
        }
        for host in hosts {
            if let Some(since) = inbox.since.remove(&(fence.clone(), host.to_owned())) {
                let took = since.elapsed();
                if took > UNRESOLVED_EVERY {
                    // Learnt while another replica acted.
                    continue;
                }
                let took_us = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
                self.metrics.learning.observe(took.as_secs_f64());
                tracing::info!(%fence, host, took_us, "in scope");
            }
        }
    }

    /// Writes what comes in, for ever.
    pub async fn run(self: Arc<Self>) {
        loop {
            self.wake.notified().await;
            loop {
                tokio::time::sleep(COALESCE).await;
                let (due, later) = self.due();
                let failed = self.write(due).await;
                if failed {
                    tokio::time::sleep(RETRY).await;
                } else if let Some(later) = later {
                    // Names that may not be shown yet; anything new comes first.
                    tokio::select! {
                        () = tokio::time::sleep(later) => {}
                        () = self.wake.notified() => {}
                    }
                } else {
                    break;
                }
            }
        }
    }

    /// Waits until every host that was seen is stored.
    pub async fn flush(&self) {
        let waiting = || {
            self.inbox()
                .pending
                .values()
                .any(|pending| !pending.hosts.is_empty())
        };
        while waiting() || self.metrics.waiting.get() > 0.0 {
            tokio::time::sleep(COALESCE).await;
        }
    }

    /// Takes what may be written now; says when something else may.
    fn due(&self) -> (HashMap<Key, Pending>, Option<Duration>) {
        let mut inbox = self.inbox();
        let Inbox { pending, shown, .. } = &mut *inbox;
        shown.retain(|_, since| since.elapsed() < UNRESOLVED_EVERY);
        let mut due = HashMap::new();
        let mut later: Option<Duration> = None;
        for (fence, mut waiting) in std::mem::take(pending) {
            let wait = shown
                .get(&fence)
                .map(|since| UNRESOLVED_EVERY.saturating_sub(since.elapsed()));
            match wait {
                None => {
                    if !waiting.unresolved.is_empty() {
                        shown.insert(fence.clone(), Instant::now());
                    }
                    due.insert(fence, waiting);
                }
                Some(wait) => {
                    let unresolved = std::mem::take(&mut waiting.unresolved);
                    if !unresolved.is_empty() {
                        later = Some(later.map_or(wait, |later| later.min(wait)));
                        let kept = Pending {
                            unresolved,
                            ..Pending::default()
                        };
                        pending.insert(fence.clone(), kept);
                    }
                    if !waiting.hosts.is_empty() {
                        due.insert(fence, waiting);
                    }
                }
            }
        }
        // Before the inbox is open again: whoever flushes must not find everything empty.
        let hosts: usize = due.values().map(|pending| pending.hosts.len()).sum();
        #[expect(clippy::cast_precision_loss, reason = "a gauge")]
        self.metrics.waiting.set(hosts as f64);
        (due, later)
    }

    /// Writes all that is due, the fences side by side. Says whether something has to be tried again.
    async fn write(self: &Arc<Self>, due: HashMap<Key, Pending>) -> bool {
        let mut writes = JoinSet::new();
        for (fence, pending) in due {
            let learner = Arc::clone(self);
            let world = self.world.borrow().clone();
            writes.spawn(async move {
                let change = |fence: &ServiceFence| {
                    let mut fence = fence.clone();
                    fence.status = Some(merge(&fence, &pending));
                    foreseen(&fence, &world, &learner.settings, (learner.clock)())
                };
                let result = learner.status.update(&world, &fence, change).await;
                result.map_err(|error| (fence, pending, error))
            });
        }
        let mut failed = false;
        while let Some(written) = writes.join_next().await {
            let Ok(Err((fence, pending, error))) = written else {
                continue;
            };
            let error = crate::chain(&error);
            tracing::warn!(%fence, error, "what was learnt is not stored yet; trying again");
            failed = true;
            let mut inbox = self.inbox();
            let kept = inbox.pending.entry(fence).or_default();
            for (host, seen) in pending.hosts {
                kept.hosts.entry(host).or_insert(seen);
            }
        }
        if !failed {
            self.metrics.waiting.set(0.0);
        }
        failed
    }
}

fn is_known(fence: &ServiceFence, fqdn: &str, evidence: Evidence, now: Timestamp) -> bool {
    let fresh = freshness(fence, evidence);
    let learnt = fence.status.iter().flat_map(|status| &status.dependencies);
    let mut same = learnt.filter(|learnt| learnt.host == fqdn);
    same.any(|learnt| {
        let lately = |last: Timestamp| now.duration_since(last) < fresh;
        learnt.evidence.contains(&evidence) && learnt.last_seen.is_some_and(lately)
    })
}

/// How old `lastSeen` may get before it is written again. What goes direct is seen all the time, and it matters to
/// `retention` alone.
fn freshness(fence: &ServiceFence, evidence: Evidence) -> SignedDuration {
    match unused_for(fence) {
        Some(unused_for) => (unused_for / 4).min(FRESH),
        None if evidence == Evidence::GlobalProxy => FRESH,
        None => RARELY,
    }
}

/// The fence's status with what was seen.
fn merge(fence: &ServiceFence, pending: &Pending) -> ServiceFenceStatus {
    let mut status = fence.status.clone().unwrap_or_default();
    for (host, seen) in &pending.hosts {
        let fresh = seen.evidence.iter().map(|kind| freshness(fence, *kind));
        let fresh = fresh.min().unwrap_or(FRESH);
        match status
            .dependencies
            .iter_mut()
            .find(|learnt| learnt.host == *host)
        {
            Some(learnt) => {
                let lately = |last: Timestamp| seen.at.duration_since(last) < fresh;
                if !learnt.last_seen.is_some_and(lately) {
                    learnt.last_seen = Some(seen.at);
                }
                for evidence in &seen.evidence {
                    if !learnt.evidence.contains(evidence) {
                        learnt.evidence.push(*evidence);
                    }
                }
            }
            None => status.dependencies.push(LearntDependency {
                host: host.clone(),
                evidence: seen.evidence.iter().copied().collect(),
                first_seen: seen.at,
                last_seen: Some(seen.at),
            }),
        }
    }
    status.dependencies.sort_by(|a, b| a.host.cmp(&b.host));
    // Names that are shown already stay where they are: to be called again is no news.
    let shown: BTreeSet<String> = status
        .unresolved
        .iter()
        .map(|entry| entry.host.clone())
        .collect();
    let new = pending
        .unresolved
        .iter()
        .filter(|entry| !shown.contains(&entry.host));
    status.unresolved.extend(new.cloned());
    let excess = status.unresolved.len().saturating_sub(SHOWN);
    status.unresolved.drain(..excess);
    status
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::fence;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    fn seen(hosts: &[&str], second: i64) -> Pending {
        let hosts = hosts
            .iter()
            .map(|host| {
                let sighting = Sighting {
                    at: at(second),
                    evidence: [Evidence::GlobalProxy].into(),
                };
                ((*host).to_owned(), sighting)
            })
            .collect();
        Pending {
            hosts,
            ..Pending::default()
        }
    }

    #[test]
    fn learning_adds_and_never_takes_away() {
        let mut cart = fence("shop", "cart", "{}");
        cart.status = Some(merge(&cart, &seen(&["b", "a"], 0)));
        cart.status = Some(merge(&cart, &seen(&["c"], 10)));
        let status = cart.status.clone().unwrap();
        let hosts: Vec<&str> = status
            .dependencies
            .iter()
            .map(|d| d.host.as_str())
            .collect();
        assert_eq!(hosts, ["a", "b", "c"]);
        // Seen again within the hour: nothing to write.
        assert_eq!(merge(&cart, &seen(&["a"], 3599)), status);
        assert!(is_known(&cart, "a", Evidence::GlobalProxy, at(3599)));
        let later = merge(&cart, &seen(&["a"], 3600));
        assert_eq!(later.dependencies[0].last_seen, Some(at(3600)));
        assert_eq!(later.dependencies[0].first_seen, at(0));
    }

    #[test]
    fn unresolved_names_are_few_and_the_youngest() {
        let mut cart = fence("shop", "cart", "{}");
        for number in 0..100 {
            let entry = UnresolvedHost {
                host: format!("junk-{number}"),
                reason: "x".into(),
            };
            let pending = Pending {
                unresolved: [entry].into(),
                ..Pending::default()
            };
            cart.status = Some(merge(&cart, &pending));
        }
        let unresolved = cart.status.unwrap().unresolved;
        assert_eq!(unresolved.len(), SHOWN);
        assert_eq!(unresolved[SHOWN - 1].host, "junk-99");
    }
}
