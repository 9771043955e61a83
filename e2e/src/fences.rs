//! What tests ask about fences and what Fenceline wrote for them.

use std::time::Duration;

use anyhow::Context;
use fenceline_crds::ServiceFence;
use fenceline_crds::istio::{EnvoyFilter, Sidecar};
use kube::Api;

use crate::app::{Outcome, Protocol};
use crate::lab::{Lab, PATIENCE};
use crate::pod::PodSpec;
use crate::wait::eventually;

/// The global proxy's identity.
pub const GLOBAL_PROXY: &str = "spiffe://cluster.local/ns/fenceline-system/sa/global-proxy";

/// A namespace and a name.
pub type Name<'a> = (&'a str, &'a str);

impl Lab {
    /// Applies a fence; `spec` is YAML in flow style.
    ///
    /// # Errors
    /// Fails when the API refuses it.
    pub async fn fence(&self, fence: Name<'_>, spec: &str) -> anyhow::Result<()> {
        let (namespace, name) = fence;
        self.apply(&format!(
            "{{apiVersion: fenceline.dev/v1alpha1, kind: ServiceFence, \
             metadata: {{name: {name}, namespace: {namespace}}}, spec: {spec}}}"
        ))
        .await
    }

    /// Starts a workload: a Service with HTTP ports, and one pod behind it.
    ///
    /// # Errors
    /// Fails when it does not start.
    pub async fn workload(&mut self, workload: Name<'_>, ports: &[u16]) -> anyhow::Result<()> {
        let (namespace, name) = workload;
        let named: Vec<String> = ports.iter().map(|port| format!("http:{port}")).collect();
        let named: Vec<&str> = named.iter().map(String::as_str).collect();
        self.service(namespace, name, &named).await?;
        let spec = ports
            .iter()
            .fold(PodSpec::new(namespace, name), |spec, port| spec.http(*port));
        self.pod(spec).await
    }

    /// Many HTTP Services by these names for the pods with `app: POD`.
    ///
    /// # Errors
    /// Fails when the API does.
    pub async fn services_of(
        &self,
        pod: Name<'_>,
        names: impl IntoIterator<Item = String>,
    ) -> anyhow::Result<()> {
        let (namespace, pod) = pod;
        let services = names.into_iter().map(|name| {
            format!(
                "{{apiVersion: v1, kind: Service, metadata: {{name: {name}, namespace: {namespace}}}, \
                 spec: {{selector: {{app: {pod}}}, ports: [{{name: http, port: 80}}]}}}}"
            )
        });
        let services: Vec<String> = services.collect();
        self.apply(&services.join("\n---\n")).await
    }

    /// # Errors
    /// Fails when there is no such fence.
    pub async fn get_fence(&self, fence: Name<'_>) -> anyhow::Result<ServiceFence> {
        let api: Api<ServiceFence> = Api::namespaced(self.client.clone(), fence.0);
        Ok(api.get(fence.1).await?)
    }

    /// # Errors
    /// Fails when the API does.
    pub async fn sidecar(&self, fence: Name<'_>) -> anyhow::Result<Option<Sidecar>> {
        let api: Api<Sidecar> = Api::namespaced(self.client.clone(), fence.0);
        Ok(api.get_opt(&format!("fenceline-{}", fence.1)).await?)
    }

    /// # Errors
    /// Fails when the API does.
    pub async fn redirect(&self, fence: Name<'_>) -> anyhow::Result<Option<EnvoyFilter>> {
        let api: Api<EnvoyFilter> = Api::namespaced(self.client.clone(), fence.0);
        Ok(api.get_opt(&format!("fenceline-{}", fence.1)).await?)
    }

    /// What all redirects have in common.
    ///
    /// # Errors
    /// Fails when the API does not answer.
    pub async fn mesh_redirect(&self) -> anyhow::Result<Option<EnvoyFilter>> {
        let api: Api<EnvoyFilter> = Api::namespaced(self.client.clone(), "istio-system");
        Ok(api.get_opt("fenceline").await?)
    }

    /// The hosts that the fence's Sidecar gives routes.
    ///
    /// # Errors
    /// Fails when there is none.
    pub async fn scope(&self, fence: Name<'_>) -> anyhow::Result<Vec<String>> {
        let sidecar = self.sidecar(fence).await?.context("no Sidecar")?;
        let listeners = sidecar.spec.egress.into_iter();
        // One with a port has what is on its way in or out.
        Ok(listeners
            .filter(|listener| !listener.other.contains_key("port"))
            .flat_map(|listener| listener.hosts)
            .collect())
    }

