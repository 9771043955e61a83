//! etcd, kube-apiserver, kube-controller-manager and istiod, as plain processes.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;
use http_body_util::{BodyExt, Full};
use kube::config::{KubeConfigOptions, Kubeconfig};
use tokio::process::Command;

use crate::process::Process;
use crate::tools::Tools;
use crate::wait::eventually;

/// The address of the control plane on the bridge that joins the pods.
pub const ADDRESS: &str = "10.244.0.1";
/// The address of the second istiod, for tests that have two.
pub const SECOND_ADDRESS: &str = "10.244.0.2";
/// Where kube-apiserver listens.
pub const API_PORT: u16 = 6443;
/// Where a gate in front of it does ([`crate::gate`]).
pub const GATE_PORT: u16 = 6444;

#[derive(Debug)]
pub struct ControlPlane {
    pub etcd: Process,
    pub apiserver: Process,
    pub controller_manager: Process,
    pub istiod: Option<Process>,
    pub second_istiod: Option<Process>,
    /// The namespaces that istiods which are started from now on answer what their proxies have.
    pub debug_allowed: String,
    pub kubeconfig: PathBuf,
    scratch: PathBuf,
    logs: PathBuf,
    tools: Tools,
}

/// A kubeconfig for `server` with a bearer token.
pub fn kubeconfig(server: &str, token: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Config\ncurrent-context: lab\n\
         clusters: [{{name: lab, cluster: {{server: '{server}', insecure-skip-tls-verify: true}}}}]\n\
         users: [{{name: lab, user: {{token: '{token}'}}}}]\n\
         contexts: [{{name: lab, context: {{cluster: lab, user: lab}}}}]\n"
    )
}

/// A client for a kubeconfig file.
///
/// # Errors
/// Fails when the file cannot be read or makes no sense.
pub async fn client(path: &Path) -> anyhow::Result<kube::Client> {
    let config = Kubeconfig::read_from(path).with_context(|| path.display().to_string())?;
    let options = KubeConfigOptions::default();
    Ok(kube::Client::try_from(
        kube::Config::from_custom_kubeconfig(config, &options).await?,
    )?)
}

/// The administrator's token; the lab's network has nobody else in it.
pub const ADMIN_TOKEN: &str = "lab-admin";

impl ControlPlane {
    /// Starts everything but istiod, which wants Istio's CRDs first.
    ///
    /// # Errors
    /// Fails when a server does not start or does not get ready.
    pub async fn start(tools: &Tools, scratch: &Path, logs: &Path) -> anyhow::Result<Self> {
        let kubeconfig_path = scratch.join("kubeconfig");
        let server = format!("https://{ADDRESS}:{API_PORT}");
        std::fs::write(&kubeconfig_path, kubeconfig(&server, ADMIN_TOKEN))?;
        let tokens = format!("{ADMIN_TOKEN},admin,admin,system:masters\n");
        std::fs::write(scratch.join("tokens.csv"), tokens)?;
        service_account_key(scratch).await?;

        let etcd = Process::start("etcd", logs, etcd(tools, scratch))?;
        let mut apiserver = Process::start("kube-apiserver", logs, apiserver(tools, scratch))?;
        let client = client(&kubeconfig_path).await?;
        eventually(
            Duration::from_secs(60),
            "kube-apiserver is well",
            async || {
                apiserver.still_runs()?;
                // kube-controller-manager waits for this too, but for ten seconds at most.
                let health = http::Request::get("/healthz").body(Vec::new())?;
                client.request_text(health).await?;
                Ok(())
            },
        )
        .await?;
        let manager = controller_manager(tools, scratch, &kubeconfig_path);
        let controller_manager = Process::start("kube-controller-manager", logs, manager)?;
        Ok(Self {
            etcd,
            apiserver,
            controller_manager,
            istiod: None,
            second_istiod: None,
            // As Fenceline's documentation asks for.
            debug_allowed: "fenceline-system".to_owned(),
            kubeconfig: kubeconfig_path,
            scratch: scratch.to_owned(),
            logs: logs.to_owned(),
            tools: tools.clone(),
        })
    }

    /// Starts kube-apiserver again after it was ended.
    ///
    /// # Errors
    /// Fails when it cannot start.
    pub fn restart_apiserver(&mut self) -> anyhow::Result<()> {
        let command = apiserver(&self.tools, &self.scratch);
        self.apiserver = Process::start("kube-apiserver", &self.logs, command)?;
        Ok(())
    }

