//! The application of a lab pod: an echo server that reports what it saw of a request, and a client that makes
//! requests from inside the pod when the test asks it to.

mod client;
mod codec;
mod flood;
mod server;
mod shapes;

pub use client::{Call, Caller, Outcome, Protocol, ask, flood, serve_control};
pub use flood::{Flood, Flooded};
pub use server::{Report, Server};
pub use shapes::Shape;
