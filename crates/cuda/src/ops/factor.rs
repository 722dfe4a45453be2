//! The parts of a read-out that are no products of matrices, in f64.

use half::bf16;

use super::{Matrix, fits, holds, of};
use crate::{Device, Error, Kernel, View, device::Argument};

/// a [B, n, n] = (g + gᵀ) / 2 + lambda I of g [B, n, n], lambdas `[B]`.
///
/// # Errors
/// [`Error::Shape`], [`Error::Call`].
pub fn symmetric(
    device: &Device,
    a: View<'_, f64>,
    g: View<'_, f32>,
    lambdas: View<'_, f64>,
    n: usize,
    batch: usize,
) -> Result<(), Error> {
    holds("a", a, batch * n * n)?;
    holds("g", g, batch * n * n)?;
    holds("lambdas", lambdas, batch)?;
    device.launch(
        Kernel::Symmetric,
        [n, batch, 1],
        256,
        0,
        &[a.argument(), g.argument(), lambdas.argument(), of(n)?],
    )
}

/// to = from, in f64.
///
/// # Errors
/// [`Error::Shape`], [`Error::Call`].
pub fn widen(device: &Device, to: View<'_, f64>, from: View<'_, f32>) -> Result<(), Error> {
    holds("to", to, from.len)?;
    let blocks = from.len.div_ceil(256).min(1 << 14);
    device.launch(
        Kernel::Widen,
        [blocks, 1, 1],
        256,
        0,
        &[
            to.argument(),
            from.argument(),
            Argument::U64(from.len as u64),
        ],
    )
}

/// to = from: `batch` blocks [rows, columns].
///
/// # Errors
/// [`Error::Shape`], [`Error::Call`].
pub fn copy_block(
    device: &Device,
    to: Matrix<'_, f64>,
    from: Matrix<'_, f64>,
    rows: usize,
    columns: usize,
    batch: usize,
) -> Result<(), Error> {
    if rows == 0 || columns == 0 || batch == 0 {
        return Ok(());
    }
    for matrix in [to, from] {
        holds(
            "a block",
            matrix.view,
            (batch - 1) * matrix.stride + (rows - 1) * matrix.ld + columns,
        )?;
    }
    let arguments = [
        to.view.argument(),
        from.view.argument(),
        of(columns)?,
        of(to.ld)?,
        of(from.ld)?,
        Argument::U64(to.stride as u64),
        Argument::U64(from.stride as u64),
    ];
    device.launch(Kernel::CopyBlock, [rows, batch, 1], 128, 0, &arguments)
}

/// a [B, n, n] += eps tr(a) I; I itself where that is 0.
///
/// # Errors
/// [`Error::Shape`], [`Error::Call`].
pub fn shift_diagonal(
    device: &Device,
    a: View<'_, f64>,
    n: usize,
    eps: f64,
    batch: usize,
) -> Result<(), Error> {
    holds("a", a, batch * n * n)?;
    device.launch(
        Kernel::ShiftDiagonal,
        [batch, 1, 1],
        128,
        0,
        &[a.argument(), of(n)?, Argument::F64(eps)],
    )
}

/// Largest diagonal block of [`factor_block`].
pub const FACTOR_BLOCK: usize = 64;

/// The diagonal block of a [B, n, n] at `at` becomes its Cholesky factor L; inverse [B, 64, 64] = L⁻¹; failed `[B]` = 1 where there is none.
///
/// # Errors
/// [`Error::Shape`], [`Error::Call`].
#[expect(
    clippy::too_many_arguments,
    reason = "operands and sizes of one kernel"
)]
pub fn factor_block(
    device: &Device,
    a: View<'_, f64>,
    inverse: View<'_, f64>,
    failed: View<'_, u32>,
    n: usize,
    at: usize,
    size: usize,
    batch: usize,
) -> Result<(), Error> {
    holds("a", a, batch * n * n)?;
    holds("inverse", inverse, batch * FACTOR_BLOCK * FACTOR_BLOCK)?;
    holds("failed", failed, batch)?;
    fits(size <= FACTOR_BLOCK && at + size <= n, || {
        format!("a block {at} + {size} of {n}")
    })?;
    let arguments = [
        a.argument(),
        inverse.argument(),
        failed.argument(),
        of(n)?,
        of(at)?,
        of(size)?,
    ];
    device.launch(Kernel::FactorBlock, [batch, 1, 1], 256, 0, &arguments)
}

