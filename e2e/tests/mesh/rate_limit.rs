//! What RateLimits admit at real proxies, of ten times as much as they allow; and that nothing else is limited.

use std::time::Duration;

use anyhow::Context;
use fenceline_e2e::app::{Flood, Flooded, flood};
use fenceline_e2e::fences::Name;
use fenceline_e2e::install::OPERATOR;
use fenceline_e2e::limits::{Kind, RATE_LIMIT_SERVICE, REDIS};
use fenceline_e2e::wait::eventually;
use fenceline_e2e::{Lab, PATIENCE, PodSpec};

/// Requests a second, and at once: what four replicas can divide.
const LIMIT: u32 = 12;
const TIME: Duration = Duration::from_secs(5);
/// Callers are called `client-0` and so on.
const CLIENT: &str = "client";

/// Where requests are limited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Inbound,
    Outbound,
    Gateway,
}

const PLACES: [Place; 3] = [Place::Inbound, Place::Outbound, Place::Gateway];

impl Place {
    /// The RateLimit there.
    fn limit(self) -> Name<'static> {
        match self {
            Self::Inbound => ("shop", "inner"),
            Self::Outbound => ("shop", "outer"),
            Self::Gateway => ("shop", "edge"),
        }
    }

    fn spec(self, share: &str, rules: &str) -> String {
        let place = match self {
            Self::Inbound => "target: {service: inner}",
            Self::Outbound => {
                "target: {selector: {matchLabels: {app: client}}}, direction: Outbound, to: outer"
            }
            Self::Gateway => "target: {gateway: {selector: {app: gateway}}}",
        };
        // The caller of an Outbound limit is no question.
        let rules = match self {
            Self::Outbound => rules.replace(PRINCIPAL, ""),
            Self::Inbound | Self::Gateway => rules.to_owned(),
        };
        format!("{{{place}, share: {share}, rules: [{rules}]}}")
    }

    /// What is called to get there.
    fn authority(self) -> &'static str {
        match self {
            Self::Inbound => "inner:80",
            Self::Outbound => "outer:80",
            Self::Gateway => "gateway:8443",
        }
    }
}

const PRINCIPAL: &str = "{name: principal, match: {path: {exact: /principal}, principals: [cluster.local/ns/shop/sa/client]}, limit: {requests: 12, per: 1s}}, ";

/// Rules that look at something of a request each, and the requests that they are for; then requests that nobody limits.
fn rules() -> String {
    format!(
        "{PRINCIPAL}{{name: prefix, match: {{path: {{prefix: /prefix}}}}, limit: {{requests: 12, per: 1s}}}}, \
         {{name: regex, match: {{path: {{regex: '/regex/[^x]+'}}}}, limit: {{requests: 12, per: 1s}}}}, \
         {{name: header, match: {{headers: [{{name: x-tier, exact: free}}]}}, limit: {{requests: 12, per: 1s}}}}, \
         {{name: user, match: {{methods: [GET], path: {{exact: /user}}}}, by: [{{header: x-user}}], limit: {{requests: 12, per: 1s}}}}"
    )
}

const LIMITED: [(&str, Kind); 6] = [
    ("path prefix", Kind::get("/prefix/a?q=1")),
    ("path regex", Kind::get("/regex/42?q=x")),
    (
        "header value",
        Kind::get("/plain").with(&[("x-tier", "free")]),
    ),
    (
        "per user: ann",
        Kind::get("/user?q=1").with(&[("x-user", "ann")]),
    ),
    (
        "per user: bob",
        Kind::get("/user").with(&[("x-user", "bob")]),
    ),
    ("principal", Kind::get("/principal")),
];
const FREE: [(&str, Kind); 3] = [
    ("another path", Kind::get("/free?x=/prefix")),
    ("no match of the regex", Kind::get("/regex/x")),
    ("no user", Kind::get("/user")),
];

const WHOLE: &str = "{name: whole, limit: {requests: 12, per: 1s}}";

/// A row of the table that the test prints.
fn row(share: &str, place: Place, what: &str, offered: u64, admitted: u64, due: f64) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "small numbers")]
    let off = admitted as f64 / due - 1.0;
    println!(
        "| {share} | {place:?} | {what} | {offered} | {admitted} | {due:.0} | {:+.1} % |",
        off * 100.0
    );
    off
}

