//! What Prometheus says: the metrics of RateLimits, and how many requests were over a limit.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use futures::StreamExt;
use tokio::sync::mpsc;

use super::adapt::Reading;
use super::plan::Filter;
use super::tenant::{self, Policy};
use super::turns::Turns;
use super::valid::Limit;
use crate::metrics::Metrics;
use crate::observe::prometheus::Prometheus;
use crate::process::evaluate::within_deadline;
use crate::world::Key;

/// The bound of questions, in metrics: how many wait for their turn.
const BOUND: &str = "rate_limit_questions";

/// How many questions at once.
const SIDE_BY_SIDE: usize = 4;
/// How often it is counted what was limited.
const COUNT: Duration = Duration::from_secs(60);

/// Asks Prometheus for RateLimits.
#[derive(Clone)]
pub(super) struct Readings(Arc<Inner>);

struct Inner {
    prometheus: Option<Arc<Prometheus>>,
    policy: Policy,
    turns: Turns,
    metrics: Arc<Metrics>,
    /// Is told of each RateLimit that got an answer.
    wake: mpsc::UnboundedSender<Key>,
    of: Mutex<HashMap<Key, OfLimit>>,
}

/// What is known for one RateLimit.
#[derive(Debug, Default)]
struct OfLimit {
    /// Queries, each with the last answer, when it was asked and when there last was a number.
    metrics: HashMap<String, Asked>,
    /// The queries that are under way.
    out: HashSet<String>,
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

/// What is known of a RateLimit's metrics.
#[derive(Debug, Default)]
pub(super) struct Read {
    pub(super) readings: BTreeMap<String, Reading>,
    /// Whether newer answers are awaited: whoever wants them is woken then.
    pub(super) asking: bool,
}

impl Readings {
    pub(super) fn new(
        prometheus: Option<Arc<Prometheus>>,
        policy: Policy,
        metrics: Arc<Metrics>,
        wake: mpsc::UnboundedSender<Key>,
    ) -> Self {
        Self(Arc::new(Inner {
            prometheus,
            policy,
            metrics,
            wake,
            turns: Turns::default(),
            of: Mutex::default(),
        }))
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<Key, OfLimit>> {
        self.0.of.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn forget(&self, key: &Key) {
        self.lock().remove(key);
    }

    pub(super) fn policy(&self) -> &Policy {
        &self.0.policy
    }

    /// The metrics of a RateLimit, as they are known. Those older than `every` are asked for anew, which nobody waits for.
    pub(super) fn metrics(&self, limit: &Limit, every: Duration) -> Read {
        if self.0.policy.is_off() {
            let off = |name: &String| {
                let value = Err(tenant::OFF.to_owned());
                let missing_for = Duration::MAX;
                (name.clone(), Reading { value, missing_for })
            };
            let readings = limit.metrics.keys().map(off).collect();
            let asking = false;
            return Read { readings, asking };
        }
        let mut all = self.lock();
        let of = all.entry(limit.key.clone()).or_default();
        of.metrics
            .retain(|query, _| limit.metrics.values().any(|wanted| wanted == query));
        for query in limit.metrics.values() {
            let fresh = |asked: &Asked| asked.at.elapsed() < every;
            if !of.metrics.get(query).is_some_and(fresh) && of.out.insert(query.clone()) {
                let (readings, key, query) = (self.clone(), limit.key.clone(), query.clone());
                tokio::spawn(async move { readings.ask(key, query).await });
            }
        }
        let reading = |query: &String| {
            let asked = of.metrics.get(query)?;
            let missing_for = asked.missing_since.map(|since| since.elapsed());
            Some(Reading {
                value: asked.value.clone(),
                missing_for: missing_for.unwrap_or_default(),
            })
        };
        let readings = limit.metrics.iter();
        Read {
            readings: readings
                .filter_map(|(name, query)| Some((name.clone(), reading(query)?)))
                .collect(),
            asking: limit.metrics.values().any(|query| of.out.contains(query)),
        }
    }

    /// Asks one question, when its turn comes, and tells whoever wants to know.
    async fn ask(&self, key: Key, query: String) {
        let turn = self.0.turns.wait(&key.namespace).await;
        self.count_waiting();
        let value = if self.lock().contains_key(&key) {
            self.number(&query, &key.namespace).await
        } else {
            return;
        };
        drop(turn);
        let mut all = self.lock();
        let Some(of) = all.get_mut(&key) else {
            return;
        };
        of.out.remove(&query);
        let now = Instant::now();
        let before = of.metrics.get(&query).and_then(|asked| asked.missing_since);
        let missing_since = value.is_err().then(|| before.unwrap_or(now));
        let asked = Asked {
            at: now,
            value,
            missing_since,
        };
        of.metrics.insert(query, asked);
        drop(all);
        // Nobody works on it once this replica no longer leads.
        let _ = self.0.wake.send(key);
    }

    fn count_waiting(&self) {
        self.0.metrics.is_over(BOUND, self.0.turns.waiting());
    }

    async fn number(&self, query: &str, namespace: &str) -> Result<f64, String> {
        let Some(prometheus) = &self.0.prometheus else {
            return Err("Fenceline runs without --prometheus-url".to_owned());
        };
        let (policy, query, namespace) = (
            self.0.policy.clone(),
            query.to_owned(),
            namespace.to_owned(),
        );
        let question = within_deadline(move || policy.question(&query, &namespace));
        let question = question
            .await
            .map_err(|too_long| format!("reading the query {too_long}"))??;
        let number = prometheus.client().single(&question).await;
        number.map_err(|error| error.to_string())
    }

    /// About how many requests were over the limit of each filter in the last five minutes, counted once a minute; nothing is known
    /// of filters whose statistics Prometheus does not have.
    pub(super) async fn limited(&self, key: &Key, filters: &[Filter]) -> HashMap<String, u64> {
        let Some(prometheus) = &self.0.prometheus else {
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
