//! The access logs of fenced workloads' own proxies: connections that no Service in scope took, where `nonHTTP: Learn` asks for
//! them. Each proxy is believed of its own pods alone.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Instant;

use envoy_types::pb::envoy::data::accesslog::v3::{AccessLogCommon, TcpAccessLogEntry};
use envoy_types::pb::envoy::service::accesslog::v3::access_log_service_server::AccessLogService;
use envoy_types::pb::envoy::service::accesslog::v3::stream_access_logs_message::LogEntries;
use envoy_types::pb::envoy::service::accesslog::v3::{
    StreamAccessLogsMessage, StreamAccessLogsResponse,
};
use fenceline_crds::{Evidence, NonHttp};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};

use super::access_log::{follow, ip, remote};
use super::identity::Identity;
use super::peer::peer;
use super::resolve::{fences_of_caller, resolve};
use crate::fence::learn::Learner;
use crate::metrics::Metrics;
use crate::world::{Key, World};

/// Serves the access log streams of callers.
pub struct CallersLog {
    pub world: watch::Receiver<Arc<World>>,
    pub learner: Arc<Learner>,
    pub trust_domain: String,
    pub metrics: Arc<Metrics>,
    pub stop: CancellationToken,
}

#[tonic::async_trait]
impl AccessLogService for CallersLog {
    async fn stream_access_logs(
        &self,
        request: Request<Streaming<StreamAccessLogsMessage>>,
    ) -> Result<Response<StreamAccessLogsResponse>, Status> {
        let caller = peer(request.metadata()).filter(|peer| peer.trust_domain == self.trust_domain);
        let Some(caller) = caller else {
            self.metrics.refused_streams.inc();
            return Err(Status::permission_denied(
                "only workloads of the mesh may report their connections",
            ));
        };
        follow(request, &self.stop, |entries, received| {
            if let LogEntries::TcpLogs(logs) = entries {
                for entry in &logs.log_entry {
                    self.metrics.observed(self.take(&caller, entry, received));
                }
            }
        })
        .await
    }
}

impl CallersLog {
    /// Takes one connection in; returns its outcome for the metrics.
    fn take(
        &self,
        caller: &Identity,
        entry: &TcpAccessLogEntry,
        received: Instant,
    ) -> &'static str {
        let Some((from, to)) = entry.common_properties.as_ref().and_then(ends) else {
            return "incomplete";
        };
        let world = Arc::clone(&self.world.borrow());
        let fences = match fences_of_caller(&world, caller, from) {
            Ok(fences) => fences,
            Err(unknown) => return unknown.outcome(),
        };
        // Addresses of the world outside are most of what comes here, and nothing to learn.
        let Ok(host) = resolve(&world, &caller.namespace, &to.to_string()) else {
            return "outside";
        };
        let learns = |fence: &&Key| {
            let fence = world.fences.get(*fence);
            fence.is_some_and(|fence| fence.spec.non_http == NonHttp::Learn)
        };
        let fences = fences.iter().filter(learns);
        let evidence = Evidence::AccessLog;
        let noted = self
            .learner
            .all_saw(&world, fences, &host.fqdn, evidence, received);
        noted.outcome()
    }
}

/// Who connected, and to which address.
fn ends(common: &AccessLogCommon) -> Option<(IpAddr, IpAddr)> {
    let to = common.downstream_local_address.as_ref()?;
    Some((remote(common)?, ip(to)?))
}
