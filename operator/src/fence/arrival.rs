//! Whether a step of a scope's change ([`super::stage`]) has arrived in the proxies it is for.
//!
//! Told by the proxies themselves ([`Eyes`]): each step changes a listener, and its clusters warm. Where none can be asked,
//! time must do.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use fenceline_crds::istio::{Sidecar, SidecarSpec};
use futures::future::join_all;
use tokio::sync::mpsc;

use super::select::{self, Labels};
use super::stage::{EVERYTHING, staged};
use crate::observe::proxy::{Eyes, Seen, State};
use crate::world::{Key, Proxy, World};

/// Of a workload with more pods, so many speak for the others.
const ASKED: usize = 8;
/// Before this nothing can have arrived: istiod collects changes for 100 ms (`PILOT_DEBOUNCE_AFTER`).
const EARLIEST: Duration = Duration::from_millis(40);
/// How often proxies are asked, at first; then more and more rarely.
const ASK: Duration = Duration::from_millis(10);
const ASK_RARELY: Duration = Duration::from_millis(250);
/// How long a step takes where no proxy can be asked.
const UNSEEN: Duration = Duration::from_secs(2);
/// A proxy that has not heard of a step by now is not waited for: istiod's longest debounce is 10 s.
const PATIENCE: Duration = Duration::from_secs(30);

/// Follows the steps of every fence.
#[derive(Debug)]
pub struct Arrivals {
    eyes: Arc<Eyes>,
    steps: Arc<Mutex<Steps>>,
    /// Fences of which a step has arrived.
    arrived: mpsc::UnboundedSender<Key>,
}

#[derive(Debug, Default)]
struct Steps {
    last: u64,
    /// The staged hosts of each fence: since which step, and whether they have arrived.
    hosts: HashMap<Key, BTreeMap<String, (u64, bool)>>,
    /// The step of each fence that is on its way.
    under_way: HashMap<Key, (u64, SidecarSpec)>,
    /// The pods of each fence whose proxies refused configuration during the last step.
    rejected: HashMap<Key, (u64, Vec<IpAddr>)>,
    /// Fences whose last step was not heard of in time, as while istiod is away. A proxy that skips a step may see no
    /// listener change with the next one, which is not waited for as long.
    missed: HashSet<Key>,
}

/// How a step ended.
#[derive(Debug, Default)]
struct Heard {
    /// By these it was refused, which then were so.
    rejected: Vec<(IpAddr, State)>,
    /// Some refused clusters, and so do not have those of this step.
    without_clusters: bool,
    /// Some have not heard of it.
    missed: bool,
}

impl Steps {
    /// Step `number` of a fence has arrived as far as it will.
    fn arrived(&mut self, fence: &Key, number: u64, heard: &Heard) {
        let Heard {
            rejected,
            without_clusters,
            missed,
        } = heard;
        if *missed {
            self.missed.insert(fence.clone());
        } else {
            self.missed.remove(fence);
        }
        if self
            .under_way
            .get(fence)
            .is_some_and(|(last, _)| *last == number)
        {
            self.under_way.remove(fence);
        }
        if rejected.is_empty() {
            self.rejected.remove(fence);
        } else {
            let pods: Vec<IpAddr> = rejected.iter().map(|(pod, _)| *pod).collect();
            tracing::warn!(%fence, ?pods, "proxies rejected configuration");
            self.rejected.insert(fence.clone(), (number, pods));
        }
        // A route without its cluster would answer 503; until then the global proxy takes these calls.
        if !without_clusters {
            self.has_clusters(fence, number);
        }
    }

    /// Every proxy has what came with step `number` and before.
    fn has_clusters(&mut self, fence: &Key, number: u64) {
        let of_fence = self.hosts.get_mut(fence).into_iter();
        for (since, heard) in of_fence.flat_map(BTreeMap::values_mut) {
            *heard |= *since <= number;
        }
    }

    /// The proxies that refused step `number` took configuration since.
    fn cured(&mut self, fence: &Key, number: u64) {
        self.has_clusters(fence, number);
        let last = self.rejected.get(fence);
        if last.is_some_and(|(refused, _)| *refused == number) {
            self.rejected.remove(fence);
        }
    }
}

/// How the pods of a fence were before a step was written.
#[derive(Debug)]
pub struct Before {
    /// Those that could be asked.
    seen: Vec<(IpAddr, State)>,
    nobody: bool,
}

