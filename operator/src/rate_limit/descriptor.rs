//! What a rule asks Envoy to find out about a request: actions, each of which gives an entry of a descriptor, or none where the request
//! does not fit.
//! <https://www.envoyproxy.io/docs/envoy/latest/api-v3/config/route/v3/route_components.proto#config-route-v3-ratelimit-action>

use std::net::IpAddr;

use fenceline_crds::{LimitBy, LimitMatch, LimitRule, ValueMatch};
use serde_json::{Value, json};

use super::path;
use super::valid::Invalid;

/// The caller, by the certificate that its proxy showed.
const PRINCIPAL: &str = "connection.uri_san_peer_certificate";
/// The value of an entry that only says that a request fits.
const YES: &str = "fits";
/// The entry that names the rule: no two rules have the same descriptor.
pub(super) const RULE: &str = "rule";

/// An action, and the entry that it gives.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Part {
    pub(super) action: Value,
    pub(super) key: String,
    /// Absent: whatever the request has, each with a bucket of its own.
    pub(super) value: Option<String>,
}

/// Everything that a rule looks at, in order; `authority` is a regular expression for the host.
pub(super) fn parts(rule: &LimitRule, authority: Option<&str>) -> Result<Vec<Part>, Invalid> {
    let given = rule.matches.clone().unwrap_or_default();
    let mut parts = vec![of_rule(&rule.name, &headers(&given, authority)?)];
    if !given.query.is_empty() {
        let query = given.query.iter().enumerate().map(|(index, one)| {
            let matcher = value(one, &format!("match.query[{index}]"))?;
            Ok(named(&one.name, matcher))
        });
        let query = query.collect::<Result<Vec<_>, Invalid>>()?;
        parts.push(yes(
            "query",
            "query_parameter_value_match",
            json!({"query_parameters": query}),
        ));
    }
    if !given.principals.is_empty() {
        let any: Vec<String> = given.principals.iter().map(|one| principal(one)).collect();
        parts.push(Part {
            value: Some("true".to_owned()),
            ..expression("principal-match", &any.join(" || "))
        });
    }
    if !given.cidrs.is_empty() {
        let ranges = given.cidrs.iter().enumerate();
        let ranges = ranges.map(|(index, text)| {
            let (address, length) = cidr(text).map_err(|why| {
                Invalid::new(format!("match.cidrs[{index}]"), format!("{text}: {why}"))
            })?;
            Ok(json!({"address_prefix": address.to_string(), "prefix_len": length}))
        });
        let ranges = ranges.collect::<Result<Vec<_>, Invalid>>()?;
        parts.push(yes(
            "address",
            "remote_address_match",
            json!({"address_matcher": {"ranges": ranges}}),
        ));
    }
    parts.extend(rule.by.iter().map(bucket));
    Ok(parts)
}

/// The entry that names the rule. Where the rule looks at headers it is theirs, so that Envoy looks at nothing else of a request that does not fit:
/// of fifty rules, most do not.
fn of_rule(name: &str, headers: &[Value]) -> Part {
    let mut fields = json!({"descriptor_key": RULE, "descriptor_value": name});
    let action = if headers.is_empty() {
        json!({"generic_key": fields})
    } else {
        fields["headers"] = json!(headers);
        json!({"header_value_match": fields})
    };
    Part {
        action,
        key: RULE.to_owned(),
        value: Some(name.to_owned()),
    }
}

/// An action that gives an entry if the request fits.
fn yes(key: &str, action: &str, mut fields: Value) -> Part {
    fields["descriptor_key"] = json!(key);
    fields["descriptor_value"] = json!(YES);
    Part {
        action: json!({action: fields}),
        key: key.to_owned(),
        value: Some(YES.to_owned()),
    }
}

