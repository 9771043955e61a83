//! What is written for a fence, in which order. Adding: the redirect first, with what all redirects have in common before
//! it, since until the Sidecar narrows the scope it catches nothing, and from then on every call out of scope needs it. Taking away: the Sidecar first, for the same reason.
//! A Sidecar comes, changes and goes in steps ([`super::stage`]).

use std::collections::BTreeSet;
use std::sync::Arc;

use fenceline_crds::istio::{EnvoyFilter, Sidecar};
use futures::StreamExt;
use kube::api::ObjectMeta;

use super::plan::{Objects, Verdict, object_key};
use super::select::{self, Labels};
use super::stage;
use super::{CONCURRENCY, Context, Error, redirect};
use crate::apply::{self, Owned};
use crate::recent::Recent;
use crate::world::feed::fence_of;
use crate::world::{Key, World};

/// What was written lately, of both kinds.
#[derive(Debug, Default)]
pub struct RecentObjects {
    sidecars: Recent<Sidecar>,
    redirects: Recent<EnvoyFilter>,
    /// Held while what all redirects have in common is written: thousands of fences may want it at once.
    mesh: tokio::sync::Mutex<()>,
}

impl RecentObjects {
    fn sidecar(&self, world: &World, key: &Key) -> Option<Arc<Sidecar>> {
        self.sidecars.newest(key, world.sidecars.get(key))
    }

    fn redirect(&self, world: &World, key: &Key) -> Option<Arc<EnvoyFilter>> {
        self.redirects.newest(key, world.envoy_filters.get(key))
    }
}

/// Whether a fence's objects are as they should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Progress {
    Done,
    /// Something was written that the watch has not shown: it may be gone again.
    LookAgain,
}

/// Writes what a verdict asks for, or the next step to it.
pub(super) async fn carry_out(
    fence: &Key,
    verdict: &Verdict,
    world: &World,
    context: &Context,
) -> Result<Progress, Error> {
    match verdict {
        Verdict::Enforce(objects) => enforce(fence, objects, world, context).await,
        Verdict::Observe(Some(sidecar)) => {
            let redirect = None;
            let sidecar = sidecar.as_ref().clone();
            enforce(fence, &Objects { redirect, sidecar }, world, context).await
        }
        Verdict::Observe(None)
        | Verdict::NoPods(_)
        | Verdict::Conflicted(_)
        | Verdict::Overlapped(_)
        | Verdict::NotInMesh(_)
        | Verdict::NameTaken(..) => {
            retire(fence, world, context).await?;
            Ok(Progress::Done)
        }
    }
}

async fn enforce(
    fence: &Key,
    objects: &Objects,
    world: &World,
    context: &Context,
) -> Result<Progress, Error> {
    let object = object_key(fence);
    let stored = context.recent.sidecar(world, &object);
    let labels = labels(&objects.sidecar);
    if stored
        .as_ref()
        .is_some_and(|stored| is_of(stored, fence) && self::labels(stored) != labels)
    {
        // Other pods: those that were fenced get back what they had, and then the others begin.
        retire(fence, world, context).await?;
        return Ok(Progress::LookAgain);
    }
    let redirect = context.recent.redirect(world, &object);
    let redirect = redirect.as_deref();
    if let Some(want) = &objects.redirect {
        ensure_mesh_redirect(context).await?;
        ensure_redirect(&object, want, redirect, context).await?;
    }
    let arrived = context.arrivals.arrived(fence, &labels, world);
    let before = stored.as_deref().or_else(|| ground(fence, &labels, world));
    let step = stage::next(objects.sidecar.clone(), before, &arrived);
    if !context.arrivals.is_under_way(fence, stored.as_deref()) {
        take_step(fence, &step, stored.as_deref(), world, context).await?;
    }
    if objects.redirect.is_none() {
        remove_own(redirect, fence, context).await?;
    }
    Ok(if world.sidecars.contains_key(&object) {
        Progress::Done
    } else {
        Progress::LookAgain
    })
}

/// Whether a fence has a redirect, which then needs what all have in common.
pub(super) fn any_redirect(world: &World) -> bool {
    let mut redirects = world.envoy_filters.values();
    redirects.any(|redirect| fence_of(redirect.as_ref()).is_some())
}

/// Makes what all redirects have in common be there. It is never taken away: without marks nothing comes of it.
pub(super) async fn ensure_mesh_redirect(context: &Context) -> Result<(), Error> {
    let _alone = context.recent.mesh.lock().await;
    // Not the world that a fence was planned with, which may be older than what was written since.
    let world = Arc::clone(&context.world.borrow());
    let key = redirect::mesh_key(&context.settings);
    let want = redirect::of_mesh(&world, &context.settings);
    let stored = context.recent.redirect(&world, &key);
    ensure_redirect(&key, &want, stored.as_deref(), context).await
}

async fn ensure_redirect(
    key: &Key,
    want: &EnvoyFilter,
    stored: Option<&EnvoyFilter>,
    context: &Context,
) -> Result<(), Error> {
    if let Some(written) = context.writer.ensure::<EnvoyFilter>(want, stored).await? {
        // The patches of what was wanted are shared by all fences; those of the answer are one more copy.
        let EnvoyFilter { metadata, .. } = written;
        let spec = want.spec.clone();
        let written = EnvoyFilter { metadata, spec };
        context.recent.redirects.wrote(key, written);
    }
    Ok(())
}

