//! y = a + b, element by element.
//!
//! candle's own sum wakes a pool of threads that spin at a barrier, which a batch of a few rows pays dearly for.
//! Start at [`add`].

#[cfg(test)]
mod tests;

use candle_core::{Result, Tensor, bail};
use rayon::prelude::*;

use crate::{
    floats::Floats,
    plain::{self, known},
    recorded::recorded2,
};

/// Elements that one thread adds without asking for help: about 30 us of one core.
const INLINE: usize = 1 << 16;

/// a + b of equal shapes. Differentiable in both.
pub fn add(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    if a.shape() != b.shape() {
        bail!("a sum of {:?} and {:?}", a.shape(), b.shape())
    }
    if !known(a) {
        return a + b;
    }
    let shape = a.shape().clone();
    let (a, b) = (a.contiguous()?, b.contiguous()?);
    let y = sum(&Floats::of(&a)?, &Floats::of(&b)?);
    recorded2("add", [&a, &b], y, shape, |[a, b], _, dy| {
        let of = |x: &Tensor| x.track_op().then(|| dy.clone());
        Ok((of(a), of(b)))
    })
}

/// y [T, out] + bias `[out]`. Differentiable in y; the bias is frozen.
///
/// # Errors
/// If the shapes do not fit.
pub fn add_bias(y: &Tensor, bias: &Tensor) -> Result<Tensor> {
    if known(y) {
        y.broadcast_add(bias)
    } else {
        plain::add_bias(y, bias)
    }
}

fn sum(a: &[f32], b: &[f32]) -> Vec<f32> {
    let sum = |(a, b): (&f32, &f32)| a + b;
    if a.len() <= INLINE {
        return a.iter().zip(b).map(sum).collect();
    }
    let pairs = a.par_iter().zip(b.par_iter()).with_min_len(INLINE / 2);
    pairs.map(sum).collect()
}
