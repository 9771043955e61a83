//! A RateLimit that makes sense: its spec, parsed once. What the API's own rules cannot see is found here, before anything is written.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use envoy_types::pb::envoy::r#type::v3::StatusCode;
use fenceline_crds::{
    Adaptive, Direction, LimitResponse, LimitRule, OnUnavailable, Quota, RateLimit, RateLimitSpec,
    Share,
};
use kube::ResourceExt;
use regex::escape;

use super::descriptor::{self, Part};
use super::expr::Expression;
use super::grammar::Refused;
use super::programs::{Compiled, Programs};
use crate::fence::select::Labels;
use crate::world::{Key, World};

/// The bound of expressions, in metrics.
const EXPRESSION: &str = "expression";
const GLOBAL_WINDOW: &str = "global_window";
/// The bounds that a spec may be over.
pub(super) const BOUNDS: [&str; 2] = [EXPRESSION, GLOBAL_WINDOW];
/// The longest window of a Global limit that has a bucket for each value which clients can make up. All namespaces' buckets are in one
/// Redis, which drops what ends soonest where it is full: long windows of one push out the short ones of others.
const LONGEST_WINDOW: Duration = Duration::from_secs(3600);

/// What is wrong, and where.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("spec.{field}: {why}")]
pub(super) struct Invalid {
    pub(super) field: String,
    why: String,
    /// The bound that it is over, as in docs/bounds.md.
    pub(super) over: Option<&'static str>,
}

impl Invalid {
    pub(super) fn new(field: impl Into<String>, why: impl Into<String>) -> Self {
        let (field, why) = (field.into(), why.into());
        let over = None;
        Self { field, why, over }
    }

    fn of_expression(field: &str, refused: &Refused) -> Self {
        let over = refused.over.then_some(EXPRESSION);
        Self {
            over,
            ..Self::new(field, &*refused.why)
        }
    }

    /// The same, of a rule.
    fn of_rule(self, index: usize) -> Self {
        let field = format!("rules[{index}].{}", self.field);
        Self { field, ..self }
    }
}

/// Where in a proxy requests are counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    Inbound,
    Outbound,
    Gateway,
}

/// A RateLimit that makes sense.
#[derive(Debug)]
pub(super) struct Limit {
    pub(super) key: Key,
    /// What is in the API has one.
    pub(super) uid: Option<String>,
    pub(super) place: Place,
    /// The pods whose proxies count.
    pub(super) labels: Labels,
    /// Whether those may be in any namespace.
    pub(super) everywhere: bool,
    pub(super) port: Option<u16>,
    pub(super) share: Share,
    pub(super) on_unavailable: OnUnavailable,
    /// PromQL by name.
    pub(super) metrics: BTreeMap<String, String>,
    pub(super) rules: Vec<Rule>,
}

impl Limit {
    /// Whether any expression names a metric.
    pub(super) fn needs_metrics(&self) -> bool {
        self.rules.iter().any(|rule| {
            let wanted = rule.adaptive.iter().map(|(_, wanted)| wanted);
            let mut all = rule.when.iter().chain(wanted);
            all.any(|expression| !expression.metrics.is_empty())
        })
    }
}

/// A rule that makes sense.
#[derive(Debug)]
pub(super) struct Rule {
    pub(super) name: String,
    pub(super) parts: Vec<Part>,
    pub(super) max_buckets: u32,
    pub(super) quota: Rate,
    pub(super) ceiling: Option<Rate>,
    pub(super) when: Option<Arc<Expression>>,
    pub(super) adaptive: Option<(Adaptive, Arc<Expression>)>,
    pub(super) every: Duration,
    pub(super) shadow: bool,
    pub(super) response: LimitResponse,
}

/// So many requests for so long, and how many at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Rate {
    pub(super) requests: u32,
    pub(super) per: Duration,
    pub(super) burst: u32,
}

impl Rate {
    fn of(quota: &Quota, field: &str) -> Result<Self, Invalid> {
        let per = quota.per().ok_or_else(|| {
            Invalid::new(
                format!("{field}.per"),
                format!("{} is no length of time, as 1s", quota.per),
            )
        })?;
        Ok(Self {
            requests: quota.requests,
            per,
            burst: quota.burst(),
        })
    }

    /// The same with another number of requests; the burst keeps its proportion.
    pub(super) fn with(self, requests: u32) -> Self {
        let burst = u64::from(self.burst) * u64::from(requests) / u64::from(self.requests.max(1));
        Self {
            requests,
            burst: u32::try_from(burst.max(1)).unwrap_or(u32::MAX),
            ..self
        }
    }

