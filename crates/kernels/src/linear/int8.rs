//! y = x Wᵀ with x rounded to int8 and W in quantised codes: products and their sums in integers.
//!
//! A row of x is cut into blocks of 32 inputs, each with codes of -127 ..= 127 and one scale, a function of the row alone.
//! With w = d q + m and x ≈ s c, a block adds s d Σ q c + m s Σ c to y: the sum of q c is exact in integers, then
//! y = fma(Σ q c, d s, y) and y = fma(m, s Σ c, y), blocks in ascending order. That is one chain whatever the number of rows,
//! tiles, threads or the vector unit, so a row's result is the same bits in any batch and on any unit.
//! Start at [`Codes`] and [`Product`].

#[cfg(test)]
mod tests;

use rayon::prelude::*;

#[cfg(test)]
use super::pack::Layout;
use super::pack::{self, Form, Panels};
use crate::{
    WeightFormat,
    blocks::Row,
    gemm::{Begin, Out, load_columns, store_columns},
    simd::{Isa, Kernel, LANES, run},
};

/// Inputs of a block of x.
const BLOCK: usize = 32;
/// The largest magnitude of a code.
const LARGEST: f32 = 127.0;
/// A block of smaller values is zero: one over its scale would be no number.
const LEAST: f32 = 1e-30;
/// Blocks that one thread rounds without asking for help: about 10 us of one core.
const INLINE: usize = 1 << 10;
/// Groups of a 4-bit panel that are expanded at a time: 24 of 640 bytes are 15 KB of a 32 KB L1.
const STRETCH: usize = 24;
/// Rows from which expanding 4-bit codes pays.
const EXPAND_ROWS: usize = 8;

/// Rows of x in int8.
pub(super) struct Codes {
    width: usize,
    /// [T, in]
    codes: Vec<i8>,
    /// What a step of a code is worth, [T, in / 32].
    scales: Vec<f32>,
    /// That times the sum of the codes, [T, in / 32].
    sums: Vec<f32>,
}

impl Codes {
    /// x [T, in], in whole blocks. A value that is not finite makes the scale of its block so, too.
    pub(super) fn of(x: &[f32], width: usize) -> Self {
        let blocks = x.len() / BLOCK;
        let mut codes = vec![0; x.len()]; // [T, in]
        let (mut scales, mut sums) = (vec![0.0; blocks], vec![0.0; blocks]); // [T, in / 32]
        let part = if blocks <= INLINE {
            blocks.max(1)
        } else {
            INLINE / 2
        };
        let each = |(((x, codes), scales), sums): (((_, _), _), _)| {
            run(Round {
                x,
                codes,
                scales,
                sums,
            });
        };
        if blocks <= INLINE {
            each((((x, &mut codes[..]), &mut scales[..]), &mut sums[..]));
        } else {
            x.par_chunks(part * BLOCK)
                .zip(codes.par_chunks_mut(part * BLOCK))
                .zip(scales.par_chunks_mut(part))
                .zip(sums.par_chunks_mut(part))
                .for_each(each);
        }
        Self {
            width,
            codes,
            scales,
            sums,
        }
    }
}

/// Blocks of x to codes.
struct Round<'a> {
    x: &'a [f32],
    codes: &'a mut [i8],
    scales: &'a mut [f32],
    sums: &'a mut [f32],
}

impl Kernel for Round<'_> {
    #[inline(always)]
    fn run<I: Isa>(self, _: I) {
        let (x, codes) = (
            self.x.as_chunks::<BLOCK>().0,
            self.codes.as_chunks_mut::<BLOCK>().0,
        );
        for (((x, codes), scale), sum) in x.iter().zip(codes).zip(self.scales).zip(self.sums) {
            (*scale, *sum) = round(x, codes);
        }
    }
}

