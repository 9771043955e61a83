//! How much a rule lets through now: a plain function of what it was, of what metrics say, and of the time. It never leaves its bounds, never
//! moves further than a step, and stays where it is while nobody knows better.

use std::collections::BTreeMap;
use std::time::Duration;

use fenceline_crds::{Adaptive, OnStale, RuleStatus};
use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

use super::expr::Inputs;
use super::valid::Rule;

/// A metric at this moment.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Reading {
    /// A finite number, or why there is none.
    pub(super) value: Result<f64, String>,
    /// How long there has been none.
    pub(super) missing_for: Duration,
}

/// What is known at this moment.
#[derive(Clone, Debug, Default)]
pub(super) struct Known {
    pub(super) readings: BTreeMap<String, Reading>,
    pub(super) replicas: u32,
    /// Whether newer readings are awaited: nothing moves until they are there.
    pub(super) asking: bool,
    /// Whether status must not show the readings: they may be another namespace's.
    pub(super) hidden: bool,
}

/// What a rule does from now on.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Decision {
    pub(super) status: RuleStatus,
    /// Why its metrics cannot be gone by any more, if so.
    pub(super) stale: Option<String>,
}

/// Decides about a rule, of which `old` was said last.
pub(super) fn decide(
    rule: &Rule,
    old: Option<&RuleStatus>,
    known: &Known,
    now: Timestamp,
) -> Decision {
    let begins = RuleStatus {
        name: rule.name.clone(),
        active: rule.when.is_none(),
        effective: rule.quota.requests,
        since: Some(Time(now)),
        ..RuleStatus::default()
    };
    let before = old.cloned().unwrap_or_else(|| begins.clone());
    let mut decision = Decision {
        status: RuleStatus {
            message: None,
            limited: None,
            ..before.clone()
        },
        stale: None,
    };
    let status = &mut decision.status;
    if let Some((adaptive, _)) = &rule.adaptive {
        // Bounds may have changed since.
        status.effective = status.effective.clamp(adaptive.min, adaptive.max);
    } else {
        status.effective = rule.quota.requests;
    }
    if rule.when.is_none() {
        status.active = true;
    }
    if rule.when.is_none() && rule.adaptive.is_none() {
        status.inputs = BTreeMap::new();
    }
    // Whoever leads next goes by what was said, so that no step comes too soon.
    let rested = !known.asking && old.is_none_or(|old| has_rested(old, rule.every, now));
    let inputs = inputs(rule, known, status.effective);
    let mut notes = Vec::new();
    if let Some(when) = &rule.when {
        match missing(&when.metrics, known).map_or_else(|| when.holds(&inputs), Err) {
            Ok(holds) if holds != status.active && rested => status.active = holds,
            Ok(_) => {}
            Err(why) => notes.push(format!(
                "`when` cannot be worked out, so that it stays as it is: {why}"
            )),
        }
        if !status.active {
            notes.push("not in force: `when` does not hold".to_owned());
        }
    }
    if let Some((adaptive, wanted)) = &rule.adaptive {
        let stale_after = adaptive.stale_after();
        let target =
            match missing(&wanted.metrics, known).map_or_else(|| wanted.wanted(&inputs), Err) {
                Ok(target) => Some(target),
                Err(why) => {
                    let stale = longest_missing(&wanted.metrics, known) >= stale_after;
                    let back = stale && adaptive.on_stale == OnStale::Declared;
                    let does = if back {
                        "it goes back to limit.requests"
                    } else {
                        "it stays as it is"
                    };
                    notes.push(format!(
                        "the limit cannot be worked out, so that {does}: {why}"
                    ));
                    if stale {
                        decision.stale = Some(format!("rule {}: {why}", rule.name));
                    }
                    back.then(|| f64::from(rule.quota.requests))
                }
            };
        if let Some(target) = target
            && rested
        {
            status.effective = step(status.effective, target, adaptive);
        }
    }
    let same =
        old.is_some_and(|old| old.active == status.active && old.effective == status.effective);
    if !same {
        status.since = Some(Time(now));
        status.inputs = used(rule, &inputs);
        status
            .inputs
            .retain(|name, _| !known.hidden || name == "replicas");
    }
    status.message = (!notes.is_empty()).then(|| notes.join("; "));
    decision
}

fn has_rested(old: &RuleStatus, every: Duration, now: Timestamp) -> bool {
    let since = old.since.as_ref().map(|time| now.duration_since(time.0));
    since.is_none_or(|time| Duration::try_from(time).is_ok_and(|time| time >= every))
}

fn inputs(rule: &Rule, known: &Known, effective: u32) -> Inputs {
    let values = known.readings.iter();
    let values =
        values.filter_map(|(name, reading)| Some((name.clone(), *reading.value.as_ref().ok()?)));
    Inputs {
        metrics: values.collect(),
        replicas: known.replicas,
        requests: rule.quota.requests,
        effective,
    }
}

