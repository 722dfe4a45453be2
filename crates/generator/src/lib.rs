//! The generator: sites, windows, states, read-outs, cores, checkpoints and PEFT export.
//!
//! `../shared/GENERATOR.md` has the mathematics. STUB of the public face; the owner of this crate fills it.
#![allow(missing_docs, unused_variables, unused_imports, dead_code, clippy::allow_attributes_without_reason, clippy::unimplemented, clippy::new_ret_no_self)]
use std::{path::Path, sync::Arc};
use candle_core::Tensor;

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
    // + config, checkpoint, shape, base mismatch, io ... one variant per thing a caller can act on
}

/// An adapted linear of a decoder layer. Ordered by layer, then as the layer computes them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Module { QProj, KProj, VProj, OProj, GateProj, UpProj, DownProj }
impl Module { pub fn name(self) -> &'static str { unimplemented!() } }
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SiteId { pub layer: usize, pub module: Module }

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Write { Published, Associative }
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReadOut { Svd, Frobenius, Spectral, Ridge }
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Strategy { Concat, Parallel, Sequential }

/// What the generator must know of its base: to check shapes and to name a mismatch.
pub struct BaseShape { pub layers: usize, pub hidden: usize, /* in/out features per module */ pub vocab: usize }
impl BaseShape { pub fn linear(&self, module: Module) -> (usize, usize) { unimplemented!() /* (out, in) */ } }

/// The parsed adapter_config.json (unknown keys pass, unsupported values do not).
#[derive(Clone, Debug)]
pub struct Config {
    pub write: Write, pub read_out: ReadOut,
    pub r1: usize, pub r2: usize, pub max_rank: usize, pub alpha: f64,
    pub window: usize, pub strategy: Strategy,      // key fastlora_strategy (ours); default parallel for ridge, sequential for the published form
    pub modules: Vec<Module>, pub layers: Option<Vec<usize>>,
    pub skip_first: bool, pub skip_last: bool,
    pub bos: Option<bool>, pub document_suffix: String, pub prompt_format: Option<String>,
    pub base_digest: Option<String>, pub base_model: String,
}

/// The trained network of one site.
#[derive(Debug)] pub struct Site {}
#[derive(Debug)] pub struct Generator {}
impl Generator {
    /// Reads adapter_config.json and adapter_model.safetensors from a folder.
    pub fn load(dir: &Path, base: &BaseShape) -> Result<Self, Error> { unimplemented!() }
    pub fn config(&self) -> &Config { unimplemented!() }
    pub fn digest(&self) -> &str { unimplemented!() }
    pub fn parameters(&self) -> usize { unimplemented!() }
    /// Sites in order; the index into this slice is used everywhere below.
    pub fn sites(&self) -> &[Site] { unimplemented!() }
    pub fn site_index(&self, id: SiteId) -> Option<usize> { unimplemented!() }
    pub fn new_window(&self) -> Result<Window, Error> { unimplemented!() }
    pub fn new_state(&self) -> Result<State, Error> { unimplemented!() }
    /// Reads the core out of a state; an empty state gives a core of zeros, which is the bare model.
    pub fn read_out(&self, state: &State) -> Result<Core, Error> { unimplemented!() }
    /// Full weight deltas alpha/R2 * B Nᵀ A1 [out, in] per site (tests, merging).
    pub fn delta_weight(&self, site: usize, core: &Core) -> Result<Tensor, Error> { unimplemented!() }
    /// adapter_config.json and adapter_model.safetensors of a PEFT LoRA.
    pub fn export_peft(&self, core: &Core) -> Result<PeftExport, Error> { unimplemented!() }
}
pub struct PeftExport { pub config_json: Vec<u8>, pub safetensors: Vec<u8>, pub rank: usize }

/// Rows of a batch that run with one core.
pub struct SiteRows<'a> { pub start: usize, pub len: usize, pub core: &'a Core, pub scale: f32 }
/// Rows of a batch that write into one open window: tokens `position .. position + len` of it.
pub struct WriteRows<'a> {
    pub start: usize, pub len: usize, pub position: usize,
    /// Normed embedding [1, D] of the token behind the last row, if the window's next token is known.
    pub lookahead: Option<Tensor>,
    pub window: &'a mut Window,
}
/// u = e / rms(e), what a successor contributes to a value. e [T, D] token embeddings.
pub fn normed_embeddings(e: &Tensor) -> Result<Tensor, Error> { unimplemented!() }
impl Site {
    pub fn id(&self) -> SiteId { unimplemented!() }
    pub fn ranks(&self) -> (usize, usize, usize) { unimplemented!() /* R1, R2, largest core rank */ }
    /// The delta to add to y: [T, out], or None if no row has a core. x [T, in].
    pub fn delta(&self, index: usize, x: &Tensor, rows: &[SiteRows<'_>]) -> Result<Option<Tensor>, Error> { unimplemented!() }
    /// Lets the rows write. x [T, in] input of the linear; h [T, D] residual entering the layer; u [T, D]
    /// normed embedding of each row's own token. The successor of a row is the next row of its segment, the
    /// last row's is `lookahead`; without one its key and hidden value stay pending in the window, and are
    /// written when the next call's first row (its successor) comes. A window that closes drops its pending.
    /// Cutting a window into calls changes no bit of the sums.
    pub fn write(&self, index: usize, x: &Tensor, h: &Tensor, u: &Tensor, rows: &mut [WriteRows<'_>]) -> Result<(), Error> { unimplemented!() }
}

/// Sums of one open window; `clone` copies the values (deep: the sums are mutated in place).
#[derive(Debug)] pub struct Window {}
/// Sums of closed windows: (S, G, mass) per site, f32. A value: `try_clone` copies, `add` composes.
#[derive(Debug)] pub struct State {}
impl State {
    pub fn add_window(&mut self, window: &Window, weight: f32) -> Result<(), Error> { unimplemented!() }
    pub fn add(&mut self, other: &State, weight: f32) -> Result<(), Error> { unimplemented!() }
    pub fn try_clone(&self) -> Result<State, Error> { unimplemented!() }
    pub fn bytes(&self) -> usize { unimplemented!() }
    pub fn is_empty(&self) -> bool { unimplemented!() }
}
/// What serving needs of a state. Immutable, cheap to clone.
#[derive(Clone, Debug)] pub struct Core { _x: Arc<()> }
impl Core { pub fn bytes(&self) -> usize { unimplemented!() } }
