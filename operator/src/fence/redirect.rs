//! The static redirect: calls to names of the mesh that are not in scope go to the global proxy.
//!
//! Routes inserted into the catch-all virtual hosts that Istio makes anyway; nothing of Istio's is removed, so that any
//! other name keeps Istio's own behaviour. It changes with the namespaces that exist, not with what is learnt.

use std::collections::BTreeSet;

use fenceline_crds::istio::EnvoyFilterSpec;
use fenceline_crds::{FirstCallPolicy, NonHttp, ServiceFence};
use serde_json::{Value, json};

use super::Settings;
use super::alternatives::any_of;
use super::plan::selector;
use super::select::Labels;
use crate::world::World;

/// The header by which the operator's answers tell the caller's proxy what to do with the call.
pub const MARK: &str = "x-fenceline";
/// Istio's own behaviour, please.
pub const PASS: &str = "pass";
/// On to the global proxy's forward port.
pub const FORWARD: &str = "forward";
/// How often one call can be sent back to its proxy. The answer that ends it counts too.
pub const REDIRECTS: u32 = 32;

/// The catch-all virtual hosts of `ALLOW_ANY`, `REGISTRY_ONLY` and `ALLOW_ANY_DYNAMIC_DNS`
/// (pilot/pkg/networking/util/util.go).
const CATCH_ALL: [&str; 3] = ["allow_any", "block_all", "allow_any_dynamic_dns"];

/// A DNS label.
const LABEL: &str = "[a-z0-9_](?:[-a-z0-9_]*[a-z0-9_])?";

/// Matches every form of a Service's name, and nothing that could be a name outside the mesh: of two labels, the second
/// must be a namespace that exists. Addresses are those of the ranges that Services have theirs from. RE2, whole string.
pub(super) fn authority_regex<'a>(
    namespaces: impl Iterator<Item = &'a str>,
    ranges: impl Iterator<Item = [u8; 2]>,
    cluster_domain: &str,
) -> String {
    let namespaces: BTreeSet<&str> = namespaces.collect();
    let domain = cluster_domain.replace('.', r"\.");
    let of_namespace = if namespaces.is_empty() {
        String::new()
    } else {
        format!(r"|\.(?:{})", any_of(&namespaces))
    };
    let ranges: BTreeSet<String> = ranges.map(|[a, b]| format!(r"{a}\.{b}")).collect();
    let addresses = if ranges.is_empty() {
        String::new()
    } else {
        let ranges = any_of(&ranges.iter().map(String::as_str).collect());
        format!(r"|(?:{ranges})\.[0-9]+\.[0-9]+")
    };
    format!(
        r"(?i)(?:{LABEL}(?:|\.{LABEL}\.svc(?:\.{domain}\.?)?{of_namespace}){addresses})(?::[0-9]+)?"
    )
}

/// The redirect for the pods that `labels` select, and the access log that the fence wants of them; nothing if it wants neither.
pub(super) fn redirect(
    fence: &ServiceFence,
    labels: &Labels,
    world: &World,
    settings: &Settings,
) -> Option<EnvoyFilterSpec> {
    let first_call = fence.spec.first_call.clone().unwrap_or_default();
    let kind = (first_call.policy, fence.spec.non_http);
    let config_patches = world.redirect(settings, kind, || patches(kind, world, settings));
    (!config_patches.is_empty()).then(|| EnvoyFilterSpec {
        workload_selector: selector(labels.clone()),
        config_patches,
        ..EnvoyFilterSpec::default()
    })
}

fn patches(
    (policy, non_http): (FirstCallPolicy, NonHttp),
    world: &World,
    settings: &Settings,
) -> Vec<Value> {
    let namespaces = world.namespaces.keys().map(String::as_str);
    let regex = authority_regex(namespaces, world.service_ranges(), &world.cluster_domain);
    // Of routes that are inserted first, the last comes out on top.
    let routes = match policy {
        FirstCallPolicy::None => Vec::new(),
        FirstCallPolicy::Forward => vec![forward(&regex, settings)],
        FirstCallPolicy::Hold => vec![
            forward(&regex, settings),
            ask_grpc(&regex, settings),
            ask(&regex, settings),
            forward_unknown_length(&regex, settings),
        ],
    };
    let redirects = CATCH_ALL.iter();
    let mut config_patches: Vec<Value> = redirects
        .flat_map(|vhost| routes.iter().map(|route| insert_first(vhost, route)))
        .collect();
    if non_http == NonHttp::Learn {
        config_patches.push(report_connections(settings));
    }
    config_patches
}

/// Connections that nothing in scope took are reported to the operator as they begin: a database's may last for days.
/// <https://www.envoyproxy.io/docs/envoy/latest/api-v3/extensions/access_loggers/grpc/v3/als.proto>
fn report_connections(settings: &Settings) -> Value {
    let log = json!({
        "name": "envoy.access_loggers.tcp_grpc",
        "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.access_loggers.grpc.v3.TcpGrpcAccessLogConfig",
            "common_config": {
                "log_name": "fenceline",
                "transport_api_version": "V3",
                "grpc_service": {"envoy_grpc": {
                    "cluster_name": format!("outbound|{}||{}", settings.callers_port, settings.operator().fqdn),
                    // A cluster's name is none that HTTP/2 allows.
                    "authority": &*settings.operator().fqdn,
                }},
            },
        },
    });
    json!({
        "applyTo": "NETWORK_FILTER",
        "match": {
            "context": "SIDECAR_OUTBOUND",
            "listener": {
                "name": "virtualOutbound",
                "filterChain": {
                    "name": "virtualOutbound-catchall-tcp",
                    "filter": {"name": "envoy.filters.network.tcp_proxy"},
                },
            },
        },
        "patch": {"operation": "MERGE", "value": {
            "name": "envoy.filters.network.tcp_proxy",
            "typed_config": {
                "@type": "type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy",
                "access_log": [log],
                "access_log_options": {"flush_access_log_on_connected": true},
            },
        }},
    })
}

