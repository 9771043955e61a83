//! What istiod sends once it has an object: by that it is seen to arrive.

use std::collections::BTreeSet;

use fenceline_crds::istio::{DestinationRuleSpec, VirtualServiceSpec};

use super::arrival::Expectation;
use super::gather::Gathered;
use super::istiod::{Kind, Wanted};
use super::order;
use crate::world::World;

/// The clusters of the subsets that a DestinationRule has and the one before it had not.
pub(super) fn rule(
    gathered: &Gathered<'_>,
    before: Option<&DestinationRuleSpec>,
    rule: Option<&DestinationRuleSpec>,
    world: &World,
) -> Expectation {
    let known: BTreeSet<&str> = before.into_iter().flat_map(order::names).collect();
    let names = rule.into_iter().flat_map(order::names);
    let names = names.filter(|name| !known.contains(name));
    let port = gathered.router.as_ref().and_then(|router| router.spec.port);
    let facts = world.services.get(gathered.service);
    let ports = facts
        .into_iter()
        .flat_map(|facts| facts.http_ports.iter().chain(&facts.other_ports));
    let ports: Vec<u16> = ports
        .copied()
        .filter(|known| port.is_none_or(|port| port == *known))
        .collect();
    let wanted = names.flat_map(|name| {
        ports.iter().map(move |port| Wanted {
            kind: Kind::Clusters,
            name: format!("outbound|{port}|{name}|{}", gathered.fqdn),
            there: true,
        })
    });
    expectation(gathered, wanted.collect())
}

/// The marks of routes; of those that are taken away, that they are gone.
pub(super) fn routes(
    gathered: &Gathered<'_>,
    before: Option<&VirtualServiceSpec>,
    routes: Option<&VirtualServiceSpec>,
) -> Expectation {
    let (marked, there) = match routes {
        Some(routes) => (Some(routes), true),
        None => (before, false),
    };
    let Some(marked) = marked else {
        return expectation(gathered, Vec::new());
    };
    let connections = marked.other.contains_key("tcp");
    let wanted = order::marks(marked).into_iter().map(|mark| {
        let (kind, name) = if connections {
            (Kind::Listeners, format!("|{mark}|{}", gathered.fqdn))
        } else {
            (Kind::Routes, mark)
        };
        Wanted { kind, name, there }
    });
    let wanted = wanted.collect();
    expectation(gathered, wanted)
}

fn expectation(gathered: &Gathered<'_>, wanted: Vec<Wanted>) -> Expectation {
    Expectation {
        service: gathered.service.clone(),
        fqdn: gathered.fqdn.clone(),
        wanted,
        hidden: gathered.others.hidden.clone(),
        owners: gathered.owners.clone(),
    }
}
