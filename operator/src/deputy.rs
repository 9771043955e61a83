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
use crate::patch::bound::bytes;
use crate::process::evaluate::{self, TooLong};
use crate::world::{Key, World};

/// How long a change waits for company.
const COALESCE: Duration = Duration::from_millis(50);
/// How long a failed write waits for its next attempt, at first and at most.
const RETRY: Duration = Duration::from_secs(1);
const LONGEST_RETRY: Duration = Duration::from_secs(30);
/// How many bytes one policy may have: two thirds of what etcd takes. Some 6,000 protected Services of one namespace.
const MOST_BYTES: usize = 1 << 20;

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
                rules: rules(&names),
                ..AuthorizationPolicySpec::default()
            },
        };
        (key, object)
    };
    Some(protected(world, settings).into_iter().map(policy).collect())
}

/// Names of protected hosts that one namespace answers for: those of its Services, and those that its ServiceEntries and
/// VirtualServices make up. Whose name somebody makes up is not made to pay for it.
#[derive(Default)]
struct Names {
    /// Of Services, and of what has a name like theirs, by the namespace in the name.
    services: BTreeMap<String, BTreeSet<String>>,
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
        let exists = |key: &&Key| world.services.contains_key(*key);
        let answers = service.as_ref().filter(exists);
        let answers = answers.map_or(namespace, |key| &key.namespace);
        let names = all.entry(answers.to_owned()).or_default();
        match service {
            Some(Key { namespace, name }) => {
                let services = names.services.entry(namespace).or_default();
                services.insert(name);
            }
            None => drop(names.others.insert(fqdn.to_owned())),
        }
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

/// Every form of the hosts' names that the global proxy understands; the short ones of their own namespace's callers. What begins as
/// a Service's name with its namespace is a name of that Service, however it goes on.
fn rules(names: &Names) -> Vec<Rule> {
    let any_port = |name: String| [format!("{name}:*"), name];
    let services = names.services.iter();
    let full = services.flat_map(|(namespace, services)| {
        services.iter().flat_map(move |name| {
            let name = format!("{name}.{namespace}");
            [format!("{name}.*"), format!("{name}:*"), name]
        })
    });
    let others = names.others.iter();
    let others = others.flat_map(|name| [format!("{name}."), name.clone()]);
    let addresses = names.addresses.iter().filter(|address| address.is_ipv4());
    let others = others
        .chain(addresses.map(ToString::to_string))
        .flat_map(any_port);
    let full = full.chain(others);
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
    let neighbours = |namespace: &String| From {
        source: Source {
            namespaces: vec![namespace.clone()],
            ..Source::default()
        },
    };
    let short = names.services.iter().map(|(namespace, services)| {
        let short = services.iter().cloned().flat_map(any_port);
        rule(vec![neighbours(namespace)], short.collect())
    });
    let full = rule(Vec::new(), full.collect());
    std::iter::once(full).chain(short).collect()
}

/// The policies that are small enough to be written, and the names of those that are not.
fn that_fit(
    mut plans: BTreeMap<Key, AuthorizationPolicy>,
) -> (BTreeMap<Key, AuthorizationPolicy>, BTreeSet<Key>) {
    let too_large: BTreeSet<Key> = plans
        .iter()
        .filter(|(_, policy)| bytes(&policy.spec) > MOST_BYTES)
        .map(|(key, _)| key.clone())
        .collect();
    plans.retain(|key, _| !too_large.contains(key));
    (plans, too_large)
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
                    plans = planned.map(that_fit);
                    let too_large = plans.iter().flat_map(|(_, too_large)| too_large);
                    for policy in too_large.clone() {
                        tracing::error!(%policy, most = MOST_BYTES, "too large to be written: it stays as it is, \
                            and what it does not name yet is forwarded while no operator answers");
                    }
                    writer.is_over("protected_names", too_large.count());
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
async fn write(
    (plans, too_large): &(BTreeMap<Key, AuthorizationPolicy>, BTreeSet<Key>),
    world: &World,
    writer: &Writer,
) -> bool {
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
        if !plans.contains_key(key) && !too_large.contains(key) {
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
            "vault.bank:80",
            "vault.bank.svc:80",
            "vault.bank.svc.cluster.local.:80",
            "vault.bank.svc.cluster.local",
            "10.96.0.9:*",
            "front.bank",
            "old.legacy.svc.other",
            "240.1.0.9",
            "240.240.0.7:*",
        ] {
            assert!(denies(hosts(0), form), "{form}");
        }
        assert!(!denies(hosts(0), "vault.bankrupt") && !denies(hosts(0), "vault"));
        assert!(hosts(0).iter().all(|host| !host.starts_with("open")));
        assert_eq!(hosts(1), &["front:*", "front", "vault:*", "vault"]);
        assert_eq!(policy.spec.rules[1].from[0].source.namespaces, ["bank"]);
    }

    /// As Istio matches hosts: whole, or by what they begin with.
    fn denies(hosts: &[String], name: &str) -> bool {
        let mut hosts = hosts.iter();
        hosts.any(|host| match host.strip_suffix('*') {
            Some(start) => name.starts_with(start),
            None => host == name,
        })
    }

    #[test]
    fn whoever_makes_up_names_of_others_pays_for_them() {
        let mesh = |count: usize| {
            let mut mesh = world();
            service(&mut mesh, "fenceline-system", "global-proxy", "{}");
            service(&mut mesh, "bank", "vault", "{}");
            service(&mut mesh, "shop", "till", "{}");
            for namespace in ["bank", "shop"] {
                let rule = "{rules: [{from: [{source: {namespaces: [evil]}}]}]}";
                policy(&mut mesh, namespace, "p", rule);
            }
            let hosts: Vec<String> = (0..count)
                .map(|number| format!("made-up-{number}.bank.svc.cluster.local"))
                .collect();
            let routes = format!(
                "{{hosts: [{}], http: [{{route: [{{destination: {{host: till}}}}]}}]}}",
                hosts.join(", ")
            );
            virtual_service(&mut mesh, "shop", "routes", &routes);
            that_fit(plan(&mesh, &settings()).unwrap())
        };
        let of = |namespace: &str| {
            let name = format!("fenceline-protected-{namespace}");
            Key::new("fenceline-system", name)
        };
        let (few, over) = mesh(1);
        assert!(over.is_empty());
        let shop = &few[&of("shop")].spec.rules;
        assert!(denies(&shop[0].to[0].operation.hosts, "made-up-0.bank.svc"));
        // A short name is its own namespace's.
        let callers = shop.iter().flat_map(|rule| &rule.from);
        let callers: Vec<_> = callers.flat_map(|from| &from.source.namespaces).collect();
        assert_eq!(callers, ["bank", "shop"]);
        let (many, over) = mesh(12_000);
        assert_eq!(over, [of("shop")].into());
        assert_eq!(many[&of("bank")], few[&of("bank")], "not one byte more");
    }

    #[test]
    fn a_policy_grows_with_its_names_alone() {
        let size = |count: usize| {
            let services = (0..count).map(|number| format!("service-{number:05}"));
            let names = Names {
                services: [("bank".to_owned(), services.collect())].into(),
                ..Names::default()
            };
            bytes(&rules(&names))
        };
        let each = (size(2_000) - size(1_000)) / 1_000;
        assert!(each < 180, "{each} bytes");
        assert!(size(4_000) < 4_001 * each + 1_000, "no more than linearly");
        assert!(size(5_500) < MOST_BYTES);
    }
}
