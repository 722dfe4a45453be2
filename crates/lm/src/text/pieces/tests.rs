//! Decoding token by token is decoding at once, also where a character ends in another token.

use proptest::prelude::*;

use super::*;
use crate::text::tests::{SMOLLM2, sentence_pieces, tokens};

proptest! {
    #[test]
    fn tokens_as_they_come_give_the_text_of_all_of_them(ids in proptest::collection::vec(prop_oneof![0..600u32, 0..49_152u32], 0..60)) {
        let all = tokens(&ids);
        let mut decoder = SMOLLM2.decoder();
        let mut bytes = Vec::new();
        let mut text = String::new();
        for &token in &all {
            bytes.extend_from_slice(SMOLLM2.inner.pieces.bytes(token).unwrap());
            text.push_str(&decoder.push(token).unwrap());
            prop_assert!(decoder.held.len() < 4);
            prop_assert!(String::from_utf8_lossy(&bytes).starts_with(&text));
        }
        text.push_str(&decoder.finish().unwrap());
        prop_assert_eq!(&text, &String::from_utf8_lossy(&bytes));
        prop_assert_eq!(&text, &SMOLLM2.decode(&all).unwrap());
    }

    #[test]
    fn a_text_comes_back_from_its_tokens(text in testkit::text()) {
        let pieces = sentence_pieces_once();
        // The mark for a space is a space to this kind of tokenizer.
        prop_assert_eq!(pieces.decode(&pieces.encode_plain(&text).unwrap()).unwrap(), text.replace('▁', " "));
        // The default model has no token for some bytes.
        let known: String = text.chars().filter(|c| c.is_ascii_graphic() || matches!(c, ' ' | '\n' | 'é' | '中' | '🦀')).collect();
        prop_assert_eq!(SMOLLM2.decode(&SMOLLM2.encode_plain(&known).unwrap()).unwrap(), known);
    }
}

fn sentence_pieces_once() -> &'static crate::text::Text {
    static TEXT: std::sync::LazyLock<crate::text::Text> =
        std::sync::LazyLock::new(|| sentence_pieces(true));
    &TEXT
}

#[test]
fn a_character_is_returned_once_it_is_whole_and_a_broken_one_once_it_cannot_be() {
    let pieces = sentence_pieces_once();
    let byte = |byte: u8| TokenId(3 + u32::from(byte));
    let mut decoder = pieces.decoder();
    let mut push = |b: u8| decoder.push(byte(b)).unwrap();
    assert_eq!(
        [push(0xf0), push(0x9f), push(0xa6), push(0x80)],
        ["", "", "", "🦀"]
    );
    assert_eq!([push(0xf0), push(0x9f), push(b'a')], ["", "", "\u{fffd}a"]);
    assert_eq!([push(0xff), push(0xc3)], ["\u{fffd}", ""]);
    assert_eq!(decoder.finish().unwrap(), "\u{fffd}");
}

#[test]
fn letters_spell_bytes_as_the_library_has_it() {
    use tokenizers::{PreTokenizedString, PreTokenizer, pre_tokenizers::byte_level::ByteLevel};
    let letters = byte_letters();
    let all: String = (0..=0x10_ffff)
        .step_by(97)
        .filter_map(char::from_u32)
        .chain((0..0x800).filter_map(char::from_u32))
        .collect();
    let mut words = PreTokenizedString::from(all.as_str());
    ByteLevel::new(false, false, false)
        .pre_tokenize(&mut words)
        .unwrap();
    let mut bytes = Vec::new();
    for (word, ..) in words.get_splits(
        tokenizers::OffsetReferential::Normalized,
        tokenizers::OffsetType::None,
    ) {
        push_letters(word, &letters, &mut bytes);
    }
    assert_eq!(bytes, all.as_bytes());
}
