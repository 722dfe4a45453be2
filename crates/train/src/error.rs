//! What can go wrong with a training run, a variant per thing that a caller can act on.

use std::path::{Path, PathBuf};

/// An error of a training run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file cannot be read or written.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A recipe that is no TOML, has an unknown key, or asks for what cannot be.
    #[error("the recipe {path}: {detail}")]
    Recipe {
        /// The file.
        path: PathBuf,
        /// The key, and what is wrong with it.
        detail: String,
    },
    /// A configuration, a checkpoint or a saved batch that is damaged.
    #[error("{path} is damaged: {detail}")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Where, and how.
        detail: String,
    },
    /// A training file that is an evaluation file, or holds mostly rows of one.
    #[error("{path} must not be trained on: {detail}")]
    HeldOut {
        /// The file.
        path: PathBuf,
        /// Why.
        detail: String,
    },
    /// Too few usable rows for what the recipe draws.
    #[error("no usable {what}: {detail}")]
    NoData {
        /// What is missing.
        what: &'static str,
        /// What was looked for.
        detail: String,
    },
    /// A checkpoint of another base, or of another recipe.
    #[error("{path} cannot be continued: {detail}")]
    Foreign {
        /// The checkpoint.
        path: PathBuf,
        /// What differs.
        detail: String,
    },
    /// A device that a run cannot have.
    #[error("{place}: {detail}")]
    Device {
        /// The device.
        place: String,
        /// Why not.
        detail: String,
    },
    /// A step gave a loss or a gradient that is no number.
    #[error("step {step}: {what} is not finite; its batch is in {batch}")]
    NotFinite {
        /// The step, from 1.
        step: u64,
        /// The loss or the gradient.
        what: String,
        /// The file with the batch.
        batch: PathBuf,
    },
    /// A data file's rows: it is damaged, or more of them are malformed than the recipe allows (`data.malformed`).
    #[error(transparent)]
    Rows(#[from] rows::Error),
    /// The model or its forward.
    #[error(transparent)]
    Lm(#[from] lm::Error),
    /// The generator.
    #[error(transparent)]
    Generator(#[from] generator::Error),
    /// The tokenizer or the chat template.
    #[error(transparent)]
    Text(#[from] lm::text::Error),
    /// A tensor operation.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
}

impl Error {
    pub(crate) fn io(path: &Path, source: std::io::Error) -> Self {
        Self::Io {
            path: path.to_owned(),
            source,
        }
    }
}
