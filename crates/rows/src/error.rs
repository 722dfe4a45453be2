//! What can go wrong with a file of rows, a variant for each thing that a caller can act on.

use std::path::{Path, PathBuf};

/// Why a file's rows cannot be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The file cannot be read.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is not made of JSON lines, compressed or not, or ends in the midst of a frame.
    #[error("{} does not hold JSON lines: {detail}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong, and where.
        detail: String,
    },
    /// The rows are of another kind, or too many of them are malformed.
    #[error(
        "{}: {malformed} of {rows} rows cannot be used, and a share of {allowed} is allowed; the first is row {first}: {detail}",
        path.display()
    )]
    Malformed {
        /// The file.
        path: PathBuf,
        /// Rows that cannot be used.
        malformed: u64,
        /// All rows; blank lines are none.
        rows: u64,
        /// The share that is allowed.
        allowed: f64,
        /// The first malformed one, from 1.
        first: u64,
        /// What is wrong with it.
        detail: String,
    },
}

impl Error {
    pub(crate) fn io(path: &Path, source: std::io::Error) -> Self {
        Self::Io {
            path: path.to_owned(),
            source,
        }
    }

    pub(crate) fn damaged(path: &Path, detail: impl Into<String>) -> Self {
        Self::Damaged {
            path: path.to_owned(),
            detail: detail.into(),
        }
    }
}
