//! Requests that are not just sent: bodies of unknown length, streams that talk, upgrades, and bytes as they are.

use std::convert::Infallible;
use std::time::Duration;

use anyhow::{Context, ensure};
use bytes::Bytes;
use futures::StreamExt;
use http::Request;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::Frame;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use super::client::{Call, Outcome, grpc_client, grpc_outcome, headers_of, texts};
use super::codec::BytesCodec;

/// How a request is sent.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Shape {
    /// At once, with its length.
    #[default]
    Whole,
    /// Its body in that many pieces, with pauses, and without a length.
    Chunked(usize),
    /// With its length, but the body in that many pieces, with pauses.
    Slow(usize),
    /// A gRPC stream of that many messages; each is sent once the one before it was answered. Its body is the first
    /// answer.
    Talk(usize),
    /// A gRPC stream of that many messages, all at once; its body is the first answer.
    Tell(usize),
    /// A WebSocket's upgrade, then that many bytes, which come back.
    Upgrade(usize),
    /// These bytes, each part once something came back for the one before; the answer is everything until the end.
    Raw(Vec<String>),
}

const PAUSE: Duration = Duration::from_millis(50);

pub(super) type RequestBody = UnsyncBoxBody<Bytes, Infallible>;

/// The body of a call, as its shape says.
pub(super) fn body(call: &Call) -> RequestBody {
    let whole = Bytes::from(vec![b'x'; call.body_bytes]);
    let (Shape::Chunked(pieces) | Shape::Slow(pieces)) = call.shape else {
        return Full::new(whole).boxed_unsync();
    };
    let size = call.body_bytes.div_ceil(pieces.max(1)).max(1);
    let (send, receive) = mpsc::channel(1);
    tokio::spawn(async move {
        for start in (0..whole.len()).step_by(size) {
            let piece = whole.slice(start..whole.len().min(start + size));
            if send.send(Ok(Frame::data(piece))).await.is_err() {
                return;
            }
            tokio::time::sleep(PAUSE).await;
        }
    });
    StreamBody::new(ReceiverStream::new(receive)).boxed_unsync()
}

/// A stream that sends a message only once the one before it was answered.
pub(super) async fn talk(call: &Call, messages: usize) -> anyhow::Result<Outcome> {
    let mut client = grpc_client(call).await?;
    let (send, receive) = mpsc::channel(1);
    let message = Bytes::from(vec![b'x'; call.body_bytes]);
    send.send(message.clone()).await?;
    let mut request = tonic::Request::new(ReceiverStream::new(receive));
    headers_of(call, &mut request)?;
    let path = call.path.parse()?;
    let answer = client.streaming(request, path, BytesCodec).await;
    let mut answers = match answer {
        Ok(answer) => answer.into_inner(),
        Err(status) => return Ok(grpc_outcome(Err(status))),
    };
    let mut first = None;
    for number in 1..=messages {
        let answer = match answers.next().await {
            Some(Ok(answer)) => answer,
            Some(Err(status)) => return Ok(grpc_outcome(Err(status))),
            None => anyhow::bail!("the stream ended after {} messages", number - 1),
        };
        first.get_or_insert(answer);
        if number < messages {
            send.send(message.clone()).await?;
        }
    }
    drop(send);
    ensure!(answers.next().await.is_none(), "more answers than messages");
    let first = first.context("no messages")?;
    Ok(grpc_outcome(Ok(tonic::Response::new(first))))
}

/// A stream of messages that waits for nothing; at least as many answers must come.
pub(super) async fn tell(call: &Call, messages: usize) -> anyhow::Result<Outcome> {
    let mut client = grpc_client(call).await?;
    let message = Bytes::from(vec![b'x'; call.body_bytes]);
    let mut request = tonic::Request::new(futures::stream::iter(vec![message; messages]));
    headers_of(call, &mut request)?;
    let path = call.path.parse()?;
    let answers = match client.streaming(request, path, BytesCodec).await {
        Ok(answer) => answer.into_inner(),
        Err(status) => return Ok(grpc_outcome(Err(status))),
    };
    let answers: Vec<Result<Bytes, tonic::Status>> = answers.collect().await;
    let answers: Result<Vec<Bytes>, tonic::Status> = answers.into_iter().collect();
    let answers = match answers {
        Ok(answers) => answers,
        Err(status) => return Ok(grpc_outcome(Err(status))),
    };
    let times = call.headers.get("x-echo-times");
    let times: usize = times.map_or(Ok(1), |times| times.parse())?;
    let want = messages * times;
    ensure!(answers.len() == want, "{} answers of {want}", answers.len());
    let first = answers.into_iter().next().context("no messages")?;
    Ok(grpc_outcome(Ok(tonic::Response::new(first))))
}

/// Upgrades, checks that bytes come back, and gives the server's report.
pub(super) async fn upgrade(call: &Call, bytes: usize) -> anyhow::Result<Outcome> {
    let stream = TokioIo::new(TcpStream::connect(call.connect).await?);
    let (mut send, connection) = http1::handshake(stream).await?;
    tokio::spawn(connection.with_upgrades());
    let mut request = Request::builder()
        .uri(&call.path)
        .header("host", call.host())
        .header("connection", "Upgrade")
        .header("upgrade", "websocket")
        .header("sec-websocket-version", "13")
        .header("sec-websocket-key", "ZmVuY2VsaW5lZmVuY2VsaQ==");
    for (name, value) in &call.headers {
        request = request.header(name, value);
    }
    let request = request.body(Full::new(Bytes::new()))?;
    let response = send.send_request(request).await?;
    let (status, headers) = (response.status().as_u16(), texts(response.headers()));
    let outcome = |body: String| Outcome {
        status,
        headers: headers.clone(),
        body,
        ..Outcome::default()
    };
    if status != 101 {
        let body = response.into_body().collect().await?.to_bytes();
        return Ok(outcome(String::from_utf8_lossy(&body).into_owned()));
    }
    let mut upgraded = TokioIo::new(hyper::upgrade::on(response).await?);
    let length = upgraded.read_u32().await?;
    let mut report = vec![0; length.try_into()?];
    upgraded.read_exact(&mut report).await?;
    let sent = vec![b'w'; bytes];
    upgraded.write_all(&sent).await?;
    let mut back = vec![0; bytes];
    upgraded.read_exact(&mut back).await?;
    ensure!(back == sent, "other bytes came back");
    Ok(outcome(String::from_utf8(report)?))
}

/// Sends bytes as they are.
pub(super) async fn raw(call: &Call, parts: &[String]) -> anyhow::Result<Outcome> {
    let mut stream = TcpStream::connect(call.connect).await?;
    let mut answer = vec![0; 64 * 1024];
    let mut filled = 0;
    for (number, part) in parts.iter().enumerate() {
        if number > 0 {
            filled += stream.read(&mut answer[filled..]).await?;
        }
        stream.write_all(part.as_bytes()).await?;
    }
    answer.truncate(filled);
    stream.read_to_end(&mut answer).await?;
    let body = String::from_utf8_lossy(&answer).into_owned();
    let status = body
        .split(' ')
        .nth(1)
        .and_then(|status| status.parse().ok());
    Ok(Outcome {
        status: status.unwrap_or_default(),
        body,
        ..Outcome::default()
    })
}
