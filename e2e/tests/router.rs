//! Routers under load, with two istiods and real proxies.

use std::time::Duration;

use fenceline_e2e::app::Protocol;
use fenceline_e2e::fences::Name;
use fenceline_e2e::traffic::{Tally, Target, Traffic};
use fenceline_e2e::wait::eventually;
use fenceline_e2e::{Lab, PATIENCE, PodSpec};

const REVIEWS: Name<'_> = ("shop", "reviews");
const CLIENTS: [&str; 2] = ["client-a", "client-b"];

/// A service with a version, called from proxies of both istiods.
async fn mesh(lab: &mut Lab) -> anyhow::Result<Vec<Target>> {
    lab.start_second_istiod().await?;
    lab.install().await?;
    lab.namespace("shop").await?;
    lab.service("shop", "reviews", &["http:80", "grpc:90"])
        .await?;
    lab.version(REVIEWS, "v1", &[]).await?;
    for (client, second) in CLIENTS.into_iter().zip([false, true]) {
        let mut spec = PodSpec::new("shop", client);
        spec.second_istiod = second;
        lab.pod(spec).await?;
    }
    let mut targets = Vec::new();
    for (protocol, port) in [
        (Protocol::Http1, 80),
        (Protocol::Http2, 80),
        (Protocol::Grpc, 90),
    ] {
        let mut target = Target::of(lab, REVIEWS, "", protocol, port).await?;
        target.answered_by = None;
        targets.push(target);
    }
    Ok(targets)
}

/// Eight callers, each of which calls one way after the other.
fn load(lab: &Lab, targets: Vec<Target>) -> anyhow::Result<Traffic> {
    let pods: Vec<Name<'_>> = CLIENTS
        .into_iter()
        .cycle()
        .take(8)
        .map(|name| ("shop", name))
        .collect();
    let choice = |pod: usize, round: u64, targets: usize| {
        (pod + usize::try_from(round).unwrap_or_default()) % targets
    };
    Traffic::start(lab, &pods, targets, Duration::from_millis(10), choice)
}

fn assert_none_failed(tally: &Tally) -> anyhow::Result<()> {
    println!(
        "{} calls, answered by {:?}, {} failed",
        tally.calls(),
        tally.answered,
        tally.failed.len()
    );
    for failure in tally.failed.iter().take(10) {
        println!("{failure:?}");
    }
    anyhow::ensure!(
        tally.failed.is_empty(),
        "{} calls failed",
        tally.failed.len()
    );
    anyhow::ensure!(tally.calls() > 100, "too few calls");
    Ok(())
}

fn versions(versions: &str) -> String {
    format!(
        "{{service: reviews, branches: [{{name: main, versions: {versions}}}], change: {{drain: 2s}}}}"
    )
}

#[test]
fn a_version_comes_and_another_goes_without_a_failed_request() {
    fenceline_e2e::test(async |lab| {
        let targets = mesh(lab).await?;
        let traffic = load(lab, targets)?;
        lab.router(REVIEWS, &versions("{v1: 1}")).await?;
        lab.until_router(REVIEWS, "Stable").await?;
        lab.version(REVIEWS, "v2", &[]).await?;
        for weights in ["{v1: 99, v2: 1}", "{v1: 1, v2: 1}", "{v2: 1}"] {
            lab.router(REVIEWS, &versions(weights)).await?;
            lab.until_router(REVIEWS, "Stable").await?;
            println!("{:.1?}: {weights}", traffic.elapsed());
        }
        let before = traffic.tally();
        tokio::time::sleep(Duration::from_secs(2)).await;
        let after = traffic.tally();
        let of = |tally: &Tally, pod: &str| tally.answered.get(pod).copied().unwrap_or_default();
        anyhow::ensure!(
            of(&before, "reviews-v1") == of(&after, "reviews-v1"),
            "v1 is still called"
        );
        anyhow::ensure!(of(&after, "reviews-v2") > of(&before, "reviews-v2"));
        lab.kubectl(&["-n", "shop", "delete", "router", "reviews"])
            .await?;
        eventually(PATIENCE * 2, "nothing is left", async || {
            let left = lab
                .kubectl(&[
                    "-n",
                    "shop",
                    "get",
                    "virtualservices,destinationrules",
                    "-o",
                    "name",
                ])
                .await?;
            anyhow::ensure!(left.trim().is_empty(), "{left}");
            Ok(())
        })
        .await?;
        assert_none_failed(&traffic.stop().await?)
    });
}
