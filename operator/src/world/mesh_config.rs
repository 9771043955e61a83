//! What every proxy needs because MeshConfig says so: the hosts of tracing, access log, metrics and authorization providers.
//! istiod refers to their clusters in every proxy's configuration, and gives a proxy only those clusters that are in its scope.
//! <https://istio.io/latest/docs/reference/config/istio.mesh.v1alpha1/>

use std::collections::BTreeSet;

use k8s_openapi::api::core::v1::ConfigMap;
use serde_json::Value;

/// The hosts that a mesh's ConfigMap names, as it writes them: `NAMESPACE/HOST`, a host, or a host with a port.
pub(super) fn hosts(map: &ConfigMap) -> BTreeSet<String> {
    let text = map.data.as_ref().and_then(|data| data.get("mesh"));
    let mesh: Value = text
        .and_then(|text| serde_yaml::from_str(text).ok())
        .unwrap_or_default();
    let providers = mesh["extensionProviders"].as_array().into_iter().flatten();
    let services = providers
        .filter_map(Value::as_object)
        .flat_map(|provider| provider.values())
        .filter_map(|settings| settings["service"].as_str());
    let proxy = &mesh["defaultConfig"];
    let addresses = [
        &proxy["tracing"]["zipkin"]["address"],
        &proxy["tracing"]["lightstep"]["address"],
        &proxy["envoyAccessLogService"]["address"],
        &proxy["envoyMetricsService"]["address"],
        &proxy["zipkinAddress"],
    ];
    let addresses = addresses.into_iter().filter_map(Value::as_str);
    services.chain(addresses).map(host).collect()
}

/// Without a namespace in front and a port behind.
fn host(text: &str) -> String {
    let text = text.rsplit('/').next().unwrap_or(text);
    let host = text.rsplit_once(':').map_or(text, |(host, _)| host);
    host.to_ascii_lowercase()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_provider_that_is_a_service() {
        let mesh = r"
extensionProviders:
- {name: a, zipkin: {service: zipkin.tracing.svc.cluster.local, port: 9411}}
- {name: b, envoyExtAuthzGrpc: {service: auth/opa.auth.svc.cluster.local, port: 9191}}
- {name: c, envoyFileAccessLog: {path: /dev/stdout}}
- {name: d, prometheus: {}}
defaultConfig:
  tracing: {zipkin: {address: 'jaeger.tracing:9411'}}
";
        let map = ConfigMap {
            data: Some([("mesh".to_owned(), mesh.to_owned())].into()),
            ..ConfigMap::default()
        };
        let want = [
            "jaeger.tracing",
            "opa.auth.svc.cluster.local",
            "zipkin.tracing.svc.cluster.local",
        ];
        assert!(hosts(&map).iter().eq(want));
        assert!(hosts(&ConfigMap::default()).is_empty());
    }
}
