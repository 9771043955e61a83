//! `RateLimit`: how many requests of which kind a workload, its callers, or a gateway lets through.

#![allow(
    unreachable_pub,
    reason = "KubeSchema repeats each struct in a place of its own"
)]

use std::collections::BTreeMap;
use std::time::Duration;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::period;
use crate::service_fence::Selector;
use crate::traffic_patch::PathMatch;

/// Limits the requests of a workload, down to the URL. Any number of RateLimits may be for the same workload: each has buckets of
/// its own, and the strictest answers. Fenceline writes one EnvoyFilter for each.
#[derive(CustomResource, Clone, Debug, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[kube(
    group = "fenceline.dev",
    version = "v1alpha1",
    kind = "RateLimit",
    namespaced,
    status = "RateLimitStatus",
    category = "fenceline",
    derive = "PartialEq",
    derive = "Default",
    validation = Rule::new("self.spec.direction != 'Outbound' || has(self.spec.to)")
        .message("an Outbound limit needs `to`: the host whose requests are limited"),
    validation = Rule::new("self.spec.direction != 'Outbound' || !has(self.spec.target.gateway)")
        .message("a gateway has no direction: leave it out"),
    validation = Rule::new("!has(self.spec.to) || self.spec.direction == 'Outbound' || has(self.spec.target.gateway)")
        .message("`to` is for Outbound limits and for gateways: what comes in at a workload is for itself"),
    validation = Rule::new("self.spec.share != 'Global' || self.spec.rules.all(r, !has(r.limit.burst))")
        .message("a Global limit counts in fixed windows, which have no burst"),
    validation = Rule::new("self.spec.share == 'Global' || self.spec.rules.all(r, !has(r.ceiling))")
        .message("a ceiling stands in front of a Global limit; other limits are local themselves"),
    validation = Rule::new("self.spec.share == 'Global' || !has(self.spec.onUnavailable)")
        .message("onUnavailable is for Global limits: others ask nobody"),
    validation = Rule::new("self.spec.direction != 'Outbound' || self.spec.rules.all(r, (!has(r.match) || !has(r.match.principals)) && (!has(r.by) || r.by.all(b, !has(b.principal))))")
        .message("the caller of an Outbound limit is the workload itself, whose principal is always the same: select other pods instead"),
    printcolumn(name = "Target", type_ = "string", json_path = ".status.target"),
    printcolumn(name = "Share", type_ = "string", json_path = ".spec.share"),
    printcolumn(
        name = "Limits",
        type_ = "string",
        json_path = ".status.summary",
        description = "What each rule lets through at this moment"
    ),
    printcolumn(
        name = "Ready",
        type_ = "string",
        json_path = ".status.conditions[?(@.type==\"Ready\")].status"
    ),
    printcolumn(
        name = "Message",
        type_ = "string",
        json_path = ".status.conditions[?(@.type==\"Ready\")].message",
        priority = 1
    ),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase")]
pub struct RateLimitSpec {
    /// Whose proxies count.
    pub target: LimitTarget,

    /// Whether requests are limited where they come in or where they go out. Not for gateways.
    #[serde(default)]
    pub direction: Direction,

    /// The host of the requests, for Outbound limits and for gateways: a Service of this namespace by its short name, or any host by its
    /// full one, also `*.example.com`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    #[x_kube(
        validation = Rule::new("self.matches('^([*][.])?[a-z0-9]([-a-z0-9.]*[a-z0-9])?$')")
            .message("`to` is a host in lower case, as reviews, reviews.shop.svc.cluster.local or *.example.com, without a port"),
    )]
    pub to: Option<String>,

    /// Narrows the limit to one port: of the pods for Inbound, of the called Service for Outbound, of the Gateway's server for a
    /// gateway. Absent: all, each with buckets of its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 65535))]
    pub port: Option<u16>,

    /// Who shares a bucket.
    #[serde(default)]
    pub share: Share,

    /// What becomes of requests while the rate limit service does not answer. Only for Global limits. Absent: `Allow`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub on_unavailable: Option<OnUnavailable>,

    /// Values that `when` and `adaptive` may use, as `metrics.NAME`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 10))]
    #[x_kube(
        validation = Rule::new("self.all(m, self.filter(o, o.name == m.name).size() == 1)").message("each metric has a name of its own"),
    )]
    pub metrics: Vec<Metric>,

    /// Each rule counts the requests that it matches in buckets of its own.
    #[schemars(length(min = 1, max = 100))]
    #[x_kube(
        validation = Rule::new("self.all(r, self.filter(o, o.name == r.name).size() == 1)").message("each rule has a name of its own"),
    )]
    pub rules: Vec<LimitRule>,
}

