//! Which hosts a fence should have in scope, and why: a plain function of the fence, the world and the time.

use std::collections::{BTreeMap, BTreeSet};

use fenceline_crds::{
    Evidence, LearntDependency, Mode, NonHttp, Scope, ServiceFence, ServiceSelector,
};
use jiff::Timestamp;
use kube::core::{Selector, SelectorExt};

use super::Settings;
use super::alias;
use super::explain::Why;
use super::select;
use crate::observe::resolve::{Unresolved, full_names, resolve};
use crate::rate_limit;
use crate::world::{Host, Key, World};

/// What a fence should have in scope.
#[derive(Default)]
pub(super) struct Scoped {
    pub hosts: BTreeSet<Host>,
    /// Of a fence that observes: those that nothing but learning brings, by name.
    pub learnt: BTreeSet<String>,
    /// By policies.
    pub named: BTreeSet<String>,
    pub counts: Scope,
    pub remarks: Vec<String>,
    /// The bounds that something of it is over.
    pub over: BTreeSet<&'static str>,
    /// When the first declaration ends.
    pub next_end: Option<Timestamp>,
}

/// The bound on what aliases bring, as metrics name it.
pub(super) const ALIAS_HOSTS: &str = "alias_hosts";
/// What a fence may be over.
pub(super) const BOUNDS: [&str; 2] = [ALIAS_HOSTS, NAMED_HOSTS];

