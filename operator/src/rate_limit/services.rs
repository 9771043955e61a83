//! What the rate limit services have of each Global RateLimit. A service is connected to any replica of Fenceline, which notes in
//! `status.services` what it accepted and what not, under a field manager of its own; the leader goes by that.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use envoy_types::pb::ratelimit::config::ratelimit::v3::RateLimitConfig;
use fenceline_crds::{LimitServiceStatus, RateLimit, RuleStatus, Share};
use prost::Message;
use tokio::sync::{Notify, watch};

use super::report::Standing;
use super::valid::Limit;
use super::{global, plan};
use crate::router::plan::short_hash;
use crate::status::StatusWriter;
use crate::world::{Key, World};

/// How long what was written may take to come back by the watch.
const SHOWN_WITHIN: Duration = Duration::from_secs(5);
/// How long changes wait for company.
const COALESCE: Duration = Duration::from_millis(100);

/// A configuration, in short.
pub(super) fn hash(config: &RateLimitConfig) -> String {
    short_hash(&format!("{:?}", config.encode_to_vec()))
}

/// What the services must know of a RateLimit.
pub(super) fn config(limit: &Limit, rules: &[RuleStatus]) -> RateLimitConfig {
    global::config(limit, |rule| plan::effective(rule, rules))
}

/// Where a Global RateLimit stands whose proxies have it; nothing where every service has it too.
pub(super) fn standing(
    object: &RateLimit,
    limit: &Limit,
    rules: &[RuleStatus],
) -> Option<Standing> {
    let services = object
        .status
        .as_ref()
        .map(|status| status.services.as_slice())
        .unwrap_or_default();
    if services.is_empty() {
        return Some(Standing::NoService);
    }
    let wanted = hash(&config(limit, rules));
    let lacks = services
        .iter()
        .find(|service| service.accepted.as_deref() != Some(&*wanted))?;
    Some(match &lacks.error {
        Some(why) => Standing::Refused(format!(
            "rate limit service {} does not take it in, and goes on with what it had: {why}",
            lacks.name
        )),
        None => Standing::OnTheWay(
            format!("rate limit service {} has not got it", lacks.name),
            true,
        ),
    })
}

/// The entries that are a replica's.
fn of_replica<'a>(
    object: &'a RateLimit,
    replica: &str,
) -> impl Iterator<Item = &'a LimitServiceStatus> {
    let services = object
        .status
        .as_ref()
        .map(|status| status.services.as_slice());
    services
        .unwrap_or_default()
        .iter()
        .filter(move |service| replica_of(&service.name) == replica)
}

fn replica_of(name: &str) -> &str {
    name.rsplit_once('@').map_or("", |(_, replica)| replica)
}

/// Takes away what replicas noted that are gone.
pub(super) async fn sweep(object: &RateLimit, status: &StatusWriter, gone: impl Fn(&str) -> bool) {
    let services = object.status.iter().flat_map(|status| &status.services);
    let replicas: std::collections::BTreeSet<&str> =
        services.map(|service| replica_of(&service.name)).collect();
    for replica in replicas.into_iter().filter(|replica| gone(replica)) {
        if let Err(error) = status.limit_services(object, replica, &[]).await {
            tracing::warn!(replica, %error, "what a former replica noted");
        }
    }
}

/// What the services of one replica have, of each RateLimit by its domain.
type Of = BTreeMap<String, LimitServiceStatus>;

/// Notes what the services have that are connected to this replica.
#[derive(Debug, Default)]
pub struct Ledger {
    services: Mutex<BTreeMap<String, Of>>,
    changed: Notify,
}

impl Ledger {
    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, Of>> {
        self.services.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A service came; gives the name that it has from now on.
    pub(super) fn enter(&self, node: &str, replica: &str) -> String {
        let mut services = self.lock();
        let name = |number: usize| match number {
            1 => format!("{node}@{replica}"),
            _ => format!("{node}#{number}@{replica}"),
        };
        let mut number = 1;
        while services.contains_key(&name(number)) {
            number += 1;
        }
        services.insert(name(number), Of::new());
        name(number)
    }

    pub(super) fn set(&self, service: &str, of: Of) {
        if let Some(known) = self.lock().get_mut(service) {
            *known = of;
        }
        self.changed.notify_one();
    }

    pub(super) fn leave(&self, service: &str) {
        self.lock().remove(service);
        self.changed.notify_one();
    }

    fn of_limit(&self, domain: &str) -> Vec<LimitServiceStatus> {
        let services = self.lock();
        services
            .values()
            .filter_map(|of| of.get(domain).cloned())
            .collect()
    }

    /// Writes what changed for as long as it is polled: every replica does.
    pub async fn run(
        &self,
        mut world: watch::Receiver<Arc<World>>,
        status: &StatusWriter,
        replica: &str,
    ) {
        let mut wrote: HashMap<Key, (Instant, Vec<LimitServiceStatus>)> = HashMap::new();
        loop {
            let now = Arc::clone(&world.borrow_and_update());
            let global = now
                .rate_limits
                .iter()
                .filter(|(_, limit)| limit.spec.share == Share::Global);
            for (key, object) in global {
                let mine = self.of_limit(&global::name(key));
                let stored: Vec<LimitServiceStatus> =
                    of_replica(object, replica).cloned().collect();
                let again = wrote
                    .get(key)
                    .is_none_or(|(at, written)| at.elapsed() > SHOWN_WITHIN || *written != mine);
                if mine == stored || !again {
                    continue;
                }
                match status.limit_services(object, replica, &mine).await {
                    Ok(()) => drop(wrote.insert(key.clone(), (Instant::now(), mine))),
                    Err(error) => {
                        tracing::warn!(rate_limit = %key, %error, "what rate limit services have")
                    }
                }
            }
            wrote.retain(|key, _| now.rate_limits.contains_key(key));
            tokio::select! {
                () = self.changed.notified() => {}
                changed = world.changed() => if changed.is_err() { return },
                () = tokio::time::sleep(SHOWN_WITHIN * 2) => {}
            }
            tokio::time::sleep(COALESCE).await;
        }
    }
}
