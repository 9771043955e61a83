//! RateLimits: one EnvoyFilter for each, and for Global ones the configuration of the rate limit service ([`discovery`]). Shape: gather,
//! validate ([`valid`]), decide ([`adapt`]), plan ([`plan`]), apply, look at what proxies make of it ([`proxies`]), status ([`report`]).

mod adapt;
mod descriptor;
pub mod discovery;
mod expr;
mod global;
mod grammar;
mod local;
mod path;
mod plan;
#[cfg(test)]
mod plan_tests;
mod programs;
mod proxies;
mod readings;
mod report;
mod services;
mod target;
mod tenant;
mod turns;
mod valid;
mod write;

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use fenceline_crds::istio::EnvoyFilter;
use fenceline_crds::{RateLimit, RuleStatus, Share};
use jiff::Timestamp;
use kube::{Resource, ResourceExt};
use tokio::sync::{mpsc, watch};

pub(crate) use expr::is_within_bounds;
pub use programs::Programs;
pub use services::Ledger;
pub(crate) use target::asks_the_service;
pub use tenant::Policy as MetricsPolicy;

use crate::apply::{RATE_LIMIT_LABEL, Writer};
use crate::args::RateLimitMetrics;
use crate::clock::Clock;
use crate::fence::Settings;
use crate::metrics::Metrics;
use crate::observe::prometheus::Prometheus;
use crate::process::Pulse;
use crate::process::evaluate::{self, TooLong};
use crate::process::quarantine::{self, Object};
use crate::recent::Recent;
use crate::router::istiod::Istiods;
use crate::status::StatusWriter;
use crate::work::{self, Next};
use crate::world::{Key, World, in_namespace};
use adapt::{Decision, Known};
use plan::InForce;
use proxies::Proxies;
use readings::{Read, Readings};
use report::{Report, Standing, Wrote};
use target::Pods;
use valid::{Invalid, Limit};
use write::OnTheWay;

/// How long a change waits for company.
const COALESCE: Duration = Duration::from_millis(50);
/// What was missed is healed this often, and proxies are asked again whether they have it.
const RESYNC: Duration = Duration::from_secs(60);
const RETRY: Duration = Duration::from_secs(2);
/// How often proxies are asked while something is on its way to them; then more and more rarely: an answer is megabytes where there are thousands.
const ASK: Duration = Duration::from_millis(250);
const ASK_RARELY: Duration = Duration::from_secs(2);
const ASK_SELDOM: Duration = Duration::from_secs(15);
/// What the controller works with.
pub struct Context {
    pub world: watch::Receiver<Arc<World>>,
    pub writer: Writer,
    pub status: Arc<StatusWriter>,
    pub settings: Settings,
    pub istiods: Arc<Istiods>,
    pub prometheus: Option<Arc<Prometheus>>,
    /// What RateLimits may ask it.
    pub policy: MetricsPolicy,
    pub programs: Arc<Programs>,
    pub metrics: Arc<Metrics>,
    /// The operator's own namespace, and this replica.
    pub operator: Key,
    pub clock: Clock,
}

/// What is remembered of a RateLimit while this replica leads.
#[derive(Debug, Default)]
struct Memory {
    /// What was decided last, which status may not show yet.
    rules: Option<Vec<RuleStatus>>,
    shared_by: Option<u32>,
    fewer_since: Option<Instant>,
    on_the_way: Option<OnTheWay>,
    /// What every proxy had last, in short, which status may not show yet.
    in_force: Option<String>,
    /// When status was written last.
    wrote: Option<Instant>,
    unready: bool,
    /// The bound that its spec is over.
    over: Option<&'static str>,
}

struct Limits {
    context: Arc<Context>,
    proxies: Proxies,
    readings: Readings,
    recent: Recent<EnvoyFilter>,
    memory: Mutex<HashMap<Key, Memory>>,
}

