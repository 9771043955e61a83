//! `fenceline run`: puts the parts together, and takes them apart in order.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::TcpListenerStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::server::Router as Services;
use tracing_subscriber::EnvFilter;

use crate::admin;
use crate::apply::Writer;
use crate::args::{LogFormat, Run};
use crate::clock;
use crate::deputy;
use crate::fence::{self, arrival::Arrivals, learn::Learner, retain::Retention};
use crate::global_proxy as global_proxy_health;
use crate::leader::Candidate;
use crate::metrics::Metrics;
use crate::observe::access_log::AccessLog;
use crate::observe::callers_log::CallersLog;
use crate::observe::ext_authz::ExtAuthz;
use crate::observe::hold::{Holder, Limits};
use crate::observe::identity::Identity;
use crate::observe::peer::Door;
use crate::observe::prometheus::{self, Prometheus};
use crate::observe::proxy::Eyes;
use crate::observe::reporters::Reporters;
use crate::policy;
use crate::ports;
use crate::rate_limit::discovery::Discovery;
use crate::rate_limit::{self, Ledger};
use crate::router;
use crate::router::istiod::{Access, Istiods};
use crate::servers;
use crate::status::StatusWriter;
use crate::world::feed::{self, Feed};
use crate::world::{Key, World};

/// How long requests that are under way may take to finish when the process is asked to end.
const PATIENCE: Duration = Duration::from_secs(5);

