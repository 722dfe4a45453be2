//! Causal attention of ragged rows over a paged cache: o = softmax(scale q Kᵀ) V over the visible keys.
//!
//! Keys are taken in ascending position for each query, so the result of a query is the same bits however
//! its row was cut into calls and whatever other rows are in the call. Start at [`paged_attention`].

#[cfg(test)]
mod tests;

use candle_core::{CpuStorage, InplaceOp2, Layout, Result, Tensor, bail};
use rayon::prelude::*;

use crate::floats::{Floats, floats_mut, floats_of, tensor};

/// Writes rows [T, Hkv, Dh] into a paged cache [blocks, block_size, Hkv, Dh] in place; `slots[t]` is
/// block * block_size + offset.
///
/// Fails, with the cache untouched, if shapes differ or a slot lies outside of the cache.
pub fn kv_append(cache: &Tensor, rows: &Tensor, slots: &[u32]) -> Result<()> {
    let (blocks, block_size, heads, dh) = cache.dims4()?;
    if rows.dims3()? != (slots.len(), heads, dh) {
        bail!("rows {:?} for {} slots of a cache {:?}", rows.shape(), slots.len(), cache.shape())
    }
    if let Some(slot) = slots.iter().find(|&&slot| slot as usize >= blocks * block_size) {
        bail!("slot {slot} of a cache of {} slots", blocks * block_size)
    }
    cache.inplace_op2(&rows.contiguous()?, &Append { slots, width: heads * dh })
}

/// Copies row t to slot `slots[t]`.
struct Append<'a> {
    slots: &'a [u32],
    width: usize,
}

impl InplaceOp2 for Append<'_> {
    fn name(&self) -> &'static str {
        "kv_append"
    }

    fn cpu_fwd(&self, cache: &mut CpuStorage, cache_layout: &Layout, rows: &CpuStorage, rows_layout: &Layout) -> Result<()> {
        let cache = floats_mut(cache, cache_layout)?; // [slots, Hkv * Dh]
        let rows = floats_of(rows, rows_layout)?; // [T, Hkv * Dh]
        for (&slot, row) in self.slots.iter().zip(rows.chunks_exact(self.width)) {
            cache[slot as usize * self.width..][..self.width].copy_from_slice(row);
        }
        Ok(())
    }
}

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
///
/// Query rows that no entry names give 0. Fails if shapes do not fit, if a row reaches beyond q or its
/// blocks, if a block lies outside of the cache, or for a window of 0.
pub fn paged_attention(
    q: &Tensor,
    k_cache: &Tensor,
    v_cache: &Tensor,
    rows: &[AttentionRow<'_>],
    scale: f32,
    window: Option<usize>,
) -> Result<Tensor> {
    let (t, heads, dh) = q.dims3()?;
    let (blocks, block_size, kv_heads, k_dh) = k_cache.dims4()?;
    if v_cache.dims4()? != (blocks, block_size, kv_heads, k_dh) || k_dh != dh || kv_heads == 0 || heads % kv_heads != 0 {
        bail!("attention of q {:?} over caches {:?} and {:?}", q.shape(), k_cache.shape(), v_cache.shape())
    }
    if window == Some(0) {
        bail!("an attention window of 0 keys")
    }
    for row in rows {
        check_row(row, t, blocks, block_size)?;
    }
    let q = q.contiguous()?;
    let (q, k, v) = (Floats::of(&q)?, Floats::of(k_cache)?, Floats::of(v_cache)?);
    let mut out = vec![0.0f32; q.len()]; // [T, H * Dh]
    let width = heads * dh;
    let shape = Sizes { heads, kv_heads, dh, block_size };
    for row in rows {
        let out = &mut out[row.start * width..][..row.len * width];
        let q = &q[row.start * width..][..row.len * width];
        out.par_chunks_mut(dh).zip(q.par_chunks(dh)).enumerate().for_each(|(i, (out, q))| {
            let last = row.position + i / heads;
            let first = window.map_or(0, |window| (last + 1).saturating_sub(window));
            reference(shape, q, &k, &v, row.blocks, i % heads, first..last + 1, scale, out);
        });
    }
    tensor(out, (t, width))
}

fn check_row(row: &AttentionRow<'_>, t: usize, blocks: usize, block_size: usize) -> Result<()> {
    if row.start.checked_add(row.len).is_none_or(|end| end > t) {
        bail!("queries {} + {} of {t} rows", row.start, row.len)
    }
    let slots = row.blocks.len().saturating_mul(block_size);
    if row.position.checked_add(row.len).is_none_or(|end| end > slots) {
        bail!("positions {} + {} in {} blocks of {block_size}", row.position, row.len, row.blocks.len())
    }
    if let Some(block) = row.blocks.iter().find(|&&block| block as usize >= blocks) {
        bail!("block {block} of a cache of {blocks} blocks")
    }
    Ok(())
}

#[derive(Clone, Copy)]
struct Sizes {
    heads: usize,
    kv_heads: usize,
    dh: usize,
    block_size: usize,
}

/// The meaning, for one query of one head: q, out [Dh].
#[expect(clippy::too_many_arguments, reason = "the formula's own operands")]
fn reference(
    sizes: Sizes,
    q: &[f32],
    k: &[f32],
    v: &[f32],
    blocks: &[u32],
    head: usize,
    keys: std::ops::Range<usize>,
    scale: f32,
    out: &mut [f32],
) {
    let Sizes { heads, kv_heads, dh, block_size } = sizes;
    let kv_head = head / (heads / kv_heads);
    let at = |key: usize| {
        let slot = blocks[key / block_size] as usize * block_size + key % block_size;
        (slot * kv_heads + kv_head) * dh
    };
    let scores: Vec<f32> = keys
        .clone()
        .map(|key| scale * q.iter().zip(&k[at(key)..][..dh]).map(|(q, k)| q * k).sum::<f32>())
        .collect();
    let largest = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let weights: Vec<f32> = scores.iter().map(|score| (score - largest).exp()).collect();
    let sum: f32 = weights.iter().sum();
    out.fill(0.0);
    for (key, weight) in keys.zip(weights) {
        for (out, v) in out.iter_mut().zip(&v[at(key)..][..dh]) {
            *out += weight / sum * v;
        }
    }
}
