//! Every vector unit of this machine computes what plain arithmetic does.
#![expect(unsafe_code, reason = "kernels on units that were asked for first")]

use super::{Isa, Kernel, LANES, Portable, exp, lanes, of_lanes, run};

/// e^x of sixteen values.
struct Exp<'a>(&'a [f32; LANES], &'a mut [f32; LANES]);

impl Kernel for Exp<'_> {
    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        *self.1 = lanes(isa, exp(isa, of_lanes(isa, self.0)));
    }
}

fn sixteen(from: f32, step: f32) -> [f32; LANES] {
    std::array::from_fn(|i| from + step * i as f32)
}

#[test]
fn the_exponential_is_within_two_units_in_the_last_place() {
    let mut worst = 0.0f64;
    for i in 0..11_000 {
        let x = sixteen(-87.0 + i as f32 * 0.015_9, 0.000_97).map(|x| x.min(88.0));
        let mut y = [0.0; LANES];
        run(Exp(&x, &mut y));
        for (x, y) in x.into_iter().zip(y) {
            let exact = f64::from(x).exp();
            let unit =
                f64::from(f32::from_bits((exact as f32).to_bits() + 1)) - f64::from(exact as f32);
            worst = worst.max((f64::from(y) - exact).abs() / unit);
        }
    }
    assert!(worst < 2.0, "{worst} units");
}

#[test]
fn the_exponential_stays_finite_and_passes_on_nan() {
    let mut x = [0.0; LANES];
    (x[0], x[1], x[2], x[3], x[4]) = (f32::NEG_INFINITY, f32::INFINITY, f32::NAN, -1e9, 1e9);
    let mut y = [0.0; LANES];
    run(Exp(&x, &mut y));
    assert!(y[0] < 1e-37 && y[3] < 1e-37 && y[1].is_finite() && y[4].is_finite() && y[2].is_nan());
    assert_eq!(y[5..], [1.0; LANES - 5]);
}

/// Every operation once, its results in a row.
struct All<'a> {
    bytes: &'a [u8; 64],
    out: &'a mut Vec<u32>,
}

impl Kernel for All<'_> {
    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let bytes = self.bytes.as_ptr();
        // SAFETY: every load reads at most 64 bytes of 64.
        let [half, brain, signed, low, high] = unsafe {
            [
                isa.load_f16(bytes),
                isa.load_bf16(bytes),
                isa.load_i8(bytes),
                isa.load_nibbles(bytes, false),
                isa.load_nibbles(bytes, true),
            ]
        };
        let x = of_lanes(isa, &sixteen(-3.0, 0.37));
        let results = [
            half,
            brain,
            signed,
            low,
            high,
            isa.splat(1.5),
            isa.fma(x, signed, low),
            isa.add(x, signed),
            isa.sub(x, signed),
            isa.mul(x, low),
            isa.div(signed, x),
            isa.max(x, isa.splat(0.1)),
            isa.min(x, isa.splat(0.1)),
            exp(isa, x),
        ];
        let square: Vec<f32> = (0..64).map(|i| i as f32).collect();
        let rows = std::array::from_fn(|j| square[8 * j..].as_ptr());
        let mut turned = [-1.0f32; 8 * LANES];
        // SAFETY: rows of eight floats, and eight sixteens for them.
        unsafe { isa.turn(&rows, turned[8..].as_mut_ptr()) };
        self.out.extend(turned.map(f32::to_bits));
        let codes: [i8; 4] = [-127, 99, 127, -3];
        let mut bytes = [0u8; 64];
        // SAFETY: 64 bytes to read, 64 to write, and four codes.
        let (quads, x) = unsafe {
            let quads = isa.load_quads(self.bytes.as_ptr());
            isa.store_quads(bytes.as_mut_ptr(), quads);
            (quads, isa.splat_quad(codes.as_ptr()))
        };
        self.out.extend(bytes.map(u32::from));
        let mut nibbles = isa.no_sums();
        let mut wide = isa.no_sums();
        for _ in 0..4 {
            nibbles = isa.add_nibble_products(nibbles, isa.low_nibbles(quads), x);
            nibbles = isa.add_nibble_products(nibbles, isa.high_nibbles(quads), x);
            wide = isa.add_byte_products(wide, quads, x);
        }
        let mut widened = [0u8; 128];
        let mut pairs = isa.no_sums();
        // SAFETY: 128 bytes to write; each half of them is 64.
        unsafe {
            isa.widen_quads(quads, widened.as_mut_ptr());
            for half in [0, 64] {
                let quads = isa.load_quads(widened.as_ptr().add(half));
                pairs = isa.add_pair_products(pairs, quads, quads);
            }
        }
        for sums in [
            isa.nibble_sums(nibbles),
            isa.byte_sums(wide),
            isa.byte_sums(pairs),
        ] {
            self.out.extend(lanes(isa, sums).map(f32::to_bits));
        }
        self.out.extend(
            results
                .into_iter()
                .flat_map(|v| lanes(isa, v))
                .map(f32::to_bits),
        );
    }
}

/// 64 bytes whose halves and brain floats are all finite.
fn bytes() -> [u8; 64] {
    std::array::from_fn(|i| {
        if i % 2 == 0 {
            (i * 37 + 11) as u8
        } else {
            0x30 + (i % 11) as u8 + (i as u8 & 1) * 0x80
        }
    })
}

#[test]
fn the_widest_unit_gives_the_bits_of_plain_arithmetic() {
    let (mut widest, mut plain) = (Vec::new(), Vec::new());
    run(All {
        bytes: &bytes(),
        out: &mut widest,
    });
    All {
        bytes: &bytes(),
        out: &mut plain,
    }
    .run(Portable);
    assert_eq!(plain.len(), (8 + 4 + 3 + 14) * LANES);
    // Row 5 of a square of 0 .. 64 is 40 .. 48; turned it is lane 5 of the second eight lanes of each sixteen.
    assert!((0..8).all(|i| f32::from_bits(plain[i * LANES + 8 + 5]) == (40 + i) as f32));
    assert_eq!(widest, plain);
}

#[cfg(target_arch = "x86_64")]
#[test]
fn every_unit_gives_the_bits_of_plain_arithmetic_beside_a_wider_one_too() {
    let mut plain = Vec::new();
    All {
        bytes: &bytes(),
        out: &mut plain,
    }
    .run(Portable);
    let ours = |run: &dyn Fn(All<'_>)| {
        let mut ours = Vec::new();
        run(All {
            bytes: &bytes(),
            out: &mut ours,
        });
        ours
    };
    let avx2 = is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("fma")
        && is_x86_feature_detected!("f16c");
    let avx512 = avx2 && is_x86_feature_detected!("avx512f");
    if avx2 {
        // SAFETY: the features were asked for above.
        assert_eq!(ours(&|all| unsafe { super::x86::run_avx2(all) }), plain);
    }
    if avx512 {
        // SAFETY: the features were asked for above.
        assert_eq!(ours(&|all| unsafe { super::x86::run_avx512(all) }), plain);
    }
    if avx512 && is_x86_feature_detected!("avx512vl") && is_x86_feature_detected!("avx512vnni") {
        // SAFETY: the features were asked for above.
        assert_eq!(ours(&|all| unsafe { super::x86::run_vnni(all) }), plain);
    }
}
