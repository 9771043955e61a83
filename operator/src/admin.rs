//! `/livez`, `/readyz` and `/metrics`.

use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use prometheus_client::registry::Registry;
use tokio::sync::watch;

use crate::metrics::ApiHealth;

#[derive(Clone)]
struct Admin {
    registry: Arc<Registry>,
    synced: watch::Receiver<bool>,
    api: ApiHealth,
}

/// The routes; `synced` and `api` decide whether the process is ready.
pub fn router(registry: Registry, synced: watch::Receiver<bool>, api: ApiHealth) -> Router {
    Router::new()
        .route("/livez", get(|| async { "ok\n" }))
        .route("/readyz", get(ready))
        .route("/metrics", get(metrics))
        .with_state(Admin {
            registry: Arc::new(registry),
            synced,
            api,
        })
}

async fn ready(State(admin): State<Admin>) -> (StatusCode, &'static str) {
    if !*admin.synced.borrow() {
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
