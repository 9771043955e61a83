//! The lab: a real control plane (etcd, kube-apiserver, istiod) and real proxies (pilot-agent, Envoy) on one machine,
//! without containers, for tests, the demo and benchmarks. It shows what configuration *does*.

pub mod app;
pub mod control_plane;
pub mod cost;
pub mod fences;
pub mod forward;
pub mod gate;
pub mod guard;
pub mod idle;
pub mod install;
pub mod isolate;
pub mod lab;
pub mod limits;
pub mod pod;
pub mod pods;
pub mod process;
pub mod prometheus;
pub mod reporter;
pub mod routers;
pub mod tools;
pub mod traffic;
pub mod wait;

pub use lab::{Lab, PATIENCE, test};
pub use pod::{App, PodSpec};
pub use rustix::process::Signal;
