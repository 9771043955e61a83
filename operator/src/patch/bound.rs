//! How much patches may make of a service's routes and of its destination: it is counted before any of it is made, and a patch
//! that there is no room for is left out whole. Those that win come first, so that the others are the ones that lose.

use std::sync::Arc;

use fenceline_crds::TrafficPatch;
use kube::ResourceExt;
use serde::Serialize;

use super::{Outcome, Part, Patches, istio_match};
use crate::apply::LARGEST;

/// The patches of one service: each is merged into every route and every subset.
const PATCHES: usize = 100;
/// Of the requests that patches with a `match` tell apart, each combination is a route of its own.
const MATCHING: usize = 5;
/// What a route matches is each match of its branch together with each of every patch.
const ALTERNATIVES_PER_ROUTE: usize = 100;
/// Of all routes of a service: about 300 KiB.
const ALTERNATIVES: usize = 2000;

/// The bounds by which patches are left out, as metrics name them.
pub(crate) const BOUNDS: [&str; 5] = [
    "patches",
    "matching_patches",
    "alternatives_per_route",
    "alternatives",
    "patch_bytes",
];

/// A branch of a service, or all of one that has no Router.
#[derive(Clone, Debug, Default)]
pub struct Room<'a> {
    pub branch: Option<&'a str>,
    pub versions: Vec<&'a str>,
    /// How many matches it has of its own, and the bytes of the longest.
    pub alternatives: usize,
    pub longest: usize,
}

/// What patches make of a branch so far.
#[derive(Clone, Debug)]
struct Load {
    /// How many patches tell requests apart.
    matching: usize,
    /// The alternatives of the route that has most.
    of_route: usize,
    /// Those of all its routes.
    alternatives: usize,
    longest: usize,
    /// Bytes of the fields that each route may have.
    fields: usize,
    /// Bytes of each version's policy, and whether it differs from the host's.
    policies: Vec<(usize, bool)>,
}

impl Load {
    fn of(room: &Room<'_>) -> Self {
        Self {
            matching: 0,
            of_route: room.alternatives.max(1),
            alternatives: room.alternatives.max(1),
            longest: room.longest,
            fields: 0,
            policies: vec![(0, false); room.versions.len()],
        }
    }

    fn routes(&self) -> usize {
        1 << self.matching
    }

    /// With one more patch.
    fn with(&self, patch: &Sizes<'_>, room: &Room<'_>) -> Self {
        let mut load = self.clone();
        let of_branch = Part {
            branch: room.branch,
            version: None,
        };
        let of_some_version = patch.object.spec.version.is_some()
            && patch.object.spec.branch.as_deref() == room.branch;
        if of_branch.is_in(patch.object) || of_some_version {
            load.fields = load.fields.saturating_add(patch.http);
        }
        if patch.matches > 0 && of_branch.is_in(patch.object) {
            load.matching += 1;
            load.of_route = load.of_route.saturating_mul(patch.matches);
            load.alternatives = load.alternatives.saturating_mul(1 + patch.matches);
            load.longest = load.longest.saturating_add(patch.longest);
        }
        for (version, (bytes, differs)) in room.versions.iter().zip(&mut load.policies) {
            let part = Part {
                branch: room.branch,
                version: Some(version),
            };
            if part.is_in(patch.object) {
                *bytes = bytes.saturating_add(patch.destination);
                *differs |= patch.destination > 0 && patch.object.spec.branch.is_some();
            }
        }
        load
    }

    /// About the bytes of its routes.
    fn bytes_of_routes(&self) -> usize {
        let matches = self.alternatives.saturating_mul(self.longest);
        matches.saturating_add(self.routes().saturating_mul(self.fields))
    }

    /// About the bytes of its subsets' policies.
    fn bytes_of_policies(&self) -> usize {
        let differing = self.policies.iter().filter(|(_, differs)| *differs);
        differing.map(|(bytes, _)| bytes).sum()
    }
}

