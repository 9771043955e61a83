//! Evidence: what is seen of calls, and what it means.

pub mod access_log;
pub mod identity;
pub mod resolve;
