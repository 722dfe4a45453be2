//! Products whose both sides are trained: y = x Wᵀ, c = a N of each row's own core, S = Σ k vᵀ of each group.
//!
//! The same chains of fused multiply-adds as their serving counterparts (`linear`, `cores`, `outer`), with
//! gradients of all inputs. Start at [`linear_trained`].

#[cfg(test)]
mod tests;

use std::ops::Range;

use candle_core::{Result, Tensor, bail};
use rayon::prelude::*;

use crate::{
    floats::{Floats, tensor, transpose},
    gemm::{Begin, Product, Right, products},
    plain::{self, known},
    recorded::{recorded1, recorded2},
};

/// x [M, K] w [K, N] -> [M, N].
fn product(x: &[f32], w: Right<'_>, m: usize, k: usize, n: usize) -> Vec<f32> {
    let mut out = vec![0.0f32; m * n];
    products(&mut [Product {
        x,
        w,
        out: &mut out,
        k,
        n,
        begin: Begin::Zero,
    }]);
    out
}

/// y = x Wᵀ: x [T, in], w [out, in] -> [T, out]. Differentiable in both; the same bits as [`crate::Linear`] of w.
///
/// # Errors
/// If the shapes do not fit.
pub fn linear_trained(x: &Tensor, w: &Tensor) -> Result<Tensor> {
    let ((t, width), (out, w_width)) = (x.dims2()?, w.dims2()?);
    if width != w_width {
        bail!("rows of {width} for weights {:?}", w.shape())
    }
    let (x, w) = (x.contiguous()?, w.contiguous()?);
    if !known(&x) {
        return plain::linear_trained(&x, &w);
    }
    let y = product(
        &Floats::of(&x)?,
        Right::Columns(&Floats::of(&w)?),
        t,
        width,
        out,
    ); // [T, out]
    recorded2(
        "linear_trained",
        [&x, &w],
        y,
        (t, out),
        move |[x, w], _, dy| {
            let (from, weights, dy) = (Floats::of(x)?, Floats::of(w)?, Floats::of(dy)?);
            let mut dx = None;
            if x.track_op() {
                let values = product(&dy, Right::Steps(&weights), t, out, width); // [T, in]
                dx = Some(tensor(values, (t, width))?);
            }
            let mut dw = None;
            if w.track_op() {
                let turned = transpose(&dy, t, out); // [out, T]
                let values = product(&turned, Right::Steps(&from), out, t, width); // [out, in]
                dw = Some(tensor(values, (out, width))?);
            }
            Ok((dx, dw))
        },
    )
}

/// Rows that a group has, one after the other.
fn gather(values: &[f32], rows: &[Range<usize>], width: usize) -> Vec<f32> {
    rows.iter()
        .flat_map(|rows| &values[rows.start * width..rows.end * width])
        .copied()
        .collect()
}

/// Adds rows of a group to where they came from.
fn scatter_add(to: &mut [f32], from: &[f32], rows: &[Range<usize>], width: usize) {
    let mut from = from.chunks_exact(width.max(1));
    for row in rows.iter().cloned().flatten() {
        let to = &mut to[row * width..][..width];
        for (to, from) in to.iter_mut().zip(from.next().unwrap_or_default()) {
            *to += from;
        }
    }
}

fn check_groups(groups: &[Vec<Range<usize>>], t: usize) -> Result<()> {
    match groups
        .iter()
        .flatten()
        .find(|rows| rows.start > rows.end || rows.end > t)
    {
        Some(rows) => bail!("rows {rows:?} of {t}"),
        None => Ok(()),
    }
}

/// c_t = a_t N_j for the rows of group j, 0 for rows in no group. a [T, R1], n [J, R1, R2], no row in two groups
/// -> [T, R2]. Differentiable in both.
///
/// # Errors
/// If the shapes do not fit, a row lies outside of a, or one is in two groups.
pub fn apply_trained_cores(a: &Tensor, n: &Tensor, groups: &[Vec<Range<usize>>]) -> Result<Tensor> {
    let ((t, width), (count, r1, r2)) = (a.dims2()?, n.dims3()?);
    if width != r1 || groups.len() != count {
        bail!(
            "rows {:?} of {} groups for cores {:?}",
            a.shape(),
            groups.len(),
            n.shape()
        )
    }
    check_groups(groups, t)?;
    let mut taken = vec![false; t];
    for row in groups.iter().flatten().cloned().flatten() {
        if std::mem::replace(&mut taken[row], true) {
            bail!("row {row} is in two groups")
        }
    }
    if !known(a) {
        return plain::apply_trained_cores(a, n, groups);
    }
    let (a, n) = (a.contiguous()?, n.contiguous()?);
    let mut c = vec![0.0f32; t * r2]; // [T, R2]
    {
        let (a, n) = (Floats::of(&a)?, Floats::of(&n)?);
        let parts: Vec<_> = groups
            .par_iter()
            .zip(n.par_chunks_exact(r1 * r2))
            .map(|(rows, n)| {
                let a = gather(&a, rows, r1); // [Tj, R1]
                product(&a, Right::Steps(n), a.len() / r1, r1, r2) // [Tj, R2]
            })
            .collect();
        for (rows, part) in groups.iter().zip(&parts) {
            scatter_add(&mut c, part, rows, r2);
        }
    }
    let groups = groups.to_vec();
    recorded2(
        "apply_trained_cores",
        [&a, &n],
        c,
        (t, r2),
        move |[a, n], _, dc| {
            let (from, cores, dc) = (Floats::of(a)?, Floats::of(n)?, Floats::of(dc)?);
            let parts: Vec<_> = groups
                .par_iter()
                .zip(cores.par_chunks_exact(r1 * r2))
                .map(|(rows, n)| {
                    let (a, dc) = (gather(&from, rows, r1), gather(&dc, rows, r2));
                    let tokens = a.len() / r1;
                    let da = product(&dc, Right::Columns(n), tokens, r2, r1); // [Tj, R1]
                    let turned = transpose(&a, tokens, r1); // [R1, Tj]
                    (da, product(&turned, Right::Steps(&dc), r1, tokens, r2)) // .., [R1, R2]
                })
                .collect();
            let mut da = vec![0.0f32; t * r1]; // [T, R1]
            let mut dn = Vec::with_capacity(count * r1 * r2); // [J, R1, R2]
            for (rows, (part, core)) in groups.iter().zip(parts) {
                scatter_add(&mut da, &part, rows, r1);
                dn.extend(core);
            }
            Ok((
                Some(tensor(da, (t, r1))?),
                Some(tensor(dn, (count, r1, r2))?),
            ))
        },
    )
}

