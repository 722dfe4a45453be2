//! y = x Wᵀ with x rounded to int8 and W in quantised codes: products and their sums in integers.
//!
//! A row of x is cut into blocks of 32 inputs, each with codes of -127 ..= 127 and one scale, a function of the row alone.
//! With w = d q + m and x ≈ s c, a block adds s d Σ q c + m s Σ c to y: the sum of q c is exact in integers, then
//! y = fma(Σ q c, d s, y) and y = fma(m, s Σ c, y), blocks in ascending order. That is one chain whatever the number of rows,
//! tiles, threads or the vector unit, so a row's result is the same bits in any batch and on any unit.
//! Start at [`Codes`] and [`Product`].

#[cfg(test)]
mod tests;

use std::mem::MaybeUninit;

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
/// Bytes of a panel that are expanded at a time, of a 32 KB L1.
const SCRATCH: usize = 20 << 10;
/// Rows from which expanding 4-bit codes pays.
const EXPAND_ROWS: usize = 8;
/// Rows from which widening bytes pays: products of sixteen bits need no signs moved from one side to the other (256 rows of
/// 576 inputs, one core, the loop alone: 61 multiply-adds a nanosecond with bytes, 84 with sixteen bits).
const WIDEN_ROWS: usize = 16;

/// Rows of x in int8.
pub(super) struct Codes {
    width: usize,
    /// [T, in]
    codes: Vec<i8>,
    /// What a step of a code is worth, [T, in / 32].
    scales: Vec<f32>,
    /// That times the sum of the codes, [T, in / 32].
    sums: Vec<f32>,
    /// The codes in sixteen bits, [T, in], where many rows meet weights of a byte; else empty.
    wide: Vec<i16>,
}

impl Codes {
    /// x [T, in], in whole blocks, for these maps. A value that is not finite makes the scale of its block so, too.
    pub(super) fn of<'a>(
        x: &[f32],
        width: usize,
        mut maps: impl Iterator<Item = &'a Panels>,
    ) -> Self {
        let mut codes = Self::rounded(x, width);
        if x.len() / width.max(1) >= WIDEN_ROWS && maps.any(Panels::has_bytes) {
            codes.wide = widened(&codes.codes);
        }
        codes
    }

    fn rounded(x: &[f32], width: usize) -> Self {
        let count = x.len() / BLOCK;
        let mut codes = Vec::with_capacity(x.len()); // [T, in]
        let (mut scales, mut sums) = (Vec::with_capacity(count), Vec::with_capacity(count)); // [T, in / 32]
        let x = &x.as_chunks::<BLOCK>().0[..count];
        let to = codes.spare_capacity_mut().as_chunks_mut::<BLOCK>().0;
        let (to, scales_to, sums_to) = (
            &mut to[..count],
            &mut scales.spare_capacity_mut()[..count],
            &mut sums.spare_capacity_mut()[..count],
        );
        if count <= INLINE {
            run(Round {
                x,
                codes: to,
                scales: scales_to,
                sums: sums_to,
            });
        } else {
            let part = INLINE / 2;
            x.par_chunks(part)
                .zip(to.par_chunks_mut(part))
                .zip(scales_to.par_chunks_mut(part))
                .zip(sums_to.par_chunks_mut(part))
                .for_each(|(((x, codes), scales), sums)| {
                    run(Round {
                        x,
                        codes,
                        scales,
                        sums,
                    });
                });
        }
        // SAFETY: all blocks of x were rounded, and x is whole blocks.
        unsafe {
            codes.set_len(count * BLOCK);
            scales.set_len(count);
            sums.set_len(count);
        }
        Self {
            width,
            codes,
            scales,
            sums,
            wide: Vec::new(),
        }
    }
}

/// Codes in sixteen bits.
fn widened(codes: &[i8]) -> Vec<i16> {
    let part = INLINE * BLOCK;
    if codes.len() <= part {
        return codes.iter().map(|&code| i16::from(code)).collect();
    }
    let codes = codes.par_iter().with_min_len(part / 2);
    codes.map(|&code| i16::from(code)).collect()
}

/// Blocks of x to codes.
struct Round<'a> {
    x: &'a [[f32; BLOCK]],
    codes: &'a mut [[MaybeUninit<i8>; BLOCK]],
    scales: &'a mut [MaybeUninit<f32>],
    sums: &'a mut [MaybeUninit<f32>],
}

impl Kernel for Round<'_> {
    #[inline(always)]
    fn run<I: Isa>(self, _: I) {
        let blocks = self.x.iter().zip(self.codes);
        for ((x, to), (scale, sum)) in blocks.zip(self.scales.iter_mut().zip(self.sums)) {
            let mut codes = [0; BLOCK];
            let (s, all) = round(x, &mut codes);
            *to = codes.map(MaybeUninit::new);
            scale.write(s);
            sum.write(all);
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
                WeightFormat::Q8_0 => self.bytes::<I, Bytes32, Widened<32>>(isa),
                WeightFormat::Q8 => self.bytes::<I, Wide32, Widened<32>>(isa),
                WeightFormat::Q6K => self.bytes::<I, Bytes16, Widened<16>>(isa),
                // Have no codes and never lie in quads.
                WeightFormat::F32 | WeightFormat::F16 | WeightFormat::BF16 => {}
            }
        }
    }
}

