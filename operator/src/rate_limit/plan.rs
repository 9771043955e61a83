//! The EnvoyFilter of a RateLimit: a plain function of what it says and of what is in force of each rule.
//!
//! Each filter stands in the listener as a name alone, and its content comes by Envoy's extension config discovery (ECDS), as istiod does it for an
//! EnvoyFilter's `EXTENSION_CONFIG`. So a limit that changes touches no listener, and no connection is drained; and a content that Envoy refuses
//! leaves its predecessor in force, and every other configuration alone.

use std::collections::BTreeMap;

use fenceline_crds::istio::{EnvoyFilter, EnvoyFilterSpec, WorkloadSelector};
use fenceline_crds::{RateLimit, RuleStatus, Share};
use kube::api::ObjectMeta;
use kube::{Resource, ResourceExt};
use serde_json::{Value, json};

use super::global;
use super::local::{self, Bucketed};
use super::valid::{Limit, Place, Rate, Rule};
use crate::apply::{MANAGED_BY, MANAGER, RATE_LIMIT_LABEL};
use crate::router::plan::short_hash;
use crate::world::Key;

/// How long a new listener waits for the content of its filters; then it serves without them.
const FETCH_TIMEOUT: &str = "5s";
const EXTENSION: &str = "EXTENSION_CONFIG";
/// So begin the statistics of all filters.
pub(super) const STAT_PREFIX: &str = "fenceline_";
/// So begin the names of all filters.
pub(super) const PREFIX: &str = "fenceline.dev/rate-limit/";

/// What rules do at this moment.
#[derive(Clone, Debug)]
pub(super) struct InForce<'a> {
    pub(super) rules: &'a [RuleStatus],
    /// How many replicas share a limit of `AcrossReplicas`.
    pub(super) replicas: u32,
    /// The cluster of the rate limit service.
    pub(super) cluster: &'a str,
}

/// A filter of a RateLimit.
#[derive(Clone, Debug)]
pub(super) struct Filter {
    /// Unique in the mesh.
    pub(super) name: String,
    pub(super) config: Value,
    /// What its statistics begin with.
    pub(super) stat_prefix: String,
    /// The counter of what was over the limit, as Envoy's Prometheus endpoint names it.
    pub(super) over_limit: String,
    /// The rules in it.
    pub(super) rules: Vec<String>,
    /// Requests a second of the strictest.
    strictest: f64,
}

/// The name of the EnvoyFilter.
pub(super) fn name(rate_limit: &str) -> String {
    format!("fenceline-rate-limit-{rate_limit}")
}

/// The EnvoyFilter; nothing where no rule counts.
pub(super) fn plan(object: &RateLimit, limit: &Limit, filters: &[Filter]) -> Option<EnvoyFilter> {
    let strictest = filters
        .iter()
        .map(|filter| filter.strictest)
        .reduce(f64::min)?;
    let patches: Vec<Value> = filters
        .iter()
        .flat_map(|filter| patches(filter, limit))
        .collect();
    Some(EnvoyFilter {
        metadata: ObjectMeta {
            name: Some(name(&object.name_any())),
            namespace: object.namespace(),
            labels: Some(
                [
                    (MANAGED_BY.to_owned(), MANAGER.to_owned()),
                    (RATE_LIMIT_LABEL.to_owned(), object.name_any()),
                ]
                .into(),
            ),
            owner_references: object.controller_owner_ref(&()).map(|owner| vec![owner]),
            ..ObjectMeta::default()
        },
        spec: EnvoyFilterSpec {
            workload_selector: Some(WorkloadSelector {
                labels: limit.labels.clone(),
                ..WorkloadSelector::default()
            }),
            config_patches: patches.into(),
            other: [("priority".to_owned(), json!(priority(strictest)))].into(),
        },
    })
}

/// Of several EnvoyFilters, the one with the lower number comes first in the chain: what the strictest limit rejects must not use up the
/// tokens of the others.
fn priority(per_second: f64) -> i32 {
    #[expect(
        clippy::cast_possible_truncation,
        reason = "the logarithm of a rate is small"
    )]
    let priority = (per_second.log10() * 100.0).round() as i32;
    priority
}

/// The filters of a RateLimit, the strictest first.
pub(super) fn filters(limit: &Limit, in_force: &InForce<'_>) -> Vec<Filter> {
    let mut groups: BTreeMap<String, Vec<(&Rule, Rate)>> = BTreeMap::new();
    for rule in &limit.rules {
        let Some(effective) = effective(rule, in_force.rules) else {
            continue;
        };
        let rate = rule.quota.with(effective);
        groups
            .entry(manner(rule, rate, limit, in_force))
            .or_default()
            .push((rule, rate));
    }
    let mut filters: Vec<Filter> = groups
        .values()
        .map(|rules| filter(rules, limit, in_force))
        .collect();
    filters.extend(
        limit
            .rules
            .iter()
            .filter_map(|rule| ceiling(rule, limit, in_force)),
    );
    // A ceiling of its own is in each proxy, and so comes before what asks the service.
    let is_remote = |filter: &Filter| filter.config["@type"] == global::TYPE;
    filters.sort_by(|a, b| {
        let order = is_remote(a)
            .cmp(&is_remote(b))
            .then(a.strictest.total_cmp(&b.strictest));
        order.then_with(|| a.name.cmp(&b.name))
    });
    filters
}

