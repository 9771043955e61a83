//! What a fence should make of Istio's configuration: a plain function of the fence, the world and the time.

use std::collections::BTreeSet;
use std::net::IpAddr;

use fenceline_crds::istio::{EgressListener, EnvoyFilter, Sidecar, SidecarSpec, WorkloadSelector};
use fenceline_crds::{Mode, Scope, ServiceFence};
use jiff::{SignedDuration, Timestamp};
use kube::api::ObjectMeta;

use super::conflict::{Outside, foreign_sidecars, senior_fences};
use super::explain::Why;
use super::redirect;
use super::scope::scope;
use super::select::{self, Labels, NoPods, is_of_namespace};
use super::stage::EVERYTHING;
use super::{Settings, owned};
use crate::world::{Host, Key, World};

/// What to do about a fence.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    pub verdict: Verdict,
    /// Pods whose proxies refused configuration during the last step. Found only by looking.
    pub rejected: Vec<IpAddr>,
    /// What the API said when it refused an object. Found only by writing.
    pub refused: Option<String>,
    /// Whether that was for an object's size. Found only by writing.
    pub too_large: bool,
    /// Whether first calls go nowhere.
    pub global_proxy_gone: bool,
    pub scope: Scope,
    /// Hosts whose AuthorizationPolicies name the workload as a caller.
    pub named: BTreeSet<String>,
    /// What is left out and why: declared dependencies that mean nothing, pods without a sidecar. They do not stop the others.
    pub remarks: Vec<String>,
    /// The bounds that something of the fence is over.
    pub over: BTreeSet<&'static str>,
    /// Hosts that were first called while the fence only observed, the latest first: those calls would have been first
    /// calls.
    pub called_since: Vec<String>,
    /// When time alone changes the plan: a declaration ends.
    pub again_in: Option<SignedDuration>,
}

