//! Shared ports, ports without names, strict meshes, callers without a sidecar, addresses for names.

use std::time::Duration;

use fenceline_e2e::app::Protocol;
use fenceline_e2e::install::{GLOBAL_PROXY, OPERATOR, SYSTEM};
use fenceline_e2e::pods::request;
use fenceline_e2e::{Lab, PATIENCE, PodSpec, wait::eventually};

const CLIENT: (&str, &str) = ("shop", "client");
const OWN: &str = "spiffe://cluster.local/ns/shop/sa/client";

const STRICT: &str = "{apiVersion: security.istio.io/v1, kind: PeerAuthentication, \
    metadata: {name: default, namespace: istio-system}, spec: {mtls: {mode: STRICT}}}";

#[test]
fn http_tcp_and_unnamed_ports_of_one_number_in_a_strict_mesh() {
    fenceline_e2e::test(async |lab| {
        lab.install().await?;
        lab.apply(STRICT).await?;
        lab.namespace("shop").await?;
        lab.workload(CLIENT, &[80]).await?;
        lab.workload(("shop", "web"), &[8080]).await?;
        lab.service("shop", "raw", &["tcp:8080"]).await?;
        lab.pod(PodSpec::new("shop", "raw").tcp(8080)).await?;
        lab.apply(
            "{apiVersion: v1, kind: Service, metadata: {name: plain, namespace: shop}, \
             spec: {selector: {app: plain}, ports: [{port: 8080}]}}",
        )
        .await?;
        lab.pod(PodSpec::new("shop", "plain").http(8080)).await?;
        lab.until_direct(CLIENT, Protocol::Http1, "web:8080")
            .await?;
        lab.fence(CLIENT, "{}").await?;
        lab.until_reason(CLIENT, "Enforced").await?;
        lab.until_forgotten(CLIENT, "web.shop.svc.cluster.local")
            .await?;

        lab.held_call(CLIENT, Protocol::Http1, "web:8080").await?;
        // What does not say that it is HTTP stayed in scope.
        let plain = lab.get(CLIENT, Protocol::Http1, "plain:8080").await?;
        anyhow::ensure!(plain.report()?.pod == "plain", "{plain:?}");
        let mut call = request(
            Protocol::Tcp,
            "raw:8080",
            lab.resolve("shop", "raw", 8080).await?,
        );
        call.body_bytes = 5;
        let outcome = lab.call(CLIENT, &call).await?;
        anyhow::ensure!(outcome.body == "raw\nxxxxx", "{outcome:?}");
        Ok(())
    });
}

#[test]
fn addresses_names_of_nobody_and_callers_without_a_sidecar() {
    fenceline_e2e::test(async |lab| {
        lab.install().await?;
        lab.apply(STRICT).await?;
        lab.namespace("shop").await?;
        lab.namespace("bank").await?;
        // Two Services over the same pod, one of them fenced.
        lab.workload(CLIENT, &[80]).await?;
        lab.services_of(CLIENT, ["desk".to_owned()]).await?;
        lab.workload(("shop", "web"), &[80]).await?;
        lab.apply(
            "{apiVersion: v1, kind: Service, metadata: {name: hidden, namespace: bank, \
             annotations: {networking.istio.io/exportTo: '.'}}, \
             spec: {selector: {app: hidden}, ports: [{name: http, port: 80}]}}",
        )
        .await?;
        lab.pod(PodSpec::new("bank", "hidden").http(80).without_sidecar())
            .await?;
        lab.pod(PodSpec::new("shop", "bare").without_sidecar())
            .await?;
        lab.until_direct(CLIENT, Protocol::Http1, "web:80").await?;
        let desk = ("shop", "desk");
        lab.fence(desk, "{}").await?;
        lab.until_reason(desk, "Enforced").await?;
        lab.until_forgotten(CLIENT, "web.shop.svc.cluster.local")
            .await?;

        // By its address: in a strict mesh only the mesh's own way leads there.
        let web = lab.resolve("shop", "web", 80).await?;
        let by_address = request(Protocol::Http1, &web.to_string(), web);
        let report = lab.call(CLIENT, &by_address).await?.report()?;
        anyhow::ensure!(report.peer() == Some(OWN), "{report:?}");
        lab.until_in_scope(desk, "shop/web.shop.svc.cluster.local")
            .await?;

        // Names that nothing answers to for this caller go where they would without us: to where it connected.
        let hidden = (lab.running("bank", "hidden")?.ip, 80).into();
        for (protocol, name) in [
            (Protocol::Http1, "hidden.bank"),
            (Protocol::Http2, "hidden.bank.svc.cluster.local"),
            (Protocol::Http1, "nobody"),
            (Protocol::Http1, "nobody.bank"),
            (Protocol::Grpc, "nobody.bank.svc"),
        ] {
            let report = lab
                .call(CLIENT, &request(protocol, name, hidden))
                .await?
                .report()?;
            let passed = report.pod == "hidden" && report.peer().is_none();
            anyhow::ensure!(passed, "{name}: {report:?}");
        }
        // What cannot go back is told why.
        let mut long = request(Protocol::Http1, "nobody.bank", hidden);
        long.method = "POST".into();
        long.body_bytes = 2_000_000;
        let outcome = lab.call(CLIENT, &long).await?;
        let reason = outcome
            .headers
            .get("x-fenceline-reason")
            .map(String::as_str);
        anyhow::ensure!(
            outcome.status == 503 && reason == Some("UnknownHost"),
            "{outcome:?}"
        );

        // Plain text to the global proxy.
        let before = lab
            .metric(OPERATOR, "fenceline_observations_total", "")
            .await?;
        let proxy = lab.running(SYSTEM, GLOBAL_PROXY)?.ip;
        for port in [15080, 15088] {
            let mut call = request(Protocol::Http1, "web.shop", (proxy, port).into());
            call.timeout = Duration::from_secs(3);
            let outcome = lab.call(("shop", "bare"), &call).await?;
            anyhow::ensure!(outcome.status == 0, "{outcome:?}");
        }
        let after = lab
            .metric(OPERATOR, "fenceline_observations_total", "")
            .await?;
        anyhow::ensure!((after - before).abs() < 0.5, "it was heard");
        Ok(())
    });
}

