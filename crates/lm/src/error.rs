//! What can go wrong with a model or a batch.
//!
//! A variant per thing that a caller can act on. Start at [`Error`].

use crate::{FileError, TokenId};

/// An error of a model, its files or a batch of rows.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A tensor operation failed: a bug, or memory ran out.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
    /// The generator refused.
    #[error(transparent)]
    Generator(#[from] generator::Error),
    /// A file is unreadable, damaged or not supported.
    #[error(transparent)]
    File(#[from] FileError),
    /// The weights lack a tensor that the architecture needs.
    #[error("the weights have no tensor {name}")]
    MissingTensor {
        /// Its name in the file.
        name: String,
    },
    /// A tensor has another shape than config or metadata say.
    #[error("the tensor {name} is {found:?}, not {expected:?}")]
    Shape {
        /// Its name in the file.
        name: String,
        /// What config or metadata make it.
        expected: Vec<usize>,
        /// What the file has.
        found: Vec<usize>,
    },
    /// The generator was made for another base.
    #[error("the generator was made for a base with digest {expected}, this one has {found}")]
    ForeignBase {
        /// The digests in the generator's config.
        expected: String,
        /// This model's.
        found: String,
    },
    /// A row writes into a window or has a core, but no generator is attached.
    #[error("row {row} needs a generator and none is attached")]
    NoGenerator {
        /// Index in the batch.
        row: usize,
    },
    /// A site at a layer that the model does not have.
    #[error("the model has no {site}")]
    NoSite {
        /// The site.
        site: generator::SiteId,
    },
    /// A row without tokens.
    #[error("row {row} has no tokens")]
    EmptyRow {
        /// Index in the batch.
        row: usize,
    },
    /// A token id that the vocabulary does not have.
    #[error("token id {} of row {row} is not below the vocabulary's {vocab}", token.0)]
    TokenOutOfRange {
        /// Index in the batch.
        row: usize,
        /// The id.
        token: TokenId,
        /// Size of the vocabulary.
        vocab: usize,
    },
    /// More tokens than the model has positions for.
    #[error("row {row} reaches position {end}, the model's context ends at {limit}")]
    ContextLength {
        /// Index in the batch.
        row: usize,
        /// Tokens of the sequence, these included.
        end: usize,
        /// The model's context length.
        limit: usize,
    },
    /// A row's blocks do not hold its tokens, do not exist, or are another row's.
    #[error("the blocks of row {row} do not fit: {what}")]
    Blocks {
        /// Index in the batch.
        row: usize,
        /// In which way.
        what: String,
    },
    /// More logits wanted than there are tokens.
    #[error("row {row} has {tokens} tokens, logits of {wanted} were asked for")]
    TooManyLogits {
        /// Index in the batch.
        row: usize,
        /// Tokens of the row.
        tokens: usize,
        /// Logits asked for.
        wanted: usize,
    },
    /// A strength that is not a finite number.
    #[error("the scale {scale} of row {row} is not finite")]
    Scale {
        /// Index in the batch.
        row: usize,
        /// The scale.
        scale: f32,
    },
    /// A row's tokens are not the next ones of its window.
    #[error("row {row} writes at {position} of a window that holds {tokens} tokens")]
    WindowPosition {
        /// Index in the batch.
        row: usize,
        /// The row's position.
        position: usize,
        /// Tokens that the window has seen.
        tokens: usize,
    },
    /// The cache was made for a model of another shape, or has an impossible size.
    #[error("the KV cache does not fit the model: {what}")]
    Cache {
        /// In which way.
        what: String,
    },
}
