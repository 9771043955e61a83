//! What the operator sees of what istiod sends: a Sidecar for its own view, with every routed host and nothing else.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use fenceline_crds::istio::{EgressListener, Sidecar, SidecarSpec, WorkloadSelector};
use kube::api::ObjectMeta;

use super::istiod::VIEW_LABEL;
use super::{Context, all};
use crate::apply::{MANAGED_BY, MANAGER};
use crate::world::{Key, World};

/// The Sidecar's name.
const NAME: &str = "fenceline-view";
const RETRY: Duration = Duration::from_secs(2);

/// The Sidecar for the view of these services; nothing where there are none.
fn plan(services: &BTreeSet<Key>, world: &World, namespace: &str) -> Option<Sidecar> {
    if services.is_empty() {
        return None;
    }
    let hosts = services
        .iter()
        .map(|service| format!("{}/{}", service.namespace, world.fqdn(service)));
    let spec = SidecarSpec {
        workload_selector: Some(WorkloadSelector {
            labels: [(VIEW_LABEL.0.to_owned(), VIEW_LABEL.1.to_owned())].into(),
            ..WorkloadSelector::default()
        }),
        egress: vec![EgressListener {
            hosts: hosts.collect(),
            ..EgressListener::default()
        }],
        ..SidecarSpec::default()
    };
    let mut sidecar = Sidecar::new(NAME, spec);
    sidecar.metadata = ObjectMeta {
        name: Some(NAME.to_owned()),
        namespace: Some(namespace.to_owned()),
        labels: Some([(MANAGED_BY.to_owned(), MANAGER.to_owned())].into()),
        owner_references: world.definition.clone().map(|owner| vec![owner]),
        ..ObjectMeta::default()
    };
    Some(sidecar)
}

/// Keeps it current, and a stream to every istiod, for as long as it is polled.
pub(super) async fn run(context: &Context) {
    let mut world = context.world.clone();
    let key = Key::new(&*context.settings.operator.namespace, NAME);
    loop {
        let now = Arc::clone(&world.borrow_and_update());
        let services = all(&now);
        let have = now.sidecars.get(&key).map(AsRef::as_ref);
        let written = match (plan(&services, &now, &key.namespace), have) {
            (Some(want), have) => context
                .writer
                .ensure::<Sidecar>(&want, have)
                .await
                .map(drop),
            (None, Some(have)) => context.writer.remove(have).await,
            (None, None) => Ok(()),
        };
        if !services.is_empty() {
            let ports = services.iter().filter_map(|service| {
                let facts = now.services.get(service)?;
                let fqdn = now.fqdn(service);
                let ports = facts.http_ports.iter().chain(&facts.other_ports);
                // Of a Service with addresses, and of one without, or with a port of no declared protocol.
                let names =
                    ports.flat_map(move |port| [port.to_string(), format!("{fqdn}:{port}")]);
                Some(names.collect::<Vec<_>>())
            });
            context.istiods.watch_routes(&ports.flatten().collect());
            context.istiods.subscribers(&now);
        }
        if let Err(error) = written {
            tracing::warn!(error = crate::chain(&error), "the view of routed hosts");
            tokio::time::sleep(RETRY).await;
            continue;
        }
        let same = |then: &World, now: &World| {
            then.services.ptr_eq(&now.services)
                && then.sidecars.ptr_eq(&now.sidecars)
                && then.routers.ptr_eq(&now.routers)
                && then.traffic_patches.ptr_eq(&now.traffic_patches)
                && then.own_rules.ptr_eq(&now.own_rules)
                && then.own_routes.ptr_eq(&now.own_routes)
        };
        if world.wait_for(|then| !same(then, &now)).await.is_err() {
            return;
        }
    }
}
