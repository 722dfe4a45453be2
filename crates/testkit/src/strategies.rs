//! Texts that tokenizers find hard, and ways to cut a sequence into chunks.
//!
//! A cut is drawn before the length is known ([`proptest::sample::Index`]), so that a failing case
//! shrinks its text and its cuts apart from each other.

use proptest::{collection::vec, prelude::*, sample::Index};

/// Pieces at which pre-tokenizers, normalisers and byte-level decoding go wrong.
const PIECES: &[&str] = &[
    "'s",
    "'t",
    "'re",
    "'ve",
    "'m",
    "'ll",
    "'d",
    "'S",
    "'LL",
    "'",
    "''",
    "’s",
    "can't",
    "we'll've",
    "it's",
    " 's",
    "'l",
    "l",
    ".",
    ",",
    "!",
    "?",
    "...",
    "?!",
    "--",
    " - ",
    "(",
    ")",
    "[1]",
    "{x}",
    "<",
    ">",
    "/",
    "\\",
    "\"",
    "_",
    "__init__",
    "=>",
    "!=",
    "<|im_start|>",
    "<|im_end|>",
    "<s>",
    "</s>",
    "<unk>",
    "<|",
    "<0x0A>",
    "▁",
    "▁the",
    "\u{0}",
    "\u{7f}",
    "\u{a0}",
    "\u{2028}",
    "\u{3000}",
    "\u{200b}",
    "\u{200d}",
    "\u{feff}",
    "\u{fffd}",
    "\u{301}",
    "e\u{301}",
    "é",
    "ﬁ",
    "Å",
    "\u{212b}",
    "ẞ",
    "\u{1100}",
    "\u{1161}",
    "\u{11a8}",
    "한국어",
    "日本語",
    "中文。",
    "、",
    "ไทย",
    "हिन्दी",
    "עברית",
    "مرحبا",
    "٣٤",
    "Ⅷ",
    "½",
    "²",
    "🦀",
    "👩‍👩‍👧",
    "🇫🇷",
    "👍🏽",
    "\u{10ffff}",
    "\u{1d49c}",
];

fn piece() -> impl Strategy<Value = String> {
    prop_oneof![
        4 => "[a-zA-Z]{1,12}",
        3 => " [a-z]{1,8}",
        2 => "[0-9]{1,7}",
        3 => "[ ]{1,9}",
        2 => "[ \t\r\n]{1,6}",
        2 => "\n{1,4}",
        2 => "[\\p{L}\\p{N}\\p{M}]{1,5}",
        2 => "[!-/:-@]{1,5}",
        5 => proptest::sample::select(PIECES).prop_map(str::to_owned),
        1 => "\\PC{1,6}",
        1 => any::<char>().prop_map(String::from),
    ]
}

/// A text of any script: words, contractions, digits, runs of spaces and newlines, combining marks, emoji, control
/// characters and the spellings of special tokens.
pub fn text() -> impl Strategy<Value = String> {
    vec(piece(), 0..24).prop_map(|pieces| pieces.concat())
}

/// Where to cut a sequence, for [`cut`] and [`cut_text`]: no cut at all, a few, or many.
pub fn cuts() -> impl Strategy<Value = Vec<Index>> {
    prop_oneof![vec(any::<Index>(), 0..6), vec(any::<Index>(), 0..64)]
}

/// The sequence in pieces, in order; pieces may be empty, their concatenation is the whole.
#[must_use]
pub fn cut<'a, T>(whole: &'a [T], cuts: &[Index]) -> Vec<&'a [T]> {
    let ends = ends(whole.len(), cuts);
    ends.windows(2)
        .map(|pair| &whole[pair[0]..pair[1]])
        .collect()
}

/// The text in pieces, in order, cut between characters; pieces may be empty, their concatenation is the whole.
#[must_use]
pub fn cut_text<'a>(whole: &'a str, cuts: &[Index]) -> Vec<&'a str> {
    let ends = ends(whole.len(), cuts)
        .into_iter()
        .map(|end| whole.floor_char_boundary(end));
    let ends: Vec<usize> = ends.collect();
    ends.windows(2)
        .map(|pair| &whole[pair[0]..pair[1]])
        .collect()
}

/// 0, the cuts in order, and the length.
fn ends(length: usize, cuts: &[Index]) -> Vec<usize> {
    let mut ends: Vec<usize> = cuts.iter().map(|cut| cut.index(length + 1)).collect();
    ends.extend([0, length]);
    ends.sort_unstable();
    ends
}

#[cfg(test)]
mod tests {
    use super::*;

    proptest! {
        #[test]
        fn pieces_make_the_whole(whole in text(), cuts in cuts()) {
            prop_assert_eq!(cut_text(&whole, &cuts).concat(), whole.clone());
            prop_assert_eq!(cut(whole.as_bytes(), &cuts).concat(), whole.as_bytes());
        }
    }
}
