//! What is known of the installation from the start.

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
        }
    }
}

impl Settings {
    pub fn global_proxy_host(&self) -> String {
        self.global_proxy().fqdn.to_string()
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
