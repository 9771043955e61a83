//! istiod's `/debug/syncz`: what each of its proxies was sent, acknowledged and refused.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use serde::Deserialize;

use super::{Access, Kind, Push, push_of};
use crate::world::Key;

const TIMEOUT: Duration = Duration::from_secs(5);

/// Asks istiods.
#[derive(Debug)]
pub struct Syncz {
    access: Arc<Access>,
    client: reqwest::Client,
}

/// One proxy.
#[derive(Clone, Debug, Deserialize)]
pub struct ProxyState {
    /// `POD.NAMESPACE`
    #[serde(rename = "proxy")]
    pub id: String,
    /// `sidecar` or `router`.
    #[serde(default)]
    pub proxy_type: String,
    /// As `1.31.0`, or what else its build says.
    #[serde(default)]
    pub istio_version: String,
    #[serde(default)]
    resources: HashMap<String, Resource>,
}

#[derive(Clone, Debug, Default, Deserialize)]
struct Resource {
    #[serde(default)]
    sent: String,
    #[serde(default)]
    acked: String,
    #[serde(default, rename = "lastError")]
    last_error: String,
}

impl ProxyState {
    /// The pod that it is of.
    pub fn pod(&self) -> Option<Key> {
        let (name, namespace) = self.id.rsplit_once('.')?;
        Some(Key::new(namespace, name))
    }

    /// The last push whose resources of a kind it has acknowledged, if it has all that it was sent.
    pub fn acknowledged(&self, kind: Kind) -> Option<Push> {
        let resource = self.resources.get(kind.type_url())?;
        (resource.sent == resource.acked).then(|| push_of(&resource.acked))?
    }

    /// The last push of which it was sent any of a kind.
    pub fn sent(&self, kind: Kind) -> Option<Push> {
        push_of(&self.resources.get(kind.type_url())?.sent)
    }

    /// The last push of which it was sent anything.
    pub fn latest(&self) -> Option<Push> {
        let sent = self
            .resources
            .values()
            .map(|resource| push_of(&resource.sent));
        sent.max().flatten()
    }

    /// Whether it was ever sent any of a kind.
    pub fn takes(&self, kind: Kind) -> bool {
        let resource = self.resources.get(kind.type_url());
        resource.is_some_and(|resource| !resource.sent.is_empty())
    }

    /// Why it refused what it was last sent.
    pub fn refused(&self, kind: Kind) -> Option<&str> {
        let resource = self.resources.get(kind.type_url())?;
        (resource.sent != resource.acked && !resource.last_error.is_empty())
            .then_some(resource.last_error.as_str())
    }
}

impl Syncz {
    pub fn new(access: Arc<Access>) -> Self {
        let client = reqwest::Client::builder().timeout(TIMEOUT).no_proxy();
        Self {
            access,
            client: client.build().unwrap_or_default(),
        }
    }

    /// The proxies of the istiod whose debug port this is.
    ///
    /// # Errors
    /// Says why it cannot be asked.
    pub async fn ask(&self, istiod: SocketAddr) -> Result<Vec<ProxyState>, String> {
        let token = std::fs::read_to_string(&self.access.token)
            .map_err(|error| format!("{}: {error}", self.access.token.display()))?;
        let url = format!("http://{istiod}/debug/syncz");
        let request = self.client.get(url).bearer_auth(token.trim());
        let answer = request.send().await.map_err(|error| crate::chain(&error))?;
        let status = answer.status();
        if !status.is_success() {
            return Err(format!(
                "istiod answers {status}; since Istio 1.29 it wants DEBUG_ENDPOINT_AUTH_ALLOWED_NAMESPACES={} in its environment",
                self.access.namespace
            ));
        }
        let body = answer.bytes().await.map_err(|error| crate::chain(&error))?;
        serde_json::from_slice(&body).map_err(|error| format!("its answer: {error}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_istiod_says() {
        let uuid = "0c1d0c6e-7c1a-4f0a-9b1d-3a5f5b0b2a11";
        let other = "1c1d0c6e-7c1a-4f0a-9b1d-3a5f5b0b2a11";
        let clusters = Kind::Clusters.type_url();
        let routes = Kind::Routes.type_url();
        let text = format!(
            r#"[{{"proxy": "cart.shop", "proxy_type": "sidecar", "istio_version": "1.31", "resources": {{
                "{clusters}": {{"sent": "t/7{uuid}", "acked": "t/7{uuid}"}},
                "{routes}": {{"sent": "t/7{uuid}", "acked": "t/6{other}", "lastError": "no"}}}}}}]"#
        );
        let proxies: Vec<ProxyState> = serde_json::from_str(&text).unwrap();
        let proxy = &proxies[0];
        assert_eq!(proxy.acknowledged(Kind::Clusters), Some(7));
        assert_eq!(proxy.acknowledged(Kind::Routes), None);
        assert_eq!(proxy.refused(Kind::Routes), Some("no"));
        assert_eq!(proxy.refused(Kind::Clusters), None);
        assert!(!proxy.takes(Kind::Endpoints));
    }
}
