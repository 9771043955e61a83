//! The only module that writes status and events. Every status write carries the version it was worked out from, so
//! that replicas which learn at the same time never undo one another's.

use std::collections::HashMap;
use std::fmt::Debug;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use fenceline_crds::{
    FencePolicy, FencePolicyStatus, LimitServiceStatus, RateLimit, Router, ServiceFence,
    ServiceFenceStatus, TrafficPatch,
};
use jiff::Timestamp;
use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::api::core::v1::ObjectReference;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::api::{ListParams, Patch, PatchParams};
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use kube::{Api, Client, Resource, ResourceExt};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::json;

use crate::apply::{MANAGER, within};
use crate::metrics::{Metrics, write};
use crate::process::quarantine::{self, Conditioned, Object};
use crate::world::{Key, World};

/// How often a write that met a newer version is worked out again before it is left to the caller's next attempt.
const ATTEMPTS: usize = 8;

/// The API takes no longer notes.
/// <https://kubernetes.io/docs/reference/kubernetes-api/cluster-resources/event-v1/>
const LONGEST_NOTE: usize = 1024;

/// A status that could not be written.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("could not write the status of ServiceFence {fence}")]
    Write {
        fence: Key,
        #[source]
        source: Box<kube::Error>,
    },
    #[error("the status of ServiceFence {fence} was changed by others {ATTEMPTS} times in a row")]
    Contended { fence: Key },
}

/// Writes the status of fences, and events about them.
pub struct StatusWriter {
    client: Client,
    metrics: Arc<Metrics>,
    recorder: Recorder,
    /// What we wrote and the watch may not have shown yet.
    latest: Mutex<HashMap<Key, Arc<ServiceFence>>>,
}

impl StatusWriter {
    pub fn new(client: Client, metrics: Arc<Metrics>, replica: &str) -> Self {
        let reporter = Reporter {
            controller: MANAGER.to_owned(),
            instance: Some(replica.to_owned()),
        };
        Self {
            recorder: Recorder::new(client.clone(), reporter),
            client,
            metrics,
            latest: Mutex::default(),
        }
    }

    /// The newest fence known here: of the watch, or what was written since.
    pub fn newest(&self, world: &World, key: &Key) -> Option<Arc<ServiceFence>> {
        let seen = world.fences.get(key)?;
        let mut latest = self.latest.lock().unwrap_or_else(PoisonError::into_inner);
        match latest.get(key) {
            Some(written) if is_newer(written.as_ref(), seen.as_ref()) => Some(Arc::clone(written)),
            _ => {
                latest.remove(key);
                Some(Arc::clone(seen))
            }
        }
    }

    /// A replica that only learns is not told which fences go.
    fn forget_former(&self, world: &World) {
        let mut latest = self.latest.lock().unwrap_or_else(PoisonError::into_inner);
        if latest.len() > world.fences.len() {
            latest.retain(|key, _| world.fences.contains_key(key));
        }
    }

    /// Writes `change` of the fence's status, worked out again from the newest where others wrote meanwhile. Says
    /// whether anything was written; `false` also where the fence is gone.
    ///
    /// # Errors
    /// Fails when the API refuses, or others keep writing.
    pub async fn update(
        &self,
        world: &World,
        key: &Key,
        change: impl Fn(&ServiceFence) -> ServiceFenceStatus,
    ) -> Result<bool, Error> {
        let Some(mut base) = self.newest(world, key) else {
            return Ok(false);
        };
        let api: Api<ServiceFence> = Api::namespaced(self.client.clone(), &key.namespace);
        let failed = |source| Error::Write {
            fence: key.clone(),
            source: Box::new(source),
        };
        self.forget_former(world);
        for _ in 0..ATTEMPTS {
            let status = change(&base);
            if base.status.as_ref() == Some(&status) {
                return Ok(false);
            }
            let patch = json!({
                "apiVersion": ServiceFence::api_version(&()),
                "kind": ServiceFence::kind(&()),
                "metadata": {
                    "name": key.name,
                    "uid": base.uid(),
                    "resourceVersion": base.resource_version(),
                },
                "status": status,
            });
            let params = PatchParams::apply(MANAGER).force();
            let patch = Patch::Apply(patch);
            let written = within(api.patch_status(&key.name, &params, &patch)).await;
            let outcome = write("ServiceFence/status", "apply", written.is_ok());
            self.metrics.writes.get_or_create(&outcome).inc();
            match written {
                Ok(written) => {
                    let mut latest = self.latest.lock().unwrap_or_else(PoisonError::into_inner);
                    latest.insert(key.clone(), Arc::new(written));
                    return Ok(true);
                }
                Err(kube::Error::Api(status)) if status.is_conflict() => {
                    match within(api.get_opt(&key.name)).await.map_err(failed)? {
                        Some(fence) => base = Arc::new(fence),
                        None => return Ok(false),
                    }
                }
                Err(kube::Error::Api(status)) if status.is_not_found() => return Ok(false),
                Err(error) => {
                    self.metrics.api.check(&error);
                    return Err(failed(error));
                }
            }
        }
        Err(Error::Contended { fence: key.clone() })
    }

