//! What becomes of a first call: a plain function of the call and the mesh.

use std::net::IpAddr;
use std::time::Duration;

use fenceline_crds::{Evidence, FirstCall, FirstCallPolicy, GrpcFirstCall, Mode, Otherwise};

use super::identity::Identity;
use super::resolve::{Unresolved, fences_of_caller, resolve};
use crate::fence::Settings;
use crate::world::{Host, Key, Protection, World};

/// Which port of the global proxy was called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Port {
    /// Its callers' proxies follow redirects.
    Ask,
    /// Its callers' proxies do not.
    Forward,
}

/// A call, as the global proxy asks about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Asked<'a> {
    pub caller: &'a Identity,
    pub address: IpAddr,
    pub authority: &'a str,
    pub port: Port,
    pub grpc: bool,
}

/// What becomes of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// It waits until the host is in the caller's scope.
    Hold(Hold),
    /// The global proxy passes it on under its own identity.
    Forward,
    /// It gets Istio's own behaviour.
    Pass,
    /// It is told why it goes nowhere.
    Refuse(Refusal),
}

/// A call to be held.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hold {
    pub host: Host,
    /// The fences whose Sidecars must have the host.
    pub fences: Vec<Key>,
    /// In all, however often it comes back.
    pub hold_for: Duration,
    /// What becomes of it when that was too short.
    pub otherwise: Box<Answer>,
}

/// Why a call goes nowhere.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// An AuthorizationPolicy asks who calls, and it would not see that.
    Protected(Key),
    /// Routes lead to so many hosts that nobody can say whether one of them asks who calls.
    LeadsTooFar(Key),
    /// It is not exported to the global proxy's namespace.
    NotExported,
    /// The pods of a headless Service are called by address; the global proxy would call another one.
    Headless,
    /// Nothing answers to the name, and the call cannot go back to where something might.
    UnknownHost,
    /// It is the global proxy that is called.
    GlobalProxy,
    /// The fence says so.
    NotInScope,
}

impl Refusal {
    /// For the header `x-fenceline-reason`.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Protected(_) => "ProtectedHost",
            Self::LeadsTooFar(_) => "LeadsTooFar",
            Self::NotExported => "NotExported",
            Self::Headless => "HeadlessHost",
            Self::UnknownHost => "UnknownHost",
            Self::GlobalProxy => "GlobalProxy",
            Self::NotInScope => "NotInScope",
        }
    }

    /// Whether trying again helps: the host comes into the caller's scope.
    pub fn passes(&self) -> bool {
        !matches!(self, Self::UnknownHost | Self::GlobalProxy)
    }

    /// For people. What a policy is called is none of a caller's business.
    pub fn message(&self) -> &'static str {
        match self {
            Self::Protected(_) => {
                "the host is not in the caller's scope yet, and cannot be called for it: \
                 an AuthorizationPolicy asks who is calling"
            }
            Self::LeadsTooFar(_) => {
                "the host is not in the caller's scope yet, and cannot be called for it: \
                 its VirtualService leads to more than 1000 hosts"
            }
            Self::NotExported => {
                "the host is not in the caller's scope yet, and cannot be called for it: \
                 it is not exported to the global proxy's namespace"
            }
            Self::Headless => {
                "the host is not in the caller's scope yet, and cannot be called for it: its pods are called by address"
            }
            Self::UnknownHost => "no service of the mesh has this name",
            Self::GlobalProxy => "the global proxy does not call itself",
            Self::NotInScope => "the host is not in the caller's scope yet",
        }
    }
}

/// A decision, and what there is to learn from the call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decision {
    pub answer: Answer,
    /// The caller's fences.
    pub fences: Vec<Key>,
    pub host: Result<Host, Unresolved>,
}

