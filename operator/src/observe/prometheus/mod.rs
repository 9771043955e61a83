//! Prometheus: which workload sent requests or opened connections to which host. Counters say so while traffic goes
//! direct, when the global proxy no longer sees it, and say it of the past: an installation into a running mesh does not
//! begin by knowing nothing.
//!
//! Asked namespace by namespace, so that no answer gets huge. What it does not say takes nothing away: only
//! [`crate::fence::retain`] does, after a question of its own.

mod client;
mod single;

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use fenceline_crds::{Evidence, ServiceFence};
use futures::StreamExt;
use kube::ResourceExt;
use tokio::sync::{Notify, watch};

pub use client::{Client, Error, Settings};
pub use single::NoNumber;

use super::resolve::resolve;
use crate::fence::learn::Learner;
use crate::fence::select;
use crate::metrics::Metrics;
use crate::world::{Key, World};

/// How Prometheus is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Health {
    /// It has not been asked yet.
    Unknown,
    Healthy,
    /// It answers, and says nothing of any fenced workload.
    Empty,
    /// It does not answer, or with an error.
    Failing(String),
}

impl Health {
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Unknown => "NotAskedYet",
            Self::Healthy => "Healthy",
            Self::Empty => "Empty",
            Self::Failing(_) => "Failing",
        }
    }

    pub fn message(&self) -> String {
        match self {
            Self::Unknown => "Prometheus has not been asked yet".to_owned(),
            Self::Healthy => "Prometheus answers".to_owned(),
            Self::Empty => "Prometheus answers, and knows no requests of any fenced workload: does it scrape the proxies, with Istio's \
                            standard metrics? Nothing is forgotten"
                .to_owned(),
            Self::Failing(why) => format!("Prometheus tells nothing: {why}. Nothing is forgotten"),
        }
    }
}

/// A caller that was not seen for so long is no caller any more: each run of a Job may be another.
const FORGOTTEN: Duration = Duration::from_secs(24 * 3600);
/// How many namespaces are asked about at once.
const SIDE_BY_SIDE: usize = 8;

/// Asks Prometheus.
pub struct Prometheus {
    client: Client,
    learner: Arc<Learner>,
    metrics: Arc<Metrics>,
    asked: Mutex<Asked>,
    wake: Notify,
    health: watch::Sender<Health>,
}

#[derive(Debug, Default)]
struct Asked {
    /// The fences, by uid, that begin with what their workloads called before.
    fences: HashSet<String>,
    /// Workloads that were seen to call anything, and when that was last said.
    callers: HashMap<Key, Instant>,
    /// How long it takes to ask about every namespace.
    round: Duration,
    /// Namespaces with fences that wait for an answer, and when one of them last had it.
    wanted: BTreeSet<String>,
    answered: Option<Instant>,
}

impl Asked {
    /// Forgets the fences that are no more.
    fn keep(&mut self, world: &World, namespaces: &BTreeSet<String>, round: Duration) {
        self.round = round;
        let there: HashSet<String> = world
            .fences
            .values()
            .filter_map(|fence| fence.uid())
            .collect();
        self.fences.retain(|known| there.contains(known));
        self.callers.retain(|caller, at| {
            namespaces.contains(&caller.namespace) && at.elapsed() < FORGOTTEN
        });
    }
}

/// An edge: the workload's name, and the host that it called.
pub type Edge = (String, String);

impl Prometheus {
    pub fn new(client: Client, learner: Arc<Learner>, metrics: Arc<Metrics>) -> Arc<Self> {
        Arc::new(Self {
            client,
            learner,
            metrics,
            asked: Mutex::default(),
            wake: Notify::new(),
            health: watch::channel(Health::Unknown).0,
        })
    }

    pub fn client(&self) -> &Client {
        &self.client
    }

    pub fn interval(&self) -> Duration {
        self.client.settings().interval
    }

    pub fn health(&self) -> watch::Receiver<Health> {
        self.health.subscribe()
    }

    fn asked(&self) -> std::sync::MutexGuard<'_, Asked> {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a fence's status has what its workload called before; if not, that is asked for at once.
    pub fn knows(&self, fence: &ServiceFence) -> bool {
        let uid = fence.uid().unwrap_or_default();
        let mut asked = self.asked();
        let known = asked.fences.contains(&uid);
        if !known {
            asked.wanted.insert(fence.namespace().unwrap_or_default());
            self.wake.notify_one();
        }
        known
    }

