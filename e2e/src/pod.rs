//! A lab pod: a network namespace with a real sidecar (pilot-agent and Envoy, captured by real iptables rules) and an
//! application, and the Pod object that the control plane knows it by.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;
use serde_json::json;
use tokio::process::Command;

use crate::app::{Call, Outcome, Protocol, ask};
use crate::control_plane::{ADDRESS, API_PORT, GATE_PORT, SECOND_ADDRESS};
use crate::isolate::run;
use crate::process::Process;
use crate::tools::Tools;

/// The user that a sidecar runs as; iptables lets its traffic through.
const PROXY_USER: &str = "1337";
/// The only node; the EndpointSlice controller skips pods of nodes that do not exist.
pub(crate) const NODE: &str = "lab";

/// What runs beside the sidecar.
#[derive(Clone, Debug, Default)]
pub enum App {
    /// The echo server and client of the lab.
    #[default]
    Echo,
    /// A program of the test's.
    Command {
        program: PathBuf,
        args: Vec<String>,
        env: BTreeMap<String, String>,
    },
    /// Nothing: the proxy is all.
    Nothing,
}

/// What to make of a pod.
#[derive(Clone, Debug)]
pub struct PodSpec {
    pub namespace: String,
    pub name: String,
    pub labels: BTreeMap<String, String>,
    pub service_account: String,
    /// Ports of the echo server that speak HTTP/1.1, h2c and gRPC.
    pub http: Vec<u16>,
    /// Ports of the echo server that speak TCP.
    pub tcp: Vec<u16>,
    pub sidecar: bool,
    /// Whether its proxy is a gateway's.
    pub gateway: bool,
    /// Its proxy's configuration beside the usual, as in the annotation `proxy.istio.io/config`.
    pub proxy_config: serde_json::Map<String, serde_json::Value>,
    /// What is merged into its Envoy's bootstrap, as the annotation `sidecar.istio.io/bootstrapOverride` has it.
    pub bootstrap: Option<String>,
    /// What its proxy says of itself beside the usual, as `ISTIO_META_…`.
    pub proxy_env: BTreeMap<String, String>,
    /// Further names that it resolves.
    pub hosts: BTreeMap<String, IpAddr>,
    /// Whether it is of the second istiod.
    pub second_istiod: bool,
    /// Whether iptables captures the pod's traffic (`REDIRECT`) or not (`NONE`).
    pub capture: bool,
    pub app: App,
}

impl PodSpec {
    /// A pod labelled `app: NAME`, running as the service account NAME, with a captured sidecar and an echo
    /// application that serves nothing.
    pub fn new(namespace: &str, name: &str) -> Self {
        Self {
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            labels: [("app".to_owned(), name.to_owned())].into(),
            service_account: name.to_owned(),
            http: Vec::new(),
            tcp: Vec::new(),
            sidecar: true,
            gateway: false,
            proxy_config: serde_json::Map::new(),
            bootstrap: None,
            proxy_env: BTreeMap::new(),
            hosts: BTreeMap::new(),
            second_istiod: false,
            capture: true,
            app: App::Echo,
        }
    }

    #[must_use]
    pub fn http(mut self, port: u16) -> Self {
        self.http.push(port);
        self
    }

    #[must_use]
    pub fn tcp(mut self, port: u16) -> Self {
        self.tcp.push(port);
        self
    }

    #[must_use]
    pub fn label(mut self, key: &str, value: &str) -> Self {
        self.labels.insert(key.to_owned(), value.to_owned());
        self
    }

    #[must_use]
    pub fn second_istiod(mut self) -> Self {
        self.second_istiod = true;
        self
    }

    #[must_use]
    pub fn service_account(mut self, name: &str) -> Self {
        name.clone_into(&mut self.service_account);
        self
    }

    #[must_use]
    pub fn without_sidecar(mut self) -> Self {
        self.sidecar = false;
        self.capture = false;
        self
    }