/// Largest matrix of [`eigen`].
pub const EIGEN_MAX: usize = 160;

/// Eigenvalues [B, p], descending, and vectors w [B, p, p] (columns) of symmetric a [B, p, p]; scratch [B, p, p].
///
/// # Errors
/// [`Error::Shape`], [`Error::Call`].
#[expect(
    clippy::too_many_arguments,
    reason = "operands and sizes of one kernel"
)]
pub fn eigen(
    device: &Device,
    values: View<'_, f64>,
    w: View<'_, f64>,
    scratch: View<'_, f64>,
    a: View<'_, f64>,
    p: usize,
    sweeps: usize,
    batch: usize,
) -> Result<(), Error> {
    fits(p.is_multiple_of(2) && (2..=EIGEN_MAX).contains(&p), || {
        format!("eigenvalues of a matrix of {p}")
    })?;
    holds("values", values, batch * p)?;
    for (name, view) in [("w", w), ("scratch", scratch), ("a", a)] {
        holds(name, view, batch * p * p)?;
    }
    let arguments = [
        values.argument(),
        w.argument(),
        scratch.argument(),
        a.argument(),
        of(p)?,
        of(sweeps)?,
    ];
    device.launch(
        Kernel::Eigen,
        [batch, 1, 1],
        1024,
        (p * p + 2 * p) * size_of::<f64>(),
        &arguments,
    )
}

/// Where a read-out's cores go: one site after the other, in one slot.
#[derive(Clone, Copy, Debug)]
pub struct Emitted<'a> {
    /// The slot.
    pub slot: View<'a, bf16>,
    /// Of the first site.
    pub offset: usize,
    /// From site to site.
    pub site_size: usize,
}

/// Factors of a decomposition: u [B, n, p], v [B, r, p], values [B, p] the squares of the singular values, descending.
#[derive(Clone, Copy, Debug)]
pub struct Factors<'a> {
    /// Left vectors.
    pub u: View<'a, f64>,
    /// Right vectors times singular values.
    pub v: View<'a, f64>,
    /// Squares of the singular values.
    pub values: View<'a, f64>,
    /// n.
    pub n: usize,
    /// r.
    pub r: usize,
    /// p.
    pub p: usize,
    /// B.
    pub batch: usize,
}

/// Low-rank cores of rank q: singular values above max(relative sigma_1, floors `[B]`) become 1, or stay what they are if `fold`.
///
/// # Errors
/// [`Error::Shape`], [`Error::Call`].
pub fn emit_low_rank(
    device: &Device,
    to: &Emitted<'_>,
    factors: &Factors<'_>,
    floors: View<'_, f64>,
    q: usize,
    relative: f64,
    fold: bool,
) -> Result<(), Error> {
    let Factors {
        u,
        v,
        values,
        n,
        r,
        p,
        batch,
    } = *factors;
    holds("u", u, batch * n * p)?;
    holds("v", v, batch * r * p)?;
    holds("values", values, batch * p)?;
    holds("floors", floors, batch)?;
    holds(
        "slot",
        to.slot,
        to.offset + batch.saturating_sub(1) * to.site_size + q * (n + r),
    )?;
    let arguments = [
        to.slot.argument(),
        u.argument(),
        v.argument(),
        values.argument(),
        floors.argument(),
        of(n)?,
        of(r)?,
        of(p)?,
        of(q)?,
        Argument::U64(to.offset as u64),
        Argument::U64(to.site_size as u64),
        Argument::F64(relative),
        Argument::U32(u32::from(fold)),
    ];
    device.launch(Kernel::EmitLowRank, [q, batch, 1], 256, 0, &arguments)
}

/// Dense cores of x [B, n, r].
///
/// # Errors
/// [`Error::Shape`], [`Error::Call`].
pub fn emit_dense(
    device: &Device,
    to: &Emitted<'_>,
    x: View<'_, f64>,
    n: usize,
    r: usize,
    batch: usize,
) -> Result<(), Error> {
    holds("x", x, batch * n * r)?;
    holds(
        "slot",
        to.slot,
        to.offset + batch.saturating_sub(1) * to.site_size + n * r,
    )?;
    let arguments = [
        to.slot.argument(),
        x.argument(),
        of(n)?,
        of(r)?,
        Argument::U64(to.offset as u64),
        Argument::U64(to.site_size as u64),
    ];
    device.launch(Kernel::EmitDense, [r, batch, 1], 256, 0, &arguments)
}
