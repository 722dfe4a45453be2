//! What is counted of an answer, whoever gives it.

use super::*;

fn outcome() -> Outcome {
    Outcome::new(&Arrival {
        at: Duration::ZERO,
        session: 0,
        kind: Kind::Ask,
        draw: 0,
    })
}

fn ms(milliseconds: u64) -> Duration {
    Duration::from_millis(milliseconds)
}

const USAGE: Usage = Usage {
    prompt_tokens: 9,
    completion_tokens: 7,
    context_tokens: 0,
    cached_tokens: 4,
};

#[test]
fn tokens_are_timed_as_they_come_and_text_behind_them_is_none() {
    let mut outcome = outcome();
    outcome.saw(0, "", ms(1));
    outcome.saw(2, "ab", ms(5));
    outcome.saw(1, "", ms(8));
    outcome.saw(0, "held back", ms(9));
    outcome.used(&USAGE);
    assert_eq!((outcome.first, outcome.last), (Some(ms(5)), Some(ms(8))));
    assert_eq!((outcome.gaps, outcome.tokens), (vec![ms(3)], 3));
    assert_eq!((outcome.prompt_tokens, outcome.cached_tokens), (9, 4));
}

#[test]
fn of_an_engine_that_names_no_tokens_text_is_timed_and_its_count_is_taken() {
    let mut outcome = outcome();
    outcome.saw(0, "a", ms(5));
    outcome.saw(0, "", ms(6));
    outcome.saw(0, "b", ms(9));
    outcome.used(&USAGE);
    assert_eq!((outcome.first, outcome.last), (Some(ms(5)), Some(ms(9))));
    assert_eq!((outcome.gaps, outcome.tokens), (vec![ms(4)], 7));
}
