//! What a RateLimit says of itself: when that is worth a write, and an event.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use fenceline_crds::{RateLimit, RateLimitStatus, RuleStatus, Share};
use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::Resource;

use super::plan::Filter;
use super::tenant;
use super::valid::Invalid;
use crate::status::{Said, StatusWriter, set_conditions};
use crate::world::Key;

/// Where a RateLimit stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Standing {
    /// How it is known.
    InForce(String),
    /// What it waits for, and whether it has done so for long enough to be said.
    OnTheWay(String, bool),
    /// The last good one is in force.
    Refused(String),
    Invalid(String),
    Unsupported(String),
    NameTaken(Key),
    /// No rate limit service is connected.
    NoService,
    Failing(String),
}

impl Standing {
    pub(super) fn is_well(&self) -> bool {
        matches!(self, Self::InForce(_) | Self::OnTheWay(_, false))
    }
}

/// What there is to be said.
#[derive(Debug)]
pub(super) struct Report {
    pub(super) standing: Standing,
    pub(super) target: Option<String>,
    pub(super) remark: Option<String>,
    pub(super) replicas: Option<u32>,
    /// Why metrics cannot be gone by.
    pub(super) stale: Vec<String>,
    /// Whether any rule goes by metrics.
    pub(super) moves: bool,
    /// Whether metrics are wanted that this installation asks nobody for.
    pub(super) metrics_off: bool,
    /// The length of time of each rule's limit.
    pub(super) per: Vec<Duration>,
    /// Requests over the limit, by filter.
    pub(super) limited: HashMap<String, u64>,
    pub(super) filters: Vec<Filter>,
    pub(super) rules: Vec<RuleStatus>,
    /// What is in force, in short.
    pub(super) mark: Option<String>,
}

impl Report {
    /// Of one that makes no sense: what was in force stays so.
    pub(super) fn invalid(invalid: &Invalid) -> Self {
        Self {
            standing: Standing::Invalid(invalid.to_string()),
            target: None,
            remark: None,
            replicas: None,
            stale: Vec::new(),
            moves: false,
            metrics_off: false,
            per: Vec::new(),
            limited: HashMap::new(),
            filters: Vec::new(),
            rules: Vec::new(),
            mark: None,
        }
    }

    /// Writes status where it is worth it, and an event where people should know. Where only numbers moved, that waits until the last
    /// write was [`REST`] ago.
    pub(super) async fn write(
        &self,
        object: &RateLimit,
        writer: &StatusWriter,
        wrote: Option<Duration>,
        now: Timestamp,
    ) -> kube::Result<Wrote> {
        let old = object.status.clone().unwrap_or_default();
        let status = self.status(object, &old, now);
        if status == old {
            return Ok(Wrote::Nothing);
        }
        if let Some(rest) = rest(object, &old, &status, wrote) {
            return Ok(Wrote::Later(rest));
        }
        // What others wrote is theirs.
        let ours = RateLimitStatus {
            services: Vec::new(),
            ..status.clone()
        };
        writer.of(object, &ours).await?;
        for (warning, reason, note) in events(&old.conditions, &status.conditions) {
            writer
                .event(&object.object_ref(&()), warning, &reason, note)
                .await;
        }
        Ok(Wrote::Status)
    }

    fn status(&self, object: &RateLimit, old: &RateLimitStatus, now: Timestamp) -> RateLimitStatus {
        let generation = object.metadata.generation;
        let seen = old.observed_generation == generation && !old.conditions.is_empty();
        let passes = seen && matches!(self.standing, Standing::OnTheWay(_, false));
        let mut said = vec![self.ready()];
        if self.moves {
            said.push(self.metrics_stale());
        }
        let mut conditions = set_conditions(&old.conditions, &said, generation, now);
        if passes && let Some(ready) = old.conditions.iter().find(|one| one.type_ == said[0].type_)
        {
            conditions[0] = ready.clone();
        }
        let invalid = matches!(self.standing, Standing::Invalid(_));
        let mut rules = if invalid {
            old.rules.clone()
        } else {
            self.rules.clone()
        };
        for rule in &mut rules {
            rule.limited = self.limited_alone(&rule.name);
            if let Some(since) = &mut rule.since {
                // As the API stores it: whole seconds, and not of the future.
                let whole = Timestamp::from_second(since.0.as_second());
                since.0 = whole.unwrap_or(since.0);
            }
        }
        RateLimitStatus {
            observed_generation: generation,
            conditions,
            target: self.target.clone().or_else(|| old.target.clone()),
            summary: if invalid {
                old.summary.clone()
            } else {
                Some(self.summary())
            },
            replicas: if invalid { old.replicas } else { self.replicas },
            limited: self.limited.values().copied().reduce(|a, b| a + b),
            rules,
            in_force: self.mark.clone().or_else(|| old.in_force.clone()),
            services: old.services.clone(),
        }
    }

