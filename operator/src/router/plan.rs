//! What a service's VirtualService and DestinationRule should be in the end: a plain function of its Router, the patches and
//! the endpoints that are ready.

use std::collections::{BTreeMap, BTreeSet};
use std::hash::Hasher as _;

use fenceline_crds::istio::{DestinationRuleSpec, Subset, VirtualServiceSpec};
use fenceline_crds::{Branch, BranchMatch, RouteProtocol, Router, VersionLabels};
use serde_json::{Map, Value, json};

use super::istiod::VIEW_LABEL;
use crate::fence::select::Labels;
use crate::patch::bound::{Room, bytes};
use crate::patch::{Outcome, Part, Patches, Requests, header_match};

/// What is known of a service.
pub struct Inputs<'a> {
    pub host: &'a str,
    pub router: Option<&'a Router>,
    pub patches: &'a Patches,
    /// How many ready endpoints have these labels.
    pub endpoints: &'a dyn Fn(&Labels) -> u32,
    /// Branches that may not be reached now, with why: another service of the sandbox is not ready, or its time is over.
    pub shut: &'a BTreeMap<String, String>,
    /// Namespaces whose callers do not have our clusters: they are led where they were without us.
    pub apart: &'a BTreeSet<String>,
}

/// What should be there in the end.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Target {
    /// Nothing: no DestinationRule.
    pub rule: Option<DestinationRuleSpec>,
    /// Nothing: no VirtualService.
    pub routes: Option<VirtualServiceSpec>,
    /// The routes as they would be for everybody, where some are kept apart: what is wanted does not change with those.
    pub for_everybody: Option<VirtualServiceSpec>,
    /// Each branch, as it is.
    pub branches: Vec<BranchPlan>,
    pub patches: Outcome,
}

/// What becomes of a branch.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BranchPlan {
    pub name: String,
    /// Ready endpoints of each version.
    pub endpoints: BTreeMap<String, u32>,
    /// Why no requests go there.
    pub shut: Option<String>,
}

/// Why a Router means nothing.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Invalid {
    #[error(
        "spec.branches: {first} and {second} have both a version {version}; give spec.labels.branch, so that their pods can be told apart"
    )]
    SameVersion {
        first: String,
        second: String,
        version: String,
    },
    #[error(
        "spec.branches[{0}].match: sourceBranch needs spec.labels.branch, the label that says a pod's branch"
    )]
    NoBranchLabel(String),
}

/// A subset's name: of the branch and the version, as a DNS label of Istio's.
/// (pkg/config/validation, `validateSubset`)
pub fn subset_name(branch: &str, version: &str) -> String {
    let plain = |text: &str| {
        !text.contains("--")
            && text
                .bytes()
                .all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-')
    };
    let name = format!("{branch}--{version}");
    if plain(branch) && plain(version) && name.len() <= 63 {
        return name;
    }
    let kept: String = name
        .to_ascii_lowercase()
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() { c } else { '-' })
        .take(50)
        .collect();
    format!(
        "{}-{}",
        kept.trim_end_matches('-'),
        short_hash(&format!("{branch}/{version}"))
    )
}

/// The same for the same text, whatever version of Fenceline asks: what is written must not change with that.
pub(crate) fn short_hash(text: &str) -> String {
    let mut hasher = fnv::FnvHasher::default();
    hasher.write(text.as_bytes());
    let hash = hasher.finish();
    format!("{:08x}", (hash ^ (hash >> 32)) & 0xffff_ffff)
}

/// The labels of a version's pods.
fn version_labels(labels: &VersionLabels, branch: &str, version: &str) -> Labels {
    let branch_label = labels.branch.iter();
    branch_label
        .map(|label| (label.clone(), branch.to_owned()))
        .chain([(labels.version.clone(), version.to_owned())])
        .collect()
}

