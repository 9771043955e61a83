//! `bench plan`: the pure planner, over a mesh that exists in memory alone.

use std::sync::Arc;
use std::time::Instant;

use clap::Args;
use fenceline::fence::Settings;
use fenceline::fence::plan::{Verdict, plan};
use fenceline::world::{Key, PodFacts, ServiceFacts, World};
use fenceline_crds::{Evidence, LearntDependency, ServiceFence, ServiceFenceStatus};
use jiff::Timestamp;
use kube::api::ObjectMeta;
use serde_json::{Value, json};

use super::numbers::resident_mb;

#[derive(Args)]
pub(super) struct Flags {
    /// Services, each with one fence and one pod.
    #[arg(long, default_value_t = 10_000)]
    services: usize,
    /// What each fence has learnt.
    #[arg(long, default_value_t = 100)]
    dependencies: usize,
    /// Services of one namespace.
    #[arg(long, default_value_t = 50)]
    per_namespace: usize,
}

pub(super) fn run(flags: &Flags) -> anyhow::Result<Value> {
    let settings = Settings::default();
    let started = Instant::now();
    let mesh = mesh(flags);
    println!(
        "{} services, {} dependencies, in memory after {:.1?}: {:.0} MB",
        mesh.services.len(),
        flags.services * flags.dependencies,
        started.elapsed(),
        resident_mb()?
    );
    // The first to look works out what each namespace sees.
    let started = Instant::now();
    for namespace in mesh.namespaces.keys() {
        mesh.view(namespace);
    }
    println!(
        "what {} namespaces see: {:.1?}",
        mesh.namespaces.len(),
        started.elapsed()
    );
    let started = Instant::now();
    let mut hosts = 0;
    for fence in mesh.fences.values() {
        let planned = plan(fence, &mesh, &settings, Timestamp::UNIX_EPOCH);
        let Verdict::Enforce(objects) = planned.verdict else {
            anyhow::bail!("not enforced: {:?}", planned.verdict);
        };
        let listeners = &objects.sidecar.spec.egress;
        hosts += listeners
            .iter()
            .map(|listener| listener.hosts.len())
            .sum::<usize>();
    }
    let all = started.elapsed();
    println!("{} fences with {hosts} hosts: {all:.1?}", mesh.fences.len());
    anyhow::ensure!(hosts >= flags.services * flags.dependencies);
    // The fences that a changed Service concerns are looked up, as the operator does by its index.
    let changed = mesh.fqdn(&place(flags, flags.services / 2));
    let names = |fence: &ServiceFence| {
        let learnt = fence.status.iter().flat_map(|status| &status.dependencies);
        learnt.into_iter().any(|learnt| learnt.host == changed)
    };
    let concerned: Vec<_> = mesh.fences.values().filter(|fence| names(fence)).collect();
    let started = Instant::now();
    for fence in &concerned {
        std::hint::black_box(plan(fence, &mesh, &settings, Timestamp::UNIX_EPOCH));
    }
    let one_thread = started.elapsed();
    // As the operator does it: each fence is a task of its own, on whichever processor is free.
    let processors = std::thread::available_parallelism()?.get();
    let started = Instant::now();
    std::thread::scope(|scope| {
        for share in concerned.chunks(concerned.len().div_ceil(processors).max(1)) {
            let (mesh, settings) = (&mesh, &settings);
            scope.spawn(move || {
                for fence in share {
                    std::hint::black_box(plan(fence, mesh, settings, Timestamp::UNIX_EPOCH));
                }
            });
        }
    });
    let all_processors = started.elapsed();
    println!(
        "a Service that {} fences name: {one_thread:.1?} by one thread, {all_processors:.1?} by {processors}",
        concerned.len()
    );
    Ok(json!({
        "services": flags.services,
        "fences": mesh.fences.len(),
        "hosts": hosts,
        "seconds": all.as_secs_f64(),
        "fences_of_a_service": concerned.len(),
        "changed_service_ms": super::numbers::ms(all_processors),
        "changed_service_ms_one_thread": super::numbers::ms(one_thread),
        "peak_rss_mb": super::numbers::peak_mb()?,
    }))
}

fn place(flags: &Flags, number: usize) -> Key {
    let namespace = format!("team-{}", number / flags.per_namespace);
    Key::new(namespace, format!("service-{number}"))
}

fn mesh(flags: &Flags) -> World {
    let mut mesh = World::new("cluster.local");
    let system = Settings::default().global_proxy;
    mesh.namespaces
        .insert(system.namespace.clone(), Arc::default());
    for number in 0..flags.services {
        let key = place(flags, number);
        mesh.namespaces.entry(key.namespace.clone()).or_default();
        let labels: std::collections::BTreeMap<_, _> =
            [("app".to_owned(), key.name.clone())].into();
        let [_, _, high, low] = u32::try_from(number).unwrap_or_default().to_be_bytes();
        let service = ServiceFacts {
            selector: labels.clone(),
            addresses: vec![[10, 96, high, low].into()],
            http_ports: [80, 9090].into(),
            ..ServiceFacts::default()
        };
        mesh.set_service(&key, Some(service));
        let pod = PodFacts {
            runs: true,
            service_account: key.name.clone(),
            workload: key.name.clone(),
            labels,
            addresses: vec![[10, 244, high, low].into()],
            ..PodFacts::default()
        };
        mesh.set_pod(&key, Some(pod));
    }
    for number in 0..flags.services {
        let key = place(flags, number);
        let mut fence = ServiceFence::new(&key.name, Default::default());
        fence.metadata = ObjectMeta {
            name: Some(key.name.clone()),
            namespace: Some(key.namespace.clone()),
            ..ObjectMeta::default()
        };
        // Far apart, as callees are.
        let learnt = (1..=flags.dependencies).map(|step| {
            let callee = (number + step * 7_919) % flags.services;
            LearntDependency {
                host: mesh.fqdn(&place(flags, callee)),
                evidence: vec![Evidence::GlobalProxy],
                first_seen: Timestamp::UNIX_EPOCH,
                last_seen: Some(Timestamp::UNIX_EPOCH),
            }
        });
        fence.status = Some(ServiceFenceStatus {
            dependencies: learnt.collect(),
            ..ServiceFenceStatus::default()
        });
        mesh.fences.insert(key, fence.into());
    }
    mesh
}
