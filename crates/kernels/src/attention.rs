//! Causal attention of ragged rows over a paged cache: o = softmax(scale q Kᵀ) V over the visible keys.
//!
//! A tile is some queries of one row with all heads that share a KV head, over all their visible keys: keys are
//! turned sixteen at a time and scored as a matrix product, weighted in two passes, and their values summed as a
//! matrix product again. Scores are chains over ascending channels, weights are summed in sixteen lanes by the
//! key's position modulo 16, values in one chain over ascending keys; keys that a query does not see weigh exactly
//! 0. So the result of a query is the same bits however its row was cut into calls and tiles, and whatever other
//! rows are in the call (finite values given). Start at [`paged_attention`].
#![expect(
    unsafe_code,
    reason = "products on raw addresses, and threads that write rows of their own"
)]

#[cfg(test)]
mod tests;

use std::ops::Range;

use candle_core::{CpuStorage, InplaceOp2, Layout, Result, Tensor, bail};
use rayon::prelude::*;

use crate::{
    floats::{Floats, floats_mut, floats_of, tensor, transpose},
    gemm::{Begin, Left, Out, Product, Right, Shared, Steps, multiply, products, spread},
    plain::{self, known},
    recorded::recorded3,
    simd::{Isa, Kernel, LANES, exp, lanes, of_lanes, run},
};