/// Whose proxies count: give one of them.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[x_kube(
    validation = Rule::new("[has(self.service), has(self.selector), has(self.gateway)].filter(x, x).size() == 1")
        .message("give one of service, selector and gateway"),
)]
#[serde(rename_all = "camelCase")]
pub struct LimitTarget {
    /// The pods of this Service of the namespace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 63))]
    pub service: Option<String>,
    /// Pods of this namespace by their labels; in Istio's root namespace, of every namespace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[x_kube(
        validation = Rule::new("self.matchLabels.size() > 0").message("a selector without labels would be every pod: give labels"),
    )]
    pub selector: Option<Selector>,
    /// Gateways of this namespace (in Istio's root namespace, of every namespace).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gateway: Option<GatewayTarget>,
}

/// Gateways, by the labels of their pods.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct GatewayTarget {
    /// As the `selector` of Istio's Gateway.
    #[schemars(extend("minProperties" = 1))]
    pub selector: BTreeMap<String, String>,
}

/// Where requests are limited.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Direction {
    /// As they come in at the workload.
    #[default]
    Inbound,
    /// As they go out of it, `to` a host.
    Outbound,
}

/// Who shares a bucket.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Share {
    /// Each replica has the whole limit for itself.
    #[default]
    PerReplica,
    /// The limit is divided by the ready replicas.
    AcrossReplicas,
    /// All replicas ask the rate limit service, which counts in Redis.
    Global,
}

/// What becomes of requests while the rate limit service does not answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum OnUnavailable {
    /// They pass; a `ceiling` still holds.
    #[default]
    Allow,
    /// They are answered with status 500.
    Deny,
}

/// A value that expressions may use.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct Metric {
    #[schemars(length(min = 1, max = 40))]
    #[x_kube(
        validation = Rule::new("self.matches('^[a-z][A-Za-z0-9_]*$')").message("a metric's name is a word, as p99"),
    )]
    pub name: String,
    pub prometheus: PrometheusQuery,
}

/// A question to Prometheus.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct PrometheusQuery {
    /// PromQL, whose answer is one number: a scalar, or a vector of one series.
    #[schemars(length(min = 1, max = 2048))]
    pub query: String,
}

/// One limit, and the requests that it is for.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct LimitRule {
    /// A DNS label.
    #[schemars(length(min = 1, max = 63))]
    #[x_kube(
        validation = Rule::new("self.matches('^[a-z0-9]([-a-z0-9]*[a-z0-9])?$')").message("a rule's name is a DNS label"),
    )]
    pub name: String,

    /// The requests that it is for: everything given must fit. Absent: all.
    #[serde(default, rename = "match", skip_serializing_if = "Option::is_none")]
    pub matches: Option<LimitMatch>,

    /// A bucket for each value instead of one for all; with several, for each combination. A request without the value is not limited.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 3))]
    pub by: Vec<LimitBy>,

    /// How many buckets of `by` a proxy keeps at once; when there are more values, the bucket that was not used for longest is
    /// dropped, and its value begins anew with a full one. Each takes some 500 bytes. Not for Global limits, whose buckets are in Redis.
    #[serde(default = "most_buckets", skip_serializing_if = "is_most_buckets")]
    #[schemars(range(min = 1, max = 100_000))]
    pub max_buckets: u32,

    /// How many requests.
    pub limit: Quota,

    /// Only with `share: Global`: what each replica lets through at most, before it asks the rate limit service.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ceiling: Option<Quota>,

    /// When the rule is in force, in CEL: `metrics.p99 > 0.5 && replicas < 10`. Absent: always. Looked at every
    /// `adaptive.every`, or 30 s.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 1024))]
    pub when: Option<String>,

    /// A limit that follows metrics.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub adaptive: Option<Adaptive>,

    /// Count, but reject nothing.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub shadow: bool,

    /// How rejected requests are answered. Absent: status 429 and `retry-after`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub response: Option<LimitResponse>,
}

const MOST_BUCKETS: u32 = 1000;

fn most_buckets() -> u32 {
    MOST_BUCKETS
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "as serde calls it")]
fn is_most_buckets(number: &u32) -> bool {
    *number == MOST_BUCKETS
}

