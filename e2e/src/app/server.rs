//! The echo server: HTTP/1.1, h2c and gRPC on one port, plain TCP on another.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::net::SocketAddr;

use bytes::Bytes;
use futures::StreamExt as _;
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tonic::body::Body;

use super::codec::BytesCodec;

/// What the server saw of one request: its answer's body.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Report {
    /// The pod that answered.
    pub pod: String,
    pub protocol: String,
    pub method: String,
    pub host: String,
    /// With the query.
    pub path: String,
    pub headers: BTreeMap<String, String>,
    pub body_bytes: usize,
}

impl Report {
    /// The identity that the pod's own sidecar vouches for: the last `URI=` of `x-forwarded-client-cert`.
    pub fn peer(&self) -> Option<&str> {
        let xfcc = self.headers.get("x-forwarded-client-cert")?;
        let last = xfcc
            .rsplit("URI=")
            .next()
            .filter(|_| xfcc.contains("URI="))?;
        last.split([';', ',']).next()
    }
}

#[derive(Clone, Debug)]
pub struct Server {
    pub pod: String,
}

impl Server {
    /// Serves HTTP/1.1, h2c and gRPC on `addr` until the process ends.
    pub async fn http(self, addr: SocketAddr) -> anyhow::Result<()> {
        let listener = TcpListener::bind(addr).await?;
        loop {
            let (stream, _) = listener.accept().await?;
            let server = self.clone();
            tokio::spawn(async move {
                let service = service_fn(move |request| server.clone().answer(request));
                let connection = auto::Builder::new(TokioExecutor::new());
                let _ = connection
                    .serve_connection_with_upgrades(TokioIo::new(stream), service)
                    .await;
            });
        }
    }

    /// Greets with the pod's name and then echoes bytes, on `addr`, until the process ends.
    pub async fn tcp(self, addr: SocketAddr) -> anyhow::Result<()> {
        let listener = TcpListener::bind(addr).await?;
        loop {
            let (mut stream, _) = listener.accept().await?;
            let greeting = format!("{}\n", self.pod);
            tokio::spawn(async move {
                stream.write_all(greeting.as_bytes()).await?;
                let (mut from, mut to) = stream.split();
                tokio::io::copy(&mut from, &mut to).await
            });
        }
    }

    async fn answer(self, request: Request<Incoming>) -> Result<Response<Body>, Infallible> {
        let grpc = request
            .headers()
            .get("content-type")
            .is_some_and(|value| value.as_bytes().starts_with(b"application/grpc"));
        // An honest gRPC server answers 200; another one is made by a request for another status.
        let hostile = request.headers().contains_key("x-echo-status");
        Ok(if grpc && !hostile {
            self.grpc(request).await
        } else {
            self.plain(request).await
        })
    }

    fn report(&self, request: &Request<Incoming>) -> Report {
        let host = request
            .headers()
            .get("host")
            .and_then(|value| value.to_str().ok());
        let authority = request
            .uri()
            .authority()
            .map(|authority| authority.as_str());
        Report {
            pod: self.pod.clone(),
            protocol: format!("{:?}", request.version()),
            method: request.method().to_string(),
            host: host.or(authority).unwrap_or_default().to_owned(),
            path: request
                .uri()
                .path_and_query()
                .map(ToString::to_string)
                .unwrap_or_default(),
            headers: request
                .headers()
                .iter()
                .map(|(name, value)| {
                    (
                        name.to_string(),
                        String::from_utf8_lossy(value.as_bytes()).into_owned(),
                    )
                })
                .collect(),
            body_bytes: 0,
        }
    }

