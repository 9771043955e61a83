//! Whose field the API refuses: it names those of our objects, which nobody here has written.

use crate::patch::Outcome;

/// The first field of Istio's objects in a refusal that a patch sets, as `TrafficPatch NAME: spec.http.timeout`.
pub(super) fn field(refusal: &str, outcome: &Outcome) -> Option<String> {
    refusal.split_whitespace().find_map(|word| {
        let (kind, path) = place(word.trim_matches([':', ',', '[', ']']))?;
        outcome.won.iter().find_map(|(patch, fields)| {
            fields.iter().find_map(|won| {
                // As `http[main/v1].timeout`.
                let (whole, own) = won.split_once("].").or_else(|| won.split_once('.'))?;
                let same = whole.starts_with(kind) && (within(own, path) || within(path, own));
                same.then(|| format!("TrafficPatch {patch}: spec.{kind}.{own}"))
            })
        })
    })
}

/// The part of a patch that a field of ours is made from, and the field in it: `spec.http[0].timeout` is `http` and `timeout`.
fn place(word: &str) -> Option<(&'static str, &str)> {
    if let Some(of_route) = word.strip_prefix("spec.http[") {
        return Some(("http", of_route.split_once("].")?.1));
    }
    if let Some(of_host) = word.strip_prefix("spec.trafficPolicy.") {
        return Some(("destination", of_host));
    }
    let of_subset = word.strip_prefix("spec.subsets[")?;
    let policy = of_subset.split_once("].trafficPolicy.")?.1;
    Some(("destination", policy))
}

/// Whether a field is another, or stands in it.
fn within(field: &str, other: &str) -> bool {
    let rest = field.strip_prefix(other);
    rest.is_some_and(|rest| rest.is_empty() || rest.starts_with(['.', '[']))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_patch_that_set_it() {
        let mut outcome = Outcome::default();
        for (patch, field) in [
            ("slow", "http[main].timeout"),
            ("again", "http.retries.attempts"),
            ("pool", "destination[main/v1].connectionPool.tcp"),
        ] {
            let fields = outcome.won.entry(patch.to_owned()).or_default();
            fields.insert(field.to_owned());
        }
        let named = |refusal: &str| field(refusal, &outcome);
        assert_eq!(
            named(
                "VirtualService.networking.istio.io is invalid: spec.http[3].timeout: Invalid value"
            )
            .as_deref(),
            Some("TrafficPatch slow: spec.http.timeout")
        );
        assert_eq!(
            named("[spec.http[0].retries.attempts: Invalid").as_deref(),
            Some("TrafficPatch again: spec.http.retries.attempts")
        );
        assert_eq!(
            named("spec.http[0].retries: Invalid value").as_deref(),
            Some("TrafficPatch again: spec.http.retries.attempts")
        );
        assert_eq!(
            named("spec.subsets[0].trafficPolicy.connectionPool.tcp.maxConnections: no").as_deref(),
            Some("TrafficPatch pool: spec.destination.connectionPool.tcp")
        );
        assert_eq!(named("spec.http[0].name: no"), None);
        assert_eq!(named("spec.http[0].timeouts: no"), None);
    }
}
