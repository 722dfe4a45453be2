//! How weights lie in files: the floating formats and GGUF's quantised blocks.
//!
//! A quantised row is codes times a scale plus a minimum, shared by groups of neighbouring inputs:
//! w_k = fma(code_k, scale_g, minimum_g). Products of a code and a scale are exact in f32 for every format
//! here (at most 11 + 6 + 5 significant bits, Q6_K aside, whose minimum is zero), so the one rounding of the
//! fused form gives the very bits of the two-step form that other readers of GGUF compute.
//! Layouts after ggml-common.h of ggml (facts of the format). Start at [`decode_row`].

use half::{bf16, f16};

/// How weights lie in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum WeightFormat {
    /// 32-bit floats.
    F32,
    /// IEEE half floats.
    F16,
    /// The upper halves of 32-bit floats.
    BF16,
    /// 8-bit codes, 32 a block, one f16 scale.
    Q8_0,
    /// 8-bit codes, 32 a block, one f32 scale: in no file, what [`crate::Linear::rounded`] makes.
    Q8,
    /// 4-bit codes around 8, 32 a block, one f16 scale.
    Q4_0,
    /// 4-bit codes, 32 a block, f16 scale and minimum.
    Q4_1,
    /// 4-bit codes, 256 a block, 6-bit scales and minima for each 32.
    Q4K,
    /// 6-bit codes around 32, 256 a block, 8-bit scales for each 16.
    Q6K,
}

impl WeightFormat {
    /// Weights of one block of a row.
    pub fn block_weights(self) -> usize {
        match self {
            Self::F32 | Self::F16 | Self::BF16 => 1,
            Self::Q8_0 | Self::Q8 | Self::Q4_0 | Self::Q4_1 => 32,
            Self::Q4K | Self::Q6K => 256,
        }
    }

    /// Bytes of one block in a file.
    pub fn block_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
            Self::Q8_0 => 34,
            Self::Q8 => 36,
            Self::Q4_0 => 18,
            Self::Q4_1 => 20,
            Self::Q4K => 144,
            Self::Q6K => 210,
        }
    }

    /// Bytes of a row of so many weights; None if that is not a whole number of blocks, or overflows.
    pub fn row_bytes(self, weights: usize) -> Option<usize> {
        let block = self.block_weights();
        if !weights.is_multiple_of(block) {
            return None;
        }
        (weights / block).checked_mul(self.block_bytes())
    }
}

/// One row of a matrix, taken apart: `w_k = fma(codes[k], scales[k / group], minima[k / group])`.
pub(crate) struct Row {
    /// Signed for Q8_0, Q8 and Q6_K, 0..16 else.
    pub(crate) codes: Vec<i8>,
    pub(crate) scales: Vec<f32>,
    pub(crate) minima: Vec<f32>,
}

/// Takes a quantised row of `row_bytes` bytes apart. `row` is cleared first.
pub(crate) fn decode_row(format: WeightFormat, bytes: &[u8], row: &mut Row) {
    row.codes.clear();
    row.scales.clear();
    row.minima.clear();
    for block in bytes.chunks_exact(format.block_bytes()) {
        match format {
            WeightFormat::Q8_0 => q8_0(block, row),
            WeightFormat::Q8 => q8(block, row),
            WeightFormat::Q4_0 => q4_0(block, row),
            WeightFormat::Q4_1 => q4_1(block, row),
            WeightFormat::Q4K => q4_k(block, row),
            WeightFormat::Q6K => q6_k(block, row),
            WeightFormat::F32 | WeightFormat::F16 | WeightFormat::BF16 => {}
        }
    }
}

fn half_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// d, then 32 signed bytes: w = d c.
fn q8_0(block: &[u8], row: &mut Row) {
    row.scales.push(half_at(block, 0));
    row.minima.push(0.0);
    row.codes
        .extend(block[2..34].iter().map(|&b| b.cast_signed()));
}

