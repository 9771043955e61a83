//! What a fence should make of Istio's configuration: a plain function of the fence, the world and the time.

use std::collections::{BTreeMap, BTreeSet};

use fenceline_crds::istio::{EgressListener, EnvoyFilter, Sidecar, SidecarSpec, WorkloadSelector};
use fenceline_crds::{
    Evidence, LearntDependency, Mode, NonHttp, Scope, ServiceFence, ServiceSelector,
};
use jiff::{SignedDuration, Timestamp};
use kube::api::ObjectMeta;
use kube::core::{Selector, SelectorExt};
use regex::Regex;

use super::redirect::redirect;
use super::select::{self, Labels, NoPods};
use super::{Settings, owned};
use crate::observe::resolve::{Unresolved, full_names, resolve};
use crate::world::feed::fence_of;
use crate::world::{Host, Key, World};

/// What to do about a fence.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    pub verdict: Verdict,
    /// Whether first calls go nowhere.
    pub global_proxy_gone: bool,
    pub scope: Scope,
    /// Hosts whose AuthorizationPolicies name the workload as a caller.
    pub named: BTreeSet<String>,
    /// Declared dependencies that mean nothing, each with why; they do not stop the others.
    pub remarks: Vec<String>,
    /// When time alone changes the plan: a declaration ends.
    pub again_in: Option<SignedDuration>,
}

