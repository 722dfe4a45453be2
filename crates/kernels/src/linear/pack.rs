//! Panels of 16 output channels, k-major inside, and how a vector unit reads them.
//!
//! A panel is a run of groups. A group has 16 scales, 16 minima where the format has them, and for each input
//! 16 codes: bytes for the wide formats; for the 4-bit ones 16 bytes hold the codes of two neighbouring inputs
//! (low nibbles the even one's). Scales stay the f16 of the file where it has f16; the two-level formats get
//! their products as f32. Channels behind the last are zero. For products in integers the codes of a group lie in quads
//! instead: four neighbouring inputs of each output side by side ([`Layout`]). Start at [`Panels`].
#![expect(unsafe_code, reason = "vector reads of packed panels")]

use half::f16;

use super::int8::round_row;
use crate::{
    Linear, WeightFormat,
    blocks::{Row, decode_row, floats_row},
    simd::{Isa, LANES},
};

/// A matrix [out, in] in panels.
#[derive(Debug)]
pub(super) struct Panels {
    pub(super) format: WeightFormat,
    pub(super) layout: Layout,
    pub(super) out_features: usize,
    pub(super) in_features: usize,
    pub(super) bytes: Vec<u8>,
    shape: Shape,
}

/// How the codes of a group lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Layout {
    /// Sixteen outputs of one input side by side, for products in f32; 4-bit codes of two neighbouring inputs share bytes.
    Lanes,
    /// Four neighbouring inputs of each of sixteen outputs, for products in integers; 4-bit codes of a quad (the low
    /// nibbles) and of the one behind it share bytes.
    Quads,
}

/// What a group of a panel looks like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Shape {
    /// Inputs of a group.
    group: usize,
    /// Bytes of 16 scales, and of 16 minima.
    scales: usize,
    minima: usize,
    /// Bytes of the 16 codes of one input, times two.
    codes: usize,
}

impl Shape {
    fn of(format: WeightFormat) -> Self {
        let (group, scales, minima, codes) = match format {
            WeightFormat::F32 => (1, 0, 0, 128),
            WeightFormat::F16 | WeightFormat::BF16 => (1, 0, 0, 64),
            WeightFormat::Q8_0 => (32, 32, 0, 32),
            WeightFormat::Q8 => (32, 64, 0, 32),
            WeightFormat::Q6K => (16, 64, 0, 32),
            WeightFormat::Q4_0 => (32, 32, 0, 16),
            WeightFormat::Q4_1 => (32, 32, 32, 16),
            WeightFormat::Q4K => (32, 64, 64, 16),
        };
        Self {
            group,
            scales,
            minima,
            codes,
        }
    }

    fn head(self) -> usize {
        self.scales + self.minima
    }

    fn bytes(self) -> usize {
        self.head() + self.group * self.codes / 2
    }

    /// Byte, behind the head, and shift of the code of a group's input k for one output.
    fn place(self, layout: Layout, k: usize, lane: usize) -> (usize, usize) {
        let wide = self.codes == 2 * LANES;
        match layout {
            Layout::Lanes if wide => (k * LANES + lane, 0),
            Layout::Lanes => (k / 2 * LANES + lane, k % 2 * 4),
            Layout::Quads if wide => ((k / 4 * LANES + lane) * 4 + k % 4, 0),
            Layout::Quads => ((k / 8 * LANES + lane) * 4 + k % 4, k / 4 % 2 * 4),
        }
    }
}

impl Panels {
    /// `bytes`: out rows of whole blocks, checked by the caller. Floating formats have no codes and ignore the layout.
    pub(super) fn new(
        format: WeightFormat,
        layout: Layout,
        bytes: &[u8],
        out_features: usize,
        in_features: usize,
    ) -> Self {
        let mut panels = Self::empty(format, layout, out_features, in_features);
        let mut row = Row {
            codes: Vec::new(),
            scales: Vec::new(),
            minima: Vec::new(),
        };
        let mut values = Vec::new();
        for (n, bytes) in bytes.chunks_exact(bytes.len() / out_features).enumerate() {
            match format {
                WeightFormat::F32 => {
                    floats_row(format, bytes, &mut values);
                    panels.put_floats(n, &values);
                }
                WeightFormat::F16 | WeightFormat::BF16 => panels.put_halves(n, bytes),
                WeightFormat::Q8_0
                | WeightFormat::Q8
                | WeightFormat::Q4_0
                | WeightFormat::Q4_1
                | WeightFormat::Q4K
                | WeightFormat::Q6K => {
                    decode_row(format, bytes, &mut row);
                    panels.put_codes(n, &row);
                }
            }
        }
        panels
    }