    /// A gateway: nothing but its proxy.
    #[must_use]
    pub fn gateway(mut self) -> Self {
        self.gateway = true;
        self.capture = false;
        self.app = App::Nothing;
        self
    }

    #[must_use]
    pub fn proxy_env(mut self, name: &str, value: &str) -> Self {
        self.proxy_env.insert(name.to_owned(), value.to_owned());
        self
    }

    #[must_use]
    pub fn app(mut self, app: App) -> Self {
        self.app = app;
        self
    }

    /// The name of its network namespace and of its folders.
    pub(crate) fn id(&self) -> String {
        format!("{}.{}", self.namespace, self.name)
    }

    /// The Pod object as a kubelet would have it by now, but for the status.
    pub(crate) fn object(&self) -> serde_json::Value {
        let mut labels = self.labels.clone();
        if self.sidecar {
            // Without it istiod tells others to send this pod plain text.
            labels.insert("security.istio.io/tlsMode".into(), "istio".into());
        }
        let mut containers = vec![json!({"name": "app", "image": "lab"})];
        if self.sidecar {
            containers.push(json!({"name": "istio-proxy", "image": "lab"}));
        }
        json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": self.name, "namespace": self.namespace, "labels": labels},
            "spec": {
                "serviceAccountName": self.service_account,
                "nodeName": NODE,
                "containers": containers,
            },
        })
    }
}

/// A running pod.
#[derive(Debug)]
pub struct Pod {
    pub spec: PodSpec,
    pub ip: Ipv4Addr,
    /// Where its processes run and where its sidecar keeps its files.
    pub folder: PathBuf,
    control: PathBuf,
    logs: PathBuf,
    tools: Tools,
    sidecar: Option<Process>,
    app: Option<Process>,
}

/// What every pod of a lab needs to know of it.
pub(crate) struct Surroundings<'a> {
    pub(crate) tools: &'a Tools,
    pub(crate) scratch: &'a Path,
    pub(crate) logs: &'a Path,
    /// Counts pods: the address and the device's name come from it.
    pub(crate) number: u16,
    pub(crate) token: &'a str,
    pub(crate) root_certificate: &'a str,
}

impl Pod {
    pub(crate) fn address(number: u16) -> Ipv4Addr {
        let [high, low] = number.to_be_bytes();
        Ipv4Addr::new(10, 244, high + 1, low)
    }

    /// Makes the network namespace and starts the sidecar and the application in it.
    pub(crate) fn start(spec: PodSpec, around: &Surroundings<'_>) -> anyhow::Result<Self> {
        let ip = Self::address(around.number);
        network(&spec.id(), around.number, ip)?;
        let folder = around.scratch.join("pods").join(spec.id());
        std::fs::create_dir_all(&folder)?;
        let istiod = if spec.second_istiod {
            SECOND_ADDRESS
        } else {
            ADDRESS
        };
        let mut hosts = format!("127.0.0.1 localhost\n{istiod} istiod.istio-system.svc\n");
        for (name, address) in &spec.hosts {
            hosts.push_str(&format!("{address} {name}\n"));
        }
        std::fs::write(folder.join("hosts"), hosts)?;
        let mut pod = Self {
            control: folder.join("control.sock"),
            ip,
            folder,
            logs: around.logs.to_owned(),
            tools: around.tools.clone(),
            sidecar: None,
            app: None,
            spec,
        };
        if pod.spec.capture {
            pod.capture()?;
        }
        if pod.spec.sidecar {
            pod.secrets(around.token, around.root_certificate)?;
            pod.start_sidecar()?;
        }
        pod.start_app()?;
        Ok(pod)
    }

