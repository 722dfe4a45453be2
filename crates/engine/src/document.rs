//! A document: its tokens, and what is kept of it once it is read.
//!
//! The tokens are kept to be read again: after its KV was evicted, or when a sequential session forgets. Start at
//! [`Document`].

use generator::State;

use crate::{
    digest::DocumentName,
    ids::{DocumentId, TokenId},
    traces::HeldTrace,
};

/// A place in a session's log: before the token of this index of the document of this number. The end of a complete
/// document is the beginning of the next number, so that a forgotten document leaves all places in order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Place {
    pub(crate) document: u64,
    pub(crate) token: usize,
}

/// A document of a session.
#[derive(Debug)]
pub(crate) struct Document {
    pub(crate) id: DocumentId,
    /// Its number in the session, never used again.
    pub(crate) number: u64,
    pub(crate) tokens: Vec<TokenId>,
    /// Whether its end has come.
    pub(crate) complete: bool,
    /// The first so many tokens have been reported as encoded.
    pub(crate) reported: usize,
    /// Its sums once it is complete and read, where they are needed for forgetting another one.
    pub(crate) state: Option<State>,
    /// What its tokens wrote, once it is complete and read, where there is room for that.
    pub(crate) trace: Option<HeldTrace>,
    /// Whether it had a trace when that left memory.
    pub(crate) traced: bool,
    /// Of its tokens, once it is complete and read.
    pub(crate) hash: DocumentName,
}

impl Document {
    pub(crate) fn new(id: DocumentId, number: u64) -> Self {
        let (tokens, hash) = (Vec::new(), DocumentName::default());
        Self {
            id,
            number,
            tokens,
            complete: false,
            reported: 0,
            state: None,
            trace: None,
            traced: false,
            hash,
        }
    }

    /// The place behind all that has come of it.
    pub(crate) fn end(&self) -> Place {
        if self.complete {
            Place {
                document: self.number + 1,
                token: 0,
            }
        } else {
            Place {
                document: self.number,
                token: self.tokens.len(),
            }
        }
    }

    /// Tokens that have not been reported as encoded.
    pub(crate) fn waiting(&self) -> usize {
        self.tokens.len() - self.reported
    }

    /// An independent copy.
    pub(crate) fn try_clone(&self) -> Result<Self, generator::Error> {
        let state = match &self.state {
            Some(state) => Some(state.try_clone()?),
            None => None,
        };
        Ok(Self {
            id: self.id,
            number: self.number,
            tokens: self.tokens.clone(),
            complete: self.complete,
            reported: self.reported,
            state,
            trace: self.trace.clone(),
            traced: self.traced,
            hash: self.hash,
        })
    }
}
