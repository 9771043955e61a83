//! One service at a time: gather, plan, the next step, status.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use fenceline_crds::istio::{DestinationRule, DestinationRuleSpec, VirtualService};
use fenceline_crds::{Change, Router};
use jiff::Timestamp;
use kube::ResourceExt;
use serde_json::Value;
use tokio::sync::mpsc;

use super::arrival::{Expectation, Known, Outcome};
use super::follow::Followed;
use super::gather::{Gathered, Namespaces, endpoints, gather};
use super::order::{self, Arrived, Stage, Step, Stored};
use super::others;
use super::passing::Passing;
use super::plan::{Inputs, Target, plan, short_hash, subset_name};
use super::report::Report;
use super::write::{self, Made, Objects};
use super::{Context, RESYNC, RETRY, blame, said};
use crate::apply;
use crate::fence::Settings;
use crate::fence::select::{Labels, matches, pods_in};
use crate::note::Note;
use crate::patch::bound::BOUNDS;
use crate::process::evaluate::{self, TooLong};
use crate::process::quarantine::{self, Object};
use crate::work::Next;
use crate::world::{Key, World};

/// What was written is looked at again once the watch shows it, which is soon.
const SHOWN: Duration = Duration::from_millis(20);

/// The bound by which proxies of other namespaces are skipped, as metrics name it.
const SKIPPED: &str = "skipped_proxies";

/// What is on its way, of each service.
pub(super) struct Hosts {
    context: Arc<Context>,
    wake: mpsc::UnboundedSender<Key>,
    followed: Mutex<HashMap<Key, OnTheWay>>,
}

/// What is on its way of one service.
#[derive(Debug, Default)]
pub(super) struct OnTheWay {
    pub(super) rule: Option<Followed>,
    pub(super) routes: Option<Followed>,
    /// The versions of objects that we wrote: until the watch shows them or newer ones, nothing is worked out.
    written: Option<(Instant, write::Versions)>,
    passing: Option<Passing>,
    /// Namespaces that are kept apart, and since when they need not be.
    unhidden: BTreeMap<String, Instant>,
    /// How many patches are left out for each bound.
    over: BTreeMap<&'static str, usize>,
}

/// Where a service stands.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Standing {
    /// All is done; what is known of the proxies.
    Stable(Known),
    /// A step is on its way.
    Changing(Stage, String),
    /// The target was refused, and the last good state is in force.
    Refused(String),
    Conflicted(Vec<String>),
    /// Somebody else's has the name of the one to be made.
    ServiceIsForeign(Key),
    Invalid(String),
    NoService,
    Failing(String),
}

fn namespaces(settings: &Settings) -> Namespaces<'_> {
    Namespaces {
        root: &settings.root_namespace,
        view: &settings.operator.namespace,
    }
}

fn is_quarantined(gathered: &Gathered<'_>, now: Timestamp) -> bool {
    let router = gathered.router.as_deref();
    let mut patches = gathered.patches.iter();
    router.is_some_and(|router| quarantine::holds(router, now))
        || patches.any(|patch| quarantine::holds(patch, now))
}

