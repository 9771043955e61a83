//! From a VirtualService and a DestinationRule that somebody wrote to the Router and the patches that mean the same; or, where those have
//! no words for it, the field that they have none for.

#[cfg(test)]
mod tests;
mod words;

use std::collections::{BTreeMap, BTreeSet};

use serde::Deserialize as _;
use serde_json::{Map, Value, json};
use words::{branch_match, check, labels};

/// What came of it.
#[derive(Debug, Default)]
pub struct Adoption {
    /// Our objects, in YAML.
    pub objects: Vec<String>,
    /// What is not adopted, and why: KIND NAMESPACE/NAME: FIELD: reason.
    pub refused: Vec<String>,
}

/// The objects for one service.
#[derive(Debug, Default)]
struct Service {
    namespace: String,
    name: String,
    routes: Option<Value>,
    rule: Option<Value>,
}

/// Why a service is not adopted: the object, the field and the reason.
struct Refused(&'static str, String, String);

type Result<T> = std::result::Result<T, Refused>;

/// Fields of a route that a TrafficPatch has too.
const HTTP: [&str; 6] = [
    "timeout",
    "retries",
    "fault",
    "mirrors",
    "headers",
    "corsPolicy",
];
/// Fields of a traffic policy that it has.
const DESTINATION: [&str; 4] = ["loadBalancer", "connectionPool", "outlierDetection", "tls"];
const ROUTES: &str = "VirtualService";
const RULE: &str = "DestinationRule";

/// Takes in YAML documents.
///
/// # Errors
/// Fails on what is not YAML.
pub fn adopt(text: &str) -> anyhow::Result<Adoption> {
    let mut services: BTreeMap<(String, String), Service> = BTreeMap::new();
    let mut adoption = Adoption::default();
    for document in serde_yaml::Deserializer::from_str(text) {
        let object = Value::deserialize(document)?;
        let many = object["items"].as_array().cloned();
        for object in many.unwrap_or_else(|| vec![object]) {
            if let Err(why) = sort(&mut services, object) {
                adoption.refused.push(why);
            }
        }
    }
    for service in services.values() {
        match service.adopted() {
            Ok(objects) => {
                for object in objects {
                    adoption.objects.push(serde_yaml::to_string(&object)?);
                }
            }
            Err(Refused(kind, field, why)) => {
                let Service {
                    namespace, name, ..
                } = service;
                let line = format!("{kind} for {namespace}/{name}: {field}: {why}");
                adoption.refused.push(line);
            }
        }
    }
    Ok(adoption)
}

/// Puts an object to those of its service.
fn sort(
    services: &mut BTreeMap<(String, String), Service>,
    object: Value,
) -> std::result::Result<(), String> {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let (kind, namespace) = (
        text(&object["kind"]),
        text(&object["metadata"]["namespace"]),
    );
    let whose = format!("{kind} {namespace}/{}", text(&object["metadata"]["name"]));
    let spec = &object["spec"];
    let host = match kind.as_str() {
        "" if object.is_null() => return Ok(()),
        "VirtualService" => match spec["hosts"].as_array().map(Vec::as_slice) {
            Some([host]) => text(host),
            _ => return Err(format!("{whose}: spec.hosts: a Router is for one host")),
        },
        "DestinationRule" => text(&spec["host"]),
        _ => {
            return Err(format!(
                "{whose}: neither a VirtualService nor a DestinationRule; left as it is"
            ));
        }
    };
    let mut labels = host.split('.');
    let (name, of) = (labels.next().unwrap_or_default(), labels.next());
    if name.is_empty() || name == "*" || of.is_some_and(|of| of != namespace) {
        return Err(format!(
            "{whose}: the host {host:?} is no Service of namespace {namespace}"
        ));
    }
    let service = services
        .entry((namespace.clone(), name.to_owned()))
        .or_default();
    (service.namespace, service.name) = (namespace, name.to_owned());
    let place = if kind == ROUTES {
        &mut service.routes
    } else {
        &mut service.rule
    };
    if place.is_some() {
        return Err(format!(
            "{whose}: there are two for {name}; istiod takes one of them"
        ));
    }
    *place = Some(object);
    Ok(())
}

/// A subset: its labels, and its policy.
struct Subset<'a> {
    labels: BTreeMap<&'a str, &'a str>,
    policy: Option<&'a Value>,
    used: bool,
}

/// The labels that tell versions and branches.
#[derive(Default)]
struct Labels {
    version: String,
    branch: Option<String>,
}

