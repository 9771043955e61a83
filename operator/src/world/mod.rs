//! The mesh as the planners see it: an immutable snapshot, cheap to copy and to change, since its maps share structure.

mod behind;
mod change;
mod dependents;
pub mod feed;
mod hosts;
mod mesh_config;
mod policies;
mod protection;
mod read;
mod redirects;
mod rules;
mod task;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};

use fenceline_crds::istio::{
    AuthorizationPolicy, DestinationRule, EnvoyFilter, Sidecar, VirtualService,
};
use fenceline_crds::{FencePolicy, RateLimit, Router, ServiceFence, TrafficPatch};
use imbl::{HashMap as SharedMap, OrdMap};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;

pub use behind::{MOST_HOSTS, Protection, TooFar};
pub use hosts::{ExportTo, Key, NamedHosts, ServiceFacts};
pub use policies::PolicyFacts;
use redirects::Redirects;
pub use rules::RuleFacts;

/// What carries a pod's traffic.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Proxy {
    /// A sidecar of its own, which a Sidecar configures.
    #[default]
    Sidecar,
    /// Nothing: it is not in the mesh.
    Nothing,
    /// ztunnel, which has no scope to be narrowed.
    Ambient,
    /// Nothing that is its own: it is in the host's network.
    HostNetwork,
}

impl Proxy {
    /// Why no Sidecar configures it: "2 of its 3 pods …".
    pub fn why(self) -> &'static str {
        match self {
            Self::Sidecar => "have a sidecar",
            Self::Nothing => "have no sidecar",
            Self::Ambient => "are in ambient mode",
            Self::HostNetwork => "are in the host's network",
        }
    }
}

/// What we know of a pod.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PodFacts {
    pub proxy: Proxy,
    /// Whether it has not ended.
    pub runs: bool,
    /// Whether it takes requests: it says so, and is not about to end.
    pub ready: bool,
    pub service_account: String,
    /// The Deployment, StatefulSet, Job or CronJob that it is of, as Istio names it.
    pub workload: String,
    pub labels: BTreeMap<String, String>,
    /// Empty for pods in the host's network: an address of theirs says nothing of who calls.
    pub addresses: Vec<IpAddr>,
}

/// A host that can be put into a Sidecar: `namespace` is that of the object which defines it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Host {
    pub namespace: Arc<str>,
    pub fqdn: Arc<str>,
}

impl Host {
    pub fn new(namespace: impl Into<Arc<str>>, fqdn: impl Into<Arc<str>>) -> Self {
        Self {
            namespace: namespace.into(),
            fqdn: fqdn.into(),
        }
    }
}

impl std::fmt::Display for Host {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.namespace, self.fqdn)
    }
}

/// What one namespace can see of the mesh.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct View {
    pub visible: u32,
    /// Hosts that must be in every scope, since the global proxy could not catch a call to them.
    pub always: BTreeSet<Host>,
    /// Of those: Services with ports that are not HTTP, which can be learnt otherwise. Not where such a port is HTTP
    /// elsewhere in the mesh: Envoy would wait there for a request to tell what it is, and a server that speaks first for
    /// nothing.
    pub non_http: BTreeSet<Host>,
}

type Namespaces = OrdMap<String, Arc<BTreeMap<String, String>>>;
type Ranges = OrdMap<[u8; 2], usize>;
type Views = Arc<Mutex<HashMap<String, Arc<View>>>>;