/// Writes rows [T, Hkv, Dh] into a paged cache [blocks, block_size, Hkv, Dh] in place; `slots[t]` is
/// block * block_size + offset.
///
/// Fails, with the cache untouched, if shapes differ or a slot lies outside of the cache.
pub fn kv_append(cache: &Tensor, rows: &Tensor, slots: &[u32]) -> Result<()> {
    let (blocks, block_size, heads, dh) = cache.dims4()?;
    if rows.dims3()? != (slots.len(), heads, dh) {
        bail!(
            "rows {:?} for {} slots of a cache {:?}",
            rows.shape(),
            slots.len(),
            cache.shape()
        )
    }
    if let Some(slot) = slots
        .iter()
        .find(|&&slot| slot as usize >= blocks * block_size)
    {
        bail!("slot {slot} of a cache of {} slots", blocks * block_size)
    }
    if !known(cache) {
        return plain::kv_append(cache, rows, slots);
    }
    cache.inplace_op2(
        &rows.contiguous()?,
        &Append {
            slots,
            width: heads * dh,
        },
    )
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

    fn cpu_fwd(
        &self,
        cache: &mut CpuStorage,
        cache_layout: &Layout,
        rows: &CpuStorage,
        rows_layout: &Layout,
    ) -> Result<()> {
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
    if v_cache.dims4()? != (blocks, block_size, kv_heads, k_dh)
        || k_dh != dh
        || dh == 0
        || heads == 0
        || block_size == 0
        || kv_heads == 0
        || heads % kv_heads != 0
    {
        bail!(
            "attention of q {:?} over caches {:?} and {:?}",
            q.shape(),
            k_cache.shape(),
            v_cache.shape()
        )
    }
    if window == Some(0) {
        bail!("an attention window of 0 keys")
    }
    for row in rows {
        check_row(row, t, blocks, block_size)?;
    }
    let mut spans: Vec<_> = rows
        .iter()
        .filter(|row| row.len > 0)
        .map(|row| (row.start, row.start + row.len))
        .collect();
    spans.sort_unstable();
    if spans.windows(2).any(|pair| pair[1].0 < pair[0].1) {
        bail!("rows of an attention call overlap")
    }
    if !known(q) {
        let sizes = plain::Sizes { scale, window };
        return plain::paged_attention(q, k_cache, v_cache, rows, sizes);
    }

    let (q, k_cache, v_cache) = (
        q.contiguous()?,
        k_cache.contiguous()?,
        v_cache.contiguous()?,
    );
    let sizes = Sizes {
        kv_heads,
        group: heads / kv_heads,
        dh,
        block_size,
        scale,
        window: window.unwrap_or(usize::MAX),
    };
    let (q, k, v) = (
        Floats::of(&q)?,
        Floats::of(&k_cache)?,
        Floats::of(&v_cache)?,
    );
    tensor(attend(&q, &k, &v, rows, sizes), (t, heads * dh))
}

/// Causal attention of whole sequences to their own keys and values: the same numbers, bit for bit, as
/// [`paged_attention`] over a cache that holds them. q [T, H, Dh], k, v [T, Hkv, Dh]; `sequences`: (first row,
/// length) of each, none overlapping. Differentiable in q, k and v. -> [T, H * Dh]
///
/// Fails if shapes do not fit, if a sequence reaches beyond the rows, if two overlap, or for a window of 0.
pub fn self_attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    sequences: &[(usize, usize)],
    scale: f32,
    window: Option<usize>,
) -> Result<Tensor> {
    let ((t, heads, dh), (kt, kv_heads, k_dh)) = (q.dims3()?, k.dims3()?);
    if v.dims3()? != (kt, kv_heads, k_dh)
        || (kt, k_dh) != (t, dh)
        || dh == 0
        || kv_heads == 0
        || heads == 0
        || heads % kv_heads != 0
        || window == Some(0)
    {
        bail!(
            "attention of q {:?} to k {:?} and v {:?}, window {window:?}",
            q.shape(),
            k.shape(),
            v.shape()
        )
    }
    let mut sequences = sequences.to_vec();
    sequences.sort_unstable();
    let ends = sequences
        .iter()
        .map(|&(start, len)| start.checked_add(len).filter(|&end| end <= t));
    let Some(ends) = ends.collect::<Option<Vec<_>>>() else {
        bail!("a sequence reaches beyond {t} rows")
    };
    if ends
        .iter()
        .zip(&sequences[1.min(sequences.len())..])
        .any(|(&end, &(start, _))| start < end)
    {
        bail!("sequences of an attention call overlap")
    }
    if !known(q) {
        let sizes = plain::Sizes { scale, window };
        return plain::self_attention(q, k, v, &sequences, sizes);
    }
    let (q, k, v) = (q.contiguous()?, k.contiguous()?, v.contiguous()?);
    let sizes = Sizes {
        kv_heads,
        group: heads / kv_heads,
        dh,
        block_size: 1,
        scale,
        window: window.unwrap_or(usize::MAX),
    };
    // Every row is a block of its own.
    let slots: Vec<u32> = (0..u32::try_from(t).map_err(candle_core::Error::wrap)?).collect();
    let rows: Vec<_> = sequences
        .iter()
        .map(|&(start, len)| AttentionRow {
            start,
            len,
            position: 0,
            blocks: &slots[start..start + len],
        })
        .collect();
    let out = attend(
        &Floats::of(&q)?,
        &Floats::of(&k)?,
        &Floats::of(&v)?,
        &rows,
        sizes,
    ); // [T, H Dh]
    recorded3(
        "self_attention",
        [&q, &k, &v],
        out,
        (t, heads * dh),
        move |[q, k, v], _, dy| {
            let (dq, dk, dv) = attend_back(
                &Floats::of(q)?,
                &Floats::of(k)?,
                &Floats::of(v)?,
                &Floats::of(dy)?,
                &sequences,
                sizes,
            );
            let of = |values, like: &Tensor| tensor(values, like.shape()).map(Some);
            Ok((of(dq, q)?, of(dk, k)?, of(dv, v)?))
        },
    )
}

/// Sizes and switches of a checked call. `group`: query heads of a KV head.
#[derive(Clone, Copy)]
struct Sizes {
    kv_heads: usize,
    group: usize,
    dh: usize,
    block_size: usize,
    scale: f32,
    window: usize,
}

