//! What Routers and patches say of themselves: when it is worth a write, and an event.

use std::fmt::Debug;

use fenceline_crds::{BranchStatus, Router, RouterStatus, TrafficPatch, TrafficPatchStatus};
use jiff::Timestamp;
use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::{Resource, ResourceExt};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::Context;
use super::arrival::Known;
use super::gather::Gathered;
use super::host::Standing;
use super::plan::{BranchPlan, Target};
use super::said::since;
use crate::status::{Said, set_conditions};

/// A status names so many fields: each has its place for each version of each branch.
const FIELDS: usize = 200;

/// What there is to be said of a service.
pub(super) struct Report<'a> {
    pub(super) gathered: &'a Gathered<'a>,
    pub(super) target: &'a Target,
    pub(super) standing: &'a Standing,
    /// Whether every proxy has what leads to a branch.
    pub(super) prepared: &'a dyn Fn(&str) -> bool,
    /// Whether a stage that passes has lasted long enough for somebody to read of it.
    pub(super) lasts: bool,
    pub(super) now: Timestamp,
}

impl Report<'_> {
    /// Writes every status that is worth it; says whether all went well.
    pub(super) async fn write(&self, context: &Context) -> bool {
        let mut well = true;
        if let Some(router) = &self.gathered.router {
            let old = router.status.clone().unwrap_or_default();
            let status = self.of_router(router, &old);
            well &= self.put(router.as_ref(), &old, status, context).await;
        }
        for junior in &self.gathered.juniors {
            let old = junior.status.clone().unwrap_or_default();
            let status = self.of_junior(junior, &old);
            well &= self.put(junior.as_ref(), &old, status, context).await;
        }
        for patch in self.gathered.patches.iter() {
            let old = patch.status.clone().unwrap_or_default();
            let status = self.of_patch(patch, &old);
            well &= self.put(patch, &old, status, context).await;
        }
        well
    }

    /// Writes a status if it is worth it, and an event if people should know; says whether it went well.
    async fn put<K, S>(&self, object: &K, old: &S, status: S, context: &Context) -> bool
    where
        K: Resource<DynamicType = (), Scope = NamespaceResourceScope>
            + Clone
            + Debug
            + DeserializeOwned,
        S: Told,
    {
        let passes = matches!(self.standing, Standing::Changing(..)) && !self.lasts;
        let seen = old.observed_generation() == status.observed_generation();
        if status == *old || (passes && seen && status.besides_progress() == old.besides_progress())
        {
            return true;
        }
        let (kind, name) = (K::kind(&()), object.name_any());
        if let Err(error) = context.status.of(object, &status).await {
            tracing::warn!(%kind, name, %error, "a status");
            return false;
        }
        if let Some((warning, reason, note)) = event(old.conditions(), status.conditions()) {
            let about = object.object_ref(&());
            context.status.event(&about, warning, reason, note).await;
        }
        true
    }

    fn of_router(&self, router: &Router, old: &RouterStatus) -> RouterStatus {
        let generation = router.metadata.generation;
        let branches = self.target.branches.iter();
        let branches = branches.map(|branch| self.of_branch(router, branch));
        let said = [self.ready(&old.conditions), self.conflicted()];
        RouterStatus {
            observed_generation: generation,
            stage: Some(said[0].reason.to_owned()),
            conditions: set_conditions(&old.conditions, &said, generation, self.now),
            branches: branches.collect(),
            fields: self
                .target
                .patches
                .fields()
                .into_iter()
                .take(FIELDS)
                .collect(),
            in_force: self.in_force(),
        }
    }

    /// Of two Routers for one Service the younger does nothing.
    fn of_junior(&self, junior: &Router, old: &RouterStatus) -> RouterStatus {
        let senior = self.gathered.router.as_ref();
        let senior = senior.map(|router| router.name_any()).unwrap_or_default();
        let why =
            format!("Router {senior} is for the same Service and is older; delete one of them");
        let said = [
            said("Ready", false, CONFLICTED, why.clone()),
            said(CONFLICTED, true, CONFLICTED, why),
        ];
        let generation = junior.metadata.generation;
        RouterStatus {
            observed_generation: generation,
            conditions: set_conditions(&old.conditions, &said, generation, self.now),
            ..RouterStatus::default()
        }
    }

    fn of_branch(&self, router: &Router, branch: &BranchPlan) -> BranchStatus {
        let idle = branch.endpoints.iter().filter(|(_, ready)| **ready == 0);
        let idle: Vec<&str> = idle.map(|(version, _)| version.as_str()).collect();
        let message = match &branch.shut {
            Some(why) => format!("no requests go there: {why}"),
            None if idle.is_empty() => "requests go there".to_owned(),
            None => format!(
                "requests go there, but not to {}, which have no ready endpoints",
                idle.join(", ")
            ),
        };
        let first = since(router, &branch.name, self.now);
        BranchStatus {
            name: branch.name.clone(),
            since: first.round(jiff::Unit::Second).ok().map(Time),
            endpoints: branch.endpoints.clone(),
            prepared: (self.prepared)(&branch.name)
                && branch.endpoints.values().any(|ready| *ready > 0),
            message,
        }
    }

    fn of_patch(&self, patch: &TrafficPatch, old: &TrafficPatchStatus) -> TrafficPatchStatus {
        let generation = patch.metadata.generation;
        let name = patch.name_any();
        let outcome = &self.target.patches;
        let won = outcome.won.get(&name).into_iter().flatten().take(FIELDS);
        let lost = outcome.lost.get(&name).into_iter().flatten().take(FIELDS);
        let (won, lost): (Vec<_>, Vec<_>) = (won.cloned().collect(), lost.cloned().collect());
        let untouched = old.observed_generation == generation
            && old.won == won
            && old.lost == lost
            && reason(&old.conditions, "Ready") == Some("Stable");
        if untouched && matches!(self.standing, Standing::Changing(..)) {
            // What it sets is in force also while others change theirs.
            return old.clone();
        }
        let ready = match outcome.refused.get(&name) {
            Some(why) => said("Ready", false, "NotApplied", why.clone()),
            None => self.ready(&old.conditions),
        };
        let said = [ready, self.conflicted()];
        let first = self.gathered.patches.iter().next();
        let speaks =
            self.gathered.router.is_none() && first.is_some_and(|first| first.name_any() == name);
        TrafficPatchStatus {
            observed_generation: generation,
            conditions: set_conditions(&old.conditions, &said, generation, self.now),
            won,
            lost,
            in_force: self.in_force().filter(|_| speaks),
        }
    }

    /// What a replica that leads since a moment has not seen itself stays as it was said.
    fn ready(&self, old: &[Condition]) -> Said {
        let mut said = ready(self.standing);
        let mut before = old.iter().filter(|before| before.type_ == "Ready");
        if let Standing::Stable(Known::AsSaid) = self.standing
            && let Some(before) = before.find(|before| before.reason == "Stable")
        {
            said.message.clone_from(&before.message);
        }
        said
    }

    /// With what bears on callers of other namespaces alone.
    fn conflicted(&self) -> Said {
        let mut said = conflicted(self.standing);
        if let (false, Some(remarks)) = (said.status, self.gathered.others.remarks()) {
            said.message = format!("nothing stands in the way; {remarks}");
        }
        said
    }

    fn in_force(&self) -> Option<String> {
        // Whoever leads next finds out anew who was skipped.
        let stable =
            matches!(self.standing, Standing::Stable(known) if !matches!(known, Known::But(_)));
        stable.then(|| self.gathered.objects.mark())
    }
}

