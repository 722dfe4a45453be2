//! Every kernel once more, as plain loops on the CPU: what it is held against.
//!
//! Same names and operands as [`crate::ops`]; sums are in f64, results are rounded where the kernels round. Nothing here is fast.

use half::bf16;

use crate::ops::{Attention, Heads};

fn wide(x: bf16) -> f64 {
    x.to_f64()
}

/// y [T, D] = x [T, D] / sqrt(mean(x²) + eps) * gain `[D]`; no gain: 1.
pub fn rms_norm(x: &[bf16], gain: Option<&[bf16]>, d: usize, eps: f32) -> Vec<bf16> {
    let row = |x: &[bf16]| {
        let mean = x.iter().map(|x| wide(*x).powi(2)).sum::<f64>() / d as f64;
        let factor = 1.0 / (mean + f64::from(eps)).sqrt();
        let value = |(i, x): (usize, &bf16)| {
            bf16::from_f64(wide(*x) * factor * gain.map_or(1.0, |gain| wide(gain[i])))
        };
        x.iter().enumerate().map(value).collect::<Vec<_>>()
    };
    x.chunks_exact(d).flat_map(row).collect()
}

/// The same of the residual stream h [T, D], which is f32.
pub fn norm_residual(h: &[f32], gain: &[bf16], d: usize, eps: f32) -> Vec<bf16> {
    let row = |h: &[f32]| {
        let mean = h.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / d as f64;
        let factor = 1.0 / (mean + f64::from(eps)).sqrt();
        let value = |(x, gain): (&f32, &bf16)| bf16::from_f64(f64::from(*x) * factor * wide(*gain));
        h.iter().zip(gain).map(value).collect::<Vec<_>>()
    };
    h.chunks_exact(d).flat_map(row).collect()
}

/// h [T, D] += y [T, D], both f32; -> `rms_norm` of h.
pub fn add_rms_norm(h: &mut [f32], y: &[f32], gain: &[bf16], d: usize, eps: f32) -> Vec<bf16> {
    for (h, y) in h.iter_mut().zip(y) {
        *h += y;
    }
    norm_residual(h, gain, d, eps)
}

/// `rms_norm` of heads `first ..` `first + heads` of each row of x [T, stride], in place.
pub fn head_norm(
    x: &mut [bf16],
    gain: &[bf16],
    first: usize,
    heads: usize,
    stride: usize,
    eps: f32,
) {
    let dh = gain.len();
    for row in x.chunks_exact_mut(stride) {
        let part = &mut row[first * dh..(first + heads) * dh];
        let normed = rms_norm(part, Some(gain), dh, eps);
        part.copy_from_slice(&normed);
    }
}

/// out [T, D] = table [V, D] at index `[T]`; beyond the table: 0.
pub fn gather_rows(table: &[bf16], index: &[u32], d: usize) -> Vec<bf16> {
    let row = |&index: &u32| {
        table
            .chunks_exact(d)
            .nth(index as usize)
            .map_or_else(|| vec![bf16::ZERO; d], <[bf16]>::to_vec)
    };
    index.iter().flat_map(row).collect()
}

/// m [T, F] = silu(gate) up of gate_up [T, 2F].
pub fn silu_mul(gate_up: &[bf16], f: usize) -> Vec<bf16> {
    let row = |row: &[bf16]| {
        let (gate, up) = row.split_at(f);
        gate.iter()
            .zip(up)
            .map(|(g, u)| bf16::from_f64(wide(*g) / (1.0 + (-wide(*g)).exp()) * wide(*u)))
            .collect::<Vec<_>>()
    };
    gate_up.chunks_exact(2 * f).flat_map(row).collect()
}

/// Σ ||k_t|| ||v_t|| over k [T, R1], v [T, R2].
pub fn mass(k: &[bf16], v: &[bf16], r1: usize, r2: usize) -> f64 {
    let norm = |row: &[bf16]| row.iter().map(|x| x.to_f64().powi(2)).sum::<f64>().sqrt();
    let rows = k.chunks_exact(r1).zip(v.chunks_exact(r2));
    rows.map(|(k, v)| norm(k) * norm(v)).sum()
}

