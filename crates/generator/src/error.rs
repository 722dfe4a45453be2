//! What can go wrong with a generator, one variant for each thing that a caller can act on.

use std::path::PathBuf;

use crate::site::SiteId;

/// An error of this crate.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file of the checkpoint cannot be read.
    #[error("cannot read {path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A file of the checkpoint is truncated, or says of itself what is not so.
    #[error("{path} is not a generator checkpoint file: {detail}")]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong, and where.
        detail: String,
    },
    /// adapter_config.json lacks a key that has no default.
    #[error("adapter_config.json lacks the key `{key}`")]
    MissingKey {
        /// The key.
        key: &'static str,
    },
    /// adapter_config.json asks for something that this crate does not do.
    #[error("adapter_config.json: `{key}` = {value} is not supported (supported: {supported})")]
    UnsupportedValue {
        /// The key.
        key: &'static str,
        /// Its value, as JSON.
        value: String,
        /// What it may be.
        supported: &'static str,
    },
    /// The checkpoint holds other tensors than its config and its base call for.
    #[error(
        "the checkpoint does not fit its config and its base: {}",
        tensors(missing, foreign)
    )]
    Tensors {
        /// Keys that are called for and not there.
        missing: Vec<String>,
        /// Keys that are there and not called for.
        foreign: Vec<String>,
    },
    /// A tensor has another shape than the config and the base call for.
    #[error(
        "the checkpoint does not fit its config and its base: `{key}` has shape {found:?}, not {want:?}"
    )]
    Shape {
        /// The tensor.
        key: String,
        /// The shape that the config and the base call for.
        want: Vec<usize>,
        /// The shape in the file.
        found: Vec<usize>,
    },
    /// A tensor has an element type that no generator has.
    #[error("the checkpoint's `{key}` is stored as {dtype}; supported: F32, F16, BF16")]
    Dtype {
        /// The tensor.
        key: String,
        /// Its element type.
        dtype: String,
    },
    /// A tensor holds values that cannot be used: not finite, or a ridge that is not positive.
    #[error("the checkpoint's `{key}` {detail}")]
    Values {
        /// The tensor.
        key: String,
        /// What is wrong with its values.
        detail: &'static str,
    },
    /// The config adapts a layer that the base does not have.
    #[error("the generator adapts layer {layer}, but its base has {layers} layers")]
    Layer {
        /// The layer.
        layer: usize,
        /// Layers of the base.
        layers: usize,
    },
    /// Rows lie outside of the batch.
    #[error("rows {start} .. {start} + {len} lie outside of a batch of {tokens} rows")]
    Rows {
        /// First row.
        start: usize,
        /// Number of rows.
        len: usize,
        /// Rows of the batch.
        tokens: usize,
    },
    /// Rows do not continue their window.
    #[error("rows at position {found} do not continue a window that holds {want} tokens")]
    Position {
        /// Tokens that the window holds.
        want: usize,
        /// Position of the first row.
        found: usize,
    },
    /// A window, state or core belongs to another generator.
    #[error("a window, state or core of another generator: {detail}")]
    Foreign {
        /// What differs.
        detail: String,
    },
    /// Bytes that were to be a core, a state or a trace are none.
    #[error("not the bytes of a core, state or trace: {detail}")]
    Bytes {
        /// What is wrong.
        detail: &'static str,
    },
    /// A document's weight is not a finite number.
    #[error("a weight of {weight} cannot scale a state")]
    Weight {
        /// The weight.
        weight: f32,
    },
    /// A state, or what is read out of it, holds values that are not finite.
    #[error("the state of {site} is not finite")]
    NotFinite {
        /// The site.
        site: SiteId,
    },
    /// G + lambda I is not positive definite: negative weights outweigh the others.
    #[error(
        "the state of {site} cannot be read out: its key sums are not positive definite (negative weights?)"
    )]
    NotPositive {
        /// The site.
        site: SiteId,
    },
    /// The singular value decomposition did not converge.
    #[error("the state of {site} cannot be read out: its decomposition did not converge")]
    NotConverged {
        /// The site.
        site: SiteId,
    },
    /// An exported adapter cannot be encoded.
    #[error("cannot encode the adapter: {detail}")]
    Export {
        /// Why.
        detail: String,
    },
    /// What a device was asked for about a state failed.
    #[error("a state on the device: {detail}")]
    Device {
        /// Its words.
        detail: String,
    },
    /// A tensor operation failed.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
}

/// Names the first few of the tensors that do not fit.
fn tensors(missing: &[String], foreign: &[String]) -> String {
    let list = |what: &str, keys: &[String]| match keys {
        [] => None,
        [one] => Some(format!("{what} `{one}`")),
        [first, second] => Some(format!("{what} `{first}` and `{second}`")),
        [first, second, rest @ ..] => Some(format!(
            "{what} `{first}`, `{second}` and {} more",
            rest.len()
        )),
    };
    let parts: Vec<_> = [
        list("it lacks", missing),
        list("it has the foreign", foreign),
    ]
    .into_iter()
    .flatten()
    .collect();
    parts.join("; ")
}
