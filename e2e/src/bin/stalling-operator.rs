//! The operator with one controller whose work never returns, once there is something for it to stall at: for tests of what becomes of
//! the others. `--stall=CONTROLLER` names the controller; everything else is as for `fenceline`.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use clap::Parser;
use fenceline::args::{Args, Command};
use fenceline::clock;
use fenceline::operator::Operator;
use fenceline::process::quarantine::{Object, holds};
use fenceline::process::{Controller, Pulse};
use fenceline::run::start_logging;
use fenceline::world::{Key, World};
use futures::future::LocalBoxFuture;
use tokio::sync::watch;

/// What the controller stalls at: an object of this name in this namespace, or the namespace itself.
const NAMESPACE: &str = "evil";
const NAME: &str = "stall";

struct Stalling {
    inner: Arc<dyn Controller>,
    world: watch::Receiver<Arc<World>>,
}

impl Controller for Stalling {
    fn name(&self) -> &'static str {
        self.inner.name()
    }

    fn run<'a>(&'a self, pulse: &'a Pulse) -> LocalBoxFuture<'a, ()> {
        Box::pin(async move {
            tokio::select! {
                () = self.inner.run(pulse) => {}
                () = self.stall(pulse) => {}
            }
        })
    }

    fn rest(&self) -> LocalBoxFuture<'_, ()> {
        self.inner.rest()
    }
}

impl Stalling {
    async fn stall(&self, pulse: &Pulse) {
        let mut world = self.world.clone();
        let found = world.wait_for(|world| self.finds(world)).await.is_ok();
        if !found {
            return;
        }
        let never = async {
            loop {
                std::thread::sleep(Duration::from_secs(3600));
            }
        };
        match self.object() {
            Some(object) => pulse.at_object(object, never).await,
            None => never.await,
        }
    }

    /// What a real controller would be at; those that work on no object of Fenceline's are at none.
    fn object(&self) -> Option<Object> {
        let key = Key::new(NAMESPACE, NAME);
        match self.name() {
            "fences" => Some(Object::Fence(key)),
            "routers" => Some(Object::Routes(key)),
            "rate limits" => Some(Object::RateLimit(key)),
            "policies" => Some(Object::FencePolicies),
            _ => None,
        }
    }

    /// Whether there is something to stall at, which a real controller would not skip.
    fn finds(&self, world: &World) -> bool {
        let (key, now) = (Key::new(NAMESPACE, NAME), clock::system());
        match self.name() {
            "fences" => world.fences.get(&key).is_some_and(|of| !holds(&**of, now)),
            "routers" => world.routers.get(&key).is_some_and(|of| !holds(&**of, now)),
            "rate limits" => {
                let limit = world.rate_limits.get(&key);
                limit.is_some_and(|of| !holds(&**of, now))
            }
            "policies" => {
                let policy = world.fence_policies.get(NAME);
                policy.is_some_and(|of| !holds(&**of, now))
            }
            other => world
                .namespaces
                .contains_key(&format!("{NAME}-{}", other.replace(' ', "-"))),
        }
    }
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let stalls = |argument: &String| argument.starts_with("--stall=");
    let (stall, others): (Vec<_>, Vec<_>) = std::env::args().partition(stalls);
    let stall = stall.first().context("no --stall=CONTROLLER")?;
    let stall = stall.trim_start_matches("--stall=");
    let Command::Run(args) = Args::parse_from(others).command else {
        anyhow::bail!("only `run` stalls");
    };
    start_logging(args.log_format, &args.log)?;
    let mut operator = Operator::assemble(*args).await?;
    let world = operator.world();
    let mut found = false;
    for controller in &mut operator.controllers {
        if controller.name() == stall {
            found = true;
            let (inner, world) = (Arc::clone(controller), world.clone());
            *controller = Arc::new(Stalling { inner, world });
        }
    }
    anyhow::ensure!(found, "there is no controller {stall}");
    operator.run().await
}