#[test]
fn two_operators_answer_whoever_leads_and_first_calls_at_once_share_a_write() {
    fenceline_e2e::test(async |lab| {
        lab.install().await?;
        lab.start_operator("fenceline-1").await?;
        lab.namespace("shop").await?;
        lab.workload(CLIENT, &[80]).await?;
        let names: Vec<String> = (0..8).map(|number| format!("s{number}")).collect();
        lab.services_of(("shop", "server"), names.clone()).await?;
        lab.pod(PodSpec::new("shop", "server").http(80)).await?;
        lab.until_direct(CLIENT, Protocol::Http1, "s7:80").await?;
        lab.fence(CLIENT, "{}").await?;
        lab.until_reason(CLIENT, "Enforced").await?;
        lab.until_forgotten(CLIENT, "s7.shop.svc.cluster.local")
            .await?;
        eventually(
            PATIENCE,
            "the global proxy knows both operators",
            async || {
                let clusters = lab
                    .running(SYSTEM, GLOBAL_PROXY)?
                    .envoy("/clusters")
                    .await?;
                let here = |name: &str| {
                    let ip = lab.running(SYSTEM, name)?.ip;
                    anyhow::Ok(clusters.contains(&format!("::{ip}:18100::")))
                };
                anyhow::ensure!(here(OPERATOR)? && here("fenceline-1")?);
                Ok(())
            },
        )
        .await?;
        let generation = async |lab: &Lab| -> anyhow::Result<Option<i64>> {
            let sidecar = lab.sidecar(CLIENT).await?;
            Ok(sidecar.and_then(|sidecar| sidecar.metadata.generation))
        };
        let before = generation(lab).await?;
        // The first: thirty at once. All are held, by both operators, and learnt once.
        let to = lab.resolve("shop", "s0", 80).await?;
        let lab_ = &*lab;
        let at_once = (0..30).map(|number| async move {
            let mut call = request(Protocol::Http2, "s0", to);
            call.path = format!("/{number}");
            lab_.call(CLIENT, &call).await?.report()
        });
        for report in futures::future::try_join_all(at_once).await? {
            anyhow::ensure!(report.peer() == Some(OWN), "{report:?}");
        }
        let written = generation(lab).await?.zip(before);
        anyhow::ensure!(
            // Its clusters, then its routes.
            written.is_some_and(|(after, before)| after == before + 2),
            "{written:?}"
        );
        for name in &names[1..] {
            lab.held_call(CLIENT, Protocol::Http1, &format!("{name}:80"))
                .await?;
        }
        for operator in [OPERATOR, "fenceline-1"] {
            let replayed = lab
                .metric(operator, "fenceline_first_calls_total", "replayed")
                .await?;
            anyhow::ensure!(replayed > 0.5, "{operator} answered nobody");
        }
        Ok(())
    });
}
