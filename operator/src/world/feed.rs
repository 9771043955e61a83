//! Watches what the [`World`] is made of, each kind by itself, and reports it to the world's task.

use std::collections::BTreeSet;
use std::fmt::Debug;
use std::net::IpAddr;
use std::sync::Arc;

use fenceline_crds::istio::{
    AuthorizationPolicy, DestinationRule, EnvoyFilter, GRPCRoute, HTTPRoute, ServiceEntry, Sidecar,
    VirtualService,
};
use fenceline_crds::{FencePolicy, RateLimit, Router, ServiceFence, TrafficPatch};
use futures::{StreamExt, pin_mut};
use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::api::core::v1::{ConfigMap, Namespace, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::runtime::watcher::{self, Event, watcher};
use kube::runtime::{WatchStreamExt, reflector};
use kube::{Api, CustomResourceExt, Resource, ResourceExt};
use serde::de::DeserializeOwned;
use tokio::sync::{mpsc, watch};

use super::change::Change;
pub use super::change::Concerned;
use super::dependents::Dependents;
use super::read::{Guarded, LeanPod, Watched};
use super::task::WorldTask;
use super::{
    Key, NamedHosts, PodFacts, PolicyFacts, Proxy, RuleFacts, ServiceFacts, World, mesh_config,
};
use crate::apply::{FENCE_LABEL, MANAGED_BY, MANAGER};
use crate::fence::Settings;
use crate::metrics::Metrics;
use crate::process::Pulse;

/// Changes that may wait for the world's task; a watch that is faster waits for it.
pub(super) const BACKLOG: usize = 4096;

/// How many objects are listed at a time: what is not kept of them takes memory meanwhile, and each page takes kube-apiserver
/// a tenth of a second where nothing changes.
const PAGE: u32 = 500;

/// The kinds that are watched, by the names that metrics and readiness use.
pub const KINDS: [&str; 19] = [
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
    "FencePolicy",
    "Router",
    "TrafficPatch",
    "RateLimit",
    "DestinationRule",
    "HTTPRoute",
    "GRPCRoute",
    "ConfigMap",
    "CustomResourceDefinition",
];

/// Kinds that a cluster need not have: the Gateway API, and what is newer than Fenceline's first kinds, where somebody updated the operator alone.
const OPTIONAL: [&str; 5] = [
    "HTTPRoute",
    "GRPCRoute",
    "Router",
    "TrafficPatch",
    "RateLimit",
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
    settings: &Settings,
    metrics: &Arc<Metrics>,
    pulse: Pulse,
) -> Feed {
    let Settings {
        cluster_domain,
        global_proxy,
        root_namespace,
        mesh_config,
        ..
    } = settings;
    let (changes, inbox) = mpsc::channel(BACKLOG);
    let world = World::new(cluster_domain);
    let (publish, published) = watch::channel(Arc::new(world.clone()));
    let (concern, concerned) = mpsc::unbounded_channel();
    let (sync, synced) = watch::channel(false);
    let (fences, writer) = reflector::store();

    let all = watcher::Config::default().page_size(PAGE);
    let ours = all.clone().labels(&format!("{MANAGED_BY}={MANAGER}"));
    let watches = Watches {
        client: client.clone(),
        changes,
        metrics: Arc::clone(metrics),
    };
    let domain = cluster_domain.clone();
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
        let hosts = object
            .as_ref()
            .map(|object| NamedHosts::of_virtual_service(object, &domain));
        let ours = object.filter(is_ours).map(Box::new);
        Change::VirtualService(key, hosts, ours)
    });
    let domain = cluster_domain.clone();
    watches.watch(&all, move |key, object: Option<DestinationRule>| {
        let facts = object.as_ref().map(|rule| RuleFacts::of(rule, &domain));
        let ours = object.filter(is_ours).map(Box::new);
        Change::Rule(key, facts, ours)
    });
    watches.watch(&all, |key, object: Option<Router>| {
        Change::Router(key, object.map(Box::new))
    });
    watches.watch(&all, |key, object: Option<TrafficPatch>| {
        Change::TrafficPatch(key, object.map(Box::new))
    });
    watches.watch(&all, |key, object: Option<RateLimit>| {
        Change::RateLimit(key, object.map(Box::new))
    });
    let namespace = global_proxy.namespace.clone();
    let operator = settings.operator.namespace.clone();
    watches.watch_all(&all, move |key, object: Read<AuthorizationPolicy>| {
        // Those that we write follow from the others.
        match object {
            Read::There(object) if key.namespace == namespace && is_ours(&object) => {
                Change::Policy(key, None, Some(Box::new(object)))
            }
            Read::There(object) => {
                Change::Policy(key, Some(PolicyFacts::of(&object, &operator)), None)
            }
            Read::Unreadable => Change::Policy(key, Some(PolicyFacts::unreadable()), None),
            Read::Gone => Change::Policy(key, None, None),
        }
    });
    let pods: Api<LeanPod> = Api::all(client.clone());
    watches.watch_in(pods, &all, |key, object: Option<LeanPod>| {
        Change::Pod(key, object.map(|object| pod_facts(&object)))
    });
    let slices = all
        .clone()
        .labels(&format!("{SERVICE_NAME}={}", global_proxy.name));
    let api = guarded::<EndpointSlice>(client, &global_proxy.namespace);
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

    let domain = cluster_domain.clone();
    watches.watch(&all, move |key, object: Option<HTTPRoute>| {
        Change::route("http", key, object.map(|route| route.spec.other), &domain)
    });
    let domain = cluster_domain.clone();
    watches.watch(&all, move |key, object: Option<GRPCRoute>| {
        Change::route("grpc", key, object.map(|route| route.spec.other), &domain)
    });
    let Key { namespace, name } = mesh_config;
    let named = all.clone().fields(&format!("metadata.name={name}"));
    let api = guarded::<ConfigMap>(client, namespace);
    watches.watch_in(api, &named, |_, object: Option<ConfigMap>| {
        Change::MeshConfig(object.as_ref().map(mesh_config::hosts).unwrap_or_default())
    });
    watches.watch(&all, |key, object: Option<FencePolicy>| {
        Change::FencePolicy(key.name, object.map(Box::new))
    });
    let definition = all
        .clone()
        .fields(&format!("metadata.name={}", ServiceFence::crd_name()));
    watches.watch(
        &definition,
        |_, object: Option<CustomResourceDefinition>| {
            Change::Definition(object.and_then(|object| object.owner_ref(&())))
        },
    );

    let task = WorldTask {
        world,
        publish,
        concern,
        sync,
        writer,
        waiting: KINDS.into(),
        changes: watches.changes,
        root_namespace: root_namespace.clone(),
        retired: 0,
        dependents: Dependents::default(),
    };
    let metrics = Arc::clone(metrics);
    tokio::spawn(async move { pulse.during(task.run(inbox, metrics)).await });
    Feed {
        world: published,
        concerned,
        fences,
        synced,
    }
}

