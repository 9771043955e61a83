//! Who may speak to us: the global proxy of first calls, and each workload of its own.

use std::sync::Arc;

use tonic::Status;
use tonic::metadata::MetadataMap;

use super::identity::Identity;
use crate::metrics::Metrics;

/// The header in which a sidecar vouches for its peer.
const FORWARDED_CLIENT_CERT: &str = "x-forwarded-client-cert";

/// Who is speaking. Our own sidecar terminates mutual TLS and says so.
pub(super) fn peer(metadata: &MetadataMap) -> Option<Identity> {
    // A header that comes twice is one list.
    let mut values = metadata.get_all(FORWARDED_CLIENT_CERT).iter();
    let peer = values.next_back().and_then(|value| value.to_str().ok());
    peer.and_then(Identity::from_forwarded)
}

/// Lets in one identity alone.
#[derive(Clone)]
pub struct Door {
    pub wanted: Identity,
    pub metrics: Arc<Metrics>,
}

impl Door {
    /// # Errors
    /// `PERMISSION_DENIED` for everybody else.
    pub fn admit(&self, metadata: &MetadataMap) -> Result<(), Status> {
        let peer = peer(metadata);
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
