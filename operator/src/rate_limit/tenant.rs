//! A RateLimit's own PromQL, narrowed to what is its namespace's: every selector gets the namespace's matcher, as prom-label-proxy does it.
//! What cannot be narrowed for sure is not asked.
//! <https://github.com/prometheus-community/prom-label-proxy>

use promql_parser::label::{MatchOp, Matcher};
use promql_parser::parser::{self, Expr, VectorSelector};

use super::grammar;
use crate::args::RateLimitMetrics;

/// Bytes of a query.
const LONGEST: usize = 1024;

/// Whom RateLimits may ask what.
#[derive(Clone, Debug)]
pub struct Policy {
    pub metrics: RateLimitMetrics,
    /// The label of series that names the namespace whose they are.
    pub label: String,
}

/// What is said of metrics that nobody may ask for.
pub(super) const OFF: &str = "this installation does not ask Prometheus for RateLimits (--rate-limit-metrics=none); \
    `namespaced` lets each ask for the series of its own namespace";

impl Policy {
    pub(super) fn is_off(&self) -> bool {
        self.metrics == RateLimitMetrics::None
    }

    /// The query that is asked for a RateLimit of `namespace`.
    ///
    /// # Errors
    /// Says why none is.
    pub(super) fn question(&self, query: &str, namespace: &str) -> Result<String, String> {
        match self.metrics {
            RateLimitMetrics::None => Err(OFF.to_owned()),
            _ if query.len() > LONGEST => Err(format!(
                "the query has {} bytes, and {LONGEST} is the most",
                query.len()
            )),
            RateLimitMetrics::Namespaced => narrowed(query, &self.label, namespace),
            RateLimitMetrics::Any => Ok(query.to_owned()),
        }
    }
}

fn narrowed(query: &str, label: &str, namespace: &str) -> Result<String, String> {
    let mut expression = parse(query)?;
    each_selector(&mut expression, &mut |selector| {
        narrow(selector, label, namespace)
    })?;
    let text = expression.to_string();
    // What is printed is what counts: it must mean what was narrowed, and each selector in it must have the matcher.
    let mut again = parse(&text)?;
    // Matchers are printed in an order of the library's own.
    let sort = &mut |selector: &mut VectorSelector| {
        let all = &mut selector.matchers.matchers;
        all.sort_by_cached_key(ToString::to_string);
        Ok(())
    };
    each_selector(&mut expression, sort)?;
    each_selector(&mut again, sort)?;
    if again != expression {
        return Err(
            "the query cannot be narrowed to the namespace: write it in another way".to_owned(),
        );
    }
    each_selector(&mut again, &mut |selector| {
        let of_label = selector
            .matchers
            .matchers
            .iter()
            .filter(|one| one.name == label);
        let of_label: Vec<&Matcher> = of_label.collect();
        match &of_label[..] {
            [one] if one.op == MatchOp::Equal && one.value == namespace => Ok(()),
            _ => Err("the query cannot be narrowed to the namespace".to_owned()),
        }
    })?;
    Ok(text)
}

fn parse(query: &str) -> Result<Expr, String> {
    grammar::check_nesting(query).map_err(|refused| format!("the query: {}", refused.why))?;
    // It panics on lengths of time that are out of range.
    let parsed = std::panic::catch_unwind(|| parser::parse(query));
    match parsed {
        Ok(Ok(expression)) => Ok(expression),
        Ok(Err(_)) | Err(_) => Err("the query is no PromQL that Fenceline knows".to_owned()),
    }
}

fn narrow(selector: &mut VectorSelector, label: &str, namespace: &str) -> Result<(), String> {
    let all = &mut selector.matchers;
    if !all.or_matchers.is_empty() {
        return Err("the query has matchers with `or`, which are not allowed".to_owned());
    }
    let of_label = all.matchers.iter().filter(|one| one.name == label);
    if of_label.clone().any(|one| !one.is_match(namespace)) {
        return Err(format!(
            "the query asks for another {label} than {namespace}, whose series alone it may ask for"
        ));
    }
    all.matchers.retain(|one| one.name != label);
    all.matchers
        .push(Matcher::new(MatchOp::Equal, label, namespace));
    Ok(())
}

