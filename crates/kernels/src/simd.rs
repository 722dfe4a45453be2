//! Sixteen f32 lanes on whatever vector unit the machine has.
//!
//! A kernel is written once over [`Isa`] and compiled for each unit under its target features; [`run`]
//! takes the widest one at run time. Every unit uses the fused multiply-add and the same order of
//! operations, so a kernel gives the same bits on all of them. Start at [`run`].
#![expect(
    unsafe_code,
    reason = "vector loads and stores, and calls under target features"
)]

#[cfg(test)]
mod tests;

/// Lanes of a vector, and output channels of a panel.
pub(crate) const LANES: usize = 16;

/// A vector unit. A value of it is the proof that the machine has it.
pub(crate) trait Isa: Copy + Send + Sync {
    /// Rows of the widest tile whose accumulators stay in registers.
    const ROWS: usize;
    /// Sixteen f32.
    type V: Copy;
    fn splat(self, value: f32) -> Self::V;
    /// # Safety
    /// 16 floats are readable at `at`.
    unsafe fn load(self, at: *const f32) -> Self::V;
    /// # Safety
    /// 16 floats are writable at `at`.
    unsafe fn store(self, at: *mut f32, v: Self::V);
    /// Sixteen IEEE halves, widened.
    /// # Safety
    /// 32 bytes are readable at `at`.
    unsafe fn load_f16(self, at: *const u8) -> Self::V;
    /// Sixteen bfloat16, widened.
    /// # Safety
    /// 32 bytes are readable at `at`.
    unsafe fn load_bf16(self, at: *const u8) -> Self::V;
    /// Sixteen signed bytes, as floats.
    /// # Safety
    /// 16 bytes are readable at `at`.
    unsafe fn load_i8(self, at: *const u8) -> Self::V;
    /// The low (high) nibbles of sixteen bytes, as floats.
    /// # Safety
    /// 16 bytes are readable at `at`.
    unsafe fn load_nibbles(self, at: *const u8, high: bool) -> Self::V;
    /// Eight floats of each of eight rows, turned: float i of row j goes to `to + i * LANES + j`.
    /// # Safety
    /// 8 floats are readable at each row; 7 * 16 + 8 are writable at `to`.
    unsafe fn turn(self, rows: &[*const f32; 8], to: *mut f32);
    /// a b + c, rounded once.
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    fn sub(self, a: Self::V, b: Self::V) -> Self::V;
    fn mul(self, a: Self::V, b: Self::V) -> Self::V;
    fn div(self, a: Self::V, b: Self::V) -> Self::V;
    /// The larger one; b where either is NaN.
    fn max(self, a: Self::V, b: Self::V) -> Self::V;
    /// The smaller one; b where either is NaN.
    fn min(self, a: Self::V, b: Self::V) -> Self::V;
    /// 2^n, n the integer in the low bits of a float of magnitude 1.5 * 2^23; -126 <= n <= 127.
    fn exp2_of_low_bits(self, v: Self::V) -> Self::V;
}

/// Something to run on the machine's widest vector unit.
pub(crate) trait Kernel {
    /// Must be `#[inline(always)]`, as must all that it calls, or it misses the target features. That bars
    /// closures over vectors: they may be left out of line.
    fn run<I: Isa>(self, isa: I);
}

/// Runs a kernel on the machine's widest vector unit.
pub(crate) fn run<K: Kernel>(kernel: K) {
    #[cfg(target_arch = "x86_64")]
    {
        let avx2 = is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c");
        if avx2 && is_x86_feature_detected!("avx512f") {
            // SAFETY: the machine has the features that this function is compiled for.
            return unsafe { x86::run_avx512(kernel) };
        }
        if avx2 {
            // SAFETY: the machine has the features that this function is compiled for.
            return unsafe { x86::run_avx2(kernel) };
        }
    }
    kernel.run(Portable);
}

