//! `ServiceFence`: the scope of one workload.

#![allow(
    unreachable_pub,
    reason = "KubeSchema repeats each struct in a place of its own"
)]

use std::collections::BTreeMap;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, LabelSelector, Time};
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{period, rules};

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
    validation = rules::short_name("ServiceFence", "objects are labelled with it"),
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

    /// Whether hosts with ports that are not HTTP are in every scope (`Import`), or only where they were seen to be called
    /// (`Learn`).
    #[serde(default, rename = "nonHTTP")]
    pub non_http: NonHttp,

    /// Other hosts that go with certain hosts.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 100))]
    pub aliases: Vec<Alias>,
}

impl ServiceFenceSpec {
    /// Whether this kind of evidence counts.
    pub fn believes(&self, evidence: Evidence) -> bool {
        let believed = self.evidence.as_ref();
        believed.is_none_or(|believed| believed.contains(&evidence))
    }
}

/// When learnt dependencies are forgotten.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct Retention {
    /// Forgets a dependency that was not called for so long, as `720h`; `1m` to `87600h`. Needs Prometheus: only who would have
    /// seen the calls can say that there were none.
    #[schemars(length(max = 16))]
    #[x_kube(
        validation = rules::period_between("unusedFor", "1m", "87600h", "720h"),
    )]
    pub unused_for: String,
}

impl Retention {
    /// How long a dependency may go uncalled.
    pub fn unused_for(&self) -> Option<Duration> {
        period(&self.unused_for)
    }
}

/// What becomes of hosts that the global proxy could not catch calls to, since they have ports that are not HTTP.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub enum NonHttp {
    /// They are in every scope.
    #[default]
    Import,
    /// They are in scope once they were declared, or seen to be called: by Prometheus, or by the callers' own proxies. A first
    /// call to one gets what Istio's outboundTrafficPolicy says.
    Learn,
}

/// Other hosts that go with certain hosts.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
pub struct Alias {
    /// A regular expression (RE2) that a whole host name fits, as `(?P<svc>[^.]+)[.]svc[.]example`.
    #[schemars(length(min = 1, max = 500))]
    pub pattern: String,
    /// What comes into scope with such a host; `$svc` is what the group of that name stands for, `$0` the whole.
    #[schemars(length(min = 1, max = 20), inner(length(min = 1, max = 253)))]
    pub hosts: Vec<String>,
}

/// What happens to a call to a host that is not in scope yet. Absent fields have their defaults.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct FirstCall {
    /// Whether it waits until the host is in scope (`Hold`), is passed on at once (`Forward`), or is left to Istio
    /// (`None`).
    #[serde(default)]
    pub policy: FirstCallPolicy,

    /// How long a call is held in all, `10ms` to `10s`; then `otherwise` applies. Absent: `1s`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 16))]
    #[x_kube(
        validation = Rule::new(
            "self.matches('^([0-9]{1,9}s|[0-9]{1,12}ms)$') && duration(self) >= duration('10ms') && duration(self) <= duration('10s')"
        )
            .message("holdFor is a whole number of ms or s, from 10ms to 10s"),
    )]
    pub hold_for: Option<String>,

    /// What becomes of a call that was held for `holdFor` in vain, or cannot be held.
    #[serde(default)]
    pub otherwise: Otherwise,

    /// gRPC: `Auto` forwards at once what no AuthorizationPolicy protects and holds the rest, `Hold` holds every call.
    #[serde(default)]
    pub grpc: GrpcFirstCall,
}

impl FirstCall {
    /// How long a call is held in all.
    pub fn hold_for(&self) -> Duration {
        let given = self.hold_for.as_deref().and_then(period);
        given.map_or(Duration::from_secs(1), |given| given.min(Self::LONGEST))
    }

    /// The longest that any call is held.
    pub const LONGEST: Duration = Duration::from_secs(10);
}