/// What becomes of the fence's objects.
#[derive(Clone, Debug, PartialEq)]
pub enum Verdict {
    /// Both objects are as given.
    Enforce(Box<Objects>),
    /// Nothing of ours is there.
    Observe,
    /// Nothing of ours is there, since it has no pods.
    NoPods(NoPods),
    /// Nothing of ours is there, since somebody else's Sidecar configures the same pods.
    Conflicted(Vec<Key>),
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

/// The name of a fence's objects.
pub fn object_name(fence: &str) -> String {
    format!("fenceline-{fence}")
}

/// Plans one fence.
pub fn plan(fence: &ServiceFence, world: &World, settings: &Settings, now: Timestamp) -> Plan {
    let namespace = fence.metadata.namespace.clone().unwrap_or_default();
    let scoped = scope(fence, &namespace, world, settings, now);
    let verdict = match select::labels(fence, world) {
        Err(why) => Verdict::NoPods(why),
        Ok(labels) => match foreign_sidecars(fence, &labels, world) {
            others if !others.is_empty() => Verdict::Conflicted(others),
            _ if fence.spec.mode == Mode::Observe => Verdict::Observe,
            _ => Verdict::Enforce(Box::new(Objects {
                redirect: redirect(fence, &labels, world, settings).map(|spec| EnvoyFilter {
                    metadata: metadata(fence, world),
                    spec,
                }),
                sidecar: Sidecar {
                    metadata: metadata(fence, world),
                    spec: sidecar(labels, &scoped.hosts),
                },
            })),
        },
    };
    Plan {
        verdict,
        global_proxy_gone: world.global_proxy_gone,
        scope: scoped.counts,
        named: scoped.named,
        remarks: scoped.remarks,
        again_in: scoped.next_end.map(|end| end.duration_since(now)),
    }
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

/// Sidecars that people wrote and that configure pods of this fence: of two, istiod takes the older, so ours might win
/// or lose by chance. One without a selector configures every pod of the namespace.
fn foreign_sidecars(fence: &ServiceFence, labels: &Labels, world: &World) -> Vec<Key> {
    let namespace = fence.metadata.namespace.as_deref().unwrap_or_default();
    let ours = object_name(fence.metadata.name.as_deref().unwrap_or_default());
    let of_namespace = world
        .sidecars
        .range(Key::new(namespace, "")..)
        .take_while(|(key, _)| key.namespace == namespace);
    of_namespace
        .filter(|(key, sidecar)| {
            let foreign = fence_of(sidecar.as_ref()).is_none();
            foreign && (key.name == ours || selects(sidecar, labels, namespace, world))
        })
        .map(|(key, _)| key.clone())
        .collect()
}

/// Whether a Sidecar selects pods that `labels` select: all of them by its labels, or one that runs.
fn selects(sidecar: &Sidecar, labels: &Labels, namespace: &str, world: &World) -> bool {
    let Some(selector) = &sidecar.spec.workload_selector else {
        return true;
    };
    if labels.is_empty() {
        // For its own pods it comes before one for the whole namespace.
        return false;
    }
    let theirs = &selector.labels;
    let shared = || {
        select::pods_in(world, namespace)
            .any(|pod| select::matches(theirs, &pod.labels) && select::matches(labels, &pod.labels))
    };
    select::matches(theirs, labels) || shared()
}

#[derive(Default)]
struct Scoped {
    hosts: BTreeSet<Host>,
    named: BTreeSet<String>,
    counts: Scope,
    remarks: Vec<String>,
    next_end: Option<Timestamp>,
}

/// The hosts in the fence's scope, and why.
fn scope(
    fence: &ServiceFence,
    namespace: &str,
    world: &World,
    settings: &Settings,
    now: Timestamp,
) -> Scoped {
    let view = world.view(namespace);
    let mut scoped = Scoped::default();
    let mut always = match fence.spec.non_http {
        NonHttp::Import => view.always.clone(),
        NonHttp::Learn => view.always.difference(&view.non_http).cloned().collect(),
    };
    always.insert(settings.global_proxy());
    for host in world.mesh_config.iter() {
        let found = resolve(world, &settings.root_namespace, host);
        let found = found.map(|host| hosts_named(world, namespace, &host.fqdn));
        always.extend(found.unwrap_or_default());
    }
    scoped.counts.always = count(always.len());

    let learnt: BTreeSet<Host> = learnt(fence, namespace, world)
        .filter(|host| !always.contains(host))
        .collect();
    scoped.counts.learnt = count(learnt.len());

    let named = named(fence, namespace, world, settings);
    scoped.named = named.iter().map(|host| host.fqdn.clone()).collect();
    scoped.counts.named = count(named.difference(&always).count());

    let mut declared = BTreeSet::new();
    for (index, dependency) in fence.spec.dependencies.iter().enumerate() {
        if dependency.until.is_some_and(|until| until <= now) {
            continue;
        }
        scoped.next_end = [scoped.next_end, dependency.until]
            .into_iter()
            .flatten()
            .min();
        if let Some(host) = &dependency.host {
            match declared_host(world, namespace, host) {
                Ok(hosts) => declared.extend(hosts),
                Err(why) => {
                    scoped
                        .remarks
                        .push(format!("spec.dependencies[{index}].host {host}: {why}"));
                }
            }
        }
        if let Some(services) = &dependency.services {
            match found(world, namespace, services) {
                Ok(hosts) => declared.extend(hosts),
                Err(why) => {
                    scoped
                        .remarks
                        .push(format!("spec.dependencies[{index}].services: {why}"));
                }
            }
        }
    }
    let targets: BTreeSet<Host> = learnt
        .iter()
        .chain(&named)
        .chain(&declared)
        .flat_map(|host| alias_target(world, namespace, &host.fqdn))
        .collect();
    declared.extend(targets);
    let known = learnt.iter().chain(&named).chain(&declared);
    let known: BTreeSet<&str> = known.map(|host| host.fqdn.as_str()).collect();
    let (implied, remarks) = aliases(fence, &known, namespace, world);
    declared.extend(implied);
    scoped.remarks.extend(remarks);
    scoped.counts.declared = count(
        declared
            .iter()
            .filter(|host| !always.contains(host))
            .count(),
    );

    scoped.hosts = always;
    scoped.hosts.extend(learnt);
    scoped.hosts.extend(named);
    scoped.hosts.extend(declared);
    scoped.counts.imported = count(scoped.hosts.len());
    scoped.counts.visible = view.visible.max(scoped.counts.imported);
    scoped
}

fn count(length: usize) -> u32 {
    u32::try_from(length).unwrap_or(u32::MAX)
}

/// What was learnt. A Service that is gone for the moment stays: a host that nothing answers to costs nothing, and when
/// it comes back its first call is not one.
fn learnt<'a>(
    fence: &'a ServiceFence,
    namespace: &'a str,
    world: &'a World,
) -> impl Iterator<Item = Host> {
    let dependencies = fence.status.iter().flat_map(|status| &status.dependencies);
    // What only a policy says is worked out from the policies of this moment.
    let seen = |learnt: &&LearntDependency| {
        let mut evidence = learnt.evidence.iter();
        evidence.any(|kind| *kind != Evidence::AuthorizationPolicy && fence.spec.believes(*kind))
    };
    dependencies
        .filter(seen)
        .flat_map(move |learnt| hosts_named(world, namespace, &learnt.host))
}

/// More would not fit into a fence's status; who is named by so many was not meant.
const MOST_NAMED: usize = 1000;

/// The hosts whose AuthorizationPolicies name the fence's pods as callers.
fn named(
    fence: &ServiceFence,
    namespace: &str,
    world: &World,
    settings: &Settings,
) -> BTreeSet<Host> {
    let Ok(labels) = select::labels(fence, world) else {
        return BTreeSet::new();
    };
    if !fence.spec.believes(Evidence::AuthorizationPolicy) {
        return BTreeSet::new();
    }
    let trust_domain = &settings.trust_domain;
    let identities: BTreeSet<String> = select::pods_in(world, namespace)
        .filter(|pod| select::matches(&labels, &pod.labels))
        .map(|pod| format!("{trust_domain}/ns/{namespace}/sa/{}", pod.service_account))
        .collect();
    if identities.is_empty() {
        // Nobody runs that a policy could mean; those who ran will be back.
        let known = fence.status.iter().flat_map(|status| &status.dependencies);
        return known
            .filter(|known| known.evidence.contains(&Evidence::AuthorizationPolicy))
            .flat_map(|known| world.providers(namespace, &known.host))
            .collect();
    }
    world
        .named_by_policies(&settings.root_namespace, namespace, &identities)
        .iter()
        .take(MOST_NAMED)
        .flat_map(|service| world.providers(namespace, &world.fqdn(service)))
        .collect()
}

/// What an ExternalName in the mesh stands for: istiod knows it as another name of that, and of nothing that is not in
/// scope (pilot/pkg/model/sidecar.go, `matchingAliasService`).
fn alias_target(world: &World, namespace: &str, fqdn: &str) -> BTreeSet<Host> {
    let service = world.service_named(fqdn);
    let facts = service.and_then(|key| world.services.get(&key));
    let target = facts.and_then(|facts| facts.alias_of.clone());
    target.map_or_else(BTreeSet::new, |target| world.providers(namespace, &target))
}

/// The hosts that go with those that are `known`, and aliases that mean nothing, each with why.
fn aliases(
    fence: &ServiceFence,
    known: &BTreeSet<&str>,
    namespace: &str,
    world: &World,
) -> (BTreeSet<Host>, Vec<String>) {
    let mut implied = BTreeSet::new();
    let mut remarks = Vec::new();
    for (index, alias) in fence.spec.aliases.iter().enumerate() {
        let pattern = match Regex::new(&format!("^(?:{})$", alias.pattern)) {
            Ok(pattern) => pattern,
            Err(error) => {
                remarks.push(format!("spec.aliases[{index}].pattern: {error}"));
                continue;
            }
        };
        for found in known.iter().filter_map(|host| pattern.captures(host)) {
            for template in &alias.hosts {
                let mut host = String::new();
                found.expand(template, &mut host);
                match declared_host(world, namespace, &host) {
                    Ok(hosts) => implied.extend(hosts),
                    Err(why) => remarks.push(format!("spec.aliases[{index}].hosts {host}: {why}")),
                }
            }
        }
    }
    (implied, remarks)
}

/// The hosts that a full name stands for in a Sidecar.
fn hosts_named(world: &World, namespace: &str, fqdn: &str) -> BTreeSet<Host> {
    let mut hosts = world.providers(namespace, fqdn);
    if hosts.is_empty()
        && let Some(service) = world.service_named(fqdn)
    {
        hosts.insert(Host {
            namespace: service.namespace,
            fqdn: fqdn.to_owned(),
        });
    }
    hosts
}

/// A declared host need not exist yet, where its name says which Service it will be.
fn declared_host(
    world: &World,
    namespace: &str,
    host: &str,
) -> Result<BTreeSet<Host>, &'static str> {
    let unknown = match resolve(world, namespace, host) {
        Ok(host) => return Ok(hosts_named(world, namespace, &host.fqdn)),
        Err(unknown) => unknown,
    };
    let name = host.trim_end_matches('.').to_ascii_lowercase();
    let will_be = full_names(world, namespace, &name)
        .into_iter()
        .find(|name| {
            let service = world.service_named(name);
            service.is_some_and(|key| world.namespaces.contains_key(&key.namespace))
        });
    match (will_be, unknown) {
        (Some(fqdn), _) => Ok(hosts_named(world, namespace, &fqdn)),
        (None, Unresolved::Malformed) => Err("not a DNS name"),
        (None, Unresolved::Unknown) => Err("nothing in the mesh answers to it"),
        (None, Unresolved::NotExported) => Err("not exported to this namespace"),
    }
}

/// The Services that a selector finds, of those that the fence's namespace may see.
fn found(world: &World, namespace: &str, services: &ServiceSelector) -> Result<Vec<Host>, String> {
    let of_services = select::label_selector(&services.selector)?;
    let of_namespaces = services
        .namespace_selector
        .as_ref()
        .map(select::label_selector);
    let of_namespaces = of_namespaces.transpose()?;
    let empty = BTreeMap::new();
    let in_namespace = |key: &Key, selector: &Option<Selector>| match selector {
        None => key.namespace == namespace,
        Some(selector) => {
            let labels = world.namespaces.get(&key.namespace);
            selector.matches(labels.map_or(&empty, AsRef::as_ref))
        }
    };
    Ok(world
        .services
        .iter()
        .filter(|(key, facts)| {
            !facts.external_name
                && facts.export_to.includes(namespace)
                && of_services.matches(&facts.labels)
                && in_namespace(key, &of_namespaces)
        })
        .flat_map(|(key, _)| hosts_named(world, namespace, &world.fqdn(key)))
        .collect())
}
