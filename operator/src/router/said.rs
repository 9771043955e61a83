//! What statuses say that the plan needs, and what else keeps it from being carried out.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use fenceline_crds::{Branch, BranchStatus, Router};
use jiff::{SignedDuration, Timestamp};
use kube::ResourceExt;

use super::gather::Gathered;
use super::order;
use super::plan::subset_name;
use crate::world::{World, in_namespace};

/// Whether status says that every proxy had what is stored.
pub(super) fn is_in_force(gathered: &Gathered<'_>) -> bool {
    let known = match (&gathered.router, gathered.patches.iter().next()) {
        (Some(router), _) => router.status.as_ref().and_then(|it| it.in_force.as_ref()),
        (None, Some(patch)) => patch.status.as_ref().and_then(|it| it.in_force.as_ref()),
        (None, None) => None,
    };
    known.is_some_and(|known| *known == gathered.objects.mark())
}

/// When a Router first had a branch.
pub(super) fn since(router: &Router, branch: &str, now: Timestamp) -> Timestamp {
    let known = router.status.iter().flat_map(|status| &status.branches);
    let mut known = known.filter(|known| known.name == branch);
    known
        .find_map(|known| known.since.clone())
        .map_or(now, |time| time.0)
}

/// How long until a branch's time is over.
fn left(since: Timestamp, ttl: Duration, now: Timestamp) -> SignedDuration {
    let ttl = SignedDuration::try_from(ttl).unwrap_or(SignedDuration::MAX);
    since
        .saturating_add(ttl)
        .map_or(SignedDuration::MAX, |end| end.duration_since(now))
}

/// Whether status says that every proxy had what leads to a branch, of the versions that it has now.
pub(super) fn was_prepared(gathered: &Gathered<'_>, branch: &str) -> bool {
    let Some(router) = &gathered.router else {
        return false;
    };
    let mut branches = router.spec.branches.iter();
    let now = branches.find(|known| known.name == branch);
    let known = router.status.iter().flat_map(|status| &status.branches);
    let mut known = known.filter(|known| known.name == branch && known.prepared);
    let same = |known: &BranchStatus, now: &Branch| known.endpoints.keys().eq(now.versions.keys());
    now.is_some_and(|now| known.any(|known| same(known, now)))
}

/// When the next branch's time is over.
pub(super) fn next_end(gathered: &Gathered<'_>, now: Timestamp) -> Option<SignedDuration> {
    let router = gathered.router.as_ref()?;
    let ends = router.spec.branches.iter().filter_map(|branch| {
        let left = left(since(router, &branch.name, now), branch.ttl()?, now);
        left.is_positive().then_some(left)
    });
    ends.min()
}

/// The branches that may not be reached, each with why: their time is over, or another Router of the same branch does not have
/// it in its proxies yet. What is reached already stays so.
pub(super) fn shut(
    gathered: &Gathered<'_>,
    world: &World,
    now: Timestamp,
) -> BTreeMap<String, String> {
    let Some(router) = &gathered.router else {
        return BTreeMap::new();
    };
    let routed = gathered
        .objects
        .routes
        .as_ref()
        .map(|routes| order::used(&routes.spec));
    let routed = routed.unwrap_or_default();
    let mut shut = BTreeMap::new();
    for branch in router.spec.branches.iter().skip(1) {
        if let Some(ttl) = branch.ttl()
            && !left(since(router, &branch.name, now), ttl, now).is_positive()
        {
            let why = format!(
                "its ttl of {} is over",
                branch.ttl.clone().unwrap_or_default()
            );
            shut.insert(branch.name.clone(), why);
            continue;
        }
        let mut versions = branch.versions.keys();
        if versions.any(|version| routed.contains(&subset_name(&branch.name, version))) {
            continue;
        }
        let others =
            in_namespace(&world.routers, &gathered.service.namespace).map(|(_, other)| other);
        let missing: BTreeSet<String> = others
            .filter(|other| {
                other.spec.service != router.spec.service
                    && other.metadata.deletion_timestamp.is_none()
            })
            .filter(|other| lacks(other, &branch.name))
            .map(|other| other.name_any())
            .collect();
        if !missing.is_empty() {
            let missing: Vec<String> = missing.into_iter().collect();
            let why = format!(
                "Routers {} have this branch too, and are not ready for it",
                missing.join(", ")
            );
            shut.insert(branch.name.clone(), why);
        }
    }
    shut
}

/// Whether a Router has a branch beside its base for which it is not prepared.
fn lacks(router: &Router, branch: &str) -> bool {
    let mut beside_base = router.spec.branches.iter().skip(1);
    let known = router.status.iter().flat_map(|status| &status.branches);
    let mut known = known.filter(|known| known.name == branch);
    beside_base.any(|has: &Branch| has.name == branch) && !known.any(|known| known.prepared)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use fenceline_crds::RouterStatus;
    use fenceline_crds::istio::DestinationRule;

    use super::*;
    use crate::router::gather::{Namespaces, gather};
    use crate::testing::{world, yaml};
    use crate::world::Key;

    const NAMESPACES: Namespaces<'_> = Namespaces {
        root: "istio-system",
        view: "fenceline-system",
    };

    fn reviews() -> Key {
        Key::new("shop", "reviews")
    }

    /// What is stored is believed to be everywhere only where status says so of just this.
    #[test]
    fn a_leader_trusts_what_was_said_of_what_is_stored() {
        let mut mesh = world();
        let spec = "{service: reviews, branches: [{name: main, versions: {v1: 1}}]}";
        let mut router = Router::new("reviews", yaml(spec));
        router.metadata.namespace = Some("shop".to_owned());
        let mut stored = |spec: &str| {
            let rule = DestinationRule::new("fenceline-reviews", yaml(spec));
            let key = Key::new("shop", "fenceline-reviews");
            mesh.own_rules.insert(key, Arc::new(rule));
            mesh.clone()
        };
        let service = reviews();
        let before = stored("{host: reviews, subsets: [{name: a}]}");
        let after = stored("{host: reviews, subsets: [{name: a}, {name: b}]}");
        let trusted = |mesh: &World, in_force: Option<&str>| {
            let mut mesh = mesh.clone();
            let mut router = router.clone();
            router.status = in_force.map(|mark| RouterStatus {
                in_force: Some(mark.to_owned()),
                ..RouterStatus::default()
            });
            mesh.routers.insert(reviews(), Arc::new(router));
            is_in_force(&gather(&service, &mesh, NAMESPACES))
        };
        let mark = gather(&service, &before, NAMESPACES).objects.mark();
        assert!(trusted(&before, Some(&mark)));
        assert!(
            !trusted(&after, Some(&mark)),
            "it was written and has not arrived"
        );
        assert!(!trusted(&before, None));
    }
}
