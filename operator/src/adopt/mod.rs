//! From a VirtualService and a DestinationRule that somebody wrote to the Router and the patches that mean the same; or, where those have
//! no words for it, the field that they have none for.

#[cfg(test)]
mod tests;
mod words;

use std::collections::{BTreeMap, BTreeSet};

use anyhow::Context as _;
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
    /// The files that they are in.
    routes_file: String,
    rule_file: String,
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
const NO_LIST: &str = "it is no list";
/// As the Router's schema has it.
const MOST_WEIGHT: u64 = 1_000_000;
const ROUTES: &str = "VirtualService";
const RULE: &str = "DestinationRule";

/// Takes in YAML documents: files, each with its name, as a VirtualService and its DestinationRule may be in different ones.
///
/// # Errors
/// Fails on what is not YAML, with the name of the file.
pub fn adopt(files: &[(String, String)]) -> anyhow::Result<Adoption> {
    let mut services: BTreeMap<(String, String), Service> = BTreeMap::new();
    let mut adoption = Adoption::default();
    for (file, text) in files {
        for document in serde_yaml::Deserializer::from_str(text) {
            let object = Value::deserialize(document).with_context(|| file.clone())?;
            let many = object["items"].as_array().cloned();
            for object in many.unwrap_or_else(|| vec![object]) {
                if let Err(why) = sort(&mut services, object, file) {
                    adoption.refused.push(format!("{file}: {why}"));
                }
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
                let file = if kind == ROUTES {
                    &service.routes_file
                } else {
                    &service.rule_file
                };
                let line = format!("{file}: {kind} for {namespace}/{name}: {field}: {why}");
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
    file: &str,
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
    let name = host.split('.').next().unwrap_or_default();
    if name.is_empty() || name.contains('*') || !is_host_of(&host, &namespace, name) {
        return Err(format!(
            "{whose}: the host {host:?} is no Service of namespace {namespace}"
        ));
    }
    let service = services
        .entry((namespace.clone(), name.to_owned()))
        .or_default();
    (service.namespace, service.name) = (namespace, name.to_owned());
    let (place, of_file) = if kind == ROUTES {
        (&mut service.routes, &mut service.routes_file)
    } else {
        (&mut service.rule, &mut service.rule_file)
    };
    if place.is_some() {
        return Err(format!(
            "{whose}: there are two for {name}; istiod takes one of them"
        ));
    }
    *place = Some(object);
    file.clone_into(of_file);
    Ok(())
}

/// Whether a host is a Service's: its name alone, or with the namespace, and what comes after that.
fn is_host_of(host: &str, namespace: &str, name: &str) -> bool {
    let mut labels = host.split('.');
    labels.next() == Some(name)
        && labels.next().is_none_or(|of| of == namespace)
        && labels.next().is_none_or(|svc| svc == "svc")
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
            } else {
                self.leads_to_itself(route, &at)?;
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
        if objects.is_empty() && self.routes.is_some() {
            // What it says is what Istio does anyway: whoever deletes it should know that nothing takes its place.
            let why = "it leads to its own Service and sets nothing; there is nothing to make of it, and it can be deleted";
            return Err(Refused(ROUTES, "spec.http".to_owned(), why.to_owned()));
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
        let routes = match spec.get("http") {
            Some(Value::Array(routes)) if !routes.is_empty() => routes.as_slice(),
            None | Some(Value::Array(_)) => {
                let why = "it has no route; istiod makes nothing of it";
                return Err(Refused(ROUTES, "spec.http".to_owned(), why.to_owned()));
            }
            Some(_) => return Err(Refused(ROUTES, "spec.http".to_owned(), NO_LIST.to_owned())),
        };
        let mut result = Vec::new();
        for (index, route) in routes.iter().enumerate() {
            let Some(mut route) = route.as_object().cloned() else {
                let why = "it is no object";
                return Err(Refused(
                    ROUTES,
                    format!("spec.http[{index}]"),
                    why.to_owned(),
                ));
            };
            for field in ["match", "route", "mirrors"] {
                if route.get(field).is_some_and(|value| !value.is_array()) {
                    let at = format!("spec.http[{index}].{field}");
                    return Err(Refused(ROUTES, at, NO_LIST.to_owned()));
                }
            }
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

    /// Without a Router requests go to the Service itself, and so must those of this route.
    fn leads_to_itself(&self, route: &Map<String, Value>, at: &str) -> Result<()> {
        let refuse =
            |field: &str, why: &str| Refused(ROUTES, format!("{at}.{field}"), why.to_owned());
        let destinations = route.get("route").and_then(Value::as_array);
        let destinations = destinations.map(Vec::as_slice).unwrap_or_default();
        if destinations.is_empty() {
            return Err(refuse("route", "it leads nowhere"));
        }
        for destination in destinations {
            self.is_plain(destination)
                .map_err(|(field, why)| refuse(&field, why))?;
            if destination["destination"].get("subset").is_some() {
                let why = "there is no DestinationRule with such a subset here: give both";
                return Err(refuse("route.destination.subset", why));
            }
        }
        Ok(())
    }

    /// Whether a destination is this Service, with nothing that a Router has no words for; else the field, and why not.
    fn is_plain(&self, destination: &Value) -> std::result::Result<(), (String, &'static str)> {
        let of_route = destination.as_object().into_iter().flat_map(Map::keys);
        let of_destination = destination["destination"]
            .as_object()
            .into_iter()
            .flat_map(Map::keys);
        let unknown = of_route
            .filter(|field| !["destination", "weight"].contains(&field.as_str()))
            .map(|field| format!("route.{field}"))
            .chain(
                of_destination
                    .filter(|field| !["host", "subset"].contains(&field.as_str()))
                    .map(|field| format!("route.destination.{field}")),
            )
            .next();
        if let Some(field) = unknown {
            return Err((field, "a Router's versions have no such field"));
        }
        let host = destination["destination"]["host"].as_str();
        if !is_host_of(host.unwrap_or_default(), &self.namespace, &self.name) {
            let field = "route.destination.host".to_owned();
            return Err((field, "a Router leads to its own Service alone"));
        }
        let weight = destination.get("weight");
        if weight.is_some_and(|weight| weight.as_u64().is_none_or(|weight| weight > MOST_WEIGHT)) {
            let field = "route.weight".to_owned();
            return Err((field, "a weight is a whole number from 0 to 1000000"));
        }
        Ok(())
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
            self.is_plain(destination)
                .map_err(|(field, why)| refuse(&field, why))?;
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
        if versions.is_empty() {
            return Err(refuse("route", "it leads nowhere"));
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