/// S_j = Σ_t k_t v_tᵀ over the rows of group j. k [T, R1], v [T, R2]; a row may be in many groups or none.
/// -> [J, R1, R2]. Differentiable in both.
///
/// # Errors
/// If the shapes do not fit or a row lies outside of k.
pub fn outer_sums(k: &Tensor, v: &Tensor, groups: &[Vec<Range<usize>>]) -> Result<Tensor> {
    let ((t, r1), (vt, r2)) = (k.dims2()?, v.dims2()?);
    if vt != t {
        bail!("outer products of {:?} and {:?}", k.shape(), v.shape())
    }
    check_groups(groups, t)?;
    if !known(k) {
        return plain::outer_sums(k, v, groups);
    }
    let (k, v) = (k.contiguous()?, v.contiguous()?);
    let mut s = Vec::with_capacity(groups.len() * r1 * r2); // [J, R1, R2]
    {
        let (k, v) = (Floats::of(&k)?, Floats::of(&v)?);
        let parts: Vec<_> = groups
            .par_iter()
            .map(|rows| {
                let (k, v) = (gather(&k, rows, r1), gather(&v, rows, r2));
                let tokens = k.len() / r1;
                let turned = transpose(&k, tokens, r1); // [R1, Tj]
                product(&turned, Right::Steps(&v), r1, tokens, r2) // [R1, R2]
            })
            .collect();
        parts.into_iter().for_each(|part| s.extend(part));
    }
    let groups = groups.to_vec();
    let shape = (groups.len(), r1, r2);
    recorded2("outer_sums", [&k, &v], s, shape, move |[k, v], _, ds| {
        let (keys, values, ds) = (Floats::of(k)?, Floats::of(v)?, Floats::of(ds)?);
        let parts: Vec<_> = groups
            .par_iter()
            .zip(ds.par_chunks_exact(r1 * r2))
            .map(|(rows, ds)| {
                let (k, v) = (gather(&keys, rows, r1), gather(&values, rows, r2));
                let tokens = k.len() / r1;
                (
                    product(&v, Right::Columns(ds), tokens, r2, r1), // [Tj, R1]
                    product(&k, Right::Steps(ds), tokens, r1, r2),   // [Tj, R2]
                )
            })
            .collect();
        let (mut dk, mut dv) = (vec![0.0f32; t * r1], vec![0.0f32; t * r2]);
        for (rows, (part_k, part_v)) in groups.iter().zip(&parts) {
            scatter_add(&mut dk, part_k, rows, r1);
            scatter_add(&mut dv, part_v, rows, r2);
        }
        Ok((Some(tensor(dk, (t, r1))?), Some(tensor(dv, (t, r2))?)))
    })
}

/// G_j = Σ_t k_t k_tᵀ over the rows of group j. k [T, R1]; a row may be in many groups or none. -> [J, R1, R1].
/// Differentiable.
///
/// # Errors
/// If a row lies outside of k.
pub fn gram_sums(k: &Tensor, groups: &[Vec<Range<usize>>]) -> Result<Tensor> {
    let (t, r1) = k.dims2()?;
    if !known(k) {
        return outer_sums(k, k, groups);
    }
    let k = k.contiguous()?;
    let g = outer_sums(&k.detach(), &k.detach(), groups)?; // [J, R1, R1]
    let values = Floats::of(&g)?.to_vec();
    let groups = groups.to_vec();
    recorded1(
        "gram_sums",
        &k,
        values,
        (groups.len(), r1, r1),
        move |k, _, dg| {
            let (keys, dg) = (Floats::of(k)?, Floats::of(dg)?);
            let parts: Vec<_> = groups
                .par_iter()
                .zip(dg.par_chunks_exact(r1 * r1))
                .map(|(rows, dg)| {
                    let k = gather(&keys, rows, r1); // [Tj, R1]
                    let turned = transpose(dg, r1, r1); // [R1, R1]
                    let both: Vec<f32> = dg.iter().zip(&turned).map(|(a, b)| a + b).collect();
                    product(&k, Right::Steps(&both), k.len() / r1, r1, r1) // [Tj, R1]
                })
                .collect();
            let mut dk = vec![0.0f32; t * r1]; // [T, R1]
            for (rows, part) in groups.iter().zip(&parts) {
                scatter_add(&mut dk, part, rows, r1);
            }
            tensor(dk, (t, r1))
        },
    )
}
