//! What can go wrong on a device.

use std::path::PathBuf;

/// What a caller can act on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A library of CUDA is not there, or is another one.
    #[error("{} cannot be used: {detail}", path.display())]
    Library {
        /// What was asked for.
        path: PathBuf,
        /// The loader's words.
        detail: String,
    },
    /// The program was built without the feature `cuda`, so it has no machine code for a GPU.
    #[error("this program was built without the feature `cuda`")]
    NoKernels,
    /// The driver or cuBLAS refused a call.
    #[error("{call} failed with {code}{}{detail}", if detail.is_empty() { "" } else { ": " })]
    Call {
        /// The function.
        call: &'static str,
        /// Its result.
        code: i32,
        /// The driver's words.
        detail: String,
    },
    /// Operands do not fit each other.
    #[error("{what}")]
    Shape {
        /// What does not fit what.
        what: String,
    },
    /// A model or a generator that has no form on the device.
    #[error("not on the device: {what}")]
    Unsupported {
        /// What it is.
        what: String,
    },
    /// A file cannot be used.
    #[error("{}: {detail}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        detail: String,
    },
    /// The key sums of a site plus lambda I are not positive definite.
    #[error("the key sums of site {site} cannot be factorised")]
    NotPositive {
        /// Index of the site.
        site: usize,
    },
}

/// An [`Error::Shape`], said where it is found.
pub(crate) fn shape(what: impl Into<String>) -> Error {
    Error::Shape { what: what.into() }
}

/// `Ok` where a fact about shapes holds.
pub(crate) fn fits(fact: bool, what: impl FnOnce() -> String) -> Result<(), Error> {
    if fact { Ok(()) } else { Err(shape(what())) }
}
