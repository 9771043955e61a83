//! Which hosts ask who is calling, and which name a workload as their caller: what AuthorizationPolicies make of the mesh.

use std::collections::BTreeSet;

use super::behind::{Behind, Protection, fitting, wildcards};
use super::policies::{Caller, PolicyFacts};
use super::{Key, ServiceFacts, World, in_namespace};

/// Of no host: what protects those whose pods cannot be told.
const ANYWHERE: &str = "";

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

    /// What makes it matter who calls `fqdn`, or anything that a VirtualService of that name leads to. Errs on the side of
    /// protection: where a host's pods cannot be told, any such policy of the mesh counts.
    pub fn protection(&self, root: &str, fqdn: &str) -> Option<Protection> {
        let lingering = self.lingering_of(fqdn);
        lingering.or_else(|| {
            let behind = self.routes_for(fqdn);
            let mut lingering = behind.filter_map(|key| self.protected_behind(root, key).lingering);
            lingering.next().or_else(|| self.protection_now(root, fqdn))
        })
    }

    fn lingering_of(&self, host: &str) -> Option<Protection> {
        let found = fitting(&self.lingering, host).into_iter().next();
        found.map(|(protection, _)| protection.clone())
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
    pub(super) fn protection_now(&self, root: &str, fqdn: &str) -> Option<Protection> {
        let own = self.own_protection(root, fqdn).map(Protection::Policy);
        own.or_else(|| {
            let mut behind = self.routes_for(fqdn);
            behind.find_map(|key| self.protected_behind(root, key).now)
        })
    }

    /// What protects anything behind a VirtualService.
    fn protected_behind(&self, root: &str, key: &Key) -> Behind {
        self.found.behind(root, key, || {
            let walk = self.walk(key);
            let hosts = || walk.hosts.iter();
            let too_far = || {
                let far = Protection::LeadsTooFar(key.clone());
                (walk.too_far && self.any_by_source().is_some()).then_some(far)
            };
            let now = hosts().find_map(|host| self.own_protection(root, host));
            Behind {
                now: now.map(Protection::Policy).or_else(too_far),
                lingering: hosts().find_map(|host| self.lingering_of(host)),
            }
        })
    }

    fn any_by_source(&self) -> Option<Key> {
        let mut policies = self.policies.iter();
        let found = policies.find(|(_, policy)| policy.by_source && !policy.own);
        found.map(|(name, _)| name.clone())
    }

    /// The hosts that a VirtualService speaks for: its own, and those of the ones that delegate to it.
    pub(super) fn hosts_routed_by(&self, key: &Key) -> BTreeSet<String> {
        let own = self.virtual_services.get(key).into_iter();
        let roots = self.roots.get(key).into_iter().flatten();
        let roots = roots.filter_map(|root| self.virtual_services.get(root));
        let hosts = own.chain(roots).flat_map(|hosts| &hosts.hosts);
        hosts.cloned().collect()
    }

    fn own_protection(&self, root: &str, host: &str) -> Option<Key> {
        let find = || self.find_own_protection(root, host);
        self.found.of_host(root, host, find)
    }

    fn find_own_protection(&self, root: &str, host: &str) -> Option<Key> {
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
        self.found.of_host(root, ANYWHERE, || self.any_by_source())
    }

    /// The VirtualServices with a wildcard that `host` fits.
    pub(super) fn wildcard_routes(&self, host: &str) -> impl Iterator<Item = &Key> {
        wildcards(&self.routes, host).into_iter().flatten()
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
