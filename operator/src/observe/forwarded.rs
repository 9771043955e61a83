//! Whom a sidecar says it speaks for: `x-forwarded-client-cert`, of which only what our own sidecar wrote counts.
//!
//! A sidecar that appends (Istio's default) puts a comma and its own element behind whatever the client sent, byte by byte. So nothing of
//! the client's is parsed: what counts is the text behind the last `By=` of our own identity, and all of it must have the one shape
//! that a sidecar gives it. Anything else is nobody.
//! <https://www.envoyproxy.io/docs/envoy/latest/configuration/http/http_conn_man/headers#x-forwarded-client-cert>

use super::identity::Identity;

/// The header in which a sidecar vouches for its peer.
pub(super) const HEADER: &str = "x-forwarded-client-cert";
/// SHA-256, in hexadecimal digits.
const DIGITS: usize = 64;
/// What Envoy writes between the hash and the URI, in its order, each if it is asked to. Istio asks for the subject alone, which is
/// empty in its certificates.
const QUOTED: [&str; 3] = ["Cert", "Chain", "Subject"];

/// The peer of the sidecar whose identity is `own`.
pub(super) fn peer(header: &str, own: &Identity) -> Option<Identity> {
    let ours = format!("By={own};Hash=");
    let (_, element) = header.rsplit_once(&ours)?;
    let (hash, mut rest) = element.split_at_checked(DIGITS)?;
    if !hash.bytes().all(|digit| digit.is_ascii_hexdigit()) {
        return None;
    }
    rest = rest.strip_prefix(';')?;
    for name in QUOTED {
        rest = past(name, rest)?;
    }
    let mut fields = rest.split(';');
    let uri = fields.next()?.strip_prefix("URI=")?;
    // A second identity is none, and a certificate may have any number of names.
    let is_name = |field: &str| field.strip_prefix("DNS=").is_some_and(is_dns);
    fields.all(is_name).then(|| Identity::parse(uri)).flatten()
}

/// What follows a quoted field and its semicolon; all of it, where another field comes first.
fn past<'a>(name: &str, text: &'a str) -> Option<&'a str> {
    let value = text
        .strip_prefix(name)
        .and_then(|text| text.strip_prefix("=\""));
    let Some(value) = value else {
        return Some(text);
    };
    let mut escaped = false;
    let end = value.bytes().position(|byte| {
        let ends = byte == b'"' && !escaped;
        escaped = byte == b'\\' && !escaped;
        ends
    })?;
    value.get(end..)?.strip_prefix("\";")
}

fn is_dns(name: &str) -> bool {
    let known = |byte: u8| byte.is_ascii_alphanumeric() || b".-_*".contains(&byte);
    !name.is_empty() && name.bytes().all(known)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const OWN: &str = "spiffe://cluster.local/ns/fenceline-system/sa/fenceline";
    const CART: &str = "spiffe://cluster.local/ns/shop/sa/cart";
    const HASH: &str = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

    fn read(header: &str) -> Option<String> {
        let own = Identity::parse(OWN).unwrap();
        peer(header, &own).map(|peer| peer.to_string())
    }

    /// An element as our sidecar writes it, with these fields after the hash.
    fn element(fields: &str) -> String {
        format!("By={OWN};Hash={HASH};{fields}")
    }

    #[test]
    fn what_sidecars_write() {
        for fields in [
            format!("Subject=\"\";URI={CART}"),
            format!("URI={CART}"),
            format!("Subject=\"\";URI={CART};DNS=cart.shop;DNS=*.cart.shop.svc"),
            format!("Subject=\"CN=a,O=\\\"b\\\";URI=x\";URI={CART}"),
            format!("Cert=\"-----BEGIN%20\";Chain=\"%0A\";Subject=\"\";URI={CART}"),
        ] {
            let header = element(&fields);
            assert_eq!(read(&header).as_deref(), Some(CART), "{header}");
        }
    }

    #[test]
    fn whatever_is_not_quite_so_is_nobody() {
        for fields in [
            "Subject=\"\"".to_owned(),
            "Subject=\"\";URI=".to_owned(),
            format!("Subject=\"\";URI={CART};URI={OWN}"),
            format!("Subject=\"\";URI={CART};"),
            format!("Subject=\"\";URI={CART},"),
            format!("Subject=\"\";URI={CART};DNS="),
            format!("Subject=\"\";URI={CART};DNS=a,By=b"),
            format!("Subject=\"\";URI={CART};Subject=\"\""),
            format!("Subject=\";URI={CART}"),
            format!("Subject=\"\"URI={CART}"),
            format!("Subject=\"\\\";URI={CART}"),
            format!("URI={CART};Subject=\"\""),
            format!("Other=\"\";URI={CART}"),
            "Subject=\"\";URI=https://cart".to_owned(),
        ] {
            assert_eq!(read(&element(&fields)), None, "{fields}");
        }
        let fields = format!("Subject=\"\";URI={CART}");
        for header in [
            String::new(),
            fields.clone(),
            format!("By={OWN};{fields}"),
            format!("By={OWN};Hash={};{fields}", &HASH[1..]),
            format!("By={OWN};Hash={HASH}0;{fields}"),
            format!("By={OWN};Hash={};{fields}", HASH.replace('0', "ä")),
            format!("By={OWN}x;Hash={HASH};{fields}"),
            format!("By={CART};Hash={HASH};{fields}"),
            // Somebody else's word after ours.
            format!("{},By={CART};Hash={HASH};{fields}", element(&fields)),
        ] {
            assert_eq!(read(&header), None, "{header}");
        }
    }

    proptest! {
        /// Property: whatever a client sends, whole elements, halves of them, open quotation marks, our own identity, its sidecar's
        /// word behind it means what it means alone.
        #[test]
        fn no_client_speaks_for_another(
            parts in proptest::collection::vec(
                prop_oneof![
                    Just("\"".to_owned()),
                    Just("\\".to_owned()),
                    Just(";".to_owned()),
                    Just(",".to_owned()),
                    Just("Subject=\"".to_owned()),
                    Just(format!("By={OWN};Hash={HASH};")),
                    Just(format!("By={OWN};Hash=")),
                    Just("URI=spiffe://cluster.local/ns/fenceline-system/sa/global-proxy".to_owned()),
                    ".{0,12}",
                ],
                0..12,
            ),
            fields in prop_oneof![
                Just(format!("Subject=\"\";URI={CART}")),
                Just(format!("Subject=\"O=x,CN=\\\"y\\\"\";URI={CART};DNS=a.b;DNS=c")),
                // Of a certificate without one, and of one with two.
                Just("Subject=\"\";URI=".to_owned()),
                Just(format!("Subject=\"\";URI={CART};URI={OWN}")),
            ],
            comma in any::<bool>(),
        ) {
            let own = element(&fields);
            let sent = parts.concat() + if comma { "," } else { "" };
            prop_assert_eq!(read(&format!("{sent}{own}")), read(&own));
        }
    }
}
