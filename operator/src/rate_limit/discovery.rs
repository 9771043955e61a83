//! Serves the rate limit service its configuration, over its xDS config API: aggregated discovery of `RateLimitConfig`, the state of the world
//! each time, one resource for each Global RateLimit. So it is known what was accepted; a file would not say.
//! <https://github.com/envoyproxy/ratelimit#xds-management-server-based-configuration-loading>

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use envoy_types::pb::envoy::service::discovery::v3::aggregated_discovery_service_server::AggregatedDiscoveryService;
use envoy_types::pb::envoy::service::discovery::v3::{
    DeltaDiscoveryRequest, DeltaDiscoveryResponse, DiscoveryRequest, DiscoveryResponse,
};
use envoy_types::pb::google::protobuf::Any;
use envoy_types::pb::ratelimit::config::ratelimit::v3::RateLimitConfig;
use fenceline_crds::{LimitServiceStatus, RateLimit, Share};
use kube::ResourceExt;
use prost::Message;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::UnboundedReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};

use super::services::{self, Ledger};
use super::{Programs, global, valid};
use crate::clock::Clock;
use crate::fence::Settings;
use crate::observe::peer::Door;
use crate::process::evaluate::within_deadline;
use crate::process::quarantine;
use crate::world::{Key, World};

const TYPE: &str = "type.googleapis.com/ratelimit.config.ratelimit.v3.RateLimitConfig";
/// How long changes wait for company: each answer has everything.
const COALESCE: Duration = Duration::from_millis(50);

type Configs = BTreeMap<String, RateLimitConfig>;

/// Serves configurations to the rate limit service alone.
pub struct Discovery {
    pub door: Door,
    pub world: watch::Receiver<Arc<World>>,
    pub settings: Settings,
    pub ledger: Arc<Ledger>,
    pub programs: Arc<Programs>,
    pub clock: Clock,
    pub replica: String,
    pub stop: CancellationToken,
}

type Answers = UnboundedReceiverStream<Result<DiscoveryResponse, Status>>;
type DeltaAnswers = UnboundedReceiverStream<Result<DeltaDiscoveryResponse, Status>>;

#[tonic::async_trait]
impl AggregatedDiscoveryService for Discovery {
    type StreamAggregatedResourcesStream = Answers;
    type DeltaAggregatedResourcesStream = DeltaAnswers;

    async fn stream_aggregated_resources(
        &self,
        request: Request<Streaming<DiscoveryRequest>>,
    ) -> Result<Response<Answers>, Status> {
        self.door.admit(request.metadata())?;
        let (send, answers) = mpsc::unbounded_channel();
        let world = self.world.clone();
        let source = Source {
            root: self.settings.root_namespace.clone(),
            programs: Arc::clone(&self.programs),
            clock: self.clock,
        };
        let (ledger, replica) = (Arc::clone(&self.ledger), self.replica.clone());
        let stop = self.stop.clone();
        let mut requests = request.into_inner();
        tokio::spawn(async move {
            let Ok(Some(first)) = requests.message().await else {
                return;
            };
            let node = first.node.map(|node| node.id).unwrap_or_default();
            let service = ledger.enter(&node, &replica);
            tracing::info!(service, "a rate limit service is connected");
            tokio::select! {
                () = serve(&service, world, &source, &mut requests, &send, &ledger) => {}
                () = stop.cancelled() => {}
            }
            ledger.leave(&service);
            tracing::info!(service, "a rate limit service is gone");
        });
        Ok(Response::new(UnboundedReceiverStream::new(answers)))
    }

