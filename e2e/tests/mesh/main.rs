//! Every test in the lab, in one program: whichever ends makes room for the next, and there is one to link.

mod believed;
mod cli;
mod closure;
mod deputy;
mod fault_points;
mod first_call;
mod hold;
mod lab;
mod leader;
mod matrix;
mod objects;
mod odd;
mod outage;
mod policy;
mod prometheus;
mod rate_limit;
mod rate_limit_kinds;
mod rejected;
mod requests;
mod router;
mod router_beside;
mod router_kinds;
mod router_verify;
mod soak;
mod stalls;
mod steps;
