//! Routers beside fences, patches of many teams, and what other people wrote.

use std::time::Duration;

use anyhow::Context;
use fenceline_e2e::app::Protocol;
use fenceline_e2e::fences::Name;
use fenceline_e2e::pods::request;
use fenceline_e2e::routers::{CLIENTS, REVIEWS, load, none_failed};
use fenceline_e2e::traffic::Traffic;
use fenceline_e2e::wait::{eventually, throughout};
use fenceline_e2e::{Lab, PATIENCE, PodSpec};

const HOST: &str = "shop/reviews.shop.svc.cluster.local";

fn versions(versions: &str) -> String {
    format!(
        "{{service: reviews, branches: [{{name: main, versions: {versions}}}], change: {{drain: 1s}}}}"
    )
}

/// How many requests a client's proxy has sent to the mirror.
async fn mirrored(lab: &Lab, client: Name<'_>) -> anyhow::Result<u64> {
    let filter = "/stats?filter=shadow.shop.svc.cluster.local.*upstream_rq_total";
    let stats = lab.running(client.0, client.1)?.envoy(filter).await?;
    let counts = stats
        .lines()
        .filter_map(|line| line.rsplit_once(": ")?.1.parse::<u64>().ok());
    Ok(counts.sum())
}

#[test]
fn a_fenced_caller_while_versions_and_mirrors_change() {
    fenceline_e2e::test(async |lab| {
        lab.routed_mesh(&["v1", "v2"]).await?;
        lab.service("shop", "shadow", &["http:80", "grpc:90"])
            .await?;
        lab.pod(PodSpec::new("shop", "shadow").http(80).http(90))
            .await?;
        let (fence, other) = (CLIENTS[0], CLIENTS[1]);
        for (_, name) in CLIENTS {
            let spec = format!("{{workload: {{selector: {{matchLabels: {{app: {name}}}}}}}}}");
            lab.fence(("shop", name), &spec).await?;
            lab.until_reason(("shop", name), "Enforced").await?;
        }
        lab.until_forgotten(fence, "reviews.shop.svc.cluster.local")
            .await?;
        lab.router(REVIEWS, &versions("{v1: 1}")).await?;
        // Both at once: the fence learns the host while the Router is new.
        let traffic = load(lab, lab.reviews().await?, 8, Duration::from_millis(10))?;
        lab.until_router(REVIEWS, "Stable").await?;
        for (_, name) in CLIENTS {
            lab.until_in_scope(("shop", name), HOST).await?;
        }
        for weights in ["{v1: 1, v2: 1}", "{v2: 1}", "{v1: 1}"] {
            lab.router(REVIEWS, &versions(weights)).await?;
            let change = lab.until_router(REVIEWS, "Stable");
            let kept = throughout(
                Duration::from_secs(2),
                "the host stays in scope",
                async || {
                    let scope = lab.scope(fence).await?;
                    anyhow::ensure!(scope.iter().any(|host| host == HOST), "{scope:?}");
                    Ok(())
                },
            );
            tokio::try_join!(change, kept)?;
        }
        // Where routes lead comes into scope with them, by istiod.
        let mirror = "{service: reviews, http: {mirrors: [{destination: {host: shadow}, percentage: {value: 50}}]}}";
        lab.traffic_patch(("shop", "mirror"), mirror).await?;
        lab.until_router(REVIEWS, "Stable").await?;
        for client in [fence, other] {
            eventually(PATIENCE, "requests are mirrored", async || {
                let count = mirrored(lab, client).await?;
                anyhow::ensure!(count > 20, "{client:?}: {count}");
                Ok(())
            })
            .await?;
        }
        lab.router(REVIEWS, &versions("{v2: 1}")).await?;
        lab.until_router(REVIEWS, "Stable").await?;
        let tally = traffic.stop().await?;
        anyhow::ensure!(tally.refused.is_empty(), "{:?}", tally.refused);
        none_failed(&tally)
    });
}

