//! A scope that widens, narrows, begins or ends costs a busy caller no call.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use fenceline_e2e::app::{Call, Protocol};
use fenceline_e2e::pods::request;
use fenceline_e2e::{Lab, PodSpec};

const CLIENT: (&str, &str) = ("shop", "client");
const HOSTS: usize = 20;
const CALLERS: usize = 8;

/// Services by these names, and one pod behind all of them.
async fn services(lab: &mut Lab, kinds: &[&str]) -> anyhow::Result<()> {
    lab.install().await?;
    lab.namespace("shop").await?;
    lab.workload(CLIENT, &[80]).await?;
    lab.pod(PodSpec::new("shop", "server").http(80)).await?;
    for kind in kinds {
        let names = (0..HOSTS).map(|number| format!("{kind}-{number}"));
        lab.services_of(("shop", "server"), names).await?;
    }
    Ok(())
}

async fn calls(lab: &Lab, kind: &str) -> anyhow::Result<Vec<Call>> {
    let mut calls = Vec::new();
    for number in 0..HOSTS {
        let host = format!("{kind}-{number}");
        let connect = lab.resolve("shop", &host, 80).await?;
        calls.push(request(Protocol::Http1, &format!("{host}:80"), connect));
    }
    Ok(calls)
}

/// What became of many calls.
#[derive(Debug, Default)]
struct Counts {
    made: usize,
    failed: BTreeMap<String, usize>,
}

/// Calls by many at once for a while; each caller goes through `calls` again and again.
async fn storm(lab: &Lab, calls: &[Call], time: Duration) -> anyhow::Result<Counts> {
    let until = Instant::now() + time;
    let callers = (0..CALLERS).map(|caller| async move {
        let mut outcomes = Vec::new();
        for call in calls.iter().cycle().skip(caller) {
            if Instant::now() > until {
                break;
            }
            outcomes.push(lab.call(CLIENT, call).await?);
        }
        anyhow::Ok(outcomes)
    });
    let outcomes = futures::future::try_join_all(callers).await?;
    let mut counts = Counts::default();
    for outcome in outcomes.into_iter().flatten() {
        counts.made += 1;
        if outcome.status != 200 {
            let what = format!("{} {}", outcome.status, outcome.body);
            *counts.failed.entry(what).or_default() += 1;
        }
    }
    Ok(counts)
}

impl Counts {
    fn add(&mut self, other: Self) {
        self.made += other.made;
        for (what, count) in other.failed {
            *self.failed.entry(what).or_default() += count;
        }
    }

    fn none_failed(&self, what: &str) -> anyhow::Result<()> {
        println!("{what}: {} calls, failed: {:?}", self.made, self.failed);
        anyhow::ensure!(self.failed.is_empty(), "{what}: {self:?}");
        Ok(())
    }
}

#[test]
fn a_scope_that_widens() {
    fenceline_e2e::test(async |lab| {
        services(lab, &["hold", "forward"]).await?;
        for (policy, kind) in [("Hold", "hold"), ("Forward", "forward")] {
            let spec = format!("{{firstCall: {{policy: {policy}}}}}");
            lab.fence(CLIENT, &spec).await?;
            lab.until_reason(CLIENT, "Enforced").await?;
            let last = format!("{kind}-{}.shop.svc.cluster.local", HOSTS - 1);
            lab.until_forgotten(CLIENT, &last).await?;
            let mut counts = Counts::default();
            // Each host by itself, by all callers at once, from before it is known until well after.
            for call in calls(lab, kind).await? {
                counts.add(storm(lab, &[call], Duration::from_millis(700)).await?);
            }
            counts.none_failed(&format!("{policy}, {HOSTS} new hosts"))?;
        }
        Ok(())
    });
}