/// The mesh at one moment.
#[derive(Clone, Debug)]
pub struct World {
    pub cluster_domain: Arc<str>,
    /// Namespaces with their labels.
    pub namespaces: Namespaces,
    pub services: OrdMap<Key, Arc<ServiceFacts>>,
    pub service_entries: OrdMap<Key, Arc<NamedHosts>>,
    pub virtual_services: OrdMap<Key, Arc<NamedHosts>>,
    pub policies: OrdMap<Key, Arc<PolicyFacts>>,
    /// The AuthorizationPolicies that Fenceline wrote for the global proxy.
    pub own_policies: OrdMap<Key, Arc<AuthorizationPolicy>>,
    pub pods: OrdMap<Key, Arc<PodFacts>>,
    /// How many endpoints of the global proxy are ready, by EndpointSlice.
    pub global_proxy: OrdMap<Key, usize>,
    /// Whether none were for a while.
    pub global_proxy_gone: bool,
    pub sidecars: OrdMap<Key, Arc<Sidecar>>,
    /// Only those that Fenceline wrote.
    pub envoy_filters: OrdMap<Key, Arc<EnvoyFilter>>,
    pub fences: OrdMap<Key, Arc<ServiceFence>>,
    pub routers: OrdMap<Key, Arc<Router>>,
    pub traffic_patches: OrdMap<Key, Arc<TrafficPatch>>,
    pub rate_limits: OrdMap<Key, Arc<RateLimit>>,
    /// The VirtualServices that Fenceline wrote for Routers and patches.
    pub own_routes: OrdMap<Key, Arc<VirtualService>>,
    /// The DestinationRules that it wrote.
    pub own_rules: OrdMap<Key, Arc<DestinationRule>>,
    /// Of every DestinationRule, its host and who sees it.
    pub rules: OrdMap<Key, Arc<RuleFacts>>,
    pub fence_policies: OrdMap<String, Arc<FencePolicy>>,
    /// Hosts that MeshConfig makes every proxy need, as it writes them.
    pub mesh_config: Arc<BTreeSet<String>>,
    /// The CustomResourceDefinition of fences, as an owner.
    pub definition: Option<OwnerReference>,
    pod_of_address: SharedMap<IpAddr, Key>,
    service_of_address: SharedMap<IpAddr, Key>,
    /// Services by their full names.
    service_of_name: SharedMap<Arc<str>, (Host, Arc<ServiceFacts>)>,
    /// The VirtualServices of each host.
    routes: OrdMap<String, BTreeSet<Key>>,
    /// The VirtualServices that delegate to each.
    roots: OrdMap<Key, BTreeSet<Key>>,
    /// The ServiceEntries of each host.
    entries: OrdMap<String, BTreeSet<Key>>,
    /// Hosts that a policy protected until a moment ago, and how many changes ago wait to be forgotten: some proxy may
    /// still route as it did then.
    lingering: OrdMap<String, (Protection, usize)>,
    /// How many addresses of Services begin so.
    service_ranges: Ranges,
    /// How many Services have this port for HTTP.
    http_ports: OrdMap<u16, usize>,
    /// How many Services are ExternalNames.
    aliases: usize,
    /// Worked out when first asked for, for the hosts as they are now.
    views: Views,
    /// What was found out of protection, as far as it was asked for.
    found: behind::Found,
    redirects: Redirects,
}

impl World {
    pub fn new(cluster_domain: &str) -> Self {
        Self {
            cluster_domain: cluster_domain.into(),
            namespaces: OrdMap::new(),
            services: OrdMap::new(),
            service_entries: OrdMap::new(),
            virtual_services: OrdMap::new(),
            policies: OrdMap::new(),
            own_policies: OrdMap::new(),
            pods: OrdMap::new(),
            global_proxy: OrdMap::new(),
            global_proxy_gone: false,
            sidecars: OrdMap::new(),
            envoy_filters: OrdMap::new(),
            fences: OrdMap::new(),
            routers: OrdMap::new(),
            traffic_patches: OrdMap::new(),
            rate_limits: OrdMap::new(),
            own_routes: OrdMap::new(),
            own_rules: OrdMap::new(),
            rules: OrdMap::new(),
            fence_policies: OrdMap::new(),
            mesh_config: Arc::default(),
            definition: None,
            pod_of_address: SharedMap::new(),
            service_of_address: SharedMap::new(),
            service_of_name: SharedMap::new(),
            routes: OrdMap::new(),
            roots: OrdMap::new(),
            entries: OrdMap::new(),
            lingering: OrdMap::new(),
            service_ranges: OrdMap::new(),
            http_ports: OrdMap::new(),
            aliases: 0,
            views: Views::default(),
            found: behind::Found::default(),
            redirects: Redirects::default(),
        }
    }

