//! Evidence: what is seen of calls, and what it means. And the answers to first calls.

pub mod access_log;
pub mod callers_log;
pub mod ext_authz;
pub mod first_call;
mod forwarded;
pub mod hold;
pub mod identity;
pub mod peer;
pub mod prometheus;
pub mod proxy;
pub mod reporters;
pub mod resolve;