/// What a rule lets through now; nothing where it does not count.
pub(super) fn effective(rule: &Rule, statuses: &[RuleStatus]) -> Option<u32> {
    match statuses.iter().find(|status| status.name == rule.name) {
        Some(status) => status.active.then_some(status.effective),
        None => rule.when.is_none().then_some(rule.quota.requests),
    }
}

/// Rules of one manner can be in one filter. One that moves is alone, since a filter whose content changes begins with full buckets.
fn manner(rule: &Rule, rate: Rate, limit: &Limit, in_force: &InForce<'_>) -> String {
    let alone = rule.adaptive.is_some() || rule.when.is_some();
    json!([
        alone.then_some(&rule.name),
        rule.response.status,
        rule.response.headers,
        rule.response.rate_limit_headers,
        rule.shadow && limit.share != Share::Global,
        buckets_of(rule),
        retry_after(rate, limit, in_force),
    ])
    .to_string()
}

/// Only where there is one for each value.
fn buckets_of(rule: &Rule) -> u32 {
    let many = rule.parts.iter().any(|part| part.value.is_none());
    if many { rule.max_buckets } else { 1 }
}

fn shared_by(limit: &Limit, in_force: &InForce<'_>) -> u32 {
    match limit.share {
        Share::AcrossReplicas => in_force.replicas.max(1),
        Share::PerReplica | Share::Global => 1,
    }
}

fn retry_after(rate: Rate, limit: &Limit, in_force: &InForce<'_>) -> u64 {
    match limit.share {
        // A fixed window: nothing comes before the next one.
        Share::Global => rate.per.as_secs().max(1),
        Share::PerReplica | Share::AcrossReplicas => {
            local::retry_after(rate, shared_by(limit, in_force))
        }
    }
}

fn filter(rules: &[(&Rule, Rate)], limit: &Limit, in_force: &InForce<'_>) -> Filter {
    let named = rules.iter().map(|(rule, _)| rule.name.clone());
    let (first, rate) = rules[0];
    // A name has content of one type: a listener that is on its way out still takes it in.
    let kind = match limit.share {
        Share::Global => "/global",
        Share::PerReplica | Share::AcrossReplicas => "",
    };
    let name = format!("{PREFIX}{}/{}{kind}", limit.key, first.name);
    let stat_prefix = stat_prefix(limit, &name);
    let response = &first.response;
    let retry_after = retry_after(rate, limit, in_force);
    let strictest = rules
        .iter()
        .map(|(_, rate)| rate.per_second())
        .fold(f64::INFINITY, f64::min);
    let (config, over_limit) = if limit.share == Share::Global {
        let manner = global::Manner {
            cluster: in_force.cluster,
            domain: &global::domain(limit),
            stat_prefix: &stat_prefix,
            on_unavailable: limit.on_unavailable,
            response,
            retry_after,
        };
        let rules: Vec<&Rule> = rules.iter().map(|(rule, _)| *rule).collect();
        (
            global::filter(&rules, manner),
            format!("envoy_cluster_ratelimit_{stat_prefix}_over_limit"),
        )
    } else {
        let shared_by = shared_by(limit, in_force);
        let buckets: Vec<Bucketed<'_>> = rules
            .iter()
            .map(|(rule, rate)| Bucketed {
                parts: &rule.parts,
                rate: *rate,
                shared_by,
            })
            .collect();
        let manner = local::Manner {
            stat_prefix: &stat_prefix,
            shadow: first.shadow,
            max_buckets: buckets_of(first),
            response,
            retry_after,
        };
        (
            local::filter(&buckets, manner),
            over_local_limit(&stat_prefix),
        )
    };
    Filter {
        name,
        config,
        over_limit,
        stat_prefix,
        rules: named.collect(),
        strictest,
    }
}

/// What stands in front of a global limit.
fn ceiling(rule: &Rule, limit: &Limit, in_force: &InForce<'_>) -> Option<Filter> {
    let rate = rule.ceiling?;
    effective(rule, in_force.rules)?;
    let name = format!("{PREFIX}{}/{}/ceiling", limit.key, rule.name);
    let stat_prefix = stat_prefix(limit, &name);
    let manner = local::Manner {
        stat_prefix: &stat_prefix,
        shadow: rule.shadow,
        max_buckets: buckets_of(rule),
        response: &rule.response,
        retry_after: local::retry_after(rate, 1),
    };
    let bucket = Bucketed {
        parts: &rule.parts,
        rate,
        shared_by: 1,
    };
    Some(Filter {
        config: local::filter(&[bucket], manner),
        over_limit: over_local_limit(&stat_prefix),
        rules: vec![rule.name.clone()],
        strictest: rate.per_second(),
        stat_prefix: stat_prefix.clone(),
        name,
    })
}

