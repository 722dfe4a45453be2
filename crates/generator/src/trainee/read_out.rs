//! Read-outs with gradients, for J sums at once.
//!
//! Values are those of [`crate::read_out`], computed in f64; each way back is a closed form:
//!
//! ```text
//! ridge       P = (G + lambda I)⁻¹, N = P S: dS = P dN, dG = -(P dN) Nᵀ, symmetrised, d ln lambda = -lambda tr((P dN) Nᵀ)
//! frobenius   N = S / |S|:                   dS = (dN - N <N, dN>) / |S|
//! spectral    N = S / s1:                    dS = dN / s1 - u1 v1ᵀ <S, dN> / s1²
//! svd         N = U f(s) Vᵀ, f = 1 for the first q values, else 0: with E = Uᵀ dN V,
//!             dS = U M Vᵀ, M_ij = (f_i - f_j) / (s_i - s_j) (E_ij + E_ji) / 2 + (f_i + f_j) / (s_i + s_j) (E_ij - E_ji) / 2
//! ```
//!
//! Start at [`ridge`] and [`normalised`].

use std::sync::Arc;

use candle_core::{Device, Result as TensorResult, Tensor};
use faer::Mat;
use kernels::{Floats, recorded1, recorded3};
use rayon::prelude::*;

use crate::{
    ReadOut, SiteId,
    error::Error,
    read_out::{Factored, RELATIVE_CUTOFF, decompose, full_decompose},
};

/// The matrices [J, R, C] of a tensor, in f64.
fn matrices(t: &Tensor) -> TensorResult<Vec<Mat<f64>>> {
    let (_, rows, columns) = t.dims3()?;
    let t = t.contiguous()?;
    let values = Floats::of(&t)?;
    let matrices = values.chunks_exact(rows * columns);
    Ok(matrices
        .map(|values| Mat::from_fn(rows, columns, |i, j| f64::from(values[i * columns + j])))
        .collect())
}

fn values_of(matrices: &[Mat<f64>]) -> Vec<f32> {
    let mut values = Vec::new();
    for m in matrices {
        for i in 0..m.nrows() {
            values.extend((0..m.ncols()).map(|j| m[(i, j)] as f32));
        }
    }
    values
}

fn finite(id: SiteId, m: &Mat<f64>) -> Result<(), Error> {
    let finite = (0..m.ncols()).all(|j| m.col(j).iter().all(|value| value.is_finite()));
    if finite {
        Ok(())
    } else {
        Err(Error::NotFinite { site: id })
    }
}

/// a bᵀ.
fn times_transposed(a: &Mat<f64>, b: &Mat<f64>) -> Mat<f64> {
    a * b.transpose()
}

/// N_j = (G_j + lambda I)⁻¹ S_j. s [J, R1, R2], g [J, R1, R1], log_ridge `[1]` -> [J, R1, R2]. Differentiable in all.
pub(super) fn ridge(
    id: SiteId,
    s: &Tensor,
    g: &Tensor,
    log_ridge: &Tensor,
) -> Result<Tensor, Error> {
    let (count, r1, r2) = s.dims3()?;
    let lambda = f64::from(log_ridge.detach().to_vec1::<f32>()?.iter().sum::<f32>()).exp();
    let (sums, grams) = (matrices(&s.detach())?, matrices(&g.detach())?);
    let solved: Vec<(Factored, Mat<f64>)> = sums
        .into_par_iter()
        .zip(grams)
        .map(|(s, g)| {
            finite(id, &s)?;
            finite(id, &g)?;
            let factored = Factored::of(g, lambda).ok_or(Error::NotPositive { site: id })?;
            let n = factored.solve(s); // [R1, R2]
            finite(id, &n)?;
            Ok((factored, n))
        })
        .collect::<Result<_, Error>>()?;
    let (factors, cores): (Vec<_>, Vec<_>) = solved.into_iter().unzip();
    let values = values_of(&cores);
    let kept = Arc::new((factors, cores));
    Ok(recorded3(
        "ridge",
        [s, g, log_ridge],
        values,
        (count, r1, r2),
        move |_, _, dn| {
            let (factors, cores) = &*kept;
            let parts: Vec<(Mat<f64>, Mat<f64>)> = matrices(dn)?
                .into_par_iter()
                .zip(factors)
                .zip(cores)
                .map(|((dn, factored), n)| {
                    let ds = factored.solve(dn); // [R1, R2]
                    // Both triangles of G go into the factor.
                    let along = times_transposed(&ds, n); // [R1, R1]
                    let dg = Mat::from_fn(r1, r1, |i, j| -0.5 * (along[(i, j)] + along[(j, i)]));
                    (ds, dg)
                })
                .collect();
            let trace: f64 = parts
                .iter()
                .map(|(_, dg)| (0..r1).map(|i| dg[(i, i)]).sum::<f64>())
                .sum();
            let (ds, dg): (Vec<_>, Vec<_>) = parts.into_iter().unzip();
            let tensor = |values: Vec<f32>, shape: (usize, usize, usize)| {
                Tensor::from_vec(values, shape, &Device::Cpu).map(Some)
            };
            Ok((
                tensor(values_of(&ds), (count, r1, r2))?,
                tensor(values_of(&dg), (count, r1, r1))?,
                Some(Tensor::new(&[(lambda * trace) as f32], &Device::Cpu)?),
            ))
        },
    )?)
}

