//! Keeps the [`World`] current: takes in what the watches report, publishes the next snapshot and says which fences to
//! look at again.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use fenceline_crds::{RateLimit, ServiceFence, Share};
use kube::ResourceExt;
use kube::runtime::reflector;
use kube::runtime::watcher::Event;
use tokio::sync::{mpsc, watch};

use super::change::{Change, Concerned};
use super::dependents::Dependents;
use super::feed::{BACKLOG, fence_of};
use super::{Key, PodFacts, PolicyFacts, Protection, ServiceFacts, World, in_namespace};
use crate::apply::RATE_LIMIT_LABEL;
use crate::fence::select::{fences_of_pod, is_of_namespace};
use crate::metrics::Metrics;

/// istiod's longest debounce (`PILOT_DEBOUNCE_MAX`) and some.
const RETIREMENT: Duration = Duration::from_secs(15);

/// How long the global proxy may be without endpoints before every fence says so.
const GONE_AFTER: Duration = Duration::from_secs(5);

pub(super) struct WorldTask {
    pub world: World,
    pub publish: watch::Sender<Arc<World>>,
    pub concern: mpsc::UnboundedSender<Concerned>,
    pub sync: watch::Sender<bool>,
    pub writer: reflector::store::Writer<ServiceFence>,
    pub waiting: BTreeSet<&'static str>,
    pub changes: mpsc::Sender<Change>,
    pub root_namespace: String,
    /// How many policies were taken away so far.
    pub retired: u64,
    pub dependents: Dependents,
}

impl WorldTask {
    /// Takes in whatever is there, publishes once, goes on.
    pub(super) async fn run(mut self, mut inbox: mpsc::Receiver<Change>, metrics: Arc<Metrics>) {
        let mut batch = Vec::new();
        while inbox.recv_many(&mut batch, BACKLOG).await > 0 {
            let mut concerned = Concerned::default();
            for change in batch.drain(..) {
                self.take(change, &mut concerned);
            }
            metrics.observe_world(&self.world);
            self.publish.send_replace(Arc::new(self.world.clone()));
            // Before everything is listed, half a mesh would look like a small one.
            if self.waiting.is_empty() {
                if !*self.sync.borrow() {
                    concerned.all = true;
                    self.sync.send_replace(true);
                }
                if concerned != Concerned::default() && self.concern.send(concerned).is_err() {
                    return;
                }
            }
        }
    }

