//! Objects of many owners made into one: the first that has a field sets it.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Map, Value};

/// Of these fields Istio allows one: who sets one of them sets which.
const ONE_OF: [[&str; 2]; 1] = [["loadBalancer.simple", "loadBalancer.consistentHash"]];

/// These are taken as a whole: parts of two owners' would be nobody's.
const WHOLE: [&str; 4] = [
    "tls",
    "loadBalancer.consistentHash",
    "fault.delay",
    "fault.abort",
];

/// What came of it.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Merged {
    pub fields: Map<String, Value>,
    /// Each field, by its path, with who set it.
    pub winners: BTreeMap<String, String>,
    /// Each field that somebody would have set, with who would have, and who did.
    pub losers: BTreeSet<(String, String, String)>,
}

/// Merges objects, each with its owner, the one that wins first.
pub(super) fn merge(parts: impl Iterator<Item = (String, Map<String, Value>)>) -> Merged {
    let mut merged = Merged::default();
    for (owner, part) in parts {
        let mut fields = std::mem::take(&mut merged.fields);
        take(&mut fields, part, "", &owner, &mut merged);
        merged.fields = fields;
    }
    merged
}

fn take(
    into: &mut Map<String, Value>,
    part: Map<String, Value>,
    path: &str,
    owner: &str,
    merged: &mut Merged,
) {
    for (name, value) in part {
        let path = if path.is_empty() {
            name.clone()
        } else {
            format!("{path}.{name}")
        };
        let whole = WHOLE.contains(&path.as_str());
        match (value, into.get_mut(&name)) {
            (Value::Object(value), Some(Value::Object(have))) if !whole => {
                take(have, value, &path, owner, merged);
            }
            (Value::Object(value), None) if !whole => {
                let mut have = Map::new();
                take(&mut have, value, &path, owner, merged);
                if !have.is_empty() {
                    into.insert(name, have.into());
                }
            }
            (value, None) => match rival(&path, merged) {
                Some(winner) => lose(path, owner, winner, merged),
                None => {
                    merged.winners.insert(path, owner.to_owned());
                    into.insert(name, value);
                }
            },
            (value, Some(have)) => {
                // To want the same is not to lose.
                if *have != value {
                    let winner = set_by(&path, merged);
                    lose(path, owner, winner, merged);
                }
            }
        }
    }
}

fn lose(path: String, owner: &str, winner: String, merged: &mut Merged) {
    merged.losers.insert((path, owner.to_owned(), winner));
}

/// Who set a field, or something within it.
fn set_by(path: &str, merged: &Merged) -> String {
    let within = format!("{path}.");
    let mut winners = merged.winners.iter();
    let winner = winners.find(|(field, _)| *field == path || field.starts_with(&within));
    winner.map(|(_, owner)| owner.clone()).unwrap_or_default()
}

/// Who set another field of which Istio allows one.
fn rival(path: &str, merged: &Merged) -> Option<String> {
    let line = ONE_OF.iter().find(|line| line.contains(&path))?;
    let mut others = line.iter().filter(|other| **other != path);
    others.find_map(|other| merged.winners.get(*other).cloned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::yaml;
    use proptest::prelude::*;
    use serde_json::json;

    fn merged(parts: &[(&str, &str)]) -> Merged {
        let parts = parts
            .iter()
            .map(|(owner, part)| ((*owner).to_owned(), yaml(part)));
        merge(parts)
    }

    #[test]
    fn field_by_field() {
        let merged = merged(&[
            ("first", "{timeout: 2s, retries: {attempts: 3}}"),
            (
                "second",
                "{timeout: 5s, retries: {attempts: 3, retryOn: reset}, mirrors: [{a: 1}]}",
            ),
            ("third", "{mirrors: [{b: 1}]}"),
        ]);
        let fields = json!({"timeout": "2s", "retries": {"attempts": 3, "retryOn": "reset"}, "mirrors": [{"a": 1}]});
        assert_eq!(Value::from(merged.fields), fields);
        let lost = |field: &str, loser: &str, winner: &str| {
            (field.to_owned(), loser.to_owned(), winner.to_owned())
        };
        let losers = [
            lost("mirrors", "third", "second"),
            lost("timeout", "second", "first"),
        ];
        assert_eq!(merged.losers, losers.into());
        assert_eq!(merged.winners["retries.retryOn"], "second");
    }

    #[test]
    fn of_what_excludes_each_other_the_first_stands() {
        let merged = merged(&[
            (
                "first",
                "{loadBalancer: {simple: LEAST_REQUEST}, tls: {mode: SIMPLE}}",
            ),
            (
                "second",
                "{loadBalancer: {consistentHash: {useSourceIp: true}, warmup: {duration: 30s}}, tls: {mode: MUTUAL, sni: a}}",
            ),
        ]);
        let fields = json!({"loadBalancer": {"simple": "LEAST_REQUEST", "warmup": {"duration": "30s"}}, "tls": {"mode": "SIMPLE"}});
        assert_eq!(Value::from(merged.fields), fields);
        assert_eq!(merged.losers.len(), 2);
    }

    proptest! {
        /// Each field comes from the first that has it, and everybody else hears of it.
        #[test]
        fn nobody_is_overwritten(parts in proptest::collection::vec(proptest::collection::btree_map("[a-c]", 0..3_u8, 0..3), 0..5)) {
            let named = |index: usize| format!("owner-{index}");
            let merged = merge(parts.iter().enumerate().map(|(index, part)| {
                let part = part.iter().map(|(field, value)| (field.clone(), json!({"x": value})));
                (named(index), part.collect())
            }));
            for (index, part) in parts.iter().enumerate() {
                for (field, value) in part {
                    let first = parts.iter().position(|part| part.contains_key(field)).unwrap_or_default();
                    let path = format!("{field}.x");
                    prop_assert_eq!(&merged.fields[field]["x"], &json!(parts[first][field]));
                    prop_assert_eq!(&merged.winners[&path], &named(first));
                    let lost = (path, named(index), named(first));
                    prop_assert_eq!(merged.losers.contains(&lost), parts[first][field] != *value);
                }
            }
        }
    }
}
