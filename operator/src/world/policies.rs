//! AuthorizationPolicies: which hosts ask who is calling, and whom they name.

use std::collections::{BTreeMap, BTreeSet};

use fenceline_crds::istio::{
    AuthorizationPolicy, AuthorizationPolicySpec, Condition, Rule, Source,
};

use super::{Key, ServiceFacts, World};

/// What we know of an AuthorizationPolicy.
/// <https://istio.io/latest/docs/reference/config/security/authorization-policy/>
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PolicyFacts {
    /// Labels of the pods it applies to; empty is all of them.
    pub selector: BTreeMap<String, String>,
    /// The Services that its `targetRefs` name; absent where it has none.
    pub services: Option<BTreeSet<String>>,
    /// Whether its answer depends on who calls, or from where.
    pub by_source: bool,
    /// Whether it is part of Fenceline's installation.
    pub own: bool,
    /// Whom it lets call, by name.
    pub callers: BTreeSet<Caller>,
}

/// A caller that an ALLOW rule names.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Caller {
    /// `TRUST_DOMAIN/ns/NAMESPACE/sa/SERVICE_ACCOUNT`, with `*` at one end perhaps.
    Principal(String),
    /// A namespace, with `*` at one end perhaps.
    Namespace(String),
}

impl PolicyFacts {
    pub fn of(policy: &AuthorizationPolicy) -> Self {
        let namespace = policy.metadata.namespace.as_deref().unwrap_or_default();
        let spec = &policy.spec;
        let action = spec.action.as_deref().unwrap_or("ALLOW");
        let selector = spec.selector.clone().unwrap_or_default();
        Self {
            selector: selector.match_labels,
            services: target_services(spec),
            by_source: match action {
                // Audits nothing away.
                "AUDIT" => false,
                // Whoever decides is told who calls.
                "CUSTOM" => true,
                _ => spec.rules.iter().any(asks_for_source),
            },
            own: policy
                .metadata
                .labels
                .as_ref()
                .and_then(|labels| labels.get("app.kubernetes.io/part-of"))
                .is_some_and(|whole| whole == "fenceline"),
            callers: if action == "ALLOW" {
                let sources = spec.rules.iter().flat_map(|rule| &rule.from);
                sources
                    .flat_map(|from| callers(&from.source, namespace))
                    .collect()
            } else {
                BTreeSet::new()
            },
        }
    }

    /// Whether it may apply to pods of a Service, those that will be too: no label of its selector contradicts the
    /// Service's.
    fn may_select(&self, name: &str, service: &ServiceFacts) -> bool {
        let named = self
            .services
            .as_ref()
            .is_none_or(|services| services.contains(name));
        let contradicts = |(key, value): (&String, &String)| {
            service
                .selector
                .get(key)
                .is_some_and(|other| other != value)
        };
        named && !self.selector.iter().any(contradicts)
    }
}

/// The Services among the policy's targets. Other kinds are waypoints and gateways, which are not called through us.
fn target_services(spec: &AuthorizationPolicySpec) -> Option<BTreeSet<String>> {
    let one = spec.other.get("targetRef");
    let many = spec
        .other
        .get("targetRefs")
        .and_then(serde_json::Value::as_array);
    let targets: Vec<_> = one.into_iter().chain(many.into_iter().flatten()).collect();
    let services = targets
        .iter()
        .filter(|target| target["kind"] == "Service")
        .filter_map(|target| target["name"].as_str())
        .map(str::to_owned);
    (!targets.is_empty()).then(|| services.collect())
}

/// Whether a rule looks at who calls, or from where. An end user's token travels on with the request, so it is neither.
fn asks_for_source(rule: &Rule) -> bool {
    let peer = |source: &Source| {
        let named = !(source.principals.is_empty()
            && source.namespaces.is_empty()
            && source.service_accounts.is_empty());
        named
            || source
                .other
                .keys()
                .any(|key| !key.ends_with("equestPrincipals"))
    };
    let condition = |when: &Condition| {
        let of_request = when.key.starts_with("request.") || when.key.starts_with("destination.");
        !of_request || when.key.contains("x-forwarded-")
    };
    rule.from.iter().any(|from| peer(&from.source)) || rule.when.iter().any(condition)
}