    fn take(&mut self, change: Change, concerned: &mut Concerned) {
        match change {
            Change::Namespace(name, labels) => self.namespace(name, labels, concerned),
            Change::Service(key, facts) => self.service(&key, facts, concerned),
            Change::ServiceEntry(key, hosts) => {
                let old = self.world.service_entries.get(&key).map(AsRef::as_ref);
                if old != hosts.as_ref() {
                    let both = [old, hosts.as_ref()].into_iter().flatten();
                    let changed = both.flat_map(|hosts| hosts.hosts.clone()).collect();
                    self.change_hosts(changed, |world| world.set_service_entry(&key, hosts));
                    concerned.all = true;
                }
            }
            Change::VirtualService(key, hosts, ours) => {
                set(&mut self.world.own_routes, key.clone(), ours);
                let old = self.world.virtual_services.get(&key).map(AsRef::as_ref);
                if old != hosts.as_ref() {
                    let mut changed = self.world.hosts_routed_by(&key);
                    changed.extend(hosts.iter().flat_map(|hosts| hosts.hosts.clone()));
                    self.change_hosts(changed, |world| world.set_virtual_service(&key, hosts));
                    concerned.all = true;
                }
            }
            Change::Rule(key, facts, ours) => {
                set(&mut self.world.rules, key.clone(), facts.map(Box::new));
                set(&mut self.world.own_rules, key, ours);
            }
            Change::Router(key, object) => set(&mut self.world.routers, key, object),
            Change::TrafficPatch(key, object) => {
                set(&mut self.world.traffic_patches, key, object);
            }
            Change::RateLimit(key, object) => {
                // Whoever asks the rate limit service has it in scope.
                let old = self.world.rate_limits.get(&key).map(AsRef::as_ref);
                let asks = |limit: Option<&RateLimit>| {
                    limit
                        .filter(|limit| limit.spec.share == Share::Global)
                        .map(|limit| limit.spec.target.clone())
                };
                if asks(old) != asks(object.as_deref()) {
                    concerned.namespaces.insert(key.namespace.clone());
                    concerned.all |= key.namespace == self.root_namespace;
                }
                set(&mut self.world.rate_limits, key, object);
            }
            Change::Policy(key, facts, ours) => {
                let old = self.world.policies.get(&key).map(AsRef::as_ref);
                if old != facts.as_ref() {
                    let named = |facts: Option<&PolicyFacts>| {
                        facts.filter(|facts| !facts.callers.is_empty()).cloned()
                    };
                    concerned.all |= named(old) != named(facts.as_ref());
                    if let Some(old) = old.filter(|old| old.by_source) {
                        let old = PolicyFacts {
                            callers: BTreeSet::new(),
                            ..old.clone()
                        };
                        self.retire(&key, old);
                    }
                    self.world.set_policy(&key, facts);
                }
                set(&mut self.world.own_policies, key, ours);
            }
            Change::Forgotten(host) => self.world.forget(&host),
            Change::Retired(key) => self.world.set_policy(&key, None),
            Change::GlobalProxy(key, ready) => {
                let slices = &mut self.world.global_proxy;
                match ready {
                    Some(ready) => drop(slices.insert(key, ready)),
                    None => drop(slices.remove(&key)),
                }
                self.look_for_global_proxy(concerned);
            }
            Change::LookForGlobalProxy => {
                let gone = self.world.global_proxy_endpoints() == 0;
                concerned.all |= gone && !self.world.global_proxy_gone;
                self.world.global_proxy_gone |= gone;
            }
            Change::Pod(key, facts) => {
                let old = self.world.pods.get(&key).map(AsRef::as_ref);
                if old != facts.as_ref() {
                    // Policies name callers by what their pods run as, and pods may be outside the mesh.
                    let runs_as = |facts: Option<&PodFacts>| {
                        facts.map(|facts| {
                            let is = (facts.proxy, facts.runs);
                            (facts.service_account.clone(), facts.labels.clone(), is)
                        })
                    };
                    if runs_as(old) != runs_as(facts.as_ref()) {
                        for facts in [old, facts.as_ref()].into_iter().flatten() {
                            let fences = fences_of_pod(&self.world, &key.namespace, facts);
                            concerned.fences.extend(fences);
                        }
                    }
                    self.world.set_pod(&key, facts);
                }
            }
            Change::Sidecar(key, object) => {
                let old = self.world.sidecars.get(&key).map(AsRef::as_ref);
                for sidecar in [old, object.as_deref()].into_iter().flatten() {
                    match fence_of(sidecar) {
                        Some(fence) => drop(concerned.fences.insert(fence)),
                        // Somebody else's may be in the way of any fence beside it.
                        None => drop(concerned.namespaces.insert(key.namespace.clone())),
                    }
                }
                set(&mut self.world.sidecars, key, object);
            }
            Change::EnvoyFilter(key, mut object) => {
                if let Some(object) = &mut object {
                    self.world.one_copy(&mut object.spec.config_patches);
                }
                let old = self.world.envoy_filters.get(&key).map(AsRef::as_ref);
                for filter in [old, object.as_deref()].into_iter().flatten() {
                    match fence_of(filter) {
                        Some(fence) => drop(concerned.fences.insert(fence)),
                        // Of a RateLimit: no fence's.
                        None if filter.labels().contains_key(RATE_LIMIT_LABEL) => {}
                        None => concerned.redirect = true,
                    }
                }
                set(&mut self.world.envoy_filters, key, object);
            }
            Change::Fence(key, object) => {
                concerned.fences.insert(key.clone());
                // One for the whole namespace makes the others write something else.
                let old = self.world.fences.get(&key).map(AsRef::as_ref);
                let dependents = &mut self.dependents;
                dependents.change(&key, old, object.as_deref(), &self.world);
                let both = [old, object.as_deref()];
                if both.into_iter().flatten().any(is_of_namespace)
                    && old.map(|old| &old.spec) != object.as_deref().map(|new| &new.spec)
                {
                    concerned.namespaces.insert(key.namespace.clone());
                }
                let event = match (&object, self.world.fences.get(&key)) {
                    (Some(fence), _) => Some(Event::Apply(fence.as_ref().clone())),
                    (None, Some(gone)) => Some(Event::Delete(gone.as_ref().clone())),
                    (None, None) => None,
                };
                if let Some(event) = event {
                    self.writer.apply_watcher_event(&event);
                }
                set(&mut self.world.fences, key, object);
            }
            Change::FencePolicy(name, object) => match object {
                Some(object) => drop(self.world.fence_policies.insert(name, Arc::from(object))),
                None => drop(self.world.fence_policies.remove(&name)),
            },
            Change::MeshConfig(hosts) => {
                concerned.all |= *self.world.mesh_config != hosts;
                self.world.mesh_config = Arc::new(hosts);
            }
            Change::Definition(definition) => {
                concerned.all |= self.world.definition != definition;
                self.world.definition = definition;
            }
            Change::Synced(kind) => {
                if kind == "EndpointSlice" {
                    self.look_for_global_proxy(concerned);
                }
                if kind == "ServiceFence" {
                    // The store takes only what comes between these two; it holds all fences already.
                    self.writer.apply_watcher_event(&Event::Init);
                    for fence in self.world.fences.values() {
                        self.writer
                            .apply_watcher_event(&Event::InitApply(fence.as_ref().clone()));
                    }
                    self.writer.apply_watcher_event(&Event::InitDone);
                }
                self.waiting.remove(kind);
            }
        }
    }

