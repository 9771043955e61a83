//! The order of a change: which step comes next, so that no request meets a route without its cluster.
//!
//! istiod sends a proxy its clusters before its routes, but a new cluster waits for its endpoints while the routes are in force
//! already; and it takes clusters away before the routes that lead to them. So subsets come first and go last, and between
//! the steps every proxy is waited for. Each step is worked out from what is stored, so that any leader goes on with it.

use std::collections::{BTreeMap, BTreeSet};

use fenceline_crds::istio::{DestinationRuleSpec, Subset, VirtualServiceSpec};
use serde_json::Value;

use super::istiod::VIEW_LABEL;

/// What is stored.
#[derive(Clone, Copy, Debug, Default)]
pub struct Stored<'a> {
    pub rule: Option<&'a DestinationRuleSpec>,
    pub routes: Option<&'a VirtualServiceSpec>,
}

/// How far what is stored has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Arrived {
    /// Every proxy has the stored DestinationRule, or none is there.
    pub rule: bool,
    /// Every proxy has the stored VirtualService, or knows that none is there.
    pub routes: bool,
    /// And has had it for so long that requests under way before have ended.
    pub drained: bool,
}

/// The next step.
#[derive(Clone, Debug, PartialEq)]
pub enum Step {
    /// Write this DestinationRule; take it away where there is none.
    Rule(Stage, Option<DestinationRuleSpec>),
    /// Write this VirtualService; take it away where there is none.
    Routes(Option<VirtualServiceSpec>),
    /// Something that was written has not arrived.
    Wait(Stage),
    Done,
}

/// Where a change stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// What new routes will lead to is on its way to the proxies.
    AddingSubsets,
    /// The routes are.
    ShiftingRoutes,
    /// Requests to what goes are ending.
    Draining,
    /// Nothing leads any more to what goes.
    RemovingSubsets,
    Stable,
}

impl Stage {
    /// As status shows it.
    pub fn name(self) -> &'static str {
        match self {
            Self::AddingSubsets => "AddingSubsets",
            Self::ShiftingRoutes => "ShiftingRoutes",
            Self::Draining => "Draining",
            Self::RemovingSubsets => "RemovingSubsets",
            Self::Stable => "Stable",
        }
    }
}

/// The next step from what is stored to the target.
pub fn next(
    stored: Stored<'_>,
    rule: Option<&DestinationRuleSpec>,
    routes: Option<&VirtualServiceSpec>,
    arrived: Arrived,
) -> Step {
    // Until nothing leads there any more, a subset stays.
    let with_all = with_subsets_of(rule, stored.rule);
    if stored.routes != routes {
        if stored.rule != with_all.as_ref() {
            return Step::Rule(Stage::AddingSubsets, with_all);
        }
        if !arrived.rule {
            return Step::Wait(Stage::AddingSubsets);
        }
        return Step::Routes(routes.cloned());
    }
    if !arrived.routes {
        // What does not touch subsets need not wait.
        if stored.rule != with_all.as_ref() {
            return Step::Rule(Stage::ShiftingRoutes, with_all);
        }
        return Step::Wait(Stage::ShiftingRoutes);
    }
    if stored.rule == rule {
        return if arrived.rule {
            Step::Done
        } else {
            Step::Wait(Stage::RemovingSubsets)
        };
    }
    if stored.rule != with_all.as_ref() {
        return Step::Rule(Stage::AddingSubsets, with_all);
    }
    if !arrived.drained {
        return Step::Wait(Stage::Draining);
    }
    Step::Rule(Stage::RemovingSubsets, rule.cloned())
}

/// The rule, with the subsets that another has and it has not.
fn with_subsets_of(
    rule: Option<&DestinationRuleSpec>,
    other: Option<&DestinationRuleSpec>,
) -> Option<DestinationRuleSpec> {
    let (Some(other), rule) = (other, rule) else {
        return rule.cloned();
    };
    let mut whole = rule.cloned().unwrap_or_else(|| DestinationRuleSpec {
        subsets: Vec::new(),
        ..other.clone()
    });
    let known: BTreeSet<String> = names(&whole).map(str::to_owned).collect();
    let missing = other.subsets.iter();
    let missing: Vec<Subset> = missing
        .filter(|subset| !known.contains(&subset.name))
        .cloned()
        .collect();
    whole.subsets.extend(missing);
    whole.subsets.sort_by(|a, b| a.name.cmp(&b.name));
    Some(whole)
}

/// The rule that is wanted, with those subsets of the stored one that have pods: somebody may still have routes to them. Where none is wanted,
/// none is kept, as whoever takes a Router away may make a DestinationRule of their own.
pub fn keeping(
    wanted: Option<&DestinationRuleSpec>,
    stored: Option<&DestinationRuleSpec>,
    has_pods: &dyn Fn(&BTreeMap<String, String>) -> bool,
) -> Option<DestinationRuleSpec> {
    let wanted = wanted?;
    let mut kept = stored.cloned().unwrap_or_default();
    kept.subsets.retain(|subset| has_pods(&subset.labels));
    with_subsets_of(Some(wanted), Some(&kept))
}

