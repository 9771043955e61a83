//! Requests of every kind, each a first call that is held or forwarded: none may differ from a mesh without us.

use std::time::Duration;

use fenceline_e2e::app::{Call, Protocol, Shape};
use fenceline_e2e::fences::GLOBAL_PROXY;
use fenceline_e2e::install::{OPERATOR, SYSTEM};
use fenceline_e2e::pods::request;
use fenceline_e2e::{Lab, PodSpec};

const CLIENT: (&str, &str) = ("shop", "client");
const OWN: &str = "spiffe://cluster.local/ns/shop/sa/client";
const SERVICES: usize = 28;

/// A fenced client, and one pod behind many Services.
async fn shop(lab: &mut Lab) -> anyhow::Result<()> {
    lab.install().await?;
    lab.namespace("shop").await?;
    lab.workload(CLIENT, &[80]).await?;
    let services: String = (0..SERVICES)
        .map(|number| {
            format!(
                "---\n{{apiVersion: v1, kind: Service, metadata: {{name: s{number}, namespace: shop}}, spec: \
                 {{selector: {{app: server}}, ports: [{{name: http, port: 80}}, {{name: grpc, port: 90}}]}}}}\n"
            )
        })
        .collect();
    lab.apply(&services).await?;
    lab.pod(PodSpec::new("shop", "server").http(80).http(90))
        .await?;
    let last = format!("s{}", SERVICES - 1);
    lab.until_direct(CLIENT, Protocol::Http1, &format!("{last}:80"))
        .await?;
    lab.fence(CLIENT, "{}").await?;
    let last = format!("{last}.shop.svc.cluster.local");
    lab.until_reason(CLIENT, "Enforced").await?;
    lab.until_forgotten(CLIENT, &last).await
}

/// Gives each call a Service that was never called before.
struct Fresh<'a> {
    lab: &'a Lab,
    next: std::cell::Cell<usize>,
}

impl Fresh<'_> {
    async fn call(&self, protocol: Protocol) -> anyhow::Result<Call> {
        let number = self.next.replace(self.next.get() + 1);
        anyhow::ensure!(number < SERVICES, "too few services");
        let port = if protocol == Protocol::Grpc { 90 } else { 80 };
        let host = format!("s{number}");
        let to = self.lab.resolve("shop", &host, port).await?;
        Ok(request(protocol, &format!("{host}:{port}"), to))
    }
}

fn with(mut call: Call, headers: &[(&str, &str)]) -> Call {
    let headers = headers.iter();
    call.headers
        .extend(headers.map(|(name, value)| ((*name).to_owned(), (*value).to_owned())));
    call
}

#[test]
fn first_calls_of_every_kind() {
    fenceline_e2e::test(async |lab| {
        shop(lab).await?;
        let lab = &*lab;
        let fresh = Fresh {
            lab,
            next: 0.into(),
        };
        // Longer than Envoy's default of 15 s; meanwhile the others.
        let mut long = with(
            fresh.call(Protocol::Http1).await?,
            &[("x-echo-delay", "16500")],
        );
        long.timeout = Duration::from_secs(30);
        let mut long_forwarded = long.clone();
        let unasked = fresh.call(Protocol::Http1).await?;
        (long_forwarded.authority, long_forwarded.connect) = (unasked.authority, unasked.connect);
        long_forwarded.method = "POST".into();
        long_forwarded.body_bytes = 100;
        long_forwarded.shape = Shape::Chunked(2);
        let long_polls = async {
            let (held, forwarded) =
                tokio::join!(lab.call(CLIENT, &long), lab.call(CLIENT, &long_forwarded));
            for (outcome, peer) in [(held?, OWN), (forwarded?, GLOBAL_PROXY)] {
                let report = outcome.report()?;
                anyhow::ensure!(report.peer() == Some(peer), "{report:?}");
            }
            anyhow::Ok(())
        };
        let others = async {
            methods_and_bodies(lab, &fresh).await?;
            redirects_of_the_application(lab, &fresh).await?;
            redirects_of_a_hostile_callee(lab, &fresh).await?;
            bytes_on_the_wire(lab, &fresh).await?;
            streams(lab, &fresh).await
        };
        tokio::try_join!(long_polls, others).map(drop)
    });
}

