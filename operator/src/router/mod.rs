//! Routers and TrafficPatches: one writer for each service, which makes one VirtualService and one DestinationRule of all of them,
//! and changes those in an order in which no request fails ([`order`]).

pub mod arrival;
mod blame;
mod expect;
mod follow;
mod gather;
mod host;
pub mod istiod;
pub mod order;
mod others;
mod passing;
pub mod plan;
#[cfg(test)]
mod plan_tests;
mod report;
mod said;
mod view;
mod votes;
mod write;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use imbl::OrdMap;
use kube::ResourceExt;
use tokio::sync::{mpsc, watch};

use crate::apply::{SERVICE_LABEL, Writer};
use crate::clock::Clock;
use crate::fence::Settings;
use crate::metrics::Metrics;
use crate::process::Pulse;
use crate::process::quarantine::Object;
use crate::router::host::Hosts;
use crate::router::istiod::Istiods;
use crate::status::StatusWriter;
use crate::work;
use crate::world::{Key, World};

/// How long a change waits for company.
const COALESCE: Duration = Duration::from_millis(20);
/// What was missed is healed this often.
const RESYNC: Duration = Duration::from_secs(600);
/// How long a service waits after an error.
const RETRY: Duration = Duration::from_secs(2);

/// What the controller works with.
pub struct Context {
    pub world: watch::Receiver<Arc<World>>,
    pub writer: Writer,
    pub status: Arc<StatusWriter>,
    pub settings: Settings,
    pub istiods: Arc<Istiods>,
    pub clock: Clock,
    pub metrics: Arc<Metrics>,
}

/// Keeps services as their Routers and patches want them for as long as it is polled: the leader's work.
pub async fn run(context: Arc<Context>, pulse: Pulse) {
    let (wake, woken) = mpsc::unbounded_channel();
    let hosts = &Hosts::new(Arc::clone(&context), wake.clone());
    let world = context.world.clone();
    let changes = work::wake_changed(world, &wake, COALESCE, all, concerned);
    let work = work::run(woken, async |service: &Key| {
        let object = Object::Routes(service.clone());
        pulse.at_object(object, hosts.reconcile(service)).await
    });
    let view = view::run(&context);
    tokio::select! {
        () = changes => {}
        () = work => {}
        () = view => {}
    }
}

/// The service that an object of ours was written for.
pub fn service_of<K: ResourceExt>(object: &K) -> Option<Key> {
    let name = object.labels().get(SERVICE_LABEL)?;
    Some(Key::new(object.namespace()?, name))
}

/// Every service that has a Router, a patch, or something of ours.
fn all(world: &World) -> BTreeSet<Key> {
    let routers = world.routers.iter();
    let routers = routers.map(|(key, router)| Key::new(&*key.namespace, &*router.spec.service));
    let patches = world.traffic_patches.iter();
    let patches = patches.map(|(key, patch)| Key::new(&*key.namespace, &*patch.spec.service));
    let rules = world
        .own_rules
        .values()
        .filter_map(|rule| service_of(rule.as_ref()));
    let routes = world
        .own_routes
        .values()
        .filter_map(|routes| service_of(routes.as_ref()));
    routers.chain(patches).chain(rules).chain(routes).collect()
}

/// The services that a change may concern: those of every namespace in which anything changed that the plan looks at.
fn concerned(then: &World, now: &World) -> BTreeSet<Key> {
    let all = all(now);
    if all.is_empty() {
        return all;
    }
    let mut namespaces = BTreeSet::new();
    changed(&then.routers, &now.routers, &mut namespaces);
    changed(&then.traffic_patches, &now.traffic_patches, &mut namespaces);
    changed(&then.own_rules, &now.own_rules, &mut namespaces);
    changed(&then.own_routes, &now.own_routes, &mut namespaces);
    changed(&then.services, &now.services, &mut namespaces);
    changed(&then.pods, &now.pods, &mut namespaces);
    let elsewhere = !then.virtual_services.ptr_eq(&now.virtual_services)
        || !then.rules.ptr_eq(&now.rules)
        || !then.namespaces.ptr_eq(&now.namespaces);
    if elsewhere {
        return all;
    }
    all.into_iter()
        .filter(|service| namespaces.contains(&service.namespace))
        .collect()
}

/// Notes the namespaces in which anything of a kind changed.
pub(crate) fn changed<V: Clone>(
    then: &OrdMap<Key, Arc<V>>,
    now: &OrdMap<Key, Arc<V>>,
    namespaces: &mut BTreeSet<String>,
) where
    Arc<V>: PartialEq,
{
    use imbl::ordmap::DiffItem;
    if then.ptr_eq(now) {
        return;
    }
    for item in then.diff(now) {
        let key = match item {
            DiffItem::Add(key, _) | DiffItem::Remove(key, _) => key,
            DiffItem::Update { new: (key, _), .. } => key,
        };
        namespaces.insert(key.namespace.clone());
    }
}
