//! Aliases: which other hosts go with certain hosts. A pattern is compiled once, however often a fence is planned, and within
//! bounds: whoever writes one must not cost everybody else's fences their turn.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, PoisonError};

use fenceline_crds::Alias;
use regex::bytes::{Regex, RegexBuilder};

/// Bytes that a compiled pattern may have. Host names are ASCII, so that no class of Unicode's is needed: those alone took megabytes.
const PATTERN_BYTES: usize = 64 << 10;
/// Patterns that are kept compiled, of all fences and policies: 32 MiB if each were of the greatest size, half of it for the tables
/// that matching fills.
const KEPT: usize = 256;
/// How many names the aliases of one fence may bring into its scope. Those over it are reached by first calls, as any other host.
pub(super) const NAMES: usize = 1000;
/// The longest name that DNS has.
const LONGEST: usize = 253;

/// An alias, read.
pub struct Rule {
    pattern: Arc<Regex>,
    /// Those of its templates that mean something.
    templates: Vec<String>,
}

/// What the aliases of a fence bring.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Implied {
    /// Names, each with the first alias that brings it; as templates write them, so that they may be short ones.
    pub names: Vec<(usize, String)>,
    /// Why the others bring none, by field.
    pub wrong: Vec<String>,
    /// Whether there were more than [`NAMES`].
    pub more: bool,
}

type Compiled = Result<Arc<Regex>, String>;

/// What patterns were compiled to. The same one stands in each fence of a policy, and is planned with again and again.
static COMPILED: Mutex<Option<HashMap<String, Compiled>>> = Mutex::new(None);

/// Reads an alias. What is wrong with it comes beside what is not, each text beginning with the field within the alias.
pub fn read(alias: &Alias) -> (Option<Rule>, Vec<String>) {
    let pattern = match compiled(&alias.pattern) {
        Ok(pattern) => pattern,
        Err(why) => return (None, vec![format!(".pattern: {why}")]),
    };
    let mut wrong = Vec::new();
    let mut templates = Vec::new();
    for (index, template) in alias.hosts.iter().enumerate() {
        let unknown = references(template)
            .into_iter()
            .find(|group| !has_group(&pattern, group));
        match unknown {
            None => templates.push(template.clone()),
            Some(group) => wrong.push(format!(".hosts[{index}]: the pattern has no group {group}")),
        }
    }
    (Some(Rule { pattern, templates }), wrong)
}

/// The names that go with those that are `known`.
pub(super) fn implied(aliases: &[Alias], known: &BTreeSet<String>) -> Implied {
    let mut implied = Implied::default();
    let mut seen = BTreeSet::new();
    for (index, alias) in aliases.iter().enumerate() {
        let (rule, wrong) = read(alias);
        let wrong = wrong.into_iter();
        implied
            .wrong
            .extend(wrong.map(|why| format!("spec.aliases[{index}]{why}")));
        let Some(rule) = rule else { continue };
        let mut too_long = false;
        let found = known.iter();
        for found in found.filter_map(|host| rule.pattern.captures(host.as_bytes())) {
            for template in &rule.templates {
                let mut name = Vec::new();
                found.expand(template.as_bytes(), &mut name);
                if name.len() > LONGEST {
                    too_long = true;
                    continue;
                }
                let name = String::from_utf8_lossy(&name).into_owned();
                if seen.contains(&name) {
                    continue;
                }
                if seen.len() == NAMES {
                    implied.more = true;
                    return implied;
                }
                seen.insert(name.clone());
                implied.names.push((index, name));
            }
        }
        if too_long {
            let why =
                format!("spec.aliases[{index}].hosts: a name of more than {LONGEST} characters");
            implied.wrong.push(why);
        }
    }
    implied
}

fn compiled(pattern: &str) -> Compiled {
    let lock = || COMPILED.lock().unwrap_or_else(PoisonError::into_inner);
    let known = lock().as_ref().and_then(|all| all.get(pattern).cloned());
    if let Some(known) = known {
        return known;
    }
    // Not under the lock: others' patterns do not wait for this one.
    let compiled = compile(pattern).map(Arc::new);
    let mut all = lock();
    let all = all.get_or_insert_default();
    if all.len() >= KEPT {
        all.clear();
    }
    all.insert(pattern.to_owned(), compiled.clone());
    compiled
}

/// # Errors
/// Says in one line why it is no pattern.
fn compile(pattern: &str) -> Result<Regex, String> {
    let build = |pattern: &str| {
        RegexBuilder::new(pattern)
            .unicode(false)
            .size_limit(PATTERN_BYTES)
            .dfa_size_limit(PATTERN_BYTES)
            .build()
            .map_err(|error| in_one_line(&error))
    };
    // By itself first: parentheses must not close those around it.
    build(pattern)?;
    build(&format!("^(?:{pattern})$"))
}

fn in_one_line(error: &regex::Error) -> String {
    let text = error.to_string();
    let last = text.lines().last().unwrap_or_default().trim();
    last.strip_prefix("error: ").unwrap_or(last).to_owned()
}

/// A template's piece: what stands there, or what a group of the pattern found.
#[derive(Debug, PartialEq, Eq)]
enum Piece<'a> {
    Text(&'a str),
    Group(&'a str),
}

/// The pieces of a template, by the rules of [`regex::bytes::Captures::expand`].
fn pieces(template: &str) -> Vec<Piece<'_>> {
    let mut pieces = Vec::new();
    let mut rest = template;
    while let Some(dollar) = rest.find('$') {
        let (before, after) = rest.split_at(dollar);
        let after = &after[1..];
        pieces.push(Piece::Text(before));
        let is_of_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
        let braced = after
            .strip_prefix('{')
            .and_then(|name| name.split_once('}'));
        let end = after.find(|c| !is_of_name(c)).unwrap_or(after.len());
        if let Some((name, behind)) = braced {
            pieces.push(Piece::Group(name));
            rest = behind;
        } else if end > 0 {
            pieces.push(Piece::Group(&after[..end]));
            rest = &after[end..];
        } else {
            pieces.push(Piece::Text("$"));
            rest = after.strip_prefix('$').unwrap_or(after);
        }
    }
    pieces.push(Piece::Text(rest));
    pieces.retain(|piece| *piece != Piece::Text(""));
    pieces
}

