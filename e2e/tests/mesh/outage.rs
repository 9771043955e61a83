//! Losing parts of the system, and getting them back.

use std::time::Duration;

use fenceline_crds::istio::{EnvoyFilter, Sidecar};
use fenceline_e2e::app::Protocol;
use fenceline_e2e::install::{GLOBAL_PROXY, OPERATOR, SYSTEM};
use fenceline_e2e::lab::MESH_CONFIG;
use fenceline_e2e::pods::request;
use fenceline_e2e::wait::throughout;
use fenceline_e2e::{Lab, PATIENCE, Signal, wait::eventually};
use kube::api::ListParams;
use kube::{Api, ResourceExt};

const CLIENT: (&str, &str) = ("shop", "client");
const REVIEWS: &str = "shop/reviews.shop.svc.cluster.local";
const RATINGS: &str = "shop/ratings.shop.svc.cluster.local";

/// A fenced client with nothing learnt, and two services that it could call.
async fn shop(lab: &mut Lab) -> anyhow::Result<()> {
    lab.install().await?;
    lab.namespace("shop").await?;
    lab.workload(CLIENT, &[80]).await?;
    lab.workload(("shop", "reviews"), &[9080]).await?;
    lab.workload(("shop", "ratings"), &[9080]).await?;
    lab.fence(CLIENT, "{}").await?;
    lab.until_forgotten(CLIENT, "reviews.shop.svc.cluster.local")
        .await?;
    lab.until_forgotten(CLIENT, "ratings.shop.svc.cluster.local")
        .await
}

async fn versions(lab: &Lab) -> anyhow::Result<Vec<String>> {
    let all = ListParams::default();
    let sidecars: Api<Sidecar> = Api::all(lab.client.clone());
    let filters: Api<EnvoyFilter> = Api::all(lab.client.clone());
    let fence = lab.get_fence(CLIENT).await?;
    let mut versions = vec![format!("{:?}", fence.resource_version())];
    versions.extend(
        sidecars
            .list(&all)
            .await?
            .iter()
            .map(|o| format!("{:?}", o.resource_version())),
    );
    versions.extend(
        filters
            .list(&all)
            .await?
            .iter()
            .map(|o| format!("{:?}", o.resource_version())),
    );
    Ok(versions)
}

#[test]
fn a_killed_operator_forgets_nothing_and_writes_nothing() {
    fenceline_e2e::test(async |lab| {
        shop(lab).await?;
        lab.held_call(CLIENT, Protocol::Http1, "reviews:9080")
            .await?;
        lab.until_in_scope(CLIENT, REVIEWS).await?;
        lab.until_quiet(OPERATOR, Duration::from_secs(1)).await?;
        let before = versions(lab).await?;

        lab.running_mut(SYSTEM, OPERATOR)?.app()?.kill().await?;
        // Without an operator first calls still work.
        lab.forwarded_call(CLIENT, Protocol::Http1, "ratings:9080")
            .await?;
        lab.until_direct(CLIENT, Protocol::Http1, "reviews:9080")
            .await?;
        lab.running_mut(SYSTEM, OPERATOR)?.start_app()?;
        lab.operator_ready(OPERATOR).await?;
        eventually(PATIENCE, "it acts again", async || {
            let leads = lab.metric(OPERATOR, "fenceline_leader", "").await?;
            anyhow::ensure!(leads > 0.5);
            Ok(())
        })
        .await?;
        throughout(Duration::from_secs(3), "nothing is written", async || {
            let writes = lab.writes(OPERATOR).await?;
            anyhow::ensure!(writes < 0.5, "{writes} writes after the restart");
            anyhow::ensure!(versions(lab).await? == before, "an object changed");
            Ok(())
        })
        .await?;
        // And it still learns.
        lab.held_call(CLIENT, Protocol::Http1, "ratings:9080")
            .await?;
        lab.until_in_scope(CLIENT, RATINGS).await
    });
}

