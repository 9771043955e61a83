//! What policies and labels make of a mesh.

use fenceline_crds::{FencePolicy, Mode};

use super::plan::{PROMOTED, Wanted, plan, unwanted};
use crate::testing::{fence, service, settings, world, yaml};
use crate::world::{Key, PodFacts, World};

/// Adds a policy; of two, the one with the greater `age` is older.
fn policy(world: &mut World, name: &str, age: i64, spec: &str) {
    let mut policy = FencePolicy::new(name, yaml(spec));
    let created = jiff::Timestamp::from_second(1_000_000 - age).unwrap();
    policy.metadata.creation_timestamp = Some(
        k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(created),
    );
    world.fence_policies.insert(name.to_owned(), policy.into());
}

fn label(world: &mut World, namespace: &str, value: &str) {
    let labels = [("fenceline.dev/fence".to_owned(), value.to_owned())];
    world
        .namespaces
        .insert(namespace.to_owned(), std::sync::Arc::new(labels.into()));
}

fn labelled_service(world: &mut World, namespace: &str, name: &str, value: &str) {
    service(world, namespace, name, "{}");
    let key = Key::new(namespace, name);
    let mut facts = world.services[&key].as_ref().clone();
    facts
        .labels
        .insert("fenceline.dev/fence".to_owned(), value.to_owned());
    world.set_service(&key, Some(facts));
}

fn wanted(world: &World) -> Wanted {
    plan(world, &settings())
}

/// `namespace/name=mode` of every fence.
fn shown(wanted: &Wanted) -> Vec<String> {
    let fences = wanted.fences.iter();
    fences
        .map(|(key, fence)| format!("{key}={:?}", fence.spec.mode))
        .collect()
}

const EVERY: &str = "{namespaceSelector: {}}";

#[test]
fn labels_of_services_win_over_those_of_namespaces_and_those_over_policies() {
    let mut mesh = world();
    labelled_service(&mut mesh, "shop", "svc1", "off");
    labelled_service(&mut mesh, "shop", "svc2", "observe");
    service(&mut mesh, "shop", "svc3", "{}");
    assert!(wanted(&mesh).fences.len() == 1, "a label needs no policy");
    policy(&mut mesh, "every", 0, EVERY);
    assert_eq!(
        shown(&wanted(&mesh)),
        ["shop/svc2=Observe", "shop/svc3=Enforce"]
    );
    label(&mut mesh, "shop", "off");
    assert_eq!(shown(&wanted(&mesh)), ["shop/svc2=Observe"]);
    label(&mut mesh, "shop", "observe");
    assert_eq!(
        shown(&wanted(&mesh)),
        ["shop/svc2=Observe", "shop/svc3=Observe"]
    );
    label(&mut mesh, "shop", "nonsense");
    assert_eq!(wanted(&mesh).fences.len(), 2, "as if it were not there");
}

#[test]
fn the_older_policy_has_a_namespace_and_the_other_is_told() {
    let mut mesh = world();
    service(&mut mesh, "shop", "cart", "{}");
    policy(&mut mesh, "a-new", 1, EVERY);
    let observe = "{namespaceSelector: {}, template: {mode: Observe}}";
    policy(&mut mesh, "old", 2, observe);
    let wanted = wanted(&mesh);
    assert_eq!(shown(&wanted), ["shop/cart=Observe"]);
    assert_eq!(wanted.lost["a-new"]["shop"], "old");
}

#[test]
fn services_of_the_same_pods_share_a_fence() {
    let mut mesh = world();
    service(&mut mesh, "shop", "db", "{}");
    service(
        &mut mesh,
        "shop",
        "db-headless",
        "{selector: {app: db}, clusterIPs: [None]}",
    );
    service(
        &mut mesh,
        "shop",
        "db-primary",
        "{selector: {app: db, role: primary}}",
    );
    service(
        &mut mesh,
        "shop",
        "alias",
        "{selector: null, type: ExternalName, externalName: x.y}",
    );
    service(&mut mesh, "shop", "anywhere", "{selector: null}");
    policy(&mut mesh, "every", 0, EVERY);
    assert_eq!(shown(&wanted(&mesh)), ["shop/db=Enforce"]);
}

#[test]
fn what_people_wrote_is_left_alone() {
    let mut mesh = world();
    service(&mut mesh, "shop", "cart", "{}");
    service(&mut mesh, "shop", "reviews", "{}");
    service(&mut mesh, "shop", "ratings", "{}");
    policy(&mut mesh, "every", 0, EVERY);
    let by_name = fence("shop", "cart", "{}");
    let by_pods = fence(
        "shop",
        "other",
        "{workload: {selector: {matchLabels: {app: reviews}}}}",
    );
    for fence in [by_name, by_pods] {
        let key = Key::new("shop", fence.metadata.name.clone().unwrap());
        mesh.fences.insert(key, fence.into());
    }
    let wanted = wanted(&mesh);
    assert_eq!(shown(&wanted), ["shop/ratings=Enforce"]);
    assert_eq!(unwanted(&mesh, &wanted).count(), 0);
}

