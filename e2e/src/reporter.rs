//! Reporting access log entries by hand, from inside a pod.

use std::io::Write;
use std::net::SocketAddr;
use std::process::Stdio;

use anyhow::Context;
use serde::{Deserialize, Serialize};

use crate::lab::Lab;

/// One entry; what is absent is left out of it.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Entry {
    /// URIs of the caller's certificate.
    pub peer: Vec<String>,
    /// The caller's address. Absent: an entry without common properties.
    pub address: Option<String>,
    /// The Host that was called. Absent: an entry without a request.
    pub authority: Option<String>,
}

/// How entries are reported.
#[derive(Clone, Copy, Debug)]
pub struct Volume {
    /// How many a message has.
    pub batch: usize,
    /// How often all of them are sent.
    pub times: usize,
}

impl Lab {
    /// Reports entries once, in one message, as [`Self::report_many`] does.
    ///
    /// # Errors
    /// Fails when the reporter cannot run.
    pub async fn report(
        &self,
        pod: (&str, &str),
        to: SocketAddr,
        forwarded: Option<&str>,
        entries: &[Entry],
    ) -> anyhow::Result<Result<(), String>> {
        let volume = Volume {
            batch: entries.len().max(1),
            times: 1,
        };
        self.report_many(pod, to, forwarded, entries, volume).await
    }

    /// Reports entries from inside a pod, through its sidecar if it has one. Returns what the reporter complained of
    /// where it was refused.
    ///
    /// # Errors
    /// Fails when the reporter cannot run.
    pub async fn report_many(
        &self,
        pod: (&str, &str),
        to: SocketAddr,
        forwarded: Option<&str>,
        entries: &[Entry],
        volume: Volume,
    ) -> anyhow::Result<Result<(), String>> {
        let mut lines = tempfile::tempfile()?;
        for entry in entries {
            writeln!(lines, "{}", serde_json::to_string(entry)?)?;
        }
        std::io::Seek::rewind(&mut lines)?;
        let mut command = self
            .running(pod.0, pod.1)?
            .command(&self.tools.lab_reporter);
        command
            .args(["--to", &to.to_string()])
            .args(["--batch", &volume.batch.to_string()])
            .args(["--times", &volume.times.to_string()])
            .stdin(Stdio::from(lines));
        if let Some(forwarded) = forwarded {
            command.args(["--forwarded", forwarded]);
        }
        let output = command.output().await.context("lab-reporter")?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        Ok(if output.status.success() {
            Ok(())
        } else {
            Err(said)
        })
    }
}
