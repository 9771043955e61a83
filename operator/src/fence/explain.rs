//! `fenceline explain`: why a workload is fenced as it is, why a host is in its scope, and what a first call to one that is
//! not would get. Plain functions of the mesh.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use fenceline_crds::{FirstCallPolicy, LearntDependency, ServiceFence};
use jiff::Timestamp;
use kube::ResourceExt;

use super::Settings;
use super::plan::{Verdict, hosts_and_why, plan};
use super::said;
use super::select;
use crate::observe::first_call::{Answer, Asked, Port, decide};
use crate::observe::identity::Identity;
use crate::observe::resolve::resolve;
use crate::world::{Host, Key, World};

/// Why a host is in a scope.
#[derive(Clone, Copy, Debug)]
pub enum Why<'a> {
    /// First calls are sent to it.
    GlobalProxy,
    /// Its own proxies report to it.
    Operator,
    /// A Global RateLimit makes its proxies ask it.
    RateLimitService,
    /// Nobody could catch a first call to it.
    Uncatchable,
    /// MeshConfig names it as a provider.
    MeshConfig,
    Learnt(&'a LearntDependency),
    /// Its policies name the workload.
    Named,
    /// `spec.dependencies[index]`.
    Declared(usize),
    /// `spec.aliases[index]`.
    Alias(usize),
    /// What an ExternalName in scope stands for.
    ExternalName,
}

impl Why<'_> {
    fn say(self, world: &World, host: &Host) -> String {
        match self {
            Self::GlobalProxy => "the global proxy, to which first calls go".to_owned(),
            Self::RateLimitService => {
                "the rate limit service, which a Global RateLimit makes its proxies ask".to_owned()
            }
            Self::Operator => {
                "Fenceline, to which its proxies report connections (nonHTTP: Learn)".to_owned()
            }
            Self::Uncatchable => uncatchable(world, host).to_owned(),
            Self::MeshConfig => "MeshConfig names it as a provider".to_owned(),
            Self::Learnt(known) => {
                let evidence: Vec<String> = known
                    .evidence
                    .iter()
                    .map(|kind| format!("{kind:?}"))
                    .collect();
                let last = known
                    .last_seen
                    .map_or_else(String::new, |last| format!(", last at {last}"));
                format!(
                    "called: {}, first at {}{last}",
                    evidence.join(", "),
                    known.first_seen
                )
            }
            Self::Named => {
                "an AuthorizationPolicy of its names the workload as a caller".to_owned()
            }
            Self::Declared(index) => format!("spec.dependencies[{index}]"),
            Self::Alias(index) => format!("spec.aliases[{index}]"),
            Self::ExternalName => "an ExternalName in scope stands for it".to_owned(),
        }
    }
}

/// Why the global proxy could not catch a call to a host.
fn uncatchable(world: &World, host: &Host) -> &'static str {
    let service = world.service_named(&host.fqdn);
    let facts = service.and_then(|key| world.services.get(&key));
    match facts {
        Some(facts) if facts.headless => {
            "headless: its pods are called by their own names and addresses"
        }
        Some(facts) if facts.needs_scope => "it has a port that is not declared to be HTTP",
        Some(_) => "a VirtualService or ServiceEntry of its name must come with it",
        None => "a ServiceEntry or VirtualService under a name of its own",
    }
}

/// Finds the fence that a person means: by its name, by a Service's or by a pod's.
pub fn find<'a>(world: &'a World, namespace: &str, name: &str) -> Vec<(&'a Key, &'a ServiceFence)> {
    let key = Key::new(namespace, name);
    if let Some((key, fence)) = world.fences.get_key_value(&key) {
        return vec![(key, fence.as_ref())];
    }
    let labels = world
        .services
        .get(&key)
        .map(|facts| facts.selector.clone())
        .or_else(|| world.pods.get(&key).map(|pod| pod.labels.clone()));
    let of_pods = |fence: &ServiceFence| {
        let theirs = select::labels(fence, world).ok();
        labels
            .as_ref()
            .zip(theirs)
            .is_some_and(|(labels, theirs)| select::matches(&theirs, labels))
    };
    let fences = select::fences_in(world, namespace);
    fences.filter(|(_, fence)| of_pods(fence)).collect()
}