/// Requests: everything given must fit.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct LimitMatch {
    /// One of these, as `GET`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(
        length(max = 10),
        inner(length(min = 1, max = 32), pattern(r"^[A-Za-z]+$"))
    )]
    pub methods: Vec<String>,
    /// The path, without the query string.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<PathMatch>,
    /// Headers, all of them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 10))]
    pub headers: Vec<ValueMatch>,
    /// Parameters of the query string, all of them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 10))]
    pub query: Vec<ValueMatch>,
    /// The caller is one of these: `TRUST_DOMAIN/ns/NAMESPACE/sa/SERVICE_ACCOUNT`, or with `*` at one end, as in Istio's
    /// AuthorizationPolicy. Who has no certificate is none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 32), inner(length(min = 1, max = 512)))]
    pub principals: Vec<String>,
    /// The client's address is in one of these ranges, as `10.0.0.0/8`. It is the one that Envoy trusts: behind proxies, the last of
    /// `x-forwarded-for`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64), inner(length(min = 1, max = 64)))]
    pub cidrs: Vec<String>,
}

/// A header or a query parameter.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[x_kube(
    validation = Rule::new("[has(self.exact), has(self.prefix), has(self.regex), has(self.present)].filter(x, x).size() == 1")
        .message("give one of exact, prefix, regex and present"),
)]
#[serde(rename_all = "camelCase")]
pub struct ValueMatch {
    #[schemars(length(min = 1, max = 256))]
    pub name: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 1024))]
    pub exact: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 1024))]
    pub prefix: Option<String>,
    /// RE2, for the whole value.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 1024))]
    pub regex: Option<String>,
    /// Whether it is there at all, or not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub present: Option<bool>,
}

/// What buckets are told apart by: give one of them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[x_kube(
    validation = Rule::new("[has(self.header), has(self.query), has(self.principal), has(self.remoteAddress)].filter(x, x).size() == 1")
        .message("give one of header, query, principal and remoteAddress"),
)]
#[serde(rename_all = "camelCase")]
pub struct LimitBy {
    /// The value of this header.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 256))]
    pub header: Option<String>,
    /// The value of this query parameter.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 256))]
    pub query: Option<String>,
    /// The caller, by its certificate.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub principal: Option<Nothing>,
    /// The client's address, as in `match.cidrs`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub remote_address: Option<Nothing>,
}

/// `{}`
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Nothing {}

/// A number of requests for a length of time.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct Quota {
    #[schemars(range(min = 1, max = 1_000_000_000))]
    pub requests: u32,
    /// As `1s`, `1m`; from `100ms` to `168h`. A Global limit knows `1s`, `1m`, `1h`, `24h` and `168h`.
    #[schemars(length(max = 16))]
    #[x_kube(
        validation = Rule::new("self.matches('^([0-9]+(ms|s|m|h))+$') && duration(self) >= duration('100ms') && duration(self) <= duration('168h')")
            .message("per is a length of time from 100ms to 168h, as 1s"),
    )]
    pub per: String,
    /// How many at once, after a pause. Absent: as many as `requests`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1_000_000_000))]
    pub burst: Option<u32>,
}

impl Quota {
    /// The length of time; nothing where the text says none.
    pub fn per(&self) -> Option<Duration> {
        period(&self.per).filter(|per| !per.is_zero())
    }

    pub fn burst(&self) -> u32 {
        self.burst.unwrap_or(self.requests)
    }
}

/// A limit that follows metrics. It begins with `limit.requests`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[x_kube(
    validation = Rule::new("self.min <= self.max").message("min is not above max"),
)]
#[serde(rename_all = "camelCase")]
pub struct Adaptive {
    /// The number of requests for `limit.per` that is wanted, in CEL: `int(100.0 / metrics.p99)`. It knows `metrics`, `replicas` (ready
    /// ones), `limit.requests` (as the spec says) and `limit.effective` (as it is now).
    #[schemars(length(min = 1, max = 1024))]
    pub requests: String,
    /// Never less.
    #[schemars(range(min = 1, max = 1_000_000_000))]
    pub min: u32,
    /// Never more.
    #[schemars(range(min = 1, max = 1_000_000_000))]
    pub max: u32,
    /// How far it moves at a time, of what it is. Absent: `25%`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 4), pattern(r"^(100|[1-9][0-9]?)%$"))]
    pub max_step: Option<String>,
    /// Changes of less than this are not made, of what it is. Absent: `5%`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 4), pattern(r"^(100|[1-9]?[0-9])%$"))]
    pub dead_band: Option<String>,
    /// How often it may move, `1s` to `1h`. Absent: `30s`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 16))]
    #[x_kube(
        validation = Rule::new("self.matches('^([0-9]+(ms|s|m|h))+$') && duration(self) >= duration('1s') && duration(self) <= duration('1h')")
            .message("every is a length of time from 1s to 1h, as 30s"),
    )]
    pub every: Option<String>,
    /// How long a metric may be missing until `onStale` holds, up to `24h`. Until then the limit stays. Absent: `2m`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 16))]
    #[x_kube(
        validation = Rule::new("self.matches('^([0-9]+(ms|s|m|h))+$') && duration(self) <= duration('24h')")
            .message("staleAfter is a length of time up to 24h, as 2m"),
    )]
    pub stale_after: Option<String>,
    /// What becomes of the limit then.
    #[serde(default)]
    pub on_stale: OnStale,
}

