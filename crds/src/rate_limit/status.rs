//! What a RateLimit says of itself.

#![allow(
    unreachable_pub,
    reason = "KubeSchema repeats each struct in a place of its own"
)]

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::KubeSchema;
use serde::{Deserialize, Serialize};

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