fn guarded<K>(client: &kube::Client, namespace: &str) -> Api<Guarded<K>>
where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope>,
{
    Api::namespaced(client.clone(), namespace)
}

fn pod_facts(pod: &LeanPod) -> PodFacts {
    let LeanPod { spec, status, .. } = pod;
    // A finished pod has given its address back.
    let runs = !matches!(status.phase.as_str(), "Succeeded" | "Failed");
    let addressed = !spec.host_network && runs;
    PodFacts {
        proxy: proxy(pod),
        runs,
        ready: runs && is_ready(pod),
        service_account: spec
            .service_account_name
            .clone()
            .unwrap_or_else(|| "default".to_owned()),
        workload: workload(pod),
        labels: pod.metadata.labels.clone().unwrap_or_default(),
        addresses: status
            .pod_ips
            .iter()
            .filter(|_| addressed)
            .filter_map(|address| address.ip.parse::<IpAddr>().ok())
            .collect(),
    }
}

/// Whether it takes requests.
fn is_ready(pod: &LeanPod) -> bool {
    let conditions = pod.status.conditions.iter();
    let mut ready = conditions.filter(|condition| condition.type_ == "Ready");
    pod.metadata.deletion_timestamp.is_none() && ready.any(|condition| condition.status == "True")
}

/// What carries a pod's traffic: injection adds a container, and since Istio 1.27 an init container that stays.
/// <https://istio.io/latest/docs/ambient/architecture/traffic-redirection/> for the annotation of ambient mode.
fn proxy(pod: &LeanPod) -> Proxy {
    let spec = &pod.spec;
    let mut containers = spec.containers.iter().chain(&spec.init_containers);
    let redirected = pod.annotations().get("ambient.istio.io/redirection");
    if containers.any(|container| container.name == "istio-proxy") {
        Proxy::Sidecar
    } else if spec.host_network {
        Proxy::HostNetwork
    } else if redirected.is_some_and(|state| state == "enabled") {
        Proxy::Ambient
    } else {
        Proxy::Nothing
    }
}

