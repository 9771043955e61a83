//! RateLimits: one EnvoyFilter for each, and for Global ones the configuration of the rate limit service ([`discovery`]). Shape: gather,
//! validate ([`valid`]), decide ([`adapt`]), plan ([`plan`]), apply, look at what proxies make of it ([`proxies`]), status ([`report`]).

mod adapt;
mod descriptor;
pub mod discovery;
mod expr;
mod global;
mod local;
mod path;
mod plan;
#[cfg(test)]
mod plan_tests;
mod proxies;
mod readings;
mod report;
mod services;
mod target;
mod valid;

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use fenceline_crds::istio::{EnvoyFilter, EnvoyFilterSpec};
use fenceline_crds::{RateLimit, RateLimitSpec, RuleStatus, Share};
use jiff::Timestamp;
use kube::{Resource, ResourceExt};
use serde_json::json;
use tokio::sync::{mpsc, watch};

pub use services::Ledger;
pub(crate) use target::asks_the_service;

use crate::apply::{self, RATE_LIMIT_LABEL, Writer};
use crate::clock::Clock;
use crate::fence::Settings;
use crate::metrics::Metrics;
use crate::note::{self, Note};
use crate::observe::prometheus::Prometheus;
use crate::recent::Recent;
use crate::router::istiod::Istiods;
use crate::router::plan::short_hash;
use crate::status::StatusWriter;
use crate::work::{self, Next};
use crate::world::{Key, World, in_namespace};
use adapt::{Decision, Known};
use plan::{Filter, InForce};
use proxies::{Before, Proxies, Seen};
use readings::Readings;
use report::{Report, Standing};
use target::Pods;
use valid::Limit;

/// How long a change waits for company.
const COALESCE: Duration = Duration::from_millis(50);
/// What was missed is healed this often, and proxies are asked again whether they have it.
const RESYNC: Duration = Duration::from_secs(60);
const RETRY: Duration = Duration::from_secs(2);
/// How often proxies are asked while something is on its way to them.
const ASK: Duration = Duration::from_millis(250);
const ASK_RARELY: Duration = Duration::from_secs(2);
/// Envoy says that it refuses what it got within moments; until then nobody can be sure.
const SETTLES: Duration = Duration::from_secs(2);
/// How long status waits before it says that something is on its way: most is there by then.
const SAID_AFTER: Duration = Duration::from_secs(5);
/// How long a change waits for the one before it.
const PATIENCE: Duration = Duration::from_secs(15);
/// What is waited for first.
const OPENING: &str = "its place in the proxies' listeners is on its way";
/// How long a change waits where nobody can be asked.
const UNSEEN: Duration = Duration::from_secs(5);

/// What the controller works with.
pub struct Context {
    pub world: watch::Receiver<Arc<World>>,
    pub writer: Writer,
    pub status: Arc<StatusWriter>,
    pub settings: Settings,
    pub istiods: Arc<Istiods>,
    pub prometheus: Option<Arc<Prometheus>>,
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
    unready: bool,
}

/// What was written last, and not seen to have arrived.
#[derive(Clone, Debug)]
struct OnTheWay {
    /// What it says, in short.
    mark: String,
    since: Instant,
    before: Before,
    /// When every proxy had it first.
    everywhere: Option<Instant>,
}

struct Limits {
    context: Arc<Context>,
    proxies: Proxies,
    readings: Readings,
    recent: Recent<EnvoyFilter>,
    memory: Mutex<HashMap<Key, Memory>>,
}

/// Keeps workloads limited as RateLimits want it for as long as it is polled: the leader's work.
pub async fn run(context: Arc<Context>) {
    let (wake, woken) = mpsc::unbounded_channel();
    let limits = Limits {
        proxies: Proxies::new(Arc::clone(&context.istiods)),
        readings: Readings::new(context.prometheus.clone()),
        recent: Recent::default(),
        memory: Mutex::default(),
        context: Arc::clone(&context),
    };
    let root = &context.settings.root_namespace;
    let changes = async {
        let mut world = context.world.clone();
        let mut then: Option<Arc<World>> = None;
        loop {
            let now = Arc::clone(&world.borrow_and_update());
            let concerned = match &then {
                None => all(&now),
                Some(then) => concerned(then, &now, root),
            };
            for limit in concerned {
                // Nobody works on it once this replica no longer leads.
                let _ = wake.send(limit);
            }
            then = Some(now);
            if world.changed().await.is_err() {
                return;
            }
            tokio::time::sleep(COALESCE).await;
        }
    };
    let work = work::run(woken, async |key: &Key| limits.reconcile(key).await);
    tokio::select! {
        () = changes => {}
        () = work => {}
    }
}

