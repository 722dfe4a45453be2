//! Norms, gathers, gates, biases and draws: kernels that take rows one by one.

use half::bf16;

use super::{eights, fits, holds, of, optional};
use crate::{Device, Error, Kernel, View, device::Argument};

/// y [T, D] = x [T, D] / sqrt(mean(x²) + eps) * gain `[D]`; no gain: 1.
///
/// # Errors
/// [`Error::Shape`], [`Error::Call`].
pub fn rms_norm(
    device: &Device,
    y: View<'_, bf16>,
    x: View<'_, bf16>,
    gain: Option<View<'_, bf16>>,
    rows: usize,
    d: usize,
    eps: f32,
) -> Result<(), Error> {
    eights(&[d])?;
    holds("y", y, rows * d)?;
    holds("x", x, rows * d)?;
    if let Some(gain) = gain {
        holds("gain", gain, d)?;
    }
    let arguments = [
        y.argument(),
        x.argument(),
        optional(gain),
        of(d)?,
        Argument::F32(eps),
    ];
    device.launch(Kernel::RmsNorm, [rows, 1, 1], 256, 0, &arguments)
}

/// The same of the residual stream h [T, D], which is f32.
///
/// # Errors
/// [`Error::Shape`], [`Error::Call`].
pub fn norm_residual(
    device: &Device,
    y: View<'_, bf16>,
    h: View<'_, f32>,
    gain: View<'_, bf16>,
    rows: usize,
    d: usize,
    eps: f32,
) -> Result<(), Error> {
    eights(&[d])?;
    holds("y", y, rows * d)?;
    holds("h", h, rows * d)?;
    holds("gain", gain, d)?;
    let arguments = [
        y.argument(),
        h.argument(),
        gain.argument(),
        of(d)?,
        Argument::F32(eps),
    ];
    device.launch(Kernel::NormResidual, [rows, 1, 1], 256, 0, &arguments)
}

/// h [T, D] += y [T, D], both f32; then x [T, D] = `rms_norm` of h.
///
/// # Errors
/// [`Error::Shape`], [`Error::Call`].
#[expect(
    clippy::too_many_arguments,
    reason = "operands and sizes of one kernel"
)]
pub fn add_rms_norm(
    device: &Device,
    x: View<'_, bf16>,
    h: View<'_, f32>,
    y: View<'_, f32>,
    gain: View<'_, bf16>,
    rows: usize,
    d: usize,
    eps: f32,
) -> Result<(), Error> {
    eights(&[d])?;
    holds("x", x, rows * d)?;
    holds("h", h, rows * d)?;
    holds("y", y, rows * d)?;
    holds("gain", gain, d)?;
    let arguments = [
        x.argument(),
        h.argument(),
        y.argument(),
        gain.argument(),
        of(d)?,
        Argument::F32(eps),
    ];
    device.launch(Kernel::AddRmsNorm, [rows, 1, 1], 256, 0, &arguments)
}

/// `rms_norm` of heads `first ..` `first + heads` of each row of x [T, stride], in place.
///
/// # Errors
/// [`Error::Shape`], [`Error::Call`].
#[expect(
    clippy::too_many_arguments,
    reason = "operands and sizes of one kernel"
)]
pub fn head_norm(
    device: &Device,
    x: View<'_, f32>,
    gain: View<'_, bf16>,
    rows: usize,
    first: usize,
    heads: usize,
    dh: usize,
    stride: usize,
    eps: f32,
) -> Result<(), Error> {
    holds("x", x, rows * stride)?;
    holds("gain", gain, dh)?;
    fits((first + heads) * dh <= stride, || {
        format!("heads {first} + {heads} of {dh} in rows of {stride}")
    })?;
    let arguments = [
        x.argument(),
        gain.argument(),
        of(first)?,
        of(dh)?,
        of(stride)?,
        Argument::F32(eps),
    ];
    device.launch(Kernel::HeadNorm, [rows, heads, 1], 32, 0, &arguments)
}

/// out [T, D] = table [V, D] at index `[T]`; beyond the table: 0.
///
/// # Errors
/// [`Error::Shape`], [`Error::Call`].
pub fn gather_rows(
    device: &Device,
    out: View<'_, bf16>,
    table: View<'_, bf16>,
    index: View<'_, u32>,
    rows: usize,
    d: usize,
) -> Result<(), Error> {
    eights(&[d])?;
    holds("out", out, rows * d)?;
    holds("index", index, rows)?;
    let arguments = [
        out.argument(),
        table.argument(),
        index.argument(),
        of(d)?,
        of(table.len / d)?,
    ];
    device.launch(Kernel::GatherRows, [rows, 1, 1], 256, 0, &arguments)
}

