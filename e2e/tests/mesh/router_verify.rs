//! The ways in which it is known that a step of a change has arrived: none costs a request.

use std::time::Duration;

use anyhow::Context;
use fenceline_e2e::lab::MESH_CONFIG;
use fenceline_e2e::routers::{REVIEWS, load, none_failed};
use fenceline_e2e::traffic::Traffic;
use fenceline_e2e::wait::eventually;
use fenceline_e2e::{Lab, PATIENCE, PodSpec, Signal};

fn only(version: &str, verify: &str) -> String {
    format!(
        "{{service: reviews, branches: [{{name: main, versions: {{{version}: 1}}}}], \
         change: {{verify: {verify}, drain: 1s, delay: 3s}}}}"
    )
}

/// Moves all requests from one version to the other and back, and says how long that took.
async fn there_and_back(lab: &Lab, traffic: &Traffic, verify: &str) -> anyhow::Result<()> {
    for version in ["v2", "v1", "v2", "v1"] {
        let began = traffic.elapsed();
        lab.router(REVIEWS, &only(version, verify)).await?;
        lab.until_router(REVIEWS, "Stable").await?;
        println!(
            "{verify}: {version} after {:.1?}",
            traffic.elapsed() - began
        );
    }
    Ok(())
}

#[test]
fn by_what_istiod_has_sent_and_by_waiting() {
    fenceline_e2e::test(async |lab| {
        lab.routed_mesh(&["v1", "v2"]).await?;
        lab.router(REVIEWS, &only("v1", "Proxies")).await?;
        lab.until_router(REVIEWS, "Stable").await?;
        let traffic = load(lab, lab.reviews().await?, 12, Duration::from_millis(5))?;
        for verify in ["ControlPlane", "Delay"] {
            there_and_back(lab, &traffic, verify).await?;
            println!("{verify}: {} failed", traffic.tally().failed.len());
        }
        none_failed(&traffic.stop().await?)
    });
}

#[test]
fn by_waiting_where_istiod_does_not_say_what_its_proxies_have() {
    fenceline_e2e::test(async |lab| {
        lab.control_plane.debug_allowed = String::new();
        let istiod = lab.control_plane.istiod.as_mut().context("istiod")?;
        istiod.kill().await?;
        lab.control_plane.start_istiod(MESH_CONFIG).await?;
        lab.routed_mesh(&["v1", "v2"]).await?;
        lab.router(REVIEWS, &only("v1", "Proxies")).await?;
        lab.until_router(REVIEWS, "Stable").await?;
        let traffic = load(lab, lab.reviews().await?, 12, Duration::from_millis(5))?;
        lab.router(REVIEWS, &only("v2", "Proxies")).await?;
        let said = eventually(PATIENCE, "status says why", async || {
            let status = lab.get_router(REVIEWS).await?.status.context("a status")?;
            let said = status.conditions.iter().find(|said| said.type_ == "Ready");
            let said = said.context("Ready")?.message.clone();
            anyhow::ensure!(said.contains("proxies cannot be asked"), "{said}");
            Ok(said)
        })
        .await?;
        println!("{said}");
        anyhow::ensure!(
            said.contains("DEBUG_ENDPOINT_AUTH_ALLOWED_NAMESPACES=fenceline-system"),
            "{said}"
        );
        lab.until_router(REVIEWS, "Stable").await?;
        there_and_back(lab, &traffic, "Proxies").await?;
        none_failed(&traffic.stop().await?)
    });
}

/// One that lost its istiod gets everything at once from the next, and would have routes before the clusters are ready.
#[test]
fn a_proxy_that_is_connected_to_no_istiod_is_waited_for() {
    fenceline_e2e::test(async |lab| {
        lab.routed_mesh(&["v1", "v2"]).await?;
        lab.router(REVIEWS, &only("v1", "Proxies")).await?;
        lab.until_router(REVIEWS, "Stable").await?;
        let traffic = load(lab, lab.reviews().await?, 12, Duration::from_millis(5))?;
        let second = lab.control_plane.second_istiod.as_mut();
        second.context("a second istiod")?.kill().await?;
        let gone = [
            "-n",
            "istio-system",
            "delete",
            "pod",
            "istiod-1",
            "--force",
            "--grace-period=0",
        ];
        lab.kubectl(&gone).await?;
        lab.router(REVIEWS, &only("v2", "Proxies")).await?;
        lab.never_routed_to("v2", Duration::from_secs(5)).await?;
        let status = lab.get_router(REVIEWS).await?.status.context("a status")?;
        let said = status.conditions.iter().find(|said| said.type_ == "Ready");
        let said = &said.context("Ready")?.message;
        println!("{said}");
        anyhow::ensure!(
            said.contains("connected to no istiod: shop/client-b"),
            "{said}"
        );
        lab.start_second_istiod().await?;
        lab.until_router(REVIEWS, "Stable").await?;
        none_failed(&traffic.stop().await?)
    });
}

/// One that never answers has no say over somebody else's service.
#[test]
fn a_silent_proxy_of_another_namespace_has_no_veto() {
    fenceline_e2e::test(async |lab| {
        lab.routed_mesh(&["v1", "v2"]).await?;
        lab.namespace("evil").await?;
        lab.pod(PodSpec::new("evil", "silent")).await?;
        let spec = |version: &str| {
            format!(
                "{{service: reviews, branches: [{{name: main, versions: {{{version}: 1}}}}], change: {{others: 5s, drain: 1s}}}}"
            )
        };
        lab.router(REVIEWS, &spec("v1")).await?;
        lab.until_router(REVIEWS, "Stable").await?;
        let traffic = load(lab, lab.reviews().await?, 8, Duration::from_millis(10))?;
        lab.running("evil", "silent")?.signal_envoy(Signal::STOP)?;
        for version in ["v2", "v1"] {
            let began = traffic.elapsed();
            lab.router(REVIEWS, &spec(version)).await?;
            let said = lab.until_router(REVIEWS, "Stable").await?;
            println!("{version} after {:.1?}: {said}", traffic.elapsed() - began);
            anyhow::ensure!(said.contains("evil/silent (does not answer)"), "{said}");
            let subsets = [
                "-n",
                "shop",
                "get",
                "destinationrule",
                "fenceline-reviews",
                "-o",
                "jsonpath={.spec.subsets[*].name}",
            ];
            let subsets = lab.kubectl(&subsets).await?;
            anyhow::ensure!(
                ["main--v1", "main--v2"]
                    .iter()
                    .all(|subset| subsets.contains(subset)),
                "skipped proxies lead to a subset that is gone: {subsets}"
            );
        }
        lab.running("evil", "silent")?.signal_envoy(Signal::CONT)?;
        eventually(PATIENCE * 2, "nobody is skipped any more", async || {
            let said = lab.until_router(REVIEWS, "Stable").await?;
            anyhow::ensure!(!said.contains("evil/"), "{said}");
            let subsets = [
                "-n",
                "shop",
                "get",
                "destinationrule",
                "fenceline-reviews",
                "-o",
                "jsonpath={.spec.subsets[*].name}",
            ];
            let subsets = lab.kubectl(&subsets).await?;
            anyhow::ensure!(!subsets.contains("main--v2"), "{subsets}");
            Ok(())
        })
        .await?;
        none_failed(&traffic.stop().await?)
    });
}
