//! What proxies made of a RateLimit: every istiod is asked what each has acknowledged and what it refused, and of which version it is.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use fenceline_crds::Share;
use tokio::sync::Mutex;

use super::plan::{Filter, PREFIX, STAT_PREFIX};
use super::target;
use super::valid::{Limit, Rule};
use crate::router::istiod::{Istiods, Kind, ProxyState, Push};
use crate::world::World;

/// What every istiod says of its proxies, or why it cannot be asked.
pub(super) type Said = BTreeMap<IpAddr, Result<Vec<ProxyState>, String>>;
/// The last push of each istiod, before something was written.
pub(super) type Before = BTreeMap<IpAddr, Push>;

/// Asks, but not again for what was just answered: hundreds of RateLimits may want to know.
#[derive(Debug)]
pub(super) struct Proxies {
    istiods: Arc<Istiods>,
    last: Mutex<Option<(Instant, Arc<Said>)>>,
}

impl Proxies {
    pub(super) fn new(istiods: Arc<Istiods>) -> Self {
        Self {
            istiods,
            last: Mutex::default(),
        }
    }

    /// What istiods said no longer ago than this.
    pub(super) async fn said(&self, world: &World, no_older_than: Duration) -> Arc<Said> {
        let mut last = self.last.lock().await;
        if let Some((at, said)) = &*last
            && at.elapsed() <= no_older_than
        {
            return Arc::clone(said);
        }
        let mut said = Said::new();
        for istiod in self.istiods.known(world) {
            said.insert(istiod, self.istiods.proxies(istiod).await);
        }
        let said = Arc::new(said);
        *last = Some((Instant::now(), Arc::clone(&said)));
        said
    }
}

/// The last push of each istiod.
pub(super) fn before(said: &Said) -> Before {
    let pushes = said.iter().filter_map(|(istiod, proxies)| {
        let last = proxies
            .as_ref()
            .ok()?
            .iter()
            .filter_map(ProxyState::latest)
            .max()?;
        Some((*istiod, last))
    });
    pushes.collect()
}

/// How far a RateLimit has come.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Seen {
    /// So many proxies have it.
    Everywhere(usize),
    Waits(String),
    /// Which proxies, and why.
    Refused(String),
    /// Nobody can be asked.
    Unknown(String),
}

/// Which of a RateLimit's proxies have what was written after `before`; without it, those that have anything.
pub(super) fn look(
    limit: &Limit,
    filters: &[Filter],
    world: &World,
    said: &Said,
    before: Option<&Before>,
) -> Seen {
    const NAMED: usize = 3;
    if said.is_empty() {
        return Seen::Unknown("no istiod is known".to_owned());
    }
    let mut waiting = Vec::new();
    let mut refused = Vec::new();
    let mut have = 0;
    for (istiod, proxies) in said {
        let proxies = match proxies {
            Ok(proxies) => proxies,
            Err(why) => return Seen::Unknown(why.clone()),
        };
        let since = before.map(|before| before.get(istiod).copied().unwrap_or_default());
        for proxy in concerned(limit, world, proxies) {
            if let Some(why) = refusal(proxy, filters, since) {
                refused.push(format!("{}: {why}", proxy.id));
            } else if filters.is_empty() || proxy.acknowledged(Kind::Extensions) > since {
                have += 1;
            } else {
                waiting.push(proxy.id.clone());
            }
        }
    }
    let few = |names: &[String]| names[..names.len().min(NAMED)].join(", ");
    if !refused.is_empty() {
        return Seen::Refused(format!(
            "{} proxies refused it: {}",
            refused.len(),
            few(&refused)
        ));
    }
    if !waiting.is_empty() {
        let all = waiting.len() + have;
        return Seen::Waits(format!(
            "{} of {all} proxies have not got it: {}",
            waiting.len(),
            few(&waiting)
        ));
    }
    Seen::Everywhere(have)
}

