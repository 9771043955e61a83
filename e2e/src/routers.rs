//! A routed service under load, and what tests ask about Routers and patches.

use std::time::Duration;

use anyhow::Context;
use fenceline_crds::{Router, TrafficPatch};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::Api;

use crate::app::Protocol;
use crate::fences::Name;
use crate::lab::{Lab, PATIENCE};
use crate::pod::PodSpec;
use crate::traffic::{Tally, Target, Traffic};
use crate::wait::{eventually, throughout};

/// The service that tests route.
pub const REVIEWS: Name<'static> = ("shop", "reviews");
/// Its callers in [`Lab::routed_mesh`], each of an istiod of its own.
pub const CLIENTS: [Name<'static>; 2] = [("shop", "client-a"), ("shop", "client-b")];

/// So many callers at the same time, each of which calls one target after the other, with `pause` between.
///
/// # Errors
/// Fails when a client does not run.
pub fn load(
    lab: &Lab,
    targets: Vec<Target>,
    callers: usize,
    pause: Duration,
) -> anyhow::Result<Traffic> {
    let pods: Vec<Name<'_>> = CLIENTS.into_iter().cycle().take(callers).collect();
    let choice = |pod: usize, round: u64, targets: usize| {
        (pod + usize::try_from(round).unwrap_or_default()) % targets
    };
    Traffic::start(lab, &pods, targets, pause, choice)
}

/// Prints what became of all calls.
///
/// # Errors
/// Fails when one of them did, or there were hardly any.
pub fn none_failed(tally: &Tally) -> anyhow::Result<()> {
    println!(
        "{} calls, answered by {:?}, {} failed",
        tally.calls(),
        tally.answered,
        tally.failed.len()
    );
    for failure in tally.failed.iter().take(10) {
        println!("{failure:?}");
    }
    anyhow::ensure!(
        tally.failed.is_empty(),
        "{} calls failed",
        tally.failed.len()
    );
    anyhow::ensure!(tally.calls() > 100, "too few calls");
    Ok(())
}

impl Lab {
    /// Two istiods, Fenceline, versions of [`REVIEWS`], and [`CLIENTS`].
    ///
    /// # Errors
    /// Fails when a part does not start.
    pub async fn routed_mesh(&mut self, versions: &[&str]) -> anyhow::Result<()> {
        self.start_second_istiod().await?;
        self.install().await?;
        self.routed_service(versions).await
    }

    /// As [`Lab::routed_mesh`], where istiods and Fenceline run.
    ///
    /// # Errors
    /// Fails when a part does not start.
    pub async fn routed_service(&mut self, versions: &[&str]) -> anyhow::Result<()> {
        self.namespace("shop").await?;
        self.service("shop", "reviews", &["http:80", "grpc:90"])
            .await?;
        for version in versions {
            self.version(REVIEWS, version, &[]).await?;
        }
        for ((namespace, name), second) in CLIENTS.into_iter().zip([false, true]) {
            let mut spec = PodSpec::new(namespace, name);
            spec.second_istiod = second;
            self.pod(spec).await?;
        }
        Ok(())
    }

    /// Calls of [`REVIEWS`] in every protocol; any version may answer.
    ///
    /// # Errors
    /// Fails when there is no such Service.
    pub async fn reviews(&self) -> anyhow::Result<Vec<Target>> {
        let mut targets = Vec::new();
        for (protocol, port) in [
            (Protocol::Http1, 80),
            (Protocol::Http2, 80),
            (Protocol::Grpc, 90),
        ] {
            let mut target = Target::of(self, REVIEWS, "", protocol, port).await?;
            target.answered_by = None;
            targets.push(target);
        }
        Ok(targets)
    }

    /// Waits until a namespace has no VirtualService and no DestinationRule.
    ///
    /// # Errors
    /// Fails when some stay.
    pub async fn until_unrouted(&self, namespace: &str) -> anyhow::Result<()> {
        let kinds = "virtualservices,destinationrules";
        eventually(PATIENCE * 2, "nothing is left", async || {
            let left = ["-n", namespace, "get", kinds, "-o", "name"];
            let left = self.kubectl(&left).await?;
            anyhow::ensure!(left.trim().is_empty(), "{left}");
            Ok(())
        })
        .await
    }

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
            says(&status.conditions, newest, reason)
        })
        .await
    }

    /// Fails if at any time of so long the routes of `reviews` lead to a version.
    ///
    /// # Errors
    /// Fails when they do.
    pub async fn never_routed_to(&self, version: &str, time: Duration) -> anyhow::Result<()> {
        let subset = format!("subset: main--{version}");
        throughout(time, &format!("no routes to {version}"), async || {
            let routes = "virtualservice/fenceline-reviews";
            let routes = self
                .kubectl(&["-n", "shop", "get", routes, "-o", "yaml"])
                .await?;
            anyhow::ensure!(!routes.contains(&subset), "{routes}");
            Ok(())
        })
        .await
    }

    /// As [`Lab::until_router`], of a TrafficPatch.
    ///
    /// # Errors
    /// Fails when it never does.
    pub async fn until_patch(&self, patch: Name<'_>, reason: &str) -> anyhow::Result<String> {
        let what = format!("TrafficPatch {patch:?} says {reason}");
        eventually(PATIENCE * 2, &what, async || {
            let patch = self.get_traffic_patch(patch).await?;
            let status = patch.status.context("no status")?;
            let newest = status.observed_generation == patch.metadata.generation;
            says(&status.conditions, newest, reason)
        })
        .await
    }

    /// Waits until there is an event about a Router, by its type and its reason.
    ///
    /// # Errors
    /// Fails when there is none in time.
    pub async fn until_event(&self, router: Name<'_>, event: &str) -> anyhow::Result<()> {
        let about = format!(
            "involvedObject.kind=Router,involvedObject.name={}",
            router.1
        );
        let columns = "jsonpath={range .items[*]}{.type} {.reason}{\"\\n\"}{end}";
        let events = [
            "-n",
            router.0,
            "get",
            "events",
            "--field-selector",
            &about,
            "-o",
            columns,
        ];
        eventually(PATIENCE, event, async || {
            let events = self.kubectl(&events).await?;
            anyhow::ensure!(events.lines().any(|line| line == event), "{events}");
            Ok(())
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

/// The message of the `Ready` condition, if it has this reason.
fn says(conditions: &[Condition], newest: bool, reason: &str) -> anyhow::Result<String> {
    let mut conditions = conditions.iter();
    let ready = conditions.find(|condition| condition.type_ == "Ready");
    let ready = ready.context("no Ready condition")?;
    anyhow::ensure!(newest && ready.reason == reason, "{ready:?}");
    Ok(ready.message.clone())
}

fn object(kind: &str, (namespace, name): Name<'_>, spec: &str) -> String {
    format!(
        "{{apiVersion: fenceline.dev/v1alpha1, kind: {kind}, metadata: {{name: {name}, namespace: {namespace}}}, spec: {spec}}}"
    )
}
