//! out [M, N] (+)= x [M, K] w [K, N]: the outer-product core under every matrix product of this crate.
//!
//! Element by element it is one chain of fused multiply-adds over ascending k, begun at zero or at what
//! stands in memory. So neither the rows beside a row, nor tiles, threads or a cut of K change a bit.
//! [`multiply`] is the core on raw addresses; start at [`products`], its safe face.
#![expect(unsafe_code, reason = "strided reads and writes through raw pointers")]

#[cfg(test)]
mod tests;

use std::ops::Range;

use rayon::prelude::*;

use crate::simd::{Isa, Kernel, LANES, run};

/// Steps of K at a time at most: 16 columns x 288 f32 are 18 KB of a 32 KB L1.
pub(crate) const STRETCH: usize = 288;
/// Rows that one packed stretch is multiplied with: 256 rows x 288 steps are 288 KB of a 512 KB L2, and a window of
/// 256 tokens is one part.
pub(crate) const ROWS: usize = 256;
/// Rows from which packing a stretch of sixteen columns pays.
const PACK_ROWS: usize = 8;

/// What the sums begin with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Begin {
    /// Zero: `out` is only written.
    Zero,
    /// What stands in `out`.
    Out,
}

/// How w lies in memory.
#[derive(Clone, Copy)]
pub(crate) enum Right<'a> {
    /// [K, N]
    Steps(&'a [f32]),
    /// [N, K]
    Columns(&'a [f32]),
}

/// One matrix product: x [M, K], w [K, N], out [M, N], all dense row-major but for a transposed w.
pub(crate) struct Product<'a> {
    pub(crate) x: &'a [f32],
    pub(crate) w: Right<'a>,
    pub(crate) out: &'a mut [f32],
    pub(crate) k: usize,
    pub(crate) n: usize,
    pub(crate) begin: Begin,
}

impl Product<'_> {
    fn m(&self) -> usize {
        self.out.len() / self.n.max(1)
    }
}

/// The meaning, on one thread, element after element.
#[cfg(test)]
pub(crate) fn reference(product: &mut Product<'_>) {
    let (m, k, n) = (product.m(), product.k, product.n);
    for row in 0..m {
        for column in 0..n {
            let out = &mut product.out[row * n + column];
            let begin = if product.begin == Begin::Zero {
                0.0
            } else {
                *out
            };
            *out = (0..k).fold(begin, |sum, step| {
                let w = match product.w {
                    Right::Steps(w) => w[step * n + column],
                    Right::Columns(w) => w[column * k + step],
                };
                product.x[row * k + step].mul_add(w, sum)
            });
        }
    }
}

/// Runs products side by side on the global pool.
///
/// # Panics
/// If the lengths of a product do not agree with its k and n: the callers have checked their shapes.
pub(crate) fn products(products: &mut [Product<'_>]) {
    let mut jobs = Vec::with_capacity(products.len());
    let (mut items, mut work) = (0, 0);
    for product in products.iter_mut() {
        let (m, k, n) = (product.m(), product.k, product.n);
        let (Right::Steps(w) | Right::Columns(w)) = product.w;
        assert!(
            product.out.len() == m * n && product.x.len() == m * k && w.len() == k * n,
            "a product of other lengths"
        );
        if product.out.is_empty() {
            continue;
        }
        let parts = m.div_ceil(ROWS);
        let first = items;
        items += parts * n.div_ceil(LANES);
        work += m * k * n;
        jobs.push(Job {
            first,
            x: product.x,
            w: product.w,
            out: Shared(product.out.as_mut_ptr()),
            m,
            k,
            n,
            parts,
            begin: product.begin,
        });
    }
    spread(items, 1, work, |range| {
        for item in range {
            let job = &jobs[jobs.partition_point(|job| job.first <= item) - 1];
            job.panel(item - job.first);
        }
    });
}

/// A product whose panels threads share out.
struct Job<'a> {
    /// Number of its first panel among those of all products.
    first: usize,
    x: &'a [f32],
    w: Right<'a>,
    out: Shared<f32>,
    m: usize,
    k: usize,
    n: usize,
    /// Row parts.
    parts: usize,
    begin: Begin,
}