/// e^x to 2 units in the last place (measured in tests.rs); x is held to -87 ..= 88, NaN stays.
///
/// x = n ln 2 + r with whole n: e^x = 2^n e^r, e^r by its series up to r^7 (|r| <= ln 2 / 2).
#[inline(always)]
pub(crate) fn exp<I: Isa>(isa: I, x: I::V) -> I::V {
    let x = isa.min(isa.splat(88.0), isa.max(isa.splat(-87.0), x));
    // Adding 1.5 * 2^23 rounds to a whole number and leaves it in the low bits.
    let magic = isa.splat(12_582_912.0);
    let shifted = isa.fma(x, isa.splat(std::f32::consts::LOG2_E), magic);
    let n = isa.sub(shifted, magic);
    // ln 2 in two parts, the first short enough for exact products with n.
    let r = isa.fma(n, isa.splat(-355.0 / 512.0), x);
    let r = isa.fma(n, isa.splat(2.121_944_4e-4), r);
    let series = isa.fma(isa.splat(1.0 / 5040.0), r, isa.splat(1.0 / 720.0));
    let series = isa.fma(series, r, isa.splat(1.0 / 120.0));
    let series = isa.fma(series, r, isa.splat(1.0 / 24.0));
    let series = isa.fma(series, r, isa.splat(1.0 / 6.0));
    let series = isa.fma(series, r, isa.splat(0.5));
    let series = isa.fma(series, r, isa.splat(1.0));
    let series = isa.fma(series, r, isa.splat(1.0));
    isa.mul(series, isa.exp2_of_low_bits(shifted))
}

/// The lanes, out of their register.
#[inline(always)]
pub(crate) fn lanes<I: Isa>(isa: I, v: I::V) -> [f32; LANES] {
    let mut lanes = [0.0; LANES];
    // SAFETY: 16 floats are writable.
    unsafe { isa.store(lanes.as_mut_ptr(), v) };
    lanes
}

/// A register out of lanes.
#[inline(always)]
pub(crate) fn of_lanes<I: Isa>(isa: I, lanes: &[f32; LANES]) -> I::V {
    // SAFETY: 16 floats are readable.
    unsafe { isa.load(lanes.as_ptr()) }
}

/// Plain arrays, for the compiler to vectorise: NEON has fused multiply-add in its baseline.
#[derive(Clone, Copy)]
pub(crate) struct Portable;

impl Isa for Portable {
    const ROWS: usize = 4;
    type V = [f32; LANES];

