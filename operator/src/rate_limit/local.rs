//! Envoy's local rate limit filter: buckets in each proxy.
//! <https://www.envoyproxy.io/docs/envoy/latest/configuration/http/http_filters/local_rate_limit_filter>

use std::time::Duration;

use fenceline_crds::LimitResponse;
use serde_json::{Value, json};

use super::descriptor::Part;
use super::valid::Rate;

pub(super) const TYPE: &str =
    "type.googleapis.com/envoy.extensions.filters.http.local_ratelimit.v3.LocalRateLimit";

/// A bucket, and the requests that it is for.
#[derive(Clone, Debug)]
pub(super) struct Bucketed<'a> {
    pub(super) parts: &'a [Part],
    pub(super) rate: Rate,
    /// How many replicas share the rate.
    pub(super) shared_by: u32,
}

/// What all buckets of a filter have in common.
#[derive(Clone, Copy, Debug)]
pub(super) struct Manner<'a> {
    pub(super) stat_prefix: &'a str,
    pub(super) shadow: bool,
    pub(super) max_buckets: u32,
    pub(super) response: &'a LimitResponse,
    /// In seconds.
    pub(super) retry_after: u64,
}

/// The filter. `rate_limits` stands inside it, so that no route has to be changed and nobody else's is used.
pub(super) fn filter(buckets: &[Bucketed<'_>], manner: Manner<'_>) -> Value {
    let Manner {
        stat_prefix,
        shadow,
        max_buckets,
        response,
        retry_after,
    } = manner;
    let fills: Vec<Duration> = buckets.iter().map(|bucket| fill_interval(bucket)).collect();
    let rate_limits: Vec<Value> = buckets
        .iter()
        .map(|bucket| json!({"actions": actions(bucket.parts)}))
        .collect();
    let descriptors: Vec<Value> = buckets.iter().map(descriptor).collect();
    let mut filter = json!({
        "@type": TYPE,
        "stat_prefix": stat_prefix,
        // What fits no descriptor is not limited; each descriptor's interval must be a multiple of this one.
        "token_bucket": bucket(u32::MAX, u32::MAX, common(&fills)),
        "always_consume_default_token_bucket": false,
        "filter_enabled": percent(100),
        "filter_enforced": percent(if shadow { 0 } else { 100 }),
        "rate_limits": rate_limits,
        "descriptors": descriptors,
        "max_dynamic_descriptors": max_buckets,
        "rate_limited_as_resource_exhausted": true,
        "response_headers_to_add": headers(response, retry_after),
    });
    if let Some(status) = response.status {
        filter["status"] = json!({"code": status});
    }
    if response.rate_limit_headers {
        filter["enable_x_ratelimit_headers"] = json!("DRAFT_VERSION_03");
    }
    filter
}

/// A filter that lets everything through: what a proxy has until it gets the other, or where it refuses it from the start.
pub(super) fn off() -> Value {
    json!({"@type": TYPE, "stat_prefix": "fenceline_off"})
}

pub(super) fn actions(parts: &[Part]) -> Vec<&Value> {
    parts.iter().map(|part| &part.action).collect()
}

/// Tokens come continuously since Envoy 1.31, so that a share of a rate is the same tokens over a longer time: no rounding, also where there are
/// more replicas than requests.
fn fill_interval(bucket: &Bucketed<'_>) -> Duration {
    bucket.rate.per * bucket.shared_by.max(1)
}

fn descriptor(of: &Bucketed<'_>) -> Value {
    let entries = of.parts.iter().map(|part| match &part.value {
        Some(value) => json!({"key": part.key, "value": value}),
        None => json!({"key": part.key}),
    });
    let burst = (of.rate.burst / of.shared_by.max(1)).max(1);
    json!({
        "entries": entries.collect::<Vec<_>>(),
        "token_bucket": bucket(burst, of.rate.requests, fill_interval(of)),
    })
}

fn bucket(most: u32, tokens: u32, interval: Duration) -> Value {
    json!({"max_tokens": most, "tokens_per_fill": tokens, "fill_interval": seconds(interval)})
}

/// As protobuf's JSON writes it.
pub(super) fn seconds(time: Duration) -> String {
    match time.subsec_millis() {
        0 => format!("{}s", time.as_secs()),
        millis => format!("{}.{millis:03}s", time.as_secs()),
    }
}

/// The greatest length of time of which all are multiples.
fn common(times: &[Duration]) -> Duration {
    let mut common = 0;
    for time in times {
        let (mut a, mut b) = (common, time.as_millis());
        while b != 0 {
            (a, b) = (b, a % b);
        }
        common = a;
    }
    Duration::from_millis(u64::try_from(common).unwrap_or(1000))
}

pub(super) fn percent(numerator: u32) -> Value {
    json!({"default_value": {"numerator": numerator, "denominator": "HUNDRED"}})
}

/// Headers of rejections.
pub(super) fn headers(response: &LimitResponse, retry_after: u64) -> Vec<Value> {
    let header = |name: &str, value: &str| json!({"header": {"key": name, "value": value}, "append_action": "OVERWRITE_IF_EXISTS_OR_ADD"});
    let given = &response.headers;
    let mut headers: Vec<Value> = given
        .iter()
        .map(|(name, value)| header(name, value))
        .collect();
    if !given
        .keys()
        .any(|name| name.eq_ignore_ascii_case("retry-after"))
    {
        headers.push(header("retry-after", &retry_after.to_string()));
    }
    headers
}

/// In how many seconds a token comes, at least 1.
pub(super) fn retry_after(rate: Rate, shared_by: u32) -> u64 {
    let rate = rate.per_second() / f64::from(shared_by.max(1));
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a few seconds"
    )]
    let seconds = (1.0 / rate).ceil().max(1.0) as u64;
    seconds
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_of_time_as_envoy_wants_them() {
        let times = [1000, 1500, 60_000].map(Duration::from_millis);
        assert_eq!(common(&times), Duration::from_millis(500));
        assert_eq!(common(&times[..1]), Duration::from_secs(1));
        assert_eq!(seconds(Duration::from_millis(1500)), "1.500s");
        assert_eq!(seconds(Duration::from_secs(60)), "60s");
        let slow = Rate {
            requests: 2,
            per: Duration::from_secs(60),
            burst: 2,
        };
        assert_eq!((retry_after(slow, 1), retry_after(slow, 3)), (30, 90));
        let fast = Rate {
            requests: 100,
            per: Duration::from_secs(1),
            burst: 2,
        };
        assert_eq!(retry_after(fast, 1), 1);
    }
}