/// What a status is asked before it is written.
trait Told: Clone + PartialEq + Serialize {
    fn observed_generation(&self) -> Option<i64>;
    fn conditions(&self) -> &[Condition];
    /// Without what says how far a change is.
    fn besides_progress(&self) -> Self;
}

impl Told for RouterStatus {
    fn observed_generation(&self) -> Option<i64> {
        self.observed_generation
    }

    fn conditions(&self) -> &[Condition] {
        &self.conditions
    }

    fn besides_progress(&self) -> Self {
        let mut branches = self.branches.clone();
        if let Some(base) = branches.first_mut() {
            // Other Routers wait for branches, not for a base.
            base.prepared = false;
        }
        Self {
            branches,
            conditions: Vec::new(),
            stage: None,
            in_force: None,
            ..self.clone()
        }
    }
}

impl Told for TrafficPatchStatus {
    fn observed_generation(&self) -> Option<i64> {
        self.observed_generation
    }

    fn conditions(&self) -> &[Condition] {
        &self.conditions
    }

    fn besides_progress(&self) -> Self {
        Self {
            conditions: Vec::new(),
            in_force: None,
            ..self.clone()
        }
    }
}

/// Why a condition is as it is.
fn reason<'a>(conditions: &'a [Condition], type_: &str) -> Option<&'a str> {
    let mut conditions = conditions.iter();
    let condition = conditions.find(|condition| condition.type_ == type_)?;
    Some(&condition.reason)
}

