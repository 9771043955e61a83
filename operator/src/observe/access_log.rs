//! The access log service: the global proxy reports each first call, and what it reports is believed only from its own
//! identity, and only of callers that are what their certificate says.
//! <https://www.envoyproxy.io/docs/envoy/latest/api-v3/service/accesslog/v3/als.proto>

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Instant;

use envoy_types::pb::envoy::config::core::v3::address::Address as AddressKind;
use envoy_types::pb::envoy::config::core::v3::Address;
use envoy_types::pb::envoy::data::accesslog::v3::tls_properties::certificate_properties::subject_alt_name::San;
use envoy_types::pb::envoy::data::accesslog::v3::{AccessLogCommon, HttpAccessLogEntry};
use envoy_types::pb::envoy::service::accesslog::v3::access_log_service_server::AccessLogService;
use envoy_types::pb::envoy::service::accesslog::v3::stream_access_logs_message::LogEntries;
use envoy_types::pb::envoy::service::accesslog::v3::{
    StreamAccessLogsMessage, StreamAccessLogsResponse,
};
use fenceline_crds::Evidence;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};

use super::identity::Identity;
use super::peer::Door;
use super::resolve::{fences_of_caller, resolve};
use crate::fence::learn::Learner;
use crate::world::World;

/// Serves Envoy's access log stream.
pub struct AccessLog {
    pub door: Door,
    pub world: watch::Receiver<Arc<World>>,
    pub learner: Arc<Learner>,
    pub stop: CancellationToken,
}

/// One call, as the global proxy reports it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Seen<'a> {
    caller: Identity,
    address: IpAddr,
    authority: &'a str,
}

#[tonic::async_trait]
impl AccessLogService for AccessLog {
    async fn stream_access_logs(
        &self,
        request: Request<Streaming<StreamAccessLogsMessage>>,
    ) -> Result<Response<StreamAccessLogsResponse>, Status> {
        self.door.admit(request.metadata())?;
        let metrics = &self.door.metrics;
        follow(request, &self.stop, |entries, received| {
            if let LogEntries::HttpLogs(logs) = entries {
                for entry in &logs.log_entry {
                    metrics.observed(self.take(entry, received));
                }
            }
        })
        .await
    }
}

/// Has every message of a stream taken in, with the time at which it came, until the stream or the process ends.
pub(super) async fn follow(
    request: Request<Streaming<StreamAccessLogsMessage>>,
    stop: &CancellationToken,
    mut take: impl FnMut(LogEntries, Instant),
) -> Result<Response<StreamAccessLogsResponse>, Status> {
    let mut stream = request.into_inner();
    loop {
        let message = tokio::select! {
            message = stream.message() => message?,
            () = stop.cancelled() => return Err(Status::unavailable("shutting down")),
        };
        let Some(message) = message else { break };
        if let Some(entries) = message.log_entries {
            take(entries, Instant::now());
        }
    }
    Ok(Response::new(StreamAccessLogsResponse {}))
}

impl AccessLog {
    /// Takes one entry in; returns its outcome for the metrics. Never fails: a proxy may report anything.
    fn take(&self, entry: &HttpAccessLogEntry, received: Instant) -> &'static str {
        let Some(seen) = read(entry) else {
            return "incomplete";
        };
        // Every trust domain is a mesh of its own; its names and namespaces are not ours.
        if seen.caller.trust_domain != self.door.wanted.trust_domain {
            return "foreign_trust_domain";
        }
        let world = Arc::clone(&self.world.borrow());
        let fences = match fences_of_caller(&world, &seen.caller, seen.address) {
            Ok(fences) => fences,
            Err(unknown) => return unknown.outcome(),
        };
        match resolve(&world, &seen.caller.namespace, seen.authority) {
            Ok(host) => {
                let evidence = Evidence::GlobalProxy;
                let noted = self
                    .learner
                    .all_saw(&world, &fences, &host.fqdn, evidence, received);
                noted.outcome()
            }
            Err(why) => {
                for fence in &fences {
                    self.learner.saw_unresolved(fence, seen.authority, why);
                }
                "unresolved"
            }
        }
    }
}

/// What an entry says of a call, if it says enough.
fn read(entry: &HttpAccessLogEntry) -> Option<Seen<'_>> {
    let common = entry.common_properties.as_ref()?;
    let authority = entry.request.as_ref()?.authority.as_str();
    Some(Seen {
        caller: certificate(common)?,
        address: remote(common)?,
        authority,
    })
}

/// The one identity of the caller's certificate.
fn certificate(common: &AccessLogCommon) -> Option<Identity> {
    let certificate = common
        .tls_properties
        .as_ref()?
        .peer_certificate_properties
        .as_ref()?;
    let mut uris = certificate
        .subject_alt_name
        .iter()
        .filter_map(|name| match &name.san {
            Some(San::Uri(uri)) => Some(uri),
            Some(San::Dns(_)) | None => None,
        });
    let uri = uris.next()?;
    uris.next()
        .is_none()
        .then(|| Identity::parse(uri))
        .flatten()
}

/// The address at the other end of the connection, not what a header claims.
pub(super) fn remote(common: &AccessLogCommon) -> Option<IpAddr> {
    ip(common.downstream_direct_remote_address.as_ref()?)
}

pub(super) fn ip(address: &Address) -> Option<IpAddr> {
    let Some(AddressKind::SocketAddress(socket)) = &address.address else {
        return None;
    };
    socket.address.parse().ok()
}
