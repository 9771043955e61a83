//! What the API refuses: rules and schemas that several fields share. What a rule cannot say, or would cost more than Kubernetes lets a rule
//! cost, the operator says in the object's status.

use kube::core::Rule;
use schemars::{Schema, SchemaGenerator, json_schema};

/// A length of time. Nothing of at most sixteen characters that fits is longer than the 292 years that CEL's `duration` knows.
const PERIOD: &str = "^([0-9]{1,6}h|[0-9]{1,7}m|[0-9]{1,9}s|[0-9]{1,12}ms)+$";

/// A label of DNS, as the names of Services are: <https://www.rfc-editor.org/rfc/rfc1123>
const DNS_LABEL: &str = "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$";

/// <https://www.rfc-editor.org/rfc/rfc9110#name-tokens>
const TOKEN: &str = "[-!#$%&*+.^_`|~0-9A-Za-z]+";

/// <https://kubernetes.io/docs/concepts/overview/working-with-objects/labels/#syntax-and-character-set>
const LABEL_KEY: &str =
    "^([a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$";
const LABEL_VALUE: &str = "^([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?$";

/// What a name may be, where objects or labels are called by it.
const NAME: u32 = 63;

/// Labels that one selector may ask for.
const LABELS: u32 = 64;

/// A rule on the object's own name.
pub(crate) fn short_name(kind: &str, why: &str) -> Rule {
    Rule::new(format!("self.metadata.name.size() <= {NAME}"))
        .message(&*format!(
            "a {kind}'s name is at most {NAME} characters long: {why}"
        ))
        .field_path(".metadata.name")
}

/// A length of time from `least` to `most`.
pub(crate) fn period_between(field: &str, least: &str, most: &str, example: &str) -> Rule {
    Rule::new(format!(
        "self.matches('{PERIOD}') && duration(self) >= duration('{least}') && duration(self) <= duration('{most}')"
    ))
    .message(&*format!(
        "{field} is a length of time from {least} to {most}, as {example}"
    ))
}

/// Whether `per`, an expression, is a window that the rate limit service knows; what is no length of time is refused elsewhere.
pub(crate) fn is_window(per: &str) -> String {
    format!(
        "!{per}.matches('{PERIOD}') || duration({per}) in [duration('1s'), duration('1m'), duration('1h'), duration('24h'), duration('168h')]"
    )
}

pub(crate) fn service_name() -> Rule {
    Rule::new(format!("self.matches('{DNS_LABEL}')"))
        .message("a Service of this namespace by its name alone, as reviews")
}

pub(crate) fn branch_name() -> Rule {
    Rule::new(format!("self.matches('{DNS_LABEL}')"))
        .message("a branch's name is a DNS label, as box-123")
}

pub(crate) fn label_value(what: &str) -> Rule {
    Rule::new(format!("self.matches('{LABEL_VALUE}')"))
        .message(&*format!("{what} is the value of a label"))
}

pub(crate) fn label_key() -> Rule {
    Rule::new(format!("self.matches('{LABEL_KEY}')"))
        .message("the key of a label, as version or example.com/version")
}

/// A regular expression that Envoy can read: CEL's are of the same syntax, and one that it cannot read is an error that says why.
///
/// One with counted repetitions is left to the operator and to Envoy: kube-apiserver would need up to 100 ms for a pattern of a
/// kilobyte, an object has a thousand of them, and each write of a status compiles them all again.
pub(crate) fn regex() -> Rule {
    Rule::new("self.contains('{') || type('x'.matches(self)) == bool")
        .message("a regular expression of RE2's syntax")
}

/// The name of a header, by an expression: every other name would make Envoy refuse what has it.
pub(crate) fn header_name() -> Rule {
    Rule::new(is_header("self")).message("a header's name, as x-user: letters, digits and -_.")
}