    pub fn set_service(&mut self, key: &Key, facts: Option<ServiceFacts>) {
        self.views = Views::default();
        self.found = behind::Found::default();
        let old = self.services.get(key).map(AsRef::as_ref);
        let ports = |facts: Option<&ServiceFacts>| facts.map(|facts| facts.http_ports.clone());
        let (were, are) = (ports(old), ports(facts.as_ref()));
        count(
            &mut self.http_ports,
            were.into_iter().flatten(),
            are.into_iter().flatten(),
        );
        let is_alias = |facts: Option<&ServiceFacts>| {
            usize::from(facts.is_some_and(|of| of.alias_of.is_some()))
        };
        let aliases = self.aliases + is_alias(facts.as_ref()) - is_alias(old);
        let old = old.map(|old| old.addresses.as_slice());
        let new = facts.as_ref().map(|facts| facts.addresses.as_slice());
        move_addresses(&mut self.service_of_address, key, old, new);
        count(&mut self.service_ranges, ranges(old), ranges(new));
        self.aliases = aliases;
        set(&mut self.services, key, facts);
        let fqdn: Arc<str> = self.fqdn(key).into();
        match self.services.get(key) {
            Some(facts) => {
                let host = Host::new(&*key.namespace, Arc::clone(&fqdn));
                self.service_of_name.insert(fqdn, (host, Arc::clone(facts)));
            }
            None => drop(self.service_of_name.remove(&fqdn)),
        }
    }

    pub fn set_policy(&mut self, key: &Key, facts: Option<PolicyFacts>) {
        self.found = behind::Found::default();
        set(&mut self.policies, key, facts);
    }

    pub fn set_pod(&mut self, key: &Key, facts: Option<PodFacts>) {
        let old = self.pods.get(key).map(|old| old.addresses.as_slice());
        let new = facts.as_ref().map(|facts| facts.addresses.as_slice());
        move_addresses(&mut self.pod_of_address, key, old, new);
        set(&mut self.pods, key, facts);
    }

    /// Keeps a host protected after a change that took its protection away, until [`Self::forget`] was called as often.
    fn linger(&mut self, host: &str, by: Protection) {
        self.found = behind::Found::default();
        let (_, changes) = self.lingering.entry(host.to_owned()).or_insert((by, 0));
        *changes += 1;
    }

    /// The change was so long ago that every proxy has heard of it.
    fn forget(&mut self, host: &str) {
        self.found = behind::Found::default();
        if let Some((_, changes)) = self.lingering.get_mut(host) {
            *changes -= 1;
            if *changes == 0 {
                self.lingering.remove(host);
            }
        }
    }

    pub fn set_service_entry(&mut self, key: &Key, hosts: Option<NamedHosts>) {
        self.views = Views::default();
        self.found = behind::Found::default();
        let old = self.service_entries.get(key).cloned();
        index_hosts(&mut self.entries, key, old.as_deref(), hosts.as_ref());
        set(&mut self.service_entries, key, hosts);
    }

    pub fn set_virtual_service(&mut self, key: &Key, hosts: Option<NamedHosts>) {
        self.views = Views::default();
        self.found = behind::Found::default();
        let old = self.virtual_services.get(key).cloned();
        index_hosts(&mut self.routes, key, old.as_deref(), hosts.as_ref());
        let delegates = |of: &NamedHosts| of.delegates.clone();
        let (were, are) = (old.as_deref().map(delegates), hosts.as_ref().map(delegates));
        index(
            &mut self.roots,
            key,
            &were.unwrap_or_default(),
            are.unwrap_or_default(),
        );
        set(&mut self.virtual_services, key, hosts);
    }

    /// How many endpoints of the global proxy are ready.
    pub fn global_proxy_endpoints(&self) -> usize {
        self.global_proxy.values().sum()
    }

    pub fn pod_at(&self, address: IpAddr) -> Option<(&Key, &PodFacts)> {
        let key = self.pod_of_address.get(&address)?;
        Some((key, self.pods.get(key)?))
    }

    /// The first two bytes of the Services' IPv4 addresses: the ranges that they come from, near enough.
    pub fn service_ranges(&self) -> impl Iterator<Item = [u8; 2]> {
        self.service_ranges.keys().copied()
    }

    /// The ports that are HTTP anywhere in the mesh: fenced proxies have a listener for each, by way of the global proxy.
    pub fn http_ports(&self) -> impl Iterator<Item = u16> {
        self.http_ports.keys().copied()
    }