/// q [T, H, Dh], k, v [slots, Hkv, Dh] -> [T, H * Dh].
fn attend(q: &[f32], k: &[f32], v: &[f32], rows: &[AttentionRow<'_>], sizes: Sizes) -> Vec<f32> {
    let Sizes {
        kv_heads,
        group,
        dh,
        block_size,
        scale,
        window,
    } = sizes;
    let heads = kv_heads * group;
    let (width, named) = (heads * dh, rows.iter().map(|row| row.len).sum::<usize>());
    let mut out = Vec::with_capacity(q.len()); // [T, H * Dh]
    if named * width < q.len() {
        out.resize(q.len(), 0.0f32);
    }
    let call = Call {
        q,
        k,
        v,
        out: Shared(out.as_mut_ptr()),
        kv_heads,
        group,
        dh,
        block_size,
        scale,
        window,
    };
    let (mut tiles, mut work) = (Vec::new(), 0);
    for row in rows {
        let mut first = 0;
        while first < row.len {
            let keys = (row.position + first + 1).min(call.window);
            let queries = first
                ..row
                    .len
                    .min(first + (TILE_SCORES / (group * keys)).clamp(1, TILE_QUERIES));
            work += 2 * queries.len() * heads * dh * keys;
            tiles.extend((0..kv_heads).map(|kv_head| Tile {
                row,
                kv_head,
                queries: queries.clone(),
            }));
            first = queries.end;
        }
    }
    spread(tiles.len(), 1, work, |range| {
        let mut scratch = Scratch::default();
        for tile in &tiles[range] {
            call.tile(tile, &mut scratch);
        }
    });
    // SAFETY: the rows do not overlap; where they are not all of q's, zeros stand already, and else each row is written.
    unsafe { out.set_len(q.len()) }
    out
}

/// What a thread computes its tiles in, one after the other: every tile writes what it reads.
#[derive(Default)]
struct Scratch {
    /// [rows, Dh]: queries, later what is summed for them.
    q: Vec<f32>,
    /// [rows, length]
    scores: Vec<f32>,
    /// [Dh, 16]
    turned: Vec<f32>,
    /// `[rows]`
    sums: Vec<f32>,
}

/// The first `len` values of a buffer that grows but is not cleared.
fn at_least(buffer: &mut Vec<f32>, len: usize) -> &mut [f32] {
    if buffer.len() < len {
        buffer.resize(len, 0.0);
    }
    &mut buffer[..len]
}

/// Gradients of q [T, H, Dh], k and v [T, Hkv, Dh] for that of the result, dy [T, H * Dh], with the weights
/// made again: with P = softmax(scale Q Kᵀ) and dS = P (dY Vᵀ - Σ P dY Vᵀ), dV = Pᵀ dY, dQ = scale dS K and
/// dK = scale dSᵀ Q, for each sequence and KV head, its query heads one below the other.
fn attend_back(
    q: &[f32],
    k: &[f32],
    v: &[f32],
    dy: &[f32],
    sequences: &[(usize, usize)],
    sizes: Sizes,
) -> (Vec<f32>, Vec<f32>, Vec<f32>) {
    let Sizes {
        kv_heads,
        group,
        dh,
        ..
    } = sizes;
    let (mut dq, mut dk, mut dv) = (
        vec![0.0f32; q.len()],
        vec![0.0f32; k.len()],
        vec![0.0f32; v.len()],
    );
    let parts: Vec<_> = sequences
        .iter()
        .flat_map(|&sequence| (0..kv_heads).map(move |head| (sequence, head)))
        .collect();
    let parts: Vec<_> = parts
        .into_par_iter()
        .map(|((start, len), head)| {
            let of = |values: &[f32], heads: usize| -> Vec<f32> {
                let width = heads * dh;
                (start..start + len)
                    .flat_map(|row| &values[(row * kv_heads + head) * width..][..width])
                    .copied()
                    .collect()
            };
            // Keys and values padded with zeros to whole vectors of weights.
            let padded = |values: &[f32]| {
                let mut rows = of(values, 1);
                rows.resize(len.next_multiple_of(LANES) * dh, 0.0);
                rows
            };
            let part = Part {
                q: of(q, group),
                k: padded(k),
                v: padded(v),
                dy: of(dy, group),
            };
            ((start, len, head), part.back(sizes))
        })
        .collect();
    for ((start, len, head), (part_q, part_k, part_v)) in parts {
        let put = |to: &mut [f32], from: &[f32], heads: usize| {
            let width = heads * dh;
            for (row, from) in from.chunks_exact(width).take(len).enumerate() {
                to[((start + row) * kv_heads + head) * width..][..width].copy_from_slice(from);
            }
        };
        put(&mut dq, &part_q, group);
        put(&mut dk, &part_k, 1);
        put(&mut dv, &part_v, 1);
    }
    (dq, dk, dv)
}

/// One KV head of one sequence of L tokens. q, dy [L group, Dh], k, v [L', Dh], L' >= L a whole number of sixteens.
struct Part {
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    dy: Vec<f32>,
}

impl Part {
    /// (dq [L group, Dh], dk [L', Dh], dv [L', Dh]).
    fn back(&self, sizes: Sizes) -> (Vec<f32>, Vec<f32>, Vec<f32>) {
        let Sizes {
            group,
            dh,
            scale,
            window,
            ..
        } = sizes;
        let (len, rows) = (self.k.len() / dh, self.q.len() / dh);
        let product = |x: &[f32], w: Right<'_>, k: usize, n: usize| {
            let mut out = vec![0.0f32; x.len() / k.max(1) * n];
            products(&mut [Product {
                x,
                w,
                out: &mut out,
                k,
                n,
                begin: Begin::Zero,
            }]);
            out
        };
        let mut p = product(&self.q, Right::Columns(&self.k), dh, len); // [rows, L']
        for (query, scores) in p.chunks_exact_mut(group * len).enumerate() {
            let visible = (query + 1).saturating_sub(window)..query + 1;
            for weights in scores.chunks_exact_mut(len) {
                for weight in weights.iter_mut() {
                    *weight *= scale;
                }
                let mut sum = 0.0;
                run(Weigh {
                    weights,
                    visible: visible.clone(),
                    sum: &mut sum,
                });
                for weight in weights {
                    *weight /= sum;
                }
            }
        }
        let dv = product(&transpose(&p, rows, len), Right::Steps(&self.dy), rows, dh); // [L', Dh]
        let mut ds = product(&self.dy, Right::Columns(&self.v), dh, len); // [rows, L']
        for (ds, p) in ds.chunks_exact_mut(len).zip(p.chunks_exact(len)) {
            let mean: f32 = ds.iter().zip(p).map(|(d, p)| d * p).sum();
            for (d, p) in ds.iter_mut().zip(p) {
                *d = scale * p * (*d - mean);
            }
        }
        let dq = product(&ds, Right::Steps(&self.k), len, dh); // [rows, Dh]
        let dk = product(&transpose(&ds, rows, len), Right::Steps(&self.q), rows, dh); // [L', Dh]
        (dq, dk, dv)
    }
}

