//! The command line. Every flag of `run` can be given by environment too.

use std::net::SocketAddr;

use clap::{Parser, Subcommand, ValueEnum};

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
}

#[derive(Debug, Parser)]
pub struct Run {
    /// The namespace of the operator and its Lease.
    #[arg(long, env = "FENCELINE_NAMESPACE", default_value = "fenceline-system")]
    pub namespace: String,
    /// This replica's name in the Lease and in events.
    #[arg(long, env = "POD_NAME", default_value = "fenceline")]
    pub name: String,
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
    /// The mesh's trust domain: Istio's meshConfig.trustDomain.
    #[arg(long, env = "FENCELINE_TRUST_DOMAIN", default_value = "cluster.local")]
    pub trust_domain: String,
    /// Istio's root namespace, whose policies apply to the whole mesh: meshConfig.rootNamespace.
    #[arg(long, env = "FENCELINE_ROOT_NAMESPACE", default_value = "istio-system")]
    pub root_namespace: String,
    /// How many first calls of one pod are held at any moment; more are forwarded or refused, as the fence says.
    #[arg(long, env = "FENCELINE_HELD_PER_CALLER", default_value_t = 100)]
    pub held_per_caller: usize,
    /// How many first calls this replica holds at any moment.
    #[arg(long, env = "FENCELINE_HELD_IN_ALL", default_value_t = 2000)]
    pub held_in_all: usize,
    /// The cluster's DNS domain.
    #[arg(
        long,
        env = "FENCELINE_CLUSTER_DOMAIN",
        default_value = "cluster.local"
    )]
    pub cluster_domain: String,
    /// Where the access log and the authorization service listen. Keep it on loopback: the sidecar in front of it checks who calls.
    #[arg(
        long,
        env = "FENCELINE_GRPC_ADDRESS",
        default_value = "127.0.0.1:18100"
    )]
    pub grpc_address: SocketAddr,
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

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    Text,
    Json,
}

fn key(text: &str) -> Result<Key, String> {
    match text.split_once('/') {
        Some((namespace, name)) if !namespace.is_empty() && !name.is_empty() => {
            Ok(Key::new(namespace, name))
        }
        _ => Err("want NAMESPACE/NAME".to_owned()),
    }
}
