//! What is kept of everybody's DestinationRules: whose clusters they are for, and who sees them.

use fenceline_crds::istio::DestinationRule;

use super::ExportTo;
use super::hosts::full_name;

/// A DestinationRule of anybody's.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RuleFacts {
    /// Its full name, which may begin with a wildcard.
    pub host: String,
    pub export_to: ExportTo,
}

impl RuleFacts {
    pub fn of(rule: &DestinationRule, cluster_domain: &str) -> Self {
        let namespace = rule.metadata.namespace.as_deref().unwrap_or_default();
        let spec = &rule.spec;
        // One for certain callers is never for those of other namespaces (pilot/pkg/model/push_context.go, `setDestinationRules`).
        let selects = spec
            .other
            .get("workloadSelector")
            .is_some_and(|selector| !selector.is_null());
        let named = spec.other.get("exportTo").and_then(|list| list.as_array());
        let named = named.into_iter().flatten().filter_map(|one| one.as_str());
        Self {
            host: full_name(&spec.host, namespace, cluster_domain),
            export_to: if selects {
                ExportTo::parse(["."].into_iter(), namespace)
            } else {
                ExportTo::parse(named, namespace)
            },
        }
    }

    /// Whether it is, or covers, a host of this full name.
    pub fn covers(&self, fqdn: &str) -> bool {
        match self.host.strip_prefix('*') {
            Some(end) => fqdn.ends_with(end),
            None => self.host == fqdn,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::yaml;

    #[test]
    fn who_sees_a_rule() {
        let facts = |spec: &str| {
            let mut rule = DestinationRule::new("theirs", yaml(spec));
            rule.metadata.namespace = Some("bank".to_owned());
            RuleFacts::of(&rule, "cluster.local")
        };
        let everybody = facts("{host: vault}");
        assert_eq!(everybody.host, "vault.bank.svc.cluster.local");
        assert!(everybody.export_to.includes("shop"));
        let private = facts("{host: '*.local', exportTo: ['.']}");
        assert!(private.export_to.includes("bank") && !private.export_to.includes("shop"));
        assert!(private.covers("reviews.shop.svc.cluster.local"));
        let of_some = facts("{host: vault, workloadSelector: {matchLabels: {app: till}}}");
        assert_eq!(of_some.export_to, private.export_to);
        let elsewhere = facts("{host: vault, exportTo: [shop]}").export_to;
        assert!(elsewhere.includes("shop") && !elsewhere.includes("bank"));
    }
}
