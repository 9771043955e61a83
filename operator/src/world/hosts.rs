//! The hosts of the mesh: what a name means to a caller, and who may see what.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use fenceline_crds::istio::{Other, ServiceEntry, VirtualService};
use k8s_openapi::api::core::v1::{Service, ServicePort};
use serde_json::Value;

/// A namespaced object's name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key {
    pub namespace: String,
    pub name: String,
}

impl Key {
    pub fn new(namespace: impl Into<String>, name: impl Into<String>) -> Self {
        Self {
            namespace: namespace.into(),
            name: name.into(),
        }
    }
}

impl std::fmt::Display for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// To which namespaces a host is visible.
/// <https://istio.io/latest/docs/reference/config/networking/service-entry/#ServiceEntry-export_to>
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum ExportTo {
    #[default]
    Everyone,
    Namespaces(BTreeSet<String>),
}

impl ExportTo {
    /// `list` as Istio writes it, in an object of `namespace`: `*`, `.`, `~` or names.
    pub(super) fn parse<'a>(list: impl Iterator<Item = &'a str>, namespace: &str) -> Self {
        let mut named = BTreeSet::new();
        let mut any = false;
        for entry in list.map(str::trim).filter(|entry| !entry.is_empty()) {
            any = true;
            match entry {
                "*" => return Self::Everyone,
                "~" => {}
                "." => drop(named.insert(namespace.to_owned())),
                other => drop(named.insert(other.to_owned())),
            }
        }
        if any {
            Self::Namespaces(named)
        } else {
            Self::Everyone
        }
    }

    pub fn includes(&self, namespace: &str) -> bool {
        match self {
            Self::Everyone => true,
            Self::Namespaces(named) => named.contains(namespace),
        }
    }
}

/// What we know of a Service.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServiceFacts {
    /// Empty: Kubernetes selects nothing by it.
    pub selector: BTreeMap<String, String>,
    pub labels: BTreeMap<String, String>,
    pub addresses: Vec<IpAddr>,
    pub http_ports: BTreeSet<u16>,
    /// Ports for TCP that are not declared to be HTTP.
    pub other_ports: BTreeSet<u16>,
    /// Whether a call to it could be one that the global proxy cannot catch: a port that is not declared to be HTTP, or
    /// pods that are called by their own names.
    pub needs_scope: bool,
    /// Whether its pods are called by their own names and addresses.
    pub headless: bool,
    pub external_name: bool,
    /// What an ExternalName is another name for.
    pub alias_of: Option<String>,
    pub export_to: ExportTo,
}

/// Istio's protocol selection: `appProtocol`, then the port's name up to the first dash.
/// <https://istio.io/latest/docs/ops/configuration/traffic-management/protocol-selection/>
fn is_http(port: &ServicePort) -> bool {
    if port
        .protocol
        .as_deref()
        .is_some_and(|protocol| protocol != "TCP")
    {
        return false;
    }
    let declared = match (&port.app_protocol, &port.name) {
        (Some(declared), _) => declared.to_ascii_lowercase(),
        (None, Some(name)) => name
            .split('-')
            .next()
            .unwrap_or_default()
            .to_ascii_lowercase()
            .replace('_', "-"),
        (None, None) => return false,
    };
    let grpc_web = port
        .name
        .as_deref()
        .is_some_and(|name| name.starts_with("grpc-web"));
    grpc_web
        || matches!(
            declared.as_str(),
            "http" | "http2" | "grpc" | "grpc-web" | "kubernetes.io/h2c" | "kubernetes.io/ws"
        )
}

impl From<&Service> for ServiceFacts {
    fn from(service: &Service) -> Self {
        let namespace = service.metadata.namespace.as_deref().unwrap_or_default();
        let annotations = service.metadata.annotations.as_ref();
        let exported = annotations.and_then(|all| all.get("networking.istio.io/exportTo"));
        let spec = service.spec.as_ref();
        let ports = spec
            .and_then(|spec| spec.ports.as_deref())
            .unwrap_or_default();
        let addresses: Vec<IpAddr> = spec
            .and_then(|spec| spec.cluster_ips.as_ref())
            .into_iter()
            .flatten()
            .filter_map(|address| address.parse().ok())
            .collect();
        let tcp = |port: &&ServicePort| port.protocol.as_deref().is_none_or(|name| name == "TCP");
        Self {
            selector: spec
                .and_then(|spec| spec.selector.clone())
                .unwrap_or_default(),
            labels: service.metadata.labels.clone().unwrap_or_default(),
            http_ports: ports
                .iter()
                .filter(|port| is_http(port))
                .filter_map(|port| u16::try_from(port.port).ok())
                .collect(),
            other_ports: ports
                .iter()
                .filter(tcp)
                .filter(|port| !is_http(port))
                .filter_map(|port| u16::try_from(port.port).ok())
                .collect(),
            needs_scope: ports.iter().filter(tcp).any(|port| !is_http(port))
                || (addresses.is_empty() && !ports.is_empty()),
            headless: addresses.is_empty() && !ports.is_empty(),
            addresses,
            alias_of: spec
                .and_then(|spec| spec.external_name.as_deref())
                .map(|name| name.trim_end_matches('.').to_ascii_lowercase()),
            external_name: spec.and_then(|spec| spec.type_.as_deref()) == Some("ExternalName"),
            export_to: ExportTo::parse(
                exported.map(String::as_str).unwrap_or_default().split(','),
                namespace,
            ),
        }
    }
}

