//! What a Router and patches make.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use fenceline_crds::{Router, TrafficPatch};
use serde_json::{Value, json};

use super::istiod::VIEW_LABEL;
use super::plan::{Inputs, Invalid, Target, plan, subset_name};
use super::{order, others, write};
use crate::fence::select::Labels;
use crate::patch::Patches;
use crate::testing::yaml;

const HOST: &str = "reviews.shop.svc.cluster.local";

fn planned(
    router: Option<&str>,
    patches: &[(&str, &str)],
    endpoints: &dyn Fn(&Labels) -> u32,
) -> Result<Target, Invalid> {
    let router = router.map(|spec| Router::new("reviews", yaml(spec)));
    let patches = patches
        .iter()
        .map(|(name, spec)| Arc::new(TrafficPatch::new(name, yaml(spec))));
    plan(&Inputs {
        host: HOST,
        router: router.as_ref(),
        patches: &Patches::new(patches.collect()),
        endpoints,
        shut: &BTreeMap::new(),
        apart: &BTreeSet::new(),
    })
}

fn ready(_: &Labels) -> u32 {
    1
}

/// The routes without their marks.
fn http(target: &Target) -> Value {
    let routes = target
        .routes
        .as_ref()
        .map(|routes| routes.other["http"].clone());
    let mut routes = routes.unwrap_or_default();
    for route in routes.as_array_mut().into_iter().flatten() {
        let name = route["name"].as_str().unwrap_or_default();
        route["name"] = json!(name.split('.').next());
    }
    routes
}

fn to(subset: &str) -> Value {
    json!({"host": HOST, "subset": subset})
}

const TWO_BRANCHES: &str = "{service: reviews, labels: {branch: branch}, branches: [\
     {name: main, versions: {v1: 90, v2: 10}}, \
     {name: box, versions: {v7: 1}, match: [{header: {name: x-branch, exact: box}}, {sourceBranch: box}]}]}";

#[test]
fn versions_by_weight_and_branches_beside_them() {
    let target = planned(Some(TWO_BRANCHES), &[], &ready).unwrap();
    let want = json!([
        {
            "name": "box",
            "match": [{"headers": {"x-branch": {"exact": "box"}}}, {"sourceLabels": {"branch": "box"}}],
            "route": [{"destination": to("box--v7")}],
        },
        {
            "name": "main",
            "route": [
                {"destination": to("main--v1"), "weight": 9},
                {"destination": to("main--v2"), "weight": 1},
            ],
        },
    ]);
    assert_eq!(http(&target), want);
    let rule = serde_json::to_value(target.rule).unwrap();
    let subset = |branch: &str, version: &str| json!({"name": format!("{branch}--{version}"), "labels": {"branch": branch, "version": version}});
    let subsets = [
        subset("main", "v1"),
        subset("main", "v2"),
        subset("box", "v7"),
    ];
    let by_name = |value: &Value| value["name"].as_str().unwrap_or_default().to_owned();
    let mut subsets = subsets.to_vec();
    subsets.sort_by_key(by_name);
    assert_eq!(rule, json!({"host": HOST, "subsets": subsets}));
}

#[test]
fn what_has_no_endpoints_gets_no_requests() {
    let without = |gone: &'static [&'static str]| {
        move |labels: &Labels| u32::from(!gone.contains(&labels["version"].as_str()))
    };
    let target = planned(Some(TWO_BRANCHES), &[], &without(&["v2", "v7"])).unwrap();
    let main = json!([{"name": "main", "route": [{"destination": to("main--v1")}]}]);
    assert_eq!(http(&target), main);
    let shut = target.branches[1].shut.as_deref();
    assert!(shut.unwrap().contains("no ready endpoints"), "{shut:?}");
    // Where nothing is ready, nothing better can be done than what was asked for.
    let target = planned(Some(TWO_BRANCHES), &[], &without(&["v1", "v2"])).unwrap();
    assert_eq!(http(&target)[1]["route"].as_array().unwrap().len(), 2);
}