#[test]
fn an_operator_that_is_asked_to_end_gives_its_lease_back() {
    fenceline_e2e::test(async |lab| {
        shop(lab).await?;
        lab.start_operator("fenceline-1").await?;
        let operator = lab.running_mut(SYSTEM, OPERATOR)?;
        let ended = operator.app()?.stop(Duration::from_secs(10)).await?;
        anyhow::ensure!(ended, "it did not end by itself");
        let patience = Duration::from_secs(5);
        eventually(
            patience,
            "the other replica acts, before the lease runs out",
            async || {
                let leads = lab.metric("fenceline-1", "fenceline_leader", "").await?;
                anyhow::ensure!(leads > 0.5);
                Ok(())
            },
        )
        .await
    });
}

#[test]
fn a_replica_that_does_not_lead_learns_too() {
    fenceline_e2e::test(async |lab| {
        shop(lab).await?;
        lab.start_operator("fenceline-1").await?;
        // The leader's node is gone, and its lease still runs.
        lab.running_mut(SYSTEM, OPERATOR)?.app()?.kill().await?;
        lab.delete_pod(SYSTEM, OPERATOR).await?;
        let learnt = async |lab: &Lab| -> anyhow::Result<bool> {
            let status = lab.get_fence(CLIENT).await?.status.unwrap_or_default();
            Ok(status
                .dependencies
                .iter()
                .any(|one| one.host == "reviews.shop.svc.cluster.local"))
        };
        eventually(
            Duration::from_secs(10),
            "the follower stores what it saw",
            async || {
                // Nobody writes the Sidecar, so it cannot be held.
                lab.forwarded_call(CLIENT, Protocol::Http1, "reviews:9080")
                    .await?;
                tokio::time::sleep(Duration::from_millis(200)).await;
                anyhow::ensure!(learnt(lab).await?);
                Ok(())
            },
        )
        .await?;
        let leads = lab.metric("fenceline-1", "fenceline_leader", "").await?;
        anyhow::ensure!(leads < 0.5, "it leads already: nothing is shown");
        lab.until_in_scope(CLIENT, REVIEWS).await?;
        lab.until_direct(CLIENT, Protocol::Http1, "reviews:9080")
            .await
            .map(drop)
    });
}

#[test]
fn kube_apiserver_away_and_back() {
    fenceline_e2e::test(async |lab| {
        shop(lab).await?;
        let reviews = lab.resolve("shop", "reviews", 9080).await?;
        lab.control_plane.apiserver.kill().await?;
        eventually(
            PATIENCE,
            "the operator says that it is not ready",
            async || {
                let ready = lab.operator_get(OPERATOR, "/readyz").await?;
                anyhow::ensure!(
                    ready.0 == 503 && ready.1.contains("kube-apiserver"),
                    "{ready:?}"
                );
                anyhow::ensure!(lab.operator_get(OPERATOR, "/livez").await?.0 == 200);
                Ok(())
            },
        )
        .await?;
        // Seen while it cannot be stored.
        let call = request(Protocol::Http1, "reviews:9080", reviews);
        lab.call(CLIENT, &call).await?.report()?;
        lab.control_plane.restart_apiserver()?;
        lab.operator_ready(OPERATOR).await?;
        lab.until_in_scope(CLIENT, REVIEWS).await?;
        lab.held_call(CLIENT, Protocol::Http1, "ratings:9080")
            .await?;
        lab.until_in_scope(CLIENT, RATINGS).await
    });
}

#[test]
fn a_watch_that_is_too_old_starts_again() {
    fenceline_e2e::test(async |lab| {
        lab.install().await?;
        lab.namespace("shop").await?;
        for name in ["cart", "desk"] {
            lab.service("shop", name, &["http:80"]).await?;
            lab.fence(("shop", name), "{}").await?;
            lab.until_reason(("shop", name), "Enforced").await?;
        }
        lab.running_mut(SYSTEM, OPERATOR)?
            .app()?
            .signal(Signal::STOP)?;
        lab.kubectl(&["-n", "shop", "delete", "service", "cart"])
            .await?;
        lab.service("shop", "lamp", &["http:80"]).await?;
        lab.control_plane.compact().await?;
        // Without its cache of old versions kube-apiserver can only say 410 Gone.
        lab.control_plane.apiserver.kill().await?;
        lab.control_plane.restart_apiserver()?;
        eventually(PATIENCE, "kube-apiserver is back", async || {
            lab.client.apiserver_version().await?;
            Ok(())
        })
        .await?;
        lab.running_mut(SYSTEM, OPERATOR)?
            .app()?
            .signal(Signal::CONT)?;
        lab.until_reason(("shop", "cart"), "ServiceNotFound")
            .await?;
        lab.fence(("shop", "lamp"), "{}").await?;
        lab.until_reason(("shop", "lamp"), "Enforced").await?;
        lab.until_reason(("shop", "desk"), "Enforced")
            .await
            .map(drop)
    });
}

