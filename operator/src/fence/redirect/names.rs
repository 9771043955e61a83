//! Which names are the mesh's.

use std::collections::BTreeSet;

use super::alternatives::any_of;

/// A DNS label.
const LABEL: &str = "[a-z0-9_](?:[-a-z0-9_]*[a-z0-9_])?";

/// Matches every form of a Service's name, and nothing that could be a name outside the mesh: of two labels, the second
/// must be a namespace that exists. Addresses are those of the ranges that Services have theirs from. RE2, whole string.
pub(super) fn authority_regex<'a>(
    namespaces: impl Iterator<Item = &'a str>,
    ranges: impl Iterator<Item = [u8; 2]>,
    cluster_domain: &str,
) -> String {
    let namespaces: BTreeSet<&str> = namespaces.collect();
    let domain = cluster_domain.replace('.', r"\.");
    let of_namespace = if namespaces.is_empty() {
        String::new()
    } else {
        format!(r"|\.(?:{})", any_of(&namespaces))
    };
    let ranges: BTreeSet<String> = ranges.map(|[a, b]| format!(r"{a}\.{b}")).collect();
    let addresses = if ranges.is_empty() {
        String::new()
    } else {
        let ranges = any_of(&ranges.iter().map(String::as_str).collect());
        format!(r"|(?:{ranges})\.[0-9]+\.[0-9]+")
    };
    format!(
        r"(?i)(?:{LABEL}(?:|\.{LABEL}\.svc(?:\.{domain}\.?)?{of_namespace}){addresses})(?::[0-9]+)?"
    )
}

#[cfg(test)]
mod tests {
    use super::authority_regex;
    use regex::Regex;

    fn caught(name: &str) -> bool {
        let namespaces = ["shop", "bank"].into_iter();
        let regex = authority_regex(namespaces, [[10, 96]].into_iter(), "cluster.local");
        Regex::new(&format!("^(?:{regex})$"))
            .unwrap()
            .is_match(name)
    }

    #[test]
    fn names_of_the_mesh_are_caught() {
        for name in [
            "reviews",
            "reviews:9080",
            "Reviews.shop",
            "reviews.bank:80",
            "reviews.any.svc",
            "reviews.any.svc.cluster.local",
            "reviews.any.svc.cluster.local.:9080",
            "10.96.0.7",
            "10.96.200.7:80",
        ] {
            assert!(caught(name), "{name}");
        }
    }

    #[test]
    fn names_outside_the_mesh_are_not() {
        for name in [
            "example.com",
            "api.example.com:443",
            "www.shop.com",
            "reviews.shop.example.com",
            "reviews.any.svc.other.domain",
            "10.97.0.7",
            "10.9.96.7",
            "110.96.0.7:80",
            "[fd00::7]:80",
            // Istio has no virtual host for these forms either.
            "shop.",
            "reviews.shop.",
            "",
        ] {
            assert!(!caught(name), "{name}");
        }
    }
}
