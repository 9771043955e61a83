//! Pods of a lab: started, found, called.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::Context;
use k8s_openapi::api::core::v1::Pod as PodObject;
use k8s_openapi::api::core::v1::{ConfigMap, Service, ServiceAccount};
use kube::Api;
use kube::api::{DeleteParams, Patch, PatchParams, PostParams};
use serde_json::json;

use crate::app::{Call, Outcome, Protocol, Shape};
use crate::control_plane::ADDRESS;
use crate::lab::{Lab, PATIENCE};
use crate::pod::{Pod, PodSpec, Surroundings};
use crate::wait::eventually;

impl Lab {
    /// Starts a pod and waits until its sidecar serves.
    ///
    /// # Errors
    /// Fails when a part of it does not start.
    pub async fn pod(&mut self, spec: PodSpec) -> anyhow::Result<()> {
        let (namespace, name) = (spec.namespace.clone(), spec.name.clone());
        let id = spec.id();
        self.started += 1;
        let number = self.started;
        self.pod_object(&spec, number).await?;
        let root_certificate = self.root_certificate(&namespace).await?;
        let token = self
            .token(&namespace, &spec.service_account, "istio-ca")
            .await?;
        let around = Surroundings {
            tools: &self.tools,
            scratch: &self.scratch,
            logs: &self.logs,
            number,
            token: &token,
            root_certificate: &root_certificate,
        };
        let mut pod = Pod::start(spec, &around)?;
        let what = format!("pod {namespace}/{name} serves");
        eventually(PATIENCE, &what, async || pod.ready().await).await?;
        self.pods.insert(id, pod);
        self.tell_prometheus()
    }

    async fn pod_object(&self, spec: &PodSpec, number: u16) -> anyhow::Result<()> {
        let account = json!({
            "apiVersion": "v1", "kind": "ServiceAccount",
            "metadata": {"name": spec.service_account, "namespace": spec.namespace},
        });
        let accounts: Api<ServiceAccount> = Api::namespaced(self.client.clone(), &spec.namespace);
        let apply = PatchParams::apply("lab");
        accounts
            .patch(&spec.service_account, &apply, &Patch::Apply(account))
            .await?;

        let pods: Api<PodObject> = Api::namespaced(self.client.clone(), &spec.namespace);
        let object = serde_json::from_value(spec.object())?;
        pods.create(&PostParams::default(), &object)
            .await
            .context("the Pod object")?;
        let ip = Pod::address(number).to_string();
        let status = json!({"status": {
            "phase": "Running", "podIP": ip, "podIPs": [{"ip": ip}], "hostIP": ADDRESS,
            "conditions": [{"type": "Ready", "status": "True"}],
        }});
        let patch = PatchParams::default();
        pods.patch_status(&spec.name, &patch, &Patch::Merge(status))
            .await?;
        Ok(())
    }

    /// The mesh's root certificate, which istiod puts into every namespace.
    pub(crate) async fn root_certificate(&self, namespace: &str) -> anyhow::Result<String> {
        let maps: Api<ConfigMap> = Api::namespaced(self.client.clone(), namespace);
        eventually(
            PATIENCE,
            "istiod publishes its root certificate",
            async || {
                let map = maps.get("istio-ca-root-cert").await?;
                let data = map.data.and_then(|mut data| data.remove("root-cert.pem"));
                data.context("no root-cert.pem")
            },
        )
        .await
    }

    /// A token of a service account.
    ///
    /// # Errors
    /// Fails when the account does not exist.
    pub async fn token(
        &self,
        namespace: &str,
        name: &str,
        audience: &str,
    ) -> anyhow::Result<String> {
        let mut args = vec!["-n", namespace, "create", "token", name, "--duration=24h"];
        if !audience.is_empty() {
            args.extend(["--audience", audience]);
        }
        Ok(self.kubectl(&args).await?.trim().to_owned())
    }

    pub(crate) fn pods(&self) -> impl Iterator<Item = &Pod> {
        self.pods.values()
    }

    /// A running pod.
    ///
    /// # Errors
    /// Fails when there is none of this name.
    pub fn running(&self, namespace: &str, name: &str) -> anyhow::Result<&Pod> {
        let id = format!("{namespace}.{name}");
        self.pods
            .get(&id)
            .with_context(|| format!("no pod {id} runs"))
    }

    /// A running pod, to be changed.
    ///
    /// # Errors
    /// Fails when there is none of this name.
    pub fn running_mut(&mut self, namespace: &str, name: &str) -> anyhow::Result<&mut Pod> {
        let id = format!("{namespace}.{name}");
        self.pods
            .get_mut(&id)
            .with_context(|| format!("no pod {id} runs"))
    }

    /// Ends a pod and deletes its object.
    ///
    /// # Errors
    /// Fails when there is none of this name.
    pub async fn delete_pod(&mut self, namespace: &str, name: &str) -> anyhow::Result<()> {
        let id = format!("{namespace}.{name}");
        let pod = self
            .pods
            .remove(&id)
            .with_context(|| format!("no pod {id} runs"))?;
        let api: Api<PodObject> = Api::namespaced(self.client.clone(), namespace);
        api.delete(name, &DeleteParams::default().grace_period(0))
            .await?;
        pod.stop().await
    }

    /// What cluster DNS would answer: a Service's address in the caller's namespace, or in the one that is named.
    ///
    /// # Errors
    /// Fails when no Service of this name has an address.
    pub async fn resolve(&self, from: &str, host: &str, port: u16) -> anyhow::Result<SocketAddr> {
        let mut labels = host.trim_end_matches('.').split('.');
        let name = labels.next().unwrap_or_default();
        let namespace = labels.next().unwrap_or(from);
        let services: Api<Service> = Api::namespaced(self.client.clone(), namespace);
        let service = services
            .get(name)
            .await
            .with_context(|| format!("DNS knows no {host}"))?;
        let ip = service
            .spec
            .and_then(|spec| spec.cluster_ip)
            .context("no address")?;
        Ok(SocketAddr::new(
            ip.parse().context("a headless Service")?,
            port,
        ))
    }

    /// Makes the request that an application in the pod would make for `http://AUTHORITY/…`.
    ///
    /// # Errors
    /// Fails when the name does not resolve or the pod's application is gone; a failed call is an outcome.
    pub async fn get(
        &self,
        from: (&str, &str),
        protocol: Protocol,
        authority: &str,
    ) -> anyhow::Result<Outcome> {
        let (host, port) = authority.rsplit_once(':').unwrap_or((authority, "80"));
        let connect = self.resolve(from.0, host, port.parse()?).await?;
        self.call(from, &request(protocol, authority, connect))
            .await
    }

    /// Makes a call from a pod.
    ///
    /// # Errors
    /// Fails when the pod's application is gone; a failed call is an outcome.
    pub async fn call(&self, from: (&str, &str), call: &Call) -> anyhow::Result<Outcome> {
        self.running(from.0, from.1)?.call(call).await
    }
}

/// A GET (for gRPC: a unary call) of `/`.
pub fn request(protocol: Protocol, authority: &str, connect: SocketAddr) -> Call {
    let grpc = protocol == Protocol::Grpc;
    Call {
        protocol,
        method: "GET".into(),
        authority: authority.into(),
        path: if grpc { "/lab.Echo/Say" } else { "/" }.into(),
        connect,
        headers: BTreeMap::new(),
        body_bytes: 0,
        timeout: Duration::from_secs(15),
        shape: Shape::Whole,
    }
}
