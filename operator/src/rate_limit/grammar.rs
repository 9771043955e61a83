//! What an expression of a RateLimit may be made of: an allowlist over what was parsed, and bounds. So nothing in it repeats, grows or
//! looks anything up, and its evaluation costs as much as it has parts.

use cel::common::ast::{EntryExpr, Expr, IdedExpr, LiteralValue, operators};

/// Bytes of an expression's text; looked at before anything is parsed.
pub(super) const LONGEST: usize = 1024;
/// Numbers, names, fields, operators and calls of an expression together.
pub(super) const MOST_PARTS: usize = 64;
/// Brackets that are open at once; looked at before anything is parsed, since the parser calls itself for each.
pub(super) const DEEPEST: usize = 16;

/// What `limit` has.
const OF_LIMIT: [&str; 2] = ["requests", "effective"];
/// Functions of one number.
const CONVERSIONS: [&str; 3] = ["int", "uint", "double"];
const OPERATORS: [&str; 16] = [
    operators::CONDITIONAL,
    operators::LOGICAL_AND,
    operators::LOGICAL_OR,
    operators::LOGICAL_NOT,
    operators::SUBSTRACT,
    operators::ADD,
    operators::MULTIPLY,
    operators::DIVIDE,
    operators::MODULO,
    operators::EQUALS,
    operators::NOT_EQUALS,
    operators::GREATER_EQUALS,
    operators::LESS_EQUALS,
    operators::GREATER,
    operators::LESS,
    operators::NEGATE,
];
const ALLOWED: &str = "numbers, true, false, metrics.NAME, replicas, limit.requests, limit.effective, \
    + - * / %, comparisons, && || !, ?:, has(), int(), uint() and double()";

/// Why an expression is not taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Refused {
    pub(super) why: String,
    /// Whether it is over a bound.
    pub(super) over: bool,
}

impl From<String> for Refused {
    fn from(why: String) -> Self {
        Self { why, over: false }
    }
}

fn over(count: usize, what: &str, most: usize) -> Refused {
    let why = format!("it has {count} {what}, and {most} is the most");
    Refused { why, over: true }
}

/// What can be seen before an expression is parsed.
///
/// # Errors
/// Says which bound it is over, and by how much.
pub(super) fn check_text(text: &str) -> Result<(), Refused> {
    if text.len() > LONGEST {
        return Err(over(text.len(), "bytes", LONGEST));
    }
    check_nesting(text)
}

/// Whether a parser that calls itself for each bracket may read it.
///
/// # Errors
/// Says how many are open at once.
pub(super) fn check_nesting(text: &str) -> Result<(), Refused> {
    let (mut open, mut deepest) = (0_usize, 0);
    for character in text.bytes() {
        match character {
            b'(' | b'[' | b'{' => open += 1,
            b')' | b']' | b'}' => open = open.saturating_sub(1),
            _ => {}
        }
        deepest = deepest.max(open);
    }
    if deepest > DEEPEST {
        return Err(over(deepest, "brackets within one another", DEEPEST));
    }
    Ok(())
}

/// What an expression names, and of how many parts it is.
#[derive(Debug, Default)]
pub(super) struct Found {
    /// The fields of `metrics`.
    pub(super) metrics: Vec<String>,
    pub(super) parts: usize,
}

/// Looks at every part of what was parsed.
///
/// # Errors
/// Names the first part that is not allowed, or says that there are too many of them.
pub(super) fn check(expression: &IdedExpr) -> Result<Found, Refused> {
    let mut found = Found::default();
    let mut rest = vec![expression];
    let mut refused = None;
    while let Some(part) = rest.pop() {
        found.parts += 1;
        if let Err(why) = look(part, &mut rest, &mut found.metrics) {
            refused.get_or_insert(why);
        }
    }
    match refused {
        Some(why) => Err(why.into()),
        None if found.parts > MOST_PARTS => {
            let what = "parts (numbers, names, fields, operators and calls)";
            Err(over(found.parts, what, MOST_PARTS))
        }
        None => Ok(found),
    }
}

fn look<'a>(
    part: &'a IdedExpr,
    rest: &mut Vec<&'a IdedExpr>,
    metrics: &mut Vec<String>,
) -> Result<(), String> {
    let refuse = |what: &str| Err(format!("{what} is not allowed here: there are {ALLOWED}"));
    match &part.expr {
        Expr::Literal(literal) => match literal {
            LiteralValue::Boolean(_)
            | LiteralValue::Double(_)
            | LiteralValue::Int(_)
            | LiteralValue::UInt(_) => Ok(()),
            LiteralValue::Bytes(_) | LiteralValue::String(_) => refuse("text"),
            LiteralValue::Null => refuse("null"),
        },
        Expr::Ident(name) if name == "replicas" => Ok(()),
        Expr::Ident(name) if name == "metrics" || name == "limit" => {
            refuse(&format!("{name} without a field"))
        }
        Expr::Ident(name) => Err(format!("{name} is not known here: there are {ALLOWED}")),
        Expr::Select(select) => match &select.operand.expr {
            Expr::Ident(name) if name == "metrics" => {
                metrics.push(select.field.clone());
                Ok(())
            }
            Expr::Ident(name) if name == "limit" && OF_LIMIT.contains(&&*select.field) => Ok(()),
            Expr::Ident(name) if name == "limit" => Err(format!(
                "limit.{} is not known here: there are limit.requests and limit.effective",
                select.field
            )),
            _ => {
                rest.push(&select.operand);
                refuse(&format!("the field {}", select.field))
            }
        },
        Expr::Call(call) => {
            rest.extend(call.target.as_deref());
            rest.extend(&call.args);
            let name = &*call.func_name;
            let known = OPERATORS.contains(&name) || CONVERSIONS.contains(&name);
            if known && call.target.is_none() {
                return Ok(());
            }
            match name {
                operators::INDEX | operators::OPT_INDEX => refuse("[]"),
                operators::IN => refuse("in"),
                name => refuse(&format!("{name}()")),
            }
        }
        Expr::List(list) => {
            rest.extend(&list.elements);
            refuse("a list")
        }
        Expr::Map(map) => {
            for entry in &map.entries {
                if let EntryExpr::MapEntry(entry) = &entry.expr {
                    rest.extend([&entry.key, &entry.value]);
                }
            }
            refuse("a map")
        }
        Expr::Comprehension(_) => refuse("a loop (all, exists, exists_one, map or filter)"),
        Expr::Struct(_) => refuse("an object"),
        Expr::Unspecified => refuse("this"),
    }
}
