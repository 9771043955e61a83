//! What a proxy says of its own configuration: Envoy's Prometheus port, which every Istio sidecar has open, and the
//! statistics of the cluster and listener managers, which Istio always keeps (pkg/bootstrap/config.go).

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
const STATS: &str = "/stats/prometheus?filter=^(cluster_manager%5C.(warming_clusters%7Ccds.update_(rejected%7Csuccess))%7C\
                     listener_manager%5C.lds.update_(rejected%7Csuccess)%7Clistener_manager%5C.(listener_(added%7Cmodified%7Cremoved)%7Ctotal_listeners_warming))$";
const TIMEOUT: Duration = Duration::from_millis(100);
/// How often a proxy may miss to answer in time, and how long it is left alone then, as where a NetworkPolicy is in the way.
const STRIKES: u32 = 5;
const BLIND: Duration = Duration::from_secs(60);
const MOST_BLIND: usize = 4096;
/// An answer has a few hundred bytes; a caller may answer what it likes.
const ENOUGH: usize = 64 << 10;
/// Calls of one caller share a look.
const FRESH: Duration = Duration::from_millis(4);

/// A proxy's configuration at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct State {
    /// How many listeners were ever added, changed or removed.
    pub listeners: u64,
    /// How many clusters wait for their endpoints, and listeners for their routes.
    pub warming: u64,
    /// How often it refused clusters or listeners.
    pub rejected: u64,
    /// How often these were clusters.
    pub rejected_clusters: u64,
    /// How often it took them.
    pub accepted: u64,
}

impl State {
    /// Whether it refused nothing since, but took something.
    pub fn is_well_since(&self, before: &Self) -> bool {
        self.rejected == before.rejected && self.accepted > before.accepted && self.warming == 0
    }
}

/// Looks at proxies.
#[derive(Debug)]
pub struct Eyes {
    client: Client<HttpConnector, Empty<Bytes>>,
    /// Who did not answer, how often since it last did, and when.
    blind: std::sync::Mutex<HashMap<IpAddr, (u32, Instant)>>,
}

/// The last look at one proxy.
#[derive(Debug, Default)]
pub struct Seen(Mutex<Option<(Instant, Option<State>)>>);

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
    /// The configuration of the proxy at `address`, as of some milliseconds ago at most. Nothing where it cannot be asked.
    pub async fn look(&self, address: IpAddr, seen: &Seen) -> Option<State> {
        let mut last = seen.0.lock().await;
        if let Some((at, state)) = *last
            && at.elapsed() < FRESH
        {
            return state;
        }
        if self.is_blind(address) {
            return None;
        }
        let answer = tokio::time::timeout(TIMEOUT, self.ask(address)).await;
        // A refusal is quick, and of a proxy that only starts.
        match &answer {
            Err(_) => self.did_not_answer(address),
            Ok(_) => self.answered(address),
        }
        let state = answer.ok().flatten();
        *last = Some((Instant::now(), state));
        state
    }

    fn is_blind(&self, address: IpAddr) -> bool {
        let blind = self.blind.lock().unwrap_or_else(PoisonError::into_inner);
        blind
            .get(&address)
            .is_some_and(|(times, last)| *times >= STRIKES && last.elapsed() < BLIND)
    }

    fn did_not_answer(&self, address: IpAddr) {
        let mut blind = self.blind.lock().unwrap_or_else(PoisonError::into_inner);
        if blind.len() >= MOST_BLIND {
            blind.clear();
        }
        let (times, last) = blind.entry(address).or_insert_with(|| (0, Instant::now()));
        *times += 1;
        *last = Instant::now();
    }

    fn answered(&self, address: IpAddr) {
        let mut blind = self.blind.lock().unwrap_or_else(PoisonError::into_inner);
        blind.remove(&address);
    }

    async fn ask(&self, address: IpAddr) -> Option<State> {
        let uri = format!("http://{}{STATS}", SocketAddr::new(address, PORT));
        let response = self.client.get(uri.parse().ok()?).await.ok()?;
        let body = Limited::new(response.into_body(), ENOUGH);
        let body = body.collect().await.ok()?.to_bytes();
        parse(std::str::from_utf8(&body).ok()?)
    }
}

/// Reads the text format of Prometheus.
fn parse(text: &str) -> Option<State> {
    let value = |name: &str| -> Option<u64> {
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix('{'))?;
        line.rsplit_once(' ')?.1.trim().parse().ok()
    };
    let listeners = ["added", "modified", "removed"]
        .map(|what| value(&format!("envoy_listener_manager_listener_{what}")));
    let warming = [
        "envoy_cluster_manager_warming_clusters",
        "envoy_listener_manager_total_listeners_warming",
    ];
    // Counted from the first time on.
    let updates =
        |of: &str, what: &str| value(&format!("envoy_{of}_update_{what}")).unwrap_or_default();
    let [cds, lds] = ["cluster_manager_cds", "listener_manager_lds"];
    let rejected_clusters = updates(cds, "rejected");
    Some(State {
        rejected: rejected_clusters + updates(lds, "rejected"),
        rejected_clusters,
        accepted: updates(cds, "success") + updates(lds, "success"),
        listeners: listeners.into_iter().sum::<Option<u64>>()?,
        warming: warming.into_iter().map(value).sum::<Option<u64>>()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn envoys_text_is_understood_and_anything_else_is_not() {
        let text = "# TYPE envoy_listener_manager_listener_added counter\n\
                    envoy_listener_manager_listener_added{} 12\n\
                    envoy_listener_manager_listener_modified{} 3\n\
                    envoy_listener_manager_listener_removed{} 2\n\
                    envoy_listener_manager_total_listeners_warming{} 1\n\
                    # TYPE envoy_cluster_manager_warming_clusters gauge\n\
                    envoy_cluster_manager_warming_clusters{} 4\n\
                    envoy_cluster_manager_cds_update_rejected{} 2\n";
        let want = State {
            listeners: 17,
            warming: 5,
            rejected: 2,
            rejected_clusters: 2,
            accepted: 0,
        };
        assert_eq!(parse(text), Some(want));
        for junk in ["", "hello", "envoy_listener_manager_listener_added{} x"] {
            assert_eq!(parse(junk), None, "{junk}");
        }
    }
}
