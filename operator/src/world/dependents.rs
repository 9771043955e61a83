//! Which fences a change of a host touches, so that one changed Service does not have every fence planned again.

use std::collections::{BTreeSet, HashMap};

use fenceline_crds::ServiceFence;

use super::{Key, World};
use crate::observe::resolve::full_names;

/// Fences by the hosts that they name.
#[derive(Debug, Default)]
pub(super) struct Dependents {
    by_host: HashMap<String, BTreeSet<Key>>,
    /// Those that find hosts by labels or patterns, so that any host may be theirs.
    finders: BTreeSet<Key>,
}

impl Dependents {
    /// A fence changed, came or went.
    pub(super) fn change(
        &mut self,
        key: &Key,
        old: Option<&ServiceFence>,
        new: Option<&ServiceFence>,
        world: &World,
    ) {
        let named = |fence: Option<&ServiceFence>| {
            fence.map_or_else(BTreeSet::new, |fence| names(key, fence, world))
        };
        let (before, after) = (named(old), named(new));
        for host in before.difference(&after) {
            if let Some(fences) = self.by_host.get_mut(host) {
                fences.remove(key);
                if fences.is_empty() {
                    self.by_host.remove(host);
                }
            }
        }
        for host in after.difference(&before) {
            let fences = self.by_host.entry(host.clone()).or_default();
            fences.insert(key.clone());
        }
        if new.is_some_and(finds) {
            self.finders.insert(key.clone());
        } else {
            self.finders.remove(key);
        }
    }

    /// The fences that name a host.
    pub(super) fn of(&self, fqdn: &str) -> impl Iterator<Item = &Key> {
        self.by_host.get(fqdn).into_iter().flatten()
    }

    pub(super) fn finders(&self) -> impl Iterator<Item = &Key> {
        self.finders.iter()
    }
}

fn finds(fence: &ServiceFence) -> bool {
    let mut dependencies = fence.spec.dependencies.iter();
    let by_labels = dependencies.any(|dependency| dependency.services.is_some());
    by_labels || !fence.spec.aliases.is_empty()
}

/// Every full name that what a fence says could mean.
fn names(key: &Key, fence: &ServiceFence, world: &World) -> BTreeSet<String> {
    let learnt = fence.status.iter().flat_map(|status| &status.dependencies);
    let mut names: BTreeSet<String> = learnt.map(|known| known.host.clone()).collect();
    let declared = fence.spec.dependencies.iter();
    for host in declared.filter_map(|dependency| dependency.host.as_deref()) {
        let host = host.trim_end_matches('.').to_ascii_lowercase();
        for name in full_names(world, &key.namespace, &host) {
            // A pod of a headless Service that is there later.
            let service = name.split_once('.').map(|(_, service)| service.to_owned());
            names.extend(service);
            names.insert(name);
        }
    }
    names
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{fence, world};

    #[test]
    fn a_fence_is_found_by_what_it_names_until_it_does_not() {
        let mesh = world();
        let key = Key::new("shop", "cart");
        let mut dependents = Dependents::default();
        let declares = fence(
            "shop",
            "cart",
            "{dependencies: [{host: ledger.bank}, {host: web}]}",
        );
        let found = |dependents: &Dependents, host: &str| dependents.of(host).count();
        dependents.change(&key, None, Some(&declares), &mesh);
        assert_eq!(found(&dependents, "ledger.bank.svc.cluster.local"), 1);
        assert_eq!(found(&dependents, "web.shop.svc.cluster.local"), 1);
        assert_eq!(found(&dependents, "web.bank.svc.cluster.local"), 0);
        assert_eq!(dependents.finders().count(), 0);
        let finds = fence(
            "shop",
            "cart",
            "{dependencies: [{services: {selector: {matchLabels: {a: b}}}}]}",
        );
        dependents.change(&key, Some(&declares), Some(&finds), &mesh);
        assert_eq!(found(&dependents, "web.shop.svc.cluster.local"), 0);
        assert_eq!(dependents.finders().count(), 1);
        dependents.change(&key, Some(&finds), None, &mesh);
        assert_eq!(dependents.finders().count(), 0);
        assert!(dependents.by_host.is_empty());
    }
}
