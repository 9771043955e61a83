//! The global proxy is nobody's deputy: what policies protect is not reached through it, whatever happens in what order.

use std::time::Duration;

use fenceline_e2e::app::{Outcome, Protocol, Shape};
use fenceline_e2e::fences::GLOBAL_PROXY as GLOBAL_PROXY_URI;
use fenceline_e2e::install::{GLOBAL_PROXY, OPERATOR, SYSTEM};
use fenceline_e2e::pods::request;
use fenceline_e2e::wait::throughout;
use fenceline_e2e::{Lab, PATIENCE, wait::eventually};

const CLIENT: (&str, &str) = ("shop", "client");
const MALLORY: (&str, &str) = ("shop", "mallory");

/// A bank whose vault lets in the teller alone, and a fenced client in the shop.
async fn bank(lab: &mut Lab) -> anyhow::Result<()> {
    lab.install().await?;
    lab.namespace("shop").await?;
    lab.namespace("bank").await?;
    lab.workload(CLIENT, &[80]).await?;
    lab.workload(("bank", "vault"), &[80]).await?;
    lab.workload(("bank", "lobby"), &[80]).await?;
    protect(lab).await?;
    lab.fence(CLIENT, "{firstCall: {policy: Forward}}").await?;
    lab.until_reason(CLIENT, "Enforced").await?;
    lab.until_forgotten(CLIENT, "vault.bank.svc.cluster.local")
        .await
}

async fn protect(lab: &Lab) -> anyhow::Result<()> {
    lab.apply(
        "{apiVersion: security.istio.io/v1, kind: AuthorizationPolicy, metadata: {name: vault, namespace: bank}, \
         spec: {selector: {matchLabels: {app: vault}}, \
         rules: [{from: [{source: {principals: [cluster.local/ns/bank/sa/teller]}}]}]}}",
    )
    .await
}

fn is_refused(outcome: &Outcome) -> anyhow::Result<()> {
    let reason = outcome.headers.get("x-fenceline-reason");
    let retry = outcome.headers.get("retry-after");
    anyhow::ensure!(
        outcome.status == 503 && reason.is_some() && retry.is_some(),
        "{outcome:?}"
    );
    Ok(())
}

/// How many requests the global proxy sent to a host, by its own counters.
async fn forwarded_to(lab: &Lab, host: &str) -> anyhow::Result<u64> {
    let clusters = lab
        .running(SYSTEM, GLOBAL_PROXY)?
        .envoy("/clusters")
        .await?;
    let of_host = format!("||{host}.svc.cluster.local::");
    let lines = clusters.lines().filter(|line| line.contains(&of_host));
    Ok(lines
        .filter_map(|line| line.rsplit_once("::rq_total::")?.1.parse::<u64>().ok())
        .sum())
}

