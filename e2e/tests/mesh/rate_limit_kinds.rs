//! RateLimits beside each other, that move, that are refused, that make no sense, and that old proxies cannot do.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Context;
use fenceline_crds::RateLimitStatus;
use fenceline_e2e::app::Protocol;
use fenceline_e2e::fences::Name;
use fenceline_e2e::install::OPERATOR;
use fenceline_e2e::limits::Kind;
use fenceline_e2e::prometheus::URL;
use fenceline_e2e::traffic::{Target, Traffic};
use fenceline_e2e::wait::eventually;
use fenceline_e2e::{Lab, PATIENCE, PodSpec};

const CART: Name<'static> = ("shop", "cart");
const CLIENT: Name<'static> = ("shop", "client");

async fn mesh(lab: &mut Lab) -> anyhow::Result<()> {
    lab.install().await?;
    lab.namespace("shop").await?;
    lab.service(CART.0, CART.1, &["http:80", "grpc:90"]).await?;
    lab.pod(PodSpec::new(CART.0, CART.1).http(80).http(90))
        .await?;
    lab.pod(PodSpec::new(CLIENT.0, CLIENT.1)).await
}

fn within(count: u64, due: f64, share: f64) -> anyhow::Result<()> {
    #[expect(clippy::cast_precision_loss, reason = "small numbers")]
    let off = count as f64 / due - 1.0;
    anyhow::ensure!(off.abs() <= share, "{count} of {due}");
    Ok(())
}

#[test]
fn limits_of_two_teams_on_one_path_and_what_rejections_look_like() {
    fenceline_e2e::test(async |lab| {
        mesh(lab).await?;
        let plain = lab.get(CLIENT, Protocol::Http1, "cart:80").await?;
        anyhow::ensure!(plain.status == 200, "{plain:?}");
        // The wide one is there first, and is made by somebody else, in Istio's root namespace.
        let wide = "{target: {selector: {matchLabels: {app: cart}}}, rules: [{name: all, limit: {requests: 60, per: 1s}}]}";
        lab.limited(("istio-system", "of-the-mesh"), wide).await?;
        let narrow = "{target: {service: cart}, rules: [{name: slow, match: {path: {prefix: /slow}}, limit: {requests: 10, per: 1s}, \
                      response: {status: 503, headers: {x-why: slowly}, rateLimitHeaders: true}}]}";
        lab.limited(("shop", "of-the-team"), narrow).await?;
        let time = Duration::from_secs(5);
        let slow = lab.calls("shop", "cart:80", &[Kind::get("/slow")]).await?;
        let fast = lab.calls("shop", "cart:80", &[Kind::get("/fast")]).await?;
        let (slow, fast) = tokio::try_join!(
            lab.flood(CLIENT, slow, 400, time),
            lab.flood(CLIENT, fast, 30, time)
        )?;
        println!(
            "two teams: /slow {:?} (60 due), /fast {:?} (all due)",
            slow.statuses[0], fast.statuses[0]
        );
        within(slow.of(0, 200), 60.0, 0.05)?;
        // What the narrow one rejects does not use up the tokens of the wide one, which was there before it.
        anyhow::ensure!(
            fast.of(0, 200) == fast.all(0) && fast.all(0) > 100,
            "{fast:?}"
        );
        anyhow::ensure!(slow.of(0, 503) + slow.of(0, 200) == slow.all(0), "{slow:?}");
        let fast = lab.calls("shop", "cart:80", &[Kind::get("/fast")]).await?;
        let fast = lab.flood(CLIENT, fast, 600, time).await?;
        println!("/fast alone: {:?} (360 due)", fast.statuses[0]);
        within(fast.of(0, 200), 360.0, 0.05)?;

        // A rejection, as clients see it.
        let mut call = lab
            .calls("shop", "cart:80", &[Kind::get("/slow")])
            .await?
            .remove(0);
        let rejected = eventually(PATIENCE, "a rejection", async || {
            let outcome = lab.call(CLIENT, &call).await?;
            anyhow::ensure!(outcome.status == 503, "{outcome:?}");
            Ok(outcome)
        })
        .await?;
        println!("{:?}", rejected.headers);
        for (name, value) in [
            ("x-why", "slowly"),
            ("retry-after", "1"),
            ("x-ratelimit-remaining", "0"),
        ] {
            anyhow::ensure!(
                rejected.headers.get(name).is_some_and(|have| have == value),
                "{name}: {rejected:?}"
            );
        }

        // gRPC, which is told in its own way.
        let grpc = "{target: {service: cart}, rules: [{name: one, match: {path: {prefix: /lab.Echo}}, limit: {requests: 1, per: 1m}}]}";
        lab.limited(("shop", "grpc"), grpc).await?;
        let connect = (call.connect.ip(), 90).into();
        call = fenceline_e2e::pods::request(Protocol::Grpc, "cart:90", connect);
        let said = eventually(PATIENCE, "gRPC is rejected", async || {
            let outcome = lab.call(CLIENT, &call).await?;
            outcome
                .error
                .with_context(|| format!("answered: {}", outcome.status))
        })
        .await?;
        println!("{said}");
        anyhow::ensure!(
            said.contains("ResourceExhausted") || said.contains("resource has been exhausted"),
            "{said}"
        );

        // What only counts rejects nothing, and weakens nobody.
        let dry = "{target: {service: cart}, rules: [{name: all, limit: {requests: 1, per: 1m}, shadow: true}]}";
        lab.limited(("shop", "of-the-team"), dry).await?;
        let calls = lab.calls("shop", "cart:80", &[Kind::get("/slow")]).await?;
        let flooded = lab
            .flood(CLIENT, calls, 300, Duration::from_secs(4))
            .await?;
        println!("with one that only counts: {:?}", flooded.statuses);
        within(flooded.of(0, 200), 300.0, 0.05)
    });
}

