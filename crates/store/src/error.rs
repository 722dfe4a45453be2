//! What a log refuses, one variant per thing that a caller can act on.

/// Why a log refuses.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// There is no such session.
    #[error("no session `{0}`")]
    UnknownSession(String),
    /// The session is there already.
    #[error("session `{0}` exists already")]
    SessionExists(String),
    /// The session has no such document, or has forgotten it.
    #[error("no document `{0}`")]
    UnknownDocument(String),
    /// Chunks before this one are missing.
    #[error("chunk {got} came where {want} is next")]
    Gap {
        /// The `seq` that comes next.
        want: u64,
        /// The `seq` that came.
        got: u64,
    },
    /// Another chunk has this `seq`.
    #[error("another chunk came as {seq} before")]
    Conflict {
        /// The `seq`.
        seq: u64,
    },
    /// A chunk without content that ends no open document.
    #[error("the chunk is empty and ends no open document")]
    EmptyChunk,
    /// The document's name is too long.
    #[error("a document's name has {bytes} bytes, more than {limit}")]
    NameTooLong {
        /// Its bytes.
        bytes: usize,
        /// The most that are allowed.
        limit: usize,
    },
    /// A document of this name has ended or was forgotten.
    #[error("document `{0}` has ended or was forgotten")]
    NameUsed(String),
    /// Text in a document of ids, or ids in a document of text.
    #[error("document `{0}` is text or ids throughout")]
    MixedContent(String),
    /// The session's log is full.
    #[error("the session holds all the {what} it may: {limit}")]
    Full {
        /// What there are too many of: `chunks`, `bytes` or `documents`.
        what: &'static str,
        /// The most that are allowed.
        limit: usize,
    },
}
