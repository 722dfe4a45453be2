//! A chunk as a client sent it, and its hash.

use crate::Kind;

/// A BLAKE3 hash.
pub type Hash = [u8; 32];

/// A piece of a document, as it was sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chunk {
    /// The document's name; empty continues the open document or begins one that the log names.
    pub document: String,
    /// What it holds.
    pub content: Content,
    /// Whether it is the document's last.
    pub end_of_document: bool,
}

/// What a chunk holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content {
    /// UTF-8 text.
    Text(String),
    /// Token ids.
    Ids(Vec<u32>),
}

impl Content {
    /// Bytes of it; an id counts four.
    #[must_use]
    pub fn bytes(&self) -> usize {
        match self {
            Self::Text(text) => text.len(),
            Self::Ids(ids) => ids.len().saturating_mul(4),
        }
    }

    /// Text or ids.
    #[must_use]
    pub fn kind(&self) -> Kind {
        match self {
            Self::Text(_) => Kind::Text,
            Self::Ids(_) => Kind::Ids,
        }
    }
}

impl Chunk {
    /// Hash of the chunk as it was sent: equal hashes mean the same chunk.
    #[must_use]
    pub fn hash(&self) -> Hash {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&(self.document.len() as u64).to_le_bytes());
        hasher.update(self.document.as_bytes());
        hasher.update(&[u8::from(self.end_of_document)]);
        match &self.content {
            Content::Text(text) => {
                hasher.update(b"text");
                hasher.update(text.as_bytes());
            }
            Content::Ids(ids) => {
                hasher.update(b"ids");
                for id in ids {
                    hasher.update(&id.to_le_bytes());
                }
            }
        }
        *hasher.finalize().as_bytes()
    }
}