/// A patch, with how long its parts are.
struct Sizes<'a> {
    object: &'a TrafficPatch,
    http: usize,
    /// Matches of its own for routes, and the bytes of the longest.
    matches: usize,
    longest: usize,
    destination: usize,
}

impl<'a> Sizes<'a> {
    fn of(object: &'a TrafficPatch) -> Self {
        let spec = &object.spec;
        let http = spec.http.as_ref().map_or(0, bytes);
        let matches = spec.matches.iter().filter(|_| http > 0);
        Self {
            object,
            http,
            matches: matches.clone().count(),
            longest: matches
                .map(|one| bytes(&istio_match(one)))
                .max()
                .unwrap_or(0),
            destination: spec.destination.as_ref().map_or(0, bytes),
        }
    }
}

/// How long something is as JSON.
pub(crate) fn bytes(value: &impl Serialize) -> usize {
    // Whatever came as JSON can be written so.
    serde_json::to_vec(value).map_or(usize::MAX, |text| text.len())
}

/// The bound that a patch is over, and what to say of it.
type Over = (&'static str, String);

impl Patches {
    /// The patches that there is room for; what is said of the others goes to the outcome.
    #[must_use]
    pub fn within_bounds(&self, rooms: &[Room<'_>], outcome: &mut Outcome) -> Self {
        let mut loads: Vec<Load> = rooms.iter().map(Load::of).collect();
        let mut host = 0_usize;
        let mut taken = Vec::new();
        for (place, patch) in self.0.iter().enumerate() {
            let sizes = Sizes::of(patch);
            let with: Vec<Load> = loads
                .iter()
                .zip(rooms)
                .map(|(load, room)| load.with(&sizes, room))
                .collect();
            let host_with = match patch.spec.branch {
                None => host.saturating_add(sizes.destination),
                Some(_) => host,
            };
            let over = if place >= PATCHES {
                Some(too_many())
            } else {
                over(&sizes, &loads, &with, rooms).or_else(|| too_long(&sizes, &with, host_with))
            };
            match over {
                Some((bound, why)) => {
                    *outcome.over.entry(bound).or_default() += 1;
                    outcome.refused.insert(patch.name_any(), why);
                }
                None => {
                    (loads, host) = (with, host_with);
                    taken.push(Arc::clone(patch));
                }
            }
        }
        Self(taken)
    }
}

fn too_many() -> Over {
    let why = format!(
        "a service can have {PATCHES} patches, and as many of a higher priority or older come first; this one is left out"
    );
    ("patches", why)
}

/// Whether a patch makes too many routes, or routes of too many matches.
fn over(sizes: &Sizes<'_>, before: &[Load], with: &[Load], rooms: &[Room<'_>]) -> Option<Over> {
    if sizes.matches == 0 {
        return None;
    }
    let concerned = before
        .iter()
        .zip(with)
        .zip(rooms)
        .filter(|((before, with), _)| with.matching > before.matching);
    for ((_, with), room) in concerned {
        let of = room
            .branch
            .map_or_else(String::new, |branch| format!(" of branch {branch}"));
        if with.matching > MATCHING {
            let why = format!(
                "{MATCHING} patches with a match, of a higher priority or older, are all that one route{of} can have; this one's http is left out"
            );
            return Some(("matching_patches", why));
        }
        if with.of_route > ALTERNATIVES_PER_ROUTE {
            let why = format!(
                "with it a route{of} would have {} alternatives, one for each combination of the branch's and the patches' matches, and {ALTERNATIVES_PER_ROUTE} is the most; \
                 its http is left out: give it fewer matches, or a higher priority",
                with.of_route
            );
            return Some(("alternatives_per_route", why));
        }
    }
    let all = with
        .iter()
        .fold(0_usize, |all, load| all.saturating_add(load.alternatives));
    (all > ALTERNATIVES).then(|| {
        let why = format!(
            "with it the service's routes would have {all} alternatives in all, and {ALTERNATIVES} is the most; its http is left out: narrow it to a branch, \
             give it fewer matches, or a higher priority"
        );
        ("alternatives", why)
    })
}

/// Whether an object would be too large with a patch.
fn too_long(sizes: &Sizes<'_>, with: &[Load], host: usize) -> Option<Over> {
    let sum = |of: fn(&Load) -> usize| {
        with.iter()
            .map(of)
            .fold(0_usize, |all, bytes| all.saturating_add(bytes))
    };
    let routes = sum(Load::bytes_of_routes);
    let rule = sum(Load::bytes_of_policies).saturating_add(host);
    let too_long = [
        ("VirtualService", routes, sizes.http),
        ("DestinationRule", rule, sizes.destination),
    ];
    let mut too_long = too_long
        .into_iter()
        .filter(|(_, bytes, own)| *own > 0 && *bytes > LARGEST);
    let (kind, bytes, _) = too_long.next()?;
    let why = format!(
        "with it the {kind} would have about {} KiB, and {} KiB is the most; it is left out: make it shorter, narrow it, or give it a higher priority",
        bytes / 1024,
        LARGEST / 1024
    );
    Some(("patch_bytes", why))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;

    /// A patch with so many matches; the first wins.
    fn telling(place: usize, matches: usize) -> Arc<TrafficPatch> {
        let one =
            |n: usize| json!({"headers": [{"name": format!("x-{place}"), "exact": n.to_string()}]});
        patch(
            place,
            json!({"match": (0..matches).map(one).collect::<Vec<_>>(), "http": {"timeout": "1s"}}),
        )
    }

    fn patch(place: usize, mut spec: Value) -> Arc<TrafficPatch> {
        spec["service"] = json!("reviews");
        spec["priority"] = json!(1000 - i64::try_from(place).unwrap());
        let spec = serde_json::from_value(spec).unwrap();
        Arc::new(TrafficPatch::new(&format!("patch-{place:03}"), spec))
    }

    fn names(patches: &Patches) -> Vec<String> {
        patches.iter().map(ResourceExt::name_any).collect()
    }

    fn bounded(patches: Vec<Arc<TrafficPatch>>, rooms: &[Room<'_>]) -> (Vec<String>, Outcome) {
        let mut outcome = Outcome::default();
        let taken = Patches::new(patches).within_bounds(rooms, &mut outcome);
        (names(&taken), outcome)
    }

    fn base() -> [Room<'static>; 1] {
        [Room::default()]
    }

    #[test]
    fn a_route_has_a_hundred_alternatives_and_not_one_more() {
        let all = |matches: &[usize]| {
            let patches = matches.iter().enumerate();
            let patches = patches.map(|(place, matches)| telling(place, *matches));
            bounded(patches.collect(), &base())
        };
        let (taken, outcome) = all(&[10, 10, 1]);
        assert_eq!(taken, ["patch-000", "patch-001", "patch-002"]);
        assert!(outcome.refused.is_empty(), "{outcome:?}");
        let (taken, outcome) = all(&[10, 10, 2, 1]);
        assert_eq!(
            taken,
            ["patch-000", "patch-001", "patch-003"],
            "what comes after it fits"
        );
        let why = &outcome.refused["patch-002"];
        assert!(
            why.contains("200 alternatives") && why.contains("100 is the most"),
            "{why}"
        );
        assert_eq!(outcome.over, [("alternatives_per_route", 1)].into());
        // Five of ten each were 161,051.
        assert_eq!(all(&[10; 5]).0, ["patch-000", "patch-001"]);
    }

    #[test]
    fn a_branch_brings_its_own_matches() {
        let room = |alternatives| {
            [Room {
                branch: Some("box"),
                alternatives,
                longest: 50,
                ..Room::default()
            }]
        };
        let patches = || vec![telling(0, 10), telling(1, 2)];
        assert_eq!(bounded(patches(), &room(5)).0.len(), 2);
        let (taken, outcome) = bounded(patches(), &room(6));
        assert_eq!(taken, ["patch-000"]);
        let why = &outcome.refused["patch-001"];
        assert!(
            why.contains("a route of branch box would have 120"),
            "{why}"
        );
    }

    #[test]
    fn all_routes_of_a_service_together() {
        let branches: Vec<String> = (0..50).map(|n| format!("b{n}")).collect();
        let rooms: Vec<Room<'_>> = branches
            .iter()
            .map(|name| Room {
                branch: Some(name),
                alternatives: 10,
                longest: 50,
                ..Room::default()
            })
            .collect();
        // 50 branches of 10 matches, each with and without the patch's.
        let (taken, _) = bounded(vec![telling(0, 3)], &rooms);
        assert_eq!(taken.len(), 1, "just 2,000");
        let (taken, outcome) = bounded(vec![telling(0, 4)], &rooms);
        assert!(taken.is_empty());
        let why = &outcome.refused["patch-000"];
        assert!(why.contains("2500 alternatives in all"), "{why}");
    }

    #[test]
    fn so_many_patches_and_no_more() {
        let plain = |place| patch(place, json!({"http": {"timeout": "1s"}}));
        let (taken, outcome) = bounded((0..=PATCHES).map(plain).collect(), &base());
        assert_eq!(taken.len(), PATCHES);
        assert!(outcome.refused["patch-100"].contains("can have 100 patches"));
        assert_eq!(outcome.over, [("patches", 1)].into());
    }

    /// It is left out, and those after it are not.
    #[test]
    fn a_patch_that_makes_an_object_too_large() {
        let long = |kib: usize| "x".repeat(kib << 10);
        let headers = |place, kib| {
            let set = json!({"request": {"set": {"x-long": long(kib)}}});
            patch(place, json!({"http": {"headers": set}}))
        };
        let (taken, outcome) =
            bounded(vec![headers(0, 510), headers(1, 4), headers(2, 1)], &base());
        assert_eq!(taken, ["patch-000", "patch-002"]);
        assert!(outcome.refused["patch-001"].contains("VirtualService would have about 514 KiB"));
        // Each version of the branch has a copy.
        let versions: Vec<String> = (0..50).map(|n| format!("v{n}")).collect();
        let rooms = [Room {
            branch: Some("main"),
            versions: versions.iter().map(String::as_str).collect(),
            ..Room::default()
        }];
        let pool = |place, kib| {
            let policy = json!({"tls": {"sni": long(kib)}});
            patch(place, json!({"branch": "main", "destination": policy}))
        };
        assert_eq!(bounded(vec![pool(0, 10)], &rooms).0.len(), 1);
        let (taken, outcome) = bounded(vec![pool(0, 11)], &rooms);
        assert!(taken.is_empty());
        assert!(outcome.refused["patch-000"].contains("DestinationRule would have about 550 KiB"));
    }

    proptest! {
        /// What is counted is never less than what is made.
        #[test]
        fn no_route_is_over_what_was_counted(matches in proptest::collection::vec(0..11_usize, 0..9), own in 0..11_usize) {
            let patches = matches.iter().enumerate().map(|(place, matches)| telling(place, *matches));
            let base: Vec<_> = (0..own)
                .map(|n| json!({"uri": {"exact": n.to_string()}}).as_object().unwrap().clone())
                .collect();
            let room = Room { alternatives: own, longest: 50, ..Room::default() };
            let mut outcome = Outcome::default();
            let all = Patches::new(patches.collect());
            let taken = all.within_bounds(&[room], &mut outcome);
            prop_assert_eq!(names(&taken).len() + outcome.refused.len(), matches.len());
            let routes = taken.routes(None, &base, &mut outcome);
            for route in &routes {
                prop_assert!(route.matches.len() <= ALTERNATIVES_PER_ROUTE);
            }
            let all: usize = routes.iter().map(|route| route.matches.len()).sum();
            prop_assert!(all <= ALTERNATIVES);
        }
    }
}
