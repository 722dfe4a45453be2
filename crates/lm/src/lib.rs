//! The frozen decoder: weights, one ragged forward, and its text side. STUB of the public face.
#![allow(missing_docs, unused_variables, unused_imports, dead_code, clippy::allow_attributes_without_reason, clippy::unimplemented, clippy::new_ret_no_self)]
mod files;
mod gguf;
pub mod text;
pub use files::FileError;
pub use text::TokenId;
use std::path::Path;
use candle_core::Tensor;
use generator::{Core, Generator, Window};

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    #[error(transparent)] Tensor(#[from] candle_core::Error),
    #[error(transparent)] Generator(#[from] generator::Error),
    #[error(transparent)] File(#[from] FileError),
    // + Io{path,..}, Header (truncated or lying file: what, where), Unsupported{what}, MissingTensor, Shape, TokenOutOfRange{token,vocab}, ContextLength{..} ...
}

/// The shape of a decoder, from config.json or GGUF metadata.
#[derive(Clone, Debug)]
pub struct Config {
    pub architecture: Architecture, pub layers: usize, pub hidden: usize, pub intermediate: usize,
    pub heads: usize, pub kv_heads: usize, pub head_dim: usize, pub vocab: usize,
    pub context_length: usize, pub rms_norm_eps: f64, pub rope_theta: f64, /* rope scaling */
    pub sliding_window: Option<usize>, pub tied_embeddings: bool, pub attention_bias: bool, pub qk_norm: bool,
    pub eos: Vec<TokenId>, pub bos: Option<TokenId>,
}
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Architecture { Llama, Mistral, Qwen2, Qwen3 }

#[derive(Clone, Copy, Debug, Default)]
pub struct LoadOptions { /// Expand all weights to f32.
    pub dequantize: bool }

/// A frozen decoder, with a generator at its sites or without one.
pub struct Lm {}
impl Lm {
    /// `path`: a GGUF file, or a folder in the HF layout (config.json, model.safetensors or shards with index).
    pub fn load(path: &Path, options: LoadOptions) -> Result<Self, Error> { unimplemented!() }
    /// Reads a generator checkpoint made for this base; an error names what does not fit.
    pub fn attach_generator(&mut self, dir: &Path) -> Result<(), Error> { unimplemented!() }
    pub fn generator(&self) -> Option<&Generator> { unimplemented!() }
    pub fn config(&self) -> &Config { unimplemented!() }
    /// blake3 over the weight file(s) as they lie on disk, in hex.
    pub fn digest(&self) -> &str { unimplemented!() }
    pub fn parameters(&self) -> u64 { unimplemented!() }
    pub fn weight_format(&self) -> &str { unimplemented!() }
    /// One forward of a ragged batch: ingest, prefill, decode and scoring alike. Checks all rows first
    /// (token range, positions against the context length and the blocks): an error leaves kv and windows untouched.
    pub fn forward(&self, rows: &mut [Row<'_>], kv: &KvCache) -> Result<Output, Error> { unimplemented!() }
}
/// A span of one sequence.
pub struct Row<'a> {
    pub tokens: &'a [TokenId],
    /// Position of the first token = tokens of the sequence already in the cache.
    pub position: usize,
    /// Blocks of the sequence, enough for position + tokens.len().
    pub blocks: &'a [u32],
    pub core: Option<&'a Core>,
    pub scale: f32,
    /// The open window that the tokens write into (their index in it = their position).
    pub window: Option<&'a mut Window>,
    /// The token behind the last one, if known: needed for `window` only.
    pub lookahead: Option<TokenId>,
    /// The last so many tokens whose logits are wanted.
    pub logits: usize,
}
/// Paged KV of all layers: per layer K and V [blocks, block_size, Hkv, Dh] f32. Memory is touched only as blocks are used.
pub struct KvCache {}
impl KvCache {
    pub fn new(config: &Config, blocks: usize, block_size: usize) -> Result<Self, Error> { unimplemented!() }
    pub fn block_size(&self) -> usize { unimplemented!() }
    pub fn blocks(&self) -> usize { unimplemented!() }
}
/// Logits of all wanted positions, rows in order. [sum of Row::logits, V] f32; None if none were wanted.
pub struct Output { pub logits: Option<Tensor> }
