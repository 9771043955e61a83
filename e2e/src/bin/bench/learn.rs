//! `bench learn`: from an access log entry to the Sidecar that is stored, with few fences and with many.

use std::ops::Range;
use std::time::{Duration, Instant};

use clap::Args;
use fenceline_e2e::Lab;
use fenceline_e2e::app::Protocol;
use fenceline_e2e::install::OPERATOR;
use fenceline_e2e::pods::request;
use serde_json::{Value, json};

use super::numbers::{ms, percentile};

#[derive(Args)]
pub(super) struct Flags {
    /// New dependencies each time, one after another, by one caller after the other.
    #[arg(long, default_value_t = 200)]
    dependencies: usize,
    /// Workloads that call, each with a fence. The next dependency of a caller waits until the last one has arrived
    /// at its proxy; those of different callers do not wait for each other.
    #[arg(long, default_value_t = 8)]
    callers: usize,
    /// Fences in all, at first and then.
    #[arg(long, default_value_t = 10)]
    few: usize,
    #[arg(long, default_value_t = 1000)]
    many: usize,
}

pub(super) async fn run(lab: &mut Lab, flags: &Flags) -> anyhow::Result<Value> {
    lab.install().await?;
    let services = flags.many.max(flags.dependencies * 2);
    lab.idle_services(services).await?;
    lab.namespace("shop").await?;
    let callers: Vec<String> = (0..flags.callers)
        .map(|number| format!("caller-{number}"))
        .collect();
    for caller in &callers {
        lab.workload(("shop", caller), &[80]).await?;
        lab.fence(("shop", caller), "{}").await?;
    }
    for caller in &callers {
        lab.until_forgotten(("shop", caller), "service-0.idle-0.svc.cluster.local")
            .await?;
    }
    let mut results = Vec::new();
    let mut others = 0;
    for (round, fences) in [flags.few, flags.many].into_iter().enumerate() {
        let more = fences.saturating_sub(flags.callers);
        lab.idle_fences(others..more).await?;
        others = more;
        lab.until_quiet(OPERATOR, Duration::from_secs(3)).await?;
        println!("{fences} fences");
        let hosts = round * flags.dependencies..(round + 1) * flags.dependencies;
        results.push(learn(lab, &callers, hosts).await?);
    }
    let (few, many) = (&mut results[0].clone(), &mut results[1].clone());
    Ok(json!({
        "dependencies": flags.dependencies,
        "fences": [flags.few, flags.many],
        "p50_ms": ms(percentile(&mut few.0, 50)),
        "p99_ms": ms(percentile(&mut few.0, 99)),
        "p50_ms_1000": ms(percentile(&mut many.0, 50)),
        "p99_ms_1000": ms(percentile(&mut many.0, 99)),
        "writes_per_edge": few.1,
        "writes_per_edge_1000": many.1,
    }))
}

/// Learns hosts one after another; says how long each took, and how many writes it cost.
async fn learn(
    lab: &Lab,
    callers: &[String],
    hosts: Range<usize>,
) -> anyhow::Result<(Vec<Duration>, f64)> {
    let count = hosts.len();
    let known = lab.learning_times(OPERATOR)?.len();
    let written = lab.writes(OPERATOR).await?;
    let start = Instant::now();
    let to = lab.resolve("idle-0", "service-0", 80).await?;
    for (number, caller) in hosts.zip(callers.iter().cycle()) {
        let caller = ("shop", caller.as_str());
        // Nobody answers there, which is no matter: the call is reported when it begins.
        let namespace = number / 50;
        let authority = format!("service-{number}.idle-{namespace}");
        let mut call = request(Protocol::Http1, &authority, to);
        call.timeout = Duration::from_millis(50);
        lab.call(caller, &call).await?;
        let fqdn = format!("service-{number}.idle-{namespace}.svc.cluster.local");
        lab.until_in_scope(caller, &format!("idle-{namespace}/{fqdn}"))
            .await?;
    }
    let mut took = lab.learning_times(OPERATOR)?.split_off(known);
    anyhow::ensure!(took.len() >= count, "only {} were timed", took.len());
    lab.until_quiet(OPERATOR, Duration::from_secs(3)).await?;
    #[expect(clippy::cast_precision_loss, reason = "small numbers")]
    let each = (lab.writes(OPERATOR).await? - written) / took.len() as f64;
    println!(
        "log entry received -> Sidecar stored, {} dependencies one by one: p50 {:.1?}, p99 {:.1?}, {each:.2} writes each \
         ({:.1?} in all)",
        took.len(),
        percentile(&mut took, 50),
        percentile(&mut took, 99),
        start.elapsed()
    );
    Ok((took, (each * 100.0).round() / 100.0))
}
