//! Expressions in CEL over metrics, replicas and the rule's own limit: compiled and tried once when a RateLimit is read, so that mistakes
//! are found before anything is written.
//! <https://github.com/google/cel-spec/blob/master/doc/langdef.md>

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;

use cel::{Context, Program, Value};

use super::grammar::{self, Refused};

/// A compiled expression.
pub(super) struct Expression {
    text: String,
    program: Program,
    /// The metrics that it names.
    pub(super) metrics: BTreeSet<String>,
    /// How many it is made of.
    pub(super) parts: usize,
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
pub(super) fn condition(text: &str, metrics: &BTreeSet<String>) -> Result<Expression, Refused> {
    let expression = compile(text, metrics)?;
    match expression.tried()? {
        Value::Bool(_) => Ok(expression),
        other => {
            let why = "it must be true or false, as `metrics.p99 > 0.5`, and is";
            Err(format!("{why} {}", kind(&other)).into())
        }
    }
}

/// Compiles a number of requests.
///
/// # Errors
/// Says what is wrong with it.
pub(super) fn number(text: &str, metrics: &BTreeSet<String>) -> Result<Expression, Refused> {
    let expression = compile(text, metrics)?;
    match expression.tried()? {
        Value::Int(_) | Value::UInt(_) | Value::Float(_) => Ok(expression),
        other => {
            let why = "it must be a number, as `int(100.0 / metrics.p99)`, and is";
            Err(format!("{why} {}", kind(&other)).into())
        }
    }
}

/// Whether a text is CEL that a RateLimit may have.
pub(crate) fn is_within_bounds(text: &str) -> bool {
    parse(text).is_ok()
}

fn parse(text: &str) -> Result<(Program, grammar::Found), Refused> {
    grammar::check_text(text)?;
    // The parser panics on what it cannot read at all (antlr4rust), which must not be the end of us.
    let parsed = std::panic::catch_unwind(|| Program::compile(text));
    let program = match parsed {
        Ok(Ok(program)) => program,
        Ok(Err(errors)) => {
            let said = errors.errors.iter().map(|error| error.msg.clone());
            let said: Vec<String> = said.take(2).collect();
            return Err(format!("it is no CEL: {}", said.join("; ")).into());
        }
        Err(_) => return Err("it is no CEL".to_owned().into()),
    };
    let found = grammar::check(program.expression())?;
    Ok((program, found))
}

fn compile(text: &str, metrics: &BTreeSet<String>) -> Result<Expression, Refused> {
    let (program, found) = parse(text)?;
    let named: BTreeSet<String> = found.metrics.into_iter().collect();
    for name in &named {
        if !metrics.contains(name) {
            return Err(format!("metrics.{name} is not among spec.metrics").into());
        }
    }
    Ok(Expression {
        text: text.to_owned(),
        metrics: named,
        parts: found.parts,
        program,
    })
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

    fn metrics() -> BTreeSet<String> {
        ["p99".to_owned(), "cpu".to_owned()].into()
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
            ("has(replicas)", "has"),
        ] {
            let why = condition(text, &metrics()).unwrap_err().why;
            assert!(why.contains(says), "{text}: {why}");
        }
        let why = number("100 / metrics.p99", &metrics()).unwrap_err().why;
        assert!(why.contains("1.0"), "{why}");
        let why = number("1 < 2", &metrics()).unwrap_err().why;
        assert!(why.contains("must be a number"), "{why}");
    }

