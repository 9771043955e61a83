//! What is noted on an object that is changed under the eyes of its proxies: what to put back if they refuse it, and what they refused.

use std::collections::BTreeMap;

use kube::ResourceExt;
use serde::Serialize;
use serde::de::DeserializeOwned;

/// What was in force before, as JSON: it is put back if what replaced it is refused.
const LAST_GOOD: &str = "fenceline.dev/last-good";
/// The target that was refused, in short, and why. It is not tried again.
const REFUSED: &str = "fenceline.dev/refused";
const REFUSED_WHY: &str = "fenceline.dev/refused-why";
/// An annotation may be long, but nobody reads it.
const LONGEST_WHY: usize = 1000;

/// What is noted on an object.
#[derive(Clone, Debug, Default)]
pub(crate) struct Note(BTreeMap<String, String>);

impl Note {
    /// `good` is what is in force now; where that has not arrived either, what was before it.
    pub(crate) fn good<S: Serialize, K: ResourceExt>(good: Option<&S>, stored: Option<&K>) -> Self {
        let good = good.and_then(|good| serde_json::to_string(good).ok());
        let before = || stored?.annotations().get(LAST_GOOD).cloned();
        Self(
            good.or_else(before)
                .map(|good| (LAST_GOOD.to_owned(), good))
                .into_iter()
                .collect(),
        )
    }

    pub(crate) fn refused<K: ResourceExt>(stored: Option<&K>, wanted: &str, why: &str) -> Self {
        let good = stored.and_then(|stored| stored.annotations().get_key_value(LAST_GOOD));
        let mut notes: BTreeMap<String, String> = good
            .map(|(name, good)| (name.clone(), good.clone()))
            .into_iter()
            .collect();
        notes.insert(REFUSED.to_owned(), wanted.to_owned());
        notes.insert(
            REFUSED_WHY.to_owned(),
            why.chars().take(LONGEST_WHY).collect(),
        );
        Self(notes)
    }

    pub(crate) fn annotations(&self) -> Option<BTreeMap<String, String>> {
        (!self.0.is_empty()).then(|| self.0.clone())
    }
}

/// What was in force before this object was written.
pub(crate) fn last_good<S: DeserializeOwned>(stored: &impl ResourceExt) -> Option<S> {
    serde_json::from_str(stored.annotations().get(LAST_GOOD)?).ok()
}

/// Why what is wanted was refused and taken back, if it was.
pub(crate) fn refused(stored: &impl ResourceExt, wanted: &str) -> Option<String> {
    let notes = stored.annotations();
    notes.get(REFUSED).filter(|mark| *mark == wanted)?;
    Some(notes.get(REFUSED_WHY).cloned().unwrap_or_default())
}
