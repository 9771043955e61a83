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
use super::reporters::{Reporters, STREAMS_PER_POD, pods_of};
use super::resolve::{fences_of_caller, resolve};
use crate::fence::learn::Learner;
use crate::metrics::Metrics;
use crate::world::{Key, World};

/// What these bounds are called. A report that is dropped is made again when the workload connects again.
const REPORTS: &str = "reports_per_second";
const STREAMS: &str = "report_streams";

/// Serves the access log streams of callers.
pub struct CallersLog {
    pub world: watch::Receiver<Arc<World>>,
    pub learner: Arc<Learner>,
    /// Our own identity, in whose name our sidecar vouches for others.
    pub own: Identity,
    pub reporters: Arc<Reporters>,
    pub metrics: Arc<Metrics>,
    pub stop: CancellationToken,
}

#[tonic::async_trait]
impl AccessLogService for CallersLog {
    async fn stream_access_logs(
        &self,
        request: Request<Streaming<StreamAccessLogsMessage>>,
    ) -> Result<Response<StreamAccessLogsResponse>, Status> {
        let caller = peer(request.metadata(), &self.own);
        let caller = caller.filter(|peer| peer.trust_domain == self.own.trust_domain);
        let Some(caller) = caller else {
            self.metrics.refused_streams.inc();
            return Err(Status::permission_denied(
                "only workloads of the mesh may report their connections",
            ));
        };
        let pods = || pods_of(&self.world.borrow(), &caller);
        let Some(pass) = self.reporters.enter(&caller, pods(), Instant::now()) else {
            self.metrics.drop_over(STREAMS);
            return Err(Status::resource_exhausted(format!(
                "{caller} has {STREAMS_PER_POD} streams for each of its pods, and no more are served"
            )));
        };
        follow(request, &self.stop, |entries, received| {
            if let LogEntries::TcpLogs(logs) = entries {
                let all = &logs.log_entry;
                let admitted = pass.admits(all.len(), pods(), received);
                for (number, entry) in all.iter().enumerate() {
                    if number < admitted {
                        self.metrics.observed(self.take(&caller, entry, received));
                    } else {
                        self.metrics.drop_over(REPORTS);
                    }
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
