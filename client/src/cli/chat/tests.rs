//! The conversation that is kept.

use super::{forget_oldest, message};

#[test]
fn the_oldest_messages_go_first_and_a_conversation_begins_with_the_user() {
    let history: Vec<_> = ["a", "b", "c", "d", "e", "f"]
        .iter()
        .enumerate()
        .map(|(i, text)| message(["user", "assistant"][i % 2], text))
        .collect();
    let kept = |keep| {
        let mut history = history.clone();
        forget_oldest(&mut history, keep);
        history
            .into_iter()
            .map(|message| message.content)
            .collect::<String>()
    };
    assert_eq!(kept(6), "abcdef");
    assert_eq!(kept(4), "cdef");
    assert_eq!(kept(3), "ef");
    assert_eq!(kept(1), "");
}
