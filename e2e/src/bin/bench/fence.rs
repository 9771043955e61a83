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
    // What istiod makes of it is istiod's; here it would take the operator's processors.
    if let Some(istiod) = &lab.control_plane.istiod {
        istiod.signal(Signal::STOP)?;
    }
    let mut figures = Map::new();
    let mut made = 0;
    for services in flags.services.iter().copied() {
        lab.fenceable_services(made..services).await?;
        made = services;
        lab.until_quiet(OPERATOR, Duration::from_secs(3)).await?;
        let written = lab.writes(OPERATOR).await?;
        let cpu = lab.operator_cpu(OPERATOR)?;
        let mut peak = 0;
        let started = Instant::now();
        lab.apply(POLICY).await?;
        let what = format!("{services} fences are in force");
        eventually(Duration::from_secs(120), &what, async || {
            peak = peak.max(lab.operator_memory(OPERATOR)?);
            let sidecars = lab
                .metric(OPERATOR, "fenceline_objects", "kind=\"Sidecar\"")
                .await?;
            #[expect(clippy::cast_precision_loss, reason = "small numbers")]
            let all = services as f64 - 0.5;
            anyhow::ensure!(sidecars > all, "{sidecars}");
            Ok(())
        })
        .await?;
        let took = started.elapsed();
        lab.until_quiet(OPERATOR, Duration::from_secs(3)).await?;
        peak = peak.max(lab.operator_memory(OPERATOR)?);
        let writes = lab.writes(OPERATOR).await? - written;
        let cpu = lab.operator_cpu(OPERATOR)? - cpu;
        println!("{what} after {took:.1?}: {writes} writes, {cpu:.1?} of a processor, {peak} KiB");
        let seconds = (took.as_secs_f64() * 100.0).round() / 100.0;
        figures.insert(format!("seconds_{services}"), json!(seconds));
        figures.insert(format!("writes_{services}"), json!(writes));
        figures.insert(format!("cpu_s_{services}"), json!(cpu.as_secs_f64()));
        figures.insert(format!("peak_rss_mb_{services}"), json!(megabytes(peak)));
        lab.kubectl(&["delete", "fencepolicy", "every"]).await?;
        eventually(Duration::from_secs(300), "no fences", async || {
            let left = lab
                .metric(OPERATOR, "fenceline_objects", "kind=\"Sidecar\"")
                .await?;
            anyhow::ensure!(left < 0.5, "{left}");
            Ok(())
        })
        .await?;
    }
    Ok(Value::Object(figures))
}
