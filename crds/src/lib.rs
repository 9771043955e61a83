//! The API types of Fenceline (`fenceline.dev/v1alpha1`), and the slice of Istio's API that it reads and writes.
//!
//! Kubernetes versions of `k8s-openapi` are chosen by the workspace.

mod fence_policy;
pub mod istio;
mod istio_words;
mod period;
mod rate_limit;
mod router;
mod rules;
mod service_fence;
mod traffic_patch;

pub use fence_policy::{
    FencePolicy, FencePolicySpec, FencePolicyStatus, Granularity, Promote, Template,
};
pub use period::period;
pub use rate_limit::{
    Adaptive, Direction, GatewayTarget, LimitBy, LimitMatch, LimitResponse, LimitRule,
    LimitServiceStatus, LimitTarget, Metric, Nothing, OnStale, OnUnavailable, PrometheusQuery,
    Quota, RateLimit, RateLimitSpec, RateLimitStatus, RuleStatus, Share, ValueMatch,
};
pub use router::{
    Branch, BranchMatch, BranchStatus, Change, CreateService, CreatedPort, FieldOrigin,
    HeaderMatch, RouteProtocol, Router, RouterSpec, RouterStatus, Verify, VersionLabels,
};
pub use service_fence::{
    Alias, Dependency, Evidence, FirstCall, FirstCallPolicy, GrpcFirstCall, LearntDependency, Mode,
    NonHttp, Otherwise, Retention, Scope, Selector, ServiceFence, ServiceFenceSpec,
    ServiceFenceStatus, ServiceSelector, UnresolvedHost, Workload,
};
pub use traffic_patch::{
    DestinationPatch, HttpPatch, IstioObject, PathMatch, RequestMatch, TrafficPatch,
    TrafficPatchSpec, TrafficPatchStatus,
};

use std::collections::BTreeMap;

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::{
    CustomResourceDefinition, JSONSchemaProps, JSONSchemaPropsOrArray, JSONSchemaPropsOrBool,
};
use kube::CustomResourceExt;

/// The CustomResourceDefinitions, each with the name of its file.
///
/// # Errors
/// Fails when a schema cannot be written as YAML, which is a defect of this crate.
pub fn manifests() -> Result<Vec<(String, String)>, serde_yaml::Error> {
    let crds = [
        ServiceFence::crd(),
        FencePolicy::crd(),
        Router::crd(),
        TrafficPatch::crd(),
        RateLimit::crd(),
    ];
    let manifest = |crd: CustomResourceDefinition| {
        let name = format!("{}.yaml", crd.spec.names.plural);
        Ok((name, serde_yaml::to_string(&finished(crd))?))
    };
    crds.into_iter().map(manifest).collect()
}

/// What the derived schema lacks: rules on the object's name may only point at it where the schema has it. And what it has too much of:
/// formats that kube-apiserver does not know, each of which it warns of to whoever applies the definition.
fn finished(mut crd: CustomResourceDefinition) -> CustomResourceDefinition {
    for version in &mut crd.spec.versions {
        let root = version.schema.as_mut();
        if let Some(root) = root.and_then(|schema| schema.open_api_v3_schema.as_mut()) {
            without_unknown_formats(root);
            let name = JSONSchemaProps {
                type_: Some("string".to_owned()),
                ..JSONSchemaProps::default()
            };
            let metadata = JSONSchemaProps {
                type_: Some("object".to_owned()),
                properties: Some([("name".to_owned(), name)].into()),
                ..JSONSchemaProps::default()
            };
            let properties = root.properties.get_or_insert_default();
            properties.insert("metadata".to_owned(), metadata);
        }
    }
    crd
}

/// <https://github.com/kubernetes/apiextensions-apiserver/blob/v0.36.3/pkg/apiserver/validation/formats.go>
fn without_unknown_formats(schema: &mut JSONSchemaProps) {
    let unsigned = |format: &String| format.starts_with("uint");
    schema.format = schema.format.take().filter(|format| !unsigned(format));
    for property in schema.properties.iter_mut().flat_map(BTreeMap::values_mut) {
        without_unknown_formats(property);
    }
    match &mut schema.items {
        Some(JSONSchemaPropsOrArray::Schema(items)) => without_unknown_formats(items),
        Some(JSONSchemaPropsOrArray::Schemas(items)) => {
            items.iter_mut().for_each(without_unknown_formats);
        }
        None => {}
    }
    if let Some(JSONSchemaPropsOrBool::Schema(values)) = &mut schema.additional_properties {
        without_unknown_formats(values);
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    /// `UPDATE=1 cargo test -p fenceline-crds` writes the files instead.
    #[test]
    fn files_are_what_the_types_say() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR"));
        for (name, want) in super::manifests().unwrap() {
            let path = folder.join(&name);
            if std::env::var_os("UPDATE").is_some() {
                std::fs::write(&path, &want).unwrap();
            }
            let have = std::fs::read_to_string(&path).unwrap_or_default();
            assert!(
                have == want,
                "crds/{name} is old: run `fenceline crds > crds/{name}`"
            );
        }
    }
}
