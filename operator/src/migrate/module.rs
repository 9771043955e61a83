//! Slime's settings of the lazyload module.

use fenceline_crds::{Alias, FencePolicy, FencePolicySpec, Granularity, Mode, Template};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, LabelSelectorRequirement};
use serde_json::Value;

use super::fence::in_namespaces;
use super::{Fate, Migration, fields};

/// Settings that mean nothing here, each with why.
const NOT_NEEDED: [(&str, &str); 17] = [
    (
        "wormholePort",
        "every HTTP port of the mesh is taken care of by itself",
    ),
    (
        "autoPort",
        "every HTTP port of the mesh is taken care of by itself",
    ),
    (
        "cleanupWormholePort",
        "ports come and go with the mesh's Services",
    ),
    ("namespace", "one global proxy serves the whole mesh"),
    (
        "globalSidecarMode",
        "one global proxy serves the whole mesh",
    ),
    (
        "clusterGsNamespace",
        "the global proxy is in fenceline-system",
    ),
    ("render", "internal to Slime"),
    (
        "passthroughByDefault",
        "names outside the mesh always get Istio's own behaviour",
    ),
    (
        "enableShortDomain",
        "short names are understood as the caller means them",
    ),
    ("disableIpv4Passthrough", "Slime ignores it"),
    ("supportH2", "HTTP/2 and gRPC always work"),
    (
        "addEnvHeaderViaLua",
        "the caller's namespace comes from its certificate",
    ),
    (
        "proxyVersion",
        "the patches are the same for every version that is supported",
    ),
    ("stripSvcPort", "ports are understood"),
    ("slimeNamespace", "Fenceline is in fenceline-system"),
    (
        "istioNamespace",
        "--root-namespace, where it is not istio-system",
    ),
    ("autoFence", "a FencePolicy does so"),
];

pub(super) fn migrate(migration: &mut Migration, object: &Value) -> anyhow::Result<()> {
    let spec = &object["spec"];
    let many = spec["module"].as_array().cloned().unwrap_or_default();
    for module in many
        .iter()
        .filter(|module| module["kind"] == "lazyload" || module["name"] == "lazyload")
    {
        one(migration, object, module)?;
    }
    for field in fields(spec).keys().filter(|field| *field != "module") {
        let why = "how Slime itself is installed; see global-proxy-config";
        migration.say(object, &format!("spec.{field}"), Fate::NotNeeded(why));
    }
    Ok(())
}

