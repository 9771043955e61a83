//! What keeps a fence from being in force: Sidecars that people wrote, other fences, pods without a proxy of their own.

use std::collections::BTreeSet;

use fenceline_crds::ServiceFence;
use fenceline_crds::istio::Sidecar;
use kube::ResourceExt;

use super::plan::object_name;
use super::select::{self, Labels};
use crate::world::feed::fence_of;
use crate::world::{Key, PodFacts, Proxy, World};

/// Sidecars that people wrote and that configure pods of this fence: of two, istiod takes the older, so ours might win
/// or lose by chance. One without a selector configures every pod of the namespace.
pub(super) fn foreign_sidecars(fence: &ServiceFence, labels: &Labels, world: &World) -> Vec<Key> {
    let namespace = fence.metadata.namespace.as_deref().unwrap_or_default();
    let ours = object_name(&fence.name_any());
    select::sidecars_in(world, namespace)
        .filter(|(key, sidecar)| {
            let foreign = fence_of(*sidecar).is_none();
            foreign && (key.name == ours || selects(sidecar, labels, namespace, world))
        })
        .map(|(key, _)| key.clone())
        .collect()
}

/// Whether a Sidecar selects pods that `labels` select: all of them by its labels, or one that runs.
fn selects(sidecar: &Sidecar, labels: &Labels, namespace: &str, world: &World) -> bool {
    let Some(selector) = &sidecar.spec.workload_selector else {
        return true;
    };
    if labels.is_empty() {
        // For its own pods it comes before one for the whole namespace.
        return false;
    }
    let theirs = &selector.labels;
    let shared = || {
        select::pods_of(world, namespace, labels).any(|pod| select::matches(theirs, &pod.labels))
    };
    select::matches(theirs, labels) || shared()
}

/// The fences that select pods of this one too and come first: the older, then by name. One for a whole namespace comes after
/// all others, and is in nobody's way: so istiod takes their Sidecars.
pub(super) fn senior_fences(fence: &ServiceFence, labels: &Labels, world: &World) -> Vec<Key> {
    let namespace = fence.metadata.namespace.as_deref().unwrap_or_default();
    let age = |fence: &ServiceFence| (fence.creation_timestamp().map(|at| at.0), fence.name_any());
    let whole = labels.is_empty();
    let seniors = select::fences_in(world, namespace)
        .filter(|(key, other)| key.name != fence.name_any() && age(other) < age(fence));
    let mine: Vec<&PodFacts> = select::pods_of(world, namespace, labels).collect();
    seniors
        .filter(|(_, other)| {
            let theirs = select::labels(other, world);
            theirs.is_ok_and(|theirs| {
                theirs.is_empty() == whole
                    && mine.iter().any(|pod| select::matches(&theirs, &pod.labels))
            })
        })
        .map(|(key, _)| key.clone())
        .collect()
}

/// The proxies of a fence's pods that no Sidecar configures: how many of how many, and of which kinds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Outside {
    pub pods: usize,
    pub of: usize,
    pub kinds: BTreeSet<Proxy>,
}

impl Outside {
    pub(super) fn of(namespace: &str, labels: &Labels, world: &World) -> Self {
        let mut outside = Self::default();
        for pod in select::pods_of(world, namespace, labels).filter(|pod| pod.runs) {
            outside.of += 1;
            if pod.proxy != Proxy::Sidecar {
                outside.pods += 1;
                outside.kinds.insert(pod.proxy);
            }
        }
        outside
    }

    /// Whether there is nobody to be fenced.
    pub fn everybody(&self) -> bool {
        self.of > 0 && self.pods == self.of
    }

    pub fn why(&self) -> String {
        let kinds: Vec<&str> = self.kinds.iter().map(|kind| kind.why()).collect();
        format!(
            "{} of its {} pods {}",
            self.pods,
            self.of,
            kinds.join(" or ")
        )
    }
}
