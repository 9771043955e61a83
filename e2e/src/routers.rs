//! What tests ask about Routers and patches.

use anyhow::Context;
use fenceline_crds::{Router, TrafficPatch};
use kube::Api;

use crate::fences::Name;
use crate::lab::{Lab, PATIENCE};
use crate::pod::PodSpec;
use crate::wait::eventually;

impl Lab {
    /// Applies a Router; `spec` is YAML in flow style.
    ///
    /// # Errors
    /// Fails when the API refuses it.
    pub async fn router(&self, router: Name<'_>, spec: &str) -> anyhow::Result<()> {
        self.apply(&object("Router", router, spec)).await
    }

    /// Applies a TrafficPatch.
    ///
    /// # Errors
    /// Fails when the API refuses it.
    pub async fn traffic_patch(&self, patch: Name<'_>, spec: &str) -> anyhow::Result<()> {
        self.apply(&object("TrafficPatch", patch, spec)).await
    }

    /// # Errors
    /// Fails when there is none.
    pub async fn get_router(&self, router: Name<'_>) -> anyhow::Result<Router> {
        let api: Api<Router> = Api::namespaced(self.client.clone(), router.0);
        Ok(api.get(router.1).await?)
    }

    /// # Errors
    /// Fails when there is none.
    pub async fn get_traffic_patch(&self, patch: Name<'_>) -> anyhow::Result<TrafficPatch> {
        let api: Api<TrafficPatch> = Api::namespaced(self.client.clone(), patch.0);
        Ok(api.get(patch.1).await?)
    }

    /// Waits until the Router gives a reason for being ready or not, of its newest spec; gives the message.
    ///
    /// # Errors
    /// Fails when it never does.
    pub async fn until_router(&self, router: Name<'_>, reason: &str) -> anyhow::Result<String> {
        let what = format!("Router {router:?} says {reason}");
        eventually(PATIENCE * 2, &what, async || {
            let router = self.get_router(router).await?;
            let status = router.status.context("no status")?;
            let newest = status.observed_generation == router.metadata.generation;
            let mut conditions = status.conditions.iter();
            let ready = conditions.find(|condition| condition.type_ == "Ready");
            let ready = ready.context("no Ready condition")?;
            anyhow::ensure!(newest && ready.reason == reason, "{ready:?}");
            Ok(ready.message.clone())
        })
        .await
    }

    /// A pod of a version: `SERVICE-VERSION`, behind the Service by its label `app`, on ports 80 and 90.
    ///
    /// # Errors
    /// Fails when it does not start.
    pub async fn version(
        &mut self,
        service: Name<'_>,
        version: &str,
        labels: &[(&str, &str)],
    ) -> anyhow::Result<()> {
        let (namespace, name) = service;
        let mut spec = PodSpec::new(namespace, &format!("{name}-{version}"))
            .label("app", name)
            .label("version", version)
            .service_account(name)
            .http(80)
            .http(90);
        for (label, value) in labels {
            spec = spec.label(label, value);
        }
        self.pod(spec).await
    }
}

fn object(kind: &str, (namespace, name): Name<'_>, spec: &str) -> String {
    format!(
        "{{apiVersion: fenceline.dev/v1alpha1, kind: {kind}, metadata: {{name: {name}, namespace: {namespace}}}, spec: {spec}}}"
    )
}
