//! What can go wrong, a variant for each thing that a caller can act on.

use std::path::{Path, PathBuf};

/// Why an evaluation cannot be run or reported.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file cannot be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A file does not hold rows of the task, or too many of them are malformed.
    #[error(transparent)]
    Rows(#[from] rows::Error),
    /// The task reads rows, and no file was named.
    #[error("task {task} needs --data FILE")]
    NoData {
        /// The task.
        task: &'static str,
    },
    /// The rows give no case, or too few for a control that needs another row's context.
    #[error("too few cases: {detail}")]
    TooFew {
        /// What is missing.
        detail: String,
    },
    /// An option that cannot work.
    #[error("{option}: {detail}")]
    Option {
        /// The option.
        option: &'static str,
        /// What is wrong.
        detail: String,
    },
    /// A method that writes imprints, and no generator.
    #[error("method {method} needs a generator, and there is none")]
    NoGenerator {
        /// The method.
        method: &'static str,
    },
    /// A generator that reads each window with those before it, and more than one document to read.
    #[error(
        "the generator's strategy is sequential; a context of {documents} documents can only be judged with parallel or concat"
    )]
    Strategy {
        /// Documents of the context.
        documents: usize,
    },
    /// Something that runs on the processor alone, or that the device has no room for.
    #[error("{what} does not run on this device: {detail}")]
    Device {
        /// What was asked for.
        what: String,
        /// Why not, or how else.
        detail: String,
    },
    /// A machine that forwards run on cannot be had, or is broken.
    #[error(transparent)]
    Engine(#[from] engine::Error),
    /// The model cannot be loaded, or a forward failed.
    #[error(transparent)]
    Lm(#[from] lm::Error),
    /// A state could not be computed or read out.
    #[error(transparent)]
    Generator(#[from] generator::Error),
    /// Text could not be turned into tokens, or back.
    #[error(transparent)]
    Text(#[from] lm::text::Error),
    /// Logits could not be read.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
    /// A report is not one of this program.
    #[error("{} is no report of `imprint eval run`: {source}", path.display())]
    Report {
        /// The file.
        path: PathBuf,
        /// Why.
        source: serde_json::Error,
    },
}

impl Error {
    /// A file that cannot be read or written.
    pub(crate) fn io(path: &Path, source: std::io::Error) -> Self {
        Self::Io {
            path: path.to_owned(),
            source,
        }
    }
}
