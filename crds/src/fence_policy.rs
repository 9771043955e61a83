//! `FencePolicy`: fences for every workload of many namespaces.

#![allow(
    unreachable_pub,
    reason = "KubeSchema repeats each struct in a place of its own"
)]

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, LabelSelector};
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::rules;
use crate::service_fence::{Alias, Dependency, Evidence, FirstCall, Mode, NonHttp, Retention};

/// Fences every workload of the namespaces that it selects. The label `fenceline.dev/fence: enforce | observe | off`, on a
/// Service or else on its namespace, wins over the policy. Fences that people wrote are left alone.
#[derive(CustomResource, Clone, Debug, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[kube(
    group = "fenceline.dev",
    version = "v1alpha1",
    kind = "FencePolicy",
    plural = "fencepolicies",
    status = "FencePolicyStatus",
    shortname = "fp",
    category = "fenceline",
    derive = "PartialEq",
    derive = "Default",
    validation = rules::short_name("FencePolicy", "fences are labelled with it"),
    printcolumn(name = "Granularity", type_ = "string", json_path = ".spec.granularity"),
    printcolumn(name = "Mode", type_ = "string", json_path = ".spec.template.mode"),
    printcolumn(name = "Namespaces", type_ = "integer", json_path = ".status.namespaces"),
    printcolumn(name = "Fences", type_ = "integer", json_path = ".status.fences"),
    printcolumn(
        name = "Enforced",
        type_ = "integer",
        json_path = ".status.enforced",
        description = "Fences that are in force"
    ),
    printcolumn(
        name = "Ready",
        type_ = "string",
        json_path = ".status.conditions[?(@.type==\"Ready\")].status"
    ),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase")]
pub struct FencePolicySpec {
    /// Which namespaces; `{}` is every one. Those of Kubernetes (`kube-*`), of Istio and of Fenceline are left out unless
    /// they are labelled by hand. Of two policies for one namespace the older counts.
    #[schemars(schema_with = "rules::selector")]
    pub namespace_selector: LabelSelector,

    /// What gets a fence of its own.
    #[serde(default)]
    pub granularity: Granularity,

    /// What the fences say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub template: Option<Template>,

    /// Hosts that are in every scope, by full name: agents, collectors, gateways.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 500), inner(length(min = 1, max = 253)))]
    #[x_kube(
        validation = Rule::new(format!("self.all(host, {})", rules::is_host("host")))
            .message("a host is a DNS name, without port, scheme or wildcard; whole namespaces are template.dependencies"),
    )]
    pub always_import: Vec<String>,

    /// Turns fences from `Observe` to `Enforce` by itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub promote: Option<Promote>,
}

/// What gets a fence of its own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Granularity {
    /// The pods of each Service. Services that select the same pods share one.
    #[default]
    Service,
    /// As `Service`, and pods that no Service selects (Jobs, consumers), by their `app` label.
    Workload,
    /// Each namespace as a whole, also where nothing runs yet.
    Namespace,
}

/// What the fences of a policy say: the fields of a ServiceFence of the same names.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct Template {
    /// Whether the fences act or only report.
    #[serde(default)]
    pub mode: Mode,
    /// Hosts that every workload needs.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 500))]
    pub dependencies: Vec<Dependency>,
    /// What is believed. Absent: everything.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 4))]
    #[x_kube(
        validation = Rule::new("self.all(kind, self.exists_one(other, other == kind))").message("each kind of evidence is named once"),
    )]
    pub evidence: Option<Vec<Evidence>>,
    /// What happens to a call to a host that is not in scope yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub first_call: Option<FirstCall>,
    /// When learnt dependencies are forgotten. Absent: never.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retention: Option<Retention>,
    /// Whether hosts with ports that are not HTTP are in every scope.
    #[serde(default, rename = "nonHTTP")]
    pub non_http: NonHttp,
    /// Other hosts that go with certain hosts.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 100))]
    pub aliases: Vec<Alias>,
}

/// When a fence that observes begins to enforce: once it is old enough and nothing new was learnt for a while. Needs
/// Prometheus, since a fence that only observes learns from it alone.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct Promote {
    /// The least age of the fence, as `24h`; `1s` to `8760h`.
    #[schemars(length(max = 16))]
    #[x_kube(
        validation = rules::period_between("after", "1s", "8760h", "24h"),
    )]
    pub after: String,
    /// For how long nothing new was learnt, as `4h`; `1s` to `8760h`.
    #[schemars(length(max = 16))]
    #[x_kube(
        validation = rules::period_between("quietFor", "1s", "8760h", "4h"),
    )]
    pub quiet_for: String,
}

/// What became of the policy.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct FencePolicyStatus {
    /// The generation of the spec that this speaks of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// `Ready`: every workload that the policy wants fenced has its fence.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["type".to_owned()]))]
    pub conditions: Vec<Condition>,
    /// Namespaces that it has a say in.
    #[serde(default)]
    pub namespaces: u32,
    /// Its fences.
    #[serde(default)]
    pub fences: u32,
    /// Of those: in force.
    #[serde(default)]
    pub enforced: u32,
    /// Of those: only observing.
    #[serde(default)]
    pub observing: u32,
    /// Of those: in conflict with objects of somebody else's.
    #[serde(default)]
    pub conflicted: u32,
}
