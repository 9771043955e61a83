//! Where routes lead: the hosts behind a VirtualService. Each is walked once for all of its hosts, and no further than the
//! bounds; what came of it is kept until something changes.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};

use imbl::OrdMap;

use super::{Key, World};

/// So many hosts may be behind one VirtualService. Gateways in front of a whole mesh lead to some hundred.
pub const MOST_HOSTS: usize = 1_000;
/// So many entries of routes are read for one VirtualService: each of the hosts may have some of its own.
const MOST_STEPS: usize = 20 * MOST_HOSTS;

/// Why a host must not be called under another identity than its caller's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Protection {
    /// This AuthorizationPolicy asks who is calling, or did until a moment ago.
    Policy(Key),
    /// This VirtualService leads to more than can be looked at, and some policy of the mesh asks who is calling.
    LeadsTooFar(Key),
}

impl std::fmt::Display for Protection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Policy(key) => write!(f, "AuthorizationPolicy {key} asks who is calling"),
            Self::LeadsTooFar(key) => {
                write!(
                    f,
                    "VirtualService {key} leads to more than {MOST_HOSTS} hosts"
                )
            }
        }
    }
}

/// Routes lead to more hosts than the bound.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TooFar;

/// Where one VirtualService leads.
#[derive(Debug, Default)]
pub(super) struct Walk<'a> {
    pub(super) hosts: HashSet<&'a str>,
    pub(super) too_far: bool,
    /// What it cost: entries that were read.
    pub(super) steps: usize,
}

/// What was found out about hosts and VirtualServices as they are now. It is never emptied: whatever changes gets a new one, so that
/// former snapshots keep theirs.
#[derive(Clone, Debug, Default)]
pub(super) struct Found(Arc<Mutex<Known>>);

#[derive(Debug, Default)]
struct Known {
    /// Whom the root namespace that is asked for protects: it is one and the same for a process.
    root: String,
    hosts: HashMap<String, Option<Key>>,
    behind: HashMap<Key, Behind>,
}

/// What is protected behind a VirtualService.
#[derive(Clone, Debug, Default)]
pub(super) struct Behind {
    pub(super) now: Option<Protection>,
    /// As of a moment ago.
    pub(super) lingering: Option<Protection>,
}

impl Found {
    fn known<T>(&self, root: &str, look: impl FnOnce(&mut Known) -> T) -> T {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if known.root != root {
            *known = Known {
                root: root.to_owned(),
                ..Known::default()
            };
        }
        look(&mut known)
    }

    pub(super) fn of_host(
        &self,
        root: &str,
        host: &str,
        find: impl FnOnce() -> Option<Key>,
    ) -> Option<Key> {
        if let Some(found) = self.known(root, |known| known.hosts.get(host).cloned()) {
            return found;
        }
        let found = find();
        self.known(root, |known| {
            known.hosts.insert(host.to_owned(), found.clone());
        });
        found
    }

    pub(super) fn behind(&self, root: &str, key: &Key, find: impl FnOnce() -> Behind) -> Behind {
        if let Some(found) = self.known(root, |known| known.behind.get(key).cloned()) {
            return found;
        }
        let found = find();
        self.known(root, |known| {
            known.behind.insert(key.clone(), found.clone());
        });
        found
    }
}

/// What a host's own name has in a map by host, and then the wildcards that it fits: each of its ends is looked up, so that
/// it does not matter how many wildcards there are.
pub(super) fn fitting<'a, V>(map: &'a OrdMap<String, V>, host: &str) -> Vec<&'a V> {
    let exact = map.get(host).filter(|_| !host.starts_with('*'));
    let mut found: Vec<&V> = exact.into_iter().collect();
    found.extend(wildcards(map, host));
    found
}

/// As [`fitting`], without the host's own name.
pub(super) fn wildcards<'a, V>(map: &'a OrdMap<String, V>, host: &str) -> Vec<&'a V> {
    let mut first = map.range("*".to_owned()..);
    if first.next().is_none_or(|(name, _)| !name.starts_with('*')) {
        return Vec::new();
    }
    let ends = host.char_indices().map(|(start, _)| &host[start..]);
    ends.chain([""])
        .filter_map(|end| map.get(&format!("*{end}")))
        .collect()
}