/// What Envoy's statistics of a filter begin with: readable, and unique by its end.
fn stat_prefix(limit: &Limit, filter: &str) -> String {
    let Key { namespace, name } = &limit.key;
    let readable = format!("{namespace}_{name}").replace(|c: char| !c.is_ascii_alphanumeric(), "_");
    format!("{STAT_PREFIX}{readable}_{}", short_hash(filter))
}

fn over_local_limit(stat_prefix: &str) -> String {
    format!("envoy_{stat_prefix}_http_local_rate_limit_rate_limited")
}

/// The filter's place in listeners, and its content.
fn patches(filter: &Filter, limit: &Limit) -> [Value; 2] {
    let context = match limit.place {
        Place::Inbound => "SIDECAR_INBOUND",
        Place::Outbound => "SIDECAR_OUTBOUND",
        Place::Gateway => "GATEWAY",
    };
    let Filter { name, config, .. } = filter;
    let mut listener = json!({"filterChain": {"filter": {
        "name": "envoy.filters.network.http_connection_manager",
        "subFilter": {"name": "envoy.filters.http.router"},
    }}});
    if let Some(port) = limit.port {
        listener["portNumber"] = json!(port);
    }
    // What is off is of the first type.
    let mut types = vec![json!(local::TYPE)];
    if config["@type"] != local::TYPE {
        types.push(config["@type"].clone());
    }
    [
        json!({
            "applyTo": EXTENSION,
            "match": {"context": context},
            "patch": {"operation": "ADD", "value": {"name": name, "typed_config": config}},
        }),
        json!({
            "applyTo": "HTTP_FILTER",
            "match": {"context": context, "listener": listener},
            "patch": {"operation": "INSERT_BEFORE", "value": {
                "name": name,
                "config_discovery": {
                    "config_source": {
                        "ads": {}, "resource_api_version": "V3", "initial_fetch_timeout": FETCH_TIMEOUT,
                    },
                    "default_config": local::off(),
                    "type_urls": types,
                },
            }},
        }),
    ]
}

/// What to write in place of what proxies refused: what was good, and whatever else was in what they refused, switched off. A proxy goes on by
/// what it refused wherever it builds a listener anew (Envoy keeps the last content of a name, also one that it could not use), so that a
/// filter must neither be left as it is nor just be taken away.
pub(super) fn back(good: Option<EnvoyFilterSpec>, refused: &EnvoyFilterSpec) -> EnvoyFilterSpec {
    let name = |patch: &Value| patch["patch"]["value"]["name"].clone();
    let good_patches: Vec<Value> = good
        .iter()
        .flat_map(|good| good.config_patches.iter().cloned())
        .collect();
    let others = refused
        .config_patches
        .iter()
        .filter(|patch| !good_patches.iter().any(|good| name(good) == name(patch)));
    let off = others.cloned().map(|mut patch| {
        if patch["applyTo"] == EXTENSION {
            patch["patch"]["value"]["typed_config"] = local::off();
        }
        patch
    });
    let patches: Vec<Value> = good_patches.iter().cloned().chain(off).collect();
    EnvoyFilterSpec {
        config_patches: patches.into(),
        ..good.unwrap_or_else(|| refused.clone())
    }
}

/// What to write before `want`, where that has filters that `stored` has not: their places in listeners, with nothing in them that anybody could
/// refuse. What comes after is then a change of contents alone, which a proxy gets in one answer and accepts or refuses as a whole; a proxy
/// that is told of new names asks for each by itself, and its word on the last hides what it said of the others.
pub(super) fn opening(
    want: &EnvoyFilterSpec,
    stored: Option<&EnvoyFilterSpec>,
) -> Option<EnvoyFilterSpec> {
    let content = |name: &Value| {
        let patches = stored
            .iter()
            .flat_map(|stored| stored.config_patches.iter());
        let mut contents = patches.filter(|patch| patch["applyTo"] == EXTENSION);
        let value = contents.find(|patch| patch["patch"]["value"]["name"] == *name)?;
        Some(value["patch"]["value"]["typed_config"].clone())
    };
    let mut is_new = false;
    let mut opening = want.clone();
    let patches = want.config_patches.iter().cloned().map(|mut patch| {
        if patch["applyTo"] == EXTENSION {
            let value = &mut patch["patch"]["value"];
            let before = content(&value["name"]);
            is_new |= before.is_none();
            value["typed_config"] = before.unwrap_or_else(local::off);
        }
        patch
    });
    opening.config_patches = patches.collect::<Vec<_>>().into();
    is_new.then_some(opening)
}
