//! The operator killed between every two of its writes.

use std::time::Duration;

use anyhow::Context;
use fenceline_e2e::gate::{Closes, Gate, Write};
use fenceline_e2e::install::{OPERATOR, SYSTEM};
use fenceline_e2e::routers::{REVIEWS, load, none_failed};
use fenceline_e2e::traffic::Traffic;
use fenceline_e2e::wait::eventually;
use fenceline_e2e::{Lab, PATIENCE, Signal};

/// More than any change has.
const MOST: usize = 40;
/// Writes that follow a change at once have been made by then.
const AFTERWARDS: Duration = Duration::from_secs(1);
/// Less than an istiod may take until it is left out.
const STOPPED: Duration = Duration::from_secs(4);

fn only(version: &str) -> String {
    format!(
        "{{service: reviews, branches: [{{name: main, versions: {{{version}: 1}}}}], change: {{drain: 1s}}}}"
    )
}

#[test]
fn no_request_fails_wherever_the_operator_is_killed() {
    fenceline_e2e::test(async |lab| {
        let gate = Gate::start().await?;
        lab.operator_server = Gate::server();
        lab.routed_mesh(&["v1", "v2"]).await?;
        lab.router(REVIEWS, &only("v1")).await?;
        lab.until_router(REVIEWS, "Stable").await?;
        let traffic = load(lab, lab.reviews().await?, 8, Duration::from_millis(10))?;
        let mut versions = ["v2", "v1"].into_iter().cycle();
        let mut points = Vec::new();
        for closes in [Closes::Before, Closes::After] {
            for number in 1..=MOST {
                let version = versions.next().unwrap_or_default();
                gate.close_at(number, closes);
                lab.router(REVIEWS, &only(version)).await?;
                let met = until_met_or_done(lab, &gate).await?;
                let stage = lab.get_router(REVIEWS).await?.status;
                let stage = stage.and_then(|status| status.stage).unwrap_or_default();
                lab.running_mut(SYSTEM, OPERATOR)?.app()?.kill().await?;
                gate.open();
                lab.running_mut(SYSTEM, OPERATOR)?.start_app()?;
                lab.operator_ready(OPERATOR).await?;
                lab.until_router(REVIEWS, "Stable").await?;
                until_answered_by(&traffic, version).await?;
                let failed = traffic.tally().failed.len();
                let Some(write) = met else {
                    anyhow::ensure!(number > 3, "a change of {} writes", number - 1);
                    println!("{closes:?}: a change has {} writes", number - 1);
                    break;
                };
                anyhow::ensure!(number < MOST, "a change has no end");
                let point = format!("{closes:?} write {number}, {}, at {stage}", named(&write));
                println!("{:.1?}: {point}: {failed} failed", traffic.elapsed());
                points.push(point);
            }
        }
        println!("{} fault points", points.len());
        for (written, closes) in [
            ("destinationrules", Closes::Before),
            ("destinationrules", Closes::After),
            ("virtualservices", Closes::Before),
            ("virtualservices", Closes::After),
        ] {
            let mut points = points.iter();
            let covered = points
                .any(|point| point.starts_with(&format!("{closes:?} ")) && point.contains(written));
            anyhow::ensure!(covered, "no point {closes:?} a write of {written}");
        }
        none_failed(&traffic.stop().await?)
    });
}

/// Whoever leads next knows that nobody has what was stored a moment ago, although status still says that all was well.
#[test]
fn what_one_istiod_has_not_sent_is_waited_for_by_the_next_leader() {
    fenceline_e2e::test(async |lab| {
        let gate = Gate::start().await?;
        lab.operator_server = Gate::server();
        lab.routed_mesh(&["v1", "v2"]).await?;
        lab.router(REVIEWS, &only("v1")).await?;
        lab.until_router(REVIEWS, "Stable").await?;
        let traffic = load(lab, lab.reviews().await?, 8, Duration::from_millis(10))?;
        let istiod = |lab: &Lab, signal| {
            let istiod = lab.control_plane.second_istiod.as_ref();
            istiod.context("a second istiod")?.signal(signal)
        };
        istiod(lab, Signal::STOP)?;
        gate.close_at(1, Closes::After);
        lab.router(REVIEWS, &only("v2")).await?;
        let write = gate.until_met(PATIENCE).await?;
        anyhow::ensure!(write.kind == "destinationrules", "{write:?}");
        lab.running_mut(SYSTEM, OPERATOR)?.app()?.kill().await?;
        let status = lab.get_router(REVIEWS).await?.status.context("a status")?;
        anyhow::ensure!(status.stage.as_deref() == Some("Stable"), "{status:?}");
        gate.open();
        lab.running_mut(SYSTEM, OPERATOR)?.start_app()?;
        lab.operator_ready(OPERATOR).await?;
        lab.never_routed_to("v2", STOPPED).await?;
        istiod(lab, Signal::CONT)?;
        lab.until_router(REVIEWS, "Stable").await?;
        until_answered_by(&traffic, "v2").await?;
        none_failed(&traffic.stop().await?)
    });
}

/// The write at which the gate closed, or nothing once a change is done without.
async fn until_met_or_done(lab: &Lab, gate: &Gate) -> anyhow::Result<Option<Write>> {
    tokio::select! {
        met = gate.until_met(PATIENCE * 3) => met.map(Some),
        done = lab.until_router(REVIEWS, "Stable") => {
            done?;
            Ok(gate.until_met(AFTERWARDS).await.ok())
        }
    }
}

/// Waits until nobody but the version answers.
async fn until_answered_by(traffic: &Traffic, version: &str) -> anyhow::Result<()> {
    let pod = format!("reviews-{version}");
    eventually(PATIENCE, "the new version answers alone", async || {
        let before = traffic.tally().answered;
        tokio::time::sleep(Duration::from_millis(200)).await;
        let after = traffic.tally().answered;
        let grew = after
            .iter()
            .filter(|(pod, answers)| before.get(*pod) != Some(answers));
        let grew: Vec<&String> = grew.map(|(pod, _)| pod).collect();
        anyhow::ensure!(grew == [&pod], "{grew:?} answer");
        Ok(())
    })
    .await
}

/// A write by what it does.
fn named(write: &Write) -> String {
    let subsets = write.body["spec"]["subsets"].as_array();
    let subsets = subsets.into_iter().flatten();
    let subsets: Vec<&str> = subsets
        .filter_map(|subset| subset["name"].as_str())
        .collect();
    let says = match write.body["status"]["stage"].as_str() {
        Some(stage) => format!(" {stage}"),
        None if subsets.is_empty() => String::new(),
        None => format!(" with {}", subsets.join(", ")),
    };
    format!("{} {} {}{says}", write.verb, write.kind, write.name)
}