/// Works out the target.
///
/// # Errors
/// Says what of the Router makes no sense.
pub fn plan(inputs: &Inputs<'_>) -> Result<Target, Invalid> {
    let mut target = Target::default();
    let patches = inputs
        .patches
        .within_bounds(&rooms(inputs.router), &mut target.patches);
    let inputs = &Inputs {
        patches: &patches,
        ..*inputs
    };
    let Some(router) = inputs.router else {
        let outcome = &mut target.patches;
        inputs.patches.refuse_unknown(&BTreeMap::new(), outcome);
        let policy = inputs.patches.policy(Part::default(), outcome);
        target.rule = (!policy.is_empty()).then(|| rule(inputs.host, Vec::new(), policy));
        let routes = base_routes(inputs, outcome);
        target.routes = (!routes.is_empty()).then(|| http_routes(inputs.host, routes));
        return Ok(target);
    };
    let labels = router.spec.labels.clone().unwrap_or_default();
    check(router, &labels)?;
    let mut subsets = Vec::new();
    let host_policy = inputs.patches.policy(Part::default(), &mut target.patches);
    let (mut routes, mut base_routes) = (Vec::new(), Vec::new());
    for (index, branch) in router.spec.branches.iter().enumerate() {
        let mut planned = look(branch, &labels, inputs);
        subsets.extend(subsets_of(
            branch,
            &labels,
            &host_policy,
            inputs,
            &mut target.patches,
        ));
        let base = index == 0;
        if !base && planned.shut.is_none() && planned.endpoints.values().all(|ready| *ready == 0) {
            planned.shut =
                Some("it has no ready endpoints; its requests go to the base".to_owned());
        }
        if planned.shut.is_none() {
            let of_branch = branch_routes(branch, &planned, &labels, inputs, &mut target.patches);
            let place = if base { &mut base_routes } else { &mut routes };
            place.extend(of_branch);
        }
        target.branches.push(planned);
    }
    routes.extend(base_routes);
    let versions: BTreeMap<&str, BTreeSet<&str>> = router
        .spec
        .branches
        .iter()
        .map(|branch| {
            (
                branch.name.as_str(),
                branch.versions.keys().map(String::as_str).collect(),
            )
        })
        .collect();
    inputs
        .patches
        .refuse_unknown(&versions, &mut target.patches);
    subsets.sort_by(|a: &Subset, b| a.name.cmp(&b.name));
    target.rule = Some(rule(inputs.host, subsets, host_policy));
    let connections = router.spec.protocol == RouteProtocol::Tcp;
    if router.spec.port.is_some() && !connections {
        // The other ports: a VirtualService takes all of them, and 404 is the answer where none of its routes fits.
        routes.push(
            json!({"name": "other-ports", "route": [{"destination": {"host": inputs.host}}]}),
        );
    }
    let marked = if connections { tcp_routes } else { http_routes };
    if !inputs.apart.is_empty() {
        target.for_everybody = Some(marked(inputs.host, routes.clone()));
        routes.insert(0, apart(inputs, connections));
    }
    target.routes = Some(marked(inputs.host, routes));
    Ok(target)
}

/// Before all others: callers of some namespaces go to the Service itself, whose cluster everybody has.
fn apart(inputs: &Inputs<'_>, connections: bool) -> Value {
    let of = inputs.apart.iter();
    let of: Vec<Value> = of
        .map(|namespace| json!({"sourceNamespace": namespace}))
        .collect();
    let mut route = json!({"match": of, "route": [{"destination": {"host": inputs.host}}]});
    if !connections {
        route["name"] = json!("apart");
    }
    route
}

/// What there is for patches to bear on, and how much of it before them.
fn rooms(router: Option<&Router>) -> Vec<Room<'_>> {
    let Some(router) = router else {
        return vec![Room::default()];
    };
    let labels = router.spec.labels.clone().unwrap_or_default();
    let branches = router.spec.branches.iter();
    let longest = |branch: &Branch| {
        let lengths = branch
            .matches
            .iter()
            .map(|one| bytes(&istio_match(one, &labels)));
        lengths.max().unwrap_or_default()
    };
    branches
        .map(|branch| Room {
            branch: Some(&branch.name),
            versions: branch.versions.keys().map(String::as_str).collect(),
            alternatives: branch.matches.len(),
            longest: longest(branch),
        })
        .collect()
}