#[test]
fn istiod_away_and_back() {
    fenceline_e2e::test(async |lab| {
        shop(lab).await?;
        let istiod = lab.control_plane.istiod.as_mut();
        istiod.expect("istiod runs").kill().await?;
        // Calls work and are learnt; only the proxies do not hear of it yet, so they are held in vain.
        lab.forwarded_call(CLIENT, Protocol::Http1, "reviews:9080")
            .await?;
        lab.until_in_scope(CLIENT, REVIEWS).await?;
        lab.forwarded_call(CLIENT, Protocol::Http1, "reviews:9080")
            .await?;
        lab.control_plane.start_istiod(MESH_CONFIG).await?;
        lab.until_direct(CLIENT, Protocol::Http1, "reviews:9080")
            .await?;
        // The step that waited for istiod is seen to arrive within a quarter of a second, and then another may be taken.
        tokio::time::sleep(Duration::from_millis(500)).await;
        lab.held_call(CLIENT, Protocol::Http1, "ratings:9080")
            .await?;
        lab.until_direct(CLIENT, Protocol::Http1, "ratings:9080")
            .await
            .map(drop)
    });
}

#[test]
fn the_global_proxy_killed_gone_and_back() {
    fenceline_e2e::test(async |lab| {
        shop(lab).await?;
        lab.start_global_proxy("global-proxy-1").await?;
        eventually(PATIENCE, "the client knows both", async || {
            let clusters = lab.running("shop", "client")?.envoy("/clusters").await?;
            let ip = lab.running(SYSTEM, "global-proxy-1")?.ip;
            anyhow::ensure!(clusters.contains(&format!("::{ip}:15080::cx_total")));
            Ok(())
        })
        .await?;
        // One of two dies without a word: its callers ask the other.
        lab.running_mut(SYSTEM, GLOBAL_PROXY)?
            .kill_sidecar()
            .await?;
        // Each name is a first call again, and half of them would go to the one that is gone.
        let reviews = (lab.running("shop", "reviews")?.ip, 9080).into();
        for number in 0..6 {
            let call = request(Protocol::Http1, &format!("nobody-{number}:9080"), reviews);
            let report = lab.call(CLIENT, &call).await?.report()?;
            anyhow::ensure!(report.pod == "reviews", "{report:?}");
        }
        lab.held_call(CLIENT, Protocol::Http1, "reviews:9080")
            .await?;
        lab.delete_pod(SYSTEM, GLOBAL_PROXY).await?;

        // None is left: calls in scope go on, first calls fail, and everything says so.
        lab.delete_pod(SYSTEM, "global-proxy-1").await?;
        let gone = lab.until_reason(CLIENT, "GlobalProxyGone").await?;
        anyhow::ensure!(gone.contains("no ready endpoints"), "{gone}");
        let metric = "fenceline_global_proxy_endpoints";
        anyhow::ensure!(lab.metric(OPERATOR, metric, "").await? < 0.5);
        let outcome = lab.get(CLIENT, Protocol::Http1, "ratings:9080").await?;
        anyhow::ensure!(outcome.status == 503, "{outcome:?}");
        lab.held_call(CLIENT, Protocol::Http1, "reviews:9080")
            .await?;
        let events = ["get", "events", "-n", SYSTEM, "-o", "wide"];
        let events = lab.kubectl(&events).await?;
        anyhow::ensure!(events.contains("GlobalProxyGone"), "{events}");

        lab.start_global_proxy(GLOBAL_PROXY).await?;
        lab.until_reason(CLIENT, "Enforced").await?;
        eventually(PATIENCE, "first calls are held again", async || {
            lab.held_call(CLIENT, Protocol::Http1, "ratings:9080")
                .await
                .map(drop)
        })
        .await
    });
}
