//! The controller of policies: makes the fences that policies and labels want, and takes away those that they no longer
//! do. The fences then do the rest by themselves: one that is deleted is taken out of force in steps.

pub mod plan;
#[cfg(test)]
mod plan_tests;
mod promote;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use fenceline_crds::{FencePolicy, FencePolicyStatus, Mode, ServiceFence};
use futures::StreamExt;
use kube::ResourceExt;
use tokio::sync::watch;

use crate::apply::{self, Writer};
use crate::clock::Clock;
use crate::fence::Settings;
use crate::observe::prometheus::Prometheus;
use crate::policy::plan::{POLICY, Wanted, made_by_policy, plan, unwanted};
use crate::process::Pulse;
use crate::process::evaluate;
use crate::process::quarantine::{self, Object};
use crate::status::{Said, StatusWriter, set_conditions};
use crate::world::{Key, World};

/// How long a change waits for company, and how many times as long as the last round took: while thousands of fences begin, each of them is a change.
const COALESCE: Duration = Duration::from_millis(100);
const LONGEST_COALESCE: Duration = Duration::from_secs(2);
const OF_A_ROUND: u32 = 10;
/// Time alone promotes fences, and Prometheus comes and goes.
const LOOK_AGAIN: Duration = Duration::from_secs(15);
/// How long failed writes wait for their next attempt, at first and at most.
const RETRY: Duration = Duration::from_secs(1);
const LONGEST_RETRY: Duration = Duration::from_secs(30);
/// How many fences are written side by side.
const CONCURRENCY: usize = 32;
/// How often policies that are quarantined are looked at.
const QUARANTINED: Duration = Duration::from_secs(60);

/// What the controller works with.
pub struct Context {
    pub writer: Writer,
    pub status: Arc<StatusWriter>,
    pub settings: Settings,
    pub prometheus: Option<Arc<Prometheus>>,
    pub clock: Clock,
}

/// Keeps fences as policies want them for as long as it is polled: the leader's work.
pub async fn run(mut world: watch::Receiver<Arc<World>>, context: Arc<Context>, pulse: Pulse) {
    let context = &*context;
    // What was carried out, and for which world.
    let mut done: Option<(Arc<World>, Wanted)> = None;
    let mut retry = RETRY;
    loop {
        let started = Instant::now();
        let now = Arc::clone(&world.borrow_and_update());
        let wanted = match done.take() {
            Some((then, wanted)) if same_wishes(&then, &now) => wanted,
            _ => match evaluate(&now, context, &pulse).await {
                Some(wanted) => wanted,
                // What is there stays.
                None => {
                    let again = until_other_wishes(&mut world, &now);
                    if tokio::time::timeout(QUARANTINED, again).await == Ok(false) {
                        return;
                    }
                    continue;
                }
            },
        };
        let failed = write(&wanted, &now, context).await;
        let well = failed.is_empty() & promote::round(&wanted, &now, context).await;
        report(&wanted, &failed, &now, context).await;
        if !well {
            tokio::time::sleep(retry).await;
            retry = (retry * 2).min(LONGEST_RETRY);
            continue;
        }
        retry = RETRY;
        let took = started.elapsed();
        let again = tokio::time::timeout(LOOK_AGAIN, until_other_wishes(&mut world, &now)).await;
        if again == Ok(false) {
            return;
        }
        done = Some((now, wanted));
        tokio::time::sleep(COALESCE.max(took * OF_A_ROUND).min(LONGEST_COALESCE)).await;
    }
}

/// What the policies want; `None` while they are quarantined. It is worked out on a thread of its own: how long it takes is the tenants'
/// Services to say.
async fn evaluate(world: &Arc<World>, context: &Context, pulse: &Pulse) -> Option<Wanted> {
    let now = (context.clock)();
    let mut policies = world.fence_policies.values();
    if policies.any(|policy| quarantine::holds(policy.as_ref(), now)) {
        return None;
    }
    let (of, settings) = (Arc::clone(world), context.settings.clone());
    let planned = evaluate::within_deadline(move || plan(&of, &settings));
    let object = Object::FencePolicies;
    if let Ok(wanted) = pulse.at_object(object.clone(), planned).await {
        return Some(wanted);
    }
    let marked = context.status.quarantine(&object, evaluate::DEADLINE, now);
    if let Err(error) = marked.await {
        tracing::error!(%object, %error, "not quarantined");
    }
    None
}

/// Waits for a world in which policies may want something else; says whether there will be any.
async fn until_other_wishes(world: &mut watch::Receiver<Arc<World>>, then: &World) -> bool {
    world.wait_for(|now| !same_wishes(then, now)).await.is_ok()
}

/// Whether nothing changed that the plan looks at.
fn same_wishes(then: &World, now: &World) -> bool {
    then.fence_policies.ptr_eq(&now.fence_policies)
        && then.namespaces.ptr_eq(&now.namespaces)
        && then.services.ptr_eq(&now.services)
        && then.fences.ptr_eq(&now.fences)
        && (then.pods.ptr_eq(&now.pods) || !needs_pods(now))
}

fn needs_pods(world: &World) -> bool {
    use fenceline_crds::Granularity::Workload;
    let mut policies = world.fence_policies.values();
    policies.any(|policy| policy.spec.granularity == Workload)
}

/// Fences that could not be written, each with why.
type Failed = BTreeMap<Key, String>;

