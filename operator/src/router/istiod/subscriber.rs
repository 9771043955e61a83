//! What an istiod sends: a stream of its own, as the proxy of a pod that has every routed host in scope and nothing else.
//!
//! A push is recognised by its number: istiod counts them, and a nonce begins with the count (pilot/pkg/xds, `NextVersion`). The first
//! push that has something is the one that every proxy must have acknowledged.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use envoy_types::pb::envoy::config::core::v3::Node;
use envoy_types::pb::envoy::service::discovery::v3::aggregated_discovery_service_client::AggregatedDiscoveryServiceClient;
use envoy_types::pb::envoy::service::discovery::v3::{DiscoveryRequest, DiscoveryResponse};
use envoy_types::pb::google::protobuf::{Struct, Value, value::Kind as Of};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::Request;
use tonic::metadata::MetadataValue;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint};

use super::{Access, Kind, Push, push_of};

/// How long until a stream that broke is opened again.
const AGAIN: Duration = Duration::from_secs(1);
const CONNECT: Duration = Duration::from_secs(5);

/// Names that somebody waits for, or waits to see gone: each with the first push that was so.
#[derive(Debug, Default)]
struct Seen {
    /// What was last sent, of each kind, and by which push.
    last: BTreeMap<Kind, (Push, Vec<Vec<u8>>)>,
    since: BTreeMap<Wanted, Push>,
    /// What somebody waits for.
    wanted: BTreeSet<Wanted>,
}

/// A name in what istiod sends.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Wanted {
    pub kind: Kind,
    pub name: String,
    /// Whether it is to be there, or not to be there any more.
    pub there: bool,
}

impl Seen {
    fn look(&mut self, wanted: &Wanted) {
        let Some((push, resources)) = self.last.get(&wanted.kind) else {
            return;
        };
        let name = wanted.name.as_bytes();
        let there = resources.iter().any(|resource| contains(resource, name));
        if there == wanted.there {
            self.since.entry(wanted.clone()).or_insert(*push);
        } else {
            self.since.remove(wanted);
        }
    }
}

fn contains(resource: &[u8], name: &[u8]) -> bool {
    !name.is_empty() && resource.windows(name.len()).any(|part| part == name)
}

