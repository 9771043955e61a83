//! Routers under load, with two istiods and real proxies.

use std::time::Duration;

use anyhow::Context;
use fenceline_crds::BranchStatus;
use fenceline_e2e::app::Protocol;
use fenceline_e2e::fences::Name;
use fenceline_e2e::install::{OPERATOR, SYSTEM};
use fenceline_e2e::pods::request;
use fenceline_e2e::routers::{CLIENTS, REVIEWS, load, none_failed};
use fenceline_e2e::traffic::{Tally, Traffic};
use fenceline_e2e::wait::eventually;
use fenceline_e2e::{Lab, PATIENCE, PodSpec};

/// Eight callers of the service.
async fn callers(lab: &Lab) -> anyhow::Result<Traffic> {
    load(lab, lab.reviews().await?, 8, Duration::from_millis(10))
}

fn versions(versions: &str) -> String {
    format!(
        "{{service: reviews, branches: [{{name: main, versions: {versions}}}], change: {{drain: 2s}}}}"
    )
}

const WITH_A_BRANCH: &str = "{service: reviews, change: {drain: 2s}, branches: [{name: main, versions: {v1: 1}}, \
    {name: box, versions: {v2: 1}, match: [{header: {name: x-branch, exact: box}}]}]}";

#[test]
fn a_version_comes_and_another_goes_without_a_failed_request() {
    fenceline_e2e::test(async |lab| {
        lab.routed_mesh(&["v1"]).await?;
        let mut targets = lab.reviews().await?;
        let mut boxed = targets.clone();
        for target in &mut boxed {
            let header = ("x-branch".to_owned(), "box".to_owned());
            target.call.headers.extend([header]);
        }
        targets.extend(boxed);
        let traffic = load(lab, targets, 8, Duration::from_millis(10))?;
        lab.router(REVIEWS, &versions("{v1: 1}")).await?;
        lab.until_router(REVIEWS, "Stable").await?;
        lab.version(REVIEWS, "v2", &[]).await?;
        lab.router(REVIEWS, WITH_A_BRANCH).await?;
        lab.until_router(REVIEWS, "Stable").await?;
        println!("{:.1?}: a branch", traffic.elapsed());
        let header = [("x-branch", "box")];
        let client = CLIENTS[0];
        for (headers, pod) in [(&header[..], "reviews-v2"), (&[], "reviews-v1")] {
            let answered = answered_by(lab, client, headers).await?;
            anyhow::ensure!(answered == pod, "{headers:?}: {answered}");
        }
        lab.router(REVIEWS, &versions("{v1: 1}")).await?;
        lab.until_router(REVIEWS, "Stable").await?;
        println!("{:.1?}: and none", traffic.elapsed());
        let answered = answered_by(lab, client, &header).await?;
        anyhow::ensure!(answered == "reviews-v1", "{answered}");
        for weights in ["{v1: 99, v2: 1}", "{v1: 1, v2: 1}", "{v2: 1}"] {
            lab.router(REVIEWS, &versions(weights)).await?;
            lab.until_router(REVIEWS, "Stable").await?;
            println!("{:.1?}: {weights}", traffic.elapsed());
        }
        let before = traffic.tally();
        tokio::time::sleep(Duration::from_secs(2)).await;
        let after = traffic.tally();
        let of = |tally: &Tally, pod: &str| tally.answered.get(pod).copied().unwrap_or_default();
        anyhow::ensure!(
            of(&before, "reviews-v1") == of(&after, "reviews-v1"),
            "v1 is still called"
        );
        anyhow::ensure!(of(&after, "reviews-v2") > of(&before, "reviews-v2"));
        lab.kubectl(&["-n", "shop", "delete", "router", "reviews"])
            .await?;
        lab.until_unrouted("shop").await?;
        none_failed(&traffic.stop().await?)
    });
}

