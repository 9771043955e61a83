//! Whether a step of a change has arrived: at every istiod, and at every proxy that has the host in scope.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use fenceline_crds::istio::Sidecar;
use fenceline_crds::{Change, Verify};
use tokio::sync::watch;

use super::istiod::{Istiods, Kind, ProxyState, Wanted};
use super::votes::{Skipped, Votes};
use crate::fence::select::{matches, sidecars_in};
use crate::world::{Key, PodFacts, Proxy, World};

/// How often is asked, at first; then more and more rarely.
const ASK: Duration = Duration::from_millis(50);
const ASK_RARELY: Duration = Duration::from_secs(1);
/// How long an istiod may take until it can be asked at all.
const REACHABLE: Duration = Duration::from_secs(5);
/// Proxies take what istiod has sent within moments; where they are not asked, so long is allowed.
const TAKEN_IN: Duration = Duration::from_secs(1);
/// A proxy that is connected to no istiod looks for another, and gets everything at once from that: it is waited for so long.
/// (Envoy's longest pause between two attempts)
const BETWEEN: Duration = Duration::from_secs(30);
/// How many proxies a message names.
const NAMED: usize = 5;
/// How often those that were skipped are looked at again: each look is an answer of istiod's for all of its proxies.
const SKIPPED_AGAIN: Duration = Duration::from_secs(30);

/// What is waited for.
#[derive(Clone, Debug)]
pub struct Expectation {
    pub service: Key,
    pub fqdn: String,
    /// What istiod sends of it; one of these at least.
    pub wanted: Vec<Wanted>,
    /// Namespaces whose proxies do not get it, since somebody's rule hides it from them there.
    pub hidden: BTreeSet<String>,
    /// Namespaces without whose proxies a step has not arrived: the service's own, those that the Router names as callers, and the operator's.
    /// The global proxy is of the last, has everything in scope, and so refuses what any Envoy would.
    pub owners: BTreeSet<String>,
}

impl Expectation {
    /// What proxies must have acknowledged.
    pub(super) fn kinds(&self) -> BTreeSet<Kind> {
        let kinds = self.wanted.iter().map(|wanted| wanted.kind);
        kinds
            // A new cluster takes no requests until it has its endpoints.
            .flat_map(|kind| match kind {
                Kind::Clusters => vec![Kind::Clusters, Kind::Endpoints],
                other => vec![other],
            })
            .collect()
    }
}

/// What is known of a step that has arrived, as far as anybody could be asked.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Known {
    /// There was nothing in it by which proxies are seen to have it.
    Nothing,
    /// Status said so before this replica led.
    AsSaid,
    Everywhere,
    /// Istiods were asked, proxies were not.
    Sent,
    /// Nobody could be asked.
    Unknown(String),
    /// Everywhere but at these, which is never forgotten over something else: what they lead to stays.
    But(Skipped),
}

impl Known {
    /// Of several steps: what is known least of.
    pub fn of_all(steps: impl Iterator<Item = Self>) -> Self {
        steps.max().unwrap_or(Self::Nothing)
    }

    /// In words.
    pub fn say(&self) -> String {
        match self {
            Self::Nothing => "it is written; it has no new cluster and no route by which proxies would be seen to have it".to_owned(),
            Self::AsSaid | Self::Everywhere => "every proxy has it".to_owned(),
            Self::But(skipped) => skipped.say(),
            Self::Sent => "every istiod has sent it; proxies were not asked, as spec.change.verify is ControlPlane".to_owned(),
            Self::Unknown(why) => format!("it is not known whether proxies have it: {why}"),
        }
    }
}

/// How a step ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    Arrived(Known),
    /// Proxies refused it, each with why.
    Refused(String),
    /// Some have not got it in time, or have not said so.
    Late(String),
}

/// Waits for a step; says meanwhile what it waits for.
pub async fn until_arrived(
    istiods: &Istiods,
    world: &watch::Receiver<Arc<World>>,
    expectation: &Expectation,
    change: &Change,
    say: &watch::Sender<String>,
) -> Outcome {
    let started = Instant::now();
    if change.verify == Verify::Delay {
        say.send_replace(format!("{:?} are waited, whatever happens", change.delay()));
        tokio::time::sleep(change.delay()).await;
        let why = format!("nobody was asked; {:?} were waited", change.delay());
        return Outcome::Arrived(Known::Unknown(why));
    }
    let mut follow = Follow::default();
    let mut pause = ASK;
    loop {
        let now = Arc::clone(&world.borrow());
        let asked = Instant::now();
        let look = follow.look(istiods, &now, expectation, change).await;
        match look {
            Look::Arrived(known) => {
                if !matches!(known, Known::But(_)) {
                    forget(istiods, &now, expectation);
                }
                return Outcome::Arrived(known);
            }
            Look::Refused(why) => return Outcome::Refused(why),
            Look::Waits(why) if started.elapsed() > change.timeout() => return Outcome::Late(why),
            Look::Waits(why) => drop(say.send_replace(why)),
        }
        // Where there are thousands of proxies, an answer is megabytes.
        tokio::time::sleep(pause.max(asked.elapsed() * 4)).await;
        if started.elapsed() > ASK_RARELY {
            pause = (pause * 2).min(ASK_RARELY);
        }
    }
}

