//! Timeouts as gRPC writes them.

use std::time::Duration;

use super::parse_timeout;

#[test]
fn a_timeout_is_read_in_all_its_units_and_nothing_else_is() {
    let cases = [
        ("2H", 7200.0),
        ("3M", 180.0),
        ("4S", 4.0),
        ("250m", 0.25),
        ("5000u", 0.005),
        ("1000n", 1e-6),
    ];
    for (text, seconds) in cases {
        assert_eq!(
            parse_timeout(text),
            Some(Duration::from_secs_f64(seconds)),
            "{text}"
        );
    }
    for text in ["", "S", "1", "-1S", "1s", "123456789S", "1é", "+1S"] {
        assert_eq!(parse_timeout(text), None, "{text}");
    }
}
