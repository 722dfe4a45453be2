//! y = x Wᵀ in f32: panels expanded on the fly, in registers for few rows, into L1 for many.
//!
//! One chain of fused multiply-adds over ascending inputs, whatever the number of rows. Start at [`Task`].

use super::pack::{self, Form, Panels};
use crate::{
    WeightFormat,
    gemm::{Begin, Left, Out, STRETCH, Steps, multiply, store_columns},
    simd::{Isa, Kernel, LANES},
};

/// Rows up to which weights are expanded in registers.
const FUSED_ROWS: usize = 4;

/// Some rows times panels first .. last, written to their columns of y.
pub(super) struct Task<'a> {
    pub(super) panels: &'a Panels,
    pub(super) x: &'a [f32],
    pub(super) y: *mut f32,
    pub(super) rows: usize,
    pub(super) first: usize,
    pub(super) last: usize,
}

impl Kernel for Task<'_> {
    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        // SAFETY: the panels were packed in the form that their format names, x has `rows` rows of the
        // panels' inputs, and these panels' columns of these rows of y are this task's own.
        unsafe {
            match self.panels.format {
                WeightFormat::F32 => self.form::<I, pack::Single>(isa),
                WeightFormat::F16 => self.form::<I, pack::Half>(isa),
                WeightFormat::BF16 => self.form::<I, pack::Brain>(isa),
                WeightFormat::Q4_0 => self.form::<I, pack::Nibbles0>(isa),
                WeightFormat::Q4_1 => self.form::<I, pack::Nibbles1>(isa),
                WeightFormat::Q4K => self.form::<I, pack::NibblesK>(isa),
                WeightFormat::Q8_0 => self.form::<I, pack::Bytes32>(isa),
                WeightFormat::Q8 => self.form::<I, pack::Wide32>(isa),
                WeightFormat::Q6K => self.form::<I, pack::Bytes16>(isa),
            }
        }
    }
}