impl Adaptive {
    /// In hundredths.
    pub fn max_step(&self) -> u32 {
        percent(self.max_step.as_deref(), 25)
    }

    /// In hundredths.
    pub fn dead_band(&self) -> u32 {
        percent(self.dead_band.as_deref(), 5)
    }

    pub fn every(&self) -> Duration {
        let given = self.every.as_deref().and_then(period);
        given.unwrap_or(EVERY)
    }

    pub fn stale_after(&self) -> Duration {
        let given = self.stale_after.as_deref().and_then(period);
        given.unwrap_or(Duration::from_secs(120))
    }
}

/// How often expressions are looked at, where nothing else is said.
const EVERY: Duration = Duration::from_secs(30);

impl LimitRule {
    /// How often its expressions are looked at.
    pub fn every(&self) -> Duration {
        self.adaptive.as_ref().map_or(EVERY, Adaptive::every)
    }
}

fn percent(text: Option<&str>, default: u32) -> u32 {
    let number = text.and_then(|text| text.strip_suffix('%')?.parse().ok());
    number.unwrap_or(default)
}

/// What becomes of an adaptive limit once its metrics are stale.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum OnStale {
    /// It stays as it is.
    #[default]
    Keep,
    /// It goes back to `limit.requests`, step by step.
    Declared,
}

/// How rejected requests are answered. gRPC calls get `RESOURCE_EXHAUSTED`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct LimitResponse {
    /// Absent: 429.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 400, max = 599))]
    pub status: Option<u16>,
    /// Further headers; `retry-after` replaces the one that is worked out: the seconds until a token comes.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 9))]
    pub headers: BTreeMap<String, String>,
    /// Whether every answer, also to requests that pass, has `x-ratelimit-limit`, `-remaining` and `-reset`, as in draft 03 of
    /// <https://datatracker.ietf.org/doc/draft-polli-ratelimit-headers/03/>.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub rate_limit_headers: bool,
}

/// What became of the RateLimit.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct RateLimitStatus {
    /// The generation of the spec that this speaks of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// `Ready`: every proxy has it. `MetricsStale`: a metric is missing, and adaptive limits stay as they are.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["type".to_owned()]))]
    pub conditions: Vec<Condition>,
    /// Whose proxies count, in words.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
    /// What each rule lets through, in short.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub summary: Option<String>,
    /// How many ready replicas the limit is divided by, with `share: AcrossReplicas`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replicas: Option<u32>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["name".to_owned()]))]
    pub rules: Vec<RuleStatus>,
    /// About how many requests were over a limit in the last five minutes, by Prometheus, to two digits for each filter.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limited: Option<u64>,
    /// What every proxy had last, in short: whoever leads next need not ask them again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub in_force: Option<String>,
    /// The rate limit services that took in the configuration of a Global limit, or did not.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["name".to_owned()]))]
    pub services: Vec<LimitServiceStatus>,
}

/// What is in force of a rule.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct RuleStatus {
    pub name: String,
    /// Whether it counts: `when` may say no.
    pub active: bool,
    /// Requests for `limit.per`, as of now.
    pub effective: u32,
    /// Since when it is so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub since: Option<Time>,
    /// What it was worked out from, when it last changed: metrics by their names, and replicas.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub inputs: BTreeMap<String, f64>,
    /// Why it is so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    /// Of `status.limited`, those of this rule, where that can be told: rules that are answered alike are counted together.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limited: Option<u64>,
}

/// A rate limit service, and what it has of this RateLimit.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct LimitServiceStatus {
    /// Its node's name, and the replica of Fenceline that it is connected to: `NODE@REPLICA`.
    pub name: String,
    /// Of what it last accepted of this RateLimit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub accepted: Option<String>,
    /// Why it refused what it was sent since.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}
