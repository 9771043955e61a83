//! The API types of Fenceline (`fenceline.dev/v1alpha1`), and the slice of Istio's API that it reads and writes.
//!
//! Kubernetes versions of `k8s-openapi` are chosen by the workspace.

pub mod istio;
mod service_fence;

pub use service_fence::{
    Dependency, Evidence, FirstCall, FirstCallPolicy, GrpcFirstCall, LearntDependency, Mode,
    Otherwise, Scope, Selector, ServiceFence, ServiceFenceSpec, ServiceFenceStatus,
    ServiceSelector, UnresolvedHost, Workload,
};

use kube::CustomResourceExt;

/// The CustomResourceDefinitions, each with the name of its file.
///
/// # Errors
/// Fails when a schema cannot be written as YAML, which is a defect of this crate.
pub fn manifests() -> Result<Vec<(String, String)>, serde_yaml::Error> {
    let crd = ServiceFence::crd();
    let name = crd.spec.names.plural.clone();
    Ok(vec![(format!("{name}.yaml"), serde_yaml::to_string(&crd)?)])
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