    /// values [out, in].
    pub(super) fn of_floats(values: &[f32], out_features: usize, in_features: usize) -> Self {
        let mut panels = Self::empty(WeightFormat::F32, Layout::Lanes, out_features, in_features);
        for (n, values) in values.chunks_exact(in_features).enumerate() {
            panels.put_floats(n, values);
        }
        panels
    }

    /// values [out, in] in whole blocks of 32, rounded to 8 bits, in quads.
    pub(super) fn rounded(values: &[f32], out_features: usize, in_features: usize) -> Self {
        let mut panels = Self::empty(WeightFormat::Q8, Layout::Quads, out_features, in_features);
        let mut row = Row {
            codes: Vec::new(),
            scales: Vec::new(),
            minima: Vec::new(),
        };
        for (n, values) in values.chunks_exact(in_features).enumerate() {
            round_row(values, &mut row);
            panels.put_codes(n, &row);
        }
        panels
    }

    /// [`WeightFormat::Q8`] in quads, as [`Self::bytes`] were; None if there are too many or too few.
    pub(super) fn of_quads(bytes: &[u8], out_features: usize, in_features: usize) -> Option<Self> {
        let size = Linear::rounded_size(out_features, in_features)?;
        if size == 0 || size != bytes.len() {
            return None;
        }
        let mut panels = Self::empty(WeightFormat::Q8, Layout::Quads, out_features, in_features);
        panels.bytes.copy_from_slice(bytes);
        Some(panels)
    }

    fn empty(
        format: WeightFormat,
        layout: Layout,
        out_features: usize,
        in_features: usize,
    ) -> Self {
        let shape = Shape::of(format);
        let bytes = out_features.div_ceil(LANES) * (in_features / shape.group) * shape.bytes();
        Self {
            format,
            layout: if shape.group == 1 {
                Layout::Lanes
            } else {
                layout
            },
            out_features,
            in_features,
            bytes: vec![0; bytes],
            shape,
        }
    }

    /// Whether codes are a byte each, for products in integers.
    pub(super) fn has_bytes(&self) -> bool {
        self.layout == Layout::Quads && self.shape.codes == 2 * LANES
    }

    /// Number of panels.
    pub(super) fn count(&self) -> usize {
        self.out_features.div_ceil(LANES)
    }

    fn panel_bytes(&self) -> usize {
        self.in_features / self.shape.group * self.shape.bytes()
    }

    /// The bytes of a panel.
    #[inline(always)]
    pub(super) fn panel(&self, panel: usize) -> &[u8] {
        let bytes = self.panel_bytes();
        &self.bytes[panel * bytes..(panel + 1) * bytes]
    }

    /// The panel of channel n, and its lane there.
    fn panel_mut(&mut self, n: usize) -> (&mut [u8], usize) {
        let bytes = self.panel_bytes();
        (&mut self.bytes[n / LANES * bytes..][..bytes], n % LANES)
    }

    fn put_floats(&mut self, n: usize, values: &[f32]) {
        let (panel, lane) = self.panel_mut(n);
        for (input, value) in panel.chunks_exact_mut(4 * LANES).zip(values) {
            input[4 * lane..][..4].copy_from_slice(&value.to_ne_bytes());
        }
    }

    fn put_halves(&mut self, n: usize, values: &[u8]) {
        let (panel, lane) = self.panel_mut(n);
        for (input, value) in panel
            .chunks_exact_mut(2 * LANES)
            .zip(values.chunks_exact(2))
        {
            input[2 * lane..][..2].copy_from_slice(value);
        }
    }