impl Service {
    fn adopted(&self) -> Result<Vec<Value>> {
        let mut objects = Vec::new();
        let mut subsets = self.subsets()?;
        let labels = labels(&subsets)?;
        let routes = self.http()?;
        let routed = !subsets.is_empty();
        let mut branches: Vec<Value> = Vec::new();
        let last = routes.len().saturating_sub(1);
        for (index, route) in routes.iter().enumerate() {
            let at = format!("spec.http[{index}]");
            let base = route
                .get("match")
                .is_none_or(|matches| matches == &json!([]));
            if base != (index == last) {
                let why = "a Router's last route is the one without a match, and it has one";
                return Err(Refused(ROUTES, format!("{at}.match"), why.to_owned()));
            }
            let mut branch = String::new();
            if routed {
                let made = self.branch(route, &at, base, &mut subsets, &labels)?;
                branch = made["name"].as_str().unwrap_or_default().to_owned();
                branches.push(made);
            } else if !base {
                let why = "without subsets there are no branches for it to lead to";
                return Err(Refused(ROUTES, format!("{at}.match"), why.to_owned()));
            }
            let http: Map<String, Value> = HTTP
                .into_iter()
                .filter_map(|field| Some((field.to_owned(), route.get(field)?.clone())))
                .collect();
            if !http.is_empty() {
                let suffix = if branch.is_empty() {
                    "http".to_owned()
                } else {
                    format!("{branch}-http")
                };
                let mut spec = json!({"service": self.name, "http": http});
                if !branch.is_empty() {
                    spec["branch"] = json!(branch);
                }
                objects.push(self.object("TrafficPatch", &suffix, &spec));
            }
        }
        self.policies(&subsets, &labels, &branches, &mut objects)?;
        if routed {
            // The base is first here, and last there.
            branches.rotate_right(1);
            let mut spec = json!({"service": self.name, "labels": {"version": labels.version}, "branches": branches});
            if let Some(branch) = &labels.branch {
                spec["labels"]["branch"] = json!(branch);
            }
            objects.insert(0, self.object("Router", "", &spec));
        }
        Ok(objects)
    }

    fn object(&self, kind: &str, suffix: &str, spec: &Value) -> Value {
        let name = if suffix.is_empty() {
            self.name.clone()
        } else {
            format!("{}-{suffix}", self.name)
        };
        json!({
            "apiVersion": "fenceline.dev/v1alpha1",
            "kind": kind,
            "metadata": {"name": name, "namespace": self.namespace},
            "spec": spec,
        })
    }

    fn http(&self) -> Result<Vec<Map<String, Value>>> {
        let Some(routes) = &self.routes else {
            return Ok(Vec::new());
        };
        let spec = routes["spec"].as_object().cloned().unwrap_or_default();
        for (field, value) in &spec {
            let mesh = field == "gateways" && *value == json!(["mesh"]);
            if !mesh && !["hosts", "http"].contains(&field.as_str()) {
                let why = "a Router has no such field";
                return Err(Refused(ROUTES, format!("spec.{field}"), why.to_owned()));
            }
        }
        let mut result = Vec::new();
        for (index, route) in spec
            .get("http")
            .and_then(Value::as_array)
            .into_iter()
            .flatten()
            .enumerate()
        {
            let mut route = route.as_object().cloned().unwrap_or_default();
            // The older way to write one mirror.
            if let Some(mirror) = route.remove("mirror") {
                let mut one = json!({"destination": mirror});
                if let Some(share) = route.remove("mirrorPercentage") {
                    one["percentage"] = share;
                }
                route.insert("mirrors".to_owned(), json!([one]));
            }
            for field in route.keys() {
                if !HTTP.contains(&field.as_str())
                    && !["name", "match", "route"].contains(&field.as_str())
                {
                    let why = "neither a Router nor a TrafficPatch has such a field";
                    return Err(Refused(
                        ROUTES,
                        format!("spec.http[{index}].{field}"),
                        why.to_owned(),
                    ));
                }
            }
            result.push(route);
        }
        Ok(result)
    }

