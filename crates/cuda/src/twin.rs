//! Every kernel once more, as plain loops on the CPU: what it is held against.
//!
//! Same names and operands as [`crate::ops`]; sums are in f64, results are rounded where the kernels round. Nothing here is fast.

use half::{bf16, f16};

use crate::ops::{Attention, Draw, Heads};

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

/// `rms_norm` of heads `first ..` `first + heads` of each row of x [T, stride], in place and not rounded.
pub fn head_norm(
    x: &mut [f32],
    gain: &[bf16],
    first: usize,
    heads: usize,
    stride: usize,
    eps: f32,
) {
    let dh = gain.len();
    for row in x.chunks_exact_mut(stride) {
        for head in row[first * dh..(first + heads) * dh].chunks_exact_mut(dh) {
            let mean = head.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / dh as f64;
            let factor = 1.0 / (mean + f64::from(eps)).sqrt();
            for (x, gain) in head.iter_mut().zip(gain) {
                *x = (f64::from(*x) * factor * wide(*gain)) as f32;
            }
        }
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
pub fn mass(k: &[f32], v: &[f32], r1: usize, r2: usize) -> f64 {
    let norm = |row: &[f32]| {
        let squares = row.iter().map(|x| f64::from(*x).powi(2));
        squares.sum::<f64>().sqrt()
    };
    let rows = k.chunks_exact(r1).zip(v.chunks_exact(r2));
    rows.map(|(k, v)| norm(k) * norm(v)).sum()
}

/// x [T, N] += bias `[N]`.
pub fn add_bias(x: &mut [f32], bias: &[bf16]) {
    for row in x.chunks_exact_mut(bias.len()) {
        for (x, bias) in row.iter_mut().zip(bias) {
            *x += bias.to_f32();
        }
    }
}

/// Rows of weights [out, in] of 4 or 8 bits, as kernels/quant.cu has them.
pub fn dequantise(codes: &[u32], scales: &[u32], bits: usize) -> Vec<f32> {
    let block = |(codes, scale): (&[u32], &u32)| {
        let bytes: Vec<u8> = codes.iter().flat_map(|word| word.to_le_bytes()).collect();
        let codes: Vec<f32> = if bits == 4 {
            let halves = [0, 4].map(|shift| bytes.iter().map(move |byte| byte >> shift & 15));
            halves.into_iter().flatten().map(f32::from).collect()
        } else {
            bytes.iter().map(|byte| f32::from(*byte as i8)).collect()
        };
        let half = |bits: u32| f16::from_bits(bits as u16).to_f32();
        let (d, m) = (half(*scale), half(scale >> 16));
        codes
            .into_iter()
            .map(move |code| code.mul_add(d, m))
            .collect::<Vec<_>>()
    };
    codes
        .chunks_exact(bits)
        .zip(scales)
        .flat_map(block)
        .collect()
}

/// y [T, out] = x [T, in] wᵀ.
pub fn multiply(x: &[bf16], w: &[f32], features: usize) -> Vec<f32> {
    let dot = |x: &[bf16], w: &[f32]| {
        let products = x.iter().zip(w).map(|(x, w)| wide(*x) * f64::from(*w));
        products.sum::<f64>() as f32
    };
    x.chunks_exact(features)
        .flat_map(|x| w.chunks_exact(features).map(move |w| dot(x, w)))
        .collect()
}

/// to `[n]` += weight from `[n]`.
pub fn add_scaled(to: &mut [f32], from: &[f32], weight: f32) {
    for (to, from) in to.iter_mut().zip(from) {
        *to = weight.mul_add(*from, *to);
    }
}

/// Each number, rounded.
pub fn narrow(from: &[f32]) -> Vec<bf16> {
    from.iter().map(|x| bf16::from_f32(*x)).collect()
}

/// Rotates q and k of qkv [T, (H + 2 Hkv) Dh] and writes k, v into the caches [slots, Hkv Dh] at cache_slots `[T]`; -> q [T, H Dh]. Rows
/// whose slot is beyond the cache are left out, and 0. cos, sin [max, Dh/2].
#[expect(clippy::too_many_arguments, reason = "the operands of one kernel")]
pub fn rope_append(
    qkv: &[f32],
    k_cache: &mut [bf16],
    v_cache: &mut [bf16],
    cos: &[f32],
    sin: &[f32],
    positions: &[u32],
    cache_slots: &[u32],
    heads: Heads,
) -> Vec<bf16> {
    let (half, width) = (heads.dim / 2, heads.keys * heads.dim);
    let mut queries = Vec::new();
    for ((row, &position), &slot) in qkv
        .chunks_exact(heads.stride())
        .zip(positions)
        .zip(cache_slots)
    {
        let slot = slot as usize;
        if (slot + 1) * width > k_cache.len() {
            queries.extend(std::iter::repeat_n(bf16::ZERO, heads.queries * heads.dim));
            continue;
        }
        let angles = position as usize * half..(position as usize + 1) * half;
        let (cos, sin) = (&cos[angles.clone()], &sin[angles]);
        let turned = |head: &[f32]| {
            let (low, high) = head.split_at(half);
            let low_of = |i: usize| bf16::from_f32(low[i] * cos[i] - high[i] * sin[i]);
            let high_of = |i: usize| bf16::from_f32(high[i] * cos[i] + low[i] * sin[i]);
            (0..half)
                .map(low_of)
                .chain((0..half).map(high_of))
                .collect::<Vec<_>>()
        };
        let (q, kv) = row.split_at(heads.queries * heads.dim);
        let (k, v) = kv.split_at(width);
        queries.extend(q.chunks_exact(heads.dim).flat_map(turned));
        let k: Vec<bf16> = k.chunks_exact(heads.dim).flat_map(turned).collect();
        k_cache[slot * width..(slot + 1) * width].copy_from_slice(&k);
        v_cache[slot * width..(slot + 1) * width].copy_from_slice(&narrow(v));
    }
    queries
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

/// out [T, H Dh]: causal attention of q [T, H Dh] over caches [blocks block_size, Hkv Dh]; rows that no sequence names give 0.
pub fn attend(
    q: &[bf16],
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
    let mut out = vec![bf16::ZERO; q.len()];
    for sequence in sequences {
        for i in 0..sequence.length {
            let (row, at) = (sequence.start + i, sequence.position + i);
            let oldest = if window > 0 {
                (at + 1).saturating_sub(window)
            } else {
                0
            };
            for head in 0..queries {
                let q = &q[(row * queries + head) * dim..][..dim];
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
    a: &[f32],
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
    let row = |((a, &slot), &scale): ((&[f32], &i32), &f32)| {
        let Ok(slot) = usize::try_from(slot) else {
            return vec![bf16::ZERO; r2];
        };
        let core = &arena[slot * slot_size + offset..(slot + 1) * slot_size];
        let a: Vec<f64> = a.iter().map(|x| f64::from(*x)).collect();
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

/// c [T, R2] times what gates leave of it, and doubts [T, 2] taken further; gates of slots `[T]` (-1: none): (G + lambda I)⁻¹ G [R1, R1] and
/// 1 - e of each.
pub fn close_gates(
    c: &mut [bf16],
    doubts: &mut [f32],
    a: &[f32],
    gates: &[(Vec<bf16>, f32)],
    slots: &[i32],
    (threshold, width): (f32, f32),
) {
    let (r1, r2) = (a.len() / slots.len(), c.len() / slots.len());
    for (row, &slot) in slots.iter().enumerate() {
        let gate = usize::try_from(slot).ok().and_then(|slot| gates.get(slot));
        let Some((known, rest)) = gate.filter(|(_, rest)| *rest > 0.0) else {
            continue;
        };
        let key: Vec<f64> = a[row * r1..(row + 1) * r1]
            .iter()
            .map(|x| f64::from(*x))
            .collect();
        let known_of = |known: &[bf16]| {
            let products = key.iter().zip(known).map(|(x, y)| x * wide(*y));
            products.sum::<f64>()
        };
        let spanned: f64 = key
            .iter()
            .zip(known.chunks_exact(r1))
            .map(|(x, known)| x * known_of(known))
            .sum();
        let length: f64 = key.iter().map(|x| x * x).sum();
        let leverage = if length > 0.0 { spanned / length } else { 0.0 };
        let doubt = &mut doubts[2 * row..2 * row + 2];
        doubt[0] += ((1.0 - leverage) / f64::from(*rest)) as f32;
        doubt[1] += 1.0;
        let far = (f64::from(doubt[0] / doubt[1]) - f64::from(threshold)) / f64::from(width);
        for c in &mut c[row * r2..(row + 1) * r2] {
            *c = bf16::from_f64(wide(*c) / (1.0 + far.exp()));
        }
    }
}

/// The token that a draw takes of a row of logits `[V]`, and its log-probability; `seen` are the tokens that a penalty is for.
pub fn draw(logits: &[f32], draw: &Draw, seen: &[u32]) -> (u32, f32) {
    let tamed = |x: f32| {
        if x.is_nan() {
            f32::MIN
        } else {
            x.clamp(f32::MIN, f32::MAX)
        }
    };
    let untouched: Vec<f32> = logits.iter().map(|x| tamed(*x)).collect();
    let mut scores = untouched.clone();
    for &token in seen {
        let score = &mut scores[token as usize];
        *score = tamed(if *score > 0.0 {
            *score / draw.penalty
        } else {
            *score * draw.penalty
        });
    }
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|a, b| scores[*b].partial_cmp(&scores[*a]).unwrap_or(a.cmp(b)));
    let best = f64::from(scores[order[0]]);
    let weight = |id: &usize| ((f64::from(scores[*id]) - best) / f64::from(draw.temperature)).exp();
    let sum = |order: &[usize]| order.iter().map(weight).sum::<f64>();
    let mut token = order[0];
    if draw.temperature > 0.0 {
        if draw.top_k == 0 && draw.top_p == 1.0 && draw.min_p == 0.0 {
            order.sort_unstable();
        }
        if draw.top_k > 0 {
            order.truncate(draw.top_k as usize);
        }
        let mut kept = order.len();
        if draw.top_p < 1.0 {
            let (all, mut reached) = (sum(&order), 0.0);
            let enough = order.iter().position(|id| {
                reached += weight(id);
                reached >= f64::from(draw.top_p) * all
            });
            kept = enough.map_or(kept, |at| at + 1);
        }
        if draw.min_p > 0.0 {
            let enough = order
                .iter()
                .filter(|id| weight(id) >= f64::from(draw.min_p));
            kept = kept.min(enough.count()).max(1);
        }
        order.truncate(kept);
        let (point, mut reached) = (draw.point * sum(&order), 0.0);
        let at = order.iter().position(|id| {
            reached += weight(id);
            point < reached && weight(id) > 0.0
        });
        let last = order.iter().rposition(|id| weight(id) > 0.0);
        token = order[at.or(last).unwrap_or(0)];
    }
    let most = untouched.iter().copied().fold(f32::MIN, f32::max);
    let exponents = untouched
        .iter()
        .map(|x| (f64::from(*x) - f64::from(most)).exp());
    let normaliser = f64::from(most) + exponents.sum::<f64>().ln();
    (
        token as u32,
        (f64::from(untouched[token]) - normaliser) as f32,
    )
}