    pub fn service_at(&self, address: IpAddr) -> Option<&Key> {
        self.service_of_address.get(&address)
    }

    /// The VirtualServices, and routes of the Gateway API, for a host.
    pub fn routes_of(&self, fqdn: &str) -> impl Iterator<Item = &Key> {
        self.routes.get(fqdn).into_iter().flatten()
    }

    /// The full name of a Service.
    pub fn fqdn(&self, service: &Key) -> String {
        format!(
            "{}.{}.svc.{}",
            service.name, service.namespace, self.cluster_domain
        )
    }

    /// The Service that a full name is the name of, whether it exists or not.
    pub fn service_named(&self, fqdn: &str) -> Option<Key> {
        let local = fqdn
            .strip_suffix(&*self.cluster_domain)?
            .strip_suffix(".svc.")?;
        let (name, namespace) = local.split_once('.')?;
        (!namespace.contains('.')).then(|| Key::new(namespace, name))
    }

    /// Whether the mesh has any ExternalName.
    pub fn has_aliases(&self) -> bool {
        self.aliases > 0
    }

    /// What an ExternalName is another name for.
    pub fn alias_of(&self, fqdn: &str) -> Option<&str> {
        let service = self.services.get(&self.service_named(fqdn)?)?;
        service.alias_of.as_deref()
    }

    /// The one host by which a caller of `namespace` reaches `fqdn`, if it is that of a Service and nothing else bears on
    /// it: what is nearly always so.
    pub fn only_provider(&self, namespace: &str, fqdn: &str) -> Option<&Host> {
        let (host, facts) = self.service_of_name.get(fqdn)?;
        let alone = facts.export_to.includes(namespace)
            && !self.routes.contains_key(fqdn)
            && self.wildcard_routes(fqdn).next().is_none();
        alone.then_some(host)
    }

    /// The hosts by which a caller of `namespace` reaches `fqdn`: a Service, or else what ServiceEntries call so; and
    /// what VirtualServices do. Those with wildcards make no host of their own.
    pub fn providers(&self, namespace: &str, fqdn: &str) -> BTreeSet<Host> {
        let name: Arc<str> = fqdn.into();
        let host = |key: &Key| Host::new(&*key.namespace, Arc::clone(&name));
        let service = self.service_named(fqdn).filter(|key| {
            self.services
                .get(key)
                .is_some_and(|facts| facts.export_to.includes(namespace))
        });
        let visible = |of: &OrdMap<Key, Arc<NamedHosts>>, key: &Key| {
            of.get(key)
                .is_some_and(|hosts| hosts.export_to.includes(namespace))
        };
        let entries = self.entries.get(fqdn).into_iter().flatten();
        let entries =
            entries.filter(|key| service.is_none() && visible(&self.service_entries, key));
        // istiod takes VirtualServices by their own namespace, which need not be the Service's.
        let routes = self.routes.get(fqdn).into_iter().flatten();
        let routes = routes.filter(|key| visible(&self.virtual_services, key));
        let named = entries.chain(routes).map(host);
        let mut providers: BTreeSet<Host> = named.chain(service.as_ref().map(host)).collect();
        if !providers.is_empty() {
            let wildcards = self.wildcard_routes(fqdn);
            let wildcards = wildcards.filter(|key| visible(&self.virtual_services, key));
            providers.extend(wildcards.map(host));
        }
        providers
    }

    /// What a caller of `namespace` can see.
    pub fn view(&self, namespace: &str) -> Arc<View> {
        let mut views = self.views.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(view) = views.get(namespace) {
            return Arc::clone(view);
        }
        let view = Arc::new(self.look(namespace));
        views.insert(namespace.to_owned(), Arc::clone(&view));
        view
    }

