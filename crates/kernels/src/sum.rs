//! y = a + b, element by element.
//!
//! candle's own sum wakes a pool of threads that spin at a barrier, which a batch of a few rows pays dearly for.
//! Start at [`add`].

#[cfg(test)]
mod tests;

use candle_core::{Result, Tensor, bail};
use rayon::prelude::*;

use crate::floats::{Floats, tensor};

/// Elements that one thread adds without asking for help: about 30 us of one core.
const INLINE: usize = 1 << 16;

/// a + b of equal shapes, f32.
pub fn add(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    if a.shape() != b.shape() {
        bail!("a sum of {:?} and {:?}", a.shape(), b.shape())
    }
    let shape = a.shape().clone();
    let (a, b) = (a.contiguous()?, b.contiguous()?);
    let (a, b) = (Floats::of(&a)?, Floats::of(&b)?);
    let sum = |(a, b): (&f32, &f32)| a + b;
    let y = if a.len() <= INLINE {
        a.iter().zip(b.iter()).map(sum).collect()
    } else {
        let pairs = a.par_iter().zip(b.par_iter()).with_min_len(INLINE / 2);
        pairs.map(sum).collect()
    };
    tensor(y, shape)
}
