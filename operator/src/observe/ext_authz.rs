//! The external authorization service: the global proxy asks what to do with each first call.
//! <https://www.envoyproxy.io/docs/envoy/latest/api-v3/service/auth/v3/external_auth.proto>
//!
//! Answers to HTTP are redirects to the very same URL, which the caller's own proxy follows, or refusals. gRPC knows no
//! redirects, and Envoy would make a gRPC error of ours; so for gRPC the answer is a header on a request that may go on, by
//! which the global proxy's own routes redirect it.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use envoy_types::ext_authz::v3::pb::{Authorization, CheckRequest, CheckResponse, HttpStatusCode};
use envoy_types::ext_authz::v3::{
    CheckResponseExt, DeniedHttpResponseBuilder, OkHttpResponseBuilder,
};
use envoy_types::pb::envoy::config::core::v3::Address;
use envoy_types::pb::envoy::config::core::v3::address::Address as AddressKind;
use envoy_types::pb::envoy::config::core::v3::socket_address::PortSpecifier;
use fenceline_crds::Evidence;
use tokio::sync::watch;
use tonic::{Request, Response, Status};

use super::first_call::{Answer, Asked, Decision, Hold, Port, Refusal, decide};
use super::hold::{Attempt, Ended, Holder};
use super::identity::Identity;
use super::peer::Door;
use crate::clock::Clock;
use crate::fence::Settings;
use crate::fence::learn::{Learner, Noted};
use crate::fence::redirect::{FORWARD, PASS, REPLY};
use crate::metrics::{Metrics, outcome};
use crate::world::World;

/// By which the global proxy's routes know what we want done with a gRPC call: `replay`, or a value for [`REPLY`].
pub const ANSWER: &str = "x-fenceline-answer";
const REPLAY: &str = "replay";
const REASON: &str = "x-fenceline-reason";

/// Answers the global proxy.
pub struct ExtAuthz {
    pub door: Door,
    pub world: watch::Receiver<Arc<World>>,
    pub settings: Settings,
    pub learner: Arc<Learner>,
    pub holder: Holder,
    pub metrics: Arc<Metrics>,
    pub clock: Clock,
}

/// What is asked, in what of the request matters to us.
#[derive(Debug)]
struct Question<'a> {
    caller: Identity,
    address: IpAddr,
    port: u16,
    authority: &'a str,
    path: &'a str,
    headers: &'a HashMap<String, String>,
}

impl<'a> Question<'a> {
    /// Nothing, where a part is missing: that was not asked by our configuration.
    fn read(request: &'a CheckRequest) -> Option<Self> {
        let attributes = request.attributes.as_ref()?;
        let source = attributes.source.as_ref()?;
        let destination = attributes.destination.as_ref()?;
        let http = attributes.request.as_ref()?.http.as_ref()?;
        let (address, _) = socket(source.address.as_ref()?)?;
        let (_, port) = socket(destination.address.as_ref()?)?;
        Some(Self {
            caller: Identity::parse(&source.principal)?,
            address,
            port,
            authority: &http.host,
            path: &http.path,
            headers: &http.headers,
        })
    }

    fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(String::as_str)
    }

    fn is_grpc(&self) -> bool {
        self.header("content-type")
            .is_some_and(|kind| kind.starts_with("application/grpc"))
    }

    /// The same URL again.
    fn location(&self) -> String {
        format!("http://{}{}", self.authority, self.path)
    }
}

fn socket(address: &Address) -> Option<(IpAddr, u16)> {
    let AddressKind::SocketAddress(socket) = address.address.as_ref()? else {
        return None;
    };
    let port = match socket.port_specifier.as_ref()? {
        PortSpecifier::PortValue(port) => u16::try_from(*port).ok()?,
        PortSpecifier::NamedPort(_) => return None,
    };
    Some((socket.address.parse().ok()?, port))
}

#[tonic::async_trait]
impl Authorization for ExtAuthz {
    async fn check(
        &self,
        request: Request<CheckRequest>,
    ) -> Result<Response<CheckResponse>, Status> {
        let received = Instant::now();
        self.door.admit(request.metadata())?;
        let Some(question) = Question::read(request.get_ref()) else {
            return Err(Status::invalid_argument(
                "want a caller with a SPIFFE identity, both addresses, and an HTTP request",
            ));
        };
        Ok(Response::new(self.answer(&question, received).await))
    }
}

impl ExtAuthz {
    async fn answer(&self, question: &Question<'_>, received: Instant) -> CheckResponse {
        let world = Arc::clone(&self.world.borrow());
        let asked = Asked {
            caller: &question.caller,
            address: question.address,
            authority: question.authority,
            port: if question.port == self.settings.ask_port {
                Port::Ask
            } else {
                Port::Forward
            },
            grpc: question.is_grpc(),
        };
        let decision = decide(&world, &self.settings, &asked);
        let full = self.learn(&world, &decision, question.authority, received);
        drop(world);
        match decision.answer {
            // Its host will not come into scope, however long it is held.
            Answer::Hold(hold) if full => {
                self.say(question, asked.port, *hold.otherwise, "at once")
            }
            Answer::Hold(hold) => match self.hold(question, &hold).await {
                Ok(replayed) => replayed,
                Err(why) => {
                    // The mesh may have changed meanwhile.
                    let decision = decide(&self.world.borrow(), &self.settings, &asked);
                    let answer = match decision.answer {
                        Answer::Hold(hold) => *hold.otherwise,
                        other => other,
                    };
                    self.say(question, asked.port, answer, why)
                }
            },
            other => self.say(question, asked.port, other, "at once"),
        }
    }