/// Scores of a tile: 128 KB of f32, so that they stay in L2 beside the keys.
const TILE_SCORES: usize = 1 << 15;
/// Queries of a tile: enough to pay for turning the keys, few enough that the causal corner costs little.
const TILE_QUERIES: usize = 32;

fn check_row(row: &AttentionRow<'_>, t: usize, blocks: usize, block_size: usize) -> Result<()> {
    if row.start.checked_add(row.len).is_none_or(|end| end > t) {
        bail!("queries {} + {} of {t} rows", row.start, row.len)
    }
    let slots = row.blocks.len().saturating_mul(block_size);
    if row
        .position
        .checked_add(row.len)
        .is_none_or(|end| end > slots)
    {
        bail!(
            "positions {} + {} in {} blocks of {block_size}",
            row.position,
            row.len,
            row.blocks.len()
        )
    }
    if let Some(block) = row.blocks.iter().find(|&&block| block as usize >= blocks) {
        bail!("block {block} of a cache of {blocks} blocks")
    }
    Ok(())
}

/// Queries of a row, counted from its first, with the heads that share a KV head.
struct Tile<'a> {
    row: &'a AttentionRow<'a>,
    kv_head: usize,
    queries: Range<usize>,
}

/// A checked call. `group`: query heads of a KV head.
struct Call<'a> {
    q: &'a [f32],
    k: &'a [f32],
    v: &'a [f32],
    out: Shared<f32>,
    kv_heads: usize,
    group: usize,
    dh: usize,
    block_size: usize,
    scale: f32,
    window: usize,
}

