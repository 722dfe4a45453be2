//! Rotary positions, half-split (HF) layout: with i < Dh/2, y_i = x_i cos_i - x_j sin_i and
//! y_j = x_j cos_i + x_i sin_i, j = i + Dh/2, cosines and sines of the row's own position. Start at [`rope`].
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
    recorded::recorded1,
};

/// Elements below which another thread does not help.
const INLINE: usize = 1 << 15;

/// Rotary embedding in the half-split (HF) layout. x [T, H, Dh]; cos, sin [max, Dh/2]; positions `[T]`.
/// Differentiable in x: a gradient is turned back by the same angles.
pub fn rope(x: &Tensor, cos: &Tensor, sin: &Tensor, positions: &[u32]) -> Result<Tensor> {
    let (t, h, dh) = x.dims3()?;
    let (max, half) = cos.dims2()?;
    if sin.dims2()? != (max, half) || dh != 2 * half || half == 0 || h == 0 {
        bail!(
            "heads of {dh} with cosines {:?} and sines {:?}",
            cos.shape(),
            sin.shape()
        )
    }
    if positions.len() != t {
        bail!("{} positions for {t} rows", positions.len())
    }
    if let Some(position) = positions.iter().find(|&&position| position as usize >= max) {
        bail!("position {position} is beyond the {max} that the tables hold")
    }
    if !known(x) {
        return plain::rope(x, cos, sin, positions);
    }
    let x = x.contiguous()?; // [T, H, Dh]
    let y = turn(&x, cos, sin, positions)?; // [T, H, Dh]
    let (cos, sin, positions) = (cos.clone(), sin.clone(), positions.to_vec());
    recorded1("rope", &x, y, (t, h, dh), move |_, _, dy| {
        let dx = turn(dy, &cos, &sin.neg()?, &positions)?; // [T, H, Dh]
        tensor(dx, (t, h, dh))
    })
}

/// x [T, H, Dh], contiguous and checked, by the angles of its positions.
fn turn(x: &Tensor, cos: &Tensor, sin: &Tensor, positions: &[u32]) -> Result<Vec<f32>> {
    let ((_, h, dh), (_, half)) = (x.dims3()?, cos.dims2()?);
    let (cos, sin) = (cos.contiguous()?, sin.contiguous()?);
    let (x, cos, sin) = (Floats::of(x)?, Floats::of(&cos)?, Floats::of(&sin)?);
    let row = |((y, x), &position): ((&mut [MaybeUninit<f32>], &[f32]), &u32)| {
        let at = position as usize * half;
        let (cos, sin) = (&cos[at..at + half], &sin[at..at + half]); // [Dh/2]
        for (y, x) in y.chunks_exact_mut(dh).zip(x.chunks_exact(dh)) {
            let ((y_low, y_high), (x_low, x_high)) = (y.split_at_mut(half), x.split_at(half));
            for i in 0..half {
                y_low[i].write(x_low[i] * cos[i] - x_high[i] * sin[i]);
                y_high[i].write(x_high[i] * cos[i] + x_low[i] * sin[i]);
            }
        }
    };
    let fill = |y: &mut [MaybeUninit<f32>]| {
        if x.len() <= INLINE {
            y.chunks_exact_mut(h * dh)
                .zip(x.chunks_exact(h * dh))
                .zip(positions)
                .for_each(row);
        } else {
            let rows = (INLINE / 4).div_ceil(h * dh);
            y.par_chunks_exact_mut(h * dh)
                .zip(x.par_chunks_exact(h * dh))
                .zip(positions)
                .with_min_len(rows)
                .for_each(row);
        }
    };
    // SAFETY: there is a position for each row of x, and both halves of each of its heads are written.
    Ok(unsafe { filled(x.len(), fill) }) // [T, H, Dh]
}
