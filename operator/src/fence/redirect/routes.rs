//! The routes of every redirect. A proxy has each of them on each port, so that only what needs one is a regular expression.

use serde_json::{Value, json};

use super::{Mark, insert_first};
use crate::fence::Settings;

/// The header by which the operator's answers tell the caller's proxy what to do with the call.
pub const REPLY: &str = "x-fenceline";
/// Istio's own behaviour, please.
pub const PASS: &str = "pass";
/// On to the global proxy's forward port.
pub const FORWARD: &str = "forward";
/// How often one call can be sent back to its proxy. The answer that ends it counts too.
pub const REDIRECTS: u32 = 32;

/// Where there are marks, they come before this.
pub(super) const PRIORITY: i32 = 100;
/// Methods that have no body.
const BODILESS: [&str; 5] = ["GET", "HEAD", "OPTIONS", "DELETE", "TRACE"];
/// A body of so many bytes does not fit into Envoy's buffer, which is 1 MiB, with what else is in it.
const BUFFER: u64 = 1_000_000;
/// No body is longer. (A patch's numbers are doubles.)
const LONGEST: u64 = 1_000_000_000_000_000;

/// For each mark its routes. Of those that are inserted first, the last comes out on top.
pub(super) fn patches(regex: &str, settings: &Settings) -> Vec<Value> {
    let for_mark = |mark: Mark| {
        let mut routes = vec![forward(regex, settings)];
        if mark.holds() {
            routes.push(ask_grpc(regex, settings));
            routes.push(ask(regex, settings));
            routes.push(forward_unknown_length(regex, settings));
        }
        let marked = json!({"route": {"name": mark.name()}});
        routes
            .into_iter()
            .map(move |route| insert_first(&marked, &route))
    };
    Mark::ALL.into_iter().flat_map(for_mark).collect()
}

fn authority(regex: &str) -> Value {
    json!({"name": ":authority", "string_match": {"safe_regex": {"regex": regex}}})
}

/// A header whose value is none that `value` describes, or that is absent: or else an absent header would match nothing, not even
/// the inverse.
fn is_not(header: &str, value: Value) -> Value {
    let mut matcher = json!({
        "name": header,
        "invert_match": true,
        "treat_missing_header_as_empty": true,
    });
    if let (Some(matcher), Value::Object(value)) = (matcher.as_object_mut(), value) {
        matcher.extend(value);
    }
    matcher
}

fn exact(value: &str) -> Value {
    json!({"string_match": {"exact": value}})
}

fn is_absent(header: &str) -> Value {
    json!({"name": header, "present_match": false})
}

fn is_not_grpc() -> Value {
    is_not(
        "content-type",
        json!({"string_match": {"prefix": "application/grpc"}}),
    )
}

/// Everything of the mesh that the ask route does not take, unless it was sent back to be passed.
fn forward(regex: &str, settings: &Settings) -> Value {
    json!({
        "name": "fenceline-forward",
        "match": {"prefix": "/", "headers": [authority(regex), is_not(REPLY, exact(PASS))]},
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
        headers.extend(BODILESS.map(|method| is_not(":method", exact(method))));
        headers.push(is_absent("content-length"));
        headers.push(is_not_grpc());
    }
    route
}

/// No application answers on the ask port, but to gRPC: what was lost there with the global proxy can be asked again.
fn ask(regex: &str, settings: &Settings) -> Value {
    let mut route = ask_grpc(regex, settings);
    route["name"] = json!("fenceline-ask");
    route["route"]["retry_policy"]["retry_on"] = json!("connect-failure,refused-stream,reset");
    if let Some(headers) = route["match"]["headers"].as_array_mut() {
        headers.push(is_not_grpc());
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
        "response_headers_to_copy": [REPLY],
    });
    let headers = json!([
        authority(regex),
        is_not(REPLY, exact(PASS)),
        is_not(REPLY, exact(FORWARD)),
        is_absent("upgrade"),
        // Its body comes once the application asks for it: Istio leaves that to the application.
        is_absent("expect"),
        is_not(
            "content-length",
            json!({"range_match": {"start": BUFFER, "end": LONGEST}})
        ),
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
