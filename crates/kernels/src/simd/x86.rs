//! The vector units of x86: AVX2 as two registers of eight, AVX-512 as one of sixteen.
//!
//! Integer products of quads go through AVX2's instructions on both; where AVX-512 comes with VNNI, through its dot products, in registers
//! of eight as well. Start at [`run_avx2`].

use std::arch::x86_64::*;

use super::{Isa, Kernel};

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
    kernel.run(Avx512::<false>(()));
}

/// # Safety
/// The machine has AVX-512F, VL and VNNI, and with them AVX2 and FMA, and F16C.
#[target_feature(enable = "avx512f,avx512vl,avx512vnni,avx2,fma,f16c")]
pub(super) unsafe fn run_vnni<K: Kernel>(kernel: K) {
    kernel.run(Avx512::<true>(()));
}

/// Two registers of eight. Only `run_avx2` makes one.
#[derive(Clone, Copy)]
pub(super) struct Avx2(());
/// One register of sixteen, with the dot products of VNNI or without. Only `run_avx512` and `run_vnni` make one.
#[derive(Clone, Copy)]
pub(super) struct Avx512<const VNNI: bool>(());

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

/// [`Isa::here`]: no instruction, but the compiler keeps what it cannot look into in order.
#[inline]
#[target_feature(enable = "avx2")]
fn here([mut a, mut b]: [__m256i; 2]) -> [__m256i; 2] {
    // SAFETY: a comment, with two registers that stay as they are.
    unsafe {
        std::arch::asm!(
            "/* {a} {b} */",
            a = inout(ymm_reg) a,
            b = inout(ymm_reg) b,
            options(nomem, nostack, preserves_flags),
        );
    }
    [a, b]
}

