//! How the gRPC ports are served: what one message, stream and connection may cost. docs/bounds.md has the numbers.

use std::time::Duration;

use envoy_types::ext_authz::v3::pb::{Authorization, AuthorizationServer};
use envoy_types::pb::envoy::service::accesslog::v3::access_log_service_server::{
    AccessLogService, AccessLogServiceServer,
};
use envoy_types::pb::envoy::service::discovery::v3::aggregated_discovery_service_server::{
    AggregatedDiscoveryService, AggregatedDiscoveryServiceServer,
};
use tonic::transport::Server;
use tonic::transport::server::Router;

/// A workload's proxy sends up to 16 KiB at once, Envoy's default, and one entry more.
pub const CALLERS_MESSAGE: usize = 64 << 10;
/// A call's headers have 60 KiB at most, Envoy's default, and come once in a question and once in an access log.
pub const PARTNERS_MESSAGE: usize = 256 << 10;
/// Who is gone without a word is noticed after both.
const KEEPALIVE: Duration = Duration::from_secs(30);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);
/// What a stream may send before somebody has read it.
const WINDOW: u32 = 64 << 10;

fn server() -> Server {
    Server::builder()
        .http2_keepalive_interval(Some(KEEPALIVE))
        .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
        .initial_stream_window_size(WINDOW)
}

/// Port 18101: any workload of the mesh.
pub fn callers(log: impl AccessLogService) -> Router {
    let log = AccessLogServiceServer::new(log).max_decoding_message_size(CALLERS_MESSAGE);
    server().add_service(log)
}

/// Port 18100: the global proxy.
pub fn global_proxy(log: impl AccessLogService, authorization: impl Authorization) -> Router {
    let log = AccessLogServiceServer::new(log).max_decoding_message_size(PARTNERS_MESSAGE);
    let authorization =
        AuthorizationServer::new(authorization).max_decoding_message_size(PARTNERS_MESSAGE);
    server().add_service(log).add_service(authorization)
}

/// Port 18102: the rate limit service.
pub fn rate_limits(discovery: impl AggregatedDiscoveryService) -> Router {
    let discovery = AggregatedDiscoveryServiceServer::new(discovery)
        .max_decoding_message_size(PARTNERS_MESSAGE);
    server().add_service(discovery)
}

#[cfg(test)]
mod tests {
    use envoy_types::pb::envoy::service::accesslog::v3::access_log_service_client::AccessLogServiceClient;
    use envoy_types::pb::envoy::service::accesslog::v3::stream_access_logs_message::Identifier;
    use envoy_types::pb::envoy::service::accesslog::v3::{
        StreamAccessLogsMessage, StreamAccessLogsResponse,
    };
    use prost::Message as _;
    use tokio::net::TcpListener;
    use tokio_stream::wrappers::TcpListenerStream;
    use tonic::{Code, Request, Response, Status, Streaming};

    use super::*;

    /// Takes everything in.
    struct Reader;

    #[tonic::async_trait]
    impl AccessLogService for Reader {
        async fn stream_access_logs(
            &self,
            request: Request<Streaming<StreamAccessLogsMessage>>,
        ) -> Result<Response<StreamAccessLogsResponse>, Status> {
            let mut messages = request.into_inner();
            while messages.message().await?.is_some() {}
            Ok(Response::new(StreamAccessLogsResponse {}))
        }
    }

    fn message(bytes: usize) -> StreamAccessLogsMessage {
        let named = |length: usize| StreamAccessLogsMessage {
            identifier: Some(Identifier {
                log_name: "x".repeat(length),
                ..Identifier::default()
            }),
            ..StreamAccessLogsMessage::default()
        };
        let frame = named(bytes).encoded_len() - bytes;
        named(bytes - frame)
    }

    #[tokio::test]
    async fn a_message_has_its_bound() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let incoming = TcpListenerStream::new(listener);
        tokio::spawn(callers(Reader).serve_with_incoming(incoming));
        let mut client = AccessLogServiceClient::connect(format!("http://{address}"))
            .await
            .unwrap();
        let at = message(CALLERS_MESSAGE);
        assert_eq!(at.encoded_len(), CALLERS_MESSAGE);
        let many = tokio_stream::iter(vec![at; 10]);
        client.stream_access_logs(many).await.unwrap();
        let above = tokio_stream::iter(vec![message(CALLERS_MESSAGE + 1)]);
        let refused = client.stream_access_logs(above).await.unwrap_err();
        assert_eq!(refused.code(), Code::OutOfRange, "{refused}");
        // Nobody else is any the worse for it.
        let at = tokio_stream::iter(vec![message(1000)]);
        client.stream_access_logs(at).await.unwrap();
    }
}
