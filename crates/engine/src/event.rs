//! What the engine says.
//!
//! Events of a step come in the order in which they happened. Start at [`Event`].

use std::time::Duration;

use crate::error::{RequestError, SessionError};
use crate::ids::{Digest, DocumentId, RequestId, Seq, SessionId, TokenId, Version};
use crate::snapshot::{Need, Snapshot};

/// A thing that happened.
#[derive(Clone, Debug)]
pub enum Event {
    /// A session is open: a new one at version 0, a fork with what it copied.
    Opened {
        /// The session.
        session: SessionId,
        /// Its newest version.
        newest: Newest,
    },
    /// A version holds all chunks up to its `seq`. The version is new, unless nothing had come since the newest one.
    Applied {
        /// The session.
        session: SessionId,
        /// The version.
        newest: Newest,
    },
    /// All chunks up to this one are read, and what reading them took is free; the version that would hold them did not fit. If
    /// somebody had asked for it, `SessionFailed` follows.
    Read {
        /// The session.
        session: SessionId,
        /// The chunk.
        seq: Seq,
    },
    /// A session that is asked for is not in memory, and a snapshot of it was kept. Answered by `Restored`; until then what asks for it
    /// waits, and all else goes on.
    Wanted {
        /// The session.
        session: SessionId,
        /// The state that it is in.
        digest: Digest,
        /// What is needed of it.
        need: Need,
    },
    /// A session may leave memory soon, and reading its log again would cost more than keeping this. Answered by `Saved`; one that is not
    /// kept is read again.
    Save {
        /// The session.
        session: SessionId,
        /// What is to be kept.
        snapshot: Snapshot,
    },
    /// So many of the session's waiting context tokens no longer wait: encoded, refused or forgotten (flow control). Each ingested token is
    /// counted once.
    Encoded {
        /// The session.
        session: SessionId,
        /// The tokens.
        tokens: usize,
    },
    /// A document is forgotten from this version on.
    Forgotten {
        /// The session.
        session: SessionId,
        /// The document.
        document: DocumentId,
        /// The version.
        newest: Newest,
    },
    /// A session's command could not be done; nothing of it is applied.
    SessionFailed {
        /// The session.
        session: SessionId,
        /// The command.
        rejected: Rejected,
        /// Why.
        error: SessionError,
    },
    /// The next token of an answer.
    Token {
        /// The request.
        request: RequestId,
        /// The token.
        token: TokenId,
        /// Its log-probability, if asked for.
        logprob: Option<f32>,
        /// The likeliest tokens of its place, likeliest first, if asked for.
        top: Vec<(TokenId, f32)>,
    },
    /// An answer has ended.
    Finished {
        /// The request.
        request: RequestId,
        /// Why it ended.
        reason: Finish,
        /// The version that it ran with; 0 is the bare model.
        version: Version,
        /// Digest of that version's state; none for the bare model.
        digest: Option<Digest>,
        /// Tokens of the prompt.
        prompt_tokens: usize,
        /// Tokens drawn, the one that ended the answer not counted.
        completion_tokens: usize,
        /// Of the prompt's tokens those whose keys and values were there already.
        cached_tokens: usize,
        /// Context tokens in the version.
        context_tokens: usize,
        /// Where the time went.
        timings: Timings,
    },
    /// Continuations are scored.
    Scored {
        /// The request.
        request: RequestId,
        /// For each continuation its tokens, each with its log-probability given those before it.
        scores: Vec<Vec<(TokenId, f32)>>,
        /// For each continuation whether greedy decoding would have produced it.
        greedy: Vec<bool>,
        /// The version that scored them; 0 is the bare model.
        version: Version,
        /// Tokens of the prompt.
        prompt_tokens: usize,
        /// Of these the ones whose keys and values were there already.
        cached_tokens: usize,
    },
    /// A version as a PEFT LoRA.
    Exported {
        /// The request.
        request: RequestId,
        /// `adapter_config.json`.
        config_json: Vec<u8>,
        /// `adapter_model.safetensors`.
        safetensors: Vec<u8>,
        /// Rank of the LoRA.
        rank: usize,
        /// The version.
        version: Version,
        /// Digest of its state.
        digest: Digest,
    },
    /// A request could not be done or ended without an answer.
    Failed {
        /// The request.
        request: RequestId,
        /// Why.
        error: RequestError,
    },
}

/// A session's newest version, and what the session takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Newest {
    /// All chunks up to this one are in the version. Never falls.
    pub seq: Seq,
    /// The version; 0 is the bare model.
    pub version: Version,
    /// Digest of the version's state.
    pub digest: Digest,
    /// Context tokens in the version.
    pub tokens: usize,
    /// Bytes of the f32 sums that the session holds, all documents.
    pub state_bytes: usize,
    /// Bytes of what single tokens of its documents wrote.
    pub trace_bytes: usize,
    /// Bytes of the version's core, which is what serving needs.
    pub core_bytes: usize,
}

/// The command that a `SessionFailed` speaks of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rejected {
    /// An `Open`.
    Open,
    /// A `Fork` into this session.
    Fork {
        /// The session that was to be copied.
        from: SessionId,
    },
    /// An `Ingest`.
    Ingest {
        /// Its seq.
        seq: Seq,
    },
    /// A `Publish`.
    Publish {
        /// Its seq.
        seq: Seq,
    },
    /// A `Forget`.
    Forget {
        /// The document.
        document: DocumentId,
    },
}

/// Why an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// The model produced one of the request's end tokens.
    Eos,
    /// `max_tokens` were produced, or the model's context is full.
    Length,
    /// The request was cancelled.
    Cancelled,
}

/// Where the time of a request went, by the caller's clock.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Timings {
    /// From `push` to the first step that ran it.
    pub queue: Duration,
    /// From there to the first token.
    pub prefill: Duration,
    /// From there to the end.
    pub decode: Duration,
}
