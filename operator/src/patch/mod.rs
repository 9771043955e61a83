//! TrafficPatches: which of them bear on a route or a subset, and what they make of it together, field by field.

pub(crate) mod bound;
mod merge;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use fenceline_crds::{FieldOrigin, TrafficPatch};
use jiff::Timestamp;
use kube::ResourceExt;
use serde_json::{Map, Value, json};

use merge::Merged;

/// The patches of one service, the one that wins first.
#[derive(Clone, Debug, Default)]
pub struct Patches(Vec<Arc<TrafficPatch>>);

/// What became of the patches.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// The fields that each sets.
    pub won: BTreeMap<String, BTreeSet<String>>,
    /// The fields that each would have set, with the patch that does.
    pub lost: BTreeMap<String, BTreeSet<FieldOrigin>>,
    /// Why something of a patch is left out.
    pub refused: BTreeMap<String, String>,
    /// How many patches are left out for each bound.
    pub over: BTreeMap<&'static str, usize>,
}

impl Outcome {
    /// Takes in what became of further fields.
    pub fn extend(&mut self, more: Self) {
        for (patch, fields) in more.won {
            self.won.entry(patch).or_default().extend(fields);
        }
        for (patch, fields) in more.lost {
            self.lost.entry(patch).or_default().extend(fields);
        }
        self.refused.extend(more.refused);
        for (bound, patches) in more.over {
            *self.over.entry(bound).or_default() += patches;
        }
    }

    fn note(&mut self, whole: &str, merged: &Merged) {
        let of = |field: &str| format!("{whole}.{field}");
        for (field, patch) in &merged.winners {
            self.won.entry(patch.clone()).or_default().insert(of(field));
        }
        for (field, loser, winner) in &merged.losers {
            let origin = FieldOrigin {
                field: of(field),
                patch: winner.clone(),
            };
            self.lost.entry(loser.clone()).or_default().insert(origin);
        }
    }

    /// Every field that a patch sets, with the patch.
    pub fn fields(&self) -> Vec<FieldOrigin> {
        let all = self.won.iter().flat_map(|(patch, fields)| {
            fields.iter().map(|field| FieldOrigin {
                field: field.clone(),
                patch: patch.clone(),
            })
        });
        let mut all: Vec<FieldOrigin> = all.collect();
        all.sort();
        all
    }
}

/// Part of a service: a branch, a version of a branch, or all of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Part<'a> {
    pub branch: Option<&'a str>,
    pub version: Option<&'a str>,
}

impl Part<'_> {
    /// Whether a patch bears on all of this part.
    fn is_in(self, patch: &TrafficPatch) -> bool {
        let within = |wanted: Option<&str>, part: Option<&str>| wanted.is_none() || wanted == part;
        within(patch.spec.branch.as_deref(), self.branch)
            && within(patch.spec.version.as_deref(), self.version)
    }
}

/// The requests of a route, and what is set for them.
#[derive(Clone, Debug, PartialEq)]
pub struct Requests {
    /// Alternatives; empty is every request.
    pub matches: Vec<Map<String, Value>>,
    /// Fields of Istio's HTTPRoute.
    pub fields: Map<String, Value>,
}

