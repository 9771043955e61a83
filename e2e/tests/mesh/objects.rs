//! What becomes of a fence's objects as the world around it changes.

use std::time::{Duration, Instant};

use anyhow::Context;
use fenceline_crds::istio::{EnvoyFilter, Sidecar};
use fenceline_e2e::install::{OPERATOR, SYSTEM};
use fenceline_e2e::{Lab, PATIENCE, wait::eventually};
use k8s_openapi::api::core::v1::Service;
use kube::api::{DeleteParams, Patch, PatchParams};
use kube::{Api, ResourceExt};
use serde_json::json;

const CART: (&str, &str) = ("shop", "cart");

const MANAGED: &str = "app.kubernetes.io/managed-by=fenceline";

/// A mesh with a fence in force.
async fn fenced(lab: &mut Lab) -> anyhow::Result<()> {
    lab.install().await?;
    lab.namespace("shop").await?;
    lab.service("shop", "cart", &["http:80"]).await?;
    lab.fence(CART, "{}").await?;
    lab.until_reason(CART, "Enforced").await.map(drop)
}

async fn gone(lab: &Lab) -> anyhow::Result<()> {
    eventually(PATIENCE, "both objects are gone", async || {
        anyhow::ensure!(lab.sidecar(CART).await?.is_none(), "the Sidecar is there");
        anyhow::ensure!(lab.redirect(CART).await?.is_none(), "the redirect is there");
        Ok(())
    })
    .await
}

async fn selected(lab: &Lab, labels: serde_json::Value) -> anyhow::Result<()> {
    eventually(
        PATIENCE,
        &format!("both objects select {labels}"),
        async || {
            let want = json!({"labels": labels});
            let sidecar = lab
                .sidecar(CART)
                .await?
                .map(|object| object.spec.workload_selector);
            anyhow::ensure!(serde_json::to_value(&sidecar)? == want, "{sidecar:?}");
            let redirect = lab
                .redirect(CART)
                .await?
                .map(|object| object.spec.workload_selector);
            anyhow::ensure!(serde_json::to_value(&redirect)? == want, "{redirect:?}");
            Ok(())
        },
    )
    .await
}

#[test]
fn a_service_that_comes_changes_and_goes() {
    fenceline_e2e::test(async |lab| {
        lab.install().await?;
        lab.namespace("shop").await?;
        let services: Api<Service> = Api::namespaced(lab.client.clone(), "shop");

        lab.fence(CART, "{}").await?;
        let message = lab.until_reason(CART, "ServiceNotFound").await?;
        anyhow::ensure!(message.contains("Service cart does not exist"), "{message}");
        gone(lab).await?;

        lab.service("shop", "cart", &["http:80"]).await?;
        lab.until_reason(CART, "Enforced").await?;
        selected(lab, json!({"app": "cart"})).await?;

        let renamed =
            json!([{"op": "replace", "path": "/spec/selector", "value": {"app": "cart2"}}]);
        let patch: json_patch::Patch = serde_json::from_value(renamed)?;
        services
            .patch("cart", &PatchParams::default(), &Patch::<()>::Json(patch))
            .await?;
        selected(lab, json!({"app": "cart2"})).await?;

        services.delete("cart", &DeleteParams::default()).await?;
        lab.until_reason(CART, "ServiceNotFound").await?;
        gone(lab).await?;

        lab.service("shop", "cart", &["http:80"]).await?;
        selected(lab, json!({"app": "cart"})).await?;
        lab.fence(CART, "{mode: Observe}").await?;
        lab.until_reason(CART, "Observing").await?;
        gone(lab).await?;
        lab.fence(CART, "{mode: Enforce}").await?;
        selected(lab, json!({"app": "cart"})).await?;

        lab.kubectl(&["-n", "shop", "delete", "sf", "cart"]).await?;
        gone(lab).await
    });
}

