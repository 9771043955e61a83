//! What tests of RateLimits need: limits and what they say, floods of requests, a gateway, and the rate limit service with its Redis.

use std::time::Duration;

use anyhow::Context;
use fenceline_crds::RateLimit;
use k8s_openapi::api::apps::v1::Deployment;
use kube::Api;

use crate::app::{Call, Flood, Flooded, Protocol, flood};
use crate::fences::Name;
use crate::install::SYSTEM;
use crate::lab::{Lab, PATIENCE};
use crate::pod::{App, PodSpec};
use crate::pods::request;
use crate::wait::eventually;

/// The rate limit service's only replica.
pub const RATE_LIMIT_SERVICE: &str = "ratelimit-0";
/// Its Redis.
pub const REDIS: &str = "redis-0";

/// A request that a flood makes, as a client of a namespace writes it.
#[derive(Clone, Debug)]
pub struct Kind {
    pub method: &'static str,
    pub path: &'static str,
    pub headers: &'static [(&'static str, &'static str)],
}

impl Kind {
    pub const fn get(path: &'static str) -> Self {
        Self {
            method: "GET",
            path,
            headers: &[],
        }
    }

    pub const fn with(mut self, headers: &'static [(&'static str, &'static str)]) -> Self {
        self.headers = headers;
        self
    }
}

impl Lab {
    /// Applies a RateLimit; `spec` is YAML in flow style.
    ///
    /// # Errors
    /// Fails when the API refuses it.
    pub async fn rate_limit(&self, limit: Name<'_>, spec: &str) -> anyhow::Result<()> {
        let (namespace, name) = limit;
        self.apply(&format!(
            "{{apiVersion: fenceline.dev/v1alpha1, kind: RateLimit, \
             metadata: {{name: {name}, namespace: {namespace}}}, spec: {spec}}}"
        ))
        .await
    }

    /// # Errors
    /// Fails when there is none.
    pub async fn get_rate_limit(&self, limit: Name<'_>) -> anyhow::Result<RateLimit> {
        let api: Api<RateLimit> = Api::namespaced(self.client.clone(), limit.0);
        Ok(api.get(limit.1).await?)
    }

    /// Waits until the RateLimit gives a reason for being ready or not, of its newest spec; gives the message.
    ///
    /// # Errors
    /// Fails when it never does.
    pub async fn until_limit(&self, limit: Name<'_>, reason: &str) -> anyhow::Result<String> {
        eventually(
            PATIENCE * 2,
            &format!("RateLimit {limit:?} says {reason}"),
            async || {
                let object = self.get_rate_limit(limit).await?;
                let status = object.status.context("no status")?;
                let ready = status.conditions.iter().find(|said| said.type_ == "Ready");
                let ready = ready.context("no Ready condition")?;
                let newest = status.observed_generation == object.metadata.generation;
                anyhow::ensure!(newest && ready.reason == reason, "{ready:?}");
                Ok(ready.message.clone())
            },
        )
        .await
    }

    /// Applies a RateLimit and waits until every proxy has it.
    ///
    /// # Errors
    /// Fails when that does not come to be.
    pub async fn limited(&self, limit: Name<'_>, spec: &str) -> anyhow::Result<()> {
        self.rate_limit(limit, spec).await?;
        self.until_limit(limit, "InForce").await.map(drop)
    }

    /// Deletes a RateLimit and waits until its EnvoyFilter is gone.
    ///
    /// # Errors
    /// Fails when it stays.
    pub async fn unlimited(&self, limit: Name<'_>) -> anyhow::Result<()> {
        self.kubectl(&["-n", limit.0, "delete", "ratelimit", limit.1])
            .await?;
        let name = format!("fenceline-rate-limit-{}", limit.1);
        eventually(PATIENCE, "the EnvoyFilter goes", async || {
            let get = [
                "-n",
                limit.0,
                "get",
                "envoyfilter",
                &name,
                "--ignore-not-found",
                "-o",
                "name",
            ];
            let left = self.kubectl(&get).await?;
            anyhow::ensure!(left.trim().is_empty(), "{left}");
            Ok(())
        })
        .await
    }

    /// Calls of a Service, as `host:port`, of these kinds.
    ///
    /// # Errors
    /// Fails when there is no such Service.
    pub async fn calls(
        &self,
        from: &str,
        authority: &str,
        kinds: &[Kind],
    ) -> anyhow::Result<Vec<Call>> {
        let (host, port) = authority.rsplit_once(':').context("host:port")?;
        let connect = self.resolve(from, host, port.parse()?).await?;
        let call = |kind: &Kind| Call {
            method: kind.method.to_owned(),
            path: kind.path.to_owned(),
            headers: kind
                .headers
                .iter()
                .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
                .collect(),
            ..request(Protocol::Http1, authority, connect)
        };
        Ok(kinds.iter().map(call).collect())
    }