/// to `[n]` += weight from `[n]`; n a multiple of 8.
///
/// # Errors
/// [`Error::Shape`], [`Error::Call`].
pub fn add_scaled(
    device: &Device,
    to: View<'_, f32>,
    from: View<'_, f32>,
    weight: f32,
) -> Result<(), Error> {
    let n = to.len();
    eights(&[n])?;
    holds("from", from, n)?;
    let arguments = [
        to.argument(),
        from.argument(),
        Argument::F32(weight),
        Argument::U64(n as u64),
    ];
    let blocks = (n / 8).div_ceil(256);
    device.launch(Kernel::AddScaled, [blocks, 1, 1], 256, 0, &arguments)
}

/// to `[n]` += weight from `[n]`, a few of them.
///
/// # Errors
/// [`Error::Shape`], [`Error::Call`].
pub fn add_scaled_masses(
    device: &Device,
    to: View<'_, f64>,
    from: View<'_, f64>,
    weight: f64,
) -> Result<(), Error> {
    let n = to.len();
    holds("from", from, n)?;
    let arguments = [
        to.argument(),
        from.argument(),
        Argument::F64(weight),
        of(n)?,
    ];
    device.launch(Kernel::AddScaledMasses, [1, 1, 1], 64, 0, &arguments)
}

/// mass `[1]` += Σ ||k_t|| ||v_t|| over k [T, R1], v [T, R2].
///
/// # Errors
/// [`Error::Shape`], [`Error::Call`].
pub fn add_mass(
    device: &Device,
    mass: View<'_, f64>,
    k: View<'_, f32>,
    v: View<'_, f32>,
    rows: usize,
    r1: usize,
    r2: usize,
) -> Result<(), Error> {
    holds("mass", mass, 1)?;
    holds("k", k, rows * r1)?;
    holds("v", v, rows * r2)?;
    let arguments = [
        mass.argument(),
        k.argument(),
        v.argument(),
        of(rows)?,
        of(r1)?,
        of(r2)?,
    ];
    device.launch(Kernel::AddMass, [1, 1, 1], 1024, 0, &arguments)
}

/// The same into f32: what the residual stream begins with.
///
/// # Errors
/// [`Error::Shape`], [`Error::Call`].
pub fn gather_residual(
    device: &Device,
    out: View<'_, f32>,
    table: View<'_, bf16>,
    index: View<'_, u32>,
    rows: usize,
    d: usize,
) -> Result<(), Error> {
    holds("out", out, rows * d)?;
    holds("index", index, rows)?;
    let arguments = [
        out.argument(),
        table.argument(),
        index.argument(),
        of(d)?,
        of(table.len / d)?,
    ];
    device.launch(Kernel::GatherResidual, [rows, 1, 1], 256, 0, &arguments)
}

/// m [T, F] = silu(gate) up of gate_up [T, 2F].
///
/// # Errors
/// [`Error::Shape`], [`Error::Call`].
pub fn silu_mul(
    device: &Device,
    m: View<'_, bf16>,
    gate_up: View<'_, bf16>,
    rows: usize,
    f: usize,
) -> Result<(), Error> {
    eights(&[f])?;
    holds("m", m, rows * f)?;
    holds("gate_up", gate_up, rows * 2 * f)?;
    let arguments = [m.argument(), gate_up.argument(), of(f)?];
    device.launch(
        Kernel::SiluMul,
        [rows, (f / 8).div_ceil(256), 1],
        256,
        0,
        &arguments,
    )
}

/// x [T, N] += bias `[N]`.
///
/// # Errors
/// [`Error::Shape`], [`Error::Call`].
pub fn add_bias(
    device: &Device,
    x: View<'_, f32>,
    bias: View<'_, bf16>,
    rows: usize,
    n: usize,
) -> Result<(), Error> {
    holds("x", x, rows * n)?;
    holds("bias", bias, n)?;
    device.launch(
        Kernel::AddBias,
        [rows, 1, 1],
        256,
        0,
        &[x.argument(), bias.argument(), of(n)?],
    )
}

/// to `[n]` = from `[n]`, rounded to bf16; n a multiple of 8.
///
/// # Errors
/// [`Error::Shape`], [`Error::Call`].
pub fn narrow(
    device: &Device,
    to: View<'_, bf16>,
    from: View<'_, f32>,
    n: usize,
) -> Result<(), Error> {
    eights(&[n])?;
    holds("to", to, n)?;
    holds("from", from, n)?;
    let arguments = [to.argument(), from.argument(), Argument::U64(n as u64)];
    let blocks = (n / 8).div_ceil(256);
    device.launch(Kernel::Narrow, [blocks, 1, 1], 256, 0, &arguments)
}