#[test]
fn a_bucket_for_each_caller_address_and_parameter() {
    fenceline_e2e::test(async |lab| {
        mesh(lab).await?;
        let friend = ("shop", "friend");
        lab.pod(PodSpec::new(friend.0, friend.1)).await?;
        let rule = |name: &str, by: &str| {
            format!(
                "{{name: {name}, match: {{path: {{exact: /{name}}}}}, by: [{by}], limit: {{requests: 10, per: 1s}}}}"
            )
        };
        let spec = format!(
            "{{target: {{service: cart}}, rules: [{}, {}, {}]}}",
            rule("caller", "{principal: {}}"),
            rule("address", "{remoteAddress: {}}"),
            rule("parameter", "{query: user}")
        );
        lab.limited(("shop", "cart"), &spec).await?;
        let kinds = [
            Kind::get("/caller"),
            Kind::get("/address"),
            Kind::get("/parameter?user=ann"),
            Kind::get("/parameter?x=1&user=bob"),
        ];
        let calls = lab.calls("shop", "cart:80", &kinds).await?;
        let time = Duration::from_secs(5);
        let (one, other) = tokio::try_join!(
            lab.flood(CLIENT, calls.clone(), 100, time),
            lab.flood(friend, calls, 100, time)
        )?;
        println!("client: {:?}\nfriend: {:?}", one.statuses, other.statuses);
        for flooded in [&one, &other] {
            for (kind, what) in ["caller", "address"].into_iter().enumerate() {
                within(flooded.of(kind, 200), 60.0, 0.05).with_context(|| what.to_owned())?;
            }
        }
        // Of these two there is one bucket each, whoever calls.
        for kind in [2, 3] {
            within(one.of(kind, 200) + other.of(kind, 200), 60.0, 0.05)?;
        }
        Ok(())
    });
}