/// Every selector there is. The library's own walk leaves out an aggregation's parameter.
fn each_selector(
    expression: &mut Expr,
    look: &mut impl FnMut(&mut VectorSelector) -> Result<(), String>,
) -> Result<(), String> {
    match expression {
        Expr::VectorSelector(selector) => look(selector),
        Expr::MatrixSelector(matrix) => look(&mut matrix.vs),
        Expr::Aggregate(aggregate) => {
            if let Some(parameter) = &mut aggregate.param {
                each_selector(parameter, look)?;
            }
            each_selector(&mut aggregate.expr, look)
        }
        Expr::Unary(unary) => each_selector(&mut unary.expr, look),
        Expr::Paren(paren) => each_selector(&mut paren.expr, look),
        Expr::Subquery(subquery) => each_selector(&mut subquery.expr, look),
        Expr::Binary(binary) => {
            each_selector(&mut binary.lhs, look)?;
            each_selector(&mut binary.rhs, look)
        }
        // It looks up series that no selector names.
        // <https://prometheus.io/docs/prometheus/latest/querying/functions/#info>
        Expr::Call(call) if call.func.name == "info" => {
            Err("the query calls info(), which is not allowed".to_owned())
        }
        Expr::Call(call) => {
            let mut arguments = call.args.args.iter_mut();
            arguments.try_for_each(|argument| each_selector(argument, look))
        }
        Expr::NumberLiteral(_) | Expr::StringLiteral(_) => Ok(()),
        Expr::Extension(_) => Err("the query has a part that Fenceline does not know".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(query: &str) -> Result<String, String> {
        let metrics = RateLimitMetrics::Namespaced;
        let label = "namespace".to_owned();
        Policy { metrics, label }.question(query, "shop")
    }

    #[test]
    fn every_selector_of_a_query_is_narrowed() {
        for (query, times) in [
            ("p99", 1),
            ("{__name__=~'.+'}", 1),
            ("{__name__=\"up\"}", 1),
            ("p99 offset 5m + p99 @ 1700000000", 2),
            (
                "sum(rate(istio_requests_total{reporter=\"destination\", response_code=~\"5..\"}[1m])) / sum(rate(istio_requests_total[1m]))",
                2,
            ),
            (
                "histogram_quantile(0.99, sum by (le) (rate(istio_request_duration_milliseconds_bucket{destination_workload=\"cart\"}[1m]))) / 1000",
                1,
            ),
            ("max_over_time(sum(rate(a[1m]))[5m:30s])", 1),
            ("topk(scalar(secret), shown)", 2),
            (
                "quantile(scalar(max(secret{namespace=~'.*'})), a) > bool 3",
                2,
            ),
            ("count_values('x', a)", 1),
            ("a and on (pod) b unless ignoring (pod) c or d", 4),
            ("-a ^ -b", 2),
            (
                "absent(a) or vector(1) or label_replace(b, 'namespace', 'bank', '', '')",
                2,
            ),
            ("a{namespace!='bank', x='namespace=\"bank\"'}", 1),
            ("a{x='\"} or secret{y=\"'}", 1),
            ("a{y=\"\\n\\\\\"}", 1),
            ("a{x=\"}\"} # } or secret", 1),
            ("sum without (pod) (a) > 1e3", 1),
            ("predict_linear(a[1h], 4 * 3600)", 1),
        ] {
            let narrowed = asked(query).unwrap_or_else(|why| panic!("{query}: {why}"));
            println!("{query} -> {narrowed}");
            let mut found = 0;
            let count = &mut |selector: &mut VectorSelector| {
                let matchers = &selector.matchers.matchers;
                let of_label = matchers.iter().filter(|one| one.name == "namespace");
                assert_eq!(
                    of_label.map(ToString::to_string).collect::<Vec<_>>(),
                    ["namespace=\"shop\""]
                );
                found += 1;
                Ok(())
            };
            each_selector(&mut parse(&narrowed).unwrap(), count).unwrap();
            assert_eq!(found, times, "{narrowed}");
        }
    }

    #[test]
    fn what_cannot_be_narrowed_is_not_asked() {
        let long = format!("a{}", " + a".repeat(256));
        let deep = format!("{}a{}", "(".repeat(17), ")".repeat(17));
        for (query, says) in [
            ("secret{namespace='bank'}", "another namespace than shop"),
            (
                "secret{namespace=~'bank|vault'}",
                "another namespace than shop",
            ),
            ("secret{namespace!='shop'}", "another namespace than shop"),
            ("secret{namespace!~'sh.*'}", "another namespace than shop"),
            (
                "topk(scalar(secret{namespace='bank'}), a)",
                "another namespace",
            ),
            ("secret{a='1' or b='2'}", "`or`"),
            ("info(a)", "info()"),
            ("a[99999999999999999999y]", "no PromQL"),
            ("a offset 999999999999999999w", "no PromQL"),
            ("sum(", "no PromQL"),
            ("", "no PromQL"),
            (&long, "the query has 1025 bytes, and 1024 is the most"),
            (&deep, "17 brackets"),
        ] {
            let refused = asked(query).unwrap_err();
            assert!(refused.contains(says), "{query}: {refused}");
        }
        let of = |metrics| Policy {
            metrics,
            label: "namespace".to_owned(),
        };
        let any = of(RateLimitMetrics::Any).question("secret", "shop");
        assert_eq!(any.as_deref(), Ok("secret"));
        let none = of(RateLimitMetrics::None)
            .question("a", "shop")
            .unwrap_err();
        assert!(none.contains("--rate-limit-metrics=none"), "{none}");
    }

    #[test]
    fn the_worst_queries_are_read_in_no_time_on_a_small_stack() {
        let fill = |again: &str, ends: &str| {
            let times = (LONGEST - ends.len()) / again.len();
            format!("{}{ends}", again.repeat(times))
        };
        let texts = [
            fill("-", "a"),
            fill("a^", "a"),
            fill("a-", "a"),
            fill("a{b=~'(x{9}){9}'}+", "a"),
            fill("a or ", "a"),
            fill("{", ""),
            fill("'", ""),
        ];
        let small = std::thread::Builder::new().stack_size(2 << 20);
        let tried = small.spawn(move || {
            let begun = std::time::Instant::now();
            for text in &texts {
                let begun = std::time::Instant::now();
                let outcome = asked(text).map(|text| text.len());
                println!("{:?} {} {outcome:?}", begun.elapsed(), &text[..12]);
            }
            begun.elapsed()
        });
        let took = tried.unwrap().join().unwrap();
        assert!(took < std::time::Duration::from_secs(10), "{took:?}");
    }
}
