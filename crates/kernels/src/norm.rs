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
    simd::{Isa, Kernel, LANES, exp, lanes, of_lanes, run},
};

/// Elements below which another thread does not help.
const INLINE: usize = 1 << 15;

/// x [T, D] / sqrt(mean(x²) + eps) * gain `[D]`; no gain: 1. Leading dimensions of x beyond two are rows too.
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
    if x.len() <= INLINE {
        run(Normalise {
            x: &x,
            gain: &gain,
            eps,
            y: &mut y,
        });
    } else {
        let part = (INLINE / 4).div_ceil(d) * d;
        let parts = y.par_chunks_mut(part).zip(x.par_chunks(part));
        parts.for_each(|(y, x)| {
            run(Normalise {
                x,
                gain: &gain,
                eps,
                y,
            })
        });
    }
    tensor(y, shape)
}

/// The meaning for one row.
#[cfg(test)]
fn reference(x: &[f32], gain: &[f32], eps: f64) -> Vec<f32> {
    let mean = x.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() / x.len() as f64;
    let factor = 1.0 / (mean + eps).sqrt();
    x.iter()
        .zip(gain)
        .map(|(&x, &gain)| (f64::from(x) * factor * f64::from(gain)) as f32)
        .collect()
}

/// Rows of as many values as the gain has.
struct Normalise<'a> {
    x: &'a [f32],
    gain: &'a [f32],
    eps: f32,
    y: &'a mut [f32],
}

impl Kernel for Normalise<'_> {
    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let Self { x, gain, eps, y } = self;
        for (x, y) in x
            .chunks_exact(gain.len().max(1))
            .zip(y.chunks_exact_mut(gain.len().max(1)))
        {
            let (whole, tail) = x.as_chunks::<LANES>();
            let mut squares = isa.splat(0.0);
            for x in whole {
                let x = of_lanes(isa, x);
                squares = isa.fma(x, x, squares);
            }
            let mut squares = lanes(isa, squares);
            for (sum, x) in squares.iter_mut().zip(tail) {
                *sum = x.mul_add(*x, *sum);
            }
            #[expect(
                clippy::cast_precision_loss,
                reason = "a row has far fewer than 2^24 channels"
            )]
            let mean = squares.iter().sum::<f32>() / x.len() as f32;
            let factor = 1.0 / (mean + eps).sqrt();
            for ((y, x), gain) in y.iter_mut().zip(x).zip(gain) {
                *y = x * factor * gain;
            }
        }
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
    if y.len() <= INLINE {
        run(SiluMul {
            gate: &gate,
            up: &up,
            y: &mut y,
        });
    } else {
        let parts = y
            .par_chunks_mut(INLINE / 4)
            .zip(gate.par_chunks(INLINE / 4))
            .zip(up.par_chunks(INLINE / 4));
        parts.for_each(|((y, gate), up)| run(SiluMul { gate, up, y }));
    }
    tensor(y, shape)
}

/// Element by element, whatever their number.
struct SiluMul<'a> {
    gate: &'a [f32],
    up: &'a [f32],
    y: &'a mut [f32],
}

impl Kernel for SiluMul<'_> {
    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let (gate, gate_tail) = self.gate.as_chunks::<LANES>();
        let (up, up_tail) = self.up.as_chunks::<LANES>();
        let (y, y_tail) = self.y.as_chunks_mut::<LANES>();
        for ((y, gate), up) in y.iter_mut().zip(gate).zip(up) {
            *y = lanes(
                isa,
                silu_mul_of(isa, of_lanes(isa, gate), of_lanes(isa, up)),
            );
        }
        let (mut gate, mut up) = ([0.0; LANES], [0.0; LANES]);
        gate[..gate_tail.len()].copy_from_slice(gate_tail);
        up[..up_tail.len()].copy_from_slice(up_tail);
        let tail = lanes(
            isa,
            silu_mul_of(isa, of_lanes(isa, &gate), of_lanes(isa, &up)),
        );
        y_tail.copy_from_slice(&tail[..y_tail.len()]);
    }
}

#[inline(always)]
fn silu_mul_of<I: Isa>(isa: I, gate: I::V, up: I::V) -> I::V {
    let one = isa.splat(1.0);
    let inverse = isa.add(one, exp(isa, isa.sub(isa.splat(0.0), gate)));
    isa.mul(isa.div(gate, inverse), up)
}