#[test]
fn what_proxies_refuse_is_taken_back_and_no_request_fails() {
    fenceline_e2e::test(async |lab| {
        mesh(lab).await?;
        let limit = ("shop", "cart");
        let spec = |regex: &str| {
            format!(
                "{{target: {{service: cart}}, rules: [{{name: free, match: {{headers: [{{name: x-tier, regex: '{regex}'}}]}}, \
                 limit: {{requests: 10, per: 1s}}}}]}}"
            )
        };
        let target = Target::of(lab, CART, "cart", Protocol::Http1, 80).await?;
        let pods = [CLIENT; 4];
        let traffic = Traffic::start(
            lab,
            &pods,
            vec![target],
            Duration::from_millis(5),
            |_, _, _| 0,
        )?;
        // The API server compiles it; RE2 has less memory for it, which only Envoy knows.
        let large = r"\pL{1000}".repeat(60);
        lab.rate_limit(limit, &spec(&large)).await?;
        let said = lab.until_limit(limit, "Refused").await?;
        println!("at first: {said}");
        let event = [
            "-n",
            "shop",
            "get",
            "events",
            "--field-selector",
            "involvedObject.kind=RateLimit",
            "-o",
            "jsonpath={.items[*].reason}",
        ];
        eventually(PATIENCE, "an event", async || {
            let reasons = lab.kubectl(&event).await?;
            anyhow::ensure!(reasons.contains("Refused"), "{reasons}");
            Ok(())
        })
        .await?;
        lab.limited(limit, &spec("fr.e")).await?;
        let admitted = async |lab: &Lab| {
            let kind = Kind::get("/").with(&[("x-tier", "free")]);
            let calls = lab.calls("shop", "cart:80", &[kind]).await?;
            let flooded = lab
                .flood(CLIENT, calls, 100, Duration::from_secs(4))
                .await?;
            println!("{:?}", flooded.statuses);
            within(flooded.of(0, 200), 50.0, 0.06)
        };
        admitted(lab).await?;
        lab.rate_limit(limit, &spec(&format!("({large}|free)")))
            .await?;
        let said = lab.until_limit(limit, "Refused").await?;
        println!("then: {said}");
        anyhow::ensure!(
            said.contains("too large") && said.contains("cart.shop"),
            "{said}"
        );
        tokio::time::sleep(Duration::from_secs(3)).await;
        admitted(lab).await?;
        lab.until_quiet(OPERATOR, Duration::from_secs(5)).await?;
        let written = async |kind: &str| {
            let of = format!("kind=\"{kind}\"");
            lab.metric(OPERATOR, "fenceline_api_writes_total", &of)
                .await
        };
        let before = [
            written("EnvoyFilter").await?,
            written("RateLimit/status").await?,
        ];
        // It is not tried again, but something else is: one object, and its status when it is on its way and when it is there.
        lab.limited(limit, &spec("free")).await?;
        let objects = written("EnvoyFilter").await? - before[0];
        let statuses = written("RateLimit/status").await? - before[1];
        println!("another spec: {objects} objects and {statuses} statuses written");
        anyhow::ensure!(objects < 1.5 && statuses < 3.5, "{objects}, {statuses}");
        let tally = traffic.stop().await?;
        println!(
            "{} other calls, {} failed",
            tally.calls(),
            tally.failed.len()
        );
        anyhow::ensure!(
            tally.failed.is_empty() && tally.calls() > 100,
            "{:?}",
            tally.failed
        );
        Ok(())
    });
}

#[test]
fn what_makes_no_sense_is_said_and_what_was_in_force_stays() {
    fenceline_e2e::test(async |lab| {
        mesh(lab).await?;
        let limit = ("shop", "cart");
        for (spec, says) in [
            (
                "{target: {}, rules: [{name: a, limit: {requests: 1, per: 1s}}]}",
                "one of service, selector and gateway",
            ),
            ("{target: {service: cart}, rules: []}", "rules"),
            (
                "{target: {service: cart}, rules: [{name: a, limit: {requests: 0, per: 1s}}]}",
                "requests",
            ),
            (
                "{target: {service: cart}, rules: [{name: a, limit: {requests: 1, per: 1d}}]}",
                "per is a length of time",
            ),
            (
                "{target: {service: cart}, direction: Outbound, rules: [{name: a, limit: {requests: 1, per: 1s}}]}",
                "needs `to`",
            ),
            (
                "{target: {service: cart}, share: Global, rules: [{name: a, limit: {requests: 1, per: 1s, burst: 2}}]}",
                "no burst",
            ),
            (
                "{target: {service: cart}, rules: [{name: a, by: [{}], limit: {requests: 1, per: 1s}}]}",
                "one of header, query",
            ),
            (
                "{target: {service: cart}, direction: Outbound, to: x, rules: [{name: a, by: [{principal: {}}], limit: {requests: 1, per: 1s}}]}",
                "whose principal is always the same",
            ),
            (
                "{target: {service: cart}, rules: [{name: a, match: {path: {regex: '/a(b'}}, limit: {requests: 1, per: 1s}}]}",
                "missing closing )",
            ),
            (
                "{target: {service: cart}, share: Global, rules: [{name: a, limit: {requests: 1, per: 10s}}]}",
                "limit.per is 1s, 1m, 1h, 24h or 168h",
            ),
        ] {
            let why = format!(
                "{:#}",
                lab.rate_limit(limit, spec)
                    .await
                    .err()
                    .context("it was taken")?
            );
            anyhow::ensure!(why.contains(says), "{spec}: {why}");
        }
        let good = "{target: {service: cart}, rules: [{name: a, limit: {requests: 10, per: 1s}}]}";
        lab.limited(limit, good).await?;
        for (spec, says) in [
            (
                "{target: {service: cart}, rules: [{name: a, when: 'metrics.p99 > 1.0', limit: {requests: 1, per: 1s}}]}",
                "spec.rules[0].when: metrics.p99 is not among spec.metrics",
            ),
            (
                "{target: {service: other}, rules: [{name: a, limit: {requests: 1, per: 1s}}]}",
                "spec.target.service: Service other does not exist",
            ),
        ] {
            lab.rate_limit(limit, spec).await?;
            let why = lab.until_limit(limit, "Invalid").await?;
            anyhow::ensure!(why.contains(says), "{spec}: {why}");
        }
        let calls = lab.calls("shop", "cart:80", &[Kind::get("/")]).await?;
        let flooded = lab
            .flood(CLIENT, calls, 100, Duration::from_secs(4))
            .await?;
        within(flooded.of(0, 200), 50.0, 0.06)?;

        // A pod whose proxy is older than what is wanted of it.
        lab.limited(limit, good).await?;
        lab.pod(
            PodSpec::new("shop", "old")
                .label("app", "cart")
                .http(80)
                .proxy_env("ISTIO_META_ISTIO_VERSION", "1.29.1"),
        )
        .await?;
        let cidrs = "{target: {service: cart}, rules: [{name: a, match: {cidrs: [10.0.0.0/8]}, limit: {requests: 1, per: 1s}}]}";
        lab.rate_limit(limit, cidrs).await?;
        let why = lab.until_limit(limit, "Unsupported").await?;
        println!("{why}");
        anyhow::ensure!(
            why.contains("1.30") && why.contains("old.shop has 1.29.1"),
            "{why}"
        );
        lab.delete_pod("shop", "old").await?;
        lab.until_limit(limit, "InForce").await?;
        // And addresses count: the client's is in the range.
        let calls = lab.calls("shop", "cart:80", &[Kind::get("/")]).await?;
        let flooded = lab.flood(CLIENT, calls, 50, Duration::from_secs(3)).await?;
        within(flooded.of(0, 200), 4.0, 0.3)
    });
}

