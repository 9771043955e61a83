//! Goldens of `examples/`, and what must hold for any mesh.

use std::collections::BTreeSet;
use std::path::Path;

use fenceline_crds::{Evidence, LearntDependency, ServiceFence, ServiceFenceStatus};
use jiff::Timestamp;
use proptest::prelude::*;

use super::plan::{Objects, Plan, Verdict, plan};
use super::redirect;
use super::select::NoPods;
use crate::testing::{
    fence, foreign_sidecar, load, pod, service, service_entry, settings, virtual_service, world,
};
use crate::world::{Key, NamedHosts, World};

fn planned(fence: &ServiceFence, world: &World) -> Plan {
    plan(fence, world, &settings(), Timestamp::UNIX_EPOCH)
}

fn objects(plan: &Plan) -> &Objects {
    match &plan.verdict {
        Verdict::Enforce(objects) => objects,
        other => panic!("not enforced: {other:?}"),
    }
}

fn hosts(plan: &Plan) -> Vec<&str> {
    let listeners = &objects(plan).sidecar.spec.egress;
    listeners
        .iter()
        .flat_map(|listener| &listener.hosts)
        .map(String::as_str)
        .collect()
}

fn knows(mut fence: ServiceFence, hosts: &[&str]) -> ServiceFence {
    let learnt = |host: &&str| LearntDependency {
        host: (*host).to_owned(),
        evidence: vec![Evidence::GlobalProxy],
        first_seen: Timestamp::UNIX_EPOCH,
        last_seen: Some(Timestamp::UNIX_EPOCH),
    };
    let dependencies = hosts.iter().map(learnt).collect();
    fence.status = Some(ServiceFenceStatus {
        dependencies,
        ..Default::default()
    });
    fence
}

const GLOBAL_PROXY: &str = "fenceline-system/global-proxy.fenceline-system.svc.cluster.local";

/// `UPDATE=1 cargo test -p fenceline examples` writes the golden instead.
#[test]
fn examples_say_what_is_written() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/bookinfo");
    let read = |name: &str| std::fs::read_to_string(folder.join(name)).unwrap_or_default();
    let mut mesh = world();
    load(&mut mesh, &read("app.yaml"));
    load(&mut mesh, &read("fences.yaml"));
    let calls = [
        ("productpage", vec!["details", "reviews"]),
        ("reviews", vec!["ratings"]),
    ];
    let mut want =
        "# What Fenceline writes for fences.yaml once the calls were made. Compared by a test.\n---\n"
            .to_owned();
    want.push_str(&serde_yaml::to_string(&redirect::of_mesh(&mesh, &settings())).unwrap());
    for (key, fence) in mesh.fences.clone() {
        let called = calls.iter().find(|(caller, _)| *caller == key.name);
        let called: Vec<String> = called
            .into_iter()
            .flat_map(|(_, called)| called)
            .map(|name| format!("{name}.bookinfo.svc.cluster.local"))
            .collect();
        let called: Vec<&str> = called.iter().map(String::as_str).collect();
        let plan = planned(&knows(fence.as_ref().clone(), &called), &mesh);
        let Objects { redirect, sidecar } = objects(&plan);
        let texts = [
            serde_yaml::to_string(redirect),
            serde_yaml::to_string(sidecar),
        ];
        for text in texts {
            want.push_str("---\n");
            want.push_str(&text.unwrap());
        }
    }
    if std::env::var_os("UPDATE").is_some() {
        std::fs::write(folder.join("written.yaml"), &want).unwrap();
    }
    assert!(
        read("written.yaml") == want,
        "examples/bookinfo/written.yaml is old; see above"
    );
}

#[test]
fn a_fence_that_knows_nothing_has_the_global_proxy_in_scope() {
    let mut mesh = world();
    service(&mut mesh, "shop", "cart", "{}");
    service(&mut mesh, "shop", "reviews", "{}");
    let plan = planned(&fence("shop", "cart", "{}"), &mesh);
    assert_eq!(hosts(&plan), [GLOBAL_PROXY]);
    assert_eq!((plan.scope.imported, plan.scope.visible), (1, 2));
}

