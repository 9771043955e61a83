//! What the leader does.

use std::sync::Arc;

use fenceline_crds::ServiceFence;
use futures::future::LocalBoxFuture;
use kube::runtime::reflector::Store;
use tokio::sync::mpsc;

use super::Parts;
use crate::apply::Writer;
use crate::args::Run;
use crate::clock;
use crate::deputy;
use crate::fence::arrival::Arrivals;
use crate::fence::retain::Retention;
use crate::fence::{self, Fences};
use crate::global_proxy;
use crate::policy;
use crate::ports;
use crate::process::{Controller, Pulse};
use crate::rate_limit;
use crate::router;
use crate::router::istiod::{Access, Istiods};
use crate::world::Key;
use crate::world::feed::Concerned;

/// A controller that is one function.
struct Task<F> {
    name: &'static str,
    begin: F,
}

impl<F> Controller for Task<F>
where
    F: Fn(Pulse) -> LocalBoxFuture<'static, ()> + Send + Sync,
{
    fn name(&self) -> &'static str {
        self.name
    }

    fn run<'a>(&'a self, pulse: &'a Pulse) -> LocalBoxFuture<'a, ()> {
        (self.begin)(pulse.clone())
    }
}

fn task<F, Begun>(name: &'static str, begin: F) -> Arc<dyn Controller>
where
    F: Fn(Pulse) -> Begun + Send + Sync + 'static,
    Begun: Future<Output = ()> + 'static,
{
    Arc::new(Task {
        name,
        begin: move |pulse| -> LocalBoxFuture<'static, ()> { Box::pin(begin(pulse)) },
    })
}

/// Every controller.
pub(super) fn all(
    parts: &Parts,
    args: &Run,
    writer: &Writer,
    stored: Store<ServiceFence>,
    concerned: mpsc::UnboundedReceiver<Concerned>,
) -> Vec<Arc<dyn Controller>> {
    let (world, settings) = (&parts.world, &parts.settings);
    let istiods = Arc::new(Istiods::new(access(parts, args)));
    let routers = Arc::new(routers(parts, writer, &istiods));
    let rate_limits = Arc::new(rate_limits(parts, args, writer, istiods));
    let policies = Arc::new(policies(parts, writer));
    let of = || (world.clone(), writer.clone(), settings.clone());
    let mut all = vec![
        fences(parts, writer, stored, concerned),
        task("ports", {
            let (world, writer, settings) = of();
            move |_| ports::run(world.clone(), writer.clone(), settings.clone())
        }),
        task("global proxy", {
            let (world, _, settings) = of();
            let status = Arc::clone(&parts.status);
            move |_| global_proxy::run(world.clone(), Arc::clone(&status), settings.clone())
        }),
        task("protected hosts", {
            let (world, writer, settings) = of();
            move |_| deputy::run(world.clone(), writer.clone(), settings.clone())
        }),
        task("policies", {
            let world = world.clone();
            move |pulse| policy::run(world.clone(), Arc::clone(&policies), pulse)
        }),
        task("routers", move |pulse| {
            router::run(Arc::clone(&routers), pulse)
        }),
        task("rate limits", move |pulse| {
            rate_limit::run(Arc::clone(&rate_limits), pulse)
        }),
    ];
    all.extend(of_prometheus(parts));
    all
}

/// Whoever asks Prometheus, where there is one, and forgets what was not called by its word.
fn of_prometheus(parts: &Parts) -> Vec<Arc<dyn Controller>> {
    let Some(prometheus) = parts.prometheus.clone() else {
        return Vec::new();
    };
    let retention = Arc::new(Retention {
        interval: prometheus.interval(),
        prometheus: Arc::clone(&prometheus),
        status: Arc::clone(&parts.status),
        clock: clock::system,
    });
    let (asked, forgotten) = (parts.world.clone(), parts.world.clone());
    vec![
        task("prometheus", move |_| {
            let (prometheus, world) = (Arc::clone(&prometheus), asked.clone());
            async move { prometheus.run(world).await }
        }),
        task("retention", move |_| {
            let (retention, world) = (Arc::clone(&retention), forgotten.clone());
            async move { retention.run(world).await }
        }),
    ]
}

fn fences(
    parts: &Parts,
    writer: &Writer,
    stored: Store<ServiceFence>,
    concerned: mpsc::UnboundedReceiver<Concerned>,
) -> Arc<dyn Controller> {
    let (arrivals, arrived) = Arrivals::new(Arc::clone(&parts.eyes));
    let context = fence::Context {
        world: parts.world.clone(),
        writer: writer.clone(),
        status: Arc::clone(&parts.status),
        learner: Arc::clone(&parts.learner),
        settings: parts.settings.clone(),
        metrics: Arc::clone(&parts.metrics),
        clock: clock::system,
        arrivals,
        recent: fence::RecentObjects::default(),
        prometheus: parts.prometheus.clone(),
        over: std::sync::Mutex::default(),
        failures: std::sync::Mutex::default(),
    };
    Arc::new(Fences::new(context, stored, concerned, arrived))
}

fn policies(parts: &Parts, writer: &Writer) -> policy::Context {
    policy::Context {
        writer: writer.clone(),
        status: Arc::clone(&parts.status),
        settings: parts.settings.clone(),
        prometheus: parts.prometheus.clone(),
        clock: clock::system,
    }
}

fn routers(parts: &Parts, writer: &Writer, istiods: &Arc<Istiods>) -> router::Context {
    router::Context {
        world: parts.world.clone(),
        writer: writer.clone(),
        status: Arc::clone(&parts.status),
        istiods: Arc::clone(istiods),
        settings: parts.settings.clone(),
        metrics: Arc::clone(&parts.metrics),
        clock: clock::system,
    }
}

fn rate_limits(
    parts: &Parts,
    args: &Run,
    writer: &Writer,
    istiods: Arc<Istiods>,
) -> rate_limit::Context {
    rate_limit::Context {
        world: parts.world.clone(),
        writer: writer.clone(),
        status: Arc::clone(&parts.status),
        settings: parts.settings.clone(),
        istiods,
        prometheus: parts.prometheus.clone(),
        policy: rate_limit::MetricsPolicy {
            metrics: args.rate_limit_metrics,
            label: args.rate_limit_metrics_label.clone(),
        },
        programs: Arc::clone(&parts.programs),
        metrics: Arc::clone(&parts.metrics),
        operator: Key::new(&*args.namespace, &*args.name),
        clock: clock::system,
    }
}

/// Who the operator is to istiod.
fn access(parts: &Parts, args: &Run) -> Access {
    let istiod = args.istiod.clone();
    Access {
        istio_namespace: parts.settings.root_namespace.clone(),
        server_name: istiod.istiod_name,
        token: istiod.istiod_token_file,
        root_certificate: istiod.istiod_ca_file,
        namespace: args.namespace.clone(),
        service_account: istiod.service_account,
        name: format!("{}-view", args.name),
        cluster: istiod.cluster,
        cluster_domain: parts.settings.cluster_domain.clone(),
    }
}