/// One block: codes, and (their scale, the scale times their sum).
#[inline(always)]
fn round(x: &[f32; BLOCK], codes: &mut [i8; BLOCK]) -> (f32, f32) {
    // Magnitudes are ordered as their bits are, infinities and NaN above all numbers.
    let mut largest = 0;
    for x in x {
        largest = largest.max(x.to_bits() & 0x7fff_ffff);
    }
    let largest = f32::from_bits(largest);
    let inverse = if largest > LEAST {
        LARGEST / largest
    } else {
        0.0
    };
    let scale = if largest < LEAST {
        0.0
    } else {
        largest / LARGEST
    };
    let mut sum = 0;
    for (code, x) in codes.iter_mut().zip(x) {
        // Adding 1.5 * 2^23 rounds to the nearest whole number, ties to even, and leaves it in the low bits.
        let shifted = (x * inverse + 12_582_912.0).to_bits();
        #[expect(clippy::cast_possible_truncation, reason = "the low byte is the code")]
        let rounded = (shifted as u8).cast_signed();
        *code = rounded;
        sum += i32::from(rounded);
    }
    #[expect(clippy::cast_precision_loss, reason = "at most 32 * 128")]
    let sum = sum as f32;
    (scale, scale * sum)
}

/// A row of weights in the format of [`WeightFormat::Q8`], rounded as rows of x are. values: whole blocks.
pub(super) fn round_row(values: &[f32], row: &mut Row) {
    let blocks = values.as_chunks::<BLOCK>().0;
    row.codes.clear();
    row.scales.clear();
    row.minima.clear();
    for values in blocks {
        let mut codes = [0; BLOCK];
        let (scale, _) = round(values, &mut codes);
        row.codes.extend_from_slice(&codes);
        row.scales.push(scale);
        row.minima.push(0.0);
    }
}

/// Rows `from .. from + rows` of x times panels first .. last, written to their columns of y.
pub(super) struct Product<'a> {
    /// In quads.
    pub(super) panels: &'a Panels,
    pub(super) x: &'a Codes,
    pub(super) from: usize,
    pub(super) rows: usize,
    /// Row `from` of y.
    pub(super) y: *mut f32,
    pub(super) first: usize,
    pub(super) last: usize,
}

impl Kernel for Product<'_> {
    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        // SAFETY: panels in quads were packed in the form that their format names; `from + rows` are rows of x, of the
        // panels' inputs; these panels' columns of these rows of y are this product's own.
        unsafe {
            match self.panels.format {
                WeightFormat::Q4_0 => self.four_bits::<I, Nibbles0>(isa),
                WeightFormat::Q4_1 => self.four_bits::<I, Nibbles1>(isa),
                WeightFormat::Q4K => self.four_bits::<I, NibblesK>(isa),
                WeightFormat::Q8_0 => self.packed::<I, Bytes32>(isa),
                WeightFormat::Q8 => self.packed::<I, Wide32>(isa),
                WeightFormat::Q6K => self.packed::<I, Bytes16>(isa),
                // Have no codes and never lie in quads.
                WeightFormat::F32 | WeightFormat::F16 | WeightFormat::BF16 => {}
            }
        }
    }
}

impl Product<'_> {
    fn left(&self) -> Left {
        let Codes {
            width,
            ref codes,
            ref scales,
            ref sums,
        } = *self.x;
        let blocks = width / BLOCK;
        Left {
            width,
            codes: codes[self.from * width..].as_ptr(),
            scales: scales[self.from * blocks..].as_ptr(),
            sums: sums[self.from * blocks..].as_ptr(),
        }
    }

    /// Columns of a panel in y.
    ///
    /// # Safety
    /// `panel` is one of the product's.
    #[inline(always)]
    unsafe fn out(&self, panel: usize) -> Out {
        let out = self.panels.out_features;
        let column = panel * LANES;
        Out {
            // SAFETY: `column` is one of a row of y.
            at: unsafe { self.y.add(column) },
            row: out,
            columns: LANES.min(out - column),
        }
    }

    /// # Safety
    /// The panels are of this form; x and y as [`Product`] says.
    #[inline(always)]
    unsafe fn packed<I: Isa, G: Group>(&self, isa: I) {
        for panel in self.first..self.last {
            let groups = self.panels.in_features / G::INPUTS;
            // SAFETY: a panel is that many groups.
            unsafe {
                tiles::<I, G>(
                    isa,
                    self.panels.panel(panel).as_ptr(),
                    groups,
                    self.left(),
                    self.out(panel),
                    self.rows,
                    Begin::Zero,
                );
            }
        }
    }

    /// Many rows: a stretch of a panel is expanded to bytes, then multiplied with all of them.
    ///
    /// # Safety
    /// As [`Self::packed`].
    #[inline(always)]
    unsafe fn four_bits<I: Isa, G: Group>(&self, isa: I) {
        if self.rows < EXPAND_ROWS {
            // SAFETY: as above.
            return unsafe { self.packed::<I, G>(isa) };
        }
        let groups = self.panels.in_features / G::INPUTS;
        let mut scratch = Scratch([0; STRETCH * Expanded::BYTES]);
        let stretch = groups.div_ceil(groups.div_ceil(STRETCH));
        for panel in self.first..self.last {
            for from in (0..groups).step_by(stretch) {
                let steps = stretch.min(groups - from);
                let begin = if from == 0 { Begin::Zero } else { Begin::Out };
                // SAFETY: a panel has `groups` groups of this form; the scratch holds `steps` expanded ones.
                unsafe {
                    let at = self.panels.panel(panel).as_ptr().add(from * G::BYTES);
                    expand::<I, G>(isa, at, steps, scratch.0.as_mut_ptr());
                    tiles::<I, Expanded>(
                        isa,
                        scratch.0.as_ptr(),
                        steps,
                        self.left().at(0, from * BLOCK),
                        self.out(panel),
                        self.rows,
                        begin,
                    );
                }
            }
        }
    }
}

