//! `bench first-call`: whole first calls through real proxies.

use std::time::Duration;

use clap::Args;
use fenceline_e2e::app::Protocol;
use fenceline_e2e::fences::GLOBAL_PROXY as GLOBAL_PROXY_URI;
use fenceline_e2e::install::{GLOBAL_PROXY, OPERATOR, SYSTEM};
use fenceline_e2e::wait::eventually;
use fenceline_e2e::{Lab, PATIENCE, PodSpec};
use serde_json::{Value, json};

use super::numbers::{ms, percentile};

const CLIENT: (&str, &str) = ("shop", "client");

#[derive(Args)]
pub(super) struct Flags {
    /// First calls of each kind: held, held while the mesh churns, forwarded.
    #[arg(long, default_value_t = 100)]
    calls: usize,
}

/// Times first calls from the application's side: held, in a quiet mesh and in one where a Service changes every 200 ms;
/// forwarded; and direct ones beside them.
pub(super) async fn run(lab: &mut Lab, flags: &Flags) -> anyhow::Result<Value> {
    let count = flags.calls;
    lab.install().await?;
    lab.namespace("shop").await?;
    lab.workload(CLIENT, &[80]).await?;
    lab.fence(CLIENT, "{}").await?;
    const QUIET: &str = "quiet";
    const CHURN: &str = "churn";
    const FORWARD: &str = "forward";
    lab.namespace("bank").await?;
    for kind in [QUIET, CHURN, FORWARD] {
        let names = (0..count).map(|number| format!("{kind}-{number}"));
        lab.services_of(("bank", "server"), names).await?;
    }
    lab.pod(PodSpec::new("bank", "server").http(80)).await?;
    lab.workload(("shop", "forwarder"), &[80]).await?;
    let forwarder = ("shop", "forwarder");
    lab.fence(forwarder, "{firstCall: {policy: Forward}}")
        .await?;
    lab.until_reason(forwarder, "Enforced").await?;
    let last = format!("{FORWARD}-{}.bank", count - 1);
    eventually(
        PATIENCE * 2,
        "the global proxy has every service",
        async || {
            let clusters = lab
                .running(SYSTEM, GLOBAL_PROXY)?
                .envoy("/clusters")
                .await?;
            anyhow::ensure!(clusters.contains(&format!("||{last}.svc.cluster.local::10.")));
            Ok(())
        },
    )
    .await?;
    lab.until_quiet(OPERATOR, Duration::from_secs(2)).await?;

    let lab = &*lab;
    let times = async |client,
                       kind: &str,
                       own: bool|
           -> anyhow::Result<(Vec<Duration>, Vec<Duration>, usize)> {
        let (mut first, mut direct, mut other) = (Vec::new(), Vec::new(), 0);
        for number in 0..count {
            let authority = format!("{kind}-{number}.bank:80");
            let outcome = lab.get(client, Protocol::Http1, &authority).await?;
            let peer = outcome.report()?.peer().map(str::to_owned);
            if own == (peer.as_deref() != Some(GLOBAL_PROXY_URI)) {
                first.push(outcome.took);
            } else {
                other += 1;
            }
            let next = lab
                .until_direct(client, Protocol::Http1, &authority)
                .await?;
            direct.push(next.took);
        }
        Ok((first, direct, other))
    };
    let say = |what: &str, mut times: Vec<Duration>| {
        let [p50, p99] = [50, 99].map(|share| percentile(&mut times, share));
        println!(
            "{what}: {} calls, p50 {p50:.1?}, p99 {p99:.1?}",
            times.len()
        );
        (ms(p50), ms(p99))
    };
    let (held, direct, other) = times(CLIENT, QUIET, true).await?;
    let quiet = say("first call, held, quiet mesh", held);
    println!("  {other} were held in vain and forwarded");
    let in_vain = other;
    let direct = say("direct", direct);
    let (forwarded, _, _) = times(forwarder, FORWARD, false).await?;
    let forwarded = say("first call, forwarded", forwarded);
    let churn = async {
        for number in 0.. {
            let label = format!("churn={number}");
            let service = ["-n", "bank", "label", "--overwrite", "service", "quiet-0"];
            lab.kubectl(&[&service[..], &[&label]].concat()).await?;
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        anyhow::Ok(())
    };
    let (held, _, other) = tokio::select! {
        times = times(CLIENT, CHURN, true) => times?,
        churned = churn => anyhow::bail!("it churned no longer: {churned:?}"),
    };
    let churned = say("first call, held, a Service changed every 200 ms", held);
    println!("  {other} were held in vain and forwarded");
    Ok(json!({
        "calls": count,
        "hold_p50_ms": quiet.0,
        "hold_p99_ms": quiet.1,
        "hold_churn_p50_ms": churned.0,
        "hold_churn_p99_ms": churned.1,
        "forward_p50_ms": forwarded.0,
        "forward_p99_ms": forwarded.1,
        "direct_p50_ms": direct.0,
        "direct_p99_ms": direct.1,
        "held_in_vain": in_vain,
        "held_in_vain_churn": other,
    }))
}