    fn subsets(&self) -> Result<BTreeMap<&str, Subset<'_>>> {
        let Some(rule) = &self.rule else {
            return Ok(BTreeMap::new());
        };
        for field in rule["spec"].as_object().into_iter().flat_map(Map::keys) {
            if !["host", "subsets", "trafficPolicy"].contains(&field.as_str()) {
                let why = "what Fenceline writes has no such field";
                return Err(Refused(RULE, format!("spec.{field}"), why.to_owned()));
            }
        }
        let subsets = rule["spec"]["subsets"].as_array().into_iter().flatten();
        Ok(subsets
            .filter_map(|subset| {
                let labels = subset["labels"].as_object().into_iter().flatten();
                let labels =
                    labels.filter_map(|(label, value)| Some((label.as_str(), value.as_str()?)));
                let made = Subset {
                    labels: labels.collect(),
                    policy: subset.get("trafficPolicy"),
                    used: false,
                };
                Some((subset["name"].as_str()?, made))
            })
            .collect())
    }

    /// The branch that a route is.
    fn branch(
        &self,
        route: &Map<String, Value>,
        at: &str,
        base: bool,
        subsets: &mut BTreeMap<&str, Subset<'_>>,
        labels: &Labels,
    ) -> Result<Value> {
        let refuse =
            |field: &str, why: &str| Refused(ROUTES, format!("{at}.{field}"), why.to_owned());
        let mut versions = Map::new();
        let mut named: BTreeSet<String> = BTreeSet::new();
        let destinations = route
            .get("route")
            .and_then(Value::as_array)
            .cloned()
            .unwrap_or_default();
        for destination in &destinations {
            let of_route = destination.as_object().into_iter().flat_map(Map::keys);
            let of_destination = destination["destination"]
                .as_object()
                .into_iter()
                .flat_map(Map::keys);
            if let Some(field) = of_route
                .filter(|field| !["destination", "weight"].contains(&field.as_str()))
                .chain(of_destination.filter(|field| !["host", "subset"].contains(&field.as_str())))
                .next()
            {
                return Err(refuse(
                    &format!("route.{field}"),
                    "a Router's versions have no such field",
                ));
            }
            let host = destination["destination"]["host"]
                .as_str()
                .unwrap_or_default();
            if host.split('.').next() != Some(&self.name) {
                return Err(refuse(
                    "route.destination.host",
                    "a Router leads to its own Service alone",
                ));
            }
            let subset = destination["destination"]["subset"]
                .as_str()
                .unwrap_or_default();
            let Some(subset) = subsets.get_mut(subset) else {
                return Err(refuse(
                    "route.destination.subset",
                    "the DestinationRule has no such subset",
                ));
            };
            subset.used = true;
            let version = subset
                .labels
                .get(labels.version.as_str())
                .copied()
                .unwrap_or_default();
            let weight = destination
                .get("weight")
                .cloned()
                .unwrap_or_else(|| json!(1));
            versions.insert(version.to_owned(), weight);
            named.extend(
                labels
                    .branch
                    .iter()
                    .filter_map(|label| Some((*subset.labels.get(label.as_str())?).to_owned())),
            );
        }
        if named.len() > 1 {
            return Err(refuse("route", "its subsets are of several branches"));
        }
        let given = route.get("name").and_then(Value::as_str).map(str::to_owned);
        let fallback = if base {
            "main".to_owned()
        } else {
            versions.keys().next().cloned().unwrap_or_default()
        };
        let name = named.into_iter().next().or(given).unwrap_or(fallback);
        let mut branch = json!({"name": name, "versions": versions});
        if !base {
            let matches = route["match"].as_array().cloned().unwrap_or_default();
            let matches: Result<Vec<Value>> = matches
                .iter()
                .map(|one| branch_match(one, labels).map_err(|why| refuse("match", &why)))
                .collect();
            branch["match"] = matches?.into();
        }
        Ok(branch)
    }

    fn policies(
        &self,
        subsets: &BTreeMap<&str, Subset<'_>>,
        labels: &Labels,
        branches: &[Value],
        objects: &mut Vec<Value>,
    ) -> Result<()> {
        let host = self
            .rule
            .as_ref()
            .and_then(|rule| rule["spec"].get("trafficPolicy"));
        if let Some(policy) = host {
            check(policy, "spec.trafficPolicy")?;
            let spec = json!({"service": self.name, "destination": policy});
            objects.push(self.object("TrafficPatch", "destination", &spec));
        }
        for (name, subset) in subsets {
            if !subset.used {
                let why = "no route of the VirtualService leads there; somebody else's may";
                return Err(Refused(
                    RULE,
                    format!("spec.subsets[{name}]"),
                    why.to_owned(),
                ));
            }
            let Some(policy) = subset.policy else {
                continue;
            };
            let at = format!("spec.subsets[{name}].trafficPolicy");
            check(policy, &at)?;
            let both = policy.as_object().into_iter().flat_map(Map::keys);
            if let Some(field) = both
                .into_iter()
                .find(|field| host.is_some_and(|host| host.get(field.as_str()).is_some()))
            {
                let why = "the host's policy has it too; Istio takes the subset's whole, patches are merged field by field";
                return Err(Refused(RULE, format!("{at}.{field}"), why.to_owned()));
            }
            let version = subset
                .labels
                .get(labels.version.as_str())
                .copied()
                .unwrap_or_default();
            let branch = branches
                .iter()
                .find(|branch| branch["versions"].get(version).is_some());
            let branch = branch
                .map(|branch| branch["name"].clone())
                .unwrap_or_default();
            let spec = json!({"service": self.name, "branch": branch, "version": version, "destination": policy});
            objects.push(self.object("TrafficPatch", &format!("{name}-destination"), &spec));
        }
        Ok(())
    }
}
