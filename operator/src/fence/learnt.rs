//! What a fence has learnt, as its status has it, and what it becomes with what was seen since.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};

use fenceline_crds::{
    Evidence, LearntDependency, ServiceFence, ServiceFenceStatus, UnresolvedHost,
};
use jiff::{SignedDuration, Timestamp};

use super::retain::unused_for;

/// `lastSeen` is kept to the hour: it costs a write.
const FRESH: SignedDuration = SignedDuration::from_hours(1);
/// Where nothing is ever forgotten, to the day.
const RARELY: SignedDuration = SignedDuration::from_hours(24);
/// How many unresolved names a fence shows.
pub(super) const SHOWN: usize = 8;
/// Hosts that a fence can have learnt. Some 6,000 are what etcd takes of one object; a workload that calls more is a gateway or a
/// prober, and a scope of so many hosts saves it little.
pub(super) const LEARNT: usize = 2000;

/// When a host was called, and who says so.
#[derive(Clone, Debug)]
pub(super) struct Sighting {
    pub at: Timestamp,
    pub evidence: BTreeSet<Evidence>,
}

/// What there is to write for one fence.
#[derive(Clone, Debug, Default)]
pub(super) struct Pending {
    pub hosts: BTreeMap<String, Sighting>,
    /// The youngest last; bounded.
    pub unresolved: VecDeque<UnresolvedHost>,
}

/// What the fence's status has of a host. Its hosts are in order, since [`merge`] puts them so.
fn learnt<'a>(fence: &'a ServiceFence, fqdn: &str) -> Option<&'a LearntDependency> {
    let learnt = &fence.status.as_ref()?.dependencies;
    let found = learnt.binary_search_by(|learnt| learnt.host.as_str().cmp(fqdn));
    found.ok().and_then(|index| learnt.get(index))
}

/// What is said of a fence that has learnt as many hosts as it can.
pub(super) fn full(fence: &ServiceFence) -> Option<String> {
    let stored = fence.status.as_ref()?.dependencies.len();
    (stored >= LEARNT).then(|| {
        format!(
            "hosts beyond the {stored} that it has learnt, since {LEARNT} is the most: each call to another one is a first call; declare those that \
             matter in spec.dependencies, let unused ones go with spec.retention, or delete the fence of a workload that calls everything"
        )
    })
}

/// Whether the fence can learn a host, if so many wait to be written.
pub(super) fn has_room(fence: &ServiceFence, fqdn: &str, waiting: usize) -> bool {
    let stored = fence.status.as_ref();
    let stored = stored.map_or(0, |status| status.dependencies.len());
    stored.saturating_add(waiting) < LEARNT || learnt(fence, fqdn).is_some()
}

pub(super) fn is_known(
    fence: &ServiceFence,
    fqdn: &str,
    evidence: Evidence,
    now: Timestamp,
) -> bool {
    let fresh = freshness(fence, evidence);
    learnt(fence, fqdn).is_some_and(|learnt| {
        let lately = |last: Timestamp| now.duration_since(last) < fresh;
        learnt.evidence.contains(&evidence) && learnt.last_seen.is_some_and(lately)
    })
}

/// How old `lastSeen` may get before it is written again. What goes direct is seen all the time, and it matters to
/// `retention` alone.
fn freshness(fence: &ServiceFence, evidence: Evidence) -> SignedDuration {
    match unused_for(fence) {
        Some(unused_for) => (unused_for / 4).min(FRESH),
        None if evidence == Evidence::GlobalProxy => FRESH,
        None => RARELY,
    }
}

