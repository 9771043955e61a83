//! Changing a scope without failing a call.
//!
//! istiod sends routes right behind the clusters they lead to, while a new cluster still waits for its endpoints; and it
//! takes clusters away before the routes that lead to them (istio#39837). A call in between finds a route without a cluster,
//! and fails. So a scope changes in two steps, with clusters outlasting routes at both ends: a host that comes gets its
//! clusters first and its routes once every proxy has those; a host that goes loses its routes first.
//!
//! What brings clusters without routes is an egress listener of protocol `HTTP_PROXY` that nobody calls: of its hosts a
//! proxy gets every cluster, whatever their ports (pilot/pkg/model/sidecar.go, `needsPortMatch`), and routes on that
//! listener alone. The state of a change is in the Sidecar itself, so that any leader goes on with it.

use std::collections::BTreeSet;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};

use fenceline_crds::istio::{EgressListener, Sidecar, SidecarSpec};
use serde_json::json;

/// Every host of the mesh: the scope of a workload without a fence.
pub const EVERYTHING: &str = "*/*";

/// The port of the listener that nobody calls: of Istio's reserved range (15000 to 15099), since the routes of a port that
/// a Service has would be taken from here.
const PORT: u16 = 15079;

/// The hosts that have routes.
pub fn routed(spec: &SidecarSpec) -> BTreeSet<String> {
    hosts(spec, false)
}

/// The hosts that have clusters alone, on their way in or out.
pub fn staged(spec: &SidecarSpec) -> BTreeSet<String> {
    hosts(spec, true)
}

fn hosts(spec: &SidecarSpec, staged: bool) -> BTreeSet<String> {
    spec.egress
        .iter()
        .filter(|listener| listener.other.contains_key("port") == staged)
        .flat_map(|listener| listener.hosts.iter().cloned())
        .collect()
}

/// The next step from the Sidecar that is `stored` to `target`. `arrived` says of which staged hosts every proxy has heard.
pub fn next(mut target: Sidecar, stored: Option<&Sidecar>, arrived: &BTreeSet<String>) -> Sidecar {
    let wanted = routed(&target.spec);
    let (was_routed, was_staged) = match stored {
        Some(stored) => (routed(&stored.spec), staged(&stored.spec)),
        None => (BTreeSet::new(), BTreeSet::new()),
    };
    let kept: BTreeSet<String> = was_routed.intersection(&wanted).cloned().collect();
    let everything = BTreeSet::from([EVERYTHING.to_owned()]);
    let all_clusters = || was_staged.contains(EVERYTHING) && arrived.contains(EVERYTHING);
    let (routed, staged) = if wanted == everything && kept.is_empty() && !was_routed.is_empty() {
        // From few hosts to all: every cluster there is, and then the routes.
        if all_clusters() {
            (wanted, BTreeSet::new())
        } else {
            (was_routed, everything)
        }
    } else if wanted == everything {
        (wanted, BTreeSet::new())
    } else if kept.is_empty() {
        // A fence begins: what has clusters, which is everything, keeps them until no route leads there any more.
        let staged = if arrived.contains(EVERYTHING) {
            BTreeSet::new()
        } else {
            everything
        };
        (wanted, staged)
    } else {
        let has_clusters = |host: &String| was_staged.contains(host) && arrived.contains(host);
        let routed: BTreeSet<String> = wanted
            .iter()
            .filter(|host| kept.contains(*host) || has_clusters(host))
            .cloned()
            .collect();
        let coming = wanted.difference(&routed).cloned();
        let going = was_routed.difference(&wanted).cloned();
        let on_the_way = was_staged.difference(arrived).cloned();
        let staged = coming.chain(going).chain(on_the_way);
        let staged = staged.filter(|host| !routed.contains(host)).collect();
        (routed, staged)
    };
    set(&mut target.spec, routed, staged, stored);
    target
}

/// Whether proxies that take in a step are seen to do so.
pub fn changes_a_listener(stored: Option<&Sidecar>, step: &Sidecar) -> bool {
    stored.and_then(bound) != bound(step)
}

/// The address of the listener that nobody calls.
fn bound(sidecar: &Sidecar) -> Option<&str> {
    let mut listeners = sidecar.spec.egress.iter();
    listeners.find_map(|listener| listener.other.get("bind")?.as_str())
}

