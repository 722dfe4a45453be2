//! The store: what clients said to their sessions, chunk by chunk.
//!
//! The log is the truth and a session's state a fold of it, so what is kept here is what a later process needs to fold it
//! again: text or ids as they came, their `seq`, their documents, and a hash chain over all of it. It leaves out tokens,
//! tensors and runtimes. Start at [`Store`], the face that a durable form will have too; [`Memory`] is today's only form.

mod chunk;
mod error;
mod memory;
mod snapshots;

pub use chunk::{Chunk, Content, Hash};
pub use error::Error;
pub use memory::Memory;
pub use snapshots::{Kept, Key, SnapshotError, Snapshots};

/// Bounds of one session's log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Chunks in a session.
    pub max_chunks: usize,
    /// Bytes of content in a session; an id counts four.
    pub max_bytes: usize,
    /// Documents in a session, forgotten ones included.
    pub max_documents: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_chunks: 1 << 20,
            max_bytes: 256 << 20,
            max_documents: 65_536,
        }
    }
}

/// What a log does with a chunk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Appended {
    /// It is new, and belongs here.
    Accepted(Place),
    /// The same chunk is there already; nothing changes.
    Duplicate,
}

/// Where a new chunk belongs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// Its document.
    pub document: String,
    /// Whether the document begins with it.
    pub begins: bool,
    /// Whether a document is open that ends because this one begins.
    pub ends_open: bool,
}

/// Whether a document's chunks hold text or ids.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// UTF-8 text.
    Text,
    /// Token ids.
    Ids,
}

/// A document as the log knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Document {
    /// Its name, unique in the session.
    pub name: String,
    /// What its chunks hold.
    pub kind: Kind,
    /// Whether its end has come.
    pub complete: bool,
    /// Whether it was forgotten: its content is gone, its name stays used.
    pub forgotten: bool,
    /// The first `seq` that spoke of it.
    pub first_seq: u64,
    /// The last `seq` that spoke of it.
    pub last_seq: u64,
}

/// The end of a log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Head {
    /// The last `seq`; 0 if there is none.
    pub seq: u64,
    /// Hash over all chunks so far: `chain(n) = blake3(chain(n - 1) || hash(n))`, and 32 zeros before the first.
    pub chain: Hash,
}

/// The logs of all sessions. One writer a session is the caller's duty: `check` then `append` is not atomic.
pub trait Store: Send + Sync {
    /// Begins an empty log.
    ///
    /// # Errors
    /// [`Error::SessionExists`].
    fn create(&self, session: &str) -> Result<(), Error>;
    /// Begins a log as a copy of another.
    ///
    /// # Errors
    /// [`Error::UnknownSession`], [`Error::SessionExists`].
    fn fork(&self, from: &str, to: &str) -> Result<(), Error>;
    /// Ends a log and drops what it holds.
    ///
    /// # Errors
    /// [`Error::UnknownSession`].
    fn remove(&self, session: &str) -> Result<(), Error>;
    /// What `append` would do with the chunk; changes nothing.
    ///
    /// # Errors
    /// Those of `append`.
    fn check(&self, session: &str, seq: u64, chunk: &Chunk) -> Result<Appended, Error>;
    /// Takes the chunk that comes next. When this returns, the chunk is kept.
    ///
    /// # Errors
    /// [`Error::Gap`] and [`Error::Conflict`] about `seq`; [`Error::EmptyChunk`], [`Error::NameTooLong`],
    /// [`Error::NameUsed`] and [`Error::MixedContent`] about the chunk; [`Error::Full`] about the bounds.
    fn append(&self, session: &str, seq: u64, chunk: Chunk) -> Result<Appended, Error>;
    /// Drops a document's content. Its name and the hashes of its chunks stay, so that a repeated chunk is still known.
    ///
    /// # Errors
    /// [`Error::UnknownSession`], [`Error::UnknownDocument`].
    fn forget(&self, session: &str, document: &str) -> Result<(), Error>;
    /// Documents in the order in which they were begun, forgotten ones included.
    ///
    /// # Errors
    /// [`Error::UnknownSession`].
    fn documents(&self, session: &str) -> Result<Vec<Document>, Error>;
    /// The end of the log.
    ///
    /// # Errors
    /// [`Error::UnknownSession`].
    fn head(&self, session: &str) -> Result<Head, Error>;
    /// Up to `limit` chunks behind `after`, for a replay: each with its `seq` and document; forgotten ones are left out.
    ///
    /// # Errors
    /// [`Error::UnknownSession`].
    fn read(&self, session: &str, after: u64, limit: usize) -> Result<Vec<Row>, Error>;
}

/// A chunk as it is kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    /// Its `seq`.
    pub seq: u64,
    /// The document it belongs to, by name.
    pub document: String,
    /// What came.
    pub chunk: std::sync::Arc<Chunk>,
}
