//! What the API takes, and what it refuses with the field and the reason: two hundred objects, a real kube-apiserver.

use std::collections::BTreeMap;

use kube::Api;
use kube::api::{
    ApiResource, DynamicObject, GroupVersionKind, Patch, PatchParams, ValidationDirective,
};
use serde::Deserialize;
use serde_json::{Value, json};

const OBJECTS: &str = include_str!("admission.yaml");

/// Kubernetes' own words about rules that it did not come to, which have no field.
const NOT_CHECKED: &str = "<nil>: Invalid value: null: some validation rules were not checked because the object was invalid; \
    correct the existing errors to complete validation";

/// An object, and what becomes of it.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Case {
    #[serde(default = "name")]
    name: String,
    spec: Value,
    /// The field that the refusal points at.
    refused: Option<String>,
}

fn name() -> String {
    "a".to_owned()
}

/// `REPEAT(x,n)` is n times x.
fn written_out(text: &str) -> String {
    let times = text.strip_prefix("REPEAT(").and_then(|rest| {
        let (what, number) = rest.strip_suffix(')')?.split_once(',')?;
        Some(what.repeat(number.parse().ok()?))
    });
    times.unwrap_or_else(|| text.to_owned())
}

fn whole(value: Value) -> Value {
    match value {
        Value::String(text) => Value::String(written_out(&text)),
        Value::Array(items) => items.into_iter().map(whole).collect(),
        Value::Object(fields) => fields
            .into_iter()
            .map(|(key, value)| (key, whole(value)))
            .collect(),
        other => other,
    }
}

/// What is wrong with the answer, if anything is.
fn amiss(answer: Option<&str>, field: Option<&str>) -> Option<String> {
    match (answer, field) {
        (None, None) => None,
        (None, Some(field)) => Some(format!("was taken, in spite of {field}")),
        (Some(said), None) => Some(format!("was refused: {said}")),
        (Some(said), Some(field)) => {
            let said = said.replace(NOT_CHECKED, "");
            // Unknown fields are said otherwise than wrong ones.
            let named =
                said.contains(&format!("{field}: ")) || said.contains(&format!("\"{field}\""));
            let ours = !said.contains("<nil>") && !said.contains("type conversion");
            (!named || !ours).then(|| format!("{field} is not what was said: {said}"))
        }
    }
}

#[test]
fn what_goes_in_makes_sense_and_what_does_not_is_refused_by_its_field() {
    fenceline_e2e::test(async |lab| {
        lab.apply_manifests("global-proxy-config").await?;
        lab.namespace("shop").await?;
        let cases: BTreeMap<String, Vec<Case>> = serde_yaml::from_str(OBJECTS)?;
        let mut wrong = Vec::new();
        let params = PatchParams {
            dry_run: true,
            field_manager: Some("lab".to_owned()),
            field_validation: Some(ValidationDirective::Strict),
            ..PatchParams::default()
        };
        for (kind, cases) in cases {
            let resource =
                ApiResource::from_gvk(&GroupVersionKind::gvk("fenceline.dev", "v1alpha1", &kind));
            let api: Api<DynamicObject> = if kind == "FencePolicy" {
                Api::all_with(lab.client.clone(), &resource)
            } else {
                Api::namespaced_with(lab.client.clone(), "shop", &resource)
            };
            for case in cases {
                let name = written_out(&case.name);
                let spec = whole(case.spec);
                let object = json!({
                    "apiVersion": "fenceline.dev/v1alpha1",
                    "kind": kind,
                    "metadata": {"name": name},
                    "spec": spec,
                });
                let answer = match api.patch(&name, &params, &Patch::Apply(object)).await {
                    Ok(_) => None,
                    Err(kube::Error::Api(status)) => Some(status.message),
                    Err(other) => return Err(other.into()),
                };
                if let Some(why) = amiss(answer.as_deref(), case.refused.as_deref()) {
                    wrong.push(format!("{kind} {spec}: {why}"));
                }
            }
        }
        anyhow::ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
        Ok(())
    });
}
