//! What a fence says of itself: conditions in plain words, and its scope.

use std::collections::BTreeSet;

use fenceline_crds::{Evidence, LearntDependency, Scope, ServiceFence, ServiceFenceStatus};
use jiff::{Timestamp, Unit};

use super::Settings;
use super::plan::{Plan, Verdict, plan};
use super::select::NoPods;
use crate::global_proxy::GONE;
use crate::status::{Said, set_conditions};
use crate::world::World;

/// The reason of fences that are enforced while their first calls go nowhere.
pub(super) const GLOBAL_PROXY_GONE: &str = "GlobalProxyGone";
const READY: &str = "Ready";
const ENFORCED: &str = "Enforced";
const CONFLICTED: &str = "Conflicted";
/// So many remarks a condition has, and so many characters each: a fence may have thousands, and what is wrong with the first ten is
/// wrong with the others.
const REMARKS: usize = 10;
const REMARK_CHARACTERS: usize = 200;

/// The `Ready` condition of a plan that was carried out.
pub(super) fn ready(plan: &Plan) -> Said {
    let (status, reason, mut message) = match &plan.verdict {
        _ if let Some(why) = &plan.refused => {
            let text = format!("{why}; it is tried again, and what is there stays as it is");
            let reason = if plan.too_large {
                "TooLarge"
            } else {
                "Failing"
            };
            (false, reason, text)
        }
        Verdict::Enforce(objects) if plan.global_proxy_gone && objects.redirect.is_some() => {
            let text = format!("{}; {GONE}", in_scope(plan.scope, "are"));
            (false, GLOBAL_PROXY_GONE, text)
        }
        Verdict::Enforce(_) if !plan.rejected.is_empty() => {
            let pods: Vec<String> = plan.rejected.iter().map(ToString::to_string).collect();
            let text = format!(
                "the proxies of {} rejected configuration while the last change arrived, of ours or of somebody else's: their logs, \
                 and istiod's pilot_total_xds_rejects, say what. They keep what they had; if they refused clusters, what is learnt meanwhile waits",
                pods.join(", ")
            );
            (false, "Rejected", text)
        }
        Verdict::Enforce(_) => (true, "Enforced", in_scope(plan.scope, "are")),
        Verdict::Observe(off) => {
            let mut text = format!(
                "mode Observe: with Enforce, {}",
                in_scope(plan.scope, "would be")
            );
            text.push_str(&first_calls(plan));
            if off.is_some() {
                text.push_str("; the namespace's fence does not count for these pods: they have the whole mesh in scope");
            }
            (true, "Observing", text)
        }
        Verdict::NoPods(NoPods::ServiceNotFound(service)) => {
            let text = format!("Service {service} does not exist; its pods have their whole scope");
            (false, "ServiceNotFound", text)
        }
        Verdict::NoPods(NoPods::ServiceWithoutSelector(service)) => {
            let text = format!(
                "Service {service} selects no pods by labels; give spec.workload.selector instead"
            );
            (false, "ServiceWithoutSelector", text)
        }
        Verdict::Conflicted(_) => (false, "Conflicted", conflict(plan)),
        Verdict::NameTaken(..) => (false, "NameTaken", conflict(plan)),
        Verdict::Overlapped(_) => (false, "Overlapped", conflict(plan)),
        Verdict::NotInMesh(_) => (false, "NotInMesh", conflict(plan)),
    };
    for remark in plan.remarks.iter().take(REMARKS) {
        message.push_str("; ignored: ");
        message.extend(remark.chars().take(REMARK_CHARACTERS));
    }
    if let Some(more @ 1..) = plan.remarks.len().checked_sub(REMARKS) {
        message.push_str(&format!("; and {more} more"));
    }
    Said {
        type_: READY,
        status,
        reason,
        message,
    }
}

fn in_scope(scope: Scope, are: &str) -> String {
    let Scope {
        imported,
        visible: _,
        learnt,
        declared,
        named,
        always,
    } = scope;
    format!(
        "{imported} hosts {are} in scope: {learnt} learnt, {declared} declared, \
         {named} whose policies name this workload, \
         {always} that every workload needs"
    )
}

/// What enforcing would have held or forwarded since.
fn first_calls(plan: &Plan) -> String {
    let hosts = &plan.called_since;
    if hosts.is_empty() {
        return String::new();
    }
    let few: Vec<&str> = hosts.iter().take(5).map(String::as_str).collect();
    format!(
        "; {} calls would have been first calls since it observes, the latest to {}",
        hosts.len(),
        few.join(", ")
    )
}

fn conflict(plan: &Plan) -> String {
    let others = match &plan.verdict {
        Verdict::Conflicted(others) => others,
        Verdict::NameTaken(kind, object) => {
            return format!(
                "{kind} {object} exists and is not Fenceline's; rename it, or this fence if that has its name from it"
            );
        }
        Verdict::Overlapped(seniors) => {
            let names: Vec<&str> = seniors.iter().map(|key| key.name.as_str()).collect();
            return format!(
                "ServiceFence {} selects the same pods and is older; nothing is written for this one. Delete one of them",
                names.join(", ")
            );
        }
        Verdict::NotInMesh(outside) => {
            return format!(
                "{}: no Sidecar would change anything, and nothing is written",
                outside.why()
            );
        }
        Verdict::Enforce(_) | Verdict::Observe(_) | Verdict::NoPods(_) => {
            return "no other Sidecar configures these pods".to_owned();
        }
    };
    let names: Vec<String> = others.iter().map(ToString::to_string).collect();
    format!(
        "Sidecar {} configures the same pods and is not Fenceline's; nothing is written. Delete it, or this fence",
        names.join(", ")
    )
}