#[test]
fn what_the_redirect_cannot_catch_is_always_in_scope() {
    let mut mesh = world();
    service(&mut mesh, "shop", "cart", "{}");
    service(
        &mut mesh,
        "bank",
        "db",
        "{ports: [{port: 5432, name: tcp}]}",
    );
    service(
        &mut mesh,
        "bank",
        "hidden",
        r#"{ports: [{port: 1, name: tcp}], exportTo: "."}"#,
    );
    service(&mut mesh, "bank", "shards", "{clusterIPs: [None]}");
    let plan = planned(&fence("shop", "cart", "{}"), &mesh);
    assert_eq!(
        hosts(&plan),
        [
            "bank/db.bank.svc.cluster.local",
            "bank/shards.bank.svc.cluster.local",
            GLOBAL_PROXY
        ]
    );
}

#[test]
fn declared_dependencies_in_every_form() {
    let mut mesh = world();
    service(&mut mesh, "shop", "cart", "{}");
    service(&mut mesh, "bank", "ledger", "{}");
    let spec = r#"
dependencies:
- {host: ledger.bank}
- {host: later.bank.svc.cluster.local}
- {host: example.com}
- {host: over.bank.svc.cluster.local, until: "1969-01-01T00:00:00Z"}
- {host: soon.bank.svc.cluster.local, until: "1970-01-01T00:01:00Z"}
- services: {namespaceSelector: {}, selector: {matchExpressions: [{key: tier, operator: DoesNotExist}]}}
"#;
    let plan = planned(&fence("shop", "cart", spec), &mesh);
    assert_eq!(
        hosts(&plan),
        [
            "bank/later.bank.svc.cluster.local",
            "bank/ledger.bank.svc.cluster.local",
            "bank/soon.bank.svc.cluster.local",
            GLOBAL_PROXY,
            "shop/cart.shop.svc.cluster.local",
        ]
    );
    assert_eq!(
        plan.remarks,
        ["spec.dependencies[2].host example.com: nothing in the mesh answers to it"]
    );
    assert_eq!(plan.again_in, Some(jiff::SignedDuration::from_mins(1)));
}

#[test]
fn a_declared_service_may_come_later() {
    let mut mesh = world();
    service(&mut mesh, "shop", "cart", "{}");
    let spec = "{dependencies: [{host: later}, {host: ledger.bank}, {host: api.com}]}";
    let plan = planned(&fence("shop", "cart", spec), &mesh);
    let want = [
        "bank/ledger.bank.svc.cluster.local",
        GLOBAL_PROXY,
        "shop/later.shop.svc.cluster.local",
    ];
    assert_eq!(hosts(&plan), want);
    assert_eq!(plan.remarks.len(), 1);
}

#[test]
fn a_virtual_service_of_another_namespace_comes_with_its_service() {
    let mut mesh = world();
    service(&mut mesh, "shop", "cart", "{}");
    service(&mut mesh, "bank", "ledger", "{}");
    let host = "ledger.bank.svc.cluster.local";
    let rules = NamedHosts {
        hosts: [host.to_owned()].into(),
        ..NamedHosts::default()
    };
    mesh.set_virtual_service(&Key::new("shop", "rules"), Some(rules));
    let unknowing = planned(&fence("shop", "cart", "{}"), &mesh);
    assert_eq!(hosts(&unknowing), [GLOBAL_PROXY]);
    let plan = planned(&knows(fence("shop", "cart", "{}"), &[host]), &mesh);
    let want = [
        "bank/ledger.bank.svc.cluster.local",
        GLOBAL_PROXY,
        "shop/ledger.bank.svc.cluster.local",
    ];
    assert_eq!(hosts(&plan), want);
}

#[test]
fn who_only_observes_is_let_off_the_fence_of_the_namespace() {
    let mut mesh = world();
    service(&mut mesh, "shop", "cart", "{}");
    let cart = fence("shop", "cart", "{mode: Observe}");
    let verdict = |mesh: &World| planned(&cart, mesh).verdict;
    assert_eq!(verdict(&mesh), Verdict::Observe(None));
    let whole = |mode: &str| {
        fence(
            "shop",
            "all",
            &format!("{{workload: {{wholeNamespace: true}}, mode: {mode}}}"),
        )
    };
    mesh.fences
        .insert(Key::new("shop", "all"), whole("Observe").into());
    assert_eq!(verdict(&mesh), Verdict::Observe(None));
    mesh.fences
        .insert(Key::new("shop", "all"), whole("Enforce").into());
    let Verdict::Observe(Some(sidecar)) = verdict(&mesh) else {
        panic!("it has the namespace's");
    };
    assert_eq!(sidecar.spec.egress[0].hosts, ["*/*"]);
    let selector = sidecar.spec.workload_selector.unwrap_or_default();
    assert_eq!(selector.labels["app"], "cart");
}

