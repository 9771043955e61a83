//! The parts of TrafficPatches that are in Istio's own words, as far as we know them: what is named here is checked where the patch is written, by
//! the patch's own field. Fields that are not named, those of a newer Istio too, are taken; kube-apiserver checks them against Istio's own
//! definitions when the VirtualService or DestinationRule is written.

use kube::core::Rule;
use schemars::{Schema, SchemaGenerator, json_schema};
use serde_json::json;

use crate::rules;

/// Go's lengths of time, which Istio reads. Nothing of at most sixteen characters that fits is too long for CEL's `duration`.
const DURATION: &str = "^([0-9]{1,6}([.][0-9]{1,6})?(ms|s|m|h))+$";

/// Headers that one list or map of a patch may name.
const HEADERS: u32 = 32;

pub(crate) fn length_of_time(least: &str) -> Rule {
    Rule::new(format!(
        "self.matches('{DURATION}') && duration(self) >= duration('{least}')"
    ))
    .message(&*format!("a length of time from {least} on, as 2s"))
}

/// An object of Istio's of which these fields are known.
fn object(properties: &serde_json::Value) -> Schema {
    json_schema!({
        "type": "object",
        "minProperties": 1,
        "x-kubernetes-preserve-unknown-fields": true,
        "properties": properties,
    })
}

fn period() -> Schema {
    json_schema!({
        "type": "string",
        "maxLength": 16,
        "x-kubernetes-validations": [length_of_time("1ms")],
    })
}

fn percentage() -> Schema {
    json_schema!({
        "type": "object",
        "x-kubernetes-preserve-unknown-fields": true,
        "properties": {"value": {"type": "number", "minimum": 0, "maximum": 100}},
    })
}

/// <https://istio.io/latest/docs/reference/config/networking/virtual-service/#HTTPRetry>
pub(crate) fn retries(_: &mut SchemaGenerator) -> Schema {
    object(&json!({
        "attempts": {"type": "integer", "minimum": 0, "maximum": i32::MAX},
        "perTryTimeout": period(),
        "retryOn": {"type": "string", "maxLength": 1024},
    }))
}

/// <https://istio.io/latest/docs/reference/config/networking/virtual-service/#HTTPFaultInjection>
pub(crate) fn fault(_: &mut SchemaGenerator) -> Schema {
    let delay = json!({"fixedDelay": period(), "percentage": percentage(), "percent": {"type": "integer", "minimum": 0, "maximum": 100}});
    let abort = json!({"httpStatus": {"type": "integer", "minimum": 200, "maximum": 599}, "percentage": percentage()});
    object(&json!({"delay": object(&delay), "abort": object(&abort)}))
}

/// <https://istio.io/latest/docs/reference/config/networking/virtual-service/#HTTPMirrorPolicy>
pub(crate) fn mirrors(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "array",
        "maxItems": 10,
        "items": {
            "type": "object",
            "x-kubernetes-preserve-unknown-fields": true,
            "required": ["destination"],
            "properties": {
                "destination": {
                    "type": "object",
                    "x-kubernetes-preserve-unknown-fields": true,
                    "required": ["host"],
                    "properties": {"host": {"type": "string", "minLength": 1, "maxLength": 253}},
                },
                "percentage": percentage(),
            },
        },
    })
}

/// <https://istio.io/latest/docs/reference/config/networking/virtual-service/#Headers>
pub(crate) fn headers(_: &mut SchemaGenerator) -> Schema {
    let named = Rule::new(format!("self.all(name, {})", rules::is_header("name")))
        .message("a header's name is as x-user: letters, digits and -_.");
    // Envoy takes both for the host, and which one wins is nobody's to know.
    let one_host =
        Rule::new("!(':authority' in self) || !self.exists(name, name.lowerAscii() == 'host')")
            .message("`:authority` and `Host` are the same header: give one of them");
    let texts = json!({
        "type": "object",
        "maxProperties": HEADERS,
        "additionalProperties": {"type": "string", "maxLength": 4096},
        "x-kubernetes-validations": [named, one_host],
    });
    let changes = json!({
        "set": texts,
        "add": texts,
        "remove": {
            "type": "array",
            "maxItems": HEADERS,
            "items": {
                "type": "string",
                "maxLength": 256,
                "x-kubernetes-validations": [rules::header_name()],
            },
        },
    });
    object(&json!({"request": object(&changes), "response": object(&changes)}))
}

/// <https://istio.io/latest/docs/reference/config/networking/destination-rule/#LoadBalancerSettings>
pub(crate) fn load_balancer(_: &mut SchemaGenerator) -> Schema {
    let mut schema = object(&json!({
        "simple": {"type": "string", "maxLength": 64},
        "consistentHash": {"type": "object", "x-kubernetes-preserve-unknown-fields": true},
    }));
    let one = Rule::new("!has(self.simple) || !has(self.consistentHash)")
        .message("give one of simple and consistentHash");
    schema.insert("x-kubernetes-validations".to_owned(), json!([one]));
    schema
}

/// An object of which no field is known here.
pub(crate) fn any(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "object",
        "minProperties": 1,
        "x-kubernetes-preserve-unknown-fields": true,
    })
}