    async fn delta_aggregated_resources(
        &self,
        _: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<DeltaAnswers>, Status> {
        Err(Status::unimplemented(
            "only the state of the world is served",
        ))
    }
}

async fn serve(
    service: &str,
    mut world: watch::Receiver<Arc<World>>,
    source: &Source,
    requests: &mut Streaming<DiscoveryRequest>,
    send: &mpsc::UnboundedSender<Result<DiscoveryResponse, Status>>,
    ledger: &Ledger,
) {
    let mut session = Session::default();
    let now = Arc::clone(&world.borrow_and_update());
    session.want(source.configs(&now).await);
    loop {
        if let Some(answer) = session.next()
            && send.send(Ok(answer)).is_err()
        {
            return;
        }
        tokio::select! {
            request = requests.message() => match request {
                Ok(Some(request)) => {
                    let refused = request.error_detail.map(|detail| detail.message);
                    if let Some(why) = &refused {
                        tracing::warn!(service, why, "the rate limit service refuses its configuration");
                    }
                    if session.answered(&request.response_nonce, refused.as_deref()) {
                        ledger.set(service, session.standing(service));
                    }
                }
                Ok(None) | Err(_) => return,
            },
            changed = world.changed() => {
                if changed.is_err() {
                    return;
                }
                tokio::time::sleep(COALESCE).await;
                let now = Arc::clone(&world.borrow_and_update());
                session.want(source.configs(&now).await);
                ledger.set(service, session.standing(service));
            }
        }
    }
}

/// What the services must know, by its name; nothing is known of a RateLimit that makes no sense.
type Wanted = BTreeMap<String, Option<RateLimitConfig>>;

/// Works out what the services must know.
#[derive(Clone)]
struct Source {
    root: String,
    programs: Arc<Programs>,
    clock: Clock,
}

impl Source {
    /// Of all Global RateLimits, on a thread of its own: how long it takes is the tenants' to say. Where all of them take too long, each
    /// is looked at by itself, and what takes too long alone stays as it was.
    async fn configs(&self, world: &Arc<World>) -> Wanted {
        self.programs.retain(world);
        let global = world.rate_limits.iter();
        let global: Vec<Arc<RateLimit>> = global
            .filter(|(_, limit)| limit.spec.share == Share::Global)
            .map(|(_, limit)| Arc::clone(limit))
            .collect();
        let (source, all, of) = (self.clone(), global.clone(), Arc::clone(world));
        let at_once = within_deadline(move || -> Wanted {
            all.iter()
                .map(|object| source.config(object, &of))
                .collect()
        });
        if let Ok(wanted) = at_once.await {
            return wanted;
        }
        let mut wanted = Wanted::new();
        for object in global {
            let name = name_of(&object);
            let (source, of) = (self.clone(), Arc::clone(world));
            let alone = within_deadline(move || source.config(&object, &of).1).await;
            wanted.insert(name, alone.unwrap_or_default());
        }
        wanted
    }

    fn config(&self, object: &RateLimit, world: &World) -> (String, Option<RateLimitConfig>) {
        let name = name_of(object);
        if quarantine::holds(object, (self.clock)()) {
            return (name, None);
        }
        let limit = valid::limit(object, world, &self.root, &self.programs).ok();
        let rules = object.status.as_ref().map(|status| status.rules.as_slice());
        let config = limit.map(|limit| services::config(&limit, rules.unwrap_or_default()));
        (name, config)
    }
}

fn name_of(object: &RateLimit) -> String {
    global::name(&Key::new(
        object.namespace().unwrap_or_default(),
        object.name_any(),
    ))
}

/// One service's stream: what it has, what it should have, and what it does not want. A configuration that it refuses leaves it with all that it
/// had, so that one bad RateLimit would keep it from every change; it is left out then, or as it was.
#[derive(Debug, Default)]
struct Session {
    number: u64,
    wanted: Configs,
    sent: Option<(String, Configs)>,
    accepted: Option<Configs>,
    /// Contents, in short, and why.
    refused: BTreeMap<String, (String, String)>,
}

impl Session {
    /// What makes no sense any more stays as it was.
    fn want(&mut self, configs: BTreeMap<String, Option<RateLimitConfig>>) {
        let before = std::mem::take(&mut self.wanted);
        let wanted = configs.into_iter().filter_map(|(name, config)| {
            let config = config.or_else(|| before.get(&name).cloned())?;
            Some((name, config))
        });
        self.wanted = wanted.collect();
        let wanted = &self.wanted;
        self.refused.retain(|name, (hash, _)| {
            wanted
                .get(name)
                .is_some_and(|config| services::hash(config) == *hash)
        });
    }

    /// What is to be sent now; nothing while an answer is awaited, or where nothing changed.
    fn next(&mut self) -> Option<DiscoveryResponse> {
        if self.sent.is_some() {
            return None;
        }
        let before = |name: &String| self.accepted.as_ref()?.get(name).cloned();
        let content = self.wanted.iter().filter_map(|(name, config)| {
            let content = if self.refused.contains_key(name) {
                before(name)?
            } else {
                config.clone()
            };
            Some((name.clone(), content))
        });
        let content: Configs = content.collect();
        if self.accepted.as_ref() == Some(&content) {
            return None;
        }
        self.number += 1;
        let nonce = self.number.to_string();
        let resources = content.values().map(|config| Any {
            type_url: TYPE.to_owned(),
            value: config.encode_to_vec(),
        });
        let answer = DiscoveryResponse {
            version_info: nonce.clone(),
            resources: resources.collect(),
            type_url: TYPE.to_owned(),
            nonce: nonce.clone(),
            ..DiscoveryResponse::default()
        };
        self.sent = Some((nonce, content));
        Some(answer)
    }