/// Whom a source names. `*` alone is anybody, and so nobody.
fn callers(source: &Source, namespace: &str) -> Vec<Caller> {
    let principals = source.principals.iter().cloned().map(Caller::Principal);
    let accounts = source.service_accounts.iter().map(|account| {
        let (of, name) = account.split_once('/').unwrap_or((namespace, account));
        Caller::Principal(format!("*/ns/{of}/sa/{name}"))
    });
    // Several fields of one source must all match: a principal says more than its namespace.
    let namespaces = source
        .namespaces
        .iter()
        .filter(|_| source.principals.is_empty() && source.service_accounts.is_empty())
        .cloned()
        .map(Caller::Namespace);
    let anybody = |caller: &Caller| match caller {
        Caller::Principal(pattern) | Caller::Namespace(pattern) => pattern == "*",
    };
    principals
        .chain(accounts)
        .chain(namespaces)
        .filter(|caller| !anybody(caller))
        .collect()
}

/// Istio's matching of strings: exact, or with `*` at one end.
fn fits(pattern: &str, text: &str) -> bool {
    match (pattern.strip_prefix('*'), pattern.strip_suffix('*')) {
        (Some(end), _) => text.ends_with(end),
        (None, Some(start)) => text.starts_with(start),
        (None, None) => pattern == text,
    }
}

