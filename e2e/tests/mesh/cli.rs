//! What people ask the command line.

use std::process::Stdio;
use std::time::Duration;

use anyhow::Context as _;
use fenceline_e2e::app::Protocol;
use fenceline_e2e::routers::{REVIEWS, load, none_failed};
use fenceline_e2e::traffic::{Tally, Traffic};
use fenceline_e2e::wait::eventually;
use fenceline_e2e::{Lab, PATIENCE, PodSpec};
use tokio::io::AsyncWriteExt as _;
use tokio::process::Command;

const CLIENT: (&str, &str) = ("shop", "client");

/// Runs `fenceline` as a person would, who may do everything; gives what it prints, on both outputs.
async fn fenceline(lab: &Lab, args: &[&str], input: &str) -> anyhow::Result<(String, String)> {
    let mut child = Command::new(&lab.tools.fenceline)
        .args(args)
        .env("KUBECONFIG", &lab.control_plane.kubeconfig)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let mut stdin = child.stdin.take().context("a standard input")?;
    stdin.write_all(input.as_bytes()).await?;
    drop(stdin);
    let output = child.wait_with_output().await?;
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).context("text");
    Ok((text(output.stdout)?, text(output.stderr)?))
}

#[test]
fn why_a_workload_is_fenced_as_it_is() {
    fenceline_e2e::test(async |lab| {
        lab.install().await?;
        lab.namespace("shop").await?;
        lab.workload(CLIENT, &[80]).await?;
        lab.workload(("shop", "reviews"), &[9080]).await?;
        lab.pod(PodSpec::new("shop", "plain").without_sidecar())
            .await?;
        lab.fence(CLIENT, "{}").await?;
        lab.until_forgotten(CLIENT, "reviews.shop.svc.cluster.local")
            .await?;
        let (text, _) = fenceline(lab, &["explain", "client", "reviews", "-n", "shop"], "").await?;
        println!("{text}");
        anyhow::ensure!(
            text.contains("not in the scope") && text.contains("is held until"),
            "{text}"
        );
        lab.held_call(CLIENT, Protocol::Http1, "reviews:9080")
            .await?;
        let (text, _) = fenceline(lab, &["explain", "client", "-n", "shop"], "").await?;
        println!("{text}");
        anyhow::ensure!(
            text.contains("called: GlobalProxy") && text.contains("Enforced"),
            "{text}"
        );
        let (_, error) = fenceline(lab, &["explain", "reviews", "-n", "shop"], "").await?;
        anyhow::ensure!(error.contains("no ServiceFence in shop"), "{error}");

        // Two fences for the same pods, and one for pods that have no sidecar.
        lab.fence(("shop", "zweiter"), "{workload: {service: client}}")
            .await?;
        let said = lab.until_reason(("shop", "zweiter"), "Overlapped").await?;
        anyhow::ensure!(said.contains("ServiceFence client"), "{said}");
        lab.fence(
            ("shop", "plain"),
            "{workload: {selector: {matchLabels: {app: plain}}}}",
        )
        .await?;
        let said = lab.until_reason(("shop", "plain"), "NotInMesh").await?;
        anyhow::ensure!(said.contains("1 of its 1 pods have no sidecar"), "{said}");
        Ok(())
    });
}

#[test]
fn what_slime_had_is_accepted_here() {
    const SLIME: &str = "{apiVersion: microservice.slime.io/v1alpha1, kind: ServiceFence, metadata: {name: client, namespace: shop}, \
        spec: {enable: true, host: {'other/*': {}, reviews.shop.svc.cluster.local: {stable: {}}}, workloadSelector: {fromService: true}}}\n---\n\
        {apiVersion: config.netease.com/v1alpha1, kind: SlimeBoot, metadata: {name: lazyload, namespace: mesh-operator}, \
        spec: {module: [{name: lazyload, kind: lazyload, general: {autoFence: true, defaultFence: true, \
        stableHost: [istio-telemetry/*, agent.ops.svc.cluster.local], blackNamespaceList: 'a,b'}}]}}";
    fenceline_e2e::test(async |lab| {
        lab.install().await?;
        lab.namespace("shop").await?;
        lab.workload(CLIENT, &[80]).await?;
        lab.workload(("shop", "reviews"), &[9080]).await?;
        let (yaml, report) = fenceline(lab, &["migrate", "-"], SLIME).await?;
        println!("{yaml}\n{report}");
        anyhow::ensure!(
            report.contains("spec.enable: became spec.mode: Enforce"),
            "{report}"
        );
        lab.apply(&yaml).await?;
        lab.until_reason(CLIENT, "Enforced").await?;
        lab.until_in_scope(CLIENT, "shop/reviews.shop.svc.cluster.local")
            .await?;
        lab.until_reason(("shop", "reviews"), "Enforced")
            .await
            .map(drop)
    });
}