    /// Writes the status of a policy, which the leader alone does.
    ///
    /// # Errors
    /// Fails when the API refuses.
    pub async fn policy(&self, name: &str, status: FencePolicyStatus) -> kube::Result<()> {
        let patch = json!({
            "apiVersion": FencePolicy::api_version(&()),
            "kind": FencePolicy::kind(&()),
            "metadata": {"name": name},
            "status": status,
        });
        let api: Api<FencePolicy> = Api::all(self.client.clone());
        let params = PatchParams::apply(MANAGER).force();
        let written = within(api.patch_status(name, &params, &Patch::Apply(patch))).await;
        let outcome = write("FencePolicy/status", "apply", written.is_ok());
        self.metrics.writes.get_or_create(&outcome).inc();
        written.map(drop)
    }

    /// Writes the status of a Router or a patch, which the leader alone does.
    ///
    /// # Errors
    /// Fails when the API refuses.
    pub async fn of<K, S>(&self, object: &K, status: &S) -> kube::Result<()>
    where
        K: Resource<DynamicType = (), Scope = NamespaceResourceScope>
            + Clone
            + Debug
            + DeserializeOwned,
        S: Serialize,
    {
        let namespace = object.namespace().unwrap_or_default();
        let patch = json!({
            "apiVersion": K::api_version(&()),
            "kind": K::kind(&()),
            "metadata": {"name": object.name_any(), "uid": object.uid()},
            "status": status,
        });
        let api: Api<K> = Api::namespaced(self.client.clone(), &namespace);
        let params = PatchParams::apply(MANAGER).force();
        let written =
            within(api.patch_status(&object.name_any(), &params, &Patch::Apply(patch))).await;
        let kind = match K::kind(&()).as_ref() {
            "Router" => "Router/status",
            "RateLimit" => "RateLimit/status",
            _ => "TrafficPatch/status",
        };
        let outcome = write(kind, "apply", written.is_ok());
        self.metrics.writes.get_or_create(&outcome).inc();
        match written {
            Err(kube::Error::Api(status)) if status.is_not_found() || status.is_conflict() => {
                Ok(())
            }
            other => other.map(drop),
        }
    }

    /// Writes what the rate limit services have that are connected to a replica, and nothing of what others noted.
    ///
    /// # Errors
    /// Fails when the API refuses.
    pub async fn limit_services(
        &self,
        object: &RateLimit,
        replica: &str,
        services: &[LimitServiceStatus],
    ) -> kube::Result<()> {
        let patch = json!({
            "apiVersion": RateLimit::api_version(&()),
            "kind": RateLimit::kind(&()),
            "metadata": {"name": object.name_any(), "uid": object.uid()},
            "status": {"services": services},
        });
        let namespace = object.namespace().unwrap_or_default();
        let api: Api<RateLimit> = Api::namespaced(self.client.clone(), &namespace);
        let params = PatchParams::apply(&format!("{MANAGER}-services-{replica}")).force();
        let written =
            within(api.patch_status(&object.name_any(), &params, &Patch::Apply(patch))).await;
        let outcome = write("RateLimit/status", "apply", written.is_ok());
        self.metrics.writes.get_or_create(&outcome).inc();
        match written {
            Err(kube::Error::Api(status)) if status.is_not_found() || status.is_conflict() => {
                Ok(())
            }
            other => other.map(drop),
        }
    }