impl Product<'_> {
    /// Rows of x as groups of this form meet them.
    fn left<G: Group>(&self) -> Left {
        let Codes {
            width,
            ref codes,
            ref scales,
            ref sums,
            ref wide,
        } = *self.x;
        let (blocks, first) = (width / BLOCK, self.from * width);
        Left {
            codes: if G::CODE == 1 {
                codes[first..].as_ptr()
            } else {
                wide[first..].as_ptr().cast()
            },
            stride: width * G::CODE,
            blocks,
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
                    self.left::<G>(),
                    self.out(panel),
                    self.rows,
                    Begin::Zero,
                );
            }
        }
    }

    /// # Safety
    /// As [`Self::packed`], for 4-bit codes.
    #[inline(always)]
    unsafe fn four_bits<I: Isa, G: Group>(&self, isa: I) {
        // SAFETY: as above.
        unsafe {
            if self.rows < EXPAND_ROWS {
                self.packed::<I, G>(isa);
            } else {
                self.expanded::<I, G, Opened>(isa);
            }
        }
    }

    /// # Safety
    /// As [`Self::packed`], for codes of a byte.
    #[inline(always)]
    unsafe fn bytes<I: Isa, G: Group, E: Expanded>(&self, isa: I) {
        // SAFETY: as above.
        unsafe {
            if self.rows < WIDEN_ROWS || self.x.wide.is_empty() {
                self.packed::<I, G>(isa);
            } else {
                self.expanded::<I, G, E>(isa);
            }
        }
    }

    /// Many rows: a stretch of a panel is expanded, then multiplied with all of them.
    ///
    /// # Safety
    /// As [`Self::packed`], for groups that E is made of.
    #[inline(always)]
    unsafe fn expanded<I: Isa, G: Group, E: Expanded>(&self, isa: I) {
        let groups = self.panels.in_features / G::INPUTS;
        let mut scratch = MaybeUninit::<Scratch>::uninit();
        let scratch = scratch.as_mut_ptr().cast::<u8>();
        let stretch = groups.div_ceil(groups.div_ceil(SCRATCH / E::BYTES));
        for panel in self.first..self.last {
            for from in (0..groups).step_by(stretch) {
                let steps = stretch.min(groups - from);
                let begin = if from == 0 { Begin::Zero } else { Begin::Out };
                // SAFETY: a panel has `groups` groups of this form; the scratch holds `steps` expanded ones.
                unsafe {
                    let at = self.panels.panel(panel).as_ptr().add(from * G::BYTES);
                    for step in 0..steps {
                        let to = scratch.add(step * E::BYTES);
                        E::expand::<I, G>(isa, at.add(step * G::BYTES), to);
                    }
                    tiles::<I, E>(
                        isa,
                        scratch,
                        steps,
                        self.left::<E>().behind::<E>(from),
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
struct Scratch {
    _bytes: [u8; SCRATCH],
}

/// Rows of x: row m's codes lie at `codes + m * stride` (bytes), its scales and sums at `.. + m * blocks`.
#[derive(Clone, Copy)]
struct Left {
    codes: *const i8,
    stride: usize,
    blocks: usize,
    scales: *const f32,
    sums: *const f32,
}

impl Left {
    /// The same from a row on.
    ///
    /// # Safety
    /// There are as many rows.
    #[inline(always)]
    unsafe fn below(self, row: usize) -> Self {
        // SAFETY: as above.
        unsafe {
            Self {
                codes: self.codes.add(row * self.stride),
                scales: self.scales.add(row * self.blocks),
                sums: self.sums.add(row * self.blocks),
                ..self
            }
        }
    }

    /// The same behind so many groups, in whole blocks.
    ///
    /// # Safety
    /// There are as many.
    #[inline(always)]
    unsafe fn behind<G: Group>(self, groups: usize) -> Self {
        let blocks = groups * G::INPUTS / BLOCK;
        // SAFETY: as above.
        unsafe {
            Self {
                codes: self.codes.add(groups * G::INPUTS * G::CODE),
                scales: self.scales.add(blocks),
                sums: self.sums.add(blocks),
                ..self
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
            let x = x.below(row);
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
    for index in 0..groups {
        // SAFETY: group `index` and its inputs are among those that the caller gives.
        unsafe {
            let group = panel.add(index * G::BYTES);
            let codes = x.codes.add(index * G::INPUTS * G::CODE);
            let dots = G::dots::<I, M>(isa, group, codes, x.stride);
            // Behind the products: before them there is no register for them.
            let (scales, minima) = G::scales(isa, group);
            for (m, (y, dot)) in y.iter_mut().zip(dots).enumerate() {
                let block = m * x.blocks + index * G::INPUTS / BLOCK;
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
    /// Bytes of a code of x.
    const CODE: usize = 1;
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
    /// A group of this form lies at `group`, its inputs of M rows, `stride` bytes apart, at `x`.
    unsafe fn dots<I: Isa, const M: usize>(
        isa: I,
        group: *const u8,
        x: *const i8,
        stride: usize,
    ) -> [I::V; M];
}

/// A group made for many rows.
trait Expanded: Group {
    /// # Safety
    /// A group of G, of as many inputs, lies at `from`; one of this form is writable at `to`.
    unsafe fn expand<I: Isa, G: Group>(isa: I, from: *const u8, to: *mut u8);
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
            unsafe fn dots<I: Isa, const M: usize>(isa: I, group: *const u8, x: *const i8, stride: usize) -> [I::V; M] {
                // SAFETY: as the caller says; the codes end a group.
                unsafe { $dots::<I, Self, M>(isa, group, x, stride) }
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
    stride: usize,
) -> [I::V; M] {
    let mut sums = [isa.no_sums(); M];
    // SAFETY: as above.
    unsafe {
        let codes = group.add(G::BYTES - BLOCK / 2 * LANES);
        for pair in 0..4 {
            let quads = isa.load_quads(codes.add(pair * 4 * LANES));
            let (low, high) = (isa.low_nibbles(quads), isa.high_nibbles(quads));
            for (m, sums) in sums.iter_mut().enumerate() {
                let x = x.add(m * stride + pair * 8);
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
    stride: usize,
) -> [I::V; M] {
    let mut sums = [isa.no_sums(); M];
    // SAFETY: as above.
    unsafe {
        let codes = group.add(G::BYTES - G::INPUTS * LANES);
        for quad in 0..G::INPUTS / 4 {
            let quads = isa.load_quads(codes.add(quad * 4 * LANES));
            for (m, sums) in sums.iter_mut().enumerate() {
                let x = isa.splat_quad(x.add(m * stride + quad * 4));
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

/// A 4-bit group opened: scales and minima in f32, a byte for each code.
struct Opened;

impl Group for Opened {
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
        stride: usize,
    ) -> [I::V; M] {
        let mut sums = [isa.no_sums(); M];
        // SAFETY: as the caller says.
        unsafe {
            let codes = group.add(2 * 4 * LANES);
            for quad in 0..BLOCK / 4 {
                let quads = isa.load_quads(codes.add(quad * 4 * LANES));
                for (m, sums) in sums.iter_mut().enumerate() {
                    let x = isa.splat_quad(x.add(m * stride + quad * 4));
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

impl Expanded for Opened {
    #[inline(always)]
    unsafe fn expand<I: Isa, G: Group>(isa: I, from: *const u8, to: *mut u8) {
        // SAFETY: as the caller says; the codes end a group.
        unsafe {
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

/// A group of N bytes an output widened: scales in f32, sixteen bits for each code, two neighbouring inputs side by side.
struct Widened<const N: usize>;

impl<const N: usize> Group for Widened<N> {
    const INPUTS: usize = N;
    const BYTES: usize = 4 * LANES + 2 * N * LANES;
    const CODE: usize = 2;
    const MINIMA: bool = false;
    #[inline(always)]
    unsafe fn scales<I: Isa>(isa: I, group: *const u8) -> (I::V, I::V) {
        // SAFETY: a group begins with sixteen scales.
        (unsafe { isa.load(group.cast()) }, isa.splat(0.0))
    }
    #[inline(always)]
    unsafe fn dots<I: Isa, const M: usize>(
        isa: I,
        group: *const u8,
        x: *const i8,
        stride: usize,
    ) -> [I::V; M] {
        let mut sums = [isa.no_sums(); M];
        // SAFETY: as the caller says.
        unsafe {
            let codes = group.add(4 * LANES);
            for pair in 0..N / 2 {
                let pairs = isa.load_quads(codes.add(pair * 4 * LANES));
                for (m, sums) in sums.iter_mut().enumerate() {
                    let x = isa.splat_quad(x.add(m * stride + pair * 4));
                    *sums = isa.here(isa.add_pair_products(*sums, pairs, x));
                }
            }
        }
        let mut dots = [isa.splat(0.0); M];
        for (dot, sums) in dots.iter_mut().zip(sums) {
            *dot = isa.byte_sums(sums);
        }
        dots
    }
}

impl<const N: usize> Expanded for Widened<N> {
    #[inline(always)]
    unsafe fn expand<I: Isa, G: Group>(isa: I, from: *const u8, to: *mut u8) {
        // SAFETY: as the caller says; the codes end a group.
        unsafe {
            isa.store(to.cast(), G::scales(isa, from).0);
            let (from, to) = (from.add(G::BYTES - N * LANES), to.add(4 * LANES));
            for quad in 0..N / 4 {
                let quads = isa.load_quads(from.add(quad * 4 * LANES));
                isa.widen_quads(quads, to.add(quad * 8 * LANES));
            }
        }
    }
}
