//! Expressions in CEL over metrics, replicas and the rule's own limit: compiled and tried once when a RateLimit is read, so that mistakes
//! are found before anything is written.
//! <https://github.com/google/cel-spec/blob/master/doc/langdef.md>

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;

use cel::common::ast::{EntryExpr, Expr, IdedExpr};
use cel::{Context, Program, Value};

/// What expressions may name.
const KNOWN: [&str; 3] = ["metrics", "replicas", "limit"];
/// What `limit` has.
const OF_LIMIT: [&str; 2] = ["requests", "effective"];

/// A compiled expression.
pub(super) struct Expression {
    text: String,
    program: Program,
    /// The metrics that it names.
    pub(super) metrics: BTreeSet<String>,
}

impl fmt::Debug for Expression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// What an expression is worked out from.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Inputs {
    /// Finite numbers.
    pub(super) metrics: BTreeMap<String, f64>,
    pub(super) replicas: u32,
    /// As the spec says.
    pub(super) requests: u32,
    /// As it is now.
    pub(super) effective: u32,
}

/// Compiles a condition.
///
/// # Errors
/// Says what is wrong with it.
pub(super) fn condition(
    text: &str,
    metrics: &BTreeMap<String, String>,
) -> Result<Expression, String> {
    let expression = compile(text, metrics)?;
    match expression.tried()? {
        Value::Bool(_) => Ok(expression),
        other => Err(format!(
            "it must be true or false, as `metrics.p99 > 0.5`, and is {}",
            kind(&other)
        )),
    }
}

/// Compiles a number of requests.
///
/// # Errors
/// Says what is wrong with it.
pub(super) fn number(text: &str, metrics: &BTreeMap<String, String>) -> Result<Expression, String> {
    let expression = compile(text, metrics)?;
    match expression.tried()? {
        Value::Int(_) | Value::UInt(_) | Value::Float(_) => Ok(expression),
        other => Err(format!(
            "it must be a number, as `int(100.0 / metrics.p99)`, and is {}",
            kind(&other)
        )),
    }
}

fn compile(text: &str, metrics: &BTreeMap<String, String>) -> Result<Expression, String> {
    // The parser panics on what it cannot read at all (antlr4rust), which must not be the end of us.
    let parsed = std::panic::catch_unwind(|| Program::compile(text));
    let program = match parsed {
        Ok(Ok(program)) => program,
        Ok(Err(errors)) => {
            let said = errors.errors.iter().map(|error| error.msg.clone());
            let said: Vec<String> = said.take(2).collect();
            return Err(format!("it is no CEL: {}", said.join("; ")));
        }
        Err(_) => return Err("it is no CEL".to_owned()),
    };
    let references = program.references();
    for name in references.variables() {
        if !KNOWN.contains(&name) {
            return Err(format!(
                "{name} is not known here: there are metrics.NAME, replicas, limit.requests and limit.effective"
            ));
        }
    }
    let mut named = BTreeSet::new();
    fields_of("metrics", program.expression(), &mut named);
    for name in &named {
        if !metrics.contains_key(name) {
            return Err(format!("metrics.{name} is not among spec.metrics"));
        }
    }
    let mut of_limit = BTreeSet::new();
    fields_of("limit", program.expression(), &mut of_limit);
    if let Some(name) = of_limit
        .iter()
        .find(|name| !OF_LIMIT.contains(&name.as_str()))
    {
        return Err(format!(
            "limit.{name} is not known here: there are limit.requests and limit.effective"
        ));
    }
    Ok(Expression {
        text: text.to_owned(),
        metrics: named,
        program,
    })
}

/// The fields of a variable that an expression names, wherever.
fn fields_of(variable: &str, expression: &IdedExpr, found: &mut BTreeSet<String>) {
    let mut look = |part: &IdedExpr| fields_of(variable, part, found);
    match &expression.expr {
        Expr::Call(call) => {
            call.target.iter().for_each(|target| look(target));
            call.args.iter().for_each(look);
        }
        Expr::List(list) => list.elements.iter().for_each(look),
        Expr::Map(map) => {
            for entry in &map.entries {
                if let EntryExpr::MapEntry(entry) = &entry.expr {
                    look(&entry.key);
                    look(&entry.value);
                }
            }
        }
        Expr::Comprehension(inner) => {
            look(&inner.iter_range);
            look(&inner.accu_init);
            look(&inner.loop_cond);
            look(&inner.loop_step);
            look(&inner.result);
        }
        Expr::Select(select) => {
            if matches!(&select.operand.expr, Expr::Ident(name) if name == variable) {
                found.insert(select.field.clone());
            } else {
                look(&select.operand);
            }
        }
        Expr::Unspecified | Expr::Ident(_) | Expr::Literal(_) | Expr::Struct(_) => {}
    }
}

fn kind(value: &Value) -> String {
    value.type_of().to_string()
}