/// x [T, N] += bias `[N]`.
pub fn add_bias(x: &mut [bf16], bias: &[bf16]) {
    for row in x.chunks_exact_mut(bias.len()) {
        for (x, bias) in row.iter_mut().zip(bias) {
            *x = bf16::from_f32(x.to_f32() + bias.to_f32());
        }
    }
}

/// Rotates q and k of qkv [T, (H + 2 Hkv) Dh] in place and writes k, v into the caches [slots, Hkv Dh] at cache_slots `[T]`; rows whose
/// slot is beyond the cache are left alone. cos, sin [max, Dh/2].
#[expect(clippy::too_many_arguments, reason = "the operands of one kernel")]
pub fn rope_append(
    qkv: &mut [bf16],
    k_cache: &mut [bf16],
    v_cache: &mut [bf16],
    cos: &[f32],
    sin: &[f32],
    positions: &[u32],
    cache_slots: &[u32],
    heads: Heads,
) {
    let (half, width) = (heads.dim / 2, heads.keys * heads.dim);
    for ((row, &position), &slot) in qkv
        .chunks_exact_mut(heads.stride())
        .zip(positions)
        .zip(cache_slots)
    {
        let slot = slot as usize;
        if (slot + 1) * width > k_cache.len() {
            continue;
        }
        let angles = position as usize * half..(position as usize + 1) * half;
        let (cos, sin) = (&cos[angles.clone()], &sin[angles]);
        for head in row
            .chunks_exact_mut(heads.dim)
            .take(heads.queries + heads.keys)
        {
            let (low, high) = head.split_at_mut(half);
            for i in 0..half {
                let (x, y) = (low[i].to_f32(), high[i].to_f32());
                low[i] = bf16::from_f32(x * cos[i] - y * sin[i]);
                high[i] = bf16::from_f32(y * cos[i] + x * sin[i]);
            }
        }
        let (_, kv) = row.split_at(heads.queries * heads.dim);
        let (k, v) = kv.split_at(width);
        k_cache[slot * width..(slot + 1) * width].copy_from_slice(k);
        v_cache[slot * width..(slot + 1) * width].copy_from_slice(v);
    }
}

/// One sequence of [`attend`].
#[derive(Clone, Debug)]
pub struct Sequence {
    /// First row of q.
    pub start: usize,
    /// Queries.
    pub length: usize,
    /// Position of the first.
    pub position: usize,
    /// Blocks in the cache.
    pub blocks: Vec<u32>,
}

/// out [T, H Dh]: causal attention of q (rows of qkv) over caches [blocks block_size, Hkv Dh]; rows that no sequence names give 0.
pub fn attend(
    qkv: &[bf16],
    k_cache: &[bf16],
    v_cache: &[bf16],
    sequences: &[Sequence],
    attention: &Attention,
) -> Vec<bf16> {
    let Attention {
        heads,
        block_size,
        window,
        ..
    } = *attention;
    let Heads { queries, keys, dim } = heads;
    let mut out = vec![bf16::ZERO; qkv.len() / heads.stride() * queries * dim];
    for sequence in sequences {
        for i in 0..sequence.length {
            let (row, at) = (sequence.start + i, sequence.position + i);
            let oldest = if window > 0 {
                (at + 1).saturating_sub(window)
            } else {
                0
            };
            for head in 0..queries {
                let q = &qkv[row * heads.stride() + head * dim..][..dim];
                let cached = |cache: &'_ [bf16], key: usize| {
                    let slot =
                        sequence.blocks[key / block_size] as usize * block_size + key % block_size;
                    let from = (slot * keys + head / (queries / keys)) * dim;
                    cache[from..from + dim]
                        .iter()
                        .map(|x| wide(*x))
                        .collect::<Vec<_>>()
                };
                let scores: Vec<f64> = (oldest..=at)
                    .map(|key| {
                        q.iter()
                            .zip(cached(k_cache, key))
                            .map(|(q, k)| wide(*q) * k)
                            .sum::<f64>()
                            / (dim as f64).sqrt()
                    })
                    .collect();
                let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let weights: Vec<f64> =
                    scores.iter().map(|score| (score - largest).exp()).collect();
                let sum: f64 = weights.iter().sum();
                let mut o = vec![0.0; dim];
                for (key, weight) in (oldest..=at).zip(&weights) {
                    for (o, v) in o.iter_mut().zip(cached(v_cache, key)) {
                        *o += weight / sum * v;
                    }
                }
                for (to, o) in out[(row * queries + head) * dim..][..dim].iter_mut().zip(o) {
                    *to = bf16::from_f64(o);
                }
            }
        }
    }
    out
}