fn references(template: &str) -> Vec<&str> {
    let groups = pieces(template)
        .into_iter()
        .filter_map(|piece| match piece {
            Piece::Group(name) => Some(name),
            Piece::Text(_) => None,
        });
    groups.collect()
}

fn has_group(pattern: &Regex, name: &str) -> bool {
    match name.parse::<usize>() {
        Ok(number) => number < pattern.captures_len(),
        Err(_) => pattern.capture_names().flatten().any(|group| group == name),
    }
}

/// What names a template can make, without regard to what its groups can be: `false` only where it never makes this one.
pub(crate) fn can_make(template: &str, name: &str) -> bool {
    let pieces = pieces(template);
    let is_open = |piece: Option<&Piece<'_>>| matches!(piece, Some(Piece::Group(_)));
    let mut texts: Vec<&str> = pieces
        .iter()
        .filter_map(|piece| match piece {
            Piece::Text(text) => Some(*text),
            Piece::Group(_) => None,
        })
        .collect();
    if !pieces.iter().any(|piece| is_open(Some(piece))) {
        return texts.concat() == name;
    }
    let mut rest = name;
    if !is_open(pieces.first()) {
        match rest.strip_prefix(texts.remove(0)) {
            Some(behind) => rest = behind,
            None => return false,
        }
    }
    if !is_open(pieces.last()) {
        match texts.pop().and_then(|end| rest.strip_suffix(end)) {
            Some(before) => rest = before,
            None => return false,
        }
    }
    for text in texts {
        match rest.find(text) {
            Some(at) => rest = &rest[at + text.len()..],
            None => return false,
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn alias(pattern: &str, hosts: &[&str]) -> Alias {
        Alias {
            pattern: pattern.to_owned(),
            hosts: hosts.iter().map(|host| (*host).to_owned()).collect(),
        }
    }

    fn known(count: usize) -> BTreeSet<String> {
        let names = 0..count;
        names
            .map(|number| format!("svc-{number}.shop.svc.cluster.local"))
            .collect()
    }

    #[test]
    fn what_is_wrong_is_said_by_field_in_one_line() {
        for (pattern, template, want) in [
            ("(", "x", ".pattern: unclosed group"),
            ("a)|(b", "x", ".pattern: unopened group"),
            (
                r"(\w{50}){50}",
                "x",
                ".pattern: Compiled regex exceeds size limit of 65536 bytes.",
            ),
            (r"\p{Greek}", "x", ".pattern: Unicode not allowed here"),
            (
                "(?P<svc>.*)",
                "$name",
                ".hosts[0]: the pattern has no group name",
            ),
            (
                "(?P<svc>.*)",
                "$svc_cache",
                ".hosts[0]: the pattern has no group svc_cache",
            ),
            (
                "(?P<svc>.*)",
                "${2}.x",
                ".hosts[0]: the pattern has no group 2",
            ),
        ] {
            let (_, wrong) = read(&alias(pattern, &[template]));
            assert_eq!(wrong, [want], "{pattern} {template}");
        }
        let (rule, wrong) = read(&alias(
            "(?P<svc>[^.]+)[.](.*)",
            &["$svc-a", "${svc}x", "$0", "$2", "$$"],
        ));
        assert!(wrong.is_empty() && rule.is_some(), "{wrong:?}");
    }

    #[test]
    fn many_names_are_cut_and_said() {
        let at = implied(&[alias(".*", &["x-$0"])], &known(NAMES));
        assert_eq!((at.names.len(), at.more), (NAMES, false));
        let over = implied(&[alias(".*", &["x-$0"])], &known(NAMES + 1));
        assert_eq!((over.names.len(), over.more), (NAMES, true));
        // One name from many hosts is one name.
        let same = implied(&[alias(".*", &["x"])], &known(NAMES + 1));
        assert_eq!((same.names.len(), same.more), (1, false));
        let long = implied(&[alias(".*", &["$0".repeat(20).as_str()])], &known(100));
        assert_eq!(
            long.wrong,
            ["spec.aliases[0].hosts: a name of more than 253 characters"]
        );
        assert!(long.names.is_empty());
    }

    proptest! {
        /// Whatever aliases and hosts there are: no more names than the bound, and no remark for each host.
        #[test]
        fn remarks_do_not_grow_with_the_mesh(
            patterns in prop::collection::vec("[a-z.*()]{1,6}", 1..10),
            templates in prop::collection::vec("[a-z$0-9.{}]{1,12}", 1..10),
            hosts in 0_usize..1500,
        ) {
            let templates: Vec<&str> = templates.iter().map(String::as_str).collect();
            let aliases: Vec<Alias> = patterns.iter().map(|of| alias(of, &templates)).collect();
            let implied = implied(&aliases, &known(hosts));
            prop_assert!(implied.names.len() <= NAMES);
            prop_assert!(implied.wrong.len() <= aliases.len() * (templates.len() + 1));
            for (_, name) in &implied.names {
                prop_assert!(templates.iter().any(|template| can_make(template, name)), "{}", name);
            }
        }
    }
}
