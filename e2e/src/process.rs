//! The processes of a lab: each with a log file, ended in the reverse order of their start.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, bail};
use rustix::process::{Pid, Signal, kill_process};
use tokio::process::{Child, Command};

/// A running program.
#[derive(Debug)]
pub struct Process {
    pub name: String,
    pub log: PathBuf,
    child: Child,
}

impl Process {
    /// Starts `command` with its output in `logs/NAME.log`; a further start appends.
    ///
    /// # Errors
    /// Fails when the log cannot be made or the program cannot start.
    pub fn start(name: &str, logs: &Path, mut command: Command) -> anyhow::Result<Self> {
        let log = logs.join(format!("{name}.log"));
        let file = File::options()
            .create(true)
            .append(true)
            .open(&log)
            .with_context(|| format!("the log {}", log.display()))?;
        let child = command
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file)
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("could not start {name}"))?;
        Ok(Self {
            name: name.to_owned(),
            log,
            child,
        })
    }

    pub fn id(&self) -> Option<u32> {
        self.child.id()
    }

    /// Fails with the end of its log when the program has ended.
    ///
    /// # Errors
    /// The program's exit status and last lines.
    pub fn still_runs(&mut self) -> anyhow::Result<()> {
        if let Some(status) = self.child.try_wait()? {
            bail!("{} ended, {status}:\n{}", self.name, tail(&self.log, 20));
        }
        Ok(())
    }

    /// Sends a signal.
    ///
    /// # Errors
    /// Fails when the program has ended.
    pub fn signal(&self, signal: Signal) -> anyhow::Result<()> {
        let id = self.id().and_then(|id| i32::try_from(id).ok());
        let pid = id
            .and_then(Pid::from_raw)
            .with_context(|| format!("{} ended", self.name))?;
        Ok(kill_process(pid, signal)?)
    }

    /// The processes that it started.
    ///
    /// # Errors
    /// Fails when it has ended.
    pub fn children(&self) -> anyhow::Result<Vec<Pid>> {
        let id = self.id().with_context(|| format!("{} ended", self.name))?;
        let mut children = Vec::new();
        for thread in std::fs::read_dir(format!("/proc/{id}/task"))? {
            let started = std::fs::read_to_string(thread?.path().join("children"))?;
            let started = started.split_whitespace();
            children.extend(started.filter_map(|id| Pid::from_raw(id.parse().ok()?)));
        }
        Ok(children)
    }

    /// SIGKILL, and no chance to say goodbye.
    ///
    /// # Errors
    /// Fails when the signal cannot be sent.
    pub async fn kill(&mut self) -> anyhow::Result<()> {
        self.child
            .kill()
            .await
            .with_context(|| format!("could not end {}", self.name))
    }

    /// SIGTERM, then SIGKILL after `patience`. Says whether the program ended by itself.
    ///
    /// # Errors
    /// Fails when a signal cannot be sent.
    pub async fn stop(&mut self, patience: Duration) -> anyhow::Result<bool> {
        if self.id().is_none() {
            return Ok(true);
        }
        self.signal(Signal::TERM)?;
        if tokio::time::timeout(patience, self.child.wait())
            .await
            .is_ok()
        {
            return Ok(true);
        }
        self.kill().await?;
        Ok(false)
    }
}

/// The processor time that a process has had, in all its threads.
///
/// # Errors
/// Fails when it has ended.
pub fn processor_time(id: u32) -> anyhow::Result<Duration> {
    let stat = std::fs::read_to_string(format!("/proc/{id}/stat"))?;
    // The name, in parentheses, may have spaces. Then utime and stime are the 12th and 13th (proc_pid_stat(5)).
    let fields = stat.rsplit_once(") ").context("no stat")?.1.split(' ');
    let ticks: u64 = fields
        .skip(11)
        .take(2)
        .filter_map(|field| field.parse::<u64>().ok())
        .sum();
    let per_second = rustix::param::clock_ticks_per_second();
    Ok(Duration::from_millis(ticks * 1000 / per_second))
}

/// The last lines of a file.
pub fn tail(path: &Path, lines: usize) -> String {
    let text = std::fs::read(path).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}
