//! The operator's parts, put together: what every replica does, and the controllers of which the leader has the work.

mod controllers;
mod servers;

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::admin;
use crate::apply::{Gate, Writer};
use crate::args::Run;
use crate::clock;
use crate::fence::Settings;
use crate::fence::learn::Learner;
use crate::leader::Candidate;
use crate::metrics::Metrics;
use crate::observe::prometheus::{self, Prometheus};
use crate::observe::proxy::Eyes;
use crate::process::controller::{self, Controller, When};
use crate::process::watchdog::{Health, Watchdog};
use crate::process::{Pulse, Pulses};
use crate::rate_limit::{Ledger, Programs};
use crate::status::StatusWriter;
use crate::world::World;
use crate::world::feed::{self, Feed};

/// What all parts have in common.
pub(crate) struct Parts {
    pub(crate) world: watch::Receiver<Arc<World>>,
    pub(crate) synced: watch::Receiver<bool>,
    pub(crate) settings: Settings,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) status: Arc<StatusWriter>,
    pub(crate) learner: Arc<Learner>,
    pub(crate) eyes: Arc<Eyes>,
    pub(crate) ledger: Arc<Ledger>,
    pub(crate) programs: Arc<Programs>,
    pub(crate) prometheus: Option<Arc<Prometheus>>,
    pub(crate) pulses: Pulses,
    pub(crate) stop: CancellationToken,
    pub(crate) replica: String,
}

/// A replica that is ready to run.
pub struct Operator {
    /// What it does while it leads. Whoever builds a binary of their own may wrap them, or add to them.
    pub controllers: Vec<Arc<dyn Controller>>,
    parts: Parts,
    candidate: Candidate,
    servers: JoinSet<anyhow::Result<()>>,
    tasks: JoinSet<()>,
}

impl Operator {
    /// Puts a replica together: its watches, servers and candidacy begin, no controller does.
    ///
    /// # Errors
    /// Fails when an address is taken, or when the API's configuration cannot be found.
    pub async fn assemble(args: Run) -> anyhow::Result<Self> {
        // Fails where somebody did so already.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let client = kube::Client::try_default()
            .await
            .context("no access to a Kubernetes API")?;
        let (metrics, pulses) = (Arc::new(Metrics::default()), Pulses::default());
        let stop = CancellationToken::new();
        let settings = args.mesh.clone().settings();
        let Feed {
            world,
            concerned,
            fences,
            synced,
        } = feed::start(&client, &settings, &metrics, pulses.of("world"));
        let status = Arc::new(StatusWriter::new(
            client.clone(),
            Arc::clone(&metrics),
            &args.name,
        ));
        let learner = Learner::new(
            Arc::clone(&status),
            world.clone(),
            settings.clone(),
            Arc::clone(&metrics),
            clock::system,
        );
        let prometheus = prometheus(&args, &learner, &metrics)?;
        let parts = Parts {
            world,
            synced,
            settings,
            metrics,
            status,
            learner,
            eyes: Arc::default(),
            ledger: Arc::default(),
            programs: Arc::default(),
            prometheus,
            pulses,
            stop,
            replica: args.name.clone(),
        };
        let admin = std::net::TcpListener::bind(args.admin_address)
            .with_context(|| format!("--admin-address {}", args.admin_address))?;
        let servers = servers::start(&parts, &args).await?;
        let candidate = Candidate::stand(client.clone(), args.namespace.clone(), args.name.clone());
        let gate = Gate::new(candidate.leads.clone());
        parts.watch(admin, &gate, candidate.resign.clone(), args.stall_after)?;
        let writer = Writer::new(
            client.clone(),
            Arc::clone(&parts.metrics),
            args.writes_per_second,
            gate,
        );
        let tasks = parts.always(client);
        let controllers = controllers::all(&parts, &args, &writer, fences, concerned);
        Ok(Self {
            controllers,
            parts,
            candidate,
            servers,
            tasks,
        })
    }

    /// The mesh, as this replica sees it.
    pub fn world(&self) -> watch::Receiver<Arc<World>> {
        self.parts.world.clone()
    }

