//! The rest of the mesh: services that nobody here calls.

use std::ops::Range;

use fenceline_crds::ServiceFence;
use futures::{StreamExt, TryStreamExt, stream};
use k8s_openapi::api::core::v1::{Pod, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::Api;
use kube::api::{DeleteParams, Patch, PatchParams, PostParams};
use serde_json::json;

use crate::lab::Lab;

/// How many idle services share a namespace.
const PER_NAMESPACE: usize = 50;

/// The namespace of a fenceable service.
fn team(number: usize) -> String {
    format!("team-{}", number / PER_NAMESPACE)
}

impl Lab {
    /// Makes services with an HTTP and a gRPC port and two endpoints each, in namespaces `idle-0`, `idle-1`, …
    ///
    /// # Errors
    /// Fails when the API refuses one.
    pub async fn idle_services(&self, count: usize) -> anyhow::Result<()> {
        self.idle_services_from(0, count).await
    }

    /// Makes more of them, from one number to below another.
    ///
    /// # Errors
    /// Fails when the API refuses one.
    pub async fn idle_services_from(&self, from: usize, to: usize) -> anyhow::Result<()> {
        for number in from.div_ceil(PER_NAMESPACE)..to.div_ceil(PER_NAMESPACE) {
            self.namespace(&format!("idle-{number}")).await?;
        }
        stream::iter(from..to)
            .map(|number| self.idle_service(number))
            .buffer_unordered(16)
            .try_collect()
            .await
    }

    /// Makes fences for idle services by number, which have no pods.
    ///
    /// # Errors
    /// Fails when the API refuses one.
    pub async fn idle_fences(&self, numbers: Range<usize>) -> anyhow::Result<()> {
        stream::iter(numbers)
            .map(async |number| {
                let namespace = format!("idle-{}", number / PER_NAMESPACE);
                let name = format!("service-{number}");
                let fence = json!({
                    "metadata": {"name": name, "namespace": namespace},
                    "spec": {"workload": {"selector": {"matchLabels": {"app": name}}}},
                });
                let fences: Api<ServiceFence> = Api::namespaced(self.client.clone(), &namespace);
                let fence = serde_json::from_value(fence)?;
                fences.create(&PostParams::default(), &fence).await?;
                Ok(())
            })
            .buffer_unordered(16)
            .try_collect()
            .await
    }

    /// Makes HTTP services by number that select pods, of which there are none.
    ///
    /// # Errors
    /// Fails when the API refuses one.
    pub async fn fenceable_services(&self, numbers: Range<usize>) -> anyhow::Result<()> {
        for number in numbers.clone().filter(|number| number % PER_NAMESPACE == 0) {
            self.namespace(&team(number)).await?;
        }
        stream::iter(numbers)
            .map(async |number| {
                let name = format!("service-{number}");
                let service = json!({
                    "metadata": {"name": name},
                    "spec": {"selector": {"app": name}, "ports": [{"name": "http", "port": 80}]},
                });
                let services: Api<Service> = Api::namespaced(self.client.clone(), &team(number));
                let service = serde_json::from_value(service)?;
                services.create(&PostParams::default(), &service).await?;
                Ok(())
            })
            .buffer_unordered(16)
            .try_collect()
            .await
    }

    /// Makes pods for those services, so many for each, that are ready and of which nothing runs: `generation` has them differ from those before, in name
    /// and address.
    ///
    /// # Errors
    /// Fails when the API refuses one.
    pub async fn fenceable_pods(
        &self,
        numbers: Range<usize>,
        each: usize,
        generation: usize,
    ) -> anyhow::Result<()> {
        let pods = numbers.flat_map(|number| (0..each).map(move |replica| (number, replica)));
        stream::iter(pods)
            .map(async |(number, replica)| self.fenceable_pod(number, replica, generation).await)
            .buffer_unordered(16)
            .try_collect()
            .await
    }

    async fn fenceable_pod(
        &self,
        number: usize,
        replica: usize,
        generation: usize,
    ) -> anyhow::Result<()> {
        let api: Api<Pod> = Api::namespaced(self.client.clone(), &team(number));
        let service = format!("service-{number}");
        let name = format!("{service}-{generation}-{replica}");
        let pod = json!({
            "metadata": {
                "name": name,
                "labels": {"app": service, "security.istio.io/tlsMode": "istio"},
            },
            "spec": {
                "nodeName": "lab",
                "serviceAccountName": service,
                "containers": [{"name": "app", "image": "lab"}, {"name": "istio-proxy", "image": "lab"}],
            },
        });
        api.create(&PostParams::default(), &serde_json::from_value(pod)?)
            .await?;
        let [high, low] = u16::try_from(number)?.to_be_bytes();
        let part = 128 + (replica + generation * 2) % 64;
        let ip = format!("10.{part}.{high}.{low}");
        let status = json!({"status": {
            "phase": "Running",
            "podIP": ip,
            "podIPs": [{"ip": ip}],
            "conditions": [{"type": "Ready", "status": "True"}],
        }});
        api.patch_status(&name, &PatchParams::default(), &Patch::Merge(status))
            .await?;
        Ok(())
    }

    /// Replaces a service's pods by the next generation, as a rollout does.
    ///
    /// # Errors
    /// Fails when the API refuses it.
    pub async fn roll_fenceable_pods(
        &self,
        number: usize,
        each: usize,
        generation: usize,
    ) -> anyhow::Result<()> {
        let api: Api<Pod> = Api::namespaced(self.client.clone(), &team(number));
        for replica in 0..each {
            self.fenceable_pod(number, replica, generation + 1).await?;
            let name = format!("service-{number}-{generation}-{replica}");
            api.delete(&name, &DeleteParams::default().grace_period(0))
                .await?;
        }
        Ok(())
    }

    async fn idle_service(&self, number: usize) -> anyhow::Result<()> {
        let namespace = format!("idle-{}", number / PER_NAMESPACE);
        let name = format!("service-{number}");
        let ports = [("http", 80), ("grpc", 9090)];
        // Without a selector, so that the endpoints below stay.
        let service = json!({
            "metadata": {"name": name, "namespace": namespace},
            "spec": {"ports": ports.map(|(name, port)| json!({"name": name, "port": port}))},
        });
        let [high, low] = u16::try_from(number)?.to_be_bytes();
        let endpoints = [201, 202].map(|part| {
            json!({
                "addresses": [format!("10.{part}.{high}.{low}")],
                "conditions": {"ready": true},
            })
        });
        let slice = json!({
            "metadata": {
                "name": name,
                "namespace": namespace,
                "labels": {"kubernetes.io/service-name": name},
            },
            "addressType": "IPv4",
            "endpoints": endpoints,
            "ports": ports.map(|(name, port)| json!({"name": name, "port": port, "protocol": "TCP"})),
        });
        let create = PostParams::default();
        let services: Api<Service> = Api::namespaced(self.client.clone(), &namespace);
        services
            .create(&create, &serde_json::from_value(service)?)
            .await?;
        let slices: Api<EndpointSlice> = Api::namespaced(self.client.clone(), &namespace);
        slices
            .create(&create, &serde_json::from_value(slice)?)
            .await?;
        Ok(())
    }
}
