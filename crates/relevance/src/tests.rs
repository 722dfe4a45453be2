//! What concerns a text, and what does not.

use std::ops::Range;

use proptest::prelude::*;

use super::{Asked, LONGEST, Listener, Meant, Spoken, WINDOW, meant};

const MILL: &str = "The old mill at Hollow Creek burnt down in 1907, and the miller Ansel Brandt rebuilt it of stone.";

fn of(told: &[&str], question: &str) -> f32 {
    all_of(told, question).strength
}

fn all_of(told: &[&str], question: &str) -> Meant {
    let told: Vec<Spoken> = told.iter().map(|text| Spoken::of(text)).collect();
    let told: Vec<&Spoken> = told.iter().collect();
    meant(&told, &Asked::new([question].into_iter(), Some("Answer:")))
}

#[test]
fn a_question_about_the_text_gets_all_of_the_imprint_and_another_none() {
    assert_eq!(of(&[MILL], "Who rebuilt the mill at Hollow Creek?"), 1.0);
    assert_eq!(of(&[MILL], "When did the mills burn?"), 1.0);
    assert_eq!(of(&[MILL], "What is the capital of Portugal?"), 0.0);
    assert_eq!(of(&[], "Who rebuilt the mill?"), 0.0);
    // A quarter of the words: half of the way from 0.1 to 0.4.
    let half = of(&[MILL], "Does Portugal mine copper near Brandt?");
    assert!((half - 0.5).abs() < 1e-6, "{half}");
}

#[test]
fn a_question_that_names_nothing_gets_all_of_it() {
    for question in [
        "What do you know about me?",
        "Summarize what I told you.",
        "Hi",
        "?",
    ] {
        assert_eq!(of(&[MILL], question), 1.0, "{question}");
    }
}

#[test]
fn who_speaks_of_himself_means_what_was_told_of_him() {
    let told = ["My sister Ada is a nurse in Oslo.", MILL];
    assert_eq!(
        all_of(&told, "What is my profession, what do I live on?"),
        Meant::ALL
    );
    assert_eq!(documents(&all_of(&told, "Where does my sister work?")), [0]);
    assert_eq!(of(&[MILL], "What is my profession?"), 0.0);
    assert_eq!(of(&told, "What is the capital of Portugal?"), 0.0);
}

#[test]
fn words_count_together_only_if_one_window_speaks_of_them() {
    let filler = "word ".repeat(2 * WINDOW);
    let apart = format!("{MILL} {filler} Lisbon and copper and zinc and tin.");
    let question = "mill Lisbon copper zinc tin lead gold silver";
    assert_eq!(
        of(&[&apart], question),
        of(&["Lisbon copper zinc tin"], question)
    );
    assert_eq!(of(&["nothing", MILL], "Ansel Brandt"), 1.0);
}

#[test]
fn a_form_that_the_text_uses_gets_all_of_it() {
    let shots = "Question: is 4 even?\nAnswer: yes\n\nQuestion: is 7 even?\nAnswer: no\n";
    assert_eq!(of(&[shots], "zebra crossings"), 1.0);
    assert_eq!(
        of(
            &["He said: the Answer: is no label here"],
            "zebra crossings"
        ),
        0.0
    );
}

#[test]
fn of_a_conversation_the_newest_messages_count() {
    let told = Spoken::of(MILL);
    let of =
        |messages: &[&str]| meant(&[&told], &Asked::new(messages.iter().copied(), None)).strength;
    assert_eq!(of(&["Who was Ansel Brandt?", "Did he marry?"]), 1.0);
    assert_eq!(of(&["Did he marry in Portugal?"]), 0.0);
    let later = ["Portugal?", "Spain?", "France?", "Italy?"];
    let long: Vec<&str> = ["Who was Ansel Brandt?"].into_iter().chain(later).collect();
    assert_eq!(of(&long), 0.0);
}

#[test]
fn letters_without_spaces_are_words() {
    assert_eq!(of(&["東京は日本の首都です。"], "日本の首都は?"), 1.0);
    assert_eq!(of(&["東京は日本の首都です。"], "猫肉魚犬鳥"), 0.0);
}

/// The documents of the parts; none: all.
fn documents(meant: &Meant) -> Vec<usize> {
    let parts = meant.parts.iter().flatten();
    parts.map(|part| part.document).collect()
}

#[test]
fn the_documents_that_speak_of_it_most_are_meant() {
    let told = [
        "The river town has a market.",
        MILL,
        "A market was held in the town of Ansel.",
        "Nothing here.",
    ];
    let documents = |question| documents(&all_of(&told, question));
    assert_eq!(documents("Who was the miller Brandt?"), [1]);
    // Two speak of it alike.
    assert_eq!(documents("Where is the market of the town?"), [0, 2]);
    // The rarer word decides.
    assert_eq!(documents("Which market had stone?"), [1]);
    // Nothing to go by, nothing known, nothing left out.
    assert_eq!(all_of(&told, "What do you know?").parts, None);
    assert_eq!(all_of(&told, "Portugal").parts, None);
    assert_eq!(all_of(&[MILL], "Who was Brandt?").parts, None);
    // Of many alike the last.
    let many: Vec<String> = (0..9).map(|n| format!("The mill number {n}.")).collect();
    let many: Vec<&str> = many.iter().map(String::as_str).collect();
    assert_eq!(
        super::tests::documents(&all_of(&many, "Which mill?")),
        [7, 8]
    );
}

/// The only one of the ranges.
fn only(ranges: &[Range<usize>]) -> Range<usize> {
    match ranges {
        [range] => range.clone(),
        _ => panic!("{ranges:?}"),
    }
}

