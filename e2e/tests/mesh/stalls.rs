//! A controller that computes for ever costs its replica the Lease, and nobody else anything: the standby acts, and skips the object at fault.

use std::time::{Duration, Instant};

use fenceline_e2e::install::SYSTEM;
use fenceline_e2e::wait::eventually;
use fenceline_e2e::{Lab, PATIENCE, PodSpec};

/// The controllers, in the order in which each is made to stall by the replica that leads.
const CONTROLLERS: [&str; 7] = [
    "fences",
    "routers",
    "rate limits",
    "policies",
    "ports",
    "global proxy",
    "protected hosts",
];
/// How long nobody may act.
const OUTAGE: Duration = Duration::from_secs(60);
/// What no replica of these could ever evaluate, as far as they know.
const AT_FAULT: (&str, &str) = ("evil", "stall");

/// Makes the thing at which a controller stalls.
async fn trap(lab: &Lab, controller: &str) -> anyhow::Result<()> {
    let of_evil = |kind: &str, spec: &str| {
        format!(
            "apiVersion: fenceline.dev/v1alpha1\nkind: {kind}\nmetadata: {{name: stall, namespace: evil}}\nspec: {spec}\n"
        )
    };
    let yaml = match controller {
        "fences" => of_evil("ServiceFence", "{}"),
        "routers" => of_evil(
            "Router",
            "{service: stall, branches: [{name: main, versions: {v1: 100}}]}",
        ),
        "rate limits" => of_evil(
            "RateLimit",
            "{target: {service: stall}, rules: [{name: all, limit: {requests: 5, per: 1s}}]}",
        ),
        "policies" => "apiVersion: fenceline.dev/v1alpha1\nkind: FencePolicy\nmetadata: {name: stall}\nspec: {namespaceSelector: {matchLabels: {fenced: by-policy}}}\n".to_owned(),
        other => {
            return lab.namespace(&format!("stall-{}", other.replace(' ', "-"))).await;
        }
    };
    lab.apply(&yaml).await
}

async fn ready(lab: &Lab, kind: &str) -> anyhow::Result<String> {
    let path = "jsonpath={range .status.conditions[?(@.type=='Ready')]}{.reason}: {.message}{end}";
    lab.kubectl(&["get", kind, "stall", "-n", "evil", "-o", path])
        .await
}

async fn leads(lab: &Lab, replica: &str) -> anyhow::Result<()> {
    let leads = lab.metric(replica, "fenceline_leader", "").await?;
    anyhow::ensure!(leads > 0.5, "{replica} does not lead");
    Ok(())
}

#[test]
fn a_controller_that_never_returns_costs_its_replica_the_lease_and_nobody_else_anything() {
    fenceline_e2e::test(async |lab| {
        lab.apply_manifests("global-proxy-config").await?;
        lab.start_global_proxy("global-proxy-0").await?;
        lab.namespace("shop").await?;
        lab.namespace("evil").await?;
        lab.service("evil", "stall", &["http:80"]).await?;
        lab.pod(PodSpec::new("evil", "stall").http(80)).await?;
        let normal = lab.tools.fenceline.clone();
        let stalling = normal.with_file_name("stalling-operator");
        anyhow::ensure!(stalling.exists(), "{} is not built", stalling.display());

        let replica = |number: usize| format!("fenceline-{number}");
        for number in 0..=CONTROLLERS.len() {
            // The standby begins while its predecessor leads; the last one is as it ships.
            lab.operator_args = vec!["--stall-after=10s".to_owned()];
            match CONTROLLERS.get(number) {
                Some(controller) => {
                    lab.tools.fenceline.clone_from(&stalling);
                    lab.operator_args.push(format!("--stall={controller}"));
                }
                None => lab.tools.fenceline.clone_from(&normal),
            }
            lab.start_operator(&replica(number)).await?;
            if number == 0 {
                eventually(PATIENCE, "the first leads", async || {
                    leads(lab, &replica(0)).await
                })
                .await?;
                continue;
            }
            let (before, controller) = (replica(number - 1), CONTROLLERS[number - 1]);
            trap(lab, controller).await?;
            let sprung = Instant::now();
            eventually(
                OUTAGE,
                &format!("the standby acts while {controller} stall"),
                async || leads(lab, &replica(number)).await,
            )
            .await?;
            let took = sprung.elapsed();
            println!(
                "{controller}: the standby acts {:.1} s after it began",
                took.as_secs_f64()
            );
            let (status, text) = lab.operator_get(&before, "/livez").await?;
            anyhow::ensure!(
                status == 503 && text.contains(&format!("task {controller} ")),
                "{status} {text}"
            );
            let label = format!("task=\"{controller}\"");
            let stalled = lab.metric(&before, "fenceline_stalled", &label).await?;
            anyhow::ensure!((stalled - 1.0).abs() < 0.1, "{stalled}");
            lab.running_mut(SYSTEM, &before)?.app()?.kill().await?;
            lab.delete_pod(SYSTEM, &before).await?;

            // Whoever leads now goes on with everybody else's.
            let name = format!("client-{number}");
            let client = ("shop", name.as_str());
            lab.workload(client, &[80]).await?;
            lab.fence(client, "{}").await?;
            lab.until_reason(client, "Enforced").await?;
        }

        // What was at fault says so, and the last replica, which stalls at nothing, leaves it alone too.
        for kind in ["servicefence", "router", "ratelimit"] {
            let said = ready(lab, kind).await?;
            anyhow::ensure!(
                said.starts_with("Quarantined: quarantined: its evaluation took more than 10 s"),
                "{kind}: {said}"
            );
        }
        anyhow::ensure!(
            lab.sidecar(AT_FAULT).await?.is_none(),
            "a quarantined fence was evaluated"
        );
        let limit =
            "{target: {service: client-1}, rules: [{name: all, limit: {requests: 5, per: 1s}}]}";
        lab.rate_limit(("shop", "client-1"), limit).await?;
        lab.until_limit(("shop", "client-1"), "InForce").await?;
        // Its spec changes, and it is evaluated again.
        lab.fence(AT_FAULT, "{firstCall: {policy: Forward}}")
            .await?;
        lab.until_reason(AT_FAULT, "Enforced").await.map(drop)
    });
}