#[test]
fn each_version_gets_its_share() {
    fenceline_e2e::test(async |lab| {
        lab.routed_mesh(&["v1", "v2", "v3"]).await?;
        let mixes = [
            [("v1", 70), ("v2", 20), ("v3", 10)],
            [("v1", 1), ("v2", 2), ("v3", 0)],
            [("v1", 7), ("v2", 11), ("v3", 13)],
        ];
        for mix in mixes {
            let weights = mix.map(|(version, weight)| format!("{version}: {weight}"));
            let weights = format!("{{{}}}", weights.join(", "));
            lab.router(REVIEWS, &versions(&weights)).await?;
            lab.until_router(REVIEWS, "Stable").await?;
            let traffic = load(lab, lab.reviews().await?, 24, Duration::ZERO)?;
            eventually(PATIENCE * 6, "enough calls", async || {
                anyhow::ensure!(traffic.tally().calls() >= 10_000);
                Ok(())
            })
            .await?;
            println!("{:.1?}: {weights}", traffic.elapsed());
            let tally = traffic.stop().await?;
            none_failed(&tally)?;
            let all: f64 = mix.iter().map(|(_, weight)| f64::from(*weight)).sum();
            for (version, weight) in mix {
                let answers = tally.answered.get(&format!("reviews-{version}"));
                #[expect(clippy::cast_precision_loss, reason = "small numbers")]
                let share = answers.copied().unwrap_or_default() as f64 / tally.calls() as f64;
                let wanted = f64::from(weight) / all;
                println!("{version}: {share:.4}, wanted {wanted:.4}");
                anyhow::ensure!((share - wanted).abs() < 0.02, "{version} has {share:.4}");
                anyhow::ensure!(weight > 0 || share == 0.0, "{version} is called");
            }
        }
        Ok(())
    });
}

/// Makes a call from a client, with headers; says which pod answered.
async fn answered_by(
    lab: &Lab,
    from: Name<'_>,
    headers: &[(&str, &str)],
) -> anyhow::Result<String> {
    let connect = lab.resolve("shop", "reviews", 80).await?;
    let mut call = request(Protocol::Http1, "reviews.shop:80", connect);
    for (name, value) in headers {
        call.headers.insert((*name).to_owned(), (*value).to_owned());
    }
    Ok(lab.call(from, &call).await?.report()?.pod)
}

const BRANCHES: &str = "{service: reviews, labels: {branch: branch}, change: {drain: 1s}, branches: [\
    {name: main, versions: {v1: 1}}, \
    {name: box, versions: {v7: 1}, match: [{header: {name: x-branch, exact: box}}, {sourceBranch: box}]}]}";

/// What became of the branch `box`.
async fn box_branch(lab: &Lab) -> anyhow::Result<BranchStatus> {
    let status = lab.get_router(REVIEWS).await?.status.context("no status")?;
    let mut branches = status.branches.into_iter();
    branches
        .find(|branch| branch.name == "box")
        .context("no branch")
}

#[test]
fn a_branch_by_header_and_by_caller_that_falls_back_to_the_base() {
    fenceline_e2e::test(async |lab| {
        lab.install().await?;
        lab.namespace("shop").await?;
        lab.service("shop", "reviews", &["http:80", "grpc:90"])
            .await?;
        lab.version(REVIEWS, "v1", &[("branch", "main")]).await?;
        lab.pod(PodSpec::new("shop", "client")).await?;
        lab.pod(PodSpec::new("shop", "boxed").label("branch", "box"))
            .await?;
        let (client, boxed) = (("shop", "client"), ("shop", "boxed"));
        let header: &[(&str, &str)] = &[("x-branch", "box")];
        lab.router(REVIEWS, BRANCHES).await?;
        lab.until_router(REVIEWS, "Stable").await?;
        // Nothing of the branch is there yet.
        for (from, headers) in [(client, header), (boxed, &[])] {
            anyhow::ensure!(answered_by(lab, from, headers).await? == "reviews-v1");
        }
        let said = box_branch(lab).await?;
        anyhow::ensure!(said.message.contains("no ready endpoints"), "{said:?}");

        lab.version(REVIEWS, "v7", &[("branch", "box")]).await?;
        for (from, headers, pod) in [
            (client, header, "reviews-v7"),
            (boxed, &[][..], "reviews-v7"),
            (client, &[][..], "reviews-v1"),
        ] {
            eventually(PATIENCE, "the branch is reached", async || {
                let answered = answered_by(lab, from, headers).await?;
                anyhow::ensure!(answered == pod, "{from:?} {headers:?}: {answered}");
                Ok(())
            })
            .await?;
        }
        lab.delete_pod("shop", "reviews-v7").await?;
        eventually(PATIENCE, "its requests go to the base", async || {
            let answered = answered_by(lab, client, header).await?;
            anyhow::ensure!(answered == "reviews-v1", "{answered}");
            Ok(())
        })
        .await?;
        lab.version(REVIEWS, "v7", &[("branch", "box")]).await?;
        eventually(PATIENCE, "it is back", async || {
            let answered = answered_by(lab, client, header).await?;
            anyhow::ensure!(answered == "reviews-v7", "{answered}");
            Ok(())
        })
        .await?;
        // By the caller alone, which nobody else's proxy is told.
        let by_caller = BRANCHES.replace("{header: {name: x-branch, exact: box}}, ", "");
        lab.router(REVIEWS, &by_caller).await?;
        lab.until_router(REVIEWS, "Stable").await?;
        for (from, pod) in [(client, "reviews-v1"), (boxed, "reviews-v7")] {
            anyhow::ensure!(answered_by(lab, from, header).await? == pod);
        }
        lab.router(REVIEWS, BRANCHES).await?;
        lab.until_router(REVIEWS, "Stable").await?;
        // Its time is over: the label is still there, the branch is not.
        let timed = BRANCHES.replace("{v7: 1}, match", "{v7: 1}, ttl: 1s, match");
        lab.router(REVIEWS, &timed).await?;
        eventually(PATIENCE, "it went by itself", async || {
            let said = box_branch(lab).await?;
            anyhow::ensure!(said.message.contains("ttl"), "{said:?}");
            let answered = answered_by(lab, client, header).await?;
            anyhow::ensure!(answered == "reviews-v1", "{answered}");
            Ok(())
        })
        .await
    });
}