/// Sizes of one site's cores in an arena: where they begin in a slot, R1, R2 and q (0: dense).
#[derive(Clone, Copy, Debug)]
pub struct CoreShape {
    /// Elements of a slot.
    pub slot_size: usize,
    /// Of the site in a slot.
    pub offset: usize,
    /// R1.
    pub r1: usize,
    /// R2.
    pub r2: usize,
    /// q.
    pub rank: usize,
}

/// c [T, R2] = scales `[T]` a [T, R1] N with each row's own N, out of slots `[T]`; -1: 0.
pub fn apply_cores(
    a: &[bf16],
    arena: &[bf16],
    slots: &[i32],
    scales: &[f32],
    shape: CoreShape,
) -> Vec<bf16> {
    let CoreShape {
        slot_size,
        offset,
        r1,
        r2,
        rank,
    } = shape;
    let dot = |x: &[f64], y: &[bf16]| x.iter().zip(y).map(|(x, y)| x * wide(*y)).sum::<f64>();
    let row = |((a, &slot), &scale): ((&[bf16], &i32), &f32)| {
        let Ok(slot) = usize::try_from(slot) else {
            return vec![bf16::ZERO; r2];
        };
        let core = &arena[slot * slot_size + offset..(slot + 1) * slot_size];
        let a: Vec<f64> = a.iter().map(|x| wide(*x)).collect();
        let (x, rows, width) = if rank == 0 {
            (a, core, r1)
        } else {
            (
                core[..rank * r1]
                    .chunks_exact(r1)
                    .map(|u| dot(&a, u))
                    .collect(),
                &core[rank * r1..],
                rank,
            )
        };
        rows.chunks_exact(width)
            .take(r2)
            .map(|row| bf16::from_f64(f64::from(scale) * dot(&x, row)))
            .collect()
    };
    a.chunks_exact(r1)
        .zip(slots)
        .zip(scales)
        .flat_map(row)
        .collect()
}

/// The token of the largest logit (plus noise at a temperature above 0), the first of equals. logits [T, V].
pub fn sample(logits: &[f32], temperatures: &[f32], seeds: &[u32], vocab: usize) -> Vec<u32> {
    let row = |((logits, &temperature), &seed): ((&[f32], &f32), &u32)| {
        let mut best = (f32::NEG_INFINITY, u32::MAX);
        for (token, logit) in (0u32..).zip(logits) {
            let noise = -(-uniform(seed, token).ln()).ln();
            let value = if temperature > 0.0 {
                logit / temperature + noise
            } else {
                *logit
            };
            if value > best.0 || best.1 == u32::MAX {
                best = (value, token);
            }
        }
        best.1
    };
    logits
        .chunks_exact(vocab)
        .zip(temperatures)
        .zip(seeds)
        .map(row)
        .collect()
}

/// A number in (0, 1) that hangs on a row's seed and a token alone (the finaliser of SplitMix64).
fn uniform(seed: u32, token: u32) -> f32 {
    let z = (u64::from(seed) << 32 | u64::from(token)).wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    let z = z ^ (z >> 31);
    ((z >> 41) as f32 + 0.5) * (1.0 / 8_388_608.0)
}
