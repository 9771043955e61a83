//! The main job: a first call works and is learnt; the next goes direct.

use std::net::Ipv4Addr;

use fenceline_e2e::app::Protocol;
use fenceline_e2e::install::OPERATOR;
use fenceline_e2e::lab::{MESH_CONFIG, shipped};
use fenceline_e2e::pods::request;
use fenceline_e2e::tools::checkout;
use fenceline_e2e::{Lab, PATIENCE, PodSpec, wait::eventually};

const CLIENT: (&str, &str) = ("shop", "client");

/// Fenceline, and a client that may call reviews.
async fn shop(lab: &mut Lab) -> anyhow::Result<()> {
    lab.install().await?;
    workloads(lab).await
}

async fn workloads(lab: &mut Lab) -> anyhow::Result<()> {
    lab.namespace("shop").await?;
    lab.workload(CLIENT, &[80]).await?;
    lab.workload(("shop", "reviews"), &[9080]).await
}

#[test]
fn a_first_call_works_and_the_next_goes_direct() {
    fenceline_e2e::test(async |lab| {
        lab.install().await?;
        lab.namespace("shop").await?;
        lab.namespace("bank").await?;
        lab.workload(CLIENT, &[80]).await?;
        lab.workload(("shop", "reviews"), &[9080]).await?;
        lab.service("bank", "ledger", &["http:80", "grpc:9090"])
            .await?;
        lab.pod(PodSpec::new("bank", "ledger").http(80).http(9090))
            .await?;
        lab.workload(("bank", "vault"), &[80]).await?;
        lab.until_direct(CLIENT, Protocol::Http1, "reviews:9080")
            .await?;

        lab.fence(CLIENT, "{}").await?;
        lab.until_reason(CLIENT, "Enforced").await?;
        let nothing = [
            // Its port is not HTTP.
            "default/kubernetes.default.svc.cluster.local",
            "fenceline-system/global-proxy.fenceline-system.svc.cluster.local",
        ];
        anyhow::ensure!(
            lab.scope(CLIENT).await? == nothing,
            "{:?}",
            lab.scope(CLIENT).await?
        );
        lab.until_forgotten(CLIENT, "reviews.shop.svc.cluster.local")
            .await?;

        for (protocol, authority, host, held) in [
            (
                Protocol::Http1,
                "reviews:9080",
                "shop/reviews.shop.svc.cluster.local",
                true,
            ),
            (
                Protocol::Grpc,
                "ledger.bank:9090",
                "bank/ledger.bank.svc.cluster.local",
                // gRPC is forwarded where nobody asks who is calling.
                false,
            ),
            (
                Protocol::Http2,
                "vault.bank.svc.cluster.local",
                "bank/vault.bank.svc.cluster.local",
                true,
            ),
        ] {
            let first = if held {
                lab.held_call(CLIENT, protocol, authority).await?
            } else {
                lab.forwarded_call(CLIENT, protocol, authority).await?
            };
            let report = first.report()?;
            anyhow::ensure!(
                report.host == authority,
                "the callee saw the Host {}",
                report.host
            );
            lab.until_in_scope(CLIENT, host).await?;
            let next = lab.until_direct(CLIENT, protocol, authority).await?;
            println!(
                "{authority}: first {:?}, direct {:?}",
                first.took, next.took
            );
        }
        let scope = lab.scope(CLIENT).await?;
        anyhow::ensure!(scope.len() == 5 && scope.iter().all(|host| !host.contains('*')));
        Ok(())
    });
}

