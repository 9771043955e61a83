//! `RateLimit`: how many requests of which kind a workload, its callers, or a gateway lets through.

#![allow(
    unreachable_pub,
    reason = "KubeSchema repeats each struct in a place of its own"
)]

mod rule;
mod status;

use std::collections::BTreeMap;

use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use rule::{
    Adaptive, LimitBy, LimitMatch, LimitResponse, LimitRule, Nothing, OnStale, Quota, ValueMatch,
};
pub use status::{LimitServiceStatus, RateLimitStatus, RuleStatus};

use crate::rules;
use crate::service_fence::Selector;

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
    validation = rules::short_name("RateLimit", "objects are labelled with it"),
    validation = Rule::new("self.spec.direction != 'Outbound' || has(self.spec.to)")
        .message("an Outbound limit needs `to`: the host whose requests are limited")
        .field_path(".spec.to"),
    validation = Rule::new("self.spec.direction != 'Outbound' || !has(self.spec.target.gateway)")
        .message("a gateway has no direction: leave it out")
        .field_path(".spec.direction"),
    validation = Rule::new("!has(self.spec.to) || self.spec.direction == 'Outbound' || has(self.spec.target.gateway)")
        .message("`to` is for Outbound limits and for gateways: what comes in at a workload is for itself")
        .field_path(".spec.to"),
    validation = Rule::new("self.spec.share != 'Global' || self.spec.rules.all(r, !has(r.limit.burst))")
        .message("a Global limit counts in fixed windows, which have no burst: leave limit.burst out")
        .field_path(".spec.rules"),
    validation = Rule::new(format!("self.spec.share != 'Global' || self.spec.rules.all(r, {})", rules::is_window("r.limit.per")))
        .message("a Global limit's limit.per is 1s, 1m, 1h, 24h or 168h, which the rate limit service counts by; a limit of another window is `share: AcrossReplicas`")
        .field_path(".spec.rules"),
    validation = Rule::new("self.spec.share == 'Global' || self.spec.rules.all(r, !has(r.ceiling))")
        .message("a ceiling stands in front of a Global limit; other limits are local themselves")
        .field_path(".spec.rules"),
    validation = Rule::new("self.spec.share == 'Global' || !has(self.spec.onUnavailable)")
        .message("onUnavailable is for Global limits: others ask nobody")
        .field_path(".spec.onUnavailable"),
    validation = Rule::new("self.spec.direction != 'Outbound' || self.spec.rules.all(r, (!has(r.match) || !has(r.match.principals)) && (!has(r.by) || r.by.all(b, !has(b.principal))))")
        .message("the caller of an Outbound limit is the workload itself, whose principal is always the same: select other pods instead")
        .field_path(".spec.rules"),
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
        validation = Rule::new("self.matches('^([*][.])?[a-z0-9]([-a-z0-9.]*[a-z0-9])?$') && !self.contains('..')")
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
    #[x_kube(validation = rules::service_name())]
    pub service: Option<String>,
    /// Pods of this namespace by their labels; in Istio's root namespace, of every namespace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
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
    #[schemars(schema_with = "rules::labels")]
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
    /// PromQL, whose answer is one number: a scalar, or a vector of one series. Asked only where the operator's `--rate-limit-metrics` lets
    /// it; with `namespaced`, for the series of this namespace.
    #[schemars(length(min = 1, max = 1024))]
    pub query: String,
}