/// Serves a metric to Prometheus, which says what the test says.
async fn scripted(lab: &Lab) -> anyhow::Result<Arc<Mutex<String>>> {
    let said = Arc::new(Mutex::new(String::new()));
    let listener = tokio::net::TcpListener::bind(fenceline_e2e::prometheus::SCRIPTED).await?;
    let says = Arc::clone(&said);
    tokio::spawn(async move {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        while let Ok((mut stream, _)) = listener.accept().await {
            let text = says.lock().unwrap_or_else(PoisonError::into_inner).clone();
            tokio::spawn(async move {
                let mut request = [0; 4096];
                // Whatever it asks for, there is one answer.
                let _ = stream.read(&mut request).await?;
                let answer = format!(
                    "HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{text}",
                    text.len()
                );
                stream.write_all(answer.as_bytes()).await
            });
        }
    });
    lab.query_prometheus("up").await?;
    Ok(said)
}

async fn status(lab: &Lab) -> anyhow::Result<RateLimitStatus> {
    lab.get_rate_limit(("shop", "cart"))
        .await?
        .status
        .context("no status")
}

fn is_stale(status: &RateLimitStatus) -> bool {
    let mut conditions = status.conditions.iter();
    conditions.any(|one| one.type_ == "MetricsStale" && one.status == "True")
}

