//! AuthorizationPolicies: which hosts ask who is calling, and whom they name.

use std::collections::{BTreeMap, BTreeSet};

use fenceline_crds::istio::{
    AuthorizationPolicy, AuthorizationPolicySpec, Condition, Rule, Source,
};

use serde_json::Value;

use super::ServiceFacts;

/// What we know of an AuthorizationPolicy.
/// <https://istio.io/latest/docs/reference/config/security/authorization-policy/>
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PolicyFacts {
    /// Labels of the pods it applies to; empty is all of them.
    pub selector: BTreeMap<String, String>,
    /// The Services that its `targetRefs` name; absent where it has none.
    pub services: Option<BTreeSet<String>>,
    /// Whether its targets are gateways, waypoints or ServiceEntries: anything of the namespace may be behind them.
    pub behind_gateways: bool,
    /// Whether it could not be read: it may say anything, and so protects its whole namespace.
    pub unreadable: bool,
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
    /// `TRUST_DOMAIN/ns/NAMESPACE/sa/SERVICE_ACCOUNT`, with `*` in place of the trust domain perhaps.
    Principal(String),
}

impl PolicyFacts {
    /// What a policy says; `operator` is Fenceline's own namespace, where alone policies are part of it.
    pub fn of(policy: &AuthorizationPolicy, operator: &str) -> Self {
        let namespace = policy.metadata.namespace.as_deref().unwrap_or_default();
        let spec = &policy.spec;
        let action = spec.action.as_deref().unwrap_or("ALLOW");
        let selector = spec.selector.clone().unwrap_or_default();
        Self {
            selector: selector.match_labels,
            services: target_services(spec),
            unreadable: false,
            behind_gateways: targets(spec).any(|target| target["kind"] != "Service"),
            by_source: match action {
                // Audits nothing away.
                "AUDIT" => false,
                // Whoever decides is told who calls.
                "CUSTOM" => true,
                _ => spec.rules.iter().any(asks_for_source),
            },
            own: namespace == operator
                && policy
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

    /// Of a policy that cannot be read, and that istiod may understand: it asks who is calling, for every pod that it may be for.
    pub(super) fn unreadable() -> Self {
        Self {
            unreadable: true,
            by_source: true,
            ..Self::default()
        }
    }

    /// Whether it may decide on calls to a Service, by pods that it will have too: no label of its selector contradicts
    /// the Service's.
    pub(super) fn may_protect(&self, name: &str, service: &ServiceFacts) -> bool {
        self.behind_gateways || self.is_for(name, service)
    }

    /// Whether it is a Service's own, as far as one can tell.
    pub(super) fn is_for(&self, name: &str, service: &ServiceFacts) -> bool {
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

fn targets(spec: &AuthorizationPolicySpec) -> impl Iterator<Item = &Value> {
    let many = spec.other.get("targetRefs").and_then(Value::as_array);
    let one = spec.other.get("targetRef").into_iter();
    one.chain(many.into_iter().flatten())
}

/// The Services among the policy's targets, if it has any target.
fn target_services(spec: &AuthorizationPolicySpec) -> Option<BTreeSet<String>> {
    let services = targets(spec)
        .filter(|target| target["kind"] == "Service")
        .filter_map(|target| target["name"].as_str())
        .map(str::to_owned);
    targets(spec).next().is_some().then(|| services.collect())
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
        let key = when.key.to_ascii_lowercase();
        let of_request = key.starts_with("request.") || key.starts_with("destination.");
        !of_request || key.contains("x-forwarded-")
    };
    rule.from.iter().any(|from| peer(&from.source)) || rule.when.iter().any(condition)
}

/// Whom a source names: service accounts. Who lets in a whole namespace permits a call, and does not expect one from each workload
/// there: such a policy would bring all Services of its namespace into the scope of all of the other's workloads.
fn callers(source: &Source, namespace: &str) -> Vec<Caller> {
    let principals = source.principals.iter().cloned();
    let accounts = source.service_accounts.iter().map(|account| {
        let (of, name) = account.split_once('/').unwrap_or((namespace, account));
        format!("*/ns/{of}/sa/{name}")
    });
    let somebody = |pattern: &String| {
        let rest = pattern.split_once("/ns/").map(|(_, rest)| rest);
        let (of, account) = rest.and_then(|rest| rest.split_once("/sa/")).unzip();
        of.is_some_and(|of| !of.contains('*'))
            && account.is_some_and(|account| !account.contains('*'))
    };
    let all = principals.chain(accounts);
    all.filter(somebody).map(Caller::Principal).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{policy, world};
    use crate::world::Key;

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
                "{rules: [{when: [{key: 'request.headers[X-Forwarded-Client-Cert]', values: [a]}]}]}",
                true,
            ),
        ] {
            assert_eq!(facts(spec).by_source, asks, "{spec}");
        }
    }

    #[test]
    fn only_allow_names_callers() {
        let cart = "rules: [{from: [{source: {serviceAccounts: [shop/cart]}}]}]";
        assert_eq!(facts(&format!("{{{cart}}}")).callers.len(), 1);
        let deny = facts(&format!("{{action: DENY, {cart}}}"));
        assert!(deny.callers.is_empty());
        let whole = facts("{rules: [{from: [{source: {namespaces: [shop]}}]}]}");
        assert!(whole.callers.is_empty() && whole.by_source);
    }

    #[test]
    fn fenceline_s_own_policies_are_in_its_own_namespace_alone() {
        let mut policy = AuthorizationPolicy::new("p", AuthorizationPolicySpec::default());
        let part = (
            "app.kubernetes.io/part-of".to_owned(),
            "fenceline".to_owned(),
        );
        policy.metadata.labels = Some([part].into());
        for (namespace, own) in [("fenceline-system", true), ("evil", false)] {
            policy.metadata.namespace = Some(namespace.to_owned());
            assert_eq!(PolicyFacts::of(&policy, "fenceline-system").own, own);
        }
    }
}
