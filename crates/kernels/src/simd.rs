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
#[cfg(target_arch = "x86_64")]
mod x86;

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

    /// Rows of the widest tile of integer products.
    const QUAD_ROWS: usize;
    /// Four bytes for each of sixteen outputs.
    type Quads: Copy;
    /// Integer sums of sixteen outputs.
    type Sums: Copy;
    /// Sixteen quads.
    /// # Safety
    /// 64 bytes are readable at `at`.
    unsafe fn load_quads(self, at: *const u8) -> Self::Quads;
    /// # Safety
    /// 64 bytes are writable at `at`.
    unsafe fn store_quads(self, at: *mut u8, quads: Self::Quads);
    /// Four bytes for all sixteen outputs.
    /// # Safety
    /// 4 bytes are readable at `at`.
    unsafe fn splat_quad(self, at: *const i8) -> Self::Quads;
    /// The low nibble of each byte.
    fn low_nibbles(self, quads: Self::Quads) -> Self::Quads;
    /// The high nibble of each byte.
    fn high_nibbles(self, quads: Self::Quads) -> Self::Quads;
    /// Sums of nothing.
    fn no_sums(self) -> Self::Sums;
    /// Adds the products of each output's four bytes: w of 0 ..= 15, x of -127 ..= 127, at most eight times before
    /// [`Isa::nibble_sums`]: eight pairs of products are 30480 at most and fit sixteen bits.
    fn add_nibble_products(self, sums: Self::Sums, w: Self::Quads, x: Self::Quads) -> Self::Sums;
    /// The same sums, in registers here: what is written before is computed before.
    #[inline(always)]
    fn here(self, sums: Self::Sums) -> Self::Sums {
        sums
    }
    /// The sums as floats.
    fn nibble_sums(self, sums: Self::Sums) -> Self::V;
    /// Adds the products of each output's four bytes: w of -128 ..= 127, x of -127 ..= 127 (a pair of products is 32512 at
    /// most and fits sixteen bits), at most 4096 times before [`Isa::byte_sums`].
    fn add_byte_products(self, sums: Self::Sums, w: Self::Quads, x: Self::Quads) -> Self::Sums;
    /// The bytes as numbers of sixteen bits: the first two of each of sixteen outputs, behind them the other two.
    /// # Safety
    /// 128 bytes are writable at `to`.
    unsafe fn widen_quads(self, quads: Self::Quads, to: *mut u8);
    /// Adds the products of each output's two numbers of sixteen bits, -128 ..= 127 each, at most 8192 times before
    /// [`Isa::byte_sums`].
    fn add_pair_products(self, sums: Self::Sums, w: Self::Quads, x: Self::Quads) -> Self::Sums;
    /// The sums as floats.
    fn byte_sums(self, sums: Self::Sums) -> Self::V;
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
        let avx512 = avx2 && is_x86_feature_detected!("avx512f");
        if avx512 && is_x86_feature_detected!("avx512vl") && is_x86_feature_detected!("avx512vnni")
        {
            // SAFETY: the machine has the features that this function is compiled for.
            return unsafe { x86::run_vnni(kernel) };
        }
        if avx512 {
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

    const QUAD_ROWS: usize = 2;
    type Quads = [[u8; 4]; LANES];
    type Sums = [i32; LANES];

    #[inline(always)]
    unsafe fn load_quads(self, at: *const u8) -> Self::Quads {
        // SAFETY: the caller gives 64 readable bytes.
        unsafe { at.cast::<Self::Quads>().read() }
    }
    #[inline(always)]
    unsafe fn store_quads(self, at: *mut u8, quads: Self::Quads) {
        // SAFETY: the caller gives 64 writable bytes.
        unsafe { at.cast::<Self::Quads>().write(quads) }
    }
    #[inline(always)]
    unsafe fn splat_quad(self, at: *const i8) -> Self::Quads {
        // SAFETY: the caller gives 4 readable bytes.
        [unsafe { at.cast::<[u8; 4]>().read() }; LANES]
    }
    #[inline(always)]
    fn low_nibbles(self, quads: Self::Quads) -> Self::Quads {
        quads.map(|quad| quad.map(|byte| byte & 15))
    }
    #[inline(always)]
    fn high_nibbles(self, quads: Self::Quads) -> Self::Quads {
        quads.map(|quad| quad.map(|byte| byte >> 4))
    }
    #[inline(always)]
    fn no_sums(self) -> Self::Sums {
        [0; LANES]
    }
    #[inline(always)]
    fn add_nibble_products(self, sums: Self::Sums, w: Self::Quads, x: Self::Quads) -> Self::Sums {
        self.add_byte_products(sums, w, x)
    }
    #[inline(always)]
    fn nibble_sums(self, sums: Self::Sums) -> Self::V {
        self.byte_sums(sums)
    }
    #[inline(always)]
    fn add_byte_products(self, sums: Self::Sums, w: Self::Quads, x: Self::Quads) -> Self::Sums {
        std::array::from_fn(|n| {
            let products = w[n].iter().zip(x[n]);
            products.fold(sums[n], |sum, (w, x)| {
                sum + i32::from(w.cast_signed()) * i32::from(x.cast_signed())
            })
        })
    }
    #[inline(always)]
    unsafe fn widen_quads(self, quads: Self::Quads, to: *mut u8) {
        let pair = |quad: [u8; 4], from: usize| {
            let wide = |byte: u8| i16::from(byte.cast_signed()).to_ne_bytes();
            let ([a, b], [c, d]) = (wide(quad[from]), wide(quad[from + 1]));
            [a, b, c, d]
        };
        let (first, second) = (
            quads.map(|quad| pair(quad, 0)),
            quads.map(|quad| pair(quad, 2)),
        );
        // SAFETY: the caller gives 128 writable bytes.
        unsafe {
            self.store_quads(to, first);
            self.store_quads(to.add(4 * LANES), second);
        }
    }
    #[inline(always)]
    fn add_pair_products(self, sums: Self::Sums, w: Self::Quads, x: Self::Quads) -> Self::Sums {
        let number = |[a, b]: [u8; 2]| i32::from(i16::from_ne_bytes([a, b]));
        std::array::from_fn(|n| {
            let ([a, b, c, d], [e, f, g, h]) = (w[n], x[n]);
            sums[n] + number([a, b]) * number([e, f]) + number([c, d]) * number([g, h])
        })
    }
    #[inline(always)]
    fn byte_sums(self, sums: Self::Sums) -> Self::V {
        #[expect(
            clippy::cast_precision_loss,
            reason = "sums of products of a block stay below 2^24"
        )]
        sums.map(|sum| sum as f32)
    }
}
