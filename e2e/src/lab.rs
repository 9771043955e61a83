//! A whole mesh on one machine: a control plane, pods with sidecars, and what tests ask of them.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, bail};
use k8s_openapi::api::core::v1::{Namespace, Service};
use kube::Api;
use kube::api::{Patch, PatchParams};
use serde_json::json;
use tokio::process::Command;

use crate::control_plane::{ADDRESS, API_PORT, ControlPlane, SECOND_ADDRESS, client};
use crate::isolate::{self, SCRATCH, run};
use crate::pod::{NODE, Pod};
use crate::process::Process;
use crate::tools::{Tools, checkout};

/// How long anything that should happen may take here before a test fails: generous, since two cores run it all.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// istiod's MeshConfig in the lab: Istio's defaults, but for filters that stock Envoy lacks.
pub const MESH_CONFIG: &str = "\
rootNamespace: istio-system
trustDomain: cluster.local
defaultProviders: {}
enableTracing: false
defaultConfig: {discoveryAddress: 'istiod.istio-system.svc:15012'}
";

pub struct Lab {
    pub client: kube::Client,
    pub control_plane: ControlPlane,
    pub tools: Tools,
    pub scratch: PathBuf,
    pub logs: PathBuf,
    /// Further arguments for operators that are started from now on.
    pub operator_args: Vec<String>,
    /// Where operators that are started from now on find kube-apiserver.
    pub operator_server: String,
    pub(crate) prometheus: Option<Process>,
    pub(crate) pods: BTreeMap<String, Pod>,
    pub(crate) started: u16,
}

/// Runs `body` in a lab of its own; where it fails, what the lab looked like is left in `.lab/NAME`.
///
/// # Panics
/// When the body fails: this is how a test fails.
#[expect(clippy::panic, reason = "a test fails by panicking")]
pub fn test(body: impl AsyncFnOnce(&mut Lab) -> anyhow::Result<()>) {
    let thread = std::thread::current();
    let name = thread.name().unwrap_or("main").to_owned();
    let result = if isolate::is_inside() {
        in_lab(&name, body)
    } else {
        isolate::run_test(&name)
    };
    if let Err(error) = result {
        panic!("{error:#}");
    }
}

/// Starts a lab in the namespaces of this process, runs `body`, and ends the lab.
///
/// # Errors
/// What went wrong in the lab or in the body.
pub fn in_lab<T>(
    name: &str,
    body: impl AsyncFnOnce(&mut Lab) -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    isolate::prepare()?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let mut lab = Lab::start().await?;
        let result = body(&mut lab).await;
        if result.is_err() {
            let kept = lab.dump(name).await;
            eprintln!("what the lab looked like: {}", kept.display());
        }
        lab.stop().await;
        result
    })
}

impl Lab {
    /// Starts the control plane, with Istio's CRDs, in namespaces that [`isolate::prepare`] prepared.
    ///
    /// # Errors
    /// Names the part that did not start, with the end of its log.
    pub async fn start() -> anyhow::Result<Self> {
        let tools = Tools::find()?;
        let scratch = PathBuf::from(SCRATCH);
        let logs = scratch.join("logs");
        std::fs::create_dir_all(&logs)?;
        run("ip", &["link", "add", "lab0", "type", "bridge"])?;
        run(
            "ip",
            &["addr", "add", &format!("{ADDRESS}/16"), "dev", "lab0"],
        )?;
        let second = format!("{SECOND_ADDRESS}/16");
        run("ip", &["addr", "add", &second, "dev", "lab0"])?;
        run("ip", &["link", "set", "lab0", "up"])?;
        std::fs::write("/proc/sys/net/ipv4/ip_forward", "1")?;

        let control_plane = ControlPlane::start(&tools, &scratch, &logs).await?;
        let client = client(&control_plane.kubeconfig).await?;
        let mut lab = Self {
            client,
            control_plane,
            tools,
            scratch,
            logs,
            operator_args: Vec::new(),
            operator_server: format!("https://{ADDRESS}:{API_PORT}"),
            prometheus: None,
            pods: BTreeMap::new(),
            started: 1,
        };
        lab.apply(&format!(
            "{{apiVersion: v1, kind: Node, metadata: {{name: {NODE}}}}}"
        ))
        .await?;
        lab.namespace("istio-system").await?;
        lab.kubectl(&[
            "apply",
            "--server-side",
            "-f",
            &lab.tools.istio_crds.to_string_lossy(),
        ])
        .await?;
        lab.control_plane.start_istiod(MESH_CONFIG).await?;
        lab.istiod_pod("istiod-0", ADDRESS).await?;
        Ok(lab)
    }