/// Decides on one call.
pub fn decide(world: &World, settings: &Settings, asked: &Asked<'_>) -> Decision {
    let caller = asked.caller;
    let ours = caller.trust_domain == settings.trust_domain;
    let fences = if ours {
        fences_of_caller(world, caller, asked.address).unwrap_or_default()
    } else {
        Vec::new()
    };
    let host = resolve(world, &caller.namespace, asked.authority);
    let answer = match &host {
        // Only a call that can go back is passed.
        Err(_) if asked.port == Port::Ask => Answer::Pass,
        Err(_) => Answer::Refuse(Refusal::UnknownHost),
        Ok(host) if *host.fqdn == settings.global_proxy_host() => {
            Answer::Refuse(Refusal::GlobalProxy)
        }
        Ok(host) => answer(world, settings, asked, &fences, host),
    };
    Decision {
        answer,
        fences,
        host,
    }
}

fn answer(
    world: &World,
    settings: &Settings,
    asked: &Asked<'_>,
    fences: &[Key],
    host: &Host,
) -> Answer {
    let enforced: Vec<&Key> = fences
        .iter()
        .filter(|key| world.fences[*key].spec.mode == Mode::Enforce)
        .collect();
    let first_call = enforced
        .first()
        .and_then(|key| world.fences[*key].spec.first_call.clone())
        .unwrap_or_default();
    let FirstCall {
        policy,
        otherwise,
        grpc,
        ..
    } = first_call;
    let forward = match obstacle(world, settings, host) {
        None => Answer::Forward,
        Some(why) => Answer::Refuse(why),
    };
    if asked.port == Port::Forward {
        return forward;
    }
    let learns = enforced.iter().any(|key| {
        let spec = &world.fences[*key].spec;
        spec.believes(Evidence::GlobalProxy)
    });
    // Nobody waits for what will not come.
    let hold = policy == FirstCallPolicy::Hold
        && (learns || enforced.is_empty())
        && !(asked.grpc && grpc == GrpcFirstCall::Auto && forward == Answer::Forward);
    if !hold {
        return forward;
    }
    Answer::Hold(Hold {
        host: host.clone(),
        fences: enforced.into_iter().cloned().collect(),
        hold_for: first_call.hold_for(),
        otherwise: Box::new(match (otherwise, forward) {
            (Otherwise::Refuse, Answer::Forward) => Answer::Refuse(Refusal::NotInScope),
            (_, forward) => forward,
        }),
    })
}

