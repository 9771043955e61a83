//! `bench rate-limit`: one Envoy at full load without a limit, with one rule and with fifty, local and global, in turn.

use std::collections::BTreeMap;
use std::time::Duration;

use clap::Args;
use fenceline_e2e::app::{Flood, Protocol, flood};
use fenceline_e2e::pods::request;
use fenceline_e2e::{Lab, PodSpec};
use serde_json::{Value, json};

const LIMIT: (&str, &str) = ("shop", "cart");

#[derive(Args)]
pub(super) struct Flags {
    /// How often each is measured; the median counts.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// For how long, in seconds.
    #[arg(long, default_value_t = 5)]
    seconds: u64,
    /// Requests at the same time.
    #[arg(long, default_value_t = 16)]
    connections: usize,
    /// Rules, where there are many.
    #[arg(long, default_value_t = 50)]
    rules: usize,
}

pub(super) async fn run(lab: &mut Lab, flags: &Flags) -> anyhow::Result<Value> {
    lab.install().await?;
    lab.start_rate_limit_service().await?;
    lab.namespace("shop").await?;
    lab.workload(LIMIT, &[80]).await?;
    // Straight to the callee's proxy, so that it is the only one.
    lab.pod(PodSpec::new("shop", "client").without_sidecar())
        .await?;
    let kinds = [
        ("none", None),
        ("1", Some(("PerReplica", 1))),
        ("many", Some(("PerReplica", flags.rules))),
        ("global_1", Some(("Global", 1))),
        ("global_many", Some(("Global", flags.rules))),
    ];
    let mut measured: BTreeMap<&str, Vec<(f64, f64)>> = BTreeMap::new();
    for round in 0..flags.rounds {
        for (name, limit) in kinds {
            match limit {
                None => {}
                Some((share, rules)) => lab.limited(LIMIT, &spec(share, rules)).await?,
            }
            let (rps, micros) = load(lab, flags).await?;
            println!("round {round}, {name}: {rps:.0} requests/s, {micros:.1} us of Envoy each");
            measured.entry(name).or_default().push((rps, micros));
        }
        lab.unlimited(LIMIT).await?;
    }
    let mut figures = json!({"rules": flags.rules, "connections": flags.connections});
    for (name, mut all) in measured {
        let many = flags.rules.to_string();
        let name = name.replace("many", &many);
        all.sort_by(|a, b| a.0.total_cmp(&b.0));
        figures[format!("rps_{name}")] = json!(all[all.len() / 2].0.round());
        all.sort_by(|a, b| a.1.total_cmp(&b.1));
        figures[format!("envoy_us_{name}")] = json!((all[all.len() / 2].1 * 10.0).round() / 10.0);
    }
    Ok(figures)
}

/// Rules that each look at the path; the last one fits, and lets everything through.
fn spec(share: &str, rules: usize) -> String {
    let rules = (1..=rules).rev().map(|number| {
        format!(
            "{{name: r{number}, match: {{methods: [GET, POST], path: {{prefix: /r{number}/}}}}, \
             limit: {{requests: 1000000, per: 1s}}}}"
        )
    });
    let rules: Vec<String> = rules.collect();
    format!(
        "{{target: {{service: cart}}, share: {share}, rules: [{}]}}",
        rules.join(", ")
    )
}

/// Requests a second, and what each cost Envoy in microseconds.
async fn load(lab: &Lab, flags: &Flags) -> anyhow::Result<(f64, f64)> {
    let pod = lab.running(LIMIT.0, LIMIT.1)?;
    let mut call = request(Protocol::Http1, "cart.shop", (pod.ip, 80).into());
    call.path = "/r1/x".to_owned();
    let order = |time| Flood {
        calls: vec![call.clone()],
        connections: flags.connections,
        per_second: 0,
        time,
    };
    let client = lab.running("shop", "client")?.control();
    flood(client, &order(Duration::from_secs(1))).await?;
    let before = pod.envoy_time()?;
    let flooded = flood(client, &order(Duration::from_secs(flags.seconds))).await?;
    let spent = pod.envoy_time()? - before;
    let (all, well) = (flooded.all(0), flooded.of(0, 200));
    anyhow::ensure!(all == well && all > 0, "{flooded:?}");
    #[expect(clippy::cast_precision_loss, reason = "small numbers")]
    let all = all as f64;
    Ok((
        all / flooded.time.as_secs_f64(),
        spent.as_secs_f64() * 1e6 / all,
    ))
}
