//! Custom tensor operations of imprint, each beside a plain reference; home of unsafe code.
//!
//! Every operation is row-independent: the result for a token does not depend on how many other tokens
//! are in the call, nor on how a sequence was cut into calls, bit for bit. Inputs are contiguous f32
//! tensors on the CPU. Start at [`Linear`], the product with frozen weights.
#![allow(missing_docs, unused_variables, unused_imports, dead_code, clippy::allow_attributes_without_reason, clippy::unimplemented, clippy::new_ret_no_self)]

use candle_core::{Result, Tensor};

/// How weights lie in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum WeightFormat { F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q4K, Q6K }

/// A frozen linear map y = x Wᵀ, W [out, in], kept in its own format and multiplied in f32.
#[derive(Clone, Debug)]
pub struct Linear {}

impl Linear {
    /// From the bytes of a row-major [out, in] matrix as they lie in a safetensors or GGUF file.
    pub fn new(format: WeightFormat, bytes: &[u8], out_features: usize, in_features: usize) -> Result<Self> { unimplemented!() }
    /// From an f32 tensor [out, in].
    pub fn from_tensor(weight: &Tensor) -> Result<Self> { unimplemented!() }
    pub fn out_features(&self) -> usize { unimplemented!() }
    pub fn in_features(&self) -> usize { unimplemented!() }
    pub fn format(&self) -> WeightFormat { unimplemented!() }
    /// Bytes held in memory.
    pub fn bytes(&self) -> usize { unimplemented!() }
    /// x [T, in] -> [T, out], both f32.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> { unimplemented!() }
    /// Rows of W as an embedding table: ids (each < out) -> [ids.len(), in] f32.
    pub fn rows(&self, ids: &[u32]) -> Result<Tensor> { unimplemented!() }
    /// W [out, in] in f32.
    pub fn dequantize(&self) -> Result<Tensor> { unimplemented!() }
    /// The same map with its weights expanded to f32.
    pub fn to_f32(&self) -> Result<Self> { unimplemented!() }
}

/// x [T, D] / sqrt(mean(x²) + eps) * gain [D]; no gain: 1.
pub fn rms_norm(x: &Tensor, gain: Option<&Tensor>, eps: f64) -> Result<Tensor> { unimplemented!() }

/// silu(gate) * up, both [T, F].
pub fn silu_mul(gate: &Tensor, up: &Tensor) -> Result<Tensor> { unimplemented!() }

/// Rotary embedding in the half-split (HF) layout. x [T, H, Dh]; cos, sin [max, Dh/2]; positions [T].
pub fn rope(x: &Tensor, cos: &Tensor, sin: &Tensor, positions: &[u32]) -> Result<Tensor> { unimplemented!() }

/// Writes rows [T, Hkv, Dh] into a paged cache [blocks, block_size, Hkv, Dh] in place; `slots[t]` is
/// block * block_size + offset.
pub fn kv_append(cache: &Tensor, rows: &Tensor, slots: &[u32]) -> Result<()> { unimplemented!() }

/// One row of a ragged attention call: `len` queries from `start` on, the first at `position`.
#[derive(Clone, Debug)]
pub struct AttentionRow<'a> {
    /// First query row in q.
    pub start: usize,
    /// Number of query rows.
    pub len: usize,
    /// Position of the first query; keys 0 ..= position + i are visible to query i.
    pub position: usize,
    /// Blocks of the row's sequence in the cache, in order.
    pub blocks: &'a [u32],
}

/// Causal attention over a paged cache. q [T, H, Dh], caches [blocks, block_size, Hkv, Dh], H a multiple
/// of Hkv; `window`: only the last so many keys (the query's own included) are visible. -> [T, H * Dh]
pub fn paged_attention(q: &Tensor, k_cache: &Tensor, v_cache: &Tensor, rows: &[AttentionRow<'_>], scale: f32, window: Option<usize>) -> Result<Tensor> { unimplemented!() }

/// The core of one site, as rows apply it.
#[derive(Clone, Debug)]
pub enum CoreView<'a> {
    /// N [R1, R2].
    Dense(&'a Tensor),
    /// U [R1, q], V [R2, q]: N = U Vᵀ.
    LowRank { u: &'a Tensor, v: &'a Tensor },
}

/// Rows of a that share one core.
#[derive(Clone, Debug)]
pub struct CoreRows<'a> { pub start: usize, pub len: usize, pub core: CoreView<'a>, pub scale: f32 }

/// a [T, R1] -> c [T, R2]: c_t = scale * a_t N of the rows' own core; rows that no entry names give 0.
pub fn apply_cores(a: &Tensor, rows: &[CoreRows<'_>], r2: usize) -> Result<Tensor> { unimplemented!() }

/// acc [R1, R2] += Σ_t k_t v_tᵀ in place, k [T, R1], v [T, R2], token after token (so that any cut of
/// the tokens into calls gives the same bits). A call may name a sub-range of rows.
pub fn accumulate_outer(acc: &Tensor, k: &Tensor, v: &Tensor, rows: std::ops::Range<usize>) -> Result<()> { unimplemented!() }