/// Lets every client flood every place, and sums up what came of it. All at once, but where a service is asked each time, which takes a third of
/// this machine for each place.
async fn floods(
    lab: &Lab,
    share: &str,
    clients: u32,
    kinds: &[Kind],
) -> anyhow::Result<Vec<(Place, Vec<Flooded>)>> {
    let flood = async |place: Place| {
        let calls = lab.calls("shop", place.authority(), kinds).await?;
        begin_with_a_second(share).await?;
        let floods = (0..clients).map(|number| {
            let calls = calls.clone();
            async move {
                let name = format!("{CLIENT}-{number}");
                let each = LIMIT * 10 / clients;
                lab.flood(("shop", &name), calls, each, time(share)).await
            }
        });
        anyhow::Ok((place, futures::future::try_join_all(floods).await?))
    };
    if share == "Global" {
        let mut all = Vec::new();
        for place in PLACES {
            all.push(flood(place).await?);
        }
        return Ok(all);
    }
    futures::future::try_join_all(PLACES.map(flood)).await
}

/// As many windows as there are seconds: the last one is not quite over.
fn time(share: &str) -> Duration {
    match share {
        "Global" => TIME - Duration::from_millis(150),
        _ => TIME,
    }
}

/// A listener that changed serves open connections until their next answer: they are used once, and buckets fill again.
async fn settle(lab: &Lab, clients: u32) -> anyhow::Result<()> {
    for _ in 0..2 {
        for place in PLACES {
            for number in 0..clients {
                let calls = lab
                    .calls("shop", place.authority(), &[Kind::get("/settle")])
                    .await?;
                let name = format!("{CLIENT}-{number}");
                let time = Duration::from_millis(200);
                lab.flood(("shop", &name), calls, 200, time).await?;
            }
        }
    }
    tokio::time::sleep(Duration::from_millis(1500)).await;
    Ok(())
}

fn sum(floods: &[Flooded], call: usize, status: Option<u16>) -> u64 {
    let of = |flooded: &Flooded| match status {
        Some(status) => flooded.of(call, status),
        None => flooded.all(call),
    };
    floods.iter().map(of).sum()
}

/// What is due of a call in the time that floods took: a bucket begins full; a window of a second begins anew each.
fn due(share: &str, floods: &[Flooded], call: usize) -> f64 {
    let time = match share {
        "Global" => {
            let time = floods[0].time.min(time(share));
            Duration::from_secs_f64(time.as_secs_f64().ceil() - 1.0)
        }
        _ => {
            let filled = floods.iter().map(|flooded| flooded.filled[call]);
            filled.max().unwrap_or_default()
        }
    };
    f64::from(LIMIT) * (1.0 + time.as_secs_f64())
}

/// Windows of the rate limit service begin with the second.
async fn begin_with_a_second(share: &str) -> anyhow::Result<()> {
    if share == "Global" {
        let now = std::time::UNIX_EPOCH.elapsed()?;
        tokio::time::sleep(Duration::from_millis(
            1020 - u64::from(now.subsec_millis()) % 1000,
        ))
        .await;
    }
    Ok(())
}

/// Applies rules everywhere, floods, prints the table, and says what is further off than it may be.
async fn measure(
    lab: &Lab,
    share: &str,
    note: &str,
    clients: u32,
    tolerance: f64,
) -> anyhow::Result<()> {
    let mut wrong = Vec::new();
    let title = format!("{share}{note}");
    for place in PLACES {
        lab.rate_limit(place.limit(), &place.spec(share, &rules()))
            .await?;
    }
    for place in PLACES {
        lab.until_limit(place.limit(), "InForce").await?;
    }
    settle(lab, clients).await?;
    let kinds: Vec<Kind> = LIMITED
        .iter()
        .chain(&FREE)
        .map(|(_, kind)| kind.clone())
        .collect();
    for (place, flooded) in floods(lab, share, clients, &kinds).await? {
        for (index, (what, _)) in LIMITED.iter().enumerate() {
            if place == Place::Outbound && *what == "principal" {
                continue;
            }
            let (offered, admitted) = (sum(&flooded, index, None), sum(&flooded, index, Some(200)));
            let due = due(share, &flooded, index);
            let off = row(&title, place, what, offered, admitted, due);
            if off.abs() > tolerance {
                wrong.push(format!("{title} {place:?} {what}: {off:+.3}"));
            }
            let rejected = sum(&flooded, index, Some(429));
            if admitted + rejected != offered {
                wrong.push(format!(
                    "{title} {place:?} {what}: other answers: {flooded:?}"
                ));
            }
        }
        for (number, (what, _)) in FREE.iter().enumerate() {
            let index = LIMITED.len() + number;
            let (offered, admitted) = (sum(&flooded, index, None), sum(&flooded, index, Some(200)));
            println!("| {title} | {place:?} | {what} (free) | {offered} | {admitted} | all | |");
            if offered != admitted || offered < 100 {
                wrong.push(format!("{title} {place:?} {what} was limited: {flooded:?}"));
            }
        }
    }
    for place in PLACES {
        lab.rate_limit(place.limit(), &place.spec(share, WHOLE))
            .await?;
    }
    for place in PLACES {
        lab.until_limit(place.limit(), "InForce").await?;
    }
    settle(lab, clients).await?;
    for (place, flooded) in floods(lab, share, clients, &[Kind::get("/any")]).await? {
        let off = row(
            &title,
            place,
            "whole service",
            sum(&flooded, 0, None),
            sum(&flooded, 0, Some(200)),
            due(share, &flooded, 0),
        );
        if off.abs() > tolerance {
            wrong.push(format!("{title} {place:?} whole service: {off:+.3}"));
        }
    }
    anyhow::ensure!(wrong.is_empty(), "{wrong:#?}");
    Ok(())
}

