//! The process: its tasks, whether each gets on, and what becomes of one that does not.
//!
//! Every controller, the world's task and every server is a task of its own with a [`Pulse`]. A thread that shares nothing with them, the
//! [`watchdog`], counts beats: a task that stalls turns `/livez` red and costs this replica its Lease, so that the standby acts; the object
//! that the task was at is [quarantined](quarantine), so that the next leader does not stall too.

pub mod controller;
pub mod evaluate;
pub mod pulse;
pub mod quarantine;
pub mod watchdog;

pub use controller::Controller;
pub use pulse::{Pulse, Pulses};
