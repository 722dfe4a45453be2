//! y = x Wᵀ with frozen W [out, in], kept in its own format.
//!
//! W is packed into panels of 16 output channels, k-major inside, so that one vector holds the same input's
//! weight for 16 outputs. Many rows: a stretch of a panel is expanded to f32 once into a scratch that stays
//! in L1 and multiplied with all rows. Few rows: expanded in registers, no scratch. Both are the same chain
//! of fused multiply-adds over ascending k, y = fma(x_k, w_k, y), with w_k = fma(code, scale, minimum): a row's result is the
//! same bits in any batch and equals that of the dequantised matrix. No activation is ever quantised.
//! Start at [`Linear`].
#![expect(unsafe_code, reason = "vector reads of packed panels")]

mod pack;
#[cfg(test)]
mod tests;

use std::sync::{Arc, OnceLock};

use candle_core::{Result, Tensor, bail};

use crate::{
    WeightFormat,
    floats::{Floats, tensor, transpose},
    gemm::{Begin, Left, Out, ROWS, STRETCH, Shared, Steps, multiply, spread, store_columns},
    recorded::recorded1,
    simd::{Isa, Kernel, LANES, run},
};
use pack::{Form, Panels};

/// A frozen linear map y = x Wᵀ, W [out, in], kept in its own format and multiplied in f32.
///
/// `clone` shares the weights.
#[derive(Clone, Debug)]
pub struct Linear {
    panels: Arc<Panels>,
    /// Wᵀ in f32, made when a gradient first comes back through this map.
    turned: Arc<OnceLock<Panels>>,
}

impl Linear {
    fn of(panels: Panels) -> Self {
        Self {
            panels: Arc::new(panels),
            turned: Arc::default(),
        }
    }

    /// From the bytes of a row-major [out, in] matrix as they lie in a safetensors or GGUF file.
    ///
    /// Fails if a row is not a whole number of the format's blocks, if the byte length is not that of the
    /// shape, or if the shape has no element or overflows.
    pub fn new(
        format: WeightFormat,
        bytes: &[u8],
        out_features: usize,
        in_features: usize,
    ) -> Result<Self> {
        if out_features == 0 || in_features == 0 {
            bail!("a linear of shape [{out_features}, {in_features}] has no weights")
        }
        let Some(row) = format.row_bytes(in_features) else {
            bail!(
                "rows of {in_features} weights are not whole blocks of {format:?} ({} weights)",
                format.block_weights()
            )
        };
        let expected = row.checked_mul(out_features);
        if expected != Some(bytes.len()) {
            bail!(
                "{} bytes for a {format:?} matrix [{out_features}, {in_features}], expected {expected:?}",
                bytes.len()
            )
        }
        Ok(Self::of(Panels::new(
            format,
            bytes,
            out_features,
            in_features,
        )))
    }

    /// From an f32 tensor [out, in].
    pub fn from_tensor(weight: &Tensor) -> Result<Self> {
        let (out_features, in_features) = weight.dims2()?;
        if out_features == 0 || in_features == 0 {
            bail!("a linear of shape [{out_features}, {in_features}] has no weights")
        }
        let weight = weight.contiguous()?;
        let values = Floats::of(&weight)?;
        Ok(Self::of(Panels::of_floats(
            &values,
            out_features,
            in_features,
        )))
    }

    /// Rows of W, entries of y.
    pub fn out_features(&self) -> usize {
        self.panels.out_features
    }

    /// Columns of W, entries of x.
    pub fn in_features(&self) -> usize {
        self.panels.in_features
    }

    /// How the weights lie in memory.
    pub fn format(&self) -> WeightFormat {
        self.panels.format
    }

    /// Bytes held in memory.
    pub fn bytes(&self) -> usize {
        self.panels.bytes.len()
    }

