//! The rules of a RateLimit: which requests, how many, and how they are told.

#![allow(
    unreachable_pub,
    reason = "KubeSchema repeats each struct in a place of its own"
)]

use std::collections::BTreeMap;
use std::time::Duration;

use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::traffic_patch::PathMatch;
use crate::{period, rules};

/// One limit, and the requests that it is for.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[x_kube(
    validation = Rule::new("!has(self.adaptive) || (self.limit.requests >= self.adaptive.min && self.limit.requests <= self.adaptive.max)")
        .message("an adaptive limit begins between adaptive.min and adaptive.max")
        .field_path(".limit.requests"),
)]
#[serde(rename_all = "camelCase")]
pub struct LimitRule {
    /// A DNS label.
    #[schemars(length(min = 1, max = 63))]
    #[x_kube(
        validation = Rule::new("self.matches('^[a-z0-9]([-a-z0-9]*[a-z0-9])?$')").message("a rule's name is a DNS label"),
    )]
    pub name: String,

    /// The requests that it is for: everything given must fit. Absent: all.
    #[serde(default, rename = "match", skip_serializing_if = "Option::is_none")]
    pub matches: Option<LimitMatch>,

    /// A bucket for each value instead of one for all; with several, for each combination. A request without the value is not limited.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 3))]
    #[x_kube(
        validation = Rule::new("self.all(b, self.exists_one(o, o == b || (has(o.header) && has(b.header) && o.header.lowerAscii() == b.header.lowerAscii())))")
            .message("buckets are told apart by each value once"),
    )]
    pub by: Vec<LimitBy>,

    /// How many buckets of `by` a proxy keeps at once; when there are more values, the bucket that was not used for longest is
    /// dropped, and its value begins anew with a full one. Each takes some 500 bytes. Not for Global limits, whose buckets are in Redis.
    #[serde(default = "most_buckets", skip_serializing_if = "is_most_buckets")]
    #[schemars(range(min = 1, max = 100_000))]
    pub max_buckets: u32,

    /// How many requests.
    pub limit: Quota,

    /// Only with `share: Global`: what each replica lets through at most, before it asks the rate limit service.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ceiling: Option<Quota>,

    /// When the rule is in force, in CEL: `metrics.p99 > 0.5 && replicas < 10`. Absent: always. Looked at every
    /// `adaptive.every`, or 30 s.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 1024))]
    pub when: Option<String>,

    /// A limit that follows metrics.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub adaptive: Option<Adaptive>,

    /// Count, but reject nothing.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub shadow: bool,

    /// How rejected requests are answered. Absent: status 429 and `retry-after`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub response: Option<LimitResponse>,
}

const MOST_BUCKETS: u32 = 1000;

fn most_buckets() -> u32 {
    MOST_BUCKETS
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "as serde calls it")]
fn is_most_buckets(number: &u32) -> bool {
    *number == MOST_BUCKETS
}

/// Requests: everything given must fit.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct LimitMatch {
    /// One of these, as `GET`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(
        length(max = 10),
        inner(length(min = 1, max = 32), pattern(r"^[A-Za-z]+$"))
    )]
    pub methods: Vec<String>,
    /// The path, without the query string.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<PathMatch>,
    /// Headers, all of them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 10))]
    #[x_kube(
        validation = Rule::new(format!("self.all(h, {})", rules::is_header("h.name")))
            .message("a header's name is as x-user: letters, digits and -_."),
    )]
    pub headers: Vec<ValueMatch>,
    /// Parameters of the query string, all of them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 10))]
    pub query: Vec<ValueMatch>,
    /// The caller is one of these: `TRUST_DOMAIN/ns/NAMESPACE/sa/SERVICE_ACCOUNT`, or with `*` at one end, as in Istio's
    /// AuthorizationPolicy. Who has no certificate is none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 32), inner(length(min = 1, max = 512)))]
    pub principals: Vec<String>,
    /// The client's address is in one of these ranges, as `10.0.0.0/8`. It is the one that Envoy trusts: behind proxies, the last of
    /// `x-forwarded-for`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64), inner(length(min = 1, max = 64)))]
    pub cidrs: Vec<String>,
}

/// A header or a query parameter.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[x_kube(
    validation = Rule::new("[has(self.exact), has(self.prefix), has(self.regex), has(self.present)].filter(x, x).size() == 1")
        .message("give one of exact, prefix, regex and present"),
)]
#[serde(rename_all = "camelCase")]
pub struct ValueMatch {
    #[schemars(length(min = 1, max = 256))]
    #[x_kube(validation = rules::parameter_name())]
    pub name: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 1024))]
    pub exact: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 1024))]
    pub prefix: Option<String>,
    /// RE2, for the whole value.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 1024))]
    #[x_kube(validation = rules::regex())]
    pub regex: Option<String>,
    /// Whether it is there at all, or not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub present: Option<bool>,
}

/// What buckets are told apart by: give one of them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[x_kube(
    validation = Rule::new("[has(self.header), has(self.query), has(self.principal), has(self.remoteAddress)].filter(x, x).size() == 1")
        .message("give one of header, query, principal and remoteAddress"),
)]
#[serde(rename_all = "camelCase")]
pub struct LimitBy {
    /// The value of this header.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 256))]
    #[x_kube(validation = rules::header_name())]
    pub header: Option<String>,
    /// The value of this query parameter.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 256))]
    #[x_kube(validation = rules::parameter_name())]
    pub query: Option<String>,
    /// The caller, by its certificate.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub principal: Option<Nothing>,
    /// The client's address, as in `match.cidrs`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub remote_address: Option<Nothing>,
}

