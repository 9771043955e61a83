//! `bench idle` and `bench restart`: a large mesh that has converged, in which only pods come and go; and the operator killed in
//! it, and started.

use std::time::{Duration, Instant};

use clap::Args;
use fenceline_e2e::Lab;
use fenceline_e2e::install::{OPERATOR, SYSTEM};
use fenceline_e2e::wait::eventually;
use serde_json::{Value, json};

use super::fence::{switch_on, without_istiod};
use super::numbers::megabytes;

#[derive(Args)]
pub(super) struct Flags {
    /// Services, each with a fence.
    #[arg(long, default_value_t = 5_000)]
    services: usize,
    /// Pods of each.
    #[arg(long, default_value_t = 2)]
    pods: usize,
    /// For how long nothing but pods changes.
    #[arg(long, default_value_t = 120)]
    seconds: u64,
    /// Services of which all pods are replaced, each second.
    #[arg(long, default_value_t = 1)]
    rolled_per_second: usize,
}

/// How long nobody may write before that is called quiet.
const QUIET: Duration = Duration::from_secs(5);

async fn converged(lab: &mut Lab, flags: &Flags) -> anyhow::Result<()> {
    lab.install().await?;
    without_istiod(lab)?;
    let started = Instant::now();
    lab.fenceable_services(0..flags.services).await?;
    println!("{} services: {:.0?}", flags.services, started.elapsed());
    switch_on(lab, flags.services).await?;
    println!("as many fences: {:.0?}", started.elapsed());
    lab.fenceable_pods(0..flags.services, flags.pods, 0).await?;
    lab.until_quiet(OPERATOR, QUIET).await?;
    println!(
        "{} pods, and quiet: {:.0?}",
        flags.services * flags.pods,
        started.elapsed()
    );
    Ok(())
}

/// What an operator costs that has nothing to do.
pub(super) async fn idle(lab: &mut Lab, flags: &Flags) -> anyhow::Result<Value> {
    converged(lab, flags).await?;
    let (written, cpu) = (lab.writes(OPERATOR).await?, lab.operator_cpu(OPERATOR)?);
    let started = Instant::now();
    let mut tick = tokio::time::interval(Duration::from_secs(1));
    let mut rolled = 0;
    while started.elapsed() < Duration::from_secs(flags.seconds) {
        tick.tick().await;
        for _ in 0..flags.rolled_per_second {
            let (number, generation) = (rolled % flags.services, rolled / flags.services);
            lab.roll_fenceable_pods(number, flags.pods, generation)
                .await?;
            rolled += 1;
        }
    }
    let took = started.elapsed();
    let cpu = lab.operator_cpu(OPERATOR)? - cpu;
    let writes = lab.writes(OPERATOR).await? - written;
    let rss = megabytes(lab.operator_memory(OPERATOR)?);
    let percent = cpu.as_secs_f64() / took.as_secs_f64() * 100.0;
    let pods = rolled * flags.pods;
    println!(
        "{pods} pods replaced in {took:.0?}: {writes} writes, {percent:.2} % of a processor, {rss} MB"
    );
    Ok(json!({
        "services": flags.services,
        "pods": flags.services * flags.pods,
        "pods_replaced": pods,
        "seconds": took.as_secs(),
        "writes": writes,
        "cpu_percent": (percent * 100.0).round() / 100.0,
        "rss_mb": rss,
    }))
}

/// What it takes to begin again.
pub(super) async fn restart(lab: &mut Lab, flags: &Flags) -> anyhow::Result<Value> {
    converged(lab, flags).await?;
    lab.running_mut(SYSTEM, OPERATOR)?.app()?.kill().await?;
    let started = Instant::now();
    lab.running_mut(SYSTEM, OPERATOR)?.start_app()?;
    lab.operator_ready(OPERATOR).await?;
    let ready = started.elapsed();
    eventually(Duration::from_secs(60), "it leads", async || {
        let leads = lab.metric(OPERATOR, "fenceline_leader", "").await?;
        anyhow::ensure!(leads > 0.5);
        Ok(())
    })
    .await?;
    let leads = started.elapsed();
    let writes = lab.until_quiet(OPERATOR, QUIET * 2).await?;
    let cpu = lab.operator_cpu(OPERATOR)?;
    let rss = megabytes(lab.operator_memory(OPERATOR)?);
    println!(
        "ready after {ready:.1?}, leads after {leads:.1?}; {writes} writes, {cpu:.1?} of a processor, {rss} MB"
    );
    Ok(json!({
        "services": flags.services,
        "pods": flags.services * flags.pods,
        "seconds_to_ready": (ready.as_secs_f64() * 100.0).round() / 100.0,
        "seconds_to_lead": (leads.as_secs_f64() * 100.0).round() / 100.0,
        "writes": writes,
        "cpu_s": cpu.as_secs_f64(),
        "rss_mb": rss,
    }))
}