/// What the VirtualService of the service says.
async fn routes(lab: &Lab) -> anyhow::Result<String> {
    let object = "virtualservice/fenceline-reviews";
    lab.kubectl(&["-n", "shop", "get", object, "-o", "jsonpath={.spec}"])
        .await
}

#[test]
fn a_change_that_proxies_refuse_is_taken_back_and_said() {
    fenceline_e2e::test(async |lab| {
        lab.routed_mesh(&["v1"]).await?;
        lab.router(REVIEWS, &versions("{v1: 1}")).await?;
        lab.until_router(REVIEWS, "Stable").await?;
        let good = routes(lab).await?;
        let traffic = callers(lab).await?;
        // istiod passes it on; Envoy has no such command.
        let wrong = "{service: reviews, http: {headers: {request: {set: {x-wrong: '%NO_SUCH_COMMAND()%'}}}}}";
        lab.traffic_patch(("shop", "wrong"), wrong).await?;
        let said = lab.until_router(REVIEWS, "Refused").await?;
        println!("{said}");
        anyhow::ensure!(
            said.contains("client-") && said.contains("NO_SUCH_COMMAND"),
            "{said}"
        );
        let now = routes(lab).await?;
        anyhow::ensure!(now == good, "{now}, not {good}");
        lab.until_event(REVIEWS, "Warning Refused").await?;
        lab.kubectl(&["-n", "shop", "delete", "trafficpatch", "wrong"])
            .await?;
        lab.until_router(REVIEWS, "Stable").await?;
        none_failed(&traffic.stop().await?)
    });
}

#[test]
fn two_teams_patches_on_one_service_and_somebody_elses_route() {
    fenceline_e2e::test(async |lab| {
        lab.install().await?;
        lab.namespace("shop").await?;
        lab.service("shop", "reviews", &["http:80", "grpc:90"])
            .await?;
        lab.version(REVIEWS, "v1", &[]).await?;
        lab.pod(PodSpec::new("shop", "client")).await?;
        let client = ("shop", "client");
        let patches = [
            (
                "slow",
                "{service: reviews, http: {timeout: 5s, headers: {request: {set: {x-team: slow}}}}}",
            ),
            (
                "fault",
                "{service: reviews, priority: 10, match: [{headers: [{name: x-break, exact: yes}]}], \
                       http: {fault: {abort: {httpStatus: 418, percentage: {value: 100}}}, headers: {request: {set: {x-team: fault}}}}}",
            ),
            (
                "pool",
                "{service: reviews, destination: {connectionPool: {http: {maxRequestsPerConnection: 7}}}}",
            ),
        ];
        for (name, spec) in patches {
            let spec = spec.replace("exact: yes", "exact: 'yes'");
            lab.traffic_patch(("shop", name), &spec).await?;
        }
        for (name, _) in patches {
            lab.until_patch(("shop", name), "Stable").await?;
        }
        let connect = lab.resolve("shop", "reviews", 80).await?;
        let mut call = request(Protocol::Http1, "reviews.shop:80", connect);
        let report = lab.call(client, &call).await?.report()?;
        anyhow::ensure!(
            report
                .headers
                .get("x-team")
                .is_some_and(|team| team == "slow"),
            "{report:?}"
        );
        call.headers.insert("x-break".into(), "yes".into());
        let outcome = lab.call(client, &call).await?;
        anyhow::ensure!(outcome.status == 418, "{outcome:?}");
        let status = lab
            .get_traffic_patch(("shop", "slow"))
            .await?
            .status
            .context("no status")?;
        let lost: Vec<String> = status
            .lost
            .iter()
            .map(|lost| format!("{} to {}", lost.field, lost.patch))
            .collect();
        anyhow::ensure!(
            lost == ["http.headers.request.set.x-team to fault"],
            "{lost:?}"
        );

        // What somebody else wrote is not touched.
        lab.service("shop", "ratings", &["http:80"]).await?;
        let theirs = "{apiVersion: networking.istio.io/v1, kind: VirtualService, metadata: {name: theirs, namespace: shop}, \
                      spec: {hosts: [ratings], http: [{route: [{destination: {host: ratings}}]}]}}";
        lab.apply(theirs).await?;
        let ratings = ("shop", "ratings");
        lab.router(
            ratings,
            "{service: ratings, branches: [{name: main, versions: {v1: 1}}]}",
        )
        .await?;
        let said = lab.until_router(ratings, "Conflicted").await?;
        anyhow::ensure!(said.contains("VirtualService shop/theirs"), "{said}");
        lab.until_event(ratings, "Warning Conflicted").await?;
        lab.kubectl(&["-n", "shop", "delete", "virtualservice", "theirs"])
            .await?;
        lab.until_router(ratings, "Stable").await?;
        lab.until_event(ratings, "Normal NoConflict").await
    });
}

