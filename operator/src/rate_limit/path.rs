//! Paths without their query strings. Envoy's `:path` has both, so that a pattern for the path must neither match a `?` nor care what
//! comes behind one.

use regex::escape;
use regex_syntax::hir::{Class, ClassUnicode, ClassUnicodeRange, Hir, HirKind};

/// Begins the query string.
const QUERY: char = '?';
/// What a path may have: no spaces, no control characters, and no query string.
const ASCII: [(char, char); 2] = [('!', '>'), ('@', '~')];
/// Bytes beyond ASCII, as Envoy's RE2 reads them: each by itself.
const BEYOND: Range = ('\u{80}', '\u{ff}');
type Range = (char, char);
/// Any query string, or none.
const ANY_QUERY: &str = r"(?:\?.*)?";

/// A regular expression for `:path` that is for exactly this path.
///
/// # Errors
/// Says why no path is like this.
pub(super) fn exact(path: &str) -> Result<String, String> {
    plain(path)?;
    Ok(format!("{}{ANY_QUERY}", escape(path)))
}

/// The prefix, which no query string can fit.
///
/// # Errors
/// Says why no path begins like this.
pub(super) fn prefix(path: &str) -> Result<&str, String> {
    plain(path)?;
    Ok(path)
}

fn plain(path: &str) -> Result<(), String> {
    if !path.starts_with('/') {
        return Err("a path begins with /".to_owned());
    }
    if path.contains([QUERY, '#']) {
        return Err("a path has no query string: match it with `query`".to_owned());
    }
    Ok(())
}

/// A regular expression for `:path` whose path, all of it, fits `pattern`.
///
/// # Errors
/// Says what is wrong with the pattern.
pub(super) fn regex(pattern: &str) -> Result<String, String> {
    let hir = regex_syntax::parse(pattern).map_err(|error| last_line(&error.to_string()))?;
    let hir = without_query(hir)?;
    let pattern: String = hir.to_string().chars().map(written).collect();
    Ok(format!("(?:{pattern}){ANY_QUERY}"))
}

/// A character as RE2 reads it: the printer writes what is beyond ASCII as it is, and control characters too, which no YAML may have.
fn written(character: char) -> String {
    match character {
        ' '..='~' => character.to_string(),
        other => format!("\\x{{{:x}}}", u32::from(other)),
    }
}

/// The parser draws a picture of the pattern; the reason comes last.
fn last_line(text: &str) -> String {
    let last = text.lines().last().unwrap_or(text);
    last.trim_start_matches("error: ").to_owned()
}

/// The same expression, but for texts with a `?`.
fn without_query(hir: Hir) -> Result<Hir, String> {
    Ok(match hir.into_kind() {
        HirKind::Empty => Hir::empty(),
        HirKind::Look(look) => Hir::look(look),
        HirKind::Literal(literal) => {
            if literal.0.contains(&b'?') {
                return Err("a path has no query string: match it with `query`".to_owned());
            }
            // Byte by byte.
            let bytes: String = literal.0.iter().map(|byte| char::from(*byte)).collect();
            Hir::literal(bytes.into_bytes())
        }
        HirKind::Class(Class::Unicode(class)) => Hir::class(Class::Unicode(of_bytes(class)?)),
        // Only where a pattern switches Unicode off.
        HirKind::Class(Class::Bytes(_)) => return Err("(?-u) is not known here".to_owned()),
        HirKind::Repetition(mut repetition) => {
            repetition.sub = Box::new(without_query(*repetition.sub)?);
            Hir::repetition(repetition)
        }
        HirKind::Capture(capture) => without_query(*capture.sub)?,
        HirKind::Concat(parts) => Hir::concat(each(parts)?),
        HirKind::Alternation(parts) => Hir::alternation(each(parts)?),
    })
}

/// The same class of what a path may have: of what is beyond ASCII, all or nothing.
fn of_bytes(class: ClassUnicode) -> Result<ClassUnicode, String> {
    let range = |(first, last): Range| ClassUnicodeRange::new(first, last);
    let beyond = ClassUnicode::new([range(('\u{80}', char::MAX))]);
    let mut of_beyond = class.clone();
    of_beyond.intersect(&beyond);
    let mut ascii = class;
    ascii.intersect(&ClassUnicode::new(ASCII.map(range)));
    if of_beyond == beyond {
        ascii.push(range(BEYOND));
    } else if !of_beyond.ranges().is_empty() {
        return Err("what is beyond ASCII stands percent-encoded in a path".to_owned());
    }
    Ok(ascii)
}

fn each(parts: Vec<Hir>) -> Result<Vec<Hir>, String> {
    parts.into_iter().map(without_query).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use regex::Regex;

    /// As Envoy does: the whole of `:path`, byte by byte.
    fn fits(pattern: &str, path: &str) -> bool {
        let bytes: String = path.bytes().map(char::from).collect();
        let whole = format!("^(?:{pattern})$");
        Regex::new(&whole).unwrap().is_match(&bytes)
    }

    #[test]
    fn the_query_string_is_no_part_of_the_path() {
        let search = exact("/search").unwrap();
        for path in ["/search", "/search?", "/search?q=/other?x"] {
            assert!(fits(&search, path), "{path}");
        }
        for path in ["/searching", "/a?q=/search", "/search/x"] {
            assert!(!fits(&search, path), "{path}");
        }
        let users = regex("/users/[^/]+(/posts)?").unwrap();
        for path in ["/users/ann", "/users/ann?x=/y", "/users/ann/posts?page=2"] {
            assert!(fits(&users, path), "{path}: {users}");
        }
        for path in [
            "/users/?x=ann",
            "/users/ann/likes?x=/posts",
            "/x?p=/users/ann",
        ] {
            assert!(!fits(&users, path), "{path}: {users}");
        }
        let anything = regex("/a.*z").unwrap();
        assert!(
            fits(&anything, "/abz?q") && !fits(&anything, "/ab?z"),
            "{anything}"
        );
    }

    #[test]
    fn what_is_no_path_is_said() {
        assert!(exact("search").unwrap_err().contains("begins with /"));
        assert!(prefix("/search?q=").unwrap_err().contains("query string"));
        assert!(
            regex(r"/search\?q=.*")
                .unwrap_err()
                .contains("query string")
        );
        assert_eq!(regex("/a(b").unwrap_err(), "unclosed group");
    }

    /// Envoy's RE2 reads bytes, and knows no `\u{…}`.
    #[test]
    fn the_pattern_is_one_that_re2_knows() {
        let printed = regex("/[^a-z/]{2,3}/.+").unwrap();
        assert!(!printed.contains(r"\u"), "{printed}");
        assert!(
            printed.is_ascii() && !printed.contains(char::is_control),
            "{printed}"
        );
        assert!(fits(&printed, "/ÄB/é"), "{printed}");
        assert!(fits(&regex("/é+").unwrap(), "/éé"));
        assert!(regex("/[à-ü]").unwrap_err().contains("percent-encoded"));
        assert!(
            !printed.contains("{100}") && !printed.contains("x{fff"),
            "{printed}"
        );
    }
}