    /// Says whether the fence has learnt as many hosts as it can, and not this one.
    fn learn(
        &self,
        world: &World,
        decision: &Decision,
        authority: &str,
        received: Instant,
    ) -> bool {
        match &decision.host {
            Ok(host) => {
                let (fences, evidence) = (&decision.fences, Evidence::GlobalProxy);
                let noted = self
                    .learner
                    .all_saw(world, fences, &host.fqdn, evidence, received);
                noted == Noted::Full
            }
            Err(why) => {
                for fence in &decision.fences {
                    self.learner.saw_unresolved(fence, authority, *why);
                }
                false
            }
        }
    }

    /// # Errors
    /// Says why the call could not be held until its host was in scope.
    async fn hold(
        &self,
        question: &Question<'_>,
        hold: &Hold,
    ) -> Result<CheckResponse, &'static str> {
        let now = u64::try_from((self.clock)().as_millisecond()).unwrap_or_default();
        let whole = u64::try_from(hold.hold_for.as_millis()).unwrap_or(u64::MAX);
        let latest = now.saturating_add(whole);
        // An application may pass a mark on with a call of its own, where it means nothing.
        let journey = journey(question, hold);
        let mark = question.header(REPLY).and_then(Attempt::parse);
        let mark = mark.filter(|mark| mark.journey == journey);
        let known = mark.or_else(|| self.holder.answered(journey));
        let Attempt { number, until, .. } = known.unwrap_or(Attempt {
            number: 0,
            until: latest,
            journey,
        });
        let until = until.min(latest);
        let rest = Duration::from_millis(until.saturating_sub(now));
        match self.holder.hold(question.address, hold, number, rest).await {
            Ended::InScope => {
                self.count("replayed");
                let next = Attempt {
                    number: number.saturating_add(1),
                    until,
                    journey,
                };
                if number > 0 {
                    return Ok(replay(question, Some(next.to_string())));
                }
                // Most calls come once, and nothing of ours should reach a callee without need.
                self.holder.remember(next);
                Ok(replay(question, None))
            }
            Ended::TooLate => Err("too late"),
            Ended::TooMany => Err("too many"),
        }
    }

    /// An answer other than to hold. `when` tells apart in the log what was held in vain.
    fn say(
        &self,
        question: &Question<'_>,
        port: Port,
        answer: Answer,
        when: &'static str,
    ) -> CheckResponse {
        match answer {
            Answer::Forward => {
                self.count(if when == "at once" {
                    "forwarded"
                } else {
                    "forwarded_after_hold"
                });
                match port {
                    Port::Ask if !question.is_grpc() => redirect(question, Some(FORWARD)),
                    _ => allow(None),
                }
            }
            Answer::Pass => {
                self.count("passed");
                replay(question, Some(PASS.to_owned()))
            }
            Answer::Refuse(why) => {
                self.count("refused");
                tracing::debug!(caller = %question.caller, host = question.authority, ?why, when, "refused");
                refuse(&why)
            }
            // `otherwise` is never to hold again.
            Answer::Hold(_) => refuse(&Refusal::NotInScope),
        }
    }

    fn count(&self, what: &'static str) {
        self.metrics.first_calls.get_or_create(&outcome(what)).inc();
    }
}

/// One call on its way, by this replica's and any other's reckoning.
fn journey(question: &Question<'_>, hold: &Hold) -> u64 {
    let mut hasher = DefaultHasher::new();
    let id = question.header("x-request-id");
    (question.address, id, &hold.host.fqdn, question.path).hash(&mut hasher);
    hasher.finish()
}

/// Sends the call back to its proxy, marked perhaps.
fn replay(question: &Question<'_>, mark: Option<String>) -> CheckResponse {
    if question.is_grpc() {
        allow(Some(mark.unwrap_or_else(|| REPLAY.to_owned())))
    } else {
        redirect(question, mark.as_deref())
    }
}

fn redirect(question: &Question<'_>, mark: Option<&str>) -> CheckResponse {
    let mut denied = DeniedHttpResponseBuilder::new();
    denied
        .set_http_status(HttpStatusCode::TemporaryRedirect)
        .add_header("location", question.location(), None, false);
    if let Some(mark) = mark {
        denied.add_header(REPLY, mark, None, false);
    }
    respond(Status::permission_denied("try again"), denied)
}

fn refuse(why: &Refusal) -> CheckResponse {
    let mut denied = DeniedHttpResponseBuilder::new();
    denied
        .set_http_status(HttpStatusCode::ServiceUnavailable)
        .add_header(REASON, why.reason(), None, false)
        .set_body(format!("fenceline: {}\n", why.message()));
    if why.passes() {
        denied.add_header("retry-after", "1", None, false);
    }
    respond(Status::permission_denied(why.reason()), denied)
}

/// Lets the request go on, with the answer for the global proxy's routes.
fn allow(answer: Option<String>) -> CheckResponse {
    let mut ok = OkHttpResponseBuilder::new();
    match answer {
        Some(answer) => ok.add_header(ANSWER, answer, None, false),
        // Not the caller's own.
        None => ok.remove_header(ANSWER),
    };
    respond(Status::ok(""), ok)
}

fn respond(
    status: Status,
    response: impl envoy_types::ext_authz::v3::ToHttpResponse,
) -> CheckResponse {
    let mut answer = CheckResponse::with_status(status);
    answer.set_http_response(response);
    answer
}
