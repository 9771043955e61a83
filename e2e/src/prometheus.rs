//! Prometheus, on request: it scrapes every sidecar and the operator.

use std::time::Duration;

use anyhow::Context;
use serde_json::{Value, json};
use tokio::process::Command;

use crate::app::{Caller, Protocol};
use crate::control_plane::ADDRESS;
use crate::lab::{Lab, PATIENCE};
use crate::pods::request;
use crate::process::Process;
use crate::wait::eventually;

pub(crate) const PORT: u16 = 9090;
/// Where a test may serve metrics of its own.
pub const SCRIPTED: &str = "10.244.0.1:9191";
/// Where pods reach it.
pub const URL: &str = "http://10.244.0.1:9090";

/// Istio's standard metrics, from Envoy's own counters: its filter that makes them is not in a stock Envoy.
/// <https://istio.io/latest/docs/reference/config/metrics/>
fn rules_of_istio() -> Value {
    let rule = |record: &str, counter: &str| {
        let outbound = format!(r#"{counter}{{cluster_name=~"outbound[|].*"}}"#);
        let labels = [
            (
                "destination_service",
                "cluster_name",
                "outbound[|][0-9]+[|][^|]*[|](.*)",
            ),
            ("source_workload", "pod", "(.*)"),
            ("source_workload_namespace", "namespace", "(.*)"),
        ];
        let expr = labels
            .iter()
            .fold(outbound, |inner, (label, from, pattern)| {
                format!(r#"label_replace({inner}, "{label}", "$1", "{from}", "{pattern}")"#)
            });
        let expr = format!(r#"label_replace({expr}, "reporter", "source", "", "")"#);
        json!({"record": record, "expr": expr})
    };
    let rules = [
        rule("istio_requests_total", "envoy_cluster_upstream_rq_total"),
        rule(
            "istio_tcp_connections_opened_total",
            "envoy_cluster_upstream_cx_total",
        ),
        rule(
            "istio_tcp_sent_bytes_total",
            "envoy_cluster_upstream_cx_tx_bytes_total",
        ),
        rule(
            "istio_tcp_received_bytes_total",
            "envoy_cluster_upstream_cx_rx_bytes_total",
        ),
    ];
    json!({"groups": [{"name": "istio", "rules": rules}]})
}

impl Lab {
    /// Ends Prometheus; what it stored is there when it is started again.
    ///
    /// # Errors
    /// Fails when it does not run.
    pub async fn stop_prometheus(&mut self) -> anyhow::Result<()> {
        let mut prometheus = self.prometheus.take().context("Prometheus does not run")?;
        prometheus.kill().await
    }

    /// Starts Prometheus, scraping once a second the pods that run by now and those that are started later.
    ///
    /// # Errors
    /// Fails when it does not start.
    pub async fn start_prometheus(&mut self) -> anyhow::Result<()> {
        let folder = self.scratch.join("prometheus");
        std::fs::create_dir_all(&folder)?;
        let rules = folder.join("rules.yml");
        std::fs::write(&rules, rules_of_istio().to_string())?;
        let config = json!({
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "rule_files": [rules],
            "scrape_configs": [{
                "job_name": "sidecars",
                "metrics_path": "/stats/prometheus",
                "file_sd_configs": [{"files": [folder.join("sidecars.json")]}],
            }, {
                "job_name": "scripted",
                "static_configs": [{"targets": [SCRIPTED]}],
            }],
        });
        std::fs::write(folder.join("prometheus.yml"), config.to_string())?;
        let mut command = Command::new(&self.tools.prometheus);
        command
            .arg(format!(
                "--config.file={}",
                folder.join("prometheus.yml").display()
            ))
            .arg(format!(
                "--storage.tsdb.path={}",
                folder.join("data").display()
            ))
            .arg(format!("--web.listen-address={ADDRESS}:{PORT}"));
        self.prometheus = Some(Process::start("prometheus", &self.logs, command)?);
        self.tell_prometheus()?;
        eventually(PATIENCE, "Prometheus answers", async || {
            self.query_prometheus("up").await.map(drop)
        })
        .await
    }

    /// Writes the list of sidecars that Prometheus watches; nothing where it does not run.
    pub(crate) fn tell_prometheus(&self) -> anyhow::Result<()> {
        if self.prometheus.is_none() {
            return Ok(());
        }
        let targets: Vec<Value> = self
            .pods()
            .filter(|pod| pod.spec.sidecar)
            .map(|pod| {
                let labels = json!({"namespace": pod.spec.namespace, "pod": pod.spec.name});
                json!({"targets": [format!("{}:15090", pod.ip)], "labels": labels})
            })
            .collect();
        let path = self.scratch.join("prometheus/sidecars.json");
        Ok(std::fs::write(path, serde_json::to_string(&targets)?)?)
    }

    /// The result of an instant query: a list of series.
    ///
    /// # Errors
    /// Fails when Prometheus does not answer, or refuses the query.
    pub async fn query_prometheus(&self, query: &str) -> anyhow::Result<Vec<Value>> {
        let to = format!("{ADDRESS}:{PORT}");
        let mut call = request(Protocol::Http1, &to, to.parse()?);
        call.timeout = Duration::from_secs(5);
        let encoded: String = query.bytes().map(|byte| format!("%{byte:02x}")).collect();
        call.path = format!("/api/v1/query?query={encoded}");
        let outcome = Caller::default().call(&call).await;
        anyhow::ensure!(outcome.status == 200, "{outcome:?}");
        let answer: Value = serde_json::from_str(&outcome.body)?;
        answer["data"]["result"]
            .as_array()
            .cloned()
            .context("no result")
    }
}