#[test]
fn a_sandbox_opens_once_every_service_of_it_is_ready() {
    fenceline_e2e::test(async |lab| {
        lab.install().await?;
        lab.namespace("shop").await?;
        lab.pod(PodSpec::new("shop", "client")).await?;
        let ratings = ("shop", "ratings");
        for service in [REVIEWS, ratings] {
            lab.service(service.0, service.1, &["http:80", "grpc:90"])
                .await?;
            lab.version(service, "v1", &[("branch", "main")]).await?;
        }
        lab.version(REVIEWS, "v7", &[("branch", "box")]).await?;
        lab.router(ratings, &BRANCHES.replace("reviews", "ratings"))
            .await?;
        lab.router(REVIEWS, BRANCHES).await?;
        lab.until_router(REVIEWS, "Stable").await?;
        let header: &[(&str, &str)] = &[("x-branch", "box")];
        for _ in 0..20 {
            let answered = answered_by(lab, ("shop", "client"), header).await?;
            anyhow::ensure!(
                answered == "reviews-v1",
                "{answered}: ratings has no such branch yet"
            );
        }
        lab.version(ratings, "v7", &[("branch", "box")]).await?;
        eventually(PATIENCE, "the sandbox is open", async || {
            let answered = answered_by(lab, ("shop", "client"), header).await?;
            anyhow::ensure!(answered == "reviews-v7", "{answered}");
            Ok(())
        })
        .await
    });
}

#[test]
fn the_operator_and_an_istiod_die_in_the_middle_of_changes() {
    fenceline_e2e::test(async |lab| {
        lab.routed_mesh(&["v1", "v2"]).await?;
        lab.router(REVIEWS, &versions("{v1: 1}")).await?;
        lab.until_router(REVIEWS, "Stable").await?;
        let traffic = callers(lab).await?;
        // Between every two writes, and while each is on its way.
        for (change, delay) in [0, 60, 120, 180, 250, 350, 500, 900, 1500]
            .into_iter()
            .enumerate()
        {
            lab.router(REVIEWS, &versions(["{v2: 1}", "{v1: 1}"][change % 2]))
                .await?;
            tokio::time::sleep(Duration::from_millis(delay)).await;
            lab.running_mut(SYSTEM, OPERATOR)?.app()?.kill().await?;
            lab.running_mut(SYSTEM, OPERATOR)?.start_app()?;
            lab.operator_ready(OPERATOR).await?;
            lab.until_router(REVIEWS, "Stable").await?;
            println!(
                "{:.1?}: killed after {delay} ms, {} failed",
                traffic.elapsed(),
                traffic.tally().failed.len()
            );
        }
        // Two changes at once, and back again before either is done.
        for weights in ["{v1: 1, v2: 1}", "{v2: 1}", "{v1: 1}"] {
            lab.router(REVIEWS, &versions(weights)).await?;
            tokio::time::sleep(Duration::from_millis(150)).await;
        }
        lab.until_router(REVIEWS, "Stable").await?;
        println!("{:.1?}: rolled back in the middle", traffic.elapsed());
        lab.router(REVIEWS, &versions("{v2: 1}")).await?;
        let istiod = lab
            .control_plane
            .second_istiod
            .as_mut()
            .context("a second istiod")?;
        istiod.kill().await?;
        tokio::time::sleep(Duration::from_secs(2)).await;
        lab.control_plane.start_second_istiod().await?;
        lab.until_router(REVIEWS, "Stable").await?;
        println!("{:.1?}: an istiod died", traffic.elapsed());
        none_failed(&traffic.stop().await?)
    });
}
