//! Which hosts ask who is calling, and which name a workload as their caller: what AuthorizationPolicies make of the mesh.

use std::collections::BTreeSet;

use super::policies::{Caller, PolicyFacts};
use super::{Key, ServiceFacts, World, in_namespace};

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
            .flat_map(|namespace| in_namespace(&self.policies, namespace))
            .map(|(policy, facts)| (policy, facts.as_ref()))
            .filter(|(_, facts)| facts.may_protect(&key.name, service))
    }

    /// The AuthorizationPolicy that makes it matter who calls `fqdn`, or anything that a VirtualService of that name
    /// leads to. Errs on the side of protection: where a host's pods cannot be told, any such policy of the mesh counts.
    pub fn protection(&self, root: &str, fqdn: &str) -> Option<Key> {
        let lingering = |host: &str| {
            let mut lingering = self.lingering.iter();
            let found = lingering.find(|(name, _)| fits(name, host));
            found.map(|(_, (policy, _))| policy.clone())
        };
        self.first_behind(fqdn, |host| {
            lingering(host).or_else(|| self.own_protection(root, host))
        })
    }

    /// Whether anything has this name.
    pub(super) fn knows(&self, host: &str) -> bool {
        let service = self.service_named(host);
        service.is_some_and(|key| self.services.contains_key(&key))
            || self.entries.contains_key(host)
            || self.routes.contains_key(host)
    }

    /// Whether nothing differs that protection depends on.
    pub fn protects_as(&self, other: &Self) -> bool {
        self.policies.ptr_eq(&other.policies)
            && self.services.ptr_eq(&other.services)
            && self.virtual_services.ptr_eq(&other.virtual_services)
            && self.service_entries.ptr_eq(&other.service_entries)
            && self.lingering.ptr_eq(&other.lingering)
    }

    /// As [`Self::protection`], without what lingers of former changes.
    pub(super) fn protection_now(&self, root: &str, fqdn: &str) -> Option<Key> {
        self.first_behind(fqdn, |host| self.own_protection(root, host))
    }

    /// What `find` finds of `fqdn` or of a host that it leads to.
    fn first_behind(&self, fqdn: &str, find: impl Fn(&str) -> Option<Key>) -> Option<Key> {
        self.behind(fqdn).find_map(|host| find(&host))
    }

    /// A host, and every host that routes lead to from there.
    pub fn behind(&self, fqdn: &str) -> impl Iterator<Item = String> {
        let mut seen = BTreeSet::new();
        let mut look_at = vec![fqdn.to_owned()];
        std::iter::from_fn(move || {
            loop {
                let host = look_at.pop()?;
                if seen.insert(host.clone()) {
                    look_at.extend(self.routed_to(&host));
                    return Some(host);
                }
            }
        })
    }

    /// The hosts that a VirtualService speaks for: its own, and those of the ones that delegate to it.
    pub(super) fn hosts_routed_by(&self, key: &Key) -> BTreeSet<String> {
        let own = self.virtual_services.get(key).into_iter();
        let roots = self
            .virtual_services
            .values()
            .filter(|hosts| hosts.delegates.contains(key));
        let hosts = own.chain(roots).flat_map(|hosts| &hosts.hosts);
        hosts.cloned().collect()
    }

    fn own_protection(&self, root: &str, host: &str) -> Option<Key> {
        let service = self
            .service_named(host)
            .and_then(|key| Some((self.services.get(&key)?, key)));
        // istiod puts the endpoints of a Service and of ServiceEntries of its name together.
        let has_entries = self.entries.contains_key(host);
        let known = service.as_ref().filter(|(facts, _)| {
            !facts.external_name && !facts.selector.is_empty() && !has_entries
        });
        if let Some((facts, key)) = known {
            return self
                .policies_of(root, key, facts)
                .find(|(_, policy)| policy.by_source)
                .map(|(name, _)| name.clone());
        }
        let only_routed = service.is_none() && !has_entries && self.routes.contains_key(host);
        if only_routed {
            return None;
        }
        self.policies
            .iter()
            .find(|(_, policy)| policy.by_source && !policy.own)
            .map(|(name, _)| name.clone())
    }

    /// The VirtualServices with a wildcard that `host` fits.
    pub(super) fn wildcard_routes<'a>(&'a self, host: &'a str) -> impl Iterator<Item = &'a Key> {
        let wildcards = self.routes.range("*".to_owned()..);
        wildcards
            .take_while(|(name, _)| name.starts_with('*'))
            .filter(move |(name, _)| fits(name, host))
            .flat_map(|(_, keys)| keys)
    }

    /// Where VirtualServices for `host` lead to, through their delegates. Those with a wildcard apply to what has none of
    /// its own; which of them is taken depends on who calls, so all are.
    fn routed_to(&self, host: &str) -> BTreeSet<String> {
        let mut destinations = BTreeSet::new();
        let own = self.routes.get(host).into_iter().flatten();
        let of_host = self.wildcard_routes(host).chain(own);
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
    pub fn named_by_policies(&self, root: &str, identities: &BTreeSet<String>) -> BTreeSet<Key> {
        let names_us =
            |Caller::Principal(pattern): &Caller| identities.iter().any(|id| fits(pattern, id));
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
                        && policy.is_for(&service.name, facts)
                });
            named.extend(services.map(|(service, _)| service.clone()));
        }
        named
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{policy, service, service_entry, virtual_service, world};

    const ROOT: &str = "istio-system";

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
        service(&mut mesh, "bank", "under-wildcard", "{}");
        let wildcard = "{hosts: ['*-wildcard.bank.svc.cluster.local'], \
                        http: [{route: [{destination: {host: ledger}}]}]}";
        virtual_service(&mut mesh, "bank", "wildcard", wildcard);
        service(&mut mesh, "bank", "shared", "{}");
        let shared = "{hosts: [shared.bank.svc.cluster.local]}";
        service_entry(&mut mesh, "bank", "shared", shared);
        policy(&mut mesh, namespace, "p", &format!("{{{spec}}}"));
        mesh.protection(ROOT, &format!("{host}.bank.svc.cluster.local"))
            .is_some()
    }

    #[test]
    fn whom_a_policy_protects() {
        let of_ledger = format!("selector: {{matchLabels: {{app: ledger}}}}, {BY_SOURCE}");
        let of_v2 = format!("selector: {{matchLabels: {{version: v2}}}}, {BY_SOURCE}");
        let target = format!("targetRefs: [{{kind: Service, name: ledger}}], {BY_SOURCE}");
        let gateway = format!("targetRefs: [{{kind: Gateway, name: g}}], {BY_SOURCE}");
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
            ("bank", &of_ledger, "under-wildcard", true),
            // Anything may be behind a gateway.
            ("bank", &gateway, "vault", true),
            ("shop", &gateway, "vault", false),
            // A ServiceEntry adds endpoints of its own.
            ("bank", &of_ledger, "shared", true),
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
    fn a_policy_that_cannot_be_read_protects_its_namespace() {
        let mut mesh = world();
        service(&mut mesh, "bank", "ledger", "{}");
        service(&mut mesh, "shop", "cart", "{}");
        mesh.policies
            .insert(Key::new("bank", "odd"), PolicyFacts::unreadable().into());
        let protects = |host: &str| mesh.protection(ROOT, host).is_some();
        assert!(protects("ledger.bank.svc.cluster.local"));
        assert!(!protects("cart.shop.svc.cluster.local"));
    }

    #[test]
    fn whom_a_policy_names() {
        let cart = BTreeSet::from(["cluster.local/ns/shop/sa/cart".to_owned()]);
        for (namespace, spec, want) in [
            ("bank", "principals: [cluster.local/ns/shop/sa/cart]", true),
            ("bank", "principals: ['*/ns/shop/sa/cart']", true),
            // A whole namespace is let in, and not expected.
            ("bank", "principals: ['cluster.local/ns/shop/*']", false),
            ("bank", "principals: ['cluster.local/ns/shop/sa/*']", false),
            ("bank", "principals: ['*/ns/shop/*']", false),
            // Patterns that leave the namespace open name nobody in particular.
            ("bank", "principals: ['*']", false),
            ("bank", "principals: ['cluster.local/*']", false),
            ("bank", "principals: ['*/sa/cart']", false),
            ("bank", "namespaces: ['s*']", false),
            (
                "bank",
                "principals: [cluster.local/ns/shop/sa/other]",
                false,
            ),
            ("bank", "namespaces: [shop]", false),
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
            (ROOT, "serviceAccounts: [shop/cart]", false),
        ] {
            let mut mesh = world();
            service(&mut mesh, "bank", "ledger", "{}");
            service(&mut mesh, "shop", "front", "{}");
            let rules = format!("{{rules: [{{from: [{{source: {{{spec}}}}}]}}]}}");
            policy(&mut mesh, namespace, "p", &rules);
            let named = mesh.named_by_policies(ROOT, &cart);
            assert_eq!(!named.is_empty(), want, "{namespace} {spec}");
            assert!(named.iter().all(|service| service.namespace == namespace));
        }
    }
}
