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
use crate::process::evaluate::{self, TooLong};
use crate::world::{Key, World};

/// How long a change waits for company.
const COALESCE: Duration = Duration::from_millis(50);
/// How long a failed write waits for its next attempt, at first and at most.
const RETRY: Duration = Duration::from_secs(1);
const LONGEST_RETRY: Duration = Duration::from_secs(30);

/// The policies that the global proxy should have, by name; nothing while it is not there.
fn plan(world: &World, settings: &Settings) -> Option<BTreeMap<Key, AuthorizationPolicy>> {
    let global_proxy = world.services.get(&settings.global_proxy)?;
    let policy = |(namespace, names): (String, Names)| {
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
                rules: rules(&namespace, &names, settings),
                ..AuthorizationPolicySpec::default()
            },
        };
        (key, object)
    };
    Some(protected(world, settings).into_iter().map(policy).collect())
}

/// Names of protected hosts in one namespace.
#[derive(Default)]
struct Names {
    /// Of Services, and of what has a name like theirs.
    services: BTreeSet<String>,
    /// Of ServiceEntries and VirtualServices in other domains, whole.
    others: BTreeSet<String>,
    addresses: BTreeSet<IpAddr>,
}

/// The protected hosts of those that the global proxy can reach, by namespace.
fn protected(world: &World, settings: &Settings) -> BTreeMap<String, Names> {
    let mut all: BTreeMap<String, Names> = BTreeMap::new();
    let mut add = |namespace: &str, fqdn: &str, addresses: &[IpAddr]| {
        let service = world.service_named(fqdn);
        if service.as_ref() == Some(&settings.global_proxy)
            || world.protection(&settings.root_namespace, fqdn).is_none()
        {
            return;
        }
        let names = match service {
            Some(Key { namespace, name }) => {
                let names = all.entry(namespace).or_default();
                names.services.insert(name);
                names
            }
            None => {
                let names = all.entry(namespace.to_owned()).or_default();
                names.others.insert(fqdn.to_owned());
                names
            }
        };
        names.addresses.extend(addresses);
    };
    for (key, facts) in &world.services {
        add(&key.namespace, &world.fqdn(key), &facts.addresses);
    }
    for (key, hosts) in world.service_entries.iter().chain(&world.virtual_services) {
        // What a wildcard stands for has names of its own.
        for host in hosts.hosts.iter().filter(|host| !host.starts_with('*')) {
            add(&key.namespace, host, &hosts.addresses);
        }
    }
    all
}

/// Every form of the hosts' names that the global proxy understands; the short ones of their own namespace's callers.
fn rules(namespace: &str, names: &Names, settings: &Settings) -> Vec<Rule> {
    let domain = &settings.cluster_domain;
    let any_port = |name: String| [format!("{name}:*"), name];
    let full = names.services.iter().flat_map(|name| {
        let name = format!("{name}.{namespace}");
        [
            format!("{name}.svc.{domain}."),
            format!("{name}.svc.{domain}"),
            format!("{name}.svc"),
            name,
        ]
    });
    let others = names.others.iter();
    let others = others.flat_map(|name| [format!("{name}."), name.clone()]);
    let addresses = names.addresses.iter().filter(|address| address.is_ipv4());
    let full = full
        .chain(others)
        .chain(addresses.map(ToString::to_string))
        .flat_map(any_port);
    let short = names.services.iter().cloned().flat_map(any_port);
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
    let mut rules = vec![rule(Vec::new(), full.collect())];
    if !names.services.is_empty() {
        rules.push(rule(vec![neighbours], short.collect()));
    }
    rules
}

/// Keeps the policies right for as long as it is polled: the leader's work.
pub async fn run(mut world: watch::Receiver<Arc<World>>, writer: Writer, settings: Settings) {
    let mut planned: Option<Arc<World>> = None;
    let mut plans = None;
    let mut retry = RETRY;
    loop {
        let now = Arc::clone(&world.borrow_and_update());
        if planned.as_ref().is_none_or(|then| !then.protects_as(&now)) {
            let (of, with) = (Arc::clone(&now), settings.clone());
            let work = move || (plan(&of, &with), of.leading_too_far().count());
            match evaluate::within_deadline(work).await {
                Ok((planned, too_far)) => {
                    plans = planned;
                    writer.is_over("routes_behind", too_far);
                }
                // What is denied so far stays denied.
                Err(TooLong) => {
                    tracing::error!(
                        "what the global proxy must not forward took too long to work out; its policies stay as they are"
                    );
                    tokio::time::sleep(LONGEST_RETRY).await;
                    continue;
                }
            }
            planned = Some(Arc::clone(&now));
        }
        if let Some(plans) = &plans
            && !write(plans, &now, &writer).await
        {
            tokio::time::sleep(retry).await;
            retry = (retry * 2).min(LONGEST_RETRY);
            continue;
        }
        retry = RETRY;
        if world.changed().await.is_err() {
            return;
        }
        tokio::time::sleep(COALESCE).await;
    }
}

/// Writes what differs; says whether all of it went well. One policy that cannot be written keeps no other from it.
async fn write(plans: &BTreeMap<Key, AuthorizationPolicy>, world: &World, writer: &Writer) -> bool {
    let mut well = true;
    let mut say = |key: &Key, result: Result<(), apply::Error>| {
        if let Err(error) = result {
            well = false;
            let error = crate::chain(&error);
            tracing::warn!(policy = %key, error, "what the global proxy must not forward");
        }
    };
    for (key, want) in plans {
        let have = world.own_policies.get(key).map(AsRef::as_ref);
        say(key, writer.ensure(want, have).await.map(drop));
    }
    for (key, have) in &world.own_policies {
        if !plans.contains_key(key) {
            say(key, writer.remove(have.as_ref()).await.map(drop));
        }
    }
    well
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{policy, service, service_entry, settings, virtual_service, world};

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
        let machine = "{hosts: [old.legacy.svc.other], addresses: [240.1.0.9], \
                       status: {addresses: [{value: 240.240.0.7}]}}";
        service_entry(&mut mesh, "bank", "machine", machine);
        assert!(plan(&mesh, &settings()).unwrap().is_empty());
        let rule = "{rules: [{from: [{source: {namespaces: [shop]}}]}], \
                    selector: {matchLabels: {app: vault}}}";
        policy(&mut mesh, "bank", "vault", rule);

        let plans = plan(&mesh, &settings()).unwrap();
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
            "old.legacy.svc.other",
            "240.1.0.9",
            "240.240.0.7:*",
        ] {
            assert!(hosts(0).iter().any(|host| host == form), "{form}");
        }
        assert!(hosts(0).iter().all(|host| !host.starts_with("open")));
        assert_eq!(hosts(1), &["front:*", "front", "vault:*", "vault"]);
        assert_eq!(policy.spec.rules[1].from[0].source.namespaces, ["bank"]);
    }
}
