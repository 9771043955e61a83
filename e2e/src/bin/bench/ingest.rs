//! `bench ingest`: access log entries by the million, over the real way: a proxy with the global proxy's identity, mutual
//! TLS, the operator's own sidecar.

use std::time::{Duration, Instant};

use clap::Args;
use fenceline_e2e::install::{OPERATOR, SYSTEM};
use fenceline_e2e::reporter::{Entry, Volume};
use fenceline_e2e::{Lab, PATIENCE, PodSpec};
use serde_json::{Value, json};

use super::numbers::megabytes;

const CLIENT: (&str, &str) = ("shop", "client");
const TWIN: (&str, &str) = (SYSTEM, "twin");
const GLOBAL_PROXY_ACCOUNT: &str = "global-proxy";

#[derive(Args)]
pub(super) struct Flags {
    /// Entries of calls that are known.
    #[arg(long, default_value_t = 1_000_000)]
    entries: usize,
    /// Different edges among them.
    #[arg(long, default_value_t = 100)]
    edges: usize,
    /// Entries with names that mean nothing.
    #[arg(long, default_value_t = 200_000)]
    junk: usize,
    /// Different names among them.
    #[arg(long, default_value_t = 20_000)]
    junk_names: usize,
    /// Entries of one message. Envoy sends what it has once it has 16 KiB, which is about forty, or after a second.
    #[arg(long, default_value_t = 100)]
    batch: usize,
}

pub(super) async fn run(lab: &mut Lab, flags: &Flags) -> anyhow::Result<Value> {
    lab.install().await?;
    lab.idle_services(flags.edges).await?;
    lab.namespace("shop").await?;
    lab.workload(CLIENT, &[80]).await?;
    lab.fence(CLIENT, "{}").await?;
    lab.until_reason(CLIENT, "Enforced").await?;
    // The global proxy's identity, and a sidecar that takes in what is called from beside it.
    let mut twin = PodSpec::new(TWIN.0, TWIN.1);
    twin.service_account = GLOBAL_PROXY_ACCOUNT.to_owned();
    lab.pod(twin).await?;
    let known: Vec<Entry> = (0..flags.edges)
        .map(|number| entry(lab, format!("service-{number}.idle-{}", number / 50)))
        .collect::<anyhow::Result<_>>()?;
    // Learnt once.
    let once = Volume {
        batch: flags.batch,
        times: 1,
    };
    report(lab, &known, once).await?;
    lab.until_quiet(OPERATOR, Duration::from_secs(3)).await?;

    let rss_before = megabytes(lab.operator_memory(OPERATOR)?);
    let times = flags.entries / flags.edges;
    let seen = report(
        lab,
        &known,
        Volume {
            batch: flags.batch,
            times,
        },
    )
    .await?;
    let rss = megabytes(lab.operator_memory(OPERATOR)?);
    println!("known edges: {seen:?}; {rss_before} -> {rss} MB");

    let junk: Vec<Entry> = (0..flags.junk_names)
        .map(|number| entry(lab, format!("junk-{number}.example.com")))
        .collect::<anyhow::Result<_>>()?;
    let times = flags.junk / flags.junk_names;
    // Names that nothing answers to are shown once a minute, by one write.
    let junk = report(
        lab,
        &junk,
        Volume {
            batch: flags.batch,
            times,
        },
    )
    .await?;
    let rss_after_junk = megabytes(lab.operator_memory(OPERATOR)?);
    println!("junk: {junk:?}; {rss} -> {rss_after_junk} MB");
    #[expect(clippy::cast_precision_loss, reason = "small numbers")]
    let millions = seen.entries as f64 / 1e6;
    Ok(json!({
        "entries": seen.entries,
        "entries_per_s": (seen.entries as f64 / seen.took.as_secs_f64()).round(),
        "entries_per_cpu_s": (seen.entries as f64 / seen.cpu.as_secs_f64()).round(),
        "cpu_s_per_million": (seen.cpu.as_secs_f64() / millions * 100.0).round() / 100.0,
        "writes": seen.writes,
        "rss_mb_before": rss_before,
        "rss_mb": rss,
        "junk_entries": junk.entries,
        "rss_mb_after_junk": rss_after_junk,
        "writes_for_junk": junk.writes,
    }))
}

fn entry(lab: &Lab, authority: String) -> anyhow::Result<Entry> {
    Ok(Entry {
        peer: vec!["spiffe://cluster.local/ns/shop/sa/client".to_owned()],
        address: Some(lab.running(CLIENT.0, CLIENT.1)?.ip.to_string()),
        authority: Some(authority),
    })
}

/// What a report cost the operator.
#[derive(Debug)]
struct Cost {
    entries: usize,
    took: Duration,
    cpu: Duration,
    writes: f64,
}

/// Reports entries so many times, and waits until all were taken in.
async fn report(lab: &Lab, entries: &[Entry], volume: Volume) -> anyhow::Result<Cost> {
    let count = entries.len() * volume.times;
    let observed = async || {
        lab.metric(OPERATOR, "fenceline_observations_total", "")
            .await
    };
    let (before, written) = (observed().await?, lab.writes(OPERATOR).await?);
    let cpu = lab.operator_cpu(OPERATOR)?;
    let started = Instant::now();
    let operator = lab.resolve(SYSTEM, "fenceline", 18100).await?;
    lab.report_many(TWIN, operator, None, entries, volume)
        .await?
        .map_err(anyhow::Error::msg)?;
    #[expect(clippy::cast_precision_loss, reason = "small numbers")]
    let all = count as f64;
    fenceline_e2e::wait::eventually(PATIENCE, "every entry is taken in", async || {
        let seen = observed().await? - before;
        anyhow::ensure!(seen > all - 0.5, "{seen} of {all}");
        Ok(())
    })
    .await?;
    Ok(Cost {
        entries: count,
        took: started.elapsed(),
        cpu: lab.operator_cpu(OPERATOR)? - cpu,
        writes: lab.writes(OPERATOR).await? - written,
    })
}
