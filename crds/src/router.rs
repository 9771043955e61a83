//! `Router`: which versions of a service get which share of its requests, and which branches beside them.

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

use crate::{period, rules};

/// Routes a service's requests to versions by weight, and to branches by header or by caller. Fenceline writes the
/// VirtualService and the DestinationRule, each change of them in an order in which no request fails.
#[derive(CustomResource, Clone, Debug, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[kube(
    group = "fenceline.dev",
    version = "v1alpha1",
    kind = "Router",
    namespaced,
    status = "RouterStatus",
    category = "fenceline",
    derive = "PartialEq",
    derive = "Default",
    validation = Rule::new("self.spec.protocol != 'TCP' || self.spec.branches.all(b, !has(b.match) || b.match.all(m, !has(m.header)))")
        .message("a TCP connection has no headers to match")
        .field_path(".spec.protocol"),
    validation = Rule::new("(has(self.spec.labels) && has(self.spec.labels.branch)) || self.spec.branches.all(b, !has(b.match) || b.match.all(m, !has(m.sourceBranch)))")
        .message("sourceBranch looks at the label of callers that labels.branch names: give it")
        .field_path(".spec.labels"),
    validation = Rule::new("!has(self.spec.createService) || !has(self.spec.port) || self.spec.createService.ports.exists(p, p.port == self.spec.port)")
        .message("the Service that createService makes has no such port")
        .field_path(".spec.port"),
    printcolumn(name = "Service", type_ = "string", json_path = ".spec.service"),
    printcolumn(
        name = "Stage",
        type_ = "string",
        json_path = ".status.stage",
        description = "Stable, or what the change under way waits for"
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
pub struct RouterSpec {
    /// The Service of this namespace whose requests are routed.
    #[schemars(length(min = 1, max = 63))]
    #[x_kube(
        validation = rules::service_name(),
        validation = Rule::new("self == oldSelf")
            .message("a Router stays with its Service: make another Router for another Service"),
    )]
    pub service: String,

    /// Makes the Service, so that one object is enough. It goes with the Router.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub create_service: Option<CreateService>,

    /// The Service's port. Absent: every port of the protocol.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 65535))]
    pub port: Option<u16>,

    /// What the port speaks.
    #[serde(default)]
    pub protocol: RouteProtocol,

    /// The labels of pods that say their branch and their version.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub labels: Option<VersionLabels>,

    /// The first is the base: what matches no other branch, or one that has no ready endpoints, goes there.
    #[schemars(length(min = 1, max = 50))]
    #[x_kube(
        validation = Rule::new("self.all(b, self.filter(o, o.name == b.name).size() == 1)")
            .message("each branch has a name of its own"),
        validation = Rule::new("!has(self[0].match) || self[0].match.size() == 0")
            .message("the first branch is the base, which takes what no other matches: it has no match of its own"),
        validation = Rule::new("self.filter(b, !has(b.match) || b.match.size() == 0).size() == 1")
            .message("each branch but the first needs a match"),
        validation = Rule::new("!has(self[0].ttl)").message("the base has no ttl"),
    )]
    pub branches: Vec<Branch>,

    /// How changes are made. Absent fields have their defaults.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub change: Option<Change>,
}

/// The Service that a Router makes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct CreateService {
    /// The labels of the pods of every branch and version.
    #[schemars(schema_with = "rules::labels")]
    pub selector: BTreeMap<String, String>,
    /// Its ports. They are named by the Router's protocol.
    #[schemars(length(min = 1, max = 50))]
    #[x_kube(
        validation = Rule::new("self.all(p, self.exists_one(o, o.port == p.port))").message("each port is named once"),
    )]
    pub ports: Vec<CreatedPort>,
}

/// A port of the Service that a Router makes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct CreatedPort {
    #[schemars(range(min = 1, max = 65535))]
    pub port: u16,
    /// The pods' port. Absent: the same.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 65535))]
    pub target_port: Option<u16>,
}

