//! `fenceline run`.

use tracing_subscriber::EnvFilter;

use crate::args::{LogFormat, Run};
use crate::operator::Operator;

/// Runs until a signal ends it.
///
/// # Errors
/// Fails when an address is taken, the API's configuration cannot be found, or a server fails.
pub async fn run(args: Run) -> anyhow::Result<()> {
    start_logging(args.log_format, &args.log)?;
    let version = env!("CARGO_PKG_VERSION");
    tracing::info!(version, name = args.name, "fenceline starts");
    Operator::assemble(args).await?.run().await
}

/// # Errors
/// Fails when the directives are none.
pub fn start_logging(format: LogFormat, directives: &str) -> anyhow::Result<()> {
    use anyhow::Context as _;
    let filter = EnvFilter::try_new(directives).context("--log")?;
    let lines = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr);
    match format {
        LogFormat::Text => lines.init(),
        LogFormat::Json => lines.json().init(),
    }
    Ok(())
}
