//! c_t = scale a_t N for rows that run with a core each: N dense [R1, R2], or U Vᵀ.
//!
//! Start at [`apply_cores`].

#[cfg(test)]
mod tests;

use candle_core::{Result, Tensor, bail};

use crate::floats::{Floats, tensor};

/// The core of one site, as rows apply it.
#[derive(Clone, Debug)]
pub enum CoreView<'a> {
    /// N [R1, R2].
    Dense(&'a Tensor),
    /// U [R1, q], V [R2, q]: N = U Vᵀ.
    LowRank {
        /// [R1, q]
        u: &'a Tensor,
        /// [R2, q]
        v: &'a Tensor,
    },
}

/// Rows of a that share one core.
#[derive(Clone, Debug)]
pub struct CoreRows<'a> {
    /// First row in a.
    pub start: usize,
    /// Number of rows.
    pub len: usize,
    /// Their core.
    pub core: CoreView<'a>,
    /// Factor on what the core gives.
    pub scale: f32,
}

/// a [T, R1] -> c [T, R2]: c_t = scale * a_t N of the rows' own core; rows that no entry names give 0.
///
/// Fails if an entry reaches beyond a, or a core does not have R1 and R2.
pub fn apply_cores(a: &Tensor, rows: &[CoreRows<'_>], r2: usize) -> Result<Tensor> {
    let (t, r1) = a.dims2()?;
    for row in rows {
        if row.start.checked_add(row.len).is_none_or(|end| end > t) {
            bail!("core rows {} + {} of {t}", row.start, row.len)
        }
        let fits = match &row.core {
            CoreView::Dense(n) => n.dims2()? == (r1, r2),
            CoreView::LowRank { u, v } => {
                let (((u1, uq), (v2, vq)), want) = ((u.dims2()?, v.dims2()?), (r1, r2));
                (u1, v2) == want && uq == vq
            }
        };
        if !fits {
            bail!("a core {:?} where R1 is {r1} and R2 {r2}", row.core)
        }
    }
    let a = a.contiguous()?;
    let a = Floats::of(&a)?;
    let mut c = vec![0.0f32; t * r2]; // [T, R2]
    for row in rows {
        let a = &a[row.start * r1..][..row.len * r1];
        let c = &mut c[row.start * r2..][..row.len * r2];
        match &row.core {
            CoreView::Dense(n) => {
                let n = n.contiguous()?;
                reference(a, &Floats::of(&n)?, r1, r2, row.scale, c);
            }
            CoreView::LowRank { u, v } => {
                let (u, v) = (u.contiguous()?, v.t()?.contiguous()?); // [R1, q], [q, R2]
                let q = u.dim(1)?;
                let mut b = vec![0.0; row.len * q]; // [len, q]
                reference(a, &Floats::of(&u)?, r1, q, 1.0, &mut b);
                reference(&b, &Floats::of(&v)?, q, r2, row.scale, c);
            }
        }
    }
    tensor(c, (t, r2))
}

/// The meaning: c[t, j] = scale Σ_i a[t, i] n[i, j], i ascending.
fn reference(a: &[f32], n: &[f32], r1: usize, r2: usize, scale: f32, c: &mut [f32]) {
    if r1 == 0 || r2 == 0 {
        return;
    }
    for (a, c) in a.chunks_exact(r1).zip(c.chunks_exact_mut(r2)) {
        for (a, n) in a.iter().zip(n.chunks_exact(r2)) {
            for (c, n) in c.iter_mut().zip(n) {
                *c += a * n;
            }
        }
        for c in c {
            *c *= scale;
        }
    }
}