impl Expression {
    /// With values that are well in the middle: mistakes in types show.
    fn tried(&self) -> Result<Value, String> {
        let inputs = Inputs {
            metrics: self
                .metrics
                .iter()
                .map(|name| (name.clone(), 1.0))
                .collect(),
            replicas: 1,
            requests: 1,
            effective: 1,
        };
        self.evaluate(&inputs)
    }

    fn evaluate(&self, inputs: &Inputs) -> Result<Value, String> {
        let mut context = Context::default();
        let metrics: HashMap<String, f64> = inputs
            .metrics
            .iter()
            .map(|(name, value)| (name.clone(), *value))
            .collect();
        let limit = HashMap::from([
            ("requests".to_owned(), i64::from(inputs.requests)),
            ("effective".to_owned(), i64::from(inputs.effective)),
        ]);
        let added = context
            .add_variable("metrics", metrics)
            .and_then(|()| context.add_variable("limit", limit))
            .and_then(|()| context.add_variable("replicas", i64::from(inputs.replicas)));
        added.map_err(|error| error.to_string())?;
        self.program.execute(&context).map_err(|error| {
            let said = error.to_string();
            if said.contains("overload") {
                format!("{said}; metrics are doubles, so numbers beside them are too: 1.0")
            } else {
                said
            }
        })
    }

    /// # Errors
    /// Says why it cannot be worked out.
    pub(super) fn holds(&self, inputs: &Inputs) -> Result<bool, String> {
        match self.evaluate(inputs)? {
            Value::Bool(holds) => Ok(holds),
            other => Err(format!("it is {}", kind(&other))),
        }
    }

    /// A finite number.
    ///
    /// # Errors
    /// Says why there is none.
    pub(super) fn wanted(&self, inputs: &Inputs) -> Result<f64, String> {
        #[expect(
            clippy::cast_precision_loss,
            reason = "it is limited to a few digits anyway"
        )]
        let number = match self.evaluate(inputs)? {
            Value::Int(number) => number as f64,
            Value::UInt(number) => number as f64,
            Value::Float(number) => number,
            other => return Err(format!("it is {}", kind(&other))),
        };
        if number.is_finite() {
            Ok(number)
        } else {
            Err(format!("it is {number}"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn metrics() -> BTreeMap<String, String> {
        [
            ("p99".to_owned(), "x".to_owned()),
            ("cpu".to_owned(), "y".to_owned()),
        ]
        .into()
    }

    fn inputs(p99: f64) -> Inputs {
        Inputs {
            metrics: [("p99".to_owned(), p99)].into(),
            replicas: 3,
            requests: 100,
            effective: 50,
        }
    }

    #[test]
    fn what_slimes_expressions_could_not() {
        let slow = condition("metrics.p99 > 0.5 && replicas < 10", &metrics()).unwrap();
        assert_eq!(slow.metrics, ["p99".to_owned()].into());
        assert!(slow.holds(&inputs(0.9)).unwrap() && !slow.holds(&inputs(0.4)).unwrap());
        let wanted = |text: &str, p99| number(text, &metrics()).unwrap().wanted(&inputs(p99));
        assert_eq!(wanted("int(100.0 / metrics.p99)", 0.3), Ok(333.0));
        assert_eq!(wanted("10 - 3 - 2", 0.0), Ok(5.0));
        assert_eq!(wanted("double(limit.effective) * 1.5", 0.0), Ok(75.0));
        assert_eq!(wanted("limit.requests / replicas", 0.0), Ok(33.0));
        assert_eq!(wanted("100.0 - metrics.p99", 250.0), Ok(-150.0));
        assert!(
            wanted("int(100.0 / metrics.p99)", 0.0).is_err(),
            "infinite is no number of requests"
        );
        assert!(wanted("100.0 / metrics.p99", 0.0).is_err());
    }

    #[test]
    fn mistakes_are_found_before_anything_is_written() {
        for (text, says) in [
            ("metrics.p99 >", "no CEL"),
            ("", "no CEL"),
            ("metrics.p95 > 1.0", "metrics.p95 is not among spec.metrics"),
            (
                "false && metrics.typo > 1.0",
                "metrics.typo is not among spec.metrics",
            ),
            ("cpu > 1.0", "cpu is not known here"),
            ("limit.burst > 1", "limit.burst is not known here"),
            ("metrics.p99", "must be true or false"),
            ("metrics.p99 > 0.5 && replicas", "bool"),
        ] {
            let why = condition(text, &metrics()).unwrap_err();
            assert!(why.contains(says), "{text}: {why}");
        }
        let why = number("100 / metrics.p99", &metrics()).unwrap_err();
        assert!(why.contains("1.0"), "{why}");
        let why = number("'many'", &metrics()).unwrap_err();
        assert!(why.contains("must be a number"), "{why}");
    }
}