impl Call<'_> {
    /// Positions of the keys that the query at `position` sees.
    fn visible(&self, position: usize) -> Range<usize> {
        (position + 1).saturating_sub(self.window)..position + 1
    }

    /// Where a key or value of a KV head begins in its cache.
    fn at(&self, tile: &Tile<'_>, key: usize) -> usize {
        let slot = tile.row.blocks[key / self.block_size] as usize * self.block_size
            + key % self.block_size;
        (slot * self.kv_heads + tile.kv_head) * self.dh
    }

    /// Where the heads of the tile begin in a row of q and of out.
    fn heads_at(&self, tile: &Tile<'_>, query: usize) -> usize {
        ((tile.row.start + query) * self.kv_heads + tile.kv_head) * self.group * self.dh
    }

    /// Rows (queries times heads) of a tile that see keys of `block`: the others' scores are not asked for.
    fn seeing(&self, tile: &Tile<'_>, block: Range<usize>) -> Range<usize> {
        let first = tile.row.position + tile.queries.start;
        let count = tile.queries.len();
        let from = block.start.saturating_sub(first).min(count);
        // The last query whose window reaches back to the block's last key.
        let reach = (block.end - 1).saturating_add(self.window);
        let to = reach.saturating_sub(first).min(count);
        from * self.group..to.max(from) * self.group
    }

    fn tile(&self, tile: &Tile<'_>, scratch: &mut Scratch) {
        let &Self { group, dh, .. } = self;
        let queries = tile.queries.clone();
        let first = self.visible(tile.row.position + queries.start).start / LANES * LANES;
        let keys = first..tile.row.position + queries.end;
        let length = keys.len().next_multiple_of(LANES);
        let rows = queries.len() * group;

        let q = at_least(&mut scratch.q, rows * dh); // [rows, Dh], rows = queries * group
        for (query, q) in queries.clone().zip(q.chunks_exact_mut(group * dh)) {
            let from = &self.q[self.heads_at(tile, query)..][..group * dh];
            for (q, from) in q.iter_mut().zip(from) {
                *q = from * self.scale;
            }
        }
        let scores = at_least(&mut scratch.scores, rows * length); // [rows, length]
        let turned = at_least(&mut scratch.turned, dh * LANES); // [Dh, 16]
        self.score(tile, keys.clone(), q, scores, turned);

        let sums = at_least(&mut scratch.sums, rows); // [rows]
        for (query, (scores, sums)) in queries.clone().zip(
            scores
                .chunks_exact_mut(group * length)
                .zip(sums.chunks_exact_mut(group)),
        ) {
            let visible = self.visible(tile.row.position + query);
            let visible = visible.start - first..visible.end - first;
            for (weights, sum) in scores.chunks_exact_mut(length).zip(sums) {
                run(Weigh {
                    weights,
                    visible: visible.clone(),
                    sum,
                });
            }
        }

        let out = q; // [rows, Dh], written before it is read: there is a key
        self.sum_values(tile, keys, scores, length, out);
        for (row, sum) in out.chunks_exact_mut(dh).zip(&*sums) {
            for value in row {
                *value /= sum;
            }
        }
        for (query, heads) in queries.zip(out.chunks_exact(group * dh)) {
            // SAFETY: rows of a call do not overlap and tiles share out the queries and KV heads of a row, so these
            // floats of out, as many as q has, are this tile's own.
            unsafe {
                let to = self.out.get().add(self.heads_at(tile, query));
                std::ptr::copy_nonoverlapping(heads.as_ptr(), to, group * dh);
            }
        }
    }

    /// scores [rows, length] = q [rows, Dh] Kᵀ, of the rows that see any of sixteen keys. turned [Dh, 16].
    fn score(
        &self,
        tile: &Tile<'_>,
        keys: Range<usize>,
        q: &[f32],
        scores: &mut [f32],
        turned: &mut [f32],
    ) {
        let dh = self.dh;
        let length = keys.len().next_multiple_of(LANES);
        for from in keys.clone().step_by(LANES) {
            let mut sixteen = [&[][..]; LANES];
            for (lane, k) in sixteen.iter_mut().enumerate() {
                // Behind the last key: the first of these again, seen by nobody.
                let key = if from + lane < keys.end {
                    from + lane
                } else {
                    from
                };
                *k = &self.k[self.at(tile, key)..][..dh];
            }
            run(Turn {
                rows: &sixteen,
                to: turned,
            });
            let rows = self.seeing(tile, from..from + LANES);
            let q = &q[rows.start * dh..rows.end * dh];
            let to = &mut scores[rows.start * length + from - keys.start..];
            // SAFETY: q is rows of Dh, `turned` Dh steps of 16, and rows of `length` have 16 scores from here on.
            unsafe {
                multiply(
                    Left {
                        at: q.as_ptr(),
                        row: dh,
                    },
                    Steps {
                        at: turned.as_ptr(),
                        row: LANES,
                    },
                    Out {
                        at: to.as_mut_ptr(),
                        row: length,
                        columns: LANES,
                    },
                    rows.len(),
                    dh,
                    Begin::Zero,
                );
            }
        }
    }

    /// out [rows, Dh] = weights [rows, length] V.
    fn sum_values(
        &self,
        tile: &Tile<'_>,
        keys: Range<usize>,
        weights: &[f32],
        length: usize,
        out: &mut [f32],
    ) {
        let dh = self.dh;
        let stride = self.kv_heads * dh;
        // Keys up to the first query's own are summed for all rows at once, those behind it sixteen at a time.
        let common = tile.row.position + tile.queries.start + 1;
        let mut from = keys.start;
        while from < keys.end {
            let end = if from < common {
                common
            } else {
                keys.end.min(from + LANES)
            };
            let rows = if from < common {
                0..out.len() / dh
            } else {
                let first = from - (common - 1);
                first * self.group..out.len() / dh
            };
            let at = self.at(tile, from);
            let mut steps = self.block_size - from % self.block_size;
            // Blocks that lie one behind the other are one: fewer sums go through memory.
            while from + steps < end && self.at(tile, from + steps) == at + steps * stride {
                steps += self.block_size;
            }
            let steps = steps.min(end - from);
            let v = &self.v[at..];
            for column in (0..dh).step_by(LANES) {
                let columns = LANES.min(dh - column);
                let mut padded = Vec::new(); // [steps, 16] where heads are no whole number of sixteens
                let right = if columns == LANES {
                    let v = &v[column..column + (steps - 1) * stride + LANES];
                    Steps {
                        at: v.as_ptr(),
                        row: stride,
                    }
                } else {
                    padded.resize(steps * LANES, 0.0);
                    for (step, to) in padded.chunks_exact_mut(LANES).enumerate() {
                        to[..columns].copy_from_slice(&v[step * stride + column..][..columns]);
                    }
                    Steps {
                        at: padded.as_ptr(),
                        row: LANES,
                    }
                };
                // SAFETY: rows of `length` weights have `steps` from here on, `right` was bounded above, and rows
                // of Dh have `columns` from `column` on.
                unsafe {
                    multiply(
                        Left {
                            at: weights[rows.start * length + from - keys.start..].as_ptr(),
                            row: length,
                        },
                        right,
                        Out {
                            at: out[rows.start * dh + column..].as_mut_ptr(),
                            row: dh,
                            columns,
                        },
                        rows.len(),
                        steps,
                        if from == keys.start {
                            Begin::Zero
                        } else {
                            Begin::Out
                        },
                    );
                }
            }
            from += steps;
        }
    }
}

