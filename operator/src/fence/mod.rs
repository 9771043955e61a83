//! The controller of fences: gather (the world), plan, apply, status. Learning feeds it through the fences' own status.

pub mod alias;
pub mod arrival;
pub mod conflict;
pub mod explain;
pub mod learn;
mod learnt;
pub mod plan;
#[cfg(test)]
mod plan_tests;
mod queue;
pub mod redirect;
pub mod retain;
mod said;
mod scope;
pub mod select;
mod settings;
pub mod stage;
mod write;

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use fenceline_crds::{Evidence, Mode, ServiceFence};
use futures::future::LocalBoxFuture;
use futures::{Stream, StreamExt};
use jiff::SignedDuration;
use kube::api::ObjectMeta;
use kube::runtime::controller::{Action, Config, ReconcileRequest, applier};
use kube::runtime::reflector::{ObjectRef, Store};
use kube::{Resource, ResourceExt};
use tokio::sync::{Notify, mpsc, watch};
use tokio_stream::wrappers::UnboundedReceiverStream;

use crate::apply::{self, FENCE_LABEL, MANAGED_BY, MANAGER, Writer};
use crate::clock::Clock;
use crate::fence::arrival::Arrivals;
use crate::fence::learn::Learner;
use crate::fence::plan::{Plan, Verdict, plan};
use crate::fence::queue::Queue;
pub use crate::fence::settings::Settings;
pub use crate::fence::write::RecentObjects;
use crate::fence::write::{Progress, any_redirect, carry_out, ensure_mesh_redirect, prune};
use crate::metrics::Metrics;
use crate::observe::prometheus::Prometheus;
use crate::policy::plan::made_by_policy;
use crate::process::quarantine::{self, Object};
use crate::process::{Controller, Pulse, evaluate};
use crate::status::{self, StatusWriter};
use crate::world::feed::Concerned;
use crate::world::{Key, World};

/// What was missed is healed this often.
const RESYNC: Duration = Duration::from_secs(600);
/// An EnvoyFilter of somebody else's is not watched, so whether it is gone is asked this often.
const LOOK_AGAIN: Duration = Duration::from_secs(30);
/// How long a new fence waits for what Prometheus knows of its workload; how long if many wait, and get their answers
/// one after the other; and how often it looks.
const HISTORY_WAIT: SignedDuration = SignedDuration::from_secs(15);
const LONGEST_HISTORY_WAIT: SignedDuration = SignedDuration::from_mins(10);
const HISTORY_LOOK: Duration = Duration::from_millis(100);
/// By then the watch shows what was written.
const SEEN_BY_NOW: Duration = Duration::from_secs(3);
/// The first pause after a failure; it doubles up to [`MAX_PAUSE`].
const PAUSE: Duration = Duration::from_millis(250);
const MAX_PAUSE: Duration = Duration::from_secs(30);
/// The pause after an object was too large: it becomes smaller by a change, which is looked at by itself.
const TOO_LARGE_PAUSE: Duration = Duration::from_secs(300);
/// How long what is no fence's waits for its next attempt: what a former one left, what all have in common.
const TRY_AGAIN: Duration = Duration::from_secs(2);
/// How many fences are worked on side by side.
const CONCURRENCY: u16 = 32;

/// The labels of what is ours, and some more.
fn labelled<const N: usize>(more: [(&str, String); N]) -> ObjectMeta {
    let ours = [(MANAGED_BY, MANAGER.to_owned())];
    let labels = ours.into_iter().chain(more);
    ObjectMeta {
        labels: Some(
            labels
                .map(|(label, value)| (label.to_owned(), value))
                .collect(),
        ),
        ..ObjectMeta::default()
    }
}

/// The labels and the owners of a fence's objects. Of two owners the garbage collector waits for both: when the fence goes,
/// Fenceline takes its objects away in steps, and when the whole kind goes, with Fenceline, they go too.
fn owned(fence: &ServiceFence, world: &World) -> ObjectMeta {
    ObjectMeta {
        owner_references: Some(
            fence
                .controller_owner_ref(&())
                .into_iter()
                .chain(world.definition.clone())
                .collect(),
        ),
        ..labelled([(FENCE_LABEL, fence.name_any())])
    }
}

