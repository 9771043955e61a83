//! What a proxy costs: its memory, its configuration, what istiod sent it.

use std::collections::BTreeSet;
use std::fmt;

use anyhow::Context;

use crate::Lab;

/// What one workload's proxy costs.
#[derive(Clone, Copy, Debug, Default)]
pub struct Cost {
    /// Bytes that Envoy has allocated.
    pub memory: f64,
    /// Bytes of its whole configuration, as its admin interface prints it.
    pub config: f64,
    /// Bytes of xDS that it received since it was started.
    pub received: f64,
    /// Services of the mesh that it has clusters for.
    pub services: usize,
}

impl Lab {
    /// What the proxy of a pod, a namespace and a name, costs now.
    ///
    /// # Errors
    /// Fails when its admin interface does not answer.
    pub async fn cost(&self, (namespace, name): (&str, &str)) -> anyhow::Result<Cost> {
        let pod = self.running(namespace, name)?;
        let memory: serde_json::Value = serde_json::from_str(&pod.envoy("/memory").await?)?;
        let allocated = memory["allocated"].as_str().context("Envoy's memory")?;
        let config = pod.envoy("/config_dump?include_eds").await?;
        let clusters = pod.envoy("/clusters").await?;
        let hosts = clusters.lines().filter_map(|line| {
            let name = line.strip_prefix("outbound|")?.split("::").next()?;
            name.rsplit('|').next()
        });
        let hosts: BTreeSet<&str> = hosts.collect();
        let received = pod
            .envoy("/stats?filter=^cluster.xds-grpc;?.upstream_cx_rx_bytes_total$")
            .await?;
        let received = received.trim().rsplit(' ').next().unwrap_or_default();
        #[expect(clippy::cast_precision_loss, reason = "shown in megabytes")]
        let config = config.len() as f64;
        Ok(Cost {
            memory: allocated.parse()?,
            config,
            received: received.parse().context("Envoy's bytes of xDS")?,
            services: hosts.len(),
        })
    }

    /// What the proxies of these pods cost, each of them.
    ///
    /// # Errors
    /// Fails when an admin interface does not answer.
    pub async fn mean_cost(&self, pods: &[(&str, &str)]) -> anyhow::Result<Mean> {
        let mut mean = Mean::default();
        #[expect(clippy::cast_precision_loss, reason = "a mean")]
        let share = 1.0 / pods.len() as f64;
        for pod in pods {
            let cost = self.cost(*pod).await?;
            mean.memory += cost.memory * share;
            mean.config += cost.config * share;
            mean.received += cost.received * share;
            #[expect(clippy::cast_precision_loss, reason = "a mean")]
            let services = cost.services as f64;
            mean.services += services * share;
        }
        Ok(mean)
    }
}

/// What proxies cost, as [`Cost`] has it.
#[derive(Clone, Copy, Debug, Default)]
pub struct Mean {
    pub memory: f64,
    pub config: f64,
    pub received: f64,
    pub services: f64,
}

impl fmt::Display for Mean {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:.2} MB of memory, {:.0} kB of configuration, {:.1} services; {:.0} kB of xDS received since its start",
            self.memory / 1e6,
            self.config / 1e3,
            self.services,
            self.received / 1e3,
        )
    }
}