#[test]
fn names_outside_the_mesh_never_reach_the_global_proxy() {
    fenceline_e2e::test(async |lab| {
        shop(lab).await?;
        // Outside: no Service, no sidecar, only an address.
        lab.namespace("outside").await?;
        lab.pod(
            PodSpec::new("outside", "internet")
                .http(9080)
                .without_sidecar(),
        )
        .await?;
        let outside = lab.running("outside", "internet")?.ip;
        lab.fence(CLIENT, "{}").await?;
        lab.until_forgotten(CLIENT, "reviews.shop.svc.cluster.local")
            .await?;

        for authority in [
            "example.com:9080",
            "api.example.com:9080",
            "reviews.shop.example.com:9080",
        ] {
            let call = request(Protocol::Http1, authority, (outside, 9080).into());
            let report = lab.call(CLIENT, &call).await?.report()?;
            anyhow::ensure!(
                report.pod == "internet" && report.host == authority,
                "{report:?}"
            );
            anyhow::ensure!(
                report.peer().is_none(),
                "it came through the mesh: {report:?}"
            );
        }
        let seen = async || {
            lab.metric(OPERATOR, "fenceline_observations_total", "")
                .await
        };
        anyhow::ensure!(seen().await? < 0.5, "it heard of them");
        // A name of the mesh does, so the silence is no accident.
        lab.held_call(CLIENT, Protocol::Http1, "reviews:9080")
            .await?;
        eventually(PATIENCE, "it hears of reviews", async || {
            anyhow::ensure!(seen().await? > 0.5);
            Ok(())
        })
        .await
    });
}

#[test]
fn ten_thousand_junk_names_write_nothing_and_cost_little() {
    const JUNK: usize = 10_000;
    fenceline_e2e::test(async |lab| {
        shop(lab).await?;
        lab.fence(CLIENT, "{}").await?;
        lab.until_forgotten(CLIENT, "reviews.shop.svc.cluster.local")
            .await?;
        lab.held_call(CLIENT, Protocol::Http1, "reviews:9080")
            .await?;
        lab.until_direct(CLIENT, Protocol::Http1, "reviews:9080")
            .await?;
        lab.until_quiet(OPERATOR, std::time::Duration::from_secs(1))
            .await?;
        let before = lab.writes(OPERATOR).await?;
        let sidecar = lab.sidecar(CLIENT).await?;
        let memory = lab.operator_memory(OPERATOR)?;

        // A name that nothing answers to goes where it would without us: to the address that was dialled.
        let to = (lab.running("shop", "reviews")?.ip, 9080).into();
        let lab = &*lab;
        let started = std::time::Instant::now();
        let calls = (0..8).map(|worker| async move {
            for number in (worker..JUNK).step_by(8) {
                let junk = format!("junk-{number}:9080");
                let outcome = lab
                    .call(CLIENT, &request(Protocol::Http1, &junk, to))
                    .await?;
                let report = outcome.report()?;
                anyhow::ensure!(report.host == junk && report.peer().is_none(), "{report:?}");
            }
            anyhow::Ok(())
        });
        futures::future::try_join_all(calls).await?;
        eventually(PATIENCE, "all of them are counted", async || {
            let seen = lab
                .metric(OPERATOR, "fenceline_observations_total", "unresolved")
                .await?;
            #[expect(clippy::cast_precision_loss, reason = "a small number")]
            let all = seen > JUNK as f64 - 0.5;
            anyhow::ensure!(all, "{seen} observations");
            Ok(())
        })
        .await?;
        let writes = lab.writes(OPERATOR).await? - before;
        let grown = lab.operator_memory(OPERATOR)?.saturating_sub(memory);
        println!(
            "{JUNK} names in {:?}: {writes} writes, {grown} KiB more",
            started.elapsed()
        );
        // Only the list that people read, and that once a minute.
        anyhow::ensure!(writes < 2.5, "{writes} writes");
        anyhow::ensure!(grown < 8 * 1024, "{grown} KiB");
        anyhow::ensure!(
            lab.sidecar(CLIENT).await? == sidecar,
            "the Sidecar was touched"
        );
        let status = lab.get_fence(CLIENT).await?.status.unwrap_or_default();
        anyhow::ensure!(status.dependencies.len() == 1, "{status:?}");
        anyhow::ensure!((1..=8).contains(&status.unresolved.len()), "{status:?}");
        Ok(())
    });
}

#[test]
fn istios_own_access_log_provider_will_do() {
    fenceline_e2e::test(async |lab| {
        let provider = shipped("global-proxy-config/telemetry/mesh-config.yaml")?;
        lab.set_mesh_config(&format!("{MESH_CONFIG}{provider}"))?;
        // A user's own kustomization, beside the checkout's.
        let folder = tempfile::tempdir_in(checkout())?;
        let base = "../global-proxy-config";
        let yaml = format!("resources: [{base}]\ncomponents: [{base}/telemetry]\n");
        std::fs::write(folder.path().join("kustomization.yaml"), yaml)?;
        lab.install_from(&folder.path().to_string_lossy()).await?;
        workloads(lab).await?;
        lab.fence(CLIENT, "{}").await?;
        lab.until_forgotten(CLIENT, "reviews.shop.svc.cluster.local")
            .await?;
        lab.held_call(CLIENT, Protocol::Http1, "reviews:9080")
            .await?;
        lab.until_in_scope(CLIENT, "shop/reviews.shop.svc.cluster.local")
            .await?;
        lab.until_direct(CLIENT, Protocol::Http1, "reviews:9080")
            .await
            .map(drop)
    });
}

