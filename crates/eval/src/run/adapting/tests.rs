use std::sync::Arc;

use lm::TokenId;

use super::*;
use crate::tasks::Question;

fn case(text: &str, label: &str, questions: &[(&str, u32)]) -> Case {
    let question = |&(shown, answer): &(&str, u32)| Question {
        id: String::new(),
        label: label.to_owned(),
        x: None,
        shown: shown.to_owned(),
        query: None,
        asked: None,
        body: vec![TokenId(1)],
        references: vec![answer.to_string()],
        answer: vec![TokenId(answer)],
        options: vec![vec![TokenId(answer)]],
        right: Some(0),
        max_tokens: 16,
    };
    Case {
        context: vec![Arc::new(Document {
            text: text.to_owned(),
            tokens: vec![TokenId(2), TokenId(3)],
        })],
        frame: crate::prompt::Frame::default(),
        styled: None,
        questions: questions.iter().map(question).collect(),
    }
}

#[test]
fn what_is_judged_is_not_tuned_on() {
    let judged = [
        case("a", "short", &[("who", 1)]),
        case("b", "short", &[("where", 2)]),
    ];
    let mut drawn = vec![
        // Told again, asked again, and a question of those beside a new one.
        case("a", "short", &[("when", 3)]),
        case("c", "short", &[("who", 1)]),
        case("d", "short", &[("where", 2), ("where", 4)]),
    ];
    drawn.extend((0..9).map(|n| case(&format!("e{n}"), "short", &[("what", n)])));
    drawn.push(case("a b", "long", &[("what", 5)]));
    let kept = unseen(drawn, &judged);
    let texts: Vec<&str> = kept
        .iter()
        .map(|case| case.context[0].text.as_str())
        .collect();
    assert_eq!(texts, ["d", "e0", "e1", "e2", "a b"]);
    let [question] = kept[0].questions.as_slice() else {
        panic!("{:?}", kept[0].questions)
    };
    assert_eq!(question.answer, [TokenId(4)]);
    assert!(question.max_tokens == 0 && question.options.is_empty());
}

#[test]
fn other_cases_are_drawn_and_enough_of_them() {
    let asked = Wanted {
        limit: 7,
        seed: 3,
        context_tokens: vec![256],
        questions: Some(2),
        shots: vec![16],
        facts: vec![1],
        distance_tokens: 0,
        windows: vec![1],
        max_malformed: 0.0,
    };
    let other = wanted(&asked);
    assert_ne!(other.seed, asked.seed);
    assert_eq!(other.limit, 7 + 2 * CASES);
    assert_eq!(other.context_tokens, asked.context_tokens);
    assert_eq!(wanted(&asked).seed, other.seed);
}
