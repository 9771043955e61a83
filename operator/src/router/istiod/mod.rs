//! What every istiod says: what it sends ([`subscriber`]), and what each of its proxies has acknowledged or refused ([`syncz`]).

pub mod subscriber;
mod syncz;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

pub use subscriber::{Subscriber, Wanted};
pub use syncz::{ProxyState, Syncz};

use crate::fence::select::pods_in;
use crate::world::World;

/// The label of the proxy that we say we are, which the Sidecar of routed hosts selects.
pub const VIEW_LABEL: (&str, &str) = ("fenceline.dev/view", "routed-hosts");
/// <https://istio.io/latest/docs/ops/deployment/application-requirements/#ports-used-by-istio>
const XDS_PORT: u16 = 15012;
const DEBUG_PORT: u16 = 15014;
/// How istiod's pods are labelled by Istio's charts.
const ISTIOD: (&str, &str) = ("app", "istiod");

/// How istiod counts its pushes.
pub type Push = u64;

/// The push that a nonce is of: `TIME/COUNT` and a UUID of 36 characters.
pub fn push_of(nonce: &str) -> Option<Push> {
    let counted = nonce.len().checked_sub(36)?;
    nonce.get(..counted)?.rsplit_once('/')?.1.parse().ok()
}

/// What istiod sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    Clusters,
    Endpoints,
    Listeners,
    Routes,
    /// The content of filters, by extension config discovery.
    Extensions,
}

impl Kind {
    pub fn type_url(self) -> &'static str {
        match self {
            Self::Clusters => "type.googleapis.com/envoy.config.cluster.v3.Cluster",
            Self::Endpoints => "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment",
            Self::Listeners => "type.googleapis.com/envoy.config.listener.v3.Listener",
            Self::Routes => "type.googleapis.com/envoy.config.route.v3.RouteConfiguration",
            Self::Extensions => "type.googleapis.com/envoy.config.core.v3.TypedExtensionConfig",
        }
    }

    fn of(type_url: &str) -> Option<Self> {
        let all = [
            Self::Clusters,
            Self::Endpoints,
            Self::Listeners,
            Self::Routes,
            Self::Extensions,
        ];
        all.into_iter().find(|kind| kind.type_url() == type_url)
    }
}

/// How istiods are reached, and who we are to them.
#[derive(Clone, Debug)]
pub struct Access {
    /// Istiod's namespace.
    pub istio_namespace: String,
    /// The name in its certificate.
    pub server_name: String,
    /// A token of our service account for the audience `istio-ca`.
    pub token: PathBuf,
    /// The mesh's root certificate.
    pub root_certificate: PathBuf,
    pub namespace: String,
    pub service_account: String,
    /// This replica's name.
    pub name: String,
    pub cluster: String,
    pub cluster_domain: String,
}

/// Every istiod, by its address.
#[derive(Debug)]
pub struct Istiods {
    access: Arc<Access>,
    subscribers: Mutex<BTreeMap<IpAddr, Arc<Subscriber>>>,
    syncz: Syncz,
    routes: Mutex<BTreeSet<String>>,
}

impl Istiods {
    pub fn new(access: Access) -> Self {
        let access = Arc::new(access);
        Self {
            syncz: Syncz::new(Arc::clone(&access)),
            access,
            subscribers: Mutex::default(),
            routes: Mutex::default(),
        }
    }

    pub fn access(&self) -> &Access {
        &self.access
    }

    /// The istiods that run.
    pub fn known(&self, world: &World) -> Vec<IpAddr> {
        let pods = pods_in(world, &self.access.istio_namespace);
        let istiods = pods.filter(|pod| {
            pod.runs && pod.ready && pod.labels.get(ISTIOD.0).is_some_and(|app| app == ISTIOD.1)
        });
        let mut all: Vec<IpAddr> = istiods
            .filter_map(|pod| pod.addresses.first().copied())
            .collect();
        all.sort();
        all
    }

    /// A stream to each istiod that runs; those to former ones end.
    pub fn subscribers(&self, world: &World) -> BTreeMap<IpAddr, Arc<Subscriber>> {
        let known = self.known(world);
        let routes = self
            .routes
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        let mut subscribers = self
            .subscribers
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        subscribers.retain(|address, _| known.contains(address));
        for address in known {
            subscribers.entry(address).or_insert_with(|| {
                let access = Arc::clone(&self.access);
                let subscriber = Subscriber::new(SocketAddr::new(address, XDS_PORT), access);
                subscriber.watch_routes(&routes);
                Arc::new(subscriber)
            });
        }
        subscribers.clone()
    }

    /// Asks for these route configurations everywhere.
    pub fn watch_routes(&self, names: &BTreeSet<String>) {
        let mut routes = self.routes.lock().unwrap_or_else(PoisonError::into_inner);
        routes.extend(names.iter().cloned());
        let subscribers = self
            .subscribers
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        subscribers
            .values()
            .for_each(|subscriber| subscriber.watch_routes(&routes));
    }

    /// What the proxies of one istiod have acknowledged.
    ///
    /// # Errors
    /// Says why it cannot be asked.
    pub async fn proxies(&self, istiod: IpAddr) -> Result<Vec<ProxyState>, String> {
        self.syncz.ask(SocketAddr::new(istiod, DEBUG_PORT)).await
    }
}

#[cfg(test)]
mod tests {
    use super::push_of;

    #[test]
    fn a_nonce_tells_its_push() {
        let uuid = "0c1d0c6e-7c1a-4f0a-9b1d-3a5f5b0b2a11";
        let nonce = format!("2026-11-21T23:17:42Z/42{uuid}");
        assert_eq!(push_of(&nonce), Some(42));
        for other in [
            "",
            uuid,
            "42",
            "2026-11-21T23:17:42Z/x0c1d0c6e-7c1a-4f0a-9b1d-3a5f5b0b2a11",
        ] {
            assert_eq!(push_of(other), None, "{other}");
        }
    }
}
