//! `bench fence`: a policy switched on over a mesh that has no fences yet.

use std::time::{Duration, Instant};

use clap::Args;
use fenceline_e2e::install::OPERATOR;
use fenceline_e2e::wait::eventually;
use fenceline_e2e::{Lab, Signal};
use serde_json::{Map, Value, json};

use super::numbers::megabytes;

#[derive(Args)]
pub(super) struct Flags {
    /// Services that get a fence, the first time and then.
    #[arg(long, value_delimiter = ',', default_value = "1000,5000")]
    services: Vec<usize>,
}

const POLICY: &str = "{apiVersion: fenceline.dev/v1alpha1, kind: FencePolicy, metadata: {name: every}, \
                      spec: {namespaceSelector: {}}}";

pub(super) async fn run(lab: &mut Lab, flags: &Flags) -> anyhow::Result<Value> {
    lab.install().await?;
    without_istiod(lab)?;
    // The global proxy has one, say.
    let others = sidecars(lab).await?;
    let mut figures = Map::new();
    let mut made = 0;
    for services in flags.services.iter().copied() {
        lab.fenceable_services(made..services).await?;
        made = services;
        lab.until_quiet(OPERATOR, Duration::from_secs(3)).await?;
        let written = lab.writes(OPERATOR).await?;
        let cpu = lab.operator_cpu(OPERATOR)?;
        let (took, peak) = switch_on(lab, services).await?;
        lab.until_quiet(OPERATOR, Duration::from_secs(3)).await?;
        let peak = peak.max(lab.operator_memory(OPERATOR)?);
        let writes = lab.writes(OPERATOR).await? - written;
        let cpu = lab.operator_cpu(OPERATOR)? - cpu;
        println!(
            "{services} fences in force after {took:.1?}: {writes} writes, {cpu:.1?} of a processor, {peak} KiB"
        );
        let seconds = (took.as_secs_f64() * 100.0).round() / 100.0;
        figures.insert(format!("seconds_{services}"), json!(seconds));
        figures.insert(format!("writes_{services}"), json!(writes));
        figures.insert(format!("cpu_s_{services}"), json!(cpu.as_secs_f64()));
        figures.insert(format!("peak_rss_mb_{services}"), json!(megabytes(peak)));
        lab.kubectl(&["delete", "fencepolicy", "every"]).await?;
        until_sidecars(lab, others, |_| Ok(())).await?;
    }
    Ok(Value::Object(figures))
}

/// What istiod makes of it is istiod's; here it would take the operator's processors.
pub(super) fn without_istiod(lab: &Lab) -> anyhow::Result<()> {
    match &lab.control_plane.istiod {
        Some(istiod) => istiod.signal(Signal::STOP),
        None => Ok(()),
    }
}

/// Applies a policy for every namespace; says how long it took until so many fences were in force, and how much memory the
/// operator had at most, in KiB.
pub(super) async fn switch_on(lab: &Lab, services: usize) -> anyhow::Result<(Duration, u64)> {
    let mut peak = 0;
    #[expect(clippy::cast_precision_loss, reason = "small numbers")]
    let all = sidecars(lab).await? + services as f64;
    let started = Instant::now();
    lab.apply(POLICY).await?;
    until_sidecars(lab, all, |lab| {
        peak = peak.max(lab.operator_memory(OPERATOR)?);
        Ok(())
    })
    .await?;
    Ok((started.elapsed(), peak))
}

async fn sidecars(lab: &Lab) -> anyhow::Result<f64> {
    lab.metric(OPERATOR, "fenceline_objects", "kind=\"Sidecar\"")
        .await
}

async fn until_sidecars(
    lab: &Lab,
    count: f64,
    mut meanwhile: impl FnMut(&Lab) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    eventually(
        Duration::from_secs(300),
        &format!("{count} Sidecars"),
        async || {
            meanwhile(lab)?;
            let there = sidecars(lab).await?;
            anyhow::ensure!((count - there).abs() < 0.5, "{there}");
            Ok(())
        },
    )
    .await
}
