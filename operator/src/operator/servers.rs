//! What proxies and the rate limit service speak to.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_stream::wrappers::TcpListenerStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::server::Router as Services;

use super::Parts;
use crate::args::Run;
use crate::clock;
use crate::observe::access_log::AccessLog;
use crate::observe::callers_log::CallersLog;
use crate::observe::ext_authz::ExtAuthz;
use crate::observe::hold::{Holder, Limits};
use crate::observe::identity::Identity;
use crate::observe::peer::Door;
use crate::observe::reporters::Reporters;
use crate::process::Pulse;
use crate::process::controller::wait_for;
use crate::rate_limit::discovery::Discovery;
use crate::servers;
use crate::world::Key;

/// How long requests that are under way may take to finish when the process is asked to end.
pub(super) const PATIENCE: Duration = Duration::from_secs(5);

/// Starts every server.
///
/// # Errors
/// Fails when an address is taken.
pub(super) async fn start(
    parts: &Parts,
    args: &Run,
) -> anyhow::Result<JoinSet<anyhow::Result<()>>> {
    let mut serving = JoinSet::new();
    let callers = bind("--callers-address", args.callers_address).await?;
    let services = servers::callers(callers_log(parts, args));
    serving.spawn(serve(callers, services, parts, "server for callers"));
    let limits = bind("--rate-limit-address", args.rate_limit_address).await?;
    let services = servers::rate_limits(discovery(parts, args));
    serving.spawn(serve(limits, services, parts, "server for rate limits"));
    let grpc = bind("--grpc-address", args.grpc_address).await?;
    let services = servers::global_proxy(access_log(parts, args), ext_authz(parts, args));
    serving.spawn(serve(grpc, services, parts, "server for the global proxy"));
    Ok(serving)
}

async fn bind(flag: &str, address: SocketAddr) -> anyhow::Result<TcpListener> {
    let listener = TcpListener::bind(address).await;
    listener.with_context(|| format!("{flag} {address}"))
}

/// Who the operator is, to whom its own sidecar says who calls.
fn own(parts: &Parts, args: &Run) -> Identity {
    Identity {
        trust_domain: parts.settings.trust_domain.clone(),
        namespace: args.namespace.clone(),
        service_account: args.istiod.service_account.clone(),
    }
}

/// Lets in the service account that a Service of ours runs as.
fn door(parts: &Parts, args: &Run, service: &Key) -> Door {
    Door {
        own: own(parts, args),
        wanted: Identity {
            trust_domain: parts.settings.trust_domain.clone(),
            namespace: service.namespace.clone(),
            service_account: service.name.clone(),
        },
        metrics: Arc::clone(&parts.metrics),
    }
}

fn access_log(parts: &Parts, args: &Run) -> AccessLog {
    AccessLog {
        door: door(parts, args, &parts.settings.global_proxy),
        world: parts.world.clone(),
        learner: Arc::clone(&parts.learner),
        stop: parts.stop.clone(),
    }
}

fn callers_log(parts: &Parts, args: &Run) -> CallersLog {
    CallersLog {
        world: parts.world.clone(),
        learner: Arc::clone(&parts.learner),
        own: own(parts, args),
        reporters: Arc::new(Reporters::new(parts.settings.bounds.reports_per_second)),
        metrics: Arc::clone(&parts.metrics),
        stop: parts.stop.clone(),
    }
}

fn discovery(parts: &Parts, args: &Run) -> Discovery {
    Discovery {
        door: door(parts, args, &parts.settings.rate_limit_service),
        world: parts.world.clone(),
        settings: parts.settings.clone(),
        ledger: Arc::clone(&parts.ledger),
        programs: Arc::clone(&parts.programs),
        clock: clock::system,
        replica: parts.replica.clone(),
        stop: parts.stop.clone(),
    }
}

fn ext_authz(parts: &Parts, args: &Run) -> ExtAuthz {
    let limits = Limits {
        per_caller: args.held_per_caller,
        in_all: args.held_in_all,
    };
    ExtAuthz {
        door: door(parts, args, &parts.settings.global_proxy),
        world: parts.world.clone(),
        settings: parts.settings.clone(),
        learner: Arc::clone(&parts.learner),
        holder: Holder::new(
            parts.world.clone(),
            Arc::clone(&parts.metrics),
            limits,
            Arc::clone(&parts.eyes),
        ),
        metrics: Arc::clone(&parts.metrics),
        clock: clock::system,
    }
}

/// Serves proxies once there is a mesh to understand them by; until then they try another replica.
fn serve(
    listener: TcpListener,
    services: Services,
    parts: &Parts,
    task: &'static str,
) -> impl Future<Output = anyhow::Result<()>> + use<> {
    let (synced, stop) = (parts.synced.clone(), parts.stop.clone());
    let pulse = parts.pulse(task);
    async move {
        let served = serve_once_synced(listener, services, synced, stop, &pulse).await;
        served.with_context(|| format!("the {task}"))
    }
}

async fn serve_once_synced(
    listener: TcpListener,
    services: Services,
    mut synced: watch::Receiver<bool>,
    stop: CancellationToken,
    pulse: &Pulse,
) -> anyhow::Result<()> {
    tokio::select! {
        () = wait_for(&mut synced) => {}
        () = stop.cancelled() => return Ok(()),
    }
    let connections = TcpListenerStream::new(listener);
    let serving = services.serve_with_incoming_shutdown(connections, stop.cancelled_owned());
    Ok(pulse.during(serving).await?)
}