    /// A command that runs inside the pod's network, with the pod's `/etc/hosts`, in the pod's folder.
    pub fn command(&self, program: &Path) -> Command {
        let mut command = Command::new("ip");
        command
            .args(["netns", "exec", &self.spec.id(), "sh", "-c"])
            .arg("mount --bind \"$0\" /etc/hosts && exec \"$@\"")
            .arg(self.folder.join("hosts"))
            .arg(program)
            .current_dir(&self.folder)
            .env(
                "PATH",
                format!(
                    "{}:/usr/sbin:/sbin",
                    std::env::var("PATH").unwrap_or_default()
                ),
            );
        command
    }

    /// Redirects the pod's traffic to its sidecar, as Istio's init container does.
    fn capture(&self) -> anyhow::Result<()> {
        let agent = self.tools.pilot_agent.to_string_lossy().into_owned();
        let id = self.spec.id();
        let mut args = vec!["netns", "exec", &id, &agent, "istio-iptables"];
        args.extend([
            "-p", "15001", "-z", "15006", "-u", PROXY_USER, "-m", "REDIRECT",
        ]);
        args.extend([
            "-i",
            "*",
            "-x",
            "",
            "-b",
            "*",
            "-d",
            "15090,15021,15020,15000",
        ]);
        let ports = format!("{API_PORT},{GATE_PORT},15090,15012,15014");
        // As the operator's Deployment asks for: its watches must outlive its sidecar's restarts.
        args.extend(["-o", &ports]);
        run("ip", &args).map(drop)
    }

    fn secrets(&self, token: &str, root_certificate: &str) -> anyhow::Result<()> {
        let secrets = self.folder.join("var/run/secrets");
        for (file, content) in [
            ("tokens/istio-token", token),
            ("istio/root-cert.pem", root_certificate),
        ] {
            let path = secrets.join(file);
            std::fs::create_dir_all(path.parent().context("a folder")?)?;
            std::fs::write(path, content)?;
        }
        std::fs::create_dir_all(self.folder.join("etc"))?;
        let owner = format!("{PROXY_USER}:{PROXY_USER}");
        run("chown", &["-R", &owner, &self.folder.to_string_lossy()]).map(drop)
    }

    /// Starts pilot-agent, which starts Envoy.
    ///
    /// # Errors
    /// Fails when it cannot start.
    pub fn start_sidecar(&mut self) -> anyhow::Result<()> {
        let spec = &self.spec;
        let mut command = self.command(Path::new("setpriv"));
        command
            .args([
                "--reuid",
                PROXY_USER,
                "--regid",
                PROXY_USER,
                "--clear-groups",
            ])
            .arg(&self.tools.pilot_agent)
            .args([
                "proxy",
                if spec.gateway { "router" } else { "sidecar" },
                "--domain",
            ])
            .arg(format!("{}.svc.cluster.local", spec.namespace))
            .arg("--templateFile")
            .arg(&self.tools.envoy_bootstrap)
            .args(["--concurrency", "1", "--proxyLogLevel"])
            .arg(std::env::var("LAB_PROXY_LOG").unwrap_or_else(|_| "warning".to_owned()));
        let labels = serde_json::to_string(&spec.labels)?;
        let mut proxy = json!({
            "discoveryAddress": "istiod.istio-system.svc:15012",
            "binaryPath": self.tools.envoy,
            "configPath": "./etc",
            "proxyStatsMatcher": {"inclusionRegexps": [
                r"cluster\..*outbound.*upstream_rq_(total|completed)", r"cluster\..*upstream_cx_total",
                r".*http_local_rate_limit.*", r"cluster\..*ratelimit.*",
            ]},
        });
        if let Some(proxy) = proxy.as_object_mut() {
            proxy.extend(spec.proxy_config.clone());
        }
        if let Some(bootstrap) = &spec.bootstrap {
            let path = self.folder.join("bootstrap.json");
            std::fs::write(&path, bootstrap)?;
            command.env("ISTIO_BOOTSTRAP_OVERRIDE", path);
        }
        command.envs([
            ("POD_NAME", spec.name.as_str()),
            ("POD_NAMESPACE", &spec.namespace),
            ("SERVICE_ACCOUNT", &spec.service_account),
            ("HOST_IP", ADDRESS),
            ("JWT_POLICY", "third-party-jwt"),
            ("PILOT_CERT_PROVIDER", "istiod"),
            ("CA_ADDR", "istiod.istio-system.svc:15012"),
            ("TRUST_DOMAIN", "cluster.local"),
            ("ISTIO_META_CLUSTER_ID", "Kubernetes"),
            ("ISTIO_META_MESH_ID", "cluster.local"),
            (
                "ISTIO_META_INTERCEPTION_MODE",
                if spec.capture { "REDIRECT" } else { "NONE" },
            ),
            ("ISTIO_META_WORKLOAD_NAME", &spec.name),
            ("ISTIO_METAJSON_LABELS", &labels),
        ]);
        command
            .envs(&spec.proxy_env)
            .env("INSTANCE_IP", self.ip.to_string())
            .env("PROXY_CONFIG", proxy.to_string());
        let name = format!("{}.sidecar", spec.id());
        self.sidecar = Some(Process::start(&name, &self.logs, command)?);
        Ok(())
    }

