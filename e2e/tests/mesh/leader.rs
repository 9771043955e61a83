//! Two operators: both learn, one acts, and either may die.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};

use fenceline_crds::istio::Sidecar;
use fenceline_e2e::app::Protocol;
use fenceline_e2e::install::{OPERATOR, SYSTEM};
use fenceline_e2e::pods::request;
use fenceline_e2e::wait::eventually;
use fenceline_e2e::{PATIENCE, PodSpec};
use futures::StreamExt;
use kube::Api;
use kube::runtime::{WatchStreamExt, watcher};

const CLIENT: (&str, &str) = ("shop", "client");
const SECOND: &str = "fenceline-1";
const HOSTS: usize = 50;

#[test]
fn the_leader_dies_while_fifty_dependencies_are_learnt() {
    fenceline_e2e::test(async |lab| {
        lab.install().await?;
        lab.start_operator(SECOND).await?;
        lab.namespace("shop").await?;
        lab.workload(CLIENT, &[80]).await?;
        lab.pod(PodSpec::new("shop", "server").http(80)).await?;
        let names = (0..HOSTS).map(|number| format!("s{number}"));
        lab.services_of(("shop", "server"), names).await?;
        lab.until_direct(CLIENT, Protocol::Http1, &format!("s{}:80", HOSTS - 1))
            .await?;
        lab.fence(CLIENT, "{firstCall: {policy: Forward}}").await?;
        lab.until_forgotten(CLIENT, "s0.shop.svc.cluster.local")
            .await?;

        // Every version of the Sidecar there is.
        let seen: Arc<Mutex<Vec<BTreeSet<String>>>> = Arc::default();
        let sidecars: Api<Sidecar> = Api::namespaced(lab.client.clone(), "shop");
        let record = Arc::clone(&seen);
        tokio::spawn(async move {
            let mut versions = watcher(sidecars, watcher::Config::default())
                .applied_objects()
                .boxed();
            while let Some(Ok(sidecar)) = versions.next().await {
                let routed = sidecar.spec.egress.iter();
                let routed = routed.filter(|listener| !listener.other.contains_key("port"));
                let hosts = routed.flat_map(|listener| listener.hosts.clone()).collect();
                if let Ok(mut seen) = record.lock() {
                    seen.push(hosts);
                }
            }
        });

        let leads = lab.metric(OPERATOR, "fenceline_leader", "").await? > 0.5;
        let leader = if leads { OPERATOR } else { SECOND };
        for number in 0..HOSTS {
            if number == HOSTS / 2 {
                lab.running_mut(SYSTEM, leader)?.app()?.kill().await?;
            }
            let authority = format!("s{number}:80");
            let to = lab.resolve("shop", &format!("s{number}"), 80).await?;
            let outcome = lab
                .call(CLIENT, &request(Protocol::Http1, &authority, to))
                .await?;
            anyhow::ensure!(outcome.status == 200, "{authority}: {outcome:?}");
        }
        let missing = async || {
            let scope = lab.scope(CLIENT).await?;
            let missing = (0..HOSTS).filter(|number| {
                !scope.contains(&format!("shop/s{number}.shop.svc.cluster.local"))
            });
            anyhow::Ok(missing.collect::<Vec<usize>>())
        };
        // What the dead one was told in its last moment was not stored yet, and what it was asked then was forwarded with
        // nobody to learn it; each is a first call once more. Nothing else is.
        let around = HOSTS / 2 - 4..HOSTS / 2 + 5;
        let unseen = |missing: &[usize]| missing.iter().all(|number| around.contains(number));
        eventually(PATIENCE * 2, "all that was seen is in scope", async || {
            let missing = missing().await?;
            anyhow::ensure!(unseen(&missing), "{missing:?}");
            Ok(())
        })
        .await?;
        for number in missing().await? {
            println!("s{number} was called at the moment of the death");
            lab.until_direct(CLIENT, Protocol::Http1, &format!("s{number}:80"))
                .await?;
        }
        eventually(PATIENCE, "all are in scope", async || {
            let missing = missing().await?;
            anyhow::ensure!(missing.is_empty(), "{missing:?}");
            Ok(())
        })
        .await?;
        let seen = seen
            .lock()
            .map_err(|_| anyhow::anyhow!("the recorder died"))?;
        println!("{} versions of the Sidecar", seen.len());
        for pair in seen.windows(2) {
            anyhow::ensure!(pair[0].is_subset(&pair[1]), "taken back: {pair:?}");
        }
        Ok(())
    });
}
