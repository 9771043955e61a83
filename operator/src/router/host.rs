//! One service at a time: gather, plan, the next step, status.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use fenceline_crds::istio::{
    DestinationRule, DestinationRuleSpec, VirtualService, VirtualServiceSpec,
};
use fenceline_crds::{Change, Router};
use jiff::{SignedDuration, Timestamp};
use kube::ResourceExt;
use serde_json::Value;
use tokio::sync::mpsc;

use super::arrival::{Expectation, Outcome};
use super::follow::Followed;
use super::order::{self, Arrived, Stage, Step, Stored};
use super::plan::{Inputs, Target, plan, short_hash, subset_name};
use super::write::{self, Objects};
use super::{Context, RESYNC, RETRY, expect, said};
use crate::fence::select::{Labels, matches, pods_in};
use crate::patch::{Patches, by_service};
use crate::world::{Key, World};

/// While something is waited for, status says what, this often.
const SAY: Duration = Duration::from_secs(2);
/// What was written is looked at again once the watch shows it, which is soon.
const SHOWN: Duration = Duration::from_millis(20);

/// When a service is to be looked at again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    In(Duration),
    /// Nothing is left of it.
    Gone,
}

/// What is on its way, of each service.
pub(super) struct Hosts {
    context: Arc<Context>,
    wake: mpsc::UnboundedSender<Key>,
    followed: Mutex<HashMap<Key, OnTheWay>>,
}

/// What is on its way of one service.
#[derive(Debug, Default)]
struct OnTheWay {
    rule: Option<Followed>,
    routes: Option<Followed>,
    /// The versions of objects that we wrote: until the watch shows them or newer ones, nothing is worked out.
    written: Option<(Instant, write::Versions)>,
}

/// What a service is, and what somebody wants of it.
pub(super) struct Gathered<'a> {
    pub(super) service: &'a Key,
    pub(super) fqdn: String,
    pub(super) router: Option<Arc<Router>>,
    /// Routers of the same service that are younger.
    pub(super) juniors: Vec<Arc<Router>>,
    pub(super) patches: Patches,
    pub(super) objects: Objects,
    /// What stands in the way.
    pub(super) conflicts: Vec<String>,
}

/// Where a service stands.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Standing {
    Stable,
    /// A step is on its way.
    Changing(Stage, String),
    /// The target was refused, and the last good state is in force.
    Refused(String),
    Conflicted(Vec<String>),
    Invalid(String),
    NoService,
    Failing(String),
}

