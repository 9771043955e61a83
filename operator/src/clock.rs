//! The one place that reads the wall clock; everything else is told the time.

use jiff::Timestamp;

/// Tells the time.
pub type Clock = fn() -> Timestamp;

/// The machine's clock.
#[expect(clippy::disallowed_methods, reason = "the edge at which time comes in")]
pub fn system() -> Timestamp {
    Timestamp::now()
}
