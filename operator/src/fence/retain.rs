//! Forgetting: a learnt host that was not called for a while goes, on positive evidence alone. The source that would have
//! seen the calls must answer, must have seen the workload itself all that time, and must say that there were none.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::sync::Arc;
use std::time::{Duration, Instant};

use fenceline_crds::{Evidence, LearntDependency, ServiceFence, ServiceFenceStatus};
use jiff::{SignedDuration, Timestamp};
use kube::Resource;
use tokio::sync::watch;

use crate::clock::Clock;
use crate::observe::prometheus::{self, Prometheus, workloads_of};
use crate::observe::resolve::resolve;
use crate::status::StatusWriter;
use crate::world::{Key, World};

/// How many hosts of one fence are forgotten at a time, and how many fences forget.
const HOSTS: usize = 10;
const FENCES: usize = 50;
/// Forgetting is spread over so much of `unusedFor`, so that what was learnt together does not go together.
const SPREAD: f64 = 0.1;
/// The points of that time, as shares of it, at which the workload must have been seen.
const SEEN_AT: [f64; 4] = [1.0, 0.75, 0.5, 0.25];

/// How long until the same is asked again, at most; else a fiftieth of the time that is asked about.
const RARELY: Duration = Duration::from_secs(3600);

/// What forgetting works with.
pub struct Retention {
    pub prometheus: Arc<Prometheus>,
    pub status: Arc<StatusWriter>,
    pub interval: Duration,
    pub clock: Clock,
}

/// The hosts that a fence may forget, if they really were not called.
pub fn candidates(fence: &ServiceFence, now: Timestamp) -> BTreeSet<String> {
    let Some(unused_for) = unused_for(fence) else {
        return BTreeSet::new();
    };
    let dependencies = fence.status.iter().flat_map(|status| &status.dependencies);
    let due = |known: &&LearntDependency| {
        let used = known.last_seen.unwrap_or(known.first_seen);
        // What a policy names goes with the policy.
        !known.evidence.contains(&Evidence::AuthorizationPolicy)
            && now.duration_since(used) > longer(unused_for, spread(fence, &known.host))
    };
    let due = dependencies.filter(due).take(HOSTS);
    due.map(|known| known.host.clone()).collect()
}

pub(super) fn unused_for(fence: &ServiceFence) -> Option<SignedDuration> {
    let retention = fence.spec.retention.as_ref()?;
    SignedDuration::try_from(retention.unused_for()?).ok()
}

/// A time, and a share of it.
fn longer(time: SignedDuration, share: f64) -> SignedDuration {
    let seconds = time.as_secs_f64() * (1.0 + share);
    SignedDuration::try_from_secs_f64(seconds).unwrap_or(SignedDuration::MAX)
}

/// The same for the same host of the same fence, and between 0 and [`SPREAD`].
fn spread(fence: &ServiceFence, host: &str) -> f64 {
    let mut hasher = DefaultHasher::new();
    (&fence.metadata.uid, host).hash(&mut hasher);
    let share = u32::try_from(hasher.finish() >> 32).unwrap_or_default();
    f64::from(share) / f64::from(u32::MAX) * SPREAD
}

/// What Prometheus knows of a namespace's calls over a time.
#[derive(Debug, Default)]
struct Past {
    /// Workloads, with the hosts that they called, as they were counted.
    calls: BTreeMap<String, BTreeSet<String>>,
    /// Workloads that it has seen all that time.
    seen: BTreeSet<String>,
}

/// A namespace, and how far back.
type Question = (String, Duration);

/// What was asked, and when: where nothing may be forgotten, the same questions need not be asked every minute.
#[derive(Debug, Default)]
struct Asked(HashMap<Question, Instant>);

impl Asked {
    /// Whether it is time for a question.
    fn is_due(&mut self, question: &Question) -> bool {
        let pause = |time: Duration| (time / 50).min(RARELY);
        self.0.retain(|(_, time), at| at.elapsed() < pause(*time));
        if self.0.contains_key(question) {
            return false;
        }
        self.0.insert(question.clone(), Instant::now());
        true
    }
}