#[test]
fn a_fence_that_begins_and_ends() {
    fenceline_e2e::test(async |lab| {
        services(lab, &["plain"]).await?;
        let all = calls(lab, "plain").await?;
        let lab = &*lab;
        everything_direct(lab).await?;
        for round in 0..3 {
            let begin_and_end = async {
                tokio::time::sleep(Duration::from_millis(500)).await;
                lab.fence(CLIENT, "{firstCall: {policy: Forward}}").await?;
                tokio::time::sleep(Duration::from_secs(2)).await;
                let delete = ["-n", "shop", "delete", "servicefence", "client"];
                lab.kubectl(&delete).await?;
                tokio::time::sleep(Duration::from_secs(2)).await;
                lab.fence(CLIENT, "{firstCall: {policy: Forward}}").await?;
                tokio::time::sleep(Duration::from_secs(1)).await;
                // Learnt by now; and not needed any more.
                lab.fence(CLIENT, "{mode: Observe}").await?;
                tokio::time::sleep(Duration::from_secs(1)).await;
                lab.kubectl(&delete).await
            };
            let time = Duration::from_secs(8);
            let (counts, ended) = tokio::join!(storm(lab, &all, time), begin_and_end);
            ended?;
            counts?.none_failed(&format!("round {round}: begun, ended, begun, observed"))?;
        }
        Ok(())
    });
}

const FORWARD: &str = "firstCall: {policy: Forward}";

/// Calls by many at once while something happens, and whatever else happens within `time`.
async fn through(
    lab: &Lab,
    calls: &[Call],
    time: Duration,
    what: &str,
    happens: impl Future<Output = anyhow::Result<()>>,
) -> anyhow::Result<()> {
    let (counts, ended) = tokio::join!(storm(lab, calls, time), happens);
    ended?;
    counts?.none_failed(what)
}

async fn everything_direct(lab: &Lab) -> anyhow::Result<()> {
    for number in 0..HOSTS {
        let authority = format!("plain-{number}:80");
        lab.until_direct(CLIENT, Protocol::Http1, &authority)
            .await?;
    }
    Ok(())
}

#[test]
fn pods_that_change_sides() {
    fenceline_e2e::test(async |lab| {
        services(lab, &["plain"]).await?;
        lab.pod(PodSpec::new("shop", "green")).await?;
        let all = calls(lab, "plain").await?;
        let lab = &*lab;
        everything_direct(lab).await?;
        let pause = || tokio::time::sleep(Duration::from_secs(3));
        let select = async |pods: &str| {
            let spec = format!("{{\"spec\":{{\"selector\":{{\"app\":\"{pods}\"}}}}}}");
            let patch = ["-n", "shop", "patch", "service", "client", "-p", &spec];
            lab.kubectl(&patch).await.map(drop)
        };
        let happens = async {
            lab.fence(CLIENT, &format!("{{{FORWARD}}}")).await?;
            pause().await;
            select("green").await?;
            pause().await;
            select("client").await?;
            pause().await;
            lab.until_reason(CLIENT, "Enforced").await?;
            // Its pods run on without it.
            lab.kubectl(&["-n", "shop", "delete", "service", "client"])
                .await?;
            lab.until_reason(CLIENT, "ServiceNotFound").await?;
            pause().await;
            let gone = lab.sidecar(CLIENT).await?.is_none();
            anyhow::ensure!(gone, "its Sidecar is there");
            Ok(())
        };
        let what = "other pods, these again, no Service";
        through(lab, &all, Duration::from_secs(16), what, happens).await
    });
}

#[test]
fn one_pod_is_let_off_the_fence_of_its_namespace() {
    fenceline_e2e::test(async |lab| {
        services(lab, &["plain"]).await?;
        let all = calls(lab, "plain").await?;
        let lab = &*lab;
        everything_direct(lab).await?;
        let pause = || tokio::time::sleep(Duration::from_secs(3));
        let delete = async |name: &str| {
            let delete = ["-n", "shop", "delete", "servicefence", name];
            lab.kubectl(&delete).await.map(drop)
        };
        let happens = async {
            let whole = format!("{{workload: {{wholeNamespace: true}}, {FORWARD}}}");
            lab.fence(("shop", "all"), &whole).await?;
            pause().await;
            lab.fence(CLIENT, "{mode: Observe}").await?;
            let said = lab.until_reason(CLIENT, "Observing").await?;
            anyhow::ensure!(said.contains("does not count for these pods"), "{said}");
            pause().await;
            let scope = lab.scope(CLIENT).await?;
            anyhow::ensure!(scope == ["*/*"], "{scope:?}");
            lab.fence(CLIENT, &format!("{{{FORWARD}}}")).await?;
            pause().await;
            delete("client").await?;
            pause().await;
            let gone = lab.sidecar(CLIENT).await?.is_none();
            anyhow::ensure!(gone, "its Sidecar is there");
            delete("all").await
        };
        let what = "the namespace, one observed, enforced, without its own";
        through(lab, &all, Duration::from_secs(16), what, happens).await
    });
}