/// Keeps workloads limited as RateLimits want it for as long as it is polled: the leader's work.
pub async fn run(context: Arc<Context>, pulse: Pulse) {
    let (wake, woken) = mpsc::unbounded_channel();
    let limits = Limits {
        proxies: Proxies::new(Arc::clone(&context.istiods)),
        readings: Readings::new(
            context.prometheus.clone(),
            context.policy.clone(),
            Arc::clone(&context.metrics),
            wake.clone(),
        ),
        recent: Recent::default(),
        memory: Mutex::default(),
        context: Arc::clone(&context),
    };
    context.programs.retain(&context.world.borrow());
    let root = &context.settings.root_namespace;
    let world = context.world.clone();
    let of_change = |then: &World, now: &World| concerned(then, now, root);
    let changes = work::wake_changed(world, &wake, COALESCE, all, of_change);
    let work = work::run(woken, async |key: &Key| {
        let object = Object::RateLimit(key.clone());
        pulse.at_object(object, limits.reconcile(key)).await
    });
    tokio::select! {
        () = changes => {}
        () = work => {}
    }
}

/// Whether a RateLimit makes sense.
#[cfg(test)]
pub(crate) fn check(object: &RateLimit, world: &World) -> Result<(), String> {
    let limit = valid::limit(object, world, "istio-system", &Programs::default());
    limit.map(drop).map_err(|invalid| invalid.to_string())
}

/// The RateLimit that an EnvoyFilter was written for.
fn limit_of(filter: &EnvoyFilter) -> Option<Key> {
    let name = filter.labels().get(RATE_LIMIT_LABEL)?;
    Some(Key::new(filter.namespace()?, name))
}

/// Every RateLimit there is, or was.
fn all(world: &World) -> BTreeSet<Key> {
    let written = world.envoy_filters.values();
    let written = written.filter_map(|filter| limit_of(filter));
    world.rate_limits.keys().cloned().chain(written).collect()
}

/// Those that a change may concern: of each namespace in which anything changed that they go by, and those of the mesh.
fn concerned(then: &World, now: &World, root: &str) -> BTreeSet<Key> {
    if now.rate_limits.is_empty() && then.rate_limits.is_empty() {
        return BTreeSet::new();
    }
    let mut namespaces = BTreeSet::new();
    crate::router::changed(&then.rate_limits, &now.rate_limits, &mut namespaces);
    crate::router::changed(&then.envoy_filters, &now.envoy_filters, &mut namespaces);
    crate::router::changed(&then.services, &now.services, &mut namespaces);
    crate::router::changed(&then.pods, &now.pods, &mut namespaces);
    if namespaces.is_empty() {
        return BTreeSet::new();
    }
    let all = all(now).into_iter();
    all.filter(|limit| limit.namespace == root || namespaces.contains(&limit.namespace))
        .collect()
}

