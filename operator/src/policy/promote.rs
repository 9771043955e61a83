//! From `Observe` to `Enforce`: once a fence is old enough and nothing new was learnt for a while, by a source that would
//! have seen it.

use std::collections::BTreeMap;
use std::time::Duration;

use fenceline_crds::{Mode, Promote, ServiceFence, period};
use jiff::{SignedDuration, Timestamp};
use kube::ResourceExt;

use super::Context;
use super::plan::{POLICY, PROMOTED, Wanted, made_by_policy};
use crate::observe::prometheus::Health;
use crate::world::World;

/// Promotes what is due; says whether all of it went well.
pub(super) async fn round(wanted: &Wanted, world: &World, context: &Context) -> bool {
    let Some(prometheus) = &context.prometheus else {
        return true;
    };
    if *prometheus.health().borrow() != Health::Healthy {
        return true;
    }
    let now = (context.clock)();
    let mut well = true;
    let mut seen = BTreeMap::new();
    for key in &wanted.promotable {
        let Some(fence) = world.fences.get(key).filter(|fence| made_by_policy(fence)) else {
            continue;
        };
        let policy = fence.labels().get(POLICY);
        let policy = policy.and_then(|name| world.fence_policies.get(name));
        let promote = policy.and_then(|policy| policy.spec.promote.as_ref());
        // Who did not see it call anything cannot say that it calls nothing new.
        let Some(promote) = promote.filter(|promote| is_due(fence, promote, now)) else {
            continue;
        };
        if !prometheus.sees(world, key) {
            continue;
        }
        // It may have been away, and what was called meanwhile is not learnt yet.
        let quiet_for = period(&promote.quiet_for).unwrap_or(Duration::MAX);
        let of = (key.namespace.clone(), quiet_for);
        if !seen.contains_key(&of) {
            match prometheus.seen(world, &key.namespace, quiet_for).await {
                Ok(edges) => drop(seen.insert(of.clone(), edges)),
                Err(error) => {
                    let error = crate::chain(&error);
                    tracing::warn!(fence = %key, error, "a promotion waits");
                    return false;
                }
            }
        }
        let calls = seen.get(&of).into_iter().flatten();
        if calls
            .clone()
            .any(|(caller, host)| caller == key && !knows(fence, host))
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

fn knows(fence: &ServiceFence, host: &str) -> bool {
    let mut learnt = fence.status.iter().flat_map(|status| &status.dependencies);
    learnt.any(|known| known.host == host)
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