#[test]
fn two_teams_change_their_patches_at_the_same_time() {
    fenceline_e2e::test(async |lab| {
        lab.routed_mesh(&["v1", "v2"]).await?;
        lab.router(REVIEWS, &versions("{v1: 1, v2: 1}")).await?;
        lab.until_router(REVIEWS, "Stable").await?;
        let traffic = load(lab, lab.reviews().await?, 12, Duration::from_millis(5))?;
        for round in 0..8 {
            let resilience = format!(
                "{{service: reviews, priority: {round}, http: {{timeout: {}s, retries: {{attempts: {round}, retryOn: 'unavailable,connect-failure'}}}}, \
                 destination: {{connectionPool: {{http: {{maxRequestsPerConnection: {}}}}}}}}}",
                20 + round,
                1000 + round
            );
            let headers = format!(
                "{{service: reviews, priority: 3, http: {{retries: {{attempts: 2}}, headers: {{request: {{set: {{x-round: '{round}'}}}}}}}}, \
                 destination: {{loadBalancer: {{simple: {}}}}}}}",
                ["RANDOM", "LEAST_REQUEST", "ROUND_ROBIN"][round % 3]
            );
            tokio::try_join!(
                lab.traffic_patch(("shop", "resilience"), &resilience),
                lab.traffic_patch(("shop", "headers"), &headers),
            )?;
            tokio::time::sleep(Duration::from_millis(300)).await;
        }
        for patch in ["resilience", "headers"] {
            lab.until_patch(("shop", patch), "Stable").await?;
        }
        let connect = lab.resolve("shop", "reviews", 80).await?;
        let call = request(Protocol::Http1, "reviews.shop:80", connect);
        for client in CLIENTS {
            let report = lab.call(client, &call).await?.report()?;
            anyhow::ensure!(
                report
                    .headers
                    .get("x-round")
                    .is_some_and(|round| round == "7")
            );
        }
        let lost = lab.get_traffic_patch(("shop", "headers")).await?.status;
        let lost = lost.context("a status")?.lost;
        anyhow::ensure!(
            lost.iter().any(|lost| lost.patch == "resilience"),
            "{lost:?}"
        );
        none_failed(&traffic.stop().await?)
    });
}

#[test]
fn a_patch_lets_grpc_calls_be_tried_again() {
    fenceline_e2e::test(async |lab| {
        lab.install().await?;
        lab.namespace("shop").await?;
        lab.service("shop", "reviews", &["grpc:90"]).await?;
        lab.pod(PodSpec::new("shop", "client")).await?;
        lab.version(REVIEWS, "v1", &[]).await?;
        let second = PodSpec::new("shop", "reviews-second").label("app", "reviews");
        lab.pod(
            second
                .label("version", "v1")
                .service_account("reviews")
                .http(90),
        )
        .await?;
        let patch = |retries: &str| format!("{{service: reviews, http: {{retries: {retries}}}}}");
        lab.traffic_patch(("shop", "retries"), &patch("{attempts: 0}"))
            .await?;
        lab.until_patch(("shop", "retries"), "Stable").await?;
        // Its proxy answers UNAVAILABLE.
        lab.running_mut("shop", "reviews-second")?
            .app()?
            .kill()
            .await?;
        let connect = lab.resolve("shop", "reviews", 90).await?;
        let call = request(Protocol::Grpc, "reviews.shop:90", connect);
        let failed = async || {
            let mut failed = 0;
            for _ in 0..40 {
                let outcome = lab.call(("shop", "client"), &call).await?;
                failed += usize::from(outcome.status != 200);
            }
            anyhow::Ok(failed)
        };
        let without = failed().await?;
        let again = "{attempts: 3, retryOn: 'unavailable,connect-failure'}";
        lab.traffic_patch(("shop", "retries"), &patch(again))
            .await?;
        lab.until_patch(("shop", "retries"), "Stable").await?;
        let with = failed().await?;
        println!("of 40 calls {without} failed without retries, {with} with them");
        anyhow::ensure!(without > 5 && with == 0, "{without}, {with}");
        Ok(())
    });
}