    fn put_codes(&mut self, n: usize, row: &Row) {
        let (shape, layout) = (self.shape, self.layout);
        let (panel, lane) = self.panel_mut(n);
        for (g, group) in panel.chunks_exact_mut(shape.bytes()).enumerate() {
            put_scale(&mut group[..shape.scales], lane, row.scales[g]);
            put_scale(&mut group[shape.scales..shape.head()], lane, row.minima[g]);
            let codes = &row.codes[g * shape.group..][..shape.group];
            let packed = &mut group[shape.head()..];
            if (layout, shape.codes) == (Layout::Quads, 2 * LANES) {
                // What every read-out does to a core.
                for (quads, codes) in packed.chunks_exact_mut(4 * LANES).zip(codes.chunks(4)) {
                    for (to, code) in quads[4 * lane..].iter_mut().zip(codes) {
                        *to = code.cast_unsigned();
                    }
                }
                continue;
            }
            for (k, &code) in codes.iter().enumerate() {
                let (byte, shift) = shape.place(layout, k, lane);
                packed[byte] |= code.cast_unsigned() << shift;
            }
        }
    }

    /// Appends row n of W, each weight as the vector units compute it.
    pub(super) fn row(&self, n: usize, out: &mut Vec<f32>) {
        let shape = self.shape;
        let (panel, lane) = (self.panel(n / LANES), n % LANES);
        match self.format {
            WeightFormat::F32 => {
                let values = panel.as_chunks::<4>().0.iter().skip(lane).step_by(LANES);
                return out.extend(values.map(|&b| f32::from_ne_bytes(b)));
            }
            WeightFormat::F16 => {
                let values = panel.as_chunks::<2>().0.iter().skip(lane).step_by(LANES);
                return out.extend(values.map(|&b| f16::from_le_bytes(b).to_f32()));
            }
            WeightFormat::BF16 => {
                let values = panel.as_chunks::<2>().0.iter().skip(lane).step_by(LANES);
                return out.extend(values.map(|&b| half::bf16::from_le_bytes(b).to_f32()));
            }
            WeightFormat::Q8_0
            | WeightFormat::Q8
            | WeightFormat::Q4_0
            | WeightFormat::Q4_1
            | WeightFormat::Q4K
            | WeightFormat::Q6K => {}
        }
        for group in panel.chunks_exact(shape.bytes()) {
            let scale = scale_at(&group[..shape.scales], lane);
            let minimum = match (self.format, shape.minima) {
                (WeightFormat::Q4_0, _) => -8.0 * scale,
                (_, 0) => 0.0,
                _ => scale_at(&group[shape.scales..shape.head()], lane),
            };
            let packed = &group[shape.head()..];
            let additive = shape.codes == LANES;
            out.extend((0..shape.group).map(|k| {
                let (byte, shift) = shape.place(self.layout, k, lane);
                let code = if shape.codes == 2 * LANES {
                    f32::from(packed[byte].cast_signed())
                } else {
                    f32::from(packed[byte] >> shift & 15)
                };
                if additive {
                    code.mul_add(scale, minimum)
                } else {
                    code * scale
                }
            }));
        }
    }

    /// W [out, in].
    pub(super) fn values(&self) -> Vec<f32> {
        let mut values = Vec::with_capacity(self.out_features * self.in_features);
        for n in 0..self.out_features {
            self.row(n, &mut values);
        }
        values
    }
}

/// Sixteen f16 in 32 bytes or sixteen f32 in 64; none in none.
fn put_scale(scales: &mut [u8], lane: usize, value: f32) {
    match scales.len() {
        0 => {}
        32 => scales[2 * lane..][..2].copy_from_slice(&f16::from_f32(value).to_le_bytes()),
        _ => scales[4 * lane..][..4].copy_from_slice(&value.to_ne_bytes()),
    }
}

fn scale_at(scales: &[u8], lane: usize) -> f32 {
    if scales.len() == 32 {
        f16::from_le_bytes([scales[2 * lane], scales[2 * lane + 1]]).to_f32()
    } else {
        let at = &scales[4 * lane..];
        f32::from_ne_bytes([at[0], at[1], at[2], at[3]])
    }
}

/// A packed form, as a vector unit reads it.
pub(super) trait Form {
    /// Inputs of a group.
    const GROUP: usize;
    /// Bytes of a group.
    const BYTES: usize;
    /// What a group's inputs share.
    type Scales<I: Isa>: Copy;
    /// # Safety
    /// A group of this form lies at `group`.
    unsafe fn scales<I: Isa>(isa: I, group: *const u8) -> Self::Scales<I>;
    /// The weights of input k (< GROUP) for 16 outputs.
    /// # Safety
    /// A group of this form lies at `group`.
    unsafe fn weights<I: Isa>(isa: I, group: *const u8, scales: &Self::Scales<I>, k: usize)
    -> I::V;
}

