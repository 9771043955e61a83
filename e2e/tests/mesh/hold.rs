//! First calls that keep the caller's identity.

use fenceline_e2e::app::Protocol;

const CLIENT: (&str, &str) = ("shop", "client");

#[test]
fn a_held_call_keeps_its_identity() {
    fenceline_e2e::test(async |lab| {
        lab.install().await?;
        lab.namespace("shop").await?;
        lab.workload(CLIENT, &[80]).await?;
        lab.workload(("shop", "reviews"), &[9080]).await?;
        lab.workload(("shop", "ratings"), &[9080]).await?;
        lab.fence(CLIENT, "{}").await?;
        lab.until_reason(CLIENT, "Enforced").await?;
        lab.until_forgotten(CLIENT, "reviews.shop.svc.cluster.local")
            .await?;
        lab.held_call(CLIENT, Protocol::Http1, "reviews:9080")
            .await?;
        lab.held_call(CLIENT, Protocol::Http2, "ratings.shop:9080")
            .await?;
        Ok(())
    });
}