    /// Marks an object as quarantined, since its evaluation took more than `limit`; of Routers and patches that are evaluated together, all.
    /// The objects are read first: whoever calls this may know an old world.
    ///
    /// # Errors
    /// Fails when the API refuses.
    pub async fn quarantine(
        &self,
        object: &Object,
        limit: Duration,
        now: Timestamp,
    ) -> kube::Result<()> {
        let client = || self.client.clone();
        match object {
            Object::Fence(Key { namespace, name }) => {
                let api = Api::<ServiceFence>::namespaced(client(), namespace);
                self.mark_all(&api, |fence| fence.name_any() == *name, limit, now)
                    .await
            }
            Object::RateLimit(Key { namespace, name }) => {
                let api = Api::<RateLimit>::namespaced(client(), namespace);
                self.mark_all(
                    &api,
                    |rate_limit| rate_limit.name_any() == *name,
                    limit,
                    now,
                )
                .await
            }
            Object::Routes(Key { namespace, name }) => {
                let routers = Api::<Router>::namespaced(client(), namespace);
                self.mark_all(&routers, |router| router.spec.service == *name, limit, now)
                    .await?;
                let patches = Api::<TrafficPatch>::namespaced(client(), namespace);
                self.mark_all(&patches, |patch| patch.spec.service == *name, limit, now)
                    .await
            }
            Object::FencePolicies => {
                let api = Api::<FencePolicy>::all(client());
                self.mark_all(&api, |_| true, limit, now).await
            }
        }
    }

    async fn mark_all<K>(
        &self,
        api: &Api<K>,
        is_at_fault: impl Fn(&K) -> bool,
        limit: Duration,
        now: Timestamp,
    ) -> kube::Result<()>
    where
        K: Conditioned + Clone + Debug + DeserializeOwned + Serialize,
    {
        let all = within(api.list(&ListParams::default())).await?;
        for object in all.items.iter().filter(|object| is_at_fault(object)) {
            let conditions = quarantine::conditions(object, limit, now);
            let message = conditions.first().map(|ready| ready.message.clone());
            let mut status = serde_json::to_value(object)
                .map(|mut whole| whole["status"].take())
                .unwrap_or_default();
            if !status.is_object() {
                status = json!({});
            }
            status["conditions"] = json!(conditions);
            status["observedGeneration"] = json!(object.meta().generation);
            if let Some(fields) = status.as_object_mut() {
                // Each replica's own, by a field manager of its own.
                fields.remove("services");
            }
            let patch = json!({
                "apiVersion": K::api_version(&()),
                "kind": K::kind(&()),
                "metadata": {"name": object.name_any(), "uid": object.uid(), "resourceVersion": object.resource_version()},
                "status": status,
            });
            let params = PatchParams::apply(MANAGER).force();
            let patch = Patch::Apply(patch);
            within(api.patch_status(&object.name_any(), &params, &patch)).await?;
            self.metrics.quarantined.inc();
            self.event(
                &object.object_ref(&()),
                true,
                quarantine::REASON,
                message.unwrap_or_default(),
            )
            .await;
        }
        Ok(())
    }

    /// Publishes an event about an object. Events are for people: one that is lost is logged, no more.
    pub async fn event(&self, about: &ObjectReference, warning: bool, reason: &str, note: String) {
        let note: String = note.chars().take(LONGEST_NOTE).collect();
        let event = Event {
            type_: if warning {
                EventType::Warning
            } else {
                EventType::Normal
            },
            reason: reason.to_owned(),
            note: Some(note),
            action: "Reconcile".to_owned(),
            secondary: None,
        };
        let result = self.recorder.publish(&event, about).await;
        self.metrics
            .writes
            .get_or_create(&write("Event", "create", result.is_ok()))
            .inc();
        if let Err(error) = result {
            tracing::warn!(%error, reason, "event lost");
        }
    }

    pub fn forget(&self, key: &Key) {
        self.latest
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(key);
    }
}

/// Resource versions of one kind can be compared since Kubernetes 1.35, and before that were numbers all the same
/// (KEP-5504).
pub(crate) fn is_newer<K: Resource>(a: &K, b: &K) -> bool {
    let version = |object: &K| {
        object
            .resource_version()
            .and_then(|version| version.parse::<u64>().ok())
    };
    a.meta().uid == b.meta().uid && version(a) > version(b)
}

/// One condition to be set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Said {
    pub type_: &'static str,
    pub status: bool,
    pub reason: &'static str,
    pub message: String,
}

/// Puts conditions into `old`; the time of a transition changes only with the status.
pub fn set_conditions(
    old: &[Condition],
    said: &[Said],
    generation: Option<i64>,
    now: Timestamp,
) -> Vec<Condition> {
    said.iter()
        .map(|said| {
            let status = if said.status { "True" } else { "False" };
            let before = old
                .iter()
                .find(|old| old.type_ == said.type_ && old.status == status);
            let since = before.map_or(Time(now), |before| before.last_transition_time.clone());
            Condition {
                type_: said.type_.to_owned(),
                status: status.to_owned(),
                reason: said.reason.to_owned(),
                message: said.message.clone(),
                observed_generation: generation,
                last_transition_time: since,
            }
        })
        .collect()
}