    /// How many requests of a rule were over its limit, where its filter has no other rule.
    fn limited_alone(&self, rule: &str) -> Option<u64> {
        let alone = self.filters.iter().filter(|filter| filter.rules == [rule]);
        let counts = alone.filter_map(|filter| self.limited.get(&filter.name).copied());
        counts.reduce(|a, b| a + b)
    }

    /// What each rule lets through, for a column.
    fn summary(&self) -> String {
        const SHOWN: usize = 3;
        let rules = self.rules.iter().zip(&self.per).map(|(rule, per)| {
            if rule.active {
                format!("{} {}/{}", rule.name, rule.effective, short(*per))
            } else {
                format!("{} off", rule.name)
            }
        });
        let mut all: Vec<String> = rules.collect();
        if all.len() > SHOWN {
            let more = all.len() - SHOWN;
            all.truncate(SHOWN);
            all.push(format!("{more} more"));
        }
        all.join(", ")
    }

    fn ready(&self) -> Said {
        let remark = |text: String| match &self.remark {
            Some(remark) => format!("{text}; {remark}"),
            None => text,
        };
        let (status, reason, message) = match &self.standing {
            Standing::InForce(how) => (true, "InForce", remark(how.clone())),
            Standing::OnTheWay(why, _) => (false, "Progressing", remark(why.clone())),
            Standing::Refused(why) => (
                false,
                "Refused",
                format!("what was in force before is again: {why}. It is tried again once the spec changes"),
            ),
            Standing::Invalid(why) => (false, "Invalid", format!("{why}; what was in force before stays")),
            Standing::Unsupported(why) => (false, "Unsupported", format!("{why}; what was in force before stays")),
            Standing::NameTaken(name) => (
                false,
                "Conflicted",
                format!("EnvoyFilter {name} is somebody else's; give the RateLimit another name, or delete it"),
            ),
            Standing::NoService => (
                false,
                "NoRateLimitService",
                "no rate limit service is connected to Fenceline: see docs/rate-limit.md; until one is, requests get what onUnavailable says"
                    .to_owned(),
            ),
            Standing::Failing(why) => (false, "Failing", why.clone()),
        };
        Said {
            type_: "Ready",
            status,
            reason,
            message,
        }
    }

    fn metrics_stale(&self) -> Said {
        if self.metrics_off {
            return Said {
                type_: "MetricsStale",
                status: true,
                reason: "MetricsOff",
                message: format!("{}; what goes by metrics stays as it is", tenant::OFF),
            };
        }
        let stale = !self.stale.is_empty();
        Said {
            type_: "MetricsStale",
            status: stale,
            reason: if stale { "Missing" } else { "Known" },
            message: if stale {
                self.stale.join("; ")
            } else {
                "every metric has a value, or had one lately".to_owned()
            },
        }
    }
}

/// How long a status that differs in moving numbers alone waits after the last write.
const REST: Duration = Duration::from_secs(30);

/// What became of a status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wrote {
    Nothing,
    Status,
    /// It is due in so long.
    Later(Duration),
}

/// How long a status has to wait, that was written `wrote` ago last; nothing where it is due. The rate limit services go by the status of
/// Global limits, so that these never wait.
fn rest(
    object: &RateLimit,
    old: &RateLimitStatus,
    new: &RateLimitStatus,
    wrote: Option<Duration>,
) -> Option<Duration> {
    let left = REST.checked_sub(wrote?).filter(|left| !left.is_zero())?;
    let may_wait = object.spec.share != Share::Global && still(old) == still(new);
    may_wait.then_some(left)
}

/// A status without what moves.
fn still(status: &RateLimitStatus) -> RateLimitStatus {
    let rules = status.rules.iter().map(|rule| RuleStatus {
        name: rule.name.clone(),
        active: rule.active,
        message: rule.message.clone(),
        effective: 0,
        since: None,
        inputs: BTreeMap::new(),
        limited: None,
    });
    RateLimitStatus {
        rules: rules.collect(),
        summary: None,
        limited: None,
        in_force: None,
        replicas: None,
        ..status.clone()
    }
}

/// As people write it.
fn short(time: Duration) -> String {
    match (time.as_secs(), time.subsec_millis()) {
        (secs, 0) if secs % 3600 == 0 => format!("{}h", secs / 3600),
        (secs, 0) if secs % 60 == 0 => format!("{}m", secs / 60),
        (secs, 0) => format!("{secs}s"),
        _ => format!("{}ms", time.as_millis()),
    }
}