    /// Starts a second istiod, for pods that are made for it ([`PodSpec::second_istiod`]).
    ///
    /// # Errors
    /// Fails when it does not start.
    pub async fn start_second_istiod(&mut self) -> anyhow::Result<()> {
        self.root_certificate("istio-system").await?;
        self.control_plane.start_second_istiod().await?;
        self.istiod_pod("istiod-1", SECOND_ADDRESS).await
    }

    /// The Pod of an istiod, which is a process outside the pods' networks.
    async fn istiod_pod(&self, name: &str, ip: &str) -> anyhow::Result<()> {
        self.apply(&format!(
            "{{apiVersion: v1, kind: Pod, metadata: {{name: {name}, namespace: istio-system, labels: {{app: istiod}}}}, \
             spec: {{nodeName: {NODE}, containers: [{{name: discovery, image: lab}}]}}}}"
        ))
        .await?;
        let pods: Api<k8s_openapi::api::core::v1::Pod> =
            Api::namespaced(self.client.clone(), "istio-system");
        let status = json!({"status": {
            "phase": "Running", "podIP": ip, "podIPs": [{"ip": ip}], "hostIP": ADDRESS,
            "conditions": [{"type": "Ready", "status": "True"}],
        }});
        pods.patch_status(name, &PatchParams::default(), &Patch::Merge(status))
            .await?;
        Ok(())
    }

    /// Changes istiod's MeshConfig, which it watches.
    ///
    /// # Errors
    /// Fails when the file cannot be written.
    pub fn set_mesh_config(&self, mesh_config: &str) -> anyhow::Result<()> {
        Ok(std::fs::write(self.scratch.join("mesh.yaml"), mesh_config)?)
    }

    /// kubectl, as it is seen from outside the lab.
    pub fn kubectl_outside(&self) -> PathBuf {
        checkout()
            .join(".cache/kubernetes/kubectl")
            .canonicalize()
            .unwrap_or_default()
    }