impl Patches {
    /// Those of a service, in any order.
    pub fn new(mut patches: Vec<Arc<TrafficPatch>>) -> Self {
        patches.sort_by_key(|patch| {
            let created = patch.creation_timestamp().map(|time| time.0);
            let age = created.unwrap_or(Timestamp::MAX);
            (
                std::cmp::Reverse(patch.spec.priority),
                age,
                patch.name_any(),
            )
        });
        Self(patches)
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn iter(&self) -> impl Iterator<Item = &TrafficPatch> {
        self.0.iter().map(AsRef::as_ref)
    }

    /// Whether any sets fields of routes.
    pub fn have_http(&self) -> bool {
        self.iter().any(|patch| patch.spec.http.is_some())
    }

    /// The routes of a branch: of the requests that patches tell apart each combination, those of most patches first, and at last
    /// the rest. `base` are the matches of the branch itself. The patches are [within bounds](Self::within_bounds).
    pub fn routes(
        &self,
        branch: Option<&str>,
        base: &[Map<String, Value>],
        outcome: &mut Outcome,
    ) -> Vec<Requests> {
        let part = Part {
            branch,
            version: None,
        };
        let of_branch: Vec<&TrafficPatch> = self
            .iter()
            .filter(|patch| patch.spec.http.is_some() && part.is_in(patch))
            .collect();
        let telling: Vec<&TrafficPatch> = of_branch
            .iter()
            .copied()
            .filter(|patch| !patch.spec.matches.is_empty())
            .collect();
        let mut combinations: Vec<u32> = (0..1_u32 << telling.len()).collect();
        combinations.sort_by_key(|set| std::cmp::Reverse(set.count_ones()));
        let mut routes = Vec::new();
        for set in combinations {
            let chosen: Vec<&TrafficPatch> = telling
                .iter()
                .enumerate()
                .filter(|(index, _)| set & (1 << index) != 0)
                .map(|(_, patch)| *patch)
                .collect();
            let Some(matches) = conjunction(base, &chosen) else {
                continue;
            };
            let in_force = of_branch
                .iter()
                .filter(|patch| patch.spec.matches.is_empty() || named(&chosen, patch));
            let merged =
                merge::merge(in_force.filter_map(|patch| Some((patch.name_any(), http(patch)?))));
            outcome.note(&whole("http", branch, None), &merged);
            routes.push(Requests {
                matches,
                fields: merged.fields,
            });
        }
        routes
    }

    /// The headers that are set for one version alone.
    pub fn headers_of(&self, part: Part<'_>, outcome: &mut Outcome) -> Option<Value> {
        let of_version = self
            .iter()
            .filter(|patch| patch.spec.version.is_some() && part.is_in(patch));
        let mut of_version = of_version
            .filter(|patch| patch.spec.http.is_some())
            .peekable();
        of_version.peek()?;
        let mut parts = Vec::new();
        for patch in of_version {
            let mut fields = http(patch).unwrap_or_default();
            let headers = fields.remove("headers");
            if let Some(other) = fields.keys().next() {
                let why = format!(
                    "http.{other} cannot be narrowed to a version: Istio's routes have it for all versions of a branch; leave version out"
                );
                outcome.refused.insert(patch.name_any(), why);
            }
            if let Some(headers) = headers {
                let whole = [("headers".to_owned(), headers)].into_iter().collect();
                parts.push((patch.name_any(), whole));
            }
        }
        let mut merged = merge::merge(parts.into_iter());
        outcome.note(&whole("http", part.branch, part.version), &merged);
        merged.fields.remove("headers")
    }

    /// The traffic policy of a part: what every patch that bears on it makes of it together.
    pub fn policy(&self, part: Part<'_>, outcome: &mut Outcome) -> Map<String, Value> {
        let bearing = self.iter().filter(|patch| part.is_in(patch));
        let merged = merge::merge(bearing.filter_map(|patch| {
            let policy = patch.spec.destination.as_ref()?;
            let policy = serde_json::to_value(policy).ok()?;
            Some((patch.name_any(), policy.as_object()?.clone()))
        }));
        outcome.note(&whole("destination", part.branch, part.version), &merged);
        merged.fields
    }

    /// Whether the destination of a branch may differ from the host's.
    pub fn narrow(&self, branch: &str) -> bool {
        let mut patches = self.iter();
        patches.any(|patch| {
            patch.spec.destination.is_some() && patch.spec.branch.as_deref() == Some(branch)
        })
    }

    /// Says of patches that name a branch or a version which the service does not have that they do nothing.
    pub fn refuse_unknown(&self, versions: &BTreeMap<&str, BTreeSet<&str>>, outcome: &mut Outcome) {
        for patch in self.iter() {
            let Some(branch) = patch.spec.branch.as_deref() else {
                continue;
            };
            let why = match (versions.get(branch), patch.spec.version.as_deref()) {
                (None, _) => format!("no Router of this service has a branch {branch}"),
                (Some(known), Some(version)) if !known.contains(version) => {
                    format!("branch {branch} has no version {version}")
                }
                _ => continue,
            };
            outcome.refused.insert(patch.name_any(), why);
        }
    }
}

fn named(chosen: &[&TrafficPatch], patch: &TrafficPatch) -> bool {
    chosen.iter().any(|one| one.name_any() == patch.name_any())
}

/// As `http[main/v1]`.
fn whole(kind: &str, branch: Option<&str>, version: Option<&str>) -> String {
    match (branch, version) {
        (None, _) => kind.to_owned(),
        (Some(branch), None) => format!("{kind}[{branch}]"),
        (Some(branch), Some(version)) => format!("{kind}[{branch}/{version}]"),
    }
}

fn http(patch: &TrafficPatch) -> Option<Map<String, Value>> {
    let http = serde_json::to_value(patch.spec.http.as_ref()?).ok()?;
    let mut http = http.as_object()?.clone();
    // A version's headers stand at its destination.
    if patch.spec.version.is_some() {
        http.retain(|field, _| field == "headers");
    }
    Some(http)
}

/// The requests that fit the branch and every one of these patches; nothing where none can.
fn conjunction(
    base: &[Map<String, Value>],
    patches: &[&TrafficPatch],
) -> Option<Vec<Map<String, Value>>> {
    let mut all = base.to_vec();
    for patch in patches {
        let own: Vec<Map<String, Value>> = patch.spec.matches.iter().map(istio_match).collect();
        all = if all.is_empty() {
            own
        } else {
            let pairs = all
                .iter()
                .flat_map(|one| own.iter().map(move |other| (one, other)));
            pairs.filter_map(|(one, other)| both(one, other)).collect()
        };
        if all.is_empty() {
            return None;
        }
    }
    Some(all)
}

/// What fits both matches; nothing where they contradict each other, or Istio has no words for it.
fn both(one: &Map<String, Value>, other: &Map<String, Value>) -> Option<Map<String, Value>> {
    let mut result = one.clone();
    for (field, value) in other {
        match (result.get_mut(field), value) {
            (None, _) => drop(result.insert(field.clone(), value.clone())),
            (Some(have), value) if have == value => {}
            (Some(Value::Object(have)), Value::Object(more)) if field == "headers" => {
                for (name, wanted) in more {
                    if have.get(name).is_some_and(|given| given != wanted) {
                        return None;
                    }
                    have.insert(name.clone(), wanted.clone());
                }
            }
            _ => return None,
        }
    }
    Some(result)
}

/// A match in Istio's words.
/// <https://istio.io/latest/docs/reference/config/networking/virtual-service/#HTTPMatchRequest>
fn istio_match(request: &fenceline_crds::RequestMatch) -> Map<String, Value> {
    let mut result = Map::new();
    if let Some(method) = &request.method {
        result.insert("method".into(), json!({"exact": method}));
    }
    if let Some(path) = &request.path {
        result.insert("uri".into(), json!(path));
    }
    if !request.headers.is_empty() {
        let headers = request.headers.iter();
        let headers: Map<String, Value> = headers.map(header_match).collect();
        result.insert("headers".into(), headers.into());
    }
    result
}

/// A header's name and what its value must be, in Istio's words.
pub fn header_match(header: &fenceline_crds::HeaderMatch) -> (String, Value) {
    let mut value = json!(header);
    if let Some(value) = value.as_object_mut() {
        value.remove("name");
    }
    (header.name.clone(), value)
}