/// Sixteen keys of Dh to Dh sixteens: one vector is the same channel of sixteen keys.
struct Turn<'a> {
    rows: &'a [&'a [f32]; LANES],
    to: &'a mut [f32],
}

impl Kernel for Turn<'_> {
    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let Self { rows, to } = self;
        let dh = rows[0].len();
        for (half, rows) in rows.as_chunks::<8>().0.iter().enumerate() {
            for channel in (0..dh / 8 * 8).step_by(8) {
                let mut at = [std::ptr::null(); 8];
                for (at, row) in at.iter_mut().zip(rows) {
                    *at = row[channel..channel + 8].as_ptr();
                }
                let to = &mut to[channel * LANES..(channel + 8) * LANES][8 * half..];
                // SAFETY: eight channels of eight rows; behind `to` lie 8 * 16 floats but for at most 8.
                unsafe { isa.turn(&at, to.as_mut_ptr()) };
            }
            for channel in dh / 8 * 8..dh {
                for (lane, row) in rows.iter().enumerate() {
                    to[channel * LANES + 8 * half + lane] = row[channel];
                }
            }
        }
    }
}

/// Scores of one query and head to weights e^(score - largest), in place, and their sum; not seen: exactly 0.
struct Weigh<'a> {
    /// A whole number of sixteens.
    weights: &'a mut [f32],
    visible: Range<usize>,
    sum: &'a mut f32,
}

