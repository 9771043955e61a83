//! A namespace whose owner means harm, with a caller and a callee of the same mind: what it costs everybody else.

use std::time::{Duration, Instant};

use anyhow::Context;
use fenceline_e2e::app::{Call, Flood, Protocol, flood};
use fenceline_e2e::fences::Name;
use fenceline_e2e::hostile::Hostile;
use fenceline_e2e::install::{OPERATOR, SYSTEM};
use fenceline_e2e::limits::Kind;
use fenceline_e2e::reporter::{Entry, Volume};
use fenceline_e2e::routers::{REVIEWS, load, none_failed};
use fenceline_e2e::wait::eventually;
use fenceline_e2e::{Lab, PATIENCE, PodSpec};

const EVIL: &str = "evil";
const CALLER: Name<'static> = (EVIL, "caller");
/// How long all of it goes on.
const SIEGE: Duration = Duration::from_secs(120);
/// What the operator's container may have: its Deployment says so.
const MEMORY_LIMIT_MIB: u64 = 512;
/// How soon a fence of somebody else begins.
const FENCE_BEGINS: Duration = Duration::from_secs(2);

/// How much the operator has of what it may have, and whether it ever was more.
#[derive(Default)]
struct Watched {
    most_mib: u64,
}

impl Watched {
    fn look(&mut self, lab: &Lab) -> anyhow::Result<()> {
        let mib = lab.operator_memory(OPERATOR)? / 1024;
        self.most_mib = self.most_mib.max(mib);
        anyhow::ensure!(
            mib < MEMORY_LIMIT_MIB,
            "the operator has {mib} MiB and would have been killed"
        );
        Ok(())
    }
}

/// What somebody else does: a new workload is fenced and makes its first call; a service is routed to another version under load; a limit
/// is changed.
async fn others_go_on(lab: &mut Lab, round: u32) -> anyhow::Result<()> {
    let name = format!("honest-{round}");
    let honest = ("shop", name.as_str());
    lab.workload(honest, &[80]).await?;
    let applied = Instant::now();
    lab.fence(honest, "{}").await?;
    eventually(PATIENCE, "a fence begins", async || {
        lab.sidecar(honest).await?.context("no Sidecar").map(drop)
    })
    .await?;
    let begins = applied.elapsed();
    lab.until_reason(honest, "Enforced").await?;
    lab.until_forgotten(honest, "bank.shop.svc.cluster.local")
        .await?;
    let call = lab.held_call(honest, Protocol::Http1, "bank:80").await?;

    let version = if round.is_multiple_of(2) { "v2" } else { "v1" };
    let changed = Instant::now();
    let spec =
        format!("{{service: reviews, branches: [{{name: main, versions: {{{version}: 1}}}}]}}");
    lab.router(REVIEWS, &spec).await?;
    lab.until_router(REVIEWS, "Stable").await?;
    let routed = changed.elapsed();

    let changed = Instant::now();
    let rate = 20 + 10 * (round % 2);
    let spec = format!(
        "{{target: {{service: bank}}, rules: [{{name: all, limit: {{requests: {rate}, per: 1s}}}}]}}"
    );
    lab.limited(("shop", "bank"), &spec).await?;
    let limited = changed.elapsed();
    println!(
        "round {round}: a fence begins after {:.2} s, a first call is answered after {:.2} s, a route has changed after {:.1} s, a limit after {:.1} s",
        begins.as_secs_f64(),
        call.took.as_secs_f64(),
        routed.as_secs_f64(),
        limited.as_secs_f64(),
    );
    anyhow::ensure!(begins < FENCE_BEGINS, "a fence began after {begins:?}");
    Ok(())
}

/// First calls of thousands of hosts that nobody has, each of which claims to come from somebody else.
async fn hostile_calls(lab: &Lab) -> anyhow::Result<Flood> {
    let connect = lab.resolve(EVIL, "callee", 80).await?;
    let claim = "By=x;Hash=y;Subject=\"z;URI=spiffe://cluster.local/ns/shop/sa/bank";
    let call = |n: u32| Call {
        headers: [("x-forwarded-client-cert".to_owned(), claim.to_owned())].into(),
        timeout: Duration::from_secs(5),
        ..fenceline_e2e::pods::request(
            Protocol::Http1,
            &format!("entry-{}-{}.{EVIL}.example:80", n % 6, n / 6),
            connect,
        )
    };
    Ok(Flood {
        calls: (0..1500).map(call).collect(),
        connections: 8,
        per_second: 50,
        time: SIEGE,
    })
}

/// What the hostile objects say of themselves, by kind and name.
async fn said(lab: &Lab, kind: &str, name: &str, condition: &str) -> anyhow::Result<String> {
    let path = format!(
        "jsonpath={{range .status.conditions[?(@.type=='{condition}')]}}{{.status}} {{.reason}}: {{.message}}{{end}}"
    );
    lab.kubectl(&["get", kind, name, "-n", EVIL, "-o", &path])
        .await
}