/// Why one of these metrics has no value.
fn missing<'a>(names: impl IntoIterator<Item = &'a String>, known: &Known) -> Option<String> {
    names
        .into_iter()
        .find_map(|name| match known.readings.get(name) {
            Some(Reading { value: Ok(_), .. }) => None,
            Some(Reading {
                value: Err(why), ..
            }) => Some(format!("metrics.{name}: {why}")),
            None => Some(format!("metrics.{name}: it has not been asked for yet")),
        })
}

fn longest_missing<'a>(names: impl IntoIterator<Item = &'a String>, known: &Known) -> Duration {
    let missing = names
        .into_iter()
        .filter_map(|name| known.readings.get(name));
    let missing = missing.filter(|reading| reading.value.is_err());
    missing
        .map(|reading| reading.missing_for)
        .max()
        .unwrap_or_default()
}

/// What status shows of the inputs.
fn used(rule: &Rule, inputs: &Inputs) -> BTreeMap<String, f64> {
    let expressions = rule
        .when
        .iter()
        .chain(rule.adaptive.iter().map(|(_, wanted)| wanted));
    let names: Vec<&String> = expressions
        .flat_map(|expression| &expression.metrics)
        .collect();
    let metrics = names
        .into_iter()
        .filter_map(|name| Some((name.clone(), short(*inputs.metrics.get(name)?))));
    let mut used: BTreeMap<String, f64> = metrics.collect();
    if rule.when.is_some() || rule.adaptive.is_some() {
        used.insert("replicas".to_owned(), f64::from(inputs.replicas));
    }
    used
}

/// Four digits are enough for people.
fn short(value: f64) -> f64 {
    format!("{value:.3e}").parse().unwrap_or(value)
}

/// The next value on the way from `current` to `target`.
fn step(current: u32, target: f64, adaptive: &Adaptive) -> u32 {
    let bounded = target.clamp(f64::from(adaptive.min), f64::from(adaptive.max));
    let share = |percent: u32| f64::from(current) * f64::from(percent) / 100.0;
    let change = bounded.round() - f64::from(current);
    if change.abs() < share(adaptive.dead_band()) {
        return current;
    }
    // At least by one, or small limits would never move.
    let most = share(adaptive.max_step()).floor().max(1.0);
    let next = f64::from(current) + change.clamp(-most, most);
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "it is a whole number between min and max"
    )]
    let next = next as u32;
    next.clamp(adaptive.min, adaptive.max)
}

#[cfg(test)]
mod tests {
    use super::*;
    use fenceline_crds::RateLimit;
    use proptest::prelude::*;

    use crate::rate_limit::valid;
    use crate::testing::{service, world, yaml};

    fn rule(rule: &str) -> Rule {
        let mut world = world();
        service(&mut world, "shop", "cart", "{}");
        let spec = format!(
            "{{target: {{service: cart}}, metrics: [{{name: p99, prometheus: {{query: x}}}}], rules: [{rule}]}}"
        );
        let mut object = RateLimit::new("cart", yaml(&spec));
        object.metadata.namespace = Some("shop".into());
        valid::limit(&object, &world, "istio-system", &Default::default())
            .unwrap()
            .rules
            .remove(0)
    }