impl Task<'_> {
    /// # Safety
    /// The panels are of this form; x and y as [`Task`] says.
    #[inline(always)]
    unsafe fn form<I: Isa, F: Form>(self, isa: I) {
        // SAFETY: as above.
        unsafe {
            match self.rows {
                1 => self.fused_pairs::<I, F, 1>(isa),
                2 => self.fused_pairs::<I, F, 2>(isa),
                3 => self.fused::<I, F, 3, 1>(isa, self.first, self.last),
                FUSED_ROWS => self.fused::<I, F, 4, 1>(isa, self.first, self.last),
                _ => self.expanded::<I, F>(isa),
            }
        }
    }

    /// # Safety
    /// As [`Self::form`], with M rows.
    #[inline(always)]
    unsafe fn fused_pairs<I: Isa, F: Form, const M: usize>(&self, isa: I) {
        let even = self.first + (self.last - self.first) / 2 * 2;
        // SAFETY: as above.
        unsafe {
            self.fused::<I, F, M, 2>(isa, self.first, even);
            self.fused::<I, F, M, 1>(isa, even, self.last);
        }
    }

    /// M rows, P panels at a time, weights expanded in registers.
    ///
    /// Panels take turns of eight inputs: with all their scales at hand at once registers do not suffice, and
    /// with longer turns the processor cannot see the other panel's sums while it waits for one's (Q4_1
    /// 576 -> 1536, one row, one core: 100 us at once, 91 us in turns).
    ///
    /// # Safety
    /// As [`Self::form`], with M rows; P divides the number of panels.
    #[inline(always)]
    unsafe fn fused<I: Isa, F: Form, const M: usize, const P: usize>(
        &self,
        isa: I,
        first: usize,
        last: usize,
    ) {
        let (out, width) = (self.panels.out_features, self.panels.in_features);
        for panel in (first..last).step_by(P) {
            let mut sums = [[isa.splat(0.0); M]; P];
            let mut group = [std::ptr::null::<u8>(); P];
            for (p, group) in group.iter_mut().enumerate() {
                *group = self.panels.panel(panel + p).as_ptr();
            }
            let mut x = self.x.as_ptr();
            for _ in 0..width / F::GROUP {
                // SAFETY: a panel has in / GROUP groups of BYTES bytes, a row of x has `in` floats; the addresses
                // behind the last group are computed but not read.
                unsafe {
                    if F::GROUP == 1 {
                        for p in 0..P {
                            let scales = F::scales(isa, group[p]);
                            fused_step::<I, F, M>(
                                isa,
                                x,
                                width,
                                group[p],
                                &scales,
                                0,
                                &mut sums[p],
                            );
                        }
                    }
                    for eight in 0..F::GROUP / 8 {
                        for p in 0..P {
                            let scales = F::scales(isa, group[p]);
                            // In pairs: two inputs' nibbles share bytes.
                            for pair in 4 * eight..4 * eight + 4 {
                                fused_step::<I, F, M>(
                                    isa,
                                    x,
                                    width,
                                    group[p],
                                    &scales,
                                    2 * pair,
                                    &mut sums[p],
                                );
                                fused_step::<I, F, M>(
                                    isa,
                                    x,
                                    width,
                                    group[p],
                                    &scales,
                                    2 * pair + 1,
                                    &mut sums[p],
                                );
                            }
                        }
                    }
                }
                for group in &mut group {
                    *group = group.wrapping_add(F::BYTES);
                }
                x = x.wrapping_add(F::GROUP);
            }
            for (p, sums) in sums.iter().enumerate() {
                let column = (panel + p) * LANES;
                for (m, &sum) in sums.iter().enumerate() {
                    // SAFETY: `column` and those behind it, 16 or fewer, are this task's columns of row m.
                    unsafe {
                        store_columns(
                            isa,
                            self.y.add(m * out + column),
                            LANES.min(out - column),
                            sum,
                        )
                    };
                }
            }
        }
    }

    /// Any number of rows: a stretch of a panel is expanded, then multiplied with all of them.
    ///
    /// # Safety
    /// As [`Self::form`].
    #[inline(always)]
    unsafe fn expanded<I: Isa, F: Form>(&self, isa: I) {
        let (out, width) = (self.panels.out_features, self.panels.in_features);
        let mut scratch = [0.0f32; STRETCH * LANES];
        // Even stretches of whole groups: STRETCH is a multiple of every group.
        let stretch = (width / F::GROUP).div_ceil(width.div_ceil(STRETCH)) * F::GROUP;
        for from in (0..width).step_by(stretch) {
            let steps = stretch.min(width - from);
            for panel in self.first..self.last {
                let column = panel * LANES;
                // SAFETY: `from` is a multiple of GROUP, so the stretch is whole groups of
                // the panel; the scratch holds it; columns as in `fused`.
                unsafe {
                    let base = self.panels.panel(panel).as_ptr();
                    for group in 0..steps / F::GROUP {
                        let at = base.add((from / F::GROUP + group) * F::BYTES);
                        let scales = F::scales(isa, at);
                        let to = scratch.as_mut_ptr().add(group * F::GROUP * LANES);
                        if F::GROUP == 1 {
                            isa.store(to, F::weights(isa, at, &scales, 0));
                        }
                        for pair in 0..F::GROUP / 2 {
                            let k = 2 * pair;
                            isa.store(to.add(k * LANES), F::weights(isa, at, &scales, k));
                            isa.store(to.add((k + 1) * LANES), F::weights(isa, at, &scales, k + 1));
                        }
                    }
                    multiply(
                        Left {
                            at: self.x.as_ptr().add(from),
                            row: width,
                        },
                        Steps {
                            at: scratch.as_ptr(),
                            row: LANES,
                        },
                        Out {
                            at: self.y.add(column),
                            row: out,
                            columns: LANES.min(out - column),
                        },
                        self.rows,
                        steps,
                        if from == 0 { Begin::Zero } else { Begin::Out },
                    );
                }
            }
        }
    }
}

/// `sums[m] = fma(x[m, k], w[k], sums[m])` for input k of a group.
///
/// A function and no closure: only `#[inline(always)]` brings it under the vector unit's features. As a closure
/// it was left out of line, and one row took 200 times as long.
///
/// # Safety
/// A group of the form lies at `group`, M rows of `width` floats with the group's first input at `x`.
#[inline(always)]
unsafe fn fused_step<I: Isa, F: Form, const M: usize>(
    isa: I,
    x: *const f32,
    width: usize,
    group: *const u8,
    scales: &F::Scales<I>,
    k: usize,
    sums: &mut [I::V; M],
) {
    // SAFETY: as above.
    unsafe {
        let w = F::weights(isa, group, scales, k);
        for (m, sum) in sums.iter_mut().enumerate() {
            *sum = isa.fma(isa.splat(*x.add(m * width + k)), w, *sum);
        }
    }
}
