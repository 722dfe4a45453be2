//! y = x Wᵀ with frozen W [out, in], kept in its own format.
//!
//! W is packed into panels of 16 output channels, k-major inside, so that one vector holds the same input's
//! weight for 16 outputs. Many rows: a stretch of a panel is expanded to f32 once into a scratch that stays
//! in L1 and multiplied with all rows. Few rows: expanded in registers, no scratch. Both are the same chain
//! of fused multiply-adds over ascending k, y = fma(x_k, w_k, y), with w_k = fma(code, scale, minimum): a row's result is the
//! same bits in any batch and equals that of the dequantised matrix. No activation is quantised, unless a map was made by
//! [`Linear::with_int8_activations`] (int8.rs). Start at [`Linear`].
#![expect(unsafe_code, reason = "vector reads of packed panels")]

mod int8;
mod pack;
mod single;
#[cfg(test)]
mod tests;

use std::{
    ops::Range,
    sync::{Arc, OnceLock},
};

use candle_core::{Result, Tensor, bail};

use crate::{
    WeightFormat,
    floats::{Floats, tensor, transpose},
    gemm::{ROWS, Shared, spread},
    plain::{self, known},
    recorded::recorded1,
    simd::{LANES, run},
};
use int8::Codes;
use pack::{Layout, Panels};
use single::Task;

/// A frozen linear map y = x Wᵀ, W [out, in], kept in its own format and multiplied in f32, or with x rounded to int8.
///
/// `clone` shares the weights.
#[derive(Clone, Debug)]
pub struct Linear {
    panels: Arc<Panels>,
    /// Wᵀ in f32, made when a gradient first comes back through this map.
    turned: Arc<OnceLock<Panels>>,
    /// W where training asked for it: on a device, or in another type.
    elsewhere: Arc<OnceLock<Tensor>>,
}

