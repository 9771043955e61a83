//! The main job: a first call works and is learnt; the next goes direct.

use fenceline_crds::ServiceFence;
use fenceline_crds::istio::Sidecar;
use fenceline_e2e::app::Protocol;
use fenceline_e2e::{Lab, PATIENCE, PodSpec, wait::eventually};
use kube::Api;

const CLIENT: (&str, &str) = ("shop", "client");

async fn hosts(lab: &Lab, fence: &str) -> anyhow::Result<Vec<String>> {
    let api: Api<Sidecar> = Api::namespaced(lab.client.clone(), "shop");
    let sidecar = api.get(&format!("fenceline-{fence}")).await?;
    Ok(sidecar
        .spec
        .egress
        .into_iter()
        .flat_map(|listener| listener.hosts)
        .collect())
}

#[test]
fn a_first_call_works_and_the_next_goes_direct() {
    fenceline_e2e::test(async |lab| {
        lab.install().await?;
        for namespace in ["shop", "bank"] {
            lab.namespace(namespace).await?;
        }
        lab.service("shop", "client", &["http:80"]).await?;
        lab.pod(PodSpec::new("shop", "client").http(80)).await?;
        lab.service("shop", "reviews", &["http:9080"]).await?;
        lab.pod(PodSpec::new("shop", "reviews").http(9080)).await?;
        lab.service("bank", "ledger", &["http:80", "grpc:9090"])
            .await?;
        lab.pod(PodSpec::new("bank", "ledger").http(80).http(9090))
            .await?;
        eventually(PATIENCE, "an unfenced call", async || {
            lab.get(CLIENT, Protocol::Http1, "reviews:9080")
                .await?
                .report()
                .map(drop)
        })
        .await?;

        lab.apply(
            "{apiVersion: fenceline.dev/v1alpha1, kind: ServiceFence,
              metadata: {name: client, namespace: shop}, spec: {}}",
        )
        .await?;
        let nothing = [
            // Its port is not HTTP.
            "default/kubernetes.default.svc.cluster.local",
            "fenceline-system/global-proxy.fenceline-system.svc.cluster.local",
        ];
        eventually(PATIENCE, "the fence knows nothing", async || {
            let hosts = hosts(lab, "client").await?;
            anyhow::ensure!(hosts == nothing, "{hosts:?}");
            Ok(())
        })
        .await?;
        eventually(PATIENCE, "the client's Envoy has only that", async || {
            let clusters = lab.running("shop", "client")?.envoy("/clusters").await?;
            anyhow::ensure!(!clusters.contains("reviews.shop"), "{clusters}");
            Ok(())
        })
        .await?;

        for (protocol, authority, host) in [
            (
                Protocol::Http1,
                "reviews:9080",
                "shop/reviews.shop.svc.cluster.local",
            ),
            (
                Protocol::Http2,
                "ledger.bank",
                "bank/ledger.bank.svc.cluster.local",
            ),
        ] {
            let first = lab.get(CLIENT, protocol, authority).await?;
            let report = first.report()?;
            println!("first call of {authority}: {:?} {report:?}", first.took);
            anyhow::ensure!(
                report.peer() == Some("spiffe://cluster.local/ns/fenceline-system/sa/global-proxy"),
                "{report:?}"
            );
            eventually(PATIENCE, &format!("{host} is in the Sidecar"), async || {
                let hosts = hosts(lab, "client").await?;
                anyhow::ensure!(hosts.iter().any(|known| known == host), "{hosts:?}");
                Ok(())
            })
            .await?;
            eventually(PATIENCE, "the next call goes direct", async || {
                let next = lab.get(CLIENT, protocol, authority).await?;
                let report = next.report()?;
                anyhow::ensure!(
                    report.peer() == Some("spiffe://cluster.local/ns/shop/sa/client"),
                    "{report:?}"
                );
                Ok(())
            })
            .await?;
        }
        let api: Api<ServiceFence> = Api::namespaced(lab.client.clone(), "shop");
        println!(
            "{}",
            serde_json::to_string_pretty(&api.get("client").await?.status)?
        );
        Ok(())
    });
}
