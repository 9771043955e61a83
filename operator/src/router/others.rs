//! What other people wrote for a service's host: what stands in the way, and whose callers do not get what is written here.
//!
//! Istio looks for a DestinationRule in the caller's namespace first, for the exact host or by a wildcard, then in the Service's, then in its root
//! namespace (pilot/pkg/model/push_context.go, `destinationRule`). Of VirtualServices it takes those that only the caller's namespace sees, then those
//! exported to it by name, then those for everybody, the older first (`VirtualServicesForGateway`). So another namespace's objects bear on that
//! namespace's callers, and on others only where they are exported to them and come first there.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use fenceline_crds::istio::VirtualServiceSpec;
use jiff::Timestamp;
use serde_json::Value;

use super::gather::Namespaces;
use crate::world::{ExportTo, Key, World};

/// Callers of so many namespaces are kept apart by a route of ours: about 20 KiB of it.
const KEPT_APART: usize = 500;
/// So many of others' objects are named.
const NAMED: usize = 10;
/// After a rule that hid ours is gone its namespace's proxies have our clusters within moments, and only then may routes lead there.
const UNHIDDEN: Duration = Duration::from_secs(10);

/// What other people wrote for the same host.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Others {
    /// What stands in the way.
    pub(super) conflicts: Vec<String>,
    /// What bears on other namespaces' callers alone.
    remarks: Vec<String>,
    /// The namespaces whose callers do not have our clusters.
    pub(super) hidden: BTreeSet<String>,
}

/// Whose service it is, and whose callers matter to it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Owner<'a> {
    pub(super) service: &'a Key,
    pub(super) fqdn: &'a str,
    /// Other namespaces whose callers the Router names.
    pub(super) callers: &'a [String],
    /// Since when there is a VirtualService of ours.
    pub(super) since: Option<Timestamp>,
}

impl Owner<'_> {
    fn names(&self, namespace: &str) -> bool {
        self.service.namespace == namespace || self.callers.iter().any(|named| named == namespace)
    }
}

impl Others {
    pub(super) fn of(owner: Owner<'_>, world: &World, namespaces: Namespaces<'_>) -> Self {
        let mut others = Self::default();
        others.routes(owner, world);
        others.rules(owner, world, namespaces);
        let hidden = others.hidden.len();
        if hidden > KEPT_APART {
            others.conflicts.push(format!(
                "DestinationRules of {hidden} namespaces, which hide ours from callers there, where {KEPT_APART} can be kept apart,"
            ));
        }
        others
    }

    fn routes(&mut self, owner: Owner<'_>, world: &World) {
        let own = Key::new(&*owner.service.namespace, super::write::name(owner.service));
        for key in world.routes_of(owner.fqdn).filter(|key| **key != own) {
            let label = match key.name.split_once('/') {
                Some((kind, name)) => {
                    format!(
                        "{}Route {}/{name}",
                        kind.to_ascii_uppercase(),
                        key.namespace
                    )
                }
                None => format!("VirtualService {key}"),
            };
            let facts = world.virtual_services.get(key);
            let export_to = facts.map(|facts| &facts.export_to);
            if key.namespace == owner.service.namespace {
                self.conflicts.push(label);
                continue;
            }
            match export_to {
                None | Some(ExportTo::Everyone) => {
                    let created = facts.and_then(|facts| facts.created);
                    let comes_first =
                        owner.since.is_none() || created.is_none() || created <= owner.since;
                    if comes_first {
                        self.conflicts.push(label);
                    } else {
                        self.remarks.push(format!(
                            "{label} is for everybody too, and has no effect: ours is older"
                        ));
                    }
                }
                Some(ExportTo::Namespaces(named)) => {
                    if let Some(caller) = named.iter().find(|named| owner.names(named)) {
                        self.conflicts
                            .push(format!("{label}, which callers in {caller} get instead,"));
                    } else if !named.is_empty() {
                        let callers = few(named.iter().map(String::as_str), named.len());
                        self.remarks
                            .push(format!("callers in {callers} get {label} instead of this"));
                    }
                }
            }
        }
    }