impl Arrivals {
    pub fn new(eyes: Arc<Eyes>) -> (Self, mpsc::UnboundedReceiver<Key>) {
        let (arrived, fences) = mpsc::unbounded_channel();
        let steps = Arc::default();
        (
            Self {
                eyes,
                steps,
                arrived,
            },
            fences,
        )
    }

    /// The staged hosts of a fence that have arrived. With no pods, all of them.
    pub fn arrived(&self, fence: &Key, labels: &Labels, world: &World) -> BTreeSet<String> {
        let pods = addresses(&fence.namespace, labels, world);
        let steps = self.steps.lock().unwrap_or_else(PoisonError::into_inner);
        let of_fence = steps.hosts.get(fence);
        if pods.is_empty() {
            let all = of_fence.into_iter().flat_map(BTreeMap::keys).cloned();
            return all.chain([EVERYTHING.to_owned()]).collect();
        }
        let of_fence = of_fence.into_iter().flatten();
        let arrived = of_fence.filter(|(_, (_, arrived))| *arrived);
        arrived.map(|(host, _)| host.clone()).collect()
    }

    /// Looks at a fence's pods before a step is written.
    pub async fn look(&self, fence: &Key, labels: &Labels, world: &World) -> Before {
        let pods = addresses(&fence.namespace, labels, world);
        let nobody = pods.is_empty();
        let mut seen = look(&self.eyes, pods.clone()).await;
        let missing = pods.into_iter();
        let missing = missing.filter(|pod| !seen.iter().any(|(known, _)| known == pod));
        // An answer may be late once.
        seen.extend(look(&self.eyes, missing.collect()).await);
        Before { seen, nobody }
    }

    /// Whether a step of the fence is on its way. The next one waits for it: of two at once nobody could tell which of
    /// them a proxy has heard of.
    pub fn is_under_way(&self, fence: &Key, stored: Option<&Sidecar>) -> bool {
        let steps = self.steps.lock().unwrap_or_else(PoisonError::into_inner);
        let step = steps.under_way.get(fence);
        // What somebody else made of it is put right at once.
        step.is_some_and(|(_, spec)| stored.is_some_and(|stored| stored.spec == *spec))
    }

    /// A step was written after `before`; or one was found on starting, where that is absent.
    pub fn follow(&self, fence: &Key, step: &Sidecar, before: Option<Before>) {
        let staged = staged(&step.spec);
        let (number, patience) = {
            let mut steps = self.steps.lock().unwrap_or_else(PoisonError::into_inner);
            let number = steps.last + 1;
            let hosts = steps.hosts.entry(fence.clone()).or_default();
            let known = hosts.len();
            hosts.retain(|host, _| staged.contains(host));
            let changed = known != hosts.len() || staged.len() != hosts.len();
            if before.is_none() && !changed {
                if hosts.is_empty() {
                    steps.hosts.remove(fence);
                }
                return;
            }
            for host in staged {
                hosts.entry(host).or_insert((number, false));
            }
            steps.last = number;
            if before.as_ref().is_some_and(|before| before.nobody) {
                steps.arrived(fence, number, &Heard::default());
                let _ = self.arrived.send(fence.clone());
                return;
            }
            let spec = step.spec.clone();
            steps.under_way.insert(fence.clone(), (number, spec));
            let patience = if steps.missed.contains(fence) {
                UNSEEN
            } else {
                PATIENCE
            };
            (number, patience)
        };
        let (eyes, steps) = (Arc::clone(&self.eyes), Arc::clone(&self.steps));
        let (fence, arrived) = (fence.clone(), self.arrived.clone());
        tokio::spawn(async move {
            let heard = match before {
                Some(Before { seen, .. }) if !seen.is_empty() => {
                    until_heard(&eyes, seen, patience).await
                }
                _ => {
                    tokio::time::sleep(UNSEEN).await;
                    Heard::default()
                }
            };
            let lock = || steps.lock().unwrap_or_else(PoisonError::into_inner);
            lock().arrived(&fence, number, &heard);
            // Nobody listens once this replica no longer leads.
            let _ = arrived.send(fence.clone());
            if !heard.rejected.is_empty() {
                until_cured(&eyes, heard.rejected).await;
                lock().cured(&fence, number);
                let _ = arrived.send(fence);
            }
        });
    }

    /// The pods whose proxies refused configuration while the fence's last step arrived.
    pub fn rejected(&self, fence: &Key) -> Vec<IpAddr> {
        let steps = self.steps.lock().unwrap_or_else(PoisonError::into_inner);
        let rejected = steps.rejected.get(fence);
        rejected.map(|(_, pods)| pods.clone()).unwrap_or_default()
    }

