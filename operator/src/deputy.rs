//! Keeps the global proxy from being a confused deputy while no operator answers it: policies of its own deny what must
//! not be forwarded, a policy for each namespace that has such hosts. While an operator answers, it says so first.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use fenceline_crds::istio::{
    AuthorizationPolicy, AuthorizationPolicySpec, Condition, From, Operation, PolicySelector, Rule,
    Source, To,
};
use kube::api::ObjectMeta;
use tokio::sync::watch;

use crate::apply::{self, MANAGED_BY, MANAGER, Writer};
use crate::fence::Settings;
use crate::observe::ext_authz::ANSWER;
use crate::world::{Key, World};

/// How long a change waits for company.
const COALESCE: Duration = Duration::from_millis(50);
/// How long a failed write waits for its next attempt, at first and at most.
const RETRY: Duration = Duration::from_secs(1);
const LONGEST_RETRY: Duration = Duration::from_secs(30);

/// The policies that the global proxy should have, by name.
fn plan(world: &World, settings: &Settings) -> BTreeMap<Key, AuthorizationPolicy> {
    let Some(global_proxy) = world.services.get(&settings.global_proxy) else {
        return BTreeMap::new();
    };
    let mut of_namespace: BTreeMap<String, BTreeSet<(String, Vec<IpAddr>)>> = BTreeMap::new();
    for (service, addresses) in hosts(world) {
        let fqdn = world.fqdn(&service);
        if service != settings.global_proxy
            && world.protection(&settings.root_namespace, &fqdn).is_some()
        {
            let Key { namespace, name } = service;
            of_namespace
                .entry(namespace)
                .or_default()
                .insert((name, addresses));
        }
    }
    let policy = |(namespace, hosts): (String, BTreeSet<(String, Vec<IpAddr>)>)| {
        let key = Key::new(
            &*settings.global_proxy.namespace,
            format!("fenceline-protected-{namespace}"),
        );
        let object = AuthorizationPolicy {
            metadata: ObjectMeta {
                name: Some(key.name.clone()),
                namespace: Some(key.namespace.clone()),
                labels: Some([(MANAGED_BY.to_owned(), MANAGER.to_owned())].into()),
                ..ObjectMeta::default()
            },
            spec: AuthorizationPolicySpec {
                selector: Some(PolicySelector {
                    match_labels: global_proxy.selector.clone(),
                }),
                action: Some("DENY".to_owned()),
                rules: rules(&namespace, &hosts, settings),
                ..AuthorizationPolicySpec::default()
            },
        };
        (key, object)
    };
    of_namespace.into_iter().map(policy).collect()
}

/// What the global proxy can reach: Services, and VirtualServices of names like theirs.
fn hosts(world: &World) -> BTreeMap<Key, Vec<IpAddr>> {
    let routed = world
        .virtual_services
        .values()
        .flat_map(|hosts| &hosts.hosts);
    let mut all: BTreeMap<Key, Vec<IpAddr>> = routed
        .filter_map(|host| world.service_named(host))
        .map(|key| (key, Vec::new()))
        .collect();
    let services = world.services.iter();
    all.extend(services.map(|(key, facts)| (key.clone(), facts.addresses.clone())));
    all
}

/// Every form of the hosts' names that the global proxy understands; the short ones of their own namespace's callers.
fn rules(
    namespace: &str,
    hosts: &BTreeSet<(String, Vec<IpAddr>)>,
    settings: &Settings,
) -> Vec<Rule> {
    let domain = &settings.cluster_domain;
    let any_port = |name: String| [format!("{name}:*"), name];
    let full = hosts.iter().flat_map(|(name, addresses)| {
        let name = format!("{name}.{namespace}");
        let addresses = addresses
            .iter()
            .filter(|address| address.is_ipv4())
            .map(ToString::to_string);
        let names = [
            format!("{name}.svc.{domain}."),
            format!("{name}.svc.{domain}"),
            format!("{name}.svc"),
            name,
        ];
        names.into_iter().chain(addresses).flat_map(any_port)
    });
    let short = hosts.iter().flat_map(|(name, _)| any_port(name.clone()));
    let rule = |from: Vec<From>, hosts: Vec<String>| Rule {
        from,
        to: vec![To {
            operation: Operation {
                hosts,
                ..Operation::default()
            },
        }],
        // What the operator sends back is not forwarded: ask.yaml.
        when: vec![Condition {
            key: format!("request.headers[{ANSWER}]"),
            not_values: vec!["*".to_owned()],
            ..Condition::default()
        }],
        ..Rule::default()
    };
    let neighbours = From {
        source: Source {
            namespaces: vec![namespace.to_owned()],
            ..Source::default()
        },
    };
    vec![
        rule(Vec::new(), full.collect()),
        rule(vec![neighbours], short.collect()),
    ]
}

