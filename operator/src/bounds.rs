//! What one namespace, workload or peer may cost everybody else. docs/bounds.md has every bound, those without a flag too.

use clap::Parser;

/// The bounds that an installation may want otherwise.
#[derive(Clone, Debug, PartialEq, Eq, Parser)]
pub struct Bounds {
    /// How many connections a second one pod may report.
    #[arg(long, env = "FENCELINE_REPORTS_PER_SECOND", default_value_t = Self::default().reports_per_second)]
    pub reports_per_second: u32,
}

impl Default for Bounds {
    fn default() -> Self {
        Self {
            reports_per_second: 100,
        }
    }
}
