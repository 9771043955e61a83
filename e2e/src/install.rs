//! Installs Fenceline into a lab as its README says, and runs what its Deployments ask for.

use std::collections::BTreeMap;

use anyhow::Context;
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::ConfigMap;
use kube::Api;

use crate::app::Protocol;
use crate::control_plane::kubeconfig;
use crate::lab::{Lab, PATIENCE};
use crate::pod::{App, PodSpec};
use crate::pods::request;
use crate::process::processor_time;
use crate::wait::eventually;

/// Where Fenceline lives.
pub const SYSTEM: &str = "fenceline-system";
/// The operator's first replica.
pub const OPERATOR: &str = "fenceline-0";
/// The global proxy's first replica.
pub const GLOBAL_PROXY: &str = "global-proxy-0";

impl Lab {
    /// Applies the CRDs and the kustomization, then runs one replica of the global proxy and one of the operator.
    ///
    /// # Errors
    /// Fails when something is refused or does not get ready.
    pub async fn install(&mut self) -> anyhow::Result<()> {
        self.install_from("global-proxy-config").await
    }

    /// As [`Lab::install`], from a kustomization of the caller's.
    ///
    /// # Errors
    /// Fails when something is refused or does not get ready.
    pub async fn install_from(&mut self, kustomization: &str) -> anyhow::Result<()> {
        self.apply_manifests(kustomization).await?;
        self.start_global_proxy(GLOBAL_PROXY).await?;
        self.start_operator(OPERATOR).await
    }

    /// What a user applies.
    ///
    /// # Errors
    /// Fails when the API refuses it.
    pub async fn apply_manifests(&self, kustomization: &str) -> anyhow::Result<()> {
        self.kubectl(&["apply", "--server-side", "-f", "crds/"])
            .await?;
        for crd in [
            "crd/servicefences.fenceline.dev",
            "crd/fencepolicies.fenceline.dev",
            "crd/routers.fenceline.dev",
            "crd/trafficpatches.fenceline.dev",
            "crd/ratelimits.fenceline.dev",
        ] {
            let wait = ["wait", "--for=condition=Established", crd];
            // A CRD that is a moment old has no conditions to wait for.
            eventually(PATIENCE, crd, async || self.kubectl(&wait).await.map(drop)).await?;
        }
        self.kubectl(&["apply", "--validate=strict", "-k", kustomization])
            .await
            .map(drop)
    }

    /// A pod as the Deployment's template asks for it.
    pub(crate) async fn replica(
        &self,
        deployment: &str,
        name: &str,
    ) -> anyhow::Result<(PodSpec, Vec<String>)> {
        let api: Api<Deployment> = Api::namespaced(self.client.clone(), SYSTEM);
        let template = api.get(deployment).await?.spec.context("a spec")?.template;
        let meta = template.metadata.unwrap_or_default();
        let pod = template.spec.context("a pod's spec")?;
        let annotations = meta.annotations.unwrap_or_default();
        let of = |name: &str| annotations.get(name).map(String::as_str);
        let mode = of("sidecar.istio.io/interceptionMode");
        let mut spec = PodSpec::new(SYSTEM, name);
        if let Some(config) = of("proxy.istio.io/config") {
            spec.proxy_config = serde_yaml::from_str(config)?;
        }
        if let Some(name) = of("sidecar.istio.io/bootstrapOverride") {
            let maps: Api<ConfigMap> = Api::namespaced(self.client.clone(), SYSTEM);
            let mut data = maps.get(name).await?.data.unwrap_or_default();
            spec.bootstrap = data.remove("custom_bootstrap.json");
        }
        spec.labels = meta.labels.unwrap_or_default();
        spec.service_account = pod.service_account_name.context("a service account")?;
        spec.capture = mode != Some("NONE");
        let args = pod
            .containers
            .first()
            .and_then(|container| container.args.clone());
        Ok((spec, args.unwrap_or_default()))
    }

    /// Starts a replica of the global proxy.
    ///
    /// # Errors
    /// Fails when it does not get ready.
    pub async fn start_global_proxy(&mut self, name: &str) -> anyhow::Result<()> {
        let (spec, _) = self.replica("global-proxy", name).await?;
        self.pod(spec.app(App::Nothing)).await
    }