/// Expanded groups. Aligned, so that no vector crosses two lines of the cache.
#[repr(align(64))]
struct Scratch([u8; STRETCH * Expanded::BYTES]);

/// Rows of x: row m's codes lie at `codes + m * width`, its scales and sums at `.. + m * width / 32`.
#[derive(Clone, Copy)]
struct Left {
    width: usize,
    codes: *const i8,
    scales: *const f32,
    sums: *const f32,
}

impl Left {
    /// The same behind `inputs` inputs, in whole blocks, and of the rows from `row` on.
    ///
    /// # Safety
    /// There are as many.
    #[inline(always)]
    unsafe fn at(self, row: usize, inputs: usize) -> Self {
        let blocks = row * (self.width / BLOCK) + inputs / BLOCK;
        // SAFETY: as above.
        unsafe {
            Self {
                width: self.width,
                codes: self.codes.add(row * self.width + inputs),
                scales: self.scales.add(blocks),
                sums: self.sums.add(blocks),
            }
        }
    }
}

/// Some groups of a panel times all rows, in tiles.
///
/// # Safety
/// `groups` groups of this form lie at `panel`, and as many inputs of `rows` rows at `x`; `out` names 16 (`columns`) columns
/// of as many rows, which nobody else writes meanwhile.
#[inline(always)]
unsafe fn tiles<I: Isa, G: Group>(
    isa: I,
    panel: *const u8,
    groups: usize,
    x: Left,
    out: Out,
    rows: usize,
    begin: Begin,
) {
    let tiles = rows.div_ceil(I::QUAD_ROWS);
    let mut row = 0;
    for tile in 0..tiles {
        let count = (rows - row).div_ceil(tiles - tile);
        // SAFETY: rows `row .. row + count` are among those that the caller gives.
        unsafe {
            let x = x.at(row, 0);
            let out = Out {
                at: out.at.add(row * out.row),
                ..out
            };
            match count {
                1 => tile_of::<I, G, 1>(isa, panel, groups, x, out, begin),
                2 => tile_of::<I, G, 2>(isa, panel, groups, x, out, begin),
                3 => tile_of::<I, G, 3>(isa, panel, groups, x, out, begin),
                _ => tile_of::<I, G, 4>(isa, panel, groups, x, out, begin),
            }
        }
        row += count;
    }
}

