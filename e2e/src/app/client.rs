//! The client half: it makes requests from inside the pod, asked over a unix socket, which crosses network namespaces.

use std::collections::{BTreeMap, HashMap};
use std::io::ErrorKind;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use bytes::Bytes;
use http::{HeaderName, HeaderValue, Request, Response};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpStream, UnixListener, UnixStream};
use tokio::sync::Mutex;

use super::codec::BytesCodec;
use super::flood::{Flood, Flooded};
use super::server::{Report, tcp_round_trip};
use super::shapes::{self, RequestBody, Shape};

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Protocol {
    Http1,
    Http2,
    Grpc,
    Tcp,
}

/// One request to make.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Call {
    pub protocol: Protocol,
    pub method: String,
    /// What a URL would name, `host:port`; the port is left out of the Host header when it is the protocol's default.
    pub authority: String,
    pub path: String,
    /// Where to connect to: what DNS would have answered for the authority.
    pub connect: SocketAddr,
    pub headers: BTreeMap<String, String>,
    pub body_bytes: usize,
    pub timeout: Duration,
    #[serde(default)]
    pub shape: Shape,
}

impl Call {
    /// What a client writes into the Host header.
    pub(super) fn host(&self) -> &str {
        let authority = &self.authority;
        authority.strip_suffix(":80").unwrap_or(authority)
    }
}

/// What came of a call.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Outcome {
    /// HTTP status, or the gRPC code's HTTP twin: 200 for OK, 503 for UNAVAILABLE, 403 for PERMISSION_DENIED, 500 for
    /// others. 0: no answer at all.
    pub status: u16,
    pub headers: BTreeMap<String, String>,
    pub body: String,
    pub error: Option<String>,
    pub took: Duration,
}

impl Outcome {
    /// What the callee saw, where the answer came from an echo server.
    pub fn report(&self) -> anyhow::Result<Report> {
        serde_json::from_str(&self.body).with_context(|| format!("no report in {self:?}"))
    }
}

enum Connection {
    Http1(http1::SendRequest<RequestBody>),
    Http2(http2::SendRequest<RequestBody>),
}

impl Connection {
    async fn open(protocol: Protocol, addr: SocketAddr) -> anyhow::Result<Self> {
        let stream = TokioIo::new(TcpStream::connect(addr).await?);
        Ok(if protocol == Protocol::Http1 {
            let (send, connection) = http1::handshake(stream).await?;
            tokio::spawn(connection);
            Self::Http1(send)
        } else {
            let (send, connection) = http2::handshake(TokioExecutor::new(), stream).await?;
            tokio::spawn(connection);
            Self::Http2(send)
        })
    }

    async fn send(&mut self, request: Request<RequestBody>) -> hyper::Result<Response<Incoming>> {
        match self {
            Self::Http1(send) => {
                send.ready().await?;
                send.send_request(request).await
            }
            Self::Http2(send) => {
                send.ready().await?;
                send.send_request(request).await
            }
        }
    }

    fn is_closed(&self) -> bool {
        match self {
            Self::Http1(send) => send.is_closed(),
            Self::Http2(send) => send.is_closed(),
        }
    }
}

/// Makes calls and keeps its connections alive between them, as real applications do.
#[derive(Default)]
pub struct Caller {
    idle: Mutex<HashMap<(Protocol, SocketAddr), Connection>>,
}

impl Caller {
    pub async fn call(&self, call: &Call) -> Outcome {
        let start = Instant::now();
        let outcome = match tokio::time::timeout(call.timeout, self.attempt(call)).await {
            Ok(Ok(outcome)) => outcome,
            Ok(Err(error)) => Outcome {
                error: Some(format!("{error:#}")),
                ..Outcome::default()
            },
            Err(_) => Outcome {
                error: Some("timed out".into()),
                ..Outcome::default()
            },
        };
        Outcome {
            took: start.elapsed(),
            ..outcome
        }
    }

    async fn attempt(&self, call: &Call) -> anyhow::Result<Outcome> {
        match &call.shape {
            Shape::Talk(messages) => return shapes::talk(call, *messages).await,
            Shape::Tell(messages) => return shapes::tell(call, *messages).await,
            Shape::Upgrade(bytes) => return shapes::upgrade(call, *bytes).await,
            Shape::Raw(parts) => return shapes::raw(call, parts).await,
            Shape::Whole | Shape::Chunked(_) | Shape::Slow(_) => {}
        }
        match call.protocol {
            Protocol::Http1 | Protocol::Http2 => self.http(call).await,
            Protocol::Grpc => grpc(call).await,
            Protocol::Tcp => {
                let answer = tcp_round_trip(call.connect, &vec![b'x'; call.body_bytes]).await?;
                let body = String::from_utf8_lossy(&answer).into_owned();
                Ok(Outcome {
                    status: 200,
                    body,
                    ..Outcome::default()
                })
            }
        }
    }