/// What a pod is a replica of, by Istio's rules (pkg/kube/inject, `GetDeployMetaFromPod`).
fn workload(pod: &LeanPod) -> String {
    let owners = pod.owner_references().iter();
    let Some(owner) = owners
        .into_iter()
        .find(|owner| owner.controller == Some(true))
    else {
        return pod.name_any();
    };
    // Of Deployments, and of Argo Rollouts.
    let hash = |label| pod.labels().get(label);
    let hash = hash("pod-template-hash").or_else(|| hash("rollouts-pod-template-hash"));
    let name = owner.name.as_str();
    let of_deployment = hash
        .filter(|_| owner.kind == "ReplicaSet")
        .and_then(|hash| name.strip_suffix(hash.as_str())?.strip_suffix('-'));
    // The time that a CronJob's Job is for, in minutes since 1970.
    let of_cron_job = name
        .rsplit_once('-')
        .filter(|(_, time)| owner.kind == "Job" && time.len() >= 8)
        .filter(|(_, time)| time.bytes().all(|byte| byte.is_ascii_digit()))
        .map(|(name, _)| name);
    of_deployment.or(of_cron_job).unwrap_or(name).to_owned()
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

/// What a watch knows of an object.
enum Read<T> {
    There(T),
    /// It is there, and malformed.
    Unreadable,
    Gone,
}

impl<T> Read<T> {
    /// What cannot be read counts as absent.
    fn readable(self) -> Option<T> {
        match self {
            Self::There(object) => Some(object),
            Self::Unreadable | Self::Gone => None,
        }
    }
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
        let api: Api<Guarded<K>> = Api::all(self.client.clone());
        self.watch_in(api, config, change);
    }

    /// As [`Self::watch`], with those that are there and cannot be read.
    fn watch_all<K, F>(&self, config: &watcher::Config, change: F)
    where
        K: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + 'static,
        F: Fn(Key, Read<K>) -> Change + Send + 'static,
    {
        let api: Api<Guarded<K>> = Api::all(self.client.clone());
        self.start(api, config, change);
    }

    fn watch_in<W, F>(&self, api: Api<W>, config: &watcher::Config, change: F)
    where
        W: Watched,
        F: Fn(Key, Option<W::Object>) -> Change + Send + 'static,
    {
        self.start(api, config, move |key, object: Read<W::Object>| {
            change(key, object.readable())
        });
    }

    fn start<W, F>(&self, api: Api<W>, config: &watcher::Config, change: F)
    where
        W: Watched,
        F: Fn(Key, Read<W::Object>) -> Change + Send + 'static,
    {
        let (changes, metrics) = (self.changes.clone(), Arc::clone(&self.metrics));
        tokio::spawn(follow(api, config.clone(), change, changes, metrics));
    }
}

fn key_of<K: Resource>(object: &K) -> Key {
    Key::new(object.namespace().unwrap_or_default(), object.name_any())
}

/// Follows one kind for ever. What was deleted while the watch was down is found by comparing with the new list.
async fn follow<W, F>(
    api: Api<W>,
    config: watcher::Config,
    change: F,
    changes: mpsc::Sender<Change>,
    metrics: Arc<Metrics>,
) where
    W: Watched,
    F: Fn(Key, Read<W::Object>) -> Change,
{
    let kind: &'static str = KINDS
        .into_iter()
        .find(|kind| *kind == W::kind(&()))
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
                        .map(|gone| change(gone, Read::Gone)),
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
                out.push(change(key, Read::Gone));
            }
            // Once it is there, it is found by trying.
            Err(error) if is_absent(&error) && OPTIONAL.contains(&kind) => {
                out.push(Change::Synced(kind));
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

fn is_absent(error: &watcher::Error) -> bool {
    match error {
        watcher::Error::InitialListFailed(kube::Error::Api(status))
        | watcher::Error::WatchStartFailed(kube::Error::Api(status)) => status.code == 404,
        _ => false,
    }
}

/// One malformed object must not hide the others.
fn present<W: Watched>(
    kind: &'static str,
    object: W,
    change: &impl Fn(Key, Read<W::Object>) -> Change,
) -> (Key, Change) {
    let key = key_of(&object);
    let object = object
        .read()
        .inspect_err(|error| tracing::warn!(kind, object = %key, error, "unreadable"));
    let object = object.map_or(Read::Unreadable, Read::There);
    (key.clone(), change(key, object))
}

/// Whether Fenceline wrote it.
pub fn is_ours<K: Resource>(object: &K) -> bool {
    object
        .labels()
        .get(MANAGED_BY)
        .is_some_and(|manager| manager == MANAGER)
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
