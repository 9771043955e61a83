//! Which fences policies and labels want: a plain function of the world.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use fenceline_crds::{
    Dependency, FencePolicy, Granularity, Mode, Selector, ServiceFence, ServiceFenceSpec, Template,
    Workload,
};
use kube::ResourceExt;
use kube::api::ObjectMeta;
use kube::core::SelectorExt;

use crate::apply::{MANAGED_BY, MANAGER};
use crate::fence::Settings;
use crate::fence::alias;
use crate::fence::select::{self, Labels, matches};
use crate::world::feed::is_ours;
use crate::world::{Key, PodFacts, World, in_namespace};

/// `enforce`, `observe` or `off`, on a Service or a Namespace.
pub const FENCE: &str = "fenceline.dev/fence";
/// The policy that a fence was made for.
pub const POLICY: &str = "fenceline.dev/fence-policy";
/// Of a policy that labels alone stand for.
const BY_LABEL: &str = "";

/// The labels that name a workload, the most specific first.
/// <https://istio.io/latest/docs/ops/configuration/telemetry/canonical-service-association/>
const NAMES: [&str; 3] = [
    "service.istio.io/canonical-name",
    "app.kubernetes.io/name",
    "app",
];

/// How many fences of a namespace are kept for workloads of which no pod runs.
const KEPT: usize = 200;

/// What policies and labels want.
#[derive(Debug, Default, PartialEq)]
pub struct Wanted {
    pub fences: BTreeMap<Key, ServiceFence>,
    /// Those of them whose mode is their policy's to say and not a label's, by a policy that promotes.
    pub promotable: BTreeSet<Key>,
    /// The namespaces of each policy.
    pub namespaces: BTreeMap<String, BTreeSet<String>>,
    /// Policies that cannot be carried out, each with why.
    pub refused: BTreeMap<String, String>,
    /// Namespaces that an older policy has, and which, by the policy that wanted them too.
    pub lost: BTreeMap<String, BTreeMap<String, String>>,
}

/// A label's word.
fn labelled(labels: &Labels) -> Option<Option<Mode>> {
    match labels.get(FENCE)?.as_str() {
        "enforce" => Some(Some(Mode::Enforce)),
        "observe" => Some(Some(Mode::Observe)),
        "off" => Some(None),
        _ => None,
    }
}

/// Works out every fence that should be there.
pub fn plan(world: &World, settings: &Settings) -> Wanted {
    let mut wanted = Wanted::default();
    let policies = by_age(world, &mut wanted);
    for (namespace, labels) in &world.namespaces {
        let said = labelled(labels);
        let of_system = is_of_the_system(namespace, settings);
        let mut wanting = policies.iter().filter(|policy| policy.selects(labels));
        let policy = wanting.next().filter(|_| said.is_some() || !of_system);
        if let Some(winner) = policy {
            for loser in wanting {
                let lost = wanted.lost.entry(loser.name.clone()).or_default();
                lost.insert(namespace.clone(), winner.name.clone());
            }
            let namespaces = wanted.namespaces.entry(winner.name.clone()).or_default();
            namespaces.insert(namespace.clone());
        }
        let by_label = Policy::by_label();
        let maker = Maker {
            world,
            namespace,
            policy: policy.unwrap_or(&by_label),
            wish: match (said, policy) {
                (Some(mode), _) => Wish::by_label(mode),
                (None, Some(policy)) => Wish {
                    mode: Some(policy.template.mode),
                    promotable: policy.promotes,
                },
                (None, None) => Wish::by_label(None),
            },
        };
        for (fence, promotable) in maker.fences() {
            let key = Key::new(namespace.clone(), fence.name_any());
            if promotable {
                wanted.promotable.insert(key.clone());
            }
            wanted.fences.insert(key, fence);
        }
    }
    wanted
}