/// A host of an object of Istio's, in full; a short one is of the object's own namespace.
pub(super) fn full_name(host: &str, namespace: &str, cluster_domain: &str) -> String {
    let host = host.to_ascii_lowercase();
    if host.contains('.') || host == "*" {
        host
    } else {
        format!("{host}.{namespace}.svc.{cluster_domain}")
    }
}

/// What we know of a ServiceEntry or a VirtualService: names that mean something, and to whom.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NamedHosts {
    /// Lower case, full names.
    pub hosts: BTreeSet<String>,
    pub export_to: ExportTo,
    /// Single addresses by which a ServiceEntry is called, those that istiod gave it too.
    pub addresses: Vec<IpAddr>,
    /// The hosts that a VirtualService leads to, mirrors among them.
    pub destinations: BTreeSet<String>,
    /// The VirtualServices that it delegates to.
    pub delegates: BTreeSet<Key>,
    /// Since when there is a VirtualService: of two for everybody istiod takes the older.
    pub created: Option<jiff::Timestamp>,
}

impl NamedHosts {
    pub fn of_service_entry(entry: &ServiceEntry) -> Self {
        let namespace = entry.metadata.namespace.as_deref().unwrap_or_default();
        Self {
            hosts: entry
                .spec
                .hosts
                .iter()
                .map(|host| host.to_ascii_lowercase())
                .collect(),
            export_to: ExportTo::parse(entry.spec.export_to.iter().map(String::as_str), namespace),
            addresses: entry
                .spec
                .addresses
                .iter()
                .map(String::as_str)
                .chain(given_addresses(entry.status.as_ref()))
                .filter_map(|address| address.parse().ok())
                .collect(),
            ..Self::default()
        }
    }

    /// The hosts of a VirtualService that sidecars apply; short ones are names of its own namespace.
    pub fn of_virtual_service(service: &VirtualService, cluster_domain: &str) -> Self {
        let namespace = service.metadata.namespace.as_deref().unwrap_or_default();
        let spec = &service.spec;
        let mesh = spec.gateways.is_empty() || spec.gateways.iter().any(|name| name == "mesh");
        let full = |host: &str| full_name(host, namespace, cluster_domain);
        let mut destinations = BTreeSet::new();
        let mut delegates = BTreeSet::new();
        for route in spec.other.values().flat_map(leads_to) {
            match route {
                ("destination", destination) | ("mirror", destination) => {
                    destinations.extend(destination["host"].as_str().map(full));
                }
                (_, delegate) => {
                    let of = delegate["namespace"].as_str().unwrap_or(namespace);
                    let name = delegate["name"].as_str();
                    delegates.extend(name.map(|name| Key::new(of, name)));
                }
            }
        }
        let hosts = spec.hosts.iter().filter(|_| mesh);
        Self {
            hosts: hosts.map(|host| full(host)).collect(),
            export_to: ExportTo::parse(spec.export_to.iter().map(String::as_str), namespace),
            addresses: Vec::new(),
            destinations,
            delegates,
            created: service
                .metadata
                .creation_timestamp
                .as_ref()
                .map(|time| time.0),
        }
    }
}

impl NamedHosts {
    /// What sidecars make of a route of the Gateway API: a VirtualService for the Services that are its parents, for
    /// everyone where it is in the Service's namespace, and else for its own namespace's callers.
    /// <https://gateway-api.sigs.k8s.io/mesh/>
    pub fn of_route(namespace: &str, spec: &Other, cluster_domain: &str) -> Self {
        let service = |reference: &Value| {
            let kind = reference["kind"].as_str().map(str::to_owned);
            let of = reference["namespace"].as_str().unwrap_or(namespace);
            let name = reference["name"].as_str()?;
            Some((
                kind,
                of.to_owned(),
                format!("{name}.{of}.svc.{cluster_domain}"),
            ))
        };
        let parents = spec.get("parentRefs").and_then(Value::as_array);
        let parents: Vec<_> = parents
            .into_iter()
            .flatten()
            .filter_map(service)
            .filter(|(kind, ..)| kind.as_deref() == Some("Service"))
            .collect();
        let ours = parents.iter().any(|(_, of, _)| of == namespace);
        let backends = spec.get("rules").into_iter().flat_map(backends);
        Self {
            destinations: backends
                .filter_map(service)
                .filter(|(kind, ..)| kind.as_deref().is_none_or(|kind| kind == "Service"))
                .map(|(_, _, host)| host)
                .collect(),
            hosts: parents.into_iter().map(|(_, _, host)| host).collect(),
            export_to: if ours {
                ExportTo::Everyone
            } else {
                ExportTo::Namespaces([namespace.to_owned()].into())
            },
            ..Self::default()
        }
    }
}

