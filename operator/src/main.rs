//! The binary.

use anyhow::Context as _;
use clap::Parser;
use fenceline::args::{Args, Command};

/// A file's text; `-` is standard input.
fn read(file: &std::path::Path) -> anyhow::Result<String> {
    if file.as_os_str() == "-" {
        return Ok(std::io::read_to_string(std::io::stdin())?);
    }
    std::fs::read_to_string(file).with_context(|| file.display().to_string())
}

/// Most of the operator's work is to read objects, which is to allocate; and what was read should be given back.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Even where a container has one processor, servers go on while something computes.
const FEWEST_THREADS: usize = 4;

fn main() -> anyhow::Result<()> {
    let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(threads.max(FEWEST_THREADS))
        .enable_all()
        .build()?;
    let result = runtime.block_on(command());
    // Evaluations that nobody waits for may go on for long.
    runtime.shutdown_background();
    result
}

async fn command() -> anyhow::Result<()> {
    match Args::parse().command {
        Command::Run(args) => fenceline::run::run(*args).await,
        Command::Explain(args) => {
            print!("{}", fenceline::inspect::explain(*args).await?);
            Ok(())
        }
        Command::Migrate { files } => {
            for file in files {
                let text = read(&file)?;
                let migration = fenceline::migrate::migrate(&text, fenceline::clock::system())
                    .with_context(|| file.display().to_string())?;
                for line in &migration.report {
                    eprintln!("{line}");
                }
                for object in &migration.objects {
                    print!("---\n{object}");
                }
            }
            Ok(())
        }
        Command::Adopt { files } => {
            let named = |file: &std::path::PathBuf| Ok((file.display().to_string(), read(file)?));
            let texts: anyhow::Result<Vec<(String, String)>> = files.iter().map(named).collect();
            let adoption = fenceline::adopt::adopt(&texts?)?;
            for line in &adoption.refused {
                eprintln!("{line}");
            }
            for object in &adoption.objects {
                print!("---\n{object}");
            }
            anyhow::ensure!(
                adoption.refused.is_empty(),
                "not everything has the same meaning here"
            );
            Ok(())
        }
        Command::Crds => {
            for (_, yaml) in fenceline_crds::manifests()? {
                print!("{yaml}");
            }
            Ok(())
        }
    }
}