    #[test]
    fn nothing_that_repeats_or_grows_is_an_expression() {
        for (text, says) in [
            ("[1,2].map(x,x) == 1", "a loop"),
            ("metrics.exists(replicas, replicas == 'p99')", "a loop"),
            ("[1, 2] == [1, 2]", "a list"),
            ("{1: 2} == {1: 2}", "a map"),
            ("'a' + 'b' == 'ab'", "text"),
            ("b'a' == b'a'", "text"),
            ("null == null", "null"),
            ("metrics['p99'] > 1.0", "[]"),
            ("1 in [1]", "in is not allowed"),
            ("metrics == metrics", "metrics without a field"),
            ("limit.requests.size() > 1", "size()"),
            ("'a'.matches('a')", "matches()"),
            ("duration('1s') > duration('2s')", "duration()"),
            ("replicas.x > 1", "the field x"),
            ("google.protobuf.Int32Value{value: 1} == 1", "an object"),
            (
                "[true].all(a, [true].all(b, [true].all(c, a && b && c)))",
                "a loop",
            ),
        ] {
            let refused = condition(text, &metrics()).unwrap_err();
            assert!(refused.why.contains(says), "{text}: {}", refused.why);
            assert!(
                refused.why.contains("there are numbers") && !refused.over,
                "{text}: {}",
                refused.why
            );
        }
        let all = "has(metrics.p99) ? uint(1) > 0u : !(metrics.cpu / 2.0 >= double(-limit.requests % 7)) || true";
        condition(all, &metrics()).unwrap();
    }

    #[test]
    fn bounds_are_kept_at_them_and_above_them() {
        // `replicas`, and an operator and a number each time.
        let sum = |times: usize| format!("replicas + 1{}", " + 1".repeat(times - 1));
        assert_eq!(number(&sum(31), &metrics()).unwrap().parts, 63);
        assert_eq!(
            number(&format!("-({})", sum(31)), &metrics())
                .unwrap()
                .parts,
            64
        );
        let refused = number(&sum(32), &metrics()).unwrap_err();
        assert!(
            refused.over && refused.why.contains("it has 65 parts"),
            "{}",
            refused.why
        );

        let spaced = |bytes: usize| format!("1{}", " ".repeat(bytes - 1));
        number(&spaced(grammar::LONGEST), &metrics()).unwrap();
        let refused = number(&spaced(grammar::LONGEST + 1), &metrics()).unwrap_err();
        assert!(
            refused.over
                && refused
                    .why
                    .contains("it has 1025 bytes, and 1024 is the most")
        );

        let nested = |deep: usize| format!("{}1{}", "(".repeat(deep), ")".repeat(deep));
        number(&nested(grammar::DEEPEST), &metrics()).unwrap();
        let refused = number(&nested(grammar::DEEPEST + 1), &metrics()).unwrap_err();
        assert!(
            refused.over && refused.why.contains("it has 17 brackets"),
            "{}",
            refused.why
        );
    }

    #[test]
    fn the_worst_texts_are_parsed_in_no_time_on_a_small_stack() {
        let fill = |begins: &str, again: &str, ends: &str| {
            let times = (grammar::LONGEST - begins.len() - ends.len()) / again.len();
            format!("{begins}{}{ends}", again.repeat(times))
        };
        let deep = "((((((((((((((((";
        let loops = "[1].map(a,".repeat(8) + "1" + &")".repeat(8);
        let texts = [
            fill("", "(", ""),
            fill("", "-", "1"),
            fill("", "- ", "1"),
            fill("", "!", "true"),
            fill("", "1?", ""),
            fill("", "1?1:", "1"),
            fill("1", "+1", ""),
            fill("a", ".a", ""),
            fill("a", "[1]", ""),
            fill("1", "&&1", ""),
            fill("1", "<1", ""),
            fill(deep, "1+", ""),
            fill(deep, "1?1:", "1))))))))))))))))"),
            fill("", &format!("{deep}1))))))))))))))))+"), "1"),
            fill("", "int(1)+", "1"),
            fill("", &format!("{loops}+"), "1"),
            fill("'", "a", ""),
            fill("", "\u{1F600}", ""),
        ];
        let small = std::thread::Builder::new().stack_size(1 << 20);
        let tried = small.spawn(move || {
            let mut longest = std::time::Duration::ZERO;
            for text in &texts {
                let (begun, parsed) = (std::time::Instant::now(), number(text, &metrics()));
                let took = begun.elapsed();
                longest = longest.max(took);
                let outcome =
                    parsed.map_err(|refused| refused.why.chars().take(70).collect::<String>());
                let start: String = text.chars().take(24).collect();
                println!("{took:?} {start} {outcome:?}");
            }
            longest
        });
        let longest = tried.unwrap().join().unwrap();
        assert!(longest < std::time::Duration::from_secs(3), "{longest:?}");
    }
}
