//! Slime's SmartLimiter.

mod expression;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use fenceline_crds::{
    Adaptive, Direction, GatewayTarget, LimitBy, LimitMatch, LimitResponse, LimitRule, LimitTarget,
    Metric, PathMatch, Quota, RateLimit, RateLimitSpec, Selector, Share, ValueMatch,
};
use regex::Regex;
use serde_json::Value;

use self::expression::expression;
use super::{Fate, Migration, fields};

/// Slime's set for the whole service.
const BASE: &str = "_base";

/// Limits of one manner become one RateLimit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Manner {
    PerReplica,
    AcrossReplicas,
    Global,
}

/// What one RateLimit has in common: its manner, and where it counts.
type Place = (Manner, bool, Option<u16>, Option<String>);

pub(super) fn migrate(migration: &mut Migration, object: &Value) -> anyhow::Result<()> {
    let meta = &object["metadata"];
    let name = meta["name"].as_str().unwrap_or_default();
    let spec = &object["spec"];
    let target = target(migration, object, name, spec);
    let mut limits: BTreeMap<Place, RateLimitSpec> = BTreeMap::new();
    for (set, value) in fields(&spec["sets"]) {
        let descriptors = value["descriptor"].as_array().cloned().unwrap_or_default();
        for (index, descriptor) in descriptors.iter().enumerate() {
            let path = format!("spec.sets[{set}].descriptor[{index}]");
            if set != BASE {
                let what = format!(
                    "a limit for the subset {set} alone: make a RateLimit with target.selector, with the labels of its pods"
                );
                migration.say(object, &path, Fate::ByHand(what));
                continue;
            }
            let read = Descriptor {
                migration,
                object,
                path,
                spec,
            };
            if let Some((place, rule, metrics)) = read.rule(index, descriptor) {
                let (manner, outbound, port, to) = place.clone();
                let limit = limits.entry(place).or_insert_with(|| RateLimitSpec {
                    target: target.clone(),
                    direction: if outbound && target.gateway.is_none() {
                        Direction::Outbound
                    } else {
                        Direction::Inbound
                    },
                    to,
                    port,
                    share: match manner {
                        Manner::PerReplica => Share::PerReplica,
                        Manner::AcrossReplicas => Share::AcrossReplicas,
                        Manner::Global => Share::Global,
                    },
                    ..RateLimitSpec::default()
                });
                limit.rules.push(rule);
                for metric in metrics {
                    if !limit.metrics.contains(&metric) {
                        limit.metrics.push(metric);
                    }
                }
            }
        }
    }
    for (number, spec) in limits.into_values().enumerate() {
        let name = if number == 0 {
            name.to_owned()
        } else {
            format!("{name}-{number}")
        };
        let mut limit = RateLimit::new(&name, spec);
        limit.metadata.namespace = meta["namespace"].as_str().map(str::to_owned);
        migration.add(&limit)?;
    }
    Ok(())
}

fn target(migration: &mut Migration, object: &Value, name: &str, spec: &Value) -> LimitTarget {
    let labels: BTreeMap<String, String> = fields(&spec["workloadSelector"])
        .into_iter()
        .filter_map(|(label, value)| Some((label, value.as_str()?.to_owned())))
        .collect();
    for (field, value) in fields(spec) {
        let path = format!("spec.{field}");
        let fate = match field.as_str() {
            "sets" => continue,
            "workloadSelector" => Fate::Became("spec.target".to_owned()),
            "gateway" if value == true => Fate::Became("spec.target.gateway".to_owned()),
            "gateway" => Fate::NotNeeded("it is the default"),
            "host" => Fate::Became("spec.to, where a descriptor is outbound".to_owned()),
            "target" => Fate::Became("spec.direction, spec.port and spec.to".to_owned()),
            "rls" => {
                Fate::NotNeeded("Fenceline's flag --rate-limit-service says where it is, for all")
            }
            _ => Fate::ByHand("no field of Slime's that is known".to_owned()),
        };
        migration.say(object, &path, fate);
    }
    if spec["gateway"] == true {
        return LimitTarget {
            gateway: Some(GatewayTarget { selector: labels }),
            ..LimitTarget::default()
        };
    }
    if labels.is_empty() {
        return LimitTarget {
            service: Some(name.to_owned()),
            ..LimitTarget::default()
        };
    }
    LimitTarget {
        selector: Some(Selector {
            match_labels: labels,
        }),
        ..LimitTarget::default()
    }
}

/// One descriptor as it is read.
struct Descriptor<'a> {
    migration: &'a mut Migration,
    object: &'a Value,
    path: String,
    spec: &'a Value,
}

