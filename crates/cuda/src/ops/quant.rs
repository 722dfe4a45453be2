//! Products with weights that stay quantised.
//!
//! Few rows read them as they are, many have them in bf16 first. Start at [`multiply_quantised`].

use half::bf16;

use super::{eights, fits, holds, of};
use crate::{Device, Element, Error, Kernel, View, device::Argument, error::shape};

/// Weights that share a scale and a minimum.
pub const QUANTISED_BLOCK: usize = 32;
/// Most rows of [`multiply_quantised`].
pub const MOST_ROWS: usize = 8;

/// A matrix [out, in] of 4 or 8 bits.
#[derive(Clone, Copy, Debug)]
pub struct Quantised<'a> {
    /// [out, in / 32, bits] words.
    pub codes: View<'a, u32>,
    /// [out, in / 32]: scale and minimum of each block, f16 both, the scale in the low half.
    pub scales: View<'a, u32>,
    /// 4 or 8.
    pub bits: usize,
    /// Rows.
    pub out: usize,
    /// Columns, a multiple of 32.
    pub features: usize,
}

impl Quantised<'_> {
    fn check(&self) -> Result<usize, Error> {
        let Self {
            codes,
            scales,
            bits,
            out,
            features,
        } = *self;
        fits(
            (bits == 4 || bits == 8) && features.is_multiple_of(QUANTISED_BLOCK) && features > 0,
            || format!("a matrix [{out}, {features}] of {bits} bits"),
        )?;
        let blocks = out * (features / QUANTISED_BLOCK);
        holds("codes", codes, blocks * bits)?;
        holds("scales", scales, blocks)?;
        Ok(blocks)
    }
}

/// to [out, in] = w, in bf16.
///
/// # Errors
/// [`Error::Shape`], [`Error::Call`].
pub fn dequantise(device: &Device, to: View<'_, bf16>, w: &Quantised<'_>) -> Result<(), Error> {
    let blocks = w.check()?;
    holds("to", to, blocks * QUANTISED_BLOCK)?;
    let kernel = if w.bits == 4 {
        Kernel::Dequantise4
    } else {
        Kernel::Dequantise8
    };
    let arguments = [
        to.argument(),
        w.codes.argument(),
        w.scales.argument(),
        Argument::U64(blocks as u64),
    ];
    device.launch(kernel, [blocks.div_ceil(128), 1, 1], 128, 0, &arguments)
}

/// y [T, out] = x [T, in] wᵀ of at most [`MOST_ROWS`] rows; y in bf16 or f32, sums in f32.
///
/// # Errors
/// [`Error::Shape`], [`Error::Call`].
pub fn multiply_quantised<Y: Element>(
    device: &Device,
    y: View<'_, Y>,
    x: View<'_, bf16>,
    w: &Quantised<'_>,
    rows: usize,
) -> Result<(), Error> {
    w.check()?;
    eights(&[w.features])?;
    fits((1..=MOST_ROWS).contains(&rows), || {
        format!("{rows} rows of a product with quantised weights")
    })?;
    holds("y", y, rows * w.out)?;
    holds("x", x, rows * w.features)?;
    let kernel = match (w.bits, Y::TYPE) {
        (4, bf16::TYPE) => Kernel::Multiply4,
        (4, f32::TYPE) => Kernel::Multiply4Wide,
        (8, bf16::TYPE) => Kernel::Multiply8,
        (8, f32::TYPE) => Kernel::Multiply8Wide,
        (bits, other) => return Err(shape(format!("{bits} bits into type {other}"))),
    };
    let arguments = [
        y.argument(),
        x.argument(),
        w.codes.argument(),
        w.scales.argument(),
        of(rows)?,
        of(w.out)?,
        of(w.features)?,
    ];
    device.launch(kernel, [w.out.div_ceil(8), 1, 1], 256, 0, &arguments)
}