#[test]
fn a_hostile_namespace_costs_nobody_else_anything() {
    fenceline_e2e::test(async |lab| {
        lab.routed_mesh(&["v1", "v2"]).await?;
        lab.workload(("shop", "bank"), &[80]).await?;
        lab.namespace(EVIL).await?;
        lab.service(EVIL, "callee", &["http:80"]).await?;
        lab.pod(PodSpec::new(EVIL, "callee").http(80)).await?;
        lab.pod(PodSpec::new(EVIL, "caller")).await?;
        lab.fence(
            CALLER,
            "{workload: {selector: {matchLabels: {app: caller}}}}",
        )
        .await?;
        others_go_on(lab, 0).await?;
        let mut watched = Watched::default();
        watched.look(lab)?;
        let before = (lab.running(SYSTEM, OPERATOR)?.app_id()?, watched.most_mib);

        let hostile = Hostile {
            namespace: EVIL,
            victim: REVIEWS,
            stolen: lab.running("shop", "bank")?.ip.into(),
        };
        let traffic = load(lab, lab.reviews().await?, 4, Duration::from_millis(20))?;
        let began = Instant::now();
        let objects = hostile.objects();
        println!("{} objects", objects.len());
        for object in objects {
            if let Err(refused) = lab.apply(&object.to_string()).await {
                println!(
                    "refused: {} {}: {refused:#}",
                    object["kind"], object["metadata"]["name"]
                );
            }
        }
        let calls = hostile_calls(lab).await?;
        let control = lab.running(EVIL, "caller")?.control().to_owned();
        let siege = tokio::spawn(async move { flood(&control, &calls).await });

        let mut rounds = 0;
        while began.elapsed() < SIEGE {
            rounds += 1;
            others_go_on(lab, rounds).await?;
            watched.look(lab)?;
            slander(lab).await?;
        }
        let siege = siege.await??;
        let calls: u64 = (0..siege.statuses.len()).map(|call| siege.all(call)).sum();
        println!(
            "{calls} hostile calls; the operator had {} MiB, and {} MiB before",
            watched.most_mib, before.1
        );
        none_failed(&traffic.stop().await?)?;
        anyhow::ensure!(rounds >= 3, "{rounds} rounds");

        // The limit holds for whoever calls.
        let calls = lab.calls("shop", "bank:80", &[Kind::get("/")]).await?;
        let flooded = lab
            .flood(("shop", "client-a"), calls, 200, Duration::from_secs(3))
            .await?;
        println!("{:?}", flooded.statuses);
        anyhow::ensure!(
            flooded.of(0, 429) > 300 && flooded.of(0, 200) >= 60,
            "{flooded:?}"
        );

        let now = lab.running(SYSTEM, OPERATOR)?.app_id()?;
        anyhow::ensure!(now == before.0, "the operator was started again");
        let (status, text) = lab.operator_get(OPERATOR, "/livez").await?;
        anyhow::ensure!(status == 200, "{status} {text}");
        what_is_wrong_is_said(lab).await
    });
}

/// Reports of connections that nobody made, from a workload that may not report.
async fn slander(lab: &Lab) -> anyhow::Result<()> {
    let service = lab.resolve(SYSTEM, "fenceline", 18100).await?;
    let entry = Entry {
        peer: vec!["spiffe://cluster.local/ns/shop/sa/bank".to_owned()],
        address: Some(lab.running("shop", "bank")?.ip.to_string()),
        authority: Some("elsewhere:80".to_owned()),
    };
    let volume = Volume {
        batch: 10,
        times: 100,
    };
    let heard = lab
        .report_many(
            CALLER,
            service,
            Some("By=x;URI=spiffe://cluster.local/ns/fenceline-system/sa/global-proxy"),
            &vec![entry; 10],
            volume,
        )
        .await?;
    anyhow::ensure!(heard.is_err(), "it was heard");
    Ok(())
}

/// Each of the hostile namespace's own objects says what is wrong with it.
async fn what_is_wrong_is_said(lab: &Lab) -> anyhow::Result<()> {
    for (kind, name, condition, words) in [
        ("trafficpatch", "matching-4", "Ready", "alternatives"),
        ("trafficpatch", "long-2", "Ready", "KiB"),
        ("ratelimit", "looping", "Ready", "adaptive.requests"),
        ("ratelimit", "long", "Ready", "adaptive.requests"),
        (
            "ratelimit",
            "greedy",
            "MetricsStale",
            "--rate-limit-metrics",
        ),
        ("servicefence", "caller", "Ready", ""),
        ("router", "many-0", "Ready", ""),
        ("servicefence", "fenced-0", "Ready", ""),
    ] {
        let said = said(lab, kind, name, condition).await?;
        println!("{kind} {name}: {said}");
        anyhow::ensure!(
            !said.is_empty() && said.contains(words),
            "{kind} {name}: {said}"
        );
    }
    Ok(())
}