    /// Requests a second.
    pub(super) fn per_second(self) -> f64 {
        f64::from(self.requests) / self.per.as_secs_f64()
    }
}

/// Parses a RateLimit; `root` is Istio's root namespace.
///
/// # Errors
/// Names the first field that makes no sense.
pub(super) fn limit(
    object: &RateLimit,
    world: &World,
    root: &str,
    programs: &Programs,
) -> Result<Limit, Invalid> {
    let compiled = programs.of(object);
    let key = Key::new(object.namespace().unwrap_or_default(), object.name_any());
    let RateLimitSpec {
        target,
        direction,
        to,
        port,
        share,
        on_unavailable,
        metrics,
        rules,
    } = &object.spec;
    let place = match (&target.gateway, direction) {
        (Some(_), _) => Place::Gateway,
        (None, Direction::Inbound) => Place::Inbound,
        (None, Direction::Outbound) => Place::Outbound,
    };
    let labels = labels(object, world)?;
    let authority = to
        .as_deref()
        .map(|to| authority(to, &key.namespace, &world.cluster_domain));
    let metrics: BTreeMap<String, String> = metrics
        .iter()
        .map(|metric| (metric.name.clone(), metric.prometheus.query.clone()))
        .collect();
    let rules = rules.iter().enumerate().map(|(index, given)| {
        rule(given, authority.as_deref(), *share, &compiled)
            .map_err(|invalid| invalid.of_rule(index))
    });
    let rules = rules.collect::<Result<_, _>>()?;
    Ok(Limit {
        place,
        labels,
        everywhere: key.namespace == root && target.service.is_none(),
        port: *port,
        share: *share,
        on_unavailable: on_unavailable.unwrap_or_default(),
        metrics,
        rules,
        uid: object.metadata.uid.clone(),
        key,
    })
}

fn labels(object: &RateLimit, world: &World) -> Result<Labels, Invalid> {
    let target = &object.spec.target;
    if let Some(gateway) = &target.gateway {
        return Ok(gateway.selector.clone());
    }
    if let Some(selector) = &target.selector {
        return Ok(selector.match_labels.clone());
    }
    let service = target.service.clone().unwrap_or_default();
    let why = match world
        .services
        .get(&Key::new(object.namespace().unwrap_or_default(), &*service))
    {
        Some(facts) if !facts.external_name && !facts.selector.is_empty() => {
            return Ok(facts.selector.clone());
        }
        Some(_) => format!("Service {service} selects no pods by labels: give target.selector"),
        None => format!("Service {service} does not exist"),
    };
    Err(Invalid::new("target.service", why))
}

/// A regular expression for the names by which a caller of `namespace` knows a host, with any port.
/// <https://kubernetes.io/docs/concepts/services-networking/dns-pod-service/>
fn authority(to: &str, namespace: &str, cluster_domain: &str) -> String {
    let suffix = format!(".svc.{cluster_domain}");
    let service = match (to.contains('.'), to.strip_suffix(&suffix)) {
        (false, _) => Some((to, namespace)),
        (true, Some(local)) => local.split_once('.'),
        (true, None) => None,
    };
    let host = match (service, to.strip_prefix("*.")) {
        (Some((name, of)), _) => {
            let full = format!(
                "{}\\.{}(?:\\.svc(?:\\.{})?)?",
                escape(name),
                escape(of),
                escape(cluster_domain)
            );
            if of == namespace {
                format!("(?:{}|{full})", escape(name))
            } else {
                full
            }
        }
        (None, Some(domain)) => format!("[^:]+\\.{}", escape(domain)),
        (None, None) => escape(to),
    };
    format!("(?i:{host}\\.?)(?::[0-9]+)?")
}

/// Whether clients can have as many buckets as they like.
fn has_made_up_buckets(given: &LimitRule) -> bool {
    given.by.iter().any(|by| by.principal.is_none())
}

