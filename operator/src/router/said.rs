//! What Routers and patches say of themselves.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Debug;
use std::time::Duration;

use fenceline_crds::{
    Branch, BranchStatus, Router, RouterStatus, TrafficPatch, TrafficPatchStatus,
};
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::{Resource, ResourceExt};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::Context;
use super::gather::Gathered;
use super::host::Standing;
use super::order;
use super::plan::{BranchPlan, Target, subset_name};
use crate::status::{Said, set_conditions};
use crate::world::{Key, World, in_namespace};

/// Whether status says that everything had arrived.
pub(super) fn was_stable(gathered: &Gathered<'_>) -> bool {
    let router = gathered
        .router
        .iter()
        .filter_map(|router| router.status.as_ref());
    let patches = gathered
        .patches
        .iter()
        .filter_map(|patch| patch.status.as_ref());
    let conditions = router
        .map(|status| &status.conditions)
        .chain(patches.map(|status| &status.conditions));
    let mut ready = conditions
        .flatten()
        .filter(|condition| condition.type_ == "Ready");
    ready.any(|condition| condition.reason == "Stable")
}

/// When a Router first had a branch.
fn since(router: &Router, branch: &str, now: Timestamp) -> Timestamp {
    let known = router.status.iter().flat_map(|status| &status.branches);
    let mut known = known.filter(|known| known.name == branch);
    known
        .find_map(|known| known.since.clone())
        .map_or(now, |time| time.0)
}

/// How long until a branch's time is over.
fn left(since: Timestamp, ttl: Duration, now: Timestamp) -> SignedDuration {
    let ttl = SignedDuration::try_from(ttl).unwrap_or(SignedDuration::MAX);
    since
        .saturating_add(ttl)
        .map_or(SignedDuration::MAX, |end| end.duration_since(now))
}

/// When the next branch's time is over.
pub(super) fn next_end(gathered: &Gathered<'_>, now: Timestamp) -> Option<SignedDuration> {
    let router = gathered.router.as_ref()?;
    let ends = router.spec.branches.iter().filter_map(|branch| {
        let left = left(since(router, &branch.name, now), branch.ttl()?, now);
        left.is_positive().then_some(left)
    });
    ends.min()
}

/// The branches that may not be reached, each with why: their time is over, or another Router of the same branch does not have
/// it in its proxies yet. What is reached already stays so.
pub(super) fn shut(
    gathered: &Gathered<'_>,
    world: &World,
    now: Timestamp,
) -> BTreeMap<String, String> {
    let Some(router) = &gathered.router else {
        return BTreeMap::new();
    };
    let routed = gathered
        .objects
        .routes
        .as_ref()
        .map(|routes| order::used(&routes.spec));
    let routed = routed.unwrap_or_default();
    let mut shut = BTreeMap::new();
    for branch in router.spec.branches.iter().skip(1) {
        if let Some(ttl) = branch.ttl()
            && !left(since(router, &branch.name, now), ttl, now).is_positive()
        {
            let why = format!(
                "its ttl of {} is over",
                branch.ttl.clone().unwrap_or_default()
            );
            shut.insert(branch.name.clone(), why);
            continue;
        }
        let mut versions = branch.versions.keys();
        if versions.any(|version| routed.contains(&subset_name(&branch.name, version))) {
            continue;
        }
        let others =
            in_namespace(&world.routers, &gathered.service.namespace).map(|(_, other)| other);
        let missing: BTreeSet<String> = others
            .filter(|other| {
                other.spec.service != router.spec.service
                    && other.metadata.deletion_timestamp.is_none()
            })
            .filter(|other| lacks(other, &branch.name))
            .map(|other| other.name_any())
            .collect();
        if !missing.is_empty() {
            let missing: Vec<String> = missing.into_iter().collect();
            let why = format!(
                "Routers {} have this branch too, and are not ready for it",
                missing.join(", ")
            );
            shut.insert(branch.name.clone(), why);
        }
    }
    shut
}

/// Whether a Router has a branch beside its base for which it is not prepared.
fn lacks(router: &Router, branch: &str) -> bool {
    let mut beside_base = router.spec.branches.iter().skip(1);
    let known = router.status.iter().flat_map(|status| &status.branches);
    let mut known = known.filter(|known| known.name == branch);
    beside_base.any(|has: &Branch| has.name == branch) && !known.any(|known| known.prepared)
}

/// What somebody else wrote for the same host.
pub(super) fn conflicts(service: &Key, fqdn: &str, world: &World) -> Vec<String> {
    let routes = world.routes_of(fqdn);
    let own = Key::new(&*service.namespace, super::write::name(service));
    let foreign = routes.filter(|key| **key != own);
    let mut conflicts: Vec<String> = foreign
        .map(|key| match key.name.split_once('/') {
            Some((kind, name)) => format!(
                "{}Route {}/{name}",
                kind.to_ascii_uppercase(),
                key.namespace
            ),
            None => format!("VirtualService {key}"),
        })
        .collect();
    let rules = world.rules.iter();
    let hiding =
        rules.filter(|(key, host)| ***host == *fqdn && !world.own_rules.contains_key(*key));
    conflicts.extend(hiding.map(|(key, _)| {
        if key.namespace == service.namespace {
            format!("DestinationRule {key}")
        } else {
            format!("DestinationRule {key}, which hides ours from callers there")
        }
    }));
    conflicts
}

