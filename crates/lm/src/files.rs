//! What can be wrong with a model's files, whatever their format.
//!
//! Shared by the weight readers and the text side. Says which file and where in it; what to do about
//! it is the caller's matter. Start at [`FileError`].

use std::path::{Path, PathBuf};

/// A model file that cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FileError {
    /// The operating system would not let us read it.
    #[error("cannot read {}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// Its header is cut short, or says what cannot be true.
    #[error("{} is damaged: {what}", path.display())]
    Header {
        /// The file.
        path: PathBuf,
        /// What is wrong, and where.
        what: String,
    },
    /// It is whole, but says something that this program cannot do.
    #[error("{} is not supported: {what}", path.display())]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// The key and its value.
        what: String,
    },
}

impl FileError {
    pub(crate) fn io(path: &Path, source: std::io::Error) -> Self {
        Self::Io {
            path: path.to_owned(),
            source,
        }
    }

    pub(crate) fn header(path: &Path, what: impl Into<String>) -> Self {
        Self::Header {
            path: path.to_owned(),
            what: what.into(),
        }
    }

    pub(crate) fn unsupported(path: &Path, what: impl Into<String>) -> Self {
        Self::Unsupported {
            path: path.to_owned(),
            what: what.into(),
        }
    }
}
