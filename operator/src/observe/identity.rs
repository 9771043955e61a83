//! SPIFFE identities.

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
            .all(|part| !part.is_empty() && part.bytes().all(is_known));
        (whole && filled).then(|| Self {
            trust_domain: trust_domain.to_owned(),
            namespace: namespace.to_owned(),
            service_account: service_account.to_owned(),
        })
    }
}

/// <https://github.com/spiffe/spiffe/blob/main/standards/SPIFFE-ID.md#2-spiffe-identity>
fn is_known(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b".-_".contains(&byte)
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
            "spiffe://cluster.local/ns/shop/sa/cart,By=x",
            "spiffe://cluster.local/ns/shop/sa/\"cart",
        ] {
            assert_eq!(id(bad), None, "{bad}");
        }
    }
}