/// What a port speaks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "UPPERCASE")]
pub enum RouteProtocol {
    /// HTTP/1.1 and HTTP/2.
    #[default]
    Http,
    /// gRPC, which is routed as HTTP/2 is.
    Grpc,
    /// Connections, by weight and by the caller's branch.
    Tcp,
}

/// The labels of pods that say their branch and their version.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[x_kube(
    validation = Rule::new("!has(self.branch) || self.branch != self.version")
        .message("branch and version are labels of their own: one cannot say both")
        .field_path(".branch"),
)]
#[serde(rename_all = "camelCase")]
pub struct VersionLabels {
    /// The label whose value is the branch's name. Absent: branches are told apart by their versions, and `sourceBranch`
    /// cannot be matched.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 317))]
    #[x_kube(validation = rules::label_key())]
    pub branch: Option<String>,
    /// The label whose value is the version's name.
    #[serde(default = "version_label")]
    #[schemars(length(min = 1, max = 317))]
    #[x_kube(validation = rules::label_key())]
    pub version: String,
}

fn version_label() -> String {
    "version".to_owned()
}

impl Default for VersionLabels {
    fn default() -> Self {
        Self {
            branch: None,
            version: version_label(),
        }
    }
}

/// A branch: versions by weight, and which requests go to them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct Branch {
    /// A DNS label.
    #[schemars(length(min = 1, max = 40))]
    #[x_kube(validation = rules::branch_name())]
    pub name: String,

    /// Versions with their weights, which are relative to each other: `{v1: 9, v2: 1}` and `{v1: 90, v2: 10}` are the same. One
    /// of weight 0 is kept ready and gets nothing.
    #[schemars(extend("minProperties" = 1, "maxProperties" = 50))]
    #[x_kube(
        validation = Rule::new("self.all(v, self[v] >= 0 && self[v] <= 1000000)").message("a weight is from 0 to 1000000"),
        validation = Rule::new("self.exists(v, self[v] > 0)").message("one version at least has a weight above 0"),
        validation = Rule::new("self.all(v, v.matches('^[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?$') && v.size() <= 63)")
            .message("a version is the value of a label"),
    )]
    pub versions: BTreeMap<String, u32>,

    /// The requests that go to this branch: those that fit one of these.
    #[serde(default, rename = "match", skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 10))]
    pub matches: Vec<BranchMatch>,

    /// How long the branch lives, from when this Router first had it, as `8h`; `1s` to `87600h`. Then its requests go to the base, although it still
    /// stands here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 16))]
    #[x_kube(
        validation = rules::period_between("ttl", "1s", "87600h", "8h"),
    )]
    pub ttl: Option<String>,
}

impl Branch {
    /// How long it lives.
    pub fn ttl(&self) -> Option<Duration> {
        self.ttl.as_deref().and_then(period)
    }
}

/// Requests that go to a branch: everything given must fit.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[x_kube(
    validation = Rule::new("has(self.header) || has(self.sourceBranch)").message("give header, sourceBranch or both"),
)]
#[serde(rename_all = "camelCase")]
pub struct BranchMatch {
    /// A header of the request.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub header: Option<HeaderMatch>,
    /// The caller's own branch, by the label `labels.branch` of its pod. Such requests need no header.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 63))]
    #[x_kube(validation = rules::label_value("a branch"))]
    pub source_branch: Option<String>,
}

/// A header of a request.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[x_kube(
    validation = Rule::new("[has(self.exact), has(self.prefix), has(self.regex)].filter(x, x).size() == 1")
        .message("give one of exact, prefix and regex"),
)]
#[serde(rename_all = "camelCase")]
pub struct HeaderMatch {
    /// Its name, which Istio wants in lower case.
    #[schemars(length(min = 1, max = 256))]
    #[x_kube(
        validation = Rule::new("self.matches('^[-a-z0-9_]+$')").message("a header's name is in lower case"),
    )]
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
    #[x_kube(validation = rules::regex())]
    pub regex: Option<String>,
}