/// # Safety
/// As [`tiles`], with M rows.
#[inline(always)]
unsafe fn tile_of<I: Isa, G: Group, const M: usize>(
    isa: I,
    panel: *const u8,
    groups: usize,
    x: Left,
    out: Out,
    begin: Begin,
) {
    if M > I::QUAD_ROWS {
        return; // never asked for: `tiles` cuts tiles of at most QUAD_ROWS. Known when compiled, so no code is made.
    }
    let mut y = [isa.splat(0.0); M];
    if begin == Begin::Out {
        for (m, y) in y.iter_mut().enumerate() {
            // SAFETY: row m of `out` is readable, `columns` wide.
            *y = unsafe { load_columns(isa, out.at.add(m * out.row), out.columns) };
        }
    }
    let blocks = x.width / BLOCK;
    for index in 0..groups {
        // SAFETY: group `index` and its inputs are among those that the caller gives.
        unsafe {
            let group = panel.add(index * G::BYTES);
            let dots = G::dots::<I, M>(isa, group, x.codes.add(index * G::INPUTS), x.width);
            // Behind the products: before them there is no register for them.
            let (scales, minima) = G::scales(isa, group);
            for (m, (y, dot)) in y.iter_mut().zip(dots).enumerate() {
                let block = m * blocks + index * G::INPUTS / BLOCK;
                let scale = isa.mul(scales, isa.splat(*x.scales.add(block)));
                *y = isa.fma(dot, scale, *y);
                if G::MINIMA {
                    *y = isa.fma(minima, isa.splat(*x.sums.add(block)), *y);
                }
            }
        }
    }
    for (m, &y) in y.iter().enumerate() {
        // SAFETY: row m of `out` is writable, `columns` wide.
        unsafe { store_columns(isa, out.at.add(m * out.row), out.columns, y) };
    }
}

/// A group of a panel, as products in integers read it.
trait Group {
    const INPUTS: usize;
    const BYTES: usize;
    /// Whether weights have minima.
    const MINIMA: bool;
    /// Scales and minima of sixteen outputs; zeros where there are no minima.
    ///
    /// # Safety
    /// A group of this form lies at `group`.
    unsafe fn scales<I: Isa>(isa: I, group: *const u8) -> (I::V, I::V);
    /// Σ q c of sixteen outputs for M rows.
    ///
    /// # Safety
    /// A group of this form lies at `group`, its inputs of M rows of `width` codes at `x`.
    unsafe fn dots<I: Isa, const M: usize>(
        isa: I,
        group: *const u8,
        x: *const i8,
        width: usize,
    ) -> [I::V; M];
}