fn conditions(plan: &Plan) -> [Said; 3] {
    let ready = ready(plan);
    let enforced = matches!(plan.verdict, Verdict::Enforce(_)) && plan.refused.is_none();
    let conflicted = matches!(
        plan.verdict,
        Verdict::Conflicted(_)
            | Verdict::NameTaken(..)
            | Verdict::Overlapped(_)
            | Verdict::NotInMesh(_)
    );
    [
        Said {
            type_: ENFORCED,
            status: enforced,
            ..ready.clone()
        },
        Said {
            type_: CONFLICTED,
            status: conflicted,
            reason: if conflicted {
                ready.reason
            } else {
                "NoConflict"
            },
            message: conflict(plan),
        },
        ready,
    ]
}

/// The reason that the fence last gave for being ready or not, for this generation of its spec or an older one.
pub(super) fn ready_reason(fence: &ServiceFence) -> Option<String> {
    let status = fence.status.as_ref()?;
    let ready = status
        .conditions
        .iter()
        .find(|condition| condition.type_ == READY)?;
    Some(ready.reason.clone())
}

/// The fence's status once the plan was carried out; what was learnt is left as it is.
pub(super) fn status(fence: &ServiceFence, plan: &Plan, now: Timestamp) -> ServiceFenceStatus {
    let old = fence.status.clone().unwrap_or_default();
    let generation = fence.metadata.generation;
    ServiceFenceStatus {
        observed_generation: generation,
        conditions: set_conditions(&old.conditions, &conditions(plan), generation, now),
        scope: Some(steady(old.scope, plan.scope)),
        dependencies: with_policies(old.dependencies, &plan.named, now),
        ..old
    }
}

/// The status of a fence that has learnt something, with what its plan makes of that already, so that it need not be written
/// once more when the plan was carried out. Only where the plan goes on as before.
pub(super) fn foreseen(
    fence: &ServiceFence,
    world: &World,
    settings: &Settings,
    now: Timestamp,
) -> ServiceFenceStatus {
    let learnt = fence.status.clone().unwrap_or_default();
    let plan = plan(fence, world, settings, now);
    let goes_on = learnt.observed_generation == fence.metadata.generation
        && ready_reason(fence).is_some_and(|before| before == ready(&plan).reason);
    if goes_on {
        status(fence, &plan, now)
    } else {
        learnt
    }
}

/// What was learnt, with what policies say now: that comes and goes with them.
fn with_policies(
    mut dependencies: Vec<LearntDependency>,
    named: &BTreeSet<String>,
    now: Timestamp,
) -> Vec<LearntDependency> {
    for known in &mut dependencies {
        let evidence = &mut known.evidence;
        let has = evidence.contains(&Evidence::AuthorizationPolicy);
        match (named.contains(&known.host), has) {
            (true, false) => evidence.push(Evidence::AuthorizationPolicy),
            (false, true) => evidence.retain(|kind| *kind != Evidence::AuthorizationPolicy),
            _ => {}
        }
    }
    dependencies.retain(|known| !known.evidence.is_empty());
    let known: BTreeSet<String> = dependencies
        .iter()
        .map(|known| known.host.clone())
        .collect();
    let new = named.difference(&known).map(|host| LearntDependency {
        host: host.clone(),
        evidence: vec![Evidence::AuthorizationPolicy],
        first_seen: now.round(Unit::Second).unwrap_or(now),
        last_seen: None,
    });
    dependencies.extend(new);
    dependencies.sort_by(|a, b| a.host.cmp(&b.host));
    dependencies
}

/// Each Service that comes or goes changes what every fence could see. That alone is written only once it makes a
/// difference of five in a hundred: a thousand fences must not be written because one Service was.
fn steady(old: Option<Scope>, new: Scope) -> Scope {
    match old {
        Some(old)
            if Scope {
                visible: new.visible,
                ..old
            } == new =>
        {
            let small = old.visible.abs_diff(new.visible).saturating_mul(20) < new.visible;
            if small { old } else { new }
        }
        _ => new,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_small_change_of_the_mesh_is_not_written_for_every_fence() {
        let scope = |visible| Scope {
            imported: 3,
            visible,
            ..Scope::default()
        };
        assert_eq!(steady(None, scope(100)), scope(100));
        assert_eq!(steady(Some(scope(100)), scope(101)), scope(100));
        assert_eq!(steady(Some(scope(100)), scope(110)), scope(110));
        let more = Scope {
            imported: 4,
            ..scope(101)
        };
        assert_eq!(steady(Some(scope(100)), more), more);
    }
}
