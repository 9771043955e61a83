//! Calls at random between many pods, for as long as a test goes on, and what became of each.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant};

use tokio::task::JoinSet;

use crate::app::{Call, Outcome, Protocol, ask};
use crate::fences::Name;
use crate::lab::Lab;
use crate::pods::request;

/// A call that may be made.
#[derive(Clone, Debug)]
pub struct Target {
    pub call: Call,
    /// The pod that must answer; absent, any may.
    pub answered_by: Option<String>,
}

impl Target {
    /// A call to a Service, a namespace and a name, which a pod must answer.
    ///
    /// # Errors
    /// Fails when there is no such Service.
    pub async fn of(
        lab: &Lab,
        (namespace, service): Name<'_>,
        pod: &str,
        protocol: Protocol,
        port: u16,
    ) -> anyhow::Result<Self> {
        let host = format!("{service}.{namespace}");
        let connect = lab.resolve(namespace, &host, port).await?;
        Ok(Self {
            call: request(protocol, &format!("{host}:{port}"), connect),
            answered_by: Some(pod.to_owned()),
        })
    }
}

/// A call that failed.
#[derive(Clone, Debug)]
pub struct Failure {
    /// Since the traffic began.
    pub at: Duration,
    pub took: Duration,
    pub from: String,
    pub to: String,
    pub protocol: Protocol,
    pub what: String,
}

/// What became of all calls.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    pub made: BTreeMap<String, usize>,
    /// By which pod.
    pub answered: BTreeMap<String, usize>,
    /// Refusals that Fenceline announces, with its reason.
    pub refused: BTreeMap<String, usize>,
    pub failed: Vec<Failure>,
}

impl Tally {
    pub fn calls(&self) -> usize {
        self.made.values().sum()
    }
}

/// Which of so many targets a pod calls: by the pod's index, and how often it called before.
pub type Choice = fn(pod: usize, round: u64, targets: usize) -> usize;

#[derive(Default)]
struct Shared {
    targets: RwLock<Vec<Target>>,
    stop: AtomicBool,
    tally: Mutex<Tally>,
}

/// Traffic that runs beside a test.
pub struct Traffic {
    shared: Arc<Shared>,
    callers: JoinSet<anyhow::Result<()>>,
    started: Instant,
}

impl Traffic {
    /// Lets each of the pods call targets that `choice` chooses, one after the other with a pause between.
    ///
    /// # Errors
    /// Fails when one of the pods does not run.
    pub fn start(
        lab: &Lab,
        pods: &[(&str, &str)],
        targets: Vec<Target>,
        pause: Duration,
        choice: Choice,
    ) -> anyhow::Result<Self> {
        let shared = Arc::new(Shared {
            targets: RwLock::new(targets),
            ..Shared::default()
        });
        let started = Instant::now();
        let mut callers = JoinSet::new();
        for (index, (namespace, name)) in pods.iter().enumerate() {
            let caller = Caller {
                control: lab.running(namespace, name)?.control().to_owned(),
                name: format!("{namespace}/{name}"),
                index,
                shared: Arc::clone(&shared),
                started,
            };
            callers.spawn(caller.run(pause, choice));
        }
        Ok(Self {
            shared,
            callers,
            started,
        })
    }

    pub fn elapsed(&self) -> Duration {
        self.started.elapsed()
    }

    /// Changes what may be called.
    pub fn set_targets(&self, targets: Vec<Target>) {
        let mut all = self
            .shared
            .targets
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        *all = targets;
    }

    pub fn tally(&self) -> Tally {
        let tally = self
            .shared
            .tally
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        tally.clone()
    }

    /// Ends the traffic once the calls under way are done.
    ///
    /// # Errors
    /// Fails when the application of a pod was gone.
    pub async fn stop(mut self) -> anyhow::Result<Tally> {
        self.shared.stop.store(true, Ordering::Relaxed);
        while let Some(ended) = self.callers.join_next().await {
            ended??;
        }
        Ok(self.tally())
    }
}

struct Caller {
    control: PathBuf,
    name: String,
    index: usize,
    shared: Arc<Shared>,
    started: Instant,
}

impl Caller {
    async fn run(self, pause: Duration, choice: Choice) -> anyhow::Result<()> {
        // Not all at the same moment.
        tokio::time::sleep(pause.mul_f64(f64::from(u32::try_from(self.index % 16)?) / 16.0)).await;
        for round in 0.. {
            if self.shared.stop.load(Ordering::Relaxed) {
                break;
            }
            let target = {
                let all = self
                    .shared
                    .targets
                    .read()
                    .unwrap_or_else(PoisonError::into_inner);
                let chosen = choice(self.index, round, all.len());
                all.get(chosen).cloned()
            };
            if let Some(target) = target {
                let at = self.started.elapsed();
                let outcome = ask(&self.control, &target.call).await?;
                self.note(&target, at, &outcome);
            }
            tokio::time::sleep(pause).await;
        }
        Ok(())
    }

    fn note(&self, target: &Target, at: Duration, outcome: &Outcome) {
        let protocol = target.call.protocol;
        let answered = match protocol {
            Protocol::Tcp => outcome.body.lines().next().map(str::to_owned),
            _ => outcome.report().ok().map(|report| report.pod),
        };
        let well = |pod: &String| match &target.answered_by {
            Some(wanted) => pod == wanted,
            None => true,
        };
        let mut tally = self
            .shared
            .tally
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        *tally.made.entry(format!("{protocol:?}")).or_default() += 1;
        if let Some(pod) = answered.filter(well) {
            *tally.answered.entry(pod).or_default() += 1;
            return;
        }
        match outcome.headers.get("x-fenceline-reason") {
            Some(reason) => *tally.refused.entry(reason.clone()).or_default() += 1,
            None => tally.failed.push(Failure {
                at,
                took: outcome.took,
                from: self.name.clone(),
                to: target.call.authority.clone(),
                protocol,
                what: format!("{outcome:?}"),
            }),
        }
    }
}
