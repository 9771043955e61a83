//! What the benches make of what they measured.

use std::time::Duration;

use anyhow::Context;

/// The value below which so many of a hundred are. Sorts.
pub(super) fn percentile(times: &mut [Duration], share: usize) -> Duration {
    times.sort();
    let last = times.len().saturating_sub(1);
    times.get(last * share / 100).copied().unwrap_or_default()
}

pub(super) fn ms(time: Duration) -> f64 {
    (time.as_secs_f64() * 10_000.0).round() / 10.0
}

/// Of kibibytes.
pub(super) fn megabytes(kib: u64) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "memory has no such size")]
    let bytes = kib as f64 * 1024.0;
    (bytes / 1e5).round() / 10.0
}

/// This process's memory, in megabytes.
pub(super) fn resident_mb() -> anyhow::Result<f64> {
    status_mb("VmRSS:")
}

/// The most that it ever was.
pub(super) fn peak_mb() -> anyhow::Result<f64> {
    status_mb("VmHWM:")
}

fn status_mb(field: &str) -> anyhow::Result<f64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let mut lines = status.lines();
    let line = lines
        .find_map(|line| line.strip_prefix(field))
        .context(field.to_owned())?;
    let kib: f64 = line.trim().trim_end_matches(" kB").parse()?;
    Ok((kib * 1024.0 / 1e5).round() / 10.0)
}
