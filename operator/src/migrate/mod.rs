//! From Slime (slime-io/slime, lazyload and limiter) to Fenceline: its objects in, ours out, and of every field what became of it.

mod fence;
mod limiter;
mod module;

use jiff::Timestamp;
use serde::Deserialize as _;
use serde::Serialize;
use serde_json::{Map, Value};

/// What became of Slime's objects.
#[derive(Debug, Default)]
pub struct Migration {
    /// Our objects, in YAML.
    pub objects: Vec<String>,
    pub report: Vec<Line>,
}

/// What became of one field.
#[derive(Debug, PartialEq, Eq)]
pub struct Line {
    /// Kind, namespace and name.
    pub object: String,
    pub field: String,
    pub fate: Fate,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It means the same here, in this field.
    Became(String),
    /// It has no meaning here, and why nothing is lost.
    NotNeeded(&'static str),
    /// A person must decide, or do something.
    ByHand(String),
}

impl std::fmt::Display for Line {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}: ", self.object, self.field)?;
        match &self.fate {
            Fate::Became(what) => write!(f, "became {what}"),
            Fate::NotNeeded(why) => write!(f, "not needed: {why}"),
            Fate::ByHand(what) => write!(f, "TO DO: {what}"),
        }
    }
}

/// Takes in YAML documents and makes ours of those that are Slime's. `now` dates what Slime had learnt.
///
/// # Errors
/// Fails on what is not YAML.
pub fn migrate(text: &str, now: Timestamp) -> anyhow::Result<Migration> {
    let mut migration = Migration::default();
    for document in serde_yaml::Deserializer::from_str(text) {
        let object = Value::deserialize(document)?;
        let many = object["items"].as_array().cloned();
        for object in many.unwrap_or_else(|| vec![object]) {
            migration.take(&object, now)?;
        }
    }
    Ok(migration)
}

impl Migration {
    fn take(&mut self, object: &Value, now: Timestamp) -> anyhow::Result<()> {
        let group = object["apiVersion"].as_str().unwrap_or_default();
        let group = group.split('/').next().unwrap_or_default();
        match (group, object["kind"].as_str().unwrap_or_default()) {
            ("microservice.slime.io", "ServiceFence") => fence::migrate(self, object, now),
            ("microservice.slime.io", "SmartLimiter") => limiter::migrate(self, object),
            ("config.netease.com", "SlimeBoot") => module::migrate(self, object),
            (_, "Service" | "Namespace") => {
                labels(self, object);
                Ok(())
            }
            _ if object.is_null() => Ok(()),
            _ => {
                let what = "no object of Slime's that is known here; left as it is".to_owned();
                self.say(object, "", Fate::ByHand(what));
                Ok(())
            }
        }
    }

    fn say(&mut self, object: &Value, field: &str, fate: Fate) {
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let names = [
            text(&object["kind"]),
            text(&object["metadata"]["namespace"]),
            text(&object["metadata"]["name"]),
        ];
        let names: Vec<String> = names.into_iter().filter(|name| !name.is_empty()).collect();
        self.report.push(Line {
            object: names.join(" "),
            field: field.to_owned(),
            fate,
        });
    }

    fn add(&mut self, object: &impl Serialize) -> anyhow::Result<()> {
        self.objects.push(serde_yaml::to_string(object)?);
        Ok(())
    }
}

/// Slime's label on Services and Namespaces.
fn labels(migration: &mut Migration, object: &Value) {
    let label = object["metadata"]["labels"]["slime.io/serviceFenced"].as_str();
    let Some(label) = label else {
        return;
    };
    let value = if label == "true" { "enforce" } else { "off" };
    let kind = object["kind"]
        .as_str()
        .unwrap_or_default()
        .to_ascii_lowercase();
    let name = object["metadata"]["name"].as_str().unwrap_or_default();
    let namespace = object["metadata"]["namespace"].as_str();
    let of = namespace.map_or_else(String::new, |namespace| format!("-n {namespace} "));
    let command = format!("kubectl label {of}{kind} {name} fenceline.dev/fence={value}");
    migration.say(
        object,
        "metadata.labels[slime.io/serviceFenced]",
        Fate::ByHand(command),
    );
}