/// Writes what differs; says what did not go well.
async fn write(wanted: &Wanted, world: &World, context: &Context) -> Failed {
    let writer = &context.writer;
    let ensured = wanted.fences.iter().map(|(key, fence)| async move {
        let have = world.fences.get(key).map(AsRef::as_ref);
        (
            key,
            writer.ensure::<ServiceFence>(fence, have).await.map(drop),
        )
    });
    let removed = unwanted(world, wanted)
        .map(|(key, fence)| async move { (key, writer.remove(fence.as_ref()).await) });
    let mut failed = Failed::new();
    let mut say = |key: &Key, result: Result<(), apply::Error>| match result {
        // Somebody wrote a fence by this name a moment ago: it is theirs.
        Ok(()) | Err(apply::Error::NotOurs { .. }) => {}
        Err(error) => {
            let error = crate::chain(&error);
            tracing::warn!(fence = %key, error, "a policy's fence");
            failed.insert(key.clone(), error);
        }
    };
    let mut ensured = futures::stream::iter(ensured).buffer_unordered(CONCURRENCY);
    while let Some((key, result)) = ensured.next().await {
        say(key, result);
    }
    let mut removed = futures::stream::iter(removed).buffer_unordered(CONCURRENCY);
    while let Some((key, result)) = removed.next().await {
        say(key, result);
    }
    failed
}

/// Writes what became of each policy.
async fn report(wanted: &Wanted, failed: &Failed, world: &World, context: &Context) {
    let mut fences: BTreeMap<&str, Vec<&ServiceFence>> = BTreeMap::new();
    for fence in world.fences.values().filter(|fence| made_by_policy(fence)) {
        let policy = fence.labels().get(POLICY).map(String::as_str);
        fences
            .entry(policy.unwrap_or_default())
            .or_default()
            .push(fence);
    }
    for (name, policy) in &world.fence_policies {
        let of_policy = fences.remove(name.as_str()).unwrap_or_default();
        let status = status(name, policy, wanted, failed, &of_policy, context);
        if policy.status.as_ref() != Some(&status)
            && let Err(error) = context.status.policy(name, status).await
        {
            tracing::warn!(policy = name, %error, "a policy's status");
        }
    }
}

fn status(
    name: &str,
    policy: &FencePolicy,
    wanted: &Wanted,
    failed: &Failed,
    fences: &[&ServiceFence],
    context: &Context,
) -> FencePolicyStatus {
    let count = |length: usize| u32::try_from(length).unwrap_or(u32::MAX);
    let is = |fence: &ServiceFence, type_: &str| {
        let conditions = fence.status.iter().flat_map(|status| &status.conditions);
        let mut of_type = conditions.filter(|condition| condition.type_ == type_);
        of_type.any(|condition| condition.status == "True")
    };
    let having = |type_: &str| count(fences.iter().filter(|fence| is(fence, type_)).count());
    let observing = fences
        .iter()
        .filter(|fence| fence.spec.mode == Mode::Observe);
    let namespaces = wanted.namespaces.get(name).map_or(0, |names| names.len());
    let old = policy.status.clone().unwrap_or_default();
    FencePolicyStatus {
        observed_generation: policy.metadata.generation,
        conditions: set_conditions(
            &old.conditions,
            &[
                ready(name, wanted, failed, namespaces, fences.len()),
                evidence(context.prometheus.as_deref()),
            ],
            policy.metadata.generation,
            (context.clock)(),
        ),
        namespaces: count(namespaces),
        fences: count(fences.len()),
        enforced: having("Enforced"),
        observing: count(observing.count()),
        conflicted: having("Conflicted"),
    }
}

/// Whether Prometheus says what is called.
fn evidence(prometheus: Option<&Prometheus>) -> Said {
    let (reason, message) = match prometheus {
        None => (
            "NotConfigured",
            "there is no --prometheus-url: nothing is known before it is called, nothing is forgotten, nothing is promoted"
                .to_owned(),
        ),
        Some(prometheus) => {
            let health = prometheus.health();
            let health = health.borrow();
            (health.reason(), health.message())
        }
    };
    Said {
        type_: "PrometheusHealthy",
        status: reason == "Healthy",
        reason,
        message,
    }
}

fn ready(name: &str, wanted: &Wanted, failed: &Failed, namespaces: usize, fences: usize) -> Said {
    let said = |status, reason, message| Said {
        type_: "Ready",
        status,
        reason,
        message,
    };
    if let Some(why) = wanted.refused.get(name) {
        return said(false, "Invalid", format!("{why}; nothing is done"));
    }
    let is_its = |fence: &ServiceFence| fence.labels().get(POLICY).is_some_and(|of| of == name);
    let should = wanted.fences.values().filter(|fence| is_its(fence)).count();
    let mut message = format!("{fences} of {should} fences in {namespaces} namespaces");
    if let Some(lost) = wanted.lost.get(name) {
        let few: Vec<String> = lost
            .iter()
            .take(5)
            .map(|(namespace, winner)| format!("{namespace} (to {winner})"))
            .collect();
        message.push_str(&format!(
            "; older policies have {} namespaces that this one selects too: {}",
            lost.len(),
            few.join(", ")
        ));
    }
    let mut failed = failed
        .iter()
        .filter(|(key, _)| wanted.fences.get(key).is_some_and(is_its));
    if let Some((key, why)) = failed.next() {
        message.push_str(&format!(
            "; {} cannot be written: {key}: {why}",
            failed.count() + 1
        ));
        return said(false, "Failing", message);
    }
    if fences == should {
        said(true, "Fenced", message)
    } else {
        said(false, "Fencing", message)
    }
}