    const ADAPTIVE: &str = "{name: a, limit: {requests: 100, per: 1s}, adaptive: {requests: 'int(100.0 / metrics.p99)', min: 10, max: 500,
        maxStep: 25%, every: 30s, staleAfter: 2m}}";

    fn reads(value: f64) -> Known {
        let value = if value.is_finite() {
            Ok(value)
        } else {
            Err(format!("it is {value}"))
        };
        known(value, Duration::ZERO)
    }

    fn known(value: Result<f64, String>, missing_for: Duration) -> Known {
        Known {
            readings: [("p99".to_owned(), Reading { value, missing_for })].into(),
            replicas: 2,
            ..Known::default()
        }
    }

    fn at(seconds: i64) -> Timestamp {
        Timestamp::from_second(seconds).unwrap()
    }

    #[test]
    fn a_limit_follows_its_metric_in_steps() {
        let rule = rule(ADAPTIVE);
        let mut status: Option<RuleStatus> = None;
        let mut went = Vec::new();
        let metric = [
            0.2,
            0.2,
            0.2,
            0.2,
            5.0,
            5.0,
            f64::NAN,
            f64::NAN,
            -3.0,
            1e9,
            0.65,
        ];
        for (turn, value) in metric.into_iter().enumerate() {
            let now = at(30 * i64::try_from(turn).unwrap());
            let decision = decide(&rule, status.as_ref(), &reads(value), now);
            went.push(decision.status.effective);
            status = Some(decision.status);
        }
        // Wanted: 500, and from the fifth 20; NaN: it stays; negative and nothing: min; at the end 153.
        assert_eq!(went, [125, 156, 195, 243, 183, 138, 138, 138, 104, 78, 97]);
    }

    #[test]
    fn it_moves_no_more_often_than_it_should_also_under_the_next_leader() {
        let rule = rule(ADAPTIVE);
        let first = decide(&rule, None, &reads(0.2), at(100)).status;
        assert_eq!(
            (first.effective, first.since.as_ref().unwrap().0),
            (125, at(100))
        );
        assert_eq!(
            decide(&rule, Some(&first), &reads(0.2), at(115)).status,
            first
        );
        assert_eq!(
            decide(&rule, Some(&first), &reads(0.2), at(130))
                .status
                .effective,
            156
        );
        assert_eq!(
            first.inputs,
            [("p99".to_owned(), 0.2), ("replicas".to_owned(), 2.0)].into()
        );
    }

    #[test]
    fn nothing_moves_while_newer_readings_are_awaited_and_what_is_hidden_is_not_shown() {
        let rule = rule(ADAPTIVE);
        let before = decide(&rule, None, &reads(0.2), at(100)).status;
        let asking = Known {
            asking: true,
            ..reads(0.2)
        };
        let same = decide(&rule, Some(&before), &asking, at(200)).status;
        assert_eq!(same, before);
        let hidden = Known {
            hidden: true,
            ..reads(0.2)
        };
        let moved = decide(&rule, Some(&before), &hidden, at(200)).status;
        assert_eq!(moved.effective, 156);
        assert_eq!(moved.inputs, [("replicas".to_owned(), 2.0)].into());
    }

    #[test]
    fn a_metric_that_is_missing_changes_nothing_until_it_is_stale() {
        let rule = rule(ADAPTIVE);
        let before = decide(&rule, None, &reads(0.2), at(0)).status;
        let missing = |seconds| known(Err("no series".into()), Duration::from_secs(seconds));
        let soon = decide(&rule, Some(&before), &missing(60), at(60));
        assert_eq!((soon.status.effective, soon.stale), (125, None));
        assert!(
            soon.status
                .message
                .unwrap()
                .contains("metrics.p99: no series")
        );
        let late = decide(&rule, Some(&before), &missing(120), at(120));
        assert_eq!(late.status.effective, 125);
        assert!(late.stale.unwrap().contains("no series"));

        let back =
            self::rule(&ADAPTIVE.replace("staleAfter: 2m", "staleAfter: 2m, onStale: Declared"));
        let late = decide(&back, Some(&before), &missing(120), at(120));
        assert_eq!(late.status.effective, 100);
    }

    #[test]
    fn a_limit_that_does_not_move_says_the_same_for_ever() {
        let rule = rule("{name: plain, limit: {requests: 5, per: 1s}}");
        let first = decide(&rule, None, &Known::default(), at(0)).status;
        assert_eq!(first.since, Some(Time(at(0))));
        let later = decide(&rule, Some(&first), &reads(3.0), at(600)).status;
        assert_eq!(later, first);
        let moved = RuleStatus {
            effective: 9,
            ..first
        };
        let back = decide(&rule, Some(&moved), &reads(3.0), at(600)).status;
        assert_eq!((back.effective, back.since), (5, Some(Time(at(600)))));
    }

    #[test]
    fn a_condition_that_nobody_can_work_out_stays_as_it_is() {
        let rule = rule("{name: w, limit: {requests: 5, per: 1s}, when: 'metrics.p99 > 0.5'}");
        let unknown = known(Err("Prometheus is away".into()), Duration::ZERO);
        let first = decide(&rule, None, &unknown, at(0)).status;
        assert!(!first.active, "nobody said yet that it should count");
        let slow = decide(&rule, Some(&first), &reads(0.9), at(60)).status;
        assert!(slow.active && slow.effective == 5);
        assert!(decide(&rule, Some(&slow), &unknown, at(120)).status.active);
        assert!(
            decide(&rule, Some(&slow), &reads(0.1), at(70))
                .status
                .active,
            "not at once"
        );
        assert!(
            !decide(&rule, Some(&slow), &reads(0.1), at(120))
                .status
                .active
        );
    }

    proptest! {
        #[test]
        fn whatever_metrics_say_a_limit_stays_in_its_bounds_and_steps(
            metrics in prop::collection::vec(any::<f64>(), 1..40)
        ) {
            let rule = rule(ADAPTIVE);
            let mut status: Option<RuleStatus> = None;
            for (turn, value) in metrics.into_iter().enumerate() {
                let before = status.as_ref().map_or(100, |status| status.effective);
                let now = at(60 * i64::try_from(turn).unwrap());
                let next = decide(&rule, status.as_ref(), &reads(value), now).status;
                prop_assert!((10..=500).contains(&next.effective));
                prop_assert!(next.effective.abs_diff(before) <= (before / 4).max(1));
                status = Some(next);
            }
        }
    }
}