/// Why a proxy refuses these filters: it names one of them, or it refuses what was pushed `since`, and names nobody else's.
fn refusal<'a>(proxy: &'a ProxyState, filters: &[Filter], since: Option<Push>) -> Option<&'a str> {
    [Kind::Extensions, Kind::Listeners]
        .into_iter()
        .find_map(|kind| {
            let why = proxy.refused(kind)?;
            // Envoy tells whose it is by the filter's name, or by printing all of it.
            let names =
                |filter: &Filter| why.contains(&filter.name) || why.contains(&filter.stat_prefix);
            let named = filters.iter().any(names);
            let others = why.contains(PREFIX) || why.contains(STAT_PREFIX);
            let new = since.is_some_and(|since| proxy.sent(kind) > Some(since));
            (named || (new && !others)).then(|| reason(why))
        })
}

/// Where Envoy prints what it refuses, the reason comes last.
fn reason(why: &str) -> &str {
    let last = why
        .lines()
        .rev()
        .map(str::trim)
        .find(|line| !line.is_empty());
    last.unwrap_or(why).trim_start_matches([':', ' '])
}

fn concerned<'a>(limit: &Limit, world: &World, proxies: &'a [ProxyState]) -> Vec<&'a ProxyState> {
    let pods: std::collections::HashSet<_> = target::pods(limit, world)
        .map(|(key, _)| key.clone())
        .collect();
    proxies
        .iter()
        .filter(|proxy| proxy.pod().is_some_and(|pod| pods.contains(&pod)))
        .collect()
}

/// A version of Istio.
type Version = (u32, u32);

/// What a RateLimit wants of its proxies, each with the first version of Istio whose proxies can do it.
/// (istio/proxy's ENVOY_VERSION by release; Envoy's fields by tag of go-control-plane)
fn wants(limit: &Limit) -> Vec<(String, Version)> {
    let mut wants = vec![("limits inside one filter".to_owned(), (1, 25))];
    if limit.share == Share::Global {
        wants.push(("share: Global".to_owned(), (1, 28)));
    }
    let has = |rule: &Rule, key: &str| rule.parts.iter().any(|part| part.key == key);
    for rule in &limit.rules {
        if rule.parts.iter().any(|part| part.value.is_none()) {
            wants.push((format!("rules[{}].by", rule.name), (1, 26)));
        }
        if has(rule, "address") {
            wants.push((format!("rules[{}].match.cidrs", rule.name), (1, 30)));
        }
    }
    wants
}

/// What the oldest proxies of a RateLimit cannot do, in words.
pub(super) fn unsupported(limit: &Limit, world: &World, said: &Said) -> Option<String> {
    let proxies = said.values().filter_map(|proxies| proxies.as_ref().ok());
    let concerned = proxies.flat_map(|proxies| concerned(limit, world, proxies));
    // A build that says no version is somebody's own, and new.
    let versions = concerned.filter_map(|proxy| Some((version(&proxy.istio_version)?, proxy)));
    let (oldest, proxy) = versions.min_by_key(|(version, _)| *version)?;
    let wants = wants(limit)
        .into_iter()
        .filter(|(_, first)| oldest < *first);
    let (what, (major, minor)) = wants.max_by_key(|(_, first)| *first)?;
    Some(format!(
        "{what} needs proxies of Istio {major}.{minor} or newer, and {} has {}",
        proxy.id, proxy.istio_version
    ))
}