#[test]
fn no_pods_means_nothing_is_written() {
    let mut mesh = world();
    let cart = fence("shop", "cart", "{}");
    let verdict = |mesh: &World| planned(&cart, mesh).verdict;
    assert_eq!(
        verdict(&mesh),
        Verdict::NoPods(NoPods::ServiceNotFound("cart".into()))
    );
    service(&mut mesh, "shop", "cart", "{selector: {}}");
    assert_eq!(
        verdict(&mesh),
        Verdict::NoPods(NoPods::ServiceWithoutSelector("cart".into()))
    );
    service(&mut mesh, "shop", "cart", "{type: ExternalName}");
    assert_eq!(
        verdict(&mesh),
        Verdict::NoPods(NoPods::ServiceWithoutSelector("cart".into()))
    );
    service(&mut mesh, "shop", "cart", "{}");
    assert!(matches!(verdict(&mesh), Verdict::Enforce(_)));
}

#[test]
fn somebody_elses_sidecar_on_the_same_pods_is_a_conflict() {
    let cart = fence("shop", "cart", "{}");
    for (spec, runs, conflict) in [
        ("{workloadSelector: {labels: {app: cart}}}", false, true),
        ("{egress: [{hosts: ['./*']}]}", false, true),
        ("{workloadSelector: {labels: {app: other}}}", false, false),
        // Labels alone do not say; a pod that has both does.
        ("{workloadSelector: {labels: {tier: web}}}", false, false),
        ("{workloadSelector: {labels: {tier: web}}}", true, true),
    ] {
        let mut mesh = world();
        service(&mut mesh, "shop", "cart", "{}");
        foreign_sidecar(&mut mesh, "shop", "theirs", spec);
        foreign_sidecar(&mut mesh, "bank", "elsewhere", "{}");
        if runs {
            pod(&mut mesh, "shop", "cart", "10.0.0.1");
            let key = Key::new("shop", "cart");
            let mut facts = mesh.pods[&key].as_ref().clone();
            facts.labels.insert("tier".into(), "web".into());
            mesh.set_pod(&key, Some(facts));
        }
        let verdict = planned(&cart, &mesh).verdict;
        let want = vec![Key::new("shop", "theirs")];
        assert_eq!(
            verdict == Verdict::Conflicted(want),
            conflict,
            "{spec}: {verdict:?}"
        );
    }
}

#[test]
fn a_sidecar_by_our_name_that_is_not_ours_is_never_overwritten() {
    let mut mesh = world();
    service(&mut mesh, "shop", "cart", "{}");
    let theirs = "{workloadSelector: {labels: {app: unrelated}}}";
    foreign_sidecar(&mut mesh, "shop", "fenceline-cart", theirs);
    let verdict = planned(&fence("shop", "cart", "{}"), &mesh).verdict;
    assert_eq!(
        verdict,
        Verdict::Conflicted(vec![Key::new("shop", "fenceline-cart")])
    );
}

/// Names of Services, in namespaces, with the spec of some of them.
fn meshes() -> impl Strategy<Value = Vec<(String, String, bool)>> {
    let namespace = prop_oneof![Just("shop".to_owned()), Just("bank".to_owned())];
    prop::collection::vec((namespace, "[a-z][a-z0-9]{0,5}", any::<bool>()), 0..20)
}

proptest! {
    #[test]
    fn whatever_the_mesh_the_sidecar_is_exact_and_never_empty(
        services in meshes(),
        learnt in prop::collection::vec("[a-z][a-z0-9]{0,5}", 0..10),
    ) {
        let mut mesh = world();
        for (namespace, name, http) in &services {
            let spec = if *http { "{}" } else { "{ports: [{port: 9, name: tcp}]}" };
            service(&mut mesh, namespace, name, spec);
        }
        service(&mut mesh, "shop", "cart", "{}");
        let learnt: Vec<String> =
            learnt.iter().map(|name| format!("{name}.bank.svc.cluster.local")).collect();
        let names: Vec<&str> = learnt.iter().map(String::as_str).collect();
        let cart = knows(fence("shop", "cart", "{}"), &names);
        let plan = planned(&cart, &mesh);
        let hosts = hosts(&plan);

        prop_assert!(hosts.contains(&GLOBAL_PROXY));
        prop_assert!(hosts.iter().all(|host| !host.contains('*') && host.contains('/')));
        let unique: BTreeSet<&&str> = hosts.iter().collect();
        prop_assert_eq!(unique.len(), hosts.len());
        for name in &names {
            let host = format!("bank/{name}");
            prop_assert!(hosts.contains(&host.as_str()));
        }
        prop_assert!(plan.scope.imported <= plan.scope.visible);

        // The same mesh, told in another order, makes the same objects.
        let mut again = world();
        service(&mut again, "shop", "cart", "{}");
        for (namespace, name, http) in services.iter().rev() {
            let spec = if *http { "{}" } else { "{ports: [{port: 9, name: tcp}]}" };
            // Of two with one name the first told is the last of the other order.
            if !again.services.contains_key(&Key::new(namespace, name)) {
                service(&mut again, namespace, name, spec);
            }
        }
        prop_assert_eq!(planned(&cart, &again).verdict, plan.verdict);
    }
}

