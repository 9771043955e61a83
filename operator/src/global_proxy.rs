//! Says when the global proxy is gone, and when it is back: an event on its Service. Fences say so in their conditions.

use std::sync::Arc;

use k8s_openapi::api::core::v1::Service;
use kube::Resource as _;
use kube::api::ObjectMeta;
use tokio::sync::watch;

use crate::fence::Settings;
use crate::status::StatusWriter;
use crate::world::World;

/// What first calls get meanwhile; for people.
pub const GONE: &str = "the global proxy has no ready endpoints: calls to hosts that are not in scope yet fail with 503 until it has";

/// Follows the global proxy for as long as it is polled: the leader's work.
pub async fn run(
    mut world: watch::Receiver<Arc<World>>,
    status: Arc<StatusWriter>,
    settings: Settings,
) {
    let mut gone = false;
    loop {
        let now = world.borrow_and_update().global_proxy_gone;
        if now != gone {
            gone = now;
            let (reason, note) = if gone {
                ("GlobalProxyGone", GONE)
            } else {
                (
                    "GlobalProxyBack",
                    "the global proxy has ready endpoints again",
                )
            };
            tracing::warn!(service = %settings.global_proxy, "{note}");
            let service = Service {
                metadata: ObjectMeta {
                    name: Some(settings.global_proxy.name.clone()),
                    namespace: Some(settings.global_proxy.namespace.clone()),
                    ..ObjectMeta::default()
                },
                ..Service::default()
            };
            let about = service.object_ref(&());
            status.event(&about, gone, reason, note.to_owned()).await;
        }
        if world.changed().await.is_err() {
            return;
        }
    }
}
