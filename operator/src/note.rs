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
/// What was in force before was too long to be kept: so many bytes.
const LEFT_OUT: &str = "fenceline.dev/last-good-left-out";
/// All annotations of an object have 256 KiB, and those of others are among them.
/// (apimachinery, `TotalAnnotationSizeLimitB`)
const LONGEST_GOOD: usize = 200 << 10;
/// An annotation may be long, but nobody reads it.
const LONGEST_WHY: usize = 1000;

/// What is noted on an object.
#[derive(Clone, Debug, Default)]
pub(crate) struct Note(BTreeMap<String, String>);

impl Note {
    /// `good` is what is in force now; where that has not arrived either, what was before it.
    pub(crate) fn good<S: Serialize, K: ResourceExt>(good: Option<&S>, stored: Option<&K>) -> Self {
        let note = match good.and_then(|good| serde_json::to_string(good).ok()) {
            Some(good) if good.len() > LONGEST_GOOD => {
                Some((LEFT_OUT.to_owned(), good.len().to_string()))
            }
            Some(good) => Some((LAST_GOOD.to_owned(), good)),
            None => stored.and_then(before),
        };
        Self(note.into_iter().collect())
    }

    pub(crate) fn refused<K: ResourceExt>(stored: Option<&K>, wanted: &str, why: &str) -> Self {
        let mut notes: BTreeMap<String, String> = stored.and_then(before).into_iter().collect();
        notes.insert(REFUSED.to_owned(), wanted.to_owned());
        let why = why.chars().take(LONGEST_WHY);
        notes.insert(REFUSED_WHY.to_owned(), why.collect());
        Self(notes)
    }

    pub(crate) fn annotations(&self) -> Option<BTreeMap<String, String>> {
        (!self.0.is_empty()).then(|| self.0.clone())
    }
}

/// What an object notes of what was in force before it.
fn before<K: ResourceExt>(stored: &K) -> Option<(String, String)> {
    let notes = [LAST_GOOD, LEFT_OUT].into_iter();
    let mut notes = notes.filter_map(|name| stored.annotations().get_key_value(name));
    let (name, good) = notes.next()?;
    Some((name.clone(), good.clone()))
}

/// That what was in force before could not be kept, if so, for people.
pub(crate) fn left_out(stored: &impl ResourceExt) -> Option<String> {
    let bytes: usize = stored.annotations().get(LEFT_OUT)?.parse().ok()?;
    Some(format!(
        "what was in force before has {} KiB, was not kept, since {} KiB is the most, and so cannot be put back; what harms nobody is in force instead",
        bytes.div_ceil(1024),
        LONGEST_GOOD >> 10
    ))
}

/// What was in force before this object was written.
pub(crate) fn last_good<S: DeserializeOwned>(stored: &impl ResourceExt) -> Option<S> {
    serde_json::from_str(stored.annotations().get(LAST_GOOD)?).ok()
}

/// Why what is wanted was refused and taken back, if it was.
pub(crate) fn refused(stored: &impl ResourceExt, wanted: &str) -> Option<String> {
    let notes = stored.annotations();
    notes.get(REFUSED).filter(|mark| *mark == wanted)?;
    let why = notes.get(REFUSED_WHY).cloned().unwrap_or_default();
    Some(match left_out(stored) {
        Some(left_out) => format!("{why}; {left_out}"),
        None => why,
    })
}

#[cfg(test)]
mod tests {
    use fenceline_crds::istio::EnvoyFilter;

    use super::*;

    fn noted(note: &Note) -> EnvoyFilter {
        let mut object = EnvoyFilter::new("ours", Default::default());
        object.metadata.annotations = note.annotations();
        object
    }

    #[test]
    fn what_is_too_long_to_be_kept_is_left_out_and_said() {
        // As JSON it has two quotation marks more.
        let good = "x".repeat(LONGEST_GOOD - 2);
        let just = noted(&Note::good(Some(&good), None::<&EnvoyFilter>));
        assert_eq!(last_good(&just), Some(good.clone()));
        assert_eq!(left_out(&just), None);
        let more = good + "x";
        let over = noted(&Note::good(Some(&more), Some(&just)));
        assert_eq!(last_good::<String>(&over), None, "neither what is older");
        assert!(over.annotations().values().map(String::len).sum::<usize>() < 100);
        let said = left_out(&over).unwrap();
        assert!(
            said.contains("201 KiB") && said.contains("200 KiB is the most"),
            "{said}"
        );
        // It stays said for as long as nothing else is good.
        let refused = noted(&Note::refused(Some(&over), "mark", "no"));
        let why = super::refused(&refused, "mark").unwrap();
        assert!(why.starts_with("no; what was in force before"), "{why}");
        let again = noted(&Note::good(None::<&String>, Some(&over)));
        assert_eq!(left_out(&again), Some(said));
        let small = noted(&Note::good(Some(&"y".to_owned()), Some(&over)));
        assert_eq!(last_good(&small), Some("y".to_owned()));
        assert_eq!(left_out(&small), None);
    }
}