/// What is to become of a Service or a namespace.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Wish {
    /// Absent: no fence.
    mode: Option<Mode>,
    /// Whether time may turn `Observe` into `Enforce`.
    promotable: bool,
}

impl Wish {
    /// A label is meant, whatever was before and whatever a policy says.
    fn by_label(mode: Option<Mode>) -> Self {
        Self {
            mode,
            promotable: false,
        }
    }
}

/// Namespaces that nobody means who says "every namespace".
fn is_of_the_system(namespace: &str, settings: &Settings) -> bool {
    namespace.starts_with("kube-")
        || namespace == settings.root_namespace
        || namespace == settings.global_proxy.namespace
}

/// A policy, read.
struct Policy {
    name: String,
    granularity: Granularity,
    promotes: bool,
    template: Template,
    dependencies: Vec<Dependency>,
    selector: kube::core::Selector,
}

impl Policy {
    fn read(name: &str, policy: &FencePolicy) -> Result<Self, String> {
        let spec = &policy.spec;
        let template = spec.template.clone().unwrap_or_default();
        for (index, alias) in template.aliases.iter().enumerate() {
            let (_, wrong) = alias::read(alias);
            if let Some(why) = wrong.first() {
                return Err(format!("spec.template.aliases[{index}]{why}"));
            }
        }
        let always = spec.always_import.iter().map(|host| Dependency {
            host: Some(host.clone()),
            ..Dependency::default()
        });
        Ok(Self {
            name: name.to_owned(),
            granularity: spec.granularity,
            promotes: spec.promote.is_some(),
            dependencies: template
                .dependencies
                .iter()
                .cloned()
                .chain(always)
                .collect(),
            selector: select::label_selector(&spec.namespace_selector)
                .map_err(|error| format!("spec.namespaceSelector: {error}"))?,
            template,
        })
    }

    /// What labels mean where no policy has a say.
    fn by_label() -> Self {
        Self {
            name: BY_LABEL.to_owned(),
            granularity: Granularity::Service,
            promotes: false,
            template: Template::default(),
            dependencies: Vec::new(),
            selector: kube::core::Selector::default(),
        }
    }

    fn selects(&self, labels: &Labels) -> bool {
        self.selector.matches(labels)
    }
}

fn by_age(world: &World, wanted: &mut Wanted) -> Vec<Policy> {
    let mut policies: Vec<_> = world.fence_policies.iter().collect();
    policies.sort_by_key(|(name, policy)| (policy.creation_timestamp(), (*name).clone()));
    let read = policies.into_iter().filter_map(|(name, policy)| {
        let read = Policy::read(name, policy);
        read.map_err(|why| wanted.refused.insert(name.clone(), why))
            .ok()
    });
    read.collect()
}

/// Makes the fences of one namespace.
struct Maker<'a> {
    world: &'a World,
    namespace: &'a str,
    policy: &'a Policy,
    /// What the namespace gets where a Service does not say otherwise; nothing at all, perhaps.
    wish: Wish,
}