/// The fence's status with what was seen.
pub(super) fn merge(fence: &ServiceFence, pending: &Pending) -> ServiceFenceStatus {
    let mut status = fence.status.clone().unwrap_or_default();
    let places = status.dependencies.iter().enumerate();
    let places: HashMap<String, usize> = places
        .map(|(place, learnt)| (learnt.host.clone(), place))
        .collect();
    for (host, seen) in &pending.hosts {
        let fresh = seen.evidence.iter().map(|kind| freshness(fence, *kind));
        let fresh = fresh.min().unwrap_or(FRESH);
        let is_full = status.dependencies.len() >= LEARNT;
        let place = places.get(host);
        match place.and_then(|place| status.dependencies.get_mut(*place)) {
            Some(learnt) => {
                let lately = |last: Timestamp| seen.at.duration_since(last) < fresh;
                if !learnt.last_seen.is_some_and(lately) {
                    learnt.last_seen = Some(seen.at);
                }
                for evidence in &seen.evidence {
                    if !learnt.evidence.contains(evidence) {
                        learnt.evidence.push(*evidence);
                    }
                }
            }
            // Other replicas learn too.
            None if is_full => {}
            None => status.dependencies.push(LearntDependency {
                host: host.clone(),
                evidence: seen.evidence.iter().copied().collect(),
                first_seen: seen.at,
                last_seen: Some(seen.at),
            }),
        }
    }
    status.dependencies.sort_by(|a, b| a.host.cmp(&b.host));
    // Names that are shown already stay where they are: to be called again is no news.
    let shown: BTreeSet<String> = status
        .unresolved
        .iter()
        .map(|entry| entry.host.clone())
        .collect();
    let new = pending
        .unresolved
        .iter()
        .filter(|entry| !shown.contains(&entry.host));
    status.unresolved.extend(new.cloned());
    let excess = status.unresolved.len().saturating_sub(SHOWN);
    status.unresolved.drain(..excess);
    status
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::fence;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    fn seen(hosts: &[&str], second: i64) -> Pending {
        let hosts = hosts
            .iter()
            .map(|host| {
                let sighting = Sighting {
                    at: at(second),
                    evidence: [Evidence::GlobalProxy].into(),
                };
                ((*host).to_owned(), sighting)
            })
            .collect();
        Pending {
            hosts,
            ..Pending::default()
        }
    }

    #[test]
    fn learning_adds_and_never_takes_away() {
        let mut cart = fence("shop", "cart", "{}");
        cart.status = Some(merge(&cart, &seen(&["b", "a"], 0)));
        cart.status = Some(merge(&cart, &seen(&["c"], 10)));
        let status = cart.status.clone().unwrap();
        let hosts: Vec<&str> = status
            .dependencies
            .iter()
            .map(|d| d.host.as_str())
            .collect();
        assert_eq!(hosts, ["a", "b", "c"]);
        // Seen again within the hour: nothing to write.
        assert_eq!(merge(&cart, &seen(&["a"], 3599)), status);
        assert!(is_known(&cart, "a", Evidence::GlobalProxy, at(3599)));
        let later = merge(&cart, &seen(&["a"], 3600));
        assert_eq!(later.dependencies[0].last_seen, Some(at(3600)));
        assert_eq!(later.dependencies[0].first_seen, at(0));
    }

    #[test]
    fn a_fence_learns_so_many_hosts_and_goes_on_with_those() {
        let names: Vec<String> = (0..LEARNT).map(|n| format!("host-{n:05}")).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let mut cart = fence("shop", "cart", "{}");
        assert!(has_room(&cart, "another", LEARNT - 1));
        assert!(!has_room(&cart, "another", LEARNT));
        cart.status = Some(merge(&cart, &seen(&names, 0)));
        assert!(!has_room(&cart, "another", 0));
        let said = full(&cart).unwrap();
        assert!(said.contains("2000 is the most"), "{said}");
        assert!(has_room(&cart, "host-00042", 0), "it is known");
        assert!(is_known(&cart, "host-01999", Evidence::GlobalProxy, at(1)));
        // What another replica has learnt meanwhile is not added to.
        let full = merge(&cart, &seen(&["another", "host-00042"], 7200));
        assert_eq!(full.dependencies.len(), LEARNT);
        assert_eq!(full.dependencies[42].last_seen, Some(at(7200)));
    }

    #[test]
    fn unresolved_names_are_few_and_the_youngest() {
        let mut cart = fence("shop", "cart", "{}");
        for number in 0..100 {
            let entry = UnresolvedHost {
                host: format!("junk-{number}"),
                reason: "x".into(),
            };
            let pending = Pending {
                unresolved: [entry].into(),
                ..Pending::default()
            };
            cart.status = Some(merge(&cart, &pending));
        }
        let unresolved = cart.status.unwrap().unresolved;
        assert_eq!(unresolved.len(), SHOWN);
        assert_eq!(unresolved[SHOWN - 1].host, "junk-99");
    }
}
