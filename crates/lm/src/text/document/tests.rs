//! The law of streaming: any chunks give the tokens of the whole, for every kind of tokenizer, and those
//! are the library's own.

use std::sync::LazyLock;

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::text::{
    Text, patterns,
    tests::{SMOLLM2, ids, library, sentence_pieces, with_stages},
};

fn split_with(pre: &str) -> Text {
    let named = patterns::named(pre).unwrap();
    with_stages(named.normalizer, named.pre_tokenizer)
}

/// A split that is not known, before bytes as letters.
fn ends_in_bytes(pattern: &str) -> Value {
    json!({"type": "Sequence", "pretokenizers": [patterns::split(pattern), patterns::byte_level()]})
}

fn metaspace(scheme: &str, split: bool) -> Text {
    let source = sentence_pieces(true);
    let stage =
        json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": split});
    let inner = Arc::try_unwrap(source.inner).ok().unwrap();
    Text::new(crate::text::Source {
        tokenizer: inner.tokenizer,
        normalizer: Value::Null,
        pre_tokenizer: stage,
        decoder: json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": split}),
        bos: None,
        eos: None,
        adds_bos: false,
        template: None,
    })
    .unwrap()
}

/// One of each kind, by name.
static KINDS: LazyLock<Vec<Kind>> = LazyLock::new(|| {
    let kinds = [
        ("smollm2", SMOLLM2.clone()),
        ("gpt-2", split_with("gpt-2")),
        ("llama3", split_with("llama-bpe")),
        ("qwen2", split_with("qwen2")),
        ("tekken", split_with("tekken")),
        ("gpt-4o", split_with("gpt-4o")),
        ("llama.cpp's default", split_with("default")),
        (
            "a byte level with a space in front",
            with_stages(
                Value::Null,
                json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true}),
            ),
        ),
        ("sentence pieces", sentence_pieces(true)),
        ("sentence pieces without a prefix", sentence_pieces(false)),
        ("metaspace, first", metaspace("first", false)),
        ("metaspace, always, split", metaspace("always", true)),
        (
            "unknown stages",
            with_stages(json!({"type": "NFKC"}), ends_in_bytes(r"\S+|\s+")),
        ),
    ];
    kinds
        .into_iter()
        .map(|(name, text)| Kind {
            name,
            library: library(&text),
            text,
        })
        .collect()
});

struct Kind {
    name: &'static str,
    text: Text,
    /// What to compare with, the whole text at once.
    library: tokenizers::Tokenizer,
}

fn streamed(text: &Text, chunks: &[&str], suffix: &str) -> Vec<TokenId> {
    let mut document = text.document();
    let mut tokens = Vec::new();
    for chunk in chunks {
        tokens.extend(document.push(chunk).unwrap());
    }
    tokens.extend(document.finish(suffix).unwrap());
    tokens
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    #[test]
    fn any_chunks_give_the_tokens_of_the_whole(whole in testkit::text(), cuts in testkit::cuts()) {
        for Kind { name: kind, text, library } in KINDS.iter() {
            let expected = text.encode_plain(&whole).unwrap();
            let at_once = library.encode_fast(whole.as_str(), false).unwrap();
            prop_assert_eq!(ids(&expected), at_once.get_ids(), "the library on {}", kind);
            let got = streamed(text, &testkit::cut_text(&whole, &cuts), "");
            prop_assert_eq!(got, expected, "{}", kind);
        }
    }

    #[test]
    fn a_provisional_end_is_the_end_and_changes_nothing(whole in testkit::text(), cuts in testkit::cuts(), suffix in "(\n\n| \\.|)") {
        for Kind { name: kind, text, .. } in KINDS.iter() {
            let mut document = text.document();
            let (mut tokens, mut seen) = (Vec::new(), String::new());
            for chunk in testkit::cut_text(&whole, &cuts) {
                tokens.extend(document.push(chunk).unwrap());
                seen.push_str(chunk);
                let mut ended = tokens.clone();
                ended.extend(document.provisional(&suffix).unwrap());
                prop_assert_eq!(ended, text.encode_plain(&format!("{seen}{suffix}")).unwrap(), "{}", kind);
            }
            tokens.extend(document.finish("").unwrap());
            prop_assert_eq!(tokens, text.encode_plain(&whole).unwrap(), "{}", kind);
        }
    }
}

