//! The only module that writes objects: server-side apply, drift repair, removal. It writes what differs from what the
//! watches last saw, and nothing else.

use std::collections::BTreeSet;
use std::fmt::Debug;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use fenceline_crds::ServiceFence;
use fenceline_crds::istio::{
    AuthorizationPolicy, DestinationRule, EnvoyFilter, Sidecar, VirtualService,
};
use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::api::core::v1::Service;
use kube::api::{DeleteParams, Patch, PatchParams, PostParams, Preconditions};
use kube::{Api, Client, Resource, ResourceExt};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::sync::watch;

use crate::budget::Budget;
use crate::metrics::{Metrics, write};
use crate::patch::bound::bytes;
use crate::world::Key;
use crate::world::feed::{self, fence_of};

/// Our field manager, and the value of [`MANAGED_BY`].
pub const MANAGER: &str = "fenceline";
/// <https://kubernetes.io/docs/concepts/overview/working-with-objects/common-labels/>
pub const MANAGED_BY: &str = "app.kubernetes.io/managed-by";
/// Names the fence that an object was written for.
pub const FENCE_LABEL: &str = "fenceline.dev/service-fence";

/// Names the Service that an object was written for.
pub const SERVICE_LABEL: &str = "fenceline.dev/service";
/// Names the RateLimit that an object was written for.
pub const RATE_LIMIT_LABEL: &str = "fenceline.dev/rate-limit";

/// How many bytes a spec of ours may have: a third of what etcd takes, so that managed fields and what was good before have room too.
/// <https://etcd.io/docs/v3.6/dev-guide/limit/>
pub const LARGEST: usize = 512 << 10;

