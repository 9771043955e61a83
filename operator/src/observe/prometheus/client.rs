//! How Prometheus is asked: where it is, with which queries, and who we are.

use std::collections::{BTreeSet, HashMap};
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use reqwest::header::{AUTHORIZATION, HeaderMap, HeaderValue};
use reqwest::{StatusCode, Url};
use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::Edge;
use crate::args::PrometheusArgs;

/// The label of a result that names the caller: the Deployment, StatefulSet, Job or CronJob, as Istio does.
const WORKLOAD: &str = "source_workload";
/// The label that names the host.
const SERVICE: &str = "destination_service";

/// Istio's counters, by the callers' proxies. A series that is new counts from its first sample, which `increase` does not see.
/// <https://istio.io/latest/docs/reference/config/metrics/>
const REQUESTS: &str = "istio_requests_total";
const CONNECTIONS: &str = "istio_tcp_connections_opened_total";
/// A connection may be in use for longer than anything is remembered.
const BYTES: [&str; 2] = [
    "istio_tcp_sent_bytes_total",
    "istio_tcp_received_bytes_total",
];

/// How Prometheus is asked.
#[derive(Clone, Debug)]
pub struct Settings {
    pub url: String,
    /// Queries with `$namespace` and `$window` in them; their results have the labels [`WORKLOAD`] and [`SERVICE`].
    pub queries: Vec<String>,
    /// More of them, for what is in use without being called anew.
    pub in_use: Vec<String>,
    /// A query with `$namespace` and `$ago` in it, for the workloads that had counters then.
    pub callers: String,
    /// How often each namespace is asked about.
    pub interval: Duration,
    /// How far each question looks back; longer than the interval, so that an answer may be missed.
    pub window: Duration,
    /// How far the first question about a fence's namespace looks back.
    pub history: Duration,
    /// How long an answer may take.
    pub timeout: Duration,
    pub headers: HeaderMap,
    pub token: Option<PathBuf>,
    pub authorities: Option<PathBuf>,
    pub identity: Option<PathBuf>,
}

impl Settings {
    /// What the flags say; nothing without an URL.
    pub fn of(args: &PrometheusArgs) -> Option<Self> {
        let queries = if args.prometheus_query.is_empty() {
            vec![query(REQUESTS), query(CONNECTIONS)]
        } else {
            args.prometheus_query.clone()
        };
        Some(Self {
            in_use: BYTES.map(query).into(),
            url: args.prometheus_url.clone()?,
            queries,
            callers: args
                .prometheus_callers_query
                .clone()
                .unwrap_or_else(callers),
            interval: args.prometheus_interval,
            window: args.prometheus_window.max(args.prometheus_interval),
            history: args.prometheus_history,
            timeout: args.prometheus_timeout,
            headers: args.prometheus_header.iter().cloned().collect(),
            token: args.prometheus_token_file.clone(),
            authorities: args.prometheus_ca_file.clone(),
            identity: args.prometheus_identity_file.clone(),
        })
    }
}

