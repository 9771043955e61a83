//! From `Observe` to `Enforce`: once a fence is old enough and nothing new was learnt for a while, by a source that would
//! have seen it.

use std::time::Duration;

use fenceline_crds::{Mode, Promote, ServiceFence, period};
use jiff::{SignedDuration, Timestamp};
use kube::ResourceExt;

use super::Context;
use super::plan::{POLICY, PROMOTED, made_by_policy};
use crate::observe::prometheus::Health;
use crate::world::World;

/// Promotes what is due; says whether all of it went well.
pub(super) async fn round(world: &World, context: &Context) -> bool {
    let Some(prometheus) = &context.prometheus else {
        return true;
    };
    if *prometheus.health().borrow() != Health::Healthy {
        return true;
    }
    let now = (context.clock)();
    let mut well = true;
    for (key, fence) in world
        .fences
        .iter()
        .filter(|(_, fence)| made_by_policy(fence))
    {
        let policy = fence.labels().get(POLICY);
        let policy = policy.and_then(|name| world.fence_policies.get(name));
        let promote = policy.and_then(|policy| policy.spec.promote.as_ref());
        // Who did not see it call anything cannot say that it calls nothing new.
        if !promote.is_some_and(|promote| is_due(fence, promote, now))
            || !prometheus.sees(world, key)
        {
            continue;
        }
        let written = context
            .writer
            .annotate(fence.as_ref(), PROMOTED, &now.to_string())
            .await;
        if let Err(error) = written {
            let error = crate::chain(&error);
            tracing::warn!(fence = %key, error, "a promotion");
            well = false;
        }
    }
    well
}

/// Whether a fence has observed for long enough.
fn is_due(fence: &ServiceFence, promote: &Promote, now: Timestamp) -> bool {
    let time = |text: &str| {
        let time = period(text).unwrap_or(Duration::MAX);
        SignedDuration::try_from(time).unwrap_or(SignedDuration::MAX)
    };
    let Some(created) = fence.creation_timestamp() else {
        return false;
    };
    let learnt = fence.status.iter().flat_map(|status| &status.dependencies);
    let last = learnt.map(|known| known.first_seen).max();
    let quiet_since = last.map_or(created.0, |last| last.max(created.0));
    fence.spec.mode == Mode::Observe
        && !fence.annotations().contains_key(PROMOTED)
        && now.duration_since(created.0) >= time(&promote.after)
        && now.duration_since(quiet_since) >= time(&promote.quiet_for)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::fence;
    use fenceline_crds::{Evidence, LearntDependency, ServiceFenceStatus};
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

    #[test]
    fn old_and_quiet() {
        let at = |second: i64| Timestamp::from_second(second).unwrap();
        let promote = Promote {
            after: "1h".to_owned(),
            quiet_for: "30m".to_owned(),
        };
        let mut cart = fence("shop", "cart", "{mode: Observe}");
        cart.metadata.creation_timestamp = Some(Time(at(0)));
        assert!(!is_due(&cart, &promote, at(3_599)));
        assert!(is_due(&cart, &promote, at(3_600)));
        cart.status = Some(ServiceFenceStatus {
            dependencies: vec![LearntDependency {
                host: "a".to_owned(),
                evidence: vec![Evidence::Prometheus],
                first_seen: at(3_000),
                last_seen: None,
            }],
            ..ServiceFenceStatus::default()
        });
        assert!(!is_due(&cart, &promote, at(3_600)), "not quiet");
        assert!(is_due(&cart, &promote, at(4_800)));
        cart.spec.mode = Mode::Enforce;
        assert!(!is_due(&cart, &promote, at(4_800)));
    }
}