/// Everything about one fence.
pub fn fence(fence: &ServiceFence, world: &World, settings: &Settings, now: Timestamp) -> String {
    let planned = plan(fence, world, settings, now);
    let ready = said::ready(&planned);
    let namespace = fence.namespace().unwrap_or_default();
    let mut text = format!(
        "ServiceFence {namespace}/{}, mode {:?}\n  {}: {}\n",
        fence.name_any(),
        fence.spec.mode,
        ready.reason,
        ready.message
    );
    if let Some(status) = &fence.status {
        for condition in status.conditions.iter().filter(|one| one.type_ == "Ready") {
            let _ = writeln!(
                text,
                "  as the operator last said: {}: {}",
                condition.reason, condition.message
            );
        }
        for name in &status.unresolved {
            let _ = writeln!(text, "  called in vain: {} ({})", name.host, name.reason);
        }
    }
    let mut hosts: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (host, why) in why(fence, world, settings, now) {
        hosts.entry(host.to_string()).or_default().extend(why);
    }
    let not = if matches!(planned.verdict, Verdict::Enforce(_)) {
        ""
    } else {
        ", if it were enforced"
    };
    let _ = writeln!(text, "\n{} hosts in scope{not}:", hosts.len());
    let width = hosts.keys().map(String::len).max().unwrap_or_default();
    for (host, why) in hosts {
        let _ = writeln!(text, "  {host:width$}  {}", why.join("; "));
    }
    text
}

/// Each host of a fence's scope, and why it is there.
pub fn why(
    fence: &ServiceFence,
    world: &World,
    settings: &Settings,
    now: Timestamp,
) -> BTreeMap<Host, Vec<String>> {
    let mut all: BTreeMap<Host, Vec<String>> = BTreeMap::new();
    hosts_and_why(fence, world, settings, now, &mut |host, why| {
        let why = why.say(world, host);
        let known = all.entry(host.clone()).or_default();
        if !known.contains(&why) {
            known.push(why);
        }
    });
    all
}

/// Everything about one host, for one fence.
pub fn host(
    fence: &ServiceFence,
    world: &World,
    settings: &Settings,
    now: Timestamp,
    name: &str,
) -> String {
    let namespace = fence.namespace().unwrap_or_default();
    let found = match resolve(world, &namespace, name) {
        Ok(found) => found,
        Err(unresolved) => {
            return format!(
                "{name} means nothing to callers in {namespace}: {}. A call to it gets what Istio's outboundTrafficPolicy says.\n",
                unresolved.reason()
            );
        }
    };
    let all = why(fence, world, settings, now);
    let of_host: Vec<_> = all
        .iter()
        .filter(|(host, _)| host.fqdn == found.fqdn)
        .collect();
    let mut text = String::new();
    for (host, why) in &of_host {
        let _ = writeln!(
            text,
            "{host} is in the scope of {}: {}",
            fence.name_any(),
            why.join("; ")
        );
    }
    if of_host.is_empty() {
        let _ = writeln!(text, "{found} is not in the scope of {}", fence.name_any());
        for (kind, grpc) in [("HTTP", false), ("gRPC", true)] {
            let answer = first_call(fence, world, settings, &namespace, name, grpc);
            let _ = writeln!(text, "  a first call by {kind}: {answer}");
        }
    }
    if let Some(by) = world.protection(&settings.root_namespace, &found.fqdn) {
        let _ = writeln!(text, "  {by}: the global proxy never calls it for anybody");
    }
    text
}

