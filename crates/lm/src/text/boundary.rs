//! Where a text may be cut so that its parts are encoded as the whole would be.
//!
//! A cut is safe if no text behind it can change a token before it, nor the other way round. Which
//! places are safe follows from the tokenizer's stages, which are known by name and never guessed:
//! a tokenizer with an unknown stage has no safe cut. Start at [`Boundaries::of`].

use std::collections::HashMap;

use serde_json::Value;
use tokenizers::{ModelWrapper, models::bpe::BPE};

use super::patterns::{ISOLATING, SPLITTING};

/// The kinds of place that are safe cuts for a tokenizer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Boundaries {
    /// Between a character that is not whitespace and a space.
    space: bool,
    /// Between a letter or digit and a newline.
    newline: bool,
    /// Between a letter of CJK scripts and their punctuation.
    ideographic: bool,
}

impl Boundaries {
    /// The safe cuts of a tokenizer, its stages as tokenizer.json writes them.
    pub(super) fn of(normalizer: &Value, pre_tokenizer: &Value, model: &ModelWrapper) -> Self {
        let normalizers = stages(normalizer, "normalizers");
        let composes = |stage: &&Value| kind(stage) == "NFC";
        let prepends = |stage: &&Value| kind(stage) == "Prepend";
        let marks_spaces = |stage: &&Value| {
            kind(stage) == "Replace" && stage["pattern"]["String"] == " " && stage["content"] == "▁"
        };
        if !normalizers
            .iter()
            .all(|s| composes(s) || prepends(s) || marks_spaces(s))
        {
            return Self::default();
        }
        let pre_tokenizers = stages(pre_tokenizer, "pretokenizers");
        if let [stage] = pre_tokenizers[..]
            && kind(stage) == "Metaspace"
            && stage["replacement"] == "▁"
        {
            return Self::of_marked_spaces(model, stage["split"].as_bool().unwrap_or(true));
        }
        if pre_tokenizers.is_empty() && normalizers.iter().any(marks_spaces) {
            return Self::of_marked_spaces(model, false);
        }
        if normalizers.iter().all(composes) && splits_words(&pre_tokenizers) {
            return Self {
                space: true,
                newline: true,
                ideographic: true,
            };
        }
        Self::default()
    }

    /// Spaces become ▁, and the model sees either the words (`split`) or the text in one piece. In one piece, a cut is
    /// safe where no token spans it: then no merge does, and merges apart from each other do not interact.
    fn of_marked_spaces(model: &ModelWrapper, split: bool) -> Self {
        let ModelWrapper::BPE(bpe) = model else {
            return Self {
                space: split,
                ..Self::default()
            };
        };
        let vocab = bpe.get_vocab();
        let positional =
            bpe.get_continuing_subword_prefix().is_some() || bpe.end_of_word_suffix.is_some();
        let spans_space = |token: &String| {
            token
                .chars()
                .zip(token.chars().skip(1))
                .any(|(a, b)| a != '▁' && b == '▁')
        };
        let spans_newline = |token: &String| {
            ["\n", "<0x0A>"]
                .iter()
                .any(|n| token.len() > n.len() && token.contains(n))
        };
        let knows =
            |tokens: &HashMap<String, u32>| tokens.contains_key("▁") && has_all_bytes(bpe, tokens);
        Self {
            space: split || (!positional && knows(&vocab) && !vocab.keys().any(spans_space)),
            newline: !positional && knows(&vocab) && !vocab.keys().any(spans_newline),
            ideographic: false,
        }
    }

    /// Whether a text may be cut between these two characters.
    pub(super) fn between(self, before: char, after: char) -> bool {
        match after {
            ' ' => self.space && !before.is_whitespace() && before != '▁',
            '\n' => self.newline && is_plain_letter_or_digit(before),
            '\u{3001}' | '\u{3002}' | '\u{ff0c}' | '\u{ff01}' | '\u{ff1f}' | '\u{ff1a}'
            | '\u{ff1b}' | '\u{300c}' | '\u{300d}' => self.ideographic && is_cjk_letter(before),
            _ => false,
        }
    }
}

/// Every byte has a token: no text is unknown, so nothing is fused with its neighbours.
fn has_all_bytes(bpe: &BPE, vocab: &HashMap<String, u32>) -> bool {
    bpe.byte_fallback && (0..=255_u8).all(|byte| vocab.contains_key(&format!("<0x{byte:02X}>")))
}

/// Whether the stages are splits that we know, with one among them that parts words from each other.
fn splits_words(stages: &[&Value]) -> bool {
    let mut parts_words = false;
    for (index, stage) in stages.iter().enumerate() {
        match kind(stage) {
            "Digits" => {}
            "ByteLevel" => {
                // A space in front of every piece would be one in front of every part of a cut text.
                if stage["add_prefix_space"] == true && index > 0 {
                    return false;
                }
                parts_words |= stage["use_regex"].as_bool().unwrap_or(true);
            }
            "Split" => {
                if stage["behavior"] != "Isolated" || stage["invert"] == true {
                    return false;
                }
                let Some(pattern) = stage["pattern"]["Regex"].as_str() else {
                    return false;
                };
                if SPLITTING.contains(&pattern) {
                    parts_words = true;
                } else if !ISOLATING.contains(&pattern) {
                    return false;
                }
            }
            _ => return false,
        }
    }
    parts_words
}

/// The type of a stage; a name no stage has, if it has none.
fn kind(stage: &Value) -> &str {
    stage["type"].as_str().unwrap_or_default()
}

/// The stages of a normaliser, pre-tokenizer or decoder, sequences in sequences flattened; `key` holds a sequence's items.
pub(super) fn stages<'a>(stage: &'a Value, key: &str) -> Vec<&'a Value> {
    if stage.is_null() {
        return Vec::new();
    }
    match stage[key].as_array() {
        Some(items) if kind(stage) == "Sequence" => {
            items.iter().flat_map(|item| stages(item, key)).collect()
        }
        _ => vec![stage],
    }
}

/// Letters and digits that every normal form leaves a letter or digit, alone or behind anything.
fn is_plain_letter_or_digit(c: char) -> bool {
    c.is_ascii_alphanumeric()
        || is_cjk_letter(c)
        || matches!(c, '\u{c0}'..='\u{24f}' if c.is_alphabetic())
        || matches!(c, '\u{410}'..='\u{44f}')
}

/// Hiragana, Katakana, unified ideographs and Hangul syllables.
fn is_cjk_letter(c: char) -> bool {
    matches!(c, '\u{3041}'..='\u{3096}' | '\u{30a1}'..='\u{30fa}' | '\u{3400}'..='\u{4dbf}' | '\u{4e00}'..='\u{9fff}' | '\u{ac00}'..='\u{d7a3}')
}