fn of(app: &str, number: u32) -> PodSpec {
    let mut spec = PodSpec::new("shop", &format!("{app}-{number}")).service_account(app);
    spec.labels.insert("app".into(), app.into());
    spec
}

/// One more replica of whoever limits.
async fn replica(lab: &mut Lab, number: u32) -> anyhow::Result<()> {
    lab.pod(of("inner", number).http(80)).await?;
    lab.pod(of(CLIENT, number)).await?;
    if number > 0 {
        lab.pod(of("gateway", number).gateway()).await?;
    }
    Ok(())
}

async fn mesh(lab: &mut Lab) -> anyhow::Result<()> {
    lab.install().await?;
    lab.namespace("shop").await?;
    for name in ["inner", "outer", "edge"] {
        lab.service("shop", name, &["http:80"]).await?;
    }
    for name in ["outer", "edge"] {
        lab.pod(of(name, 0).http(80)).await?;
    }
    lab.gateway("shop", "edge").await?;
    replica(lab, 0).await
}

#[test]
fn what_limits_admit_in_each_proxy_and_across_replicas() {
    fenceline_e2e::test(async |lab| {
        mesh(lab).await?;
        println!(
            "| share | place | what | offered | admitted | due | off |\n|---|---|---|---|---|---|---|"
        );
        measure(lab, "PerReplica", "", 1, 0.05).await?;
        for replicas in [1, 2, 4] {
            for number in 1..replicas {
                let there = lab.running("shop", &format!("inner-{number}")).is_ok();
                if !there {
                    replica(lab, number).await?;
                }
            }
            let note = format!(", {replicas} replicas");
            measure(lab, "AcrossReplicas", &note, replicas, 0.10).await?;
            let status = lab
                .get_rate_limit(("shop", "inner"))
                .await?
                .status
                .context("a status")?;
            anyhow::ensure!(status.replicas == Some(replicas), "{status:?}");
        }
        scaled_under_load(lab).await
    });
}

#[test]
fn what_global_limits_admit_and_what_becomes_of_requests_when_a_part_is_away() {
    fenceline_e2e::test(async |lab| {
        mesh(lab).await?;
        replica(lab, 1).await?;
        let limit = Place::Inbound.limit();
        lab.rate_limit(limit, &Place::Inbound.spec("Global", WHOLE))
            .await?;
        let why = lab.until_limit(limit, "NoRateLimitService").await?;
        println!("{why}");
        lab.start_rate_limit_service().await?;
        lab.until_limit(limit, "InForce").await?;
        println!(
            "| share | place | what | offered | admitted | due | off |\n|---|---|---|---|---|---|---|"
        );
        measure(lab, "Global", ", 2 replicas", 2, 0.10).await?;
        away(lab).await
    });
}

/// One more replica comes while requests do: none fails, and with each bucket that begins anew a burst at most is let through beyond the rate.
async fn scaled_under_load(lab: &mut Lab) -> anyhow::Result<()> {
    let calls = lab.calls("shop", "inner:80", &[Kind::get("/any")]).await?;
    let control = lab.running("shop", "client-0")?.control().to_owned();
    let order = Flood {
        calls,
        connections: 16,
        per_second: LIMIT * 10,
        time: Duration::from_secs(12),
    };
    let load = tokio::spawn(async move { flood(&control, &order).await });
    tokio::time::sleep(Duration::from_secs(2)).await;
    lab.pod(of("inner", 4).http(80)).await?;
    eventually(PATIENCE, "the quota is divided by five", async || {
        let status = lab.get_rate_limit(("shop", "inner")).await?.status;
        let replicas = status.and_then(|status| status.replicas);
        anyhow::ensure!(replicas == Some(5), "{replicas:?}");
        Ok(())
    })
    .await?;
    let flooded = load.await??;
    let (admitted, rejected) = (flooded.of(0, 200), flooded.of(0, 429));
    let due = due("AcrossReplicas", std::slice::from_ref(&flooded), 0);
    println!(
        "scaled from 4 to 5 under load: {:?}, {due:.0} due",
        flooded.statuses[0]
    );
    anyhow::ensure!(admitted + rejected == flooded.all(0), "{flooded:?}");
    #[expect(clippy::cast_precision_loss, reason = "small numbers")]
    let admitted = admitted as f64;
    anyhow::ensure!(
        admitted > due * 0.9 && admitted < due * 1.1 + 2.0 * f64::from(LIMIT),
        "{admitted} of {due}"
    );
    Ok(())
}

