//! The rest of the mesh: services that nobody here calls.

use std::ops::Range;

use fenceline_crds::ServiceFence;
use futures::{StreamExt, TryStreamExt, stream};
use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::Api;
use kube::api::PostParams;
use serde_json::json;

use crate::lab::Lab;

/// How many idle services share a namespace.
const PER_NAMESPACE: usize = 50;

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
        let namespace = |number: usize| format!("team-{}", number / PER_NAMESPACE);
        for number in numbers.clone().filter(|number| number % PER_NAMESPACE == 0) {
            self.namespace(&namespace(number)).await?;
        }
        stream::iter(numbers)
            .map(async |number| {
                let name = format!("service-{number}");
                let service = json!({
                    "metadata": {"name": name},
                    "spec": {"selector": {"app": name}, "ports": [{"name": "http", "port": 80}]},
                });
                let services: Api<Service> =
                    Api::namespaced(self.client.clone(), &namespace(number));
                let service = serde_json::from_value(service)?;
                services.create(&PostParams::default(), &service).await?;
                Ok(())
            })
            .buffer_unordered(16)
            .try_collect()
            .await
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
