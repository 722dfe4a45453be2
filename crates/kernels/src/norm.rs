//! rms_norm: y = x / sqrt(mean(x²) + eps) * gain, and silu_mul: y = g / (1 + exp(-g)) * u. Row by row.
//!
//! Squares are summed in sixteen lanes over ascending channels, then lane by lane, so a row gives the same
//! bits in any batch. Start at [`rms_norm`].
#![expect(
    unsafe_code,
    reason = "results that are not cleared before they are written"
)]

#[cfg(test)]
mod tests;

use std::mem::MaybeUninit;

use candle_core::{Result, Tensor, bail};
use rayon::prelude::*;

use crate::{
    floats::{Floats, filled, tensor},
    plain::{self, known},
    recorded::{recorded1, recorded2},
    simd::{Isa, Kernel, LANES, exp, lanes, of_lanes, run},
};

/// Elements below which another thread does not help.
const INLINE: usize = 1 << 15;

/// x [T, D] / sqrt(mean(x²) + eps) * gain `[D]`; no gain: 1. Leading dimensions of x beyond two are rows too.
/// Differentiable in x; the gain is frozen.
pub fn rms_norm(x: &Tensor, gain: Option<&Tensor>, eps: f64) -> Result<Tensor> {
    let d = x.dim(candle_core::D::Minus1)?;
    if !known(x) && gain.is_none_or(|gain| gain.dims() == [d]) {
        return plain::rms_norm(x, gain, eps);
    }
    let ones;
    let gain = match gain {
        Some(gain) if gain.dims1()? == d => gain.contiguous()?,
        Some(gain) => bail!("a gain of {} for rows of {d}", gain.elem_count()),
        None => {
            ones = Tensor::ones(d, candle_core::DType::F32, x.device())?;
            ones
        }
    };
    let (x, shape) = (x.contiguous()?, x.shape().clone()); // [T, D]
    #[expect(clippy::cast_possible_truncation, reason = "eps is a small constant")]
    let eps = eps as f32;
    let y = normalise(&Floats::of(&x)?, &Floats::of(&gain)?, eps); // [T, D]
    recorded1("rms_norm", &x, y, shape, move |x, _, dy| {
        let (from, shape) = (Floats::of(x)?, x.shape());
        let dx = normalise_back(&from, &Floats::of(&gain)?, &Floats::of(dy)?, eps); // [T, D]
        tensor(dx, shape)
    })
}

/// x [T, D], gain `[D]` -> [T, D].
fn normalise(x: &[f32], gain: &[f32], eps: f32) -> Vec<f32> {
    let fill = |y: &mut [MaybeUninit<f32>]| {
        if x.len() <= INLINE {
            return run(Normalise { x, gain, eps, y });
        }
        let part = (INLINE / 4).div_ceil(gain.len()) * gain.len();
        let parts = y.par_chunks_mut(part).zip(x.par_chunks(part));
        parts.for_each(|(y, x)| run(Normalise { x, gain, eps, y }));
    };
    // SAFETY: x is whole rows of as many values as the gain has, and each is written.
    unsafe { filled(x.len(), fill) } // [T, D]
}

/// dx = r (g dy) - x r³ / D Σ_j x_j g_j dy_j with r = 1 / sqrt(mean(x²) + eps). x, dy [T, D], gain `[D]` -> [T, D].
fn normalise_back(x: &[f32], gain: &[f32], dy: &[f32], eps: f32) -> Vec<f32> {
    let mut dx = vec![0.0f32; x.len()]; // [T, D]
    let part = (INLINE / 4).div_ceil(gain.len().max(1)) * gain.len().max(1);
    let parts = dx
        .par_chunks_mut(part)
        .zip(x.par_chunks(part))
        .zip(dy.par_chunks(part));
    parts.for_each(|((dx, x), dy)| {
        run(NormaliseBack {
            x,
            gain,
            dy,
            eps,
            dx,
        })
    });
    dx
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
    y: &'a mut [MaybeUninit<f32>],
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
                y.write(x * factor * gain);
            }
        }
    }
}

/// The gradient of [`Normalise`].
struct NormaliseBack<'a> {
    x: &'a [f32],
    gain: &'a [f32],
    dy: &'a [f32],
    eps: f32,
    dx: &'a mut [f32],
}

impl Kernel for NormaliseBack<'_> {
    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let Self {
            x,
            gain,
            dy,
            eps,
            dx,
        } = self;
        let width = gain.len().max(1);
        let rows = x.chunks_exact(width).zip(dy.chunks_exact(width));
        for ((x, dy), dx) in rows.zip(dx.chunks_exact_mut(width)) {
            let (mut squares, mut along) = (isa.splat(0.0), isa.splat(0.0));
            let (whole, tail) = x.as_chunks::<LANES>();
            let (gains, _) = gain.as_chunks::<LANES>();
            let (grads, _) = dy.as_chunks::<LANES>();
            for ((x, g), dy) in whole.iter().zip(gains).zip(grads) {
                let (x, g, dy) = (of_lanes(isa, x), of_lanes(isa, g), of_lanes(isa, dy));
                squares = isa.fma(x, x, squares);
                along = isa.fma(isa.mul(g, dy), x, along);
            }
            let mut squares: f32 = lanes(isa, squares).iter().sum();
            let mut along: f32 = lanes(isa, along).iter().sum();
            let from = width - tail.len();
            for ((x, g), dy) in tail.iter().zip(&gain[from..]).zip(&dy[from..]) {
                squares += x * x;
                along += x * g * dy;
            }
            #[expect(
                clippy::cast_precision_loss,
                reason = "a row has far fewer than 2^24 channels"
            )]
            let count = width as f32;
            let r = 1.0 / (squares / count + eps).sqrt();
            let across = along * r * r * r / count;
            for (((dx, x), g), dy) in dx.iter_mut().zip(x).zip(gain).zip(dy) {
                *dx = r * g * dy - x * across;
            }
        }
    }
}