impl Retention {
    /// Forgets what is due, again and again, as long as it is polled: the leader's work.
    pub async fn run(&self, world: watch::Receiver<Arc<World>>) {
        let mut tick = tokio::time::interval(self.interval);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut asked = Asked::default();
        loop {
            tick.tick().await;
            if *self.prometheus.health().borrow() == prometheus::Health::Healthy {
                let world = Arc::clone(&world.borrow());
                self.round(&world, &mut asked).await;
            }
        }
    }

    async fn round(&self, world: &World, asked: &mut Asked) {
        let now = (self.clock)();
        let mut pasts: BTreeMap<Question, Option<Past>> = BTreeMap::new();
        let mut forgetful = 0;
        for (key, fence) in &world.fences {
            let due = candidates(fence, now);
            if due.is_empty() || !self.prometheus.sees(world, key) {
                continue;
            }
            let unused_for = unused_for(fence).and_then(|time| Duration::try_from(time).ok());
            let Some(unused_for) = unused_for else {
                continue;
            };
            let of = (key.namespace.clone(), unused_for);
            if !pasts.contains_key(&of) {
                let past = if asked.is_due(&of) {
                    self.past(&key.namespace, unused_for).await
                } else {
                    None
                };
                pasts.insert(of.clone(), past);
            }
            let Some(Some(past)) = pasts.get(&of) else {
                continue;
            };
            let unused = unused(world, key, &due, past);
            if !unused.is_empty() {
                self.forget(world, key, fence, &unused).await;
                forgetful += 1;
            }
            if forgetful == FENCES {
                return;
            }
        }
    }

    /// Nothing where any question fails.
    async fn past(&self, namespace: &str, time: Duration) -> Option<Past> {
        let past = async {
            let mut past = Past::default();
            for (index, share) in SEEN_AT.into_iter().enumerate() {
                let at = time.mul_f64(share);
                let seen = self.prometheus.client().callers_at(namespace, at).await?;
                past.seen = if index == 0 {
                    seen
                } else {
                    past.seen.intersection(&seen).cloned().collect()
                };
                if past.seen.is_empty() {
                    // Nobody's past is known; what was called is much to ask.
                    return Ok(past);
                }
            }
            let used = self.prometheus.client().used_by(namespace, time).await?;
            for (workload, host) in used {
                past.calls.entry(workload).or_default().insert(host);
            }
            Ok::<_, prometheus::Error>(past)
        };
        match past.await {
            Ok(past) => Some(past),
            Err(error) => {
                let error = crate::chain(&error);
                tracing::warn!(namespace, error, "nothing is forgotten");
                None
            }
        }
    }

    async fn forget(
        &self,
        world: &World,
        key: &Key,
        fence: &ServiceFence,
        unused: &BTreeSet<String>,
    ) {
        let now = (self.clock)();
        let change = |fence: &ServiceFence| without(fence, unused, now);
        match self.status.update(world, key, change).await {
            Ok(true) => {
                let hosts: Vec<&str> = unused.iter().map(String::as_str).collect();
                let retention = fence.spec.retention.clone().unwrap_or_default();
                let note = format!(
                    "not called for {}, and no longer in scope for that: {}. A call brings them back",
                    retention.unused_for,
                    hosts.join(", ")
                );
                tracing::info!(fence = %key, note, "forgot");
                let about = fence.object_ref(&());
                self.status.event(&about, false, "Forgot", note).await;
            }
            Ok(false) => {}
            Err(error) => {
                let error = crate::chain(&error);
                tracing::warn!(fence = %key, error, "what it should forget");
            }
        }
    }
}