    /// A fence is gone, and its Sidecar with it.
    pub fn forget(&self, fence: &Key) {
        let mut steps = self.steps.lock().unwrap_or_else(PoisonError::into_inner);
        steps.rejected.remove(fence);
        steps.under_way.remove(fence);
        steps.missed.remove(fence);
        steps.hosts.remove(fence);
    }
}

/// The pods whose proxies take in what is written for these labels.
fn addresses(namespace: &str, labels: &Labels, world: &World) -> Vec<IpAddr> {
    let others = select::sidecars_in(world, namespace).filter(|_| labels.is_empty());
    let selectors = others.filter_map(|(_, sidecar)| sidecar.spec.workload_selector.as_ref());
    let others: Vec<&Labels> = selectors.map(|selector| &selector.labels).collect();
    select::pods_of(world, namespace, labels)
        .filter(|pod| pod.runs && pod.proxy == Proxy::Sidecar)
        // Where it is for the whole namespace, those with a Sidecar of their own have that.
        .filter(|pod| !others.iter().any(|own| select::matches(own, &pod.labels)))
        .filter_map(|pod| pod.addresses.first().copied())
        .take(ASKED)
        .collect()
}

async fn look(eyes: &Eyes, pods: Vec<IpAddr>) -> Vec<(IpAddr, State)> {
    let look = async |pod| Some((pod, eyes.look(pod, &Seen::default()).await?));
    let looks = join_all(pods.into_iter().map(look)).await;
    looks.into_iter().flatten().collect()
}

/// How often a proxy that refused something is asked whether it is well again.
const LOOK_AGAIN: Duration = Duration::from_secs(5);

/// Waits until each proxy has taken configuration without refusing any since, or is gone.
async fn until_cured(eyes: &Eyes, mut ill: Vec<(IpAddr, State)>) {
    let mut silent = Silent::default();
    while !ill.is_empty() {
        tokio::time::sleep(LOOK_AGAIN).await;
        let pods = ill.iter().map(|(pod, _)| *pod).collect();
        let now: HashMap<IpAddr, State> = look(eyes, pods).await.into_iter().collect();
        ill.retain_mut(|(pod, before)| {
            let Some(now) = now.get(pod) else {
                return silent.may_answer(*pod);
            };
            silent.answered(*pod);
            if now.is_well_since(before) {
                return false;
            }
            if now.rejected > before.rejected {
                *before = *now;
            }
            true
        });
    }
}

/// How often a proxy may fail to answer before it is taken to be gone.
const GONE: u32 = 6;

/// Proxies that did not answer, and how often in a row.
#[derive(Debug, Default)]
struct Silent(HashMap<IpAddr, u32>);

impl Silent {
    /// A proxy did not answer; says whether it may yet.
    fn may_answer(&mut self, pod: IpAddr) -> bool {
        let times = self.0.entry(pod).or_default();
        *times += 1;
        *times < GONE
    }

    fn answered(&mut self, pod: IpAddr) {
        self.0.remove(&pod);
    }
}

/// Waits until each proxy has taken in a change of listeners since, and nothing of it warms; one that is gone is not waited
/// for.
async fn until_heard(eyes: &Eyes, mut waiting: Vec<(IpAddr, State)>, patience: Duration) -> Heard {
    let mut heard = Heard::default();
    let mut silent = Silent::default();
    let started = Instant::now();
    let mut pause = ASK;
    tokio::time::sleep(EARLIEST).await;
    while !waiting.is_empty() && started.elapsed() < patience {
        let pods = waiting.iter().map(|(pod, _)| *pod).collect();
        let now: HashMap<IpAddr, State> = look(eyes, pods).await.into_iter().collect();
        waiting.retain(|(pod, before)| {
            let Some(now) = now.get(pod) else {
                return silent.may_answer(*pod);
            };
            silent.answered(*pod);
            let refused = now.rejected > before.rejected;
            if refused {
                heard.rejected.push((*pod, *now));
                heard.without_clusters |= now.rejected_clusters > before.rejected_clusters;
            }
            !refused && (now.listeners == before.listeners || now.warming > 0)
        });
        if started.elapsed() > ASK_RARELY * 2 {
            pause = (pause * 2).min(ASK_RARELY);
        }
        tokio::time::sleep(pause).await;
    }
    heard.missed = !waiting.is_empty();
    heard
}
