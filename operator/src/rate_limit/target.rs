//! Whose proxies a RateLimit is for.

use fenceline_crds::{RateLimit, ServiceFence, Share};
use kube::ResourceExt;

use super::valid::{Limit, Place};
use crate::fence::Settings;
use crate::fence::select::{self, Labels, matches};
use crate::world::{Key, PodFacts, Proxy, World, in_namespace};

/// The pods of a RateLimit that run.
pub(super) fn pods<'a>(
    limit: &'a Limit,
    world: &'a World,
) -> impl Iterator<Item = (&'a Key, &'a PodFacts)> {
    let all = limit.everywhere.then(|| world.pods.iter());
    let of_namespace = (!limit.everywhere).then(|| in_namespace(&world.pods, &limit.key.namespace));
    let pods = all
        .into_iter()
        .flatten()
        .chain(of_namespace.into_iter().flatten());
    pods.map(|(key, pod)| (key, pod.as_ref()))
        .filter(|(_, pod)| pod.runs && matches(&limit.labels, &pod.labels))
}

/// What there is to be said of the pods.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Pods {
    pub(super) ready: u32,
    /// How many have no proxy of their own, of how many.
    without: Option<(usize, usize, Proxy)>,
}

impl Pods {
    pub(super) fn of(limit: &Limit, world: &World) -> Self {
        let all: Vec<&PodFacts> = pods(limit, world).map(|(_, pod)| pod).collect();
        let without: Vec<Proxy> = all
            .iter()
            .map(|pod| pod.proxy)
            .filter(|proxy| *proxy != Proxy::Sidecar)
            .collect();
        let ready = all.iter().filter(|pod| pod.ready).count();
        Self {
            ready: u32::try_from(ready).unwrap_or(u32::MAX),
            without: without
                .first()
                .map(|proxy| (without.len(), all.len(), *proxy)),
        }
    }

    /// What an operator should know of them.
    pub(super) fn remark(&self) -> Option<String> {
        match self.without {
            Some((without, all, proxy)) => Some(format!(
                "{without} of its {all} pods {}, and limit nothing",
                proxy.why()
            )),
            None if self.ready == 0 => Some("no pod of it is ready at the moment".to_owned()),
            None => None,
        }
    }
}

/// Whose proxies count, in words.
pub(super) fn words(limit: &Limit, object: &RateLimit) -> String {
    let spec = &object.spec;
    let labels = || {
        let labels = limit
            .labels
            .iter()
            .map(|(label, value)| format!("{label}={value}"));
        labels.collect::<Vec<_>>().join(",")
    };
    let whose = match (&spec.target.service, limit.place) {
        (Some(service), _) => service.clone(),
        (None, Place::Gateway) => format!("gateway {}", labels()),
        (None, Place::Inbound | Place::Outbound) => labels(),
    };
    match &spec.to {
        Some(to) => format!("{whose} to {to}"),
        None => whose,
    }
}

/// Whether a fence's pods ask the rate limit service.
pub(crate) fn asks_the_service(fence: &ServiceFence, world: &World, settings: &Settings) -> bool {
    if world.rate_limits.is_empty() {
        return false;
    }
    let namespace = fence.namespace().unwrap_or_default();
    let of_namespace = in_namespace(&world.rate_limits, &namespace);
    let of_mesh = in_namespace(&world.rate_limits, &settings.root_namespace);
    let mut asking = of_namespace
        .chain(of_mesh)
        .map(|(_, limit)| limit)
        .filter(|limit| limit.spec.share == Share::Global && limit.spec.target.gateway.is_none())
        .filter_map(|limit| labels(limit, world));
    let Ok(fenced) = select::labels(fence, world) else {
        return false;
    };
    asking.any(|limited| {
        let mut pods = select::pods_of(world, &namespace, &fenced).peekable();
        if pods.peek().is_none() {
            // While none runs, by what their labels will be at least.
            return matches(&limited, &fenced) || matches(&fenced, &limited);
        }
        pods.any(|pod| matches(&limited, &pod.labels))
    })
}

fn labels(limit: &RateLimit, world: &World) -> Option<Labels> {
    let target = &limit.spec.target;
    if let Some(selector) = &target.selector {
        return Some(selector.match_labels.clone());
    }
    let service = Key::new(limit.namespace()?, target.service.as_deref()?);
    let facts = world.services.get(&service)?;
    (!facts.selector.is_empty()).then(|| facts.selector.clone())
}

/// By how many replicas a limit is divided: with more of them at once, so that it is never exceeded; with fewer only once it has been so for a
/// while, since a rollout has one more and one less in turn; and not at all for one in twenty.
pub(super) fn shared_by(current: Option<u32>, ready: u32, fewer_for: std::time::Duration) -> u32 {
    /// How long a rollout may take from one pod to the next.
    const SETTLED: std::time::Duration = std::time::Duration::from_secs(30);
    let ready_or_one = ready.max(1);
    let Some(current) = current.filter(|current| *current > 0) else {
        return ready_or_one;
    };
    let off = current.abs_diff(ready_or_one);
    if u64::from(off) * 20 < u64::from(current) {
        return current;
    }
    if ready_or_one < current && (ready == 0 || fewer_for < SETTLED) {
        return current;
    }
    ready_or_one
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    use crate::testing::{fence, pod, service, settings, world, yaml};

    #[test]
    fn a_quota_is_divided_by_the_replicas() {
        let (now, later) = (Duration::ZERO, Duration::from_secs(30));
        assert_eq!(shared_by(None, 0, now), 1);
        assert_eq!(shared_by(None, 3, now), 3);
        assert_eq!(shared_by(Some(2), 4, now), 4, "more, at once");
        assert_eq!(shared_by(Some(4), 3, now), 4, "fewer, not at once");
        assert_eq!(shared_by(Some(4), 3, later), 3);
        assert_eq!(shared_by(Some(4), 0, later), 4, "all away: they come back");
        assert_eq!(
            (
                shared_by(Some(100), 104, now),
                shared_by(Some(100), 105, now)
            ),
            (100, 105)
        );
    }

    #[test]
    fn who_asks_the_rate_limit_service_has_it_in_scope() {
        let mut mesh = world();
        for name in ["cart", "front"] {
            service(&mut mesh, "shop", name, "{}");
            pod(&mut mesh, "shop", name, "10.1.0.1");
        }
        let asks = |mesh: &World, name: &str| {
            let fence = fence("shop", name, &format!("{{workload: {{service: {name}}}}}"));
            asks_the_service(&fence, mesh, &settings())
        };
        assert!(!asks(&mesh, "cart"));
        let spec = "{target: {service: cart}, share: Global, rules: [{name: all, limit: {requests: 1, per: 1s}}]}";
        let mut limit = RateLimit::new("limit", yaml(spec));
        limit.metadata.namespace = Some("shop".into());
        mesh.rate_limits
            .insert(Key::new("shop", "limit"), limit.into());
        assert!(asks(&mesh, "cart") && !asks(&mesh, "front"));
    }
}