impl Descriptor<'_> {
    fn say(&mut self, field: &str, fate: Fate) {
        let path = format!("{}.{field}", self.path);
        self.migration.say(self.object, &path, fate);
    }

    fn rule(mut self, index: usize, descriptor: &Value) -> Option<(Place, LimitRule, Vec<Metric>)> {
        let action = &descriptor["action"];
        let mut metrics = Vec::new();
        let per = per(&action["fill_interval"]);
        let Some(per) = per else {
            self.say(
                "action.fill_interval",
                Fate::ByHand("it is no length of time; nothing was made".to_owned()),
            );
            return None;
        };
        let quota = text(&action["quota"]);
        let (limit, adaptive, divided) = self.quota(&quota, &mut metrics)?;
        let manner = match action["strategy"].as_str().unwrap_or_default() {
            "global" => Manner::Global,
            _ if divided => Manner::AcrossReplicas,
            _ => Manner::PerReplica,
        };
        self.say(
            "action.strategy",
            Fate::Became(format!("spec.share: {manner:?}")),
        );
        let mut rule = LimitRule {
            name: format!("descriptor-{index}"),
            max_buckets: 1000,
            limit: Quota {
                requests: limit,
                per,
                burst: None,
            },
            adaptive,
            ..LimitRule::default()
        };
        self.condition(&text(&descriptor["condition"]), &mut rule, &mut metrics);
        self.matches(&descriptor["match"], &mut rule);
        let headers: BTreeMap<String, String> = action["headers_to_add"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|one| {
                Some((
                    one["key"].as_str()?.to_owned(),
                    one["value"].as_str()?.to_owned(),
                ))
            })
            .collect();
        if !headers.is_empty() {
            self.say(
                "action.headers_to_add",
                Fate::Became("response.headers".to_owned()),
            );
            rule.response = Some(LimitResponse {
                headers,
                ..LimitResponse::default()
            });
        }
        if !descriptor["custom_key"].is_null() {
            let what = "a descriptor that an EnvoyPlugin makes; Slime's newest version ignores it"
                .to_owned();
            self.say("custom_key", Fate::ByHand(what));
        }
        let place = self.place(&descriptor["target"]);
        Some(((manner, place.0, place.1, place.2), rule, metrics))
    }

    /// The number, whether it moves, and whether it is divided by the pods.
    fn quota(
        &mut self,
        quota: &str,
        metrics: &mut Vec<Metric>,
    ) -> Option<(u32, Option<Adaptive>, bool)> {
        let divided = Regex::new(r"^\s*(\d+)\s*/\s*\{\{\s*\._base\.pod\s*\}\}\s*$").ok()?;
        if let Some(number) = divided
            .captures(quota)
            .and_then(|found| found[1].parse().ok())
        {
            self.say(
                "action.quota",
                Fate::Became("limit.requests, of all replicas together".to_owned()),
            );
            return Some((number, None, true));
        }
        if let Ok(number) = quota.trim().parse::<u32>()
            && number > 0
        {
            self.say("action.quota", Fate::Became("limit.requests".to_owned()));
            return Some((number, None, false));
        }
        let Some(requests) = expression(quota, metrics) else {
            self.say(
                "action.quota",
                Fate::ByHand(format!("{quota} is not understood; nothing was made")),
            );
            return None;
        };
        let what = format!(
            "{quota} became adaptive.requests: {requests}; choose limit.requests, min and max (1, 1 and 1000 are guesses), and a query for each metric"
        );
        self.say("action.quota", Fate::ByHand(what));
        let adaptive = Adaptive {
            requests,
            min: 1,
            max: 1000,
            ..Adaptive::default()
        };
        Some((1, Some(adaptive), false))
    }

    fn condition(&mut self, condition: &str, rule: &mut LimitRule, metrics: &mut Vec<Metric>) {
        match condition.trim() {
            "true" | "" => self.say("condition", Fate::NotNeeded("it always holds")),
            other => match expression(other, metrics) {
                Some(when) => {
                    let what = format!("when: {when}; give a query for each of its metrics");
                    self.say("condition", Fate::ByHand(what));
                    rule.when = Some(when);
                }
                None => self.say(
                    "condition",
                    Fate::ByHand(format!("{other} is not understood: say it in `when`")),
                ),
            },
        }
    }

    fn matches(&mut self, matches: &Value, rule: &mut LimitRule) {
        let mut matcher = LimitMatch::default();
        for (index, one) in matches
            .as_array()
            .cloned()
            .unwrap_or_default()
            .iter()
            .enumerate()
        {
            let field = format!("match[{index}]");
            let name = text(&one["name"]);
            let source = one["matchSource"].as_str().unwrap_or("HeadMatch");
            match source {
                "SourceIpMatch" => {
                    let given = text(&one["exact_match"]);
                    matcher
                        .cidrs
                        .extend(given.split(',').map(|ip| ip.trim().to_owned()));
                    self.say(&field, Fate::Became("match.cidrs".to_owned()));
                    continue;
                }
                "JsonBodyMatch" => {
                    let what = "bodies are not looked at (only NetEase's own Envoy could): send what is to be matched in a header".to_owned();
                    self.say(&field, Fate::ByHand(what));
                    continue;
                }
                _ => {}
            }
            let query = source == "QueryMatch" || one["useQueryMatch"] == true;
            if one["present_match_separate"] == true {
                let by = if query {
                    LimitBy {
                        query: Some(name),
                        ..LimitBy::default()
                    }
                } else {
                    LimitBy {
                        header: Some(name),
                        ..LimitBy::default()
                    }
                };
                rule.by.push(by);
                self.say(&field, Fate::Became("by".to_owned()));
                continue;
            }
            if one["invert_match"] == true {
                self.say(
                    &field,
                    Fate::ByHand(
                        "a match that is inverted: write a regex, or present: false".to_owned(),
                    ),
                );
                continue;
            }
            let exact = one["exact_match"].as_str().map(str::to_owned);
            let prefix = one["prefix_match"].as_str().map(str::to_owned);
            let suffix = one["suffix_match"]
                .as_str()
                .map(|suffix| format!(".*{}", regex::escape(suffix)));
            let regex = one["regex_match"].as_str().map(str::to_owned).or(suffix);
            match (name.as_str(), query) {
                (":method", false) if exact.is_some() => matcher.methods.extend(exact),
                (":path", false) => {
                    matcher.path = Some(PathMatch {
                        exact,
                        prefix,
                        regex,
                    });
                    self.say(
                        &field,
                        Fate::Became("match.path, without the query string".to_owned()),
                    );
                    continue;
                }
                _ => {
                    let present =
                        (exact.is_none() && prefix.is_none() && regex.is_none()).then_some(true);
                    let value = ValueMatch {
                        name,
                        exact,
                        prefix,
                        regex,
                        present,
                    };
                    if query {
                        matcher.query.push(value)
                    } else {
                        matcher.headers.push(value)
                    }
                }
            }
            self.say(
                &field,
                Fate::Became(if query { "match.query" } else { "match" }.to_owned()),
            );
        }
        rule.matches = (matcher != LimitMatch::default()).then_some(matcher);
    }

    /// Whether it is for what goes out, the port, and the host.
    fn place(&mut self, own: &Value) -> (bool, Option<u16>, Option<String>) {
        let target = if own.is_null() {
            &self.spec["target"]
        } else {
            own
        };
        let outbound = target["direction"] == "outbound" || self.spec["gateway"] == true;
        let port = target["port"]
            .as_u64()
            .and_then(|port| u16::try_from(port).ok())
            .filter(|port| *port > 0);
        let routes: Vec<&str> = target["route"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(Value::as_str)
            .collect();
        let hosts: Vec<&str> = target["host"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(Value::as_str)
            .collect();
        let named = hosts
            .into_iter()
            .chain(routes.iter().filter_map(|route| route.split('/').next()));
        let mut named: Vec<String> = named
            .map(|host| host.split(':').next().unwrap_or(host).to_owned())
            .collect();
        named.dedup();
        let host = outbound.then(|| {
            named
                .first()
                .cloned()
                .or_else(|| self.spec["host"].as_str().map(str::to_owned))
        });
        if named.len() > 1 {
            let what = format!(
                "a RateLimit has one host: {} need others",
                named[1..].join(", ")
            );
            self.say("target", Fate::ByHand(what));
        }
        if !routes.is_empty() {
            let what = "a route's name became its host; narrow the limit by match.path".to_owned();
            self.say("target.route", Fate::ByHand(what));
        }
        (outbound, port, host.flatten())
    }
}

/// Text, or a number as text.
fn text(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Null => String::new(),
        other => other.to_string(),
    }
}

/// A protobuf Duration, in either of the ways in which it is written.
fn per(value: &Value) -> Option<String> {
    if let Some(text) = value.as_str() {
        return fenceline_crds::period(text).map(|_| text.to_owned());
    }
    let seconds = value["seconds"].as_u64().unwrap_or_default();
    let millis = value["nanos"].as_u64().unwrap_or_default() / 1_000_000;
    match (seconds, millis) {
        (0, 0) => None,
        (seconds, 0) => Some(format!("{seconds}s")),
        (seconds, millis) => Some(format!("{}ms", seconds * 1000 + millis)),
    }
}
