//! What Prometheus says: the metrics of RateLimits, and how many requests were over a limit.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use futures::StreamExt;

use super::adapt::Reading;
use super::plan::Filter;
use super::valid::Limit;
use crate::observe::prometheus::Prometheus;
use crate::world::Key;

/// How many questions at once.
const SIDE_BY_SIDE: usize = 4;
/// How often it is counted what was limited.
const COUNT: Duration = Duration::from_secs(60);

/// Asks Prometheus for RateLimits.
#[derive(Default)]
pub(super) struct Readings {
    prometheus: Option<Arc<Prometheus>>,
    of: Mutex<HashMap<Key, OfLimit>>,
}

/// What is known for one RateLimit.
#[derive(Debug, Default)]
struct OfLimit {
    /// Queries, each with the last answer, when it was asked and when there last was a number.
    metrics: HashMap<String, Asked>,
    counted: Option<Instant>,
    counts: HashMap<String, u64>,
}

#[derive(Debug)]
struct Asked {
    at: Instant,
    value: Result<f64, String>,
    /// When there was none first, since there last was one.
    missing_since: Option<Instant>,
}

impl Readings {
    pub(super) fn new(prometheus: Option<Arc<Prometheus>>) -> Self {
        Self {
            prometheus,
            ..Self::default()
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<Key, OfLimit>> {
        self.of.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn forget(&self, key: &Key) {
        self.lock().remove(key);
    }

    /// The metrics of a RateLimit, none older than `every`.
    pub(super) async fn metrics(
        &self,
        limit: &Limit,
        every: Duration,
    ) -> BTreeMap<String, Reading> {
        let due: Vec<String> = {
            let mut all = self.lock();
            let known = &mut all.entry(limit.key.clone()).or_default().metrics;
            known.retain(|query, _| limit.metrics.values().any(|wanted| wanted == query));
            let is_due = |query: &&String| {
                known
                    .get(*query)
                    .is_none_or(|asked| asked.at.elapsed() >= every)
            };
            limit.metrics.values().filter(is_due).cloned().collect()
        };
        let asked: Vec<(String, Result<f64, String>)> = futures::stream::iter(due)
            .map(async |query| {
                let value = self.number(&query).await;
                (query, value)
            })
            .buffer_unordered(SIDE_BY_SIDE)
            .collect()
            .await;
        let mut all = self.lock();
        let known = &mut all.entry(limit.key.clone()).or_default().metrics;
        let now = Instant::now();
        for (query, value) in asked {
            let before = known.get(&query).and_then(|asked| asked.missing_since);
            let missing_since = value.is_err().then(|| before.unwrap_or(now));
            known.insert(
                query,
                Asked {
                    at: now,
                    value,
                    missing_since,
                },
            );
        }
        let reading = |query: &String| {
            let asked = known.get(query)?;
            Some(Reading {
                value: asked.value.clone(),
                missing_for: asked
                    .missing_since
                    .map(|since| since.elapsed())
                    .unwrap_or_default(),
            })
        };
        let readings = limit.metrics.iter();
        readings
            .filter_map(|(name, query)| Some((name.clone(), reading(query)?)))
            .collect()
    }

    async fn number(&self, query: &str) -> Result<f64, String> {
        let Some(prometheus) = &self.prometheus else {
            return Err("Fenceline runs without --prometheus-url".to_owned());
        };
        let number = prometheus
            .client()
            .number(query)
            .await
            .map_err(|error| crate::chain(&error))?;
        match number {
            None => Err("Prometheus has no such series".to_owned()),
            Some(number) if number.is_finite() => Ok(number),
            Some(number) => Err(format!("Prometheus says {number}")),
        }
    }

    /// About how many requests were over the limit of each filter in the last five minutes, counted once a minute; nothing is known
    /// of filters whose statistics Prometheus does not have.
    pub(super) async fn limited(&self, key: &Key, filters: &[Filter]) -> HashMap<String, u64> {
        let Some(prometheus) = &self.prometheus else {
            return HashMap::new();
        };
        {
            let mut all = self.lock();
            let known = all.entry(key.clone()).or_default();
            if known.counted.is_some_and(|at| at.elapsed() < COUNT) {
                return known.counts.clone();
            }
            known.counted = Some(Instant::now());
        }
        let counts: HashMap<String, u64> = futures::stream::iter(filters)
            .map(async |filter| {
                let query = format!("sum(increase({}[5m]))", filter.over_limit);
                let count = prometheus.client().number(&query).await.ok().flatten()?;
                Some((filter.name.clone(), rounded(count)))
            })
            .buffer_unordered(SIDE_BY_SIDE)
            .filter_map(std::future::ready)
            .collect()
            .await;
        let mut all = self.lock();
        all.entry(key.clone())
            .or_default()
            .counts
            .clone_from(&counts);
        counts
    }

    /// How many requests all RateLimits rejected.
    pub(super) fn total(&self) -> u64 {
        self.lock()
            .values()
            .flat_map(|known| known.counts.values())
            .sum()
    }
}

/// To two digits: a status that says what is about so need not be written each time.
fn rounded(count: f64) -> u64 {
    let text = format!("{:.1e}", count.max(0.0));
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a number of requests"
    )]
    let rounded = text.parse::<f64>().unwrap_or(0.0).round() as u64;
    rounded
}

#[cfg(test)]
mod tests {
    #[test]
    fn counts_are_rounded() {
        let all = [0.0, 0.4, 7.2, 123.0, 98_765.4].map(super::rounded);
        assert_eq!(all, [0, 0, 7, 120, 99_000]);
    }
}
