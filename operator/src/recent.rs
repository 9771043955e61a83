//! Objects that we wrote and that the watch may not have shown yet.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use kube::Resource;

use crate::status::is_newer;
use crate::world::Key;

/// How long the watch may take to show an object that is new.
const SHOWN_WITHIN: Duration = Duration::from_secs(2);

/// The objects of a kind that we wrote and that the watch may not have shown yet: a step must not be taken back because it is
/// not known of, nor anything written twice.
#[derive(Debug)]
pub(crate) struct Recent<K>(Mutex<HashMap<Key, (Instant, Arc<K>)>>);

impl<K> Default for Recent<K> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<K: Resource> Recent<K> {
    /// The newest object known here, where `seen` is what the watch shows.
    pub(crate) fn newest(&self, key: &Key, seen: Option<&Arc<K>>) -> Option<Arc<K>> {
        let mut recent = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match recent.get(key) {
            Some((at, written)) => {
                let unseen = match seen {
                    Some(seen) => is_newer(written.as_ref(), seen.as_ref()),
                    None => at.elapsed() < SHOWN_WITHIN,
                };
                if unseen {
                    return Some(Arc::clone(written));
                }
                recent.remove(key);
                seen.cloned()
            }
            None => seen.cloned(),
        }
    }

    pub(crate) fn wrote(&self, key: &Key, object: K) {
        let mut recent = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        recent.insert(key.clone(), (Instant::now(), Arc::new(object)));
    }

    pub(crate) fn removed(&self, key: &Key) {
        let mut recent = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        recent.remove(key);
    }
}