fn check(router: &Router, labels: &VersionLabels) -> Result<(), Invalid> {
    let mut versions: BTreeMap<&str, &str> = BTreeMap::new();
    for branch in &router.spec.branches {
        if labels.branch.is_some() {
            continue;
        }
        if branch.matches.iter().any(|one| one.source_branch.is_some()) {
            return Err(Invalid::NoBranchLabel(branch.name.clone()));
        }
        for version in branch.versions.keys() {
            if let Some(first) = versions.insert(version, &branch.name) {
                return Err(Invalid::SameVersion {
                    first: first.to_owned(),
                    second: branch.name.clone(),
                    version: version.clone(),
                });
            }
        }
    }
    Ok(())
}

fn look(branch: &Branch, labels: &VersionLabels, inputs: &Inputs<'_>) -> BranchPlan {
    let endpoints = branch.versions.keys().map(|version| {
        let ready = (inputs.endpoints)(&version_labels(labels, &branch.name, version));
        (version.clone(), ready)
    });
    BranchPlan {
        name: branch.name.clone(),
        endpoints: endpoints.collect(),
        shut: inputs.shut.get(&branch.name).cloned(),
    }
}

fn subsets_of(
    branch: &Branch,
    labels: &VersionLabels,
    host_policy: &Map<String, Value>,
    inputs: &Inputs<'_>,
    outcome: &mut Outcome,
) -> Vec<Subset> {
    let mut subsets = Vec::new();
    let narrowed = inputs.patches.narrow(&branch.name);
    for version in branch.versions.keys() {
        let part = Part {
            branch: Some(&branch.name),
            version: Some(version),
        };
        // Of a subset's policy Istio takes each field whole, or else the host's: so it has everything, or nothing.
        let mut policy = Map::new();
        let mut differs = false;
        if narrowed {
            let mut noted = Outcome::default();
            policy = inputs.patches.policy(part, &mut noted);
            differs = policy != *host_policy;
            if differs {
                outcome.extend(noted);
            }
        }
        subsets.push(Subset {
            name: subset_name(&branch.name, version),
            labels: version_labels(labels, &branch.name, version),
            traffic_policy: differs.then(|| policy.into()),
            ..Subset::default()
        });
    }
    subsets
}

/// The routes of a branch.
fn branch_routes(
    branch: &Branch,
    planned: &BranchPlan,
    labels: &VersionLabels,
    inputs: &Inputs<'_>,
    outcome: &mut Outcome,
) -> Vec<Value> {
    let Some(router) = inputs.router else {
        return Vec::new();
    };
    let base = branch.matches.is_empty();
    let destinations = destinations(branch, planned, router.spec.port, inputs, outcome);
    let http = router.spec.protocol != RouteProtocol::Tcp;
    let own: Vec<Map<String, Value>> = if base {
        let any = Map::new();
        let port = router.spec.port.map(|port| with_port(any, port));
        port.into_iter().collect()
    } else {
        let matches = branch.matches.iter();
        let matches = matches.map(|one| istio_match(one, labels));
        let port = |one| {
            router
                .spec
                .port
                .map_or_else(|| Map::clone(&one), |port| with_port(one.clone(), port))
        };
        matches.map(port).collect()
    };
    if !http {
        let mut route = json!({"route": destinations});
        if !own.is_empty() {
            route["match"] = json!(own);
        }
        return vec![route];
    }
    let requests = inputs.patches.routes(Some(&branch.name), &own, outcome);
    named_routes(&branch.name, requests, &json!(destinations))
}

/// Routes that lead to the same place; the last, which takes what fits no other, has the plain name.
fn named_routes(name: &str, requests: Vec<Requests>, to: &Value) -> Vec<Value> {
    let last = requests.len().saturating_sub(1);
    let routes = requests.into_iter().enumerate().map(|(index, requests)| {
        let mut route = requests.fields;
        let name = if index == last {
            name.to_owned()
        } else {
            format!("{name}-{index}")
        };
        route.insert("name".into(), name.into());
        if !requests.matches.is_empty() {
            route.insert("match".into(), json!(requests.matches));
        }
        route.insert("route".into(), to.clone());
        Value::from(route)
    });
    routes.collect()
}

fn with_port(mut one: Map<String, Value>, port: u16) -> Map<String, Value> {
    one.insert("port".into(), port.into());
    one
}