fn rule(
    given: &LimitRule,
    authority: Option<&str>,
    share: Share,
    compiled: &Compiled,
) -> Result<Rule, Invalid> {
    let quota = Rate::of(&given.limit, "limit")?;
    if share == Share::Global && super::global::unit(quota.per).is_none() {
        let why = format!(
            "{} is no window of the rate limit service, which knows 1s, 1m, 1h, 24h and 168h; a limit of another window is `share: AcrossReplicas`",
            given.limit.per
        );
        return Err(Invalid::new("limit.per", why));
    }
    if share == Share::Global && quota.per > LONGEST_WINDOW && has_made_up_buckets(given) {
        let why = format!(
            "{} is more than 1h, the longest window of a Global limit with a bucket for each header, query parameter or address, \
             which clients can make up; leave `by` out, or give `by: [{{principal: {{}}}}]`",
            given.limit.per
        );
        return Err(Invalid {
            over: Some(GLOBAL_WINDOW),
            ..Invalid::new("limit.per", why)
        });
    }
    let ceiling = given
        .ceiling
        .as_ref()
        .map(|quota| Rate::of(quota, "ceiling"))
        .transpose()?;
    let parts = descriptor::parts(given, authority)?;
    let when = given.when.as_deref().map(|text| compiled.condition(text));
    let when = when
        .transpose()
        .map_err(|refused| Invalid::of_expression("when", &refused))?;
    let adaptive = match &given.adaptive {
        None => None,
        Some(adaptive) => {
            let within = adaptive.min..=adaptive.max;
            if !within.contains(&quota.requests) {
                let why = format!(
                    "{} is not between adaptive.min and adaptive.max",
                    quota.requests
                );
                return Err(Invalid::new("limit.requests", why));
            }
            let wanted = compiled
                .number(&adaptive.requests)
                .map_err(|refused| Invalid::of_expression("adaptive.requests", &refused))?;
            Some((adaptive.clone(), wanted))
        }
    };
    let response = given.response.clone().unwrap_or_default();
    if let Some(status) = response.status
        && StatusCode::try_from(i32::from(status)).is_err()
    {
        return Err(Invalid::new(
            "response.status",
            format!("{status} is none that Envoy answers with, as 429 or 503"),
        ));
    }
    for (name, value) in &response.headers {
        let well = name.parse::<reqwest::header::HeaderName>().is_ok()
            && value.parse::<reqwest::header::HeaderValue>().is_ok();
        if !well {
            return Err(Invalid::new(
                format!("response.headers[{name}]"),
                "this is no header of HTTP",
            ));
        }
    }
    Ok(Rule {
        name: given.name.clone(),
        parts,
        max_buckets: given.max_buckets,
        quota,
        ceiling,
        when,
        adaptive,
        every: given.every(),
        shadow: given.shadow,
        response,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use regex::Regex;

    #[test]
    fn a_global_limit_with_made_up_buckets_has_windows_of_an_hour_at_most() {
        let world = crate::testing::world();
        let over = |share: &str, by: &str, per: &str| {
            let spec = format!(
                "{{target: {{selector: {{matchLabels: {{app: a}}}}}}, share: {share}, rules: [{{name: a, by: {by}, limit: {{requests: 5, per: {per}}}}}]}}"
            );
            let object = RateLimit::new("a", crate::testing::yaml(&spec));
            limit(&object, &world, "istio-system", &Programs::default())
                .err()
                .map(|invalid| (invalid.to_string(), invalid.over))
        };
        let user = "[{header: x-user}]";
        assert_eq!(over("Global", user, "1h"), None);
        for by in [
            user,
            "[{principal: {}}, {query: q}]",
            "[{remoteAddress: {}}]",
        ] {
            let (why, bound) = over("Global", by, "24h").unwrap();
            assert_eq!(bound, Some(GLOBAL_WINDOW));
            assert!(
                why.starts_with("spec.rules[0].limit.per: 24h is more than 1h"),
                "{why}"
            );
        }
        assert_eq!(over("Global", "[{principal: {}}]", "168h"), None);
        assert_eq!(over("Global", "[]", "168h"), None);
        assert_eq!(over("PerReplica", user, "24h"), None);
    }

    #[test]
    fn the_names_of_a_host() {
        let fits = |to: &str, host: &str| {
            let regex = authority(to, "shop", "cluster.local");
            Regex::new(&format!("^(?:{regex})$"))
                .unwrap()
                .is_match(host)
        };
        for host in [
            "cart",
            "Cart:80",
            "cart.shop",
            "cart.shop.svc",
            "cart.shop.svc.cluster.local:8080",
            "cart.shop.",
        ] {
            assert!(
                fits("cart", host) && fits("cart.shop.svc.cluster.local", host),
                "{host}"
            );
        }
        for host in ["cart.bank", "mycart", "cart.shop.svc.other"] {
            assert!(!fits("cart", host), "{host}");
        }
        assert!(
            !fits("vault.bank.svc.cluster.local", "vault"),
            "a short name is of the caller's namespace"
        );
        assert!(fits("vault.bank.svc.cluster.local", "vault.bank:80"));
        assert!(
            fits("*.example.com", "api.example.com:443") && !fits("*.example.com", "example.com")
        );
        assert!(!fits("api.example.com", "apixexample.com"));
    }
}