fn forget(istiods: &Istiods, world: &World, expectation: &Expectation) {
    for subscriber in istiods.subscribers(world).values() {
        subscriber.forget(&expectation.wanted);
    }
}

/// Waits until fewer of those that were skipped are behind; gives the others.
pub async fn until_fewer(
    istiods: &Istiods,
    world: &watch::Receiver<Arc<World>>,
    expectation: &Expectation,
    skipped: Skipped,
) -> Known {
    loop {
        tokio::time::sleep(SKIPPED_AGAIN).await;
        let now = Arc::clone(&world.borrow());
        let Some(still) = still_skipped(istiods, &now, expectation, &skipped).await else {
            continue;
        };
        if still.is_empty() {
            forget(istiods, &now, expectation);
            return Known::Everywhere;
        }
        if still != skipped {
            return Known::But(still);
        }
    }
}

/// Those of the skipped that still do not have it; nothing where an istiod does not say.
async fn still_skipped(
    istiods: &Istiods,
    world: &World,
    expectation: &Expectation,
    skipped: &Skipped,
) -> Option<Skipped> {
    let subscribers = istiods.subscribers(world);
    let mut votes = Votes::default();
    if subscribers.is_empty() {
        return None;
    }
    for (address, subscriber) in subscribers {
        subscriber.expect(&expectation.wanted);
        let push = subscriber.since(&expectation.wanted)?;
        let proxies = istiods.proxies(address).await.ok()?;
        let root = &istiods.access().istio_namespace;
        let concerned = concerned(world, root, &proxies, expectation);
        votes.take(&concerned, expectation, push, Duration::MAX, Duration::ZERO);
    }
    Some(votes.skipped().only(skipped))
}

enum Look {
    Arrived(Known),
    Refused(String),
    Waits(String),
}

/// What was seen so far.
#[derive(Debug)]
struct Follow {
    started: Instant,
    /// Since when each istiod has sent it.
    sent: HashMap<IpAddr, Instant>,
}

impl Default for Follow {
    fn default() -> Self {
        Self {
            started: Instant::now(),
            sent: HashMap::new(),
        }
    }
}

impl Follow {
    async fn look(
        &mut self,
        istiods: &Istiods,
        world: &World,
        expectation: &Expectation,
        change: &Change,
    ) -> Look {
        let subscribers = istiods.subscribers(world);
        if subscribers.is_empty() {
            return self.after(change.delay(), "no istiod is known");
        }
        let mut waits = Vec::new();
        let mut connected = HashSet::new();
        let mut known = Known::Everywhere;
        let mut all_answer = true;
        let mut votes = Votes::default();
        let root = &istiods.access().istio_namespace;
        for (address, subscriber) in subscribers {
            subscriber.expect(&expectation.wanted);
            let Some(push) = subscriber.since(&expectation.wanted) else {
                if !subscriber.answers() && self.started.elapsed() > REACHABLE {
                    let why = format!("istiod {address} cannot be asked what it sends");
                    match self.after(change.delay() + REACHABLE, &why) {
                        Look::Arrived(unknown) => {
                            known = known.max(unknown);
                            continue;
                        }
                        other => return other,
                    }
                }
                waits.push(format!("istiod {address} has not sent it"));
                continue;
            };
            let sent = *self.sent.entry(address).or_insert_with(Instant::now);
            if change.verify == Verify::ControlPlane {
                known = known.max(Known::Sent);
                if sent.elapsed() < TAKEN_IN {
                    waits.push(format!("istiod {address} has sent it a moment ago"));
                }
                continue;
            }
            match istiods.proxies(address).await {
                Err(why) => {
                    all_answer = false;
                    known = known.max(Known::Unknown(format!(
                        "proxies cannot be asked: {why}; {:?} were waited",
                        change.delay()
                    )));
                    if sent.elapsed() < change.delay() {
                        waits.push(format!(
                            "proxies cannot be asked: {why}; {:?} are waited",
                            change.delay()
                        ));
                    }
                }
                Ok(proxies) => {
                    connected.extend(proxies.iter().filter_map(ProxyState::pod));
                    let concerned = concerned(world, root, &proxies, expectation);
                    votes.take(
                        &concerned,
                        expectation,
                        push,
                        sent.elapsed(),
                        change.others(),
                    );
                }
            }
        }
        if let Some(why) = votes.refused() {
            return Look::Refused(why);
        }
        waits.extend(votes.waits());
        let asked = change.verify == Verify::Proxies && all_answer && waits.is_empty();
        if asked && self.started.elapsed() < BETWEEN {
            let mut between = between(world, root, &connected, expectation);
            if self.started.elapsed() >= change.others() {
                between.retain(|pod| expectation.owners.contains(&pod.namespace));
            }
            let between: Vec<String> = between.iter().map(Key::to_string).collect();
            if !between.is_empty() {
                waits.push(format!(
                    "{} proxies are connected to no istiod: {}",
                    between.len(),
                    few(&between)
                ));
            }
        }
        if waits.is_empty() {
            let skipped = votes.skipped();
            if !skipped.is_empty() {
                known = known.max(Known::But(skipped));
            }
            Look::Arrived(known)
        } else {
            Look::Waits(waits.join("; "))
        }
    }