    async fn http(&self, call: &Call) -> anyhow::Result<Outcome> {
        let key = (call.protocol, call.connect);
        let idle = self
            .idle
            .lock()
            .await
            .remove(&key)
            .filter(|idle| !idle.is_closed());
        let mut connection = match idle {
            Some(connection) => connection,
            None => Connection::open(call.protocol, call.connect).await?,
        };
        let host = call.host();
        let mut request = Request::builder().method(call.method.as_str());
        request = if call.protocol == Protocol::Http1 {
            request.uri(&call.path).header("host", host)
        } else {
            request.uri(format!("http://{host}{}", call.path))
        };
        for (name, value) in &call.headers {
            request = request.header(name, value);
        }
        if matches!(call.shape, Shape::Slow(_)) {
            request = request.header("content-length", call.body_bytes);
        }
        let request = request.body(shapes::body(call))?;
        let (head, body) = connection.send(request).await?.into_parts();
        let body = body.collect().await?.to_bytes();
        self.idle.lock().await.insert(key, connection);
        Ok(Outcome {
            status: head.status.as_u16(),
            headers: texts(&head.headers),
            body: String::from_utf8_lossy(&body).into_owned(),
            ..Outcome::default()
        })
    }
}

pub(super) fn texts(headers: &http::HeaderMap) -> BTreeMap<String, String> {
    let text = |value: &HeaderValue| String::from_utf8_lossy(value.as_bytes()).into_owned();
    headers
        .iter()
        .map(|(name, value)| (name.to_string(), text(value)))
        .collect()
}

pub(super) async fn grpc_client(
    call: &Call,
) -> anyhow::Result<tonic::client::Grpc<tonic::transport::Channel>> {
    let origin = format!("http://{}", call.authority).parse()?;
    let channel = tonic::transport::Endpoint::from_shared(format!("http://{}", call.connect))?
        .origin(origin)
        .connect()
        .await?;
    let mut client = tonic::client::Grpc::new(channel);
    client.ready().await?;
    Ok(client)
}

pub(super) fn headers_of<T>(call: &Call, request: &mut tonic::Request<T>) -> anyhow::Result<()> {
    let metadata = request.metadata_mut().as_mut();
    for (name, value) in &call.headers {
        let name: HeaderName = name.parse()?;
        metadata.insert(name, HeaderValue::from_str(value)?);
    }
    Ok(())
}

async fn grpc(call: &Call) -> anyhow::Result<Outcome> {
    let mut client = grpc_client(call).await?;
    let mut request = tonic::Request::new(Bytes::from(vec![b'x'; call.body_bytes]));
    headers_of(call, &mut request)?;
    let path = call.path.parse()?;
    let answer = client
        .unary::<Bytes, Bytes, _>(request, path, BytesCodec)
        .await;
    Ok(grpc_outcome(answer))
}

pub(super) fn grpc_outcome(answer: Result<tonic::Response<Bytes>, tonic::Status>) -> Outcome {
    match answer {
        Ok(answer) => Outcome {
            status: 200,
            headers: texts(answer.metadata().as_ref()),
            body: String::from_utf8_lossy(answer.get_ref()).into_owned(),
            ..Outcome::default()
        },
        Err(status) => Outcome {
            status: match status.code() {
                tonic::Code::Unavailable => 503,
                tonic::Code::PermissionDenied => 403,
                _ => 500,
            },
            headers: texts(status.metadata().as_ref()),
            error: Some(status.to_string()),
            ..Outcome::default()
        },
    }
}

/// What the control socket takes.
#[derive(Deserialize)]
#[serde(untagged)]
enum Asked {
    Flood(Flood),
    Call(Call),
}

/// Serves calls, one JSON line each, on a unix socket until the process ends.
pub async fn serve_control(path: &Path) -> anyhow::Result<()> {
    let listener = UnixListener::bind(path)?;
    let caller = Arc::new(Caller::default());
    loop {
        let (stream, _) = listener.accept().await?;
        let caller = Arc::clone(&caller);
        tokio::spawn(async move { serve_calls(stream, &caller).await });
    }
}

async fn serve_calls(mut stream: UnixStream, caller: &Caller) -> anyhow::Result<()> {
    let (from, mut to) = stream.split();
    let mut lines = BufReader::new(from).lines();
    while let Some(line) = lines.next_line().await? {
        let mut answer = match serde_json::from_str(&line)? {
            Asked::Flood(flood) => serde_json::to_vec(&flood.run().await)?,
            Asked::Call(call) => serde_json::to_vec(&caller.call(&call).await)?,
        };
        answer.push(b'\n');
        to.write_all(&answer).await?;
    }
    Ok(())
}

/// Connects as soon as the application has taken in others: a Unix socket refuses those that it has no room for at once.
async fn connect(socket: &Path) -> std::io::Result<UnixStream> {
    let mut tries = 0;
    loop {
        match UnixStream::connect(socket).await {
            Err(error) if error.kind() == ErrorKind::WouldBlock && tries < 1000 => {
                tries += 1;
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            result => return result,
        }
    }
}

/// Asks the application behind the socket to make a call.
///
/// # Errors
/// Fails when the application is not there; what goes wrong with the call itself is in the outcome.
pub async fn ask(socket: &Path, call: &Call) -> anyhow::Result<Outcome> {
    ask_for(socket, call).await
}

/// Asks it to make many.
///
/// # Errors
/// Fails when the application is not there.
pub async fn flood(socket: &Path, flood: &Flood) -> anyhow::Result<Flooded> {
    ask_for(socket, flood).await
}

async fn ask_for<T: DeserializeOwned>(socket: &Path, what: &impl Serialize) -> anyhow::Result<T> {
    let mut stream = connect(socket)
        .await
        .with_context(|| format!("the application behind {}", socket.display()))?;
    let mut line = serde_json::to_vec(what)?;
    line.push(b'\n');
    stream.write_all(&line).await?;
    let Some(answer) = BufReader::new(stream).lines().next_line().await? else {
        bail!("the application behind {} hung up", socket.display());
    };
    Ok(serde_json::from_str(&answer)?)
}