#[test]
fn policies_are_followed_as_they_come_and_go() {
    fenceline_e2e::test(async |lab| {
        bank(lab).await?;
        let vault = lab.resolve("bank", "vault", 80).await?;
        let lobby = lab.resolve("bank", "lobby", 80).await?;
        // Marked by hand: as one that was held in vain would be.
        let forward = |authority: &str, to| {
            let mut call = request(Protocol::Http1, authority, to);
            call.headers.insert("x-fenceline".into(), "forward".into());
            call
        };
        let deny = async |lab: &Lab, there: bool| {
            eventually(
                PATIENCE,
                &format!("a policy that denies: {there}"),
                async || {
                    let name = "fenceline-protected-bank";
                    let policy = ["-n", SYSTEM, "get", "authorizationpolicy", name];
                    anyhow::ensure!(lab.kubectl(&policy).await.is_ok() == there);
                    Ok(())
                },
            )
            .await
        };
        deny(lab, true).await?;
        is_refused(
            &lab.call(CLIENT, &request(Protocol::Http1, "vault.bank", vault))
                .await?,
        )?;
        lab.forwarded_call(CLIENT, Protocol::Http1, "lobby.bank:80")
            .await?;

        // A policy that is new: refused at once.
        lab.namespace("safe").await?;
        lab.workload(("safe", "box"), &[80]).await?;
        let name = "box.safe.svc.cluster.local";
        lab.until_forgotten(CLIENT, name).await?;
        let to = lab.resolve("safe", "box", 80).await?;
        lab.apply(
            "{apiVersion: security.istio.io/v1, kind: AuthorizationPolicy, metadata: {name: box, namespace: istio-system}, \
             spec: {action: DENY, rules: [{from: [{source: {notNamespaces: [safe]}}], to: [{operation: {ports: ['80']}}]}], \
             selector: {matchLabels: {app: box}}}}",
        )
        .await?;
        tokio::time::sleep(Duration::from_millis(50)).await;
        is_refused(&lab.call(CLIENT, &forward("box.safe", to)).await?)?;
        anyhow::ensure!(forwarded_to(lab, "box.safe").await? == 0);

        // The operator goes: what is protected stays so, under every name it has, and the rest is forwarded.
        lab.running_mut(SYSTEM, OPERATOR)?.app()?.kill().await?;
        let before = forwarded_to(lab, "lobby.bank").await?;
        for name in [
            "vault.bank",
            "VAULT.Bank",
            "vault.bank.svc",
            "vault.bank.svc.cluster.local:80",
            "vault.bank.svc.cluster.local.",
            &vault.ip().to_string(),
        ] {
            let outcome = lab.call(CLIENT, &forward(name, vault)).await?;
            let outcome = (outcome.status != 403).then_some(outcome);
            // Once it is in scope the vault itself refuses.
            outcome.as_ref().map_or(Ok(()), is_refused)?;
        }
        let report = lab
            .call(CLIENT, &forward("lobby.bank", lobby))
            .await?
            .report()?;
        anyhow::ensure!(report.pod == "lobby", "{report:?}");
        anyhow::ensure!(forwarded_to(lab, "vault.bank").await? == 0);
        anyhow::ensure!(forwarded_to(lab, "lobby.bank").await? >= before);

        // And it follows while it is there.
        lab.running_mut(SYSTEM, OPERATOR)?.start_app()?;
        lab.operator_ready(OPERATOR).await?;
        lab.kubectl(&["-n", "bank", "delete", "authorizationpolicy", "vault"])
            .await?;
        deny(lab, false).await
    });
}

#[test]
fn an_attacker_gets_nothing_and_harms_nobody() {
    fenceline_e2e::test(async |lab| {
        bank(lab).await?;
        lab.workload(MALLORY, &[80]).await?;
        lab.workload(("shop", "till"), &[80]).await?;
        lab.fence(MALLORY, "{}").await?;
        lab.until_reason(MALLORY, "Enforced").await?;
        lab.until_forgotten(MALLORY, "till.shop.svc.cluster.local")
            .await?;
        let before = lab.scope(CLIENT).await?;
        let proxy = lab.resolve(SYSTEM, "global-proxy", 15088).await?;
        let proxy_pod = lab.running(SYSTEM, GLOBAL_PROXY)?.ip;
        let operator = lab.running(SYSTEM, OPERATOR)?.ip;
        let forged = [
            (
                "x-forwarded-client-cert",
                "By=x;URI=spiffe://cluster.local/ns/bank/sa/teller",
            ),
            ("x-envoy-original-url", "http://vault.bank/"),
            ("x-fenceline", "forward"),
            (
                "x-fenceline-peer",
                "spiffe://cluster.local/ns/bank/sa/teller",
            ),
            ("x-fenceline-vhost", "vault.bank.svc:0"),
            ("x-fenceline-answer", "replay"),
            ("x-envoy-original-dst-host", "10.244.1.1:80"),
        ];

        // It dials the global proxy itself, through its own sidecar, and says what it likes.
        for (port, host) in [
            (15088, "vault.bank"),
            (15080, "vault.bank"),
            (15088, "fenceline.fenceline-system:18100"),
            (15088, "global-proxy.fenceline-system:15088"),
            (15088, "kubernetes.default:443"),
        ] {
            for headers in [&forged[..], &forged[..2], &forged[2..6], &[]] {
                let mut call = request(Protocol::Http1, host, (proxy.ip(), port).into());
                call.headers = headers
                    .iter()
                    .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
                    .collect();
                let outcome = lab.call(MALLORY, &call).await?;
                let answered = outcome
                    .report()
                    .is_ok_and(|report| report.peer() == Some(GLOBAL_PROXY_URI));
                anyhow::ensure!(!answered, "{host} by {port}: {outcome:?}");
            }
        }
        // Past its sidecar's routes, as plain bytes to the pods: no certificate, no answer.
        for (ip, port) in [
            (proxy_pod, 15088),
            (proxy_pod, 15080),
            (proxy_pod, 15081),
            (operator, 18100),
        ] {
            let mut call = request(Protocol::Http1, "x", (ip, port).into());
            call.timeout = Duration::from_secs(2);
            call.shape = Shape::Raw(vec![
                "GET / HTTP/1.1\r\nhost: vault.bank\r\nconnection: close\r\n\r\n".into(),
            ]);
            let outcome = lab.call(MALLORY, &call).await?;
            anyhow::ensure!(outcome.report().is_err(), "{ip}:{port}: {outcome:?}");
        }
        anyhow::ensure!(
            forwarded_to(lab, "vault.bank").await? == 0,
            "it reached the vault"
        );

        // It opens 5,000 calls that are held; the client's own first calls go on as before.
        let memory = lab.operator_memory(OPERATOR)?;
        let to = lab.resolve("shop", "till", 80).await?;
        // A scope that never arrives, so that they stay held.
        if let Some(istiod) = lab.control_plane.istiod.as_mut() {
            istiod.signal(fenceline_e2e::Signal::STOP)?;
        }
        let lab = &*lab;
        let flood = (0..5000).map(|number| async move {
            let mut call = request(Protocol::Http2, "till.shop", to);
            call.path = format!("/{number}");
            // It may take its time on a machine that is busy otherwise.
            call.timeout = Duration::from_secs(60);
            lab.call(MALLORY, &call).await
        });
        let client = throughout(
            Duration::from_secs(3),
            "the client's calls work",
            async || {
                lab.forwarded_call(CLIENT, Protocol::Http1, "lobby.bank:80")
                    .await
                    .map(drop)
            },
        );
        let (flood, client) = tokio::join!(futures::future::join_all(flood), client);
        client?;
        let mut answers = std::collections::BTreeMap::new();
        for outcome in flood {
            *answers.entry(outcome?.status).or_insert(0) += 1;
        }
        let grown = lab.operator_memory(OPERATOR)?.saturating_sub(memory);
        println!("5,000 held: {answers:?}; {grown} KiB more in the operator");
        anyhow::ensure!(grown < 64 * 1024, "{grown} KiB");
        anyhow::ensure!(answers.get(&200) == Some(&5000), "{answers:?}");
        anyhow::ensure!(
            lab.scope(CLIENT).await?.len() <= before.len() + 1,
            "somebody else learnt"
        );
        anyhow::ensure!(lab.metric(OPERATOR, "fenceline_held_calls", "").await? < 0.5);
        Ok(())
    });
}