/// How a first call is answered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub enum FirstCallPolicy {
    /// It waits at the global proxy until the host is in the caller's scope; the caller's own proxy then calls the host
    /// itself, so that the callee sees who is calling. What cannot wait (long bodies, upgrades) is forwarded.
    #[default]
    Hold,
    /// The global proxy passes it on under its own identity, where no AuthorizationPolicy asks who is calling; else it
    /// is refused. The caller's next call goes direct.
    Forward,
    /// It is not redirected at all: it gets what Istio's outboundTrafficPolicy says, and nothing is learnt from it.
    None,
}

/// What becomes of a call that could not be held.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Otherwise {
    /// The global proxy passes it on, where no AuthorizationPolicy asks who is calling; else it is refused.
    #[default]
    Forward,
    /// 503, or `UNAVAILABLE` for gRPC.
    Refuse,
}

/// How a first call by gRPC is answered, where the policy is `Hold`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum GrpcFirstCall {
    /// Forward where no AuthorizationPolicy asks who is calling; else hold. A held stream, whose request does not end by
    /// itself, gets `UNAVAILABLE` once the host is in scope.
    #[default]
    Auto,
    /// Hold every call.
    Hold,
}

/// The pods of a fence: by a Service or by labels.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[x_kube(
    validation = Rule::new(
        "[has(self.service), has(self.selector), has(self.wholeNamespace) && self.wholeNamespace].filter(x, x).size() == 1"
    )
        .message("give one of service, selector and wholeNamespace"),
)]
#[serde(rename_all = "camelCase")]
pub struct Workload {
    /// The Service of this namespace whose pods are fenced.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 63))]
    #[x_kube(validation = rules::service_name())]
    pub service: Option<String>,

    /// The labels of the pods that are fenced.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub selector: Option<Selector>,

    /// Every pod of the namespace, but for those with a Sidecar of their own.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub whole_namespace: bool,
}

/// Pods by their labels. Istio's Sidecar selects by equality alone, and so does this.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Selector {
    /// Labels that a pod must have, all of them; at least one.
    #[schemars(schema_with = "rules::labels")]
    pub match_labels: BTreeMap<String, String>,
}

/// Whether a fence acts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Mode {
    /// Write the Sidecar, so that the workload has just its dependencies in scope.
    #[default]
    Enforce,
    /// Report in status what would be in scope; write nothing to Istio. First calls go to the global proxy only once a
    /// fence is enforced, so what is new is learnt from Prometheus and policies alone meanwhile.
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
        validation = Rule::new(rules::is_host("self"))
            .message("a host is a DNS name, without port, scheme or wildcard"),
    )]
    pub host: Option<String>,

    /// Services by label, in namespaces by label.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub services: Option<ServiceSelector>,

    /// When the declaration ends; the host may still be learnt.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<Time>")]
    #[x_kube(
        validation = Rule::new("self >= timestamp('2000-01-01T00:00:00Z')").message("until is a moment after the year 2000"),
    )]
    pub until: Option<Timestamp>,
}

/// Services by their labels, in namespaces by theirs.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ServiceSelector {
    /// Which namespaces: absent is the fence's own, `{}` is every one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "rules::selector")]
    pub namespace_selector: Option<LabelSelector>,
    /// Which Services in them: `{}` is every one.
    #[schemars(schema_with = "rules::selector")]
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
    /// Of the imported: hosts whose AuthorizationPolicies name the workload as a caller.
    #[serde(default)]
    pub named: u32,
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
    /// Prometheus has counted requests or connections of the workload to it.
    Prometheus,
    /// The access logs of the workload's own proxies show connections to it.
    AccessLog,
    /// An AuthorizationPolicy of the host allows the workload to call it, by name. Goes when the policy does.
    AuthorizationPolicy,
}

/// A host that the workload calls.
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
    /// When the workload was last known to call it, to the hour; absent if it never was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<Time>")]
    pub last_seen: Option<Timestamp>,
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
