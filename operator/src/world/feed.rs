//! Keeps the [`World`] current: a watch for each kind, and one task that takes in what they report, publishes the next
//! snapshot and says which fences to look at again.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Debug;
use std::net::IpAddr;
use std::sync::Arc;

use fenceline_crds::ServiceFence;
use fenceline_crds::istio::{
    AuthorizationPolicy, EnvoyFilter, ServiceEntry, Sidecar, VirtualService,
};
use futures::{StreamExt, pin_mut};
use k8s_openapi::api::core::v1::{Namespace, Pod, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::core::DeserializeGuard;
use kube::runtime::watcher::{self, Event, watcher};
use kube::runtime::{WatchStreamExt, reflector};
use kube::{Api, Resource, ResourceExt};
use serde::de::DeserializeOwned;
use tokio::sync::{mpsc, watch};

use super::{Key, NamedHosts, PodFacts, PolicyFacts, ServiceFacts, World};
use crate::apply::{FENCE_LABEL, MANAGED_BY, MANAGER};
use crate::fence::select::fences_of_pod;
use crate::metrics::Metrics;

/// Changes that may wait for the world's task; a watch that is faster waits for it.
const BACKLOG: usize = 4096;

/// What changed, already cut to what the world keeps.
#[derive(Debug)]
enum Change {
    Namespace(String, Option<BTreeMap<String, String>>),
    Service(Key, Option<ServiceFacts>),
    ServiceEntry(Key, Option<NamedHosts>),
    VirtualService(Key, Option<NamedHosts>),
    /// A policy, and whether Fenceline wrote it.
    Policy(Key, Option<PolicyFacts>, Option<Box<AuthorizationPolicy>>),
    Pod(Key, Option<PodFacts>),
    /// A policy that was taken away is no longer in force anywhere.
    Retired(Key),
    /// How many endpoints of the global proxy are ready, by slice.
    GlobalProxy(Key, Option<usize>),
    /// Time to see whether it came back.
    LookForGlobalProxy,
    Sidecar(Key, Option<Box<Sidecar>>),
    EnvoyFilter(Key, Option<Box<EnvoyFilter>>),
    Fence(Key, Option<Box<ServiceFence>>),
    /// A watch has delivered all there is.
    Synced(&'static str),
}

/// istiod's longest debounce (`PILOT_DEBOUNCE_MAX`) and some.
const RETIREMENT: std::time::Duration = std::time::Duration::from_secs(15);

/// How long the global proxy may be without endpoints before every fence says so.
const GONE_AFTER: std::time::Duration = std::time::Duration::from_secs(5);

/// Which fences a change concerns.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Concerned {
    pub all: bool,
    /// All of these namespaces.
    pub namespaces: BTreeSet<String>,
    pub fences: BTreeSet<Key>,
    /// Those that find Services by label.
    pub with_selectors: bool,
}

/// The kinds that are watched, by the names that metrics and readiness use.
pub const KINDS: [&str; 10] = [
    "Namespace",
    "Service",
    "ServiceEntry",
    "VirtualService",
    "AuthorizationPolicy",
    "Pod",
    "EndpointSlice",
    "Sidecar",
    "EnvoyFilter",
    "ServiceFence",
];

/// Where the world comes out.
#[derive(Debug)]
pub struct Feed {
    pub world: watch::Receiver<Arc<World>>,
    pub concerned: mpsc::UnboundedReceiver<Concerned>,
    pub fences: reflector::Store<ServiceFence>,
    /// Turns true once every kind has been listed.
    pub synced: watch::Receiver<bool>,
}

/// Starts the watches and the world's task; they end with the runtime.
pub fn start(
    client: &kube::Client,
    cluster_domain: &str,
    global_proxy: &Key,
    metrics: &Arc<Metrics>,
) -> Feed {
    let (changes, inbox) = mpsc::channel(BACKLOG);
    let world = World::new(cluster_domain);
    let (publish, published) = watch::channel(Arc::new(world.clone()));
    let (concern, concerned) = mpsc::unbounded_channel();
    let (sync, synced) = watch::channel(false);
    let (fences, writer) = reflector::store();

    let all = watcher::Config::default();
    let ours = all.clone().labels(&format!("{MANAGED_BY}={MANAGER}"));
    let watches = Watches {
        client: client.clone(),
        changes,
        metrics: Arc::clone(metrics),
    };
    let domain = cluster_domain.to_owned();
    watches.watch(&all, |key, object: Option<Namespace>| {
        Change::Namespace(
            key.name,
            object.map(|object| object.metadata.labels.unwrap_or_default()),
        )
    });
    watches.watch(&all, |key, object: Option<Service>| {
        Change::Service(key, object.as_ref().map(ServiceFacts::from))
    });
    watches.watch(&all, |key, object: Option<ServiceEntry>| {
        Change::ServiceEntry(key, object.as_ref().map(NamedHosts::of_service_entry))
    });
    watches.watch(&all, move |key, object: Option<VirtualService>| {
        let hosts = object.map(|object| NamedHosts::of_virtual_service(&object, &domain));
        Change::VirtualService(key, hosts)
    });
    let namespace = global_proxy.namespace.clone();
    watches.watch(&all, move |key, object: Option<AuthorizationPolicy>| {
        // Those that we write follow from the others.
        match object {
            Some(object) if key.namespace == namespace && is_ours(&object) => {
                Change::Policy(key, None, Some(Box::new(object)))
            }
            object => Change::Policy(key, object.as_ref().map(PolicyFacts::of), None),
        }
    });
    watches.watch(&all, |key, object: Option<Pod>| {
        Change::Pod(key, object.map(|object| pod_facts(&object)))
    });
    let slices = all
        .clone()
        .labels(&format!("{SERVICE_NAME}={}", global_proxy.name));
    let api = Api::namespaced(client.clone(), &global_proxy.namespace);
    watches.watch_in(api, &slices, |key, object: Option<EndpointSlice>| {
        Change::GlobalProxy(key, object.as_ref().map(ready_endpoints))
    });
    watches.watch(&all, |key, object: Option<Sidecar>| {
        Change::Sidecar(key, object.map(Box::new))
    });
    watches.watch(&ours, |key, object: Option<EnvoyFilter>| {
        Change::EnvoyFilter(key, object.map(Box::new))
    });
    watches.watch(&all, |key, object: Option<ServiceFence>| {
        Change::Fence(key, object.map(Box::new))
    });

    let task = WorldTask {
        world,
        publish,
        concern,
        sync,
        writer,
        waiting: KINDS.into(),
        changes: watches.changes,
        retired: 0,
    };
    tokio::spawn(task.run(inbox, Arc::clone(metrics)));
    Feed {
        world: published,
        concerned,
        fences,
        synced,
    }
}

fn pod_facts(pod: &Pod) -> PodFacts {
    let spec = pod.spec.as_ref();
    let host_network = spec.and_then(|spec| spec.host_network).unwrap_or_default();
    let status = pod.status.as_ref();
    // A finished pod has given its address back.
    let phase = status
        .and_then(|status| status.phase.as_deref())
        .unwrap_or_default();
    let addressed = !host_network && !matches!(phase, "Succeeded" | "Failed");
    let addresses = status
        .and_then(|status| status.pod_ips.as_ref())
        .into_iter()
        .flatten();
    PodFacts {
        service_account: spec
            .and_then(|spec| spec.service_account_name.clone())
            .unwrap_or_else(|| "default".to_owned()),
        labels: pod.metadata.labels.clone().unwrap_or_default(),
        addresses: addresses
            .filter(|_| addressed)
            .filter_map(|address| address.ip.parse::<IpAddr>().ok())
            .collect(),
    }
}

/// <https://kubernetes.io/docs/reference/labels-annotations-taints/#kubernetesioservice-name>
const SERVICE_NAME: &str = "kubernetes.io/service-name";

fn ready_endpoints(slice: &EndpointSlice) -> usize {
    let ready = |condition: Option<bool>| condition.unwrap_or(true);
    slice
        .endpoints
        .iter()
        .filter(|endpoint| {
            ready(
                endpoint
                    .conditions
                    .as_ref()
                    .and_then(|conditions| conditions.ready),
            )
        })
        .count()
}

struct Watches {
    client: kube::Client,
    changes: mpsc::Sender<Change>,
    metrics: Arc<Metrics>,
}

impl Watches {
    fn watch<K, F>(&self, config: &watcher::Config, change: F)
    where
        K: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + 'static,
        F: Fn(Key, Option<K>) -> Change + Send + 'static,
    {
        self.watch_in(Api::all(self.client.clone()), config, change);
    }

    fn watch_in<K, F>(&self, api: Api<DeserializeGuard<K>>, config: &watcher::Config, change: F)
    where
        K: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + 'static,
        F: Fn(Key, Option<K>) -> Change + Send + 'static,
    {
        let (changes, metrics) = (self.changes.clone(), Arc::clone(&self.metrics));
        tokio::spawn(follow(api, config.clone(), change, changes, metrics));
    }
}

fn key_of<K: Resource>(object: &K) -> Key {
    Key::new(object.namespace().unwrap_or_default(), object.name_any())
}

/// Follows one kind for ever. What was deleted while the watch was down is found by comparing with the new list.
async fn follow<K, F>(
    api: Api<DeserializeGuard<K>>,
    config: watcher::Config,
    change: F,
    changes: mpsc::Sender<Change>,
    metrics: Arc<Metrics>,
) where
    K: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + 'static,
    F: Fn(Key, Option<K>) -> Change,
{
    let kind: &'static str = KINDS
        .into_iter()
        .find(|kind| *kind == K::kind(&()))
        .unwrap_or("unknown");
    let mut known = BTreeSet::new();
    let mut listed = BTreeSet::new();
    let events = watcher(api, config).default_backoff();
    pin_mut!(events);
    while let Some(event) = events.next().await {
        let mut out = Vec::new();
        match event {
            Ok(Event::Init) => listed.clear(),
            Ok(Event::InitApply(object)) => {
                let (key, change) = present(kind, object, &change);
                known.insert(key.clone());
                listed.insert(key);
                out.push(change);
            }
            Ok(Event::InitDone) => {
                out.extend(
                    known
                        .difference(&listed)
                        .cloned()
                        .map(|gone| change(gone, None)),
                );
                known = std::mem::take(&mut listed);
                out.push(Change::Synced(kind));
            }
            Ok(Event::Apply(object)) => {
                let (key, change) = present(kind, object, &change);
                known.insert(key);
                out.push(change);
            }
            Ok(Event::Delete(object)) => {
                let key = key_of(&object);
                known.remove(&key);
                out.push(change(key, None));
            }
            Err(error) => {
                metrics
                    .watch_errors
                    .get_or_create(&crate::metrics::kind(kind))
                    .inc();
                metrics.api.failed();
                tracing::warn!(kind, %error, "watch interrupted");
            }
        }
        for change in out {
            if changes.send(change).await.is_err() {
                return;
            }
        }
    }
}

/// One malformed object must not hide the others; it counts as absent.
fn present<K: Resource>(
    kind: &'static str,
    object: DeserializeGuard<K>,
    change: &impl Fn(Key, Option<K>) -> Change,
) -> (Key, Change)
where
    DeserializeGuard<K>: Resource,
{
    let key = key_of(&object);
    let object = object.0.inspect_err(
        |error| tracing::warn!(kind, object = %key, error = %error.error, "unreadable"),
    );
    (key.clone(), change(key, object.ok()))
}

struct WorldTask {
    world: World,
    publish: watch::Sender<Arc<World>>,
    concern: mpsc::UnboundedSender<Concerned>,
    sync: watch::Sender<bool>,
    writer: reflector::store::Writer<ServiceFence>,
    waiting: BTreeSet<&'static str>,
    changes: mpsc::Sender<Change>,
    /// How many policies were taken away so far.
    retired: u64,
}

impl WorldTask {
    /// Takes in whatever is there, publishes once, goes on.
    async fn run(mut self, mut inbox: mpsc::Receiver<Change>, metrics: Arc<Metrics>) {
        let mut batch = Vec::new();
        while inbox.recv_many(&mut batch, BACKLOG).await > 0 {
            let mut concerned = Concerned::default();
            for change in batch.drain(..) {
                self.take(change, &mut concerned);
            }
            metrics.observe_world(&self.world);
            self.publish.send_replace(Arc::new(self.world.clone()));
            // Before everything is listed, half a mesh would look like a small one.
            if self.waiting.is_empty() {
                if !*self.sync.borrow() {
                    concerned.all = true;
                    self.sync.send_replace(true);
                }
                if concerned != Concerned::default() && self.concern.send(concerned).is_err() {
                    return;
                }
            }
        }
    }

    fn take(&mut self, change: Change, concerned: &mut Concerned) {
        match change {
            Change::Namespace(name, labels) => self.namespace(name, labels, concerned),
            Change::Service(key, facts) => self.service(&key, facts, concerned),
            Change::ServiceEntry(key, hosts) => {
                let old = self.world.service_entries.get(&key).map(AsRef::as_ref);
                if old != hosts.as_ref() {
                    self.world.set_service_entry(&key, hosts);
                    concerned.all = true;
                }
            }
            Change::VirtualService(key, hosts) => {
                let old = self.world.virtual_services.get(&key).map(AsRef::as_ref);
                if old != hosts.as_ref() {
                    self.world.set_virtual_service(&key, hosts);
                    concerned.all = true;
                }
            }
            Change::Policy(key, facts, ours) => {
                let old = self.world.policies.get(&key).map(AsRef::as_ref);
                if old != facts.as_ref() {
                    let named = |facts: Option<&PolicyFacts>| {
                        facts.filter(|facts| !facts.callers.is_empty()).cloned()
                    };
                    concerned.all |= named(old) != named(facts.as_ref());
                    if let Some(old) = old.filter(|old| old.by_source) {
                        let old = PolicyFacts {
                            callers: BTreeSet::new(),
                            ..old.clone()
                        };
                        self.retire(&key, old);
                    }
                    set(&mut self.world.policies, key.clone(), facts.map(Box::new));
                }
                set(&mut self.world.own_policies, key, ours);
            }
            Change::Retired(key) => drop(self.world.policies.remove(&key)),
            Change::GlobalProxy(key, ready) => {
                let slices = &mut self.world.global_proxy;
                match ready {
                    Some(ready) => drop(slices.insert(key, ready)),
                    None => drop(slices.remove(&key)),
                }
                self.look_for_global_proxy(concerned);
            }
            Change::LookForGlobalProxy => {
                let gone = self.world.global_proxy_endpoints() == 0;
                concerned.all |= gone && !self.world.global_proxy_gone;
                self.world.global_proxy_gone |= gone;
            }
            Change::Pod(key, facts) => {
                let old = self.world.pods.get(&key).map(AsRef::as_ref);
                if old != facts.as_ref() {
                    // Policies name callers by what their pods run as.
                    let runs_as = |facts: Option<&PodFacts>| {
                        facts.map(|facts| (facts.service_account.clone(), facts.labels.clone()))
                    };
                    if runs_as(old) != runs_as(facts.as_ref()) {
                        for facts in [old, facts.as_ref()].into_iter().flatten() {
                            let fences = fences_of_pod(&self.world, &key.namespace, facts);
                            concerned.fences.extend(fences);
                        }
                    }
                    self.world.set_pod(&key, facts);
                }
            }
            Change::Sidecar(key, object) => {
                let old = self.world.sidecars.get(&key).map(AsRef::as_ref);
                for sidecar in [old, object.as_deref()].into_iter().flatten() {
                    match fence_of(sidecar) {
                        Some(fence) => drop(concerned.fences.insert(fence)),
                        // Somebody else's may be in the way of any fence beside it.
                        None => drop(concerned.namespaces.insert(key.namespace.clone())),
                    }
                }
                set(&mut self.world.sidecars, key, object);
            }
            Change::EnvoyFilter(key, object) => {
                let old = self.world.envoy_filters.get(&key).map(AsRef::as_ref);
                let both = [old, object.as_deref()].into_iter().flatten();
                concerned.fences.extend(both.filter_map(fence_of));
                set(&mut self.world.envoy_filters, key, object);
            }
            Change::Fence(key, object) => {
                concerned.fences.insert(key.clone());
                let event = match (&object, self.world.fences.get(&key)) {
                    (Some(fence), _) => Some(Event::Apply(fence.as_ref().clone())),
                    (None, Some(gone)) => Some(Event::Delete(gone.as_ref().clone())),
                    (None, None) => None,
                };
                if let Some(event) = event {
                    self.writer.apply_watcher_event(&event);
                }
                set(&mut self.world.fences, key, object);
            }
            Change::Synced(kind) => {
                if kind == "EndpointSlice" {
                    self.look_for_global_proxy(concerned);
                }
                if kind == "ServiceFence" {
                    // The store takes only what comes between these two; it holds all fences already.
                    self.writer.apply_watcher_event(&Event::Init);
                    for fence in self.world.fences.values() {
                        self.writer
                            .apply_watcher_event(&Event::InitApply(fence.as_ref().clone()));
                    }
                    self.writer.apply_watcher_event(&Event::InitDone);
                }
                self.waiting.remove(kind);
            }
        }
    }

    /// It is back as soon as it is, and gone once it was for a while.
    fn look_for_global_proxy(&mut self, concerned: &mut Concerned) {
        if self.world.global_proxy_endpoints() > 0 {
            concerned.all |= self.world.global_proxy_gone;
            self.world.global_proxy_gone = false;
            return;
        }
        let changes = self.changes.clone();
        tokio::spawn(async move {
            tokio::time::sleep(GONE_AFTER).await;
            // The world's task ends with the process.
            let _ = changes.send(Change::LookForGlobalProxy).await;
        });
    }

    /// Keeps what a policy said for as long as some proxy may still go by it: a host that asks who is calling must not
    /// be called under another identity while it does.
    fn retire(&mut self, key: &Key, old: PolicyFacts) {
        self.retired += 1;
        // No object can have this name.
        let name = format!("{}#{}", key.name, self.retired);
        let key = Key::new(&*key.namespace, name);
        self.world.policies.insert(key.clone(), Arc::new(old));
        let changes = self.changes.clone();
        tokio::spawn(async move {
            tokio::time::sleep(RETIREMENT).await;
            // The world's task ends with the process.
            let _ = changes.send(Change::Retired(key)).await;
        });
    }

    fn namespace(
        &mut self,
        name: String,
        labels: Option<BTreeMap<String, String>>,
        concerned: &mut Concerned,
    ) {
        let old = self.world.namespaces.get(&name);
        // The redirect lists the namespaces that exist.
        concerned.all |= old.is_some() != labels.is_some();
        concerned.with_selectors |= old.map(AsRef::as_ref) != labels.as_ref();
        match labels {
            Some(labels) => drop(self.world.namespaces.insert(name, Arc::new(labels))),
            None => drop(self.world.namespaces.remove(&name)),
        }
    }

    fn service(&mut self, key: &Key, facts: Option<ServiceFacts>, concerned: &mut Concerned) {
        let old = self.world.services.get(key);
        if old.map(AsRef::as_ref) == facts.as_ref() {
            return;
        }
        let in_every_scope = |facts: Option<&ServiceFacts>| {
            facts
                .filter(|facts| facts.needs_scope)
                .map(|facts| facts.export_to.clone())
        };
        let before = in_every_scope(old.map(AsRef::as_ref));
        concerned.all |= before != in_every_scope(facts.as_ref());
        concerned.namespaces.insert(key.namespace.clone());
        concerned.with_selectors = true;
        let ranges: Vec<_> = self.world.service_ranges().collect();
        self.world.set_service(key, facts);
        // The redirect lists them.
        concerned.all |= !self.world.service_ranges().eq(ranges);
    }
}

/// Whether Fenceline wrote it.
pub fn is_ours<K: Resource>(object: &K) -> bool {
    object
        .labels()
        .get(MANAGED_BY)
        .is_some_and(|manager| manager == MANAGER)
}

fn set<T>(map: &mut imbl::OrdMap<Key, Arc<T>>, key: Key, value: Option<Box<T>>) {
    match value {
        Some(value) => drop(map.insert(key, Arc::from(value))),
        None => drop(map.remove(&key)),
    }
}

/// The fence that an object of ours was written for: by its labels, or by its owner where somebody took those off.
pub fn fence_of<K: Resource>(object: &K) -> Option<Key> {
    let labelled = object.labels().get(FENCE_LABEL).filter(|_| is_ours(object));
    let group = format!("{}/", ServiceFence::group(&()));
    let owner = object.owner_references().iter().find(|owner| {
        owner.kind == ServiceFence::kind(&()) && owner.api_version.starts_with(&group)
    });
    let name = labelled.or_else(|| owner.map(|owner| &owner.name))?;
    Some(Key::new(object.namespace()?, name))
}