#[test]
fn what_hides_ours_from_callers_or_delegates_is_said() {
    fenceline_e2e::test(async |lab| {
        lab.routed_mesh(&["v1"]).await?;
        lab.namespace("bank").await?;
        lab.pod(PodSpec::new("bank", "till")).await?;
        let rule = |host: &str| {
            format!(
                "{{apiVersion: networking.istio.io/v1, kind: DestinationRule, metadata: {{name: tls, namespace: bank}}, \
                  spec: {{host: '{host}', exportTo: ['.'], trafficPolicy: {{connectionPool: {{tcp: {{maxConnections: 100}}}}}}}}}}"
            )
        };
        let traffic = load(lab, lab.reviews().await?, 4, Duration::from_millis(20))?;
        let connect = lab.resolve("shop", "reviews", 80).await?;
        let call = request(Protocol::Http1, "reviews.shop:80", connect);
        for host in ["reviews.shop.svc.cluster.local", "*.shop.svc.cluster.local"] {
            lab.apply(&rule(host)).await?;
            let named = "{service: reviews, branches: [{name: main, versions: {v1: 1}}], change: {drain: 1s, callers: [bank]}}";
            lab.router(REVIEWS, named).await?;
            let said = lab.until_router(REVIEWS, "Conflicted").await?;
            println!("{said}");
            anyhow::ensure!(
                said.contains("DestinationRule bank/tls, which hides ours"),
                "{said}"
            );
            // With our routes these would meet clusters that their proxies do not have.
            let report = lab.call(("bank", "till"), &call).await?.report()?;
            anyhow::ensure!(report.pod == "reviews-v1", "{report:?}");
            lab.kubectl(&["-n", "bank", "delete", "destinationrule", "tls"])
                .await?;
            lab.until_router(REVIEWS, "Stable").await?;
            lab.call(("bank", "till"), &call).await?.report()?;
            lab.kubectl(&["-n", "shop", "delete", "router", "reviews"])
                .await?;
            lab.until_unrouted("shop").await?;
        }
        // A route that leads on through another object, seen by its own namespace alone.
        lab.apply(
            "{apiVersion: networking.istio.io/v1, kind: VirtualService, metadata: {name: root, namespace: bank}, \
              spec: {hosts: [reviews.shop.svc.cluster.local], exportTo: ['.'], http: [{delegate: {name: rest, namespace: bank}}]}}\n---\n\
             {apiVersion: networking.istio.io/v1, kind: VirtualService, metadata: {name: rest, namespace: bank}, \
              spec: {http: [{route: [{destination: {host: reviews.shop.svc.cluster.local}}]}]}}",
        )
        .await?;
        let named = "{service: reviews, branches: [{name: main, versions: {v1: 1}}], change: {callers: [bank]}}";
        lab.router(REVIEWS, named).await?;
        let said = lab.until_router(REVIEWS, "Conflicted").await?;
        println!("{said}");
        anyhow::ensure!(said.contains("VirtualService bank/root"), "{said}");
        // Where nobody named its callers it is theirs to do.
        lab.router(REVIEWS, &versions("{v1: 1}")).await?;
        lab.until_router(REVIEWS, "Stable").await?;
        let said = beside(lab).await?;
        anyhow::ensure!(
            said.contains("callers in bank get VirtualService bank/root"),
            "{said}"
        );
        lab.call(("bank", "till"), &call).await?.report()?;
        none_failed(&traffic.stop().await?)
    });
}

/// What a Router says of other people's objects that do not stand in its way.
async fn beside(lab: &Lab) -> anyhow::Result<String> {
    let status = lab.get_router(REVIEWS).await?.status.context("a status")?;
    let mut said = status.conditions.into_iter();
    let said = said.find(|said| said.type_ == "Conflicted");
    Ok(said.context("Conflicted")?.message)
}

/// Istio's own example for mutual TLS in a namespace: it is for the callers there, and nobody else's Router waits for it.
#[test]
fn a_rule_of_another_namespace_for_everything_stops_nobody() {
    fenceline_e2e::test(async |lab| {
        lab.routed_mesh(&["v1", "v2"]).await?;
        lab.namespace("evil").await?;
        lab.pod(PodSpec::new("evil", "caller")).await?;
        let all = "{apiVersion: networking.istio.io/v1, kind: DestinationRule, metadata: {name: all, namespace: evil}, \
            spec: {host: '*.local', exportTo: ['.'], trafficPolicy: {tls: {mode: ISTIO_MUTUAL}}}}";
        lab.apply(all).await?;
        let mut targets = lab.reviews().await?;
        targets.truncate(2);
        let there = Traffic::start(
            lab,
            &[("evil", "caller"); 2],
            targets,
            Duration::from_millis(20),
            |_, _, _| 0,
        )?;
        let traffic = load(lab, lab.reviews().await?, 6, Duration::from_millis(20))?;
        // There, and back.
        for version in ["v1", "v2", "v1"] {
            lab.router(REVIEWS, &versions(&format!("{{{version}: 1}}")))
                .await?;
            lab.until_router(REVIEWS, "Stable").await?;
            let connect = lab.resolve("shop", "reviews", 80).await?;
            let call = request(Protocol::Http1, "reviews.shop:80", connect);
            for client in CLIENTS {
                let report = lab.call(client, &call).await?.report()?;
                anyhow::ensure!(report.pod == format!("reviews-{version}"), "{report:?}");
            }
        }
        let said = beside(lab).await?;
        println!("{said}");
        anyhow::ensure!(
            said.contains(
                "callers in evil do not get this: DestinationRule evil/all hides ours there"
            ),
            "{said}"
        );
        // Its callers go to the Service itself, as they did without a Router.
        anyhow::ensure!(there.tally().answered.contains_key("reviews-v2"));
        // Once it is gone they are led as everybody is, and when it comes again as before.
        lab.kubectl(&["-n", "evil", "delete", "destinationrule", "all"])
            .await?;
        eventually(PATIENCE * 2, "nobody is kept apart", async || {
            let routes = [
                "-n",
                "shop",
                "get",
                "virtualservice",
                "fenceline-reviews",
                "-o",
                "jsonpath={.spec}",
            ];
            let routes = lab.kubectl(&routes).await?;
            anyhow::ensure!(!routes.contains("sourceNamespace"), "{routes}");
            Ok(())
        })
        .await?;
        lab.until_router(REVIEWS, "Stable").await?;
        none_failed(&there.stop().await?)?;
        none_failed(&traffic.stop().await?)
    });
}

