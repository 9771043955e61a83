//! What is adopted, and what is not.

use super::*;
use crate::fence::select::Labels as PodLabels;
use crate::patch::Patches;
use crate::router::plan::{Inputs, plan, subset_name};
use crate::testing::yaml;
use fenceline_crds::{Router, TrafficPatch};

/// As one file.
fn adopt(text: &str) -> anyhow::Result<Adoption> {
    super::adopt(&[("theirs.yaml".to_owned(), text.to_owned())])
}

const THEIRS: &str = "
kind: VirtualService
metadata: {name: theirs, namespace: shop}
spec:
  hosts: [reviews]
  http:
  - name: box
    match: [{headers: {x-branch: {exact: box}}}, {sourceLabels: {branch: box}}]
    fault: {abort: {httpStatus: 500, percentage: {value: 1}}}
    route: [{destination: {host: reviews, subset: new}}]
  - timeout: 2s
    retries: {attempts: 2}
    mirror: {host: shadow}
    mirrorPercentage: {value: 10}
    route:
    - {destination: {host: reviews, subset: one}, weight: 90}
    - {destination: {host: reviews, subset: two}, weight: 10}
---
kind: DestinationRule
metadata: {name: theirs, namespace: shop}
spec:
  host: reviews.shop.svc.cluster.local
  trafficPolicy: {outlierDetection: {consecutive5xxErrors: 5}}
  subsets:
  - {name: one, labels: {branch: main, version: v1}}
  - {name: two, labels: {branch: main, version: v2}, trafficPolicy: {loadBalancer: {simple: RANDOM}}}
  - {name: new, labels: {branch: box, version: v7}}
";

#[test]
fn what_is_adopted_makes_the_same_again() {
    let adoption = adopt(THEIRS).unwrap();
    assert_eq!(adoption.refused, Vec::<String>::new());
    let objects: Vec<Value> = adoption.objects.iter().map(|text| yaml(text)).collect();
    let of = |kind: &'static str| objects.iter().filter(move |object| object["kind"] == kind);
    let router: Router = serde_json::from_value(of("Router").next().unwrap().clone()).unwrap();
    let patches = of("TrafficPatch").map(|patch| {
        let patch: TrafficPatch = serde_json::from_value(patch.clone()).unwrap();
        patch.into()
    });
    let ready = |_: &PodLabels| 1;
    let target = plan(&Inputs {
        host: "reviews",
        router: Some(&router),
        patches: &Patches::new(patches.collect()),
        endpoints: &ready,
        shut: &BTreeMap::new(),
        apart: &BTreeSet::new(),
    })
    .unwrap();
    let mut routes = target.routes.unwrap().other["http"].clone();
    for route in routes.as_array_mut().unwrap() {
        route.as_object_mut().unwrap().remove("name");
    }
    let to = |branch: &str, version: &str| json!({"host": "reviews", "subset": subset_name(branch, version)});
    let want = json!([
        {
            "match": [{"headers": {"x-branch": {"exact": "box"}}}, {"sourceLabels": {"branch": "box"}}],
            "fault": {"abort": {"httpStatus": 500, "percentage": {"value": 1}}},
            "route": [{"destination": to("box", "v7")}],
        },
        {
            "timeout": "2s",
            "retries": {"attempts": 2},
            "mirrors": [{"destination": {"host": "shadow"}, "percentage": {"value": 10}}],
            "route": [
                {"destination": to("main", "v1"), "weight": 9},
                {"destination": to("main", "v2"), "weight": 1},
            ],
        },
    ]);
    assert_eq!(routes, want);
    let rule = target.rule.unwrap();
    assert_eq!(
        rule.traffic_policy,
        Some(json!({"outlierDetection": {"consecutive5xxErrors": 5}}))
    );
    assert_eq!(rule.subsets.len(), 3);
}