/// The next step before a Sidecar is taken away, and none when it may go: every cluster there is, beside the routes it
/// has; and where its pods will have the scope of their namespace (`ground`), the routes of that.
pub fn farewell(
    stored: &Sidecar,
    ground: Option<&Sidecar>,
    arrived: &BTreeSet<String>,
) -> Option<Sidecar> {
    let mut step = stored.clone();
    let has = routed(&stored.spec);
    let then = ground.map_or_else(
        || BTreeSet::from([EVERYTHING.to_owned()]),
        |ground| routed(&ground.spec),
    );
    if has == then {
        return None;
    }
    let everything = BTreeSet::from([EVERYTHING.to_owned()]);
    if !arrived.contains(EVERYTHING) {
        if !staged(&stored.spec).contains(EVERYTHING) {
            set(&mut step.spec, has, everything, Some(stored));
        }
        return Some(step);
    }
    ground?;
    set(&mut step.spec, then, everything, Some(stored));
    Some(step)
}

fn set(
    spec: &mut SidecarSpec,
    routed: BTreeSet<String>,
    staged: BTreeSet<String>,
    stored: Option<&Sidecar>,
) {
    let listener = |hosts: BTreeSet<String>| EgressListener {
        hosts: hosts.into_iter().collect(),
        ..EgressListener::default()
    };
    spec.egress.clear();
    if !staged.is_empty() {
        let bind = bind(&routed, &staged, stored);
        let mut waiting = listener(staged);
        waiting.other = [
            (
                "port".to_owned(),
                json!({"number": PORT, "protocol": "HTTP_PROXY", "name": "fenceline-staging"}),
            ),
            ("bind".to_owned(), json!(bind)),
        ]
        .into();
        spec.egress.push(waiting);
    }
    // Istio wants the one for every other port last.
    spec.egress.push(listener(routed));
}