/// Path, headers, host and method, which Envoy matches all alike, one after the other until one does not fit: what tells most comes first.
fn headers(given: &LimitMatch, authority: Option<&str>) -> Result<Vec<Value>, Invalid> {
    let mut all = Vec::new();
    if let Some(wanted) = &given.path {
        let found = |field: &str, why| Invalid::new(format!("match.path.{field}"), why);
        let matcher = if let Some(exact) = &wanted.exact {
            let regex = path::exact(exact).map_err(|why| found("exact", why))?;
            string("safe_regex", &json!({"regex": regex}))
        } else if let Some(prefix) = &wanted.prefix {
            let prefix = path::prefix(prefix).map_err(|why| found("prefix", why))?;
            string("prefix", &json!(prefix))
        } else {
            let pattern = wanted.regex.as_deref().unwrap_or_default();
            let regex = path::regex(pattern).map_err(|why| found("regex", why))?;
            string("safe_regex", &json!({"regex": regex}))
        };
        all.push(named(":path", matcher));
    }
    for (index, one) in given.headers.iter().enumerate() {
        let matcher = value(one, &format!("match.headers[{index}]"))?;
        all.push(named(&one.name.to_ascii_lowercase(), matcher));
    }
    if let Some(regex) = authority {
        let matcher = string("safe_regex", &json!({"regex": regex}));
        all.push(named(":authority", matcher));
    }
    match given.methods.as_slice() {
        [] => {}
        [method] => all.push(named(":method", string("exact", &json!(method)))),
        methods => {
            let regex = methods.join("|");
            let matcher = string("safe_regex", &json!({"regex": regex}));
            all.push(named(":method", matcher));
        }
    }
    Ok(all)
}

fn string(how: &str, what: &Value) -> Value {
    json!({"string_match": {how: what}})
}

fn named(name: &str, mut matcher: Value) -> Value {
    matcher["name"] = json!(name);
    matcher
}

/// A matcher for a header or a query parameter.
fn value(wanted: &ValueMatch, field: &str) -> Result<Value, Invalid> {
    let ValueMatch {
        name: _,
        exact,
        prefix,
        regex,
        present,
    } = wanted;
    if let Some(exact) = exact {
        return Ok(string("exact", &json!(exact)));
    }
    if let Some(prefix) = prefix {
        return Ok(string("prefix", &json!(prefix)));
    }
    if let Some(regex) = regex {
        regex_syntax::parse(regex).map_err(|error| {
            let said = error.to_string();
            let last = said.lines().last().unwrap_or(&said).to_owned();
            Invalid::new(format!("{field}.regex"), last)
        })?;
        return Ok(string("safe_regex", &json!({"regex": regex})));
    }
    Ok(match present {
        Some(false) => json!({"present_match": false}),
        _ => json!({"present_match": true}),
    })
}

/// An entry of what an expression of Envoy's says; none where it cannot be worked out.
/// <https://www.envoyproxy.io/docs/envoy/latest/api-v3/extensions/rate_limit_descriptors/expr/v3/expr.proto>
fn expression(key: &str, text: &str) -> Part {
    Part {
        action: json!({"extension": {
            "name": "envoy.rate_limit_descriptors.expr",
            "typed_config": {
                "@type": "type.googleapis.com/envoy.extensions.rate_limit_descriptors.expr.v3.Descriptor",
                "descriptor_key": key,
                "text": text,
            },
        }}),
        key: key.to_owned(),
        value: None,
    }
}

/// The condition that the caller is this one, as Istio's AuthorizationPolicy writes it.
fn principal(wanted: &str) -> String {
    let quoted = |text: &str| serde_json::to_string(text).unwrap_or_default();
    if wanted == "*" {
        return format!("{PRINCIPAL} != \"\"");
    }
    if let Some(end) = wanted.strip_prefix('*') {
        return format!("{PRINCIPAL}.endsWith({})", quoted(end));
    }
    match wanted.strip_suffix('*') {
        Some(start) => format!(
            "{PRINCIPAL}.startsWith({})",
            quoted(&format!("spiffe://{start}"))
        ),
        None => format!("{PRINCIPAL} == {}", quoted(&format!("spiffe://{wanted}"))),
    }
}

