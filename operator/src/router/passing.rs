//! When a stage that passes is worth a status.

use std::time::{Duration, Instant};

use super::order::Stage;

/// A stage that is over sooner is not said: nobody would read it.
const BRIEF: Duration = Duration::from_secs(1);
/// While something is waited for, status says what, this often.
const SAY: Duration = Duration::from_secs(5);

/// A stage that is under way.
#[derive(Clone, Copy, Debug)]
pub(super) struct Passing {
    stage: Stage,
    since: Instant,
    said: Option<Instant>,
}

impl Passing {
    /// The same stage still, or one that begins now.
    pub(super) fn go_on(known: Option<Self>, stage: Stage, now: Instant) -> Self {
        let known = known.filter(|known| known.stage == stage);
        known.unwrap_or(Self {
            stage,
            since: now,
            said: None,
        })
    }

    /// Whether it is worth a status now, and when to ask again.
    pub(super) fn say(&mut self, drain: Duration, now: Instant) -> (bool, Duration) {
        // How long this one lasts is known before.
        let drains = self.stage == Stage::Draining && drain >= BRIEF;
        let due = match self.said {
            Some(said) => said + SAY,
            None if drains => self.since,
            None => self.since + BRIEF,
        };
        let says = due <= now;
        if says {
            self.said = Some(now);
        }
        let again = if says { SAY } else { due - now };
        let drained = (self.since + drain).saturating_duration_since(now);
        // Nobody else says when that is over.
        let ends = self.stage == Stage::Draining && !drained.is_zero();
        (says, if ends { again.min(drained) } else { again })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_over_soon_is_not_said() {
        let start = Instant::now();
        let at = |millis: u64| start + Duration::from_millis(millis);
        let (drain, none) = (Duration::from_secs(10), Duration::ZERO);
        let mut adding = Passing::go_on(None, Stage::AddingSubsets, at(0));
        assert_eq!(adding.say(drain, at(0)), (false, BRIEF));
        let mut adding = Passing::go_on(Some(adding), Stage::AddingSubsets, at(1000));
        assert_eq!(adding.say(drain, at(1000)), (true, SAY));
        assert!(
            !adding.say(drain, at(5999)).0,
            "not at every change of what it waits for"
        );
        assert!(adding.say(drain, at(6000)).0);
        let mut next = Passing::go_on(Some(adding), Stage::ShiftingRoutes, at(6000));
        assert!(!next.say(drain, at(6000)).0);
        let mut draining = Passing::go_on(Some(next), Stage::Draining, at(6100));
        assert_eq!(draining.say(drain, at(6100)), (true, SAY), "that one lasts");
        assert_eq!(draining.say(drain, at(11_100)), (true, SAY));
        assert_eq!(
            draining.say(drain, at(16_050)),
            (false, Duration::from_millis(50)),
            "until it ends"
        );
        let mut draining = Passing::go_on(Some(next), Stage::Draining, at(6100));
        assert_eq!(draining.say(none, at(6100)), (false, BRIEF));
    }
}
