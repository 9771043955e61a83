//! Where the programs of the lab are.

use std::path::{Path, PathBuf};

use anyhow::{Context, bail};

/// The programs and files that `e2e/setup.sh` put into `.cache`.
#[derive(Clone, Debug)]
pub struct Tools {
    pub etcd: PathBuf,
    pub kube_apiserver: PathBuf,
    pub kube_controller_manager: PathBuf,
    pub kubectl: PathBuf,
    pub pilot_discovery: PathBuf,
    pub pilot_agent: PathBuf,
    pub envoy: PathBuf,
    pub prometheus: PathBuf,
    pub redis: PathBuf,
    /// The libraries of what came from Debian's packages.
    pub debian_libraries: PathBuf,
    /// The rate limit service.
    pub rate_limit_service: PathBuf,
    pub istio_crds: PathBuf,
    pub envoy_bootstrap: PathBuf,
    /// The Gateway API's, which a test applies that needs them.
    pub gateway_api_crds: PathBuf,
    /// Our own: the operator, the application of the pods, and what reports by hand.
    pub fenceline: PathBuf,
    pub lab_app: PathBuf,
    pub lab_reporter: PathBuf,
}

/// The checkout's root.
pub fn checkout() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
}

impl Tools {
    /// # Errors
    /// Names what is missing and how to get it.
    pub fn find() -> anyhow::Result<Self> {
        let cache = Path::new(crate::isolate::TOOLS);
        let cached = |path: &str| present(cache.join(path), "run e2e/setup.sh");
        Ok(Self {
            etcd: cached("debian/usr/bin/etcd")?,
            kube_apiserver: cached("kubernetes/kube-apiserver")?,
            kube_controller_manager: cached("kubernetes/kube-controller-manager")?,
            kubectl: cached("kubernetes/kubectl")?,
            pilot_discovery: cached("istio/pilot-discovery")?,
            pilot_agent: cached("istio/pilot-agent")?,
            envoy: cached("envoy/envoy")?,
            prometheus: cached("debian/usr/bin/prometheus")?,
            redis: cached("debian/usr/bin/redis-server")?,
            debian_libraries: cached("debian/usr/lib/x86_64-linux-gnu")?,
            rate_limit_service: cached("ratelimit/service_cmd")?,
            istio_crds: cached("istio/crd-all.gen.yaml")?,
            envoy_bootstrap: cached("istio/envoy_bootstrap.json")?,
            gateway_api_crds: cached("istio/gateway-api")?,
            fenceline: built("fenceline")?,
            lab_app: built("lab-app")?,
            lab_reporter: built("lab-reporter")?,
        })
    }
}

fn present(path: PathBuf, remedy: &str) -> anyhow::Result<PathBuf> {
    if !path.exists() {
        bail!("{} is missing: {remedy}", path.display());
    }
    Ok(path)
}

/// A program of this workspace, beside the running one or in the folder above it (tests run from `deps/`).
fn built(name: &str) -> anyhow::Result<PathBuf> {
    let running = std::env::current_exe().context("this program's path")?;
    let beside = running
        .ancestors()
        .skip(1)
        .take(2)
        .map(|folder| folder.join(name));
    match beside.into_iter().find(|path| path.is_file()) {
        Some(path) => Ok(path),
        None => {
            bail!("{name} is not built: run `cargo build --workspace --bins` in the same profile")
        }
    }
}