/// Whether people should be told, in an event: a warning or not, the reason and a note.
fn event(old: &[Condition], new: &[Condition]) -> Option<(bool, &'static str, String)> {
    let ready = new.iter().find(|condition| condition.type_ == "Ready")?;
    let before = reason(old, "Ready");
    let now = [REFUSED, CONFLICTED, INVALID]
        .into_iter()
        .find(|bad| *bad == ready.reason);
    match now {
        Some(bad) if before != Some(bad) => Some((true, bad, ready.message.clone())),
        Some(_) => None,
        None if reason(old, CONFLICTED) == Some(CONFLICTED) => Some((
            false,
            NO_CONFLICT,
            "what stood in the way is gone".to_owned(),
        )),
        None => None,
    }
}

const REFUSED: &str = "Refused";
pub(super) const CONFLICTED: &str = "Conflicted";
const NO_CONFLICT: &str = "NoConflict";
const INVALID: &str = "Invalid";

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
        Standing::Stable(known) => (true, "Stable", known.say()),
        Standing::Changing(stage, why) => (false, stage.name(), why.clone()),
        Standing::Refused(why) => (
            false,
            REFUSED,
            format!(
                "the last change was taken back, and what was in force before is again: {why}. It is tried again once something else is wanted"
            ),
        ),
        Standing::Conflicted(others) => (
            false,
            CONFLICTED,
            format!(
                "{} is for the same host and is not Fenceline's; nothing is written. `fenceline adopt` makes a Router of it",
                others.join(", ")
            ),
        ),
        Standing::ServiceIsForeign(service) => (
            false,
            CONFLICTED,
            format!(
                "Service {service} is not this Router's to make; nothing is written. Leave spec.createService out, or delete it"
            ),
        ),
        Standing::Invalid(why) => (false, INVALID, format!("{why}; nothing is done")),
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
    let others = match standing {
        Standing::Conflicted(others) => others.join(", "),
        Standing::ServiceIsForeign(service) => format!("Service {service}"),
        _ => {
            let none = "nobody else's object is for this host".to_owned();
            return said(CONFLICTED, false, NO_CONFLICT, none);
        }
    };
    said(CONFLICTED, true, CONFLICTED, others)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_people_are_told_in_events() {
        let conditions = |standing: &Standing| {
            let said = [ready(standing), conflicted(standing)];
            set_conditions(&[], &said, None, Timestamp::UNIX_EPOCH)
        };
        let stable = || Standing::Stable(Known::Everywhere);
        let changing = Standing::Changing(super::super::order::Stage::Draining, String::new());
        let refused = Standing::Refused("no".into());
        let theirs = Standing::Conflicted(vec!["VirtualService shop/theirs".into()]);
        let told = |before: &Standing, after: &Standing| {
            let event = event(&conditions(before), &conditions(after));
            event.map(|(warning, reason, _)| (warning, reason))
        };
        assert_eq!(told(&stable(), &changing), None);
        assert_eq!(told(&changing, &refused), Some((true, "Refused")));
        assert_eq!(told(&refused, &refused), None);
        assert_eq!(told(&refused, &changing), None);
        assert_eq!(told(&changing, &theirs), Some((true, "Conflicted")));
        assert_eq!(told(&theirs, &changing), Some((false, "NoConflict")));
        assert_eq!(
            told(&stable(), &Standing::Invalid("x".into())),
            Some((true, "Invalid"))
        );
    }
}
