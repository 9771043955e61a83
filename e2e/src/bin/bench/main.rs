//! `make bench`: what Fenceline saves and what it costs, on a real mesh on this machine. `bench NAME` runs one; its last line is
//! one JSON object. Without a name all of them run, and `target/bench.md` has the table.

mod fence;
mod first_call;
mod idle;
mod ingest;
mod learn;
mod numbers;
mod plan;
mod rate_limit;
mod route_change;
mod scope;

use std::fmt::Write as _;
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

use anyhow::Context;
use clap::{Parser, Subcommand};
use fenceline_e2e::tools::checkout;
use fenceline_e2e::{isolate, lab};
use serde_json::Value;

/// Measures Fenceline on this machine.
#[derive(Parser)]
struct Args {
    #[command(subcommand)]
    bench: Option<Bench>,
}

#[derive(Subcommand)]
enum Bench {
    /// What a proxy costs with the whole mesh, with its own namespace, and fenced.
    Scope(scope::Flags),
    /// From an access log entry to the Sidecar that is stored.
    Learn(learn::Flags),
    /// First calls from the application's side.
    FirstCall(first_call::Flags),
    /// A policy switched on.
    Fence(fence::Flags),
    /// Access log entries by the million.
    Ingest(ingest::Flags),
    /// A large mesh in which only pods come and go.
    Idle(idle::Flags),
    /// The operator killed in such a mesh, and started.
    Restart(idle::Flags),
    /// A service's traffic moved from one version to another under load.
    RouteChange(route_change::Flags),
    /// What limits cost one Envoy at full load.
    RateLimit(rate_limit::Flags),
    /// The pure planner.
    Plan(plan::Flags),
}

/// In the order in which all of them run.
const NAMES: [&str; 10] = [
    "plan",
    "ingest",
    "fence",
    "idle",
    "restart",
    "learn",
    "first-call",
    "route-change",
    "rate-limit",
    "scope",
];

fn main() -> anyhow::Result<()> {
    let Some(bench) = Args::parse().bench else {
        return all();
    };
    let figures = match &bench {
        Bench::Plan(flags) => plan::run(flags)?,
        _ if !isolate::is_inside() => return inside(),
        Bench::Scope(flags) => measured(async |lab| scope::run(lab, flags).await)?,
        Bench::Learn(flags) => measured(async |lab| learn::run(lab, flags).await)?,
        Bench::Fence(flags) => measured(async |lab| fence::run(lab, flags).await)?,
        Bench::Idle(flags) => measured(async |lab| idle::idle(lab, flags).await)?,
        Bench::Restart(flags) => measured(async |lab| idle::restart(lab, flags).await)?,
        Bench::RouteChange(flags) => measured(async |lab| route_change::run(lab, flags).await)?,
        Bench::RateLimit(flags) => measured(async |lab| rate_limit::run(lab, flags).await)?,
        Bench::Ingest(flags) => measured(async |lab| ingest::run(lab, flags).await)?,
        Bench::FirstCall(flags) => measured(async |lab| first_call::run(lab, flags).await)?,
    };
    println!("{figures}");
    Ok(())
}

fn measured(
    bench: impl AsyncFnOnce(&mut fenceline_e2e::Lab) -> anyhow::Result<Value>,
) -> anyhow::Result<Value> {
    lab::in_lab("bench", bench)
}

/// The same again, in namespaces of its own.
fn inside() -> anyhow::Result<()> {
    let given: Vec<String> = std::env::args().skip(1).collect();
    let given: Vec<&str> = given.iter().map(String::as_str).collect();
    let status = isolate::command(&given)?.status()?;
    anyhow::ensure!(status.success(), "the bench failed: {status}");
    Ok(())
}

/// Runs all of them, one after the other, and writes the table.
fn all() -> anyhow::Result<()> {
    let mut table = String::from("| bench | figure | value |\n|---|---|---|\n");
    for name in NAMES {
        println!("== {name}");
        let figures = one(name).with_context(|| name.to_owned())?;
        for (figure, value) in figures.as_object().into_iter().flatten() {
            writeln!(table, "| {name} | {figure} | {value} |")?;
        }
    }
    let path = checkout().join("target/bench.md");
    std::fs::write(&path, &table)?;
    println!("\n{table}");
    Ok(())
}

/// Runs one in a process of its own, so that its memory is its own; passes on what it prints.
fn one(name: &str) -> anyhow::Result<Value> {
    let mut child = Command::new(std::env::current_exe()?)
        .arg(name)
        .stdout(Stdio::piped())
        .spawn()?;
    let mut last = String::new();
    let output = child.stdout.take().context("its output")?;
    for line in BufReader::new(output).lines() {
        last = line?;
        println!("{last}");
    }
    let status = child.wait()?;
    anyhow::ensure!(status.success(), "{status}");
    serde_json::from_str(&last).context("its last line")
}
