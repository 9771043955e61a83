//! `make bench`: how fast Fenceline learns, and how quiet it is when there is nothing to learn.

use std::time::{Duration, Instant};

use clap::Parser;
use fenceline_e2e::app::Protocol;
use fenceline_e2e::fences::GLOBAL_PROXY as GLOBAL_PROXY_URI;
use fenceline_e2e::install::{GLOBAL_PROXY, OPERATOR, SYSTEM};
use fenceline_e2e::lab::request;
use fenceline_e2e::wait::eventually;
use fenceline_e2e::{Lab, PATIENCE, PodSpec, isolate, lab};

const CLIENT: (&str, &str) = ("shop", "client");

/// Measures learning and idling on a real mesh on this machine.
#[derive(Parser)]
struct Args {
    /// Services of the mesh besides.
    #[arg(long, default_value_t = 500)]
    services: usize,
    /// New dependencies, one after another.
    #[arg(long, default_value_t = 100)]
    dependencies: usize,
    /// Seconds to watch the converged operator.
    #[arg(long, default_value_t = 120)]
    idle: u64,
    /// First calls of each kind: held, held while the mesh churns, forwarded.
    #[arg(long, default_value_t = 200)]
    first_calls: usize,
    /// Only the first calls.
    #[arg(long)]
    first_calls_only: bool,
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    if isolate::is_inside() {
        return lab::in_lab("bench", async |lab| {
            if args.first_calls_only {
                lab.install().await?;
                lab.namespace("shop").await?;
                lab.workload(CLIENT, &[80]).await?;
                lab.fence(CLIENT, "{}").await?;
            } else {
                measure(lab, &args).await?;
            }
            first_calls(lab, args.first_calls).await
        });
    }
    let given: Vec<String> = std::env::args().skip(1).collect();
    let given: Vec<&str> = given.iter().map(String::as_str).collect();
    let status = isolate::command(&given)?.status()?;
    anyhow::ensure!(status.success(), "the bench failed: {status}");
    Ok(())
}

#[expect(clippy::cast_precision_loss, reason = "small numbers")]
async fn measure(lab: &mut Lab, args: &Args) -> anyhow::Result<()> {
    lab.install().await?;
    lab.idle_services(args.services.max(args.dependencies))
        .await?;
    lab.namespace("shop").await?;
    lab.workload(CLIENT, &[80]).await?;
    begin(lab).await?;
    lab.until_forgotten(CLIENT, "service-0.idle-0.svc.cluster.local")
        .await?;
    lab.until_quiet(OPERATOR, Duration::from_secs(2)).await?;
    println!("mesh: {} services", args.services);
    println!("operator memory: {:.1} MB", memory(lab)?);

    let written = lab.writes(OPERATOR).await?;
    let start = Instant::now();
    let to = lab.resolve("idle-0", "service-0", 80).await?;
    for number in 0..args.dependencies {
        // Nobody answers there, which is no matter: the call is reported when it begins.
        let authority = format!("service-{number}.idle-{}", number / 50);
        let mut call = request(Protocol::Http1, &authority, to);
        call.timeout = Duration::from_millis(50);
        lab.call(CLIENT, &call).await?;
        let host = format!(
            "idle-{0}/service-{number}.idle-{0}.svc.cluster.local",
            number / 50
        );
        lab.until_in_scope(CLIENT, &host).await?;
    }
    let took = lab.learning_times(OPERATOR)?;
    anyhow::ensure!(
        took.len() >= args.dependencies,
        "only {} were timed",
        took.len()
    );
    let at = |share: usize| took[(took.len() - 1) * share / 100];
    println!(
        "log entry received -> Sidecar stored, {} dependencies one by one: p50 {:.1?}, p99 {:.1?}, max {:.1?} ({:.1?} in all)",
        took.len(),
        at(50),
        at(99),
        at(100),
        start.elapsed()
    );

    lab.until_quiet(OPERATOR, Duration::from_secs(2)).await?;
    let each = (lab.writes(OPERATOR).await? - written) / took.len() as f64;
    println!("API writes for each dependency: {each:.2}");
    let before = lab.writes(OPERATOR).await?;
    tokio::time::sleep(Duration::from_secs(args.idle)).await;
    let writes = lab.writes(OPERATOR).await? - before;
    println!(
        "API writes of the converged operator in {} s, its Lease not counted: {writes}",
        args.idle
    );
    println!("operator memory: {:.1} MB", memory(lab)?);
    eventually(PATIENCE, "the operator is well", async || {
        let errors = lab
            .metric(OPERATOR, "fenceline_reconcile_errors_total", "")
            .await?;
        anyhow::ensure!(errors < 0.5, "{errors} failed reconciliations");
        Ok(())
    })
    .await
}

