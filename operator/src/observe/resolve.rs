//! From what a proxy reports to what it means: which fences the caller belongs to, which host it called.

use std::net::IpAddr;

use crate::fence::select;
use crate::observe::identity::Identity;
use crate::world::{Host, Key, World};

/// Why a name is no dependency.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Unresolved {
    /// Not a DNS name and not an address.
    Malformed,
    /// Nothing in the mesh answers to it.
    Unknown,
    /// What answers to it is not exported to the caller's namespace.
    NotExported,
}

impl Unresolved {
    /// As status shows it.
    pub fn reason(self) -> &'static str {
        match self {
            Self::Malformed => "Malformed",
            Self::Unknown => "UnknownHost",
            Self::NotExported => "NotExported",
        }
    }
}

/// The host part of an authority: without port, brackets and trailing dot, in lower case.
pub(crate) fn host_of(authority: &str) -> Option<String> {
    let host = if let Some(bracketed) = authority.strip_prefix('[') {
        let (address, rest) = bracketed.split_once(']')?;
        (rest.is_empty() || is_port(rest)).then_some(address)?
    } else if authority.parse::<IpAddr>().is_ok() {
        authority
    } else {
        match authority.find(':') {
            Some(colon) if is_port(&authority[colon..]) => &authority[..colon],
            Some(_) => return None,
            None => authority,
        }
    };
    Some(host.strip_suffix('.').unwrap_or(host).to_ascii_lowercase())
}

fn is_port(text: &str) -> bool {
    text.strip_prefix(':')
        .is_some_and(|port| port.parse::<u16>().is_ok())
}

/// RFC 1123, with the underscore that some names have all the same.
fn is_dns_name(host: &str) -> bool {
    let label = |label: &str| {
        let plain = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
        (1..=63).contains(&label.len())
            && label.chars().all(plain)
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    host.len() <= 253 && host.split('.').all(label)
}

/// What `authority` (a Host header, a declared host) means to a caller of `namespace`.
///
/// # Errors
/// Says why it is nothing that a Sidecar could import.
pub fn resolve(world: &World, namespace: &str, authority: &str) -> Result<Host, Unresolved> {
    let host = host_of(authority).ok_or(Unresolved::Malformed)?;
    if let Ok(address) = host.parse::<IpAddr>() {
        let service = world.service_at(address).ok_or(Unresolved::Unknown)?;
        return visible(world, namespace, &world.fqdn(service));
    }
    if !is_dns_name(&host) {
        return Err(Unresolved::Malformed);
    }
    let mut why = Unresolved::Unknown;
    for candidate in full_names(world, namespace, &host) {
        match visible(world, namespace, &candidate) {
            Ok(host) => return Ok(host),
            Err(reason) => why = why.max(reason),
        }
    }
    Err(why)
}

fn visible(world: &World, namespace: &str, fqdn: &str) -> Result<Host, Unresolved> {
    let providers = world.providers(namespace, fqdn);
    // As Istio does: the caller's own namespace first, then the first in the alphabet.
    let own = providers.iter().find(|host| &*host.namespace == namespace);
    if let Some(host) = own.or_else(|| providers.first()) {
        return Ok(host.clone());
    }
    let service = world.service_named(fqdn);
    let hidden = service.is_some_and(|key| world.services.contains_key(&key));
    Err(if hidden {
        Unresolved::NotExported
    } else {
        Unresolved::Unknown
    })
}

/// The full names that a name may stand for, likeliest first.
pub(crate) fn full_names(world: &World, namespace: &str, host: &str) -> Vec<String> {
    let domain = &*world.cluster_domain;
    let labels: Vec<&str> = host.split('.').collect();
    let mut names = Vec::new();
    match labels.as_slice() {
        [_] => names.push(format!("{host}.{namespace}.svc.{domain}")),
        [_, _] => names.push(format!("{host}.svc.{domain}")),
        [.., "svc"] => names.push(format!("{host}.{domain}")),
        // POD.SERVICE.NAMESPACE; the Service comes out below.
        [_, _, _] => names.push(format!("{host}.svc.{domain}")),
        _ => {}
    }
    names.push(host.to_owned());
    // A pod of a headless Service, called by its own name, needs that Service.
    for name in names.clone() {
        let parent = name.split_once('.').map(|(_, parent)| parent);
        let service = parent.and_then(|parent| world.service_named(parent));
        let headless = service.as_ref().and_then(|key| world.services.get(key));
        if let (Some(parent), Some(facts)) = (parent, headless)
            && facts.addresses.is_empty()
        {
            names.push(parent.to_owned());
        }
    }
    names
}

/// Why a caller is not believed, or nothing is learnt of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UnknownCaller {
    /// No pod of the mesh has this address.
    NoPod,
    /// The pod behind the address is not the certificate's.
    NotTheIdentitys,
    /// No fence selects the pod.
    NotFenced,
}