    /// Makes etcd forget all history: a watch that starts from an older version is told 410 Gone.
    ///
    /// # Errors
    /// Fails when etcd does not answer.
    pub async fn compact(&self) -> anyhow::Result<()> {
        let answer = etcd_post("/v3/kv/range", r#"{"key": "AA=="}"#).await?;
        let answer: serde_json::Value = serde_json::from_str(&answer)?;
        let revision = answer["header"]["revision"]
            .as_str()
            .context("etcd's revision")?;
        let request = format!(r#"{{"revision": "{revision}", "physical": true}}"#);
        etcd_post("/v3/kv/compaction", &request).await.map(drop)
    }

    /// Starts istiod, or starts it again after it was ended.
    ///
    /// # Errors
    /// Fails when it does not answer in time.
    pub async fn start_istiod(&mut self, mesh_config: &str) -> anyhow::Result<()> {
        std::fs::write(self.scratch.join("mesh.yaml"), mesh_config)?;
        self.istiod = Some(self.run_istiod("istiod-0", ADDRESS).await?);
        Ok(())
    }

    /// Starts a second istiod, once the first has made the mesh's certificates.
    ///
    /// # Errors
    /// Fails when it does not answer in time.
    pub async fn start_second_istiod(&mut self) -> anyhow::Result<()> {
        self.second_istiod = Some(self.run_istiod("istiod-1", SECOND_ADDRESS).await?);
        Ok(())
    }

    async fn run_istiod(&self, name: &str, address: &str) -> anyhow::Result<Process> {
        let command = self.istiod_command(name, address)?;
        let mut istiod = Process::start(name, &self.logs, command)?;
        eventually(Duration::from_secs(60), "istiod answers", async || {
            istiod.still_runs()?;
            tokio::net::TcpStream::connect((address, 15012)).await?;
            Ok(())
        })
        .await?;
        Ok(istiod)
    }

    /// istiod without what stock Envoy has no filters for.
    fn istiod_command(&self, name: &str, address: &str) -> anyhow::Result<Command> {
        // It keeps files where it runs.
        let folder = self.scratch.join(name);
        std::fs::create_dir_all(&folder)?;
        let mut command = Command::new(&self.tools.pilot_discovery);
        command
            .arg("discovery")
            .arg("--kubeconfig")
            .arg(&self.kubeconfig)
            .arg("--meshConfig")
            .arg(self.scratch.join("mesh.yaml"))
            .arg(format!("--grpcAddr={address}:15010"))
            .arg(format!("--secureGRPCAddr={address}:15012"))
            .arg(format!("--httpAddr={address}:8080"))
            .arg(format!("--monitoringAddr={address}:15014"))
            .args(["--httpsAddr=", "--ctrlz_port=0"])
            .current_dir(folder)
            .env("POD_NAME", name)
            .envs([
                ("POD_NAMESPACE", "istio-system"),
                ("PILOT_CERT_PROVIDER", "istiod"),
                ("INJECTION_WEBHOOK_CONFIG_NAME", ""),
                ("VALIDATION_WEBHOOK_CONFIG_NAME", ""),
                ("PILOT_ENABLE_METADATA_EXCHANGE", "false"),
                ("PILOT_ENABLE_ALPN_FILTER", "false"),
                ("PILOT_ENABLE_TELEMETRY_LABEL", "false"),
                ("PILOT_DISABLE_MX_ALPN", "true"),
                (
                    "DEBUG_ENDPOINT_AUTH_ALLOWED_NAMESPACES",
                    self.debug_allowed.as_str(),
                ),
            ]);
        Ok(command)
    }
}

/// etcd's JSON gateway: <https://etcd.io/docs/v3.4/dev-guide/api_grpc_gateway/>
async fn etcd_post(path: &str, body: &str) -> anyhow::Result<String> {
    let stream = tokio::net::TcpStream::connect(("127.0.0.1", 2379)).await?;
    let io = hyper_util::rt::TokioIo::new(stream);
    let (mut send, connection) = hyper::client::conn::http1::handshake(io).await?;
    tokio::spawn(connection);
    let body = Full::new(bytes::Bytes::copy_from_slice(body.as_bytes()));
    let request = http::Request::post(path)
        .header("host", "127.0.0.1:2379")
        .body(body)?;
    let answer = send.send_request(request).await?;
    anyhow::ensure!(
        answer.status().is_success(),
        "etcd {path}: {}",
        answer.status()
    );
    Ok(String::from_utf8(
        answer.into_body().collect().await?.to_bytes().to_vec(),
    )?)
}

/// kube-apiserver signs service account tokens with a key of its own.
async fn service_account_key(scratch: &Path) -> anyhow::Result<()> {
    let key = scratch.join("sa.key");
    let status = Command::new("openssl")
        .args(["genrsa", "-out"])
        .arg(&key)
        .arg("2048")
        .stderr(std::process::Stdio::null())
        .status()
        .await
        .context("could not start openssl")?;
    anyhow::ensure!(status.success(), "openssl genrsa: {status}");
    Ok(())
}

fn etcd(tools: &Tools, scratch: &Path) -> Command {
    let mut command = Command::new(&tools.etcd);
    command.arg("--data-dir").arg(scratch.join("etcd")).args([
        "--listen-client-urls=http://127.0.0.1:2379",
        "--advertise-client-urls=http://127.0.0.1:2379",
        "--listen-peer-urls=http://127.0.0.1:2380",
    ]);
    command
}

fn apiserver(tools: &Tools, scratch: &Path) -> Command {
    let key = scratch.join("sa.key");
    let key = key.display();
    let mut command = Command::new(&tools.kube_apiserver);
    command.args([
        "--etcd-servers=http://127.0.0.1:2379".to_owned(),
        "--service-account-issuer=https://kubernetes.default.svc".to_owned(),
        format!("--service-account-key-file={key}"),
        format!("--service-account-signing-key-file={key}"),
        "--service-cluster-ip-range=10.96.0.0/12".to_owned(),
        format!("--token-auth-file={}", scratch.join("tokens.csv").display()),
        "--authorization-mode=RBAC".to_owned(),
        format!("--cert-dir={}", scratch.join("certs").display()),
        format!("--secure-port={API_PORT}"),
        "--bind-address=0.0.0.0".to_owned(),
        format!("--advertise-address={ADDRESS}"),
        "--disable-admission-plugins=ServiceAccount".to_owned(),
    ]);
    command
}

fn controller_manager(tools: &Tools, scratch: &Path, kubeconfig: &Path) -> Command {
    let mut command = Command::new(&tools.kube_controller_manager);
    command.arg("--kubeconfig").arg(kubeconfig).args([
        "--controllers=endpointslice-controller,garbage-collector-controller,\
         namespace-controller,serviceaccount-controller",
        "--leader-elect=false",
    ]);
    command.arg("--cert-dir").arg(scratch.join("certs"));
    command
}