#[test]
fn the_global_proxy_has_every_http_port_of_the_mesh() {
    fenceline_e2e::test(async |lab| {
        lab.install().await?;
        lab.namespace("shop").await?;
        let has = async |lab: &Lab, port: i32| -> anyhow::Result<bool> {
            let system: Api<Service> = Api::namespaced(lab.client.clone(), "fenceline-system");
            let ports = system
                .get("global-proxy")
                .await?
                .spec
                .and_then(|spec| spec.ports);
            Ok(ports.unwrap_or_default().iter().any(|one| one.port == port))
        };
        let until = async |lab: &Lab, port: i32, want: bool| {
            eventually(PATIENCE, &format!("port {port}: {want}"), async || {
                anyhow::ensure!(has(lab, port).await? == want);
                Ok(())
            })
            .await
        };
        lab.service("shop", "cart", &["http:7001", "tcp:7002"])
            .await?;
        until(lab, 7001, true).await?;
        anyhow::ensure!(
            !has(lab, 7002).await?,
            "a TCP port must not become an HTTP listener"
        );
        lab.kubectl(&["-n", "shop", "delete", "service", "cart"])
            .await?;
        until(lab, 7001, false).await?;
        until(lab, 15088, true).await
    });
}

#[test]
fn what_was_changed_by_hand_is_put_back_within_a_second() {
    fenceline_e2e::test(async |lab| {
        fenced(lab).await?;
        lab.until_quiet(OPERATOR, Duration::from_secs(1)).await?;
        let sidecar = lab.sidecar(CART).await?.map(|object| object.spec);
        let redirect = lab.redirect(CART).await?.map(|object| object.spec);
        let common = lab.mesh_redirect().await?.map(|object| object.spec);
        anyhow::ensure!(
            common.is_some(),
            "nothing that all redirects have in common"
        );
        let restored = async |lab: &Lab, what: &str| -> anyhow::Result<()> {
            let start = Instant::now();
            eventually(PATIENCE, what, async || {
                let is = lab.sidecar(CART).await?.map(|object| object.spec);
                anyhow::ensure!(is == sidecar, "{is:?}");
                let is = lab.redirect(CART).await?.map(|object| object.spec);
                anyhow::ensure!(is == redirect, "{is:?}");
                let is = lab.mesh_redirect().await?.map(|object| object.spec);
                anyhow::ensure!(is == common, "{is:?}");
                Ok(())
            })
            .await?;
            println!("{what}: put back after {:?}", start.elapsed());
            anyhow::ensure!(start.elapsed() < Duration::from_secs(1), "{what}: too slow");
            Ok(())
        };
        let sidecars: Api<Sidecar> = Api::namespaced(lab.client.clone(), "shop");
        let filters: Api<EnvoyFilter> = Api::namespaced(lab.client.clone(), "shop");
        let by_hand = PatchParams {
            field_manager: Some("somebody".into()),
            ..Default::default()
        };
        let wide = json!({"spec": {"egress": [{"hosts": ["*/*"]}]}});
        sidecars
            .patch("fenceline-cart", &by_hand, &Patch::Merge(wide))
            .await?;
        restored(lab, "a wider Sidecar").await?;
        let added = json!({"spec": {"outboundTrafficPolicy": {"mode": "REGISTRY_ONLY"}}});
        sidecars
            .patch("fenceline-cart", &by_hand, &Patch::Merge(added))
            .await?;
        restored(lab, "a field that we do not set").await?;
        sidecars
            .delete("fenceline-cart", &DeleteParams::default())
            .await?;
        restored(lab, "a deleted Sidecar").await?;
        let none = json!({"spec": {"configPatches": []}});
        let everywhere: Api<EnvoyFilter> = Api::namespaced(lab.client.clone(), "istio-system");
        for (filters, name) in [(filters, "fenceline-cart"), (everywhere, "fenceline")] {
            filters.patch(name, &by_hand, &Patch::Merge(&none)).await?;
            restored(lab, &format!("{name}, emptied")).await?;
            filters.delete(name, &DeleteParams::default()).await?;
            restored(lab, &format!("{name}, deleted")).await?;
        }
        Ok(())
    });
}

/// As Istio's `experimental.stableValidationPolicy` does with EnvoyFilters.
const NO_SIDECARS: &str = "
apiVersion: admissionregistration.k8s.io/v1
kind: ValidatingAdmissionPolicy
metadata: {name: no-sidecars}
spec:
  matchConstraints:
    resourceRules:
    - {apiGroups: [networking.istio.io], apiVersions: ['*'], operations: [CREATE, UPDATE], resources: [sidecars]}
  validations:
  - {expression: 'object.metadata.namespace != \"shop\"', message: no Sidecars in shop}
---
apiVersion: admissionregistration.k8s.io/v1
kind: ValidatingAdmissionPolicyBinding
metadata: {name: no-sidecars}
spec: {policyName: no-sidecars, validationActions: [Deny]}
";

