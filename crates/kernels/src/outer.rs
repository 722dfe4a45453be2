//! acc += Σ_t k_t v_tᵀ, token after token.
//!
//! Each element of acc is one chain of fused multiply-adds that goes on from what stands in memory, so any
//! cut of the tokens into calls gives the same bits. Start at [`accumulate_outer`].

#[cfg(test)]
mod tests;

use std::ops::Range;

use candle_core::{CpuStorage, InplaceOp3, Layout, Result, Tensor, bail};

use crate::{
    floats::{floats_mut, floats_of},
    gemm::{Begin, Product, Right, products},
};

/// acc [R1, R2] += Σ_t k_t v_tᵀ in place, k [T, R1], v [T, R2], token after token (so that any cut of
/// the tokens into calls gives the same bits). A call may name a sub-range of rows.
///
/// acc must own its storage: k and v may be the same tensor, acc neither of them.
pub fn accumulate_outer(acc: &Tensor, k: &Tensor, v: &Tensor, rows: Range<usize>) -> Result<()> {
    let ((r1, r2), (t, k1), (vt, v2)) = (acc.dims2()?, k.dims2()?, v.dims2()?);
    if (k1, v2) != (r1, r2) || vt != t {
        bail!(
            "outer products of {:?} and {:?} into {:?}",
            k.shape(),
            v.shape(),
            acc.shape()
        )
    }
    if rows.start > rows.end || rows.end > t {
        bail!("rows {rows:?} of {t}")
    }
    acc.inplace_op3(&k.contiguous()?, &v.contiguous()?, &Outer { r1, r2, rows })
}

struct Outer {
    r1: usize,
    r2: usize,
    rows: Range<usize>,
}

impl InplaceOp3 for Outer {
    fn name(&self) -> &'static str {
        "accumulate_outer"
    }

    fn cpu_fwd(
        &self,
        acc: &mut CpuStorage,
        acc_layout: &Layout,
        k: &CpuStorage,
        k_layout: &Layout,
        v: &CpuStorage,
        v_layout: &Layout,
    ) -> Result<()> {
        let acc = floats_mut(acc, acc_layout)?; // [R1, R2]
        let (k, v) = (floats_of(k, k_layout)?, floats_of(v, v_layout)?); // [T, R1], [T, R2]
        let &Self {
            r1,
            r2,
            rows: Range { start, end },
        } = self;
        let v = &v[start * r2..end * r2];
        let k = transpose(&k[start * r1..end * r1], end - start, r1); // [R1, T]: its rows meet rows of acc
        products(&mut [Product {
            x: &k,
            w: Right::Steps(v),
            out: acc,
            k: end - start,
            n: r2,
            begin: Begin::Out,
        }]);
        Ok(())
    }
}

/// [rows, columns] -> [columns, rows], in squares that stay in L1.
fn transpose(values: &[f32], rows: usize, columns: usize) -> Vec<f32> {
    const SQUARE: usize = 16;
    let mut turned = vec![0.0; values.len()];
    for row in (0..rows).step_by(SQUARE) {
        for column in (0..columns).step_by(SQUARE) {
            for c in column..columns.min(column + SQUARE) {
                for r in row..rows.min(row + SQUARE) {
                    turned[c * rows + r] = values[r * columns + c];
                }
            }
        }
    }
    turned
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
