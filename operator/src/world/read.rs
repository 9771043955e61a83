//! Objects as the watches read them: no more of them than is kept, since there are many, and none that is malformed hides
//! the others.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt::Debug;

use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::api::core::v1::{Pod, PodIP};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{OwnerReference, Time};
use kube::Resource;
use kube::api::ObjectMeta;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer};
use serde_json::Value;

/// What a watch delivers.
pub(super) trait Watched:
    Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + 'static
{
    type Object;

    /// # Errors
    /// Says what is wrong with the object.
    fn read(self) -> Result<Self::Object, String>;
}

/// An object that somebody may have written so that it makes no sense.
#[derive(Clone, Debug)]
pub(super) struct Guarded<K>(Result<K, (String, ObjectMeta)>);

impl<'de, K: DeserializeOwned> Deserialize<'de> for Guarded<K> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let mut object = Value::deserialize(deserializer)?;
        // Often more than the object itself, and of no use here.
        if let Some(metadata) = object.get_mut("metadata").and_then(Value::as_object_mut) {
            metadata.remove("managedFields");
        }
        let text = |field: &str| object["metadata"][field].as_str().map(str::to_owned);
        let metadata = ObjectMeta {
            name: text("name"),
            namespace: text("namespace"),
            uid: text("uid"),
            resource_version: text("resourceVersion"),
            ..ObjectMeta::default()
        };
        let read = K::deserialize(object).map_err(|error| (error.to_string(), metadata));
        Ok(Self(read))
    }
}

impl<K: Resource<DynamicType = ()>> Resource for Guarded<K> {
    type DynamicType = ();
    type Scope = K::Scope;

    fn kind((): &()) -> Cow<'_, str> {
        K::kind(&())
    }

    fn group((): &()) -> Cow<'_, str> {
        K::group(&())
    }

    fn version((): &()) -> Cow<'_, str> {
        K::version(&())
    }

    fn plural((): &()) -> Cow<'_, str> {
        K::plural(&())
    }

    fn meta(&self) -> &ObjectMeta {
        match &self.0 {
            Ok(object) => object.meta(),
            Err((_, metadata)) => metadata,
        }
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        match &mut self.0 {
            Ok(object) => object.meta_mut(),
            Err((_, metadata)) => metadata,
        }
    }
}

impl<K> Watched for Guarded<K>
where
    K: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + 'static,
{
    type Object = K;

    fn read(self) -> Result<K, String> {
        self.0.map_err(|(error, _)| error)
    }
}

/// What is read of a pod. The API has made sure that it makes sense.
#[derive(Clone, Debug, Default, Deserialize)]
pub(super) struct LeanPod {
    #[serde(deserialize_with = "lean_metadata")]
    pub(super) metadata: ObjectMeta,
    #[serde(default)]
    pub(super) spec: LeanPodSpec,
    #[serde(default)]
    pub(super) status: LeanPodStatus,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct LeanPodSpec {
    pub(super) containers: Vec<LeanContainer>,
    pub(super) init_containers: Vec<LeanContainer>,
    pub(super) service_account_name: Option<String>,
    pub(super) host_network: bool,
}

#[derive(Clone, Debug, Deserialize)]
pub(super) struct LeanContainer {
    pub(super) name: String,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct LeanPodStatus {
    pub(super) phase: String,
    #[serde(rename = "podIPs")]
    pub(super) pod_ips: Vec<PodIP>,
    pub(super) conditions: Vec<LeanCondition>,
}

#[derive(Clone, Debug, Deserialize)]
pub(super) struct LeanCondition {
    #[serde(rename = "type")]
    pub(super) type_: String,
    pub(super) status: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", default)]
#[derive(Default)]
struct LeanMetadata {
    name: Option<String>,
    namespace: Option<String>,
    uid: Option<String>,
    resource_version: Option<String>,
    labels: Option<BTreeMap<String, String>>,
    annotations: Option<BTreeMap<String, String>>,
    owner_references: Option<Vec<OwnerReference>>,
    deletion_timestamp: Option<Time>,
}

fn lean_metadata<'de, D: Deserializer<'de>>(deserializer: D) -> Result<ObjectMeta, D::Error> {
    let LeanMetadata {
        name,
        namespace,
        uid,
        resource_version,
        labels,
        annotations,
        owner_references,
        deletion_timestamp,
    } = LeanMetadata::deserialize(deserializer)?;
    Ok(ObjectMeta {
        name,
        namespace,
        uid,
        resource_version,
        labels,
        annotations,
        owner_references,
        deletion_timestamp,
        ..ObjectMeta::default()
    })
}

impl Resource for LeanPod {
    type DynamicType = ();
    type Scope = NamespaceResourceScope;

    fn kind((): &()) -> Cow<'_, str> {
        Pod::kind(&())
    }

    fn group((): &()) -> Cow<'_, str> {
        Pod::group(&())
    }

    fn version((): &()) -> Cow<'_, str> {
        Pod::version(&())
    }

    fn plural((): &()) -> Cow<'_, str> {
        Pod::plural(&())
    }

    fn meta(&self) -> &ObjectMeta {
        &self.metadata
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.metadata
    }
}

impl Watched for LeanPod {
    type Object = Self;

    fn read(self) -> Result<Self, String> {
        Ok(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use fenceline_crds::istio::Sidecar;
    use serde_json::json;

    #[test]
    fn what_makes_no_sense_is_told_with_its_name() {
        let metadata =
            json!({"name": "cart", "namespace": "shop", "managedFields": [{"manager": "x"}]});
        let well = json!({"metadata": metadata, "spec": {"egress": [{"hosts": ["./*"]}]}});
        let read: Guarded<Sidecar> = serde_json::from_value(well).unwrap();
        assert_eq!(read.meta().managed_fields, None);
        assert_eq!(read.read().unwrap().spec.egress[0].hosts, ["./*"]);
        let ill = json!({"metadata": metadata, "spec": {"egress": 7}});
        let read: Guarded<Sidecar> = serde_json::from_value(ill).unwrap();
        assert_eq!(read.meta().name.as_deref(), Some("cart"));
        assert!(read.read().unwrap_err().contains("invalid type"));
    }

    #[test]
    fn a_pod_without_most_of_it() {
        let pod = json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": "cart-0", "namespace": "shop", "labels": {"app": "cart"}, "managedFields": []},
            "spec": {"containers": [{"name": "app", "image": "x"}], "nodeName": "n"},
            "status": {"phase": "Running", "podIPs": [{"ip": "10.1.0.1"}]},
        });
        let pod: LeanPod = serde_json::from_value(pod).unwrap();
        assert_eq!(pod.spec.containers[0].name, "app");
        assert_eq!(pod.status.pod_ips[0].ip, "10.1.0.1");
        let empty: LeanPod = serde_json::from_value(json!({"metadata": {}})).unwrap();
        assert_eq!(empty.status.phase, "");
    }
}
