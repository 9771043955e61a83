//! `TrafficPatch`: one feature of one team, on the same routes as everybody else's.

#![allow(
    unreachable_pub,
    reason = "KubeSchema repeats each struct in a place of its own"
)]

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::router::{FieldOrigin, HeaderMatch};
use crate::{istio_words, rules};

/// Sets fields of a service's routes and of its destination. Of all patches of a service, and its Router, Fenceline makes one
/// VirtualService and one DestinationRule, field by field: the higher `priority` wins, then the older patch, then the
/// name.
#[derive(CustomResource, Clone, Debug, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[kube(
    group = "fenceline.dev",
    version = "v1alpha1",
    kind = "TrafficPatch",
    plural = "trafficpatches",
    namespaced,
    status = "TrafficPatchStatus",
    category = "fenceline",
    derive = "PartialEq",
    derive = "Default",
    validation = Rule::new("has(self.spec.http) || has(self.spec.destination)")
        .message("give http, destination or both: a patch that sets nothing is a mistake")
        .field_path(".spec"),
    validation = Rule::new("!has(self.spec.version) || has(self.spec.branch)")
        .message("a version is of a branch: give branch too")
        .field_path(".spec.version"),
    validation = Rule::new("!has(self.spec.match) || !has(self.spec.destination)")
        .message("a destination is the same for all requests: match narrows http alone")
        .field_path(".spec.match"),
    printcolumn(name = "Service", type_ = "string", json_path = ".spec.service"),
    printcolumn(name = "Branch", type_ = "string", json_path = ".spec.branch"),
    printcolumn(name = "Priority", type_ = "integer", json_path = ".spec.priority"),
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
pub struct TrafficPatchSpec {
    /// The Service of this namespace.
    #[schemars(length(min = 1, max = 63))]
    #[x_kube(
        validation = rules::service_name(),
        validation = Rule::new("self == oldSelf")
            .message("a TrafficPatch stays with its Service: make another one for another Service"),
    )]
    pub service: String,

    /// Narrows the patch to a branch of the service's Router.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 40))]
    #[x_kube(validation = rules::branch_name())]
    pub branch: Option<String>,

    /// Narrows it to a version of the branch: its `destination`, and `http.headers`. Other fields of routes are the same for all
    /// versions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 63))]
    #[x_kube(validation = rules::label_value("a version"))]
    pub version: Option<String>,

    /// Narrows `http` to requests that fit one of these.
    #[serde(default, rename = "match", skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 10))]
    pub matches: Vec<RequestMatch>,

    /// Of two patches that set the same field, the one with the higher priority wins.
    #[serde(default)]
    pub priority: i32,

    /// Fields of the routes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub http: Option<HttpPatch>,

    /// Fields of the destination.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub destination: Option<DestinationPatch>,
}

/// Requests: everything given must fit.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[x_kube(
    validation = Rule::new("has(self.method) || has(self.path) || (has(self.headers) && self.headers.size() > 0)")
        .message("give method, path, headers or several of them"),
)]
#[serde(rename_all = "camelCase")]
pub struct RequestMatch {
    /// As `GET`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 32), pattern(r"^[-A-Za-z]+$"))]
    pub method: Option<String>,
    /// The path, without the query string.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<PathMatch>,
    /// Headers, all of them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 10))]
    pub headers: Vec<HeaderMatch>,
}

/// A path of a request.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[x_kube(
    validation = Rule::new("[has(self.exact), has(self.prefix), has(self.regex)].filter(x, x).size() == 1")
        .message("give one of exact, prefix and regex"),
)]
#[serde(rename_all = "camelCase")]
pub struct PathMatch {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 1024))]
    pub exact: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 1024))]
    pub prefix: Option<String>,
    /// RE2, for the whole path.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 1024))]
    #[x_kube(validation = rules::regex())]
    pub regex: Option<String>,
}

/// An object of Istio's API, in Istio's own words; kube-apiserver checks it when it is written.
pub type IstioObject = Map<String, Value>;

/// Fields of the routes, as Istio's HTTPRoute has them:
/// <https://istio.io/latest/docs/reference/config/networking/virtual-service/#HTTPRoute>
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[schemars(extend("minProperties" = 1))]
#[serde(rename_all = "camelCase")]
pub struct HttpPatch {
    /// As `2s`; `0s` is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 16))]
    #[x_kube(validation = istio_words::length_of_time("0s"))]
    pub timeout: Option<String>,
    /// `attempts`, `perTryTimeout`, `retryOn`, … For gRPC, `retryOn` knows `cancelled`, `deadline-exceeded`, `unavailable`, …
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "istio_words::retries")]
    pub retries: Option<IstioObject>,
    /// `delay` and `abort`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "istio_words::fault")]
    pub fault: Option<IstioObject>,
    /// Where copies of requests go; answers to those are thrown away. A list is taken as a whole.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "istio_words::mirrors")]
    pub mirrors: Option<Vec<IstioObject>>,
    /// `request` and `response`, each with `set`, `add` and `remove`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "istio_words::headers")]
    pub headers: Option<IstioObject>,
    /// `allowOrigins`, `allowMethods`, …
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "istio_words::any")]
    pub cors_policy: Option<IstioObject>,
}

/// Fields of the destination, as Istio's TrafficPolicy has them:
/// <https://istio.io/latest/docs/reference/config/networking/destination-rule/#TrafficPolicy>
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[schemars(extend("minProperties" = 1))]
#[serde(rename_all = "camelCase")]
pub struct DestinationPatch {
    /// `simple` or `consistentHash`; `localityLbSetting`; `warmup`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "istio_words::load_balancer")]
    pub load_balancer: Option<IstioObject>,
    /// `tcp` and `http`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "istio_words::any")]
    pub connection_pool: Option<IstioObject>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "istio_words::any")]
    pub outlier_detection: Option<IstioObject>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "istio_words::any")]
    pub tls: Option<IstioObject>,
}

/// What became of the patch.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct TrafficPatchStatus {
    /// The generation of the spec that this speaks of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// `Ready`: everything that it sets is in force, but for what it lost.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["type".to_owned()]))]
    pub conditions: Vec<Condition>,
    /// The fields that it sets; the first 200.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub won: Vec<String>,
    /// The fields that another patch sets; the first 200.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub lost: Vec<FieldOrigin>,
    /// What every proxy had last, in short, where no Router says so: whoever leads next need not ask them again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub in_force: Option<String>,
}
