//! Slime's ServiceFence.

use std::collections::BTreeMap;

use fenceline_crds::{
    Dependency, Mode, Selector, ServiceFence, ServiceFenceSpec, ServiceSelector, Workload,
};
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, LabelSelectorRequirement};
use serde_json::Value;

use super::{Fate, Migration, fields};

/// What Slime had learnt is kept for so long, time enough to be learnt again.
const LEARNT: SignedDuration = SignedDuration::from_hours(720);

pub(super) fn migrate(
    migration: &mut Migration,
    object: &Value,
    now: Timestamp,
) -> anyhow::Result<()> {
    let labels = &object["metadata"]["labels"];
    if labels["app.kubernetes.io/created-by"] == "fence-controller" {
        let why = "Slime made it by itself; a FencePolicy or a label does so here";
        migration.say(object, "", Fate::NotNeeded(why));
        return Ok(());
    }
    let name = object["metadata"]["name"].as_str().unwrap_or_default();
    let mut spec = ServiceFenceSpec {
        mode: Mode::Observe,
        ..ServiceFenceSpec::default()
    };
    for (field, value) in fields(&object["spec"]) {
        let path = format!("spec.{field}");
        match field.as_str() {
            "enable" => {
                let on = value.as_bool().unwrap_or_default();
                spec.mode = if on { Mode::Enforce } else { Mode::Observe };
                let became = format!("spec.mode: {:?}", spec.mode);
                migration.say(object, &path, Fate::Became(became));
            }
            "host" => hosts(migration, object, &value, &mut spec),
            "namespaceSelector" => {
                let names = strings(&value);
                spec.dependencies.push(in_namespaces(names));
                let became = "spec.dependencies[].services (Slime documents this field and ignores it; \
                              here it is in force)";
                migration.say(object, &path, Fate::Became(became.to_owned()));
            }
            "labelSelector" => {
                for one in value.as_array().into_iter().flatten() {
                    spec.dependencies.push(by_labels(&one["selector"]));
                }
                let became = "spec.dependencies[].services".to_owned();
                migration.say(object, &path, Fate::Became(became));
            }
            "workloadSelector" => {
                spec.workload = workload(name, &value);
                let became = "spec.workload".to_owned();
                migration.say(object, &path, Fate::Became(became));
            }
            _ => {
                let what = "no field of Slime's that is known".to_owned();
                migration.say(object, &path, Fate::ByHand(what));
            }
        }
    }
    if spec.workload.is_none() {
        // Slime's oldest rule.
        let app = BTreeMap::from([("app".to_owned(), name.to_owned())]);
        spec.workload = Some(selecting(app));
    }
    learnt(migration, object, now, &mut spec);
    let mut fence = ServiceFence::new(name, spec);
    fence.metadata.namespace = object["metadata"]["namespace"].as_str().map(str::to_owned);
    migration.add(&fence)
}

fn hosts(migration: &mut Migration, object: &Value, value: &Value, spec: &mut ServiceFenceSpec) {
    for (host, strategy) in fields(value) {
        let path = format!("spec.host[{host}]");
        let seconds = strategy["deadline"]["expire"]["seconds"].as_i64();
        let until = seconds.and_then(|seconds| Timestamp::from_second(seconds).ok());
        if !strategy["auto"].is_null() {
            let why = "nothing in Slime ever wrote when a host was called; spec.retention does";
            migration.say(object, &format!("{path}.auto"), Fate::NotNeeded(why));
        }
        spec.dependencies.push(match host.strip_suffix("/*") {
            Some(namespace) => Dependency {
                until,
                ..in_namespaces(vec![namespace.to_owned()])
            },
            None => Dependency {
                host: Some(host.clone()),
                until,
                ..Dependency::default()
            },
        });
        let became = "spec.dependencies[]".to_owned();
        migration.say(object, &path, Fate::Became(became));
    }
}

/// The hosts that Slime had learnt: `{destination_service="HOST"}`.
fn learnt(migration: &mut Migration, object: &Value, now: Timestamp, spec: &mut ServiceFenceSpec) {
    let known = fields(&object["status"]["metricStatus"]);
    let mut hosts = Vec::new();
    for key in known.keys() {
        let quoted = key.split(['"', '\'']).nth(1);
        match quoted {
            Some(host) if host.contains('.') => hosts.push(host.to_owned()),
            _ => {
                let what = format!("{key} is no host that is understood");
                migration.say(object, "status.metricStatus", Fate::ByHand(what));
            }
        }
    }
    if hosts.is_empty() {
        return;
    }
    let until = now.checked_add(LEARNT).ok();
    let became = format!(
        "{} spec.dependencies[] until {}, so that nothing has to be learnt anew at once",
        hosts.len(),
        until.unwrap_or(now)
    );
    spec.dependencies
        .extend(hosts.into_iter().map(|host| Dependency {
            host: Some(host),
            until,
            ..Dependency::default()
        }));
    migration.say(object, "status.metricStatus", Fate::Became(became));
}

fn workload(name: &str, value: &Value) -> Option<Workload> {
    let labels: BTreeMap<String, String> = fields(&value["labels"])
        .into_iter()
        .filter_map(|(key, value)| Some((key, value.as_str()?.to_owned())))
        .collect();
    if !labels.is_empty() {
        return Some(selecting(labels));
    }
    (value["fromService"] == true).then(|| Workload {
        service: Some(name.to_owned()),
        ..Workload::default()
    })
}

fn selecting(match_labels: BTreeMap<String, String>) -> Workload {
    Workload {
        selector: Some(Selector { match_labels }),
        ..Workload::default()
    }
}

fn strings(value: &Value) -> Vec<String> {
    let items = value.as_array().into_iter().flatten();
    items
        .filter_map(|item| item.as_str().map(str::to_owned))
        .collect()
}

/// Every Service of these namespaces.
pub(super) fn in_namespaces(names: Vec<String>) -> Dependency {
    let one_of = LabelSelectorRequirement {
        key: "kubernetes.io/metadata.name".to_owned(),
        operator: "In".to_owned(),
        values: Some(names),
    };
    Dependency {
        services: Some(ServiceSelector {
            namespace_selector: Some(LabelSelector {
                match_expressions: Some(vec![one_of]),
                ..LabelSelector::default()
            }),
            selector: LabelSelector::default(),
        }),
        ..Dependency::default()
    }
}

/// Services with these labels, wherever.
fn by_labels(value: &Value) -> Dependency {
    let labels = fields(value).into_iter();
    let labels = labels.filter_map(|(key, value)| Some((key, value.as_str()?.to_owned())));
    Dependency {
        services: Some(ServiceSelector {
            namespace_selector: Some(LabelSelector::default()),
            selector: LabelSelector {
                match_labels: Some(labels.collect()),
                ..LabelSelector::default()
            },
        }),
        ..Dependency::default()
    }
}