impl Job<'_> {
    /// Sixteen columns of one row part.
    fn panel(&self, item: usize) {
        let &Self { m, k, n, .. } = self;
        let (panel, part) = (item / self.parts, item % self.parts);
        let column = panel * LANES;
        let columns = LANES.min(n - column);
        let rows = m * part / self.parts..m * (part + 1) / self.parts;
        // SAFETY: row `rows.start` < m and `column` < n lie in out.
        let at = unsafe { self.out.get().add(rows.start * n + column) };
        let out = Out {
            at,
            row: n,
            columns,
        };
        let mut scratch = [0.0f32; STRETCH * LANES];
        if k == 0 && self.begin == Begin::Zero {
            // SAFETY: no step is read; the columns of these rows are this item's own.
            unsafe {
                multiply(
                    Left {
                        at: self.x.as_ptr(),
                        row: k,
                    },
                    Steps {
                        at: scratch.as_ptr(),
                        row: LANES,
                    },
                    out,
                    rows.len(),
                    0,
                    Begin::Zero,
                )
            }
        }
        let stretch = k.div_ceil(k.div_ceil(STRETCH).max(1)).max(1);
        for from in (0..k).step_by(stretch) {
            let steps = stretch.min(k - from);
            let right = match self.w {
                Right::Steps(w) if columns == LANES && rows.len() < PACK_ROWS => Steps {
                    at: w[from * n + column..].as_ptr(),
                    row: n,
                },
                Right::Steps(w) => {
                    for (step, to) in scratch.chunks_exact_mut(LANES).take(steps).enumerate() {
                        to[..columns].copy_from_slice(&w[(from + step) * n + column..][..columns]);
                    }
                    Steps {
                        at: scratch.as_ptr(),
                        row: LANES,
                    }
                }
                Right::Columns(w) => {
                    for lane in 0..columns {
                        let w = &w[(column + lane) * k + from..][..steps];
                        for (w, to) in w.iter().zip(scratch.chunks_exact_mut(LANES)) {
                            to[lane] = *w;
                        }
                    }
                    Steps {
                        at: scratch.as_ptr(),
                        row: LANES,
                    }
                }
            };
            let x = &self.x[rows.start * k + from..];
            let begin = if from == 0 { self.begin } else { Begin::Out };
            // SAFETY: x holds the steps of these rows; w was bounded above: either a scratch of `steps` times 16
            // or `steps` rows of n with 16 columns from `column` on; out's columns of these rows are this item's own.
            unsafe {
                multiply(
                    Left {
                        at: x.as_ptr(),
                        row: k,
                    },
                    right,
                    out,
                    rows.len(),
                    steps,
                    begin,
                )
            }
        }
    }
}

/// x: element (m, k) lies at `at + m * row + k`.
#[derive(Clone, Copy)]
pub(crate) struct Left {
    pub(crate) at: *const f32,
    pub(crate) row: usize,
}

/// w: sixteen columns of step k lie at `at + k * row`.
#[derive(Clone, Copy)]
pub(crate) struct Steps {
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
pub(crate) unsafe fn multiply(x: Left, w: Steps, out: Out, m: usize, k: usize, begin: Begin) {
    run(Multiply {
        x,
        w,
        out,
        m,
        k,
        begin,
    });
}

struct Multiply {
    x: Left,
    w: Steps,
    out: Out,
    m: usize,
    k: usize,
    begin: Begin,
}

impl Kernel for Multiply {
    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let Self {
            x,
            w,
            out,
            m,
            k,
            begin,
        } = self;
        let tiles = m.div_ceil(I::ROWS);
        let mut row = 0;
        for tile in 0..tiles {
            // Even tiles: 8 rows on six-row registers go as 4 + 4, not as 6 + 2.
            let rows = (m - row).div_ceil(tiles - tile);
            // SAFETY: rows `row .. row + rows` are among the m that the caller of `multiply` gives.
            unsafe {
                let x = Left {
                    at: x.at.add(row * x.row),
                    ..x
                };
                let out = Out {
                    at: out.at.add(row * out.row),
                    ..out
                };
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
}

/// # Safety
/// As [`multiply`], with M rows.
#[inline(always)]
unsafe fn tile_of<I: Isa, const M: usize>(
    isa: I,
    x: Left,
    w: Steps,
    out: Out,
    k: usize,
    begin: Begin,
) {
    if M > I::ROWS {
        return; // never asked for: `Multiply` cuts tiles of at most ROWS. Known when compiled, so no code is made.
    }
    let mut sums = [isa.splat(0.0); M];
    if begin == Begin::Out {
        for (m, sum) in sums.iter_mut().enumerate() {
            // SAFETY: row m of `out` is readable, `columns` wide.
            *sum = unsafe { load_columns(isa, out.at.add(m * out.row), out.columns) };
        }
    }
    let mut w_at = w.at;
    for step in 0..k {
        // SAFETY: step k of x (M rows) and w is among those the caller gives; the address behind the last
        // step is computed but not read.
        unsafe {
            let w_k = isa.load(w_at);
            for (m, sum) in sums.iter_mut().enumerate() {
                *sum = isa.fma(isa.splat(*x.at.add(m * x.row + step)), w_k, *sum);
            }
        }
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

/// Runs a chain of operations on a thread of the pool that they share.
///
/// From another thread each operation hands its work over, sleeps, and is woken when it is done: some hundred times for a
/// forward. From here it does its own part, and the other threads stay awake from one operation to the next.
pub fn on_pool<T: Send>(chain: impl FnOnce() -> T + Send) -> T {
    rayon::scope(|_| chain())
}

/// Multiply-adds below which waking other threads costs more than it gives: about 10 us of one core.
pub(crate) const INLINE_WORK: usize = 1 << 18;

/// Cuts `items` into even ranges and runs them on the global pool; inline if the work is small.
/// `work`: multiply-adds of the whole. `grain`: items that belong together.
pub(crate) fn spread(
    items: usize,
    grain: usize,
    work: usize,
    run: impl Fn(Range<usize>) + Send + Sync,
) {
    let grains = items.div_ceil(grain);
    let threads = rayon::current_num_threads();
    if work <= INLINE_WORK || threads < 2 || grains < 2 {
        return run(0..items);
    }
    // Several parts a thread even out what the system takes away from one of them.
    let parts = grains.min((work / INLINE_WORK).max(2)).min(threads * 16);
    (0..parts).into_par_iter().with_max_len(1).for_each(|part| {
        let from = (grains * part / parts * grain).min(items);
        let to = (grains * (part + 1) / parts * grain).min(items);
        run(from..to);
    });
}
