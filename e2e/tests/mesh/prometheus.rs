//! Prometheus as evidence: what is known from the start, what stays known, what is forgotten, and what is not.

use std::time::{Duration, Instant};

use fenceline_crds::Evidence;
use fenceline_e2e::app::{Call, Protocol};
use fenceline_e2e::guard::{GUARDED, SLOW, TOKEN, WRONG};
use fenceline_e2e::install::{OPERATOR, SYSTEM};
use fenceline_e2e::pods::request;
use fenceline_e2e::prometheus::URL;
use fenceline_e2e::wait::eventually;
use fenceline_e2e::{Lab, PATIENCE};

const CLIENT: (&str, &str) = ("shop", "client");
const REVIEWS: &str = "reviews.shop.svc.cluster.local";
const LEDGER: &str = "ledger.bank.svc.cluster.local";

const CALLS: [&str; 2] = ["reviews:9080", "ledger.bank:80"];

/// A mesh in which a client has called two services before Fenceline was there.
async fn mesh(lab: &mut Lab, flags: &[&str]) -> anyhow::Result<[Call; 2]> {
    running(lab).await?;
    let url = format!("--prometheus-url={URL}");
    lab.operator_args = [&[url.as_str(), "--prometheus-interval=2s"], flags]
        .concat()
        .iter()
        .map(|flag| (*flag).to_owned())
        .collect();
    lab.install().await?;
    Ok([
        request(
            Protocol::Http1,
            CALLS[0],
            lab.resolve("shop", "reviews", 9080).await?,
        ),
        request(
            Protocol::Http1,
            CALLS[1],
            lab.resolve("bank", "ledger", 80).await?,
        ),
    ])
}

/// The mesh before Fenceline is there.
async fn running(lab: &mut Lab) -> anyhow::Result<()> {
    for namespace in ["shop", "bank"] {
        lab.namespace(namespace).await?;
    }
    lab.workload(CLIENT, &[80]).await?;
    lab.workload(("shop", "reviews"), &[9080]).await?;
    lab.workload(("bank", "ledger"), &[80]).await?;
    lab.start_prometheus().await?;
    for authority in CALLS {
        lab.until_direct(CLIENT, Protocol::Http1, authority).await?;
    }
    until_counted(lab, LEDGER).await
}

async fn until_counted(lab: &Lab, host: &str) -> anyhow::Result<()> {
    eventually(
        PATIENCE,
        &format!("calls to {host} are counted"),
        async || {
            let query = format!(
                "istio_requests_total{{source_workload='client', destination_service='{host}'}} > 0"
            );
            anyhow::ensure!(!lab.query_prometheus(&query).await?.is_empty());
            Ok(())
        },
    )
    .await
}

/// The evidence for each host of the client's fence.
async fn known(lab: &Lab) -> anyhow::Result<Vec<(String, Vec<Evidence>)>> {
    let status = lab.get_fence(CLIENT).await?.status.unwrap_or_default();
    let dependencies = status.dependencies.into_iter();
    Ok(dependencies
        .map(|known| (known.host, known.evidence))
        .collect())
}

async fn until_policy_says(lab: &Lab, type_: &str, reason: &str) -> anyhow::Result<()> {
    let path = format!("jsonpath={{.status.conditions[?(@.type==\"{type_}\")].reason}}");
    eventually(
        PATIENCE,
        &format!("the policy's {type_} is {reason}"),
        async || {
            let said = lab
                .kubectl(&["get", "fencepolicy", "every", "-o", &path])
                .await?;
            anyhow::ensure!(said == reason, "{said}");
            Ok(())
        },
    )
    .await
}

async fn policy(lab: &Lab, spec: &str) -> anyhow::Result<()> {
    lab.apply(&format!(
        "{{apiVersion: fenceline.dev/v1alpha1, kind: FencePolicy, metadata: {{name: every}}, \
         spec: {{namespaceSelector: {{}}, {spec}}}}}"
    ))
    .await
}

#[test]
fn a_running_mesh_is_known_before_the_first_call() {
    fenceline_e2e::test(async |lab| {
        let calls = mesh(lab, &[]).await?;
        policy(lab, "template: {mode: Enforce}").await?;
        lab.until_reason(CLIENT, "Enforced").await?;
        let seen = vec![Evidence::Prometheus];
        let want = [
            (LEDGER.to_owned(), seen.clone()),
            (REVIEWS.to_owned(), seen),
        ];
        anyhow::ensure!(known(lab).await? == want, "{:?}", known(lab).await?);
        lab.until_forgotten(CLIENT, "client.shop.svc.cluster.local")
            .await?;
        for call in &calls {
            let report = lab.call(CLIENT, call).await?.report()?;
            anyhow::ensure!(report.peer() == Some("spiffe://cluster.local/ns/shop/sa/client"));
        }
        let first = lab
            .metric(OPERATOR, "fenceline_first_calls_total", "")
            .await?;
        anyhow::ensure!(first < 0.5, "{first} first calls");
        until_policy_says(lab, "PrometheusHealthy", "Healthy").await?;

        // A fence that is made later knows the past too.
        lab.kubectl(&["-n", "shop", "delete", "servicefence", "client"])
            .await?;
        lab.until_reason(CLIENT, "Enforced").await?;
        anyhow::ensure!(known(lab).await? == want, "{:?}", known(lab).await?);

        // Gone: nothing is lost, and it is said.
        lab.stop_prometheus().await?;
        until_policy_says(lab, "PrometheusHealthy", "Failing").await?;
        anyhow::ensure!(known(lab).await? == want);
        lab.start_prometheus().await?;
        until_policy_says(lab, "PrometheusHealthy", "Healthy").await
    });
}