fn version(text: &str) -> Option<Version> {
    let mut numbers = text.split(['.', '-']);
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use fenceline_crds::RateLimit;
    use serde_json::json;

    use crate::rate_limit::plan::{InForce, filters};
    use crate::rate_limit::valid;
    use crate::testing::{pod, service, world, yaml};

    fn mesh() -> World {
        let mut world = world();
        service(&mut world, "shop", "cart", "{}");
        pod(&mut world, "shop", "cart", "10.1.0.1");
        pod(&mut world, "shop", "front", "10.1.0.2");
        world
    }

    fn limit(world: &World, rule: &str) -> Limit {
        let spec = format!(
            "{{target: {{service: cart}}, rules: [{{name: a, limit: {{requests: 1, per: 1s}}, {rule}}}]}}"
        );
        let mut object = RateLimit::new("limit", yaml(&spec));
        object.metadata.namespace = Some("shop".into());
        valid::limit(&object, world, "istio-system", &Default::default()).unwrap()
    }

    /// A proxy that was sent one push and acknowledged another, with an error and a version.
    fn said(sent: u64, acked: u64, error: &str, version: &str) -> Said {
        let nonce = |push: u64| format!("t/{push}0c1d0c6e-7c1a-4f0a-9b1d-3a5f5b0b2a1{push}");
        let proxy = |name: &str| {
            json!({"proxy": format!("{name}.shop"), "istio_version": version, "resources": {
                Kind::Extensions.type_url(): {"sent": nonce(sent), "acked": nonce(acked), "lastError": error},
            }})
        };
        let proxies = serde_json::from_value(json!([proxy("cart"), proxy("front")])).unwrap();
        [("10.0.0.1".parse().unwrap(), Ok(proxies))].into()
    }

    #[test]
    fn a_limit_has_arrived_once_its_own_proxies_acknowledged_a_later_push() {
        let world = mesh();
        let limit = limit(&world, "shadow: false");
        let in_force = InForce {
            rules: &[],
            replicas: 1,
            cluster: "c",
        };
        let filters = filters(&limit, &in_force);
        let before = before(&said(3, 3, "", ""));
        let look = |said: &Said| look(&limit, &filters, &world, said, Some(&before));
        assert!(matches!(look(&said(3, 3, "", "")), Seen::Waits(_)));
        assert_eq!(
            look(&said(4, 4, "", "")),
            Seen::Everywhere(1),
            "the other is no proxy of it"
        );
        let ours = look(&said(
            4,
            3,
            "fenceline.dev/rate-limit/shop/limit/a: bad",
            "",
        ));
        assert!(matches!(ours, Seen::Refused(why) if why.contains("cart.shop: ")));
        let unnamed = look(&said(4, 3, "bad", ""));
        assert!(matches!(unnamed, Seen::Refused(_)));
        let others = look(&said(
            4,
            3,
            "fenceline.dev/rate-limit/shop/other/a: bad",
            "",
        ));
        assert!(
            matches!(others, Seen::Waits(_)),
            "it is not ours to take back"
        );
        let printed = "goo.gle\nstat_prefix: \"fenceline_shop_other_0\"\n: Proto constraint";
        assert!(matches!(look(&said(4, 3, printed, "")), Seen::Waits(_)));
        let ours = printed.replace("fenceline_shop_other_0", &filters[0].stat_prefix);
        let ours = look(&said(4, 3, &ours, ""));
        assert_eq!(
            ours,
            Seen::Refused("1 proxies refused it: cart.shop: Proto constraint".into())
        );
    }

    #[test]
    fn what_old_proxies_cannot_do() {
        let world = mesh();
        let plain = limit(&world, "shadow: false");
        let says =
            |limit: &Limit, version: &str| unsupported(limit, &world, &said(1, 1, "", version));
        assert_eq!(says(&plain, "1.28.1"), None);
        assert_eq!(says(&plain, "unknown"), None);
        assert!(says(&plain, "1.24.0").unwrap().contains("1.25"));
        let cidrs = limit(&world, "match: {cidrs: [10.0.0.0/8]}");
        let why = says(&cidrs, "1.29.3").unwrap();
        assert!(
            why.contains("match.cidrs needs proxies of Istio 1.30") && why.contains("cart.shop"),
            "{why}"
        );
        assert_eq!(says(&cidrs, "1.30.0-rc.1"), None);
    }
}
