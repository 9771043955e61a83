//! Objects whose evaluation took too long: what is in effect for them stays, their status says so, and nobody evaluates them again until
//! their spec changes or [`RETRY`] is over. The mark is the condition itself, so that every replica knows of it.

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::Resource;

use fenceline_crds::{FencePolicy, RateLimit, Router, ServiceFence, TrafficPatch};

use crate::world::Key;

/// The reason of the condition `Ready` of what is quarantined.
pub const REASON: &str = "Quarantined";
/// What slowed an evaluation down need not have been the object.
pub const RETRY: SignedDuration = SignedDuration::from_hours(6);

/// What a controller works on, by key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Object {
    Fence(Key),
    FencePolicies,
    /// The Routers and TrafficPatches of a Service, which are evaluated together.
    Routes(Key),
    RateLimit(Key),
}

impl std::fmt::Display for Object {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Fence(key) => write!(f, "ServiceFence {key}"),
            Self::FencePolicies => write!(f, "the FencePolicies"),
            Self::Routes(key) => write!(f, "the Routers and TrafficPatches of Service {key}"),
            Self::RateLimit(key) => write!(f, "RateLimit {key}"),
        }
    }
}

/// A kind that can be quarantined.
pub trait Conditioned: Resource<DynamicType = ()> {
    fn conditions(&self) -> &[Condition];
}

macro_rules! conditioned {
    ($($kind:ty),*) => {$(
        impl Conditioned for $kind {
            fn conditions(&self) -> &[Condition] {
                self.status.as_ref().map_or(&[], |status| &status.conditions)
            }
        }
    )*};
}

conditioned!(ServiceFence, FencePolicy, Router, TrafficPatch, RateLimit);

/// Whether nobody is to evaluate the object now.
pub fn holds(object: &impl Conditioned, now: Timestamp) -> bool {
    let generation = object.meta().generation;
    object.conditions().iter().any(|condition| {
        condition.type_ == "Ready"
            && condition.reason == REASON
            && condition.observed_generation == generation
            && now.duration_since(condition.last_transition_time.0) < RETRY
    })
}

/// The conditions of an object that is quarantined at `now`, since its evaluation took more than `limit`.
pub fn conditions(object: &impl Conditioned, limit: Duration, now: Timestamp) -> Vec<Condition> {
    let others = object
        .conditions()
        .iter()
        .filter(|old| old.type_ != "Ready");
    let ready = Condition {
        type_: "Ready".to_owned(),
        status: "False".to_owned(),
        reason: REASON.to_owned(),
        message: message(limit),
        observed_generation: object.meta().generation,
        // Also where it was not ready before: the time in quarantine counts from here.
        last_transition_time: Time(now),
    };
    std::iter::once(ready).chain(others.cloned()).collect()
}

fn message(limit: Duration) -> String {
    format!(
        "quarantined: its evaluation took more than {} s; what is in effect stays, and Fenceline evaluates it again once its spec changes, or in {} hours",
        limit.as_secs(),
        RETRY.as_hours()
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::yaml;

    #[test]
    fn until_its_spec_changes_or_for_a_while() {
        let now: Timestamp = "2026-01-01T00:00:00Z".parse().unwrap();
        let mut fence: ServiceFence = yaml(
            "{metadata: {name: a, namespace: b, generation: 3}, spec: {}, status: {conditions: [
              {type: Ready, status: 'False', reason: Failing, message: m, lastTransitionTime: '2020-01-01T00:00:00Z'},
              {type: Enforced, status: 'True', reason: Enforced, message: m, lastTransitionTime: '2020-01-01T00:00:00Z'}]}}",
        );
        assert!(!holds(&fence, now));
        let conditions = conditions(&fence, Duration::from_secs(30), now);
        assert_eq!(conditions.len(), 2, "the others stay");
        assert!(conditions[0].message.contains("took more than 30 s"));
        fence.status.as_mut().unwrap().conditions = conditions;
        assert!(holds(&fence, now));
        let nearly = now + RETRY - SignedDuration::from_secs(1);
        assert!(holds(&fence, nearly) && !holds(&fence, now + RETRY));
        fence.metadata.generation = Some(4);
        assert!(!holds(&fence, now));
    }
}