impl Hosts {
    pub(super) fn new(context: Arc<Context>, wake: mpsc::UnboundedSender<Key>) -> Self {
        let followed = Mutex::default();
        Self {
            context,
            wake,
            followed,
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<Key, OnTheWay>> {
        self.followed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the next step for a service.
    pub(super) async fn reconcile(&self, service: &Key) -> Next {
        let world = Arc::clone(&self.context.world.borrow());
        let gathered = gather(service, &world);
        if !self.is_shown(service, &gathered.objects) {
            return Next::In(SHOWN);
        }
        let now = (self.context.clock)();
        let endpoints = |labels: &Labels| endpoints(&world, service, labels);
        let shut = said::shut(&gathered, &world, now);
        let inputs = Inputs {
            host: &gathered.fqdn,
            router: gathered.router.as_deref(),
            patches: &gathered.patches,
            endpoints: &endpoints,
            shut: &shut,
        };
        let (target, standing) = match plan(&inputs) {
            Err(invalid) => (Target::default(), Standing::Invalid(invalid.to_string())),
            Ok(target) => {
                let standing = self.carry_out(&gathered, &target, &world).await;
                (target, standing)
            }
        };
        let prepared = |branch: &str| self.is_prepared(&gathered, branch);
        let reported =
            said::report(&gathered, &target, &standing, &prepared, &self.context, now).await;
        let nothing = gathered.router.is_none() && gathered.patches.is_empty();
        if nothing && gathered.objects.is_empty() {
            self.lock().remove(service);
            return Next::Gone;
        }
        let ends = said::next_end(&gathered, now).and_then(|end| Duration::try_from(end).ok());
        let next = match &standing {
            Standing::Changing(..) => SAY,
            Standing::Failing(_) => RETRY,
            _ if !reported => RETRY,
            _ => RESYNC,
        };
        Next::In(ends.map_or(next, |end| end.min(next)))
    }

    /// Whether the watch shows what we wrote last.
    fn is_shown(&self, service: &Key, objects: &Objects) -> bool {
        let mut followed = self.lock();
        let Some(of_service) = followed.get_mut(service) else {
            return true;
        };
        let shown = of_service
            .written
            .as_ref()
            .is_none_or(|(at, versions)| at.elapsed() > RETRY || versions.are_shown_by(objects));
        if shown {
            of_service.written = None;
        }
        shown
    }

    async fn carry_out(&self, gathered: &Gathered<'_>, target: &Target, world: &World) -> Standing {
        if !gathered.conflicts.is_empty() {
            return Standing::Conflicted(gathered.conflicts.clone());
        }
        if let Some(router) = &gathered.router {
            match write::ensure_service(router, world, &self.context).await {
                Ok(()) => {}
                Err(error) => return Standing::Failing(crate::chain(&error)),
            }
        }
        if !world.services.contains_key(gathered.service) && target.rule.is_some() {
            return Standing::NoService;
        }
        let wanted = write::mark(target);
        if let Some(why) = gathered.objects.refused(&wanted) {
            return Standing::Refused(why);
        }
        let change = change(gathered.router.as_deref());
        self.follow_stored(gathered, &change, world);
        if let Some((stage, why)) = self.failure(gathered.service) {
            return self.put_back(gathered, stage, &why, &wanted, world).await;
        }
        let arrived = self.arrived(gathered.service, &change);
        let stored = Stored {
            rule: gathered.objects.rule.as_ref().map(|rule| &rule.spec),
            routes: gathered.objects.routes.as_ref().map(|routes| &routes.spec),
        };
        match order::next(
            stored,
            target.rule.as_ref(),
            target.routes.as_ref(),
            arrived,
        ) {
            Step::Done => Standing::Stable,
            Step::Wait(stage) => {
                Standing::Changing(stage, self.says(gathered.service, stage, &change))
            }
            Step::Rule(stage, rule) => {
                let good = stored.rule.filter(|_| arrived.rule);
                let note = write::Note::good(good, gathered.objects.rule.as_ref());
                self.write_rule(gathered, stage, rule, &note, &change, world)
                    .await
            }
            Step::Routes(routes) => {
                let good = stored.routes.filter(|_| arrived.routes);
                let note = write::Note::good(good, gathered.objects.routes.as_ref());
                self.write_routes(gathered, routes, &note, &change, world)
                    .await
            }
        }
    }

    /// Puts back what was in force before, and leaves it so until something else is wanted.
    async fn put_back(
        &self,
        gathered: &Gathered<'_>,
        stage: Stage,
        why: &str,
        wanted: &str,
        world: &World,
    ) -> Standing {
        let change = Change {
            verify: fenceline_crds::Verify::Delay,
            ..change(gathered.router.as_deref())
        };
        tracing::warn!(service = %gathered.service, stage = stage.name(), why, "a change is taken back");
        let note =
            |object: Option<&BTreeMap<String, String>>| write::Note::refused(object, wanted, why);
        let written = if stage == Stage::ShiftingRoutes {
            let stored = gathered.objects.routes.as_ref();
            let last: Option<VirtualServiceSpec> = stored.and_then(write::last_good);
            // None was there before: the service's own endpoints then.
            let last = last.or_else(|| write::plain_routes(&gathered.fqdn));
            let note = note(stored.map(ResourceExt::annotations));
            self.write_routes(gathered, last, &note, &change, world)
                .await
        } else {
            let stored = gathered.objects.rule.as_ref();
            let last: Option<DestinationRuleSpec> = stored.and_then(write::last_good);
            let last = last.or_else(|| stored.map(|stored| write::without_policies(&stored.spec)));
            let note = note(stored.map(ResourceExt::annotations));
            self.write_rule(gathered, stage, last, &note, &change, world)
                .await
        };
        match written {
            Standing::Failing(error) => Standing::Failing(error),
            _ => Standing::Refused(why.to_owned()),
        }
    }

    async fn write_rule(
        &self,
        gathered: &Gathered<'_>,
        stage: Stage,
        rule: Option<DestinationRuleSpec>,
        note: &write::Note,
        change: &Change,
        world: &World,
    ) -> Standing {
        let before = gathered.objects.rule.as_ref().map(|rule| &rule.spec);
        let expectation = expect::rule(gathered, before, rule.as_ref(), world);
        let followed = self.follow(content(rule.as_ref()), expectation, change);
        let have = gathered.objects.rule.as_ref();
        let written = match rule {
            Some(spec) => {
                let want = write::object::<DestinationRule>(gathered, spec, note, world);
                self.context
                    .writer
                    .ensure::<DestinationRule>(&want, have)
                    .await
            }
            None => self.remove(have).await,
        };
        self.wrote(
            gathered.service,
            written,
            |on_the_way, version| {
                on_the_way.rule = Some(followed);
                write::Versions::of_rule(version)
            },
            stage,
        )
    }

    async fn write_routes(
        &self,
        gathered: &Gathered<'_>,
        routes: Option<VirtualServiceSpec>,
        note: &write::Note,
        change: &Change,
        world: &World,
    ) -> Standing {
        let before = gathered.objects.routes.as_ref().map(|routes| &routes.spec);
        let expectation = expect::routes(gathered, before, routes.as_ref());
        let followed = self.follow(content(routes.as_ref()), expectation, change);
        let have = gathered.objects.routes.as_ref();
        let written = match routes {
            Some(spec) => {
                let want = write::object::<VirtualService>(gathered, spec, note, world);
                self.context
                    .writer
                    .ensure::<VirtualService>(&want, have)
                    .await
            }
            None => self.remove(have).await,
        };
        self.wrote(
            gathered.service,
            written,
            |on_the_way, version| {
                on_the_way.routes = Some(followed);
                write::Versions::of_routes(version)
            },
            Stage::ShiftingRoutes,
        )
    }

    async fn remove<K: crate::apply::Owned>(
        &self,
        have: Option<&K>,
    ) -> Result<Option<K>, crate::apply::Error> {
        match have {
            Some(have) => self.context.writer.remove(have).await.map(|()| None),
            None => Ok(None),
        }
    }

    fn wrote<K: ResourceExt>(
        &self,
        service: &Key,
        written: Result<Option<K>, crate::apply::Error>,
        take: impl FnOnce(&mut OnTheWay, Option<String>) -> write::Versions,
        stage: Stage,
    ) -> Standing {
        match written {
            Err(error) => Standing::Failing(crate::chain(&error)),
            Ok(object) => {
                let version = object.and_then(|object| object.resource_version());
                let mut followed = self.lock();
                let of_service = followed.entry(service.clone()).or_default();
                let versions = take(of_service, version);
                of_service.written = Some((Instant::now(), versions));
                Standing::Changing(stage, "written a moment ago".to_owned())
            }
        }
    }

    fn follow(&self, content: String, expectation: Expectation, change: &Change) -> Followed {
        let Context { istiods, world, .. } = &*self.context;
        // Before anything is written: the first push that has it is the one to wait for.
        let now = Arc::clone(&world.borrow());
        for subscriber in istiods.subscribers(&now).values() {
            subscriber.expect(&expectation.wanted);
        }
        Followed::start(
            content,
            expectation,
            change.clone(),
            Arc::clone(istiods),
            world.clone(),
            self.wake.clone(),
        )
    }

    /// What is stored and not followed yet, as after a start, or was changed by somebody. Where status says that all had arrived,
    /// it has.
    fn follow_stored(&self, gathered: &Gathered<'_>, change: &Change, world: &World) {
        let rule = gathered.objects.rule.as_ref().map(|rule| &rule.spec);
        let routes = gathered.objects.routes.as_ref().map(|routes| &routes.spec);
        let (of_rule, of_routes) = (content(rule), content(routes));
        let stale = |followed: Option<&Followed>, content: &str| {
            followed.is_none_or(|followed| followed.content != content)
        };
        let mut followed = self.lock();
        let of_service = followed.entry(gathered.service.clone()).or_default();
        let begins = of_service.rule.is_none() && of_service.routes.is_none();
        let trusted = begins && said::was_stable(gathered);
        let start = |content: String, expectation: Expectation| {
            if trusted {
                Followed::arrived(content)
            } else {
                self.follow(content, expectation, change)
            }
        };
        if stale(of_service.rule.as_ref(), &of_rule) {
            let expected = expect::rule(gathered, None, rule, world);
            of_service.rule = Some(start(of_rule, expected));
        }
        if stale(of_service.routes.as_ref(), &of_routes) {
            let expected = expect::routes(gathered, None, routes);
            of_service.routes = Some(start(of_routes, expected));
        }
    }

    fn arrived(&self, service: &Key, change: &Change) -> Arrived {
        let followed = self.lock();
        let Some(of_service) = followed.get(service) else {
            return Arrived::default();
        };
        let ended = |followed: Option<&Followed>| match followed?.outcome()? {
            (Outcome::Arrived, at) => Some(at),
            _ => None,
        };
        let routes = ended(of_service.routes.as_ref());
        Arrived {
            rule: ended(of_service.rule.as_ref()).is_some(),
            routes: routes.is_some(),
            drained: routes.is_some_and(|at| at.elapsed() >= change.drain()),
        }
    }

    /// Whether every proxy has what leads to a branch.
    fn is_prepared(&self, gathered: &Gathered<'_>, branch: &str) -> bool {
        let arrived = self.arrived(gathered.service, &Change::default());
        let branches = gathered
            .router
            .iter()
            .flat_map(|router| &router.spec.branches);
        let mut versions = branches
            .filter(|known| known.name == branch)
            .flat_map(|known| known.versions.keys());
        let rule = gathered.objects.rule.as_ref();
        let has = |name: &str| {
            rule.is_some_and(|rule| order::names(&rule.spec).any(|known| known == name))
        };
        arrived.rule && versions.all(|version| has(&subset_name(branch, version)))
    }

    /// What was refused, or did not arrive in time.
    fn failure(&self, service: &Key) -> Option<(Stage, String)> {
        let followed = self.lock();
        let of_service = followed.get(service)?;
        let failed = |followed: Option<&Followed>| match followed?.outcome()?.0 {
            Outcome::Arrived => None,
            Outcome::Refused(why) => Some(why),
            Outcome::Late(why) => Some(format!("not in time: {why}")),
        };
        let routes = failed(of_service.routes.as_ref()).map(|why| (Stage::ShiftingRoutes, why));
        routes.or_else(|| failed(of_service.rule.as_ref()).map(|why| (Stage::AddingSubsets, why)))
    }

    fn says(&self, service: &Key, stage: Stage, change: &Change) -> String {
        let followed = self.lock();
        let of_service = followed.get(service);
        let followed = match stage {
            Stage::ShiftingRoutes => of_service.and_then(|of| of.routes.as_ref()),
            Stage::Draining => {
                return format!("requests to what goes have {:?} to end", change.drain());
            }
            _ => of_service.and_then(|of| of.rule.as_ref()),
        };
        followed.map(Followed::says).unwrap_or_default()
    }
}

/// How changes of a service are made; without a Router by the defaults.
fn change(router: Option<&Router>) -> Change {
    router
        .and_then(|router| router.spec.change.clone())
        .unwrap_or_default()
}

/// What an object says, in short.
fn content<T: serde::Serialize>(spec: Option<&T>) -> String {
    let value = serde_json::to_value(spec).unwrap_or(Value::Null);
    short_hash(&value.to_string())
}

/// How many pods behind the Service have these labels, and are ready.
fn endpoints(world: &World, service: &Key, labels: &Labels) -> u32 {
    let Some(facts) = world.services.get(service) else {
        return 0;
    };
    let ready = pods_in(world, &service.namespace).filter(|pod| {
        pod.ready
            && pod.runs
            && matches(&facts.selector, &pod.labels)
            && matches(labels, &pod.labels)
    });
    u32::try_from(ready.count()).unwrap_or(u32::MAX)
}

/// Finds out all there is about a service.
fn gather<'a>(service: &'a Key, world: &World) -> Gathered<'a> {
    let age = |router: &Arc<Router>| {
        let created = router.creation_timestamp().map(|time| time.0);
        (created.unwrap_or(Timestamp::MAX), router.name_any())
    };
    let mut routers: Vec<Arc<Router>> = super::in_namespace(&world.routers, &service.namespace)
        .filter(|router| {
            router.spec.service == service.name && router.metadata.deletion_timestamp.is_none()
        })
        .cloned()
        .collect();
    routers.sort_by_key(age);
    let mut routers = routers.into_iter();
    let router = routers.next();
    let patches = by_service(super::entries_in(
        &world.traffic_patches,
        &service.namespace,
    ))
    .remove(service)
    .unwrap_or_default();
    let fqdn = world.fqdn(service);
    Gathered {
        conflicts: said::conflicts(service, &fqdn, world),
        service,
        fqdn,
        router,
        juniors: routers.collect(),
        patches: Patches::new(patches),
        objects: Objects::stored(service, world),
    }
}

/// How long until a branch's time is over.
pub(super) fn left(since: Timestamp, ttl: Duration, now: Timestamp) -> SignedDuration {
    let ttl = SignedDuration::try_from(ttl).unwrap_or(SignedDuration::MAX);
    since
        .saturating_add(ttl)
        .map_or(SignedDuration::MAX, |end| end.duration_since(now))
}
