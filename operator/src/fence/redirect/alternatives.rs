//! A regular expression for many names that is not much longer than it must be: what names begin with in common is written
//! once. It is in each route of the redirect, which every proxy has on each port.

use std::collections::BTreeSet;

/// Fits these names and no others. They are DNS labels: nothing in them has a meaning of its own.
pub(super) fn any_of(names: &BTreeSet<&str>) -> String {
    let names: Vec<&str> = names.iter().copied().collect();
    node(&names)
}

/// `names` are sorted, and each is there once.
fn node(names: &[&str]) -> String {
    let [first, .., last] = names else {
        return names.concat();
    };
    // Of sorted names the first and the last differ the most.
    let common = first.bytes().zip(last.bytes()).take_while(|(a, b)| a == b);
    let (prefix, _) = first.split_at(common.count());
    let rests: Vec<&str> = names.iter().map(|name| &name[prefix.len()..]).collect();
    let (optional, rests) = match rests.split_first() {
        Some((&"", rests)) => ("?", rests),
        _ => ("", &*rests),
    };
    let groups: Vec<String> = rests
        .chunk_by(|a, b| a.as_bytes()[0] == b.as_bytes()[0])
        .map(node)
        .collect();
    let (single, longer): (Vec<&String>, Vec<&String>) =
        groups.iter().partition(|group| group.len() == 1);
    let mut alternatives: Vec<String> = longer.into_iter().cloned().collect();
    match &*single {
        [] => {}
        [one] => alternatives.push((*one).clone()),
        // A dash stands last, where it is no range.
        many => {
            let dash = many.iter().any(|one| *one == "-");
            let others: String = many
                .iter()
                .filter(|one| **one != "-")
                .map(|one| one.as_str())
                .collect();
            alternatives.push(format!("[{others}{}]", if dash { "-" } else { "" }));
        }
    }
    match &*alternatives {
        [one] if optional.is_empty() || one.len() == 1 => format!("{prefix}{one}{optional}"),
        many => format!("{prefix}(?:{}){optional}", many.join("|")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use regex::Regex;

    #[test]
    fn what_is_common_is_written_once() {
        let of = |names: &[&str]| any_of(&names.iter().copied().collect());
        assert_eq!(of(&["shop"]), "shop");
        assert_eq!(
            of(&["team-1", "team-2", "team-13", "bank"]),
            "(?:bank|team-(?:13?|2))"
        );
        assert_eq!(of(&["a", "b", "c"]), "[abc]");
        assert_eq!(of(&["shop", "shop-a"]), "shop(?:-a)?");
        let hundred: Vec<String> = (0..100).map(|number| format!("team-{number}")).collect();
        let hundred: BTreeSet<&str> = hundred.iter().map(String::as_str).collect();
        assert!(any_of(&hundred).len() < 250, "{}", any_of(&hundred));
    }

    proptest! {
        #[test]
        fn the_same_names_as_one_by_one(
            names in proptest::collection::btree_set("[a-c]([a-c-]{0,4}[a-c])?", 1..12),
            others in proptest::collection::vec("[a-c-]{0,6}", 8),
        ) {
            let names: BTreeSet<&str> = names.iter().map(String::as_str).collect();
            let short = Regex::new(&format!("^(?:{})$", any_of(&names))).unwrap();
            for name in names.iter().copied().chain(others.iter().map(String::as_str)) {
                prop_assert_eq!(short.is_match(name), names.contains(name), "{} in {}", name, short);
            }
        }
    }
}
