//! `ServiceFence`: the scope of one workload.

#![allow(
    unreachable_pub,
    reason = "KubeSchema repeats each struct in a place of its own"
)]

use std::collections::BTreeMap;

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, LabelSelector, Time};
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Keeps the Istio configuration of one workload as small as its real dependencies. Fenceline learns what the workload
/// calls and writes an Istio Sidecar with exactly those hosts; calls to other hosts of the mesh still work, through the
/// global proxy, and are learnt by that.
#[derive(CustomResource, Clone, Debug, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[kube(
    group = "fenceline.dev",
    version = "v1alpha1",
    kind = "ServiceFence",
    namespaced,
    status = "ServiceFenceStatus",
    shortname = "sf",
    category = "fenceline",
    derive = "PartialEq",
    derive = "Default",
    validation = Rule::new("self.metadata.name.size() <= 63")
        .message("a ServiceFence's name is at most 63 characters long: objects are labelled with it"),
    printcolumn(name = "Mode", type_ = "string", json_path = ".spec.mode"),
    printcolumn(
        name = "Imported",
        type_ = "integer",
        json_path = ".status.scope.imported",
        description = "Hosts in the workload's scope"
    ),
    printcolumn(
        name = "Visible",
        type_ = "integer",
        json_path = ".status.scope.visible",
        description = "Hosts of the mesh that the workload would have without a fence"
    ),
    printcolumn(
        name = "Ready",
        type_ = "string",
        json_path = ".status.conditions[?(@.type==\"Ready\")].status"
    ),
    printcolumn(
        name = "Reason",
        type_ = "string",
        json_path = ".status.conditions[?(@.type==\"Ready\")].reason",
        priority = 1
    ),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase")]
pub struct ServiceFenceSpec {
    /// The pods that are fenced. Absent: those of the Service with the fence's own name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub workload: Option<Workload>,

    /// Whether the fence acts (`Enforce`) or only reports what it would do (`Observe`).
    #[serde(default)]
    pub mode: Mode,

    /// Hosts that the workload needs whatever was learnt. They stay until removed here, or until `until`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 2000))]
    pub dependencies: Vec<Dependency>,
}

/// The pods of a fence: by a Service or by labels.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[x_kube(
    validation = Rule::new("has(self.service) != has(self.selector)")
        .message("give either service or selector, and not both"),
)]
pub struct Workload {
    /// The Service of this namespace whose pods are fenced.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 63))]
    pub service: Option<String>,

    /// The labels of the pods that are fenced.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub selector: Option<Selector>,
}

/// Pods by their labels. Istio's Sidecar selects by equality alone, and so does this.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Selector {
    /// Labels that a pod must have, all of them; at least one.
    #[schemars(extend("minProperties" = 1))]
    pub match_labels: BTreeMap<String, String>,
}

/// Whether a fence acts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Mode {
    /// Write the Sidecar, so that the workload has just its dependencies in scope.
    #[default]
    Enforce,
    /// Report in status what would be in scope; write nothing to Istio. First calls go to the global proxy only once a
    /// fence is enforced, so nothing new is learnt meanwhile.
    Observe,
}

/// A declared dependency: a host, or every Service that a selector finds.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[x_kube(
    validation = Rule::new("has(self.host) != has(self.services)")
        .message("give either host or services, and not both"),
)]
pub struct Dependency {
    /// A host of a Service, ServiceEntry or VirtualService; `name`, `name.namespace` or the full name. No wildcards.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    #[x_kube(
        validation = Rule::new("self.matches('^[a-zA-Z0-9_]([-a-zA-Z0-9_.]*[a-zA-Z0-9_])?[.]?$')")
            .message("a host is a DNS name, without port, scheme or wildcard"),
    )]
    pub host: Option<String>,

    /// Services by label, in namespaces by label.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub services: Option<ServiceSelector>,

    /// When the declaration ends; the host may still be learnt.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<Time>")]
    pub until: Option<Timestamp>,
}

/// Services by their labels, in namespaces by theirs.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ServiceSelector {
    /// Which namespaces: absent is the fence's own, `{}` is every one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub namespace_selector: Option<LabelSelector>,
    /// Which Services in them: `{}` is every one.
    pub selector: LabelSelector,
}

/// What Fenceline knows and did.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct ServiceFenceStatus {
    /// The generation of the spec that the conditions speak of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,

    /// `Ready`: the fence is what its spec asks for. `Enforced`: the Sidecar is in force. `Conflicted`: somebody else's
    /// object is in the way.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["type".to_owned()]))]
    pub conditions: Vec<Condition>,

    /// How many hosts are in scope, of how many.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scope: Option<Scope>,

    /// What was learnt: hosts that the workload called.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["host".to_owned()]))]
    pub dependencies: Vec<LearntDependency>,

    /// The last few names called that nothing in the mesh answers to; no effect on the scope.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub unresolved: Vec<UnresolvedHost>,
}

/// The win: what is in scope, of what would be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Scope {
    /// Hosts in the workload's scope.
    pub imported: u32,
    /// Hosts that the workload would see without a fence.
    pub visible: u32,
    /// Of the imported: hosts that the workload was seen to call.
    pub learnt: u32,
    /// Of the imported: hosts that `spec.dependencies` names.
    pub declared: u32,
    /// Of the imported: hosts that are in every scope, since the global proxy could not catch calls to them (ports that
    /// are not HTTP, ServiceEntries, VirtualServices under names of their own), and the global proxy itself.
    pub always: u32,
}

/// Why we believe in a dependency.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema,
)]
pub enum Evidence {
    /// The global proxy saw the workload call it.
    GlobalProxy,
}

/// A host that the workload was seen to call.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct LearntDependency {
    /// The full name.
    pub host: String,
    /// How it became known.
    pub evidence: Vec<Evidence>,
    /// When it first became known.
    #[schemars(with = "Time")]
    pub first_seen: Timestamp,
    /// When the workload was last known to call it, to the hour.
    #[schemars(with = "Time")]
    pub last_seen: Timestamp,
}

/// A name that was called and that nothing answers to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct UnresolvedHost {
    /// As it was called, without port, cut to 253 characters.
    pub host: String,
    /// Why it is not a dependency.
    pub reason: String,
}