    fn rules(&mut self, owner: Owner<'_>, world: &World, namespaces: Namespaces<'_>) {
        let theirs = world
            .rules
            .iter()
            .filter(|(key, _)| !world.own_rules.contains_key(*key));
        for (key, rule) in theirs {
            let of = key.namespace.as_str();
            if of == owner.service.namespace {
                // Of two in one namespace the more exact host wins, and ours has no wildcard.
                if rule.host == owner.fqdn {
                    self.conflicts.push(format!("DestinationRule {key}"));
                }
                continue;
            }
            // The root namespace's come after the service's own, but for those that are for itself alone.
            let bears = match &rule.export_to {
                ExportTo::Everyone => of != namespaces.root,
                ExportTo::Namespaces(named) => {
                    named.contains(of) && (of != namespaces.root || named.len() == 1)
                }
            };
            if !bears || !rule.covers(owner.fqdn) {
                continue;
            }
            let hides = format!("DestinationRule {key}, which hides ours from callers there");
            // What our own view does not get is never seen to arrive.
            if owner.names(of) || of == namespaces.view {
                self.conflicts.push(hides);
            } else {
                self.hidden.insert(of.to_owned());
                self.remarks.push(format!(
                    "callers in {of} do not get this: DestinationRule {key} hides ours there"
                ));
            }
        }
    }

    /// What people should know that does not stand in the way.
    pub(super) fn remarks(&self) -> Option<String> {
        let all = self.remarks.len();
        (all > 0).then(|| few(self.remarks.iter().map(String::as_str), all))
    }
}

/// The first of many.
fn few<'a>(names: impl Iterator<Item = &'a str>, all: usize) -> String {
    let named: Vec<&str> = names.take(NAMED).collect();
    let named = named.join("; ");
    match all.saturating_sub(NAMED) {
        0 => named,
        more => format!("{named}; and {more} more"),
    }
}

/// The namespaces that a VirtualService of ours keeps apart.
pub(super) fn apart(routes: &VirtualServiceSpec) -> BTreeSet<String> {
    let routes = routes.other.values().filter_map(Value::as_array).flatten();
    let matches = routes
        .filter_map(|route| route["match"].as_array())
        .flatten();
    matches
        .filter_map(|one| Some(one["sourceNamespace"].as_str()?.to_owned()))
        .collect()
}

