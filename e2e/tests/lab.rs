//! The lab itself: a mesh without Fenceline works as a mesh does.

use fenceline_e2e::app::Protocol;
use fenceline_e2e::{PATIENCE, PodSpec, wait::eventually};

#[test]
fn pods_call_each_other_under_their_own_identity() {
    fenceline_e2e::test(async |lab| {
        lab.namespace("shop").await?;
        lab.service("shop", "server", &["http:9080", "grpc:9090", "tcp:9000"])
            .await?;
        lab.pod(
            PodSpec::new("shop", "server")
                .http(9080)
                .http(9090)
                .tcp(9000),
        )
        .await?;
        lab.pod(PodSpec::new("shop", "client")).await?;
        for (protocol, port) in [
            (Protocol::Http1, 9080),
            (Protocol::Http2, 9080),
            (Protocol::Grpc, 9090),
        ] {
            let what = format!("{protocol:?} reaches the server");
            eventually(PATIENCE, &what, async || {
                let outcome = lab
                    .get(("shop", "client"), protocol, &format!("server:{port}"))
                    .await?;
                let report = outcome.report()?;
                anyhow::ensure!(report.pod == "server");
                anyhow::ensure!(report.peer() == Some("spiffe://cluster.local/ns/shop/sa/client"));
                Ok(())
            })
            .await?;
        }
        eventually(PATIENCE, "TCP reaches the server", async || {
            let outcome = lab
                .get(("shop", "client"), Protocol::Tcp, "server:9000")
                .await?;
            anyhow::ensure!(outcome.body.starts_with("server\n"), "{outcome:?}");
            Ok(())
        })
        .await
    });
}