/// The subsets of a rule.
pub fn names(rule: &DestinationRuleSpec) -> impl Iterator<Item = &str> {
    rule.subsets.iter().map(|subset| subset.name.as_str())
}

/// The subsets that routes lead to.
pub fn used(routes: &VirtualServiceSpec) -> BTreeSet<String> {
    let mut used = BTreeSet::new();
    for of_protocol in routes.other.values() {
        collect(of_protocol, &mut used);
    }
    used
}

fn collect(value: &Value, used: &mut BTreeSet<String>) {
    match value {
        Value::Object(fields) => {
            if let Some(Value::String(subset)) = fields.get("subset") {
                used.insert(subset.clone());
            }
            fields.values().for_each(|value| collect(value, used));
        }
        Value::Array(items) => items.iter().for_each(|value| collect(value, used)),
        _ => {}
    }
}

/// What tells routes from others where a proxy has them: their names, and for connections, whose routes have none, the subset
/// that a route for our own view leads to. A route for certain callers is sent to nobody else, and so is never seen.
pub fn marks(routes: &VirtualServiceSpec) -> BTreeSet<String> {
    let of = |protocol: &str| {
        let routes = routes.other.get(protocol).and_then(Value::as_array);
        routes.into_iter().flatten()
    };
    let of_some =
        |one: &Value| one.get("sourceLabels").is_some() || one.get("sourceNamespace").is_some();
    let matches = |route: &Value| route["match"].as_array().cloned().unwrap_or_default();
    let named = of("http").filter(|route| {
        let matches = matches(route);
        matches.is_empty() || !matches.iter().all(of_some)
    });
    let named = named.filter_map(|route| Some(route["name"].as_str()?.to_owned()));
    let for_view = of("tcp").filter(|route| {
        let mut matches = matches(route).into_iter();
        matches.any(|one| one["sourceLabels"].get(VIEW_LABEL.0).is_some())
    });
    let subset = for_view.filter_map(|route| route["route"][0]["destination"]["subset"].as_str());
    named.chain(subset.map(str::to_owned)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn rule(subsets: &BTreeSet<String>) -> DestinationRuleSpec {
        let subset = |name: &String| Subset {
            name: name.clone(),
            ..Subset::default()
        };
        DestinationRuleSpec {
            host: "reviews".into(),
            subsets: subsets.iter().map(subset).collect(),
            ..DestinationRuleSpec::default()
        }
    }

    fn routes(subsets: &BTreeSet<String>) -> VirtualServiceSpec {
        let to = |name: &String| json!({"destination": {"host": "reviews", "subset": name}});
        let route: Vec<Value> = subsets.iter().map(to).collect();
        VirtualServiceSpec {
            hosts: vec!["reviews".into()],
            other: [("http".to_owned(), json!([{"name": "main", "route": route}]))].into(),
            ..VirtualServiceSpec::default()
        }
    }

    fn set(names: &[&str]) -> BTreeSet<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    /// A mesh in which what is written arrives when it is told to.
    #[derive(Default)]
    struct Mesh {
        rule: Option<DestinationRuleSpec>,
        routes: Option<VirtualServiceSpec>,
        arrived: Arrived,
        /// What any proxy may still have: rules are in force everywhere once they have arrived, until then the old one may
        /// be, and the same for routes.
        old_rules: Vec<Option<DestinationRuleSpec>>,
        old_routes: Vec<Option<VirtualServiceSpec>>,
    }

    impl Mesh {
        fn step(
            &mut self,
            rule: Option<&DestinationRuleSpec>,
            routes: Option<&VirtualServiceSpec>,
        ) -> Step {
            let stored = Stored {
                rule: self.rule.as_ref(),
                routes: self.routes.as_ref(),
            };
            let step = next(stored, rule, routes, self.arrived);
            match &step {
                Step::Rule(_, rule) => {
                    self.old_rules
                        .push(std::mem::replace(&mut self.rule, rule.clone()));
                    self.arrived.rule = false;
                }
                Step::Routes(routes) => {
                    self.old_routes
                        .push(std::mem::replace(&mut self.routes, routes.clone()));
                    self.arrived.routes = false;
                    self.arrived.drained = false;
                }
                Step::Wait(_) | Step::Done => {}
            }
            step
        }

        fn arrive(&mut self, what: u8) {
            if what & 1 != 0 {
                self.arrived.rule = true;
                self.old_rules.clear();
            }
            if what & 2 != 0 {
                self.arrived.routes = true;
            }
            if what & 4 != 0 && self.arrived.routes {
                // What was under way by the old routes has ended.
                self.arrived.drained = true;
                self.old_routes.clear();
            }
        }

        /// Every subset that any proxy's routes lead to is in every rule that any proxy may have.
        fn is_safe(&self) -> bool {
            let rules: Vec<BTreeSet<String>> = self
                .old_rules
                .iter()
                .chain([&self.rule])
                .map(|rule| rule.iter().flat_map(names).map(str::to_owned).collect())
                .collect();
            self.old_routes
                .iter()
                .chain([&self.routes])
                .flatten()
                .all(|routes| rules.iter().all(|rule| used(routes).is_subset(rule)))
        }
    }

    #[test]
    fn what_is_seen_of_routes() {
        let of = |protocol: &str, routes: Value| {
            let other = [(protocol.to_owned(), routes)].into();
            marks(&VirtualServiceSpec {
                other,
                ..VirtualServiceSpec::default()
            })
        };
        let by_caller = json!({"sourceLabels": {"branch": "box"}});
        let http = json!([
            {"name": "box.1", "match": [by_caller]},
            {"name": "either.1", "match": [{"headers": {"x-branch": {"exact": "box"}}}, by_caller]},
            {"name": "main.1"},
        ]);
        assert_eq!(of("http", http), set(&["either.1", "main.1"]));
        let to = |subset: &str| json!([{"destination": {"host": "db", "subset": subset}}]);
        let tcp = json!([
            {"match": [{"sourceLabels": {VIEW_LABEL.0: VIEW_LABEL.1}}], "route": to("mark-1")},
            {"match": [by_caller], "route": to("box--v7")},
            {"route": to("main--v1")},
        ]);
        assert_eq!(of("tcp", tcp), set(&["mark-1"]));
    }

    /// Who was skipped may still have routes to what nobody wants any more.
    #[test]
    fn what_skipped_proxies_lead_to_stays_while_it_has_pods() {
        let mut stored = rule(&set(&["v1", "v2", "v3"]));
        for subset in &mut stored.subsets {
            subset.labels = [("version".to_owned(), subset.name.clone())].into();
        }
        let wanted = rule(&set(&["v3"]));
        let has_pods = |labels: &BTreeMap<String, String>| labels["version"] != "v1";
        let kept = keeping(Some(&wanted), Some(&stored), &has_pods).unwrap();
        assert_eq!(names(&kept).collect::<Vec<_>>(), ["v2", "v3"]);
        assert_eq!(keeping(None, Some(&stored), &has_pods), None);
        let by = routes(&set(&["v3"]));
        let done = Arrived {
            rule: true,
            routes: true,
            drained: true,
        };
        let stored = |rule| Stored {
            rule: Some(rule),
            routes: Some(&by),
        };
        assert_eq!(
            next(stored(&kept), Some(&kept), Some(&by), done),
            Step::Done
        );
        assert_eq!(
            next(stored(&kept), Some(&wanted), Some(&by), done),
            Step::Rule(Stage::RemovingSubsets, Some(wanted.clone())),
            "once they have it"
        );
    }

    #[test]
    fn a_version_comes_and_another_goes() {
        let mut mesh = Mesh {
            rule: Some(rule(&set(&["v1"]))),
            routes: Some(routes(&set(&["v1"]))),
            arrived: Arrived {
                rule: true,
                routes: true,
                drained: true,
            },
            ..Mesh::default()
        };
        let (to, by) = (rule(&set(&["v2"])), routes(&set(&["v2"])));
        let both = Some(rule(&set(&["v1", "v2"])));
        let mut steps = Vec::new();
        for arrives in [0, 1, 0, 2, 0, 4, 0, 1, 0] {
            steps.push(mesh.step(Some(&to), Some(&by)));
            mesh.arrive(arrives);
        }
        let want = [
            Step::Rule(Stage::AddingSubsets, both),
            Step::Wait(Stage::AddingSubsets),
            Step::Routes(Some(by)),
            Step::Wait(Stage::ShiftingRoutes),
            Step::Wait(Stage::Draining),
            Step::Wait(Stage::Draining),
            Step::Rule(Stage::RemovingSubsets, Some(to)),
            Step::Wait(Stage::RemovingSubsets),
            Step::Done,
        ];
        assert_eq!(steps, want);
    }

    proptest! {
        /// Whatever is wanted, whenever it changes and whenever it arrives: no proxy has a route to a subset that it may not have,
        /// and in the end all is as wanted.
        #[test]
        fn no_route_without_its_subset(
            wanted in proptest::collection::vec(proptest::option::of(proptest::collection::btree_set("[a-d]", 1..3)), 1..6),
            arrivals in proptest::collection::vec(0..8_u8, 24),
        ) {
            let mut mesh = Mesh {
                arrived: Arrived { rule: true, routes: true, drained: true },
                ..Mesh::default()
            };
            let mut arrivals = arrivals.into_iter();
            let last = wanted.len() - 1;
            for (index, subsets) in wanted.iter().enumerate() {
                let (to, by) = (subsets.as_ref().map(rule), subsets.as_ref().map(routes));
                let steps = if index == last { 40 } else { 4 };
                let mut done = false;
                for _ in 0..steps {
                    done = mesh.step(to.as_ref(), by.as_ref()) == Step::Done;
                    prop_assert!(mesh.is_safe());
                    mesh.arrive(arrivals.next().unwrap_or(7));
                    prop_assert!(mesh.is_safe());
                }
                if index == last {
                    prop_assert!(done);
                    prop_assert_eq!(&mesh.rule, &to);
                    prop_assert_eq!(&mesh.routes, &by);
                }
            }
        }
    }
}