    /// Waits until the fence's Sidecar has the host.
    ///
    /// # Errors
    /// Fails when it does not get it.
    pub async fn until_in_scope(&self, fence: Name<'_>, host: &str) -> anyhow::Result<()> {
        eventually(
            PATIENCE,
            &format!("{host} in the scope of {fence:?}"),
            async || {
                let scope = self.scope(fence).await?;
                anyhow::ensure!(scope.iter().any(|known| known == host), "it has {scope:?}");
                Ok(())
            },
        )
        .await
    }

    /// Waits until the fence's `Ready` gives this reason; returns its message.
    ///
    /// # Errors
    /// Fails with what it says instead.
    pub async fn until_reason(&self, fence: Name<'_>, reason: &str) -> anyhow::Result<String> {
        eventually(PATIENCE, &format!("{fence:?} says {reason}"), async || {
            let object = self.get_fence(fence).await?;
            let status = object.status.context("no status yet")?;
            let ready = status
                .conditions
                .into_iter()
                .find(|said| said.type_ == "Ready");
            let ready = ready.context("no condition Ready")?;
            anyhow::ensure!(
                ready.reason == reason,
                "{}: {}",
                ready.reason,
                ready.message
            );
            anyhow::ensure!(
                status.observed_generation == object.metadata.generation,
                "old news"
            );
            Ok(ready.message)
        })
        .await
    }

    /// Waits until the proxy of a pod has no cluster of `host`: a narrow scope has arrived.
    ///
    /// # Errors
    /// Fails when it keeps one.
    pub async fn until_forgotten(&self, pod: Name<'_>, host: &str) -> anyhow::Result<()> {
        eventually(
            PATIENCE,
            &format!("{pod:?} has no cluster of {host}"),
            async || {
                let clusters = self.running(pod.0, pod.1)?.envoy("/clusters").await?;
                anyhow::ensure!(
                    !clusters.contains(&format!("||{host}::")),
                    "it is still there"
                );
                Ok(())
            },
        )
        .await
    }

    /// Waits until a call from `pod` is answered under `pod`'s own identity: it went direct.
    ///
    /// # Errors
    /// Fails with the last answer that did not.
    pub async fn until_direct(
        &self,
        pod: Name<'_>,
        protocol: Protocol,
        authority: &str,
    ) -> anyhow::Result<Outcome> {
        let own = format!("spiffe://cluster.local/ns/{}/sa/{}", pod.0, pod.1);
        eventually(
            PATIENCE,
            &format!("{protocol:?} to {authority} goes direct"),
            async || {
                let outcome = self.get(pod, protocol, authority).await?;
                let report = outcome.report()?;
                anyhow::ensure!(report.peer() == Some(own.as_str()), "{report:?}");
                Ok(outcome)
            },
        )
        .await
    }

    /// Makes a call that must be answered under the identity of `pod`, the first time: it was held.
    ///
    /// # Errors
    /// Fails when there is no answer or it came another way.
    pub async fn held_call(
        &self,
        pod: Name<'_>,
        protocol: Protocol,
        authority: &str,
    ) -> anyhow::Result<Outcome> {
        let outcome = self.get(pod, protocol, authority).await?;
        let report = outcome.report()?;
        let own = format!("spiffe://cluster.local/ns/{}/sa/{}", pod.0, pod.1);
        anyhow::ensure!(report.peer() == Some(&own), "{authority}: {report:?}");
        Ok(outcome)
    }

    /// Makes a call that must be answered under the global proxy's identity: it was forwarded.
    ///
    /// # Errors
    /// Fails when there is no answer or it came another way.
    pub async fn forwarded_call(
        &self,
        pod: Name<'_>,
        protocol: Protocol,
        authority: &str,
    ) -> anyhow::Result<Outcome> {
        let outcome = self.get(pod, protocol, authority).await?;
        let report = outcome.report()?;
        anyhow::ensure!(
            report.peer() == Some(GLOBAL_PROXY),
            "{authority}: {report:?}"
        );
        Ok(outcome)
    }

    /// How often the operator has written to the API, its Lease not counted.
    ///
    /// # Errors
    /// Fails when the operator does not answer.
    pub async fn writes(&self, operator: &str) -> anyhow::Result<f64> {
        self.metric(operator, "fenceline_api_writes_total", "")
            .await
    }

    /// Waits until the operator has not written for `quiet`.
    ///
    /// # Errors
    /// Fails when it never stops writing.
    pub async fn until_quiet(&self, operator: &str, quiet: Duration) -> anyhow::Result<f64> {
        eventually(PATIENCE, "the operator has converged", async || {
            let before = self.writes(operator).await?;
            tokio::time::sleep(quiet).await;
            let after = self.writes(operator).await?;
            anyhow::ensure!(
                (before - after).abs() < 0.5,
                "{before} writes, then {after}"
            );
            Ok(after)
        })
        .await
    }
}
