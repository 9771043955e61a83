//! Which fences a change of a host touches, so that one changed Service does not have every fence planned again.

use std::collections::{BTreeSet, HashMap};

use fenceline_crds::ServiceFence;

use super::{Key, World};
use crate::fence::alias::can_make;
use crate::observe::resolve::full_names;

/// Fences by the hosts that they name.
#[derive(Debug, Default)]
pub(super) struct Dependents {
    by_host: HashMap<String, BTreeSet<Key>>,
    /// Those that find hosts by labels, so that any host may be theirs.
    finders: BTreeSet<Key>,
    /// Those that bring hosts by aliases, by the templates of these. All fences of a policy share theirs.
    by_template: HashMap<String, BTreeSet<Key>>,
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
        moved(&mut self.by_host, key, &before, &after);
        moved(&mut self.by_template, key, &templates(old), &templates(new));
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

    /// The fences of which an alias may bring a Service. No pattern is looked at: this is everybody's thread.
    pub(super) fn brings<'a>(
        &'a self,
        service: &'a Key,
        world: &'a World,
    ) -> impl Iterator<Item = &'a Key> {
        let fqdn = world.fqdn(service);
        let short = format!("{}.{}", service.name, service.namespace);
        let forms = [fqdn, format!("{short}.svc"), short];
        self.by_template.iter().flat_map(move |(template, fences)| {
            let by_any = forms.iter().any(|form| makes(template, form));
            let by_own = makes(template, &service.name);
            fences
                .iter()
                .filter(move |fence| by_any || (by_own && fence.namespace == service.namespace))
        })
    }

    pub(super) fn finders(&self) -> impl Iterator<Item = &Key> {
        self.finders.iter()
    }
}

fn finds(fence: &ServiceFence) -> bool {
    let mut dependencies = fence.spec.dependencies.iter();
    dependencies.any(|dependency| dependency.services.is_some())
}

/// The templates of a fence's aliases, as names are compared.
fn templates(fence: Option<&ServiceFence>) -> BTreeSet<String> {
    let aliases = fence.into_iter().flat_map(|fence| &fence.spec.aliases);
    aliases.flat_map(|alias| alias.hosts.clone()).collect()
}

/// Whether a template may make a name of a Service, or that of a pod of its: then the name's first label is dropped.
fn makes(template: &str, name: &str) -> bool {
    let template = template.trim_end_matches('.');
    let of_a_pod = template.split_once('.').map(|(first, rest)| {
        // What a group stands for may have dots.
        if first.contains('$') {
            format!("${{0}}{rest}")
        } else {
            rest.to_owned()
        }
    });
    // Letters of literals are compared as DNS does; a group stands for what is in lower case already.
    let makes =
        |template: &str| can_make(template, name) || can_make(&template.to_ascii_lowercase(), name);
    makes(template) || of_a_pod.is_some_and(|template| makes(&template))
}

/// Moves a fence in an index; nothing is kept without a fence.
fn moved(
    index: &mut HashMap<String, BTreeSet<Key>>,
    key: &Key,
    before: &BTreeSet<String>,
    after: &BTreeSet<String>,
) {
    for name in before.difference(after) {
        if let Some(fences) = index.get_mut(name) {
            fences.remove(key);
            if fences.is_empty() {
                index.remove(name);
            }
        }
    }
    for name in after.difference(before) {
        index.entry(name.clone()).or_default().insert(key.clone());
    }
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
        let brings = fence(
            "shop",
            "cart",
            "{aliases: [{pattern: '(?P<svc>[^.]+).*', hosts: ['$svc-cache', 'db-0.$svc.Data', '${svc}x.bank.svc']}]}",
        );
        dependents.change(&key, Some(&finds), Some(&brings), &mesh);
        assert_eq!(dependents.finders().count(), 0);
        for (namespace, name, want) in [
            ("shop", "web-cache", 1),
            // What stands before the dot may be a pod's name.
            ("bank", "web-cache", 1),
            ("shop", "web", 0),
            ("data", "orders", 1),
            ("bank", "webx", 1),
            ("bank", "web", 1),
            ("data", "web", 1),
            ("other", "web", 0),
        ] {
            let service = Key::new(namespace, name);
            assert_eq!(
                dependents.brings(&service, &mesh).count(),
                want,
                "{service}"
            );
        }
        dependents.change(&key, Some(&brings), None, &mesh);
        assert!(dependents.by_template.is_empty());
        assert!(dependents.by_host.is_empty());
    }
}
