//! What is known of the installation from the start.

use crate::bounds::Bounds;
use crate::world::{Host, Key};

/// What the planner must know of the installation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// The global proxy's Service.
    pub global_proxy: Key,
    /// Its port for calls that may be held.
    pub ask_port: u16,
    /// Its port for calls to be passed on.
    pub forward_port: u16,
    /// The operator's own Service.
    pub operator: Key,
    /// Its port for the access logs of callers.
    pub callers_port: u16,
    pub cluster_domain: String,
    pub trust_domain: String,
    /// Istio's root namespace, whose policies apply to the whole mesh.
    pub root_namespace: String,
    /// The ConfigMap with MeshConfig.
    pub mesh_config: Key,
    /// The rate limit service.
    pub rate_limit_service: Key,
    /// Its port.
    pub rate_limit_port: u16,
    pub bounds: Bounds,
}

/// What an installation has that changes nothing.
impl Default for Settings {
    fn default() -> Self {
        Self {
            global_proxy: Key::new("fenceline-system", "global-proxy"),
            ask_port: 15080,
            forward_port: 15088,
            operator: Key::new("fenceline-system", "fenceline"),
            callers_port: 18101,
            cluster_domain: "cluster.local".into(),
            trust_domain: "cluster.local".into(),
            root_namespace: "istio-system".into(),
            mesh_config: Key::new("istio-system", "istio"),
            rate_limit_service: Key::new("fenceline-system", "ratelimit"),
            rate_limit_port: 8081,
            bounds: Bounds::default(),
        }
    }
}

impl Settings {
    pub fn global_proxy_host(&self) -> String {
        self.global_proxy().fqdn.to_string()
    }

    pub(super) fn rate_limit_service(&self) -> Host {
        self.host(&self.rate_limit_service)
    }

    /// The cluster of the rate limit service, as istiod names it.
    pub(crate) fn rate_limit_cluster(&self) -> String {
        let Host { fqdn, .. } = self.rate_limit_service();
        format!("outbound|{}||{fqdn}", self.rate_limit_port)
    }

    pub(super) fn operator(&self) -> Host {
        self.host(&self.operator)
    }

    pub(super) fn global_proxy(&self) -> Host {
        self.host(&self.global_proxy)
    }

    fn host(&self, service: &Key) -> Host {
        let Key { namespace, name } = service;
        let fqdn = format!("{name}.{namespace}.svc.{}", self.cluster_domain);
        Host::new(&**namespace, fqdn)
    }
}
