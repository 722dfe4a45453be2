//! Stop strings: the laws, whatever the pieces.

use proptest::{collection::vec, prelude::*};

use super::stop::Stops;

/// What is shown of a text in these pieces, and whether a stop string ended it.
fn shown(pieces: &[String], stops: &[String]) -> (String, bool) {
    let mut stops = Stops::new(stops.to_vec());
    let mut out = String::new();
    for piece in pieces {
        if stops.push(piece, &mut out) {
            return (out, true);
        }
    }
    out.push_str(&stops.rest());
    (out, false)
}

proptest! {
    #[test]
    fn a_text_ends_before_its_first_stop_string_or_is_whole(
        pieces in vec("[ab\\n\u{e9}]{0,3}", 0..8),
        stops in vec("[ab\\n\u{e9}]{1,3}", 0..4),
    ) {
        let text = pieces.concat();
        let (out, stopped) = shown(&pieces, &stops);
        // The stop string that is complete first ends the text, at the place where the earliest of those known by then begins.
        prop_assert_eq!(stopped, stops.iter().any(|stop| text.contains(stop.as_str())));
        prop_assert!(text.starts_with(&out));
        prop_assert!(stops.iter().all(|stop| !out.contains(stop.as_str())));
        if !stopped {
            prop_assert_eq!(out, text);
        }
    }

    #[test]
    fn what_is_shown_early_never_begins_a_stop_string(text in "[ab]{0,12}", stop in "[ab]{1,4}") {
        let mut stops = Stops::new(vec![stop.clone()]);
        let mut out = String::new();
        for letter in text.chars() {
            if stops.push(&letter.to_string(), &mut out) {
                break;
            }
            prop_assert!((1..stop.len()).all(|cut| !out.ends_with(&stop[..cut]) || !text[out.len() - cut..].starts_with(&stop)));
        }
    }
}

#[test]
fn a_stop_string_over_the_border_of_tokens_is_found() {
    let (out, stopped) = shown(
        &["The answer\nQues".into(), "tion: no".into()],
        &["\nQuestion:".into()],
    );
    assert_eq!((out.as_str(), stopped), ("The answer", true));
}