/// Is told why each host is in scope.
type Note<'a> = &'a mut dyn FnMut(&Host, Why<'_>);

/// The hosts in the fence's scope; `note` is told why each is there.
pub(super) fn scope(
    fence: &ServiceFence,
    namespace: &str,
    world: &World,
    settings: &Settings,
    now: Timestamp,
    note: Note<'_>,
) -> Scoped {
    let mut scoped = Scoped::default();
    let always = always(fence, namespace, world, settings, note);
    scoped.counts.always = count(always.len());

    let mut learnt = learnt(fence, namespace, world, note);
    learnt.retain(|host| !always.contains(host));
    scoped.counts.learnt = count(learnt.len());

    let named = named(fence, namespace, world, settings, &mut scoped);
    for host in &named {
        note(host, Why::Named);
    }
    scoped.named = named.iter().map(|host| host.fqdn.to_string()).collect();
    scoped.counts.named = count(named.difference(&always).count());

    let mut declared = declared(fence, namespace, world, now, &mut scoped, note);
    let known = learnt.iter().chain(&named).chain(&declared);
    let targets: BTreeSet<Host> = known
        .filter(|_| world.has_aliases())
        .flat_map(|host| alias_target(world, namespace, &host.fqdn))
        .collect();
    for host in &targets {
        note(host, Why::ExternalName);
    }
    declared.extend(targets);
    if !fence.spec.aliases.is_empty() {
        let known = learnt.iter().chain(&named).chain(&declared);
        let known: BTreeSet<String> = known.map(|host| host.fqdn.to_string()).collect();
        declared.extend(aliases(fence, &known, namespace, world, &mut scoped, note));
    }
    scoped.counts.declared = count(declared.difference(&always).count());
    if fence.spec.mode == Mode::Observe {
        let alone = learnt
            .difference(&declared)
            .filter(|host| !named.contains(host));
        scoped.learnt = alone.map(|host| host.fqdn.to_string()).collect();
    }

    scoped.hosts = always;
    scoped.hosts.extend(learnt);
    scoped.hosts.extend(named);
    scoped.hosts.extend(declared);
    scoped.counts.imported = count(scoped.hosts.len());
    let visible = world.view(namespace).visible;
    scoped.counts.visible = visible.max(scoped.counts.imported);
    scoped
}

/// Hosts that are in every scope.
fn always(
    fence: &ServiceFence,
    namespace: &str,
    world: &World,
    settings: &Settings,
    note: Note<'_>,
) -> BTreeSet<Host> {
    let view = world.view(namespace);
    let mut always = match fence.spec.non_http {
        NonHttp::Import => view.always.clone(),
        NonHttp::Learn => view.always.difference(&view.non_http).cloned().collect(),
    };
    for host in &always {
        note(host, Why::Uncatchable);
    }
    if fence.spec.non_http == NonHttp::Learn {
        let operator = settings.operator();
        note(&operator, Why::Operator);
        always.insert(operator);
    }
    if rate_limit::asks_the_service(fence, world, settings) {
        let service = settings.rate_limit_service();
        note(&service, Why::RateLimitService);
        always.insert(service);
    }
    let global_proxy = settings.global_proxy();
    note(&global_proxy, Why::GlobalProxy);
    always.insert(global_proxy);
    for host in world.mesh_config.iter() {
        let found = resolve(world, &settings.root_namespace, host);
        let found = found.map(|host| hosts_named(world, namespace, &host.fqdn));
        for host in found.unwrap_or_default() {
            note(&host, Why::MeshConfig);
            always.insert(host);
        }
    }
    always
}

/// What `spec.dependencies` says. What means nothing becomes a remark, and stops nothing else.
fn declared(
    fence: &ServiceFence,
    namespace: &str,
    world: &World,
    now: Timestamp,
    scoped: &mut Scoped,
    note: Note<'_>,
) -> BTreeSet<Host> {
    let mut declared = BTreeSet::new();
    for (index, dependency) in fence.spec.dependencies.iter().enumerate() {
        if dependency.until.is_some_and(|until| until <= now) {
            continue;
        }
        let ends = [scoped.next_end, dependency.until];
        scoped.next_end = ends.into_iter().flatten().min();
        let mut hosts = BTreeSet::new();
        if let Some(host) = &dependency.host {
            match declared_host(world, namespace, host) {
                Ok(found) => hosts.extend(found),
                Err(why) => scoped
                    .remarks
                    .push(format!("spec.dependencies[{index}].host {host}: {why}")),
            }
        }
        if let Some(services) = &dependency.services {
            match found(world, namespace, services) {
                Ok(found) => hosts.extend(found),
                Err(why) => scoped
                    .remarks
                    .push(format!("spec.dependencies[{index}].services: {why}")),
            }
        }
        for host in &hosts {
            note(host, Why::Declared(index));
        }
        declared.extend(hosts);
    }
    declared
}

fn count(length: usize) -> u32 {
    u32::try_from(length).unwrap_or(u32::MAX)
}

/// What was learnt. A Service that is gone for the moment stays: a host that nothing answers to costs nothing, and when
/// it comes back its first call is not one.
fn learnt(fence: &ServiceFence, namespace: &str, world: &World, note: Note<'_>) -> BTreeSet<Host> {
    let dependencies = fence.status.iter().flat_map(|status| &status.dependencies);
    // What only a policy says is worked out from the policies of this moment.
    let seen = |learnt: &&LearntDependency| {
        let mut evidence = learnt.evidence.iter();
        evidence.any(|kind| *kind != Evidence::AuthorizationPolicy && fence.spec.believes(*kind))
    };
    let mut hosts = BTreeSet::new();
    for known in dependencies.filter(seen) {
        if let Some(host) = world.only_provider(namespace, &known.host) {
            note(host, Why::Learnt(known));
            hosts.insert(host.clone());
            continue;
        }
        for host in hosts_named(world, namespace, &known.host) {
            note(&host, Why::Learnt(known));
            hosts.insert(host);
        }
    }
    hosts
}

/// More would not fit into a fence's status; who is named by so many was not meant.
const MOST_NAMED: usize = 1000;
/// So many hosts of one other namespace: a workload calls fewer, and one namespace's policies must not fill everybody's scopes.
const MOST_NAMED_BY_ONE: usize = 50;
/// The bound on hosts whose policies name a workload, as metrics name it.
pub(super) const NAMED_HOSTS: &str = "named_hosts";

/// The hosts whose AuthorizationPolicies name the fence's pods as callers.
fn named(
    fence: &ServiceFence,
    namespace: &str,
    world: &World,
    settings: &Settings,
    scoped: &mut Scoped,
) -> BTreeSet<Host> {
    let Ok(labels) = select::labels(fence, world) else {
        return BTreeSet::new();
    };
    if !fence.spec.believes(Evidence::AuthorizationPolicy) {
        return BTreeSet::new();
    }
    let trust_domain = &settings.trust_domain;
    let identities: BTreeSet<String> = select::pods_of(world, namespace, &labels)
        .map(|pod| format!("{trust_domain}/ns/{namespace}/sa/{}", pod.service_account))
        .collect();
    if identities.is_empty() {
        // Nobody runs that a policy could mean; those who ran will be back.
        let known = fence.status.iter().flat_map(|status| &status.dependencies);
        return known
            .filter(|known| known.evidence.contains(&Evidence::AuthorizationPolicy))
            .take(MOST_NAMED)
            .flat_map(|known| world.providers(namespace, &known.host))
            .collect();
    }
    let all = world.named_by_policies(&settings.root_namespace, &identities);
    let (within, over) = fair(&all, namespace);
    if over > 0 {
        scoped.over.insert(NAMED_HOSTS);
        scoped.remarks.push(format!(
            "AuthorizationPolicies name this workload as a caller of {} hosts, and {MOST_NAMED_BY_ONE} of one other namespace and {MOST_NAMED} \
             in all are the most; {over} come into scope by first calls",
            all.len()
        ));
    }
    within
        .into_iter()
        .flat_map(|service| world.providers(namespace, &world.fqdn(service)))
        .collect()
}

/// The Services that are within the bounds, and how many are not: the namespace's own first, then those of the others one of each at a
/// time, so that who has many crowds out nobody.
fn fair<'a>(all: &'a BTreeSet<Key>, own: &str) -> (Vec<&'a Key>, usize) {
    let mut within: Vec<&Key> = all.iter().filter(|key| key.namespace == own).collect();
    within.truncate(MOST_NAMED);
    let mut rounds: Vec<(usize, &Key)> = Vec::new();
    let mut of_one: (&str, usize) = ("", 0);
    for key in all.iter().filter(|key| key.namespace != own) {
        if of_one.0 != key.namespace {
            of_one = (&key.namespace, 0);
        }
        if of_one.1 < MOST_NAMED_BY_ONE {
            rounds.push((of_one.1, key));
        }
        of_one.1 += 1;
    }
    rounds.sort_unstable();
    let room = MOST_NAMED - within.len();
    within.extend(rounds.into_iter().take(room).map(|(_, key)| key));
    let over = all.len() - within.len();
    (within, over)
}

