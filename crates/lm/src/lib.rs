//! The frozen decoder: weights, one ragged forward, and its text side.
//!
//! A model is read from GGUF or from the HF layout and never changes; sessions differ by the cores that
//! rows bring along. No engine, clock or network here. Start at [`Lm::forward`].

pub mod text;

mod batch;
mod config;
mod error;
mod files;
mod forward;
mod gguf;
mod kv;
mod oneshot;
mod options;
mod tensors;
mod training;
mod weights;

pub use batch::Row;
pub use config::{Architecture, Config, RopeScaling};
pub use error::Error;
pub use files::FileError;
pub use forward::{Lm, Output};
pub use kv::KvCache;
pub use oneshot::Windows;
pub use options::{Activations, LoadOptions};
pub use tensors::Tensors;
pub use text::TokenId;