/// Ends parts of it, one at a time.
async fn away(lab: &mut Lab) -> anyhow::Result<()> {
    for place in [Place::Outbound, Place::Gateway] {
        lab.unlimited(place.limit()).await?;
    }
    let limit = Place::Inbound.limit();
    let spec = |unavailable: &str, ceiling: &str| {
        format!(
            "{{target: {{service: inner}}, share: Global, onUnavailable: {unavailable}, \
              rules: [{{name: all, limit: {{requests: 20, per: 1s}}{ceiling}}}]}}"
        )
    };
    let flooded = async |lab: &Lab| {
        let calls = lab.calls("shop", "inner:80", &[Kind::get("/any")]).await?;
        lab.flood(("shop", "client-0"), calls, 200, Duration::from_secs(3))
            .await
    };
    let statuses = |flooded: &Flooded| flooded.statuses[0].clone();

    println!("== who is fenced and asks the rate limit service has it in scope");
    lab.fence(("shop", "inner"), "{}").await?;
    lab.until_reason(("shop", "inner"), "Enforced").await?;
    let service = "fenceline-system/ratelimit.fenceline-system.svc.cluster.local";
    lab.until_in_scope(("shop", "inner"), service).await?;

    lab.limited(limit, &spec("Allow", "")).await?;
    println!("== the operator is away: limits stay as they are");
    lab.running_mut("fenceline-system", OPERATOR)?
        .app()?
        .kill()
        .await?;
    let without = flooded(lab).await?;
    println!("{:?}", statuses(&without));
    anyhow::ensure!((60..=90).contains(&without.of(0, 200)), "{without:?}");
    lab.running_mut("fenceline-system", OPERATOR)?.start_app()?;
    lab.operator_ready(OPERATOR).await?;
    lab.until_limit(limit, "InForce").await?;
    let written = "kind=\"EnvoyFilter\"";
    let objects = lab
        .metric(OPERATOR, "fenceline_api_writes_total", written)
        .await?;
    anyhow::ensure!(
        objects < 0.5,
        "what is as it should be was written: {objects}"
    );

    println!("== Redis is away, onUnavailable: Allow");
    lab.running_mut("fenceline-system", REDIS)?
        .app()?
        .kill()
        .await?;
    let open = flooded(lab).await?;
    println!("{:?}", statuses(&open));
    anyhow::ensure!(open.of(0, 200) == open.all(0), "{open:?}");

    println!("== the same with a ceiling of 50 a second for each of two replicas");
    lab.limited(limit, &spec("Allow", ", ceiling: {requests: 50, per: 1s}"))
        .await?;
    let ceiling = flooded(lab).await?;
    println!("{:?}", statuses(&ceiling));
    // Two full buckets, and two times fifty a second.
    anyhow::ensure!(
        (360..=440).contains(&ceiling.of(0, 200)) && ceiling.of(0, 0) == 0,
        "{ceiling:?}"
    );

    println!("== the same, onUnavailable: Deny");
    lab.limited(limit, &spec("Deny", "")).await?;
    let closed = flooded(lab).await?;
    println!("{:?}", statuses(&closed));
    anyhow::ensure!(closed.of(0, 500) == closed.all(0), "{closed:?}");

    println!("== Redis is back");
    lab.running_mut("fenceline-system", REDIS)?.start_app()?;
    eventually(PATIENCE, "the limit holds again", async || {
        let back = flooded(lab).await?;
        anyhow::ensure!(
            (60..=90).contains(&back.of(0, 200)) && back.of(0, 500) == 0,
            "{back:?}"
        );
        Ok(())
    })
    .await?;

    println!("== the rate limit service is away, onUnavailable: Allow");
    lab.limited(limit, &spec("Allow", "")).await?;
    lab.running_mut("fenceline-system", RATE_LIMIT_SERVICE)?
        .app()?
        .kill()
        .await?;
    let said = lab.until_limit(limit, "NoRateLimitService").await?;
    println!("{said}");
    let open = flooded(lab).await?;
    println!("{:?}", statuses(&open));
    anyhow::ensure!(open.of(0, 200) == open.all(0), "{open:?}");
    lab.running_mut("fenceline-system", RATE_LIMIT_SERVICE)?
        .start_app()?;
    lab.until_limit(limit, "InForce").await?;
    eventually(PATIENCE, "the limit holds again", async || {
        let back = flooded(lab).await?;
        anyhow::ensure!((60..=90).contains(&back.of(0, 200)), "{back:?}");
        Ok(())
    })
    .await
}