/// What an ExternalName in the mesh stands for: istiod knows it as another name of that, and of nothing that is not in
/// scope (pilot/pkg/model/sidecar.go, `matchingAliasService`).
fn alias_target(world: &World, namespace: &str, fqdn: &str) -> BTreeSet<Host> {
    let target = world.alias_of(fqdn);
    target.map_or_else(BTreeSet::new, |target| world.providers(namespace, target))
}

/// The hosts that go with those that are `known`. An alias that means nothing becomes a remark.
fn aliases(
    fence: &ServiceFence,
    known: &BTreeSet<String>,
    namespace: &str,
    world: &World,
    scoped: &mut Scoped,
    note: Note<'_>,
) -> BTreeSet<Host> {
    let found = alias::implied(&fence.spec.aliases, known);
    scoped.remarks.extend(found.wrong);
    if found.more {
        scoped.over.insert(ALIAS_HOSTS);
        scoped.remarks.push(format!(
            "spec.aliases bring more than {} names; those over it come into scope by first calls",
            alias::NAMES
        ));
    }
    let mut implied = BTreeSet::new();
    for (index, name) in found.names {
        match declared_host(world, namespace, &name) {
            Ok(hosts) => {
                hosts.iter().for_each(|host| note(host, Why::Alias(index)));
                implied.extend(hosts);
            }
            Err(why) => scoped
                .remarks
                .push(format!("spec.aliases[{index}].hosts {name}: {why}")),
        }
    }
    implied
}

/// The hosts that a full name stands for in a Sidecar.
fn hosts_named(world: &World, namespace: &str, fqdn: &str) -> BTreeSet<Host> {
    let mut hosts = world.providers(namespace, fqdn);
    if hosts.is_empty()
        && let Some(service) = world.service_named(fqdn)
    {
        hosts.insert(Host::new(service.namespace, fqdn));
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_s_policies_crowd_out_others() {
        let services = |namespace: String, count: usize| {
            (0..count).map(move |number| Key::new(namespace.clone(), format!("svc-{number:04}")))
        };
        let mut all: BTreeSet<Key> = services("aaa".to_owned(), 6600).collect();
        all.extend(services("bank".to_owned(), 1));
        all.extend(services("shop".to_owned(), 60));
        let (within, over) = fair(&all, "shop");
        let of = |namespace: &str| {
            within
                .iter()
                .filter(|key| key.namespace == namespace)
                .count()
        };
        assert_eq!((of("aaa"), of("bank"), of("shop"), over), (50, 1, 60, 6550));
        // Many namespaces of many: each has its share.
        let many = (0..200).flat_map(|number| services(format!("evil-{number:03}"), 100));
        let all: BTreeSet<Key> = many.chain(services("zoo".to_owned(), 1)).collect();
        let (within, over) = fair(&all, "shop");
        assert_eq!((within.len(), over), (MOST_NAMED, all.len() - MOST_NAMED));
        assert!(within.iter().any(|key| key.namespace == "zoo"));
    }
}