/// Of what is due: what none of the fence's workloads called, all of which were seen all the time.
fn unused(world: &World, fence: &Key, due: &BTreeSet<String>, past: &Past) -> BTreeSet<String> {
    let workloads = workloads_of(world, fence);
    if !workloads.is_subset(&past.seen) {
        return BTreeSet::new();
    }
    let called: BTreeSet<String> = workloads
        .iter()
        .filter_map(|workload| past.calls.get(workload))
        .flatten()
        .filter_map(|host| {
            let host = resolve(world, &fence.namespace, host).ok()?;
            Some(host.fqdn.to_string())
        })
        .collect();
    // Istio counts a request for the host that a route led it to.
    let is_called = |host: &&String| {
        let alias = world.alias_of(host);
        // What nobody can look at counts as called: it stays.
        let behind = world.any_behind(host, |host| called.contains(host));
        behind.unwrap_or(true) || alias.is_some_and(|host| called.contains(host))
    };
    due.iter()
        .filter(|host| !is_called(host))
        .cloned()
        .collect()
}

/// The status without these hosts, but for those that were called a moment ago after all.
fn without(fence: &ServiceFence, unused: &BTreeSet<String>, now: Timestamp) -> ServiceFenceStatus {
    let due = candidates(fence, now);
    let mut status = fence.status.clone().unwrap_or_default();
    let goes = |host: &String| unused.contains(host) && due.contains(host);
    status.dependencies.retain(|known| !goes(&known.host));
    status
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{fence, pod, service, virtual_service, world};

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    fn knows(spec: &str, hosts: &[(&str, Evidence, i64)]) -> ServiceFence {
        let mut fence = fence("shop", "cart", spec);
        let dependencies = hosts.iter().map(|(host, evidence, last)| LearntDependency {
            host: (*host).to_owned(),
            evidence: vec![*evidence],
            first_seen: at(0),
            last_seen: Some(at(*last)),
        });
        fence.status = Some(ServiceFenceStatus {
            dependencies: dependencies.collect(),
            ..Default::default()
        });
        fence
    }

    #[test]
    fn only_what_is_old_is_due_and_only_with_retention() {
        let hosts = [
            ("old", Evidence::GlobalProxy, 0),
            ("young", Evidence::Prometheus, 9_000),
            ("named", Evidence::AuthorizationPolicy, 0),
        ];
        let with = knows("{retention: {unusedFor: 1h}}", &hosts);
        assert_eq!(candidates(&with, at(10_000)), ["old".to_owned()].into());
        assert!(candidates(&with, at(3_600)).is_empty(), "not to the second");
        let without = knows("{}", &hosts);
        assert!(candidates(&without, at(10_000)).is_empty());
    }

    #[test]
    fn missing_data_takes_nothing_away() {
        let mut mesh = world();
        service(&mut mesh, "shop", "cart", "{}");
        service(&mut mesh, "bank", "ledger", "{}");
        pod(&mut mesh, "shop", "cart", "10.1.0.1");
        let key = Key::new("shop", "cart");
        mesh.fences
            .insert(key.clone(), fence("shop", "cart", "{}").into());
        let (ledger, old) = (
            "ledger.bank.svc.cluster.local",
            "old.bank.svc.cluster.local",
        );
        let due = BTreeSet::from([ledger.to_owned(), old.to_owned()]);
        let calls = [("cart".to_owned(), BTreeSet::from([ledger.to_owned()]))];
        let mut past = Past {
            calls: calls.into(),
            seen: BTreeSet::new(),
        };
        assert!(
            unused(&mesh, &key, &due, &past).is_empty(),
            "not seen itself"
        );
        past.seen.insert("cart".to_owned());
        assert_eq!(unused(&mesh, &key, &due, &past), [old.to_owned()].into());
        // What is called is counted for the host that a route leads to.
        let route = "{hosts: [old], http: [{route: [{destination: {host: ledger}}]}]}";
        virtual_service(&mut mesh, "bank", "old", route);
        assert!(
            unused(&mesh, &key, &due, &past).is_empty(),
            "called by way of a route"
        );
        mesh.set_virtual_service(&Key::new("bank", "old"), None);
        // Another workload of the fence was not seen.
        pod(&mut mesh, "shop", "cart", "10.1.0.1");
        let mut second = mesh.pods[&key].as_ref().clone();
        second.workload = "cart-canary".to_owned();
        mesh.set_pod(&Key::new("shop", "cart-canary"), Some(second));
        assert!(unused(&mesh, &key, &due, &past).is_empty());
    }
}
