//! Prometheus, on request: it scrapes every sidecar and the operator.

use std::time::Duration;

use anyhow::Context;
use serde_json::{Value, json};
use tokio::process::Command;

use crate::app::{Caller, Protocol};
use crate::lab::{Lab, PATIENCE, request};
use crate::process::Process;
use crate::wait::eventually;

const PORT: u16 = 9090;

impl Lab {
    /// Starts Prometheus, scraping once a second the pods that run by now and those that are started later.
    ///
    /// # Errors
    /// Fails when it does not start.
    pub async fn start_prometheus(&mut self) -> anyhow::Result<()> {
        let folder = self.scratch.join("prometheus");
        std::fs::create_dir_all(&folder)?;
        let config = json!({
            "global": {"scrape_interval": "1s"},
            "scrape_configs": [{
                "job_name": "sidecars",
                "metrics_path": "/stats/prometheus",
                "file_sd_configs": [{"files": [folder.join("sidecars.json")]}],
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
            .arg(format!("--web.listen-address=127.0.0.1:{PORT}"));
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
        let to = ([127, 0, 0, 1], PORT).into();
        let mut call = request(Protocol::Http1, &format!("127.0.0.1:{PORT}"), to);
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
