//! rms_norm: y = x / sqrt(mean(x²) + eps) * gain, and silu_mul: y = g / (1 + exp(-g)) * u. Row by row.
//!
//! Squares are summed in sixteen lanes over ascending channels, then lane by lane, so a row gives the same
//! bits in any batch. Start at [`rms_norm`].

#[cfg(test)]
mod tests;

use candle_core::{Result, Tensor, bail};
use rayon::prelude::*;

use crate::{
    floats::{Floats, tensor},
    simd::LANES,
};

/// Elements below which another thread does not help.
const INLINE: usize = 1 << 15;

/// x [T, D] / sqrt(mean(x²) + eps) * gain [D]; no gain: 1. Leading dimensions of x beyond two are rows too.
pub fn rms_norm(x: &Tensor, gain: Option<&Tensor>, eps: f64) -> Result<Tensor> {
    let d = x.dim(candle_core::D::Minus1)?;
    let ones;
    let gain = match gain {
        Some(gain) if gain.dims1()? == d => gain.contiguous()?,
        Some(gain) => bail!("a gain of {} for rows of {d}", gain.elem_count()),
        None => {
            ones = Tensor::ones(d, candle_core::DType::F32, x.device())?;
            ones
        }
    };
    let (x, shape) = (x.contiguous()?, x.shape().clone());
    let (x, gain) = (Floats::of(&x)?, Floats::of(&gain)?); // [T, D], [D]
    let mut y = vec![0.0f32; x.len()]; // [T, D]
    #[expect(clippy::cast_possible_truncation, reason = "eps is a small constant")]
    let eps = eps as f32;
    if d > 0 {
        let row = |(y, x): (&mut [f32], &[f32])| normalise(x, &gain, eps, y);
        if x.len() <= INLINE {
            y.chunks_exact_mut(d).zip(x.chunks_exact(d)).for_each(row);
        } else {
            y.par_chunks_exact_mut(d).zip(x.par_chunks_exact(d)).with_min_len((INLINE / 4).div_ceil(d)).for_each(row);
        }
    }
    tensor(y, shape)
}

/// One row.
#[inline]
fn normalise(x: &[f32], gain: &[f32], eps: f32, y: &mut [f32]) {
    let (blocks, tail) = x.as_chunks::<LANES>();
    let mut lanes = [0.0f32; LANES];
    for block in blocks {
        for (sum, x) in lanes.iter_mut().zip(block) {
            *sum += x * x;
        }
    }
    for (sum, x) in lanes.iter_mut().zip(tail) {
        *sum += x * x;
    }
    #[expect(clippy::cast_precision_loss, reason = "a row has far fewer than 2^24 channels")]
    let mean = lanes.iter().sum::<f32>() / x.len() as f32;
    let factor = 1.0 / (mean + eps).sqrt();
    for ((y, x), gain) in y.iter_mut().zip(x).zip(gain) {
        *y = x * factor * gain;
    }
}

/// silu(gate) * up, both [T, F].
pub fn silu_mul(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    if gate.shape() != up.shape() {
        bail!("silu_mul of {:?} and {:?}", gate.shape(), up.shape())
    }
    let shape = gate.shape().clone();
    let (gate, up) = (gate.contiguous()?, up.contiguous()?);
    let (gate, up) = (Floats::of(&gate)?, Floats::of(&up)?); // [T, F]
    let mut y = vec![0.0f32; gate.len()]; // [T, F]
    let part = |((y, gate), up): ((&mut [f32], &[f32]), &[f32])| {
        for ((y, gate), up) in y.iter_mut().zip(gate).zip(up) {
            *y = gate / (1.0 + (-gate).exp()) * up;
        }
    };
    y.par_chunks_mut(INLINE / 4).zip(gate.par_chunks(INLINE / 4)).zip(up.par_chunks(INLINE / 4)).for_each(part);
    tensor(y, shape)
}
