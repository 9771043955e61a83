//! The objects of a service: what is stored, and what is written with it for whoever leads next.

use std::collections::BTreeSet;
use std::sync::Arc;

use fenceline_crds::istio::{
    DestinationRule, DestinationRuleSpec, VirtualService, VirtualServiceSpec,
};
use fenceline_crds::{RouteProtocol, Router};
use k8s_openapi::api::core::v1::Service;
use kube::api::ObjectMeta;
use kube::{Resource, ResourceExt};
use serde::de::DeserializeOwned;
use serde_json::json;

use super::arrival::Expectation;
use super::follow::Followed;
use super::gather::Gathered;
use super::host::OnTheWay;
use super::plan::{Target, short_hash};
use super::report::CONFLICTED;
use super::{Context, expect};
use crate::apply::{self, MANAGED_BY, MANAGER, Owned, SERVICE_LABEL};
use crate::note::{self, Note};
use crate::world::{Key, ServiceFacts, World};

/// What is stored of ours.
#[derive(Clone, Debug, Default)]
pub(super) struct Objects {
    pub(super) rule: Option<Arc<DestinationRule>>,
    pub(super) routes: Option<Arc<VirtualService>>,
}

impl Objects {
    pub(super) fn stored(service: &Key, world: &World) -> Self {
        let key = Key::new(&*service.namespace, name(service));
        Self {
            rule: world.own_rules.get(&key).cloned(),
            routes: world.own_routes.get(&key).cloned(),
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.rule.is_none() && self.routes.is_none()
    }

    /// What they say, in short.
    pub(super) fn mark(&self) -> String {
        let rule = self.rule.as_ref().map(|rule| &rule.spec);
        let routes = self.routes.as_ref().map(|routes| &routes.spec);
        short_hash(&json!([rule, routes]).to_string())
    }

    /// Why this target was taken back, if it was.
    pub(super) fn refused(&self, wanted: &str) -> Option<String> {
        let rule = self
            .rule
            .as_deref()
            .and_then(|rule| note::refused(rule, wanted));
        rule.or_else(|| note::refused(self.routes.as_deref()?, wanted))
    }
}

/// The name of a service's objects.
pub(super) fn name(service: &Key) -> String {
    format!("fenceline-{}", service.name)
}

/// A target, in short; whose callers are kept apart is nothing that anybody wants.
pub(super) fn mark(target: &Target) -> String {
    let routes = target.for_everybody.as_ref().or(target.routes.as_ref());
    short_hash(&json!([target.rule, routes]).to_string())
}

/// The versions of what was written.
#[derive(Clone, Debug, Default)]
pub(super) struct Versions {
    pub(super) rule: Option<Option<String>>,
    pub(super) routes: Option<Option<String>>,
}

impl Versions {
    /// Whether these objects are as new. What was removed is gone, what was written is there, or something newer.
    pub(super) fn are_shown_by(&self, objects: &Objects) -> bool {
        let number =
            |version: &Option<String>| version.as_ref().and_then(|text| text.parse::<u64>().ok());
        let shown = |written: &Option<Option<String>>, stored: Option<Option<String>>| match written
        {
            None => true,
            Some(None) => stored.is_none(),
            Some(version) => stored.is_some_and(|stored| number(&stored) >= number(version)),
        };
        shown(
            &self.rule,
            objects.rule.as_ref().map(|rule| rule.resource_version()),
        ) && shown(
            &self.routes,
            objects
                .routes
                .as_ref()
                .map(|routes| routes.resource_version()),
        )
    }
}

/// Routes as there are none.
fn plain_routes(fqdn: &str) -> VirtualServiceSpec {
    let route = json!([{"name": "plain", "route": [{"destination": {"host": fqdn}}]}]);
    VirtualServiceSpec {
        hosts: vec![fqdn.to_owned()],
        other: [("http".to_owned(), route)].into(),
        ..VirtualServiceSpec::default()
    }
}

/// The subsets alone.
fn without_policies(rule: &DestinationRuleSpec) -> DestinationRuleSpec {
    let mut rule = rule.clone();
    rule.traffic_policy = None;
    for subset in &mut rule.subsets {
        subset.traffic_policy = None;
    }
    rule
}

/// One of the two kinds that are written for a service, in steps.
pub(super) trait Made: Owned<Spec: Clone + DeserializeOwned + Send> {
    fn made(name: &str, spec: Self::Spec) -> Self;

    /// What is stored of this kind.
    fn of(objects: &Objects) -> Option<&Self>;

    /// Where what is on its way of this kind is followed.
    fn followed(on_the_way: &mut OnTheWay) -> &mut Option<Followed>;

    /// That this version was written, or with none that it was taken away.
    fn written(version: Option<String>) -> Versions;

    /// What istiod sends once this is there, where `before` was.
    fn expected(
        gathered: &Gathered<'_>,
        before: Option<&Self::Spec>,
        spec: Option<&Self::Spec>,
        world: &World,
    ) -> Expectation;

    /// What harms nobody, where nothing was in force before.
    fn harmless(gathered: &Gathered<'_>) -> Option<Self::Spec>;

    /// What to put back: what was in force before.
    fn last_good(gathered: &Gathered<'_>) -> Option<Self::Spec> {
        let last = Self::of(&gathered.objects).and_then(note::last_good);
        last.or_else(|| Self::harmless(gathered))
    }
}

impl Made for DestinationRule {
    fn made(name: &str, spec: DestinationRuleSpec) -> Self {
        Self::new(name, spec)
    }

