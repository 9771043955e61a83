//! A question that a tenant wrote, of which one number is wanted: little of its answer is read, and none of its words are repeated.

use std::time::Duration;

use reqwest::{Response, StatusCode};

use super::client::{Answer, Client, Numbers, promql};

/// Bytes of an answer that are read. One series with the longest labels has a few KiB.
const LARGEST: usize = 64 << 10;
/// How long an answer may take, unless `--prometheus-timeout` is shorter. A limit that moves every ten seconds goes by what is quick.
const LONGEST: Duration = Duration::from_secs(5);

/// Why there is no number, in our own words alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoNumber {
    #[error("Prometheus does not answer within {} s", LONGEST.as_secs())]
    NoAnswer,
    #[error("Prometheus cannot be asked: the operator's log says why")]
    CannotAsk,
    #[error("Prometheus answers {}", .0.as_u16())]
    Refused(StatusCode),
    #[error("its answer has more than {} KiB, and one number is wanted", LARGEST >> 10)]
    TooLarge,
    #[error("its answer is not that of Prometheus")]
    Strange,
    #[error("Prometheus has no such series")]
    Nothing,
    #[error("more than one series, and one number is wanted: sum or max them")]
    Many,
    #[error("not a finite number")]
    NotFinite,
}

impl Client {
    /// The finite number that a query gives.
    ///
    /// # Errors
    /// Says why there is none. No word of the answer is in it.
    pub async fn single(&self, query: &str) -> Result<f64, NoNumber> {
        let patience = LONGEST.min(self.settings().timeout);
        let asked = tokio::time::timeout(patience, self.ask_single(query, patience));
        let body = asked.await.map_err(|_| NoNumber::NoAnswer)??;
        read(&body)
    }

    async fn ask_single(&self, query: &str, patience: Duration) -> Result<Vec<u8>, NoNumber> {
        let asked = self.question().map_err(|error| {
            tracing::warn!(error = crate::chain(&error), "Prometheus cannot be asked");
            NoNumber::CannotAsk
        })?;
        let thinks = promql(patience);
        // Two series are too many already; who does not know the parameter ignores it.
        let asked = asked.form(&[("query", query), ("timeout", &thinks), ("limit", "2")]);
        let answer = asked.send().await.map_err(|_| NoNumber::NoAnswer)?;
        if !answer.status().is_success() {
            return Err(NoNumber::Refused(answer.status()));
        }
        beginning_of(answer).await
    }
}

/// The whole body, unless it is too large; nothing beyond that is read.
async fn beginning_of(mut answer: Response) -> Result<Vec<u8>, NoNumber> {
    let mut body = Vec::new();
    while let Some(chunk) = answer.chunk().await.map_err(|_| NoNumber::NoAnswer)? {
        if body.len() + chunk.len() > LARGEST {
            return Err(NoNumber::TooLarge);
        }
        body.extend_from_slice(&chunk);
    }
    Ok(body)
}

fn read(body: &[u8]) -> Result<f64, NoNumber> {
    let answer: Answer<Numbers> = serde_json::from_slice(body).map_err(|_| NoNumber::Strange)?;
    let number = match answer.data.result {
        Numbers::Scalar(sample) => sample.number(),
        Numbers::Vector(series) => match &series[..] {
            [] => return Err(NoNumber::Nothing),
            [one] => one.value.number(),
            _ => return Err(NoNumber::Many),
        },
    };
    if number.is_finite() {
        Ok(number)
    } else {
        Err(NoNumber::NotFinite)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_finite_number_or_our_own_words() {
        let said = |result: &str| read(format!(r#"{{"data": {{"result": {result}}}}}"#).as_bytes());
        assert_eq!(said(r#"[1, "0.5"]"#), Ok(0.5));
        let series = |value: &str| {
            format!(r#"{{"metric": {{"secret": "of bank"}}, "value": [1, "{value}"]}}"#)
        };
        assert_eq!(said(&format!("[{}]", series("7"))), Ok(7.0));
        assert_eq!(said("[]"), Err(NoNumber::Nothing));
        let two = format!("[{}, {}]", series("7"), series("8"));
        assert_eq!(said(&two), Err(NoNumber::Many));
        assert_eq!(
            said(&format!("[{}]", series("+Inf"))),
            Err(NoNumber::NotFinite)
        );
        assert_eq!(
            said(&format!("[{}]", series("secret"))),
            Err(NoNumber::NotFinite)
        );
        assert_eq!(said("\"secret\""), Err(NoNumber::Strange));
        assert_eq!(
            NoNumber::Refused(StatusCode::UNPROCESSABLE_ENTITY).to_string(),
            "Prometheus answers 422"
        );
    }

    fn answer(bytes: usize) -> Response {
        // In pieces, as a network gives it.
        let pieces = (0..bytes.div_ceil(1000)).map(move |piece| {
            let size = 1000.min(bytes - piece * 1000);
            Ok::<_, std::io::Error>(vec![b' '; size])
        });
        let frames = pieces.map(|piece| {
            piece.map(|piece| hyper::body::Frame::<hyper::body::Bytes>::data(piece.into()))
        });
        let frames = http_body_util::StreamBody::new(futures::stream::iter(frames));
        let body = reqwest::Body::wrap(frames);
        hyper::Response::new(body).into()
    }

    #[tokio::test]
    async fn no_more_of_an_answer_is_read_than_a_number_needs() {
        let at = beginning_of(answer(LARGEST)).await;
        assert_eq!(at.map(|body| body.len()), Ok(LARGEST));
        assert_eq!(
            beginning_of(answer(LARGEST + 1)).await,
            Err(NoNumber::TooLarge)
        );
        assert_eq!(
            beginning_of(answer(100 << 20)).await,
            Err(NoNumber::TooLarge)
        );
    }
}
