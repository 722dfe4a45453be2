//! How texts are split before they are encoded: the pre-tokenizers that GGUF files name, and the
//! regular expressions whose safe cuts are known.
//!
//! The expressions are facts of the models' tokenizer.json files; names and meanings of
//! `tokenizer.ggml.pre` are llama.cpp's (`src/llama-vocab.cpp`). Start at [`named`].

use serde_json::{Value, json};

pub(super) const GPT2: &str =
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
pub(super) const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
pub(super) const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const O200K: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// llama.cpp's own split for files that name none, one stage after the other; GPT-2's is its second.
const DEFAULT_STAGES: [&str; 4] = [r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"];

/// Expressions with these two properties, on which `boundary` builds. No match runs on from a character that is not
/// whitespace into a space, from a letter or digit into a newline, or from a letter into punctuation other than an
/// apostrophe. And what is matched before such a place does not depend on what follows it, nor the other way round:
/// there is no look-behind, and the only look-ahead, `\s+(?!\S)`, sees one character, behind whitespace.
pub(super) const SPLITTING: [&str; 5] = [GPT2, LLAMA3, QWEN2, TEKKEN, O200K];

/// Expressions that only split runs of one kind of character off, and so never join what others split.
pub(super) const ISOLATING: [&str; 4] = [
    r"[\p{P}\$\+<=>\^~\|]+",
    r"\p{N}+",
    r"\p{N}",
    "[0-9][0-9][0-9]",
];

/// A split that a GGUF file names.
pub(super) struct Named {
    /// The stages, as tokenizer.json would write them.
    pub(super) pre_tokenizer: Value,
    /// The normaliser of the models that use it.
    pub(super) normalizer: Value,
    /// A word that is a token is not put together by merges.
    pub(super) ignore_merges: bool,
    /// Whether a file that does not say puts a BOS in front.
    pub(super) adds_bos: bool,
}

/// The split behind a name of `tokenizer.ggml.pre`, if it is one that we know.
pub(super) fn named(pre: &str) -> Option<Named> {
    let plain = |stages: &[&str]| Named {
        pre_tokenizer: sequence(stages),
        normalizer: Value::Null,
        ignore_merges: false,
        adds_bos: false,
    };
    Some(match pre {
        "default" => plain(&DEFAULT_STAGES),
        "gpt-2" | "phi-2" | "olmo" | "jais" | "mpt" => plain(&[GPT2]),
        "smollm" | "starcoder" | "refact" | "command-r" | "codeshell" | "exaone" | "minerva-7b" => {
            plain(&[r"\p{N}", GPT2])
        }
        "llama3" | "llama-v3" | "llama-bpe" | "falcon3" => Named {
            ignore_merges: true,
            adds_bos: true,
            ..plain(&[LLAMA3])
        },
        "qwen2" | "deepseek-r1-qwen" => Named {
            normalizer: json!({"type": "NFC"}),
            ..plain(&[QWEN2])
        },
        "tekken" => Named {
            ignore_merges: true,
            adds_bos: true,
            ..plain(&[TEKKEN])
        },
        "gpt-4o" | "llama4" => plain(&[O200K]),
        _ => return None,
    })
}

/// Splits one after the other, then bytes as letters.
fn sequence(stages: &[&str]) -> Value {
    let mut stages: Vec<Value> = stages.iter().map(|stage| split(stage)).collect();
    stages.push(byte_level());
    json!({"type": "Sequence", "pretokenizers": stages})
}

pub(super) fn split(pattern: &str) -> Value {
    json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false})
}

pub(super) fn byte_level() -> Value {
    json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false})
}