    /// `x-echo-status` chooses the status, `x-echo-location` adds a location, `x-echo-delay` waits so many milliseconds
    /// before it answers. An upgrade is granted: the report, after its length, then an echo.
    async fn plain(self, request: Request<Incoming>) -> Response<Body> {
        let mut report = self.report(&request);
        if request.headers().contains_key("upgrade") {
            return upgrade(report, request);
        }
        let delay = report.headers.get("x-echo-delay");
        if let Some(delay) = delay.and_then(|value| value.parse().ok()) {
            tokio::time::sleep(std::time::Duration::from_millis(delay)).await;
        }
        report.body_bytes = match request.into_body().collect().await {
            Ok(body) => body.to_bytes().len(),
            Err(_) => return Response::new(Body::empty()),
        };
        let status = report
            .headers
            .get("x-echo-status")
            .and_then(|value| value.parse().ok())
            .unwrap_or(StatusCode::OK);
        let body = serde_json::to_vec(&report).unwrap_or_default();
        let mut response = Response::builder().status(status);
        if let Some(location) = report.headers.get("x-echo-location") {
            response = response.header("location", location);
        }
        response
            .header("content-type", "application/json")
            .body(Body::new(Full::new(Bytes::from(body))))
            .unwrap_or_default()
    }

    /// Answers each message of the stream with a report; a unary call is a stream of one. `x-echo-times` has each answered
    /// so often.
    async fn grpc(self, request: Request<Incoming>) -> Response<Body> {
        let report = self.report(&request);
        let times = report.headers.get("x-echo-times");
        let times = times.and_then(|times| times.parse().ok()).unwrap_or(1);
        let echo = tower_echo(times, move |message: Bytes| {
            let seen = Report {
                body_bytes: message.len(),
                ..report.clone()
            };
            Bytes::from(serde_json::to_vec(&seen).unwrap_or_default())
        });
        tonic::server::Grpc::new(BytesCodec)
            .streaming(echo, request)
            .await
    }
}

fn upgrade(report: Report, request: Request<Incoming>) -> Response<Body> {
    tokio::spawn(async move {
        let mut stream = TokioIo::new(hyper::upgrade::on(request).await?);
        let report = serde_json::to_vec(&report)?;
        stream.write_u32(report.len().try_into()?).await?;
        stream.write_all(&report).await?;
        let (mut from, mut to) = tokio::io::split(stream);
        anyhow::Ok(tokio::io::copy(&mut from, &mut to).await?)
    });
    Response::builder()
        .status(StatusCode::SWITCHING_PROTOCOLS)
        .header("connection", "Upgrade")
        .header("upgrade", "websocket")
        .body(Body::empty())
        .unwrap_or_default()
}

type Replies =
    std::pin::Pin<Box<dyn tokio_stream::Stream<Item = Result<Bytes, tonic::Status>> + Send>>;

#[derive(Clone)]
struct Echo<F>(usize, F);

fn tower_echo<F: Fn(Bytes) -> Bytes + Clone + Send + 'static>(times: usize, reply: F) -> Echo<F> {
    Echo(times, reply)
}

impl<F> tonic::server::StreamingService<Bytes> for Echo<F>
where
    F: Fn(Bytes) -> Bytes + Clone + Send + 'static,
{
    type Response = Bytes;
    type ResponseStream = Replies;
    type Future = std::future::Ready<Result<tonic::Response<Replies>, tonic::Status>>;

    fn call(&mut self, request: tonic::Request<tonic::Streaming<Bytes>>) -> Self::Future {
        let Self(times, reply) = self.clone();
        let replies = request.into_inner().map(move |message| message.map(&reply));
        let replies = replies.flat_map(move |reply| futures::stream::iter(vec![reply; times]));
        std::future::ready(Ok(tonic::Response::new(Box::pin(replies))))
    }
}

/// Reads the greeting of the TCP server and what it echoes of `payload`.
pub(super) async fn tcp_round_trip(addr: SocketAddr, payload: &[u8]) -> anyhow::Result<Vec<u8>> {
    let mut stream = tokio::net::TcpStream::connect(addr).await?;
    stream.write_all(payload).await?;
    stream.shutdown().await?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await?;
    Ok(answer)
}
