//! The static redirect: calls to names of the mesh that are not in scope go to the global proxy.
//!
//! Routes inserted into the catch-all virtual hosts that Istio makes anyway; nothing of Istio's is removed, so that any
//! other name keeps Istio's own behaviour. It changes with the namespaces that exist, not with what is learnt.

use std::collections::BTreeSet;

use fenceline_crds::istio::{EnvoyFilterSpec, WorkloadSelector};
use serde_json::{Value, json};

use super::Settings;
use super::select::Labels;
use crate::world::World;

/// The catch-all virtual hosts of `ALLOW_ANY`, `REGISTRY_ONLY` and `ALLOW_ANY_DYNAMIC_DNS`
/// (pilot/pkg/networking/util/util.go).
const CATCH_ALL: [&str; 3] = ["allow_any", "block_all", "allow_any_dynamic_dns"];

/// A DNS label.
const LABEL: &str = "[a-z0-9_](?:[-a-z0-9_]*[a-z0-9_])?";

/// Matches every form of a Service's name, and nothing that could be a name outside the mesh: of two labels, the second
/// must be a namespace that exists. RE2, whole string.
pub(super) fn authority_regex<'a>(
    namespaces: impl Iterator<Item = &'a str>,
    cluster_domain: &str,
) -> String {
    let namespaces: BTreeSet<&str> = namespaces.collect();
    let domain = cluster_domain.replace('.', r"\.");
    let of_namespace = if namespaces.is_empty() {
        String::new()
    } else {
        let list: Vec<&str> = namespaces.into_iter().collect();
        format!(r"|\.(?:{})", list.join("|"))
    };
    format!(r"(?i){LABEL}(?:|\.{LABEL}\.svc(?:\.{domain}\.?)?{of_namespace})(?::[0-9]+)?")
}

/// The redirect for the pods that `labels` select.
pub(super) fn redirect(labels: &Labels, world: &World, settings: &Settings) -> EnvoyFilterSpec {
    let namespaces = world.namespaces.keys().map(String::as_str);
    let regex = authority_regex(namespaces, &world.cluster_domain);
    EnvoyFilterSpec {
        workload_selector: Some(WorkloadSelector {
            labels: labels.clone(),
            ..Default::default()
        }),
        config_patches: CATCH_ALL
            .iter()
            .map(|vhost| patch(vhost, &regex, settings))
            .collect(),
        ..EnvoyFilterSpec::default()
    }
}

fn patch(vhost: &str, regex: &str, settings: &Settings) -> Value {
    let port = settings.forward_port;
    let host = settings.global_proxy_host();
    json!({
        "applyTo": "HTTP_ROUTE",
        // No name of a route configuration: one patch covers every port.
        "match": {
            "context": "SIDECAR_OUTBOUND",
            "routeConfiguration": {"vhost": {"name": vhost}},
        },
        "patch": {
            "operation": "INSERT_FIRST",
            "value": {
                "name": "fenceline-forward",
                "match": {
                    "prefix": "/",
                    "headers": [{
                        "name": ":authority",
                        "string_match": {"safe_regex": {"regex": regex}},
                    }],
                },
                "route": {
                    "cluster": format!("outbound|{port}||{host}"),
                    // As in Istio's own catch-all: Envoy's 15 s would cut long calls short.
                    "timeout": "0s",
                    "max_grpc_timeout": "0s",
                },
            },
        },
    })
}

#[cfg(test)]
mod tests {
    use super::authority_regex;
    use regex::Regex;

    fn caught(name: &str) -> bool {
        let regex = authority_regex(["shop", "bank"].into_iter(), "cluster.local");
        Regex::new(&format!("^(?:{regex})$"))
            .unwrap()
            .is_match(name)
    }

    #[test]
    fn names_of_the_mesh_are_caught() {
        for name in [
            "reviews",
            "reviews:9080",
            "Reviews.shop",
            "reviews.bank:80",
            "reviews.any.svc",
            "reviews.any.svc.cluster.local",
            "reviews.any.svc.cluster.local.:9080",
        ] {
            assert!(caught(name), "{name}");
        }
    }

    #[test]
    fn names_outside_the_mesh_are_not() {
        for name in [
            "example.com",
            "api.example.com:443",
            "www.shop.com",
            "reviews.shop.example.com",
            "reviews.any.svc.other.domain",
            "10.96.0.7",
            "10.96.0.7:80",
            "[fd00::7]:80",
            // Istio has no virtual host for these forms either.
            "shop.",
            "reviews.shop.",
            "",
        ] {
            assert!(!caught(name), "{name}");
        }
    }
}