#[test]
fn service_entries_and_virtual_services_keep_working() {
    fenceline_e2e::test(async |lab| {
        shop(lab).await?;
        lab.workload(("shop", "ratings"), &[9080]).await?;
        lab.namespace("outside").await?;
        lab.pod(
            PodSpec::new("outside", "legacy")
                .http(9080)
                .without_sidecar(),
        )
        .await?;
        let legacy = lab.running("outside", "legacy")?.ip;
        lab.apply(&format!(
            "apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {{name: legacy, namespace: outside}}
spec:
  hosts: [legacy.example.com]
  ports: [{{number: 9080, name: http, protocol: HTTP}}]
  resolution: STATIC
  endpoints: [{{address: {legacy}}}]
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {{name: api, namespace: shop}}
spec:
  hosts: [api.internal]
  http: [{{route: [{{destination: {{host: reviews, port: {{number: 9080}}}}}}]}}]
"
        ))
        .await?;
        lab.fence(CLIENT, "{}").await?;
        lab.until_in_scope(CLIENT, "outside/legacy.example.com")
            .await?;
        lab.until_in_scope(CLIENT, "shop/api.internal").await?;
        lab.until_forgotten(CLIENT, "ratings.shop.svc.cluster.local")
            .await?;
        // An address that nobody has: only the mesh's own routes lead to an answer.
        let nowhere = Ipv4Addr::new(10, 244, 250, 1);
        // Istio gives a VirtualService without a Service of its name the port 80.
        for (authority, port, pod) in [
            ("legacy.example.com:9080", 9080, "legacy"),
            ("api.internal", 80, "reviews"),
        ] {
            eventually(
                PATIENCE,
                &format!("{authority} is answered by {pod}"),
                async || {
                    let call = request(Protocol::Http1, authority, (nowhere, port).into());
                    let report = lab.call(CLIENT, &call).await?.report()?;
                    anyhow::ensure!(report.pod == pod, "{report:?}");
                    Ok(())
                },
            )
            .await?;
        }
        // A VirtualService of a Service applies to its first call too.
        lab.apply(
            "apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: ratings, namespace: shop}
spec:
  hosts: [ratings]
  http: [{route: [{destination: {host: reviews}}]}]
",
        )
        .await?;
        eventually(
            PATIENCE,
            "the first call of ratings follows its VirtualService",
            async || {
                let report = lab
                    .get(CLIENT, Protocol::Http1, "ratings:9080")
                    .await?
                    .report()?;
                anyhow::ensure!(report.pod == "reviews", "{report:?}");
                Ok(())
            },
        )
        .await
    });
}

#[test]
fn a_first_call_works_where_only_registered_hosts_are_allowed() {
    fenceline_e2e::test(async |lab| {
        let strict = "outboundTrafficPolicy: {mode: REGISTRY_ONLY}\n";
        lab.set_mesh_config(&format!("{MESH_CONFIG}{strict}"))?;
        shop(lab).await?;
        lab.fence(CLIENT, "{}").await?;
        lab.until_forgotten(CLIENT, "reviews.shop.svc.cluster.local")
            .await?;
        let to = lab.resolve("shop", "reviews", 9080).await?;
        let elsewhere = request(Protocol::Http1, "example.com:9080", to);
        eventually(PATIENCE, "Istio's own answer to other names", async || {
            let outcome = lab.call(CLIENT, &elsewhere).await?;
            anyhow::ensure!(outcome.status == 502, "{outcome:?}");
            Ok(())
        })
        .await?;
        lab.held_call(CLIENT, Protocol::Http1, "reviews:9080")
            .await?;
        lab.until_direct(CLIENT, Protocol::Http1, "reviews:9080")
            .await
            .map(drop)
    });
}