/// The namespaces to keep apart now: those where ours is hidden, and those where it was until a moment ago, with how long that
/// lasts. `gone` notes since when they are not.
pub(super) fn keep_apart(
    hidden: &BTreeSet<String>,
    stored: &BTreeSet<String>,
    gone: &mut BTreeMap<String, Instant>,
    now: Instant,
) -> (BTreeSet<String>, Option<Duration>) {
    gone.retain(|namespace, _| stored.contains(namespace) && !hidden.contains(namespace));
    let mut apart = hidden.clone();
    let mut next: Option<Duration> = None;
    for namespace in stored.difference(hidden) {
        let since = *gone.entry(namespace.clone()).or_insert(now);
        let left = (since + UNHIDDEN).saturating_duration_since(now);
        if !left.is_zero() {
            apart.insert(namespace.clone());
            next = Some(next.map_or(left, |next| next.min(left)));
        }
    }
    (apart, next)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::testing::{virtual_service, world};
    use crate::world::RuleFacts;

    const FQDN: &str = "reviews.shop.svc.cluster.local";
    const NAMESPACES: Namespaces<'_> = Namespaces {
        root: "istio-system",
        view: "fenceline-system",
    };

    fn seen(mesh: &World, callers: &[&str], since: Option<Timestamp>) -> Others {
        let callers: Vec<String> = callers.iter().map(|name| (*name).to_owned()).collect();
        let owner = Owner {
            service: &Key::new("shop", "reviews"),
            fqdn: FQDN,
            callers: &callers,
            since,
        };
        Others::of(owner, mesh, NAMESPACES)
    }

    /// The DestinationRules of these namespaces, hosts and exports; none is everybody.
    fn rules(rules: &[(&str, &str, Option<&[&str]>)]) -> World {
        let mut mesh = world();
        for (namespace, host, export_to) in rules {
            let export_to = export_to.map_or(ExportTo::Everyone, |named| {
                ExportTo::Namespaces(named.iter().map(|name| (*name).to_owned()).collect())
            });
            let host = (*host).to_owned();
            let facts = RuleFacts { host, export_to };
            mesh.rules
                .insert(Key::new(*namespace, "theirs"), Arc::new(facts));
        }
        mesh
    }

    #[test]
    fn another_namespaces_rule_is_a_remark_to_everybody_else() {
        for host in [FQDN, "*.shop.svc.cluster.local", "*.local", "*"] {
            for export_to in [None, Some(&["evil"][..]), Some(&["evil", "shop"])] {
                let mesh = rules(&[("evil", host, export_to)]);
                let others = seen(&mesh, &[], None);
                assert!(others.conflicts.is_empty(), "{host} {others:?}");
                assert_eq!(others.hidden, ["evil".to_owned()].into());
                assert_eq!(
                    others.remarks().as_deref(),
                    Some(
                        "callers in evil do not get this: DestinationRule evil/theirs hides ours there"
                    )
                );
                let named = seen(&mesh, &["evil"], None);
                assert_eq!(
                    named.conflicts,
                    ["DestinationRule evil/theirs, which hides ours from callers there"]
                );
            }
        }
        let elsewhere = rules(&[
            ("evil", "*.local", Some(&["shop"])),
            ("evil", "ratings.shop.svc.cluster.local", None),
        ]);
        assert_eq!(seen(&elsewhere, &[], None), Others::default());
    }

    #[test]
    fn rules_of_the_services_own_namespace_and_of_istios() {
        let own = rules(&[("shop", FQDN, Some(&["bank"]))]);
        assert_eq!(
            seen(&own, &[], None).conflicts,
            ["DestinationRule shop/theirs"]
        );
        let wildcard = rules(&[("shop", "*.shop.svc.cluster.local", None)]);
        assert_eq!(seen(&wildcard, &[], None), Others::default());
        let root = rules(&[("istio-system", "*.local", None)]);
        assert_eq!(
            seen(&root, &[], None),
            Others::default(),
            "ours comes first"
        );
        let private = rules(&[("istio-system", "*.local", Some(&["istio-system"]))]);
        assert_eq!(
            seen(&private, &[], None).hidden,
            ["istio-system".to_owned()].into()
        );
        let view = rules(&[("fenceline-system", "*.local", None)]);
        assert_eq!(seen(&view, &[], None).conflicts.len(), 1);
    }

    #[test]
    fn so_many_namespaces_are_kept_apart() {
        let names: Vec<String> = (0..=KEPT_APART).map(|n| format!("ns-{n}")).collect();
        let all: Vec<_> = names
            .iter()
            .map(|name| (name.as_str(), "*.local", None))
            .collect();
        assert!(seen(&rules(&all[1..]), &[], None).conflicts.is_empty());
        let conflicts = seen(&rules(&all), &[], None).conflicts;
        assert!(conflicts[0].contains("of 501 namespaces"), "{conflicts:?}");
    }

    #[test]
    fn whose_virtual_services_come_first() {
        let made = |export_to: &str| {
            let mut mesh = world();
            let spec = format!("{{hosts: [{FQDN}], exportTo: {export_to}}}");
            virtual_service(&mut mesh, "evil", "theirs", &spec);
            mesh
        };
        let private = seen(&made("['.']"), &[], None);
        assert!(private.conflicts.is_empty());
        assert_eq!(
            private.remarks().as_deref(),
            Some("callers in evil get VirtualService evil/theirs instead of this")
        );
        assert_eq!(seen(&made("['.']"), &["evil"], None).conflicts.len(), 1);
        assert_eq!(seen(&made("[shop]"), &[], None).conflicts.len(), 1);
        assert_eq!(seen(&made("['~']"), &[], None), Others::default());
        let mut mesh = made("['*']");
        assert_eq!(
            seen(&mesh, &[], None).conflicts,
            ["VirtualService evil/theirs"]
        );
        let at = |second| Timestamp::from_second(second).ok();
        let key = Key::new("evil", "theirs");
        let mut facts = mesh.virtual_services[&key].as_ref().clone();
        facts.created = at(100);
        mesh.set_virtual_service(&key, Some(facts));
        assert_eq!(seen(&mesh, &[], at(100)).conflicts.len(), 1);
        let ours_is_older = seen(&mesh, &[], at(99));
        assert!(ours_is_older.conflicts.is_empty() && ours_is_older.remarks().is_some());
    }

    #[test]
    fn a_namespace_stays_apart_until_it_has_our_clusters() {
        let set = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        let (evil, none): (BTreeSet<String>, BTreeSet<String>) = (set(&["evil"]), set(&[]));
        let mut gone = BTreeMap::new();
        let start = Instant::now();
        assert_eq!(
            keep_apart(&evil, &none, &mut gone, start),
            (evil.clone(), None)
        );
        let left = keep_apart(&none, &evil, &mut gone, start);
        assert_eq!(left, (evil.clone(), Some(UNHIDDEN)));
        let half = keep_apart(&none, &evil, &mut gone, start + UNHIDDEN / 2);
        assert_eq!(half, (evil.clone(), Some(UNHIDDEN / 2)));
        // It came back, and went again.
        keep_apart(&evil, &evil, &mut gone, start + UNHIDDEN);
        let again = keep_apart(&none, &evil, &mut gone, start + UNHIDDEN);
        assert_eq!(again, (evil.clone(), Some(UNHIDDEN)));
        let over = keep_apart(&none, &evil, &mut gone, start + UNHIDDEN * 2);
        assert_eq!(over, (none, None));
    }
}