/// Whether an expression is the name of a header, or one of HTTP/2's own as `:authority`.
pub(crate) fn is_header(name: &str) -> String {
    format!("{name}.matches('^:?{TOKEN}$')")
}

/// The name of a parameter of a query string.
pub(crate) fn parameter_name() -> Rule {
    Rule::new(r"self.matches('^[^\\x00-\\x20\\x7f]+$')")
        .message("a parameter's name has no spaces and no control characters")
}

/// Whether a text is a host: labels with single dots between them. `*` and ports are none.
pub(crate) fn is_host(host: &str) -> String {
    format!(
        "{host}.matches('^[a-zA-Z0-9_]([-a-zA-Z0-9_.]*[a-zA-Z0-9_])?[.]?$') && !{host}.contains('..')"
    )
}

/// Labels that pods must have, one at least.
pub(crate) fn labels(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "object",
        "minProperties": 1,
        "maxProperties": LABELS,
        "additionalProperties": value_of_label(),
        "x-kubernetes-validations": [keys_of_labels()],
    })
}

fn value_of_label() -> Schema {
    json_schema!({"type": "string", "maxLength": 63, "pattern": LABEL_VALUE})
}

fn keys_of_labels() -> Rule {
    Rule::new(format!("self.all(key, key.matches('{LABEL_KEY}'))"))
        .message("a key that no label can have: one is as app or example.com/app")
}

/// <https://kubernetes.io/docs/reference/kubernetes-api/common-definitions/label-selector/>, with its words: the API takes any otherwise, and
/// selects nothing by them. Its keys are the operator's to check: a rule for each key of each of two thousand selectors would cost too much.
pub(crate) fn selector(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "object",
        "properties": {
            "matchExpressions": {
                "description": "Conditions on labels, all of which hold.",
                "type": "array",
                "maxItems": 16,
                "items": {
                    "type": "object",
                    "required": ["key", "operator"],
                    "properties": {
                        "key": {"description": "The label.", "type": "string", "maxLength": 317, "pattern": LABEL_KEY},
                        "operator": {
                            "description": "How it is compared with `values`, or whether it is there.",
                            "type": "string",
                            "enum": ["In", "NotIn", "Exists", "DoesNotExist"],
                        },
                        "values": {
                            "description": "For `In` and `NotIn`.",
                            "type": "array",
                            "maxItems": 256,
                            "items": value_of_label(),
                        },
                    },
                    "x-kubernetes-validations": [
                        Rule::new("(self.operator in ['In', 'NotIn']) == (has(self.values) && self.values.size() > 0)")
                            .message("In and NotIn need values; Exists and DoesNotExist have none")
                            .field_path(".values"),
                    ],
                },
            },
            "matchLabels": {
                "description": "Labels, all of which it has.",
                "type": "object",
                "maxProperties": LABELS,
                "additionalProperties": value_of_label(),
            },
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The hours that each character of a unit's longest text stands for, sixteen times: no text says more.
    #[test]
    fn no_length_of_time_is_too_long_for_cel() {
        const LONGEST: f64 = 292.0 * 365.0 * 24.0;
        let inner = PERIOD.trim_start_matches("^(").trim_end_matches(")+$");
        let densest = inner.split('|').map(|unit| {
            let (digits, unit) = unit
                .strip_prefix("[0-9]{1,")
                .and_then(|rest| rest.split_once('}'))
                .unwrap();
            let digits: u8 = digits.parse().unwrap();
            let to_the_hour = match unit {
                "h" => 1.0,
                "m" => 60.0,
                "s" => 3600.0,
                "ms" => 3_600_000.0,
                other => panic!("{other}"),
            };
            let characters = f64::from(digits) + if unit == "ms" { 2.0 } else { 1.0 };
            10_f64.powi(i32::from(digits)) / to_the_hour / characters
        });
        let densest = densest.fold(0.0, f64::max);
        assert!(densest * 16.0 < LONGEST, "{densest}");
    }
}
