//! Which pods a fence selects.

use std::collections::BTreeMap;

use fenceline_crds::ServiceFence;
use fenceline_crds::istio::Sidecar;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use kube::core::Selector;

use crate::world::{Key, PodFacts, World, in_namespace};

pub type Labels = BTreeMap<String, String>;

/// Why a fence selects no pods.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NoPods {
    /// The Service does not exist (yet, or any more).
    ServiceNotFound(String),
    /// The Service selects nothing by labels, or points elsewhere.
    ServiceWithoutSelector(String),
}

/// Whether a fence is for its whole namespace.
pub fn is_of_namespace(fence: &ServiceFence) -> bool {
    let workload = fence.spec.workload.as_ref();
    workload.is_some_and(|workload| workload.whole_namespace)
}

/// The labels of the fence's pods; none for a whole namespace, since an empty selector means just that.
///
/// # Errors
/// Says why there are none.
pub fn labels(fence: &ServiceFence, world: &World) -> Result<Labels, NoPods> {
    if is_of_namespace(fence) {
        return Ok(Labels::new());
    }
    let workload = fence.spec.workload.clone().unwrap_or_default();
    if let Some(selector) = workload.selector
        && !selector.match_labels.is_empty()
    {
        return Ok(selector.match_labels);
    }
    let meta = &fence.metadata;
    let name = workload
        .service
        .or_else(|| meta.name.clone())
        .unwrap_or_default();
    let service = Key::new(meta.namespace.clone().unwrap_or_default(), name);
    match world.services.get(&service) {
        None => Err(NoPods::ServiceNotFound(service.name)),
        Some(facts) if facts.external_name || facts.selector.is_empty() => {
            Err(NoPods::ServiceWithoutSelector(service.name))
        }
        Some(facts) => Ok(facts.selector.clone()),
    }
}

/// Whether pods with `labels` are selected by `selector`.
pub fn matches(selector: &Labels, labels: &Labels) -> bool {
    selector
        .iter()
        .all(|(key, value)| labels.get(key) == Some(value))
}

/// The fences of `namespace`.
pub fn fences_in<'a>(
    world: &'a World,
    namespace: &str,
) -> impl Iterator<Item = (&'a Key, &'a ServiceFence)> {
    in_namespace(&world.fences, namespace).map(|(key, fence)| (key, fence.as_ref()))
}

/// The Sidecars of `namespace`, whoever wrote them.
pub fn sidecars_in<'a>(
    world: &'a World,
    namespace: &'a str,
) -> impl Iterator<Item = (&'a Key, &'a Sidecar)> {
    in_namespace(&world.sidecars, namespace).map(|(key, sidecar)| (key, sidecar.as_ref()))
}

/// The pods of `namespace`.
pub fn pods_in<'a>(world: &'a World, namespace: &'a str) -> impl Iterator<Item = &'a PodFacts> {
    in_namespace(&world.pods, namespace).map(|(_, pod)| pod.as_ref())
}

/// The pods of `namespace` that `labels` select.
pub fn pods_of<'a>(
    world: &'a World,
    namespace: &'a str,
    labels: &'a Labels,
) -> impl Iterator<Item = &'a PodFacts> {
    pods_in(world, namespace).filter(|pod| matches(labels, &pod.labels))
}

/// The fences that select a pod of `namespace`.
pub fn fences_of_pod(world: &World, namespace: &str, pod: &PodFacts) -> Vec<Key> {
    fences_in(world, namespace)
        .filter(|(_, fence)| {
            labels(fence, world).is_ok_and(|selector| matches(&selector, &pod.labels))
        })
        .map(|(key, _)| key.clone())
        .collect()
}

/// A label selector as Kubernetes means it; absent selects nothing.
///
/// # Errors
/// Fails on an operator that does not exist.
pub fn label_selector(selector: &LabelSelector) -> Result<Selector, String> {
    selector
        .clone()
        .try_into()
        .map_err(|error| format!("{error}"))
}
