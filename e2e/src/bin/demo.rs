//! `make demo`: Bookinfo in a mesh of 500 other services, before and after its fences, on a real control plane and real
//! proxies on this machine.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::Context;
use clap::Parser;
use fenceline_e2e::app::Protocol;
use fenceline_e2e::cost::Cost;
use fenceline_e2e::tools::checkout;
use fenceline_e2e::wait::eventually;
use fenceline_e2e::{Lab, PATIENCE, PodSpec, forward, isolate, lab};

const NAMESPACE: &str = "bookinfo";
const WORKLOADS: [&str; 4] = ["productpage", "details", "reviews", "ratings"];
const CALLS: [(&str, &str); 3] = [
    ("productpage", "details"),
    ("productpage", "reviews"),
    ("reviews", "ratings"),
];

/// Shows what Fenceline does, on a real mesh on this machine.
#[derive(Clone, Parser)]
struct Args {
    /// Leave everything running until Ctrl-C, with traffic, for a look around with kubectl.
    #[arg(long)]
    keep: bool,
    /// Exit non-zero unless every promise of the table held.
    #[arg(long)]
    check: bool,
    /// How many other services there are in the mesh.
    #[arg(long, default_value_t = 500)]
    services: usize,
}

fn main() -> anyhow::Result<ExitCode> {
    let args = Args::parse();
    let folder = checkout().canonicalize()?.join(".lab/demo");
    std::fs::create_dir_all(&folder)?;
    if isolate::is_inside() {
        let held = lab::in_lab("demo", async |lab| inside(lab, &args, &folder).await)?;
        let failed = args.check && !held;
        return Ok(if failed {
            ExitCode::FAILURE
        } else {
            ExitCode::SUCCESS
        });
    }
    outside(&folder)
}

fn socket(folder: &Path) -> PathBuf {
    folder.join("api.sock")
}

/// Starts the demo in namespaces of its own, and lets kubectl in.
fn outside(folder: &Path) -> anyhow::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        forward::serve_outside(folder, socket(folder)).await?;
        println!("starting a control plane, in namespaces of its own …");
        let args: Vec<String> = std::env::args().skip(1).collect();
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        let mut child = tokio::process::Command::from(isolate::command(&args)?).spawn()?;
        let ended = tokio::select! {
            status = child.wait() => Some(status?),
            interrupted = tokio::signal::ctrl_c() => {
                interrupted?;
                // Ctrl-C reaches the demo itself too, which tidies up if it is far enough to.
                let patience = Duration::from_secs(3);
                tokio::time::timeout(patience, child.wait()).await.ok().transpose()?
            }
        };
        let Some(status) = ended else {
            child.kill().await?;
            return Ok(ExitCode::FAILURE);
        };
        Ok(if status.success() {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        })
    })
}

#[derive(Clone, Debug, Default)]
struct Row {
    workload: &'static str,
    before: Cost,
    after: Cost,
    first: Vec<Duration>,
    next: Vec<Duration>,
    broken: Vec<String>,
}

struct Progress(Instant);

impl Progress {
    fn say(&self, what: &str) {
        println!("[{:5.1} s] {what}", self.0.elapsed().as_secs_f64());
    }
}

async fn inside(lab: &mut Lab, args: &Args, folder: &Path) -> anyhow::Result<bool> {
    let progress = Progress(Instant::now());
    progress.say("a control plane runs: etcd, kube-apiserver, kube-controller-manager, istiod");
    forward::serve_inside(&socket(folder)).await?;
    progress.say(&format!(
        "kubectl works: export KUBECONFIG={}",
        folder.join("kubeconfig").display()
    ));
    lab.install().await?;
    progress.say(
        "Fenceline is installed: kubectl apply -f crds/; kubectl apply -k global-proxy-config",
    );
    lab.idle_services(args.services).await?;
    progress.say(&format!("{} other services are in the mesh", args.services));
    bookinfo(lab).await?;
    progress.say("Bookinfo runs, each pod with its sidecar: productpage -> details, reviews; reviews -> ratings");

    let mut rows: Vec<Row> = WORKLOADS
        .iter()
        .map(|workload| Row {
            workload,
            ..Row::default()
        })
        .collect();
    let mesh = args.services;
    eventually(PATIENCE, "every proxy has the whole mesh", async || {
        for row in &mut rows {
            row.before = lab.cost((NAMESPACE, row.workload)).await?;
            anyhow::ensure!(row.before.services >= mesh, "{row:?}");
        }
        Ok(())
    })
    .await?;
    for (from, to) in CALLS {
        lab.until_direct((NAMESPACE, from), Protocol::Http1, &format!("{to}:9080"))
            .await?;
    }
    progress.say("without fences: every proxy has the whole mesh, and every call works");

    lab.kubectl(&["apply", "-f", "examples/bookinfo/fences.yaml"])
        .await?;
    for workload in WORKLOADS {
        lab.until_reason((NAMESPACE, workload), "Enforced").await?;
        lab.until_forgotten((NAMESPACE, workload), "service-0.idle-0.svc.cluster.local")
            .await?;
        lab.until_forgotten((NAMESPACE, workload), "ratings.bookinfo.svc.cluster.local")
            .await?;
    }
    progress.say("four fences are in force (kubectl apply -f examples/bookinfo/fences.yaml): nothing is in scope yet");
    for (from, to) in CALLS {
        traffic(lab, &mut rows, from, to, &progress).await?;
    }
    for row in &mut rows {
        row.after = lab.cost((NAMESPACE, row.workload)).await?;
    }
    let held = table(&mut rows, lab).await?;
    if args.keep {
        hints(folder, lab);
        keep(lab).await?;
    } else {
        println!("to look around with kubectl: make demo DEMO_ARGS=--keep");
    }
    Ok(held)
}