/// Times first calls from the application's side: held, in a quiet mesh and in one where a Service changes every 200 ms;
/// forwarded; and direct ones beside them.
async fn first_calls(lab: &mut Lab, count: usize) -> anyhow::Result<()> {
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
        times.sort();
        let at = |share: usize| {
            let last = times.len().saturating_sub(1);
            times.get(last * share / 100).copied().unwrap_or_default()
        };
        println!(
            "{what}: {} calls, p50 {:.1?}, p99 {:.1?}",
            times.len(),
            at(50),
            at(99)
        );
    };
    let (held, direct, other) = times(CLIENT, QUIET, true).await?;
    say("first call, held, quiet mesh", held);
    println!("  {other} were held in vain and forwarded");
    say("direct", direct);
    let (forwarded, _, _) = times(forwarder, FORWARD, false).await?;
    say("first call, forwarded", forwarded);
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
        churned = churn => return churned,
    };
    say("first call, held, a Service changed every 200 ms", held);
    println!("  {other} were held in vain and forwarded");
    Ok(())
}

/// Begins to fence the client while it calls a service that nobody declared, and counts what fails.
async fn begin(lab: &mut Lab) -> anyhow::Result<()> {
    lab.workload(("shop", "reviews"), &[9080]).await?;
    lab.until_direct(CLIENT, Protocol::Http1, "reviews:9080")
        .await?;
    let call = request(
        Protocol::Http1,
        "reviews:9080",
        lab.resolve("shop", "reviews", 9080).await?,
    );
    let lab = &*lab;
    let until = Instant::now() + Duration::from_secs(4);
    let callers = (0..4).map(|_| async {
        let (mut made, mut failed) = (0_u32, Vec::new());
        while Instant::now() < until {
            made += 1;
            let outcome = lab.call(CLIENT, &call).await?;
            if outcome.status != 200 {
                failed.push((
                    Instant::now(),
                    format!("{} {}", outcome.status, outcome.body),
                ));
            }
        }
        anyhow::Ok((made, failed))
    });
    let fence = async {
        tokio::time::sleep(Duration::from_secs(1)).await;
        lab.fence(CLIENT, "{}").await
    };
    let (counts, fenced) = tokio::join!(futures::future::try_join_all(callers), fence);
    fenced?;
    let (made, failed) = counts?
        .into_iter()
        .fold((0, Vec::new()), |(made, mut all), one| {
            all.extend(one.1);
            (made + one.0, all)
        });
    let times = failed.iter().map(|(at, _)| *at);
    let lasted = times
        .clone()
        .max()
        .zip(times.min())
        .map(|(last, first)| last - first);
    println!(
        "a fence begins while an undeclared service is called: {} of {made} calls failed, within {:.0?}",
        failed.len(),
        lasted.unwrap_or_default()
    );
    let answers: std::collections::BTreeSet<String> =
        failed.into_iter().map(|(_, answer)| answer).collect();
    for answer in answers.iter().take(4) {
        println!("  {answer}");
    }
    Ok(())
}

#[expect(clippy::cast_precision_loss, reason = "shown in megabytes")]
fn memory(lab: &Lab) -> anyhow::Result<f64> {
    Ok(lab.operator_memory(OPERATOR)? as f64 * 1024.0 / 1e6)
}