fn insert_first(vhost: &str, route: &Value) -> Value {
    json!({
        "applyTo": "HTTP_ROUTE",
        // No name of a route configuration: one patch covers every port.
        "match": {
            "context": "SIDECAR_OUTBOUND",
            "routeConfiguration": {"vhost": {"name": vhost}},
        },
        "patch": {"operation": "INSERT_FIRST", "value": route},
    })
}

fn authority(regex: &str) -> Value {
    json!({"name": ":authority", "string_match": {"safe_regex": {"regex": regex}}})
}

/// A header whose whole value is nothing that `regex` matches, or that is absent.
fn is_not(header: &str, regex: &str) -> Value {
    json!({
        "name": header,
        "string_match": {"safe_regex": {"regex": regex}},
        "invert_match": true,
        // Or else an absent header matches nothing, not even the inverse.
        "treat_missing_header_as_empty": true,
    })
}

/// Everything of the mesh that the ask route does not take, unless it was sent back to be passed.
fn forward(regex: &str, settings: &Settings) -> Value {
    json!({
        "name": "fenceline-forward",
        "match": {"prefix": "/", "headers": [authority(regex), is_not(MARK, PASS)]},
        // An application's own redirects reach its client: there is no redirect policy here.
        "route": to(settings.forward_port, settings),
    })
}

/// A body that may never end: the method has one, and nobody says how long it is. (Envoy takes `transfer-encoding` off
/// before it looks for a route.)
fn forward_unknown_length(regex: &str, settings: &Settings) -> Value {
    let mut route = forward(regex, settings);
    route["name"] = json!("fenceline-forward-unknown-length");
    if let Some(headers) = route["match"]["headers"].as_array_mut() {
        headers.push(is_not(":method", "GET|HEAD|OPTIONS|DELETE|TRACE"));
        headers.push(is_not("content-length", ".+"));
        headers.push(is_not("content-type", GRPC));
    }
    route
}

const GRPC: &str = "application/grpc.*";

/// No application answers on the ask port, but to gRPC: what was lost there with the global proxy can be asked again.
fn ask(regex: &str, settings: &Settings) -> Value {
    let mut route = ask_grpc(regex, settings);
    route["name"] = json!("fenceline-ask");
    route["route"]["retry_policy"]["retry_on"] = json!("connect-failure,refused-stream,reset");
    if let Some(headers) = route["match"]["headers"].as_array_mut() {
        headers.push(is_not("content-type", GRPC));
    }
    route
}

/// What can be sent again: no upgrade, and a body, if any, of a known length within Envoy's buffer, which is 1 MiB. And
/// gRPC, of which nobody knows.
///
/// Never `request_headers_to_add` here: Envoy 1.40 keeps a pointer into the route, which an update replaces.
fn ask_grpc(regex: &str, settings: &Settings) -> Value {
    let mut route = to(settings.ask_port, settings);
    route["internal_redirect_policy"] = json!({
        "max_internal_redirects": REDIRECTS,
        "redirect_response_codes": [307],
        "response_headers_to_copy": [MARK],
    });
    let headers = json!([
        authority(regex),
        is_not(MARK, &format!("{PASS}|{FORWARD}")),
        is_not("upgrade", ".+"),
        // Its body comes once the application asks for it: Istio leaves that to the application.
        is_not("expect", ".+"),
        is_not("content-length", "[0-9]{7,}"),
    ]);
    json!({
        "name": "fenceline-ask-grpc",
        "match": {"prefix": "/", "headers": headers},
        "route": route,
    })
}

fn to(port: u16, settings: &Settings) -> Value {
    json!({
        "cluster": format!("outbound|{port}||{}", settings.global_proxy_host()),
        // As in Istio's own catch-all: Envoy's 15 s would cut long calls short.
        "timeout": "0s",
        "max_grpc_timeout": "0s",
        // A replica that is gone has not seen the request; another one is asked.
        "retry_policy": {
            "retry_on": "connect-failure,refused-stream",
            "num_retries": 2,
            "retry_host_predicate": [{
                "name": "envoy.retry_host_predicates.previous_hosts",
                "typed_config": {
                    "@type": "type.googleapis.com/envoy.extensions.retry.host.previous_hosts.v3.PreviousHostsPredicate",
                },
            }],
            "host_selection_retry_max_attempts": 5,
        },
    })
}

#[cfg(test)]
mod tests {
    use super::authority_regex;
    use regex::Regex;

    fn caught(name: &str) -> bool {
        let namespaces = ["shop", "bank"].into_iter();
        let regex = authority_regex(namespaces, [[10, 96]].into_iter(), "cluster.local");
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
            "10.96.0.7",
            "10.96.200.7:80",
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
            "10.97.0.7",
            "10.9.96.7",
            "110.96.0.7:80",
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
