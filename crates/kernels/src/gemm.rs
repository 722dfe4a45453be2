//! out [M, 16] (+)= x [M, K] w [K, 16]: the outer-product core under every matrix product of this crate.
//!
//! Element by element it is one chain of fused multiply-adds over ascending k, begun at zero or at what
//! stands in memory. So neither the rows beside a row, nor tiles, nor a cut of K changes a bit. This file
//! does not know what x and w mean, nor threads. Start at [`multiply`].
#![expect(unsafe_code, reason = "strided reads and writes through raw pointers")]

use std::ops::Range;

use rayon::prelude::*;

use crate::simd::{Isa, LANES};

/// x: element (m, k) lies at `at + m * row + k * step`.
#[derive(Clone, Copy)]
pub(crate) struct Left {
    pub(crate) at: *const f32,
    pub(crate) row: usize,
    pub(crate) step: usize,
}

/// w: sixteen columns of row k lie at `at + k * row`.
#[derive(Clone, Copy)]
pub(crate) struct Right {
    pub(crate) at: *const f32,
    pub(crate) row: usize,
}

/// out: the first `columns` (1 ..= 16) of row m lie at `at + m * row`.
#[derive(Clone, Copy)]
pub(crate) struct Out {
    pub(crate) at: *mut f32,
    pub(crate) row: usize,
    pub(crate) columns: usize,
}

/// What the sums begin with.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Begin {
    /// Zero: `out` is only written.
    Zero,
    /// What stands in `out`.
    Out,
}

/// A pointer that threads may share, each for elements of its own.
#[derive(Clone, Copy)]
pub(crate) struct Shared<T>(pub(crate) *mut T);
// SAFETY: only an address; every use of it says why its elements are its own.
unsafe impl<T> Send for Shared<T> {}
// SAFETY: as above.
unsafe impl<T> Sync for Shared<T> {}

impl<T> Shared<T> {
    /// The address, by a method, so that closures capture the whole value.
    #[inline(always)]
    pub(crate) fn get(self) -> *mut T {
        self.0
    }
}

/// out [m, 16] (+)= x [m, k] w [k, 16].
///
/// # Safety
/// All elements that `x`, `w` and `out` name for m rows, k steps and 16 (`out.columns`) columns are readable
/// (writable), and nobody else writes them meanwhile.
#[inline(always)]
pub(crate) unsafe fn multiply<I: Isa>(isa: I, x: Left, w: Right, out: Out, m: usize, k: usize, begin: Begin) {
    let tiles = m.div_ceil(I::ROWS);
    let mut row = 0;
    for tile in 0..tiles {
        // Even tiles: 8 rows on six-row registers go as 4 + 4, not as 6 + 2.
        let rows = (m - row).div_ceil(tiles - tile);
        // SAFETY: rows `row .. row + rows` are among the m that the caller gives.
        unsafe {
            let x = Left { at: x.at.add(row * x.row), ..x };
            let out = Out { at: out.at.add(row * out.row), ..out };
            match rows {
                1 => tile_of::<I, 1>(isa, x, w, out, k, begin),
                2 => tile_of::<I, 2>(isa, x, w, out, k, begin),
                3 => tile_of::<I, 3>(isa, x, w, out, k, begin),
                4 => tile_of::<I, 4>(isa, x, w, out, k, begin),
                5 => tile_of::<I, 5>(isa, x, w, out, k, begin),
                6 => tile_of::<I, 6>(isa, x, w, out, k, begin),
                7 => tile_of::<I, 7>(isa, x, w, out, k, begin),
                8 => tile_of::<I, 8>(isa, x, w, out, k, begin),
                9 => tile_of::<I, 9>(isa, x, w, out, k, begin),
                10 => tile_of::<I, 10>(isa, x, w, out, k, begin),
                11 => tile_of::<I, 11>(isa, x, w, out, k, begin),
                _ => tile_of::<I, 12>(isa, x, w, out, k, begin),
            }
        }
        row += rows;
    }
}

/// # Safety
/// As [`multiply`], with M rows.
#[inline(always)]
unsafe fn tile_of<I: Isa, const M: usize>(isa: I, x: Left, w: Right, out: Out, k: usize, begin: Begin) {
    let mut sums = [isa.splat(0.0); M];
    if begin == Begin::Out {
        for (m, sum) in sums.iter_mut().enumerate() {
            // SAFETY: row m of `out` is readable, `columns` wide.
            *sum = unsafe { load_columns(isa, out.at.add(m * out.row), out.columns) };
        }
    }
    let (mut x_at, mut w_at) = (x.at, w.at);
    for _ in 0..k {
        // SAFETY: step k of x (M rows) and w is among those the caller gives; the addresses behind the last
        // step are computed but not read.
        unsafe {
            let w_k = isa.load(w_at);
            for (m, sum) in sums.iter_mut().enumerate() {
                *sum = isa.fma(isa.splat(*x_at.add(m * x.row)), w_k, *sum);
            }
        }
        x_at = x_at.wrapping_add(x.step);
        w_at = w_at.wrapping_add(w.row);
    }
    for (m, &sum) in sums.iter().enumerate() {
        // SAFETY: row m of `out` is writable, `columns` wide.
        unsafe { store_columns(isa, out.at.add(m * out.row), out.columns, sum) };
    }
}

/// # Safety
/// `columns` (at most 16) floats are readable at `at`.
#[inline(always)]
pub(crate) unsafe fn load_columns<I: Isa>(isa: I, at: *const f32, columns: usize) -> I::V {
    if columns == LANES {
        // SAFETY: 16 floats are readable.
        return unsafe { isa.load(at) };
    }
    let mut lanes = [0.0; LANES];
    // SAFETY: `columns` floats are readable at `at`, and at most 16.
    unsafe {
        std::ptr::copy_nonoverlapping(at, lanes.as_mut_ptr(), columns.min(LANES));
        isa.load(lanes.as_ptr())
    }
}

/// # Safety
/// `columns` (at most 16) floats are writable at `at`.
#[inline(always)]
pub(crate) unsafe fn store_columns<I: Isa>(isa: I, at: *mut f32, columns: usize, v: I::V) {
    if columns == LANES {
        // SAFETY: 16 floats are writable.
        return unsafe { isa.store(at, v) };
    }
    let mut lanes = [0.0; LANES];
    // SAFETY: `columns` floats are writable at `at`, and at most 16.
    unsafe {
        isa.store(lanes.as_mut_ptr(), v);
        std::ptr::copy_nonoverlapping(lanes.as_ptr(), at, columns.min(LANES));
    }
}

/// Multiply-adds below which waking other threads costs more than it gives: about 10 us of one core.
const INLINE_WORK: usize = 1 << 18;

/// Cuts `items` into even ranges and runs them on the global pool; inline if the work is small.
/// `work`: multiply-adds of the whole. `grain`: items that belong together.
pub(crate) fn spread(items: usize, grain: usize, work: usize, run: impl Fn(Range<usize>) + Send + Sync) {
    let grains = items.div_ceil(grain.max(1));
    let threads = rayon::current_num_threads();
    if work <= INLINE_WORK || threads < 2 || grains < 2 {
        return run(0..items);
    }
    // Several parts a thread even out what the system takes away from one of them.
    let parts = grains.min((work / INLINE_WORK).max(2)).min(threads * 4);
    (0..parts).into_par_iter().with_max_len(1).for_each(|part| {
        let from = (grains * part / parts * grain).min(items);
        let to = (grains * (part + 1) / parts * grain).min(items);
        run(from..to);
    });
}
