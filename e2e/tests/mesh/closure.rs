//! What comes with a host: routes to other hosts, wildcards, pods called by their own names.

use fenceline_crds::Evidence;
use fenceline_e2e::app::Protocol;
use fenceline_e2e::lab::MESH_CONFIG;
use fenceline_e2e::pods::request;
use fenceline_e2e::wait::eventually;
use fenceline_e2e::{Lab, PATIENCE, PodSpec};

const CLIENT: (&str, &str) = ("shop", "client");
const OWN: &str = "spiffe://cluster.local/ns/shop/sa/client";

async fn bank(lab: &mut Lab) -> anyhow::Result<()> {
    lab.install().await?;
    for namespace in ["shop", "bank", "routes"] {
        lab.namespace(namespace).await?;
    }
    lab.workload(CLIENT, &[80]).await?;
    for name in ["front", "ledger", "vault"] {
        lab.workload(("bank", name), &[80]).await?;
    }
    Ok(())
}

/// Waits until a call of the fenced client is answered by `pod`, to the client itself.
async fn until_answered(lab: &Lab, authority: &str, pod: &str) -> anyhow::Result<()> {
    let what = format!("{authority} is answered by {pod}");
    eventually(PATIENCE, &what, async || {
        let outcome = lab.get(CLIENT, Protocol::Http1, authority).await?;
        let report = outcome.report()?;
        anyhow::ensure!(
            report.pod == pod && report.peer() == Some(OWN),
            "{report:?}"
        );
        Ok(())
    })
    .await
}

#[test]
fn routes_of_the_gateway_api_and_virtual_services_with_wildcards() {
    fenceline_e2e::test(async |lab| {
        let crds = lab.tools.gateway_api_crds.to_string_lossy().into_owned();
        lab.kubectl(&["apply", "--server-side", "-f", &crds])
            .await?;
        bank(lab).await?;
        lab.apply(
            "{apiVersion: gateway.networking.k8s.io/v1, kind: HTTPRoute, metadata: {name: front, namespace: bank}, \
              spec: {parentRefs: [{group: '', kind: Service, name: front, port: 80}], \
                     rules: [{backendRefs: [{name: vault, port: 80}]}]}}\n---\n\
             {apiVersion: networking.istio.io/v1, kind: VirtualService, metadata: {name: ledgers, namespace: routes}, \
              spec: {hosts: ['*dger.bank.svc.cluster.local'], \
                     http: [{route: [{destination: {host: vault.bank.svc.cluster.local}}]}]}}",
        )
        .await?;
        lab.fence(CLIENT, "{}").await?;
        lab.until_reason(CLIENT, "Enforced").await?;
        lab.until_forgotten(CLIENT, "ledger.bank.svc.cluster.local")
            .await?;
        until_answered(lab, "front.bank:80", "vault").await?;
        until_answered(lab, "ledger.bank:80", "vault").await?;
        lab.until_in_scope(CLIENT, "routes/ledger.bank.svc.cluster.local")
            .await
    });
}

#[test]
fn service_entries_with_wildcards_in_a_mesh_that_allows_nothing_else() {
    fenceline_e2e::test(async |lab| {
        bank(lab).await?;
        let strict = "outboundTrafficPolicy: {mode: REGISTRY_ONLY}\n";
        lab.set_mesh_config(&format!("{MESH_CONFIG}{strict}"))?;
        lab.pod(
            PodSpec::new("routes", "legacy")
                .http(9080)
                .without_sidecar(),
        )
        .await?;
        let legacy = (lab.running("routes", "legacy")?.ip, 9080).into();
        lab.fence(CLIENT, "{}").await?;
        lab.until_forgotten(CLIENT, "ledger.bank.svc.cluster.local")
            .await?;
        let call = request(Protocol::Http1, "any.legacy.test:9080", legacy);
        eventually(PATIENCE, "nothing else is allowed", async || {
            let outcome = lab.call(CLIENT, &call).await?;
            anyhow::ensure!(outcome.report().is_err(), "{outcome:?}");
            Ok(())
        })
        .await?;
        lab.apply(
            "{apiVersion: networking.istio.io/v1, kind: ServiceEntry, metadata: {name: legacy, namespace: routes}, \
              spec: {hosts: ['*.legacy.test'], ports: [{number: 9080, name: http, protocol: HTTP}], resolution: NONE}}",
        )
        .await?;
        // Where istiod sent MeshConfig's change and a step of the fence at once, the step was not seen, and is waited for.
        eventually(
            PATIENCE * 2,
            "the wildcard's hosts are called",
            async || {
                let report = lab.call(CLIENT, &call).await?.report()?;
                anyhow::ensure!(report.pod == "legacy", "{report:?}");
                Ok(())
            },
        )
        .await
    });
}

