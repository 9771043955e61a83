//! The compiled expressions of RateLimits: each is parsed once for each generation of its object, by whoever needs it first.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, PoisonError};

use fenceline_crds::{RateLimit, RateLimitSpec};
use kube::ResourceExt;

use super::expr::{self, Expression};
use super::grammar::Refused;
use crate::world::{Key, World};

/// Parts of expressions that are kept for one namespace, about 300 bytes each: of some two thousand short expressions. More are
/// compiled at each look, at the cost of that namespace's RateLimits alone.
const KEPT_PARTS: usize = 20_000;

/// What an expression is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum For {
    Condition,
    Number,
}

type Outcome = Result<Arc<Expression>, Refused>;

/// The expressions of one RateLimit.
#[derive(Debug, Default)]
pub(super) struct Compiled(HashMap<(For, String), Outcome>);

impl Compiled {
    fn new(spec: &RateLimitSpec) -> Self {
        let metrics: BTreeSet<String> = spec.metrics.iter().map(|one| one.name.clone()).collect();
        let mut all = HashMap::new();
        for rule in &spec.rules {
            let when = rule.when.iter().map(|text| (For::Condition, text));
            let wanted = rule.adaptive.iter();
            let wanted = wanted.map(|adaptive| (For::Number, &adaptive.requests));
            for (what, text) in when.chain(wanted) {
                all.entry((what, text.clone()))
                    .or_insert_with(|| compile(what, text, &metrics));
            }
        }
        Self(all)
    }

    /// # Errors
    /// Says what is wrong with it.
    pub(super) fn condition(&self, text: &str) -> Outcome {
        self.find(For::Condition, text)
    }

    /// # Errors
    /// Says what is wrong with it.
    pub(super) fn number(&self, text: &str) -> Outcome {
        self.find(For::Number, text)
    }

    fn find(&self, what: For, text: &str) -> Outcome {
        let found = self.0.get(&(what, text.to_owned())).cloned();
        found.unwrap_or_else(|| Err("it is not of this RateLimit".to_owned().into()))
    }

    fn parts(&self) -> usize {
        let parts = |one: &Outcome| one.as_ref().map_or(1, |expression| expression.parts);
        // The entry itself is one.
        self.0.values().map(parts).sum::<usize>() + 1
    }
}

fn compile(what: For, text: &str, metrics: &BTreeSet<String>) -> Outcome {
    match what {
        For::Condition => expr::condition(text, metrics),
        For::Number => expr::number(text, metrics),
    }
    .map(Arc::new)
}

#[derive(Debug)]
struct Kept {
    uid: String,
    generation: i64,
    parts: usize,
    compiled: Arc<Compiled>,
}

/// What is kept for one namespace.
#[derive(Debug, Default)]
struct OfNamespace {
    parts: usize,
    kept: HashMap<String, Kept>,
}

impl OfNamespace {
    fn forget(&mut self, name: &str) {
        if let Some(old) = self.kept.remove(name) {
            self.parts -= old.parts;
        }
    }

    fn keep(&mut self, name: &str, new: Kept) {
        self.forget(name);
        if self.parts + new.parts <= KEPT_PARTS {
            self.parts += new.parts;
            self.kept.insert(name.to_owned(), new);
        }
    }
}

/// The compiled expressions of all RateLimits, for the leader and for the rate limit services' configuration.
#[derive(Debug, Default)]
pub struct Programs(Mutex<HashMap<String, OfNamespace>>);

impl Programs {
    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<String, OfNamespace>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The expressions of a RateLimit. Nobody else waits while they are compiled.
    pub(super) fn of(&self, object: &RateLimit) -> Arc<Compiled> {
        let (namespace, name) = (object.namespace().unwrap_or_default(), object.name_any());
        let version = object.uid().zip(object.metadata.generation);
        if let Some((uid, generation)) = &version
            && let Some(of_namespace) = self.lock().get(&namespace)
            && let Some(kept) = of_namespace.kept.get(&name)
            && kept.uid == *uid
            && kept.generation == *generation
        {
            return Arc::clone(&kept.compiled);
        }
        let compiled = Arc::new(Compiled::new(&object.spec));
        if let Some((uid, generation)) = version {
            let kept = Kept {
                uid,
                generation,
                parts: compiled.parts(),
                compiled: Arc::clone(&compiled),
            };
            self.lock().entry(namespace).or_default().keep(&name, kept);
        }
        compiled
    }

    pub(super) fn forget(&self, key: &Key) {
        if let Some(of_namespace) = self.lock().get_mut(&key.namespace) {
            of_namespace.forget(&key.name);
        }
    }

    /// Forgets those of RateLimits that are gone.
    pub(super) fn retain(&self, world: &World) {
        self.lock().retain(|namespace, of_namespace| {
            let is_gone = |name: &&String| {
                !world
                    .rate_limits
                    .contains_key(&Key::new(&**namespace, &***name))
            };
            let gone: Vec<String> = of_namespace.kept.keys().filter(is_gone).cloned().collect();
            for name in gone {
                of_namespace.forget(&name);
            }
            !of_namespace.kept.is_empty()
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{world, yaml};

    fn limit(name: &str, generation: i64, rules: usize) -> RateLimit {
        let rule = |index| {
            // Of 63 parts.
            let sum = " + 1".repeat(30);
            format!(
                "{{name: r{index}, limit: {{requests: 5, per: 1s}}, when: 'replicas{sum} > {index}'}}"
            )
        };
        let rules: Vec<String> = (0..rules).map(rule).collect();
        let mut object = RateLimit::new(
            name,
            yaml(&format!(
                "{{target: {{service: cart}}, rules: [{}]}}",
                rules.join(", ")
            )),
        );
        object.metadata.namespace = Some("shop".into());
        object.metadata.uid = Some(format!("uid-of-{name}"));
        object.metadata.generation = Some(generation);
        object
    }

    #[test]
    fn each_generation_is_compiled_once_and_forgotten_with_its_object() {
        let programs = Programs::default();
        let first = programs.of(&limit("a", 1, 1));
        assert!(Arc::ptr_eq(&first, &programs.of(&limit("a", 1, 1))));
        let second = programs.of(&limit("a", 2, 2));
        assert_eq!((first.0.len(), second.0.len()), (1, 2));
        let mut anew = limit("a", 2, 2);
        anew.metadata.uid = Some("another".into());
        assert!(!Arc::ptr_eq(&second, &programs.of(&anew)));
        let kept = || {
            let all = programs.lock();
            (all["shop"].kept.len(), all["shop"].parts)
        };
        assert_eq!(kept(), (1, 2 * 63 + 1));
        programs.of(&limit("b", 1, 1));
        programs.forget(&Key::new("shop", "a"));
        assert_eq!(kept(), (1, 63 + 1));
        programs.retain(&world());
        assert!(programs.lock().is_empty());
    }

    #[test]
    fn one_namespace_keeps_only_so_many() {
        let programs = Programs::default();
        for number in 0..10 {
            let compiled = programs.of(&limit(&format!("l{number}"), 1, 50));
            assert_eq!(compiled.0.len(), 50, "those that are not kept work too");
        }
        let kept = programs.lock()["shop"].parts;
        assert!(kept <= KEPT_PARTS && kept > KEPT_PARTS - 50 * 64, "{kept}");
        let mut other = limit("other", 1, 1);
        other.metadata.namespace = Some("bank".into());
        let first = programs.of(&other);
        assert!(Arc::ptr_eq(&first, &programs.of(&other)));
    }
}
