//! Who is believed: only the global proxy, and only of callers that are what their certificate says.

use fenceline_e2e::install::{OPERATOR, SYSTEM};
use fenceline_e2e::reporter::Entry;
use fenceline_e2e::{App, Lab, PATIENCE, PodSpec, wait::eventually};

const CLIENT: (&str, &str) = ("shop", "client");
const CLIENT_URI: &str = "spiffe://cluster.local/ns/shop/sa/client";
const REVIEWS: &str = "shop/reviews.shop.svc.cluster.local";

fn entry(peer: &str, address: &str) -> Entry {
    Entry {
        peer: vec![peer.to_owned()],
        address: Some(address.to_owned()),
        authority: Some("reviews:9080".to_owned()),
    }
}

async fn until(lab: &Lab, outcome: &str, want: f64) -> anyhow::Result<()> {
    eventually(
        PATIENCE,
        &format!("{want} entries are {outcome}"),
        async || {
            let label = format!("outcome=\"{outcome}\"");
            let is = lab
                .metric(OPERATOR, "fenceline_observations_total", &label)
                .await?;
            anyhow::ensure!((is - want).abs() < 0.5, "{is}");
            Ok(())
        },
    )
    .await
}

#[test]
fn nobody_else_can_report_and_nobody_can_be_slandered() {
    fenceline_e2e::test(async |lab| {
        lab.install().await?;
        lab.namespace("shop").await?;
        lab.workload(CLIENT, &[80]).await?;
        lab.service("shop", "reviews", &["http:9080"]).await?;
        lab.pod(PodSpec::new("shop", "mallory")).await?;
        // A pod that really is the global proxy, as far as its certificate says.
        let mut twin = PodSpec::new(SYSTEM, "twin").service_account("global-proxy");
        twin.app = App::Echo;
        lab.pod(twin).await?;
        lab.fence(CLIENT, "{}").await?;
        lab.until_reason(CLIENT, "Enforced").await?;
        let before = lab.scope(CLIENT).await?;
        let client = lab.running("shop", "client")?.ip.to_string();
        let mallory = lab.running("shop", "mallory")?.ip.to_string();
        let service = lab.resolve(SYSTEM, "fenceline", 18100).await?;
        let pod = (lab.running(SYSTEM, OPERATOR)?.ip, 18100).into();
        let good = entry(CLIENT_URI, &client);
        let forged = "By=x;URI=spiffe://cluster.local/ns/fenceline-system/sa/global-proxy";

        for (from, to) in [(("shop", "mallory"), service), (("shop", "mallory"), pod)] {
            for claim in [None, Some(forged)] {
                let refused = lab
                    .report(from, to, claim, std::slice::from_ref(&good))
                    .await?;
                anyhow::ensure!(
                    refused.is_err(),
                    "mallory was heard at {to}, claiming {claim:?}"
                );
            }
        }
        // Past the sidecar, from within the operator's own pod, without its sidecar to vouch for it.
        let loopback = ([127, 0, 0, 1], 18100).into();
        for claim in [None, Some(forged)] {
            let entries = std::slice::from_ref(&good);
            let refused = lab
                .report((SYSTEM, OPERATOR), loopback, claim, entries)
                .await?;
            let refused = refused.err().unwrap_or_default();
            anyhow::ensure!(refused.contains("only spiffe://"), "{claim:?}: {refused}");
        }
        // What a client sends itself does not get as far as that.
        let listeners = lab
            .running(SYSTEM, OPERATOR)?
            .envoy("/config_dump?resource=dynamic_listeners")
            .await?;
        let sanitizes = listeners.contains("SANITIZE_SET");
        anyhow::ensure!(sanitizes && !listeners.contains("APPEND_FORWARD"));

        // The right identity, but what it says cannot be.
        let twin = (SYSTEM, "twin");
        let entries = [
            entry(CLIENT_URI, &mallory),
            entry("spiffe://cluster.local/ns/shop/sa/mallory", &client),
            entry("spiffe://other.mesh/ns/shop/sa/client", &client),
            entry(CLIENT_URI, "10.1.2.3"),
            entry(CLIENT_URI, "not an address"),
            Entry {
                peer: vec![],
                ..good.clone()
            },
            Entry {
                peer: vec![CLIENT_URI.into(), forged.into()],
                ..good.clone()
            },
            Entry {
                address: None,
                ..good.clone()
            },
            Entry {
                authority: None,
                ..good.clone()
            },
            Entry::default(),
        ];
        let heard = lab.report(twin, service, None, &entries).await?;
        anyhow::ensure!(heard.is_ok(), "{heard:?}");
        until(lab, "not_believed", 2.0).await?;
        until(lab, "foreign_trust_domain", 1.0).await?;
        until(lab, "unknown_pod", 1.0).await?;
        until(lab, "incomplete", 6.0).await?;
        anyhow::ensure!(lab.scope(CLIENT).await? == before, "somebody was believed");

        // The same road with the truth: so the refusals above are no accident.
        let heard = lab.report(twin, service, None, &[good]).await?;
        anyhow::ensure!(heard.is_ok(), "{heard:?}");
        lab.until_in_scope(CLIENT, REVIEWS).await
    });
}
