//! SPIFFE identities, and who a sidecar says is calling.

use std::fmt;

/// `spiffe://TRUST_DOMAIN/ns/NAMESPACE/sa/SERVICE_ACCOUNT`, Istio's form of a workload's identity.
/// <https://istio.io/latest/docs/concepts/security/#istio-identity>
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Identity {
    pub trust_domain: String,
    pub namespace: String,
    pub service_account: String,
}

impl Identity {
    pub fn parse(uri: &str) -> Option<Self> {
        let path = uri.strip_prefix("spiffe://")?;
        let mut parts = path.split('/');
        let trust_domain = parts.next()?;
        let (ns, namespace) = (parts.next()?, parts.next()?);
        let (sa, service_account) = (parts.next()?, parts.next()?);
        let whole = parts.next().is_none() && ns == "ns" && sa == "sa";
        let filled = [trust_domain, namespace, service_account]
            .iter()
            .all(|part| !part.is_empty());
        (whole && filled).then(|| Self {
            trust_domain: trust_domain.to_owned(),
            namespace: namespace.to_owned(),
            service_account: service_account.to_owned(),
        })
    }

    /// The peer of our own sidecar, from `x-forwarded-client-cert`. A sidecar appends to what the client sent, so only
    /// the last element is its own word.
    /// <https://www.envoyproxy.io/docs/envoy/latest/configuration/http/http_conn_man/headers#x-forwarded-client-cert>
    pub fn from_forwarded(header: &str) -> Option<Self> {
        let last = split_outside_quotes(header, ',').last()?;
        let mut uris = split_outside_quotes(last, ';').filter_map(|pair| {
            let (name, value) = pair.trim().split_once('=')?;
            name.eq_ignore_ascii_case("uri").then_some(value)
        });
        let uri = uris.next()?;
        // Two identities are none.
        uris.next().is_none().then(|| Self::parse(uri)).flatten()
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            trust_domain,
            namespace,
            service_account,
        } = self;
        write!(
            f,
            "spiffe://{trust_domain}/ns/{namespace}/sa/{service_account}"
        )
    }
}

fn split_outside_quotes(text: &str, separator: char) -> impl Iterator<Item = &str> {
    let mut quoted = false;
    let mut escaped = false;
    text.split(move |c| {
        let was_escaped = escaped;
        escaped = c == '\\' && !was_escaped;
        if c == '"' && !was_escaped {
            quoted = !quoted;
        }
        c == separator && !quoted
    })
}

#[cfg(test)]
mod tests {
    use super::Identity;

    fn id(uri: &str) -> Option<String> {
        Identity::parse(uri).map(|identity| identity.to_string())
    }

    #[test]
    fn only_whole_identities_count() {
        let good = "spiffe://cluster.local/ns/shop/sa/cart";
        assert_eq!(id(good).as_deref(), Some(good));
        for bad in [
            "",
            "https://cluster.local/ns/shop/sa/cart",
            "spiffe://cluster.local/ns/shop",
            "spiffe://cluster.local/ns/shop/sa/",
            "spiffe://cluster.local/ns/shop/sa/cart/more",
            "spiffe:///ns/shop/sa/cart",
        ] {
            assert_eq!(id(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_client_cannot_speak_for_another() {
        let own = "By=spiffe://c/ns/f/sa/op;Hash=ab;Subject=\"CN=a,O=\\\"b\\\";URI=x\";\
                   URI=spiffe://c/ns/shop/sa/cart";
        let read = |header: &str| Identity::from_forwarded(header).map(|id| id.to_string());
        assert_eq!(read(own).as_deref(), Some("spiffe://c/ns/shop/sa/cart"));
        let forged = format!("By=x;URI=spiffe://c/ns/f/sa/global-proxy,{own}");
        assert_eq!(read(&forged).as_deref(), Some("spiffe://c/ns/shop/sa/cart"));
        assert_eq!(read("By=x;Hash=y"), None);
        assert_eq!(
            read("URI=spiffe://c/ns/a/sa/b;URI=spiffe://c/ns/c/sa/d"),
            None
        );
    }
}
