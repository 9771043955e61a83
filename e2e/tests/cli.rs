//! What people ask the command line.

use std::process::Stdio;

use anyhow::Context as _;
use fenceline_e2e::app::Protocol;
use fenceline_e2e::{Lab, PodSpec};
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
