//! Slime's expressions: Go templates over `material`, and operators of its own.

use fenceline_crds::{Metric, PrometheusQuery};
use regex::Regex;

use crate::rate_limit;

/// Slime's templates in CEL: `{{._base.cpu.max}}>10` is `metrics.cpu_max > 10.0`; `{{._base.pod}}` is the number of replicas.
pub(super) fn expression(text: &str, metrics: &mut Vec<Metric>) -> Option<String> {
    let template = Regex::new(r"\{\{\s*\.([A-Za-z0-9_.-]+)\s*\}\}").ok()?;
    let mut named = Vec::new();
    let replaced = template.replace_all(text, |found: &regex::Captures<'_>| {
        let path = found[1].trim_start_matches("_base.");
        if path == "pod" {
            return "double(replicas)".to_owned();
        }
        let name = path.replace(|c: char| !c.is_ascii_alphanumeric(), "_");
        named.push(name.clone());
        format!("metrics.{name}")
    });
    // Its operators: | and & are `or` and `and`; its numbers are whole, and beside metrics CEL wants 10.0.
    let number = Regex::new(r"(^|[^\w.])(\d+)($|[^\w.])").ok()?;
    let mut cel = replaced
        .replace("||", "|")
        .replace("&&", "&")
        .replace('|', " || ")
        .replace('&', " && ");
    while number.is_match(&cel) {
        cel = number.replace(&cel, "${1}${2}.0${3}").into_owned();
    }
    let known = Regex::new(r"^[\w\s.()+*/<>&|=-]+$").ok()?;
    if !known.is_match(&cel) || !rate_limit::is_within_bounds(cel.trim()) {
        return None;
    }
    for name in named {
        let metric = Metric {
            prometheus: PrometheusQuery {
                query: format!("TODO_query_of_{name}"),
            },
            name,
        };
        if !metrics.contains(&metric) {
            metrics.push(metric);
        }
    }
    Some(cel.trim().to_owned())
}