    /// Whether those who wait for an answer get theirs one after the other.
    pub fn gets_on(&self) -> bool {
        let asked = self.asked();
        let lately = |at: Instant| at.elapsed() < self.client.settings().timeout;
        !asked.wanted.is_empty() && asked.answered.is_some_and(lately)
    }

    /// The fences of a namespace, by uid, whose workloads' history is not known yet.
    fn unknown(&self, world: &World, namespace: &str) -> Vec<String> {
        let asked = self.asked();
        let fences = select::fences_in(world, namespace).filter_map(|(_, fence)| fence.uid());
        fences
            .filter(|fence| !asked.fences.contains(fence))
            .collect()
    }

    /// Whether a workload of the fence was lately seen to call anything: what it did not call, it did not call.
    pub fn sees(&self, world: &World, fence: &Key) -> bool {
        let workloads = workloads_of(world, fence);
        let asked = self.asked();
        let fresh = (self.client.settings().interval + asked.round) * 3;
        let seen = |workload: &String| {
            let key = Key::new(fence.namespace.clone(), workload.clone());
            asked
                .callers
                .get(&key)
                .is_some_and(|at| at.elapsed() < fresh)
        };
        workloads.iter().any(seen)
    }

    /// Asks again and again, as long as it is polled: the leader's work.
    pub async fn run(&self, world: watch::Receiver<Arc<World>>) {
        tokio::join!(self.ask_when_wanted(&world), self.ask_regularly(&world));
    }

    async fn ask_when_wanted(&self, world: &watch::Receiver<Arc<World>>) {
        loop {
            self.wake.notified().await;
            let now = Arc::clone(&world.borrow());
            let wanted: Vec<String> = self.asked().wanted.iter().cloned().collect();
            let results = wanted.into_iter().map(async |namespace| {
                let result = self.ask(&now, &namespace).await;
                let mut asked = self.asked();
                asked.wanted.remove(&namespace);
                if result.is_ok() {
                    asked.answered = Some(Instant::now());
                }
                result
            });
            let results = futures::stream::iter(results).buffer_unordered(SIDE_BY_SIDE);
            let results: Vec<_> = results.collect().await;
            // Namespaces without traffic say nothing of Prometheus.
            if results.iter().any(|result| !matches!(result, Ok(0))) {
                self.say(&results);
            }
        }
    }

    async fn ask_regularly(&self, world: &watch::Receiver<Arc<World>>) {
        let mut tick = tokio::time::interval(self.interval());
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tick.tick().await;
            let started = Instant::now();
            let now = Arc::clone(&world.borrow());
            let namespaces: BTreeSet<String> =
                now.fences.keys().map(|key| key.namespace.clone()).collect();
            let asked = namespaces.iter().map(|namespace| self.ask(&now, namespace));
            let mut asked = futures::stream::iter(asked).buffer_unordered(SIDE_BY_SIDE);
            let mut results = Vec::new();
            while let Some(result) = asked.next().await {
                results.push(result);
                // If nobody answers, the others would wait as long.
                if results.len() >= SIDE_BY_SIDE && results.iter().all(Result::is_err) {
                    break;
                }
            }
            self.asked().keep(&now, &namespaces, started.elapsed());
            self.say(&results);
        }
    }

    /// Asks about one namespace and learns from the answer; says how many edges it has.
    async fn ask(&self, world: &World, namespace: &str) -> Result<usize, Error> {
        let unknown = self.unknown(world, namespace);
        let window = if unknown.is_empty() {
            self.client.settings().window
        } else {
            self.client.settings().history
        };
        let edges = match self.client.edges_of(namespace, window).await {
            // So much of the past is too much to ask; the present may not be.
            Err(Error::Refused { status, said }) if !unknown.is_empty() => {
                tracing::warn!(namespace, %status, said, "its history stays unknown");
                self.asked().fences.extend(unknown);
                return Err(Error::Refused { status, said });
            }
            edges => edges?,
        };
        let received = Instant::now();
        let callers = edges
            .iter()
            .map(|(workload, _)| (Key::new(namespace, workload.clone()), received));
        self.asked().callers.extend(callers);
        for (fence, host) in of_fences(world, namespace, &edges) {
            self.learner
                .saw(world, &fence, &host, Evidence::Prometheus, received);
        }
        if !unknown.is_empty() {
            // Known is what the status has: a scope is planned from nothing else.
            let stored = tokio::time::timeout(
                self.client.settings().timeout,
                self.learner.flush(|fence| fence.namespace == namespace),
            );
            if stored.await.is_ok() {
                self.asked().fences.extend(unknown);
            }
        }
        Ok(edges.len())
    }

    /// What the fences of a namespace were seen to call over the last `window`.
    ///
    /// # Errors
    /// Fails when Prometheus does not answer.
    pub async fn seen(
        &self,
        world: &World,
        namespace: &str,
        window: Duration,
    ) -> Result<BTreeSet<(Key, String)>, Error> {
        let edges = self.client.edges_of(namespace, window).await?;
        Ok(of_fences(world, namespace, &edges))
    }

    fn say(&self, results: &[Result<usize, Error>]) {
        let failed = results.iter().find_map(|result| result.as_ref().err());
        let edges: usize = results.iter().flatten().sum();
        let health = match failed {
            Some(error) => Health::Failing(crate::chain(error)),
            None if edges > 0 || results.is_empty() => Health::Healthy,
            None => Health::Empty,
        };
        self.metrics
            .prometheus
            .set(i64::from(health == Health::Healthy));
        self.health.send_if_modified(|old| {
            let changed = old.reason() != health.reason();
            if changed {
                tracing::info!(
                    health = health.reason(),
                    message = health.message(),
                    "Prometheus"
                );
            }
            let differs = *old != health;
            *old = health;
            differs
        });
    }
}