/// Whether a RateLimit makes sense.
#[cfg(test)]
pub(crate) fn check(object: &RateLimit, world: &World) -> Result<(), String> {
    let limit = valid::limit(object, world, "istio-system");
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

/// What was refused is not tried again until another spec is wanted, or another Fenceline makes something else of it.
fn mark_of_spec(spec: &RateLimitSpec) -> String {
    short_hash(&json!([spec, env!("CARGO_PKG_VERSION")]).to_string())
}

/// What an EnvoyFilter says, in short.
fn mark_of(spec: &EnvoyFilterSpec) -> String {
    short_hash(&json!(spec).to_string())
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
        let (report, next) =
            match valid::limit(object, &world, &self.context.settings.root_namespace) {
                Err(invalid) => (Report::invalid(&invalid), RESYNC),
                Ok(limit) => self.keep(object, &limit, &world, now).await,
            };
        self.note_unready(key, &report.standing);
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
        match report.write(object, &self.context.status, now).await {
            Ok(()) => Next::In(next),
            Err(error) => {
                tracing::warn!(rate_limit = %key, %error, "a status");
                Next::In(RETRY)
            }
        }
    }

    /// Nobody wants it any more.
    async fn retire(&self, key: &Key, world: &World) -> Next {
        self.lock().remove(key);
        self.readings.forget(key);
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
        limit: &Limit,
        world: &World,
        now: Timestamp,
    ) -> (Report, Duration) {
        let pods = Pods::of(limit, world);
        let replicas = self.replicas(object, limit, pods.ready);
        let decisions = self.decide(object, limit, pods.ready, now).await;
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
        self.count();
        let next = match &standing {
            Standing::OnTheWay(..) => ASK,
            Standing::Failing(_) => RETRY,
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
        (report, if settles { next.min(ASK_RARELY) } else { next })
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

    async fn decide(
        &self,
        object: &RateLimit,
        limit: &Limit,
        replicas: u32,
        now: Timestamp,
    ) -> Vec<Decision> {
        let every = limit
            .rules
            .iter()
            .map(|rule| rule.every)
            .min()
            .unwrap_or(RESYNC);
        // Asked a little early rather than once too late.
        let readings = self.readings.metrics(limit, every.mul_f64(0.9)).await;
        let known = Known { readings, replicas };
        let mut memory = self.lock();
        let of = memory.entry(limit.key.clone()).or_default();
        let said = object
            .status
            .as_ref()
            .map(|status| status.rules.as_slice())
            .unwrap_or_default();
        let before = of.rules.as_deref().unwrap_or(said);
        let decisions: Vec<Decision> = limit
            .rules
            .iter()
            .map(|rule| {
                let old = before.iter().find(|status| status.name == rule.name);
                adapt::decide(rule, old, &known, now)
            })
            .collect();
        of.rules = Some(
            decisions
                .iter()
                .map(|decision| decision.status.clone())
                .collect(),
        );
        decisions
    }

    /// Makes the EnvoyFilter be as it should, unless proxies refused just that; with what it says, in short, once every proxy has it.
    async fn carry_out(
        &self,
        object: &RateLimit,
        limit: &Limit,
        filters: &[Filter],
        world: &World,
    ) -> (Standing, Option<String>) {
        let name = Key::new(&*limit.key.namespace, plan::name(&limit.key.name));
        let stored = self.recent.newest(&name, world.envoy_filters.get(&name));
        let wanted = mark_of_spec(&object.spec);
        if let Some(why) = stored
            .as_deref()
            .and_then(|stored| note::refused(stored, &wanted))
        {
            return (Standing::Refused(why), None);
        }
        let said = self.proxies.said(world, ASK).await;
        if let Some(why) = proxies::unsupported(limit, world, &said) {
            return (Standing::Unsupported(why), None);
        }
        let Some(mut want) = plan::plan(object, limit, filters) else {
            return (self.take_away(&name, stored.as_deref()).await, None);
        };
        let mark = mark_of(&want.spec);
        if stored
            .as_deref()
            .is_none_or(|stored| stored.spec != want.spec)
        {
            // One thing at a time: what is refused is told by what came last.
            if let Some(standing) = self
                .still_comes(limit, filters, world, stored.as_deref())
                .await
            {
                return match standing {
                    Standing::Refused(why) => (
                        self.put_back(object, limit, stored.as_deref(), &why).await,
                        None,
                    ),
                    other => (other, None),
                };
            }
            let opening = plan::opening(&want.spec, stored.as_deref().map(|stored| &stored.spec));
            let opens = opening.is_some();
            want.spec = opening.unwrap_or(want.spec);
            let good = stored
                .as_deref()
                .filter(|stored| self.is_good(object, stored));
            want.metadata.annotations =
                Note::good(good.map(|stored| &stored.spec), stored.as_deref()).annotations();
            let before = proxies::before(self.proxies.said(world, Duration::ZERO).await.as_ref());
            if let Err(standing) = self.write(&name, &want, stored.as_deref()).await {
                return (standing, None);
            }
            self.lock().entry(limit.key.clone()).or_default().on_the_way = Some(OnTheWay {
                mark: mark_of(&want.spec),
                since: Instant::now(),
                before,
                everywhere: None,
            });
            if opens {
                return (Standing::OnTheWay(OPENING.to_owned(), false), None);
            }
        }
        let standing = match self.follow(limit, filters, world, &mark).await {
            Standing::Refused(why) => self.put_back(object, limit, stored.as_deref(), &why).await,
            Standing::InForce(seen) if limit.share == Share::Global => {
                services::standing(object, limit, &self.rules_of(limit))
                    .unwrap_or(Standing::InForce(seen))
            }
            other => other,
        };
        let has = matches!(standing, Standing::InForce(_));
        (standing, has.then_some(mark))
    }

    fn rules_of(&self, limit: &Limit) -> Vec<RuleStatus> {
        let memory = self.lock();
        let of = memory.get(&limit.key);
        of.and_then(|of| of.rules.clone()).unwrap_or_default()
    }

    /// Whether what is stored was seen to be in force.
    fn is_good(&self, object: &RateLimit, stored: &EnvoyFilter) -> bool {
        let said = object
            .status
            .as_ref()
            .and_then(|status| status.in_force.as_deref());
        let mark = mark_of(&stored.spec);
        let memory = self.lock();
        let key = Key::new(object.namespace().unwrap_or_default(), object.name_any());
        let on_the_way = memory.get(&key).and_then(|of| of.on_the_way.as_ref());
        let arrived = on_the_way.is_some_and(|it| it.mark == mark && it.everywhere.is_some());
        arrived || said == Some(&*mark)
    }

    async fn write(
        &self,
        name: &Key,
        want: &EnvoyFilter,
        have: Option<&EnvoyFilter>,
    ) -> Result<(), Standing> {
        match self.context.writer.ensure(want, have).await {
            Ok(Some(written)) => {
                self.recent.wrote(name, written);
                Ok(())
            }
            Ok(None) => Ok(()),
            Err(apply::Error::NotOurs { object, .. }) => Err(Standing::NameTaken(object)),
            Err(error) => Err(Standing::Failing(
                error.refusal().unwrap_or_else(|| crate::chain(&error)),
            )),
        }
    }

    /// No rule counts.
    async fn take_away(&self, name: &Key, stored: Option<&EnvoyFilter>) -> Standing {
        if let Some(stored) = stored {
            if let Err(error) = self.context.writer.remove(stored).await {
                return Standing::Failing(crate::chain(&error));
            }
            self.recent.removed(name);
        }
        Standing::InForce("no rule is in force at the moment".to_owned())
    }

    /// Where what was written last stands, as long as it has not arrived.
    async fn still_comes(
        &self,
        limit: &Limit,
        filters: &[Filter],
        world: &World,
        stored: Option<&EnvoyFilter>,
    ) -> Option<Standing> {
        let stored = mark_of(&stored?.spec);
        let on_the_way = self.lock().get(&limit.key)?.on_the_way.clone()?;
        if on_the_way.mark != stored
            || on_the_way.everywhere.is_some()
            || on_the_way.since.elapsed() > PATIENCE
        {
            return None;
        }
        match self.follow(limit, filters, world, &stored).await {
            // There, if not settled: that is for what can be refused.
            Standing::OnTheWay(..) if self.is_everywhere(limit) => None,
            Standing::InForce(_) => None,
            Standing::OnTheWay(..) => {
                let lasts = on_the_way.since.elapsed() > SAID_AFTER;
                Some(Standing::OnTheWay(OPENING.to_owned(), lasts))
            }
            other => Some(other),
        }
    }

    fn is_everywhere(&self, limit: &Limit) -> bool {
        let memory = self.lock();
        let on_the_way = memory.get(&limit.key).and_then(|of| of.on_the_way.as_ref());
        on_the_way.is_some_and(|it| it.everywhere.is_some())
    }

    /// What proxies make of what is stored.
    async fn follow(
        &self,
        limit: &Limit,
        filters: &[Filter],
        world: &World,
        mark: &str,
    ) -> Standing {
        let on_the_way = self
            .lock()
            .get(&limit.key)
            .and_then(|of| of.on_the_way.clone());
        let on_the_way = on_the_way.filter(|it| it.mark == mark);
        let waits = on_the_way
            .as_ref()
            .is_some_and(|it| it.everywhere.is_none());
        let said = self
            .proxies
            .said(world, if waits { ASK / 2 } else { ASK_RARELY })
            .await;
        let before = on_the_way.as_ref().map(|it| &it.before);
        match proxies::look(limit, filters, world, &said, before) {
            Seen::Refused(why) => Standing::Refused(why),
            Seen::Waits(why) => match on_the_way {
                // A proxy that is connected, but of which nothing came since, began lately or moved to another istiod.
                None => Standing::InForce("every proxy had it".to_owned()),
                Some(it) => Standing::OnTheWay(why, it.since.elapsed() > SAID_AFTER),
            },
            Seen::Everywhere(proxies) => {
                if let Some(it) = &on_the_way {
                    let first = it.everywhere.unwrap_or_else(Instant::now);
                    let settled = first.elapsed() > SETTLES;
                    let mut memory = self.lock();
                    let of = memory.entry(limit.key.clone()).or_default();
                    // Looked at again for a while: Envoy may refuse it yet.
                    of.on_the_way = (first.elapsed() < UNSEEN).then(|| OnTheWay {
                        everywhere: Some(first),
                        ..it.clone()
                    });
                    if !settled {
                        let why = "every proxy has it; whether one refuses it shows in a moment"
                            .to_owned();
                        return Standing::OnTheWay(why, false);
                    }
                }
                Standing::InForce(format!("{proxies} proxies have it"))
            }
            Seen::Unknown(why) => match on_the_way {
                Some(it) if it.since.elapsed() < UNSEEN => Standing::OnTheWay(why, false),
                _ => Standing::InForce(format!("it is not known whether proxies have it: {why}")),
            },
        }
    }

    /// Puts back what was in force before, or nothing, and leaves it so until something else is wanted.
    async fn put_back(
        &self,
        object: &RateLimit,
        limit: &Limit,
        stored: Option<&EnvoyFilter>,
        why: &str,
    ) -> Standing {
        let name = Key::new(&*limit.key.namespace, plan::name(&limit.key.name));
        let newest = self.recent.newest(&name, None);
        let stored = newest.as_deref().or(stored);
        tracing::warn!(rate_limit = %limit.key, why, "a limit is taken back");
        let mut back = match stored {
            Some(stored) => stored.clone(),
            None => return Standing::Refused(why.to_owned()),
        };
        back.metadata.managed_fields = None;
        back.metadata.resource_version = None;
        back.metadata.uid = None;
        back.metadata.creation_timestamp = None;
        back.metadata.generation = None;
        back.spec = plan::back(stored.and_then(note::last_good), &back.spec);
        back.metadata.annotations =
            Note::refused(stored, &mark_of_spec(&object.spec), why).annotations();
        match self.write(&name, &back, stored).await {
            Err(standing) => standing,
            Ok(()) => {
                self.lock().entry(limit.key.clone()).or_default().on_the_way = None;
                Standing::Refused(why.to_owned())
            }
        }
    }

    fn note_unready(&self, key: &Key, standing: &Standing) {
        let unready = {
            let mut memory = self.lock();
            memory.entry(key.clone()).or_default().unready = !standing.is_well();
            memory.values().filter(|of| of.unready).count()
        };
        self.context
            .metrics
            .unready_limits
            .set(i64::try_from(unready).unwrap_or(i64::MAX));
    }

    fn count(&self) {
        let total = i64::try_from(self.readings.total()).unwrap_or(i64::MAX);
        self.context.metrics.limited.set(total);
    }
}