/// What people should be told: whether it is a warning, the reason, and a note.
fn events(old: &[Condition], new: &[Condition]) -> Vec<(bool, String, String)> {
    const BAD: [&str; 5] = [
        "Refused",
        "Invalid",
        "Unsupported",
        "Conflicted",
        "NoRateLimitService",
    ];
    let find = |all: &[Condition], type_: &str| all.iter().find(|one| one.type_ == type_).cloned();
    let mut events = Vec::new();
    if let Some(ready) = find(new, "Ready") {
        let before = find(old, "Ready").map(|one| one.reason).unwrap_or_default();
        let is_bad = BAD.contains(&&*ready.reason);
        if is_bad && before != ready.reason {
            events.push((true, ready.reason, ready.message));
        } else if ready.reason == "InForce" && BAD.contains(&&*before) {
            events.push((false, ready.reason, ready.message));
        }
    }
    if let Some(stale) = find(new, "MetricsStale") {
        let before = find(old, "MetricsStale").is_some_and(|one| one.status == "True");
        match (before, stale.status == "True") {
            (false, true) => events.push((true, "MetricsStale".to_owned(), stale.message)),
            (true, false) => events.push((false, "MetricsKnown".to_owned(), stale.message)),
            _ => {}
        }
    }
    events
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_column_says_what_is_let_through() {
        let rule = |name: &str, active, effective| RuleStatus {
            name: name.to_owned(),
            active,
            effective,
            ..RuleStatus::default()
        };
        let report = Report {
            rules: vec![
                rule("a", true, 50),
                rule("b", false, 5),
                rule("c", true, 1),
                rule("d", true, 1),
            ],
            per: [1000, 1000, 60_000, 1500].map(Duration::from_millis).into(),
            ..Report::invalid(&Invalid::new("rules", "x"))
        };
        assert_eq!(report.summary(), "a 50/1s, b off, c 1/1m, 1 more");
        assert_eq!(short(Duration::from_secs(7200)), "2h");
        assert_eq!(short(Duration::from_millis(1500)), "1500ms");
    }

    #[test]
    fn numbers_that_move_are_written_once_in_a_while_and_all_else_at_once() {
        let of = |effective, message: Option<&str>| RateLimitStatus {
            rules: vec![RuleStatus {
                name: "a".to_owned(),
                effective,
                message: message.map(str::to_owned),
                ..RuleStatus::default()
            }],
            summary: Some(format!("a {effective}/1s")),
            in_force: Some(effective.to_string()),
            ..RateLimitStatus::default()
        };
        let mut object = RateLimit::default();
        let ago = |seconds| Some(Duration::from_secs(seconds));
        let (old, moved) = (of(1, None), of(2, None));
        let left = rest(&object, &old, &moved, ago(10));
        assert_eq!(left, Some(Duration::from_secs(20)));
        assert_eq!(rest(&object, &old, &moved, ago(30)), None);
        assert_eq!(
            rest(&object, &old, &moved, None),
            None,
            "not since this replica leads"
        );
        assert_eq!(rest(&object, &old, &of(2, Some("x")), ago(1)), None);
        object.spec.share = Share::Global;
        assert_eq!(
            rest(&object, &old, &moved, ago(1)),
            None,
            "services go by it"
        );
    }

    #[test]
    fn metrics_that_are_off_are_said_with_the_flag() {
        let report = Report {
            moves: true,
            metrics_off: true,
            ..Report::invalid(&Invalid::new("rules", "x"))
        };
        let said = report.metrics_stale();
        assert!(said.status && said.reason == "MetricsOff");
        assert!(said.message.contains("--rate-limit-metrics=none"));
    }

    #[test]
    fn what_people_are_told_in_events() {
        let conditions = |standing: Standing, stale: &[&str]| {
            let report = Report {
                standing,
                moves: true,
                stale: stale.iter().map(|text| (*text).to_owned()).collect(),
                ..Report::invalid(&Invalid::new("rules", "x"))
            };
            set_conditions(
                &[],
                &[report.ready(), report.metrics_stale()],
                None,
                Timestamp::UNIX_EPOCH,
            )
        };
        let well = conditions(Standing::InForce("x".into()), &[]);
        let refused = conditions(Standing::Refused("x".into()), &[]);
        let stale = conditions(Standing::InForce("x".into()), &["p99"]);
        let told = |old: &[Condition], new: &[Condition]| -> Vec<(bool, String)> {
            events(old, new)
                .into_iter()
                .map(|(warning, reason, _)| (warning, reason))
                .collect()
        };
        assert_eq!(told(&well, &refused), [(true, "Refused".to_owned())]);
        assert_eq!(told(&refused, &refused), []);
        assert_eq!(told(&refused, &well), [(false, "InForce".to_owned())]);
        assert_eq!(told(&well, &stale), [(true, "MetricsStale".to_owned())]);
        assert_eq!(told(&stale, &well), [(false, "MetricsKnown".to_owned())]);
        assert_eq!(told(&[], &well), []);
    }
}
