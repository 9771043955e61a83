//! Fences for every namespace, by policy and by label.

use std::time::{Duration, Instant};

use fenceline_crds::ServiceFence;
use fenceline_e2e::app::Protocol;
use fenceline_e2e::pods::request;
use fenceline_e2e::wait::eventually;
use fenceline_e2e::{Lab, PATIENCE, PodSpec};
use kube::{Api, ResourceExt};

const CLIENT: (&str, &str) = ("shop", "client");
const POLICY: &str =
    "{apiVersion: fenceline.dev/v1alpha1, kind: FencePolicy, metadata: {name: every}, spec: ";

async fn mesh(lab: &mut Lab) -> anyhow::Result<()> {
    lab.install().await?;
    for namespace in ["shop", "bank"] {
        lab.namespace(namespace).await?;
    }
    lab.workload(CLIENT, &[80]).await?;
    lab.workload(("shop", "reviews"), &[9080]).await?;
    lab.workload(("bank", "ledger"), &[80]).await?;
    lab.until_direct(CLIENT, Protocol::Http1, "ledger.bank:80")
        .await
        .map(drop)
}

/// Waits until these fences, and no others, are there and say so.
async fn until_fenced(lab: &Lab, want: &[&str]) -> anyhow::Result<()> {
    let api: Api<ServiceFence> = Api::all(lab.client.clone());
    eventually(PATIENCE, &format!("fences {want:?}"), async || {
        let fences = api.list(&Default::default()).await?;
        let mut have: Vec<String> = Vec::new();
        for fence in fences {
            let status = fence.status.clone().unwrap_or_default();
            let ready = status.conditions.iter().find(|said| said.type_ == "Ready");
            let reason = ready.map_or("", |ready| ready.reason.as_str());
            have.push(format!(
                "{}/{} {reason}",
                fence.namespace().unwrap_or_default(),
                fence.name_any()
            ));
        }
        anyhow::ensure!(have == want, "there are {have:?}");
        Ok(())
    })
    .await
}

async fn label(lab: &Lab, what: &[&str], value: &str) -> anyhow::Result<()> {
    let label = format!("fenceline.dev/fence{value}");
    let args = [&["label", "--overwrite"], what, &[label.as_str()]].concat();
    lab.kubectl(&args).await.map(drop)
}

#[test]
fn switched_on_and_off_while_calls_go_on() {
    fenceline_e2e::test(async |lab| {
        mesh(lab).await?;
        let calls = [
            ("reviews:9080", lab.resolve("shop", "reviews", 9080).await?),
            ("ledger.bank:80", lab.resolve("bank", "ledger", 80).await?),
        ]
        .map(|(authority, to)| request(Protocol::Http1, authority, to));
        let (calls, lab) = (&calls, &*lab);
        let done = std::cell::Cell::new(false);
        let traffic = async {
            let (mut made, start) = (0, Instant::now());
            while !done.get() {
                for call in calls {
                    let outcome = lab.call(CLIENT, call).await?;
                    made += 1;
                    anyhow::ensure!(
                        outcome.status == 200,
                        "call {made}, after {:?}: {outcome:?}",
                        start.elapsed()
                    );
                }
            }
            println!("{made} calls, none failed");
            anyhow::Ok(())
        };
        let switch = async {
            lab.apply(&format!("{POLICY} {{namespaceSelector: {{}}}}}}"))
                .await?;
            let all = [
                "bank/ledger Enforced",
                "shop/client Enforced",
                "shop/reviews Enforced",
            ];
            until_fenced(lab, &all).await?;
            let said = lab.kubectl(&["get", "fencepolicy", "every"]).await?;
            println!("{said}");

            // A label on a Service, one on its namespace, and the policy.
            label(lab, &["-n", "shop", "service", "reviews"], "=observe").await?;
            until_fenced(
                lab,
                &[
                    "bank/ledger Enforced",
                    "shop/client Enforced",
                    "shop/reviews Observing",
                ],
            )
            .await?;
            label(lab, &["namespace", "shop"], "=off").await?;
            until_fenced(lab, &["bank/ledger Enforced", "shop/reviews Observing"]).await?;
            eventually(PATIENCE, "the client has no Sidecar", async || {
                anyhow::ensure!(lab.sidecar(CLIENT).await?.is_none());
                anyhow::ensure!(lab.redirect(CLIENT).await?.is_none());
                Ok(())
            })
            .await?;
            label(lab, &["namespace", "shop"], "-").await?;
            label(lab, &["-n", "shop", "service", "reviews"], "-").await?;
            until_fenced(lab, &all).await?;

            // One by hand is not the policy's, whatever it says.
            label(lab, &["-n", "shop", "service", "client"], "=off").await?;
            until_fenced(lab, &["bank/ledger Enforced", "shop/reviews Enforced"]).await?;
            lab.fence(CLIENT, "{mode: Observe}").await?;
            label(lab, &["-n", "shop", "service", "client"], "-").await?;
            let by_hand = [
                "bank/ledger Enforced",
                "shop/client Observing",
                "shop/reviews Enforced",
            ];
            until_fenced(lab, &by_hand).await?;
            lab.kubectl(&["delete", "fencepolicy", "every"]).await?;
            until_fenced(lab, &["shop/client Observing"]).await?;
            tokio::time::sleep(Duration::from_secs(1)).await;
            done.set(true);
            anyhow::Ok(())
        };
        tokio::try_join!(traffic, switch).map(drop)
    });
}