/// silu(gate) * up, both [T, F]. Differentiable in both.
pub fn silu_mul(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    if gate.shape() != up.shape() {
        bail!("silu_mul of {:?} and {:?}", gate.shape(), up.shape())
    }
    if !known(gate) {
        return plain::silu_mul(gate, up);
    }
    let shape = gate.shape().clone();
    let (gate, up) = (gate.contiguous()?, up.contiguous()?); // [T, F]
    let y = gated(&Floats::of(&gate)?, &Floats::of(&up)?); // [T, F]
    recorded2("silu_mul", [&gate, &up], y, shape, |[gate, up], _, dy| {
        let (from, up, dy) = (Floats::of(gate)?, Floats::of(up)?, Floats::of(dy)?);
        let (dg, du) = gated_back(&from, &up, &dy); // [T, F], [T, F]
        let of = |values| tensor(values, gate.shape()).map(Some);
        Ok((of(dg)?, of(du)?))
    })
}

fn gated(gate: &[f32], up: &[f32]) -> Vec<f32> {
    let fill = |y: &mut [MaybeUninit<f32>]| {
        if gate.len() <= INLINE {
            return run(SiluMul { gate, up, y });
        }
        let parts = y
            .par_chunks_mut(INLINE / 4)
            .zip(gate.par_chunks(INLINE / 4))
            .zip(up.par_chunks(INLINE / 4));
        parts.for_each(|((y, gate), up)| run(SiluMul { gate, up, y }));
    };
    // SAFETY: gate and up are of one shape, and a value is written for each of theirs.
    unsafe { filled(gate.len(), fill) }
}

/// With s = 1 / (1 + exp(-g)): dg = dy u s (1 + g (1 - s)), du = dy g s.
fn gated_back(gate: &[f32], up: &[f32], dy: &[f32]) -> (Vec<f32>, Vec<f32>) {
    let (mut dg, mut du) = (vec![0.0f32; gate.len()], vec![0.0f32; gate.len()]);
    let part = INLINE / 4;
    let parts = dg.par_chunks_mut(part).zip(du.par_chunks_mut(part));
    let from = gate
        .par_chunks(part)
        .zip(up.par_chunks(part))
        .zip(dy.par_chunks(part));
    parts.zip(from).for_each(|((dg, du), ((gate, up), dy))| {
        run(SiluMulBack {
            gate,
            up,
            dy,
            dg,
            du,
        })
    });
    (dg, du)
}

/// Element by element, whatever their number.
struct SiluMul<'a> {
    gate: &'a [f32],
    up: &'a [f32],
    y: &'a mut [MaybeUninit<f32>],
}

impl Kernel for SiluMul<'_> {
    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let (gate, gate_tail) = self.gate.as_chunks::<LANES>();
        let (up, up_tail) = self.up.as_chunks::<LANES>();
        let (y, y_tail) = self.y.as_chunks_mut::<LANES>();
        for ((y, gate), up) in y.iter_mut().zip(gate).zip(up) {
            let product = silu_mul_of(isa, of_lanes(isa, gate), of_lanes(isa, up));
            // SAFETY: sixteen values are writable.
            unsafe { isa.store(y.as_mut_ptr().cast(), product) };
        }
        let (mut gate, mut up) = ([0.0; LANES], [0.0; LANES]);
        gate[..gate_tail.len()].copy_from_slice(gate_tail);
        up[..up_tail.len()].copy_from_slice(up_tail);
        let tail = lanes(
            isa,
            silu_mul_of(isa, of_lanes(isa, &gate), of_lanes(isa, &up)),
        );
        for (y, value) in y_tail.iter_mut().zip(tail) {
            y.write(value);
        }
    }
}

#[inline(always)]
fn silu_mul_of<I: Isa>(isa: I, gate: I::V, up: I::V) -> I::V {
    let one = isa.splat(1.0);
    let inverse = isa.add(one, exp(isa, isa.sub(isa.splat(0.0), gate)));
    isa.mul(isa.div(gate, inverse), up)
}

/// The gradient of [`SiluMul`].
struct SiluMulBack<'a> {
    gate: &'a [f32],
    up: &'a [f32],
    dy: &'a [f32],
    dg: &'a mut [f32],
    du: &'a mut [f32],
}

impl Kernel for SiluMulBack<'_> {
    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let one = isa.splat(1.0);
        let count = self.gate.len();
        for from in (0..count).step_by(LANES) {
            let here = from..count.min(from + LANES);
            let (mut gate, mut up, mut dy) = ([0.0; LANES], [0.0; LANES], [0.0; LANES]);
            gate[..here.len()].copy_from_slice(&self.gate[here.clone()]);
            up[..here.len()].copy_from_slice(&self.up[here.clone()]);
            dy[..here.len()].copy_from_slice(&self.dy[here.clone()]);
            let (g, u, dy) = (of_lanes(isa, &gate), of_lanes(isa, &up), of_lanes(isa, &dy));
            let s = isa.div(one, isa.add(one, exp(isa, isa.sub(isa.splat(0.0), g))));
            let slope = isa.fma(isa.mul(g, isa.sub(one, s)), s, s);
            let dg = lanes(isa, isa.mul(isa.mul(dy, u), slope));
            let du = lanes(isa, isa.mul(isa.mul(dy, g), s));
            self.dg[here.clone()].copy_from_slice(&dg[..here.len()]);
            self.du[here.clone()].copy_from_slice(&du[..here.len()]);
        }
    }
}