/// The backends of a route's rules, at any depth: mirrors are among the filters.
fn backends(value: &Value) -> Vec<&Value> {
    match value {
        Value::Array(items) => items.iter().flat_map(backends).collect(),
        Value::Object(fields) => fields
            .iter()
            .flat_map(|(name, value)| match (name.as_str(), value) {
                ("backendRefs", Value::Array(items)) => {
                    // A backend may have filters of its own.
                    items
                        .iter()
                        .chain(items.iter().flat_map(backends))
                        .collect()
                }
                ("backendRef", value) => vec![value],
                _ => backends(value),
            })
            .collect(),
        _ => Vec::new(),
    }
}

/// What istiod's controller allocated.
/// <https://istio.io/latest/docs/reference/config/networking/service-entry/#ServiceEntryStatus>
fn given_addresses(status: Option<&Value>) -> impl Iterator<Item = &str> {
    let addresses = status.and_then(|status| status["addresses"].as_array());
    let addresses = addresses.into_iter().flatten();
    addresses.filter_map(|address| address["value"].as_str())
}

/// What a VirtualService's routes say, at any depth, of where requests go.
fn leads_to(value: &Value) -> Vec<(&str, &Value)> {
    match value {
        Value::Array(items) => items.iter().flat_map(leads_to).collect(),
        Value::Object(fields) => fields
            .iter()
            .flat_map(|(name, value)| {
                let leads = matches!(name.as_str(), "destination" | "mirror" | "delegate");
                let below = leads_to(value);
                leads
                    .then_some((name.as_str(), value))
                    .into_iter()
                    .chain(below)
            })
            .collect(),
        _ => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn facts(spec: &serde_json::Value) -> ServiceFacts {
        let service = json!({"metadata": {"name": "cart", "namespace": "shop"}, "spec": spec});
        ServiceFacts::from(&serde_json::from_value::<Service>(service).unwrap())
    }

    #[test]
    fn a_port_is_http_only_when_it_says_so() {
        for (port, http) in [
            (json!({"port": 80, "name": "http"}), true),
            (json!({"port": 80, "name": "http-web"}), true),
            (json!({"port": 80, "name": "grpc-api"}), true),
            (
                json!({"port": 80, "name": "web", "appProtocol": "http"}),
                true,
            ),
            (
                json!({"port": 80, "name": "http", "appProtocol": "tcp"}),
                false,
            ),
            (
                json!({"port": 80, "name": "web", "appProtocol": "kubernetes.io/h2c"}),
                true,
            ),
            (json!({"port": 80}), false),
            (json!({"port": 80, "name": "https"}), false),
            (json!({"port": 80, "name": "httpfoo"}), false),
            (json!({"port": 80, "name": "tcp-http"}), false),
        ] {
            let facts = facts(&json!({"clusterIPs": ["10.0.0.1"], "ports": [port]}));
            assert_eq!(facts.http_ports.len(), usize::from(http), "{port}");
            assert_eq!(facts.needs_scope, !http, "{port}");
        }
    }

    #[test]
    fn udp_ports_and_headless_services() {
        let dns = json!({"port": 53, "name": "dns", "protocol": "UDP"});
        assert!(!facts(&json!({"clusterIPs": ["10.0.0.1"], "ports": [dns]})).needs_scope);
        let http = json!({"port": 80, "name": "http"});
        assert!(facts(&json!({"clusterIPs": ["None"], "ports": [http]})).needs_scope);
    }

    #[test]
    fn routes_of_the_gateway_api() {
        let route = |namespace: &str, spec: Value| {
            let spec: Other = serde_json::from_value(spec).unwrap();
            NamedHosts::of_route(namespace, &spec, "cluster.local")
        };
        let spec = json!({
            "parentRefs": [{"group": "", "kind": "Service", "name": "front"}, {"kind": "Gateway", "name": "g"}],
            "rules": [{
                "backendRefs": [{"name": "v1", "port": 80}, {"name": "v2", "namespace": "bank"}],
                "filters": [{"type": "RequestMirror", "requestMirror": {"backendRef": {"name": "shadow"}}}],
            }],
        });
        let ours = route("shop", spec.clone());
        assert!(ours.hosts.iter().eq(["front.shop.svc.cluster.local"]));
        let want =
            ["shadow.shop", "v1.shop", "v2.bank"].map(|name| format!("{name}.svc.cluster.local"));
        assert!(ours.destinations.iter().eq(&want));
        assert_eq!(ours.export_to, ExportTo::Everyone);
        let mut theirs = spec;
        theirs["parentRefs"][0]["namespace"] = json!("bank");
        assert!(!route("shop", theirs).export_to.includes("bank"));
    }

    #[test]
    fn export_to_as_istio_writes_it() {
        let parse = |text: &str| ExportTo::parse(text.split(','), "shop");
        assert_eq!(parse(""), ExportTo::Everyone);
        assert_eq!(parse("a, *"), ExportTo::Everyone);
        assert!(parse(".").includes("shop") && !parse(".").includes("bank"));
        assert!(parse("bank").includes("bank") && !parse("bank").includes("shop"));
        assert!(!parse("~").includes("shop"));
    }
}