impl UnknownCaller {
    /// The outcome, as metrics show it.
    pub fn outcome(self) -> &'static str {
        match self {
            Self::NoPod => "unknown_pod",
            Self::NotTheIdentitys => "not_believed",
            Self::NotFenced => "not_fenced",
        }
    }
}

/// The fences of the pod that called: the pod behind the address, if it is what the certificate says.
///
/// # Errors
/// Says why there is none.
pub fn fences_of_caller(
    world: &World,
    identity: &Identity,
    address: IpAddr,
) -> Result<Vec<Key>, UnknownCaller> {
    let (pod, facts) = world.pod_at(address).ok_or(UnknownCaller::NoPod)?;
    if pod.namespace != identity.namespace || facts.service_account != identity.service_account {
        return Err(UnknownCaller::NotTheIdentitys);
    }
    let fences = select::fences_of_pod(world, &pod.namespace, facts);
    if fences.is_empty() {
        Err(UnknownCaller::NotFenced)
    } else {
        Ok(fences)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{service, world};

    fn mesh() -> World {
        let mut mesh = world();
        service(
            &mut mesh,
            "shop",
            "reviews",
            r#"{clusterIPs: [10.96.0.7, "fd00::7"]}"#,
        );
        service(&mut mesh, "bank", "ledger", "{clusterIPs: [10.96.0.8]}");
        service(
            &mut mesh,
            "bank",
            "vault",
            r#"{clusterIPs: [10.96.0.9], exportTo: "."}"#,
        );
        service(&mut mesh, "bank", "db", "{clusterIPs: [None]}");
        mesh
    }

    #[test]
    fn every_form_of_a_name() {
        let mesh = mesh();
        let reviews = "shop/reviews.shop.svc.cluster.local";
        let ledger = "bank/ledger.bank.svc.cluster.local";
        for (authority, want) in [
            ("reviews", reviews),
            ("reviews:9080", reviews),
            ("Reviews.", reviews),
            ("reviews.shop", reviews),
            ("reviews.shop:80", reviews),
            ("reviews.shop.svc", reviews),
            ("reviews.shop.svc.cluster.local", reviews),
            ("reviews.shop.svc.cluster.local.:9080", reviews),
            ("ledger.bank", ledger),
            ("10.96.0.7", reviews),
            ("10.96.0.7:9080", reviews),
            ("[fd00::7]:9080", reviews),
            ("[fd00::7]", reviews),
            ("fd00::7", reviews),
            (
                "db-0.db.bank.svc.cluster.local",
                "bank/db.bank.svc.cluster.local",
            ),
            ("db-0.db.bank", "bank/db.bank.svc.cluster.local"),
        ] {
            let got = resolve(&mesh, "shop", authority).map(|host| host.to_string());
            assert_eq!(got.as_deref(), Ok(want), "{authority}");
        }
    }

    #[test]
    fn names_that_mean_nothing_here() {
        let mesh = mesh();
        let long = "a".repeat(300);
        for (authority, want) in [
            ("ledger", Unresolved::Unknown),
            ("example.com", Unresolved::Unknown),
            ("api.example.com:443", Unresolved::Unknown),
            ("vault.bank", Unresolved::NotExported),
            ("10.1.2.3", Unresolved::Unknown),
            ("[::1]:80", Unresolved::Unknown),
            ("", Unresolved::Malformed),
            ("[", Unresolved::Malformed),
            ("[fd00::7", Unresolved::Malformed),
            ("reviews:http", Unresolved::Malformed),
            ("reviews:99999", Unresolved::Malformed),
            ("re views", Unresolved::Malformed),
            ("*.shop", Unresolved::Malformed),
            ("a..b", Unresolved::Malformed),
            ("shop/reviews", Unresolved::Malformed),
            (&long, Unresolved::Malformed),
        ] {
            assert_eq!(resolve(&mesh, "shop", authority), Err(want), "{authority}");
        }
    }
}
