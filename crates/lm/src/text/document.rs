//! A document's text, tokenised as it comes.
//!
//! Text is held back from the last safe cut (`boundary`) on, usually a word, and encoded once what
//! follows can no longer change it. Every byte is scanned and encoded once, so the cost is linear in the
//! text. Start at [`DocumentTokenizer::push`].

#[cfg(test)]
mod tests;

use std::sync::Arc;

use super::{Error, Inner, Pipeline, TokenId};

/// A text without a safe cut is cut after so many bytes (at the end of the last whole character), counted from its last
/// cut: the same places whatever the chunks. [`super::Text::encode_plain`] cuts there too.
pub const MAX_HELD_BYTES: usize = 1 << 16;

/// Segments are encoded in blocks of about so many bytes: memory does not grow with the text.
const BLOCK_BYTES: usize = 1 << 13;

/// Tokenises a document's text in any chunks; the concatenation of all tokens equals `encode_plain` of the whole text.
///
/// The text since the last safe cut is held back until more comes, [`MAX_HELD_BYTES`] at most. `clone` copies what is
/// held and shares the rest.
#[derive(Clone)]
pub struct DocumentTokenizer {
    inner: Arc<Inner>,
    /// Text of which no token has been returned.
    held: String,
    /// Whether `held` begins the text, which some tokenizers put a space in front of.
    at_start: bool,
    committed_bytes: usize,
    scan: Scan,
}

/// What has been seen of the held text.
#[derive(Clone, Copy, Default)]
struct Scan {
    /// Bytes of it that have been looked at.
    seen: usize,
    /// The last place where it may or must be cut.
    cut: usize,
    /// The character before `seen`.
    before: Option<char>,
}

impl DocumentTokenizer {
    /// `at_start`: whether the text begins here, as far as the tokenizer's prefix is concerned.
    pub(super) fn new(inner: Arc<Inner>, at_start: bool) -> Self {
        Self {
            inner,
            held: String::new(),
            at_start,
            committed_bytes: 0,
            scan: Scan::default(),
        }
    }

    /// Takes text and returns the tokens that no later text can change.
    ///
    /// # Errors
    /// If the tokenizer has no token for the text; nothing is taken then.
    pub fn push(&mut self, text: &str) -> Result<Vec<TokenId>, Error> {
        let length = self.held.len();
        self.held.push_str(text);
        match self.encode_up_to_last_cut() {
            Ok((tokens, scan)) => {
                self.commit(scan);
                Ok(tokens)
            }
            Err(error) => {
                self.held.truncate(length);
                Err(error)
            }
        }
    }

    /// Bytes of text whose tokens have all been returned.
    #[must_use]
    pub fn committed_bytes(&self) -> usize {
        self.committed_bytes
    }

    /// The tokens of what is held back plus `suffix`, as if the document ended here; changes nothing.
    ///
    /// # Errors
    /// If the tokenizer has no token for the text.
    pub fn provisional(&self, suffix: &str) -> Result<Vec<TokenId>, Error> {
        self.clone().finish(suffix)
    }

    /// Ends the document: the last tokens.
    ///
    /// # Errors
    /// If the tokenizer has no token for the text.
    pub fn finish(mut self, suffix: &str) -> Result<Vec<TokenId>, Error> {
        let mut tokens = self.push(suffix)?;
        self.inner
            .encode_segment(&self.held, self.pipeline(self.at_start), &mut tokens)?;
        Ok(tokens)
    }

    /// The text that is held.
    #[must_use]
    pub fn held(&self) -> &str {
        &self.held
    }

    /// Bytes held.
    #[must_use]
    pub fn held_bytes(&self) -> usize {
        self.held.len()
    }

    /// Tokens of the held text up to its last cut, and the scan at its end.
    fn encode_up_to_last_cut(&self) -> Result<(Vec<TokenId>, Scan), Error> {
        let (mut scan, mut start, mut tokens) = (self.scan, 0, Vec::new());
        let mut encode = |start: usize, end: usize| {
            let at_start = self.at_start && start == 0;
            self.inner
                .encode_segment(&self.held[start..end], self.pipeline(at_start), &mut tokens)
        };
        for c in self.held[scan.seen..].chars() {
            let at = scan.seen;
            let safe = scan
                .before
                .is_some_and(|before| self.inner.boundaries.between(before, c));
            let forced = !safe && at + c.len_utf8() - scan.cut > MAX_HELD_BYTES;
            if safe || forced {
                scan.cut = at;
            }
            // A safe cut need not be made, a forced one must.
            if forced || (safe && at - start >= BLOCK_BYTES) {
                encode(start, at)?;
                start = at;
            }
            scan.before = Some(c);
            scan.seen = at + c.len_utf8();
        }
        if scan.cut > start {
            encode(start, scan.cut)?;
        }
        Ok((tokens, scan))
    }

    /// Drops the text before the last cut.
    fn commit(&mut self, scan: Scan) {
        self.held.drain(..scan.cut);
        self.at_start &= scan.cut == 0;
        self.committed_bytes += scan.cut;
        self.scan = Scan {
            seen: scan.seen - scan.cut,
            cut: 0,
            before: scan.before,
        };
    }

    fn pipeline(&self, at_start: bool) -> &Pipeline {
        if at_start {
            &self.inner.first
        } else {
            &self.inner.inside
        }
    }
}
