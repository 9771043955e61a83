//! The slice of Istio's API that Fenceline reads and writes. Fields that it does not know are kept (`other`), so that
//! what is read can be compared and written back whole. Proven in the lab against Istio's own CRDs.

use std::collections::BTreeMap;
use std::sync::Arc;

use kube::CustomResource;
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Fields of an object that this slice does not name.
pub type Other = BTreeMap<String, Value>;

/// <https://istio.io/latest/docs/reference/config/networking/sidecar/>
#[derive(CustomResource, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[kube(
    group = "networking.istio.io",
    version = "v1",
    kind = "Sidecar",
    namespaced,
    schema = "disabled",
    derive = "PartialEq",
    derive = "Default"
)]
#[serde(rename_all = "camelCase")]
pub struct SidecarSpec {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub workload_selector: Option<WorkloadSelector>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub egress: Vec<EgressListener>,
    #[serde(flatten)]
    pub other: Other,
}

/// Pods of the object's namespace, by their labels.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct WorkloadSelector {
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    #[serde(flatten)]
    pub other: Other,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct EgressListener {
    /// `NAMESPACE/FQDN`.
    pub hosts: Vec<String>,
    #[serde(flatten)]
    pub other: Other,
}

/// <https://istio.io/latest/docs/reference/config/networking/envoy-filter/>
#[derive(CustomResource, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[kube(
    group = "networking.istio.io",
    version = "v1alpha3",
    kind = "EnvoyFilter",
    namespaced,
    schema = "disabled",
    derive = "PartialEq",
    derive = "Default"
)]
#[serde(rename_all = "camelCase")]
pub struct EnvoyFilterSpec {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub workload_selector: Option<WorkloadSelector>,
    /// Each a patch of Envoy's own configuration, in Envoy's own words.
    #[serde(default, skip_serializing_if = "<[Value]>::is_empty")]
    pub config_patches: Patches,
    #[serde(flatten)]
    pub other: Other,
}

/// Patches that many objects may share.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "Vec<Value>")]
pub struct Patches(Arc<Vec<Value>>);

impl std::convert::From<Vec<Value>> for Patches {
    fn from(patches: Vec<Value>) -> Self {
        Self(Arc::new(patches))
    }
}

impl std::ops::Deref for Patches {
    type Target = [Value];

    fn deref(&self) -> &[Value] {
        &self.0
    }
}

/// <https://istio.io/latest/docs/reference/config/networking/virtual-service/>
#[derive(CustomResource, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[kube(
    group = "networking.istio.io",
    version = "v1",
    kind = "VirtualService",
    namespaced,
    schema = "disabled",
    derive = "PartialEq",
    derive = "Default"
)]
#[serde(rename_all = "camelCase")]
pub struct VirtualServiceSpec {
    /// Empty for a delegate.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub hosts: Vec<String>,
    /// Absent is `mesh`: every sidecar.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub gateways: Vec<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub export_to: Vec<String>,
    #[serde(flatten)]
    pub other: Other,
}

/// <https://istio.io/latest/docs/reference/config/networking/destination-rule/>
#[derive(CustomResource, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[kube(
    group = "networking.istio.io",
    version = "v1",
    kind = "DestinationRule",
    namespaced,
    schema = "disabled",
    derive = "PartialEq",
    derive = "Default"
)]
#[serde(rename_all = "camelCase")]
pub struct DestinationRuleSpec {
    pub host: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub traffic_policy: Option<Value>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub subsets: Vec<Subset>,
    #[serde(flatten)]
    pub other: Other,
}

/// <https://istio.io/latest/docs/reference/config/networking/destination-rule/#Subset>
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Subset {
    pub name: String,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub traffic_policy: Option<Value>,
    #[serde(flatten)]
    pub other: Other,
}

/// <https://istio.io/latest/docs/reference/config/networking/service-entry/>
#[derive(CustomResource, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[kube(
    group = "networking.istio.io",
    version = "v1",
    kind = "ServiceEntry",
    namespaced,
    status = "Value",
    schema = "disabled",
    derive = "PartialEq",
    derive = "Default"
)]
#[serde(rename_all = "camelCase")]
pub struct ServiceEntrySpec {
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub hosts: Vec<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub addresses: Vec<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub export_to: Vec<String>,
    #[serde(flatten)]
    pub other: Other,
}