#[test]
fn namespaces_of_the_system_must_ask_for_it() {
    let mut mesh = world();
    service(&mut mesh, "istio-system", "istiod", "{}");
    service(&mut mesh, "kube-system", "dns", "{}");
    for namespace in ["istio-system", "kube-system"] {
        mesh.namespaces
            .insert(namespace.to_owned(), std::sync::Arc::default());
    }
    policy(&mut mesh, "every", 0, EVERY);
    assert_eq!(shown(&wanted(&mesh)).len(), 0);
    label(&mut mesh, "kube-system", "observe");
    assert_eq!(shown(&wanted(&mesh)), ["kube-system/dns=Observe"]);
}

fn pod(world: &mut World, name: &str, labels: &[(&str, &str)]) {
    let labels = labels.iter();
    let facts = PodFacts {
        labels: labels
            .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
            .collect(),
        addresses: vec!["10.1.0.9".parse().unwrap()],
        ..PodFacts::default()
    };
    world.set_pod(&Key::new("shop", name), Some(facts));
}

#[test]
fn workloads_without_a_service() {
    let mut mesh = world();
    service(&mut mesh, "shop", "cart", "{}");
    pod(&mut mesh, "cart-1", &[("app", "cart")]);
    pod(
        &mut mesh,
        "report-1",
        &[("app", "Report_Job"), ("job-name", "report-1")],
    );
    pod(&mut mesh, "anonymous", &[]);
    policy(
        &mut mesh,
        "every",
        0,
        "{namespaceSelector: {}, granularity: Workload}",
    );
    let names = ["shop/cart=Enforce", "shop/workload-report-job=Enforce"];
    let first = wanted(&mesh);
    assert_eq!(shown(&first), names);

    // The job is done, and comes back tomorrow.
    for (key, fence) in first.fences {
        mesh.fences.insert(key, fence.into());
    }
    mesh.set_pod(&Key::new("shop", "report-1"), None);
    assert_eq!(shown(&wanted(&mesh)), names);
    // Somebody gives it a Service.
    service(&mut mesh, "shop", "report", "{selector: {app: Report_Job}}");
    let now = wanted(&mesh);
    assert_eq!(shown(&now), ["shop/cart=Enforce", "shop/report=Enforce"]);
    let gone: Vec<String> = unwanted(&mesh, &now)
        .map(|(key, _)| key.to_string())
        .collect();
    assert_eq!(gone, ["shop/workload-report-job"]);
}

#[test]
fn a_whole_namespace() {
    let mut mesh = world();
    service(&mut mesh, "shop", "cart", "{}");
    labelled_service(&mut mesh, "shop", "special", "observe");
    labelled_service(&mut mesh, "shop", "without", "off");
    policy(
        &mut mesh,
        "every",
        0,
        "{namespaceSelector: {}, granularity: Namespace, alwaysImport: [agent.bank.svc.cluster.local]}",
    );
    let wanted = wanted(&mesh);
    // Also where nothing runs yet.
    assert_eq!(
        shown(&wanted),
        [
            "bank/namespace=Enforce",
            "shop/namespace=Enforce",
            "shop/special=Observe",
            // It would have the namespace's otherwise.
            "shop/without=Observe"
        ]
    );
    let fence = &wanted.fences[&Key::new("shop", "namespace")];
    assert_eq!(fence.spec.dependencies.len(), 1);
    assert!(fence.spec.workload.as_ref().unwrap().whole_namespace);
}

#[test]
fn a_policy_that_makes_no_sense_does_nothing_and_says_why() {
    let mut mesh = world();
    service(&mut mesh, "shop", "cart", "{}");
    let spec = "{namespaceSelector: {}, template: {aliases: [{pattern: '(', hosts: [x]}]}}";
    policy(&mut mesh, "bad", 0, spec);
    let wanted = wanted(&mesh);
    assert_eq!(wanted.fences.len(), 0);
    assert!(wanted.refused["bad"].starts_with("spec.template.aliases[0].pattern: "));
}

#[test]
fn who_was_promoted_stays_so() {
    let mut mesh = world();
    service(&mut mesh, "shop", "cart", "{}");
    policy(
        &mut mesh,
        "every",
        0,
        "{namespaceSelector: {}, template: {mode: Observe}, promote: {after: 1h, quietFor: 1h}}",
    );
    let (key, mut fence) = wanted(&mesh).fences.pop_first().unwrap();
    assert_eq!(fence.spec.mode, Mode::Observe);
    let annotations = [(PROMOTED.to_owned(), "2026-01-01T00:00:00Z".to_owned())];
    fence.metadata.annotations = Some(annotations.into());
    mesh.fences.insert(key.clone(), fence.into());
    assert_eq!(shown(&wanted(&mesh)), ["shop/cart=Enforce"]);
    assert!(wanted(&mesh).promotable.contains(&key));
    // Who says so by a label means it.
    labelled_service(&mut mesh, "shop", "cart", "observe");
    assert_eq!(shown(&wanted(&mesh)), ["shop/cart=Observe"]);
    assert!(wanted(&mesh).promotable.is_empty());
    service(&mut mesh, "shop", "cart", "{}");
    let spec = "{namespaceSelector: {}, template: {mode: Observe}}";
    policy(&mut mesh, "every", 0, spec);
    assert_eq!(shown(&wanted(&mesh)), ["shop/cart=Observe"], "taken back");
}
