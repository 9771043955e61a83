//! A gate between the operator and kube-apiserver, which lets so many writes through and then none: wherever a change can be
//! interrupted, a test can interrupt it there.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Context;
use bytes::Bytes;
use http::{Method, Request, Response};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use kube::client::Body;
use serde_json::Value;
use tokio::net::TcpListener;
use tokio::sync::watch;

use crate::control_plane::{ADDRESS, API_PORT, GATE_PORT};

/// Writes to these are counted; leases, events and the like pass freely.
const COUNTED: [&str; 2] = ["/apis/networking.istio.io/", "/apis/fenceline.dev/"];

/// What becomes of the write at which the gate closes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Closes {
    /// kube-apiserver never sees it.
    Before,
    /// It is stored, but nobody is told.
    After,
}

/// A write that met the gate.
#[derive(Clone, Debug)]
pub struct Write {
    pub verb: Method,
    /// As in the API's paths, with the subresource: `routers/status`.
    pub kind: String,
    pub name: String,
    /// What it says, as JSON.
    pub body: Value,
}

/// How many writes still pass, and the write that did not.
#[derive(Debug, Default)]
struct State {
    closes: Mutex<Option<(usize, Closes)>>,
    met: watch::Sender<Option<Write>>,
}

/// A running gate.
#[derive(Debug)]
pub struct Gate {
    state: Arc<State>,
    serving: tokio::task::JoinHandle<()>,
}

impl Drop for Gate {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

impl Gate {
    /// Starts a gate, open.
    ///
    /// # Errors
    /// Fails when it cannot listen.
    pub async fn start() -> anyhow::Result<Self> {
        let address: SocketAddr = format!("{ADDRESS}:{GATE_PORT}").parse()?;
        let listener = TcpListener::bind(address).await.context("the gate")?;
        let client = upstream()?;
        let state = Arc::new(State::default());
        let shared = Arc::clone(&state);
        let serving = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (client, state) = (client.clone(), Arc::clone(&shared));
                let service = service_fn(move |request| {
                    let (client, state) = (client.clone(), Arc::clone(&state));
                    async move { Ok::<_, Infallible>(state.pass(&client, request).await) }
                });
                tokio::spawn(async move {
                    let connection = auto::Builder::new(TokioExecutor::new());
                    // Whoever called may be gone.
                    let _ = connection
                        .serve_connection(TokioIo::new(stream), service)
                        .await;
                });
            }
        });
        Ok(Self { state, serving })
    }

    /// Where an operator finds kube-apiserver through this gate.
    pub fn server() -> String {
        format!("http://{ADDRESS}:{GATE_PORT}")
    }

    /// Closes at the write of this number, counted from 1 and from now on.
    pub fn close_at(&self, number: usize, closes: Closes) {
        self.state.met.send_replace(None);
        *self.state.lock() = Some((number, closes));
    }

    /// Lets everything through.
    pub fn open(&self) {
        *self.state.lock() = None;
    }

    /// The write at which it closed, if it has.
    pub fn met(&self) -> Option<Write> {
        self.state.met.borrow().clone()
    }

    /// Waits until it closes.
    ///
    /// # Errors
    /// Fails when it does not in time.
    pub async fn until_met(&self, patience: Duration) -> anyhow::Result<Write> {
        let mut met = self.state.met.subscribe();
        let met = tokio::time::timeout(patience, met.wait_for(Option::is_some)).await;
        met.context("no write came")??.clone().context("a write")
    }
}

/// kube-apiserver, for whoever has a token.
fn upstream() -> anyhow::Result<kube::Client> {
    let mut config = kube::Config::new(format!("https://{ADDRESS}:{API_PORT}").parse()?);
    config.accept_invalid_certs = true;
    config.default_retry = false;
    Ok(kube::Client::try_from(config)?)
}

impl State {
    fn lock(&self) -> std::sync::MutexGuard<'_, Option<(usize, Closes)>> {
        self.closes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether this write is the one to close at; one that comes later never passes.
    async fn count(&self) -> Option<Closes> {
        let closed = {
            let mut closes = self.lock();
            match closes.as_mut() {
                None => return None,
                Some((0, _)) => None,
                Some((left, closes)) => {
                    *left -= 1;
                    if *left > 0 {
                        return None;
                    }
                    Some(*closes)
                }
            }
        };
        match closed {
            Some(closes) => Some(closes),
            None => std::future::pending().await,
        }
    }

    async fn pass(&self, client: &kube::Client, request: Request<Incoming>) -> Response<Body> {
        let (parts, body) = request.into_parts();
        let body = match body.collect().await {
            Ok(body) => body.to_bytes(),
            Err(_) => Bytes::new(),
        };
        let write = write(&parts, &body);
        let closes = match &write {
            Some(_) => self.count().await,
            None => None,
        };
        if closes == Some(Closes::Before) {
            self.met.send_replace(write);
            return std::future::pending().await;
        }
        let answer = client
            .send(Request::from_parts(parts, Body::from(body)))
            .await;
        if closes == Some(Closes::After) {
            self.met.send_replace(write);
            return std::future::pending().await;
        }
        answer.unwrap_or_else(|error| {
            let mut answer = Response::new(Body::from(error.to_string().into_bytes()));
            *answer.status_mut() = http::StatusCode::BAD_GATEWAY;
            answer
        })
    }
}

/// What is written, if it counts.
fn write(parts: &http::request::Parts, body: &[u8]) -> Option<Write> {
    let changes = [Method::POST, Method::PUT, Method::PATCH, Method::DELETE];
    let path = parts.uri.path();
    let counts = COUNTED.iter().any(|group| path.starts_with(group));
    if !counts || !changes.contains(&parts.method) {
        return None;
    }
    // /apis/GROUP/VERSION/namespaces/NAMESPACE/KIND/NAME/SUBRESOURCE
    let mut of_namespace = path.split('/').skip(6);
    let kind = of_namespace.next().unwrap_or_default();
    let body: Value = serde_json::from_slice(body).unwrap_or_default();
    let name = of_namespace
        .next()
        .or_else(|| body["metadata"]["name"].as_str());
    let name = name.unwrap_or_default().to_owned();
    let kind = match of_namespace.next() {
        Some(subresource) => format!("{kind}/{subresource}"),
        None => kind.to_owned(),
    };
    Some(Write {
        verb: parts.method.clone(),
        kind,
        name,
        body,
    })
}
