//! Who may speak to us: the global proxy of first calls, and each workload of its own.

use std::sync::Arc;

use tonic::Status;
use tonic::metadata::MetadataMap;

use super::forwarded;
use super::identity::Identity;
use crate::metrics::Metrics;

/// Who is speaking. Our own sidecar, whose identity is `own`, terminates mutual TLS and says so, in one header.
pub(super) fn peer(metadata: &MetadataMap, own: &Identity) -> Option<Identity> {
    let mut values = metadata.get_all(forwarded::HEADER).iter();
    let header = values.next()?.to_str().ok()?;
    // A sidecar joins what comes in several.
    if values.next().is_some() {
        return None;
    }
    forwarded::peer(header, own)
}

/// Lets in one identity alone.
#[derive(Clone)]
pub struct Door {
    pub wanted: Identity,
    /// Our own, in whose name our sidecar vouches for others.
    pub own: Identity,
    pub metrics: Arc<Metrics>,
}

impl Door {
    /// # Errors
    /// `PERMISSION_DENIED` for everybody else.
    pub fn admit(&self, metadata: &MetadataMap) -> Result<(), Status> {
        let peer = peer(metadata, &self.own);
        if peer.as_ref() == Some(&self.wanted) {
            return Ok(());
        }
        self.metrics.refused_streams.inc();
        let who = peer.map_or_else(|| "nobody we know".to_owned(), |peer| peer.to_string());
        tracing::warn!(peer = %who, wanted = %self.wanted, "refused");
        Err(Status::permission_denied(format!(
            "only {} is served here; this is {who}",
            self.wanted
        )))
    }
}