/// A form without scales: one input a group.
macro_rules! plain {
    ($(#[$doc:meta])* $name:ident, $bytes:literal, |$isa:ident, $at:ident| $load:expr) => {
        $(#[$doc])*
        pub(super) struct $name;
        impl Form for $name {
            const GROUP: usize = 1;
            const BYTES: usize = $bytes;
            type Scales<I: Isa> = ();
            #[inline(always)]
            unsafe fn scales<I: Isa>(_: I, _: *const u8) {}
            #[inline(always)]
            unsafe fn weights<I: Isa>($isa: I, $at: *const u8, (): &(), _: usize) -> I::V {
                // SAFETY: a group is 16 values.
                unsafe { $load }
            }
        }
    };
}

plain!(/** F32. */ Single, 64, |isa, at| isa.load(at.cast()));
plain!(/** F16. */ Half, 32, |isa, at| isa.load_f16(at));
plain!(/** BF16. */ Brain, 32, |isa, at| isa.load_bf16(at));

/// Signed bytes times a scale.
macro_rules! bytes {
    ($(#[$doc:meta])* $name:ident, $group:literal, $head:literal, |$isa:ident, $at:ident| $scales:expr) => {
        $(#[$doc])*
        pub(super) struct $name;
        impl Form for $name {
            const GROUP: usize = $group;
            const BYTES: usize = $head + $group * LANES;
            type Scales<I: Isa> = I::V;
            #[inline(always)]
            unsafe fn scales<I: Isa>($isa: I, $at: *const u8) -> I::V {
                // SAFETY: a group begins with 16 scales.
                unsafe { $scales }
            }
            #[inline(always)]
            unsafe fn weights<I: Isa>(isa: I, group: *const u8, scales: &I::V, k: usize) -> I::V {
                // SAFETY: behind the scales lie 16 codes of each input.
                isa.mul(unsafe { isa.load_i8(group.add($head + k * LANES)) }, *scales)
            }
        }
    };
}

bytes!(/** Q8_0. */ Bytes32, 32, 32, |isa, at| isa.load_f16(at));
bytes!(/** Q8. */ Wide32, 32, 64, |isa, at| isa.load(at.cast()));
bytes!(/** Q6_K. */ Bytes16, 16, 64, |isa, at| isa.load(at.cast()));

/// Nibbles times a scale plus a minimum.
macro_rules! nibbles {
    ($(#[$doc:meta])* $name:ident, $head:literal, |$isa:ident, $at:ident| $scales:expr) => {
        $(#[$doc])*
        pub(super) struct $name;
        impl Form for $name {
            const GROUP: usize = 32;
            const BYTES: usize = $head + 16 * LANES;
            type Scales<I: Isa> = (I::V, I::V);
            #[inline(always)]
            unsafe fn scales<I: Isa>($isa: I, $at: *const u8) -> (I::V, I::V) {
                // SAFETY: a group begins with its scales and minima.
                unsafe { $scales }
            }
            #[inline(always)]
            unsafe fn weights<I: Isa>(isa: I, group: *const u8, scales: &(I::V, I::V), k: usize) -> I::V {
                // SAFETY: behind the head lie 16 bytes for each two inputs.
                let codes = unsafe { isa.load_nibbles(group.add($head + k / 2 * LANES), k % 2 == 1) };
                isa.fma(codes, scales.0, scales.1)
            }
        }
    };
}

nibbles!(/** Q4_0: the minimum is -8 scales. */ Nibbles0, 32, |isa, at| {
    let scales = isa.load_f16(at);
    (scales, isa.mul(scales, isa.splat(-8.0)))
});
nibbles!(/** Q4_1. */ Nibbles1, 64, |isa, at| (isa.load_f16(at), isa.load_f16(at.add(32))));
nibbles!(/** Q4_K. */ NibblesK, 128, |isa, at| (isa.load(at.cast()), isa.load(at.add(64).cast())));