#[test]
fn what_comes_with_a_host() {
    let mut mesh = world();
    for (namespace, name) in [("shop", "cart"), ("bank", "ledger"), ("bank", "vault")] {
        service(&mut mesh, namespace, name, "{}");
    }
    let alias = "{selector: null, type: ExternalName, externalName: vault.bank.svc.cluster.local}";
    service(&mut mesh, "bank", "alias", alias);
    service(&mut mesh, "istio-system", "zipkin", "{}");
    mesh.mesh_config = BTreeSet::from(["zipkin.istio-system".to_owned()]).into();
    service_entry(
        &mut mesh,
        "bank",
        "outside",
        "{hosts: ['*.example.com', api.example.com]}",
    );
    service_entry(
        &mut mesh,
        "bank",
        "hidden",
        "{hosts: ['*.example.org'], exportTo: [.]}",
    );
    let routes = "{hosts: ['*.bank.svc.cluster.local'], http: []}";
    virtual_service(&mut mesh, "routes", "for-bank", routes);
    let calls = [
        "ledger.bank.svc.cluster.local",
        "alias.bank.svc.cluster.local",
    ];
    let cart = knows(fence("shop", "cart", "{}"), &calls);
    let plan = planned(&cart, &mesh);
    let mut want = vec![
        // A wildcard is a host of its own; the VirtualService's comes by the names that it is for.
        "bank/*.example.com",
        "bank/alias.bank.svc.cluster.local",
        "bank/api.example.com",
        "bank/ledger.bank.svc.cluster.local",
        "bank/vault.bank.svc.cluster.local",
        GLOBAL_PROXY,
        "istio-system/zipkin.istio-system.svc.cluster.local",
        "routes/alias.bank.svc.cluster.local",
        "routes/ledger.bank.svc.cluster.local",
        "routes/vault.bank.svc.cluster.local",
    ];
    want.sort_unstable();
    assert_eq!(hosts(&plan), want);
}

#[test]
fn aliases_bring_other_hosts() {
    let mut mesh = world();
    for name in ["cart", "reviews", "reviews-cache"] {
        service(&mut mesh, "shop", name, "{}");
    }
    let spec = r"
aliases:
- {pattern: '(?P<svc>[^.]+)[.]shop[.]svc[.].*', hosts: ['$svc-cache.shop.svc.cluster.local']}
- {pattern: '(', hosts: [x]}
";
    let cart = knows(
        fence("shop", "cart", spec),
        &["reviews.shop.svc.cluster.local"],
    );
    let plan = planned(&cart, &mesh);
    assert!(hosts(&plan).contains(&"shop/reviews-cache.shop.svc.cluster.local"));
    assert!(
        plan.remarks[0].starts_with("spec.aliases[1].pattern: "),
        "{:?}",
        plan.remarks
    );
}

#[test]
fn ports_that_are_not_http_can_be_learnt_too() {
    let mut mesh = world();
    service(&mut mesh, "shop", "cart", "{}");
    let tcp = "{ports: [{port: 5432, name: tcp}]}";
    service(&mut mesh, "bank", "db", tcp);
    service(&mut mesh, "bank", "other", tcp);
    service(
        &mut mesh,
        "bank",
        "shards",
        "{clusterIPs: [None], ports: [{port: 5432, name: tcp}]}",
    );
    let cart = knows(
        fence("shop", "cart", "{nonHTTP: Learn}"),
        &["db.bank.svc.cluster.local"],
    );
    // The pods of a headless Service are called by address: nobody could tell which Service was meant.
    let want = [
        "bank/db.bank.svc.cluster.local",
        "bank/shards.bank.svc.cluster.local",
        // To which connections are reported.
        "fenceline-system/fenceline.fenceline-system.svc.cluster.local",
        GLOBAL_PROXY,
    ];
    assert_eq!(hosts(&planned(&cart, &mesh)), want);
}