/// Runs until a signal ends it.
///
/// # Errors
/// Fails when an address is taken, the API's configuration cannot be found, or a server fails.
pub async fn run(args: Run) -> anyhow::Result<()> {
    let Run {
        namespace,
        name,
        mesh,
        held_per_caller,
        held_in_all,
        grpc_address,
        callers_address,
        rate_limit_address,
        admin_address,
        log_format,
        log,
        writes_per_second,
        prometheus,
        istiod,
    } = args;
    start_logging(log_format, &log)?;
    tracing::info!(
        version = env!("CARGO_PKG_VERSION"),
        name,
        "fenceline starts"
    );
    let client = kube::Client::try_default()
        .await
        .context("no access to a Kubernetes API")?;
    let stop = CancellationToken::new();
    let metrics = Arc::new(Metrics::default());

    let settings = mesh.settings();
    let Feed {
        world,
        mut concerned,
        fences,
        synced,
    } = feed::start(&client, &settings, &metrics);
    tokio::spawn(metrics.api.clone().probe(client.clone()));
    let status = Arc::new(StatusWriter::new(
        client.clone(),
        Arc::clone(&metrics),
        &name,
    ));
    let learner = Learner::new(
        Arc::clone(&status),
        world.clone(),
        settings.clone(),
        Arc::clone(&metrics),
        clock::system,
    );
    let mut learning = tokio::spawn(Arc::clone(&learner).run());

    let prometheus = match prometheus::Settings::of(&prometheus) {
        None => None,
        Some(asked) => {
            // Fails where somebody did so already.
            let _ = rustls::crypto::ring::default_provider().install_default();
            let client = prometheus::Client::new(asked)?;
            let (learner, metrics) = (Arc::clone(&learner), Arc::clone(&metrics));
            Some(Prometheus::new(client, learner, metrics))
        }
    };

    let own = Identity {
        trust_domain: settings.trust_domain.clone(),
        namespace: namespace.clone(),
        service_account: istiod.service_account.clone(),
    };
    let door = Door {
        own: own.clone(),
        wanted: Identity {
            trust_domain: settings.trust_domain.clone(),
            namespace: settings.global_proxy.namespace.clone(),
            service_account: settings.global_proxy.name.clone(),
        },
        metrics: Arc::clone(&metrics),
    };
    let access_log = AccessLog {
        door: door.clone(),
        world: world.clone(),
        learner: Arc::clone(&learner),
        stop: stop.clone(),
    };
    let callers_log = CallersLog {
        world: world.clone(),
        learner: Arc::clone(&learner),
        own: own.clone(),
        reporters: Arc::new(Reporters::new(settings.bounds.reports_per_second)),
        metrics: Arc::clone(&metrics),
        stop: stop.clone(),
    };
    let callers = TcpListener::bind(callers_address)
        .await
        .with_context(|| format!("--callers-address {callers_address}"))?;
    let services = servers::callers(callers_log);
    let mut callers = tokio::spawn(serve(callers, services, synced.clone(), stop.clone()));
    let ledger = Arc::new(Ledger::default());
    let discovery = Discovery {
        door: Door {
            own,
            wanted: Identity {
                trust_domain: settings.trust_domain.clone(),
                namespace: settings.rate_limit_service.namespace.clone(),
                service_account: settings.rate_limit_service.name.clone(),
            },
            metrics: Arc::clone(&metrics),
        },
        world: world.clone(),
        settings: settings.clone(),
        ledger: Arc::clone(&ledger),
        replica: name.clone(),
        stop: stop.clone(),
    };
    let configurations = TcpListener::bind(rate_limit_address)
        .await
        .with_context(|| format!("--rate-limit-address {rate_limit_address}"))?;
    let services = servers::rate_limits(discovery);
    let mut configurations = tokio::spawn(serve(
        configurations,
        services,
        synced.clone(),
        stop.clone(),
    ));
    let noting = {
        let (world, status, replica) = (world.clone(), Arc::clone(&status), name.clone());
        async move { ledger.run(world, &status, &replica).await }
    };
    tokio::spawn(noting);
    let limits = Limits {
        per_caller: held_per_caller,
        in_all: held_in_all,
    };
    let eyes = Arc::new(Eyes::default());
    let ext_authz = ExtAuthz {
        door,
        world: world.clone(),
        settings: settings.clone(),
        learner: Arc::clone(&learner),
        holder: Holder::new(
            world.clone(),
            Arc::clone(&metrics),
            limits,
            Arc::clone(&eyes),
        ),
        metrics: Arc::clone(&metrics),
        clock: clock::system,
    };
    let admin = TcpListener::bind(admin_address)
        .await
        .with_context(|| format!("--admin-address {admin_address}"))?;
    let grpc = TcpListener::bind(grpc_address)
        .await
        .with_context(|| format!("--grpc-address {grpc_address}"))?;
    let routes = admin::router(metrics.registry(), synced.clone(), metrics.api.clone());
    let admin = axum::serve(admin, routes)
        .with_graceful_shutdown(stop.clone().cancelled_owned())
        .into_future();
    let admin = tokio::spawn(admin);
    let services = servers::global_proxy(access_log, ext_authz);
    let mut grpc = tokio::spawn(serve(grpc, services, synced.clone(), stop.clone()));

    let writer = Writer::new(client.clone(), Arc::clone(&metrics), writes_per_second);
    let (arrivals, mut arrived) = Arrivals::new(eyes);
    let context = Arc::new(fence::Context {
        world: world.clone(),
        writer: writer.clone(),
        status,
        learner: Arc::clone(&learner),
        settings: settings.clone(),
        metrics: Arc::clone(&metrics),
        clock: clock::system,
        arrivals,
        recent: fence::RecentObjects::default(),
        prometheus: prometheus.clone(),
        failures: std::sync::Mutex::default(),
    });
    let policies = policy::Context {
        writer: writer.clone(),
        status: Arc::clone(&context.status),
        settings: settings.clone(),
        prometheus: prometheus.clone(),
        clock: clock::system,
    };
    let retention = prometheus.clone().map(|prometheus| Retention {
        interval: prometheus.interval(),
        prometheus,
        status: Arc::clone(&context.status),
        clock: clock::system,
    });
    let routers = Arc::new(router::Context {
        world: world.clone(),
        writer: writer.clone(),
        status: Arc::clone(&context.status),
        istiods: Arc::new(Istiods::new(Access {
            istio_namespace: settings.root_namespace.clone(),
            server_name: istiod.istiod_name,
            token: istiod.istiod_token_file,
            root_certificate: istiod.istiod_ca_file,
            namespace: namespace.clone(),
            service_account: istiod.service_account,
            name: format!("{name}-view"),
            cluster: istiod.cluster,
            cluster_domain: settings.cluster_domain.clone(),
        })),
        settings: settings.clone(),
        clock: clock::system,
    });
    let rate_limits = Arc::new(rate_limit::Context {
        world: world.clone(),
        writer: writer.clone(),
        status: Arc::clone(&context.status),
        settings: settings.clone(),
        istiods: Arc::clone(&routers.istiods),
        prometheus: prometheus.clone(),
        metrics: Arc::clone(&metrics),
        operator: Key::new(&*namespace, &*name),
        clock: clock::system,
    });
    let candidate = Candidate::stand(client.clone(), namespace, name);
    let mut leads = candidate.leads.clone();
    let work = async {
        wait_for(&mut synced.clone()).await;
        tracing::info!("the mesh is listed");
        loop {
            // Who does not act has no use for what changed; whoever begins to act looks at everything.
            tokio::select! {
                () = wait_for(&mut leads) => {}
                () = drain(&mut concerned) => {}
            }
            metrics.leader.set(1);
            tracing::info!("this replica acts");
            tokio::select! {
                () = wait_until_not(&mut leads) => {}
                () = fence::run(Arc::clone(&context), fences.clone(), &mut concerned, &mut arrived) => {}
                () = ports::run(world.clone(), writer.clone(), settings.clone()) => {}
                () = global_proxy_health::run(world.clone(), Arc::clone(&context.status), settings.clone()) => {}
                () = deputy::run(world.clone(), writer.clone(), settings.clone()) => {}
                () = policy::run(world.clone(), &policies) => {}
                () = router::run(Arc::clone(&routers)) => {}
                () = rate_limit::run(Arc::clone(&rate_limits)) => {}
                () = ask(prometheus.as_deref(), &world) => {}
                () = forget(retention.as_ref(), &world) => {}
            }
            metrics.leader.set(0);
            // Of these only the leader knows.
            metrics.limited.set(0);
            metrics.unready_limits.set(0);
            tracing::warn!("this replica no longer acts");
        }
    };
    tokio::select! {
        () = work => {}
        signal = ended() => tracing::info!(signal = signal?, "ending"),
        // Without these the process would look well and learn nothing.
        _ = &mut learning => anyhow::bail!("learning ended"),
        ended = &mut callers => return ended?.context("the service for callers ended"),
        ended = &mut configurations => return ended?.context("the service for the rate limit service ended"),
        ended = &mut grpc => return ended?.context("the service for the global proxy ended"),
    }

    // What was learnt is stored, streams move to another replica, and the lease goes last: the next leader finds all.
    stop.cancel();
    for server in [
        grpc,
        callers,
        configurations,
        tokio::spawn(async { Ok(admin.await??) }),
    ] {
        if let Ok(result) = tokio::time::timeout(PATIENCE, server).await {
            result??;
        }
    }
    let _ = tokio::time::timeout(PATIENCE, learner.flush()).await;
    let _ = tokio::time::timeout(PATIENCE, candidate.resign()).await;
    Ok(())
}