#[test]
fn one_port_alone() {
    let router = "{service: reviews, port: 9080, branches: [{name: main, versions: {v1: 1}}]}";
    let target = planned(Some(router), &[], &ready).unwrap();
    let destination = json!({"host": HOST, "subset": "main--v1", "port": {"number": 9080}});
    let want = json!([
        {"name": "main", "match": [{"port": 9080}], "route": [{"destination": destination}]},
        {"name": "other-ports", "route": [{"destination": {"host": HOST}}]},
    ]);
    assert_eq!(http(&target), want);
}

#[test]
fn connections() {
    let router = "{service: reviews, protocol: TCP, labels: {branch: branch}, branches: [\
                  {name: main, versions: {v1: 2, v2: 2}}, {name: box, versions: {v7: 1}, match: [{sourceBranch: box}]}]}";
    let target = planned(Some(router), &[], &ready).unwrap();
    let want = json!([
        {"match": [{"sourceLabels": {"branch": "box"}}], "route": [{"destination": to("box--v7")}]},
        {"route": [{"destination": to("main--v1"), "weight": 1}, {"destination": to("main--v2"), "weight": 1}]},
    ]);
    let routes = target.routes.unwrap();
    let (for_view, rest) = routes.other["tcp"]
        .as_array()
        .unwrap()
        .split_first()
        .unwrap();
    assert_eq!(json!(rest), want);
    assert!(
        for_view["match"][0]["sourceLabels"]
            .get(VIEW_LABEL.0)
            .is_some()
    );
}

#[test]
fn patches_of_many_teams() {
    let patches = [
        (
            "timeouts",
            "{service: reviews, http: {timeout: 2s, retries: {attempts: 2}}, destination: {outlierDetection: {consecutive5xxErrors: 5}}}",
        ),
        (
            "box-fault",
            "{service: reviews, branch: box, priority: 10, http: {timeout: 9s, fault: {abort: {httpStatus: 500}}}}",
        ),
        (
            "search",
            "{service: reviews, branch: main, match: [{path: {prefix: /search}}], priority: 5, http: {timeout: 1s}}",
        ),
        (
            "v2",
            "{service: reviews, branch: main, version: v2, http: {headers: {request: {set: {x-new: '1'}}}}, destination: {loadBalancer: {simple: RANDOM}}}",
        ),
        (
            "lost",
            "{service: reviews, branch: nowhere, http: {timeout: 3s}}",
        ),
    ];
    let target = planned(Some(TWO_BRANCHES), &patches, &ready).unwrap();
    let routes = http(&target);
    assert_eq!(routes[0]["timeout"], "9s");
    assert_eq!(routes[0]["fault"], json!({"abort": {"httpStatus": 500}}));
    assert_eq!(routes[1]["name"], "main-0");
    assert_eq!(routes[1]["match"], json!([{"uri": {"prefix": "/search"}}]));
    assert_eq!(routes[1]["timeout"], "1s");
    assert_eq!(routes[2]["name"], "main");
    assert_eq!(routes[2]["timeout"], "2s");
    for route in routes.as_array().unwrap() {
        assert_eq!(route["retries"], json!({"attempts": 2}));
    }
    assert_eq!(
        routes[2]["route"][1]["headers"],
        json!({"request": {"set": {"x-new": "1"}}})
    );
    let rule = target.rule.unwrap();
    let ejection = json!({"outlierDetection": {"consecutive5xxErrors": 5}});
    assert_eq!(rule.traffic_policy, Some(ejection));
    let policies: Vec<_> = rule
        .subsets
        .iter()
        .filter_map(|subset| subset.traffic_policy.clone())
        .collect();
    // A subset's policy replaces the host's, field by field: it has both.
    assert_eq!(
        policies,
        [
            json!({"loadBalancer": {"simple": "RANDOM"}, "outlierDetection": {"consecutive5xxErrors": 5}})
        ]
    );
    let outcome = target.patches;
    assert!(outcome.refused["lost"].contains("nowhere"));
    let lost: Vec<String> = outcome.lost["timeouts"]
        .iter()
        .map(|one| format!("{} to {}", one.field, one.patch))
        .collect();
    assert_eq!(
        lost,
        [
            "http[box].timeout to box-fault",
            "http[main].timeout to search"
        ]
    );
}