/// A reconciliation that failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("the fence's objects")]
    Apply(#[from] apply::Error),
    #[error("the fence's status")]
    Status(#[from] status::Error),
    #[error("could not quarantine the fence")]
    Quarantine(#[source] kube::Error),
}

/// What a reconciliation works with.
pub struct Context {
    pub world: watch::Receiver<Arc<World>>,
    pub writer: Writer,
    pub status: Arc<StatusWriter>,
    pub learner: Arc<Learner>,
    pub settings: Settings,
    pub metrics: Arc<Metrics>,
    pub clock: Clock,
    pub arrivals: Arrivals,
    pub recent: RecentObjects,
    pub prometheus: Option<Arc<Prometheus>>,
    /// The bounds that each fence is over.
    pub over: std::sync::Mutex<std::collections::HashMap<Key, BTreeSet<&'static str>>>,
    pub failures: std::sync::Mutex<std::collections::HashMap<Key, u32>>,
}

/// The controller of fences.
pub struct Fences {
    context: Arc<Context>,
    stored: Store<ServiceFence>,
    wakers: tokio::sync::Mutex<Wakers>,
}

/// Who says which fences are to be looked at.
struct Wakers {
    /// Those that a change of the mesh concerns.
    concerned: mpsc::UnboundedReceiver<Concerned>,
    /// Those of which a step has arrived.
    arrived: mpsc::UnboundedReceiver<Key>,
}

impl Fences {
    pub fn new(
        context: Context,
        stored: Store<ServiceFence>,
        concerned: mpsc::UnboundedReceiver<Concerned>,
        arrived: mpsc::UnboundedReceiver<Key>,
    ) -> Self {
        Self {
            context: Arc::new(context),
            stored,
            wakers: tokio::sync::Mutex::new(Wakers { concerned, arrived }),
        }
    }
}

impl Controller for Fences {
    fn name(&self) -> &'static str {
        "fences"
    }

    fn run<'a>(&'a self, pulse: &'a Pulse) -> LocalBoxFuture<'a, ()> {
        Box::pin(async move {
            let mut wakers = self.wakers.lock().await;
            let context = Arc::clone(&self.context);
            run(context, self.stored.clone(), &mut wakers, pulse).await;
        })
    }

    /// Who does not act has no use for what changed; whoever begins to act looks at everything.
    fn rest(&self) -> LocalBoxFuture<'_, ()> {
        Box::pin(async move {
            let mut wakers = self.wakers.lock().await;
            while wakers.concerned.recv().await.is_some() {}
            std::future::pending().await
        })
    }
}

/// Acts on fences for as long as it is polled: the leader's work.
async fn run(
    context: Arc<Context>,
    fences: Store<ServiceFence>,
    Wakers { concerned, arrived }: &mut Wakers,
    pulse: &Pulse,
) {
    // What came while another replica led is covered by looking at everything once.
    while concerned.try_recv().is_ok() {}
    while arrived.try_recv().is_ok() {}
    let (queue, requests) = Queue::new();
    let everything = Concerned {
        all: true,
        ..Concerned::default()
    };
    enqueue(&context, &everything, &queue);
    let (gone, redirect) = (Notify::new(), Notify::new());
    gone.notify_one();
    redirect.notify_one();
    let feed = async {
        loop {
            let concerned = tokio::select! {
                concerned = concerned.recv() => concerned,
                fence = arrived.recv() => fence.map(|fence| Concerned {
                    fences: [fence].into(),
                    ..Concerned::default()
                }),
            };
            let Some(concerned) = concerned else { return };
            if enqueue(&context, &concerned, &queue) == Known::Gone || concerned.all {
                gone.notify_one();
            }
            if concerned.redirect || concerned.all {
                redirect.notify_one();
            }
        }
    };
    let pruning = async {
        loop {
            gone.notified().await;
            if !prune(&context).await {
                tokio::time::sleep(TRY_AGAIN).await;
                gone.notify_one();
            }
        }
    };
    let redirecting = async {
        loop {
            redirect.notified().await;
            if !keep_mesh_redirect(&context).await {
                tokio::time::sleep(TRY_AGAIN).await;
                redirect.notify_one();
            }
        }
    };
    let work = reconciliations(&context, fences, requests, pulse).for_each(|fence| {
        fence.iter().for_each(|fence| queue.done(fence));
        std::future::ready(())
    });
    tokio::join!(feed, pruning, redirecting, work);
}

/// Keeps what all redirects have in common as it should be, where there are any; says whether it is.
async fn keep_mesh_redirect(context: &Context) -> bool {
    if !any_redirect(&context.world.borrow()) {
        return true;
    }
    match ensure_mesh_redirect(context).await {
        Ok(()) => true,
        Err(error) => {
            let error = crate::chain(&error);
            tracing::warn!(error, "what all redirects have in common");
            false
        }
    }
}