#[test]
fn what_the_api_refuses_is_said_and_tried_again() {
    fenceline_e2e::test(async |lab| {
        lab.install().await?;
        lab.namespace("shop").await?;
        lab.service("shop", "cart", &["http:80"]).await?;
        lab.apply(NO_SIDECARS).await?;
        // The policy is in force a moment later.
        let theirs = "{apiVersion: networking.istio.io/v1, kind: Sidecar, metadata: {name: probe, namespace: shop}, spec: {}}";
        eventually(PATIENCE, "the policy is in force", async || {
            let gone = [
                "-n",
                "shop",
                "delete",
                "sidecar",
                "probe",
                "--ignore-not-found",
            ];
            lab.kubectl(&gone).await?;
            anyhow::ensure!(lab.apply(theirs).await.is_err(), "not yet");
            Ok(())
        })
        .await?;
        lab.fence(CART, "{}").await?;
        let message = lab.until_reason(CART, "Failing").await?;
        println!("{message}");
        anyhow::ensure!(
            message.contains("Sidecar shop/fenceline-cart")
                && message.contains("no Sidecars in shop"),
            "{message}"
        );
        let policy = "validatingadmissionpolicybinding/no-sidecars";
        lab.kubectl(&["delete", policy]).await?;
        lab.until_reason(CART, "Enforced").await.map(drop)
    });
}

#[test]
fn nothing_is_left_when_it_goes_as_the_readme_says() {
    fenceline_e2e::test(async |lab| {
        fenced(lab).await?;
        lab.kubectl(&["delete", "servicefences", "-A", "--all"])
            .await?;
        gone(lab).await?;
        // What the Deployments run goes with them.
        lab.running_mut(SYSTEM, OPERATOR)?.app()?.kill().await?;
        for go in [["-k", "global-proxy-config"], ["-f", "crds/"]] {
            lab.kubectl(&["delete", go[0], go[1], "--wait=false"])
                .await?;
        }
        eventually(PATIENCE, "nothing is left", async || {
            let ours = [
                "get",
                "envoyfilters,sidecars",
                "-A",
                "-o",
                "name",
                "-l",
                MANAGED,
            ];
            let left = lab.kubectl(&ours).await?;
            anyhow::ensure!(left.trim().is_empty(), "{left}");
            Ok(())
        })
        .await
    });
}

#[test]
fn a_namespace_that_comes_changes_one_object() {
    fenceline_e2e::test(async |lab| {
        fenced(lab).await?;
        lab.until_quiet(OPERATOR, Duration::from_secs(1)).await?;
        let (before, redirect) = (lab.writes(OPERATOR).await?, lab.redirect(CART).await?);
        lab.namespace("late").await?;
        eventually(PATIENCE, "the redirect has it", async || {
            let common = lab.mesh_redirect().await?.context("gone")?;
            let patches = serde_json::to_string(&common.spec)?;
            anyhow::ensure!(patches.contains("late"), "{patches}");
            Ok(())
        })
        .await?;
        lab.until_quiet(OPERATOR, Duration::from_secs(1)).await?;
        let writes = lab.writes(OPERATOR).await? - before;
        anyhow::ensure!(writes < 1.5, "{writes} writes");
        anyhow::ensure!(
            lab.redirect(CART).await? == redirect,
            "the fence's own changed"
        );
        Ok(())
    });
}