    /// Where nobody can be asked, time must do.
    fn after(&self, delay: Duration, why: &str) -> Look {
        if self.started.elapsed() >= delay {
            Look::Arrived(Known::Unknown(format!("{why}; {delay:?} were waited")))
        } else {
            Look::Waits(format!("{why}; {delay:?} are waited"))
        }
    }
}

/// The proxies that have the host in scope.
fn concerned<'a>(
    world: &World,
    root: &str,
    proxies: &'a [ProxyState],
    expectation: &Expectation,
) -> Vec<&'a ProxyState> {
    let has = |proxy: &&ProxyState| {
        let Some(key) = proxy.pod() else {
            return false;
        };
        // The views of operators are no pods, and one that is gone waits for nothing.
        let Some(pod) = world.pods.get(&key) else {
            return false;
        };
        pod.runs
            && proxy.proxy_type != "router"
            && has_in_scope(world, root, &key, pod, expectation)
    };
    proxies.iter().filter(has).collect()
}

/// The proxies that have the host in scope, and are connected to none of the istiods that answered.
fn between(
    world: &World,
    root: &str,
    connected: &HashSet<Key>,
    expectation: &Expectation,
) -> Vec<Key> {
    let pods = world.pods.iter().filter(|(key, pod)| {
        pod.runs
            && pod.ready
            && pod.proxy == Proxy::Sidecar
            && !connected.contains(*key)
            && has_in_scope(world, root, key, pod, expectation)
    });
    pods.map(|(key, _)| key.clone()).collect()
}

fn has_in_scope(
    world: &World,
    root: &str,
    key: &Key,
    pod: &PodFacts,
    expectation: &Expectation,
) -> bool {
    let Expectation {
        service,
        fqdn,
        hidden,
        ..
    } = expectation;
    !hidden.contains(&key.namespace)
        && is_in_scope(world, root, (&key.namespace, pod), service, fqdn)
}

/// The first of many names.
pub(super) fn few(names: &[String]) -> String {
    names[..names.len().min(NAMED)].join(", ")
}

/// Whether a pod's proxy has a Service in scope: by the Sidecar for it, for its namespace, or for the mesh.
/// <https://istio.io/latest/docs/reference/config/networking/sidecar/>
fn is_in_scope(
    world: &World,
    root: &str,
    (namespace, pod): (&str, &PodFacts),
    service: &Key,
    fqdn: &str,
) -> bool {
    let selects = |sidecar: &&Sidecar| {
        let selector = sidecar.spec.workload_selector.as_ref();
        selector.is_some_and(|selector| {
            !selector.labels.is_empty() && matches(&selector.labels, &pod.labels)
        })
    };
    let for_all = |sidecar: &&Sidecar| {
        let selector = sidecar.spec.workload_selector.as_ref();
        selector.is_none_or(|selector| selector.labels.is_empty())
    };
    let own = || sidecars_in(world, namespace).map(|(_, sidecar)| sidecar);
    let mut of_mesh = sidecars_in(world, root).map(|(_, sidecar)| sidecar);
    let sidecar = own().find(selects).or_else(|| own().find(for_all));
    let Some(sidecar) = sidecar.or_else(|| of_mesh.find(for_all)) else {
        return true;
    };
    let mut hosts = sidecar
        .spec
        .egress
        .iter()
        .flat_map(|listener| &listener.hosts);
    sidecar.spec.egress.is_empty() || hosts.any(|host| includes(host, namespace, service, fqdn))
}

