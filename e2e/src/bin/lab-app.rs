//! The application that runs in a lab pod.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;

use clap::Parser;
use fenceline_e2e::app::{Server, serve_control};

#[derive(Parser)]
struct Args {
    /// The name it reports.
    #[arg(long)]
    pod: String,
    /// Ports that speak HTTP/1.1, h2c and gRPC.
    #[arg(long)]
    http: Vec<u16>,
    /// Ports that greet and then echo bytes.
    #[arg(long)]
    tcp: Vec<u16>,
    /// The unix socket on which calls are asked for.
    #[arg(long)]
    control: PathBuf,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let Args {
        pod,
        http,
        tcp,
        control,
    } = Args::parse();
    let server = Server { pod };
    let mut tasks = tokio::task::JoinSet::new();
    for port in http {
        tasks.spawn(
            server
                .clone()
                .http(SocketAddr::from((Ipv4Addr::UNSPECIFIED, port))),
        );
    }
    for port in tcp {
        tasks.spawn(
            server
                .clone()
                .tcp(SocketAddr::from((Ipv4Addr::UNSPECIFIED, port))),
        );
    }
    tasks.spawn(async move { serve_control(&control).await });
    while let Some(ended) = tasks.join_next().await {
        ended??;
    }
    Ok(())
}
