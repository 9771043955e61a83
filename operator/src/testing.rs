//! Small worlds for tests.

use std::sync::Arc;

use fenceline_crds::ServiceFence;
use fenceline_crds::istio::{AuthorizationPolicy, ServiceEntry, Sidecar, VirtualService};
use k8s_openapi::api::core::v1::Service;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::fence::Settings;
use crate::world::{Key, NamedHosts, PodFacts, PolicyFacts, Proxy, ServiceFacts, World};

/// A mesh with the namespaces `shop`, `bank` and `fenceline-system`, and nothing in them.
pub(crate) fn world() -> World {
    let mut world = World::new("cluster.local");
    for namespace in ["shop", "bank", "fenceline-system"] {
        world
            .namespaces
            .insert(namespace.to_owned(), Arc::default());
    }
    world
}

/// What an installation with every default has.
pub(crate) fn settings() -> Settings {
    Settings::default()
}

/// Parses YAML.
///
/// # Panics
/// When the YAML is not a `T`.
pub(crate) fn yaml<T: DeserializeOwned>(text: &str) -> T {
    serde_yaml::from_str(text).expect("YAML of a test")
}

/// Adds a Service that selects `app: NAME` and has one HTTP port, 80; `spec` adds to that or replaces it, and may name
/// `exportTo`.
pub(crate) fn service(world: &mut World, namespace: &str, name: &str, spec: &str) {
    let mut whole = json!({
        "selector": {"app": name},
        "clusterIPs": ["10.96.1.1"],
        "ports": [{"port": 80, "name": "http"}],
    });
    let mut annotations = json!({});
    for (field, value) in yaml::<serde_json::Map<String, Value>>(spec) {
        if field == "exportTo" {
            annotations["networking.istio.io/exportTo"] = value;
        } else {
            whole[field] = value;
        }
    }
    let object: Service = serde_json::from_value(json!({
        "metadata": {"name": name, "namespace": namespace, "annotations": annotations},
        "spec": whole,
    }))
    .expect("a Service");
    world.set_service(
        &Key::new(namespace, name),
        Some(ServiceFacts::from(&object)),
    );
}

/// Adds a pod labelled `app: NAME` that runs as the service account NAME.
pub(crate) fn pod(world: &mut World, namespace: &str, name: &str, address: &str) {
    let facts = PodFacts {
        proxy: Proxy::Sidecar,
        runs: true,
        ready: true,
        service_account: name.to_owned(),
        workload: name.to_owned(),
        labels: [("app".to_owned(), name.to_owned())].into(),
        addresses: vec![address.parse().expect("an address")],
    };
    world.set_pod(&Key::new(namespace, name), Some(facts));
}

/// Adds an AuthorizationPolicy.
pub(crate) fn policy(world: &mut World, namespace: &str, name: &str, spec: &str) {
    let mut policy = AuthorizationPolicy::new(name, yaml(spec));
    policy.metadata.namespace = Some(namespace.to_owned());
    let facts = PolicyFacts::of(&policy, "fenceline-system");
    world.set_policy(&Key::new(namespace, name), Some(facts));
}

/// Adds a VirtualService.
pub(crate) fn virtual_service(world: &mut World, namespace: &str, name: &str, spec: &str) {
    let mut object = VirtualService::new(name, yaml(spec));
    object.metadata.namespace = Some(namespace.to_owned());
    let hosts = NamedHosts::of_virtual_service(&object, &world.cluster_domain);
    world.set_virtual_service(&Key::new(namespace, name), Some(hosts));
}

/// Adds a ServiceEntry; `spec` may name its `status`.
pub(crate) fn service_entry(world: &mut World, namespace: &str, name: &str, spec: &str) {
    let mut fields = yaml::<serde_json::Map<String, Value>>(spec);
    let status = fields.remove("status");
    let spec = serde_json::from_value(fields.into()).expect("a ServiceEntry");
    let mut object = ServiceEntry::new(name, spec);
    object.metadata.namespace = Some(namespace.to_owned());
    object.status = status;
    let hosts = NamedHosts::of_service_entry(&object);
    world.set_service_entry(&Key::new(namespace, name), Some(hosts));
}

/// Adds a Sidecar of somebody else's.
pub(crate) fn foreign_sidecar(world: &mut World, namespace: &str, name: &str, spec: &str) {
    let mut sidecar = Sidecar::new(name, yaml(spec));
    sidecar.metadata.namespace = Some(namespace.to_owned());
    world
        .sidecars
        .insert(Key::new(namespace, name), sidecar.into());
}

/// A fence, not yet in a world.
pub(crate) fn fence(namespace: &str, name: &str, spec: &str) -> ServiceFence {
    let mut fence = ServiceFence::new(name, yaml(spec));
    fence.metadata.namespace = Some(namespace.to_owned());
    fence.metadata.uid = Some(format!("uid-of-{name}"));
    fence
}

/// Takes in the objects of a YAML file that the world knows of, as the watches would.
pub(crate) fn load(world: &mut World, text: &str) {
    use serde::Deserialize;
    for document in serde_yaml::Deserializer::from_str(text) {
        let object = Value::deserialize(document).expect("YAML of a test");
        let meta = |field: &str| {
            object["metadata"][field]
                .as_str()
                .unwrap_or_default()
                .to_owned()
        };
        let key = Key::new(meta("namespace"), meta("name"));
        match object["kind"].as_str() {
            Some("Namespace") => {
                world.namespaces.insert(key.name, Arc::default());
            }
            Some("Service") => {
                let service: Service = serde_json::from_value(object).expect("a Service");
                let mut facts = ServiceFacts::from(&service);
                // The API gives each an address.
                facts.addresses = vec!["10.96.0.1".parse().expect("an address")];
                facts.needs_scope = facts.http_ports.is_empty();
                world.set_service(&key, Some(facts));
            }
            Some("ServiceFence") => {
                let fence = fence(&key.namespace, &key.name, &object["spec"].to_string());
                world.fences.insert(key, fence.into());
            }
            _ => {}
        }
    }
}