impl World {
    /// Walks from a VirtualService over the routes of every host that it leads to, each VirtualService once.
    pub(super) fn walk<'a>(&'a self, from: &'a Key) -> Walk<'a> {
        let mut walk = Walk::default();
        let mut seen = HashSet::from([from]);
        let mut delegates = HashSet::new();
        let mut look_at = vec![from];
        while let Some(routes) = look_at.pop().and_then(|key| self.virtual_services.get(key)) {
            walk.steps += routes.delegates.len();
            let leaves = routes.delegates.iter().filter(|key| delegates.insert(*key));
            let leaves = leaves.filter_map(|key| self.virtual_services.get(key));
            let destinations = std::iter::once(routes).chain(leaves);
            for host in destinations.flat_map(|routes| &routes.destinations) {
                walk.steps += 1;
                if walk.hosts.insert(host) {
                    for key in self.routes_for(host) {
                        walk.steps += 1;
                        if seen.insert(key) {
                            look_at.push(key);
                        }
                    }
                }
                if walk.hosts.len() > MOST_HOSTS || walk.steps > MOST_STEPS {
                    walk.too_far = true;
                    return walk;
                }
            }
        }
        walk
    }

    /// The VirtualServices that apply to a host: those with a wildcard apply to what has none of its own; which of them is
    /// taken depends on who calls, so all are.
    pub(super) fn routes_for(&self, host: &str) -> impl Iterator<Item = &Key> {
        fitting(&self.routes, host).into_iter().flatten()
    }

    /// Whether `is` says so of a host or of any that routes lead to from there.
    ///
    /// # Errors
    /// Fails where routes lead to more hosts than the bound, and none of those that were looked at will do.
    pub fn any_behind(&self, fqdn: &str, is: impl Fn(&str) -> bool) -> Result<bool, TooFar> {
        if is(fqdn) {
            return Ok(true);
        }
        let mut too_far = false;
        for key in self.routes_for(fqdn) {
            let walk = self.walk(key);
            if walk.hosts.iter().any(|host| is(host)) {
                return Ok(true);
            }
            too_far |= walk.too_far;
        }
        if too_far { Err(TooFar) } else { Ok(false) }
    }