proptest! {
    // A long text at a time, each with one kind of tokenizer.
    #![proptest_config(ProptestConfig::with_cases(26))]

    #[test]
    fn any_chunks_of_a_long_text_give_the_tokens_of_the_whole(
        parts in proptest::collection::vec(testkit::text(), 100..200), runs in proptest::collection::vec((0..200usize, "[a ☃\n]", 1..90_000usize), 0..3), cuts in testkit::cuts(), kind in 0..13usize,
    ) {
        let mut parts = parts;
        for (at, c, length) in runs {
            let at = at % parts.len();
            parts[at] = c.repeat(length);
        }
        let (whole, Kind { name: kind, text, .. }) = (parts.concat(), &KINDS[kind]);
        let mut document = text.document();
        let mut tokens = Vec::new();
        for chunk in testkit::cut_text(&whole, &cuts) {
            tokens.extend(document.push(chunk).unwrap());
            prop_assert!(document.held_bytes() <= MAX_HELD_BYTES, "{} bytes held", document.held_bytes());
        }
        prop_assert_eq!(document.committed_bytes() + document.held_bytes(), whole.len());
        tokens.extend(document.finish("").unwrap());
        let expected = text.encode_plain(&whole).unwrap();
        prop_assert!(tokens == expected, "{kind}: other tokens in chunks");
    }
}

#[test]
fn every_neighbourhood_of_hard_pieces_gives_the_tokens_of_the_whole_character_by_character() {
    const HARD: [&str; 16] = [
        "a", "A", "'s", "'", "12", ".", "/", "。", "中", "\n", "\r", " ", "\t", "\u{301}", "▁",
        "<s>",
    ];
    for Kind {
        name,
        text,
        library,
    } in KINDS.iter()
    {
        for (index, first) in HARD.iter().enumerate() {
            for pair in 0..HARD.len() * HARD.len() {
                let (second, third) = (HARD[pair / HARD.len()], HARD[pair % HARD.len()]);
                // Behind a letter for one half of them, in front of one for the other.
                let whole = if (index + pair) % 2 == 0 {
                    format!("x{first}{second}{third}")
                } else {
                    format!("{first}{second}{third}x")
                };
                let chunks: Vec<&str> = whole.split_inclusive(|_: char| true).collect();
                let at_once = library.encode_fast(whole.as_str(), false).unwrap();
                assert_eq!(
                    ids(&streamed(text, &chunks, "")),
                    at_once.get_ids(),
                    "{name} on {whole:?}"
                );
            }
        }
    }
}

#[test]
fn every_known_kind_of_tokenizer_streams_word_by_word() {
    for Kind {
        name: kind, text, ..
    } in KINDS.iter()
    {
        let mut document = text.document();
        let tokens = document.push("It's the first and only sentence").unwrap();
        let expected = if *kind == "unknown stages" {
            ""
        } else {
            "It's the first and only"
        };
        assert_eq!(document.committed_bytes(), expected.len(), "{kind}");
        assert_eq!(
            text.decode(&tokens).unwrap().trim_start(),
            expected,
            "{kind}"
        );
    }
    let mut document = SMOLLM2.document();
    document.push("one\ntwo").unwrap();
    assert_eq!(document.held_bytes(), "\ntwo".len());
    document.push("中文。中").unwrap();
    assert_eq!(document.held_bytes(), "。中".len());
}

#[test]
fn a_text_without_a_safe_cut_is_cut_at_the_bound_whatever_the_chunks() {
    let whole = "☃".repeat(MAX_HELD_BYTES);
    let expected = SMOLLM2.encode_plain(&whole).unwrap();
    for size in [3, 300, 3 * 65_537] {
        let chunks: Vec<&str> = (0..whole.len())
            .step_by(size)
            .map(|at| &whole[at..whole.len().min(at + size)])
            .collect();
        assert_eq!(
            streamed(&SMOLLM2, &chunks, ""),
            expected,
            "chunks of {size}"
        );
    }
    let mut document = SMOLLM2.document();
    document.push(&whole).unwrap();
    // 21,845 characters of three bytes fit into 65,536.
    assert_eq!(document.committed_bytes() % 65_535, 0);
    assert!(document.committed_bytes() > 0);
}

#[test]
fn text_that_a_tokenizer_has_no_token_for_is_refused_and_nothing_is_taken() {
    // A BPE whose token for the unknown is not in its vocabulary.
    let model = tokenizers::models::bpe::BPE::builder()
        .vocab_and_merges([("a".to_owned(), 0), ("▁".to_owned(), 1)], vec![]);
    let stage =
        json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never", "split": true});
    let text = Text::new(crate::text::Source {
        tokenizer: tokenizers::Tokenizer::new(model.unk_token("<unk>".into()).build().unwrap()),
        normalizer: Value::Null,
        decoder: stage.clone(),
        pre_tokenizer: stage,
        bos: None,
        eos: None,
        adds_bos: false,
        template: None,
    })
    .unwrap();
    let mut document = text.document();
    assert_eq!(ids(&document.push("aa a").unwrap()), [0, 0]);
    assert!(matches!(
        document.push("a x a"),
        Err(crate::text::Error::Tokenizer { .. })
    ));
    assert_eq!((document.committed_bytes(), document.held_bytes()), (2, 2));
    assert_eq!(ids(&document.finish("a a").unwrap()), [1, 0, 0, 1, 0]);
}