/// The query for a counter of Istio's.
fn query(counter: &str) -> String {
    let series =
        format!(r#"{counter}{{reporter="source",source_workload_namespace="$namespace"}}"#);
    format!(
        "sum by ({WORKLOAD}, {SERVICE}) (increase({series}[$window])) > 0 or \
         sum by ({WORKLOAD}, {SERVICE}) (last_over_time({series}[$window]) unless last_over_time({series}[$window] offset $window)) > 0"
    )
}

/// The query for the workloads that had any counter of Istio's some time ago.
fn callers() -> String {
    let matchers = r#"reporter="source",source_workload_namespace="$namespace""#;
    format!(
        r#"count by ({WORKLOAD}) ({{__name__=~"{REQUESTS}|{CONNECTIONS}",{matchers}}} offset $ago)"#
    )
}

/// A length of time as PromQL writes it.
pub(super) fn promql(time: Duration) -> String {
    format!("{}ms", time.as_millis())
}

/// Why a question has no answer.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{flag}: {path}")]
    File {
        flag: &'static str,
        path: String,
        source: std::io::Error,
    },
    #[error("--prometheus-token-file: the token has characters that no header may have")]
    Token,
    #[error("{0}")]
    Tls(&'static str, #[source] reqwest::Error),
    #[error("--prometheus-url: it must begin with http:// or https:// and a host")]
    Url,
    #[error("{0}")]
    NoAnswer(String),
    #[error("it answers {status}: {said}")]
    Refused { status: StatusCode, said: String },
    #[error("it gives {0} series, and one number is wanted: sum or max them")]
    Many(usize),
    #[error("its answer is not whole: {0}")]
    Partial(String),
    #[error("its answer is not that of Prometheus, but begins with {said:?}")]
    Strange {
        said: String,
        source: serde_json::Error,
    },
}

/// An answer of its API.
/// <https://prometheus.io/docs/prometheus/latest/querying/api/>
#[derive(Debug, Deserialize)]
pub(super) struct Answer<T> {
    pub(super) data: Data<T>,
    /// Of an answer that is not whole, as Thanos and Mimir give them when a store is away.
    #[serde(default)]
    warnings: Vec<String>,
}

#[derive(Debug, Deserialize)]
pub(super) struct Data<T> {
    pub(super) result: T,
}

#[derive(Debug, Deserialize)]
struct Series {
    metric: HashMap<String, String>,
}

/// What an instant query gives: a number with its time, or a number for each series.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
pub(super) enum Numbers {
    Scalar(Sample),
    Vector(Vec<NumberOfSeries>),
}

#[derive(Debug, Deserialize)]
pub(super) struct NumberOfSeries {
    pub(super) value: Sample,
}

/// A time, and a number as text, since JSON has no infinity.
#[derive(Debug, Deserialize)]
pub(super) struct Sample(serde::de::IgnoredAny, String);

impl Sample {
    /// NaN where it is no number.
    pub(super) fn number(&self) -> f64 {
        let Self(_, text) = self;
        match text.as_str() {
            "+Inf" => f64::INFINITY,
            "-Inf" => f64::NEG_INFINITY,
            number => number.parse().unwrap_or(f64::NAN),
        }
    }
}

/// What a question was answered with.
#[derive(Debug, Default)]
struct Answers {
    edges: BTreeSet<Edge>,
    /// Why it may not be all.
    warning: Option<String>,
}

#[derive(Debug, Deserialize)]
struct Refusal {
    error: String,
}

/// What proves who we are, and who Prometheus is.
#[derive(Debug, Default, PartialEq, Eq)]
struct Secrets {
    token: Option<Vec<u8>>,
    authorities: Option<Vec<u8>>,
    identity: Option<Vec<u8>>,
}

impl Secrets {
    fn read(settings: &Settings) -> Result<Self, Error> {
        let read = |flag, path: &Option<PathBuf>| {
            let read = |path: &PathBuf| {
                std::fs::read(path).map_err(|source| Error::File {
                    flag,
                    path: path.display().to_string(),
                    source,
                })
            };
            path.as_ref().map(read).transpose()
        };
        Ok(Self {
            token: read("--prometheus-token-file", &settings.token)?,
            authorities: read("--prometheus-ca-file", &settings.authorities)?,
            identity: read("--prometheus-identity-file", &settings.identity)?,
        })
    }

    fn client(&self, settings: &Settings) -> Result<reqwest::Client, Error> {
        let mut builder = reqwest::Client::builder()
            .timeout(settings.timeout)
            .default_headers(settings.headers.clone());
        if let Some(token) = &self.token {
            let token = String::from_utf8_lossy(token);
            let header = HeaderValue::from_str(&format!("Bearer {}", token.trim()));
            let mut header = header.map_err(|_| Error::Token)?;
            header.set_sensitive(true);
            builder = builder.default_headers([(AUTHORIZATION, header)].into_iter().collect());
        }
        if let Some(authorities) = &self.authorities {
            let trusted = reqwest::Certificate::from_pem_bundle(authorities)
                .map_err(|error| Error::Tls("--prometheus-ca-file", error))?;
            builder = builder.tls_certs_merge(trusted);
        }
        if let Some(identity) = &self.identity {
            let identity = reqwest::Identity::from_pem(identity)
                .map_err(|error| Error::Tls("--prometheus-identity-file", error))?;
            builder = builder.identity(identity);
        }
        builder
            .build()
            .map_err(|error| Error::Tls("the client for --prometheus-url", error))
    }
}

/// Asks Prometheus. Token and certificates are read again before each question: Kubernetes and cert-manager change
/// them while we run.
pub struct Client {
    settings: Settings,
    endpoint: Url,
    made: Mutex<(Secrets, reqwest::Client)>,
}

impl Client {
    /// # Errors
    /// Fails when a file cannot be read or is not what it should be, and when the URL is none.
    pub fn new(settings: Settings) -> Result<Self, Error> {
        let endpoint = endpoint(&settings.url)?;
        let secrets = Secrets::read(&settings)?;
        let client = secrets.client(&settings)?;
        Ok(Self {
            settings,
            endpoint,
            made: Mutex::new((secrets, client)),
        })
    }

    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    fn current(&self) -> Result<reqwest::Client, Error> {
        let secrets = Secrets::read(&self.settings)?;
        let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        if made.0 != secrets {
            let client = secrets.client(&self.settings)?;
            *made = (secrets, client);
        }
        Ok(made.1.clone())
    }

    /// The edges of a namespace's workloads over the last `window`.
    ///
    /// # Errors
    /// Fails when Prometheus does not answer, or refuses a query.
    pub async fn edges_of(
        &self,
        namespace: &str,
        window: Duration,
    ) -> Result<BTreeSet<Edge>, Error> {
        let queries = self.settings.queries.iter();
        let answers = self.ask_each(queries, namespace, window).await?;
        Ok(answers.edges)
    }

    /// The same, with connections that were only used; and not if the answer is not whole.
    ///
    /// # Errors
    /// Fails when Prometheus does not answer with all it should have.
    pub async fn used_by(
        &self,
        namespace: &str,
        window: Duration,
    ) -> Result<BTreeSet<Edge>, Error> {
        let queries = self.settings.queries.iter().chain(&self.settings.in_use);
        let answers = self.ask_each(queries, namespace, window).await?;
        match answers.warning {
            Some(warning) => Err(Error::Partial(warning)),
            None => Ok(answers.edges),
        }
    }

    async fn ask_each(
        &self,
        queries: impl Iterator<Item = &String>,
        namespace: &str,
        window: Duration,
    ) -> Result<Answers, Error> {
        let mut answers = Answers::default();
        for query in queries {
            let query = query
                .replace("$namespace", namespace)
                .replace("$window", &promql(window));
            let Answers { edges, warning } = self.ask(&query).await?;
            answers.edges.extend(edges);
            answers.warning = answers.warning.or(warning);
        }
        Ok(answers)
    }

    /// The workloads of a namespace that were seen to call anything so long ago.
    ///
    /// # Errors
    /// Fails when Prometheus does not answer, or refuses the query.
    pub async fn callers_at(
        &self,
        namespace: &str,
        ago: Duration,
    ) -> Result<BTreeSet<String>, Error> {
        let query = self
            .settings
            .callers
            .replace("$namespace", namespace)
            .replace("$ago", &promql(ago));
        let answers = self.ask(&query).await?;
        let workloads = answers.edges.into_iter().map(|(workload, _)| workload);
        Ok(workloads.collect())
    }

    /// The number that a query gives, which may be none in the sense of arithmetic; nothing where it gives no series.
    ///
    /// # Errors
    /// Fails when Prometheus does not answer, refuses the query, or gives several numbers.
    pub async fn number(&self, query: &str) -> Result<Option<f64>, Error> {
        let answer: Answer<Numbers> = self.fetch(query).await?;
        match answer.data.result {
            Numbers::Scalar(sample) => Ok(Some(sample.number())),
            Numbers::Vector(series) if series.len() > 1 => Err(Error::Many(series.len())),
            Numbers::Vector(series) => Ok(series.first().map(|series| series.value.number())),
        }
    }

    async fn ask(&self, query: &str) -> Result<Answers, Error> {
        let Answer { data, warnings } = self.fetch::<Vec<Series>>(query).await?;
        let edge = |mut labels: HashMap<String, String>| {
            let service = labels.remove(SERVICE).unwrap_or_default();
            Some((labels.remove(WORKLOAD)?, service))
        };
        let series = data.result.into_iter();
        Ok(Answers {
            edges: series.filter_map(|series| edge(series.metric)).collect(),
            // Remarks about the query itself came among the warnings for a while.
            warning: warnings
                .into_iter()
                .find(|warning| !warning.starts_with("PromQL info")),
        })
    }

    pub(super) fn question(&self) -> Result<reqwest::RequestBuilder, Error> {
        Ok(self.current()?.post(self.endpoint.clone()))
    }

    async fn fetch<T: DeserializeOwned>(&self, query: &str) -> Result<Answer<T>, Error> {
        // How long Prometheus may think is not longer than we wait.
        let thinks = promql(self.settings.timeout);
        let asked = self.question()?;
        let asked = asked.form(&[("query", query), ("timeout", &thinks)]);
        let answer = asked.send().await.map_err(|error| no_answer(&error))?;
        let status = answer.status();
        let body = answer.bytes().await.map_err(|error| no_answer(&error))?;
        if !status.is_success() {
            let said = serde_json::from_slice(&body).map(|Refusal { error }| error);
            let said = said.unwrap_or_else(|_| beginning(&body));
            return Err(Error::Refused { status, said });
        }
        serde_json::from_slice(&body).map_err(|source| Error::Strange {
            said: beginning(&body),
            source,
        })
    }
}

/// Where instant queries go; a path before it is kept.
fn endpoint(url: &str) -> Result<Url, Error> {
    let mut url = Url::parse(url).map_err(|_| Error::Url)?;
    if !matches!(url.scheme(), "http" | "https") || !url.has_host() {
        return Err(Error::Url);
    }
    let path = format!("{}/api/v1/query", url.path().trim_end_matches('/'));
    url.set_path(&path);
    Ok(url)
}

/// The causes of an error alone: what it says itself is the whole URL.
fn no_answer(error: &reqwest::Error) -> Error {
    let said = std::error::Error::source(error).map(crate::chain);
    Error::NoAnswer(said.unwrap_or_else(|| error.to_string()))
}

fn beginning(body: &[u8]) -> String {
    const SHOWN: usize = 120;
    let text = String::from_utf8_lossy(body);
    text.chars().take(SHOWN).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_url_may_have_a_path() {
        let asked = |url: &str| endpoint(url).map(String::from).ok();
        let plain = asked("http://prometheus:9090");
        assert_eq!(plain.unwrap(), "http://prometheus:9090/api/v1/query");
        let mimir = asked("https://mimir/prometheus/");
        assert_eq!(mimir.unwrap(), "https://mimir/prometheus/api/v1/query");
        assert_eq!(asked("prometheus:9090"), None);
    }
}
