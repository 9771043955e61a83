//! What the watches report, and which fences to look at again for it.

use std::collections::{BTreeMap, BTreeSet};

use fenceline_crds::istio::{
    AuthorizationPolicy, DestinationRule, EnvoyFilter, Other, Sidecar, VirtualService,
};
use fenceline_crds::{FencePolicy, RateLimit, Router, ServiceFence, TrafficPatch};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;

use super::{Key, NamedHosts, PodFacts, PolicyFacts, RuleFacts, ServiceFacts};

/// What changed, already cut to what the world keeps.
#[derive(Debug)]
pub(super) enum Change {
    Namespace(String, Option<BTreeMap<String, String>>),
    Service(Key, Option<ServiceFacts>),
    ServiceEntry(Key, Option<NamedHosts>),
    /// A VirtualService's hosts, and all of it where it is ours.
    VirtualService(Key, Option<NamedHosts>, Option<Box<VirtualService>>),
    /// What is kept of a DestinationRule, and all of it where it is ours.
    Rule(Key, Option<RuleFacts>, Option<Box<DestinationRule>>),
    Router(Key, Option<Box<Router>>),
    TrafficPatch(Key, Option<Box<TrafficPatch>>),
    RateLimit(Key, Option<Box<RateLimit>>),
    /// A policy, and whether Fenceline wrote it.
    Policy(Key, Option<PolicyFacts>, Option<Box<AuthorizationPolicy>>),
    Pod(Key, Option<PodFacts>),
    /// A host that lost its protection has lost it everywhere.
    Forgotten(String),
    /// A policy that was taken away is no longer in force anywhere.
    Retired(Key),
    /// How many endpoints of the global proxy are ready, by slice.
    GlobalProxy(Key, Option<usize>),
    /// Time to see whether it came back.
    LookForGlobalProxy,
    Sidecar(Key, Option<Box<Sidecar>>),
    EnvoyFilter(Key, Option<Box<EnvoyFilter>>),
    Fence(Key, Option<Box<ServiceFence>>),
    FencePolicy(String, Option<Box<FencePolicy>>),
    /// The hosts of MeshConfig's providers.
    MeshConfig(BTreeSet<String>),
    /// The CustomResourceDefinition of fences.
    Definition(Option<OwnerReference>),
    /// A watch has delivered all there is.
    Synced(&'static str),
}

impl Change {
    /// A route of the Gateway API of some kind. No VirtualService can have this name.
    pub(super) fn route(kind: &str, key: Key, spec: Option<Other>, cluster_domain: &str) -> Self {
        let hosts = spec.map(|spec| NamedHosts::of_route(&key.namespace, &spec, cluster_domain));
        let name = format!("{kind}/{}", key.name);
        Self::VirtualService(Key::new(key.namespace, name), hosts, None)
    }
}

/// What a change concerns.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Concerned {
    pub all: bool,
    /// All of these namespaces.
    pub namespaces: BTreeSet<String>,
    pub fences: BTreeSet<Key>,
    /// What all redirects have in common.
    pub redirect: bool,
}