#[test]
fn what_has_no_words_is_refused_with_the_field() {
    for (from, to, field) in [
        ("timeout: 2s", "rewrite: {uri: /}", "spec.http[1].rewrite"),
        (
            "hosts: [reviews]",
            "hosts: [reviews]\n  exportTo: ['.']",
            "spec.exportTo",
        ),
        (
            "{headers: {x-branch: {exact: box}}}",
            "{uri: {prefix: /}}",
            "spec.http[0].match",
        ),
        (
            "subset: two",
            "subset: three",
            "spec.http[1].route.destination.subset",
        ),
        (
            "trafficPolicy: {loadBalancer: {simple: RANDOM}}",
            "trafficPolicy: {portLevelSettings: []}",
            "spec.subsets[two].trafficPolicy.portLevelSettings",
        ),
        (
            "trafficPolicy: {loadBalancer: {simple: RANDOM}}",
            "trafficPolicy: {outlierDetection: {}}",
            "spec.subsets[two].trafficPolicy.outlierDetection",
        ),
        (
            "{branch: box, version: v7}",
            "{version: v7}",
            "spec.subsets",
        ),
        (
            "host: reviews.shop",
            "host: reviews.bank",
            "no Service of namespace shop",
        ),
    ] {
        let text = THEIRS.replacen(from, to, 1);
        assert_ne!(text, THEIRS, "{from}");
        let refused = adopt(&text).unwrap().refused;
        assert!(
            refused.iter().any(|line| line.contains(field)),
            "{field}: {refused:?}"
        );
    }
}

#[test]
fn timeouts_alone_need_no_router() {
    let theirs = "{kind: VirtualService, metadata: {name: t, namespace: shop}, \
                  spec: {hosts: [reviews], http: [{timeout: 1s, route: [{destination: {host: reviews}}]}]}}";
    let adoption = adopt(theirs).unwrap();
    assert_eq!(adoption.refused, Vec::<String>::new());
    let objects: Vec<Value> = adoption.objects.iter().map(|text| yaml(text)).collect();
    assert_eq!(objects.len(), 1);
    assert_eq!(
        objects[0]["spec"],
        json!({"service": "reviews", "http": {"timeout": "1s"}})
    );
}

/// Whoever deletes what was adopted sends everything to the Service itself.
#[test]
fn what_leads_elsewhere_is_never_adopted() {
    let refused = |spec: &str| {
        let theirs = format!(
            "{{kind: VirtualService, metadata: {{name: t, namespace: shop}}, spec: {{hosts: [reviews], {spec}}}}}"
        );
        let adoption = adopt(&theirs).unwrap();
        assert!(adoption.objects.is_empty(), "{spec}: {adoption:?}");
        adoption.refused.join("; ")
    };
    let to =
        |host: &str| format!("http: [{{timeout: 1s, route: [{{destination: {{host: {host}}}}}]}}]");
    for (spec, field) in [
        (to("reviews.bank"), "spec.http[0].route.destination.host"),
        (to("reviews.bank.svc.cluster.local"), "spec.http[0].route.destination.host"),
        (to("ratings"), "spec.http[0].route.destination.host"),
        (to("reviews.shop.example.com"), "spec.http[0].route.destination.host"),
        (to("reviews, subset: v1"), "spec.http[0].route.destination.subset"),
        (to("reviews, port: {number: 9080}"), "spec.http[0].route.destination.port"),
        (
            "http: [{timeout: 1s, route: [{destination: {host: a}, weight: 30}, {destination: {host: b}, weight: 70}]}]".to_owned(),
            "spec.http[0].route.destination.host",
        ),
        (
            "http: [{timeout: 1s, route: [{destination: {host: reviews}, weight: -1}]}]".to_owned(),
            "spec.http[0].route.weight",
        ),
        ("http: [{timeout: 1s}]".to_owned(), "spec.http[0].route"),
        ("http: [{timeout: 1s, route: {}}]".to_owned(), "spec.http[0].route: it is no list"),
        ("http: {timeout: 1s}".to_owned(), "spec.http: it is no list"),
        ("http: []".to_owned(), "spec.http: it has no route"),
        (to("reviews").replace("timeout: 1s, ", ""), "spec.http: it leads to its own Service"),
    ] {
        let said = refused(&spec);
        assert!(said.contains(field), "{spec}: {said}");
        assert!(said.starts_with("theirs.yaml: "), "{said}");
    }
    let negative = THEIRS.replacen("weight: 90", "weight: -90", 1);
    let said = adopt(&negative).unwrap().refused;
    assert!(said[0].contains("spec.http[1].route.weight"), "{said:?}");
}