impl Maker<'_> {
    /// The fences, and whether each may be promoted.
    fn fences(&self) -> Vec<(ServiceFence, bool)> {
        let whole = self.policy.granularity == Granularity::Namespace;
        let mut fences = Vec::new();
        if whole {
            let workload = Workload {
                whole_namespace: true,
                ..Workload::default()
            };
            fences.extend(self.fence("namespace", workload, self.wish));
        }
        let services = self.services(whole);
        for (name, (_, wish)) in &services {
            let workload = Workload {
                service: Some(name.clone()),
                ..Workload::default()
            };
            fences.extend(self.fence(name, workload, *wish));
        }
        if self.policy.granularity == Granularity::Workload {
            let selectors: Vec<&Labels> =
                services.values().map(|(selector, _)| *selector).collect();
            for (name, labels) in self.workloads(&selectors) {
                let workload = Workload {
                    selector: Some(Selector {
                        match_labels: labels,
                    }),
                    ..Workload::default()
                };
                fences.extend(self.fence(&name, workload, self.wish));
            }
        }
        fences
    }

    /// The Services that stand for their pods, each with what its label says or else the namespace. Of several that select
    /// the same pods, the one that selects most, then the first in the alphabet. Where the whole namespace has a fence, only
    /// those that say something themselves.
    fn services(&self, whole: bool) -> BTreeMap<String, (&Labels, Wish)> {
        let of_namespace = in_namespace(&self.world.services, self.namespace)
            .filter(|(_, facts)| !facts.external_name && !facts.selector.is_empty());
        let all: Vec<_> = of_namespace.collect();
        let selectors: Vec<&Labels> = all.iter().map(|(_, facts)| &facts.selector).collect();
        standing(&selectors)
            .into_iter()
            .map(|index| {
                let (key, facts) = all[index];
                let wish = match labelled(&facts.labels) {
                    // Without a fence of its own it would have the namespace's.
                    Some(None) if whole => Wish::by_label(self.wish.mode.map(|_| Mode::Observe)),
                    Some(said) => Wish::by_label(said),
                    None if whole => Wish::by_label(None),
                    None => self.wish,
                };
                (key.name.clone(), (&facts.selector, wish))
            })
            .collect()
    }

    /// The workloads of pods that no Service selects, with the label that selects each. Those that had a fence keep it
    /// while no pod of theirs runs, but for the oldest of many: a Job comes back, if it has no name of its own each time.
    fn workloads(&self, services: &[&Labels]) -> BTreeMap<String, Labels> {
        let alone = |pod: &&PodFacts| {
            !pod.addresses.is_empty()
                && !services
                    .iter()
                    .any(|selector| matches(selector, &pod.labels))
        };
        let running = select::pods_in(self.world, self.namespace).filter(alone);
        let running = running.filter_map(|pod| named_by(&pod.labels));
        let kept = select::fences_in(self.world, self.namespace).filter_map(|(key, fence)| {
            let made = is_ours(fence) && fence.labels().get(POLICY) == Some(&self.policy.name);
            let selector = fence.spec.workload.as_ref()?.selector.as_ref()?;
            let covered = services
                .iter()
                .any(|service| matches(service, &selector.match_labels));
            let age = fence.creation_timestamp();
            (made && !covered).then(|| (age, (key.name.clone(), selector.match_labels.clone())))
        });
        let mut kept: Vec<_> = kept.collect();
        kept.sort_by(|(a, _), (b, _)| b.cmp(a));
        let kept = kept.into_iter().map(|(_, kept)| kept);
        running.chain(kept.take(KEPT)).collect()
    }

    /// A fence, unless none is wanted or somebody wrote one by this name or for the same pods.
    fn fence(&self, name: &str, workload: Workload, wish: Wish) -> Option<(ServiceFence, bool)> {
        let mode = wish.mode?;
        let name = name.to_owned();
        let key = Key::new(self.namespace, name.clone());
        let existing = self.world.fences.get(&key);
        if existing.is_some_and(|fence| !is_ours(fence.as_ref())) {
            return None;
        }
        let Template {
            evidence,
            first_call,
            retention,
            non_http,
            aliases,
            ..
        } = self.policy.template.clone();
        let was = |fence: &Arc<ServiceFence>| fence.annotations().contains_key(PROMOTED);
        let promoted = wish.promotable && existing.is_some_and(was);
        let fence = ServiceFence {
            metadata: ObjectMeta {
                name: Some(name),
                namespace: Some(self.namespace.to_owned()),
                labels: Some(
                    [
                        (MANAGED_BY.to_owned(), MANAGER.to_owned()),
                        (POLICY.to_owned(), self.policy.name.clone()),
                    ]
                    .into(),
                ),
                ..ObjectMeta::default()
            },
            spec: ServiceFenceSpec {
                workload: Some(workload),
                mode: if promoted { Mode::Enforce } else { mode },
                dependencies: self.policy.dependencies.clone(),
                evidence,
                first_call,
                retention,
                non_http,
                aliases,
            },
            status: None,
        };
        (!self.is_taken(&fence)).then_some((fence, wish.promotable))
    }

    /// Whether a fence that somebody wrote selects these pods.
    fn is_taken(&self, fence: &ServiceFence) -> bool {
        let Ok(labels) = select::labels(fence, self.world) else {
            return false;
        };
        let by_hand = select::fences_in(self.world, self.namespace);
        by_hand
            .filter(|(_, fence)| !is_ours(*fence))
            .filter_map(|(_, fence)| select::labels(fence, self.world).ok())
            .any(|theirs| theirs.is_empty() == labels.is_empty() && matches(&theirs, &labels))
    }
}