#[test]
fn a_whole_namespace_and_pods_without_a_service() {
    fenceline_e2e::test(async |lab| {
        mesh(lab).await?;
        for host in ["ops/*", "*.example.com", "agent.ops:80"] {
            let wrong = format!("{POLICY} {{namespaceSelector: {{}}, alwaysImport: ['{host}']}}}}");
            let refused = lab.apply(&wrong).await;
            let why = refused.err().map(|why| format!("{why:#}"));
            let says = |why: &String| why.contains("a host is a DNS name, without port");
            anyhow::ensure!(why.as_ref().is_some_and(says), "{host}: {why:?}");
        }
        lab.namespace("empty").await?;
        let whole = "{namespaceSelector: {matchExpressions: [{key: kubernetes.io/metadata.name, operator: In, \
                     values: [shop, empty]}]}, granularity: Namespace, template: {firstCall: {holdFor: 5s}}}";
        lab.apply(&format!("{POLICY} {whole}}}")).await?;
        until_fenced(
            lab,
            &["empty/namespace Enforced", "shop/namespace Enforced"],
        )
        .await?;
        let host = "ledger.bank.svc.cluster.local";
        for pod in [CLIENT, ("shop", "reviews")] {
            lab.until_forgotten(pod, host).await?;
        }
        // What one pod calls is in scope for all of them.
        lab.held_call(CLIENT, Protocol::Http1, "ledger.bank:80")
            .await?;
        lab.until_direct(("shop", "reviews"), Protocol::Http1, "ledger.bank:80")
            .await?;
        // A pod that comes where nothing ran has the namespace's scope from the start.
        lab.pod(PodSpec::new("empty", "first")).await?;
        lab.held_call(("empty", "first"), Protocol::Http1, "ledger.bank:80")
            .await?;

        // Its own fence wants something else of first calls than the namespace's: its own counts.
        lab.workload(("empty", "second"), &[80]).await?;
        let forward = "{firstCall: {policy: Forward}}";
        lab.fence(("empty", "second"), forward).await?;
        lab.until_reason(("empty", "second"), "Enforced").await?;
        let gone = "ledger.bank.svc.cluster.local";
        lab.until_forgotten(("empty", "second"), gone).await?;
        lab.forwarded_call(("empty", "second"), Protocol::Http1, "ledger.bank:80")
            .await?;
        lab.kubectl(&["-n", "empty", "delete", "servicefence", "second"])
            .await?;

        // A job: no Service, and yet a fence.
        lab.pod(PodSpec::new("bank", "job")).await?;
        let workloads = "{namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: bank}}, granularity: Workload, \
                         template: {firstCall: {holdFor: 5s}}}";
        lab.apply(&format!("{POLICY} {workloads}}}")).await?;
        until_fenced(lab, &["bank/ledger Enforced", "bank/workload-job Enforced"]).await?;
        lab.until_forgotten(("bank", "job"), "reviews.shop.svc.cluster.local")
            .await?;
        lab.held_call(("bank", "job"), Protocol::Http1, "reviews.shop:9080")
            .await?;
        lab.until_in_scope(
            ("bank", "workload-job"),
            "shop/reviews.shop.svc.cluster.local",
        )
        .await
    });
}
