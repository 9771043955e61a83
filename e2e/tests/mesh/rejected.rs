//! Proxies that reject configuration, ours or somebody else's: it is said, nothing breaks, and it is said when it is over.

use fenceline_e2e::Lab;
use fenceline_e2e::app::Protocol;
use fenceline_e2e::fences::GLOBAL_PROXY;
use fenceline_e2e::pods::request;

const CLIENT: (&str, &str) = ("shop", "client");

/// Somebody else's EnvoyFilter, which makes a cluster that Envoy does not take.
const WRONG: &str = "{apiVersion: networking.istio.io/v1alpha3, kind: EnvoyFilter, metadata: {name: wrong, namespace: shop}, \
    spec: {configPatches: [{applyTo: CLUSTER, match: {context: SIDECAR_OUTBOUND}, \
    patch: {operation: ADD, value: {name: wrong, type: STATIC, connect_timeout: 0s}}}]}}";

async fn mesh(lab: &mut Lab) -> anyhow::Result<()> {
    lab.install().await?;
    for namespace in ["shop", "bank"] {
        lab.namespace(namespace).await?;
    }
    lab.workload(CLIENT, &[80]).await?;
    for name in ["ledger", "rates"] {
        lab.workload(("bank", name), &[80]).await?;
    }
    Ok(())
}

#[test]
fn what_a_proxy_rejects_is_said_until_it_takes_configuration_again() {
    fenceline_e2e::test(async |lab| {
        mesh(lab).await?;
        lab.fence(CLIENT, "{}").await?;
        lab.until_reason(CLIENT, "Enforced").await?;
        lab.until_forgotten(CLIENT, "rates.bank.svc.cluster.local")
            .await?;
        lab.apply(WRONG).await?;
        // The new cluster is refused with the wrong one: no route may lead there.
        let connect = lab.resolve("bank", "ledger", 80).await?;
        let call = request(Protocol::Http1, "ledger.bank:80", connect);
        lab.call(CLIENT, &call).await?.report()?;
        let said = lab.until_reason(CLIENT, "Rejected").await?;
        for _ in 0..20 {
            let report = lab.call(CLIENT, &call).await?.report()?;
            anyhow::ensure!(report.peer() == Some(GLOBAL_PROXY), "{report:?}");
        }
        let address = lab.running("shop", "client")?.ip.to_string();
        anyhow::ensure!(said.contains(&address), "{said}");
        println!("{said}");
        lab.kubectl(&["-n", "shop", "delete", "envoyfilter", "wrong"])
            .await?;
        lab.until_reason(CLIENT, "Enforced").await?;
        lab.until_direct(CLIENT, Protocol::Http1, "ledger.bank:80")
            .await?;
        lab.held_call(CLIENT, Protocol::Http1, "rates.bank:80")
            .await
            .map(drop)
    });
}