/// What becomes of the fence's objects.
#[derive(Clone, Debug, PartialEq)]
pub enum Verdict {
    /// Both objects are as given.
    Enforce(Box<Objects>),
    /// Nothing of ours is there; but where the namespace has a fence of its own in force, a Sidecar that lets these pods
    /// off it.
    Observe(Option<Box<Sidecar>>),
    /// Nothing of ours is there, since it has no pods.
    NoPods(NoPods),
    /// Nothing of ours is there, since somebody else's Sidecar configures the same pods.
    Conflicted(Vec<Key>),
    /// Nothing of ours is there, since other fences select the same pods.
    Overlapped(Vec<Key>),
    /// Nothing of ours is there, since no pod has a sidecar.
    NotInMesh(Outside),
    /// Not all of ours is there, since somebody else's object of this kind has the name. Found only by writing.
    NameTaken(&'static str, Key),
}

/// The objects of an enforced fence.
#[derive(Clone, Debug, PartialEq)]
pub struct Objects {
    /// Absent where first calls are left to Istio.
    pub redirect: Option<EnvoyFilter>,
    pub sidecar: Sidecar,
}

/// Tells of each host of a fence's scope why it is there.
pub(super) fn hosts_and_why(
    fence: &ServiceFence,
    world: &World,
    settings: &Settings,
    now: Timestamp,
    note: &mut dyn FnMut(&Host, Why<'_>),
) {
    let namespace = fence.metadata.namespace.clone().unwrap_or_default();
    scope(fence, &namespace, world, settings, now, note);
}

/// The name of a fence's objects.
pub fn object_name(fence: &str) -> String {
    format!("fenceline-{fence}")
}

/// Where a fence's objects are.
pub fn object_key(fence: &Key) -> Key {
    Key::new(&*fence.namespace, object_name(&fence.name))
}

/// Plans one fence.
pub fn plan(fence: &ServiceFence, world: &World, settings: &Settings, now: Timestamp) -> Plan {
    let namespace = fence.metadata.namespace.clone().unwrap_or_default();
    let mut scoped = scope(fence, &namespace, world, settings, now, &mut |_, _| ());
    scoped.remarks.extend(super::learnt::full(fence));
    let verdict = match select::labels(fence, world) {
        Err(why) => Verdict::NoPods(why),
        Ok(labels) => {
            let outside = Outside::of(&namespace, &labels, world);
            if outside.pods > 0 && !outside.everybody() {
                scoped.remarks.push(outside.why());
            }
            match obstacle(fence, &labels, outside, world) {
                Some(obstacle) => obstacle,
                None if fence.spec.mode == Mode::Observe => {
                    let off = !labels.is_empty() && is_fenced(&namespace, world);
                    let everything = || SidecarSpec {
                        workload_selector: selector(labels),
                        egress: vec![EgressListener {
                            hosts: vec![EVERYTHING.to_owned()],
                            ..EgressListener::default()
                        }],
                        ..SidecarSpec::default()
                    };
                    Verdict::Observe(off.then(|| {
                        Box::new(Sidecar {
                            metadata: metadata(fence, world),
                            spec: everything(),
                        })
                    }))
                }
                None => Verdict::Enforce(Box::new(Objects {
                    redirect: redirect::of_fence(fence, &labels, world, settings).map(|spec| {
                        EnvoyFilter {
                            metadata: metadata(fence, world),
                            spec,
                        }
                    }),
                    sidecar: Sidecar {
                        metadata: metadata(fence, world),
                        spec: sidecar(labels, &scoped.hosts),
                    },
                })),
            }
        }
    };
    Plan {
        verdict,
        rejected: Vec::new(),
        refused: None,
        too_large: false,
        global_proxy_gone: world.global_proxy_gone,
        scope: scoped.counts,
        named: scoped.named,
        remarks: scoped.remarks,
        over: scoped.over,
        called_since: called_since(fence, &scoped.learnt),
        again_in: scoped.next_end.map(|end| end.duration_since(now)),
    }
}

/// Whether a fence for the whole namespace is to be in force.
fn is_fenced(namespace: &str, world: &World) -> bool {
    let mut fences = select::fences_in(world, namespace);
    fences.any(|(_, fence)| is_of_namespace(fence) && fence.spec.mode == Mode::Enforce)
}

/// The first answer of Prometheus about a fence is history.
const HISTORY: SignedDuration = SignedDuration::from_mins(2);

fn called_since(fence: &ServiceFence, learnt: &BTreeSet<String>) -> Vec<String> {
    let Some(created) = &fence.metadata.creation_timestamp else {
        return Vec::new();
    };
    let dependencies = fence.status.iter().flat_map(|status| &status.dependencies);
    let mut since: Vec<_> = dependencies
        .filter(|known| known.last_seen.is_some() && learnt.contains(&known.host))
        .filter(|known| known.first_seen.duration_since(created.0) > HISTORY)
        .collect();
    since.sort_by_key(|known| std::cmp::Reverse(known.first_seen));
    since.into_iter().map(|known| known.host.clone()).collect()
}

/// What keeps the fence from being in force.
fn obstacle(
    fence: &ServiceFence,
    labels: &Labels,
    outside: Outside,
    world: &World,
) -> Option<Verdict> {
    let foreign = foreign_sidecars(fence, labels, world);
    if !foreign.is_empty() {
        return Some(Verdict::Conflicted(foreign));
    }
    let seniors = senior_fences(fence, labels, world);
    if !seniors.is_empty() {
        return Some(Verdict::Overlapped(seniors));
    }
    outside.everybody().then_some(Verdict::NotInMesh(outside))
}

fn metadata(fence: &ServiceFence, world: &World) -> ObjectMeta {
    let name = fence.metadata.name.clone().unwrap_or_default();
    ObjectMeta {
        name: Some(object_name(&name)),
        namespace: fence.metadata.namespace.clone(),
        ..owned(fence, world)
    }
}

/// Absent for a whole namespace.
pub(super) fn selector(labels: Labels) -> Option<WorkloadSelector> {
    (!labels.is_empty()).then(|| WorkloadSelector {
        labels,
        ..WorkloadSelector::default()
    })
}

/// Exact hosts only: one wildcard would make istiod look at every service of the mesh (istio#60473). Never an empty
/// list, which would mean everything (istio#59376): the global proxy is always in it.
fn sidecar(labels: Labels, hosts: &BTreeSet<Host>) -> SidecarSpec {
    SidecarSpec {
        workload_selector: selector(labels),
        egress: vec![EgressListener {
            hosts: hosts.iter().map(Host::to_string).collect(),
            ..EgressListener::default()
        }],
        ..SidecarSpec::default()
    }
}
