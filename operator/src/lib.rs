//! Fenceline: an operator that keeps the configuration of an Istio sidecar mesh as small as its real dependencies.
//!
//! Shape of every controller: gather, validate, plan, apply, status. Planning is plain functions of plain data; only
//! [`apply`] and [`status`] write.

pub mod admin;
pub mod adopt;
pub mod apply;
pub mod args;
pub mod bounds;
pub mod budget;
pub mod clock;
pub mod deputy;
pub mod fence;
pub mod global_proxy;
pub mod inspect;
pub mod leader;
pub mod metrics;
pub mod migrate;
mod note;
pub mod observe;
pub mod operator;
pub mod patch;
pub mod policy;
pub mod ports;
pub mod process;
pub mod rate_limit;
mod recent;
pub mod router;
pub mod run;
pub mod servers;
pub mod status;
#[cfg(test)]
mod testing;
mod work;
pub mod world;

/// An error with its causes, in one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}