/// The edges of fenced workloads, by fence, with the host's full name.
fn of_fences(world: &World, namespace: &str, edges: &BTreeSet<Edge>) -> BTreeSet<(Key, String)> {
    let mut fences: HashMap<String, BTreeSet<Key>> = HashMap::new();
    for (key, _) in select::fences_in(world, namespace) {
        for workload in workloads_of(world, key) {
            fences.entry(workload).or_default().insert(key.clone());
        }
    }
    let mut known = BTreeSet::new();
    for (workload, service) in edges {
        let Some(fences) = fences.get(workload) else {
            continue;
        };
        // What is not the mesh's is nothing to learn: `unknown`, PassthroughCluster, names outside.
        if let Ok(host) = resolve(world, namespace, service) {
            let edges = fences.iter();
            known.extend(edges.map(|fence| (fence.clone(), host.fqdn.to_string())));
        }
    }
    known
}

/// The workloads that a fence stands for: those of its pods, and one of its own name while none run.
pub fn workloads_of(world: &World, fence: &Key) -> BTreeSet<String> {
    let Some(object) = world.fences.get(fence) else {
        return BTreeSet::new();
    };
    let labels = select::labels(object, world);
    let mut workloads: BTreeSet<String> = labels
        .iter()
        .flat_map(|labels| select::pods_of(world, &fence.namespace, labels))
        .map(|pod| pod.workload.clone())
        .collect();
    if workloads.is_empty() {
        workloads.insert(by_name(object));
    }
    workloads
}

fn by_name(fence: &ServiceFence) -> String {
    let name = fence.name_any();
    name.strip_prefix("workload-").unwrap_or(&name).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{fence, pod, service, world};

    #[test]
    fn edges_become_dependencies_of_the_workloads_fences() {
        let mut mesh = world();
        service(&mut mesh, "shop", "cart", "{}");
        service(&mut mesh, "bank", "ledger", "{}");
        pod(&mut mesh, "shop", "cart", "10.1.0.1");
        for name in ["cart", "idle"] {
            let fence = fence(
                "shop",
                name,
                "{workload: {selector: {matchLabels: {app: cart}}}}",
            );
            mesh.fences.insert(Key::new("shop", name), fence.into());
        }
        let edge = |workload: &str, host: &str| (workload.to_owned(), host.to_owned());
        let edges = BTreeSet::from([
            edge("cart", "ledger.bank.svc.cluster.local"),
            edge("cart", "unknown"),
            edge("cart", "example.com"),
            edge("other", "ledger.bank.svc.cluster.local"),
        ]);
        let ledger = "ledger.bank.svc.cluster.local".to_owned();
        let want = BTreeSet::from([
            (Key::new("shop", "cart"), ledger.clone()),
            (Key::new("shop", "idle"), ledger),
        ]);
        assert_eq!(of_fences(&mesh, "shop", &edges), want);
        assert!(of_fences(&mesh, "bank", &edges).is_empty());
    }

    #[test]
    fn a_fence_whose_pods_are_away_goes_by_its_name() {
        let mut mesh = world();
        service(&mut mesh, "shop", "cart", "{}");
        let fence = fence("shop", "workload-cart", "{workload: {service: cart}}");
        let key = Key::new("shop", "workload-cart");
        mesh.fences.insert(key.clone(), fence.into());
        assert_eq!(workloads_of(&mesh, &key), ["cart".to_owned()].into());
    }
}