/// One istiod's stream.
#[derive(Debug)]
pub struct Subscriber {
    seen: Arc<Mutex<Seen>>,
    /// The names of the route configurations to ask for.
    routes: watch::Sender<BTreeSet<String>>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Subscriber {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Subscriber {
    /// Follows the istiod at `address` until it is dropped.
    pub fn new(address: std::net::SocketAddr, access: Arc<Access>) -> Self {
        let seen = Arc::default();
        let (routes, wanted) = watch::channel(BTreeSet::new());
        let stream = follow(address, access, Arc::clone(&seen), wanted);
        let task = tokio::spawn(stream);
        Self { seen, routes, task }
    }

    /// Asks for these route configurations too.
    pub fn watch_routes(&self, names: &BTreeSet<String>) {
        self.routes.send_if_modified(|known| {
            let before = known.len();
            known.extend(names.iter().cloned());
            known.len() != before
        });
    }

    /// From now on it is noted when a name comes or goes.
    pub fn expect(&self, wanted: &[Wanted]) {
        let mut seen = self.lock();
        for wanted in wanted {
            if seen.wanted.insert(wanted.clone()) {
                seen.look(wanted);
            }
        }
    }

    /// The first push with which all of these were so; nothing while one is not.
    pub fn since(&self, wanted: &[Wanted]) -> Option<Push> {
        let seen = self.lock();
        let pushes = wanted.iter().map(|wanted| seen.since.get(wanted).copied());
        pushes.collect::<Option<Vec<_>>>()?.into_iter().max()
    }

    /// Whether istiod has ever sent anything here.
    pub fn answers(&self) -> bool {
        !self.lock().last.is_empty()
    }

    /// Nobody waits for these any more.
    pub fn forget(&self, wanted: &[Wanted]) {
        let mut seen = self.lock();
        for wanted in wanted {
            seen.wanted.remove(wanted);
            seen.since.remove(wanted);
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn follow(
    address: std::net::SocketAddr,
    access: Arc<Access>,
    seen: Arc<Mutex<Seen>>,
    mut routes: watch::Receiver<BTreeSet<String>>,
) {
    loop {
        if let Err(error) = stream(address, &access, &seen, &mut routes).await {
            let error = crate::chain(&error);
            tracing::debug!(%address, error, "istiod's stream");
        }
        tokio::time::sleep(AGAIN).await;
    }
}

/// Why a stream ended.
#[derive(Debug, thiserror::Error)]
enum Ended {
    #[error("{0}")]
    File(String, #[source] std::io::Error),
    #[error("connecting")]
    Connect(#[from] tonic::transport::Error),
    #[error("the token has characters that no header may have")]
    Token,
    #[error("istiod refused: {0}")]
    Refused(#[from] tonic::Status),
}

async fn stream(
    address: std::net::SocketAddr,
    access: &Access,
    seen: &Mutex<Seen>,
    routes: &mut watch::Receiver<BTreeSet<String>>,
) -> Result<(), Ended> {
    let read = |path: &std::path::Path| {
        std::fs::read(path).map_err(|error| Ended::File(path.display().to_string(), error))
    };
    let mut endpoint =
        Endpoint::from_shared(format!("https://{address}"))?.connect_timeout(CONNECT);
    let root = Certificate::from_pem(read(&access.root_certificate)?);
    let tls = ClientTlsConfig::new()
        .ca_certificate(root)
        .domain_name(access.server_name.clone());
    endpoint = endpoint.tls_config(tls)?;
    let channel: Channel = endpoint.connect().await?;
    let (send, requests) = mpsc::unbounded_channel();
    let mut request = Request::new(UnboundedReceiverStream::new(requests));
    let token = String::from_utf8_lossy(&read(&access.token)?)
        .trim()
        .to_owned();
    let token: MetadataValue<_> = format!("Bearer {token}")
        .parse()
        .map_err(|_| Ended::Token)?;
    request.metadata_mut().insert("authorization", token);

    {
        // Another istiod may answer now, which counts its pushes anew.
        let mut seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.last.clear();
        seen.since.clear();
    }
    let node = node(access);
    let ask = |kind: Kind, names: Vec<String>, answered: Option<&DiscoveryResponse>| {
        // Nobody takes it once the stream has ended, which is seen below.
        let _ = send.send(DiscoveryRequest {
            node: Some(node.clone()),
            type_url: kind.type_url().to_owned(),
            resource_names: names,
            version_info: answered
                .map(|it| it.version_info.clone())
                .unwrap_or_default(),
            response_nonce: answered.map(|it| it.nonce.clone()).unwrap_or_default(),
            ..DiscoveryRequest::default()
        });
    };
    let names = |routes: &watch::Receiver<BTreeSet<String>>| {
        routes.borrow().iter().cloned().collect::<Vec<_>>()
    };
    ask(Kind::Clusters, Vec::new(), None);
    ask(Kind::Listeners, Vec::new(), None);
    let mut client =
        AggregatedDiscoveryServiceClient::new(channel).max_decoding_message_size(256 << 20);
    let mut answers = client
        .stream_aggregated_resources(request)
        .await?
        .into_inner();
    let mut last_routes: Option<DiscoveryResponse> = None;
    routes.mark_changed();
    loop {
        tokio::select! {
            answer = answers.message() => {
                let Some(answer) = answer? else { return Ok(()) };
                let Some(kind) = Kind::of(&answer.type_url) else { continue };
                let asked = if kind == Kind::Routes { names(routes) } else { Vec::new() };
                ask(kind, asked, Some(&answer));
                if kind == Kind::Routes {
                    last_routes = Some(DiscoveryResponse { resources: Vec::new(), ..answer.clone() });
                }
                take(seen, kind, answer);
            }
            changed = routes.changed() => {
                if changed.is_err() {
                    return Ok(());
                }
                let asked = names(routes);
                if !asked.is_empty() {
                    ask(Kind::Routes, asked, last_routes.as_ref());
                }
            }
        }
    }
}

fn take(seen: &Mutex<Seen>, kind: Kind, answer: DiscoveryResponse) {
    let push = push_of(&answer.nonce).unwrap_or_default();
    let resources = answer.resources.into_iter().map(|any| any.value).collect();
    let mut seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
    seen.last.insert(kind, (push, resources));
    let wanted: Vec<Wanted> = seen
        .wanted
        .iter()
        .filter(|one| one.kind == kind)
        .cloned()
        .collect();
    for wanted in wanted {
        seen.look(&wanted);
    }
}

/// Who we say we are: istiod holds a proxy's identity against its token.
fn node(access: &Access) -> Node {
    let text = |text: &str| Value {
        kind: Some(Of::StringValue(text.to_owned())),
    };
    let of = |fields: Vec<(&str, Value)>| Struct {
        fields: fields
            .into_iter()
            .map(|(name, value)| (name.to_owned(), value))
            .collect(),
    };
    let labels = of(vec![(super::VIEW_LABEL.0, text(super::VIEW_LABEL.1))]);
    let metadata = of(vec![
        ("NAMESPACE", text(&access.namespace)),
        ("SERVICE_ACCOUNT", text(&access.service_account)),
        ("CLUSTER_ID", text(&access.cluster)),
        ("GENERATOR", text("")),
        (
            "LABELS",
            Value {
                kind: Some(Of::StructValue(labels)),
            },
        ),
    ]);
    let Access {
        name, namespace, ..
    } = access;
    Node {
        // TYPE~IP~NAME.NAMESPACE~DOMAIN; nobody has this address (RFC 5737).
        id: format!(
            "sidecar~192.0.2.1~{name}.{namespace}~{namespace}.svc.{}",
            access.cluster_domain
        ),
        metadata: Some(metadata),
        ..Node::default()
    }
}