/// An address and the length of its prefix; one address is a range of one.
fn cidr(text: &str) -> Result<(IpAddr, u8), &'static str> {
    const WANT: &str = "want a range of addresses, as 10.0.0.0/8 or 2001:db8::/32";
    let (address, length) = match text.split_once('/') {
        Some((address, length)) => (address, Some(length)),
        None => (text, None),
    };
    let address: IpAddr = address.parse().map_err(|_| WANT)?;
    let most = if address.is_ipv4() { 32 } else { 128 };
    let length = length.map_or(Ok(most), |length| length.parse().map_err(|_| WANT))?;
    if length > most {
        return Err(WANT);
    }
    Ok((address, length))
}

fn bucket(by: &LimitBy) -> Part {
    let LimitBy {
        header,
        query,
        principal: _,
        remote_address,
    } = by;
    if let Some(header) = header {
        let name = header.to_ascii_lowercase();
        let key = format!("header {name}");
        return Part {
            action: json!({"request_headers": {"header_name": name, "descriptor_key": key}}),
            key,
            value: None,
        };
    }
    if let Some(query) = query {
        let key = format!("query {query}");
        return Part {
            action: json!({"query_parameters": {"query_parameter_name": query, "descriptor_key": key}}),
            key,
            value: None,
        };
    }
    if remote_address.is_some() {
        return Part {
            action: json!({"remote_address": {}}),
            key: "remote_address".to_owned(),
            value: None,
        };
    }
    expression("principal", PRINCIPAL)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::yaml;

    fn of(rule: &str) -> Result<Vec<Part>, Invalid> {
        parts(&yaml(rule), None)
    }

    #[test]
    fn everything_that_a_rule_may_look_at() {
        let all = of(
            "{name: all, limit: {requests: 1, per: 1s}, by: [{header: X-User}, {query: page}, {principal: {}}], match: {
               methods: [GET, HEAD], path: {prefix: /search}, headers: [{name: X-Tier, exact: free}, {name: debug, present: false}],
               query: [{name: lang, regex: 'd.'}], principals: ['cluster.local/ns/shop/sa/cart', 'cluster.local/ns/bank/*'],
               cidrs: [10.0.0.0/8, '::1']}}",
        )
        .unwrap();
        let keys: Vec<(&str, Option<&str>)> = all
            .iter()
            .map(|part| (part.key.as_str(), part.value.as_deref()))
            .collect();
        assert_eq!(
            keys,
            [
                ("rule", Some("all")),
                ("query", Some("fits")),
                ("principal-match", Some("true")),
                ("address", Some("fits")),
                ("header x-user", None),
                ("query page", None),
                ("principal", None),
            ]
        );
        assert_eq!(
            all[0].action["header_value_match"]["headers"],
            json!([
                {"name": ":path", "string_match": {"prefix": "/search"}},
                {"name": "x-tier", "string_match": {"exact": "free"}},
                {"name": "debug", "present_match": false},
                {"name": ":method", "string_match": {"safe_regex": {"regex": "GET|HEAD"}}},
            ])
        );
        assert_eq!(
            all[2].action["extension"]["typed_config"]["text"],
            "connection.uri_san_peer_certificate == \"spiffe://cluster.local/ns/shop/sa/cart\" || \
             connection.uri_san_peer_certificate.startsWith(\"spiffe://cluster.local/ns/bank/\")"
        );
        assert_eq!(
            all[3].action["remote_address_match"]["address_matcher"]["ranges"][1],
            json!({"address_prefix": "::1", "prefix_len": 128})
        );
    }

    #[test]
    fn what_makes_no_sense_names_its_field() {
        for (matches, field) in [
            ("{path: {exact: search}}", "match.path.exact"),
            ("{path: {regex: '/a(b'}}", "match.path.regex"),
            (
                "{headers: [{name: x, regex: '['}]}",
                "match.headers[0].regex",
            ),
            ("{cidrs: [10.0.0.0/33]}", "match.cidrs[0]"),
            ("{cidrs: [10.0.0.0/8, host]}", "match.cidrs[1]"),
        ] {
            let rule = format!("{{name: bad, limit: {{requests: 1, per: 1s}}, match: {matches}}}");
            assert_eq!(of(&rule).unwrap_err().field, field);
        }
    }
}
