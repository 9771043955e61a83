//! What a caller's proxy says of its own clusters: Envoy's Prometheus port, which every Istio sidecar has open, and the
//! statistics of the cluster manager, which Istio always keeps (pkg/bootstrap/config.go).
//!
//! istiod sends routes right behind the clusters they lead to, and Envoy routes by them at once, while a new cluster waits
//! for its endpoints. In between a call finds no cluster, and fails. So a held call goes back only while nothing warms.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::PoisonError;
use std::time::{Duration, Instant};

use http_body_util::{BodyExt, Empty, Limited};
use hyper::body::Bytes;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use tokio::sync::Mutex;

/// <https://istio.io/latest/docs/ops/deployment/application-requirements/#ports-used-by-istio>
const PORT: u16 = 15090;
const STATS: &str =
    "/stats/prometheus?filter=cluster_manager%5C.(cluster_added%7Cwarming_clusters)$";
const TIMEOUT: Duration = Duration::from_millis(100);
/// How long a proxy is left alone that did not answer, as where a NetworkPolicy is in the way.
const BLIND: Duration = Duration::from_secs(60);
const MOST_BLIND: usize = 4096;
/// An answer has a few hundred bytes; a caller may answer what it likes.
const ENOUGH: usize = 64 << 10;
/// Calls of one caller share a look.
const FRESH: Duration = Duration::from_millis(4);

/// A proxy's clusters at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Clusters {
    /// How many were ever added.
    pub added: u64,
    /// How many wait for their endpoints.
    pub warming: u64,
}

/// Looks at proxies.
pub struct Eyes {
    client: Client<HttpConnector, Empty<Bytes>>,
    /// Who did not answer, and when.
    blind: std::sync::Mutex<HashMap<IpAddr, Instant>>,
}

/// The last look at one proxy.
#[derive(Debug, Default)]
pub struct Seen(Mutex<Option<(Instant, Option<Clusters>)>>);

impl Default for Eyes {
    fn default() -> Self {
        let mut connector = HttpConnector::new();
        connector.set_connect_timeout(Some(TIMEOUT));
        connector.set_nodelay(true);
        let client = Client::builder(TokioExecutor::new())
            .pool_idle_timeout(Duration::from_secs(5))
            .build(connector);
        let blind = std::sync::Mutex::default();
        Self { client, blind }
    }
}

impl Eyes {
    /// The clusters of the proxy at `address`, as of some milliseconds ago at most. Nothing where it cannot be asked.
    pub async fn look(&self, address: IpAddr, seen: &Seen) -> Option<Clusters> {
        let mut last = seen.0.lock().await;
        if let Some((at, clusters)) = *last
            && at.elapsed() < FRESH
        {
            return clusters;
        }
        if self.is_blind(address) {
            return None;
        }
        let clusters = tokio::time::timeout(TIMEOUT, self.ask(address)).await;
        let clusters = clusters.ok().flatten();
        if clusters.is_none() {
            self.did_not_answer(address);
        }
        *last = Some((Instant::now(), clusters));
        clusters
    }

    fn is_blind(&self, address: IpAddr) -> bool {
        let blind = self.blind.lock().unwrap_or_else(PoisonError::into_inner);
        blind
            .get(&address)
            .is_some_and(|since| since.elapsed() < BLIND)
    }

    fn did_not_answer(&self, address: IpAddr) {
        let mut blind = self.blind.lock().unwrap_or_else(PoisonError::into_inner);
        if blind.len() >= MOST_BLIND {
            blind.clear();
        }
        blind.insert(address, Instant::now());
    }

    async fn ask(&self, address: IpAddr) -> Option<Clusters> {
        let uri = format!("http://{}{STATS}", SocketAddr::new(address, PORT));
        let response = self.client.get(uri.parse().ok()?).await.ok()?;
        let body = Limited::new(response.into_body(), ENOUGH);
        let body = body.collect().await.ok()?.to_bytes();
        parse(std::str::from_utf8(&body).ok()?)
    }
}

/// Reads the text format of Prometheus.
fn parse(text: &str) -> Option<Clusters> {
    let value = |name: &str| {
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix('{'))?;
        line.rsplit_once(' ')?.1.trim().parse().ok()
    };
    Some(Clusters {
        added: value("envoy_cluster_manager_cluster_added")?,
        warming: value("envoy_cluster_manager_warming_clusters")?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn envoys_text_is_understood_and_anything_else_is_not() {
        let text = "# TYPE envoy_cluster_manager_cluster_added counter\n\
                    envoy_cluster_manager_cluster_added{} 12\n\
                    # TYPE envoy_cluster_manager_warming_clusters gauge\n\
                    envoy_cluster_manager_warming_clusters{} 1\n";
        let want = Clusters {
            added: 12,
            warming: 1,
        };
        assert_eq!(parse(text), Some(want));
        for junk in ["", "hello", "envoy_cluster_manager_cluster_added{} x"] {
            assert_eq!(parse(junk), None, "{junk}");
        }
    }
}
