//! The patches of redirects: large, and the same for thousands of fences, so there is one copy of each.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use fenceline_crds::istio::Patches;

use super::World;
use crate::fence::Settings;
use crate::fence::redirect::Purpose;

/// How many different ones of the watch are kept for comparison.
const SEEN: usize = 8;

/// Shared by every snapshot of the world.
#[derive(Clone, Debug, Default)]
pub(super) struct Redirects(Arc<Mutex<Known>>);

#[derive(Debug, Default)]
struct Known {
    /// What the made ones are made from.
    from: Option<Basis>,
    made: HashMap<Purpose, Patches>,
    /// What the watch showed, the latest first.
    seen: Vec<Patches>,
}

#[derive(Debug)]
struct Basis {
    namespaces: super::Namespaces,
    ranges: super::Ranges,
    settings: Settings,
}

impl Basis {
    fn is(&self, world: &World, settings: &Settings) -> bool {
        self.namespaces.ptr_eq(&world.namespaces)
            && self.ranges.ptr_eq(&world.service_ranges)
            && self.settings == *settings
    }
}

impl World {
    /// The patches for a purpose; made where nothing that they depend on is as it was: the namespaces, the
    /// addresses of Services, and the installation.
    pub fn patches(
        &self,
        settings: &Settings,
        purpose: Purpose,
        make: impl FnOnce() -> Vec<serde_json::Value>,
    ) -> Patches {
        let mut known = self
            .redirects
            .0
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if !known
            .from
            .as_ref()
            .is_some_and(|from| from.is(self, settings))
        {
            known.made.clear();
            known.from = Some(Basis {
                namespaces: self.namespaces.clone(),
                ranges: self.service_ranges.clone(),
                settings: settings.clone(),
            });
        }
        let made = known.made.entry(purpose).or_insert_with(|| make().into());
        made.clone()
    }

    /// The same patches, as the copy that is there already.
    pub(super) fn one_copy(&self, patches: &mut Patches) {
        let mut known = self
            .redirects
            .0
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let mut there = known.made.values().chain(&known.seen);
        if let Some(same) = there.find(|same| *same == patches) {
            *patches = same.clone();
            return;
        }
        known.seen.insert(0, patches.clone());
        known.seen.truncate(SEEN);
    }
}
