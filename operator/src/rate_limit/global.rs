//! Global limits: Envoy's rate limit filter, which asks the rate limit service, and the configuration of that service
//! (envoyproxy/ratelimit), which it gets from Fenceline.
//! <https://www.envoyproxy.io/docs/envoy/latest/configuration/http/http_filters/rate_limit_filter>

use std::time::Duration;

use envoy_types::pb::ratelimit::config::ratelimit::v3::{
    RateLimitConfig, RateLimitDescriptor, RateLimitPolicy, RateLimitUnit,
};
use fenceline_crds::{LimitResponse, OnUnavailable};
use serde_json::{Value, json};

use super::descriptor::Part;
use super::local::{actions, headers, percent};
use super::valid::{Limit, Rule};
use crate::world::Key;

pub(super) const TYPE: &str =
    "type.googleapis.com/envoy.extensions.filters.http.ratelimit.v3.RateLimit";
/// How long a proxy waits for the service. Envoy's own default of 20 ms is less than a busy machine's pause.
const TIMEOUT: &str = "0.1s";

/// The rate limit service's window of this length.
/// <https://github.com/envoyproxy/ratelimit#rate-limit-definition>
pub(super) fn unit(per: Duration) -> Option<RateLimitUnit> {
    const HOUR: u64 = 3600;
    if per.subsec_nanos() != 0 {
        return None;
    }
    Some(match per.as_secs() {
        1 => RateLimitUnit::Second,
        60 => RateLimitUnit::Minute,
        HOUR => RateLimitUnit::Hour,
        secs if secs == 24 * HOUR => RateLimitUnit::Day,
        secs if secs == 168 * HOUR => RateLimitUnit::Week,
        _ => return None,
    })
}

/// What a RateLimit's configuration is called.
pub(super) fn name(key: &Key) -> String {
    key.to_string()
}

/// Keeps the limits of one RateLimit apart from those of others, in the service and in Redis. The service takes any workload's word for
/// which domain it asks for, so a domain is not to be guessed: a RateLimit's uid is random, and nobody sees it but who may read
/// what is in its namespace, and its proxies.
pub(super) fn domain(limit: &Limit) -> String {
    match &limit.uid {
        Some(uid) => format!("{}/{uid}", limit.key),
        None => limit.key.to_string(),
    }
}

/// How the service is asked.
#[derive(Clone, Copy, Debug)]
pub(super) struct Manner<'a> {
    pub(super) cluster: &'a str,
    pub(super) domain: &'a str,
    pub(super) stat_prefix: &'a str,
    pub(super) on_unavailable: OnUnavailable,
    pub(super) response: &'a LimitResponse,
    pub(super) retry_after: u64,
}

/// The filter for rules that are answered alike.
pub(super) fn filter(rules: &[&Rule], manner: Manner<'_>) -> Value {
    let Manner {
        cluster,
        domain,
        stat_prefix,
        on_unavailable,
        response,
        retry_after,
    } = manner;
    let authority = cluster.rsplit('|').next().unwrap_or(cluster);
    let rate_limits: Vec<Value> = rules
        .iter()
        .map(|rule| json!({"actions": actions(&rule.parts)}))
        .collect();
    let mut filter = json!({
        "@type": TYPE,
        "domain": domain,
        "stat_prefix": stat_prefix,
        "timeout": TIMEOUT,
        "failure_mode_deny": on_unavailable == OnUnavailable::Deny,
        "rate_limited_as_resource_exhausted": true,
        "filter_enabled": percent(100),
        // What only counts does so in the service, whose answer is the same either way.
        "filter_enforced": percent(100),
        "rate_limit_service": {
            // A cluster's name is no authority that a server takes.
            "grpc_service": {"envoy_grpc": {"cluster_name": cluster, "authority": authority}, "timeout": TIMEOUT},
            "transport_api_version": "V3",
        },
        "rate_limits": rate_limits,
        "response_headers_to_add": headers(response, retry_after),
    });
    if let Some(status) = response.status {
        filter["rate_limited_status"] = json!({"code": status});
    }
    if response.rate_limit_headers {
        filter["enable_x_ratelimit_headers"] = json!("DRAFT_VERSION_03");
    }
    filter
}

/// What the service must know of a RateLimit; `effective` is what each rule lets through now, or nothing where it does not count.
pub(super) fn config(limit: &Limit, effective: impl Fn(&Rule) -> Option<u32>) -> RateLimitConfig {
    let descriptors = limit.rules.iter().filter_map(|rule| {
        let requests = effective(rule)?;
        let policy = RateLimitPolicy {
            unit: unit(rule.quota.per)?.into(),
            requests_per_unit: requests,
            ..RateLimitPolicy::default()
        };
        nested(&rule.parts, policy, rule.shadow)
    });
    RateLimitConfig {
        name: name(&limit.key),
        domain: domain(limit),
        descriptors: descriptors.collect(),
    }
}

/// The entries of a rule, one within the other; the innermost has the limit.
fn nested(parts: &[Part], policy: RateLimitPolicy, shadow: bool) -> Option<RateLimitDescriptor> {
    let (innermost, outer) = parts.split_last()?;
    let plain = |part: &Part| RateLimitDescriptor {
        key: part.key.clone(),
        // Without a value: every value, each counted by itself.
        value: part.value.clone().unwrap_or_default(),
        ..RateLimitDescriptor::default()
    };
    let innermost = RateLimitDescriptor {
        rate_limit: Some(policy),
        shadow_mode: shadow,
        ..plain(innermost)
    };
    Some(
        outer
            .iter()
            .rev()
            .fold(innermost, |inner, part| RateLimitDescriptor {
                descriptors: vec![inner],
                ..plain(part)
            }),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_windows_of_the_rate_limit_service() {
        let known = |seconds| unit(Duration::from_secs(seconds));
        assert_eq!(known(1), Some(RateLimitUnit::Second));
        assert_eq!(known(86_400), Some(RateLimitUnit::Day));
        assert_eq!(known(604_800), Some(RateLimitUnit::Week));
        assert_eq!((known(10), known(120)), (None, None));
        assert_eq!(unit(Duration::from_millis(1500)), None);
    }
}