impl Linear {
    fn of(panels: Panels) -> Self {
        Self {
            panels: Arc::new(panels),
            turned: Arc::default(),
            elsewhere: Arc::default(),
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
        Self::packed(format, Layout::Lanes, bytes, out_features, in_features)
    }

    /// The same for products in integers: in the quantised formats each 32 neighbouring inputs of a row of x are rounded to 8
    /// bits with a scale of their own. Floating formats are multiplied in f32 all the same.
    ///
    /// A row's result is still the same bits in any batch. Gradients are those of the map in f32.
    pub fn with_int8_activations(
        format: WeightFormat,
        bytes: &[u8],
        out_features: usize,
        in_features: usize,
    ) -> Result<Self> {
        Self::packed(format, Layout::Quads, bytes, out_features, in_features)
    }

    fn packed(
        format: WeightFormat,
        layout: Layout,
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
            layout,
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

    /// The same map with its weights rounded to 8 bits, 32 neighbouring inputs to a scale ([`WeightFormat::Q8`]), for products in
    /// integers; itself where it is such a map, or where its inputs are not whole blocks of 32.
    pub fn rounded(&self) -> Self {
        let (out, width) = (self.out_features(), self.in_features());
        if self.rounds_activations() || WeightFormat::Q8.row_bytes(width).is_none() {
            return self.clone();
        }
        Self::of(Panels::rounded(&self.panels.values(), out, width))
    }

    /// What [`Linear::rounded`] makes of the map of an f32 tensor [out, in]; None where its inputs are not whole blocks of 32.
    pub fn rounded_of(weight: &Tensor) -> Result<Option<Self>> {
        let (out, width) = weight.dims2()?;
        if out == 0 || width == 0 || WeightFormat::Q8.row_bytes(width).is_none() {
            return Ok(None);
        }
        let weight = weight.contiguous()?;
        let values = Floats::of(&weight)?;
        Ok(Some(Self::of(Panels::rounded(&values, out, width))))
    }

    /// Bytes that the weights of a rounded map [out, in] take; None where there is no such map.
    pub fn rounded_size(out_features: usize, in_features: usize) -> Option<usize> {
        let row = WeightFormat::Q8.row_bytes(in_features)?;
        out_features
            .checked_next_multiple_of(LANES)?
            .checked_mul(row)
    }

    /// What [`Linear::rounded`] made, in bytes for [`Linear::of_rounded_bytes`]; None for a map of another kind.
    pub fn rounded_bytes(&self) -> Option<&[u8]> {
        (self.rounds_activations() && self.format() == WeightFormat::Q8)
            .then_some(&self.panels.bytes)
    }

    /// The map [out, in] whose [`Linear::rounded_bytes`] these are, bit for bit. Fails if they are not as many as it has.
    pub fn of_rounded_bytes(bytes: &[u8], out_features: usize, in_features: usize) -> Result<Self> {
        match Panels::of_quads(bytes, out_features, in_features) {
            Some(panels) => Ok(Self::of(panels)),
            None => bail!(
                "{} bytes for a rounded matrix [{out_features}, {in_features}]",
                bytes.len()
            ),
        }
    }

    /// Writes zeros over the weights, if nobody else holds them. Says whether it did.
    pub fn scrub(&mut self) -> bool {
        self.turned = Arc::default();
        self.elsewhere = Arc::default();
        let panels = Arc::get_mut(&mut self.panels);
        panels.is_some_and(|panels| {
            panels.bytes.fill(0);
            true
        })
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

    /// Whether activations are rounded to int8.
    pub fn rounds_activations(&self) -> bool {
        self.panels.layout == Layout::Quads
    }

    /// Bytes held in memory.
    pub fn bytes(&self) -> usize {
        self.panels.bytes.len()
    }

    /// x [T, in] -> [T, out], both f32. Differentiable in x; W is frozen.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let [y] = Self::forward_all([self], x)?; // [T, out]
        Ok(y)
    }

    /// The same x through several maps at once, which costs less than one after the other where rows are few: [T, in] ->
    /// [T, out] of each, the same bits as alone.
    pub fn forward_all<const N: usize>(maps: [&Self; N], x: &Tensor) -> Result<[Tensor; N]> {
        let (t, in_features) = x.dims2()?;
        if let Some(map) = maps.iter().find(|map| map.in_features() != in_features) {
            bail!(
                "a linear of {} inputs got rows of {in_features}",
                map.in_features()
            )
        }
        let x = x.contiguous()?; // [T, in]
        if !known(&x) {
            let mut ys = Vec::with_capacity(N);
            for map in maps {
                ys.push(plain::frozen(&x, &map.beside(&x)?)?); // [T, out]
            }
            return ys.try_into().map_err(|_| as_many());
        }
        let products = forward(maps.map(|map| &*map.panels), &Floats::of(&x)?, t); // [T, out] each
        let mut ys = Vec::with_capacity(N);
        for (map, y) in maps.into_iter().zip(products) {
            let shape = (t, map.out_features());
            let map = map.clone();
            ys.push(recorded1("linear", &x, y, shape, move |_, _, dy| {
                let dx = map.back(&Floats::of(dy)?, t); // [T, in]
                tensor(dx, (t, in_features))
            })?);
        }
        ys.try_into().map_err(|_| as_many())
    }

    /// W [out, in] where x is and of its type; made once, and there for good.
    ///
    /// Fails where it was made for tensors elsewhere before.
    pub(crate) fn beside(&self, x: &Tensor) -> Result<Tensor> {
        let w = match self.elsewhere.get() {
            Some(w) => w.clone(),
            None => {
                let w = self.dequantize()?.to_device(x.device())?;
                let w = w.to_dtype(x.dtype())?;
                self.elsewhere.get_or_init(|| w).clone()
            }
        };
        if w.dtype() != x.dtype() || w.device().location() != x.device().location() {
            bail!(
                "weights in {:?} at {:?} for rows in {:?} at {:?}",
                w.dtype(),
                w.device().location(),
                x.dtype(),
                x.device().location()
            )
        }
        Ok(w)
    }

    /// dy [T, out] -> dx = dy W [T, in], on weights that are turned and expanded to f32 once.
    pub(crate) fn back(&self, dy: &[f32], t: usize) -> Vec<f32> {
        let turned = self.turned.get_or_init(|| {
            let (out, width) = (self.out_features(), self.in_features());
            let values = transpose(&self.panels.values(), out, width); // [in, out]
            Panels::of_floats(&values, width, out)
        });
        let [dx] = forward([turned], dy, t);
        dx
    }

    /// x [T, in] -> [T, out] of plain numbers.
    pub(crate) fn values(&self, x: &[f32], t: usize) -> Vec<f32> {
        let [y] = forward([&*self.panels], x, t);
        y
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

fn as_many() -> candle_core::Error {
    candle_core::Error::msg("as many results as maps")
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

/// x [T, in] -> [T, out] of each matrix, shared out over the threads as if they were one.
fn forward<const N: usize>(maps: [&Panels; N], x: &[f32], t: usize) -> [Vec<f32>; N] {
    let mut ys = maps.map(|panels| Vec::with_capacity(t * panels.out_features)); // [T, out] each
    let Some(width) = maps.first().map(|panels| panels.in_features) else {
        return ys;
    };
    if t == 0 {
        return ys;
    }
    let mut at = ys.iter_mut().map(|y| Shared(y.as_mut_ptr()));
    let (mut first, mut outs) = (0, 0);
    let jobs = maps.map(|panels| {
        let job = Job {
            panels,
            y: at.next().unwrap_or(Shared(std::ptr::null_mut())),
            first,
        };
        first += panels.count();
        outs += panels.out_features;
        job
    });
    let count = first;
    let rounded = maps.iter().any(|panels| panels.layout == Layout::Quads);
    let codes = rounded.then(|| Codes::of(x, width, maps.iter().copied()));
    let row_parts = t.div_ceil(ROWS);
    // Pairs of panels: one row alone needs two chains of sums to keep the multipliers busy.
    spread(row_parts * count, 2, t * outs * width, |range| {
        let mut item = range.start;
        while item < range.end {
            let (part, panel) = (item / count, item % count);
            let job = &jobs[jobs.partition_point(|job| job.first <= panel) - 1];
            let here = panel - job.first;
            let last = job.panels.count().min(here + (range.end - item));
            let rows = t * part / row_parts..t * (part + 1) / row_parts;
            job.run(x, codes.as_ref(), rows, here..last);
            item += last - here;
        }
    });
    for (y, panels) in ys.iter_mut().zip(maps) {
        // SAFETY: the panels of all row parts cover y, and each wrote all of its own.
        unsafe { y.set_len(t * panels.out_features) }
    }
    ys
}

/// Rows of x [T, in] through a map of their own each, y [T, out] written in their places: the same bits as by [`Linear::values`].
/// All maps round activations and have as many inputs and outputs; rows of x lie within x and y and in one entry only.
pub(crate) fn own_maps(entries: &[(&Linear, Range<usize>)], x: &[f32], y: &mut [f32]) {
    let Some((any, _)) = entries.first() else {
        return;
    };
    let (width, out) = (any.in_features(), any.out_features());
    let rows = x.len() / width;
    let mut next = 0;
    for (map, range) in entries {
        assert!(
            (map.in_features(), map.out_features()) == (width, out)
                && map.rounds_activations()
                && next <= range.start
                && range.start <= range.end
                && range.end <= rows,
            "rows of a map of another size, or out of order"
        );
        next = range.end;
    }
    assert!(y.len() == rows * out, "a result of another size");
    let codes = Codes::of(x, width, entries.iter().map(|(map, _)| &*map.panels));
    let (mut items, mut work, y) = (0, 0, Shared(y.as_mut_ptr()));
    let mut jobs = Vec::with_capacity(entries.len());
    for (map, range) in entries {
        let panels = &*map.panels;
        // Parts of rows, panels of a part side by side.
        for part in range.clone().step_by(ROWS) {
            let rows = part..range.end.min(part + ROWS);
            work += rows.len() * out * width;
            let first = items;
            items += panels.count();
            jobs.push((Job { panels, y, first }, rows));
        }
    }
    spread(items, 2, work, |range| {
        let mut item = range.start;
        while item < range.end {
            let (job, rows) = &jobs[jobs.partition_point(|(job, _)| job.first <= item) - 1];
            let here = item - job.first;
            let last = job.panels.count().min(here + (range.end - item));
            job.run(x, Some(&codes), rows.clone(), here..last);
            item += last - here;
        }
    });
}

/// A matrix whose panels threads share out.
struct Job<'a> {
    panels: &'a Panels,
    y: Shared<f32>,
    /// Number of its first panel among those of all matrices.
    first: usize,
}

impl Job<'_> {
    /// Some rows times some panels.
    fn run(&self, x: &[f32], codes: Option<&Codes>, rows: Range<usize>, panels: Range<usize>) {
        let (out, width) = (self.panels.out_features, self.panels.in_features);
        // SAFETY: `rows.start` is a row of y.
        let y = unsafe { self.y.get().add(rows.start * out) };
        if let (Layout::Quads, Some(x)) = (self.panels.layout, codes) {
            return run(int8::Product {
                panels: self.panels,
                x,
                from: rows.start,
                rows: rows.len(),
                y,
                first: panels.start,
                last: panels.end,
            });
        }
        run(Task {
            panels: self.panels,
            x: &x[rows.start * width..rows.end * width],
            y,
            rows: rows.len(),
            first: panels.start,
            last: panels.end,
        });
    }
}
