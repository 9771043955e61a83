//! The static redirect: calls to names of the mesh that are not in scope go to the global proxy.
//!
//! It is in two parts. What every redirect has in common, which is large and changes with the namespaces that exist, stands once
//! for the whole mesh, in Istio's root namespace ([`routes`]): routes that istiod inserts wherever it finds a mark. The marks are
//! routes that match nothing; each fence puts them into its pods' catch-all virtual hosts. Marks must be there first, so
//! the routes have the higher `priority`, by which istiod sorts patches of both namespaces
//! (istio#49681, since 1.22).
//!
//! Nothing of Istio's is removed, so that any other name keeps Istio's own behaviour; and pods without marks have nothing of it.

mod alternatives;
mod names;
mod routes;

use fenceline_crds::istio::{EnvoyFilter, EnvoyFilterSpec};
use fenceline_crds::{FirstCallPolicy, NonHttp, ServiceFence};
use kube::api::ObjectMeta;
use serde_json::{Value, json};

pub use self::routes::{FORWARD, PASS, REDIRECTS, REPLY};
use super::plan::selector;
use super::select::Labels;
use super::{Settings, labelled};
use crate::world::{Key, World};

/// The catch-all virtual hosts of `ALLOW_ANY`, `REGISTRY_ONLY` and `ALLOW_ANY_DYNAMIC_DNS`
/// (pilot/pkg/networking/util/util.go).
const CATCH_ALL: [&str; 3] = ["allow_any", "block_all", "allow_any_dynamic_dns"];

/// Of a fence's name there is always something behind `fenceline-`.
const NAME: &str = "fenceline";

/// What a set of patches is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Purpose {
    Mesh,
    Fence {
        mark: Option<Mark>,
        non_http: NonHttp,
    },
}

/// What a fence wants done with first calls, and for whom. Where a workload's fence stands in a fenced namespace its pods have the
/// marks of both, and the workload's own counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Mark {
    NamespaceForwards,
    NamespaceHolds,
    Forwards,
    Holds,
}

impl Mark {
    /// In the order in which their routes are put on top of one another.
    const ALL: [Self; 4] = [
        Self::NamespaceForwards,
        Self::NamespaceHolds,
        Self::Forwards,
        Self::Holds,
    ];

    fn of(policy: FirstCallPolicy, labels: &Labels) -> Option<Self> {
        match (policy, labels.is_empty()) {
            (FirstCallPolicy::None, _) => None,
            (FirstCallPolicy::Forward, true) => Some(Self::NamespaceForwards),
            (FirstCallPolicy::Hold, true) => Some(Self::NamespaceHolds),
            (FirstCallPolicy::Forward, false) => Some(Self::Forwards),
            (FirstCallPolicy::Hold, false) => Some(Self::Holds),
        }
    }

    fn holds(self) -> bool {
        matches!(self, Self::NamespaceHolds | Self::Holds)
    }

    /// The name of the route that is the mark.
    fn name(self) -> &'static str {
        match self {
            Self::NamespaceForwards => "fenceline-mark-namespace-forward",
            Self::NamespaceHolds => "fenceline-mark-namespace-hold",
            Self::Forwards => "fenceline-mark-forward",
            Self::Holds => "fenceline-mark-hold",
        }
    }
}

/// Where the part that all redirects have in common is.
pub fn mesh_key(settings: &Settings) -> Key {
    Key::new(&*settings.root_namespace, NAME)
}

/// The part that all redirects have in common.
pub fn of_mesh(world: &World, settings: &Settings) -> EnvoyFilter {
    let namespaces = world.namespaces.keys().map(String::as_str);
    let config_patches = world.patches(settings, Purpose::Mesh, || {
        let domain = &world.cluster_domain;
        let regex = names::authority_regex(namespaces, world.service_ranges(), domain);
        routes::patches(&regex, settings)
    });
    let Key { namespace, name } = mesh_key(settings);
    EnvoyFilter {
        metadata: ObjectMeta {
            name: Some(name),
            namespace: Some(namespace),
            owner_references: world.definition.clone().map(|definition| vec![definition]),
            ..labelled([])
        },
        spec: EnvoyFilterSpec {
            config_patches,
            other: [("priority".to_owned(), json!(routes::PRIORITY))].into(),
            ..EnvoyFilterSpec::default()
        },
    }
}

/// A fence's own part, for the pods that `labels` select: its mark, and the access log that it wants of them; nothing if it
/// wants neither.
pub(super) fn of_fence(
    fence: &ServiceFence,
    labels: &Labels,
    world: &World,
    settings: &Settings,
) -> Option<EnvoyFilterSpec> {
    let first_call = fence.spec.first_call.clone().unwrap_or_default();
    let mark = Mark::of(first_call.policy, labels);
    let non_http = fence.spec.non_http;
    let purpose = Purpose::Fence { mark, non_http };
    let config_patches = world.patches(settings, purpose, || {
        let marks = mark.into_iter().flat_map(marks);
        let log = (non_http == NonHttp::Learn).then(|| report_connections(settings));
        marks.chain(log).collect()
    });
    (!config_patches.is_empty()).then(|| EnvoyFilterSpec {
        workload_selector: selector(labels.clone()),
        config_patches,
        ..EnvoyFilterSpec::default()
    })
}

/// Routes that match nothing.
fn marks(mark: Mark) -> impl Iterator<Item = Value> {
    let route = json!({
        "name": mark.name(),
        "match": {"prefix": "/", "runtime_fraction": {"default_value": {"numerator": 0}}},
        "direct_response": {"status": 503},
    });
    CATCH_ALL
        .into_iter()
        .map(move |vhost| insert_first(&json!({"name": vhost}), &route))
}

/// No name of a route configuration: one patch covers every port.
fn insert_first(vhost: &Value, route: &Value) -> Value {
    json!({
        "applyTo": "HTTP_ROUTE",
        "match": {"context": "SIDECAR_OUTBOUND", "routeConfiguration": {"vhost": vhost}},
        "patch": {"operation": "INSERT_FIRST", "value": route},
    })
}

/// Connections that nothing in scope took are reported to the operator as they begin: a database's may last for days.
/// <https://www.envoyproxy.io/docs/envoy/latest/api-v3/extensions/access_loggers/grpc/v3/als.proto>
fn report_connections(settings: &Settings) -> Value {
    let log = json!({
        "name": "envoy.access_loggers.tcp_grpc",
        "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.access_loggers.grpc.v3.TcpGrpcAccessLogConfig",
            "common_config": {
                "log_name": "fenceline",
                "transport_api_version": "V3",
                "grpc_service": {"envoy_grpc": {
                    "cluster_name": format!("outbound|{}||{}", settings.callers_port, settings.operator().fqdn),
                    // A cluster's name is none that HTTP/2 allows.
                    "authority": &*settings.operator().fqdn,
                }},
            },
        },
    });
    json!({
        "applyTo": "NETWORK_FILTER",
        "match": {
            "context": "SIDECAR_OUTBOUND",
            "listener": {
                "name": "virtualOutbound",
                "filterChain": {
                    "name": "virtualOutbound-catchall-tcp",
                    "filter": {"name": "envoy.filters.network.tcp_proxy"},
                },
            },
        },
        "patch": {"operation": "MERGE", "value": {
            "name": "envoy.filters.network.tcp_proxy",
            "typed_config": {
                "@type": "type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy",
                "access_log": [log],
                "access_log_options": {"flush_access_log_on_connected": true},
            },
        }},
    })
}