    /// It is back as soon as it is, and gone once it was for a while.
    fn look_for_global_proxy(&mut self, concerned: &mut Concerned) {
        if self.world.global_proxy_endpoints() > 0 {
            concerned.all |= self.world.global_proxy_gone;
            self.world.global_proxy_gone = false;
            return;
        }
        self.after(GONE_AFTER, Change::LookForGlobalProxy);
    }

    /// Changes what `hosts` are or lead to. A host that was protected until now stays so for as long as some proxy may
    /// still go by the old state.
    fn change_hosts(&mut self, hosts: BTreeSet<String>, change: impl FnOnce(&mut World)) {
        let root = self.root_namespace.clone();
        let known = hosts.into_iter().filter(|host| self.world.knows(host));
        let protected: Vec<(String, Protection)> = known
            .filter_map(|host| Some((self.world.protection_now(&root, &host)?, host)))
            .map(|(by, host)| (host, by))
            .collect();
        change(&mut self.world);
        // All are looked at before the first lingers: what was found out holds until something changes.
        let lost: Vec<_> = protected
            .into_iter()
            .filter(|(host, _)| self.world.protection_now(&root, host).is_none())
            .collect();
        for (host, by) in lost {
            self.world.linger(&host, by);
            self.after(RETIREMENT, Change::Forgotten(host));
        }
    }

    fn after(&self, time: Duration, change: Change) {
        let changes = self.changes.clone();
        tokio::spawn(async move {
            tokio::time::sleep(time).await;
            // The world's task ends with the process.
            let _ = changes.send(change).await;
        });
    }

    /// Keeps what a policy said for as long as some proxy may still go by it: a host that asks who is calling must not
    /// be called under another identity while it does.
    fn retire(&mut self, key: &Key, old: PolicyFacts) {
        self.retired += 1;
        // No object can have this name.
        let name = format!("{}#{}", key.name, self.retired);
        let key = Key::new(&*key.namespace, name);
        self.world.set_policy(&key, Some(old));
        self.after(RETIREMENT, Change::Retired(key));
    }

    fn namespace(
        &mut self,
        name: String,
        labels: Option<BTreeMap<String, String>>,
        concerned: &mut Concerned,
    ) {
        let old = self.world.namespaces.get(&name);
        // The redirect lists the namespaces that exist.
        concerned.redirect |= old.is_some() != labels.is_some();
        if old.map(AsRef::as_ref) != labels.as_ref() {
            concerned.fences.extend(self.dependents.finders().cloned());
        }
        match labels {
            Some(labels) => drop(self.world.namespaces.insert(name, Arc::new(labels))),
            None => drop(self.world.namespaces.remove(&name)),
        }
    }

    /// Whether a policy names callers of Services in a namespace: their fences go by its labels.
    fn is_under_a_policy(&self, namespace: &str) -> bool {
        [namespace, &self.root_namespace].into_iter().any(|of| {
            let mut policies = in_namespace(&self.world.policies, of);
            policies.any(|(_, policy)| !policy.callers.is_empty())
        })
    }