/// The pods that the example's Deployments ask for.
async fn bookinfo(lab: &mut Lab) -> anyhow::Result<()> {
    lab.kubectl(&["apply", "-f", "examples/bookinfo/app.yaml"])
        .await?;
    for workload in WORKLOADS {
        let pod = PodSpec::new(NAMESPACE, workload)
            .label("version", "v1")
            .http(9080);
        lab.pod(pod).await?;
    }
    Ok(())
}

/// One edge of the graph: its first call, and twenty that follow.
async fn traffic(
    lab: &Lab,
    rows: &mut [Row],
    from: &'static str,
    to: &str,
    progress: &Progress,
) -> anyhow::Result<()> {
    let row = rows
        .iter_mut()
        .find(|row| row.workload == from)
        .context("a workload")?;
    let authority = format!("{to}:9080");
    let caller = (NAMESPACE, from);
    match lab.held_call(caller, Protocol::Http1, &authority).await {
        Ok(first) => row.first.push(first.took),
        Err(error) => row
            .broken
            .push(format!("the first call to {to}: {error:#}")),
    }
    let host = format!("{NAMESPACE}/{to}.{NAMESPACE}.svc.cluster.local");
    let start = Instant::now();
    lab.until_in_scope(caller, &host).await?;
    lab.until_direct(caller, Protocol::Http1, &authority)
        .await?;
    let learnt = start.elapsed();
    let mut times = Vec::new();
    for _ in 0..20 {
        let next = lab.get(caller, Protocol::Http1, &authority).await?;
        if next.status != 200 {
            row.broken.push(format!("a call to {to}: {next:?}"));
        }
        times.push(next.took);
    }
    times.sort();
    row.next.push(times[times.len() / 2]);
    progress.say(&format!(
        "{from} -> {to}: learnt by its first call, direct {learnt:.0?} later"
    ));
    Ok(())
}

fn shown(times: &[Duration]) -> String {
    let times: Vec<String> = times
        .iter()
        .map(|time| format!("{:.1}", time.as_secs_f64() * 1000.0))
        .collect();
    if times.is_empty() {
        "calls nobody".to_owned()
    } else {
        format!("{} ms", times.join(", "))
    }
}

/// Prints the table; says whether every promise held.
async fn table(rows: &mut [Row], lab: &Lab) -> anyhow::Result<bool> {
    println!();
    println!(
        "{:<12} {:<28} {:<22} {:<22} {:<16} next calls",
        "workload", "services in scope", "Envoy memory", "Envoy config", "first call"
    );
    let mega = |bytes: f64| bytes / 1_000_000.0;
    let mut held = true;
    for row in rows {
        let fence = lab.get_fence((NAMESPACE, row.workload)).await?;
        let scope = fence
            .status
            .and_then(|status| status.scope)
            .context("a scope")?;
        println!(
            "{:<12} {:<28} {:<22} {:<22} {:<16} {}",
            row.workload,
            format!(
                "{} of {} ({} learnt)",
                scope.imported, scope.visible, scope.learnt
            ),
            format!(
                "{:.1} -> {:.1} MB",
                mega(row.before.memory),
                mega(row.after.memory)
            ),
            format!(
                "{:.2} -> {:.2} MB",
                mega(row.before.config),
                mega(row.after.config)
            ),
            shown(&row.first),
            shown(&row.next),
        );
        let calls = CALLS
            .iter()
            .filter(|(from, _)| *from == row.workload)
            .count();
        for (promise, kept) in [
            (
                "exactly what it calls is learnt",
                scope.learnt as usize == calls,
            ),
            ("its scope is small", scope.imported <= 8),
            (
                "Envoy needs less memory",
                row.after.memory < row.before.memory,
            ),
            (
                "Envoy's configuration is at most a quarter",
                row.after.config * 4.0 < row.before.config,
            ),
        ] {
            if !kept {
                row.broken.push(format!("not so: {promise}"));
            }
        }
        held &= row.broken.is_empty();
        for broken in &row.broken {
            println!("  BROKEN {}: {broken}", row.workload);
        }
    }
    println!();
    println!(
        "first call: held at the global proxy until it is in scope, then made by the workload itself. next calls: direct (median of 20)."
    );
    if held {
        println!("every promise held");
    }
    Ok(held)
}

fn hints(folder: &Path, lab: &Lab) {
    println!();
    println!(
        "to look around (with kubectl, or {}):",
        lab.kubectl_outside().display()
    );
    println!(
        "  export KUBECONFIG={}",
        folder.join("kubeconfig").display()
    );
    for command in [
        "get servicefences -n bookinfo",
        "describe servicefence productpage -n bookinfo",
        "get sidecar fenceline-productpage -n bookinfo -o yaml",
        "get events -n bookinfo",
    ] {
        println!("  kubectl {command}");
    }
    println!();
}

/// Calls go on, once a second, until Ctrl-C.
async fn keep(lab: &Lab) -> anyhow::Result<()> {
    println!(
        "everything keeps running, with a round of calls each second; Ctrl-C ends it and leaves nothing behind"
    );
    let calls = async {
        loop {
            for (from, to) in CALLS {
                let authority = format!("{to}:9080");
                match lab
                    .get((NAMESPACE, from), Protocol::Http1, &authority)
                    .await
                {
                    Ok(outcome) if outcome.status == 200 => {}
                    other => println!("{from} -> {to}: {other:?}"),
                }
            }
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    };
    tokio::select! {
        () = calls => Ok(()),
        interrupted = tokio::signal::ctrl_c() => Ok(interrupted?),
    }
}
