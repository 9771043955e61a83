//! Golden of `examples/rate-limit`, and what must hold for any RateLimit.

use std::path::Path;

use fenceline_crds::{RateLimit, RuleStatus};
use serde::Deserialize;
use serde_json::{Value, json};

use super::plan::{Filter, InForce, back, filters, opening, plan};
use super::valid::{self, Limit};
use super::{global, local};
use crate::testing::{service, world, yaml};
use crate::world::World;

fn mesh() -> World {
    let mut world = world();
    for name in ["reviews", "details", "ratings"] {
        service(&mut world, "bookinfo", name, "{}");
    }
    world
}

fn parsed(object: &RateLimit) -> Limit {
    valid::limit(object, &mesh(), "istio-system", &Default::default()).unwrap()
}

fn limit(spec: &str) -> (RateLimit, Limit) {
    let mut object = RateLimit::new("limit", yaml(spec));
    object.metadata.namespace = Some("bookinfo".into());
    let limit = parsed(&object);
    (object, limit)
}

fn planned(limit: &Limit, rules: &[RuleStatus], replicas: u32) -> Vec<Filter> {
    let cluster = "outbound|8081||ratelimit.fenceline-system.svc.cluster.local";
    filters(
        limit,
        &InForce {
            rules,
            replicas,
            cluster,
        },
    )
}

/// `UPDATE=1 cargo test -p fenceline rate_limit` writes the golden instead.
#[test]
fn examples_say_what_is_written() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/rate-limit");
    let text = std::fs::read_to_string(folder.join("rate-limits.yaml")).unwrap();
    let mut written = String::from(
        "# What Fenceline writes for rate-limits.yaml, with three replicas of reviews.\n",
    );
    for document in serde_yaml::Deserializer::from_str(&text) {
        let object = RateLimit::deserialize(document).unwrap();
        let limit = parsed(&object);
        let mut filter = plan(&object, &limit, &planned(&limit, &[], 3)).unwrap();
        filter.metadata.owner_references = None;
        written.push_str("---\n");
        written.push_str(&serde_yaml::to_string(&filter).unwrap());
    }
    let path = folder.join("written.yaml");
    if std::env::var_os("UPDATE").is_some() {
        std::fs::write(&path, &written).unwrap();
    }
    let golden = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(
        golden == written,
        "examples/rate-limit/written.yaml is old; see above"
    );
}

const RULES: &str = "
- {name: slow, match: {path: {prefix: /slow}}, limit: {requests: 10, per: 1s}}
- {name: wide, limit: {requests: 1000, per: 1s}}
- {name: dry, limit: {requests: 5, per: 1s}, shadow: true}
- {name: teapot, limit: {requests: 20, per: 1s}, response: {status: 403}}
- {name: users, by: [{header: x-user}], limit: {requests: 30, per: 1m}, maxBuckets: 50}
- {name: moves, limit: {requests: 40, per: 1s}, adaptive: {requests: '40', min: 1, max: 100}}";

fn many() -> (RateLimit, Limit) {
    let indented = RULES.replace('\n', "\n  ");
    limit(&format!("target: {{service: reviews}}\nrules:{indented}"))
}

#[test]
fn rules_that_are_answered_alike_share_a_filter_and_the_strictest_comes_first() {
    let (_, limit) = many();
    let filters = planned(&limit, &[], 1);
    let rules: Vec<Vec<&str>> = filters
        .iter()
        .map(|filter| filter.rules.iter().map(String::as_str).collect())
        .collect();
    let wanted: [&[&str]; 5] = [
        &["users"],
        &["dry"],
        &["slow", "wide"],
        &["teapot"],
        &["moves"],
    ];
    assert_eq!(rules, wanted.map(<[&str]>::to_vec));
    assert_eq!(
        filters[1].config["filter_enforced"]["default_value"]["numerator"], 0,
        "it only counts"
    );
    assert_eq!(
        filters[2].config["filter_enforced"]["default_value"]["numerator"],
        100
    );
    assert_eq!(filters[3].config["status"]["code"], 403);
    assert_eq!(filters[0].config["max_dynamic_descriptors"], 50);
}

