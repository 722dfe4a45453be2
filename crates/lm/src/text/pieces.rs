//! Tokens back to text, as they come.
//!
//! Every token of a vocabulary has its bytes in one table; a text is their concatenation, read as
//! UTF-8. Special tokens are spelled out. Start at [`TextDecoder::push`].

#[cfg(test)]
mod tests;

use std::sync::Arc;

use serde_json::Value;
use tokenizers::{Model, Tokenizer};

use super::{Error, Inner, TokenId, boundary::stages};

/// No vocabulary has more: the largest of today have some 260,000 tokens.
const MAX_VOCAB: usize = 1 << 22;

/// The bytes of every token.
pub(super) struct Pieces {
    bytes: Vec<u8>,
    /// Where each token's bytes end; they begin where the one's before end.
    ends: Vec<usize>,
    /// The first space of a text was put there by the tokenizer.
    strips_first_space: bool,
}

/// How tokens spell bytes.
enum Spelling {
    /// GPT-2's letters for bytes.
    ByteLevel,
    /// ▁ for a space, and tokens such as `<0x0A>` for a byte if `byte_tokens`.
    Marked { byte_tokens: bool },
}

impl Pieces {
    /// Reads the vocabulary with the decoder of tokenizer.json.
    pub(super) fn new(tokenizer: &Tokenizer, decoder: &Value) -> Result<Self, Error> {
        let (spelling, strips_first_space) = spelling(decoder)?;
        let added = tokenizer.get_added_vocabulary().get_added_tokens_decoder();
        let vocab = tokenizer.get_vocab(true);
        let largest = vocab.values().copied().chain(added.keys().copied()).max();
        let size = largest.map_or(0, |largest| largest as usize + 1);
        if size > MAX_VOCAB {
            return Err(Error::Tokenizer {
                what: format!("a token id of {} (at most {MAX_VOCAB} tokens)", size - 1),
            });
        }
        let letters = byte_letters();
        let (mut bytes, mut ends) = (Vec::new(), Vec::with_capacity(size));
        for id in 0..size as u32 {
            if let Some(token) = added.get(&id) {
                bytes.extend_from_slice(token.content.as_bytes());
            } else if let Some(token) = tokenizer.get_model().id_to_token(id) {
                match spelling {
                    Spelling::ByteLevel => push_letters(&token, &letters, &mut bytes),
                    Spelling::Marked { byte_tokens } => match byte_of(&token) {
                        Some(byte) if byte_tokens => bytes.push(byte),
                        _ => bytes.extend_from_slice(token.replace('▁', " ").as_bytes()),
                    },
                }
            }
            ends.push(bytes.len());
        }
        Ok(Self {
            bytes,
            ends,
            strips_first_space,
        })
    }

    /// Ids are below this.
    pub(super) fn vocab_size(&self) -> usize {
        self.ends.len()
    }

    fn bytes(&self, token: TokenId) -> Result<&[u8], Error> {
        let id = token.0 as usize;
        let unknown = Error::UnknownToken {
            token,
            vocab: self.vocab_size(),
        };
        let end = *self.ends.get(id).ok_or(unknown)?;
        let start = if id == 0 { 0 } else { self.ends[id - 1] };
        Ok(&self.bytes[start..end])
    }
}

/// The spelling behind a decoder, and whether it strips the first space.
fn spelling(decoder: &Value) -> Result<(Spelling, bool), Error> {
    let (mut spelling, mut strips) = (None, false);
    let mut byte_tokens = false;
    for stage in stages(decoder, "decoders") {
        match stage["type"].as_str().unwrap_or("none") {
            "ByteLevel" => spelling = Some(Spelling::ByteLevel),
            "Metaspace" if stage["replacement"] == "▁" => {
                spelling = Some(Spelling::Marked { byte_tokens: false });
                strips |= stage["prepend_scheme"] != "never";
            }
            "Replace" if stage["pattern"]["String"] == "▁" && stage["content"] == " " => {
                spelling = Some(Spelling::Marked { byte_tokens: false });
            }
            "ByteFallback" => byte_tokens = true,
            "Fuse" => {}
            "Strip" if stage["content"] == " " && stage["stop"] == 0 => {
                strips |= stage["start"] != 0
            }
            other => {
                return Err(Error::Unsupported {
                    what: format!("the decoder {other} of a tokenizer"),
                });
            }
        }
    }
    match spelling {
        Some(Spelling::ByteLevel) => Ok((Spelling::ByteLevel, false)),
        Some(Spelling::Marked { .. }) => Ok((Spelling::Marked { byte_tokens }, strips)),
        None => Err(Error::Unsupported {
            what: "a tokenizer without a decoder".into(),
        }),
    }
}