/// Serves proxies once there is a mesh to understand them by; until then they try another replica.
async fn serve(
    listener: TcpListener,
    services: Services,
    mut synced: watch::Receiver<bool>,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    tokio::select! {
        () = wait_for(&mut synced) => {}
        () = stop.cancelled() => return Ok(()),
    }
    services
        .serve_with_incoming_shutdown(TcpListenerStream::new(listener), stop.cancelled_owned())
        .await?;
    Ok(())
}

async fn wait_for(flag: &mut watch::Receiver<bool>) {
    if flag.wait_for(|set| *set).await.is_err() {
        std::future::pending::<()>().await;
    }
}

async fn drain<T>(changes: &mut mpsc::UnboundedReceiver<T>) {
    while changes.recv().await.is_some() {}
    std::future::pending::<()>().await;
}

async fn wait_until_not(flag: &mut watch::Receiver<bool>) {
    // A sender that is gone cannot renew the lease either.
    let _ = flag.wait_for(|set| !*set).await;
}

/// The first signal that asks the process to end; a second one ends it at once.
async fn ended() -> anyhow::Result<&'static str> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let first = tokio::select! {
        _ = terminate.recv() => "SIGTERM",
        _ = interrupt.recv() => "SIGINT",
    };
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        std::process::exit(130);
    });
    Ok(first)
}

fn start_logging(format: LogFormat, directives: &str) -> anyhow::Result<()> {
    let filter = EnvFilter::try_new(directives).context("--log")?;
    let lines = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr);
    match format {
        LogFormat::Text => lines.init(),
        LogFormat::Json => lines.json().init(),
    }
    Ok(())
}

/// Asks Prometheus, where there is one.
async fn ask(prometheus: Option<&Prometheus>, world: &watch::Receiver<Arc<World>>) {
    match prometheus {
        Some(prometheus) => prometheus.run(world.clone()).await,
        None => std::future::pending().await,
    }
}

/// Forgets, where anybody can say what was not called.
async fn forget(retention: Option<&Retention>, world: &watch::Receiver<Arc<World>>) {
    match retention {
        Some(retention) => retention.run(world.clone()).await,
        None => std::future::pending().await,
    }
}
