//! Parts of Istio's objects, and whether there are words for them here.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Map, Value, json};

use super::{DESTINATION, Labels, RULE, Refused, Result, Subset};

pub(super) fn check(policy: &Value, at: &str) -> Result<()> {
    let fields = policy.as_object().into_iter().flat_map(Map::keys);
    let mut unknown = fields.filter(|field| !DESTINATION.contains(&field.as_str()));
    match unknown.next() {
        Some(field) => Err(Refused(
            RULE,
            format!("{at}.{field}"),
            "a TrafficPatch has no such field".to_owned(),
        )),
        None => Ok(()),
    }
}

/// The labels by which all subsets are told apart.
pub(super) fn labels(subsets: &BTreeMap<&str, Subset<'_>>) -> Result<Labels> {
    let keys: BTreeSet<Vec<&str>> = subsets
        .values()
        .map(|subset| subset.labels.keys().copied().collect())
        .collect();
    let mut keys = keys.into_iter();
    let (first, other) = (keys.next(), keys.next());
    let refuse = |why: &str| Err(Refused(RULE, "spec.subsets".to_owned(), why.to_owned()));
    match (first.as_deref(), other) {
        (None, _) => Ok(Labels::default()),
        (_, Some(_)) => refuse(
            "they have different labels; a Router's have all the same, for the version and for the branch",
        ),
        (Some([version]), None) => Ok(Labels {
            version: (*version).to_owned(),
            branch: None,
        }),
        (Some([one, another]), None) if [one, another].contains(&&"version") => {
            let branch = if *one == "version" { another } else { one };
            Ok(Labels {
                version: "version".to_owned(),
                branch: Some((*branch).to_owned()),
            })
        }
        _ => refuse("which of their labels is the version's is not clear"),
    }
}

/// A branch's match, or why it cannot be one.
pub(super) fn branch_match(one: &Value, labels: &Labels) -> std::result::Result<Value, String> {
    let mut result = Map::new();
    for (field, value) in one.as_object().into_iter().flatten() {
        let only = value
            .as_object()
            .filter(|entries| entries.len() == 1)
            .and_then(|entries| entries.iter().next());
        match (field.as_str(), only) {
            ("name", _) => {}
            ("headers", Some((name, condition)))
                if condition.as_object().is_some_and(|kinds| kinds.len() == 1) =>
            {
                let mut header = condition.clone();
                header["name"] = json!(name);
                result.insert("header".to_owned(), header);
            }
            ("sourceLabels", Some((label, branch))) if labels.branch.as_ref() == Some(label) => {
                result.insert("sourceBranch".to_owned(), branch.clone());
            }
            _ => {
                return Err(format!(
                    "{field}: a branch is matched by one header and by the branch label of the caller"
                ));
            }
        }
    }
    Ok(result.into())
}