/// The way back of one normalisation.
enum Back {
    /// Nothing was written: no gradient.
    Zero,
    /// N and |S|.
    Frobenius(Mat<f64>, f64),
    /// S, s1, u1 and v1.
    Spectral(Mat<f64>, f64, Mat<f64>, Mat<f64>),
    /// U [R1, R1], s, V [R2, R2], and how many values were kept.
    Svd(Mat<f64>, Vec<f64>, Mat<f64>, usize),
}

impl Back {
    fn of(&self, dn: &Mat<f64>) -> Mat<f64> {
        match self {
            Self::Zero => Mat::zeros(dn.nrows(), dn.ncols()),
            Self::Frobenius(n, norm) => {
                let along = inner(n, dn);
                Mat::from_fn(dn.nrows(), dn.ncols(), |i, j| {
                    (dn[(i, j)] - n[(i, j)] * along) / norm
                })
            }
            Self::Spectral(s, first, u, v) => {
                let along = inner(s, dn) / (first * first);
                Mat::from_fn(dn.nrows(), dn.ncols(), |i, j| {
                    dn[(i, j)] / first - u[(i, 0)] * v[(j, 0)] * along
                })
            }
            Self::Svd(u, s, v, kept) => {
                let e = u.transpose() * dn * v; // [R1, R2]
                let value = |i: usize| s.get(i).copied().unwrap_or(0.0);
                let f = |i: usize| f64::from(u8::from(i < *kept));
                let at = |i: usize, j: usize| {
                    if i < e.nrows() && j < e.ncols() {
                        e[(i, j)]
                    } else {
                        0.0
                    }
                };
                // Values that nearly coincide would send the gradient to infinity.
                let floor = GAP * value(0);
                let m = Mat::from_fn(e.nrows(), e.ncols(), |i, j| {
                    let mut m = 0.0;
                    if f(i) != f(j) {
                        let gap = value(i) - value(j);
                        let gap = gap.abs().max(floor) * if i < j { 1.0 } else { -1.0 };
                        m += 0.5 * (f(i) - f(j)) / gap * (at(i, j) + at(j, i));
                    }
                    let sum = (value(i) + value(j)).max(floor);
                    m + 0.5 * (f(i) + f(j)) / sum * (at(i, j) - at(j, i))
                }); // [R1, R2]
                u * m * v.transpose()
            }
        }
    }
}

/// Differences and sums of singular values count as at least this part of the largest in a gradient.
const GAP: f64 = 1e-4;

fn inner(a: &Mat<f64>, b: &Mat<f64>) -> f64 {
    let columns = (0..a.ncols()).map(|j| {
        let (a, b) = (a.col(j), b.col(j));
        a.iter().zip(b.iter()).map(|(a, b)| a * b).sum::<f64>()
    });
    columns.sum()
}

/// The read-outs of S alone. s [J, R1, R2] -> [J, R1, R2]. Differentiable.
pub(super) fn normalised(
    kind: ReadOut,
    id: SiteId,
    max_rank: usize,
    s: &Tensor,
) -> Result<Tensor, Error> {
    let (count, r1, r2) = s.dims3()?;
    let done: Vec<(Mat<f64>, Back)> = matrices(&s.detach())?
        .into_par_iter()
        .map(|s| {
            finite(id, &s)?;
            let norm = s.norm_l2();
            if norm == 0.0 {
                return Ok((s, Back::Zero));
            }
            match kind {
                ReadOut::Frobenius => {
                    let n = Mat::from_fn(r1, r2, |i, j| s[(i, j)] / norm);
                    Ok((n.clone(), Back::Frobenius(n, norm)))
                }
                ReadOut::Spectral => {
                    let svd = decompose(s.as_ref()).ok_or(Error::NotConverged { site: id })?;
                    let first = svd.values[0];
                    let n = Mat::from_fn(r1, r2, |i, j| s[(i, j)] / first);
                    let (u, v) = (
                        svd.u.subcols(0, 1).to_owned(),
                        svd.v.subcols(0, 1).to_owned(),
                    );
                    Ok((n, Back::Spectral(s, first, u, v)))
                }
                ReadOut::Svd => {
                    let svd = full_decompose(s.as_ref()).ok_or(Error::NotConverged { site: id })?;
                    let cutoff = RELATIVE_CUTOFF * svd.values.first().copied().unwrap_or(0.0);
                    let above = svd.values.iter().take_while(|value| **value > cutoff);
                    let kept = above.count().min(max_rank);
                    let n = svd.u.subcols(0, kept) * svd.v.subcols(0, kept).transpose();
                    Ok((n, Back::Svd(svd.u, svd.values, svd.v, kept)))
                }
                ReadOut::Ridge => Err(Error::Foreign {
                    detail: format!("no ridge at {id}"),
                }),
            }
        })
        .collect::<Result<_, Error>>()?;
    let (cores, backs): (Vec<_>, Vec<_>) = done.into_iter().unzip();
    Ok(recorded1(
        "read_out",
        s,
        values_of(&cores),
        (count, r1, r2),
        move |_, _, dn| {
            let ds: Vec<_> = matrices(dn)?
                .par_iter()
                .zip(&backs)
                .map(|(dn, back)| back.of(dn))
                .collect();
            Tensor::from_vec(values_of(&ds), (count, r1, r2), &Device::Cpu)
        },
    )?)
}