#[test]
fn prometheus_behind_a_guard_slow_or_wrong() {
    fenceline_e2e::test(async |lab| {
        running(lab).await?;
        let guard = lab.guard_prometheus()?;
        let identity = format!("--prometheus-identity-file={}", guard.identity.display());
        let stranger = |url: &str| {
            vec![
                format!("--prometheus-url={url}"),
                format!("--prometheus-token-file={}", guard.token.display()),
                format!("--prometheus-ca-file={}", guard.authority.display()),
                "--prometheus-interval=2s".to_owned(),
                "--prometheus-timeout=3s".to_owned(),
            ]
        };
        let at = |url: &str| [stranger(url), vec![identity.clone()]].concat();
        lab.operator_args = at(GUARDED);
        lab.install().await?;
        policy(lab, "template: {mode: Enforce}").await?;
        lab.until_reason(CLIENT, "Enforced").await?;
        let known_before = known(lab).await?;
        anyhow::ensure!(known_before.len() == 2, "{known_before:?}");
        until_policy_says(lab, "PrometheusHealthy", "Healthy").await?;

        // A token that is changed is read again; one that is wrong is told.
        std::fs::write(&guard.token, "tunafish")?;
        until_failing(lab, "403").await?;
        std::fs::write(&guard.token, TOKEN)?;
        until_policy_says(lab, "PrometheusHealthy", "Healthy").await?;

        for (flags, why) in [
            (at(SLOW), "timed out"),
            (at(WRONG), "Log in"),
            (stranger(GUARDED), "ertificate"),
        ] {
            lab.delete_pod(SYSTEM, OPERATOR).await?;
            lab.operator_args = flags;
            lab.start_operator(OPERATOR).await?;
            until_failing(lab, why).await?;
            let known = known(lab).await?;
            anyhow::ensure!(known == known_before, "{known:?}");
        }
        Ok(())
    });
}

/// Waits until the policy says that Prometheus fails, and why.
async fn until_failing(lab: &Lab, why: &str) -> anyhow::Result<()> {
    eventually(PATIENCE, &format!("the policy says: {why}"), async || {
        let path = "jsonpath={.status.conditions[?(@.type==\"PrometheusHealthy\")]}";
        let said = lab
            .kubectl(&["get", "fencepolicy", "every", "-o", path])
            .await?;
        anyhow::ensure!(said.contains("Failing") && said.contains(why), "{said}");
        println!("{said}");
        Ok(())
    })
    .await
}

#[test]
fn a_fence_that_observes_is_promoted_once_nothing_new_is_learnt() {
    fenceline_e2e::test(async |lab| {
        let [reviews, _] = mesh(lab, &["--prometheus-window=20s"]).await?;
        let start = Instant::now();
        policy(
            lab,
            "template: {mode: Observe}, promote: {after: 8s, quietFor: 5s}",
        )
        .await?;
        let message = lab.until_reason(CLIENT, "Observing").await?;
        println!("{message}");
        let lab = &*lab;
        let traffic = async {
            loop {
                lab.call(CLIENT, &reviews).await?;
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
        };
        tokio::select! {
            enforced = lab.until_reason(CLIENT, "Enforced") => drop(enforced?),
            ended = traffic => return ended,
        }
        let took = start.elapsed();
        anyhow::ensure!(took > Duration::from_secs(8), "after {took:?}");
        lab.until_direct(CLIENT, Protocol::Http1, "reviews:9080")
            .await
            .map(drop)
    });
}

#[test]
fn what_is_not_called_is_forgotten_and_what_is_not_known_is_not() {
    fenceline_e2e::test(async |lab| {
        let [reviews, ledger] = mesh(lab, &["--prometheus-window=15s"]).await?;
        lab.fence(CLIENT, "{retention: {unusedFor: 1m}}").await?;
        lab.until_reason(CLIENT, "Enforced").await?;
        lab.call(CLIENT, &ledger).await?.report()?;
        let start = Instant::now();
        let lab_ = &*lab;
        let traffic = async {
            loop {
                let outcome = lab_.call(CLIENT, &reviews).await?;
                anyhow::ensure!(outcome.status == 200, "{outcome:?}");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        };
        let gone = async {
            loop {
                let known = known(lab_).await?;
                if known.iter().all(|(host, _)| host != LEDGER) {
                    return anyhow::Ok(());
                }
                anyhow::ensure!(start.elapsed() < Duration::from_secs(150), "{known:?}");
                tokio::time::sleep(Duration::from_millis(500)).await;
            }
        };
        tokio::select! {
            gone = gone => gone?,
            ended = traffic => return ended,
        }
        println!("forgotten {:.0?} after its last call", start.elapsed());
        anyhow::ensure!(start.elapsed() > Duration::from_secs(60));
        let hosts: Vec<String> = known(lab)
            .await?
            .into_iter()
            .map(|(host, _)| host)
            .collect();
        anyhow::ensure!(hosts == [REVIEWS], "{hosts:?}");
        let events = lab
            .kubectl(&["-n", "shop", "get", "events", "-o", "wide"])
            .await?;
        anyhow::ensure!(
            events.contains("Forgot") && events.contains(LEDGER),
            "{events}"
        );
        // A call brings it back.
        lab.until_forgotten(CLIENT, LEDGER).await?;
        lab.held_call(CLIENT, Protocol::Http1, "ledger.bank:80")
            .await
            .map(drop)
    });
}
