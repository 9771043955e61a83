//! Every kind of request × every kind of policy × hold and forward: what the application sees, and who the callee sees.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use fenceline_e2e::app::{Call, Outcome, Protocol, Shape};
use fenceline_e2e::fences::GLOBAL_PROXY as GLOBAL_PROXY_URI;
use fenceline_e2e::install::{GLOBAL_PROXY, SYSTEM};
use fenceline_e2e::pods::request;
use fenceline_e2e::tools::checkout;
use fenceline_e2e::{Lab, PATIENCE, PodSpec, wait::eventually};

const HOLDER: (&str, &str) = ("shop", "holder");
const FORWARDER: (&str, &str) = ("shop", "forwarder");
const HTTP: u16 = 80;
const GRPC: u16 = 90;

/// A kind of request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Get,
    Post(usize),
    Chunked,
    H2c,
    Unary,
    Bidi,
    WebSocket,
}

const KINDS: [(&str, Kind); 9] = [
    ("get", Kind::Get),
    ("post-1k", Kind::Post(1 << 10)),
    ("post-200k", Kind::Post(200 << 10)),
    ("post-5m", Kind::Post(5 << 20)),
    ("chunked", Kind::Chunked),
    ("h2c", Kind::H2c),
    ("grpc-unary", Kind::Unary),
    ("grpc-bidi", Kind::Bidi),
    ("websocket", Kind::WebSocket),
];

impl Kind {
    fn port(self) -> u16 {
        if matches!(self, Self::Unary | Self::Bidi) {
            GRPC
        } else {
            HTTP
        }
    }

    fn call(self, mut call: Call) -> Call {
        match self {
            Self::Get | Self::H2c | Self::Unary => {}
            Self::Post(bytes) => {
                call.method = "POST".into();
                call.body_bytes = bytes;
            }
            Self::Chunked => {
                call.method = "POST".into();
                call.body_bytes = 10_000;
                call.shape = Shape::Chunked(4);
            }
            Self::Bidi => call.shape = Shape::Talk(3),
            Self::WebSocket => call.shape = Shape::Upgrade(1000),
        }
        call
    }

    fn protocol(self) -> Protocol {
        match self {
            Self::H2c => Protocol::Http2,
            Self::Unary | Self::Bidi => Protocol::Grpc,
            _ => Protocol::Http1,
        }
    }

    /// Whether its proxy can send it again.
    fn is_replayable(self) -> bool {
        match self {
            Self::Get | Self::H2c | Self::Unary => true,
            Self::Post(bytes) => bytes < 1_000_000,
            Self::Chunked | Self::Bidi | Self::WebSocket => false,
        }
    }

    fn is_grpc(self) -> bool {
        matches!(self, Self::Unary | Self::Bidi)
    }
}

/// What protects the callee: a policy's rules, and whether they let the clients in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Policy {
    name: &'static str,
    title: &'static str,
    spec: Option<&'static str>,
    lets_in: bool,
    /// Whether it names the clients, so that they have the host in scope before they call.
    names: bool,
}

const POLICIES: [Policy; 5] = [
    Policy {
        name: "open",
        title: "no policy",
        spec: None,
        lets_in: true,
        names: false,
    },
    Policy {
        name: "named",
        title: "ALLOW naming the caller",
        spec: Some(
            "action: ALLOW, rules: [{from: [{source: {principals: \
             [cluster.local/ns/shop/sa/holder, cluster.local/ns/shop/sa/forwarder]}}]}]",
        ),
        lets_in: true,
        names: true,
    },
    Policy {
        name: "matched",
        title: "ALLOW matching the caller by a condition",
        spec: Some("action: ALLOW, rules: [{when: [{key: source.namespace, values: [shop]}]}]"),
        lets_in: true,
        names: false,
    },
    Policy {
        name: "others",
        title: "ALLOW naming somebody else",
        spec: Some(
            "action: ALLOW, rules: [{from: [{source: {principals: [cluster.local/ns/shop/sa/other]}}]}]",
        ),
        lets_in: false,
        names: false,
    },
    Policy {
        name: "denied",
        title: "DENY naming the caller",
        spec: Some(
            "action: DENY, rules: [{from: [{source: {principals: \
             [cluster.local/ns/shop/sa/holder, cluster.local/ns/shop/sa/forwarder]}}]}]",
        ),
        lets_in: false,
        names: false,
    },
];

