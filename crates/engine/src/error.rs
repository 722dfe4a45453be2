//! What can go wrong, a variant for each thing that a caller can act on.
//!
//! A bad command is an event with a [`RequestError`] or [`SessionError`]; [`Error`] means an engine that cannot load or is broken.

use crate::ids::{DocumentId, SessionId, TokenId};

/// The engine cannot be loaded, or is broken.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A bound that cannot work.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The model could not be loaded, or a forward failed.
    #[error(transparent)]
    Lm(#[from] lm::Error),
    /// The generator could not be loaded, or a state could not be computed.
    #[error(transparent)]
    Generator(#[from] generator::Error),
    /// The machine that runs the forwards failed.
    #[error("the machine failed: {detail}")]
    Machine {
        /// Its words.
        detail: String,
    },
    /// Logits could not be read.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
}

/// A field of `Config` is out of its range.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field} is {value}; it must be from {least} to {most}")]
pub struct ConfigError {
    /// The field.
    pub field: &'static str,
    /// Its value.
    pub value: usize,
    /// The least that works.
    pub least: usize,
    /// The most that works.
    pub most: usize,
}

/// Why a request has no answer.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum RequestError {
    /// No open session has this name.
    #[error("there is no session {session}")]
    UnknownSession {
        /// The name.
        session: SessionId,
    },
    /// The session was closed while the request waited or ran.
    #[error("session {session} was closed")]
    SessionClosed {
        /// The session.
        session: SessionId,
    },
    /// The session was not in memory, and could not be brought back. A later request tries again.
    #[error("session {session} could not be brought back: {reason}")]
    NotRestored {
        /// The session.
        session: SessionId,
        /// Why.
        reason: String,
    },
    /// Another request under way has this id.
    #[error("a request of this id is under way")]
    RequestExists,
    /// The prompt (with its continuation, where one is given) does not fit the model's context.
    #[error("{tokens} tokens do not fit the model's context of {limit}")]
    ContextLength {
        /// Tokens asked for.
        tokens: usize,
        /// The model's context length.
        limit: usize,
    },
    /// The request could never fit the KV cache.
    #[error("{tokens} tokens do not fit the cache of {limit}")]
    CacheLength {
        /// Tokens asked for.
        tokens: usize,
        /// Tokens that the cache holds.
        limit: usize,
    },
    /// A token id is not of the vocabulary.
    #[error("token {} is not below the vocabulary size {vocab}", token.0)]
    TokenOutOfRange {
        /// The id.
        token: TokenId,
        /// Size of the vocabulary.
        vocab: usize,
    },
    /// A prompt needs at least one token.
    #[error("the prompt is empty")]
    EmptyPrompt,
    /// A score needs at least one continuation.
    #[error("there is no continuation to score")]
    NoContinuation,
    /// A continuation needs at least one token.
    #[error("continuation {index} is empty")]
    EmptyContinuation {
        /// Which one, from 0.
        index: usize,
    },
    /// A sampling value (or the adapter's scale) is out of its range.
    #[error("{field} is {value}; it must be {range}")]
    Sampling {
        /// The field.
        field: &'static str,
        /// Its value.
        value: f32,
        /// What it must be.
        range: &'static str,
    },
    /// The session has no adapter yet: nothing has been published, or all is forgotten.
    #[error("session {session} has no adapter to export")]
    NoVersion {
        /// The session.
        session: SessionId,
    },
    /// The engine runs without a generator.
    #[error("there is no generator; only the bare model answers")]
    NoGenerator,
    /// The request was cancelled.
    #[error("the request was cancelled")]
    Cancelled,
    /// The version could not be exported.
    #[error("export: {reason}")]
    Export {
        /// Why.
        reason: String,
    },
}

/// Why a session's command could not be done.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SessionError {
    /// No open session has this name.
    #[error("there is no session {session}")]
    UnknownSession {
        /// The name.
        session: SessionId,
    },
    /// An open session has this name already.
    #[error("there is a session {session} already")]
    SessionExists {
        /// The name.
        session: SessionId,
    },
    /// The bound on open sessions is reached.
    #[error("there are {limit} sessions, and no more are allowed")]
    TooManySessions {
        /// `Config::max_sessions`.
        limit: usize,
    },
    /// The engine runs without a generator: a session could not take anything in.
    #[error("there is no generator; sessions need one")]
    NoGenerator,
    /// A window's size is out of its range.
    #[error("a window of {tokens} tokens; it must be from {least} to {limit}")]
    Window {
        /// The size.
        tokens: usize,
        /// The least size in which a token writes.
        least: usize,
        /// The largest that the model's context and the KV cache hold.
        limit: usize,
    },
    /// The session has no such document (any more).
    #[error("there is no document {document}")]
    UnknownDocument {
        /// The document.
        document: DocumentId,
    },
    /// The document has ended or was forgotten; it takes no more tokens.
    #[error("document {document} is closed")]
    DocumentClosed {
        /// The document.
        document: DocumentId,
    },
    /// A document begins while another one is open.
    #[error("document {open} has not ended")]
    DocumentOpen {
        /// The open document.
        open: DocumentId,
    },
    /// Provisional tokens came while no document is open.
    #[error("no document is open")]
    NoOpenDocument,
    /// With strategy concat a document is one window, and this one does not fit it.
    #[error("a document of {tokens} tokens; strategy concat holds {limit}")]
    DocumentTooLong {
        /// Tokens of the document, those asked for included.
        tokens: usize,
        /// The largest that the model's context and the KV cache hold.
        limit: usize,
    },
    /// The bound on a session's documents is reached.
    #[error("the session has {limit} documents, and no more are allowed")]
    TooManyDocuments {
        /// `Config::max_documents`.
        limit: usize,
    },
    /// The bound on tokens is reached.
    #[error("{tokens} context tokens, and {limit} are allowed")]
    TooManyTokens {
        /// Tokens, those asked for included.
        tokens: usize,
        /// `Config::max_session_tokens`, or `Config::max_queued_tokens` for one chunk.
        limit: usize,
    },
    /// The bound on the states of all sessions is reached.
    #[error("the states would take {bytes} bytes, and {limit} are allowed")]
    StateBudget {
        /// Bytes, those asked for included.
        bytes: usize,
        /// `Config::state_budget_bytes`.
        limit: usize,
    },
    /// The bound on the cores of all versions is reached: this version is not published. What it holds is not lost; the next one
    /// has it.
    #[error("the cores would take {bytes} bytes, and {limit} are allowed")]
    CoreBudget {
        /// Bytes, those asked for included.
        bytes: usize,
        /// `Config::core_budget_bytes`.
        limit: usize,
    },
    /// The session's state could not be read out, so it takes no more context. Requests go on with its newest version;
    /// closing it is all that is left to do.
    #[error("the state cannot be read out: {reason}")]
    ReadOut {
        /// What the generator says.
        reason: String,
    },
    /// A token id is not of the vocabulary.
    #[error("token {} is not below the vocabulary size {vocab}", token.0)]
    TokenOutOfRange {
        /// The id.
        token: TokenId,
        /// Size of the vocabulary.
        vocab: usize,
    },
}

impl SessionError {
    /// What a state could not do.
    pub(crate) fn from_state(error: &generator::Error) -> Self {
        Self::ReadOut {
            reason: error.to_string(),
        }
    }
}