/// A route of the Gateway API; with a Service as parent, sidecars apply it.
/// <https://gateway-api.sigs.k8s.io/reference/spec/#httproutespec>
#[derive(CustomResource, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[kube(
    group = "gateway.networking.k8s.io",
    version = "v1",
    kind = "HTTPRoute",
    namespaced,
    schema = "disabled",
    derive = "PartialEq",
    derive = "Default"
)]
pub struct HTTPRouteSpec {
    #[serde(flatten)]
    pub other: Other,
}

/// The same for gRPC.
#[derive(CustomResource, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[kube(
    group = "gateway.networking.k8s.io",
    version = "v1",
    kind = "GRPCRoute",
    namespaced,
    schema = "disabled",
    derive = "PartialEq",
    derive = "Default"
)]
pub struct GRPCRouteSpec {
    #[serde(flatten)]
    pub other: Other,
}

/// <https://istio.io/latest/docs/reference/config/security/authorization-policy/>
#[derive(CustomResource, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[kube(
    group = "security.istio.io",
    version = "v1",
    kind = "AuthorizationPolicy",
    namespaced,
    schema = "disabled",
    derive = "PartialEq",
    derive = "Default"
)]
#[serde(rename_all = "camelCase")]
pub struct AuthorizationPolicySpec {
    /// The pods it applies to; absent is every one of the namespace, or of the mesh in the root namespace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub selector: Option<PolicySelector>,
    /// `ALLOW` (also when absent), `DENY`, `AUDIT` or `CUSTOM`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub action: Option<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub rules: Vec<Rule>,
    #[serde(flatten)]
    pub other: Other,
}

/// Pods of the object's namespace, by their labels.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PolicySelector {
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub match_labels: BTreeMap<String, String>,
}

/// <https://istio.io/latest/docs/reference/config/security/authorization-policy/#Rule>
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Rule {
    /// Who calls; any of them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub from: Vec<From>,
    /// What is called; any of them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub to: Vec<To>,
    /// Further conditions; all of them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub when: Vec<Condition>,
    #[serde(flatten)]
    pub other: Other,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct From {
    #[serde(default)]
    pub source: Source,
}

/// <https://istio.io/latest/docs/reference/config/security/authorization-policy/#Source>
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Source {
    /// `TRUST_DOMAIN/ns/NAMESPACE/sa/SERVICE_ACCOUNT`, or with `*` at one end.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub principals: Vec<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub namespaces: Vec<String>,
    /// `NAMESPACE/SERVICE_ACCOUNT`, or `SERVICE_ACCOUNT` of the policy's own namespace.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub service_accounts: Vec<String>,
    #[serde(flatten)]
    pub other: Other,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct To {
    #[serde(default)]
    pub operation: Operation,
}

/// <https://istio.io/latest/docs/reference/config/security/authorization-policy/#Operation>
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Operation {
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub hosts: Vec<String>,
    #[serde(flatten)]
    pub other: Other,
}

/// <https://istio.io/latest/docs/reference/config/security/authorization-policy/#Condition>
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Condition {
    pub key: String,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub values: Vec<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub not_values: Vec<String>,
}

#[cfg(test)]
mod tests {
    use super::Sidecar;
    use serde_json::{Value, json};

    #[test]
    fn fields_that_are_not_known_survive_reading_and_writing() {
        let sidecar = json!({
            "apiVersion": "networking.istio.io/v1", "kind": "Sidecar",
            "metadata": {"name": "theirs", "namespace": "shop"},
            "spec": {
                "workloadSelector": {"labels": {"app": "cart"}},
                "egress": [{"hosts": ["./*"], "bind": "127.0.0.1"}],
                "outboundTrafficPolicy": {"mode": "REGISTRY_ONLY"},
            },
        });
        let read: Sidecar = serde_json::from_value(sidecar.clone()).unwrap();
        assert_eq!(
            serde_json::to_value(read).unwrap(),
            sidecar,
            "{:?}",
            Value::Null
        );
    }
}