/// What must become of a first call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Want {
    /// Answered, and the callee saw the caller.
    Own,
    /// Answered, and the callee saw the global proxy.
    Forwarded,
    /// The callee itself refused the caller.
    Denied,
    /// The global proxy refused, for now.
    Refused,
}

fn want(kind: Kind, policy: Policy, hold: bool) -> Want {
    let direct = if policy.lets_in {
        Want::Own
    } else {
        Want::Denied
    };
    match policy.spec {
        // In scope before anybody called.
        _ if policy.names => direct,
        None if hold && kind.is_replayable() && !kind.is_grpc() => direct,
        None => Want::Forwarded,
        Some(_) if hold && kind.is_replayable() => direct,
        Some(_) => Want::Refused,
    }
}

fn is(outcome: &Outcome, client: &str) -> Result<Want, String> {
    let own = format!("spiffe://cluster.local/ns/shop/sa/{client}");
    match outcome.status {
        200 | 101 => match outcome.report().map_err(|error| error.to_string())?.peer() {
            Some(peer) if peer == own => Ok(Want::Own),
            Some(GLOBAL_PROXY_URI) => Ok(Want::Forwarded),
            other => Err(format!("the callee saw {other:?}")),
        },
        403 => Ok(Want::Denied),
        503 if outcome.headers.contains_key("x-fenceline-reason") => Ok(Want::Refused),
        _ => Err(format!("{outcome:?}")),
    }
}

#[test]
fn every_request_under_every_policy() {
    fenceline_e2e::test(async |lab| {
        shop(lab).await?;
        let mut failures = String::new();
        let mut cells = BTreeMap::new();
        for (number, policy) in POLICIES.iter().enumerate() {
            for (client, hold) in [(HOLDER, true), (FORWARDER, false)] {
                for (name, kind) in KINDS {
                    let host = format!("{}-{name}", policy.name);
                    let authority = format!("{host}.bank:{}", kind.port());
                    let connect = lab.resolve("bank", &host, kind.port()).await?;
                    let call = kind.call(request(kind.protocol(), &authority, connect));
                    let outcome = lab.call(client, &call).await?;
                    let want = want(kind, *policy, hold);
                    match is(&outcome, client.1) {
                        Ok(is) if is == want => {}
                        other => writeln!(
                            failures,
                            "{authority} hold={hold}: want {want:?}, {other:?}"
                        )?,
                    }
                    let cell = format!("{} {:.0?}", said(want, kind), outcome.took);
                    cells.insert((name, hold, number), cell);
                    // Refused for now: what was learnt lets the next one through, or to the callee's own refusal.
                    if want == Want::Refused {
                        let direct = if policy.lets_in {
                            Want::Own
                        } else {
                            Want::Denied
                        };
                        eventually(PATIENCE, &format!("{authority} goes direct"), async || {
                            let next = lab.call(client, &call).await?;
                            anyhow::ensure!(is(&next, client.1) == Ok(direct), "{next:?}");
                            Ok(())
                        })
                        .await?;
                    }
                }
            }
        }
        anyhow::ensure!(failures.is_empty(), "{failures}");
        never_forwarded(lab).await?;
        let table = table(&cells)?;
        println!("{table}");
        let path = checkout().join("target/first-call.md");
        std::fs::write(path, table)?;
        Ok(())
    });
}