    /// Lets a pod make so many of each of these calls a second, for a while.
    ///
    /// # Errors
    /// Fails when the pod's application is gone.
    pub async fn flood(
        &self,
        from: Name<'_>,
        calls: Vec<Call>,
        each: u32,
        time: Duration,
    ) -> anyhow::Result<Flooded> {
        let kinds = u32::try_from(calls.len())?;
        let order = Flood {
            calls,
            connections: 16,
            per_second: each * kinds,
            time,
        };
        flood(self.running(from.0, from.1)?.control(), &order).await
    }

    /// Starts the rate limit service and its Redis, as a user does.
    ///
    /// # Errors
    /// Fails when one does not start.
    pub async fn start_rate_limit_service(&mut self) -> anyhow::Result<()> {
        self.kubectl(&[
            "apply",
            "--validate=strict",
            "-k",
            "global-proxy-config/rate-limit-service",
        ])
        .await?;
        self.start_redis().await?;
        self.start_rate_limit_replica(RATE_LIMIT_SERVICE).await
    }

    /// Starts Redis, also again after it was ended.
    ///
    /// # Errors
    /// Fails when it does not start.
    pub async fn start_redis(&mut self) -> anyhow::Result<()> {
        let (mut spec, args, mut env) = self.asked_for("redis", REDIS).await?;
        env.insert(
            "LD_LIBRARY_PATH".into(),
            self.tools.debian_libraries.to_string_lossy().into_owned(),
        );
        spec.app = App::Command {
            program: self.tools.redis.clone(),
            args,
            env,
        };
        self.pod(spec).await
    }

    /// Starts a replica of the rate limit service.
    ///
    /// # Errors
    /// Fails when it does not start.
    pub async fn start_rate_limit_replica(&mut self, name: &str) -> anyhow::Result<()> {
        let (mut spec, args, env) = self.asked_for("ratelimit", name).await?;
        for service in ["fenceline", "redis"] {
            let address = self.resolve(SYSTEM, service, 0).await?.ip();
            spec.hosts
                .insert(format!("{service}.{SYSTEM}.svc.cluster.local"), address);
        }
        // It is held until its proxy has started, as its template asks for.
        let (namespace, name) = (spec.namespace.clone(), spec.name.clone());
        self.pod(spec.app(App::Nothing)).await?;
        let app = App::Command {
            program: self.tools.rate_limit_service.clone(),
            args,
            env,
        };
        let pod = self.running_mut(&namespace, &name)?;
        pod.spec.app = app;
        pod.start_app()
    }

    /// A pod as a Deployment's template asks for it, its arguments and its environment.
    async fn asked_for(
        &self,
        deployment: &str,
        name: &str,
    ) -> anyhow::Result<(
        PodSpec,
        Vec<String>,
        std::collections::BTreeMap<String, String>,
    )> {
        let (spec, args) = self.replica(deployment, name).await?;
        let api: Api<Deployment> = Api::namespaced(self.client.clone(), SYSTEM);
        let template = api.get(deployment).await?.spec.context("a spec")?.template;
        let pod = template.spec.context("a pod's spec")?;
        let env = pod
            .containers
            .into_iter()
            .next()
            .and_then(|container| container.env)
            .unwrap_or_default();
        // The only field that is asked for is the pod's name.
        let env = env
            .into_iter()
            .map(|one| (one.name, one.value.unwrap_or_else(|| name.to_owned())));
        Ok((spec, args, env.collect()))
    }

    /// Starts a gateway on port 8443 for mesh callers, with their certificates, which leads every request to a Service; its own Service
    /// is `gateway.NAMESPACE`.
    ///
    /// # Errors
    /// Fails when it does not start.
    pub async fn gateway(&mut self, namespace: &str, to: &str) -> anyhow::Result<()> {
        self.service(namespace, "gateway", &["http:8443"]).await?;
        self.apply(&format!(
            "{{apiVersion: networking.istio.io/v1, kind: Gateway, metadata: {{name: gateway, namespace: {namespace}}}, \
              spec: {{selector: {{app: gateway}}, servers: [{{port: {{number: 8443, name: https, protocol: HTTPS}}, \
              tls: {{mode: ISTIO_MUTUAL}}, hosts: ['*']}}]}}}}\n---\n\
             {{apiVersion: networking.istio.io/v1, kind: VirtualService, metadata: {{name: gateway, namespace: {namespace}}}, \
              spec: {{hosts: ['*'], gateways: [gateway], http: [{{route: [{{destination: {{host: {to}}}}}]}}]}}}}"
        ))
        .await?;
        self.pod(PodSpec::new(namespace, "gateway").gateway()).await
    }
}