impl World {
    /// The policies that may apply to a Service's pods.
    fn policies_of<'a>(
        &'a self,
        root: &'a str,
        key: &'a Key,
        service: &'a ServiceFacts,
    ) -> impl Iterator<Item = (&'a Key, &'a PolicyFacts)> {
        let own = (key.namespace != root).then_some(key.namespace.as_str());
        own.into_iter()
            .chain([root])
            .flat_map(|namespace| {
                self.policies
                    .range(Key::new(namespace, "")..)
                    .take_while(move |(policy, _)| policy.namespace == namespace)
            })
            .map(|(policy, facts)| (policy, facts.as_ref()))
            .filter(|(_, facts)| facts.may_select(&key.name, service))
    }

    /// The AuthorizationPolicy that makes it matter who calls `fqdn`, or anything that a VirtualService of that name
    /// leads to. Errs on the side of protection: where a host's pods cannot be told, any such policy of the mesh counts.
    pub fn protection(&self, root: &str, fqdn: &str) -> Option<Key> {
        let mut seen = BTreeSet::new();
        let mut look_at = vec![fqdn.to_owned()];
        while let Some(host) = look_at.pop() {
            if !seen.insert(host.clone()) {
                continue;
            }
            if let Some(policy) = self.own_protection(root, &host) {
                return Some(policy);
            }
            look_at.extend(self.routed_to(&host));
        }
        None
    }

    fn own_protection(&self, root: &str, host: &str) -> Option<Key> {
        let service = self
            .service_named(host)
            .and_then(|key| Some((self.services.get(&key)?, key)));
        let known = service
            .as_ref()
            .filter(|(facts, _)| !facts.external_name && !facts.selector.is_empty());
        if let Some((facts, key)) = known {
            return self
                .policies_of(root, key, facts)
                .find(|(_, policy)| policy.by_source)
                .map(|(name, _)| name.clone());
        }
        let named = |hosts: &super::NamedHosts| hosts.hosts.contains(host);
        let routed = self.routes.get(host).is_some_and(|keys| !keys.is_empty());
        let only_routed =
            service.is_none() && routed && !self.service_entries.values().any(|hosts| named(hosts));
        if only_routed {
            return None;
        }
        self.policies
            .iter()
            .find(|(_, policy)| policy.by_source && !policy.own)
            .map(|(name, _)| name.clone())
    }

    /// Where VirtualServices of the name `host` lead to, through their delegates.
    fn routed_to(&self, host: &str) -> BTreeSet<String> {
        let mut destinations = BTreeSet::new();
        let of_host = self.routes.get(host).into_iter().flatten();
        for hosts in of_host.filter_map(|key| self.virtual_services.get(key)) {
            destinations.extend(hosts.destinations.iter().cloned());
            for delegate in &hosts.delegates {
                if let Some(delegate) = self.virtual_services.get(delegate) {
                    destinations.extend(delegate.destinations.iter().cloned());
                }
            }
        }
        destinations
    }

    /// The Services whose policies name a caller: `identities` are those that its pods run as, without `spiffe://`.
    /// A policy for every workload of the mesh names no Service.
    pub fn named_by_policies(
        &self,
        root: &str,
        namespace: &str,
        identities: &BTreeSet<String>,
    ) -> BTreeSet<Key> {
        let names_us = |caller: &Caller| match caller {
            Caller::Principal(pattern) => identities.iter().any(|id| fits(pattern, id)),
            Caller::Namespace(pattern) => fits(pattern, namespace),
        };
        let mut named = BTreeSet::new();
        for (key, policy) in &self.policies {
            let whole_mesh =
                key.namespace == root && policy.selector.is_empty() && policy.services.is_none();
            if whole_mesh || !policy.callers.iter().any(names_us) {
                continue;
            }
            let from = if key.namespace == root {
                Key::new("", "")
            } else {
                Key::new(&*key.namespace, "")
            };
            let services = self
                .services
                .range(from..)
                .take_while(|(service, _)| {
                    key.namespace == root || service.namespace == key.namespace
                })
                .filter(|(service, facts)| {
                    !facts.external_name
                        && !facts.selector.is_empty()
                        && policy.may_select(&service.name, facts)
                });
            named.extend(services.map(|(service, _)| service.clone()));
        }
        named
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{policy, service, virtual_service, world};

    const ROOT: &str = "istio-system";

    fn facts(spec: &str) -> PolicyFacts {
        let mut mesh = world();
        policy(&mut mesh, "bank", "p", spec);
        mesh.policies[&Key::new("bank", "p")].as_ref().clone()
    }

    #[test]
    fn what_asks_who_is_calling() {
        for (spec, asks) in [
            ("{}", false),
            ("{action: DENY, rules: [{}]}", false),
            ("{rules: [{to: [{operation: {paths: [/public]}}]}]}", false),
            (
                "{rules: [{from: [{source: {requestPrincipals: ['*']}}]}]}",
                false,
            ),
            (
                "{rules: [{when: [{key: 'request.headers[x-team]', values: [a]}]}]}",
                false,
            ),
            (
                "{action: AUDIT, rules: [{from: [{source: {namespaces: [a]}}]}]}",
                false,
            ),
            ("{action: CUSTOM, provider: {name: x}, rules: [{}]}", true),
            ("{rules: [{from: [{source: {principals: ['*']}}]}]}", true),
            (
                "{action: DENY, rules: [{from: [{source: {notNamespaces: [shop]}}]}]}",
                true,
            ),
            (
                "{rules: [{from: [{source: {serviceAccounts: [a/b]}}]}]}",
                true,
            ),
            (
                "{rules: [{from: [{source: {ipBlocks: [10.0.0.0/8]}}]}]}",
                true,
            ),
            (
                "{rules: [{from: [{source: {notRemoteIpBlocks: [10.0.0.0/8]}}]}]}",
                true,
            ),
            (
                "{rules: [{when: [{key: source.namespace, notValues: [a]}]}]}",
                true,
            ),
            (
                "{rules: [{when: [{key: remote.ip, values: [10.0.0.1]}]}]}",
                true,
            ),
            (
                "{rules: [{when: [{key: 'request.headers[x-forwarded-client-cert]', values: [a]}]}]}",
                true,
            ),
        ] {
            assert_eq!(facts(spec).by_source, asks, "{spec}");
        }
    }

    const BY_SOURCE: &str = "rules: [{from: [{source: {namespaces: [shop]}}]}]";

    /// The policy that protects a host of `bank`, in a mesh with the one policy given.
    fn protected(namespace: &str, spec: &str, host: &str) -> bool {
        let mut mesh = world();
        service(&mut mesh, "bank", "ledger", "{}");
        service(&mut mesh, "bank", "vault", "{}");
        service(&mut mesh, "shop", "cart", "{}");
        service(&mut mesh, "bank", "anywhere", "{selector: null}");
        let alias = "{selector: null, type: ExternalName, externalName: vault.bank.svc}";
        service(&mut mesh, "bank", "alias", alias);
        let to = |host: &str| {
            format!("{{hosts: [front], http: [{{route: [{{destination: {{host: {host}}}}}]}}]}}")
        };
        virtual_service(&mut mesh, "bank", "front", &to("ledger"));
        let mirrored = "{hosts: [mirrored], http: [{route: [{destination: {host: vault}}],
            mirrors: [{destination: {host: ledger.bank.svc.cluster.local}}]}]}";
        virtual_service(&mut mesh, "bank", "mirrored", mirrored);
        virtual_service(
            &mut mesh,
            "bank",
            "root",
            "{hosts: [root], http: [{delegate: {name: leaf}}]}",
        );
        virtual_service(
            &mut mesh,
            "bank",
            "leaf",
            "{tcp: [{route: [{destination: {host: ledger}}]}]}",
        );
        policy(&mut mesh, namespace, "p", &format!("{{{spec}}}"));
        mesh.protection(ROOT, &format!("{host}.bank.svc.cluster.local"))
            .is_some()
    }

    #[test]
    fn whom_a_policy_protects() {
        let of_ledger = format!("selector: {{matchLabels: {{app: ledger}}}}, {BY_SOURCE}");
        let of_v2 = format!("selector: {{matchLabels: {{version: v2}}}}, {BY_SOURCE}");
        let target = format!("targetRefs: [{{kind: Service, name: ledger}}], {BY_SOURCE}");
        for (namespace, spec, host, want) in [
            ("bank", of_ledger.as_str(), "ledger", true),
            ("bank", &of_ledger, "vault", false),
            ("shop", &of_ledger, "ledger", false),
            (ROOT, &of_ledger, "ledger", true),
            (ROOT, BY_SOURCE, "vault", true),
            ("bank", BY_SOURCE, "vault", true),
            // Its pods may be labelled so, or will be.
            ("bank", &of_v2, "vault", true),
            ("bank", &target, "ledger", true),
            ("bank", &target, "vault", false),
            // By way of a route, a mirror, a delegate.
            ("bank", &of_ledger, "front", true),
            ("bank", &of_ledger, "mirrored", true),
            ("bank", &of_ledger, "root", true),
            // Who knows whose pods these are?
            ("shop", BY_SOURCE, "anywhere", true),
            ("shop", BY_SOURCE, "alias", true),
            ("shop", BY_SOURCE, "nothing", true),
            ("shop", "rules: [{}]", "anywhere", false),
        ] {
            assert_eq!(
                protected(namespace, spec, host),
                want,
                "{namespace} {spec} {host}"
            );
        }
    }

    #[test]
    fn whom_a_policy_names() {
        let cart = BTreeSet::from(["cluster.local/ns/shop/sa/cart".to_owned()]);
        for (namespace, spec, want) in [
            ("bank", "principals: [cluster.local/ns/shop/sa/cart]", true),
            ("bank", "principals: ['*/ns/shop/sa/cart']", true),
            ("bank", "principals: ['cluster.local/ns/shop/*']", true),
            ("bank", "principals: ['*']", false),
            (
                "bank",
                "principals: [cluster.local/ns/shop/sa/other]",
                false,
            ),
            ("bank", "namespaces: [shop]", true),
            (
                "bank",
                "namespaces: [shop], principals: [cluster.local/ns/shop/sa/other]",
                false,
            ),
            ("bank", "namespaces: [other]", false),
            ("bank", "serviceAccounts: [shop/cart]", true),
            ("shop", "serviceAccounts: [cart]", true),
            ("bank", "serviceAccounts: [cart]", false),
            ("bank", "notNamespaces: [other]", false),
            // Every workload of the mesh is none in particular.
            (ROOT, "namespaces: [shop]", false),
        ] {
            let mut mesh = world();
            service(&mut mesh, "bank", "ledger", "{}");
            service(&mut mesh, "shop", "front", "{}");
            let rules = format!("{{rules: [{{from: [{{source: {{{spec}}}}}]}}]}}");
            policy(&mut mesh, namespace, "p", &rules);
            let named = mesh.named_by_policies(ROOT, "shop", &cart);
            assert_eq!(!named.is_empty(), want, "{namespace} {spec}");
            assert!(named.iter().all(|service| service.namespace == namespace));
        }
        assert!(
            facts("{action: DENY, rules: [{from: [{source: {namespaces: [shop]}}]}]}")
                .callers
                .is_empty()
        );
    }
}