/// A request that failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(
        "{kind} {object} would have {} KiB, and {} KiB is the most; it is left as it is",
        bytes.div_ceil(1024), LARGEST >> 10
    )]
    TooLarge {
        kind: &'static str,
        object: Key,
        bytes: usize,
    },
    #[error("could not {verb} {kind} {object}")]
    Request {
        verb: &'static str,
        kind: &'static str,
        object: Key,
        #[source]
        source: Box<kube::Error>,
    },
    #[error("{kind} {object} is not ours")]
    NotOurs { kind: &'static str, object: Key },
    #[error("{kind} {object} is gone")]
    Gone { kind: &'static str, object: Key },
    #[error("{kind} {object} was changed by somebody else meanwhile")]
    Changed { kind: &'static str, object: Key },
    #[error("{kind} {object} is not written: this replica no longer leads")]
    NotLeading { kind: &'static str, object: Key },
}

impl Error {
    /// What the API says where it understood and does not want it: an admission policy, a quota, a right that is missing. Not
    /// of what goes by itself.
    pub fn refusal(&self) -> Option<String> {
        let Self::Request { source, .. } = self else {
            return None;
        };
        match &**source {
            kube::Error::Api(status) if matches!(status.code, 400 | 403 | 413 | 422) => {
                Some(format!("{self}: {}", status.message))
            }
            _ if self.is_too_large() => Some(format!("{self}: {source}")),
            _ => None,
        }
    }

    /// Whether the object is too large, or there is no room for it: to try again soon changes nothing. etcd's own words come with 500.
    /// <https://etcd.io/docs/v3.6/dev-guide/limit/>
    pub fn is_too_large(&self) -> bool {
        match self {
            Self::TooLarge { .. } => true,
            Self::Request { source, .. } => match &**source {
                kube::Error::Api(status) => match status.code {
                    413 | 507 => true,
                    500 => ["too large", "ResourceExhausted", "database space exceeded"]
                        .iter()
                        .any(|words| status.message.contains(words)),
                    _ => false,
                },
                _ => false,
            },
            _ => false,
        }
    }
}

/// A kind that Fenceline writes whole: objects with a spec.
pub trait Owned:
    Resource<DynamicType = (), Scope = NamespaceResourceScope>
    + Clone
    + Debug
    + Serialize
    + DeserializeOwned
    + Send
    + Sync
    + 'static
{
    type Spec: PartialEq + Serialize + Sync;
    const KIND: &'static str;
    /// Whether istiod makes configuration of it, and so should not get too many at once.
    const FOR_ISTIOD: bool = true;
    /// Whether it may have [`LARGEST`] bytes and no more.
    const BOUNDED: bool = false;

    fn spec(&self) -> &Self::Spec;
}

impl Owned for Sidecar {
    type Spec = fenceline_crds::istio::SidecarSpec;
    const KIND: &'static str = "Sidecar";
    const BOUNDED: bool = true;

    fn spec(&self) -> &Self::Spec {
        &self.spec
    }
}

impl Owned for EnvoyFilter {
    type Spec = fenceline_crds::istio::EnvoyFilterSpec;
    const KIND: &'static str = "EnvoyFilter";

    fn spec(&self) -> &Self::Spec {
        &self.spec
    }
}

impl Owned for VirtualService {
    type Spec = fenceline_crds::istio::VirtualServiceSpec;
    const KIND: &'static str = "VirtualService";
    const BOUNDED: bool = true;

    fn spec(&self) -> &Self::Spec {
        &self.spec
    }
}

impl Owned for DestinationRule {
    type Spec = fenceline_crds::istio::DestinationRuleSpec;
    const KIND: &'static str = "DestinationRule";
    const BOUNDED: bool = true;

    fn spec(&self) -> &Self::Spec {
        &self.spec
    }
}

impl Owned for AuthorizationPolicy {
    type Spec = fenceline_crds::istio::AuthorizationPolicySpec;
    const KIND: &'static str = "AuthorizationPolicy";

    fn spec(&self) -> &Self::Spec {
        &self.spec
    }
}

impl Owned for ServiceFence {
    type Spec = fenceline_crds::ServiceFenceSpec;
    const KIND: &'static str = "ServiceFence";
    const FOR_ISTIOD: bool = false;

    fn spec(&self) -> &Self::Spec {
        &self.spec
    }
}

/// Whether this replica may write: it leads, and none of its tasks stalled. It is asked before every write, since a task that comes back
/// late goes on where it was.
#[derive(Clone, Debug)]
pub struct Gate {
    shut: Arc<AtomicBool>,
    leads: watch::Receiver<bool>,
}

impl Gate {
    pub fn new(leads: watch::Receiver<bool>) -> Self {
        let shut = Arc::default();
        Self { shut, leads }
    }

    /// Nothing is written any more.
    pub fn shut(&self) {
        self.shut.store(true, Ordering::SeqCst);
    }

    fn is_open(&self) -> bool {
        !self.shut.load(Ordering::SeqCst) && *self.leads.borrow()
    }
}

/// Writes objects.
#[derive(Clone)]
pub struct Writer {
    client: Client,
    metrics: Arc<Metrics>,
    budget: Budget,
    gate: Gate,
}

impl Writer {
    /// Writes at most `per_second` objects a second, while the gate is open.
    pub fn new(client: Client, metrics: Arc<Metrics>, per_second: u32, gate: Gate) -> Self {
        let budget = Budget::new(per_second, metrics.writes_waiting.clone());
        Self {
            client,
            metrics,
            budget,
            gate,
        }
    }

    /// So much is over a bound now.
    pub(crate) fn is_over(&self, bound: &'static str, count: usize) {
        self.metrics.is_over(bound, count);
    }

    /// Makes the object in the cluster be `want`, where `have` is what the watch last saw. Gives what was written, if that
    /// was necessary.
    ///
    /// # Errors
    /// Fails when somebody else's object has this name, when `want` is of a uid that is gone or is too large, or when the API refuses.
    pub async fn ensure<K: Owned>(&self, want: &K, have: Option<&K>) -> Result<Option<K>, Error> {
        let object = Key::new(want.namespace().unwrap_or_default(), want.name_any());
        if let Some(have) = have
            && is_ours(have, want)
            && is_as_wanted(have, want)
        {
            return Ok(None);
        }
        let bytes = bytes(want.spec());
        if K::BOUNDED && bytes > LARGEST {
            self.metrics.drop_over("object_bytes");
            return Err(Error::TooLarge {
                kind: K::KIND,
                object,
                bytes,
            });
        }
        let api = Api::<K>::namespaced(self.client.clone(), &object.namespace);
        // To apply by force is to take over, so what the watch has not shown yet is made, or else looked at first.
        let unseen = match have {
            Some(_) => None,
            None if want.uid().is_some() => self.live(&api, &object).await?,
            None => match self.create(&api, &object, want).await? {
                Some(made) => return Ok(Some(made)),
                None => self.live(&api, &object).await?,
            },
        };
        match have.or(unseen.as_ref()) {
            Some(have) if !is_ours(have, want) => {
                return Err(Error::NotOurs {
                    kind: K::KIND,
                    object,
                });
            }
            Some(have) if is_as_wanted(have, want) => return Ok(None),
            _ => {}
        }
        let params = PatchParams::apply(MANAGER).force();
        self.wait::<K>(&object).await?;
        let written = within(api.patch(&object.name, &params, &Patch::Apply(want))).await;
        if let Err(kube::Error::Api(status)) = &written
            && status.is_conflict()
            && want.uid().is_some()
        {
            return Err(Error::Gone {
                kind: K::KIND,
                object,
            });
        }
        let mut written = self.done(K::KIND, "apply", &object, written)?;
        if !same_spec(&written, want) {
            // Apply leaves alone what another manager added, and a fence's objects are the fence's alone.
            let rest = undo(&written, want);
            let params = PatchParams {
                field_manager: Some(MANAGER.into()),
                ..PatchParams::default()
            };
            let patch = Patch::<()>::Json(rest);
            self.may_write(K::KIND, &object)?;
            let patched = within(api.patch(&object.name, &params, &patch)).await;
            written = self.done(K::KIND, "apply", &object, patched)?;
        }
        Ok(Some(written))
    }

    /// Makes the object; nothing where there is one of this name. It costs kube-apiserver half of what applying does.
    async fn create<K: Owned>(
        &self,
        api: &Api<K>,
        object: &Key,
        want: &K,
    ) -> Result<Option<K>, Error> {
        let params = PostParams {
            field_manager: Some(MANAGER.to_owned()),
            ..PostParams::default()
        };
        self.wait::<K>(object).await?;
        match within(api.create(&params, want)).await {
            Err(kube::Error::Api(status)) if status.is_already_exists() => Ok(None),
            other => self.done(K::KIND, "create", object, other).map(Some),
        }
    }

    /// Waits for the object's turn.
    async fn wait<K: Owned>(&self, object: &Key) -> Result<(), Error> {
        if K::FOR_ISTIOD {
            self.budget.wait(&object.namespace).await;
        }
        self.may_write(K::KIND, object)
    }

    fn may_write(&self, kind: &'static str, object: &Key) -> Result<(), Error> {
        if self.gate.is_open() {
            return Ok(());
        }
        let object = object.clone();
        Err(Error::NotLeading { kind, object })
    }

    async fn live<K: Owned>(&self, api: &Api<K>, object: &Key) -> Result<Option<K>, Error> {
        within(api.get_opt(&object.name)).await.map_err(|source| {
            self.metrics.api.check(&source);
            Error::Request {
                verb: "get",
                kind: K::KIND,
                object: object.clone(),
                source: Box::new(source),
            }
        })
    }

    /// Sets an annotation of an object of ours, by a field manager of its own, so that applying the object leaves it.
    ///
    /// # Errors
    /// Fails when the API refuses.
    pub async fn annotate<K: Owned>(&self, have: &K, name: &str, value: &str) -> Result<(), Error> {
        let object = Key::new(have.namespace().unwrap_or_default(), have.name_any());
        let patch = json!({"metadata": {"uid": have.uid(), "annotations": {name: value}}});
        let params = PatchParams {
            field_manager: Some(format!("{MANAGER}-annotations")),
            ..PatchParams::default()
        };
        let api = Api::<K>::namespaced(self.client.clone(), &object.namespace);
        self.may_write(K::KIND, &object)?;
        let written = within(api.patch(&object.name, &params, &Patch::Merge(patch))).await;
        self.done(K::KIND, "annotate", &object, written).map(drop)
    }

    /// Deletes an object of ours, exactly the one that the watch saw.
    ///
    /// # Errors
    /// Fails when the API refuses, and when somebody changed it since; an object that is already gone is a success.
    pub async fn remove<K: Owned>(&self, have: &K) -> Result<(), Error> {
        let object = Key::new(have.namespace().unwrap_or_default(), have.name_any());
        let params = DeleteParams {
            preconditions: Some(Preconditions {
                uid: have.uid(),
                resource_version: have.resource_version(),
            }),
            ..DeleteParams::default()
        };
        let api = Api::<K>::namespaced(self.client.clone(), &object.namespace);
        self.wait::<K>(&object).await?;
        match within(api.delete(&object.name, &params)).await {
            Err(kube::Error::Api(status)) if status.is_not_found() => Ok(()),
            Err(kube::Error::Api(status)) if status.is_conflict() => Err(Error::Changed {
                kind: K::KIND,
                object,
            }),
            other => self.done(K::KIND, "delete", &object, other).map(drop),
        }
    }

    /// Adds `ports` to the global proxy's Service, and takes away those of ours that are not among them. Ports that
    /// others put there stay theirs.
    ///
    /// # Errors
    /// Fails when the API refuses.
    pub async fn ensure_ports(
        &self,
        service: &Key,
        ports: &BTreeSet<u16>,
        target_port: u16,
    ) -> Result<(), Error> {
        let ports: Vec<Value> = ports
            .iter()
            .map(|port| {
                json!({"name": format!("http-{port}"), "port": port, "protocol": "TCP", "targetPort": target_port})
            })
            .collect();
        let object = json!({
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": service.name, "namespace": service.namespace},
            "spec": {"ports": ports},
        });
        let api: Api<Service> = Api::namespaced(self.client.clone(), &service.namespace);
        let params = PatchParams::apply(MANAGER).force();
        self.may_write("Service", service)?;
        let written = within(api.patch(&service.name, &params, &Patch::Apply(object))).await;
        self.done("Service", "apply", service, written).map(drop)
    }

    /// Makes a Service be as given, if nobody else has it.
    ///
    /// # Errors
    /// Fails when somebody else's Service has this name, or when the API refuses.
    pub async fn ensure_service(&self, want: &Service) -> Result<(), Error> {
        const KIND: &str = "Service";
        let object = Key::new(want.namespace().unwrap_or_default(), want.name_any());
        let api: Api<Service> = Api::namespaced(self.client.clone(), &object.namespace);
        let there = within(api.get_opt(&object.name)).await;
        let there = there.map_err(|source| Error::Request {
            verb: "get",
            kind: KIND,
            object: object.clone(),
            source: Box::new(source),
        })?;
        if there.is_some_and(|there| !feed::is_ours(&there)) {
            return Err(Error::NotOurs { kind: KIND, object });
        }
        let mut want = serde_json::to_value(want).unwrap_or_default();
        want["apiVersion"] = json!("v1");
        want["kind"] = json!(KIND);
        let params = PatchParams::apply(MANAGER).force();
        self.may_write(KIND, &object)?;
        let written = within(api.patch(&object.name, &params, &Patch::Apply(want))).await;
        self.done(KIND, "apply", &object, written).map(drop)
    }

    fn done<T>(
        &self,
        kind: &'static str,
        verb: &'static str,
        object: &Key,
        result: kube::Result<T>,
    ) -> Result<T, Error> {
        self.metrics
            .writes
            .get_or_create(&write(kind, verb, result.is_ok()))
            .inc();
        match &result {
            Ok(_) => tracing::info!(kind, verb, %object, "wrote"),
            Err(error) => self.metrics.api.check(error),
        }
        result.map_err(|source| Error::Request {
            verb,
            kind,
            object: object.clone(),
            source: Box::new(source),
        })
    }
}

/// How long the API may take to answer: a connection that died silently must not hold up everything behind it.
const ANSWER: Duration = Duration::from_secs(10);

/// The request, or an error once the API took too long.
pub(crate) async fn within<T>(request: impl Future<Output = kube::Result<T>>) -> kube::Result<T> {
    match tokio::time::timeout(ANSWER, request).await {
        Ok(result) => result,
        Err(elapsed) => Err(kube::Error::Service(Box::new(elapsed))),
    }
}

fn is_ours<K: Resource>(have: &K, want: &K) -> bool {
    match fence_of(want) {
        Some(fence) => fence_of(have) == Some(fence),
        None => feed::is_ours(have),
    }
}

fn same_spec<K: Owned>(have: &K, want: &K) -> bool {
    have.spec() == want.spec()
}

/// Whether everything that we would write is there, and nothing else in the spec.
fn is_as_wanted<K: Owned>(have: &K, want: &K) -> bool {
    let labelled = want
        .labels()
        .iter()
        .all(|(key, value)| have.labels().get(key) == Some(value));
    let is_there = |owner| have.owner_references().contains(owner);
    same_spec(have, want) && labelled && want.owner_references().iter().all(is_there)
}

/// The patch from the spec that is there to the one that should be.
fn undo<K: Owned>(have: &K, want: &K) -> json_patch::Patch {
    let spec =
        |object: &K| json!({"spec": serde_json::to_value(object.spec()).unwrap_or_default()});
    json_patch::diff(&spec(have), &spec(want))
}

#[cfg(test)]
mod tests {
    use super::*;
    use kube::core::Status;

    #[test]
    fn what_is_too_large_is_a_refusal() {
        let error = |code: u16, message: &str| Error::Request {
            verb: "apply",
            kind: "Sidecar",
            object: Key::new("shop", "fenceline-cart"),
            source: Box::new(kube::Error::Api(
                Status::failure(message, "").with_code(code).boxed(),
            )),
        };
        for (code, message, large) in [
            (500, "etcdserver: request is too large", true),
            (
                500,
                "rpc error: code = ResourceExhausted desc = trying to send message",
                true,
            ),
            (507, "no room", true),
            (413, "limit is 3145728", true),
            (500, "etcdserver: leader changed", false),
            (409, "too large to be true", false),
        ] {
            let error = error(code, message);
            assert_eq!(error.is_too_large(), large, "{message}");
            assert_eq!(error.refusal().is_some(), large, "{message}");
        }
        assert!(error(422, "denied").refusal().is_some());
    }
}