/// What somebody wrote by hand.
const BY_HAND: &str = "{apiVersion: networking.istio.io/v1, kind: VirtualService, metadata: {name: by-hand, namespace: shop}, \
      spec: {hosts: [reviews], http: [{timeout: 9s, route: [\
      {destination: {host: reviews, subset: stable}, weight: 80}, {destination: {host: reviews, subset: canary}, weight: 20}]}]}}\n---\n\
    {apiVersion: networking.istio.io/v1, kind: DestinationRule, metadata: {name: by-hand, namespace: shop}, \
      spec: {host: reviews, trafficPolicy: {connectionPool: {http: {maxRequestsPerConnection: 1000}}}, \
      subsets: [{name: stable, labels: {version: v1}}, {name: canary, labels: {version: v2}}]}}";

/// The share of all calls since `before` that a pod answered.
fn share(before: &Tally, after: &Tally, pod: &str) -> f64 {
    let of = |tally: &Tally| tally.answered.get(pod).copied().unwrap_or_default();
    #[expect(clippy::cast_precision_loss, reason = "small numbers")]
    let share = (of(after) - of(before)) as f64 / (after.calls() - before.calls()) as f64;
    share
}

/// Lets so many calls be made; gives the share of `reviews-v1` among them.
async fn shared(traffic: &Traffic, calls: usize) -> anyhow::Result<f64> {
    let before = traffic.tally();
    eventually(PATIENCE * 4, "enough calls", async || {
        anyhow::ensure!(traffic.tally().calls() >= before.calls() + calls);
        Ok(())
    })
    .await?;
    Ok(share(&before, &traffic.tally(), "reviews-v1"))
}

#[test]
fn what_people_wrote_becomes_a_router_under_load() {
    fenceline_e2e::test(async |lab| {
        lab.routed_mesh(&["v1", "v2"]).await?;
        lab.apply(BY_HAND).await?;
        // Applied so, they cost calls of their own.
        tokio::time::sleep(Duration::from_secs(3)).await;
        let traffic = load(lab, lab.reviews().await?, 12, Duration::from_millis(5))?;
        println!("by hand: v1 has {:.3}", shared(&traffic, 3000).await?);
        let kinds = "virtualservice,destinationrule";
        let theirs = ["-n", "shop", "get", kinds, "by-hand", "-o", "yaml"];
        let theirs = lab.kubectl(&theirs).await?;
        let (yaml, report) = fenceline(lab, &["adopt", "-"], &theirs).await?;
        println!("{yaml}\n{report}");
        lab.apply(&yaml).await?;
        let said = lab.until_router(REVIEWS, "Conflicted").await?;
        anyhow::ensure!(
            said.contains("VirtualService shop/by-hand")
                && said.contains("DestinationRule shop/by-hand"),
            "{said}"
        );
        // The routes first: their subsets stay for as long as a proxy may have them.
        let between = traffic.tally();
        let began = traffic.elapsed();
        lab.kubectl(&["-n", "shop", "delete", "virtualservice", "by-hand"])
            .await?;
        tokio::time::sleep(Duration::from_secs(2)).await;
        lab.kubectl(&["-n", "shop", "delete", "destinationrule", "by-hand"])
            .await?;
        lab.until_router(REVIEWS, "Stable").await?;
        println!(
            "handed over in {:.1?}, v1 had {:.3} meanwhile",
            traffic.elapsed() - began,
            share(&between, &traffic.tally(), "reviews-v1")
        );
        let ours = shared(&traffic, 10_000).await?;
        println!("the Router: v1 has {ours:.3}");
        anyhow::ensure!((ours - 0.8).abs() < 0.02, "{ours}");
        let routes = ["-n", "shop", "get", "virtualservice", "-o", "yaml"];
        let routes = lab.kubectl(&routes).await?;
        anyhow::ensure!(routes.contains("timeout: 9s"), "{routes}");
        none_failed(&traffic.stop().await?)
    });
}