/// What a service's Routers and patches want, or why it cannot be, on a thread of its own: how long it takes is the tenants' to say.
async fn evaluate(
    service: &Key,
    world: &Arc<World>,
    settings: &Settings,
    apart: BTreeSet<String>,
    now: Timestamp,
) -> Result<Result<Target, String>, TooLong> {
    let (service, world, settings) = (service.clone(), Arc::clone(world), settings.clone());
    evaluate::within_deadline(move || {
        let gathered = gather(&service, &world, namespaces(&settings));
        let endpoints = |labels: &Labels| endpoints(&world, &service, labels);
        let shut = said::shut(&gathered, &world, now);
        let inputs = Inputs {
            host: &gathered.fqdn,
            router: gathered.router.as_deref(),
            patches: &gathered.patches,
            endpoints: &endpoints,
            shut: &shut,
            apart: &apart,
        };
        plan(&inputs).map_err(|invalid| invalid.to_string())
    })
    .await
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
        let settings = &self.context.settings;
        let gathered = gather(service, &world, namespaces(settings));
        if !self.is_shown(service, &gathered.objects) {
            return Next::In(SHOWN);
        }
        let now = (self.context.clock)();
        if is_quarantined(&gathered, now) {
            return Next::In(RESYNC);
        }
        let (apart, apart_for) = self.keep_apart(&gathered);
        let (target, standing) = match evaluate(service, &world, settings, apart, now).await {
            Err(TooLong) => return self.quarantine(service, now).await,
            Ok(Err(invalid)) => (Target::default(), Standing::Invalid(invalid)),
            Ok(Ok(target)) => {
                let standing = self.carry_out(&gathered, &target, &world).await;
                (target, standing)
            }
        };
        self.note_over(service, &target);
        let prepared = |branch: &str| self.is_prepared(&gathered, branch);
        let (lasts, again) = self.pass(&gathered, &standing);
        let report = Report {
            gathered: &gathered,
            target: &target,
            standing: &standing,
            prepared: &prepared,
            lasts,
            now,
        };
        let reported = report.write(&self.context).await;
        let nothing = gathered.router.is_none() && gathered.patches.is_empty();
        if nothing && gathered.objects.is_empty() {
            self.lock().remove(service);
            self.show_over();
            return Next::Gone;
        }
        let ends = said::next_end(&gathered, now).and_then(|end| Duration::try_from(end).ok());
        let next = match &standing {
            Standing::Changing(..) => again,
            Standing::Failing(_) => RETRY,
            _ if !reported => RETRY,
            _ => RESYNC,
        };
        let ends = ends.into_iter().chain(apart_for);
        Next::In(ends.fold(next, Duration::min))
    }

    /// The namespaces to keep apart, and when that is to be looked at again.
    fn keep_apart(&self, gathered: &Gathered<'_>) -> (BTreeSet<String>, Option<Duration>) {
        let stored = gathered.objects.routes.as_ref();
        let stored = stored.map(|routes| others::apart(&routes.spec));
        let mut followed = self.lock();
        let of_service = followed.entry(gathered.service.clone()).or_default();
        others::keep_apart(
            &gathered.others.hidden,
            &stored.unwrap_or_default(),
            &mut of_service.unhidden,
            Instant::now(),
        )
    }

    /// The rule that is wanted, with the subsets that proxies may still use which were skipped and so have former routes.
    fn with_subsets_of_skipped(
        &self,
        gathered: &Gathered<'_>,
        target: &Target,
        stored: Option<&DestinationRuleSpec>,
        world: &World,
    ) -> Option<DestinationRuleSpec> {
        let wanted = target.rule.as_ref();
        let followed = self.lock();
        let routes = followed.get(gathered.service);
        let routes = routes.and_then(|of| of.routes.as_ref());
        if routes.is_none_or(|routes| routes.skipped().is_empty()) {
            return wanted.cloned();
        }
        drop(followed);
        let has_pods = |labels: &Labels| {
            let mut pods = pods_in(world, &gathered.service.namespace);
            pods.any(|pod| matches(labels, &pod.labels))
        };
        order::keeping(wanted, stored, &has_pods)
    }

    fn note_over(&self, service: &Key, target: &Target) {
        let mut followed = self.lock();
        let of_service = followed.entry(service.clone()).or_default();
        let mut over = target.patches.over.clone();
        let both = [&of_service.rule, &of_service.routes].into_iter().flatten();
        let skipped = both.map(|followed| followed.skipped().len()).max();
        if let Some(skipped) = skipped.filter(|skipped| *skipped > 0) {
            over.insert(SKIPPED, skipped);
        }
        if of_service.over != over {
            of_service.over = over;
            drop(followed);
            self.show_over();
        }
    }

    /// Shows how many patches are left out, of all services.
    fn show_over(&self) {
        let followed = self.lock();
        for bound in BOUNDS.into_iter().chain([SKIPPED]) {
            let over = followed.values().filter_map(|of| of.over.get(bound));
            self.context.metrics.is_over(bound, over.sum());
        }
    }

    /// Marks the service's Routers and patches; what is in effect stays.
    async fn quarantine(&self, service: &Key, now: Timestamp) -> Next {
        let object = Object::Routes(service.clone());
        let status = &self.context.status;
        match status.quarantine(&object, evaluate::DEADLINE, now).await {
            Ok(()) => Next::In(RESYNC),
            Err(error) => {
                tracing::error!(%object, %error, "not quarantined");
                Next::In(RETRY)
            }
        }
    }

    /// Whether the stage under way has lasted long enough to be said, and when to ask again.
    fn pass(&self, gathered: &Gathered<'_>, standing: &Standing) -> (bool, Duration) {
        let mut followed = self.lock();
        let of_service = followed.entry(gathered.service.clone()).or_default();
        let Standing::Changing(stage, _) = *standing else {
            of_service.passing = None;
            return (true, RESYNC);
        };
        let now = Instant::now();
        let mut passing = Passing::go_on(of_service.passing, stage, now);
        let (lasts, again) = passing.say(change(gathered.router.as_deref()).drain(), now);
        of_service.passing = Some(passing);
        (lasts, again)
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
        // What nobody wants any more goes, whoever else is there.
        let wanted = target.rule.is_some() || target.routes.is_some();
        if wanted && !gathered.others.conflicts.is_empty() {
            return Standing::Conflicted(gathered.others.conflicts.clone());
        }
        if let Some(router) = &gathered.router {
            match write::ensure_service(router, world, &self.context).await {
                Ok(()) => {}
                Err(apply::Error::NotOurs { object, .. }) => {
                    return Standing::ServiceIsForeign(object);
                }
                Err(error) => return failing(&error, target),
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
        match self.failure(gathered.service) {
            None => {}
            Some((stage @ Stage::ShiftingRoutes, why)) => {
                return self
                    .put_back::<VirtualService>(gathered, target, stage, &why, world)
                    .await;
            }
            Some((stage, why)) => {
                return self
                    .put_back::<DestinationRule>(gathered, target, stage, &why, world)
                    .await;
            }
        }
        let arrived = self.arrived(gathered.service, &change);
        let stored_rule = spec_of::<DestinationRule>(gathered);
        let goal = self.with_subsets_of_skipped(gathered, target, stored_rule, world);
        let stored = Stored {
            rule: spec_of::<DestinationRule>(gathered),
            routes: spec_of::<VirtualService>(gathered),
        };
        match order::next(stored, goal.as_ref(), target.routes.as_ref(), arrived) {
            Step::Done => Standing::Stable(self.known(gathered.service)),
            Step::Wait(stage) => {
                Standing::Changing(stage, self.says(gathered.service, stage, &change))
            }
            Step::Rule(stage, rule) => {
                let good = stored.rule.filter(|_| arrived.rule);
                let note = Note::good(good, gathered.objects.rule.as_deref());
                self.write::<DestinationRule>(
                    (gathered, target),
                    stage,
                    rule,
                    &note,
                    &change,
                    world,
                )
                .await
            }
            Step::Routes(routes) => {
                let good = stored.routes.filter(|_| arrived.routes);
                let note = Note::good(good, gathered.objects.routes.as_deref());
                let stage = Stage::ShiftingRoutes;
                self.write::<VirtualService>(
                    (gathered, target),
                    stage,
                    routes,
                    &note,
                    &change,
                    world,
                )
                .await
            }
        }
    }

    /// Puts back what was in force before, and leaves it so until something else is wanted.
    async fn put_back<K: Made>(
        &self,
        gathered: &Gathered<'_>,
        target: &Target,
        stage: Stage,
        why: &str,
        world: &World,
    ) -> Standing {
        let change = Change {
            verify: fenceline_crds::Verify::Delay,
            ..change(gathered.router.as_deref())
        };
        tracing::warn!(service = %gathered.service, stage = stage.name(), why, "a change is taken back");
        let note = Note::refused(K::of(&gathered.objects), &write::mark(target), why);
        let last = K::last_good(gathered);
        match self
            .write::<K>((gathered, target), stage, last, &note, &change, world)
            .await
        {
            Standing::Failing(error) => Standing::Failing(error),
            _ => Standing::Refused(why.to_owned()),
        }
    }

    async fn write<K: Made>(
        &self,
        (gathered, target): (&Gathered<'_>, &Target),
        stage: Stage,
        spec: Option<K::Spec>,
        note: &Note,
        change: &Change,
        world: &World,
    ) -> Standing {
        let before = spec_of::<K>(gathered);
        let expectation = K::expected(gathered, before, spec.as_ref(), world);
        let followed = self.follow(content(spec.as_ref()), expectation, change);
        let have = K::of(&gathered.objects);
        let writer = &self.context.writer;
        let written = match (spec, have) {
            (Some(spec), have) => {
                let want = write::object::<K>(gathered, spec, note, world);
                writer.ensure::<K>(&want, have).await
            }
            (None, Some(have)) => writer.remove(have).await.map(|()| None),
            (None, None) => Ok(None),
        };
        match written {
            Err(error) => failing(&error, target),
            Ok(object) => {
                let version = object.and_then(|object| object.resource_version());
                let mut on_the_way = self.lock();
                let of_service = on_the_way.entry(gathered.service.clone()).or_default();
                *K::followed(of_service) = Some(followed);
                of_service.written = Some((Instant::now(), K::written(version)));
                Standing::Changing(stage, "it is on its way to the proxies".to_owned())
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

    /// What is stored and not followed yet, as after a start, or was changed by somebody. Where status says that every proxy had
    /// just this, they have.
    fn follow_stored(&self, gathered: &Gathered<'_>, change: &Change, world: &World) {
        let mut followed = self.lock();
        let of_service = followed.entry(gathered.service.clone()).or_default();
        let begins = of_service.rule.is_none() && of_service.routes.is_none();
        let trusted = begins && said::is_in_force(gathered);
        self.follow_if_new::<DestinationRule>(of_service, trusted, gathered, change, world);
        self.follow_if_new::<VirtualService>(of_service, trusted, gathered, change, world);
    }

    fn follow_if_new<K: Made>(
        &self,
        of_service: &mut OnTheWay,
        trusted: bool,
        gathered: &Gathered<'_>,
        change: &Change,
        world: &World,
    ) {
        let spec = spec_of::<K>(gathered);
        let content = content(spec);
        let followed = K::followed(of_service);
        if followed
            .as_ref()
            .is_some_and(|followed| followed.content == content)
        {
            return;
        }
        *followed = Some(if trusted {
            Followed::arrived(content)
        } else {
            self.follow(content, K::expected(gathered, None, spec, world), change)
        });
    }

    fn arrived(&self, service: &Key, change: &Change) -> Arrived {
        let followed = self.lock();
        let Some(of_service) = followed.get(service) else {
            return Arrived::default();
        };
        let ended = |followed: Option<&Followed>| match followed?.outcome()? {
            (Outcome::Arrived(_), at) => Some(at),
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
        let has_all = versions.all(|version| has(&subset_name(branch, version)));
        has_all && (arrived.rule || said::was_prepared(gathered, branch))
    }

    /// What was refused, or did not arrive in time.
    fn failure(&self, service: &Key) -> Option<(Stage, String)> {
        let followed = self.lock();
        let of_service = followed.get(service)?;
        let failed = |followed: Option<&Followed>| match followed?.outcome()?.0 {
            Outcome::Arrived(_) => None,
            Outcome::Refused(why) => Some(why),
            Outcome::Late(why) => Some(format!("not in time: {why}")),
        };
        let routes = failed(of_service.routes.as_ref()).map(|why| (Stage::ShiftingRoutes, why));
        routes.or_else(|| failed(of_service.rule.as_ref()).map(|why| (Stage::AddingSubsets, why)))
    }

    /// What is known of what is in force.
    fn known(&self, service: &Key) -> Known {
        let followed = self.lock();
        let of_service = followed.get(service);
        let known = |followed: Option<&Followed>| match followed?.outcome()?.0 {
            Outcome::Arrived(known) => Some(known),
            Outcome::Refused(_) | Outcome::Late(_) => None,
        };
        let both = of_service.map(|of| [known(of.rule.as_ref()), known(of.routes.as_ref())]);
        Known::of_all(both.into_iter().flatten().flatten())
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

/// What the API refused; where it is a patch's field, by that.
fn failing(error: &apply::Error, target: &Target) -> Standing {
    let Some(refusal) = error.refusal() else {
        return Standing::Failing(crate::chain(error));
    };
    Standing::Failing(match blame::field(&refusal, &target.patches) {
        Some(field) => format!("{field}: {refusal}"),
        None => refusal,
    })
}

/// How changes of a service are made; without a Router by the defaults.
fn change(router: Option<&Router>) -> Change {
    router
        .and_then(|router| router.spec.change.clone())
        .unwrap_or_default()
}

/// What is stored of a kind.
fn spec_of<'a, K: Made>(gathered: &'a Gathered<'_>) -> Option<&'a K::Spec> {
    K::of(&gathered.objects).map(K::spec)
}

/// What an object says, in short.
fn content<T: serde::Serialize>(spec: Option<&T>) -> String {
    let value = serde_json::to_value(spec).unwrap_or(Value::Null);
    short_hash(&value.to_string())
}