/// Keeps the policies right for as long as it is polled: the leader's work.
pub async fn run(mut world: watch::Receiver<Arc<World>>, writer: Writer, settings: Settings) {
    let mut planned: Option<Arc<World>> = None;
    let mut plans = BTreeMap::new();
    let mut retry = RETRY;
    loop {
        let now = Arc::clone(&world.borrow_and_update());
        if planned.as_ref().is_none_or(|then| !same_hosts(then, &now)) {
            plans = plan(&now, &settings);
            planned = Some(Arc::clone(&now));
        }
        match write(&plans, &now, &writer).await {
            Ok(()) => retry = RETRY,
            Err(error) => {
                tracing::warn!(
                    error = crate::chain(&error),
                    "what the global proxy must not forward"
                );
                tokio::time::sleep(retry).await;
                retry = (retry * 2).min(LONGEST_RETRY);
                continue;
            }
        }
        if world.changed().await.is_err() {
            return;
        }
        tokio::time::sleep(COALESCE).await;
    }
}

/// Whether nothing changed that the plan looks at.
fn same_hosts(then: &World, now: &World) -> bool {
    then.policies.ptr_eq(&now.policies)
        && then.services.ptr_eq(&now.services)
        && then.virtual_services.ptr_eq(&now.virtual_services)
        && then.service_entries.ptr_eq(&now.service_entries)
}

async fn write(
    plans: &BTreeMap<Key, AuthorizationPolicy>,
    world: &World,
    writer: &Writer,
) -> Result<(), apply::Error> {
    for (key, want) in plans {
        let have = world.own_policies.get(key).map(AsRef::as_ref);
        writer.ensure(want, have).await?;
    }
    for (key, have) in &world.own_policies {
        if !plans.contains_key(key) {
            writer.remove(have.as_ref()).await?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{policy, service, settings, virtual_service, world};

    #[test]
    fn every_name_of_a_protected_host_is_denied_and_no_other() {
        let mut mesh = world();
        service(
            &mut mesh,
            "fenceline-system",
            "global-proxy",
            "{selector: {app: global-proxy}}",
        );
        service(&mut mesh, "bank", "vault", "{clusterIPs: [10.96.0.9]}");
        service(&mut mesh, "bank", "open", "{}");
        service(&mut mesh, "shop", "cart", "{}");
        let front = "{hosts: [front], http: [{route: [{destination: {host: vault}}]}]}";
        virtual_service(&mut mesh, "bank", "front", front);
        assert!(plan(&mesh, &settings()).is_empty());
        let rule = "{rules: [{from: [{source: {namespaces: [shop]}}]}], \
                    selector: {matchLabels: {app: vault}}}";
        policy(&mut mesh, "bank", "vault", rule);

        let plans = plan(&mesh, &settings());
        assert_eq!(plans.len(), 1);
        let policy = &plans[&Key::new("fenceline-system", "fenceline-protected-bank")];
        assert_eq!(policy.spec.action.as_deref(), Some("DENY"));
        let hosts = |rule: usize| &policy.spec.rules[rule].to[0].operation.hosts;
        for form in [
            "vault.bank",
            "vault.bank:*",
            "vault.bank.svc:*",
            "vault.bank.svc.cluster.local",
            "10.96.0.9:*",
            "front.bank",
        ] {
            assert!(hosts(0).iter().any(|host| host == form), "{form}");
        }
        assert!(hosts(0).iter().all(|host| !host.starts_with("open")));
        assert_eq!(hosts(1), &["front:*", "front", "vault:*", "vault"]);
        assert_eq!(policy.spec.rules[1].from[0].source.namespaces, ["bank"]);
    }
}
