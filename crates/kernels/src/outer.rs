//! acc += Σ_t k_t v_tᵀ, token after token.
//!
//! Each element of acc is one chain of fused multiply-adds that goes on from what stands in memory, so any
//! cut of the tokens into calls gives the same bits. Start at [`accumulate_outer`].

#[cfg(test)]
mod tests;

use std::ops::Range;

use candle_core::{CpuStorage, InplaceOp2, Layout, Result, Tensor, bail};

use crate::{
    floats::{Floats, floats_mut, floats_of, transpose},
    gemm::{Begin, Product, Right, products},
};

/// acc [R1, R2] += Σ_t k_t v_tᵀ in place for each pair (acc, v) of `sums`, k [T, R1], v [T, R2], token after token (so
/// that any cut of the tokens into calls gives the same bits). A call may name a sub-range of rows.
///
/// An acc must own its storage: k and the v may be the same tensor, acc none of them. Shapes are checked before anything is written.
pub fn accumulate_outer(sums: &[(&Tensor, &Tensor)], k: &Tensor, rows: Range<usize>) -> Result<()> {
    let (t, r1) = k.dims2()?;
    for (acc, v) in sums {
        let ((a1, r2), (vt, v2)) = (acc.dims2()?, v.dims2()?);
        if (a1, v2) != (r1, r2) || vt != t {
            bail!(
                "outer products of {:?} and {:?} into {:?}",
                k.shape(),
                v.shape(),
                acc.shape()
            )
        }
    }
    if rows.start > rows.end || rows.end > t {
        bail!("rows {rows:?} of {t}")
    }
    let keys = {
        let k = k.contiguous()?;
        let k = Floats::of(&k)?; // [T, R1]
        transpose(&k[rows.start * r1..rows.end * r1], rows.len(), r1) // [R1, Tr]: its rows meet rows of acc
    };
    for (acc, v) in sums {
        acc.inplace_op2(
            &v.contiguous()?,
            &Outer {
                keys: &keys,
                first: rows.start,
                count: rows.len(),
            },
        )?;
    }
    Ok(())
}

struct Outer<'a> {
    /// [R1, count]
    keys: &'a [f32],
    /// The row of v that belongs to the first key.
    first: usize,
    count: usize,
}

impl InplaceOp2 for Outer<'_> {
    fn name(&self) -> &'static str {
        "accumulate_outer"
    }

    fn cpu_fwd(
        &self,
        acc: &mut CpuStorage,
        acc_layout: &Layout,
        v: &CpuStorage,
        v_layout: &Layout,
    ) -> Result<()> {
        let (_, r2) = acc_layout.shape().dims2()?;
        let acc = floats_mut(acc, acc_layout)?; // [R1, R2]
        let v = floats_of(v, v_layout)?; //        [T, R2]
        products(&mut [Product {
            x: self.keys,
            w: Right::Steps(&v[self.first * r2..(self.first + self.count) * r2]),
            out: acc,
            k: self.count,
            n: r2,
            begin: Begin::Out,
        }]);
        Ok(())
    }
}

/// The meaning: acc[i, j] = fma(k[t, i], v[t, j], acc[i, j]) for t ascending.
#[cfg(test)]
fn reference(acc: &mut [f32], k: &[f32], v: &[f32], r1: usize, r2: usize) {
    for (k, v) in k.chunks_exact(r1).zip(v.chunks_exact(r2)) {
        for (acc, k) in acc.chunks_exact_mut(r2).zip(k) {
            for (acc, v) in acc.iter_mut().zip(v) {
                *acc = k.mul_add(*v, *acc);
            }
        }
    }
}
