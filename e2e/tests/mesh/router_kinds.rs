//! Routers of connections, and Routers that make their Service.

use std::time::Duration;

use anyhow::Context;
use fenceline_e2e::app::Protocol;
use fenceline_e2e::fences::Name;
use fenceline_e2e::routers::none_failed;
use fenceline_e2e::traffic::{Target, Traffic};
use fenceline_e2e::wait::{eventually, throughout};
use fenceline_e2e::{Lab, PATIENCE, PodSpec};

const DB: Name<'_> = ("shop", "db");
const PORT: u16 = 5432;

async fn database(lab: &mut Lab, version: &str, branch: &str) -> anyhow::Result<()> {
    let spec = PodSpec::new("shop", &format!("db-{version}"))
        .label("app", "db")
        .label("version", version)
        .label("branch", branch)
        .service_account("db")
        .tcp(PORT);
    lab.pod(spec).await
}

fn connections(versions: &str) -> String {
    format!(
        "{{service: db, protocol: TCP, labels: {{branch: branch}}, change: {{drain: 1s}}, branches: [\
         {{name: main, versions: {versions}}}, {{name: box, versions: {{v7: 1}}, match: [{{sourceBranch: box}}]}}]}}"
    )
}

/// Calls of the database by one of the clients.
fn calls(lab: &Lab, client: &str, target: &Target) -> anyhow::Result<Traffic> {
    let callers = [("shop", client); 8];
    let targets = vec![target.clone()];
    Traffic::start(
        lab,
        &callers,
        targets,
        Duration::from_millis(2),
        |_, _, _| 0,
    )
}

#[test]
fn connections_by_weight_and_by_the_callers_branch() {
    fenceline_e2e::test(async |lab| {
        lab.start_second_istiod().await?;
        lab.install().await?;
        lab.namespace("shop").await?;
        lab.service("shop", "db", &["tcp:5432"]).await?;
        for (version, branch) in [("v1", "main"), ("v2", "main"), ("v7", "box")] {
            database(lab, version, branch).await?;
        }
        lab.pod(PodSpec::new("shop", "client").label("branch", "main"))
            .await?;
        let boxed = PodSpec::new("shop", "boxed").label("branch", "box");
        lab.pod(boxed.second_istiod()).await?;
        let mut target = Target::of(lab, DB, "", Protocol::Tcp, PORT).await?;
        target.answered_by = None;
        lab.router(DB, &connections("{v1: 3, v2: 1}")).await?;
        lab.until_router(DB, "Stable").await?;
        let plain = calls(lab, "client", &target)?;
        let boxed = calls(lab, "boxed", &target)?;
        eventually(PATIENCE * 4, "enough calls", async || {
            anyhow::ensure!(plain.tally().calls() >= 4000);
            Ok(())
        })
        .await?;
        let tally = plain.tally();
        #[expect(clippy::cast_precision_loss, reason = "small numbers")]
        let share = tally.answered["db-v1"] as f64 / tally.calls() as f64;
        println!("{} connections, {share:.4} of them to v1", tally.calls());
        anyhow::ensure!((share - 0.75).abs() < 0.03, "{share}");
        for versions in ["{v2: 1}", "{v1: 1, v2: 1}", "{v1: 1}"] {
            lab.router(DB, &connections(versions)).await?;
            lab.until_router(DB, "Stable").await?;
        }
        let before = plain.tally().answered["db-v2"];
        tokio::time::sleep(Duration::from_secs(1)).await;
        anyhow::ensure!(plain.tally().answered["db-v2"] == before, "v2 is called");
        let boxed = boxed.stop().await?;
        none_failed(&boxed)?;
        anyhow::ensure!(boxed.answered.keys().eq(["db-v7"]), "{:?}", boxed.answered);
        none_failed(&plain.stop().await?)
    });
}

#[test]
fn a_router_makes_its_service_which_goes_with_it() {
    const RATINGS: Name<'_> = ("shop", "ratings");
    fenceline_e2e::test(async |lab| {
        lab.install().await?;
        lab.namespace("shop").await?;
        lab.pod(PodSpec::new("shop", "client")).await?;
        lab.version(RATINGS, "v1", &[]).await?;
        let made = |ports: &str| {
            format!(
                "{{service: ratings, createService: {{selector: {{app: ratings}}, ports: {ports}}}, \
                 branches: [{{name: main, versions: {{v1: 1}}}}], change: {{drain: 1s}}}}"
            )
        };
        lab.router(RATINGS, &made("[{port: 80}]")).await?;
        lab.until_router(RATINGS, "Stable").await?;
        let answered = async |port: u16| {
            eventually(PATIENCE, "it is called", async || {
                let host = format!("ratings.shop:{port}");
                let answer = lab.get(("shop", "client"), Protocol::Http1, &host).await?;
                anyhow::ensure!(answer.report()?.pod == "ratings-v1", "{answer:?}");
                Ok(())
            })
            .await
        };
        answered(80).await?;
        // One more port, which leads to a port of another number.
        lab.router(RATINGS, &made("[{port: 80}, {port: 8080, targetPort: 90}]"))
            .await?;
        lab.until_router(RATINGS, "Stable").await?;
        answered(8080).await?;
        lab.kubectl(&["-n", "shop", "delete", "router", "ratings"])
            .await?;
        eventually(PATIENCE, "the Service is gone", async || {
            let left = lab
                .kubectl(&["-n", "shop", "get", "service", "-o", "name"])
                .await?;
            anyhow::ensure!(left.trim().is_empty(), "{left}");
            Ok(())
        })
        .await?;
        lab.until_unrouted("shop").await?;

        // Somebody else's of this name stays as it is, even if it says the same.
        lab.service("shop", "ratings", &["http:80"]).await?;
        let version = ["-n", "shop", "get", "service", "ratings", "-o", "yaml"];
        let theirs = lab.kubectl(&version).await?;
        lab.router(RATINGS, &made("[{port: 80}]")).await?;
        let said = lab.until_router(RATINGS, "Conflicted").await?;
        println!("{said}");
        anyhow::ensure!(said.contains("Service shop/ratings"), "{said}");
        lab.until_event(RATINGS, "Warning Conflicted").await?;
        throughout(Duration::from_secs(2), "it stays so", async || {
            let status = lab.get_router(RATINGS).await?.status.context("a status")?;
            anyhow::ensure!(status.stage.as_deref() == Some("Conflicted"), "{status:?}");
            Ok(())
        })
        .await?;
        anyhow::ensure!(lab.kubectl(&version).await? == theirs, "it was touched");
        let rules = lab
            .kubectl(&["-n", "shop", "get", "destinationrules", "-o", "name"])
            .await?;
        anyhow::ensure!(rules.trim().is_empty(), "{rules}");
        lab.kubectl(&["-n", "shop", "delete", "service", "ratings"])
            .await?;
        lab.until_router(RATINGS, "Stable")
            .await
            .context("once it is gone")?;
        answered(80).await
    });
}
