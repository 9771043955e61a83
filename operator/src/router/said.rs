//! What statuses say that the plan needs, and what else keeps it from being carried out.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use fenceline_crds::{Branch, BranchStatus, Router};
use jiff::{SignedDuration, Timestamp};
use kube::ResourceExt;

use super::gather::Gathered;
use super::order;
use super::plan::subset_name;
use crate::world::{Key, World, in_namespace};

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

/// What somebody else wrote for the same host.
pub(super) fn conflicts(service: &Key, fqdn: &str, world: &World, root: &str) -> Vec<String> {
    let routes = world.routes_of(fqdn);
    let own = Key::new(&*service.namespace, super::write::name(service));
    let foreign = routes.filter(|key| **key != own);
    let mut conflicts: Vec<String> = foreign
        .map(|key| match key.name.split_once('/') {
            Some((kind, name)) => format!(
                "{}Route {}/{name}",
                kind.to_ascii_uppercase(),
                key.namespace
            ),
            None => format!("VirtualService {key}"),
        })
        .collect();
    let rules = world.rules.iter();
    let theirs = rules.filter(|(key, _)| !world.own_rules.contains_key(*key));
    conflicts.extend(theirs.filter_map(|(key, host)| {
        if key.namespace == service.namespace {
            // Of two in one namespace the more exact host wins, and ours has no wildcard.
            return (**host == *fqdn).then(|| format!("DestinationRule {key}"));
        }
        // The root namespace's come after the service's own.
        let hides = **host == *fqdn || (key.namespace != root && covers(host, fqdn));
        hides.then(|| format!("DestinationRule {key}, which hides ours from callers there"))
    }));
    conflicts
}

/// Whether a DestinationRule's host, which may begin with a wildcard, is or covers a name.
fn covers(host: &str, fqdn: &str) -> bool {
    match host.strip_prefix('*') {
        Some(end) => fqdn.ends_with(end),
        None => host == fqdn,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use fenceline_crds::RouterStatus;
    use fenceline_crds::istio::DestinationRule;

    use super::*;
    use crate::router::gather::gather;
    use crate::testing::{world, yaml};

    const ROOT: &str = "istio-system";

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
            is_in_force(&gather(&service, &mesh, ROOT))
        };
        let mark = gather(&service, &before, ROOT).objects.mark();
        assert!(trusted(&before, Some(&mark)));
        assert!(
            !trusted(&after, Some(&mark)),
            "it was written and has not arrived"
        );
        assert!(!trusted(&before, None));
    }

    #[test]
    fn whose_destination_rules_are_in_the_way() {
        let all = |rules: &[(&str, &str)]| {
            let mut mesh = world();
            for (namespace, host) in rules {
                let key = Key::new(*namespace, "theirs");
                mesh.rules.insert(key, Arc::new((*host).to_owned()));
            }
            conflicts(&reviews(), "reviews.shop.svc.cluster.local", &mesh, ROOT)
        };
        let none: [&str; 0] = [];
        assert_eq!(
            all(&[("shop", "reviews.shop.svc.cluster.local")]),
            ["DestinationRule shop/theirs"]
        );
        assert_eq!(all(&[("shop", "*.shop.svc.cluster.local")]), none);
        assert_eq!(all(&[(ROOT, "*.local")]), none, "ours comes first");
        assert_eq!(all(&[("bank", "ratings.shop.svc.cluster.local")]), none);
        for host in [
            "reviews.shop.svc.cluster.local",
            "*.shop.svc.cluster.local",
            "*.local",
            "*",
        ] {
            let hidden = all(&[("bank", host)]);
            assert_eq!(
                hidden,
                ["DestinationRule bank/theirs, which hides ours from callers there"]
            );
        }
    }
}
