//! The command line. Every flag of `run` can be given by environment too.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Parser, Subcommand, ValueEnum};
use reqwest::header::{HeaderName, HeaderValue};

use crate::bounds::Bounds;
use crate::fence::Settings;
use crate::world::Key;

/// Keeps the configuration of an Istio sidecar mesh as small as its real dependencies, without breaking a call.
#[derive(Debug, Parser)]
#[command(name = "fenceline", version)]
pub struct Args {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Runs the operator.
    Run(Box<Run>),
    /// Prints the CustomResourceDefinitions as YAML.
    Crds,
    /// Says why a workload is fenced as it is: each host in its scope, and why. With a host: why it is in scope, or what a first
    /// call to it would get. Reads the cluster, as your kubeconfig lets it.
    Explain(Box<Explain>),
    /// Turns VirtualServices and DestinationRules into Routers and TrafficPatches that mean the same: YAML on standard output, and on
    /// standard error what has no such words, with the field. Applies nothing.
    Adopt {
        /// Files with the objects, as `kubectl get … -o yaml` prints them; `-` is standard input.
        #[arg(required = true)]
        files: Vec<PathBuf>,
    },
    /// Turns Slime's objects (ServiceFence, SmartLimiter, SlimeBoot, labels) into Fenceline's: YAML on standard output, and on
    /// standard error of every field what became of it. Applies nothing.
    Migrate {
        /// Files with Slime's objects, as `kubectl get … -o yaml` prints them; `-` is standard input.
        #[arg(required = true)]
        files: Vec<PathBuf>,
    },
}

#[derive(Debug, Parser)]
pub struct Explain {
    /// A fence, a Service, or a pod.
    pub workload: String,
    /// A host, as the workload would call it.
    pub host: Option<String>,
    /// The workload's namespace.
    #[arg(short, long, default_value = "default")]
    pub namespace: String,
    #[command(flatten)]
    pub mesh: MeshArgs,
}

#[derive(Debug, Parser)]
pub struct Run {
    /// The namespace of the operator and its Lease.
    #[arg(long, env = "FENCELINE_NAMESPACE", default_value = "fenceline-system")]
    pub namespace: String,
    /// This replica's name in the Lease and in events.
    #[arg(long, env = "POD_NAME", default_value = "fenceline")]
    pub name: String,
    #[command(flatten)]
    pub mesh: MeshArgs,
    /// How many first calls of one pod are held at any moment; more are forwarded or refused, as the fence says.
    #[arg(long, env = "FENCELINE_HELD_PER_CALLER", default_value_t = 100)]
    pub held_per_caller: usize,
    /// How many first calls this replica holds at any moment.
    #[arg(long, env = "FENCELINE_HELD_IN_ALL", default_value_t = 2000)]
    pub held_in_all: usize,
    /// How many objects are written a second at most, so that istiod is never stormed.
    #[arg(long, env = "FENCELINE_WRITES_PER_SECOND", default_value_t = 500)]
    pub writes_per_second: u32,
    /// After how long without a heartbeat a task of this replica counts as stalled: the replica then gives up its Lease, fails /livez and ends.
    /// At least 10s.
    #[arg(long, env = "FENCELINE_STALL_AFTER", default_value = "30s", value_parser = stall)]
    pub stall_after: Duration,
    #[command(flatten)]
    pub prometheus: PrometheusArgs,
    /// Whether RateLimits may ask Prometheus by themselves (`spec.metrics`): none of them, each for the series of its own namespace, or each
    /// for any series, with this operator's rights.
    #[arg(long, env = "FENCELINE_RATE_LIMIT_METRICS", value_enum, default_value_t = RateLimitMetrics::None)]
    pub rate_limit_metrics: RateLimitMetrics,
    /// The label that names the namespace whose a series is, for --rate-limit-metrics=namespaced.
    #[arg(long, env = "FENCELINE_RATE_LIMIT_METRICS_LABEL", default_value = "namespace", value_parser = label)]
    pub rate_limit_metrics_label: String,
    #[command(flatten)]
    pub istiod: IstiodArgs,
    /// Where the access log and the authorization service listen. Keep it on loopback: the sidecar in front of it checks who calls.
    #[arg(
        long,
        env = "FENCELINE_GRPC_ADDRESS",
        default_value = "127.0.0.1:18100"
    )]
    pub grpc_address: SocketAddr,
    /// Where the access logs of callers come in. Keep it on loopback.
    #[arg(
        long,
        env = "FENCELINE_CALLERS_ADDRESS",
        default_value = "127.0.0.1:18101"
    )]
    pub callers_address: SocketAddr,
    /// Where the rate limit service gets its configuration. Keep it on loopback.
    #[arg(
        long,
        env = "FENCELINE_RATE_LIMIT_ADDRESS",
        default_value = "127.0.0.1:18102"
    )]
    pub rate_limit_address: SocketAddr,
    /// Where /livez, /readyz and /metrics are served.
    #[arg(long, env = "FENCELINE_ADMIN_ADDRESS", default_value = "0.0.0.0:8080")]
    pub admin_address: SocketAddr,
    /// How log lines look.
    #[arg(long, env = "FENCELINE_LOG_FORMAT", value_enum, default_value_t = LogFormat::Text)]
    pub log_format: LogFormat,
    /// What is logged: a level, or tracing's directives.
    #[arg(
        long,
        env = "FENCELINE_LOG",
        default_value = "info,kube_lease_manager=warn"
    )]
    pub log: String,
}