#[test]
fn a_limit_that_moves_leaves_the_buckets_of_all_others_alone() {
    let (object, limit) = many();
    let moved = RuleStatus {
        name: "moves".into(),
        active: true,
        effective: 77,
        ..RuleStatus::default()
    };
    let (before, after) = (planned(&limit, &[], 1), planned(&limit, &[moved], 1));
    let changed: Vec<&str> = before
        .iter()
        .zip(&after)
        .filter(|(before, after)| before.config != after.config)
        .map(|(before, _)| before.rules[0].as_str())
        .collect();
    assert_eq!(changed, ["moves"]);
    // Nor does any listener change.
    let places = |filters: &[Filter]| -> Vec<Value> {
        let filter = plan(&object, &limit, filters).unwrap();
        let places = filter.spec.config_patches.iter();
        places
            .filter(|patch| patch["applyTo"] == "HTTP_FILTER")
            .cloned()
            .collect()
    };
    assert_eq!(places(&before), places(&after));
}

#[test]
fn a_rule_that_does_not_count_is_not_there() {
    let (object, limit) = limit(
        "{target: {service: reviews}, metrics: [{name: p99, prometheus: {query: x}}],
          rules: [{name: w, limit: {requests: 5, per: 1s}, when: 'metrics.p99 > 1.0'}]}",
    );
    assert!(
        planned(&limit, &[], 1).is_empty(),
        "nobody said yet that it should"
    );
    assert!(plan(&object, &limit, &[]).is_none());
    let active = RuleStatus {
        name: "w".into(),
        active: true,
        effective: 5,
        ..RuleStatus::default()
    };
    assert_eq!(planned(&limit, &[active], 1).len(), 1);
}

#[test]
fn a_share_of_a_quota_is_not_rounded() {
    let (_, limit) = limit(
        "{target: {service: reviews}, share: AcrossReplicas, rules: [{name: a, limit: {requests: 10, per: 1s, burst: 20}}]}",
    );
    let bucket = |replicas| {
        planned(&limit, &[], replicas)[0].config["descriptors"][0]["token_bucket"].clone()
    };
    assert_eq!(
        bucket(1),
        json!({"max_tokens": 20, "tokens_per_fill": 10, "fill_interval": "1s"})
    );
    assert_eq!(
        bucket(3),
        json!({"max_tokens": 6, "tokens_per_fill": 10, "fill_interval": "3s"})
    );
    assert_eq!(
        bucket(40),
        json!({"max_tokens": 1, "tokens_per_fill": 10, "fill_interval": "40s"})
    );
}

#[test]
fn a_ceiling_stands_before_the_global_limit() {
    let (_, limit) = limit(
        "{target: {service: reviews}, share: Global, onUnavailable: Deny,
          rules: [{name: g, by: [{header: x-user}], limit: {requests: 100, per: 1m}, ceiling: {requests: 50, per: 1s}}]}",
    );
    let filters = planned(&limit, &[], 4);
    let types: Vec<&Value> = filters
        .iter()
        .map(|filter| &filter.config["@type"])
        .collect();
    assert_eq!(types, [local::TYPE, global::TYPE]);
    assert_eq!(
        filters[0].config["descriptors"][0]["token_bucket"]["tokens_per_fill"], 50,
        "each replica has it whole"
    );
    assert_eq!(filters[1].config["failure_mode_deny"], true);
    let config = global::config(&limit, |rule| Some(rule.quota.requests));
    assert_eq!(
        (config.name.as_str(), config.domain.as_str()),
        ("bookinfo/limit", "bookinfo/limit")
    );
    let known = Limit {
        uid: Some("0c1d0c6e-7c1a-4f0a-9b1d-3a5f5b0b2a11".to_owned()),
        ..limit
    };
    let config = global::config(&known, |rule| Some(rule.quota.requests));
    let domain = "bookinfo/limit/0c1d0c6e-7c1a-4f0a-9b1d-3a5f5b0b2a11";
    assert_eq!(
        (config.name.as_str(), config.domain.as_str()),
        ("bookinfo/limit", domain)
    );
    let filters = planned(&known, &[], 4);
    assert_eq!(filters[1].config["domain"], domain, "proxies ask for it");
    let outer = &config.descriptors[0];
    assert_eq!((outer.key.as_str(), outer.value.as_str()), ("rule", "g"));
    let inner = &outer.descriptors[0];
    assert_eq!(
        (inner.key.as_str(), inner.value.as_str()),
        ("header x-user", "")
    );
    assert_eq!(inner.rate_limit.as_ref().unwrap().requests_per_unit, 100);
    assert!(outer.rate_limit.is_none());
}

