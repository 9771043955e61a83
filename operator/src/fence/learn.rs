//! Learning: what was seen becomes durable in the fence's status, whichever replica saw it.
//!
//! Nothing polls: the first new host of a fence starts a short wait for company ([`COALESCE`]), then one write takes
//! all of them. What cannot be written is kept and tried again. No fence waits for another one's write.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use fenceline_crds::{Evidence, ServiceFence, UnresolvedHost};
use jiff::Unit;
use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;

use super::Settings;
use super::learnt::{Pending, SHOWN, Sighting, has_room, is_known, merge};
use super::said::foreseen;
use crate::clock::Clock;
use crate::metrics::Metrics;
use crate::observe::resolve::{Unresolved, host_of};
use crate::status::StatusWriter;
use crate::world::{Key, World};

/// How long the first new host of a fence waits for others.
pub const COALESCE: Duration = Duration::from_millis(20);
/// Unresolved names alone are written at most this often for each fence: whoever forges names must not make us write.
const UNRESOLVED_EVERY: Duration = Duration::from_secs(60);
/// How long a failed write of a fence waits for its next attempt, twice as long each time.
const RETRY: Duration = Duration::from_millis(500);
const LONGEST_RETRY: Duration = Duration::from_secs(60);
/// The bound, as metrics name it.
const LEARNT_HOSTS: &str = "learnt_hosts";
/// Hosts whose learning is timed at any moment; more are learnt untimed.
const TIMED: usize = 16_384;

/// A write that failed.
#[derive(Clone, Copy, Debug)]
struct Failed {
    attempts: u32,
    again: Instant,
}

#[derive(Default)]
struct Inbox {
    pending: HashMap<Key, Pending>,
    /// The fences that are being written, and how many hosts of each.
    writing: HashMap<Key, usize>,
    failed: HashMap<Key, Failed>,
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
    /// New, and the fence has learnt as many hosts as it can: calls to it stay first calls.
    Full,
}

impl Noted {
    /// The outcome, as metrics show it.
    pub fn outcome(self) -> &'static str {
        match self {
            Self::Learnt => "learnt",
            Self::Known => "known",
            Self::Full => "full",
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
            match (self.saw(world, fence, fqdn, evidence, received), all) {
                (Noted::Learnt, _) => all = Noted::Learnt,
                (Noted::Full, Noted::Known) => all = Noted::Full,
                _ => {}
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
        let Some(object) = world.fences.get(fence) else {
            return Noted::Known;
        };
        if !object.spec.believes(evidence) || is_known(object, fqdn, evidence, now) {
            return Noted::Known;
        }
        let mut inbox = self.inbox();
        let pending = inbox.pending.entry(fence.clone()).or_default();
        if !pending.hosts.contains_key(fqdn) && !has_room(object, fqdn, pending.hosts.len()) {
            drop(inbox);
            self.metrics.drop_over(LEARNT_HOSTS);
            return Noted::Full;
        }
        pending
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
        let mut writes = JoinSet::new();
        loop {
            self.wake.notified().await;
            loop {
                tokio::time::sleep(COALESCE).await;
                let (due, later) = self.due();
                for (fence, pending) in due {
                    writes.spawn(Arc::clone(&self).write(fence, pending));
                }
                while writes.try_join_next().is_some() {}
                let Some(later) = later else {
                    break;
                };
                // Names that may not be shown yet, and what is tried again; anything new comes first.
                tokio::select! {
                    () = tokio::time::sleep(later) => {}
                    () = self.wake.notified() => {}
                }
            }
        }
    }

    /// Waits until every host that these fences' workloads were seen to call is stored, or its fence cannot be written now.
    pub async fn flush(&self, concerned: impl Fn(&Key) -> bool) {
        let waiting = || {
            let inbox = self.inbox();
            let hosts = |pending: &Pending| !pending.hosts.is_empty();
            let mut pending = inbox.pending.iter().filter(|(_, pending)| hosts(pending));
            pending.any(|(fence, _)| concerned(fence) && !inbox.failed.contains_key(fence))
                || inbox.writing.keys().any(&concerned)
        };
        while waiting() {
            tokio::time::sleep(COALESCE).await;
        }
    }

    /// Takes what may be written now; says when something else may.
    fn due(&self) -> (HashMap<Key, Pending>, Option<Duration>) {
        let mut inbox = self.inbox();
        let Inbox {
            pending,
            shown,
            writing,
            failed,
            ..
        } = &mut *inbox;
        shown.retain(|_, since| since.elapsed() < UNRESOLVED_EVERY);
        failed.retain(|fence, _| pending.contains_key(fence) || writing.contains_key(fence));
        let mut due = HashMap::new();
        let mut later: Option<Duration> = None;
        for (fence, mut waiting) in std::mem::take(pending) {
            if writing.contains_key(&fence) {
                // Its end wakes us.
                pending.insert(fence, waiting);
                continue;
            }
            let again = failed
                .get(&fence)
                .map(|failed| failed.again.saturating_duration_since(Instant::now()));
            if let Some(again) = again.filter(|again| !again.is_zero()) {
                later = Some(later.map_or(again, |later| later.min(again)));
                pending.insert(fence, waiting);
                continue;
            }
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
        for (fence, pending) in &due {
            writing.insert(fence.clone(), pending.hosts.len());
        }
        self.count(&inbox);
        (due, later)
    }

    #[expect(clippy::cast_precision_loss, reason = "a gauge")]
    fn count(&self, inbox: &Inbox) {
        let waiting: usize = inbox.writing.values().sum();
        let failed = inbox.failed.keys();
        let failed = failed.filter_map(|fence| inbox.pending.get(fence));
        let failed: usize = failed.map(|pending| pending.hosts.len()).sum();
        self.metrics.waiting.set((waiting + failed) as f64);
    }

    /// Writes what is due of one fence; where that fails, it is due again later.
    async fn write(self: Arc<Self>, fence: Key, pending: Pending) {
        let world = self.world.borrow().clone();
        let change = |fence: &ServiceFence| {
            let mut fence = fence.clone();
            fence.status = Some(merge(&fence, &pending));
            foreseen(&fence, &world, &self.settings, (self.clock)())
        };
        let result = self.status.update(&world, &fence, change).await;
        let mut inbox = self.inbox();
        inbox.writing.remove(&fence);
        match result {
            Ok(_) => drop(inbox.failed.remove(&fence)),
            Err(error) => {
                let error = crate::chain(&error);
                let attempts = inbox.failed.get(&fence).map_or(0, |failed| failed.attempts);
                let wait = RETRY
                    .saturating_mul(1 << attempts.min(10))
                    .min(LONGEST_RETRY);
                tracing::warn!(%fence, error, ?wait, "what was learnt is not stored yet; it is tried again");
                let kept = inbox.pending.entry(fence.clone()).or_default();
                for (host, seen) in pending.hosts {
                    kept.hosts.entry(host).or_insert(seen);
                }
                let failed = Failed {
                    attempts: attempts.saturating_add(1),
                    again: Instant::now() + wait,
                };
                inbox.failed.insert(fence, failed);
            }
        }
        self.count(&inbox);
        drop(inbox);
        self.wake.notify_one();
    }
}
