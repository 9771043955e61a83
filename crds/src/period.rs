//! Lengths of time as Kubernetes writes them: `90s`, `1h30m`, `500ms`.

use std::time::Duration;

/// The length of time that `text` says; nothing where it says none.
/// <https://pkg.go.dev/time#ParseDuration>, without signs and fractions.
pub fn period(text: &str) -> Option<Duration> {
    let mut rest = text;
    let mut total = Duration::ZERO;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit())?;
        let number: u64 = rest[..digits].parse().ok()?;
        rest = &rest[digits..];
        let end = rest
            .find(|c: char| c.is_ascii_digit())
            .unwrap_or(rest.len());
        let unit = match &rest[..end] {
            "ms" => Duration::from_millis(1),
            "s" => Duration::from_secs(1),
            "m" => Duration::from_secs(60),
            "h" => Duration::from_secs(3600),
            _ => return None,
        };
        total = total.checked_add(unit.checked_mul(u32::try_from(number).ok()?)?)?;
        rest = &rest[end..];
    }
    (!text.is_empty()).then_some(total)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_go_writes_them() {
        for (text, want) in [
            ("500ms", Some(500)),
            ("90s", Some(90_000)),
            ("1h30m", Some(5_400_000)),
            ("720h", Some(2_592_000_000)),
            ("", None),
            ("10", None),
            ("h", None),
            ("1d", None),
            ("-1s", None),
            ("1.5h", None),
        ] {
            let want = want.map(Duration::from_millis);
            assert_eq!(period(text), want, "{text}");
        }
    }
}