macro_rules! group {
    ($(#[$doc:meta])* $name:ident, $form:ty, $minima:literal, $dots:ident, |$isa:ident, $at:ident| $scales:expr) => {
        $(#[$doc])*
        struct $name;
        impl Group for $name {
            const INPUTS: usize = <$form as Form>::GROUP;
            const BYTES: usize = <$form as Form>::BYTES;
            const MINIMA: bool = $minima;
            #[inline(always)]
            unsafe fn scales<I: Isa>($isa: I, $at: *const u8) -> (I::V, I::V) {
                // SAFETY: as the caller says.
                unsafe { $scales }
            }
            #[inline(always)]
            unsafe fn dots<I: Isa, const M: usize>(isa: I, group: *const u8, x: *const i8, width: usize) -> [I::V; M] {
                // SAFETY: as the caller says; the codes end a group.
                unsafe { $dots::<I, Self, M>(isa, group, x, width) }
            }
        }
    };
}

group!(/** Q4_0. */ Nibbles0, pack::Nibbles0, true, nibble_dots, |isa, at| pack::Nibbles0::scales(isa, at));
group!(/** Q4_1. */ Nibbles1, pack::Nibbles1, true, nibble_dots, |isa, at| pack::Nibbles1::scales(isa, at));
group!(/** Q4_K. */ NibblesK, pack::NibblesK, true, nibble_dots, |isa, at| pack::NibblesK::scales(isa, at));
group!(/** Q8_0. */ Bytes32, pack::Bytes32, false, byte_dots, |isa, at| {
    (pack::Bytes32::scales(isa, at), isa.splat(0.0))
});
group!(/** Q8. */ Wide32, pack::Wide32, false, byte_dots, |isa, at| {
    (pack::Wide32::scales(isa, at), isa.splat(0.0))
});
group!(/** Q6_K. */ Bytes16, pack::Bytes16, false, byte_dots, |isa, at| {
    (pack::Bytes16::scales(isa, at), isa.splat(0.0))
});

/// # Safety
/// As [`Group::dots`], for a group that ends in the nibbles of 32 inputs.
#[inline(always)]
unsafe fn nibble_dots<I: Isa, G: Group, const M: usize>(
    isa: I,
    group: *const u8,
    x: *const i8,
    width: usize,
) -> [I::V; M] {
    let mut sums = [isa.no_sums(); M];
    // SAFETY: as above.
    unsafe {
        let codes = group.add(G::BYTES - BLOCK / 2 * LANES);
        for pair in 0..4 {
            let quads = isa.load_quads(codes.add(pair * 4 * LANES));
            let (low, high) = (isa.low_nibbles(quads), isa.high_nibbles(quads));
            for (m, sums) in sums.iter_mut().enumerate() {
                let x = x.add(m * width + pair * 8);
                *sums = isa.add_nibble_products(*sums, low, isa.splat_quad(x));
                *sums = isa.add_nibble_products(*sums, high, isa.splat_quad(x.add(4)));
                *sums = isa.here(*sums);
            }
        }
    }
    let mut dots = [isa.splat(0.0); M];
    for (dot, sums) in dots.iter_mut().zip(sums) {
        *dot = isa.nibble_sums(sums);
    }
    dots
}

/// # Safety
/// As [`Group::dots`], for a group that ends in a byte for each input.
#[inline(always)]
unsafe fn byte_dots<I: Isa, G: Group, const M: usize>(
    isa: I,
    group: *const u8,
    x: *const i8,
    width: usize,
) -> [I::V; M] {
    let mut sums = [isa.no_sums(); M];
    // SAFETY: as above.
    unsafe {
        let codes = group.add(G::BYTES - G::INPUTS * LANES);
        for quad in 0..G::INPUTS / 4 {
            let quads = isa.load_quads(codes.add(quad * 4 * LANES));
            for (m, sums) in sums.iter_mut().enumerate() {
                let x = isa.splat_quad(x.add(m * width + quad * 4));
                *sums = isa.here(isa.add_byte_products(*sums, quads, x));
            }
        }
    }
    let mut dots = [isa.splat(0.0); M];
    for (dot, sums) in dots.iter_mut().zip(sums) {
        *dot = isa.byte_sums(sums);
    }
    dots
}

/// A 4-bit group expanded: scales and minima in f32, a byte for each code.
struct Expanded;

impl Group for Expanded {
    const INPUTS: usize = BLOCK;
    const BYTES: usize = 2 * 4 * LANES + BLOCK * LANES;
    const MINIMA: bool = true;
    #[inline(always)]
    unsafe fn scales<I: Isa>(isa: I, group: *const u8) -> (I::V, I::V) {
        // SAFETY: a group begins with sixteen scales and sixteen minima.
        unsafe {
            (
                isa.load(group.cast()),
                isa.load(group.add(4 * LANES).cast()),
            )
        }
    }
    #[inline(always)]
    unsafe fn dots<I: Isa, const M: usize>(
        isa: I,
        group: *const u8,
        x: *const i8,
        width: usize,
    ) -> [I::V; M] {
        let mut sums = [isa.no_sums(); M];
        // SAFETY: as the caller says.
        unsafe {
            let codes = group.add(2 * 4 * LANES);
            for quad in 0..BLOCK / 4 {
                let quads = isa.load_quads(codes.add(quad * 4 * LANES));
                for (m, sums) in sums.iter_mut().enumerate() {
                    let x = isa.splat_quad(x.add(m * width + quad * 4));
                    *sums = isa.here(isa.add_nibble_products(*sums, quads, x));
                }
            }
        }
        let mut dots = [isa.splat(0.0); M];
        for (dot, sums) in dots.iter_mut().zip(sums) {
            *dot = isa.nibble_sums(sums);
        }
        dots
    }
}

/// # Safety
/// `groups` 4-bit groups of this form lie at `from`; as many expanded ones are writable at `to`.
#[inline(always)]
unsafe fn expand<I: Isa, G: Group>(isa: I, from: *const u8, groups: usize, to: *mut u8) {
    for index in 0..groups {
        // SAFETY: as above; the codes end a group.
        unsafe {
            let (from, to) = (from.add(index * G::BYTES), to.add(index * Expanded::BYTES));
            let (scales, minima) = G::scales(isa, from);
            isa.store(to.cast(), scales);
            isa.store(to.add(4 * LANES).cast(), minima);
            let (from, to) = (
                from.add(G::BYTES - BLOCK / 2 * LANES),
                to.add(2 * 4 * LANES),
            );
            for pair in 0..4 {
                let quads = isa.load_quads(from.add(pair * 4 * LANES));
                let to = to.add(pair * 8 * LANES);
                isa.store_quads(to, isa.low_nibbles(quads));
                isa.store_quads(to.add(4 * LANES), isa.high_nibbles(quads));
            }
        }
    }
}