#[test]
fn an_adaptive_limit_follows_a_metric_that_rises_vanishes_lies_and_comes_back() {
    fenceline_e2e::test(async |lab| {
        lab.start_prometheus().await?;
        // The scripted metric is of no namespace.
        lab.operator_args = vec![
            format!("--prometheus-url={URL}"),
            "--rate-limit-metrics=any".to_owned(),
        ];
        mesh(lab).await?;
        let metric = scripted(lab).await?;
        let say = |value: &str| {
            let line = if value.is_empty() {
                String::new()
            } else {
                format!("p99 {value}\n")
            };
            *metric.lock().unwrap_or_else(PoisonError::into_inner) = line;
        };
        say("1");
        let spec = "{target: {service: cart}, metrics: [{name: p99, prometheus: {query: p99}}], \
                    rules: [{name: follows, limit: {requests: 100, per: 1s}, \
                             adaptive: {requests: 'int(100.0 / metrics.p99)', min: 20, max: 300, maxStep: 100%, every: 10s, staleAfter: 8s}}, \
                            {name: slow, match: {path: {prefix: /slow}}, limit: {requests: 5, per: 1s}, when: 'metrics.p99 > 1.5'}]}";
        lab.limited(("shop", "cart"), spec).await?;
        let traffic = {
            let target = Target::of(lab, CART, "cart", Protocol::Http1, 80).await?;
            Traffic::start(
                lab,
                &[CLIENT],
                vec![target],
                Duration::from_millis(100),
                |_, _, _| 0,
            )?
        };
        let began = Instant::now();
        println!(
            "| s | metric | limit | `when: p99 > 1.5` | MetricsStale |\n|---|---|---|---|---|"
        );
        let mut last: Option<(u32, Instant)> = None;
        // What the metric says, for how long, and where the limit is at the end of that.
        for (value, seconds, ends) in [
            ("1", 3, 100..=100),
            ("4", 12, 25..=27),
            ("", 20, 25..=27),
            ("NaN", 12, 25..=27),
            ("-1", 12, 20..=20),
            ("+Inf", 12, 20..=20),
            ("1e300", 12, 20..=20),
            ("0.2", 42, 285..=300),
            ("1", 12, 96..=105),
        ] {
            say(value);
            // No number is no value; how long infinity lasts here is just short of stale.
            let stale = value.is_empty() || value == "NaN";
            let began_so = Instant::now();
            loop {
                let seen = status(lab).await?;
                let (rule, slow) = (&seen.rules[0], &seen.rules[1]);
                if last.is_none_or(|(before, _)| before != rule.effective) {
                    let at = began.elapsed().as_secs();
                    println!(
                        "| {at} | {value} | {} | {} | {} |",
                        rule.effective,
                        slow.active,
                        is_stale(&seen)
                    );
                    if let Some((before, since)) = last {
                        // Each step doubles it at most; the status is not written for every one.
                        let steps = u32::try_from(since.elapsed().as_secs() / 10 + 1)?;
                        anyhow::ensure!(
                            rule.effective <= before.saturating_mul(2_u32.saturating_pow(steps)),
                            "{before} -> {}: {steps} steps at most",
                            rule.effective
                        );
                    }
                    last = Some((rule.effective, Instant::now()));
                }
                anyhow::ensure!((20..=300).contains(&rule.effective), "{rule:?}");
                // It is there, and stays there for as long as the metric says so.
                let either = value == "+Inf";
                let said = is_stale(&seen) == stale || either;
                let arrived = ends.contains(&rule.effective) && said;
                let time = began_so.elapsed();
                if arrived && time > Duration::from_secs(seconds) {
                    break;
                }
                // Steps take longer where everything else runs on the same two processors.
                let patience = Duration::from_secs(seconds) + PATIENCE * 2;
                anyhow::ensure!(time < patience, "{value}: {seen:?}");
                tokio::time::sleep(Duration::from_millis(150)).await;
            }
        }
        // Prometheus away: what is, stays, and is said.
        lab.stop_prometheus().await?;
        let stale = eventually(
            PATIENCE * 2,
            "it is said that metrics are missing",
            async || {
                let status = status(lab).await?;
                anyhow::ensure!(is_stale(&status), "{status:?}");
                Ok(status)
            },
        )
        .await?;
        println!(
            "Prometheus away: {} ; {:?}",
            stale.rules[0].effective, stale.rules[0].message
        );
        anyhow::ensure!((96..=105).contains(&stale.rules[0].effective), "{stale:?}");
        lab.start_prometheus().await?;
        eventually(PATIENCE, "it is said that they are back", async || {
            let status = status(lab).await?;
            anyhow::ensure!(!is_stale(&status), "{status:?}");
            Ok(())
        })
        .await?;
        let tally = traffic.stop().await?;
        println!(
            "{} calls meanwhile, {} failed",
            tally.calls(),
            tally.failed.len()
        );
        anyhow::ensure!(
            tally.failed.is_empty() && tally.calls() > 100,
            "{:?}",
            tally.failed
        );

        // What is rejected is counted.
        let calls = lab.calls("shop", "cart:80", &[Kind::get("/")]).await?;
        let flooded = lab
            .flood(CLIENT, calls, 500, Duration::from_secs(5))
            .await?;
        let rejected = flooded.of(0, 429);
        let counted = eventually(PATIENCE * 3, "status counts them", async || {
            let limited = status(lab).await?.limited.context("not counted yet")?;
            anyhow::ensure!(limited > 0, "none yet");
            Ok(limited)
        })
        .await?;
        println!("{rejected} rejected, about {counted} counted");
        within(counted, f64::from(u32::try_from(rejected)?), 0.25)
    });
}
