//! Many requests for a while: what became of each kind is counted, and no more is kept.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tokio::time::MissedTickBehavior;

use super::client::{Call, Caller};

/// Requests to make for a while.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Flood {
    /// Made in turn.
    pub calls: Vec<Call>,
    /// Each with one request at a time.
    pub connections: usize,
    /// Of all connections together; 0 is as many as there can be.
    pub per_second: u32,
    pub time: Duration,
}

/// What became of them.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Flooded {
    /// Of each call, how often which status was the answer; 0 is none.
    pub statuses: Vec<BTreeMap<u16, u64>>,
    /// Of each call, how long a bucket with room for one second's tokens was filled meanwhile.
    pub filled: Vec<Duration>,
    pub time: Duration,
}

/// How long a bucket with room for one second's tokens has been filled since the first answer: of a longer pause, as of a machine
/// that had no time for the test, nothing more than a second counts.
#[derive(Debug, Default)]
struct Filled {
    last: Option<Instant>,
    time: Duration,
}

impl Filled {
    fn answered(&mut self, now: Instant) {
        if let Some(last) = self.last {
            self.time += (now - last).min(Duration::from_secs(1));
        }
        self.last = Some(now);
    }
}

type AllFilled = Arc<Vec<Mutex<Filled>>>;

impl Flooded {
    /// How many requests of a call had this status.
    pub fn of(&self, call: usize, status: u16) -> u64 {
        let statuses = self.statuses.get(call);
        statuses
            .and_then(|statuses| statuses.get(&status))
            .copied()
            .unwrap_or_default()
    }

    /// How many requests of a call there were.
    pub fn all(&self, call: usize) -> u64 {
        self.statuses
            .get(call)
            .map(|statuses| statuses.values().sum())
            .unwrap_or_default()
    }
}

impl Flood {
    /// Makes them.
    pub async fn run(self) -> Flooded {
        let started = Instant::now();
        let mut connections = tokio::task::JoinSet::new();
        let filled: AllFilled = Arc::new(self.calls.iter().map(|_| Mutex::default()).collect());
        for number in 0..self.connections {
            connections.spawn(self.clone().connection(number, Arc::clone(&filled)));
        }
        let mut flooded = Flooded {
            statuses: vec![BTreeMap::new(); self.calls.len()],
            ..Flooded::default()
        };
        while let Some(ended) = connections.join_next().await {
            for (sum, one) in flooded.statuses.iter_mut().zip(ended.unwrap_or_default()) {
                for (status, count) in one {
                    *sum.entry(status).or_default() += count;
                }
            }
        }
        flooded.time = started.elapsed();
        let filled = filled.iter();
        flooded.filled = filled
            .map(|one| one.lock().unwrap_or_else(PoisonError::into_inner).time)
            .collect();
        flooded
    }

    async fn connection(self, number: usize, filled: AllFilled) -> Vec<BTreeMap<u16, u64>> {
        let mut statuses = vec![BTreeMap::new(); self.calls.len()];
        let caller = Caller::default();
        let ends = Instant::now() + self.time;
        let connections = f64::from(u32::try_from(self.connections).unwrap_or(u32::MAX));
        let mut pace = (self.per_second > 0).then(|| {
            let pause = Duration::from_secs_f64(connections / f64::from(self.per_second));
            // Not all at the same moment.
            let share = f64::from(u32::try_from(number).unwrap_or_default()) / connections;
            let begins = tokio::time::Instant::now() + pause.mul_f64(share);
            let mut pace = tokio::time::interval_at(begins, pause);
            pace.set_missed_tick_behavior(MissedTickBehavior::Burst);
            pace
        });
        for turn in number.. {
            if let Some(pace) = &mut pace {
                pace.tick().await;
            }
            if Instant::now() >= ends {
                break;
            }
            let which = turn % self.calls.len();
            let outcome = caller.call(&self.calls[which]).await;
            *statuses[which].entry(outcome.status).or_default() += 1;
            let mut filled = filled[which].lock().unwrap_or_else(PoisonError::into_inner);
            filled.answered(Instant::now());
        }
        statuses
    }
}
