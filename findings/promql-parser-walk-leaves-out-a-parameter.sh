#!/usr/bin/env bash
# promql-parser 0.11.1 (crates.io, the PromQL parser in Rust) has `util::walk_expr`, which its documentation calls a depth-first walk of
# an expression. The walk visits the vectors that an aggregation is over, and does not visit the aggregation's parameter, although a
# parameter is an expression of its own with selectors of its own: of `topk(scalar(limit), requests)` only `requests` is seen.
# Whoever counts, rewrites or checks selectors with the walk misses those. The operator therefore walks the tree itself
# (operator/src/rate_limit/tenant.rs).
#
# Seen: "walk_expr sees: requests" and "the tree also has: limit".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
mkdir src
cat >Cargo.toml <<'TOML'
[package]
name = "seen"
version = "0.0.0"
edition = "2021"

[dependencies]
promql-parser = "=0.11.1"
TOML
cat >src/main.rs <<'RUST'
use promql_parser::parser::{self, Expr};
use promql_parser::util::{walk_expr, ExprVisitor};

#[derive(Default)]
struct Names(Vec<String>);

impl ExprVisitor for Names {
    type Error = String;

    fn pre_visit(&mut self, expression: &Expr) -> Result<bool, String> {
        if let Expr::VectorSelector(selector) = expression {
            self.0.extend(selector.name.clone());
        }
        Ok(true)
    }
}

fn names(expression: &Expr) -> Vec<String> {
    let mut names = Names::default();
    walk_expr(&mut names, expression).unwrap();
    names.0
}

fn main() {
    let parsed = parser::parse("topk(scalar(limit), requests)").unwrap();
    let walked = names(&parsed);
    println!("walk_expr sees: {}", walked.join(", "));
    let Expr::Aggregate(topk) = &parsed else { panic!("no aggregation") };
    let of_parameter = names(topk.param.as_ref().expect("a parameter"));
    println!("the tree also has: {}", of_parameter.join(", "));
    assert_eq!(walked, ["requests"], "the walk has changed");
    assert_eq!(of_parameter, ["limit"], "the parameter has changed");
}
RUST
cargo run --quiet