async fn methods_and_bodies(lab: &Lab, fresh: &Fresh<'_>) -> anyhow::Result<()> {
    let path = "/a%2Fb;c/d?x=%20&y=1//&z=http://e.f/";
    for (method, bytes, shape) in [
        ("HEAD", 0, Shape::Whole),
        ("DELETE", 0, Shape::Whole),
        ("OPTIONS", 0, Shape::Whole),
        ("PUT", 10, Shape::Whole),
        ("POST", 100_000, Shape::Slow(6)),
        ("POST", 999_999, Shape::Whole),
    ] {
        let mut call = with(
            fresh.call(Protocol::Http1).await?,
            &[("content-encoding", "gzip"), ("accept-encoding", "br")],
        );
        call.method = method.into();
        call.body_bytes = bytes;
        call.shape = shape;
        call.path = path.into();
        let outcome = lab.call(CLIENT, &call).await?;
        anyhow::ensure!(outcome.status == 200, "{method}: {outcome:?}");
        if method == "HEAD" {
            continue;
        }
        let report = outcome.report()?;
        // A call that came back because it was early, as on a slow machine, is known by a mark.
        let early = |value: &str| value.starts_with("again-");
        let ours = report.headers.iter().any(|(name, value)| {
            name.starts_with("x-fenceline") && !(name == "x-fenceline" && early(value))
        });
        anyhow::ensure!(report.peer() == Some(OWN) && !ours, "{method}: {report:?}");
        anyhow::ensure!(report.body_bytes == bytes && report.method == method);
        anyhow::ensure!(report.path == path, "{method}: {}", report.path);
        anyhow::ensure!(report.headers["content-encoding"] == "gzip");
        // The same connection again, without us.
        let again = lab.call(CLIENT, &call).await?.report()?;
        anyhow::ensure!(again.peer() == Some(OWN), "{again:?}");
    }
    Ok(())
}

async fn redirects_of_the_application(lab: &Lab, fresh: &Fresh<'_>) -> anyhow::Result<()> {
    for (status, body, peer) in [
        ("302", 0, OWN),
        ("307", 0, OWN),
        ("307", 2_000_000, GLOBAL_PROXY),
    ] {
        let mut call = with(
            fresh.call(Protocol::Http1).await?,
            &[
                ("x-echo-status", status),
                ("x-echo-location", "http://s0/elsewhere"),
            ],
        );
        if body > 0 {
            call.method = "POST".into();
            call.body_bytes = body;
        }
        let outcome = lab.call(CLIENT, &call).await?;
        let untouched = outcome.status.to_string() == status
            && outcome.headers.get("location").map(String::as_str) == Some("http://s0/elsewhere");
        anyhow::ensure!(untouched, "{outcome:?}");
        anyhow::ensure!(outcome.report()?.peer() == Some(peer), "{outcome:?}");
    }
    Ok(())
}

/// gRPC is answered through the ask port, whose redirects the caller's proxy follows: none of a callee's gets there, or it would choose what
/// else is called in its caller's name. The body is the first callee's own, of the path that was called.
async fn redirects_of_a_hostile_callee(lab: &Lab, fresh: &Fresh<'_>) -> anyhow::Result<()> {
    for kind in ["application/grpc", "application/grpc-web+proto"] {
        for status in ["302", "307"] {
            let headers = [
                ("content-type", kind),
                ("authorization", "Bearer of-the-caller"),
                ("x-echo-status", status),
                ("x-echo-location", "http://s0/elsewhere?so=much"),
            ];
            let mut call = with(fresh.call(Protocol::Http2).await?, &headers);
            call.method = "POST".into();
            call.body_bytes = 100;
            let outcome = lab.call(CLIENT, &call).await?;
            let answered = outcome.status.to_string() == status;
            anyhow::ensure!(answered, "{kind}: {outcome:?}");
            let report = outcome.report()?;
            anyhow::ensure!(report.path == "/", "{kind}: it was followed: {report:?}");
            let forwarded = report.peer() == Some(GLOBAL_PROXY);
            let located = outcome.headers.contains_key("location");
            anyhow::ensure!(forwarded && !located, "{kind}: {outcome:?}");
        }
    }
    Ok(())
}