impl Limits {
    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<Key, Memory>> {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn reconcile(&self, key: &Key) -> Next {
        let world = Arc::clone(&self.context.world.borrow());
        let object = world
            .rate_limits
            .get(key)
            .filter(|object| object.meta().deletion_timestamp.is_none());
        let Some(object) = object else {
            return self.retire(key, &world).await;
        };
        let now = (self.context.clock)();
        if quarantine::holds(object.as_ref(), now) {
            return Next::In(RESYNC);
        }
        let kept = match self.validate(object, &world).await {
            Err(too_long) => Err(too_long),
            Ok(Err(invalid)) => Ok((Report::invalid(&invalid), RESYNC, invalid.over)),
            Ok(Ok(limit)) => self
                .keep(object, &limit, &world, now)
                .await
                .map(|(report, next)| (report, next, None)),
        };
        let (report, next, over) = match kept {
            Err(TooLong) => return self.quarantine(key, now).await,
            Ok(kept) => kept,
        };
        self.note(key, &report, over);
        let namespace = &self.context.operator;
        let gone = |replica: &str| {
            // Replicas that are not pods, as on somebody's own machine, are nobody's to judge.
            let here = in_namespace(&world.pods, &namespace.namespace)
                .next()
                .is_some();
            here && replica != namespace.name
                && !world
                    .pods
                    .contains_key(&Key::new(&*namespace.namespace, replica))
        };
        services::sweep(object, &self.context.status, gone).await;
        let wrote = self.lock().get(key).and_then(|of| of.wrote);
        let wrote = wrote.map(|at| at.elapsed());
        let written = report.write(object, &self.context.status, wrote, now).await;
        match written {
            Ok(Wrote::Nothing) => Next::In(next),
            Ok(Wrote::Later(rest)) => Next::In(next.min(rest)),
            Ok(Wrote::Status) => {
                let wrote = Some(Instant::now());
                self.lock().entry(key.clone()).or_default().wrote = wrote;
                Next::In(next)
            }
            Err(error) => {
                tracing::warn!(rate_limit = %key, %error, "a status");
                Next::In(RETRY)
            }
        }
    }

    /// What a RateLimit means, on a thread of its own: how long it takes is the tenants' to say.
    async fn validate(
        &self,
        object: &Arc<RateLimit>,
        world: &Arc<World>,
    ) -> Result<Result<Arc<Limit>, Invalid>, TooLong> {
        let (object, world) = (Arc::clone(object), Arc::clone(world));
        let root = self.context.settings.root_namespace.clone();
        let programs = Arc::clone(&self.context.programs);
        evaluate::within_deadline(move || {
            valid::limit(&object, &world, &root, &programs).map(Arc::new)
        })
        .await
    }

    /// Marks it; what is in effect stays.
    async fn quarantine(&self, key: &Key, now: Timestamp) -> Next {
        let object = Object::RateLimit(key.clone());
        let status = &self.context.status;
        match status.quarantine(&object, evaluate::DEADLINE, now).await {
            Ok(()) => Next::In(RESYNC),
            Err(error) => {
                tracing::error!(%object, %error, "not quarantined");
                Next::In(RETRY)
            }
        }
    }

    /// Nobody wants it any more.
    async fn retire(&self, key: &Key, world: &World) -> Next {
        self.lock().remove(key);
        self.readings.forget(key);
        self.context.programs.forget(key);
        self.count();
        let object = Key::new(&*key.namespace, plan::name(&key.name));
        let Some(filter) = self
            .recent
            .newest(&object, world.envoy_filters.get(&object))
        else {
            return Next::Gone;
        };
        if limit_of(&filter).as_ref() != Some(key) {
            return Next::Gone;
        }
        match self.context.writer.remove(filter.as_ref()).await {
            Ok(()) => {
                self.recent.removed(&object);
                Next::Gone
            }
            Err(error) => {
                tracing::warn!(rate_limit = %key, error = crate::chain(&error), "an EnvoyFilter that nobody wants");
                Next::In(RETRY)
            }
        }
    }

    /// Keeps a RateLimit that makes sense; says what there is to be said, and when to look again.
    async fn keep(
        &self,
        object: &RateLimit,
        limit: &Arc<Limit>,
        world: &World,
        now: Timestamp,
    ) -> Result<(Report, Duration), TooLong> {
        let pods = Pods::of(limit, world);
        let replicas = self.replicas(object, limit, pods.ready);
        let decisions = self.decide(object, limit, pods.ready, now).await?;
        let rules: Vec<RuleStatus> = decisions
            .iter()
            .map(|decision| decision.status.clone())
            .collect();
        let cluster = self.context.settings.rate_limit_cluster();
        let in_force = InForce {
            rules: &rules,
            replicas,
            cluster: &cluster,
        };
        let filters = plan::filters(limit, &in_force);
        let (standing, mark) = self.carry_out(object, limit, &filters, world).await;
        let limited = self.readings.limited(&limit.key, &filters).await;
        let next = match &standing {
            Standing::OnTheWay(..) => self.pace(&limit.key),
            Standing::Failing(_) => RETRY,
            Standing::Unsupported(_) => ASK_SELDOM,
            Standing::InForce(_)
                if self
                    .lock()
                    .get(&limit.key)
                    .is_some_and(|of| of.on_the_way.is_some()) =>
            {
                ASK_RARELY
            }
            _ => RESYNC,
        };
        let moves = limit
            .rules
            .iter()
            .filter(|rule| rule.when.is_some() || rule.adaptive.is_some());
        let next = moves
            .map(|rule| rule.every)
            .chain([next])
            .min()
            .unwrap_or(next);
        let report = Report {
            standing,
            target: Some(target::words(limit, object)),
            remark: pods.remark(),
            replicas: (limit.share == Share::AcrossReplicas).then_some(replicas),
            stale: decisions
                .iter()
                .filter_map(|decision| decision.stale.clone())
                .collect(),
            moves: limit
                .rules
                .iter()
                .any(|rule| rule.when.is_some() || rule.adaptive.is_some()),
            metrics_off: self.readings.policy().is_off() && limit.needs_metrics(),
            per: limit.rules.iter().map(|rule| rule.quota.per).collect(),
            limited,
            filters,
            rules,
            mark,
        };
        // With fewer replicas, the limit is divided anew a while later.
        let settles = self
            .lock()
            .get(&limit.key)
            .is_some_and(|of| of.fewer_since.is_some());
        let next = if settles { next.min(ASK_RARELY) } else { next };
        Ok((report, next))
    }

    /// By how many replicas the limit is divided.
    fn replicas(&self, object: &RateLimit, limit: &Limit, ready: u32) -> u32 {
        let mut memory = self.lock();
        let of = memory.entry(limit.key.clone()).or_default();
        let before = of.shared_by.or_else(|| object.status.as_ref()?.replicas);
        if before.is_some_and(|before| ready < before) {
            of.fewer_since.get_or_insert_with(Instant::now);
        } else {
            of.fewer_since = None;
        }
        let fewer_for = of
            .fewer_since
            .map(|since| since.elapsed())
            .unwrap_or_default();
        let shared_by = target::shared_by(before, ready, fewer_for);
        if Some(shared_by) != before {
            of.fewer_since = None;
        }
        of.shared_by = Some(shared_by);
        shared_by
    }

    /// What its rules do from now on, worked out on a thread of its own.
    async fn decide(
        &self,
        object: &RateLimit,
        limit: &Arc<Limit>,
        replicas: u32,
        now: Timestamp,
    ) -> Result<Vec<Decision>, TooLong> {
        let every = limit
            .rules
            .iter()
            .map(|rule| rule.every)
            .min()
            .unwrap_or(RESYNC);
        // Asked a little early rather than once too late.
        let Read { readings, asking } = self.readings.metrics(limit, every.mul_f64(0.9));
        let known = Known {
            readings,
            replicas,
            asking,
            hidden: self.readings.policy().metrics == RateLimitMetrics::Any,
        };
        let said = object.status.as_ref().map(|status| status.rules.clone());
        let before = self.rules_of(limit).or(said).unwrap_or_default();
        let of = Arc::clone(limit);
        let decisions = evaluate::within_deadline(move || -> Vec<Decision> {
            let decide = |rule: &valid::Rule| {
                let old = before.iter().find(|status| status.name == rule.name);
                adapt::decide(rule, old, &known, now)
            };
            of.rules.iter().map(decide).collect()
        })
        .await?;
        let statuses = decisions.iter().map(|decision| decision.status.clone());
        let rules = Some(statuses.collect());
        self.lock().entry(limit.key.clone()).or_default().rules = rules;
        Ok(decisions)
    }

    /// How soon to look again at what is on its way.
    fn pace(&self, key: &Key) -> Duration {
        let memory = self.lock();
        let since = memory.get(key).and_then(|of| of.on_the_way.as_ref());
        match since.map(OnTheWay::elapsed) {
            Some(time) if time < ASK_RARELY * 3 => ASK,
            Some(time) if time < ASK_SELDOM * 2 => ASK_RARELY,
            // What waits for something else, as for a rate limit service, is told by a change.
            _ => ASK_SELDOM,
        }
    }

    fn note(&self, key: &Key, report: &Report, over: Option<&'static str>) {
        let mut memory = self.lock();
        let of = memory.entry(key.clone()).or_default();
        (of.unready, of.over) = (!report.standing.is_well(), over);
        of.in_force = report.mark.clone().or_else(|| of.in_force.take());
        drop(memory);
        self.count();
    }

    fn count(&self) {
        let memory = self.lock();
        let unready = memory.values().filter(|of| of.unready).count();
        let metrics = &self.context.metrics;
        for bound in valid::BOUNDS {
            let over = memory.values().filter(|of| of.over == Some(bound)).count();
            metrics.is_over(bound, over);
        }
        drop(memory);
        let number = |count: u64| i64::try_from(count).unwrap_or(i64::MAX);
        metrics.unready_limits.set(number(unready as u64));
        metrics.limited.set(number(self.readings.total()));
    }
}