/// Writes every status; says whether all went well.
pub(super) async fn report(
    gathered: &Gathered<'_>,
    target: &Target,
    standing: &Standing,
    prepared: &dyn Fn(&str) -> bool,
    context: &Context,
    now: Timestamp,
) -> bool {
    let mut well = true;
    if let Some(router) = &gathered.router {
        let status = router_status(router, target, standing, prepared, now);
        well &= write(router.as_ref(), router.status.as_ref(), &status, context).await;
    }
    for junior in &gathered.juniors {
        let senior = gathered
            .router
            .as_ref()
            .map(|router| router.name_any())
            .unwrap_or_default();
        let why =
            format!("Router {senior} is for the same Service and is older; delete one of them");
        let old = junior.status.clone().unwrap_or_default();
        let status = RouterStatus {
            observed_generation: junior.metadata.generation,
            conditions: set_conditions(
                &old.conditions,
                &[
                    said("Ready", false, "Conflicted", why.clone()),
                    said("Conflicted", true, "Conflicted", why),
                ],
                junior.metadata.generation,
                now,
            ),
            ..RouterStatus::default()
        };
        well &= write(junior.as_ref(), junior.status.as_ref(), &status, context).await;
    }
    for patch in gathered.patches.iter() {
        let status = patch_status(patch, target, standing, now);
        well &= write(patch, patch.status.as_ref(), &status, context).await;
    }
    well
}

/// Writes a status that differs from the one that is there; says whether it went well.
async fn write<K, S>(object: &K, old: Option<&S>, status: &S, context: &Context) -> bool
where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope>
        + Clone
        + Debug
        + DeserializeOwned,
    S: PartialEq + Serialize,
{
    if old == Some(status) {
        return true;
    }
    let written = context.status.of(object, status).await;
    let (kind, name) = (K::kind(&()), object.name_any());
    written
        .inspect_err(|error| tracing::warn!(%kind, name, %error, "a status"))
        .is_ok()
}

fn said(type_: &'static str, status: bool, reason: &'static str, message: String) -> Said {
    Said {
        type_,
        status,
        reason,
        message,
    }
}

/// The `Ready` condition.
fn ready(standing: &Standing) -> Said {
    let (status, reason, message) = match standing {
        Standing::Stable => (true, "Stable", "every proxy has it".to_owned()),
        Standing::Changing(stage, why) => (false, stage.name(), why.clone()),
        Standing::Refused(why) => (
            false,
            "Refused",
            format!(
                "the last change was taken back, and what was in force before is again: {why}. It is tried again once something else is wanted"
            ),
        ),
        Standing::Conflicted(others) => (
            false,
            "Conflicted",
            format!(
                "{} is for the same host and is not Fenceline's; nothing is written. `fenceline adopt` makes a Router of it",
                others.join(", ")
            ),
        ),
        Standing::Invalid(why) => (false, "Invalid", format!("{why}; nothing is done")),
        Standing::NoService => (
            false,
            "ServiceNotFound",
            "the Service does not exist; make it, or give spec.createService".to_owned(),
        ),
        Standing::Failing(why) => (false, "Failing", why.clone()),
    };
    said("Ready", status, reason, message)
}

fn conflicted(standing: &Standing) -> Said {
    match standing {
        Standing::Conflicted(others) => said("Conflicted", true, "Conflicted", others.join(", ")),
        _ => said(
            "Conflicted",
            false,
            "NoConflict",
            "nobody else's object is for this host".to_owned(),
        ),
    }
}

fn router_status(
    router: &Router,
    target: &Target,
    standing: &Standing,
    prepared: &dyn Fn(&str) -> bool,
    now: Timestamp,
) -> RouterStatus {
    let old = router.status.clone().unwrap_or_default();
    let generation = router.metadata.generation;
    let branches = target.branches.iter();
    let branches = branches.map(|branch| branch_status(router, branch, prepared, now));
    RouterStatus {
        observed_generation: generation,
        conditions: set_conditions(
            &old.conditions,
            &[ready(standing), conflicted(standing)],
            generation,
            now,
        ),
        stage: Some(ready(standing).reason.to_owned()),
        branches: branches.collect(),
        fields: target.patches.fields(),
    }
}

fn branch_status(
    router: &Router,
    branch: &BranchPlan,
    prepared: &dyn Fn(&str) -> bool,
    now: Timestamp,
) -> BranchStatus {
    let idle: Vec<String> = branch
        .endpoints
        .iter()
        .filter(|(_, ready)| **ready == 0)
        .map(|(version, _)| version.clone())
        .collect();
    let message = match &branch.shut {
        Some(why) => format!("no requests go there: {why}"),
        None if idle.is_empty() => "requests go there".to_owned(),
        None => format!(
            "requests go there, but not to {}, which have no ready endpoints",
            idle.join(", ")
        ),
    };
    let first = since(router, &branch.name, now);
    BranchStatus {
        name: branch.name.clone(),
        since: first.round(jiff::Unit::Second).ok().map(Time),
        endpoints: branch.endpoints.clone(),
        prepared: prepared(&branch.name) && branch.endpoints.values().any(|ready| *ready > 0),
        message,
    }
}

fn patch_status(
    patch: &TrafficPatch,
    target: &Target,
    standing: &Standing,
    now: Timestamp,
) -> TrafficPatchStatus {
    let old = patch.status.clone().unwrap_or_default();
    let generation = patch.metadata.generation;
    let name = patch.name_any();
    let outcome = &target.patches;
    let ready = match outcome.refused.get(&name) {
        Some(why) => said("Ready", false, "NotApplied", why.clone()),
        None => ready(standing),
    };
    TrafficPatchStatus {
        observed_generation: generation,
        conditions: set_conditions(
            &old.conditions,
            &[ready, conflicted(standing)],
            generation,
            now,
        ),
        won: outcome
            .won
            .get(&name)
            .into_iter()
            .flatten()
            .cloned()
            .collect(),
        lost: outcome
            .lost
            .get(&name)
            .into_iter()
            .flatten()
            .cloned()
            .collect(),
    }
}