/// All annotations of an object have 256 KiB, and what was good before is one of them.
#[test]
fn what_is_too_long_to_be_noted_is_changed_all_the_same() {
    fenceline_e2e::test(async |lab| {
        lab.routed_mesh(&["v1"]).await?;
        // An annotation of an object has room for 200 KiB of what was in force before.
        let long = |mark: &str| {
            let value = "long".repeat(1000);
            let headers = |how: &str| {
                let headers = (0..30).map(|n| format!("x-{mark}-{how}-{n:02}: {value}"));
                headers.collect::<Vec<_>>().join(", ")
            };
            format!(
                "{{service: reviews, http: {{headers: {{request: {{set: {{{}}}, add: {{{}}}}}}}}}}}",
                headers("set"),
                headers("add")
            )
        };
        for mark in ["first", "second", "third"] {
            lab.traffic_patch(("shop", "long"), &long(mark)).await?;
            lab.until_patch(("shop", "long"), "Stable").await?;
            let routes = [
                "-n",
                "shop",
                "get",
                "virtualservice",
                "fenceline-reviews",
                "-o",
                "yaml",
            ];
            let routes = lab.kubectl(&routes).await?;
            anyhow::ensure!(
                routes.contains(&format!("x-{mark}-add-29")),
                "{mark} is not in force"
            );
            anyhow::ensure!(
                mark == "first" || routes.contains("last-good-left-out"),
                "{mark}"
            );
        }
        Ok(())
    });
}

#[test]
fn a_service_that_somebody_else_takes_over() {
    fenceline_e2e::test(async |lab| {
        lab.routed_mesh(&["v1", "v2"]).await?;
        lab.router(REVIEWS, &versions("{v1: 1}")).await?;
        lab.until_router(REVIEWS, "Stable").await?;
        let traffic = load(lab, lab.reviews().await?, 8, Duration::from_millis(10))?;
        lab.apply(
            "{apiVersion: networking.istio.io/v1, kind: VirtualService, metadata: {name: theirs, namespace: shop}, \
              spec: {hosts: [reviews], http: [{route: [{destination: {host: reviews}}]}]}}",
        )
        .await?;
        lab.until_router(REVIEWS, "Conflicted").await?;
        // What was in force stays, and what is wanted now waits.
        lab.router(REVIEWS, &versions("{v2: 1}")).await?;
        lab.until_router(REVIEWS, "Conflicted").await?;
        let names = [
            "-n",
            "shop",
            "get",
            "virtualservices,destinationrules",
            "-o",
            "name",
        ];
        let (ours, theirs) = (
            "fenceline-reviews",
            "virtualservice.networking.istio.io/theirs",
        );
        let all = lab.kubectl(&names).await?;
        anyhow::ensure!(
            all.matches(ours).count() == 2 && all.contains(theirs),
            "{all}"
        );
        anyhow::ensure!(!traffic.tally().answered.contains_key("reviews-v2"));
        // Without the Router it is theirs alone.
        lab.kubectl(&["-n", "shop", "delete", "router", "reviews"])
            .await?;
        eventually(PATIENCE, "ours are gone", async || {
            let left = lab.kubectl(&names).await?;
            anyhow::ensure!(left.trim() == theirs, "{left}");
            Ok(())
        })
        .await?;
        eventually(PATIENCE, "theirs is in force", async || {
            anyhow::ensure!(traffic.tally().answered.contains_key("reviews-v2"));
            Ok(())
        })
        .await?;
        none_failed(&traffic.stop().await?)
    });
}