    /// Takes in an answer; says whether it was one to what was sent last.
    fn answered(&mut self, nonce: &str, refused: Option<&str>) -> bool {
        let Some((_, content)) = self.sent.take_if(|(sent, _)| sent == nonce) else {
            return false;
        };
        let Some(why) = refused else {
            self.accepted = Some(content);
            return true;
        };
        let before = self.accepted.get_or_insert_default();
        let is_new = |name: &&String| before.get(*name) != content.get(*name);
        // Its errors begin with the name of the configuration.
        let named = content
            .keys()
            .filter(|name| why.contains(&format!("{name}:")));
        let mut guilty: Vec<String> = named.filter(is_new).cloned().collect();
        if guilty.is_empty() {
            guilty = content.keys().filter(is_new).cloned().collect();
        }
        for name in guilty {
            let hash = content.get(&name).map(services::hash).unwrap_or_default();
            self.refused.insert(name, (hash, why.to_owned()));
        }
        true
    }

    fn standing(&self, service: &str) -> BTreeMap<String, LimitServiceStatus> {
        let of = |name: &String| LimitServiceStatus {
            name: service.to_owned(),
            accepted: self
                .accepted
                .as_ref()
                .and_then(|accepted| accepted.get(name))
                .map(services::hash),
            error: self.refused.get(name).map(|(_, why)| why.clone()),
        };
        self.wanted
            .keys()
            .map(|name| (name.clone(), of(name)))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use envoy_types::pb::ratelimit::config::ratelimit::v3::{RateLimitDescriptor, RateLimitPolicy};

    fn config(name: &str, requests: u32) -> RateLimitConfig {
        RateLimitConfig {
            name: name.to_owned(),
            domain: name.to_owned(),
            descriptors: vec![RateLimitDescriptor {
                key: "rule".to_owned(),
                rate_limit: Some(RateLimitPolicy {
                    requests_per_unit: requests,
                    ..RateLimitPolicy::default()
                }),
                ..RateLimitDescriptor::default()
            }],
        }
    }

    fn wanted(all: &[(&str, u32)]) -> BTreeMap<String, Option<RateLimitConfig>> {
        all.iter()
            .map(|(name, requests)| ((*name).to_owned(), Some(config(name, *requests))))
            .collect()
    }

    fn sent(session: &mut Session) -> Option<(String, usize)> {
        session
            .next()
            .map(|answer| (answer.nonce, answer.resources.len()))
    }

    #[test]
    fn a_service_gets_everything_once_and_again_when_something_changes() {
        let mut session = Session::default();
        assert_eq!(
            sent(&mut session),
            Some(("1".into(), 0)),
            "it waits for a first answer, also an empty one"
        );
        session.want(wanted(&[("shop/a", 1)]));
        assert_eq!(sent(&mut session), None, "one at a time");
        assert!(session.answered("1", None));
        assert_eq!(sent(&mut session), Some(("2".into(), 1)));
        assert!(!session.answered("1", None), "old news");
        assert!(session.answered("2", None));
        assert_eq!(sent(&mut session), None);
        // A RateLimit that makes no sense for the moment.
        session.want([("shop/a".to_owned(), None)].into());
        assert_eq!(sent(&mut session), None);
        let has = &session.standing("rls@a")["shop/a"];
        assert_eq!(has.accepted, Some(services::hash(&config("shop/a", 1))));
    }

    #[test]
    fn what_is_refused_keeps_nobody_else_from_changing() {
        let mut session = Session::default();
        session.want(wanted(&[("shop/a", 1), ("shop/b", 1)]));
        sent(&mut session);
        session.answered("1", None);
        session.want(wanted(&[("shop/a", 2), ("shop/b", 2)]));
        sent(&mut session);
        assert!(session.answered("2", Some("shop/a: duplicate descriptor")));
        let answer = session.next().unwrap();
        assert_eq!(answer.nonce, "3");
        session.answered("3", None);
        let standing = session.standing("rls@a");
        assert_eq!(
            standing["shop/a"].accepted,
            Some(services::hash(&config("shop/a", 1)))
        );
        assert_eq!(
            standing["shop/a"].error.as_deref(),
            Some("shop/a: duplicate descriptor")
        );
        assert_eq!(
            standing["shop/b"].accepted,
            Some(services::hash(&config("shop/b", 2)))
        );
        assert_eq!(sent(&mut session), None, "it is not tried again");
        session.want(wanted(&[("shop/a", 3), ("shop/b", 2)]));
        assert!(sent(&mut session).is_some());
        session.answered("4", None);
        assert_eq!(session.standing("rls@a")["shop/a"].error, None);
    }
}