fn first_call(
    fence: &ServiceFence,
    world: &World,
    settings: &Settings,
    namespace: &str,
    name: &str,
    grpc: bool,
) -> String {
    let policy = fence.spec.first_call.clone().unwrap_or_default().policy;
    let labels = select::labels(fence, world).unwrap_or_default();
    let mut pods = select::pods_of(world, namespace, &labels);
    let pod = pods.find(|pod| !pod.addresses.is_empty());
    let Some(pod) = pod else {
        return "no pod of the workload runs that could make one".to_owned();
    };
    let caller = Identity {
        trust_domain: settings.trust_domain.clone(),
        namespace: namespace.to_owned(),
        service_account: pod.service_account.clone(),
    };
    let asked = |port| Asked {
        caller: &caller,
        address: pod.addresses[0],
        authority: name,
        port,
        grpc,
    };
    let port = match policy {
        FirstCallPolicy::None => return "is not redirected: firstCall.policy is None".to_owned(),
        FirstCallPolicy::Hold => Port::Ask,
        FirstCallPolicy::Forward => Port::Forward,
    };
    say(&decide(world, settings, &asked(port)).answer)
}

fn say(answer: &Answer) -> String {
    match answer {
        Answer::Hold(hold) => format!(
            "is held until the host is in scope, for {:?} at most; else {}",
            hold.hold_for,
            say(&hold.otherwise)
        ),
        Answer::Forward => "the global proxy passes it on, and the next one goes direct".to_owned(),
        Answer::Pass => "gets Istio's own behaviour".to_owned(),
        Answer::Refuse(why) => format!("is refused: {}", why.message()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{fence as a_fence, pod, policy, service, settings, world};
    use fenceline_crds::{Evidence, ServiceFenceStatus};

    #[test]
    fn a_fence_and_its_hosts() {
        let mut mesh = world();
        for name in ["cart", "reviews"] {
            service(&mut mesh, "shop", name, "{}");
        }
        service(&mut mesh, "fenceline-system", "global-proxy", "{}");
        service(&mut mesh, "bank", "vault", "{}");
        service(
            &mut mesh,
            "bank",
            "db",
            "{ports: [{port: 5432, name: tcp}]}",
        );
        pod(&mut mesh, "shop", "cart", "10.1.0.1");
        let rule = "{rules: [{from: [{source: {notNamespaces: [evil]}}]}]}";
        policy(&mut mesh, "bank", "not-evil", rule);
        let mut cart = a_fence("shop", "cart", "{dependencies: [{host: reviews}]}");
        cart.status = Some(ServiceFenceStatus {
            dependencies: vec![LearntDependency {
                host: "reviews.shop.svc.cluster.local".to_owned(),
                evidence: vec![Evidence::Prometheus],
                first_seen: Timestamp::UNIX_EPOCH,
                last_seen: None,
            }],
            ..ServiceFenceStatus::default()
        });
        mesh.fences
            .insert(Key::new("shop", "cart"), cart.clone().into());
        let text = fence(&cart, &mesh, &settings(), Timestamp::UNIX_EPOCH);
        for part in [
            "Enforced: 3 hosts",
            "called: Prometheus, first at 1970-01-01T00:00:00Z; spec.dependencies[0]",
            "a port that is not declared to be HTTP",
            "the global proxy, to which",
        ] {
            assert!(text.contains(part), "{part}\n{text}");
        }
        let text = host(
            &cart,
            &mesh,
            &settings(),
            Timestamp::UNIX_EPOCH,
            "vault.bank",
        );
        for part in [
            "bank/vault.bank.svc.cluster.local is not in the scope of cart",
            "by HTTP: is held until the host is in scope, for 1s at most; else is refused",
            "AuthorizationPolicy bank/not-evil asks",
        ] {
            assert!(text.contains(part), "{part}\n{text}");
        }
        let text = host(&cart, &mesh, &settings(), Timestamp::UNIX_EPOCH, "nobody");
        assert!(text.contains("UnknownHost"), "{text}");
        // By the fence, its Service, its pod.
        assert_eq!(find(&mesh, "shop", "cart").len(), 1);
        assert_eq!(find(&mesh, "shop", "reviews").len(), 0);
    }
}