/// Integer products of quads, outputs 0 to 7 in the first register; by VNNI where `$vnni`, a constant, says so: its sums are of 32 bits from
/// the first product on, so they are the same numbers.
macro_rules! quads {
    ($vnni:expr) => {
        type Quads = [__m256i; 2];
        type Sums = [__m256i; 2];

        #[inline(always)]
        unsafe fn load_quads(self, at: *const u8) -> Self::Quads {
            // SAFETY: AVX2 is there, and the caller gives 64 readable bytes.
            unsafe {
                [
                    _mm256_loadu_si256(at.cast()),
                    _mm256_loadu_si256(at.add(32).cast()),
                ]
            }
        }
        #[inline(always)]
        unsafe fn store_quads(self, at: *mut u8, quads: Self::Quads) {
            // SAFETY: AVX2 is there, and the caller gives 64 writable bytes.
            unsafe {
                _mm256_storeu_si256(at.cast(), quads[0]);
                _mm256_storeu_si256(at.add(32).cast(), quads[1]);
            }
        }
        #[inline(always)]
        unsafe fn splat_quad(self, at: *const i8) -> Self::Quads {
            // SAFETY: AVX2 is there, and the caller gives 4 readable bytes.
            unsafe { [_mm256_set1_epi32(at.cast::<i32>().read_unaligned()); 2] }
        }
        #[inline(always)]
        fn low_nibbles(self, [a, b]: Self::Quads) -> Self::Quads {
            // SAFETY: a value of this unit exists only where the machine has AVX2.
            unsafe {
                let low = _mm256_set1_epi8(15);
                [_mm256_and_si256(a, low), _mm256_and_si256(b, low)]
            }
        }
        #[inline(always)]
        fn high_nibbles(self, [a, b]: Self::Quads) -> Self::Quads {
            // SAFETY: a value of this unit exists only where the machine has AVX2.
            unsafe { self.low_nibbles([_mm256_srli_epi16::<4>(a), _mm256_srli_epi16::<4>(b)]) }
        }
        #[inline(always)]
        fn no_sums(self) -> Self::Sums {
            // SAFETY: a value of this unit exists only where the machine has AVX2.
            unsafe { [_mm256_setzero_si256(); 2] }
        }
        /// Pairs of products are summed in sixteen bits, but by VNNI.
        #[inline(always)]
        fn add_nibble_products(
            self,
            [a, b]: Self::Sums,
            w: Self::Quads,
            x: Self::Quads,
        ) -> Self::Sums {
            // SAFETY: a value of this unit exists only where the machine has AVX2.
            unsafe {
                if $vnni {
                    return [
                        _mm256_dpbusd_epi32(a, w[0], x[0]),
                        _mm256_dpbusd_epi32(b, w[1], x[1]),
                    ];
                }
                [
                    _mm256_add_epi16(a, _mm256_maddubs_epi16(w[0], x[0])),
                    _mm256_add_epi16(b, _mm256_maddubs_epi16(w[1], x[1])),
                ]
            }
        }
        #[inline(always)]
        fn here(self, sums: Self::Sums) -> Self::Sums {
            // SAFETY: a value of this unit exists only where the machine has AVX2.
            unsafe { here(sums) }
        }
        #[inline(always)]
        fn nibble_sums(self, [a, b]: Self::Sums) -> Self::V {
            // SAFETY: a value of this unit exists only where the machine has AVX2.
            unsafe {
                if $vnni {
                    return self.byte_sums([a, b]);
                }
                let ones = _mm256_set1_epi16(1);
                self.byte_sums([_mm256_madd_epi16(a, ones), _mm256_madd_epi16(b, ones)])
            }
        }
        #[inline(always)]
        unsafe fn widen_quads(self, quads: Self::Quads, to: *mut u8) {
            // SAFETY: AVX2 is there, and the caller gives 128 writable bytes.
            unsafe {
                for (half, quads) in quads.into_iter().enumerate() {
                    // Outputs 0 to 3 and 4 to 7, their first and second pairs in turns.
                    let low = _mm256_cvtepi8_epi16(_mm256_castsi256_si128(quads));
                    let high = _mm256_cvtepi8_epi16(_mm256_extracti128_si256::<1>(quads));
                    let (low, high) = (_mm256_castsi256_ps(low), _mm256_castsi256_ps(high));
                    let first = _mm256_castps_si256(_mm256_shuffle_ps::<0x88>(low, high));
                    let second = _mm256_castps_si256(_mm256_shuffle_ps::<0xdd>(low, high));
                    let to = to.add(32 * half);
                    _mm256_storeu_si256(to.cast(), _mm256_permute4x64_epi64::<0xd8>(first));
                    _mm256_storeu_si256(
                        to.add(64).cast(),
                        _mm256_permute4x64_epi64::<0xd8>(second),
                    );
                }
            }
        }
        #[inline(always)]
        fn add_pair_products(
            self,
            [a, b]: Self::Sums,
            w: Self::Quads,
            x: Self::Quads,
        ) -> Self::Sums {
            // SAFETY: a value of this unit exists only where the machine has AVX2.
            unsafe {
                if $vnni {
                    return [
                        _mm256_dpwssd_epi32(a, w[0], x[0]),
                        _mm256_dpwssd_epi32(b, w[1], x[1]),
                    ];
                }
                [
                    _mm256_add_epi32(a, _mm256_madd_epi16(w[0], x[0])),
                    _mm256_add_epi32(b, _mm256_madd_epi16(w[1], x[1])),
                ]
            }
        }
        /// |w| (x sign w): the instruction takes one side without a sign.
        #[inline(always)]
        fn add_byte_products(
            self,
            [a, b]: Self::Sums,
            w: Self::Quads,
            x: Self::Quads,
        ) -> Self::Sums {
            // SAFETY: a value of this unit exists only where the machine has AVX2.
            unsafe {
                let (w, x) = (
                    [_mm256_abs_epi8(w[0]), _mm256_abs_epi8(w[1])],
                    [_mm256_sign_epi8(x[0], w[0]), _mm256_sign_epi8(x[1], w[1])],
                );
                if $vnni {
                    return self.add_nibble_products([a, b], w, x);
                }
                let ones = _mm256_set1_epi16(1);
                let first = _mm256_maddubs_epi16(w[0], x[0]);
                let second = _mm256_maddubs_epi16(w[1], x[1]);
                [
                    _mm256_add_epi32(a, _mm256_madd_epi16(first, ones)),
                    _mm256_add_epi32(b, _mm256_madd_epi16(second, ones)),
                ]
            }
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

    const QUAD_ROWS: usize = 3;
    quads!(false);
    #[inline(always)]
    fn byte_sums(self, [a, b]: Self::Sums) -> Self::V {
        // SAFETY: an Avx2 exists only where the machine has AVX2.
        unsafe { [_mm256_cvtepi32_ps(a), _mm256_cvtepi32_ps(b)] }
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

impl<const VNNI: bool> Isa for Avx512<VNNI> {
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

    const QUAD_ROWS: usize = 3;
    quads!(VNNI);
    #[inline(always)]
    fn byte_sums(self, [a, b]: Self::Sums) -> Self::V {
        // SAFETY: an Avx512 exists only where the machine has AVX-512F.
        unsafe {
            let wide = _mm512_inserti64x4::<1>(_mm512_castsi256_si512(a), b);
            _mm512_cvtepi32_ps(wide)
        }
    }
}