fn one(migration: &mut Migration, object: &Value, module: &Value) -> anyhow::Result<()> {
    let general = &module["general"];
    let mut template = Template::default();
    let mut policy = FencePolicySpec::default();
    // Each of these narrows; of `managementSelectors` any may match.
    let mut narrower = Vec::new();
    let mut selectors: Vec<LabelSelector> = Vec::new();
    for (field, value) in fields(general) {
        let path = format!("general.{field}");
        let fate = match field.as_str() {
            "defaultFence" => {
                let on = value.as_bool().unwrap_or_default();
                if !on {
                    narrower.push(labelled());
                }
                Fate::Became(format!(
                    "spec.namespaceSelector: {}",
                    if on { "every namespace" } else { "those labelled fenceline.dev/fence=enforce" }
                ))
            }
            "stableHost" => {
                stable_hosts(&value, &mut policy, &mut template);
                Fate::Became("spec.alwaysImport, and spec.template.dependencies for whole namespaces".to_owned())
            }
            "domainAliases" => {
                template.aliases = aliases(&value);
                Fate::Became("spec.template.aliases".to_owned())
            }
            "fenceLabelKeyAlias" => {
                policy.granularity = Granularity::Workload;
                Fate::Became("spec.granularity: Workload (by the labels that Istio names workloads by)".to_owned())
            }
            "managementSelectors" => {
                let given = value.as_array().into_iter().flatten();
                selectors.extend(given.filter_map(|one| serde_json::from_value(one.clone()).ok()));
                Fate::Became("spec.namespaceSelector, a FencePolicy for each".to_owned())
            }
            "blackNamespaceList" => {
                narrower.push(named("NotIn", &value));
                Fate::Became("spec.namespaceSelector".to_owned())
            }
            "whiteNamespaceList" => {
                narrower.push(named("In", &value));
                Fate::Became("spec.namespaceSelector".to_owned())
            }
            "metricSourceType" if value == "prometheus" => {
                let address = module["metric"]["prometheus"]["address"].as_str();
                let address = address.unwrap_or("URL");
                Fate::ByHand(format!("give the operator --prometheus-url={address}; the global proxy's access log counts too"))
            }
            "metricSourceType" => Fate::NotNeeded("the global proxy's access log always counts"),
            "dispatches" => Fate::ByHand(
                "names of the mesh go to the global proxy and no others do; what dispatches sent elsewhere needs a ServiceEntry \
                 or a VirtualService"
                    .to_owned(),
            ),
            other => match NOT_NEEDED.iter().find(|(name, _)| *name == other) {
                Some((_, why)) => Fate::NotNeeded(why),
                None => Fate::ByHand("no setting of Slime's that is known".to_owned()),
            },
        };
        migration.say(object, &path, fate);
    }
    for field in ["metric", "global"] {
        if !module[field].is_null() {
            let why = "queries are Istio's standard metrics, asked namespace by namespace; --prometheus-query for others";
            migration.say(object, field, Fate::NotNeeded(why));
        }
    }
    if general["autoFence"] != true {
        let why =
            "autoFence is off: fences are by hand, and there is no FencePolicy to make".to_owned();
        migration.say(object, "general.autoFence", Fate::ByHand(why));
        return Ok(());
    }
    template.mode = Mode::Enforce;
    policy.template = Some(template);
    if selectors.is_empty() {
        selectors.push(LabelSelector::default());
    }
    for (index, mut selector) in selectors.into_iter().enumerate() {
        for other in &narrower {
            narrow(&mut selector, other);
        }
        let name = module["name"].as_str().unwrap_or("lazyload");
        let name = if index == 0 {
            name.to_owned()
        } else {
            format!("{name}-{index}")
        };
        let spec = FencePolicySpec {
            namespace_selector: selector,
            ..policy.clone()
        };
        migration.add(&FencePolicy::new(&name, spec))?;
    }
    Ok(())
}

/// `NAMESPACE/*`, or hosts.
fn stable_hosts(value: &Value, policy: &mut FencePolicySpec, template: &mut Template) {
    let hosts = value.as_array().into_iter().flatten();
    for host in hosts.filter_map(Value::as_str) {
        match host.strip_suffix("/*") {
            Some(namespace) => template
                .dependencies
                .push(in_namespaces(vec![namespace.to_owned()])),
            None => policy.always_import.push(host.to_owned()),
        }
    }
}

fn aliases(value: &Value) -> Vec<Alias> {
    let given = value.as_array().into_iter().flatten();
    given
        .map(|one| Alias {
            pattern: one["pattern"].as_str().unwrap_or_default().to_owned(),
            hosts: one["templates"]
                .as_array()
                .into_iter()
                .flatten()
                .filter_map(|template| template.as_str().map(str::to_owned))
                .collect(),
        })
        .collect()
}

/// Adds what another selector asks for.
fn narrow(selector: &mut LabelSelector, other: &LabelSelector) {
    for (label, value) in other.match_labels.iter().flatten() {
        let labels = selector.match_labels.get_or_insert_default();
        labels.insert(label.clone(), value.clone());
    }
    for expression in other.match_expressions.iter().flatten() {
        let expressions = selector.match_expressions.get_or_insert_default();
        expressions.push(expression.clone());
    }
}

fn labelled() -> LabelSelector {
    let label = [("fenceline.dev/fence".to_owned(), "enforce".to_owned())];
    LabelSelector {
        match_labels: Some(label.into()),
        ..LabelSelector::default()
    }
}

/// Namespaces of a list with commas.
fn named(operator: &str, value: &Value) -> LabelSelector {
    let names = value.as_str().unwrap_or_default().split(',').map(str::trim);
    LabelSelector {
        match_expressions: Some(vec![LabelSelectorRequirement {
            key: "kubernetes.io/metadata.name".to_owned(),
            operator: operator.to_owned(),
            values: Some(
                names
                    .filter(|name| !name.is_empty())
                    .map(str::to_owned)
                    .collect(),
            ),
        }]),
        ..LabelSelector::default()
    }
}
