//! What `/metrics` shows. Labels are few and bounded: never the name of an object.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64};

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};
use tokio::sync::Notify;

use crate::world::World;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Kind {
    kind: &'static str,
}

pub fn kind(kind: &'static str) -> Kind {
    Kind { kind }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Write {
    kind: &'static str,
    verb: &'static str,
    outcome: &'static str,
}

pub fn write(kind: &'static str, verb: &'static str, ok: bool) -> Write {
    Write {
        kind,
        verb,
        outcome: if ok { "ok" } else { "error" },
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Outcome {
    outcome: &'static str,
}

pub fn outcome(outcome: &'static str) -> Outcome {
    Outcome { outcome }
}

/// A bound of docs/bounds.md.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Bound {
    bound: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Task {
    task: &'static str,
}

/// The process's metrics.
#[derive(Debug)]
pub struct Metrics {
    pub writes: Family<Write, Counter>,
    /// What became of what the global proxy reported, by outcome.
    pub observations: Family<Outcome, Counter>,
    pub global_proxy_endpoints: Gauge,
    /// Writes that wait for the budget.
    pub writes_waiting: Gauge,
    /// Whether Prometheus answers, and knows something.
    pub prometheus: Gauge,
    /// What became of first calls.
    pub first_calls: Family<Outcome, Counter>,
    /// Requests that rate limits rejected in the last five minutes, by Prometheus.
    pub limited: Gauge,
    /// RateLimits that are not in force as they say.
    pub unready_limits: Gauge,
    /// Calls that are held now.
    pub held: Gauge,
    /// How long calls were held each time, before they were sent back.
    pub held_for: Histogram,
    /// Streams that were not the global proxy's.
    pub refused_streams: Counter,
    pub watch_errors: Family<Kind, Counter>,
    pub objects: Family<Kind, Gauge>,
    pub leader: Gauge<i64, std::sync::atomic::AtomicI64>,
    pub reconcile_errors: Counter,
    /// Tasks that do not come back.
    pub stalled: Family<Task, Gauge>,
    /// Objects that were quarantined since the process began.
    pub quarantined: Counter,
    /// How much is over a bound at the moment: objects, namespaces or hosts, as docs/bounds.md says of each.
    pub over_bound: Family<Bound, Gauge>,
    /// How often something was dropped or refused since it was over a bound.
    pub dropped: Family<Bound, Counter>,
    /// From an access log entry's arrival to the Sidecar being stored.
    pub learning: Histogram,
    /// Writes of learnt dependencies that wait for the API.
    pub waiting: Gauge<f64, AtomicU64>,
    pub api: ApiHealth,
}

impl Default for Metrics {
    fn default() -> Self {
        Self {
            writes: Family::default(),
            observations: Family::default(),
            global_proxy_endpoints: Gauge::default(),
            writes_waiting: Gauge::default(),
            prometheus: Gauge::default(),
            first_calls: Family::default(),
            limited: Gauge::default(),
            unready_limits: Gauge::default(),
            held: Gauge::default(),
            held_for: Histogram::new(exponential_buckets(0.005, 1.5, 20)),
            refused_streams: Counter::default(),
            watch_errors: Family::default(),
            objects: Family::default(),
            leader: Gauge::default(),
            reconcile_errors: Counter::default(),
            stalled: Family::default(),
            quarantined: Counter::default(),
            over_bound: Family::default(),
            dropped: Family::default(),
            learning: Histogram::new(exponential_buckets(0.005, 1.5, 16)),
            waiting: Gauge::default(),
            api: ApiHealth::default(),
        }
    }
}

impl Metrics {
    /// The registry that `/metrics` shows.
    pub fn registry(&self) -> Registry {
        let Self {
            writes,
            observations,
            global_proxy_endpoints,
            writes_waiting,
            prometheus,
            first_calls,
            limited,
            unready_limits,
            held,
            held_for,
            refused_streams,
            watch_errors,
            objects,
            leader,
            reconcile_errors,
            stalled,
            quarantined,
            over_bound,
            dropped,
            learning,
            waiting,
            api: _,
        } = self;
        let mut registry = Registry::with_prefix("fenceline");
        registry.register(
            "api_writes",
            "Requests to the API that write",
            writes.clone(),
        );
        let help = "Access log entries, by what became of them";
        registry.register("observations", help, observations.clone());
        registry.register(
            "global_proxy_endpoints",
            "Ready endpoints of the global proxy",
            global_proxy_endpoints.clone(),
        );
        let help = "Writes of objects that wait for the write budget";
        registry.register("writes_waiting", help, writes_waiting.clone());
        let help = "Whether Prometheus answers and knows requests of fenced workloads";
        registry.register("prometheus_healthy", help, prometheus.clone());
        let help = "First calls, by what became of them";
        registry.register("first_calls", help, first_calls.clone());
        let help = "Requests over a rate limit in the last five minutes, by Prometheus";
        registry.register("limited_requests", help, limited.clone());
        let help = "RateLimits that are not in force as they say";
        registry.register("unready_rate_limits", help, unready_limits.clone());
        registry.register("held_calls", "First calls that are held now", held.clone());
        let help = "How long first calls were held before they were sent back";
        registry.register_with_unit("held", help, Unit::Seconds, held_for.clone());
        let help = "Requests refused, since they were not the global proxy's";
        registry.register("refused_streams", help, refused_streams.clone());
        registry.register(
            "watch_errors",
            "Interruptions of watches",
            watch_errors.clone(),
        );
        registry.register(
            "objects",
            "Objects in the snapshot of the mesh",
            objects.clone(),
        );
        registry.register("leader", "1 on the replica that acts", leader.clone());
        registry.register(
            "reconcile_errors",
            "Failed reconciliations",
            reconcile_errors.clone(),
        );
        let help = "1 for a task that did not come back for 30 s: this replica gave up its Lease";
        registry.register("stalled", help, stalled.clone());
        let help = "Objects that were quarantined, since their evaluation took too long";
        registry.register("quarantined", help, quarantined.clone());
        let help = "What is over a bound at the moment, by bound";
        registry.register("over_bound", help, over_bound.clone());
        let help = "What was dropped or refused since it was over a bound, by bound";
        registry.register("dropped", help, dropped.clone());
        let help = "From an access log entry's arrival to its host being stored in a Sidecar";
        registry.register_with_unit("learning", help, Unit::Seconds, learning.clone());
        let help = "Learnt dependencies that are not stored yet";
        registry.register("unsaved_dependencies", help, waiting.clone());
        registry
    }

    /// A task does not come back.
    pub fn stalls(&self, task: &'static str) {
        self.stalled.get_or_create(&Task { task }).set(1);
    }

    /// So much is over a bound now.
    pub fn is_over(&self, bound: &'static str, count: usize) {
        let count = i64::try_from(count).unwrap_or(i64::MAX);
        self.over_bound.get_or_create(&Bound { bound }).set(count);
    }

    /// Something was dropped or refused, since it was over a bound.
    pub fn drop_over(&self, bound: &'static str) {
        self.dropped.get_or_create(&Bound { bound }).inc();
    }

    /// Something was reported, with this outcome.
    pub fn observed(&self, became: &'static str) {
        self.observations.get_or_create(&outcome(became)).inc();
    }

    pub fn observe_world(&self, world: &World) {
        let policies = world.policies.values();
        let unreadable = policies.filter(|policy| policy.unreadable).count();
        self.is_over("unreadable_policies", unreadable);
        let endpoints = i64::try_from(world.global_proxy_endpoints()).unwrap_or(i64::MAX);
        self.global_proxy_endpoints.set(endpoints);
        for (name, count) in [
            ("Namespace", world.namespaces.len()),
            ("Service", world.services.len()),
            ("ServiceEntry", world.service_entries.len()),
            ("VirtualService", world.virtual_services.len()),
            ("AuthorizationPolicy", world.policies.len()),
            ("Pod", world.pods.len()),
            ("Sidecar", world.sidecars.len()),
            ("EnvoyFilter", world.envoy_filters.len()),
            ("ServiceFence", world.fences.len()),
            ("FencePolicy", world.fence_policies.len()),
            ("Router", world.routers.len()),
            ("TrafficPatch", world.traffic_patches.len()),
            ("RateLimit", world.rate_limits.len()),
            ("DestinationRule", world.rules.len()),
        ] {
            let count = i64::try_from(count).unwrap_or(i64::MAX);
            self.objects.get_or_create(&kind(name)).set(count);
        }
    }
}

/// Whether kube-apiserver answers, as far as we know. A watch that fails says no; only an answer says yes again, since
/// a quiet watch says nothing.
#[derive(Clone, Debug, Default)]
pub struct ApiHealth {
    down: Arc<AtomicBool>,
    changed: Arc<Notify>,
}

impl ApiHealth {
    pub fn failed(&self) {
        self.down.store(true, std::sync::atomic::Ordering::Relaxed);
        self.changed.notify_one();
    }

    /// Takes a failed request as a sign, unless the API answered it.
    pub fn check(&self, error: &kube::Error) {
        if !matches!(error, kube::Error::Api(_)) {
            self.failed();
        }
    }

    pub fn is_up(&self) -> bool {
        !self.down.load(std::sync::atomic::Ordering::Relaxed)
    }

    /// Asks the API, after each failure, until it answers.
    pub async fn probe(self, client: kube::Client) {
        loop {
            self.changed.notified().await;
            while crate::apply::within(client.apiserver_version())
                .await
                .is_err()
            {
                tokio::time::sleep(std::time::Duration::from_millis(500)).await;
            }
            self.down.store(false, std::sync::atomic::Ordering::Relaxed);
            tracing::info!("kube-apiserver answers again");
        }
    }
}