#[test]
fn patches_without_a_router() {
    let patches = [("timeouts", "{service: reviews, http: {timeout: 2s}}")];
    let target = planned(None, &patches, &ready).unwrap();
    let want =
        json!([{"name": "base", "timeout": "2s", "route": [{"destination": {"host": HOST}}]}]);
    assert_eq!(http(&target), want);
    assert_eq!(target.rule, None);
    let policy = [(
        "pool",
        "{service: reviews, destination: {connectionPool: {http: {maxRetries: 1}}}}",
    )];
    let target = planned(None, &policy, &ready).unwrap();
    assert_eq!(target.routes, None);
    assert!(target.rule.is_some());
}

#[test]
fn what_makes_no_sense_is_said() {
    let twice = "{service: reviews, branches: [{name: main, versions: {v1: 1}}, \
                 {name: box, versions: {v1: 1}, match: [{header: {name: x, exact: y}}]}]}";
    let error = planned(Some(twice), &[], &ready).unwrap_err().to_string();
    assert!(
        error.contains("main and box have both a version v1"),
        "{error}"
    );
    let unlabelled = "{service: reviews, branches: [{name: main, versions: {v1: 1}}, \
                      {name: box, versions: {v2: 1}, match: [{sourceBranch: box}]}]}";
    let error = planned(Some(unlabelled), &[], &ready)
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("sourceBranch needs spec.labels.branch"),
        "{error}"
    );
}

#[test]
fn subsets_have_names_that_istio_takes() {
    assert_eq!(subset_name("main", "v1"), "main--v1");
    let mut names = std::collections::BTreeSet::new();
    for (branch, version) in [
        ("a", "b-c"),
        ("a-b", "c"),
        ("a", "V1.2"),
        ("a", "v1-2"),
        ("a--b", "c"),
        ("a", "b--c"),
    ] {
        let name = subset_name(branch, version);
        assert!(name.len() <= 63 && !name.ends_with('-'), "{name}");
        assert!(
            name.bytes()
                .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-'),
            "{name}"
        );
        assert!(names.insert(name));
    }
    let long = "v".repeat(63);
    assert!(subset_name("main", &long).len() <= 63);
}

/// Whose DestinationRule hides ours has no cluster of ours: its callers go where they went without us.
#[test]
fn callers_that_do_not_have_our_clusters_are_led_to_the_service_itself() {
    let planned = |spec: &str, apart: &[&str]| {
        plan(&Inputs {
            host: HOST,
            router: Some(&Router::new("reviews", yaml(spec))),
            patches: &Patches::default(),
            endpoints: &ready,
            shut: &BTreeMap::new(),
            apart: &apart.iter().map(|name| (*name).to_owned()).collect(),
        })
        .unwrap()
    };
    let everybody = planned(TWO_BRANCHES, &[]);
    let apart = planned(TWO_BRANCHES, &["evil", "vile"]);
    let routes = http(&apart);
    let want = json!({
        "name": "apart",
        "match": [{"sourceNamespace": "evil"}, {"sourceNamespace": "vile"}],
        "route": [{"destination": {"host": HOST}}],
    });
    assert_eq!(routes[0], want);
    assert_eq!(
        routes.as_array().unwrap()[1..],
        *http(&everybody).as_array().unwrap()
    );
    let spec = apart.routes.as_ref().unwrap();
    assert_eq!(
        others::apart(spec),
        ["evil".to_owned(), "vile".to_owned()].into()
    );
    assert!(
        order::marks(spec)
            .iter()
            .all(|mark| !mark.starts_with("apart")),
        "our own view does not get that route"
    );
    assert!(order::marks(spec).is_disjoint(&order::marks(everybody.routes.as_ref().unwrap())));
    assert_eq!(
        write::mark(&apart),
        write::mark(&everybody),
        "what is wanted is the same"
    );
    let tcp = "{service: reviews, protocol: TCP, branches: [{name: main, versions: {v1: 1}}]}";
    let routes = planned(tcp, &["evil"]).routes.unwrap().other["tcp"].clone();
    assert_eq!(routes[1]["match"], json!([{"sourceNamespace": "evil"}]));
    assert_eq!(routes[1]["route"], json!([{"destination": {"host": HOST}}]));
}
