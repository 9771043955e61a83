//! What one namespace, workload or peer may cost everybody else. docs/bounds.md has every bound, those without a flag too.

use clap::Parser;

/// The bounds that an installation may want otherwise.
#[derive(Clone, Debug, PartialEq, Eq, Parser)]
pub struct Bounds {
    /// How many hosts one fence learns. What a workload calls beyond that stays a first call.
    #[arg(long, env = "FENCELINE_LEARNT_PER_FENCE", default_value_t = Self::default().learnt_per_fence)]
    pub learnt_per_fence: usize,
    /// How many hosts of one namespace, which every scope needs, other namespaces' Sidecars name one by one. Of a namespace with
    /// more they import all that it exports, which is what their proxies would have without Fenceline.
    #[arg(long, env = "FENCELINE_HOSTS_PER_NAMESPACE", default_value_t = Self::default().hosts_per_namespace)]
    pub hosts_per_namespace: usize,
    /// How many hosts of one other namespace AuthorizationPolicies bring into a scope.
    #[arg(long, env = "FENCELINE_NAMED_PER_NAMESPACE", default_value_t = Self::default().named_per_namespace)]
    pub named_per_namespace: usize,
    /// For how many HTTP ports that no other namespace has one namespace's Services give every fenced proxy a listener.
    #[arg(long, env = "FENCELINE_PORTS_PER_NAMESPACE", default_value_t = Self::default().ports_per_namespace)]
    pub ports_per_namespace: usize,
    /// For how many HTTP ports in all.
    #[arg(long, env = "FENCELINE_PORTS", default_value_t = Self::default().ports)]
    pub ports: usize,
    /// How many connections a second one pod may report.
    #[arg(long, env = "FENCELINE_REPORTS_PER_SECOND", default_value_t = Self::default().reports_per_second)]
    pub reports_per_second: u32,
}

impl Default for Bounds {
    fn default() -> Self {
        Self {
            learnt_per_fence: 2000,
            hosts_per_namespace: 50,
            named_per_namespace: 50,
            ports_per_namespace: 64,
            ports: 1000,
            reports_per_second: 100,
        }
    }
}