fn istio_match(one: &BranchMatch, labels: &VersionLabels) -> Map<String, Value> {
    let mut result = Map::new();
    if let Some(header) = &one.header {
        let headers: Map<String, Value> = [header_match(header)].into_iter().collect();
        result.insert("headers".into(), headers.into());
    }
    if let (Some(branch), Some(label)) = (&one.source_branch, &labels.branch) {
        result.insert("sourceLabels".into(), json!({label: branch}));
    }
    result
}

/// Where a branch's requests go: to the versions that have endpoints, by weight. Where none has, to all of them: there is nothing
/// better.
fn destinations(
    branch: &Branch,
    planned: &BranchPlan,
    port: Option<u16>,
    inputs: &Inputs<'_>,
    outcome: &mut Outcome,
) -> Vec<Value> {
    let ready = |version: &str| {
        planned
            .endpoints
            .get(version)
            .is_some_and(|ready| *ready > 0)
    };
    let any = branch
        .versions
        .iter()
        .any(|(version, weight)| *weight > 0 && ready(version));
    let chosen = branch
        .versions
        .iter()
        .filter(|(version, weight)| **weight > 0 && (!any || ready(version)));
    let chosen: Vec<(&String, u32)> = chosen.map(|(version, weight)| (version, *weight)).collect();
    let divisor = chosen
        .iter()
        .fold(0, |all, (_, weight)| gcd(all, *weight))
        .max(1);
    let several = chosen.len() > 1;
    let to = |(version, weight): (&String, u32)| {
        let mut destination =
            json!({"host": inputs.host, "subset": subset_name(&branch.name, version)});
        if let Some(port) = port {
            destination["port"] = json!({"number": port});
        }
        let mut route = json!({"destination": destination});
        if several {
            route["weight"] = json!(weight / divisor);
        }
        let part = Part {
            branch: Some(&branch.name),
            version: Some(version),
        };
        if let Some(headers) = inputs.patches.headers_of(part, outcome) {
            route["headers"] = headers;
        }
        route
    };
    chosen.into_iter().map(to).collect()
}

fn gcd(a: u32, b: u32) -> u32 {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// The routes of a service without a Router: its own endpoints, with what patches set.
fn base_routes(inputs: &Inputs<'_>, outcome: &mut Outcome) -> Vec<Value> {
    if !inputs.patches.have_http() {
        return Vec::new();
    }
    let requests = inputs.patches.routes(None, &[], outcome);
    let to = json!([{"destination": {"host": inputs.host}}]);
    named_routes("base", requests, &to)
}

fn rule(host: &str, subsets: Vec<Subset>, policy: Map<String, Value>) -> DestinationRuleSpec {
    DestinationRuleSpec {
        host: host.to_owned(),
        subsets,
        traffic_policy: (!policy.is_empty()).then(|| policy.into()),
        ..DestinationRuleSpec::default()
    }
}

/// Each route's name ends with a mark of what all of them say, by which it is seen whether a proxy has these routes or others.
fn http_routes(host: &str, mut routes: Vec<Value>) -> VirtualServiceSpec {
    let mark = short_hash(&json!(routes).to_string());
    for route in &mut routes {
        let name = route["name"].as_str().unwrap_or_default();
        route["name"] = json!(format!("{name}.{mark}"));
    }
    VirtualServiceSpec {
        hosts: vec![host.to_owned()],
        other: [("http".to_owned(), routes.into())].into(),
        ..VirtualServiceSpec::default()
    }
}

/// Routes of connections have no names: so one for nobody but our own view of what istiod sends leads to a subset with the mark.
fn tcp_routes(host: &str, mut routes: Vec<Value>) -> VirtualServiceSpec {
    let mark = short_hash(&json!(routes).to_string());
    let for_view = json!({
        "match": [{"sourceLabels": {VIEW_LABEL.0: VIEW_LABEL.1}}],
        "route": [{"destination": {"host": host, "subset": format!("mark-{mark}")}}],
    });
    routes.insert(0, for_view);
    VirtualServiceSpec {
        hosts: vec![host.to_owned()],
        other: [("tcp".to_owned(), routes.into())].into(),
        ..VirtualServiceSpec::default()
    }
}