/// Each fence that was worked on, or is gone.
fn reconciliations(
    context: &Arc<Context>,
    fences: Store<ServiceFence>,
    requests: mpsc::UnboundedReceiver<ObjectRef<ServiceFence>>,
    pulse: &Pulse,
) -> impl Stream<Item = Option<Key>> + use<> {
    let requests = UnboundedReceiverStream::new(requests)
        .map(|fence| Ok::<_, Infallible>(ReconcileRequest::from(fence)));
    let pulse = pulse.clone();
    applier(
        move |fence: Arc<ServiceFence>, context: Arc<Context>| {
            let pulse = pulse.clone();
            let key = Key::new(fence.namespace().unwrap_or_default(), fence.name_any());
            Box::pin(async move {
                let reconciled = reconcile(&fence, &context);
                pulse.at_object(Object::Fence(key), reconciled).await
            })
        },
        |fence: Arc<ServiceFence>, error: &Error, context: Arc<Context>| {
            retry(&fence, error, &context)
        },
        Arc::clone(context),
        fences,
        requests,
        Config::default().concurrency(CONCURRENCY),
    )
    .map(|result| {
        use kube::runtime::controller::Error::{ObjectNotFound, ReconcilerFailed};
        let (namespace, name) = match result {
            Ok((fence, _)) => (fence.namespace, fence.name),
            Err(ReconcilerFailed(_, fence) | ObjectNotFound(fence)) => {
                (fence.namespace, fence.name)
            }
            Err(_) => return None,
        };
        Some(Key::new(namespace.unwrap_or_default(), name))
    })
}

/// Whether fences that a change concerns exist.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Known {
    There,
    /// Some were deleted.
    Gone,
}

/// Puts every fence that a change concerns into the queue.
fn enqueue(context: &Context, concerned: &Concerned, queue: &Queue) -> Known {
    let world = Arc::clone(&context.world.borrow());
    let there = concerned.fences.iter().cloned();
    let about = there.filter(|key| world.fences.contains_key(key)).collect();
    let mut others: BTreeSet<Key> = BTreeSet::new();
    for namespace in &concerned.namespaces {
        others.extend(select::fences_in(&world, namespace).map(|(key, _)| key.clone()));
    }
    if concerned.all {
        others.extend(world.fences.keys().cloned());
    }
    queue.put(about, others);
    let mut fences = Known::There;
    for key in &concerned.fences {
        if !world.fences.contains_key(key) {
            context.status.forget(key);
            fences = Known::Gone;
        }
    }
    fences
}

#[tracing::instrument(skip_all, fields(
    kind = "ServiceFence",
    ns = fence.namespace(),
    name = fence.name_any(),
    generation = fence.metadata.generation,
))]
async fn reconcile(fence: &ServiceFence, context: &Context) -> Result<Action, Error> {
    let key = Key::new(fence.namespace().unwrap_or_default(), fence.name_any());
    let world = Arc::clone(&context.world.borrow());
    if is_too_early(&key, &world, context) {
        return Ok(Action::requeue(HISTORY_LOOK));
    }
    // The newest status: what was learnt a moment ago is in it before the watch shows it.
    let Some(fence) = context.status.newest(&world, &key) else {
        return Ok(Action::await_change());
    };
    if fence.metadata.deletion_timestamp.is_some() {
        return Ok(Action::await_change());
    }
    let now = (context.clock)();
    if quarantine::holds(fence.as_ref(), now) {
        return Ok(Action::requeue(RESYNC));
    }
    let Ok(mut plan) = evaluate(&fence, &world, &context.settings, now).await else {
        let object = Object::Fence(key);
        let marked = context.status.quarantine(&object, evaluate::DEADLINE, now);
        marked.await.map_err(Error::Quarantine)?;
        return Ok(Action::requeue(RESYNC));
    };
    let mut resync = RESYNC;
    match carry_out(&key, &plan.verdict, &world, context).await {
        Err(Error::Apply(apply::Error::NotOurs { kind, object })) => {
            plan.verdict = Verdict::NameTaken(kind, object);
            carry_out(&key, &plan.verdict, &world, context).await?;
            resync = LOOK_AGAIN;
        }
        Ok(Progress::LookAgain) => resync = SEEN_BY_NOW,
        Err(Error::Apply(error)) if error.is_too_large() => {
            plan.refused = Some(error.refusal().unwrap_or_else(|| error.to_string()));
            plan.too_large = true;
            report(&key, &fence, &plan, &world, context).await?;
            return Err(error.into());
        }
        Err(Error::Apply(error)) if let Some(why) = error.refusal() => {
            plan.refused = Some(why);
            report(&key, &fence, &plan, &world, context).await?;
            return Err(error.into());
        }
        other => drop(other?),
    }
    plan.rejected = context.arrivals.rejected(&key);
    report(&key, &fence, &plan, &world, context).await?;
    let mut failures = context
        .failures
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner);
    failures.remove(&key);
    let ends = plan.again_in.and_then(|end| Duration::try_from(end).ok());
    Ok(Action::requeue(ends.map_or(resync, |end| {
        end.min(resync).max(Duration::from_millis(1))
    })))
}