#[test]
fn pods_of_a_stateful_set_are_called_by_name() {
    fenceline_e2e::test(async |lab| {
        bank(lab).await?;
        lab.apply(
            "{apiVersion: v1, kind: Service, metadata: {name: db, namespace: bank}, \
              spec: {clusterIP: None, selector: {app: db}, \
                     ports: [{name: http, port: 8080}, {name: tcp, port: 5432}]}}",
        )
        .await?;
        for name in ["db-0", "db-1", "db-2"] {
            lab.pod(
                PodSpec::new("bank", name)
                    .label("app", "db")
                    .http(8080)
                    .tcp(5432),
            )
            .await?;
        }
        lab.fence(CLIENT, "{nonHTTP: Learn}").await?;
        lab.until_forgotten(CLIENT, "ledger.bank.svc.cluster.local")
            .await?;
        for round in 0..5 {
            for name in ["db-0", "db-1", "db-2"] {
                let ip = lab.running("bank", name)?.ip;
                for authority in [
                    format!("{name}.db.bank:8080"),
                    format!("{name}.db.bank.svc.cluster.local:8080"),
                ] {
                    let call = request(Protocol::Http1, &authority, (ip, 8080).into());
                    let report = lab.call(CLIENT, &call).await?.report()?;
                    anyhow::ensure!(
                        report.pod == name && report.peer() == Some(OWN),
                        "round {round}: {report:?}"
                    );
                }
                let call = request(Protocol::Tcp, "db", (ip, 5432).into());
                let outcome = lab.call(CLIENT, &call).await?;
                anyhow::ensure!(outcome.body.starts_with(name), "round {round}: {outcome:?}");
            }
        }
        Ok(())
    });
}

#[test]
fn tcp_is_learnt_from_the_callers_own_logs() {
    fenceline_e2e::test(async |lab| {
        bank(lab).await?;
        let [cache, queue] =
            ["cache", "queue"].map(|name| format!("bank/{name}.bank.svc.cluster.local"));
        for (name, port) in [("cache", 6379), ("queue", 5672)] {
            lab.service("bank", name, &[&format!("tcp:{port}")]).await?;
            lab.pod(PodSpec::new("bank", name).tcp(port)).await?;
        }
        lab.fence(CLIENT, "{}").await?;
        for host in [&cache, &queue] {
            lab.until_in_scope(CLIENT, host).await?;
        }
        lab.fence(CLIENT, "{nonHTTP: Learn}").await?;
        for name in ["cache", "queue"] {
            lab.until_forgotten(CLIENT, &format!("{name}.bank.svc.cluster.local"))
                .await?;
        }
        is_learnt(lab, "cache", 6379, &cache).await?;
        // Where somebody has HTTP on its port, Envoy would wait for a request from a client that waits for the server.
        lab.service("bank", "web", &["http:5672"]).await?;
        lab.until_in_scope(CLIENT, &queue).await?;
        let connect = lab.resolve("bank", "queue", 5672).await?;
        let mut call = request(Protocol::Tcp, "queue.bank", connect);
        call.timeout = std::time::Duration::from_secs(3);
        eventually(PATIENCE, "the queue answers", async || {
            let outcome = lab.call(CLIENT, &call).await?;
            anyhow::ensure!(outcome.body.starts_with("queue"), "{outcome:?}");
            Ok(())
        })
        .await
    });
}

/// A connection by TCP to a host out of scope, and what becomes of it.
async fn is_learnt(lab: &Lab, name: &str, port: u16, host: &str) -> anyhow::Result<()> {
    // Out of scope: Istio's own behaviour, which leads to an address that only kube-proxy knows. It is reported all the same.
    let mut call = request(
        Protocol::Tcp,
        &format!("{name}.bank"),
        lab.resolve("bank", name, port).await?,
    );
    call.timeout = std::time::Duration::from_secs(3);
    let outcome = lab.call(CLIENT, &call).await?;
    anyhow::ensure!(!outcome.body.starts_with(name), "{outcome:?}");
    lab.until_in_scope(CLIENT, host).await?;
    let what = "a connection that was learnt is taken by the mesh";
    eventually(PATIENCE, what, async || {
        let outcome = lab.call(CLIENT, &call).await?;
        anyhow::ensure!(outcome.body.starts_with(name), "{outcome:?}");
        Ok(())
    })
    .await?;
    let status = lab.get_fence(CLIENT).await?.status.unwrap_or_default();
    let known = status
        .dependencies
        .iter()
        .find(|known| host.ends_with(&known.host));
    let evidence = known.map(|known| known.evidence.as_slice());
    anyhow::ensure!(evidence == Some(&[Evidence::AccessLog]), "{evidence:?}");
    Ok(())
}