fn is_of(sidecar: &Sidecar, fence: &Key) -> bool {
    fence_of(sidecar).as_ref() == Some(fence)
}

/// What pods with these labels have where this fence has no Sidecar: that of their whole namespace, if there is one.
fn ground<'a>(fence: &'a Key, labels: &Labels, world: &'a World) -> Option<&'a Sidecar> {
    if labels.is_empty() {
        return None;
    }
    select::sidecars_in(world, &fence.namespace)
        .map(|(_, sidecar)| sidecar)
        .find(|sidecar| self::labels(sidecar).is_empty())
}

fn labels(sidecar: &Sidecar) -> Labels {
    let selector = sidecar.spec.workload_selector.clone();
    selector.unwrap_or_default().labels
}

/// Writes a step, if it is not there yet, and has its arrival followed.
async fn take_step(
    fence: &Key,
    step: &Sidecar,
    stored: Option<&Sidecar>,
    world: &World,
    context: &Context,
) -> Result<(), Error> {
    let arrivals = &context.arrivals;
    let before = if stage::changes_a_listener(stored, step) {
        Some(arrivals.look(fence, &labels(step), world).await)
    } else {
        None
    };
    if let Some(written) = context.writer.ensure::<Sidecar>(step, stored).await? {
        let object = object_key(fence);
        context.recent.sidecars.wrote(&object, written);
        let hosts = step.spec.egress.iter().flat_map(|listener| &listener.hosts);
        let names = hosts
            .filter_map(|host| host.split_once('/'))
            .map(|(_, fqdn)| fqdn);
        context.learner.stored(fence, names);
    }
    arrivals.follow(fence, step, before);
    Ok(())
}

/// Takes a fence's objects away in steps ([`stage::farewell`]): at last the Sidecar, then the redirect.
async fn retire(fence: &Key, world: &World, context: &Context) -> Result<(), Error> {
    let object = object_key(fence);
    let stored = context.recent.sidecar(world, &object);
    let stored = stored.filter(|stored| is_of(stored, fence));
    if let Some(stored) = &stored {
        if context.arrivals.is_under_way(fence, Some(stored)) {
            return Ok(());
        }
        let labels = labels(stored);
        let arrived = context.arrivals.arrived(fence, &labels, world);
        let ground = ground(fence, &labels, world);
        if let Some(mut step) = stage::farewell(stored, ground, &arrived) {
            step.metadata = ours_again(&step.metadata);
            return take_step(fence, &step, Some(stored), world, context).await;
        }
    }
    remove(fence, stored.as_deref(), world, context).await
}

/// The metadata of an object of ours for writing it again: exactly this one, which must not come back once it is gone.
fn ours_again(stored: &ObjectMeta) -> ObjectMeta {
    ObjectMeta {
        name: stored.name.clone(),
        namespace: stored.namespace.clone(),
        uid: stored.uid.clone(),
        labels: stored.labels.clone(),
        owner_references: stored.owner_references.clone(),
        ..ObjectMeta::default()
    }
}

async fn remove(
    fence: &Key,
    sidecar: Option<&Sidecar>,
    world: &World,
    context: &Context,
) -> Result<(), Error> {
    let object = object_key(fence);
    let redirect = context.recent.redirect(world, &object);
    remove_own(sidecar, fence, context).await?;
    context.recent.sidecars.removed(&object);
    context.arrivals.forget(fence);
    remove_own(redirect.as_deref(), fence, context).await?;
    context.recent.redirects.removed(&object);
    Ok(())
}

/// Removes an object of the fence's, if it is the fence's.
async fn remove_own<K: Owned>(
    object: Option<&K>,
    fence: &Key,
    context: &Context,
) -> Result<(), Error> {
    if let Some(object) = object.filter(|object| fence_of(*object).as_ref() == Some(fence)) {
        context.writer.remove(object).await?;
    }
    Ok(())
}

/// Takes away what belongs to fences that are gone; says whether all of it went well so far.
pub(super) async fn prune(context: &Context) -> bool {
    let world = Arc::clone(&context.world.borrow());
    let sidecars = world.sidecars.values();
    let redirects = world.envoy_filters.values();
    let orphans: BTreeSet<Key> = sidecars
        .filter_map(|object| fence_of(object.as_ref()))
        .chain(redirects.filter_map(|object| fence_of(object.as_ref())))
        .filter(|fence| !world.fences.contains_key(fence))
        .collect();
    let retired = orphans.into_iter().map(|fence| async move {
        // Others took their time.
        let world = Arc::clone(&context.world.borrow());
        if world.fences.contains_key(&fence) {
            return true;
        }
        match retire(&fence, &world, context).await {
            Ok(()) | Err(Error::Apply(apply::Error::Gone { .. })) => true,
            Err(error) => {
                let error = crate::chain(&error);
                tracing::warn!(%fence, error, "what a former fence left");
                false
            }
        }
    });
    let retired = futures::stream::iter(retired).buffer_unordered(usize::from(CONCURRENCY));
    let went: Vec<bool> = retired.collect().await;
    went.into_iter().all(|well| well)
}