    fn service(&mut self, key: &Key, facts: Option<ServiceFacts>, concerned: &mut Concerned) {
        let old = self.world.services.get(key);
        if old.map(AsRef::as_ref) == facts.as_ref() {
            return;
        }
        let in_every_scope = |facts: Option<&ServiceFacts>| {
            facts
                .filter(|facts| facts.needs_scope)
                .map(|facts| (facts.export_to.clone(), facts.other_ports.clone()))
        };
        let before = in_every_scope(old.map(AsRef::as_ref));
        concerned.all |= before != in_every_scope(facts.as_ref());
        // Whoever calls an alias has in scope what it is another name for.
        let alias = |facts: Option<&ServiceFacts>| facts.and_then(|facts| facts.alias_of.clone());
        concerned.all |= alias(old.map(AsRef::as_ref)) != alias(facts.as_ref());
        // MeshConfig may name it, in short or in full.
        let first = |host: &String| host.split('.').next() == Some(&key.name);
        concerned.all |=
            old.is_some() != facts.is_some() && self.world.mesh_config.iter().any(first);
        // Its pods, which others may select too.
        let pods = |facts: Option<&ServiceFacts>| {
            facts.map(|facts| {
                (
                    facts.selector.clone(),
                    facts.labels.clone(),
                    facts.external_name,
                )
            })
        };
        if pods(old.map(AsRef::as_ref)) != pods(facts.as_ref()) {
            concerned.namespaces.insert(key.namespace.clone());
            concerned.all |= self.is_under_a_policy(&key.namespace);
        }
        let fqdn = self.world.fqdn(key);
        let touched = self.dependents.of(&fqdn).chain(self.dependents.finders());
        concerned.fences.extend(touched.cloned());
        let brought = self.dependents.brings(key, &self.world);
        concerned.fences.extend(brought.cloned());
        let ranges: Vec<_> = self.world.service_ranges().collect();
        let ports: Vec<_> = self.world.http_ports().collect();
        self.change_hosts([fqdn].into(), |world| world.set_service(key, facts));
        // The redirect lists them.
        concerned.redirect |= !self.world.service_ranges().eq(ranges);
        // What can be learnt by TCP depends on them.
        concerned.all |= !self.world.http_ports().eq(ports);
    }
}

fn set<T>(map: &mut imbl::OrdMap<Key, Arc<T>>, key: Key, value: Option<Box<T>>) {
    match value {
        Some(value) => drop(map.insert(key, Arc::from(value))),
        None => drop(map.remove(&key)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{policy, service, settings, virtual_service, world};
    use crate::world::NamedHosts;

    fn task(world: World) -> WorldTask {
        let (changes, _) = mpsc::channel(1);
        WorldTask {
            world,
            publish: watch::channel(Arc::new(World::new("cluster.local"))).0,
            concern: mpsc::unbounded_channel().0,
            sync: watch::channel(true).0,
            writer: reflector::store().1,
            waiting: BTreeSet::new(),
            changes,
            root_namespace: settings().root_namespace,
            retired: 0,
            dependents: Dependents::default(),
        }
    }

    #[tokio::test]
    async fn protection_outlives_the_change_that_ends_it() {
        let mut mesh = world();
        service(&mut mesh, "bank", "vault", "{}");
        let rule = "{rules: [{from: [{source: {namespaces: [shop]}}]}], \
                    selector: {matchLabels: {app: vault}}}";
        policy(&mut mesh, "bank", "vault", rule);
        let front = "{hosts: [front], http: [{route: [{destination: {host: vault}}]}]}";
        virtual_service(&mut mesh, "bank", "front", front);
        let root = settings().root_namespace;
        let mut task = task(mesh);
        let protected = |task: &WorldTask, host| task.world.protection(&root, host).is_some();
        let take = |task: &mut WorldTask, change| task.take(change, &mut Concerned::default());
        let front = "front.bank.svc.cluster.local";
        let vault = "vault.bank.svc.cluster.local";
        assert!(protected(&task, front) && protected(&task, vault));

        // Neither the route nor the Service leads to the vault's pods any more; some proxies do not know yet.
        let elsewhere = NamedHosts {
            hosts: [front.to_owned()].into(),
            ..NamedHosts::default()
        };
        let key = Key::new("bank", "front");
        take(
            &mut task,
            Change::VirtualService(key, Some(elsewhere), None),
        );
        let other = ServiceFacts {
            selector: [("app".to_owned(), "other".to_owned())].into(),
            ..ServiceFacts::default()
        };
        take(
            &mut task,
            Change::Service(Key::new("bank", "vault"), Some(other)),
        );
        assert!(protected(&task, front) && protected(&task, vault));

        let new = Change::Service(
            Key::new("bank", "new"),
            Some(ServiceFacts {
                selector: [("app".to_owned(), "new".to_owned())].into(),
                ..ServiceFacts::default()
            }),
        );
        take(&mut task, new);
        assert!(!protected(&task, "new.bank.svc.cluster.local"));

        let before = task.world.clone();
        take(&mut task, Change::Forgotten(front.to_owned()));
        assert!(
            !task.world.protects_as(&before),
            "what the global proxy denies follows"
        );
        assert!(!protected(&task, front) && protected(&task, vault));
        take(&mut task, Change::Forgotten(vault.to_owned()));
        assert!(!protected(&task, vault));
    }
}