    /// Runs kubectl and returns what it printed.
    ///
    /// # Errors
    /// Fails with what it complained of.
    pub async fn kubectl(&self, args: &[&str]) -> anyhow::Result<String> {
        let output = Command::new(&self.tools.kubectl)
            .arg("--kubeconfig")
            .arg(&self.control_plane.kubeconfig)
            .args(args)
            .current_dir(checkout())
            .env("HOME", &self.scratch)
            .output()
            .await
            .context("could not start kubectl")?;
        if !output.status.success() {
            bail!(
                "kubectl {}: {}",
                args.join(" "),
                String::from_utf8_lossy(&output.stderr).trim()
            );
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// `kubectl apply` of YAML as a user would, with strict validation against the real CRDs.
    ///
    /// # Errors
    /// Fails with kubectl's complaint.
    pub async fn apply(&self, yaml: &str) -> anyhow::Result<()> {
        let file = tempfile::Builder::new()
            .suffix(".yaml")
            .tempfile_in(&self.scratch)?;
        std::fs::write(file.path(), yaml)?;
        let path = file.path().to_string_lossy();
        self.kubectl(&["apply", "--validate=strict", "-f", &path])
            .await
            .map(drop)
    }

    /// # Errors
    /// Fails when the API refuses it.
    pub async fn namespace(&self, name: &str) -> anyhow::Result<()> {
        let object = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}});
        let api: Api<Namespace> = Api::all(self.client.clone());
        api.patch(name, &PatchParams::apply("lab"), &Patch::Apply(object))
            .await?;
        Ok(())
    }

    /// Makes a Service that selects `app: NAME`; `ports` are names with numbers, as in `http:9080`.
    ///
    /// # Errors
    /// Fails when the API refuses it.
    pub async fn service(&self, namespace: &str, name: &str, ports: &[&str]) -> anyhow::Result<()> {
        let ports = ports.iter().map(|port| {
            let (kind, number) = port.split_once(':').context("a port is NAME:NUMBER")?;
            let number: u16 = number.parse()?;
            Ok(json!({"name": format!("{kind}-{number}"), "port": number}))
        });
        let object = json!({
            "apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "namespace": namespace},
            "spec": {"selector": {"app": name}, "ports": ports.collect::<anyhow::Result<Vec<_>>>()?},
        });
        let api: Api<Service> = Api::namespaced(self.client.clone(), namespace);
        api.patch(name, &PatchParams::apply("lab"), &Patch::Apply(object))
            .await?;
        Ok(())
    }

    /// Leaves logs, objects and every Envoy's configuration in `.lab/NAME` of the checkout.
    async fn dump(&self, name: &str) -> PathBuf {
        let folder = checkout().join(".lab").join(name.replace("::", "."));
        let _ = std::fs::remove_dir_all(&folder);
        let _ = std::fs::create_dir_all(&folder);
        let copy = format!("{}/.", self.logs.display());
        let _ = run("cp", &["-r", &copy, &folder.to_string_lossy()]);
        for (file, kinds) in [
            ("fences.yaml", "servicefences.fenceline.dev"),
            ("routers.yaml", "routers,trafficpatches"),
            ("rate-limits.yaml", "ratelimits"),
            (
                "istio.yaml",
                "sidecars,envoyfilters,virtualservices,destinationrules,serviceentries",
            ),
            ("cluster.yaml", "namespaces,services,pods"),
            ("events.yaml", "events"),
        ] {
            let args = ["get", kinds, "-A", "-o", "yaml"];
            let text = match self.kubectl(&args).await {
                Ok(text) => text,
                Err(error) => format!("{error:#}"),
            };
            let _ = std::fs::write(folder.join(file), text);
        }
        for (id, pod) in self.pods.iter().filter(|(_, pod)| pod.spec.sidecar) {
            for (path, file) in [
                ("/config_dump?include_eds", "config_dump.json"),
                ("/stats?usedonly", "stats.txt"),
                ("/clusters", "clusters.txt"),
            ] {
                let text = pod
                    .envoy(path)
                    .await
                    .unwrap_or_else(|error| format!("{error:#}"));
                let _ = std::fs::write(folder.join(format!("{id}.{file}")), text);
            }
        }
        folder
    }

    /// Ends everything.
    async fn stop(self) {
        for (_, pod) in self.pods {
            let _ = pod.stop().await;
        }
        if let Some(mut prometheus) = self.prometheus {
            let _ = prometheus.kill().await;
        }
        let ControlPlane {
            mut etcd,
            mut apiserver,
            mut controller_manager,
            mut istiod,
            mut second_istiod,
            ..
        } = self.control_plane;
        for process in [
            istiod.as_mut(),
            second_istiod.as_mut(),
            Some(&mut controller_manager),
            Some(&mut apiserver),
        ]
        .into_iter()
        .chain([Some(&mut etcd)])
        .flatten()
        {
            let _ = process.kill().await;
        }
    }
}

/// The file of the checkout, for tests that apply what the repository ships.
///
/// # Errors
/// Fails when there is no such file.
pub fn shipped(path: &str) -> anyhow::Result<String> {
    let path = checkout().join(path);
    std::fs::read_to_string(&path).with_context(|| path.display().to_string())
}