#[test]
fn the_sentences_that_speak_of_it_are_meant_and_what_lies_around_counts_for_less() {
    // Tokens: words. 7 + 8 + 6 + 5.
    let told = "The code of Zorblat is 1234, truly. The code of Mirvane is 5678, they say. He married Clara Voss in spring. Nothing else         is known here.";
    let part = |question| {
        let meant = all_of(&[told], question);
        let [part] = &meant.parts.unwrap()[..] else {
            panic!("{question}")
        };
        (only(&part.tokens), only(&part.around), meant.beside)
    };
    // All words in one sentence: this one alone, and hardly anything else.
    let (tokens, around, beside) = part("What is the code of Mirvane?");
    assert_eq!((tokens, around), (7..15, 0..26));
    assert!((beside - 0.2 * 8.0 / 26.0).abs() < 1e-6, "{beside}");
    // A word is missing: its neighbours, too.
    let (tokens, _, beside) = part("Whom did Mirvane marry?");
    assert_eq!(tokens, 0..21);
    assert!((beside - 1.0).abs() < 1e-6, "{beside}");
}

#[test]
fn a_text_that_goes_on_gets_all_of_it_unless_a_sentence_speaks_of_all_its_words() {
    let told =
        Spoken::of("The code of Zorblat is 1234. The code of Mirvane is 5678. Nothing else.");
    let meant = |text: &str| meant(&[&told], &Asked::text(text));
    let sure = meant("The code of Mirvane is ");
    assert_eq!(sure.strength, 1.0);
    assert_eq!(only(&sure.parts.unwrap()[0].tokens), 6..12);
    for text in [
        "",
        "On rainy days Mirvane ",
        "Once upon a time ",
        "Code, code",
        "Zorblat's code",
    ] {
        let meant = meant(text);
        assert_eq!(meant.strength, 1.0, "{text}");
        assert_eq!(meant.parts.is_some(), text.starts_with("Zor"), "{text}");
        // All of it, but not on what it does not know.
        assert_eq!(meant.gated, meant.parts.is_none(), "{text}");
    }
    // Its last words count.
    let long = format!("{} The code of Mirvane is ", "rain ".repeat(40));
    assert_eq!(meant(&long).parts, None);
    let long = format!(
        "{} The code of Mirvane is {}",
        "rain ".repeat(40),
        "the ".repeat(20)
    );
    assert!(meant(&long).parts.is_some());
}

#[test]
fn a_part_lies_in_its_window_of_a_long_document() {
    let filler = "word word word word. ".repeat(WINDOW);
    let told = format!("{filler}The miller Ansel Brandt died. {filler}");
    let words = 4 * WINDOW;
    let meant = all_of(&[&told], "Ansel Brandt, the miller");
    let part = &meant.parts.unwrap()[0];
    assert_eq!(only(&part.tokens), words..words + 5);
    assert_eq!(only(&part.around), words..words + WINDOW + 1);
    // Without a full stop a sentence ends somewhere, too.
    let endless = "word ".repeat(1000);
    assert_eq!(Spoken::of(&endless).passages.len(), 1000 / LONGEST);
}

#[test]
fn what_is_told_but_has_no_tokens_yet_is_known() {
    let mut spoken = Spoken::of("The miller Ansel Bra");
    spoken.ahead("ndt died");
    let strength =
        |spoken: &Spoken| meant(&[spoken], &Asked::new(["Brandt died"].into_iter(), None)).strength;
    assert_eq!(strength(&spoken), 1.0);
    spoken.ahead("");
    assert_eq!(strength(&spoken), 0.0);
    spoken.hear("ndt", 1);
    spoken.hear(" died", 1);
    spoken.ahead("");
    assert_eq!(strength(&spoken), 1.0);
}

#[test]
fn of_a_long_message_so_many_words_are_looked_up() {
    let words = |count: usize| -> String { (0..count).map(|n| format!("{n}x ")).collect() };
    for (count, kept) in [(5000, super::WORDS), (90, 90)] {
        let message = words(count);
        let asked = Asked::new([message.as_str()].into_iter(), None);
        assert_eq!(asked.messages[0].len(), kept);
    }
}

#[test]
fn what_a_document_takes_is_bounded_by_its_words() {
    let text: String = (0..2000).map(|n| format!("label{n}: {n}x\n")).collect();
    let spoken = Spoken::of(&text);
    let kept: usize = spoken
        .passages
        .iter()
        .map(|passage| passage.words.len())
        .sum();
    assert!(kept + spoken.open.len() <= 4000);
    assert_eq!(spoken.labels.len(), super::LABELS);
    let heard = Listener::default().hear(&"a".repeat(100_000));
    assert!(heard.words.is_empty() && format!("{heard:?}").len() < 400);
}

proptest! {
    /// However a text is told, it speaks of the same.
    #[test]
    fn chunks_say_what_the_whole_says(words in prop::collection::vec("[ \n][a-zA-Z0-9:東]{1,6}[.,!]?", 0..40), cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..6)) {
        let mut bounds: Vec<usize> = cuts.into_iter().map(|cut| cut.index(words.len() + 1)).collect();
        bounds.extend([0, words.len()]);
        bounds.sort_unstable();
        let mut spoken = Spoken::default();
        for pair in bounds.windows(2) {
            let mut onward = spoken.onward();
            for word in &words[pair[0]..pair[1]] {
                onward.hear(word, 1);
            }
            onward.ahead("");
            spoken.extend(onward);
        }
        let mut whole = Spoken::of(&words.concat());
        whole.ahead("");
        prop_assert_eq!(spoken, whole);
    }
}