/// The fence's plan, on a thread of its own: how long it takes is the tenants' to say.
async fn evaluate(
    fence: &Arc<ServiceFence>,
    world: &Arc<World>,
    settings: &Settings,
    now: jiff::Timestamp,
) -> Result<Plan, evaluate::TooLong> {
    let (fence, world, settings) = (Arc::clone(fence), Arc::clone(world), settings.clone());
    evaluate::within_deadline(move || plan(&fence, &world, &settings, now)).await
}

/// Counts the fences that are over a bound.
fn show_over(key: &Key, plan: &Plan, world: &World, context: &Context) {
    let mut over = context
        .over
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner);
    let changed = if plan.over.is_empty() {
        over.remove(key).is_some()
    } else {
        over.insert(key.clone(), plan.over.clone()).as_ref() != Some(&plan.over)
    };
    if changed {
        over.retain(|key, _| world.fences.contains_key(key));
        for bound in scope::BOUNDS {
            let fences = over.values().filter(|over| over.contains(bound));
            context.metrics.is_over(bound, fences.count());
        }
    }
}

/// Writes the conditions and the scope, and an event where the fence's state changed.
async fn report(
    key: &Key,
    fence: &ServiceFence,
    plan: &Plan,
    world: &World,
    context: &Context,
) -> Result<(), Error> {
    show_over(key, plan, world, context);
    let now = (context.clock)();
    let before = said::ready_reason(fence);
    let change = |fence: &ServiceFence| said::status(fence, plan, now);
    context.status.update(world, key, change).await?;
    let ready = said::ready(plan);
    // Of the global proxy there is one event, not one for each fence.
    let about_us = |reason: &str| reason != said::GLOBAL_PROXY_GONE;
    // Nor of each fence of a policy that it begins well: the policy says so, of thousands.
    if before.is_none() && ready.status && made_by_policy(fence) {
        return Ok(());
    }
    if before.as_deref() != Some(ready.reason)
        && about_us(ready.reason)
        && before.as_deref().is_none_or(about_us)
    {
        tracing::info!(
            reason = ready.reason,
            message = ready.message,
            "fence changed"
        );
        let warning = !ready.status;
        context
            .status
            .event(&fence.object_ref(&()), warning, ready.reason, ready.message)
            .await;
    }
    Ok(())
}

/// Whether Prometheus is about to say what the workload of a new fence called so far. A fence does not wait for long:
/// what is not known then is learnt from first calls.
fn is_too_early(key: &Key, world: &World, context: &Context) -> bool {
    let (Some(prometheus), Some(fence)) = (&context.prometheus, world.fences.get(key)) else {
        return false;
    };
    let age = fence.creation_timestamp().map_or(HISTORY_WAIT, |created| {
        (context.clock)().duration_since(created.0)
    });
    fence.spec.mode == Mode::Enforce
        && fence.spec.believes(Evidence::Prometheus)
        && (age < HISTORY_WAIT || (age < LONGEST_HISTORY_WAIT && prometheus.gets_on()))
        && !prometheus.knows(fence)
}

fn retry(fence: &ServiceFence, error: &Error, context: &Context) -> Action {
    let key = Key::new(fence.namespace().unwrap_or_default(), fence.name_any());
    let mut failures = context
        .failures
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner);
    let failed = failures.entry(key.clone()).or_default();
    let pause = match error {
        Error::Apply(error) if error.is_too_large() => TOO_LARGE_PAUSE,
        _ => PAUSE.saturating_mul(1 << (*failed).min(10)).min(MAX_PAUSE),
    };
    *failed += 1;
    context.metrics.reconcile_errors.inc();
    tracing::warn!(fence = %key, error = crate::chain(error), ?pause, "trying again");
    Action::requeue(pause)
}