    /// The processor time that Envoy has had.
    ///
    /// # Errors
    /// Fails when there is none.
    pub fn envoy_time(&self) -> anyhow::Result<Duration> {
        let sidecar = self.sidecar.as_ref().context("a sidecar")?;
        let children = sidecar.children()?;
        let envoy = children.first().context("no Envoy")?;
        crate::process::processor_time(envoy.as_raw_nonzero().get().try_into()?)
    }

    /// Sends Envoy a signal, and its agent none.
    ///
    /// # Errors
    /// Fails when there is none.
    pub fn signal_envoy(&self, signal: rustix::process::Signal) -> anyhow::Result<()> {
        let sidecar = self.sidecar.as_ref().context("a sidecar")?;
        let children = sidecar.children()?;
        let envoy = children.first().context("no Envoy")?;
        Ok(rustix::process::kill_process(*envoy, signal)?)
    }

    /// Kills the proxy, and the agent that would start it again.
    ///
    /// # Errors
    /// Fails when there is none.
    pub async fn kill_sidecar(&mut self) -> anyhow::Result<()> {
        let sidecar = self.sidecar.as_mut().context("a sidecar")?;
        // Envoy would outlive its agent.
        let children = sidecar.children()?;
        sidecar.kill().await?;
        for child in children {
            rustix::process::kill_process(child, rustix::process::Signal::KILL)?;
        }
        Ok(())
    }

    /// Starts the application, or starts it again.
    ///
    /// # Errors
    /// Fails when it cannot start.
    pub fn start_app(&mut self) -> anyhow::Result<()> {
        let mut command = match &self.spec.app {
            App::Nothing => return Ok(()),
            App::Command { program, args, env } => {
                let mut command = self.command(program);
                command.args(args).envs(env);
                command
            }
            App::Echo => {
                let _ = std::fs::remove_file(&self.control);
                let mut command = self.command(&self.tools.lab_app);
                command
                    .args(["--pod", &self.spec.name, "--control"])
                    .arg(&self.control);
                for port in &self.spec.http {
                    command.args(["--http", &port.to_string()]);
                }
                for port in &self.spec.tcp {
                    command.args(["--tcp", &port.to_string()]);
                }
                command
            }
        };
        command.env("POD_NAME", &self.spec.name);
        let name = format!("{}.app", self.spec.id());
        self.app = Some(Process::start(&name, &self.logs, command)?);
        Ok(())
    }

    /// The application's process id.
    ///
    /// # Errors
    /// Fails when the pod has none.
    pub fn app_id(&self) -> anyhow::Result<u32> {
        self.app
            .as_ref()
            .and_then(Process::id)
            .context("this pod runs no application")
    }

