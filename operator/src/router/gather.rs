//! Finding out all there is about a service.

use std::collections::BTreeSet;
use std::sync::Arc;

use fenceline_crds::Router;
use jiff::Timestamp;
use kube::ResourceExt;

use super::others::{Others, Owner};
use super::write::Objects;
use crate::fence::select::{Labels, matches, pods_in};
use crate::patch::Patches;
use crate::world::{Key, World, in_namespace};

/// What a service is, and what somebody wants of it.
pub(super) struct Gathered<'a> {
    pub(super) service: &'a Key,
    pub(super) fqdn: String,
    pub(super) router: Option<Arc<Router>>,
    /// Routers of the same service that are younger.
    pub(super) juniors: Vec<Arc<Router>>,
    pub(super) patches: Patches,
    pub(super) objects: Objects,
    /// What other people wrote for it.
    pub(super) others: Others,
    /// Namespaces whose proxies a change waits for.
    pub(super) owners: BTreeSet<String>,
}

/// Namespaces that mean something to everybody.
#[derive(Clone, Copy, Debug)]
pub(super) struct Namespaces<'a> {
    /// Istio's root namespace.
    pub(super) root: &'a str,
    /// That of our view of what istiod sends.
    pub(super) view: &'a str,
}

/// How many pods behind the Service have these labels, and are ready.
pub(super) fn endpoints(world: &World, service: &Key, labels: &Labels) -> u32 {
    let Some(facts) = world.services.get(service) else {
        return 0;
    };
    let ready = pods_in(world, &service.namespace).filter(|pod| {
        pod.ready
            && pod.runs
            && matches(&facts.selector, &pod.labels)
            && matches(labels, &pod.labels)
    });
    u32::try_from(ready.count()).unwrap_or(u32::MAX)
}

/// Finds out all there is about a service.
pub(super) fn gather<'a>(
    service: &'a Key,
    world: &World,
    namespaces: Namespaces<'_>,
) -> Gathered<'a> {
    let age = |router: &Arc<Router>| {
        let created = router.creation_timestamp().map(|time| time.0);
        (created.unwrap_or(Timestamp::MAX), router.name_any())
    };
    let routers = in_namespace(&world.routers, &service.namespace).map(|(_, router)| router);
    let mut routers: Vec<Arc<Router>> = routers
        .filter(|router| {
            router.spec.service == service.name && router.metadata.deletion_timestamp.is_none()
        })
        .cloned()
        .collect();
    routers.sort_by_key(age);
    let mut routers = routers.into_iter();
    let router = routers.next();
    let patches = in_namespace(&world.traffic_patches, &service.namespace).map(|(_, patch)| patch);
    let patches = patches.filter(|patch| patch.spec.service == service.name);
    let fqdn = world.fqdn(service);
    let objects = Objects::stored(service, world);
    let change = router
        .as_ref()
        .and_then(|router| router.spec.change.as_ref());
    let ours = objects.routes.as_ref();
    let owner = Owner {
        service,
        fqdn: &fqdn,
        callers: change.map(|change| &*change.callers).unwrap_or_default(),
        since: ours
            .and_then(|ours| ours.creation_timestamp())
            .map(|time| time.0),
    };
    let own = [service.namespace.as_str(), namespaces.view];
    let named = owner.callers.iter().map(String::as_str);
    Gathered {
        owners: own.into_iter().chain(named).map(str::to_owned).collect(),
        others: Others::of(owner, world, namespaces),
        service,
        fqdn,
        router,
        juniors: routers.collect(),
        patches: Patches::new(patches.cloned().collect()),
        objects,
    }
}
