//! The binary.

use clap::Parser;
use fenceline::args::{Args, Command};

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    match Args::parse().command {
        Command::Run(args) => fenceline::run::run(*args).await,
        Command::Crds => {
            for (_, yaml) in fenceline_crds::manifests()? {
                print!("{yaml}");
            }
            Ok(())
        }
    }
}