    /// Starts a replica of the operator with its own service account's rights, and waits until it is ready.
    ///
    /// # Errors
    /// Fails when it does not get ready.
    pub async fn start_operator(&mut self, name: &str) -> anyhow::Result<()> {
        let (mut spec, mut args) = self.replica("fenceline", name).await?;
        let token = self.token(SYSTEM, &spec.service_account, "").await?;
        let path = self.scratch.join(format!("{name}.kubeconfig"));
        std::fs::write(&path, kubeconfig(&self.operator_server, &token))?;
        let env = [("KUBECONFIG".to_owned(), path.to_string_lossy().into_owned())];
        // What the Deployment mounts.
        let secrets = self
            .scratch
            .join(format!("pods/{SYSTEM}.{name}/var/run/secrets"));
        let secret = |flag: &str, file: &str| format!("{flag}={}", secrets.join(file).display());
        args.push(secret("--istiod-token-file", "tokens/istio-token"));
        args.push(secret("--istiod-ca-file", "istio/root-cert.pem"));
        args.extend(self.operator_args.iter().cloned());
        let program = self.tools.fenceline.clone();
        spec = spec.app(App::Command {
            program,
            args,
            env: BTreeMap::from(env),
        });
        self.pod(spec).await?;
        self.operator_ready(name).await
    }

    /// Waits until `/readyz` says so.
    ///
    /// # Errors
    /// Fails when it does not in time.
    pub async fn operator_ready(&self, name: &str) -> anyhow::Result<()> {
        eventually(PATIENCE, "the operator is ready", async || {
            let ready = self.operator_get(name, "/readyz").await?;
            anyhow::ensure!(ready.0 == 200, "{ready:?}");
            Ok(())
        })
        .await
    }

    /// Asks the operator's admin port, from the lab's own network, as a kubelet or Prometheus would.
    ///
    /// # Errors
    /// Fails when nothing answers.
    pub async fn operator_get(&self, name: &str, path: &str) -> anyhow::Result<(u16, String)> {
        let ip = self.running(SYSTEM, name)?.ip;
        let mut call = request(Protocol::Http1, &format!("{ip}:8080"), (ip, 8080).into());
        path.clone_into(&mut call.path);
        let outcome = crate::app::Caller::default().call(&call).await;
        anyhow::ensure!(outcome.status != 0, "no answer: {outcome:?}");
        Ok((outcome.status, outcome.body))
    }

    /// How long each dependency took from its access log entry to the stored Sidecar, by the operator's log, in
    /// its order.
    ///
    /// # Errors
    /// Fails when the log cannot be read.
    pub fn learning_times(&self, name: &str) -> anyhow::Result<Vec<std::time::Duration>> {
        let log = std::fs::read_to_string(self.logs.join(format!("{SYSTEM}.{name}.app.log")))?;
        let lines = log
            .lines()
            .filter_map(|line| serde_json::from_str(line).ok());
        let fields = lines.map(|line: serde_json::Value| line["fields"].clone());
        let learnt = fields.filter(|fields| fields["message"] == "in scope");
        let took = learnt
            .filter_map(|fields| {
                fields["took_us"]
                    .as_u64()
                    .map(std::time::Duration::from_micros)
            })
            .collect();
        Ok(took)
    }

    /// The operator's resident memory, in KiB.
    ///
    /// # Errors
    /// Fails when it does not run.
    pub fn operator_memory(&self, name: &str) -> anyhow::Result<u64> {
        let id = self.running(SYSTEM, name)?.app_id()?;
        let status = std::fs::read_to_string(format!("/proc/{id}/status"))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kib = line.and_then(|line| line.trim().strip_suffix(" kB"));
        Ok(kib.context("no VmRSS")?.trim().parse()?)
    }

    /// The processor time that the operator has had, in all its threads.
    ///
    /// # Errors
    /// Fails when it does not run.
    pub fn operator_cpu(&self, name: &str) -> anyhow::Result<std::time::Duration> {
        let id = self.running(SYSTEM, name)?.app_id()?;
        processor_time(id)
    }

    /// A metric of the operator, summed over the series whose labels contain `labels`.
    ///
    /// # Errors
    /// Fails when the operator does not answer.
    pub async fn metric(&self, operator: &str, name: &str, labels: &str) -> anyhow::Result<f64> {
        let (_, text) = self.operator_get(operator, "/metrics").await?;
        let named = text.lines().filter(|line| {
            let end = line.find(['{', ' ']).unwrap_or(line.len());
            line[..end] == *name && line.contains(labels)
        });
        Ok(named
            .filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok())
            .sum())
    }
}