/// Of selectors those that select what no wider one does, and of equal ones the first. Each is compared only with those that have its
/// rarest label: a wider selector has none but labels of the narrower one.
fn standing(selectors: &[&Labels]) -> Vec<usize> {
    let mut first: BTreeMap<&Labels, usize> = BTreeMap::new();
    let mut count: HashMap<(&String, &String), usize> = HashMap::new();
    for (index, selector) in selectors.iter().enumerate() {
        if first.contains_key(selector) {
            continue;
        }
        first.insert(selector, index);
        for label in *selector {
            *count.entry(label).or_default() += 1;
        }
    }
    let mut by_rarest: HashMap<(&String, &String), Vec<&Labels>> = HashMap::new();
    for selector in first.keys() {
        if let Some(label) = selector.iter().min_by_key(|label| count[label]) {
            by_rarest.entry(label).or_default().push(selector);
        }
    }
    let is_wider = |wider: &&Labels, selector: &Labels| {
        wider.len() < selector.len() && matches(wider, selector)
    };
    let stands = |selector: &Labels| {
        let mut candidates = selector.iter().filter_map(|label| by_rarest.get(&label));
        !candidates.any(|wider| wider.iter().any(|wider| is_wider(wider, selector)))
    };
    let mut standing: Vec<usize> = first
        .into_iter()
        .filter(|(selector, _)| stands(selector))
        .map(|(_, index)| index)
        .collect();
    standing.sort_unstable();
    standing
}

/// Says that a fence was promoted from `Observe`, and when.
pub const PROMOTED: &str = "fenceline.dev/promoted";

/// The label that names a pod's workload, as a selector, and a name for its fence.
fn named_by(labels: &Labels) -> Option<(String, Labels)> {
    let (key, value) = NAMES
        .into_iter()
        .find_map(|key| Some((key, labels.get(key).filter(|value| !value.is_empty())?)))?;
    // A label's value may be no object's name.
    let name: String = value
        .to_ascii_lowercase()
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() { c } else { '-' })
        .collect();
    let name = format!("workload-{}", name.trim_matches('-'));
    let name = name.chars().take(63).collect::<String>();
    let name = name.trim_end_matches('-').to_owned();
    Some((name, [(key.to_owned(), value.clone())].into()))
}

/// The fences that policies and labels made and no longer want. Those of a policy that is refused stay as they are.
pub fn unwanted<'a>(
    world: &'a World,
    wanted: &'a Wanted,
) -> impl Iterator<Item = (&'a Key, &'a Arc<ServiceFence>)> {
    let fences: BTreeSet<Key> = wanted.fences.keys().cloned().collect();
    world.fences.iter().filter(move |(key, fence)| {
        let policy = fence.labels().get(POLICY);
        let refused = policy.is_some_and(|policy| wanted.refused.contains_key(policy));
        made_by_policy(fence) && !fences.contains(*key) && !refused
    })
}

/// Whether a policy or a label made it.
pub fn made_by_policy(fence: &ServiceFence) -> bool {
    is_ours(fence) && fence.labels().contains_key(POLICY)
}