/// How changes are made.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct Change {
    /// How it is known that a step has arrived.
    #[serde(default)]
    pub verify: Verify,
    /// How long one step may take to arrive everywhere, `1s` to `1h`; then the last good state is put back. Absent: `2m`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 16))]
    #[x_kube(
        validation = Rule::new("self.matches('^([0-9]+(ms|s|m|h))+$') && duration(self) >= duration('1s') && duration(self) <= duration('1h')")
            .message("timeout is a length of time from 1s to 1h, as 2m"),
    )]
    pub timeout: Option<String>,
    /// How long requests under way to a version that goes have to end, up to `1h`. Absent: `10s`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 16))]
    #[x_kube(
        validation = Rule::new("self.matches('^([0-9]+(ms|s|m|h))+$') && duration(self) <= duration('1h')")
            .message("drain is a length of time up to 1h, as 10s"),
    )]
    pub drain: Option<String>,
    /// How long `verify: Delay` waits, and any other where it can ask nobody, up to `1h`. Absent: `5s`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 16))]
    #[x_kube(
        validation = Rule::new("self.matches('^([0-9]+(ms|s|m|h))+$') && duration(self) <= duration('1h')")
            .message("delay is a length of time up to 1h, as 5s"),
    )]
    pub delay: Option<String>,
    /// How long proxies of other namespaces are waited for that refuse a step or do not answer, up to `1h`; then they are skipped and named. Absent: `30s`. Those of
    /// the Router's own namespace and of `callers` are waited for until `timeout`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 16))]
    #[x_kube(
        validation = Rule::new("self.matches('^([0-9]+(ms|s|m|h))+$') && duration(self) <= duration('1h')")
            .message("others is a length of time up to 1h, as 30s"),
    )]
    pub others: Option<String>,
    /// Other namespaces whose callers must get what this Router says. What somebody wrote there that keeps them from it is a
    /// conflict, as it is in the Router's own namespace; in any other it is said, and callers there go to the Service itself.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 50), inner(length(min = 1, max = 63)))]
    pub callers: Vec<String>,
}

impl Change {
    pub fn timeout(&self) -> Duration {
        given_or(self.timeout.as_deref(), 120)
    }

    pub fn drain(&self) -> Duration {
        given_or(self.drain.as_deref(), 10)
    }

    pub fn delay(&self) -> Duration {
        given_or(self.delay.as_deref(), 5)
    }

    pub fn others(&self) -> Duration {
        given_or(self.others.as_deref(), 30)
    }
}

fn given_or(text: Option<&str>, seconds: u64) -> Duration {
    text.and_then(period)
        .unwrap_or_else(|| Duration::from_secs(seconds))
}

/// How it is known that a step has arrived.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Verify {
    /// Every istiod is asked what each proxy has acknowledged. Where none can be asked, as `Delay`.
    #[default]
    Proxies,
    /// Every istiod is asked what it has sent; proxies are not waited for.
    ControlPlane,
    /// `delay` is waited.
    Delay,
}

/// What became of the Router.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct RouterStatus {
    /// The generation of the spec that this speaks of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// `Ready`: requests go where this Router says. `Conflicted`: somebody else's object is in the way.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["type".to_owned()]))]
    pub conditions: Vec<Condition>,
    /// `Stable`, or the step that is under way.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stage: Option<String>,
    /// What became of each branch.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub branches: Vec<BranchStatus>,
    /// Which TrafficPatch each field of the routes and of the destination has its value from; the first 200.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub fields: Vec<FieldOrigin>,
    /// What every proxy had last, in short: whoever leads next need not ask them again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub in_force: Option<String>,
}

/// What became of a branch.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct BranchStatus {
    pub name: String,
    /// When this Router first had it: its `ttl` counts from then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub since: Option<Time>,
    /// Ready endpoints of each version.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub endpoints: BTreeMap<String, u32>,
    /// Whether every proxy has what leads to it, so that it may be reached.
    #[serde(default)]
    pub prepared: bool,
    /// Whether requests go there, or why not.
    pub message: String,
}

/// Where a field has its value from.
#[derive(
    Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, KubeSchema,
)]
#[serde(rename_all = "camelCase")]
pub struct FieldOrigin {
    /// As `http[main].timeout`.
    pub field: String,
    /// The TrafficPatch's name.
    pub patch: String,
}
