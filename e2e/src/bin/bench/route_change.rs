//! `bench route-change`: a service's traffic moves from one version to another under load, with Fenceline, and the naive way.

use std::time::{Duration, Instant};

use anyhow::Context;
use clap::Args;
use fenceline_e2e::install::OPERATOR;
use fenceline_e2e::routers::{REVIEWS, load};
use fenceline_e2e::traffic::Traffic;
use fenceline_e2e::wait::eventually;
use fenceline_e2e::{Lab, PATIENCE};
use serde_json::{Value, json};

#[derive(Args)]
pub(super) struct Flags {
    /// Requests each way, at least.
    #[arg(long, default_value_t = 10_000)]
    requests: usize,
    /// Changes each way.
    #[arg(long, default_value_t = 8)]
    changes: usize,
    /// Callers at the same time.
    #[arg(long, default_value_t = 12)]
    callers: usize,
}

pub(super) async fn run(lab: &mut Lab, flags: &Flags) -> anyhow::Result<Value> {
    lab.routed_mesh(&["v1", "v2"]).await?;
    lab.router(REVIEWS, &router("v1")).await?;
    lab.until_router(REVIEWS, "Stable").await?;
    lab.until_quiet(OPERATOR, Duration::from_secs(2)).await?;

    let (mut shifted, mut stable) = (Vec::new(), Vec::new());
    let written = lab.writes(OPERATOR).await?;
    let traffic = callers(lab, flags).await?;
    for change in 0..flags.changes {
        let version = ["v2", "v1"][change % 2];
        let started = Instant::now();
        lab.router(REVIEWS, &router(version)).await?;
        until_stage(lab, &["Draining", "RemovingSubsets", "Stable"]).await?;
        shifted.push(started.elapsed());
        until_stage(lab, &["Stable"]).await?;
        stable.push(started.elapsed());
        pace(&traffic, flags, change).await;
    }
    let ours = traffic.stop().await?;
    let written = lab.writes(OPERATOR).await? - written;
    println!(
        "{} requests, {} failed; {shifted:.1?} until shifted, {stable:.1?} until stable",
        ours.calls(),
        ours.failed.len()
    );
    for failure in ours.failed.iter().take(5) {
        println!("{failure:?}");
    }

    lab.kubectl(&["-n", "shop", "delete", "router", "reviews"])
        .await?;
    lab.until_unrouted("shop").await?;
    lab.apply(&naive("v1")).await?;
    tokio::time::sleep(Duration::from_secs(3)).await;
    let traffic = callers(lab, flags).await?;
    for change in 0..flags.changes {
        lab.apply(&naive(["v2", "v1"][change % 2])).await?;
        tokio::time::sleep(Duration::from_secs(3)).await;
        pace(&traffic, flags, change).await;
    }
    let theirs = traffic.stop().await?;
    println!(
        "both objects at once: {} requests, {} failed",
        theirs.calls(),
        theirs.failed.len()
    );
    #[expect(clippy::cast_precision_loss, reason = "small numbers")]
    let each = written / flags.changes as f64;
    let seconds = |times: &mut Vec<Duration>| {
        (super::numbers::percentile(times, 50).as_secs_f64() * 100.0).round() / 100.0
    };
    Ok(json!({
        "changes": flags.changes,
        "seconds": seconds(&mut stable),
        "seconds_shifted": seconds(&mut shifted),
        "requests": ours.calls(),
        "failed": ours.failed.len(),
        "writes_per_change": (each * 10.0).round() / 10.0,
        "naive_requests": theirs.calls(),
        "naive_failed": theirs.failed.len(),
    }))
}

fn router(version: &str) -> String {
    format!(
        "{{service: reviews, branches: [{{name: main, versions: {{{version}: 1}}}}], change: {{drain: 1s}}}}"
    )
}

/// What people write by hand.
fn naive(version: &str) -> String {
    format!(
        "{{apiVersion: networking.istio.io/v1, kind: DestinationRule, metadata: {{name: reviews, namespace: shop}}, \
         spec: {{host: reviews, subsets: [{{name: {version}, labels: {{version: {version}}}}}]}}}}\n---\n\
         {{apiVersion: networking.istio.io/v1, kind: VirtualService, metadata: {{name: reviews, namespace: shop}}, \
         spec: {{hosts: [reviews], http: [{{route: [{{destination: {{host: reviews, subset: {version}}}}}]}}]}}}}"
    )
}

async fn until_stage(lab: &Lab, stages: &[&str]) -> anyhow::Result<()> {
    eventually(PATIENCE * 2, "the change goes on", async || {
        let router = lab.get_router(REVIEWS).await?;
        let status = router.status.context("no status")?;
        let newest = status.observed_generation == router.metadata.generation;
        let stage = status.stage.unwrap_or_default();
        anyhow::ensure!(newest && stages.contains(&stage.as_str()), "{stage}");
        Ok(())
    })
    .await
}

/// Waits until the change's share of the requests was made.
async fn pace(traffic: &Traffic, flags: &Flags, change: usize) {
    let due = flags.requests * (change + 1) / flags.changes;
    while traffic.tally().calls() < due {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

async fn callers(lab: &Lab, flags: &Flags) -> anyhow::Result<Traffic> {
    let targets = lab.reviews().await?;
    load(lab, targets, flags.callers, Duration::from_millis(5))
}