/// The mesh and the installation.
#[derive(Clone, Debug, Parser)]
pub struct MeshArgs {
    /// The global proxy's Service, NAMESPACE/NAME; its service account has the same name. In another namespace than the
    /// operator's, the Role `fenceline` must be there too.
    #[arg(
        long,
        env = "FENCELINE_GLOBAL_PROXY",
        default_value = "fenceline-system/global-proxy",
        value_parser = key
    )]
    pub global_proxy: Key,
    /// The port of the global proxy's Service that holds calls.
    #[arg(long, env = "FENCELINE_ASK_PORT", default_value_t = 15080)]
    pub ask_port: u16,
    /// The port of the global proxy's Service that passes calls on.
    #[arg(long, env = "FENCELINE_FORWARD_PORT", default_value_t = 15088)]
    pub forward_port: u16,
    /// The operator's own Service, NAMESPACE/NAME, to which fenced workloads with `nonHTTP: Learn` send their access logs.
    #[arg(
        long,
        env = "FENCELINE_SERVICE",
        default_value = "fenceline-system/fenceline",
        value_parser = key
    )]
    pub operator: Key,
    /// The port of that Service for them.
    #[arg(long, env = "FENCELINE_CALLERS_PORT", default_value_t = 18101)]
    pub callers_port: u16,
    /// The mesh's trust domain: Istio's meshConfig.trustDomain.
    #[arg(long, env = "FENCELINE_TRUST_DOMAIN", default_value = "cluster.local")]
    pub trust_domain: String,
    /// Istio's root namespace, whose policies apply to the whole mesh: meshConfig.rootNamespace.
    #[arg(long, env = "FENCELINE_ROOT_NAMESPACE", default_value = "istio-system")]
    pub root_namespace: String,
    /// The ConfigMap with Istio's MeshConfig, NAMESPACE/NAME; `istio-REVISION` with a revision. The ClusterRole must allow
    /// to watch it.
    #[arg(long, env = "FENCELINE_MESH_CONFIG", default_value = "istio-system/istio", value_parser = key)]
    pub mesh_config: Key,
    /// The rate limit service's Service, NAMESPACE/NAME, which Global RateLimits ask.
    #[arg(long, env = "FENCELINE_RATE_LIMIT_SERVICE", default_value = "fenceline-system/ratelimit", value_parser = key)]
    pub rate_limit_service: Key,
    /// The port of that Service.
    #[arg(long, env = "FENCELINE_RATE_LIMIT_PORT", default_value_t = 8081)]
    pub rate_limit_port: u16,
    /// The cluster's DNS domain.
    #[arg(
        long,
        env = "FENCELINE_CLUSTER_DOMAIN",
        default_value = "cluster.local"
    )]
    pub cluster_domain: String,
    #[command(flatten)]
    pub bounds: Bounds,
}

impl MeshArgs {
    /// What the planners must know of them.
    pub fn settings(self) -> Settings {
        let Self {
            global_proxy,
            ask_port,
            forward_port,
            operator,
            callers_port,
            trust_domain,
            root_namespace,
            mesh_config,
            rate_limit_service,
            rate_limit_port,
            cluster_domain,
            bounds,
        } = self;
        Settings {
            global_proxy,
            ask_port,
            forward_port,
            operator,
            callers_port,
            cluster_domain,
            trust_domain,
            root_namespace,
            mesh_config,
            rate_limit_service,
            rate_limit_port,
            bounds,
        }
    }
}