    /// The VirtualServices that lead to more hosts than the bound.
    pub fn leading_too_far(&self) -> impl Iterator<Item = &Key> {
        let all = self.virtual_services.keys();
        all.filter(|key| self.walk(key).too_far)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::testing::{policy, service, virtual_service, world};
    use crate::world::NamedHosts;
    use proptest::prelude::*;

    const ROOT: &str = "istio-system";

    fn fits(pattern: &str, host: &str) -> bool {
        pattern
            .strip_prefix('*')
            .map_or(pattern == host, |end| host.ends_with(end))
    }

    /// The walk as it was: host by host, all destinations again for each, all wildcards one by one.
    fn plainly(mesh: &World, fqdn: &str) -> BTreeSet<String> {
        let mut seen = BTreeSet::new();
        let mut look_at = vec![fqdn.to_owned()];
        while let Some(host) = look_at.pop() {
            if !seen.insert(host.clone()) {
                continue;
            }
            for routes in mesh.virtual_services.values() {
                if routes.hosts.iter().any(|name| fits(name, &host)) {
                    look_at.extend(routes.destinations.iter().cloned());
                    for leaf in &routes.delegates {
                        let leaf = mesh.virtual_services.get(leaf).into_iter();
                        look_at.extend(leaf.flat_map(|leaf| leaf.destinations.iter().cloned()));
                    }
                }
            }
        }
        seen
    }

    fn behind(mesh: &World, fqdn: &str) -> BTreeSet<String> {
        let walks = mesh.routes_for(fqdn).flat_map(|key| mesh.walk(key).hosts);
        walks.chain([fqdn]).map(str::to_owned).collect()
    }

    /// A VirtualService with `count` hosts and a route to each of them.
    fn knot(count: usize) -> World {
        let mut mesh = world();
        let hosts: BTreeSet<String> = (0..count)
            .map(|number| format!("h{number}.bank.svc.cluster.local"))
            .collect();
        let facts = NamedHosts {
            destinations: hosts.clone(),
            hosts,
            ..NamedHosts::default()
        };
        mesh.set_virtual_service(&Key::new("bank", "knot"), Some(facts));
        mesh
    }

    #[test]
    fn hosts_times_routes_cost_hosts_and_routes() {
        let steps = |count| {
            let mesh = knot(count);
            mesh.walk(&Key::new("bank", "knot")).steps
        };
        // Each host once as a destination, and once for the VirtualService that it has.
        for count in [10, 100, 1_000] {
            assert_eq!(steps(count), 2 * count);
        }
        assert_eq!(steps(50_000), 2 * (MOST_HOSTS + 1), "it gives up");
        // All its hosts share one walk.
        let mesh = knot(1_000);
        let walks = std::cell::Cell::new(0);
        for host in &mesh.virtual_services[&Key::new("bank", "knot")].hosts {
            for key in mesh.routes_for(host) {
                mesh.found.behind(ROOT, key, || {
                    walks.set(walks.get() + 1);
                    Behind::default()
                });
            }
        }
        assert_eq!(walks.get(), 1);
    }

    #[test]
    fn what_leads_too_far_is_protected_if_anything_is_and_called() {
        let host = "h1.bank.svc.cluster.local";
        let protects = |count| {
            let mut mesh = knot(count);
            assert_eq!(mesh.protection(ROOT, host), None, "by what?");
            service(&mut mesh, "shop", "vault", "{}");
            let rule = "{rules: [{from: [{source: {namespaces: [evil]}}]}]}";
            policy(&mut mesh, "shop", "p", rule);
            let far = mesh.leading_too_far().count();
            let called = mesh.any_behind(host, |_| false);
            (mesh.protection(ROOT, host), far, called)
        };
        assert_eq!(protects(MOST_HOSTS), (None, 0, Ok(false)));
        let too_far = Protection::LeadsTooFar(Key::new("bank", "knot"));
        let want = (Some(too_far), 1, Err(TooFar));
        assert_eq!(protects(MOST_HOSTS + 1), want);
    }

    #[test]
    fn a_snapshot_keeps_its_answer_whatever_changes() {
        let mut mesh = world();
        service(&mut mesh, "bank", "vault", "{}");
        let front = "{hosts: [front], http: [{route: [{destination: {host: vault}}]}]}";
        virtual_service(&mut mesh, "bank", "front", front);
        let host = "front.bank.svc.cluster.local";
        let before = mesh.clone();
        assert_eq!(mesh.protection(ROOT, host), None);
        let rule = "{rules: [{from: [{source: {namespaces: [shop]}}]}]}";
        policy(&mut mesh, "bank", "p", rule);
        assert!(mesh.protection(ROOT, host).is_some());
        assert_eq!(before.protection(ROOT, host), None);
        let after = mesh.clone();
        mesh.set_virtual_service(&Key::new("bank", "front"), None);
        assert!(after.protection(ROOT, host).is_some());
    }

    type Routes = (BTreeSet<u8>, BTreeSet<u8>, BTreeSet<u8>);

    fn routes() -> impl Strategy<Value = Vec<Routes>> {
        let some = || proptest::collection::btree_set(0..6_u8, 0..4);
        proptest::collection::vec((some(), some(), some()), 1..6)
    }

    fn small(all: &[Routes]) -> World {
        let names = ["a.x", "b.x", "c.x", "ab.x", "*.x", "*b.x"];
        let name = |index: &u8| names[usize::from(*index)].to_owned();
        let mut mesh = world();
        for (index, (hosts, destinations, delegates)) in all.iter().enumerate() {
            let destinations = destinations.iter().filter(|index| **index < 4);
            let facts = NamedHosts {
                hosts: hosts.iter().map(name).collect(),
                destinations: destinations.map(name).collect(),
                delegates: delegates
                    .iter()
                    .map(|leaf| Key::new("shop", leaf.to_string()))
                    .collect(),
                ..NamedHosts::default()
            };
            mesh.set_virtual_service(&Key::new("shop", index.to_string()), Some(facts));
        }
        mesh
    }

    proptest! {
        #[test]
        fn it_leads_where_it_led_before(all in routes(), gone in 0..6_usize) {
            let mut mesh = small(&all);
            for host in ["a.x", "b.x", "c.x", "ab.x"] {
                prop_assert_eq!(behind(&mesh, host), plainly(&mesh, host));
            }
            mesh.set_virtual_service(&Key::new("shop", gone.to_string()), None);
            for (key, routes) in &mesh.virtual_services {
                let roots = mesh.virtual_services.values().filter(|root| root.delegates.contains(key));
                let hosts = roots.chain([routes]).flat_map(|root| root.hosts.clone());
                let want: BTreeSet<String> = hosts.collect();
                prop_assert_eq!(mesh.hosts_routed_by(key), want);
            }
        }
    }
}