/// The byte that a token such as `<0x0A>` stands for.
fn byte_of(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    if digits.len() == 2 {
        u8::from_str_radix(digits, 16).ok()
    } else {
        None
    }
}

/// Byte + 1 by letter (0: none), for the letters below U+0144 that GPT-2 spells bytes with: a byte that prints is
/// itself, the others are U+0100 and on, in order.
pub(super) fn byte_letters() -> [u16; 0x144] {
    let mut letters = [0; 0x144];
    let mut next = 0x100;
    for byte in 0..=255_u8 {
        let prints = matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
        let letter = if prints { usize::from(byte) } else { next };
        next += usize::from(!prints);
        letters[letter] = u16::from(byte) + 1;
    }
    letters
}

/// The bytes that a token spells; one with a character that spells none stands for itself.
fn push_letters(token: &str, letters: &[u16; 0x144], bytes: &mut Vec<u8>) {
    let byte = |c: char| {
        letters
            .get(c as usize)
            .and_then(|&letter| letter.checked_sub(1))
            .and_then(|byte| u8::try_from(byte).ok())
    };
    match token.chars().map(byte).collect::<Option<Vec<u8>>>() {
        Some(spelled) => bytes.extend(spelled),
        None => bytes.extend_from_slice(token.as_bytes()),
    }
}

/// Incremental detokenisation: text is returned once it is whole UTF-8.
///
/// The concatenation equals `decode` of all tokens. Bytes that can no longer become UTF-8 are U+FFFD.
#[derive(Clone)]
pub struct TextDecoder {
    inner: Arc<Inner>,
    /// The first bytes of a character, three at most.
    held: Vec<u8>,
    strips_space: bool,
}

impl TextDecoder {
    pub(super) fn new(inner: Arc<Inner>) -> Self {
        let strips_space = inner.pieces.strips_first_space;
        Self {
            inner,
            held: Vec::new(),
            strips_space,
        }
    }

    /// Takes a token and returns the text that is whole with it, which may be empty.
    ///
    /// # Errors
    /// [`Error::UnknownToken`] if the vocabulary has no such token; nothing changes then.
    pub fn push(&mut self, token: TokenId) -> Result<String, Error> {
        let mut bytes = self.inner.pieces.bytes(token)?;
        if self.strips_space && !bytes.is_empty() {
            bytes = bytes.strip_prefix(b" ").unwrap_or(bytes);
            self.strips_space = false;
        }
        self.held.extend_from_slice(bytes);
        let mut text = String::new();
        let mut whole = 0;
        for chunk in self.held.utf8_chunks() {
            text.push_str(chunk.valid());
            whole += chunk.valid().len();
            let invalid = chunk.invalid();
            let last = whole + invalid.len() == self.held.len();
            if last && is_unfinished(invalid) {
                break;
            }
            if !invalid.is_empty() {
                text.push(char::REPLACEMENT_CHARACTER);
                whole += invalid.len();
            }
        }
        self.held.drain(..whole);
        Ok(text)
    }

    /// What is left: U+FFFD for a character that never became whole, else nothing.
    ///
    /// # Errors
    /// None today; the tokens have been checked as they came.
    pub fn finish(self) -> Result<String, Error> {
        Ok(String::from_utf8_lossy(&self.held).into_owned())
    }
}

/// Whether more bytes could make a character of these.
fn is_unfinished(bytes: &[u8]) -> bool {
    std::str::from_utf8(bytes).is_err_and(|error| error.error_len().is_none())
}