    /// x [T, in] -> [T, out], both f32. Differentiable in x; W is frozen.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (t, in_features) = x.dims2()?;
        if in_features != self.in_features() {
            bail!(
                "a linear of {} inputs got rows of {in_features}",
                self.in_features()
            )
        }
        let x = x.contiguous()?; // [T, in]
        let y = forward(&self.panels, &Floats::of(&x)?, t); // [T, out]
        let map = self.clone();
        recorded1(
            "linear",
            &x,
            y,
            (t, self.out_features()),
            move |_, _, dy| {
                let dx = map.back(&Floats::of(dy)?, t); // [T, in]
                tensor(dx, (t, in_features))
            },
        )
    }

    /// dy [T, out] -> dx = dy W [T, in], on weights that are turned and expanded to f32 once.
    pub(crate) fn back(&self, dy: &[f32], t: usize) -> Vec<f32> {
        let turned = self.turned.get_or_init(|| {
            let (out, width) = (self.out_features(), self.in_features());
            let values = transpose(&self.panels.values(), out, width); // [in, out]
            Panels::of_floats(&values, width, out)
        });
        forward(turned, dy, t)
    }

    /// x [T, in] -> [T, out] of plain numbers.
    pub(crate) fn values(&self, x: &[f32], t: usize) -> Vec<f32> {
        forward(&self.panels, x, t)
    }

    /// Rows of W as an embedding table: ids (each < out) -> [ids.len(), in] f32.
    pub fn rows(&self, ids: &[u32]) -> Result<Tensor> {
        let (out, width) = (self.out_features(), self.in_features());
        let mut rows = Vec::with_capacity(ids.len() * width);
        for &id in ids {
            let Some(row) = usize::try_from(id).ok().filter(|&row| row < out) else {
                bail!("row {id} of a table of {out} rows")
            };
            self.panels.row(row, &mut rows);
        }
        tensor(rows, (ids.len(), width))
    }

    /// W [out, in] in f32.
    pub fn dequantize(&self) -> Result<Tensor> {
        tensor(
            self.panels.values(),
            (self.out_features(), self.in_features()),
        )
    }

    /// The same map with its weights expanded to f32.
    pub fn to_f32(&self) -> Result<Self> {
        let (out, width) = (self.out_features(), self.in_features());
        Ok(Self::of(Panels::of_floats(
            &self.panels.values(),
            out,
            width,
        )))
    }
}

/// The meaning: y[t, n] = Σ_k x[t, k] W[n, k], fused, k ascending. x [T, in], w [out, in] -> [T, out].
#[cfg(test)]
fn reference(x: &[f32], w: &[f32], t: usize, out: usize, width: usize) -> Vec<f32> {
    let mut y = vec![0.0; t * out];
    for row in 0..t {
        for n in 0..out {
            for k in 0..width {
                y[row * out + n] = x[row * width + k].mul_add(w[n * width + k], y[row * out + n]);
            }
        }
    }
    y
}

/// Rows up to which weights are expanded in registers.
const FUSED_ROWS: usize = 4;

/// x [T, in] -> [T, out].
fn forward(panels: &Panels, x: &[f32], t: usize) -> Vec<f32> {
    let (out, width) = (panels.out_features, panels.in_features);
    let mut y = vec![0.0f32; t * out]; // [T, out]
    if t == 0 {
        return y;
    }
    let y_at = Shared(y.as_mut_ptr());
    let row_parts = t.div_ceil(ROWS);
    let count = panels.count();
    // Pairs of panels: one row alone needs two chains of sums to keep the multipliers busy.
    spread(row_parts * count, 2, t * out * width, |range| {
        let mut item = range.start;
        while item < range.end {
            let part = item / count;
            let stop = range.end.min((part + 1) * count);
            let rows = t * part / row_parts..t * (part + 1) / row_parts;
            let task = Task {
                panels,
                x: &x[rows.start * width..rows.end * width],
                // SAFETY: `rows.start` is a row of y.
                y: unsafe { y_at.get().add(rows.start * out) },
                rows: rows.len(),
                first: item % count,
                last: item % count + (stop - item),
            };
            run(task);
            item = stop;
        }
    });
    y
}

/// Some rows times panels first .. last, written to their columns of y.
struct Task<'a> {
    panels: &'a Panels,
    x: &'a [f32],
    y: *mut f32,
    rows: usize,
    first: usize,
    last: usize,
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
