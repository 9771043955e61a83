//! Waiting for something to come true, with the last reason it was not.

use std::time::{Duration, Instant};

use anyhow::Context;

/// Tries `check` every 20 ms until it succeeds; returns what it gave.
///
/// # Errors
/// After `patience`, the last error of `check`, with `what` was waited for.
pub async fn eventually<T>(
    patience: Duration,
    what: &str,
    mut check: impl AsyncFnMut() -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    let start = Instant::now();
    loop {
        match check().await {
            Ok(value) => return Ok(value),
            Err(error) if start.elapsed() > patience => {
                return Err(error).context(format!("waited {patience:?} in vain: {what}"));
            }
            Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
        }
    }
}

/// Checks every 50 ms, for all of `period`, that `check` holds.
///
/// # Errors
/// The first time it does not.
pub async fn throughout(
    period: Duration,
    what: &str,
    mut check: impl AsyncFnMut() -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let start = Instant::now();
    while start.elapsed() < period {
        check()
            .await
            .with_context(|| format!("{:?} on: {what}", start.elapsed()))?;
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    Ok(())
}