impl Kernel for Weigh<'_> {
    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let Self {
            weights,
            visible,
            sum,
        } = self;
        // Sixteens that are not seen at all have no part in it: what they would add is exactly 0.
        let whole = visible.start / LANES * LANES..visible.end.next_multiple_of(LANES);
        weights[whole.start..visible.start].fill(f32::NEG_INFINITY);
        weights[visible.end..whole.end].fill(f32::NEG_INFINITY);
        let (sixteens, _) = weights[whole.clone()].as_chunks_mut::<LANES>();
        let mut largest = isa.splat(f32::NEG_INFINITY);
        for scores in &*sixteens {
            largest = isa.max(of_lanes(isa, scores), largest);
        }
        let largest = lanes(isa, largest)
            .into_iter()
            .fold(f32::NEG_INFINITY, f32::max);
        for scores in &mut *sixteens {
            *scores = lanes(
                isa,
                exp(isa, isa.sub(of_lanes(isa, scores), isa.splat(largest))),
            );
        }
        weights[..visible.start].fill(0.0);
        weights[visible.end..].fill(0.0);
        let (sixteens, _) = weights[whole].as_chunks::<LANES>();
        let mut total = isa.splat(0.0);
        for weights in sixteens {
            total = isa.add(total, of_lanes(isa, weights));
        }
        *sum = lanes(isa, total).iter().sum();
    }
}

/// The meaning, for one query of one head in f64: q [Dh], keys and values [L, Dh] -> [Dh].
#[cfg(test)]
fn reference(q: &[f32], keys: &[&[f32]], values: &[&[f32]], scale: f32) -> Vec<f64> {
    let wide = |v: &f32| f64::from(*v);
    let scores: Vec<f64> = keys
        .iter()
        .map(|k| {
            f64::from(scale)
                * q.iter()
                    .zip(*k)
                    .map(|(q, k)| wide(q) * wide(k))
                    .sum::<f64>()
        })
        .collect();
    let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let weights: Vec<f64> = scores.iter().map(|score| (score - largest).exp()).collect();
    let sum: f64 = weights.iter().sum();
    let of = |d: usize| {
        weights
            .iter()
            .zip(values)
            .map(|(weight, v)| weight * wide(&v[d]))
            .sum::<f64>()
            / sum
    };
    (0..q.len()).map(of).collect()
}