/// Prometheus as evidence of calls. Lengths of time are written as `90s`, `1h30m`.
#[derive(Clone, Debug, Parser)]
pub struct PrometheusArgs {
    /// Prometheus, or anything with its API, as http://prometheus.monitoring:9090. Absent: nobody is asked, and nothing is
    /// forgotten.
    #[arg(long, env = "FENCELINE_PROMETHEUS_URL")]
    pub prometheus_url: Option<String>,
    /// A query for calls, once for each; `$namespace` and `$window` are filled in, and its result must have the labels
    /// source_workload and destination_service. Absent: those of Istio's standard metrics.
    #[arg(long)]
    pub prometheus_query: Vec<String>,
    /// A query for the workloads of `$namespace` that had any counter `$ago`. Absent: that of Istio's standard metrics.
    #[arg(long, env = "FENCELINE_PROMETHEUS_CALLERS_QUERY")]
    pub prometheus_callers_query: Option<String>,
    /// How often each namespace is asked about.
    #[arg(long, env = "FENCELINE_PROMETHEUS_INTERVAL", default_value = "60s", value_parser = time)]
    pub prometheus_interval: Duration,
    /// How far each question looks back.
    #[arg(long, env = "FENCELINE_PROMETHEUS_WINDOW", default_value = "1h", value_parser = time)]
    pub prometheus_window: Duration,
    /// How far the first question about a fence looks back.
    #[arg(long, env = "FENCELINE_PROMETHEUS_HISTORY", default_value = "24h", value_parser = time)]
    pub prometheus_history: Duration,
    /// How long an answer may take.
    #[arg(long, env = "FENCELINE_PROMETHEUS_TIMEOUT", default_value = "10s", value_parser = time)]
    pub prometheus_timeout: Duration,
    /// A header for each question, NAME=VALUE, as X-Scope-OrgID=mesh.
    #[arg(long, value_parser = header)]
    pub prometheus_header: Vec<(HeaderName, HeaderValue)>,
    /// A file with a bearer token. Like the others it is read again when it changes.
    #[arg(long, env = "FENCELINE_PROMETHEUS_TOKEN_FILE")]
    pub prometheus_token_file: Option<PathBuf>,
    /// A file with the certificates, in PEM, of authorities to be trusted beside the system's.
    #[arg(long, env = "FENCELINE_PROMETHEUS_CA_FILE")]
    pub prometheus_ca_file: Option<PathBuf>,
    /// A file with a client certificate and its key, in PEM.
    #[arg(long, env = "FENCELINE_PROMETHEUS_IDENTITY_FILE")]
    pub prometheus_identity_file: Option<PathBuf>,
}

/// How istiod is asked what it sends to whom, which is how changes of routes are seen to arrive.
#[derive(Clone, Debug, Parser)]
pub struct IstiodArgs {
    /// A file with a token of the operator's service account for the audience istio-ca.
    #[arg(
        long,
        env = "FENCELINE_ISTIOD_TOKEN_FILE",
        default_value = "/var/run/secrets/tokens/istio-token"
    )]
    pub istiod_token_file: PathBuf,
    /// A file with the mesh's root certificate, in PEM: istio-ca-root-cert.
    #[arg(
        long,
        env = "FENCELINE_ISTIOD_CA_FILE",
        default_value = "/var/run/secrets/istio/root-cert.pem"
    )]
    pub istiod_ca_file: PathBuf,
    /// The name in istiod's certificate; with a revision istiod-REVISION.istio-system.svc.
    #[arg(
        long,
        env = "FENCELINE_ISTIOD_NAME",
        default_value = "istiod.istio-system.svc"
    )]
    pub istiod_name: String,
    /// The cluster's name in Istio: meshConfig's or the chart's clusterName.
    #[arg(long, env = "FENCELINE_CLUSTER", default_value = "Kubernetes")]
    pub cluster: String,
    /// The operator's service account.
    #[arg(long, env = "FENCELINE_SERVICE_ACCOUNT", default_value = "fenceline")]
    pub service_account: String,
}

fn header(text: &str) -> Result<(HeaderName, HeaderValue), String> {
    let (name, value) = text.split_once('=').ok_or("it must be NAME=VALUE")?;
    let name = name
        .trim()
        .parse()
        .map_err(|error| format!("{name}: {error}"))?;
    let value = value
        .trim()
        .parse()
        .map_err(|error| format!("its value: {error}"))?;
    Ok((name, value))
}

fn time(text: &str) -> Result<Duration, String> {
    match fenceline_crds::period(text) {
        Some(time) if !time.is_zero() => Ok(time),
        _ => Err("want a length of time, as 90s or 1h30m".to_owned()),
    }
}

/// A task beats every few seconds, and a busy machine may be late.
fn stall(text: &str) -> Result<Duration, String> {
    match time(text)? {
        time if time >= Duration::from_secs(10) => Ok(time),
        _ => Err("want at least 10s".to_owned()),
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    Text,
    Json,
}

/// What RateLimits may ask Prometheus.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum RateLimitMetrics {
    None,
    Namespaced,
    Any,
}

/// <https://prometheus.io/docs/concepts/data_model/#metric-names-and-labels>
fn label(text: &str) -> Result<String, String> {
    let mut characters = text.chars();
    let first = |c: char| c.is_ascii_alphabetic() || c == '_';
    let well = characters.next().is_some_and(first)
        && characters.all(|c| c.is_ascii_alphanumeric() || c == '_');
    if well && text != "__name__" {
        Ok(text.to_owned())
    } else {
        Err("want the name of a label, as namespace".to_owned())
    }
}

fn key(text: &str) -> Result<Key, String> {
    match text.split_once('/') {
        Some((namespace, name)) if !namespace.is_empty() && !name.is_empty() => {
            Ok(Key::new(namespace, name))
        }
        _ => Err("want NAMESPACE/NAME".to_owned()),
    }
}