#[test]
fn somebody_elses_sidecar_is_never_touched() {
    fenceline_e2e::test(async |lab| {
        lab.install().await?;
        lab.namespace("shop").await?;
        // What all redirects have in common is not there, and its name is taken.
        let theirs = "{apiVersion: networking.istio.io/v1alpha3, kind: EnvoyFilter,
                       metadata: {name: fenceline, namespace: istio-system}, spec: {configPatches: []}}";
        lab.apply(theirs).await?;
        lab.service("shop", "vase", &["http:80"]).await?;
        let vase = ("shop", "vase");
        lab.fence(vase, "{}").await?;
        let message = lab.until_reason(vase, "NameTaken").await?;
        anyhow::ensure!(
            message.contains("EnvoyFilter istio-system/fenceline"),
            "{message}"
        );
        anyhow::ensure!(
            lab.sidecar(vase).await?.is_none(),
            "a scope without a redirect"
        );
        lab.kubectl(&["-n", "istio-system", "delete", "envoyfilter", "fenceline"])
            .await?;
        lab.service("shop", "cart", &["http:80"]).await?;
        lab.fence(CART, "{}").await?;
        selected(lab, json!({"app": "cart"})).await?;
        lab.apply(
            "{apiVersion: networking.istio.io/v1, kind: Sidecar,
              metadata: {name: theirs, namespace: shop},
              spec: {workloadSelector: {labels: {app: cart}}, egress: [{hosts: ['./*']}]}}",
        )
        .await?;
        let message = lab.until_reason(CART, "Conflicted").await?;
        anyhow::ensure!(message.contains("shop/theirs"), "{message}");
        gone(lab).await?;
        let sidecars: Api<Sidecar> = Api::namespaced(lab.client.clone(), "shop");
        let theirs = sidecars.get("theirs").await?;
        anyhow::ensure!(theirs.metadata.generation == Some(1), "{theirs:?}");
        sidecars.delete("theirs", &DeleteParams::default()).await?;
        selected(lab, json!({"app": "cart"})).await?;

        // One by the name that we would use, on pods that we do not fence.
        lab.service("shop", "desk", &["http:80"]).await?;
        lab.apply(
            "{apiVersion: networking.istio.io/v1, kind: Sidecar,
              metadata: {name: fenceline-desk, namespace: shop},
              spec: {workloadSelector: {labels: {app: other}}, egress: [{hosts: ['./*']}]}}",
        )
        .await?;
        let desk = ("shop", "desk");
        lab.fence(desk, "{}").await?;
        lab.until_reason(desk, "Conflicted").await?;
        let theirs = sidecars.get("fenceline-desk").await?;
        anyhow::ensure!(theirs.metadata.generation == Some(1) && theirs.labels().is_empty());

        // And an EnvoyFilter.
        lab.service("shop", "lamp", &["http:80"]).await?;
        lab.apply(
            "{apiVersion: networking.istio.io/v1alpha3, kind: EnvoyFilter,
              metadata: {name: fenceline-lamp, namespace: shop}, spec: {configPatches: []}}",
        )
        .await?;
        let lamp = ("shop", "lamp");
        lab.fence(lamp, "{}").await?;
        let message = lab.until_reason(lamp, "NameTaken").await?;
        anyhow::ensure!(
            message.contains("EnvoyFilter shop/fenceline-lamp"),
            "{message}"
        );
        anyhow::ensure!(
            lab.sidecar(lamp).await?.is_none(),
            "a scope without a redirect"
        );
        Ok(())
    });
}

#[test]
fn bad_fences_are_refused_with_the_field_and_the_reason() {
    fenceline_e2e::test(async |lab| {
        lab.apply_manifests("global-proxy-config").await?;
        lab.namespace("shop").await?;
        for (spec, want) in [
            (
                "{workload: {service: a, selector: {matchLabels: {a: b}}}}",
                "spec.workload: Invalid value",
            ),
            (
                "{workload: {}}",
                "give one of service, selector and wholeNamespace",
            ),
            (
                "{workload: {selector: {matchLabels: {}}}}",
                "spec.workload.selector.matchLabels",
            ),
            (
                "{dependencies: [{}]}",
                "give either host or services, and not both",
            ),
            (
                "{dependencies: [{host: 'http://a'}]}",
                "a host is a DNS name, without port, scheme or wildcard",
            ),
            (
                "{dependencies: [{host: '*.shop'}]}",
                "spec.dependencies[0].host",
            ),
            (
                "{dependencies: [{host: 'a:80'}]}",
                "spec.dependencies[0].host",
            ),
            (
                "{retention: {unusedFor: 5s}}",
                "unusedFor is a length of time from 1m to 87600h",
            ),
            ("{mode: Off}", "spec.mode"),
            ("{moode: Observe}", "moode"),
        ] {
            let Err(error) = lab.fence(CART, spec).await else {
                anyhow::bail!("{spec} was taken");
            };
            let error = format!("{error:#}");
            anyhow::ensure!(error.contains(want), "{spec}: {error}");
        }
        let long = "n".repeat(64);
        anyhow::ensure!(
            lab.fence(("shop", &long), "{}").await.is_err(),
            "a long name was taken"
        );
        lab.fence(
            CART,
            "{dependencies: [{host: reviews}, {host: a.b.svc.cluster.local.}]}",
        )
        .await?;
        let columns = lab.kubectl(&["-n", "shop", "get", "sf"]).await?;
        for column in ["MODE", "IMPORTED", "VISIBLE", "READY", "AGE"] {
            anyhow::ensure!(columns.contains(column), "{columns}");
        }
        Ok(())
    });
}