    /// Runs until a signal, or a part that fails, ends it. What was learnt is stored, streams move to another replica, and the Lease goes
    /// last: the next leader finds all.
    ///
    /// # Errors
    /// Fails when a server fails, or a task ends or panics.
    pub async fn run(self) -> anyhow::Result<()> {
        let Self {
            controllers,
            parts,
            candidate,
            mut servers,
            mut tasks,
        } = self;
        let when = When {
            synced: parts.synced.clone(),
            leads: candidate.leads.clone(),
            stop: parts.stop.clone(),
        };
        tasks.spawn(note_leadership(when.clone(), Arc::clone(&parts.metrics)));
        let (ended, mut threads) = mpsc::unbounded_channel();
        for controller in controllers {
            let pulse = parts.pulses.of(controller.name());
            controller::start(controller, when.clone(), pulse, ended.clone())?;
        }
        drop(ended);
        let failed = tokio::select! {
            () = parts.stop.cancelled() => Ok(()),
            // Without these the process would look well and learn nothing.
            ended = tasks.join_next() => match ended {
                Some(Err(error)) => Err(anyhow::Error::from(error).context("a task panicked")),
                _ => Err(anyhow::anyhow!("a task ended")),
            },
            ended = threads.recv() => {
                Err(anyhow::anyhow!("the controller of {} ended", ended.unwrap_or("nothing")))
            }
            ended = servers.join_next() => match ended {
                Some(Ok(result)) => result.and(Err(anyhow::anyhow!("a server ended"))),
                Some(Err(error)) => Err(anyhow::Error::from(error).context("a server panicked")),
                None => Err(anyhow::anyhow!("there is no server")),
            },
        };
        // The watchdog ends what does not end by itself.
        parts.stop.cancel();
        while let Ok(Some(_)) = tokio::time::timeout(servers::PATIENCE, servers.join_next()).await {
        }
        // No controller is left half-way through a request.
        while let Ok(Some(_)) = tokio::time::timeout(servers::PATIENCE, threads.recv()).await {}
        let _ = tokio::time::timeout(servers::PATIENCE, parts.learner.flush(|_| true)).await;
        let _ = tokio::time::timeout(servers::PATIENCE, candidate.resign()).await;
        failed
    }
}

impl Parts {
    /// What every replica does, whoever leads.
    fn always(&self, client: kube::Client) -> JoinSet<()> {
        let mut tasks = JoinSet::new();
        tasks.spawn(self.metrics.api.clone().probe(client));
        let learner = Arc::clone(&self.learner);
        let pulse = self.pulses.of("learner");
        tasks.spawn(async move { pulse.during(learner.run()).await });
        let (ledger, status) = (Arc::clone(&self.ledger), Arc::clone(&self.status));
        let (world, replica) = (self.world.clone(), self.replica.clone());
        let pulse = self.pulses.of("rate limit services");
        tasks.spawn(async move {
            pulse.during(ledger.run(world, &status, &replica)).await;
        });
        tasks
    }

    /// Starts the watchdog, which serves `/livez` and its like too.
    fn watch(
        &self,
        admin: std::net::TcpListener,
        gate: &Gate,
        resign: CancellationToken,
        patience: Duration,
    ) -> anyhow::Result<()> {
        let health = Health::default();
        let routes = admin::router(
            self.metrics.registry(),
            self.synced.clone(),
            self.metrics.api.clone(),
            health.clone(),
        );
        let watchdog = Watchdog {
            pulses: self.pulses.clone(),
            health,
            metrics: Arc::clone(&self.metrics),
            gate: gate.clone(),
            resign,
            stop: self.stop.clone(),
            replica: self.replica.clone(),
            patience,
            clock: clock::system,
        };
        watchdog.start(admin, routes)
    }

    pub(crate) fn pulse(&self, task: &'static str) -> Pulse {
        self.pulses.of(task)
    }
}

fn prometheus(
    args: &Run,
    learner: &Arc<Learner>,
    metrics: &Arc<Metrics>,
) -> anyhow::Result<Option<Arc<Prometheus>>> {
    let Some(asked) = prometheus::Settings::of(&args.prometheus) else {
        return Ok(None);
    };
    let client = prometheus::Client::new(asked)?;
    let (learner, metrics) = (Arc::clone(learner), Arc::clone(metrics));
    Ok(Some(Prometheus::new(client, learner, metrics)))
}

/// Says whether this replica acts.
async fn note_leadership(when: When, metrics: Arc<Metrics>) {
    let When {
        mut synced,
        mut leads,
        stop: _,
    } = when;
    controller::wait_for(&mut synced).await;
    tracing::info!("the mesh is listed");
    loop {
        controller::wait_for(&mut leads).await;
        metrics.leader.set(1);
        tracing::info!("this replica acts");
        controller::wait_until_not(&mut leads).await;
        metrics.leader.set(0);
        // Of these only the leader knows.
        metrics.limited.set(0);
        metrics.unready_limits.set(0);
        tracing::warn!("this replica no longer acts");
    }
}