/// Whether `NAMESPACE/HOST` of a Sidecar in `namespace` includes a Service.
fn includes(host: &str, namespace: &str, service: &Key, fqdn: &str) -> bool {
    let Some((of, name)) = host.split_once('/') else {
        return false;
    };
    let of = match of {
        "*" => true,
        "." => service.namespace == namespace,
        other => service.namespace == other,
    };
    let name = match name.strip_prefix('*') {
        Some(suffix) => fqdn.ends_with(suffix),
        None => name == fqdn,
    };
    of && name
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{foreign_sidecar, pod, service, world};

    /// What nobody could be asked is never said to be everywhere.
    #[test]
    fn what_is_known_least_of_is_said() {
        let why = || Known::Unknown("no istiod is known; 5s were waited".into());
        let known = |steps: &[Known]| Known::of_all(steps.iter().cloned());
        assert_eq!(known(&[Known::Everywhere, why()]), why());
        assert_eq!(known(&[Known::Sent, Known::Everywhere]), Known::Sent);
        assert_eq!(
            known(&[Known::Nothing, Known::Everywhere]),
            Known::Everywhere
        );
        assert_eq!(known(&[]), Known::Nothing);
        assert!(
            why()
                .say()
                .starts_with("it is not known whether proxies have it")
        );
        let follow = Follow::default();
        let after = follow.after(Duration::ZERO, "no istiod is known");
        assert!(
            matches!(after, Look::Arrived(Known::Unknown(why)) if why.contains("no istiod is known"))
        );
    }

    #[test]
    fn who_is_connected_to_no_istiod() {
        let mut mesh = world();
        service(&mut mesh, "bank", "vault", "{}");
        pod(&mut mesh, "shop", "cart", "10.1.0.1");
        pod(&mut mesh, "shop", "front", "10.1.0.2");
        foreign_sidecar(
            &mut mesh,
            "shop",
            "front",
            "{workloadSelector: {labels: {app: front}}, egress: [{hosts: ['./*']}]}",
        );
        let vault = Expectation {
            service: Key::new("bank", "vault"),
            fqdn: "vault.bank.svc.cluster.local".into(),
            wanted: Vec::new(),
            hidden: BTreeSet::new(),
            owners: BTreeSet::new(),
        };
        let absent = |connected: &[&str], mesh: &World| {
            let connected = connected.iter().map(|name| Key::new("shop", *name));
            let absent = between(mesh, "istio-system", &connected.collect(), &vault);
            absent.iter().map(Key::to_string).collect::<Vec<_>>()
        };
        assert_eq!(
            absent(&[], &mesh),
            ["shop/cart"],
            "the other has it not in scope"
        );
        assert!(absent(&["cart"], &mesh).is_empty());
        let cart = Key::new("shop", "cart");
        let mut unready = mesh.pods[&cart].as_ref().clone();
        unready.ready = false;
        mesh.set_pod(&cart, Some(unready));
        assert!(
            absent(&[], &mesh).is_empty(),
            "one that begins gets everything at once anyway"
        );
    }

    #[test]
    fn who_has_a_service_in_scope() {
        let mut mesh = world();
        service(&mut mesh, "bank", "vault", "{}");
        for (namespace, name, address) in [
            ("shop", "cart", "10.1.0.1"),
            ("shop", "front", "10.1.0.2"),
            ("bank", "till", "10.1.0.3"),
        ] {
            pod(&mut mesh, namespace, name, address);
        }
        let vault = Key::new("bank", "vault");
        let has = |mesh: &World, namespace: &str, name: &str| {
            let pod = &mesh.pods[&Key::new(namespace, name)];
            is_in_scope(
                mesh,
                "istio-system",
                (namespace, pod),
                &vault,
                "vault.bank.svc.cluster.local",
            )
        };
        assert!(
            has(&mesh, "shop", "cart"),
            "without a Sidecar everybody has everything"
        );
        foreign_sidecar(
            &mut mesh,
            "shop",
            "cart",
            "{workloadSelector: {labels: {app: cart}}, egress: [{hosts: ['./*']}]}",
        );
        assert!(!has(&mesh, "shop", "cart") && has(&mesh, "shop", "front"));
        foreign_sidecar(
            &mut mesh,
            "shop",
            "all",
            "{egress: [{hosts: [bank/vault.bank.svc.cluster.local]}]}",
        );
        assert!(!has(&mesh, "shop", "cart") && has(&mesh, "shop", "front"));
        foreign_sidecar(
            &mut mesh,
            "istio-system",
            "all",
            "{egress: [{hosts: ['istio-system/*']}]}",
        );
        assert!(!has(&mesh, "bank", "till") && has(&mesh, "shop", "front"));
        foreign_sidecar(
            &mut mesh,
            "bank",
            "all",
            "{egress: [{hosts: ['*/*.bank.svc.cluster.local']}]}",
        );
        assert!(has(&mesh, "bank", "till"));
    }
}