/// The fields of an object; none where it is none.
fn fields(value: &Value) -> Map<String, Value> {
    value.as_object().cloned().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SLIME: &str = r"
apiVersion: microservice.slime.io/v1alpha1
kind: ServiceFence
metadata: {name: productpage, namespace: default}
spec:
  enable: true
  host:
    reviews.default.svc.cluster.local: {stable: {}}
    old.default.svc.cluster.local: {deadline: {expire: {seconds: 1893456000}}}
    other/*: {}
  namespaceSelector: [foo, bar]
  labelSelector:
  - selector: {group: shared}
  workloadSelector: {fromService: true}
  surprise: 1
status:
  domains: {}
  metricStatus:
    '{destination_service=''details.default.svc.cluster.local''}': '3'
---
apiVersion: microservice.slime.io/v1alpha1
kind: ServiceFence
metadata: {name: auto, namespace: default, labels: {app.kubernetes.io/created-by: fence-controller}}
spec: {enable: true, workloadSelector: {fromService: true}}
---
apiVersion: config.netease.com/v1alpha1
kind: SlimeBoot
metadata: {name: lazyload, namespace: mesh-operator}
spec:
  module:
  - name: lazyload
    kind: lazyload
    general:
      autoFence: true
      defaultFence: true
      autoPort: true
      wormholePort: ['9080']
      stableHost: [istio-telemetry/*, agent.ops.svc.cluster.local]
      domainAliases: [{pattern: '(?P<s>[^.]+)[.]corp', templates: ['$s.default.svc.cluster.local']}]
      fenceLabelKeyAlias: 'app:app'
      blackNamespaceList: 'a,b'
      metricSourceType: prometheus
    metric: {prometheus: {address: 'http://prom:9090', handlers: {}}}
---
apiVersion: v1
kind: Namespace
metadata: {name: foo, labels: {slime.io/serviceFenced: 'false'}}
";

    #[test]
    fn every_field_has_a_fate() {
        let now = Timestamp::from_second(1_700_000_000).unwrap();
        let migration = migrate(SLIME, now).unwrap();
        let report: Vec<String> = migration.report.iter().map(ToString::to_string).collect();
        let says = |text: &str| {
            assert!(
                report.iter().any(|line| line.contains(text)),
                "{text}: {report:#?}"
            )
        };
        says("spec.enable: became spec.mode: Enforce");
        says("spec.host[other/*]: became");
        says("spec.surprise: TO DO");
        says("status.metricStatus: became");
        says("ServiceFence default auto: : not needed");
        says("general.autoPort: not needed");
        says("general.metricSourceType: TO DO: give the operator --prometheus-url");
        says("kubectl label namespace foo fenceline.dev/fence=off");

        let objects: Vec<Value> = migration
            .objects
            .iter()
            .map(|text| serde_yaml::from_str(text).unwrap())
            .collect();
        assert_eq!(objects.len(), 2);
        let dependencies = objects[0]["spec"]["dependencies"].as_array().unwrap();
        assert_eq!(dependencies.len(), 6, "{dependencies:#?}");
        assert!(
            dependencies
                .iter()
                .any(|one| one["until"] == "2030-01-01T00:00:00Z")
        );
        assert_eq!(objects[0]["spec"]["workload"]["service"], "productpage");
        let policy = &objects[1];
        assert_eq!(policy["kind"], "FencePolicy");
        assert_eq!(policy["spec"]["granularity"], "Workload");
        assert_eq!(
            policy["spec"]["alwaysImport"][0],
            "agent.ops.svc.cluster.local"
        );
        assert_eq!(
            policy["spec"]["namespaceSelector"]["matchExpressions"][0]["operator"],
            "NotIn"
        );
    }
}