    /// The application's process.
    ///
    /// # Errors
    /// Fails when the pod has none.
    pub fn app(&mut self) -> anyhow::Result<&mut Process> {
        self.app.as_mut().context("this pod runs no application")
    }

    /// The socket on which its application is asked to make calls.
    pub fn control(&self) -> &Path {
        &self.control
    }

    /// Makes a call from inside the pod.
    ///
    /// # Errors
    /// Fails when the pod's application does not answer; the call's own failure is in the outcome.
    pub async fn call(&self, call: &Call) -> anyhow::Result<Outcome> {
        ask(&self.control, call).await
    }

    /// Asks the sidecar's own Envoy admin interface, from inside the pod.
    ///
    /// # Errors
    /// Fails when Envoy does not answer 200.
    pub async fn envoy(&self, path: &str) -> anyhow::Result<String> {
        let outcome = match self.spec.app {
            App::Echo => self.call(&admin_call(path)).await?,
            // Without an application of ours in the pod, a short-lived client goes in.
            App::Command { .. } | App::Nothing => {
                let url = format!("http://127.0.0.1:15000{path}");
                let agent = &self.tools.pilot_agent;
                let mut command = self.command(agent);
                command.args([
                    "request",
                    if path == "/quitquitquit" {
                        "POST"
                    } else {
                        "GET"
                    },
                ]);
                let output = command
                    .arg(url.trim_start_matches("http://127.0.0.1:15000/"))
                    .output()
                    .await?;
                anyhow::ensure!(output.status.success(), "pilot-agent request {path} failed");
                return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
            }
        };
        anyhow::ensure!(outcome.status == 200, "Envoy's {path}: {outcome:?}");
        Ok(outcome.body)
    }

    /// Whether Envoy has its listeners.
    ///
    /// # Errors
    /// Fails when a process of the pod ended or Envoy is not there yet.
    pub async fn ready(&mut self) -> anyhow::Result<()> {
        for process in [self.app.as_mut(), self.sidecar.as_mut()]
            .into_iter()
            .flatten()
        {
            process.still_runs()?;
        }
        if matches!(self.spec.app, App::Echo) {
            anyhow::ensure!(self.control.exists(), "the application is not there yet");
        }
        if self.spec.sidecar {
            let stats = self
                .envoy("/stats?filter=listener_manager.workers_started")
                .await?;
            anyhow::ensure!(
                stats.contains("workers_started: 1"),
                "no listeners yet: {stats}"
            );
        }
        Ok(())
    }

    pub(crate) async fn stop(mut self) -> anyhow::Result<()> {
        for process in [self.app.as_mut(), self.sidecar.as_mut()]
            .into_iter()
            .flatten()
        {
            process.stop(Duration::from_millis(200)).await?;
        }
        run("ip", &["netns", "delete", &self.spec.id()]).map(drop)
    }
}

fn admin_call(path: &str) -> Call {
    let admin = ([127, 0, 0, 1], 15000).into();
    Call {
        path: path.into(),
        timeout: Duration::from_secs(10),
        ..crate::pods::request(Protocol::Http1, "127.0.0.1:15000", admin)
    }
}

/// A network namespace on the lab's bridge.
fn network(id: &str, number: u16, ip: Ipv4Addr) -> anyhow::Result<()> {
    let ours = format!("pod{number}");
    let address = format!("{ip}/16");
    run("ip", &["netns", "add", id])?;
    run(
        "ip",
        &[
            "link", "add", &ours, "type", "veth", "peer", "name", "eth0", "netns", id,
        ],
    )?;
    run("ip", &["link", "set", &ours, "master", "lab0", "up"])?;
    run("ip", &["-n", id, "link", "set", "lo", "up"])?;
    run("ip", &["-n", id, "addr", "add", &address, "dev", "eth0"])?;
    run("ip", &["-n", id, "link", "set", "eth0", "up"])?;
    run("ip", &["-n", id, "route", "add", "default", "via", ADDRESS]).map(drop)
}