/// Two clients, one service for each kind of request and policy, one pod behind all of a policy's.
async fn shop(lab: &mut Lab) -> anyhow::Result<()> {
    lab.install().await?;
    lab.namespace("shop").await?;
    lab.namespace("bank").await?;
    lab.workload(HOLDER, &[HTTP]).await?;
    lab.workload(FORWARDER, &[HTTP]).await?;
    for policy in POLICIES {
        let Policy { name, spec, .. } = policy;
        if let Some(spec) = spec {
            lab.apply(&format!(
                "{{apiVersion: security.istio.io/v1, kind: AuthorizationPolicy, \
                 metadata: {{name: {name}, namespace: bank}}, \
                 spec: {{selector: {{matchLabels: {{app: {name}}}}}, {spec}}}}}"
            ))
            .await?;
        }
        let mut services = String::new();
        for (kind, _) in KINDS {
            writeln!(
                services,
                "---\n{{apiVersion: v1, kind: Service, metadata: {{name: {name}-{kind}, namespace: bank}}, \
                 spec: {{selector: {{app: {name}}}, ports: [{{name: http, port: {HTTP}}}, {{name: grpc, port: {GRPC}}}]}}}}"
            )?;
        }
        lab.apply(&services).await?;
        lab.pod(PodSpec::new("bank", name).http(HTTP).http(GRPC))
            .await?;
    }
    lab.fence(HOLDER, "{}").await?;
    lab.fence(FORWARDER, "{firstCall: {policy: Forward}}")
        .await?;
    for client in [HOLDER, FORWARDER] {
        lab.until_reason(client, "Enforced").await?;
        lab.until_forgotten(client, "open-get.bank.svc.cluster.local")
            .await?;
        lab.until_in_scope(client, "bank/named-get.bank.svc.cluster.local")
            .await?;
    }
    eventually(PATIENCE, "the global proxy has every service", async || {
        let clusters = lab
            .running(SYSTEM, GLOBAL_PROXY)?
            .envoy("/clusters")
            .await?;
        anyhow::ensure!(clusters.contains("||denied-websocket.bank"), "not yet");
        Ok(())
    })
    .await
}

/// By the global proxy's own counters: not one request went to a protected host.
async fn never_forwarded(lab: &Lab) -> anyhow::Result<()> {
    let clusters = lab
        .running(SYSTEM, GLOBAL_PROXY)?
        .envoy("/clusters")
        .await?;
    let requests = |policy: &str| -> u64 {
        let of_policy = format!("||{policy}-");
        let lines = clusters.lines().filter(|line| line.contains(&of_policy));
        lines
            .filter_map(|line| line.rsplit_once("::rq_total::")?.1.parse::<u64>().ok())
            .sum()
    };
    anyhow::ensure!(requests("open") > 0, "the counters say nothing");
    for Policy { name, .. } in POLICIES.into_iter().filter(|policy| policy.spec.is_some()) {
        anyhow::ensure!(requests(name) == 0, "{name} was forwarded to");
    }
    Ok(())
}

fn said(want: Want, kind: Kind) -> &'static str {
    match (want, kind.is_grpc()) {
        (Want::Own, _) => "answered, caller",
        (Want::Forwarded, _) => "answered, global proxy",
        (Want::Denied, false) => "403 of the callee",
        (Want::Denied, true) => "PERMISSION_DENIED of the callee",
        (Want::Refused, false) => "503, then direct",
        (Want::Refused, true) => "UNAVAILABLE, then direct",
    }
}

/// What happened, for people: the answer, whom the callee saw, and how long it took.
fn table(cells: &BTreeMap<(&str, bool, usize), String>) -> anyhow::Result<String> {
    let mut table = String::new();
    for (hold, mode) in [(true, "Hold"), (false, "Forward")] {
        let titles: Vec<&str> = POLICIES.iter().map(|policy| policy.title).collect();
        writeln!(table, "| {mode} | {} |", titles.join(" | "))?;
        writeln!(table, "|---{}|", "|---".repeat(POLICIES.len()))?;
        for (name, _) in KINDS {
            let row: Vec<&str> = (0..POLICIES.len())
                .map(|policy| cells[&(name, hold, policy)].as_str())
                .collect();
            writeln!(table, "| {name} | {} |", row.join(" | "))?;
        }
        writeln!(table)?;
    }
    Ok(table)
}
