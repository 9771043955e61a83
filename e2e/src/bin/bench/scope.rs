//! `bench scope`: what a proxy costs with the whole mesh in scope, with Istio's usual advice (`./*`), and fenced.

use clap::Args;
use fenceline_e2e::app::Protocol;
use fenceline_e2e::cost::Cost;
use fenceline_e2e::wait::eventually;
use fenceline_e2e::{Lab, PATIENCE};
use serde_json::{Value, json};

const CALLER: (&str, &str) = ("idle-0", "caller");

#[derive(Args)]
pub(super) struct Flags {
    /// Services of the mesh, each with two ports and two endpoints.
    #[arg(long, default_value_t = 2_000)]
    services: usize,
    /// What the caller depends on.
    #[arg(long, default_value_t = 10)]
    dependencies: usize,
    /// The fence's `firstCall.policy`.
    #[arg(long, default_value = "Hold")]
    first_call: String,
}

pub(super) async fn run(lab: &mut Lab, flags: &Flags) -> anyhow::Result<Value> {
    lab.install().await?;
    lab.idle_services(flags.services / 2).await?;
    lab.workload(CALLER, &[80]).await?;
    println!("{} services", flags.services / 2);
    let hosts: Vec<String> = (0..flags.dependencies)
        .map(|number| host(number * 37 % (flags.services / 2)))
        .collect();
    let declared: Vec<String> = hosts
        .iter()
        .map(|host| format!("{{host: {host}}}"))
        .collect();
    let fence = format!(
        "{{firstCall: {{policy: {}}}, dependencies: [{}]}}",
        flags.first_call,
        declared.join(", ")
    );
    lab.fence(CALLER, &fence).await?;
    lab.until_reason(CALLER, "Enforced").await?;
    let few = |cost: &Cost| cost.services <= flags.dependencies + 4;
    settled(lab, "just fenced, half the mesh", few).await?;
    fresh(lab).await?;
    let half = settled(lab, "fenced, half the mesh", few).await?;
    lab.idle_services_from(flags.services / 2, flags.services)
        .await?;
    println!("{} services", flags.services);
    // The new ones are not in its scope; something that is tells when istiod has pushed them.
    tokio::time::sleep(std::time::Duration::from_secs(3)).await;
    let fenced = settled(lab, "fenced", few).await?;

    lab.kubectl(&["-n", CALLER.0, "delete", "servicefence", CALLER.1])
        .await?;
    let all = |cost: &Cost| cost.services >= flags.services;
    settled(lab, "no longer fenced", all).await?;
    fresh(lab).await?;
    let full = settled(lab, "the whole mesh", all).await?;
    in_scope(lab, "./*").await?;
    lab.get(CALLER, Protocol::Http1, "caller:80").await?;
    let own = settled(lab, "./*", |cost| cost.services < flags.services / 2).await?;
    in_scope(lab, "~/*").await?;
    let nothing = settled(lab, "nothing in scope", |cost| cost.services < 2).await?;

    let mb = |cost: &Cost| (cost.memory / 1e5).round() / 10.0;
    Ok(json!({
        "services": flags.services,
        "dependencies": flags.dependencies,
        "envoy_mb_full": mb(&full),
        "envoy_mb_namespace": mb(&own),
        "envoy_mb_fenced": mb(&fenced),
        "envoy_mb_nothing": mb(&nothing),
        "envoy_mb_fenced_half_the_mesh": mb(&half),
        "ratio": (full.memory / fenced.memory * 10.0).round() / 10.0,
        "config_bytes_full": full.config,
        "config_bytes_namespace": own.config,
        "config_bytes_fenced": fenced.config,
        "config_bytes_fenced_half_the_mesh": half.config,
        "config_ratio": (full.config / fenced.config * 10.0).round() / 10.0,
    }))
}

/// The caller with this in scope.
async fn in_scope(lab: &mut Lab, hosts: &str) -> anyhow::Result<()> {
    let sidecar = format!(
        "{{apiVersion: networking.istio.io/v1, kind: Sidecar, metadata: {{name: default, namespace: idle-0}}, \
         spec: {{egress: [{{hosts: ['{hosts}']}}]}}}}"
    );
    lab.apply(&sidecar).await?;
    fresh(lab).await
}

/// A proxy that never had anything else: one whose configuration was larger keeps some of the memory.
async fn fresh(lab: &mut Lab) -> anyhow::Result<()> {
    lab.delete_pod(CALLER.0, CALLER.1).await?;
    let pod = fenceline_e2e::PodSpec::new(CALLER.0, CALLER.1).http(80);
    lab.pod(pod).await
}

fn host(number: usize) -> String {
    format!("service-{number}.idle-{}.svc.cluster.local", number / 50)
}

/// What the caller's proxy costs once it has what it should.
async fn settled(lab: &Lab, what: &str, has: impl Fn(&Cost) -> bool) -> anyhow::Result<Cost> {
    let mut last = Cost::default();
    eventually(PATIENCE * 4, what, async || {
        last = lab.cost(CALLER).await?;
        anyhow::ensure!(has(&last), "{last:?}");
        Ok(())
    })
    .await?;
    // What a change leaves behind goes within a moment.
    tokio::time::sleep(std::time::Duration::from_secs(2)).await;
    let cost = lab.cost(CALLER).await?;
    println!(
        "{what}: {:.1} MB, {:.2} MB of configuration, {} services",
        cost.memory / 1e6,
        cost.config / 1e6,
        cost.services
    );
    Ok(cost)
}