/// `{}`
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Nothing {}

/// A number of requests for a length of time.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct Quota {
    #[schemars(range(min = 1, max = 1_000_000_000))]
    pub requests: u32,
    /// As `1s`, `1m`; from `100ms` to `168h`. A Global limit knows `1s`, `1m`, `1h`, `24h` and `168h`.
    #[schemars(length(max = 16))]
    #[x_kube(
        validation = rules::period_between("per", "100ms", "168h", "1s"),
    )]
    pub per: String,
    /// How many at once, after a pause. Absent: as many as `requests`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1_000_000_000))]
    pub burst: Option<u32>,
}

impl Quota {
    /// The length of time; nothing where the text says none.
    pub fn per(&self) -> Option<Duration> {
        period(&self.per).filter(|per| !per.is_zero())
    }

    pub fn burst(&self) -> u32 {
        self.burst.unwrap_or(self.requests)
    }
}

/// A limit that follows metrics. It begins with `limit.requests`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[x_kube(
    validation = Rule::new("self.min <= self.max").message("min is not above max").field_path(".min"),
)]
#[serde(rename_all = "camelCase")]
pub struct Adaptive {
    /// The number of requests for `limit.per` that is wanted, in CEL: `int(100.0 / metrics.p99)`. It knows `metrics`, `replicas` (ready
    /// ones), `limit.requests` (as the spec says) and `limit.effective` (as it is now).
    #[schemars(length(min = 1, max = 1024))]
    pub requests: String,
    /// Never less.
    #[schemars(range(min = 1, max = 1_000_000_000))]
    pub min: u32,
    /// Never more.
    #[schemars(range(min = 1, max = 1_000_000_000))]
    pub max: u32,
    /// How far it moves at a time, of what it is. Absent: `25%`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 4), pattern(r"^(100|[1-9][0-9]?)%$"))]
    pub max_step: Option<String>,
    /// Changes of less than this are not made, of what it is. Absent: `5%`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 4), pattern(r"^(100|[1-9]?[0-9])%$"))]
    pub dead_band: Option<String>,
    /// How often it may move, `10s` to `1h`. Absent: `30s`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 16))]
    #[x_kube(
        validation = Rule::new("self.matches('^([0-9]+(ms|s|m|h))+$') && duration(self) >= duration('10s') && duration(self) <= duration('1h')")
            .message("every is a length of time from 10s to 1h, as 30s"),
    )]
    pub every: Option<String>,
    /// How long a metric may be missing until `onStale` holds, `1s` to `24h`. Until then the limit stays. Absent: `2m`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 16))]
    #[x_kube(
        validation = rules::period_between("staleAfter", "1s", "24h", "2m"),
    )]
    pub stale_after: Option<String>,
    /// What becomes of the limit then.
    #[serde(default)]
    pub on_stale: OnStale,
}

impl Adaptive {
    /// In hundredths.
    pub fn max_step(&self) -> u32 {
        percent(self.max_step.as_deref(), 25)
    }

    /// In hundredths.
    pub fn dead_band(&self) -> u32 {
        percent(self.dead_band.as_deref(), 5)
    }

    pub fn every(&self) -> Duration {
        let given = self.every.as_deref().and_then(period);
        // What was stored before there was a least is still there.
        given.unwrap_or(EVERY).max(LEAST)
    }

    pub fn stale_after(&self) -> Duration {
        let given = self.stale_after.as_deref().and_then(period);
        given.unwrap_or(Duration::from_secs(120))
    }
}

/// How often expressions are looked at, where nothing else is said.
const EVERY: Duration = Duration::from_secs(30);
/// Each move is a write, an answer of istiod and, before it, a question to Prometheus, which itself looks every 15 s or more rarely.
const LEAST: Duration = Duration::from_secs(10);

impl LimitRule {
    /// How often its expressions are looked at.
    pub fn every(&self) -> Duration {
        self.adaptive.as_ref().map_or(EVERY, Adaptive::every)
    }
}

fn percent(text: Option<&str>, default: u32) -> u32 {
    let number = text.and_then(|text| text.strip_suffix('%')?.parse().ok());
    number.unwrap_or(default)
}

/// What becomes of an adaptive limit once its metrics are stale.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum OnStale {
    /// It stays as it is.
    #[default]
    Keep,
    /// It goes back to `limit.requests`, step by step.
    Declared,
}

/// Texts of headers' values have neither line breaks nor other control characters.
fn response_headers(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
    schemars::json_schema!({
        "type": "object",
        "maxProperties": 9,
        "additionalProperties": {"type": "string", "maxLength": 1024, "pattern": r"^[^\x00-\x08\x0a-\x1f\x7f]*$"},
        "x-kubernetes-validations": [
            kube::core::Rule::new(format!("self.all(name, {})", rules::is_header("name")))
                .message("a header's name is as x-user: letters, digits and -_."),
        ],
    })
}

/// How rejected requests are answered. gRPC calls get `RESOURCE_EXHAUSTED`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct LimitResponse {
    /// Absent: 429.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 400, max = 599))]
    pub status: Option<u16>,
    /// Further headers; `retry-after` replaces the one that is worked out: the seconds until a token comes.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(schema_with = "response_headers")]
    pub headers: BTreeMap<String, String>,
    /// Whether every answer, also to requests that pass, has `x-ratelimit-limit`, `-remaining` and `-reset`, as in draft 03 of
    /// <https://datatracker.ietf.org/doc/draft-polli-ratelimit-headers/03/>.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub rate_limit_headers: bool,
}
