//! The lab itself: a mesh without Fenceline works as a mesh does.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use fenceline_e2e::app::Protocol;
use fenceline_e2e::{PATIENCE, PodSpec, isolate, wait::eventually};

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
        lab.start_prometheus().await?;
        eventually(PATIENCE, "Prometheus has seen the calls", async || {
            let query = "envoy_cluster_upstream_rq_total{pod='client', cluster_name=~'.*server.*'}";
            anyhow::ensure!(
                !lab.query_prometheus(query).await?.is_empty(),
                "no series yet"
            );
            Ok(())
        })
        .await?;
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

/// The processes in the process namespace of `pid`, as the machine sees them.
fn companions(namespace: &Path) -> Vec<PathBuf> {
    let processes = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    processes
        .map(|entry| entry.path())
        .filter(|path| std::fs::read_link(path.join("ns/pid")).is_ok_and(|link| link == namespace))
        .collect()
}

fn children(id: u32) -> Vec<u32> {
    let threads = std::fs::read_dir(format!("/proc/{id}/task"))
        .into_iter()
        .flatten()
        .flatten();
    threads
        .filter_map(|thread| std::fs::read_to_string(thread.path().join("children")).ok())
        .flat_map(|text| {
            text.split_whitespace()
                .map(str::to_owned)
                .collect::<Vec<_>>()
        })
        .filter_map(|id| id.parse().ok())
        .collect()
}

#[test]
fn a_killed_lab_leaves_nothing_behind() {
    if isolate::is_inside() {
        return;
    }
    // The test as a user starts it, so that what is killed is the outermost process.
    let mut lab = Command::new(std::env::current_exe().unwrap())
        .args([
            "lab::pods_call_each_other_under_their_own_identity",
            "--exact",
        ])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut namespace = None;
    // Until the lab has its control plane and its pods: some twenty processes.
    for _ in 0..600 {
        let inner = children(lab.id()).into_iter().flat_map(children).next();
        namespace = inner.and_then(|id| std::fs::read_link(format!("/proc/{id}/ns/pid")).ok());
        if namespace
            .as_deref()
            .is_some_and(|namespace| companions(namespace).len() >= 8)
        {
            break;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    let namespace = namespace.expect("the lab has a process namespace");
    assert!(companions(&namespace).len() >= 8, "the lab did not start");
    lab.kill().unwrap();
    lab.wait().unwrap();
    for _ in 0..100 {
        if companions(&namespace).is_empty() {
            return;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    panic!("still there: {:?}", companions(&namespace));
}