/// What Envoy refuses, it refuses with everything that came with it: nothing of ours may be so.
/// (envoyproxy/envoy local_ratelimit: duplicate descriptors; intervals that are no multiple of the default bucket's, or below 50 ms)
#[test]
fn what_envoy_is_known_to_refuse_is_never_written() {
    let (_, limit) = limit(
        "{target: {service: reviews}, rules: [{name: a, limit: {requests: 1, per: 1500ms}}, {name: b, limit: {requests: 1, per: 1m}},
          {name: c, limit: {requests: 1, per: 100ms}}]}",
    );
    for replicas in 1..9 {
        for filter in planned(&limit, &[], replicas) {
            let millis = |bucket: &Value| {
                let text = bucket["fill_interval"]
                    .as_str()
                    .unwrap()
                    .trim_end_matches('s')
                    .to_owned();
                (text.parse::<f64>().unwrap() * 1000.0).round() as u64
            };
            let default = millis(&filter.config["token_bucket"]);
            let descriptors = filter.config["descriptors"].as_array().unwrap();
            assert!(default >= 50);
            assert!(
                descriptors
                    .iter()
                    .all(|one| millis(&one["token_bucket"]) % default == 0)
            );
            let mut entries: Vec<String> = descriptors
                .iter()
                .map(|one| one["entries"].to_string())
                .collect();
            entries.sort();
            entries.dedup();
            assert_eq!(entries.len(), descriptors.len());
        }
    }
}

#[test]
fn what_was_refused_is_switched_off_where_it_was() {
    let rule = |name: &str, requests| {
        format!(
            "{{name: {name}, limit: {{requests: {requests}, per: 1s}}, response: {{headers: {{x-rule: {name}}}}}}}"
        )
    };
    let spec = |rules: &[String]| {
        let (object, limit) = limit(&format!(
            "{{target: {{service: reviews}}, rules: [{}]}}",
            rules.join(", ")
        ));
        plan(&object, &limit, &planned(&limit, &[], 1))
            .unwrap()
            .spec
    };
    let good = spec(&[rule("a", 5)]);
    let refused = spec(&[rule("a", 7), rule("b", 9)]);
    let content = |spec: &fenceline_crds::istio::EnvoyFilterSpec| -> Vec<(Value, bool)> {
        let patches = spec.config_patches.iter();
        let contents = patches.filter(|patch| patch["applyTo"] == "EXTENSION_CONFIG");
        contents
            .map(|patch| {
                let value = &patch["patch"]["value"];
                (value["name"].clone(), value["typed_config"] == local::off())
            })
            .collect()
    };
    let (a, b) = (
        json!("fenceline.dev/rate-limit/bookinfo/limit/a"),
        json!("fenceline.dev/rate-limit/bookinfo/limit/b"),
    );
    let both = back(Some(good.clone()), &refused);
    assert_eq!(content(&both), [(a.clone(), false), (b.clone(), true)]);
    assert_eq!(both.config_patches[0], good.config_patches[0]);
    let none = back(None, &refused);
    assert_eq!(content(&none), [(a, true), (b, true)]);
    assert_eq!(none.workload_selector, refused.workload_selector);
    // The other way: first the place, then what is in it.
    let first = opening(&good, None).unwrap();
    assert_eq!(
        content(&first),
        [(json!("fenceline.dev/rate-limit/bookinfo/limit/a"), true)]
    );
    let second = opening(&refused, Some(&good)).unwrap();
    assert_eq!(content(&second), content(&both));
    assert_eq!(
        second.config_patches[0], good.config_patches[0],
        "what was there stays"
    );
    assert!(
        opening(&good, Some(&first)).is_none(),
        "contents alone need no opening"
    );
}