#[test]
fn a_mesh_that_allows_nothing_by_default() {
    fenceline_e2e::test(async |lab| {
        bank(lab).await?;
        lab.apply(
            "{apiVersion: security.istio.io/v1, kind: AuthorizationPolicy, metadata: {name: nothing, namespace: istio-system}, spec: {}}\n---\n\
             {apiVersion: security.istio.io/v1, kind: AuthorizationPolicy, metadata: {name: lobby, namespace: bank}, \
              spec: {selector: {matchLabels: {app: lobby}}, rules: [{to: [{operation: {ports: ['80']}}]}]}}",
        )
        .await?;
        let vault = lab.resolve("bank", "vault", 80).await?;
        let call = request(Protocol::Http1, "vault.bank", vault);
        eventually(PATIENCE, "nothing is allowed", async || {
            let outcome = lab.call(CLIENT, &call).await?;
            anyhow::ensure!(outcome.status == 403, "{outcome:?}");
            Ok(())
        })
        .await?;
        lab.forwarded_call(CLIENT, Protocol::Http1, "lobby.bank:80")
            .await
            .map(drop)
    });
}

#[test]
fn what_the_global_proxy_cannot_see_is_refused_and_not_lost() {
    fenceline_e2e::test(async |lab| {
        bank(lab).await?;
        lab.workload(("shop", "private"), &[80]).await?;
        let export = "networking.istio.io/exportTo=.";
        let annotate = ["-n", "shop", "annotate", "service", "private", export];
        lab.kubectl(&annotate).await?;
        tokio::time::sleep(Duration::from_secs(1)).await;
        let private = lab.resolve("shop", "private", 80).await?;
        let outcome = lab
            .call(CLIENT, &request(Protocol::Http1, "private", private))
            .await?;
        is_refused(&outcome)?;
        let reason = outcome.headers.get("x-fenceline-reason");
        anyhow::ensure!(
            reason.is_some_and(|reason| reason == "NotExported"),
            "{outcome:?}"
        );
        lab.until_direct(CLIENT, Protocol::Http1, "private:80")
            .await
            .map(drop)
    });
}
