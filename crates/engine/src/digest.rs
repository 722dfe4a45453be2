//! State digests: names of states that do not depend on how they were reached.
//!
//! blake3 over base, generator, strategy, window and the documents' tokens, every part with its length, so that
//! different parts never read alike. Chunks, flushes, seqs and the names of documents are no part of it, nor
//! are documents without a token: they add nothing. Start at [`StateHash`].

#[cfg(test)]
mod tests;

use std::ops::Range;

use generator::{Gate, Strategy};

use crate::ids::{Digest, TokenId};

/// The hash of a document's tokens so far.
#[derive(Clone, Debug, Default)]
pub(crate) struct DocumentHash {
    hasher: blake3::Hasher,
    tokens: u64,
}

impl DocumentHash {
    pub(crate) fn push(&mut self, tokens: &[TokenId]) {
        for token in tokens {
            self.hasher.update(&token.0.to_le_bytes());
        }
        self.tokens += tokens.len() as u64;
    }

    /// As if the document ended here.
    pub(crate) fn name(&self) -> DocumentName {
        DocumentName {
            hash: *self.hasher.finalize().as_bytes(),
            tokens: self.tokens,
        }
    }
}

/// The hash of a whole document's tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct DocumentName {
    hash: [u8; 32],
    tokens: u64,
}

impl DocumentName {
    pub(crate) fn tokens(&self) -> usize {
        usize::try_from(self.tokens).unwrap_or(usize::MAX)
    }
}

/// The hash of a state: the fixed parts first, then document by document.
#[derive(Clone, Debug)]
pub(crate) struct StateHash(blake3::Hasher);

impl StateHash {
    /// `base` and `generator` are the digests of the two, `window` the tokens in a window.
    pub(crate) fn new(base: &str, generator: &str, strategy: Strategy, window: usize) -> Self {
        let mut hasher = blake3::Hasher::new();
        for part in ["imprint state 1", base, generator, strategy_name(strategy)] {
            hasher
                .update(&(part.len() as u64).to_le_bytes())
                .update(part.as_bytes());
        }
        hasher.update(&(window as u64).to_le_bytes());
        Self(hasher)
    }

    pub(crate) fn push(&mut self, document: &DocumentName) {
        if document.tokens > 0 {
            self.0
                .update(&document.tokens.to_le_bytes())
                .update(&document.hash);
        }
    }

    /// That of the document before it these tokens alone count, with this weight.
    pub(crate) fn push_part(&mut self, tokens: &[Range<usize>], weight: f32) {
        self.0
            .update(&u64::MAX.to_le_bytes())
            .update(&(tokens.len() as u64).to_le_bytes())
            .update(&weight.to_le_bytes());
        for range in tokens {
            self.0
                .update(&(range.start as u64).to_le_bytes())
                .update(&(range.end as u64).to_le_bytes());
        }
    }

    /// The name of a state that is held back by this gate.
    pub(crate) fn gated(gate: &Gate, state: &Digest) -> Digest {
        let mut hasher = blake3::Hasher::new();
        hasher
            .update(b"imprint gated state 1")
            .update(&gate.digest())
            .update(&state.0);
        Digest(*hasher.finalize().as_bytes())
    }

    pub(crate) fn finish(&self) -> Digest {
        Digest(*self.0.finalize().as_bytes())
    }
}

fn strategy_name(strategy: Strategy) -> &'static str {
    match strategy {
        Strategy::Concat => "concat",
        Strategy::Parallel => "parallel",
        Strategy::Sequential => "sequential",
    }
}