    fn look(&self, namespace: &str) -> View {
        let mut view = View::default();
        for (key, facts) in &self.services {
            if facts.external_name || !facts.export_to.includes(namespace) {
                continue;
            }
            view.visible += 1;
            if facts.needs_scope {
                let host = Host::new(&*key.namespace, self.fqdn(key));
                let shares = |port: &u16| self.http_ports.contains_key(port);
                if !facts.headless && !facts.other_ports.iter().any(shares) {
                    view.non_http.insert(host.clone());
                }
                view.always.insert(host);
            }
        }
        // A wildcard of a ServiceEntry is a host of its own, and makes istiod look at every service (istio#60473); a wildcard
        // of a VirtualService comes with the hosts that it is for.
        let entries = self.service_entries.iter();
        let routes = self.virtual_services.iter();
        let routes =
            routes.filter(|(_, hosts)| !hosts.hosts.iter().any(|host| host.starts_with('*')));
        for (key, hosts) in entries
            .chain(routes)
            .filter(|(_, hosts)| hosts.export_to.includes(namespace))
        {
            for fqdn in &hosts.hosts {
                let host = Host::new(&*key.namespace, &**fqdn);
                let service = self
                    .service_named(fqdn)
                    .and_then(|key| self.services.get(&key));
                match service {
                    None => view.visible += u32::from(view.always.insert(host)),
                    // No host more, but its rules must come with the Service.
                    Some(facts) if facts.needs_scope => drop(view.always.insert(host)),
                    Some(_) => {}
                }
            }
        }
        view
    }
}

/// The objects of a namespace.
pub fn in_namespace<'a, V>(
    all: &'a OrdMap<Key, Arc<V>>,
    namespace: &str,
) -> impl Iterator<Item = (&'a Key, &'a Arc<V>)> + use<'a, V> {
    let namespace = namespace.to_owned();
    all.range(Key::new(&*namespace, "")..)
        .take_while(move |(key, _)| key.namespace == namespace)
}

/// Moves an object in an index by host; no host is kept without an object.
fn index_hosts(
    by_host: &mut OrdMap<String, BTreeSet<Key>>,
    key: &Key,
    old: Option<&NamedHosts>,
    new: Option<&NamedHosts>,
) {
    let hosts = |of: Option<&NamedHosts>| of.map_or_else(BTreeSet::new, |of| of.hosts.clone());
    index(by_host, key, &hosts(old), hosts(new));
}

/// Moves an object in an index; nothing is kept without an object.
fn index<K: Ord + Clone>(
    index: &mut OrdMap<K, BTreeSet<Key>>,
    key: &Key,
    old: &BTreeSet<K>,
    new: BTreeSet<K>,
) {
    for one in old {
        if let Some(keys) = index.get_mut(one) {
            keys.remove(key);
            if keys.is_empty() {
                index.remove(one);
            }
        }
    }
    for one in new {
        index.entry(one).or_default().insert(key.clone());
    }
}

/// Gives up the old addresses of an object, but for those that belong to a newer one by now, and takes the new ones.
fn move_addresses(
    owners: &mut SharedMap<IpAddr, Key>,
    key: &Key,
    old: Option<&[IpAddr]>,
    new: Option<&[IpAddr]>,
) {
    for address in old.unwrap_or_default() {
        if owners.get(address) == Some(key) {
            owners.remove(address);
        }
    }
    for address in new.unwrap_or_default() {
        owners.insert(*address, key.clone());
    }
}

fn ranges(addresses: Option<&[IpAddr]>) -> impl Iterator<Item = [u8; 2]> {
    let addresses = addresses.unwrap_or_default().iter();
    addresses.filter_map(|address| match address {
        IpAddr::V4(address) => Some([address.octets()[0], address.octets()[1]]),
        // Written in too many ways to be recognised.
        IpAddr::V6(_) => None,
    })
}

/// Keeps count of what there is of each.
fn count<K: Ord + Clone>(
    counts: &mut OrdMap<K, usize>,
    old: impl Iterator<Item = K>,
    new: impl Iterator<Item = K>,
) {
    for one in new {
        *counts.entry(one).or_default() += 1;
    }
    for one in old {
        match counts.get(&one) {
            Some(1) | None => drop(counts.remove(&one)),
            Some(many) => drop(counts.insert(one, many - 1)),
        }
    }
}

fn set<T>(map: &mut OrdMap<Key, Arc<T>>, key: &Key, value: Option<T>) {
    match value {
        Some(value) => drop(map.insert(key.clone(), Arc::new(value))),
        None => drop(map.remove(key)),
    }
}
