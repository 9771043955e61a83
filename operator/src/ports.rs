//! The global proxy's Service lists every HTTP port of the mesh. Istio gives a proxy a listener for a port only if
//! something in its scope has that port as an HTTP one; through these, every fenced proxy has them all.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

use crate::apply::Writer;
use crate::fence::Settings;
use crate::world::World;

/// How long a change waits for company.
const COALESCE: Duration = Duration::from_millis(50);
const RETRY: Duration = Duration::from_secs(1);

/// The ports that the operator has to add: those of the mesh, but for the Service's own.
fn wanted(world: &World, settings: &Settings) -> BTreeSet<u16> {
    let mut ports = BTreeSet::new();
    for (_, facts) in world
        .services
        .iter()
        .filter(|(key, _)| **key != settings.global_proxy)
    {
        ports.extend(&facts.http_ports);
    }
    ports.remove(&settings.ask_port);
    ports.remove(&settings.forward_port);
    ports
}

/// Whether the Service has to be written: a port is missing, or one is there that we once wanted. At the start nobody
/// remembers; then any port by a name of ours counts as one that we wanted.
fn is_due(have: &BTreeSet<u16>, want: &BTreeSet<u16>, applied: Option<&BTreeSet<u16>>) -> bool {
    let stale = match applied {
        Some(applied) => applied != want,
        None => !have.is_subset(want),
    };
    stale || !want.is_subset(have)
}

/// Keeps the ports right for as long as it is polled: the leader's work.
pub async fn run(mut world: watch::Receiver<Arc<World>>, writer: Writer, settings: Settings) {
    let mut applied = None;
    let mut missing = false;
    loop {
        let now = Arc::clone(&world.borrow_and_update());
        let have = now.services.get(&settings.global_proxy).map(|have| {
            let mut ports = have.http_ports.clone();
            ports.remove(&settings.ask_port);
            ports.remove(&settings.forward_port);
            ports
        });
        if missing != have.is_none() {
            missing = have.is_none();
            let service = &settings.global_proxy;
            if missing {
                tracing::warn!(%service, "no such Service: first calls go nowhere until it exists");
            }
        }
        let want = wanted(&now, &settings);
        if have.is_some_and(|have| is_due(&have, &want, applied.as_ref())) {
            match writer
                .ensure_ports(&settings.global_proxy, &want, settings.forward_port)
                .await
            {
                Ok(()) => applied = Some(want),
                Err(error) => {
                    tracing::warn!(error = crate::chain(&error), "the global proxy's ports");
                    tokio::time::sleep(RETRY).await;
                    continue;
                }
            }
        }
        let other = |then: &Arc<World>| !then.services.ptr_eq(&now.services);
        if world.wait_for(other).await.is_err() {
            return;
        }
        tokio::time::sleep(COALESCE).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{service, settings, world};

    #[test]
    fn every_http_port_of_the_mesh_and_no_other() {
        let settings = settings();
        let mut mesh = world();
        service(
            &mut mesh,
            "shop",
            "cart",
            "{ports: [{port: 80, name: http}, {port: 81, name: grpc}]}",
        );
        service(
            &mut mesh,
            "shop",
            "db",
            "{ports: [{port: 5432, name: tcp}, {port: 82, name: x}]}",
        );
        service(
            &mut mesh,
            "fenceline-system",
            "global-proxy",
            "{ports: [{port: 15088, name: http-forward}, {port: 99, name: http-99}]}",
        );
        assert_eq!(wanted(&mesh, &settings), [80, 81].into());
    }

    #[test]
    fn a_port_of_somebody_elses_is_not_fought_over() {
        let (ours, theirs) = (BTreeSet::from([80]), BTreeSet::from([80, 99]));
        assert!(
            is_due(&theirs, &ours, None),
            "once, in case it was ours before a restart"
        );
        assert!(!is_due(&theirs, &ours, Some(&ours)));
        assert!(!is_due(&ours, &ours, None));
        assert!(
            is_due(&BTreeSet::new(), &ours, Some(&ours)),
            "somebody took it away"
        );
        assert!(is_due(&theirs, &ours, Some(&theirs)), "a Service went");
    }
}