/// Why the global proxy must not pass calls on to a host.
fn obstacle(world: &World, settings: &Settings, host: &Host) -> Option<Refusal> {
    let service = world.service_named(&host.fqdn);
    let headless = service
        .and_then(|key| world.services.get(&key))
        .is_some_and(|facts| facts.addresses.is_empty() && !facts.external_name);
    let protected = world.protection(&settings.root_namespace, &host.fqdn);
    let proxy = &settings.global_proxy.namespace;
    let hidden = world.providers(proxy, &host.fqdn).is_empty();
    protected
        .map(|by| match by {
            Protection::Policy(policy) => Refusal::Protected(policy),
            Protection::LeadsTooFar(routes) => Refusal::LeadsTooFar(routes),
        })
        .or_else(|| headless.then_some(Refusal::Headless))
        .or_else(|| hidden.then_some(Refusal::NotExported))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{fence, pod, policy, service, settings, world};

    fn mesh(first_call: &str) -> World {
        let mut mesh = world();
        service(&mut mesh, "shop", "cart", "{}");
        service(&mut mesh, "shop", "open", "{clusterIPs: [10.96.0.5]}");
        service(&mut mesh, "bank", "vault", "{}");
        service(&mut mesh, "bank", "hidden", r#"{exportTo: "."}"#);
        service(&mut mesh, "bank", "db", "{clusterIPs: [None]}");
        service(&mut mesh, "fenceline-system", "global-proxy", "{}");
        let rule = "{rules: [{from: [{source: {namespaces: [shop]}}]}], \
                    selector: {matchLabels: {app: vault}}}";
        policy(&mut mesh, "bank", "vault", rule);
        pod(&mut mesh, "shop", "cart", "10.1.0.1");
        let spec = format!("{{firstCall: {first_call}}}");
        let cart = fence("shop", "cart", &spec);
        mesh.fences.insert(Key::new("shop", "cart"), cart.into());
        mesh
    }

    const OPEN: &str = "open";
    const VAULT: &str = "vault.bank";

    /// What becomes of a call by the cart: in a word.
    fn becomes(world: &World, authority: &str, port: Port, grpc: bool) -> String {
        let caller = Identity::parse("spiffe://cluster.local/ns/shop/sa/cart").unwrap();
        let asked = Asked {
            caller: &caller,
            address: "10.1.0.1".parse().unwrap(),
            authority,
            port,
            grpc,
        };
        say(&decide(world, &settings(), &asked).answer)
    }

    fn say(answer: &Answer) -> String {
        match answer {
            Answer::Hold(hold) => format!("hold, {}", say(&hold.otherwise)),
            Answer::Forward => "forward".into(),
            Answer::Pass => "pass".into(),
            Answer::Refuse(why) => why.reason().into(),
        }
    }

    #[test]
    fn every_kind_of_call() {
        use Port::{Ask, Forward};
        for (first_call, authority, port, grpc, want) in [
            ("{}", OPEN, Ask, false, "hold, forward"),
            ("{otherwise: Refuse}", OPEN, Ask, false, "hold, NotInScope"),
            ("{}", VAULT, Ask, false, "hold, ProtectedHost"),
            ("{}", OPEN, Ask, true, "forward"),
            ("{grpc: Hold}", OPEN, Ask, true, "hold, forward"),
            ("{}", VAULT, Ask, true, "hold, ProtectedHost"),
            ("{}", OPEN, Forward, false, "forward"),
            ("{}", VAULT, Forward, false, "ProtectedHost"),
            ("{}", VAULT, Forward, true, "ProtectedHost"),
            ("{policy: Forward}", OPEN, Ask, false, "forward"),
            ("{policy: Forward}", VAULT, Ask, false, "ProtectedHost"),
            ("{}", "nothing", Ask, false, "pass"),
            ("{}", "nothing", Forward, false, "UnknownHost"),
            ("{}", "hidden.bank", Ask, true, "pass"),
            ("{}", "hidden.bank", Forward, false, "UnknownHost"),
            (
                "{}",
                "VAULT.bank.svc.cluster.local.:80",
                Forward,
                false,
                "ProtectedHost",
            ),
            ("{}", "10.96.0.5:80", Forward, false, "forward"),
            ("{}", "db.bank", Forward, false, "HeadlessHost"),
            ("{}", "db-0.db.bank", Ask, false, "hold, HeadlessHost"),
            (
                "{}",
                "global-proxy.fenceline-system",
                Forward,
                false,
                "GlobalProxy",
            ),
        ] {
            let mesh = mesh(first_call);
            let is = becomes(&mesh, authority, port, grpc);
            assert_eq!(is, want, "{first_call} {authority} {port:?} grpc={grpc}");
        }
    }

    #[test]
    fn who_is_not_what_the_certificate_says_teaches_nothing() {
        let mesh = mesh("{}");
        let cart = "spiffe://cluster.local/ns/shop/sa/cart";
        let decided = |identity: &str, address: &str| {
            let asked = Asked {
                caller: &Identity::parse(identity).unwrap(),
                address: address.parse().unwrap(),
                authority: OPEN,
                port: Port::Ask,
                grpc: false,
            };
            decide(&mesh, &settings(), &asked).fences
        };
        assert_eq!(decided(cart, "10.1.0.1").len(), 1);
        assert!(decided(cart, "10.1.0.9").is_empty());
        assert!(decided("spiffe://cluster.local/ns/shop/sa/x", "10.1.0.1").is_empty());
        assert!(decided("spiffe://elsewhere/ns/shop/sa/cart", "10.1.0.1").is_empty());
    }
}