    fn of(objects: &Objects) -> Option<&Self> {
        objects.rule.as_deref()
    }

    fn followed(on_the_way: &mut OnTheWay) -> &mut Option<Followed> {
        &mut on_the_way.rule
    }

    fn written(version: Option<String>) -> Versions {
        Versions {
            rule: Some(version),
            ..Versions::default()
        }
    }

    fn expected(
        gathered: &Gathered<'_>,
        before: Option<&DestinationRuleSpec>,
        spec: Option<&DestinationRuleSpec>,
        world: &World,
    ) -> Expectation {
        expect::rule(gathered, before, spec, world)
    }

    fn harmless(gathered: &Gathered<'_>) -> Option<DestinationRuleSpec> {
        Self::of(&gathered.objects).map(|stored| without_policies(&stored.spec))
    }
}

impl Made for VirtualService {
    fn made(name: &str, spec: VirtualServiceSpec) -> Self {
        Self::new(name, spec)
    }

    fn of(objects: &Objects) -> Option<&Self> {
        objects.routes.as_deref()
    }

    fn followed(on_the_way: &mut OnTheWay) -> &mut Option<Followed> {
        &mut on_the_way.routes
    }

    fn written(version: Option<String>) -> Versions {
        Versions {
            routes: Some(version),
            ..Versions::default()
        }
    }

    fn expected(
        gathered: &Gathered<'_>,
        before: Option<&VirtualServiceSpec>,
        spec: Option<&VirtualServiceSpec>,
        _: &World,
    ) -> Expectation {
        expect::routes(gathered, before, spec)
    }

    /// The service's own endpoints.
    fn harmless(gathered: &Gathered<'_>) -> Option<VirtualServiceSpec> {
        Some(plain_routes(&gathered.fqdn))
    }
}

/// The object as it is to be written. It goes with Fenceline's own kinds, not with the Router: Fenceline takes it away in
/// steps.
pub(super) fn object<K: Made>(
    gathered: &Gathered<'_>,
    spec: K::Spec,
    note: &Note,
    world: &World,
) -> K {
    let name = name(gathered.service);
    let mut object = K::made(&name, spec);
    *object.meta_mut() = ObjectMeta {
        name: Some(name),
        namespace: Some(gathered.service.namespace.clone()),
        labels: Some(
            [
                (MANAGED_BY.to_owned(), MANAGER.to_owned()),
                (SERVICE_LABEL.to_owned(), gathered.service.name.clone()),
            ]
            .into(),
        ),
        annotations: note.annotations(),
        owner_references: world.definition.clone().map(|owner| vec![owner]),
        ..ObjectMeta::default()
    };
    object
}

/// Makes the Service that a Router wants made.
pub(super) async fn ensure_service(
    router: &Router,
    world: &World,
    context: &Context,
) -> Result<(), apply::Error> {
    let Some(wanted) = &router.spec.create_service else {
        return Ok(());
    };
    let namespace = router.namespace().unwrap_or_default();
    let key = Key::new(&*namespace, &*router.spec.service);
    let (name, protocol) = match router.spec.protocol {
        RouteProtocol::Http => ("http", "http"),
        RouteProtocol::Grpc => ("grpc", "grpc"),
        RouteProtocol::Tcp => ("tcp", "tcp"),
    };
    let ports: Vec<_> = wanted
        .ports
        .iter()
        .map(|port| {
            json!({
                "name": format!("{name}-{}", port.port),
                "port": port.port,
                "targetPort": port.target_port.unwrap_or(port.port),
                "protocol": "TCP",
                "appProtocol": protocol,
            })
        })
        .collect();
    // What is there already is compared by what it means, once this Router's newest spec was carried out: until then it may be
    // somebody else's, or differ in what is not looked at here.
    let carried_out = router.status.as_ref().is_some_and(|status| {
        let mut conditions = status.conditions.iter();
        status.observed_generation == router.metadata.generation
            && !conditions.any(|one| one.type_ == CONFLICTED && one.status == "True")
    });
    let is_as_wanted = |facts: &Arc<ServiceFacts>| {
        let known = facts.http_ports.iter().chain(&facts.other_ports);
        let wanted_ports = wanted.ports.iter().map(|port| port.port);
        facts.selector == wanted.selector
            && known.copied().collect::<BTreeSet<_>>() == wanted_ports.collect()
    };
    if carried_out && world.services.get(&key).is_some_and(is_as_wanted) {
        return Ok(());
    }
    let service: Result<Service, _> = serde_json::from_value(json!({
        "metadata": {
            "name": key.name,
            "namespace": namespace,
            "labels": {MANAGED_BY: MANAGER},
            "ownerReferences": router.controller_owner_ref(&()).map(|owner| vec![owner]),
        },
        "spec": {"selector": wanted.selector, "ports": ports},
    }));
    match service {
        Ok(service) => context.writer.ensure_service(&service).await,
        // Whatever the schema lets through makes a Service.
        Err(error) => {
            tracing::error!(%error, "a Service of a Router");
            Ok(())
        }
    }
}