/// A loopback address of each step's own, so that a proxy which takes in several steps at once is seen to have the last.
fn bind(
    routed_now: &BTreeSet<String>,
    staged_now: &BTreeSet<String>,
    stored: Option<&Sidecar>,
) -> String {
    let last = stored.and_then(bound);
    let same = stored.is_some_and(|stored| {
        routed(&stored.spec) == *routed_now && staged(&stored.spec) == *staged_now
    });
    if let Some(last) = last.filter(|_| same) {
        return last.to_owned();
    }
    let mut hasher = DefaultHasher::new();
    (last, routed_now, staged_now).hash(&mut hasher);
    let [a, b, c, ..] = hasher.finish().to_be_bytes();
    // Not 127.0.0.1, on which others listen.
    format!("127.{a}.{b}.{}", c.max(2))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sidecar(hosts: &[&str]) -> Sidecar {
        let hosts = hosts.iter().map(|host| (*host).to_owned()).collect();
        let egress = vec![EgressListener {
            hosts,
            ..EgressListener::default()
        }];
        Sidecar::new(
            "cart",
            SidecarSpec {
                egress,
                ..SidecarSpec::default()
            },
        )
    }

    fn set_of(hosts: &[&str]) -> BTreeSet<String> {
        hosts.iter().map(|host| (*host).to_owned()).collect()
    }

    /// `routed | staged`
    fn shown(sidecar: &Sidecar) -> String {
        let join = |hosts: BTreeSet<String>| hosts.into_iter().collect::<Vec<_>>().join(" ");
        format!(
            "{} | {}",
            join(routed(&sidecar.spec)),
            join(staged(&sidecar.spec))
        )
    }

    #[test]
    fn a_host_that_comes_gets_its_clusters_first() {
        let nothing = BTreeSet::new();
        let stored = sidecar(&["p", "a"]);
        let first = next(sidecar(&["p", "a", "b"]), Some(&stored), &nothing);
        assert_eq!(shown(&first), "a p | b");
        let again = next(sidecar(&["p", "a", "b"]), Some(&first), &nothing);
        assert_eq!(again, first, "nothing to write while it is on its way");
        // Another one is learnt meanwhile: its step is seen by another listener.
        let second = next(sidecar(&["p", "a", "b", "c"]), Some(&first), &nothing);
        assert_eq!(shown(&second), "a p | b c");
        assert_ne!(second.spec.egress[0].other, first.spec.egress[0].other);
        let third = next(
            sidecar(&["p", "a", "b", "c"]),
            Some(&second),
            &set_of(&["b"]),
        );
        assert_eq!(shown(&third), "a b p | c");
        let last = next(
            sidecar(&["p", "a", "b", "c"]),
            Some(&third),
            &set_of(&["c"]),
        );
        assert_eq!(last, sidecar(&["a", "b", "c", "p"]));
    }

    #[test]
    fn a_host_that_goes_loses_its_routes_first() {
        let nothing = BTreeSet::new();
        let first = next(sidecar(&["p"]), Some(&sidecar(&["p", "a"])), &nothing);
        assert_eq!(shown(&first), "p | a");
        assert_eq!(next(sidecar(&["p"]), Some(&first), &nothing), first);
        let gone = next(sidecar(&["p"]), Some(&first), &set_of(&["a"]));
        assert_eq!(gone, sidecar(&["p"]));
        // Wanted again while it goes: its clusters may still be there or not, so it waits its turn.
        let back = next(sidecar(&["p", "a"]), Some(&first), &nothing);
        assert_eq!(shown(&back), "p | a");
    }

    #[test]
    fn a_fence_begins_and_ends_with_every_cluster_there_is() {
        let begun = next(sidecar(&["p", "a"]), None, &BTreeSet::new());
        assert_eq!(shown(&begun), "a p | */*");
        // Learnt while it begins.
        let more = next(sidecar(&["p", "a", "b"]), Some(&begun), &BTreeSet::new());
        assert_eq!(shown(&more), "a p | */* b");
        let settled = next(sidecar(&["p", "a"]), Some(&begun), &set_of(&[EVERYTHING]));
        assert_eq!(settled, sidecar(&["a", "p"]));
        let last = farewell(&settled, None, &BTreeSet::new()).unwrap();
        assert_eq!(shown(&last), "a p | */*");
        let everything = set_of(&[EVERYTHING]);
        assert_eq!(farewell(&last, None, &everything), None);
    }

    #[test]
    fn in_a_namespace_with_a_fence_of_its_own() {
        let (nothing, everything) = (BTreeSet::new(), set_of(&[EVERYTHING]));
        let ground = sidecar(&["p", "n"]);
        // Its pods had the namespace's scope, and go back to it.
        let begun = next(sidecar(&["p", "a"]), Some(&ground), &nothing);
        assert_eq!(shown(&begun), "p | a n");
        let settled = next(sidecar(&["p", "a"]), Some(&begun), &set_of(&["a", "n"]));
        let first = farewell(&settled, Some(&ground), &nothing).unwrap();
        assert_eq!(shown(&first), "a p | */*");
        let second = farewell(&first, Some(&ground), &everything).unwrap();
        assert_eq!(shown(&second), "n p | */*");
        assert_eq!(farewell(&second, Some(&ground), &everything), None);
        // To be let off is to get everything, clusters first.
        let all = || sidecar(&[EVERYTHING]);
        let first = next(all(), Some(&ground), &nothing);
        assert_eq!(shown(&first), "n p | */*");
        let second = next(all(), Some(&first), &everything);
        assert_eq!(shown(&second), "*/* | ");
        assert_eq!(next(all(), Some(&second), &nothing), second);
        assert_eq!(next(all(), None, &nothing), all());
        let back = farewell(&second, Some(&ground), &everything).unwrap();
        assert_eq!(shown(&back), "n p | */*");
        assert_eq!(farewell(&second, None, &nothing), None);
    }

    proptest! {
        /// Whatever changes and whenever proxies hear of it: no host has a route that did not have clusters in the step
        /// before, none loses its clusters while it has routes, and it ends where it should.
        #[test]
        fn clusters_outlast_routes(
            targets in proptest::collection::vec(proptest::collection::btree_set("[a-e]", 0..5), 1..8),
            heard in proptest::collection::vec(any::<bool>(), 8),
        ) {
            let target = |hosts: &BTreeSet<String>| {
                let mut all: Vec<&str> = hosts.iter().map(String::as_str).collect();
                all.push("p");
                sidecar(&all)
            };
            let mut stored = sidecar(&["p"]);
            let mut arrived = BTreeSet::new();
            let clusters = |sidecar: &Sidecar| {
                let mut all = routed(&sidecar.spec);
                all.extend(staged(&sidecar.spec));
                all
            };
            let mut steps: Vec<_> = targets.iter().zip(&heard).collect();
            let last = targets.last().unwrap();
            steps.extend([(last, &true); 4]);
            for (hosts, heard) in steps {
                let step = next(target(hosts), Some(&stored), &arrived);
                prop_assert!(routed(&step.spec).is_subset(&clusters(&stored)));
                prop_assert!(routed(&stored.spec).is_subset(&clusters(&step)));
                arrived = if *heard { staged(&step.spec) } else { BTreeSet::new() };
                stored = step;
            }
            prop_assert_eq!(shown(&stored), shown(&next(target(last), Some(&target(last)), &arrived)));
        }
    }
}
