//! `/livez`, `/readyz` and `/metrics`.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use hyper_util::service::TowerToHyperService;
use prometheus_client::registry::Registry;
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, watch};

use crate::metrics::ApiHealth;
use crate::process::watchdog::Health;

/// How many connections are served side by side: those of kubelets and of a few Prometheuses.
const CONNECTIONS: usize = 64;
/// How long a request's head may take.
const HEAD: Duration = Duration::from_secs(5);
/// How long a connection lives.
const CONNECTION: Duration = Duration::from_secs(600);

#[derive(Clone)]
struct Admin {
    registry: Arc<Registry>,
    synced: watch::Receiver<bool>,
    api: ApiHealth,
    health: Health,
}

/// The routes; `synced` and `api` decide whether the process is ready, `health` whether it is alive.
pub fn router(
    registry: Registry,
    synced: watch::Receiver<bool>,
    api: ApiHealth,
    health: Health,
) -> Router {
    Router::new()
        .route("/livez", get(alive))
        .route("/readyz", get(ready))
        .route("/metrics", get(metrics))
        .with_state(Admin {
            registry: Arc::new(registry),
            synced,
            api,
            health,
        })
}

/// Serves the routes for as long as it is polled. Anybody may connect, so connections are counted and have time limits.
pub(crate) async fn serve(listener: TcpListener, routes: Router) {
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else {
            return;
        };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "the admin port");
                tokio::time::sleep(HEAD).await;
                continue;
            }
        };
        let service = TowerToHyperService::new(routes.clone());
        tokio::spawn(async move {
            let mut builder = auto::Builder::new(TokioExecutor::new());
            builder
                .http1()
                .timer(TokioTimer::new())
                .header_read_timeout(HEAD);
            builder
                .http2()
                .timer(TokioTimer::new())
                .max_concurrent_streams(8);
            let connection = builder.serve_connection(TokioIo::new(stream), service);
            // What goes wrong with a connection is its client's.
            let _ = tokio::time::timeout(CONNECTION, connection).await;
            drop(place);
        });
    }
}

async fn alive(State(admin): State<Admin>) -> (StatusCode, String) {
    match admin.health.trouble() {
        None => (StatusCode::OK, "ok\n".to_owned()),
        Some(trouble) => (StatusCode::SERVICE_UNAVAILABLE, format!("{trouble}\n")),
    }
}

async fn ready(State(admin): State<Admin>) -> (StatusCode, &'static str) {
    if admin.health.trouble().is_some() {
        (StatusCode::SERVICE_UNAVAILABLE, "a task stalls\n")
    } else if !*admin.synced.borrow() {
        (
            StatusCode::SERVICE_UNAVAILABLE,
            "the mesh is not listed yet\n",
        )
    } else if !admin.api.is_up() {
        (
            StatusCode::SERVICE_UNAVAILABLE,
            "kube-apiserver does not answer\n",
        )
    } else {
        (StatusCode::OK, "ok\n")
    }
}

async fn metrics(State(admin): State<Admin>) -> impl IntoResponse {
    let mut text = String::new();
    let status = match prometheus_client::encoding::text::encode(&mut text, &admin.registry) {
        Ok(()) => StatusCode::OK,
        Err(_) => StatusCode::INTERNAL_SERVER_ERROR,
    };
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    (status, [(header::CONTENT_TYPE, kind)], text)
}