/// Sends bytes to a Service of their own; gives everything that came back.
async fn raw(
    lab: &Lab,
    fresh: &Fresh<'_>,
    parts: impl Fn(&str) -> Vec<String>,
) -> anyhow::Result<String> {
    let mut call = fresh.call(Protocol::Http1).await?;
    call.shape = Shape::Raw(parts(call.authority.trim_end_matches(":80")));
    let outcome = lab.call(CLIENT, &call).await?;
    anyhow::ensure!(outcome.error.is_none(), "{call:?}: {outcome:?}");
    Ok(outcome.body)
}

async fn bytes_on_the_wire(lab: &Lab, fresh: &Fresh<'_>) -> anyhow::Result<()> {
    let end = "connection: close\r\n\r\n";
    let answers = raw(lab, fresh, |host| {
        let one = format!("GET /one HTTP/1.1\r\nhost: {host}\r\n\r\n");
        vec![format!("{one}GET /two HTTP/1.1\r\nhost: {host}\r\n{end}")]
    });
    let answers = answers.await?;
    let both = answers.find("\"/one\"").zip(answers.find("\"/two\""));
    anyhow::ensure!(both.is_some_and(|(one, two)| one < two), "{answers}");

    let answer = raw(lab, fresh, |host| {
        let head = format!("POST / HTTP/1.1\r\nhost: {host}\r\ncontent-length: 5\r\n");
        vec![
            format!("{head}expect: 100-continue\r\n{end}"),
            "hello".into(),
        ]
    });
    let answer = answer.await?;
    let continued = answer.starts_with("HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200");
    anyhow::ensure!(continued && answer.contains("\"body_bytes\":5"), "{answer}");

    let answer = raw(lab, fresh, |host| {
        vec![format!(
            "GET http://{host}/abs HTTP/1.1\r\nhost: {host}\r\n{end}"
        )]
    });
    let answer = answer.await?;
    let answered = answer.starts_with("HTTP/1.1 200") && answer.contains("\"/abs\"");
    anyhow::ensure!(answered, "{answer}");
    Ok(())
}

async fn streams(lab: &Lab, fresh: &Fresh<'_>) -> anyhow::Result<()> {
    for (shape, times) in [
        (Shape::Talk(5), "1"),
        (Shape::Tell(7), "1"),
        (Shape::Tell(1), "9"),
    ] {
        let mut call = with(
            fresh.call(Protocol::Grpc).await?,
            &[("x-echo-times", times)],
        );
        call.shape = shape;
        call.body_bytes = 100;
        let outcome = lab.call(CLIENT, &call).await?;
        let report = outcome.report()?;
        anyhow::ensure!(report.peer() == Some(GLOBAL_PROXY), "{report:?}");
    }
    Ok(())
}

#[test]
fn without_an_operator_first_calls_are_forwarded_and_redirects_are_the_applications() {
    fenceline_e2e::test(async |lab| {
        shop(lab).await?;
        lab.running_mut(SYSTEM, OPERATOR)?.app()?.kill().await?;
        let lab = &*lab;
        let fresh = Fresh {
            lab,
            next: 0.into(),
        };
        for (protocol, shape) in [
            (Protocol::Http1, Shape::Whole),
            (Protocol::Http2, Shape::Whole),
            (Protocol::Grpc, Shape::Whole),
            (Protocol::Grpc, Shape::Talk(3)),
            (Protocol::Http1, Shape::Upgrade(10)),
        ] {
            let mut call = fresh.call(protocol).await?;
            call.shape = shape;
            let report = lab.call(CLIENT, &call).await?.report()?;
            anyhow::ensure!(report.peer() == Some(GLOBAL_PROXY), "{report:?}");
        }
        let headers = [
            ("x-echo-status", "307"),
            ("x-echo-location", "http://s0/else"),
        ];
        let call = with(fresh.call(Protocol::Http1).await?, &headers);
        let outcome = lab.call(CLIENT, &call).await?;
        anyhow::ensure!(outcome.status == 307, "{outcome:?}");
        anyhow::ensure!(
            outcome.headers["location"] == "http://s0/else",
            "{outcome:?}"
        );
        Ok(())
    });
}
