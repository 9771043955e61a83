//! `fenceline explain`: looks at the mesh once and says what the operator makes of it.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail};

use crate::args::Explain;
use crate::fence::explain;
use crate::metrics::Metrics;
use crate::process::Pulses;
use crate::world::feed;

/// How long the mesh may take to be listed.
const PATIENCE: Duration = Duration::from_secs(60);

/// What there is to say about a workload, and a host of its.
///
/// # Errors
/// Fails where the cluster cannot be read, and where the workload has no fence.
pub async fn explain(args: Explain) -> anyhow::Result<String> {
    let Explain {
        workload,
        host,
        namespace,
        mesh,
    } = args;
    let settings = mesh.settings();
    let client = kube::Client::try_default()
        .await
        .context("no access to a Kubernetes API")?;
    let metrics: Arc<Metrics> = Arc::default();
    let mut feed = feed::start(&client, &settings, &metrics, Pulses::default().of("world"));
    let listed = tokio::time::timeout(PATIENCE, feed.synced.wait_for(|synced| *synced)).await;
    listed.context("not everything could be listed: may you read Services, Pods, Istio's objects and Fenceline's?")??;
    let world = Arc::clone(&feed.world.borrow());
    let now = crate::clock::system();
    let fences = explain::find(&world, &namespace, &workload);
    if fences.is_empty() {
        bail!(
            "no ServiceFence in {namespace} is called {workload} or selects its pods: it has the whole mesh in scope, \
             unless somebody wrote a Sidecar. A ServiceFence, a FencePolicy or the label fenceline.dev/fence=enforce changes that"
        );
    }
    let texts = fences.into_iter().map(|(_, fence)| match &host {
        Some(host) => explain::host(fence, &world, &settings, now, host),
        None => explain::fence(fence, &world, &settings, now),
    });
    Ok(texts.collect::<Vec<_>>().join("\n"))
}