    #[inline(always)]
    fn splat(self, value: f32) -> Self::V {
        [value; LANES]
    }
    #[inline(always)]
    unsafe fn load(self, at: *const f32) -> Self::V {
        // SAFETY: the caller gives 16 readable floats.
        unsafe { at.cast::<Self::V>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store(self, at: *mut f32, v: Self::V) {
        // SAFETY: the caller gives 16 writable floats.
        unsafe { at.cast::<Self::V>().write_unaligned(v) }
    }
    #[inline(always)]
    unsafe fn load_f16(self, at: *const u8) -> Self::V {
        // SAFETY: the caller gives 32 readable bytes.
        unsafe { at.cast::<[[u8; 2]; LANES]>().read() }
            .map(|b| half::f16::from_le_bytes(b).to_f32())
    }
    #[inline(always)]
    unsafe fn load_bf16(self, at: *const u8) -> Self::V {
        // SAFETY: the caller gives 32 readable bytes.
        unsafe { at.cast::<[[u8; 2]; LANES]>().read() }
            .map(|b| half::bf16::from_le_bytes(b).to_f32())
    }
    #[inline(always)]
    unsafe fn load_i8(self, at: *const u8) -> Self::V {
        // SAFETY: the caller gives 16 readable bytes.
        unsafe { at.cast::<[i8; LANES]>().read() }.map(f32::from)
    }
    #[inline(always)]
    unsafe fn load_nibbles(self, at: *const u8, high: bool) -> Self::V {
        // SAFETY: the caller gives 16 readable bytes.
        let bytes = unsafe { at.cast::<[u8; LANES]>().read() };
        bytes.map(|b| f32::from(if high { b >> 4 } else { b & 15 }))
    }
    #[inline(always)]
    unsafe fn turn(self, rows: &[*const f32; 8], to: *mut f32) {
        for (j, row) in rows.iter().enumerate() {
            for i in 0..8 {
                // SAFETY: as the caller says.
                unsafe { *to.add(i * LANES + j) = *row.add(i) };
            }
        }
    }
    #[inline(always)]
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        std::array::from_fn(|i| a[i].mul_add(b[i], c[i]))
    }
    #[inline(always)]
    fn add(self, a: Self::V, b: Self::V) -> Self::V {
        std::array::from_fn(|i| a[i] + b[i])
    }
    #[inline(always)]
    fn sub(self, a: Self::V, b: Self::V) -> Self::V {
        std::array::from_fn(|i| a[i] - b[i])
    }
    #[inline(always)]
    fn mul(self, a: Self::V, b: Self::V) -> Self::V {
        std::array::from_fn(|i| a[i] * b[i])
    }
    #[inline(always)]
    fn div(self, a: Self::V, b: Self::V) -> Self::V {
        std::array::from_fn(|i| a[i] / b[i])
    }
    #[inline(always)]
    fn max(self, a: Self::V, b: Self::V) -> Self::V {
        std::array::from_fn(|i| if a[i] > b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    fn min(self, a: Self::V, b: Self::V) -> Self::V {
        std::array::from_fn(|i| if a[i] < b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    fn exp2_of_low_bits(self, v: Self::V) -> Self::V {
        v.map(|v| f32::from_bits((v.to_bits() << 23).wrapping_add(0x3f80_0000)))
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{Isa, Kernel};
    use std::arch::x86_64::*;

    /// # Safety
    /// The machine has AVX2, FMA and F16C.
    #[target_feature(enable = "avx2,fma,f16c")]
    pub(super) unsafe fn run_avx2<K: Kernel>(kernel: K) {
        kernel.run(Avx2(()));
    }

    /// # Safety
    /// The machine has AVX-512F, and with it AVX2 and FMA, and F16C.
    #[target_feature(enable = "avx512f,avx2,fma,f16c")]
    pub(super) unsafe fn run_avx512<K: Kernel>(kernel: K) {
        kernel.run(Avx512(()));
    }

    /// Two registers of eight. Only `run_avx2` makes one.
    #[derive(Clone, Copy)]
    pub(super) struct Avx2(());
    /// One register of sixteen. Only `run_avx512` makes one.
    #[derive(Clone, Copy)]
    pub(super) struct Avx512(());

    /// [`Isa::turn`] in three rounds: neighbouring rows by ones, then by pairs, then by halves.
    ///
    /// # Safety
    /// The machine has AVX2; floats as there.
    #[inline(always)]
    unsafe fn turn(rows: &[*const f32; 8], to: *mut f32) {
        // SAFETY: as above.
        unsafe {
            let a0 = _mm256_loadu_ps(rows[0]);
            let a1 = _mm256_loadu_ps(rows[1]);
            let a2 = _mm256_loadu_ps(rows[2]);
            let a3 = _mm256_loadu_ps(rows[3]);
            let a4 = _mm256_loadu_ps(rows[4]);
            let a5 = _mm256_loadu_ps(rows[5]);
            let a6 = _mm256_loadu_ps(rows[6]);
            let a7 = _mm256_loadu_ps(rows[7]);
            let (b0, b1) = (_mm256_unpacklo_ps(a0, a1), _mm256_unpackhi_ps(a0, a1));
            let (b2, b3) = (_mm256_unpacklo_ps(a2, a3), _mm256_unpackhi_ps(a2, a3));
            let (b4, b5) = (_mm256_unpacklo_ps(a4, a5), _mm256_unpackhi_ps(a4, a5));
            let (b6, b7) = (_mm256_unpacklo_ps(a6, a7), _mm256_unpackhi_ps(a6, a7));
            let (c0, c1) = (
                _mm256_shuffle_ps::<0x44>(b0, b2),
                _mm256_shuffle_ps::<0xee>(b0, b2),
            );
            let (c2, c3) = (
                _mm256_shuffle_ps::<0x44>(b1, b3),
                _mm256_shuffle_ps::<0xee>(b1, b3),
            );
            let (c4, c5) = (
                _mm256_shuffle_ps::<0x44>(b4, b6),
                _mm256_shuffle_ps::<0xee>(b4, b6),
            );
            let (c6, c7) = (
                _mm256_shuffle_ps::<0x44>(b5, b7),
                _mm256_shuffle_ps::<0xee>(b5, b7),
            );
            _mm256_storeu_ps(to, _mm256_permute2f128_ps::<0x20>(c0, c4));
            _mm256_storeu_ps(to.add(16), _mm256_permute2f128_ps::<0x20>(c1, c5));
            _mm256_storeu_ps(to.add(32), _mm256_permute2f128_ps::<0x20>(c2, c6));
            _mm256_storeu_ps(to.add(48), _mm256_permute2f128_ps::<0x20>(c3, c7));
            _mm256_storeu_ps(to.add(64), _mm256_permute2f128_ps::<0x31>(c0, c4));
            _mm256_storeu_ps(to.add(80), _mm256_permute2f128_ps::<0x31>(c1, c5));
            _mm256_storeu_ps(to.add(96), _mm256_permute2f128_ps::<0x31>(c2, c6));
            _mm256_storeu_ps(to.add(112), _mm256_permute2f128_ps::<0x31>(c3, c7));
        }
    }

    /// A method without pointers, lane by lane on both halves.
    macro_rules! both {
        ($name:ident($($a:ident),+), $op:ident) => {
            #[inline(always)]
            fn $name(self, $($a: Self::V),+) -> Self::V {
                // SAFETY: an Avx2 exists only where the machine has AVX2 and FMA.
                unsafe { [$op($($a[0]),+), $op($($a[1]),+)] }
            }
        };
    }

    impl Isa for Avx2 {
        const ROWS: usize = 6;
        type V = [__m256; 2];

        both!(fma(a, b, c), _mm256_fmadd_ps);
        both!(add(a, b), _mm256_add_ps);
        both!(sub(a, b), _mm256_sub_ps);
        both!(mul(a, b), _mm256_mul_ps);
        both!(div(a, b), _mm256_div_ps);
        both!(max(a, b), _mm256_max_ps);
        both!(min(a, b), _mm256_min_ps);

        #[inline(always)]
        fn splat(self, value: f32) -> Self::V {
            // SAFETY: an Avx2 exists only where the machine has AVX2.
            unsafe { [_mm256_set1_ps(value); 2] }
        }
        #[inline(always)]
        unsafe fn load(self, at: *const f32) -> Self::V {
            // SAFETY: AVX2 is there, and the caller gives 16 readable floats.
            unsafe { [_mm256_loadu_ps(at), _mm256_loadu_ps(at.add(8))] }
        }
        #[inline(always)]
        unsafe fn store(self, at: *mut f32, v: Self::V) {
            // SAFETY: AVX2 is there, and the caller gives 16 writable floats.
            unsafe {
                _mm256_storeu_ps(at, v[0]);
                _mm256_storeu_ps(at.add(8), v[1]);
            }
        }
        #[inline(always)]
        unsafe fn load_f16(self, at: *const u8) -> Self::V {
            // SAFETY: F16C is there, and the caller gives 32 readable bytes.
            unsafe {
                [
                    _mm256_cvtph_ps(_mm_loadu_si128(at.cast())),
                    _mm256_cvtph_ps(_mm_loadu_si128(at.add(16).cast())),
                ]
            }
        }
        #[inline(always)]
        unsafe fn load_bf16(self, at: *const u8) -> Self::V {
            // SAFETY: AVX2 is there, and the caller gives 32 readable bytes.
            unsafe {
                let low = _mm256_cvtepu16_epi32(_mm_loadu_si128(at.cast()));
                let high = _mm256_cvtepu16_epi32(_mm_loadu_si128(at.add(16).cast()));
                [
                    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(low)),
                    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(high)),
                ]
            }
        }
        #[inline(always)]
        unsafe fn load_i8(self, at: *const u8) -> Self::V {
            // SAFETY: AVX2 is there, and the caller gives 16 readable bytes.
            unsafe {
                [
                    _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(at.cast()))),
                    _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(at.add(8).cast()))),
                ]
            }
        }
        #[inline(always)]
        unsafe fn load_nibbles(self, at: *const u8, high: bool) -> Self::V {
            // SAFETY: AVX2 is there, and the caller gives 16 readable bytes.
            unsafe {
                let bytes = _mm_loadu_si128(at.cast());
                let bytes = if high {
                    _mm_srli_epi16::<4>(bytes)
                } else {
                    bytes
                };
                let codes = _mm_and_si128(bytes, _mm_set1_epi8(15));
                [
                    _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(codes)),
                    _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_unpackhi_epi64(codes, codes))),
                ]
            }
        }
        #[inline(always)]
        unsafe fn turn(self, rows: &[*const f32; 8], to: *mut f32) {
            // SAFETY: AVX2 is there, and the caller gives the floats.
            unsafe { turn(rows, to) }
        }
        #[inline(always)]
        fn exp2_of_low_bits(self, v: Self::V) -> Self::V {
            // SAFETY: an Avx2 exists only where the machine has AVX2.
            unsafe {
                let one = _mm256_set1_epi32(0x3f80_0000);
                let low = _mm256_slli_epi32::<23>(_mm256_castps_si256(v[0]));
                let high = _mm256_slli_epi32::<23>(_mm256_castps_si256(v[1]));
                [
                    _mm256_castsi256_ps(_mm256_add_epi32(low, one)),
                    _mm256_castsi256_ps(_mm256_add_epi32(high, one)),
                ]
            }
        }
    }

    /// A method without pointers.
    macro_rules! one {
        ($name:ident($($a:ident),+), $op:ident) => {
            #[inline(always)]
            fn $name(self, $($a: Self::V),+) -> Self::V {
                // SAFETY: an Avx512 exists only where the machine has AVX-512F.
                unsafe { $op($($a),+) }
            }
        };
    }

    impl Isa for Avx512 {
        const ROWS: usize = 12;
        type V = __m512;

        one!(fma(a, b, c), _mm512_fmadd_ps);
        one!(add(a, b), _mm512_add_ps);
        one!(sub(a, b), _mm512_sub_ps);
        one!(mul(a, b), _mm512_mul_ps);
        one!(div(a, b), _mm512_div_ps);
        one!(max(a, b), _mm512_max_ps);
        one!(min(a, b), _mm512_min_ps);

        #[inline(always)]
        fn splat(self, value: f32) -> Self::V {
            // SAFETY: an Avx512 exists only where the machine has AVX-512F.
            unsafe { _mm512_set1_ps(value) }
        }
        #[inline(always)]
        unsafe fn load(self, at: *const f32) -> Self::V {
            // SAFETY: AVX-512F is there, and the caller gives 16 readable floats.
            unsafe { _mm512_loadu_ps(at) }
        }
        #[inline(always)]
        unsafe fn store(self, at: *mut f32, v: Self::V) {
            // SAFETY: AVX-512F is there, and the caller gives 16 writable floats.
            unsafe { _mm512_storeu_ps(at, v) }
        }
        #[inline(always)]
        unsafe fn load_f16(self, at: *const u8) -> Self::V {
            // SAFETY: AVX-512F is there, and the caller gives 32 readable bytes.
            unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(at.cast())) }
        }
        #[inline(always)]
        unsafe fn load_bf16(self, at: *const u8) -> Self::V {
            // SAFETY: AVX-512F is there, and the caller gives 32 readable bytes.
            unsafe {
                let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(at.cast()));
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
            }
        }
        #[inline(always)]
        unsafe fn load_i8(self, at: *const u8) -> Self::V {
            // SAFETY: AVX-512F is there, and the caller gives 16 readable bytes.
            unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(at.cast()))) }
        }
        #[inline(always)]
        unsafe fn load_nibbles(self, at: *const u8, high: bool) -> Self::V {
            // SAFETY: AVX-512F is there, and the caller gives 16 readable bytes.
            unsafe {
                let bytes = _mm_loadu_si128(at.cast());
                let bytes = if high {
                    _mm_srli_epi16::<4>(bytes)
                } else {
                    bytes
                };
                _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_and_si128(
                    bytes,
                    _mm_set1_epi8(15),
                )))
            }
        }
        #[inline(always)]
        unsafe fn turn(self, rows: &[*const f32; 8], to: *mut f32) {
            // SAFETY: AVX2 is there, and the caller gives the floats.
            unsafe { turn(rows, to) }
        }
        #[inline(always)]
        fn exp2_of_low_bits(self, v: Self::V) -> Self::V {
            // SAFETY: an Avx512 exists only where the machine has AVX-512F.
            unsafe {
                let exponent = _mm512_slli_epi32::<23>(_mm512_castps_si512(v));
                _mm512_castsi512_ps(_mm512_add_epi32(exponent, _mm512_set1_epi32(0x3f80_0000)))
            }
        }
    }
}