/// d in f32, then 32 signed bytes: w = d c.
fn q8(block: &[u8], row: &mut Row) {
    let d = f32::from_le_bytes([block[0], block[1], block[2], block[3]]);
    row.scales.push(d);
    row.minima.push(0.0);
    row.codes
        .extend(block[4..36].iter().map(|&b| b.cast_signed()));
}

/// Low nibbles are the first 16 weights, high nibbles the other 16.
fn nibbles(packed: &[u8], codes: &mut Vec<i8>) {
    codes.extend(packed.iter().map(|&b| (b & 15).cast_signed()));
    codes.extend(packed.iter().map(|&b| (b >> 4).cast_signed()));
}

/// d, then 16 bytes of nibbles: w = d (c - 8).
fn q4_0(block: &[u8], row: &mut Row) {
    let d = half_at(block, 0);
    row.scales.push(d);
    row.minima.push(-8.0 * d);
    nibbles(&block[2..18], &mut row.codes);
}

/// d, m, then 16 bytes of nibbles: w = d c + m.
fn q4_1(block: &[u8], row: &mut Row) {
    row.scales.push(half_at(block, 0));
    row.minima.push(half_at(block, 2));
    nibbles(&block[4..20], &mut row.codes);
}

/// d, dmin, 12 bytes with eight 6-bit scales and minima, 4 x 32 bytes of nibbles: w = d s c - dmin m.
fn q4_k(block: &[u8], row: &mut Row) {
    let (d, dmin) = (half_at(block, 0), half_at(block, 2));
    let packed = &block[4..16];
    for group in 0..8 {
        let (scale, minimum) = if group < 4 {
            (packed[group] & 63, packed[group + 4] & 63)
        } else {
            (
                packed[group + 4] & 15 | packed[group - 4] >> 6 << 4,
                packed[group + 4] >> 4 | packed[group] >> 6 << 4,
            )
        };
        row.scales.push(d * f32::from(scale));
        row.minima.push(-(dmin * f32::from(minimum)));
    }
    for packed in block[16..144].chunks_exact(32) {
        nibbles(packed, &mut row.codes);
    }
}

/// 128 bytes of low nibbles, 64 of upper bit pairs, 16 signed scales, d: w = d s (c - 32).
fn q6_k(block: &[u8], row: &mut Row) {
    let d = half_at(block, 208);
    for &scale in &block[192..208] {
        row.scales.push(d * f32::from(scale.cast_signed()));
        row.minima.push(0.0);
    }
    for (low, high) in block[..128]
        .chunks_exact(64)
        .zip(block[128..192].chunks_exact(32))
    {
        let code = |nibble: u8, pair: u8| (nibble | (pair & 3) << 4).cast_signed() - 32;
        row.codes
            .extend((0..32).map(|l| code(low[l] & 15, high[l])));
        row.codes
            .extend((0..32).map(|l| code(low[l + 32] & 15, high[l] >> 2)));
        row.codes
            .extend((0..32).map(|l| code(low[l] >> 4, high[l] >> 4)));
        row.codes
            .extend((0..32).map(|l| code(low[l + 32] >> 4, high[l] >> 6)));
    }
}

/// The values of a row in a floating format.
pub(crate) fn floats_row(format: WeightFormat, bytes: &[u8], out: &mut Vec<f32>) {
    out.clear();
    match format {
        WeightFormat::F32 => out.extend(
            bytes
                .as_chunks::<4>()
                .0
                .iter()
                .map(|&b| f32::from_le_bytes(b)),
        ),
        WeightFormat::F16 => out.extend(
            bytes
                .as_chunks::<2>()
                .0
                .iter()
                .map(|&b| f16::from_le_bytes(b).to_f32()),
        ),
        WeightFormat::BF16 => out.extend(
            bytes
                .as_chunks::<2>()
                .0
                .iter()
                .map(|&b| bf16::from_le_bytes(b).to_f32()),
        ),
        WeightFormat::Q8_0
        | WeightFormat::Q8
        | WeightFormat::Q4_0
        | WeightFormat::Q4_1
        | WeightFormat::Q4K
        | WeightFormat::Q6K => {}
    }
}
