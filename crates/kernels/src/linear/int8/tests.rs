//! Laws of products in integers: they are their meaning, bit for bit, at any size, with any codes, on any vector unit.

use candle_core::{
    Device, Tensor,
    quantized::{GgmlDType, QTensor},
};
use proptest::prelude::*;

use super::{BLOCK, Codes, Layout, Panels, Product};
use crate::{
    Linear, WeightFormat,
    blocks::{Row, decode_row},
    noise::noise,
    simd::{Kernel, Portable},
};

/// Formats of files.
const FORMATS: [(WeightFormat, GgmlDType); 5] = [
    (WeightFormat::Q8_0, GgmlDType::Q8_0),
    (WeightFormat::Q4_0, GgmlDType::Q4_0),
    (WeightFormat::Q4_1, GgmlDType::Q4_1),
    (WeightFormat::Q4K, GgmlDType::Q4K),
    (WeightFormat::Q6K, GgmlDType::Q6K),
];

/// The meaning: for each block of 32 inputs s = max |x| / 127, c = x / s to the nearest whole number; for each group of
/// weights y = fma(Σ q c, d s, y), then, where there are minima, y = fma(m, s Σ c, y) with the sum over the block.
fn reference(x: &[f32], format: WeightFormat, bytes: &[u8], out: usize, width: usize) -> Vec<f32> {
    let mut row = Row {
        codes: Vec::new(),
        scales: Vec::new(),
        minima: Vec::new(),
    };
    let has_minima = !matches!(
        format,
        WeightFormat::Q8_0 | WeightFormat::Q8 | WeightFormat::Q6K
    );
    let mut y = Vec::new();
    for x in x.chunks_exact(width) {
        let blocks: Vec<(f32, Vec<i32>)> = x
            .chunks_exact(BLOCK)
            .map(|x| {
                let largest = x.iter().fold(0.0_f32, |largest, x| largest.max(x.abs()));
                let factor = if largest > 1e-30 {
                    127.0 / largest
                } else {
                    0.0
                };
                let codes = x.iter().map(|x| (x * factor).round_ties_even() as i32);
                let scale = if largest < 1e-30 {
                    0.0
                } else {
                    largest / 127.0
                };
                (scale, codes.collect())
            })
            .collect();
        let codes: Vec<i32> = blocks.iter().flat_map(|(_, codes)| codes.clone()).collect();
        for bytes in bytes.chunks_exact(bytes.len() / out) {
            decode_row(format, bytes, &mut row);
            let group = width / row.scales.len();
            let mut sum = 0.0_f32;
            for (g, (d, m)) in row.scales.iter().zip(&row.minima).enumerate() {
                let inputs = g * group..(g + 1) * group;
                let products = row.codes[inputs.clone()].iter().zip(&codes[inputs.clone()]);
                let dot: i32 = products.map(|(&q, c)| i32::from(q) * c).sum();
                let (scale, block) = &blocks[inputs.start / BLOCK];
                sum = (dot as f32).mul_add(d * scale, sum);
                if has_minima {
                    sum = m.mul_add(scale * block.iter().sum::<i32>() as f32, sum);
                }
            }
            y.push(sum);
        }
    }
    y
}

/// A matrix in this format.
fn matrix(format: GgmlDType, out: usize, width: usize) -> Vec<u8> {
    let values = noise(out as u64 + 1, out * width);
    let values = Tensor::from_vec(values, (out, width), &Device::Cpu).unwrap();
    let quantised = QTensor::quantize(&values, format).unwrap();
    quantised.data().unwrap().into_owned()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

fn product(linear: &Linear, x: &[f32]) -> Vec<f32> {
    let t = x.len() / linear.in_features();
    linear.values(x, t)
}

/// The same on plain arrays.
fn portable(format: WeightFormat, bytes: &[u8], out: usize, width: usize, x: &[f32]) -> Vec<f32> {
    let panels = Panels::new(format, Layout::Quads, bytes, out, width);
    let codes = Codes::of(x, width, std::iter::once(&panels));
    let rows = x.len() / width;
    let mut y = vec![0.0; rows * out];
    Product {
        panels: &panels,
        x: &codes,
        from: 0,
        rows,
        y: y.as_mut_ptr(),
        first: 0,
        last: panels.count(),
    }
    .run(Portable);
    y
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]
    #[test]
    fn a_product_in_integers_is_its_meaning_at_any_size(
        t in 0usize..28, out in 1usize..70, blocks in 1usize..5, which in 0usize..5, seed in any::<u64>(),
    ) {
        let (format, ggml) = FORMATS[which];
        let width = blocks * format.block_weights();
        let bytes = matrix(ggml, out, width);
        let linear = Linear::with_int8_activations(format, &bytes, out, width).unwrap();
        prop_assert!(linear.rounds_activations());
        let x = noise(seed, t * width);
        let want = bits(&reference(&x, format, &bytes, out, width));
        prop_assert_eq!(&bits(&product(&linear, &x)), &want);
        prop_assert_eq!(&bits(&portable(format, &bytes, out, width, &x)), &want);
    }
}

/// A matrix in [`WeightFormat::Q8`]: for each block d = max |w| / 127 and w / d to the nearest whole number.
fn q8(values: &[f32]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for block in values.chunks_exact(BLOCK) {
        let largest = block
            .iter()
            .fold(0.0_f32, |largest, w| largest.max(w.abs()));
        bytes.extend((largest / 127.0).to_le_bytes());
        let code = |w: &f32| (w * (127.0 / largest)).round_ties_even() as i8;
        bytes.extend(block.iter().map(|w| code(w).cast_unsigned()));
    }
    bytes
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]
    #[test]
    fn a_map_is_rounded_to_its_meaning_and_comes_back_from_its_bytes(
        t in 0usize..20, out in 1usize..70, blocks in 1usize..5, seed in any::<u64>(), magnitude in -30i32..30,
    ) {
        let width = blocks * BLOCK;
        let values: Vec<f32> = noise(seed, out * width).iter().map(|w| w * 2.0_f32.powi(magnitude)).collect();
        let bytes = q8(&values);
        let weight = Tensor::from_vec(values, (out, width), &Device::Cpu).unwrap();
        let rounded = Linear::from_tensor(&weight).unwrap().rounded();
        prop_assert!(rounded.rounds_activations() && rounded.bytes() == Linear::rounded_size(out, width).unwrap());
        let x = noise(seed ^ 1, t * width);
        let want = bits(&reference(&x, WeightFormat::Q8, &bytes, out, width));
        prop_assert_eq!(&bits(&product(&rounded, &x)), &want);
        prop_assert_eq!(&bits(&portable(WeightFormat::Q8, &bytes, out, width, &x)), &want);
        let read = Linear::with_int8_activations(WeightFormat::Q8, &bytes, out, width).unwrap();
        prop_assert_eq!(&bits(&product(&read, &x)), &want);
        let raw = rounded.rounded_bytes().unwrap();
        let back = Linear::of_rounded_bytes(raw, out, width).unwrap();
        prop_assert_eq!(&bits(&product(&back, &x)), &want);
        prop_assert!(Linear::of_rounded_bytes(&raw[1..], out, width).is_err());
        // In f32 it is the dequantised matrix.
        let exact = Linear::new(WeightFormat::Q8, &bytes, out, width).unwrap();
        prop_assert_eq!(&bits(&product(&exact, &x)), &bits(&product(&rounded.to_f32().unwrap(), &x)));
    }
}

#[test]
fn only_maps_of_whole_blocks_are_rounded_and_only_rounded_ones_have_such_bytes() {
    let of = |width| {
        let weight = Tensor::from_vec(noise(3, 4 * width), (4, width), &Device::Cpu).unwrap();
        Linear::from_tensor(&weight).unwrap()
    };
    assert!(!of(40).rounded().rounds_activations());
    assert!(of(64).rounded_bytes().is_none());
    assert!(Linear::rounded_size(4, 40).is_none());
    for (out, width) in [(0, 32), (4, 0), (usize::MAX, 32), (4, usize::MAX - 31)] {
        assert!(Linear::of_rounded_bytes(&[], out, width).is_err());
    }
    let mut rounded = of(64).rounded();
    let other = rounded.clone();
    assert!(!rounded.scrub(), "somebody else holds it");
    drop(other);
    assert!(rounded.scrub() && product(&rounded, &noise(5, 64)) == [0.0; 4]);
}

#[test]
fn no_sum_overflows_with_the_largest_codes() {
    for (format, _) in FORMATS {
        let (out, width) = (17, 512);
        let count = format.row_bytes(width).unwrap() * out / format.block_bytes();
        // All codes -128, 127, 0 or 15, whatever the format has; scales and minima of 1 where they are halves.
        for fill in [0x80, 0x7f, 0xff, 0x00] {
            let mut bytes = vec![fill; count * format.block_bytes()];
            for block in bytes.chunks_exact_mut(format.block_bytes()) {
                let one = half::f16::ONE.to_le_bytes();
                match format {
                    WeightFormat::Q6K => block[208..].copy_from_slice(&one),
                    WeightFormat::Q4_1 | WeightFormat::Q4K => {
                        block[..2].copy_from_slice(&one);
                        block[2..4].copy_from_slice(&one);
                    }
                    _ => block[..2].copy_from_slice(&one),
                }
            }
            let linear = Linear::with_int8_activations(format, &bytes, out, width).unwrap();
            for sign in [1.0, -1.0] {
                // Of one sign, and alternating: pairs that add up, and pairs that differ.
                for alternating in [false, true] {
                    let x: Vec<f32> = (0..17 * width)
                        .map(|k| {
                            if alternating && k % 2 == 1 {
                                -sign
                            } else {
                                sign
                            }
                        })
                        .collect();
                    let want = reference(&x, format, &bytes, out, width);
                    assert_eq!(
                        product(&linear, &x),
                        want,
                        "{format:?} of {fill:#x}, {sign}"
                    );
                    assert_eq!(product(&linear, &x[..width]), want[..out], "one row");
                }
            }
        }
    }
}

#[test]
fn rows_of_any_magnitude_round_to_within_half_a_step_or_show_that_they_are_no_numbers() {
    let (format, ggml) = FORMATS[2];
    let (out, width) = (5, 64);
    let bytes = matrix(ggml, out, width);
    let linear = Linear::with_int8_activations(format, &bytes, out, width).unwrap();
    for magnitude in [0.0, 1e-38, 1e-31, 1e-20, 1.0, 1e30] {
        let x: Vec<f32> = noise(3, 2 * width).iter().map(|x| x * magnitude).collect();
        let codes = Codes::of(&x, width, std::iter::empty());
        for (block, x) in x.chunks_exact(BLOCK).enumerate() {
            for (code, x) in codes.codes[block * BLOCK..].iter().zip(x) {
                let scale = codes.scales[block];
                let error = (f32::from(*code) * scale - x).abs();
                assert!(
                    error <= 0.5001 * scale || magnitude < 1e-29,
                    "{x} as {code} of {scale}"
                );
                assert!((-127..=127).contains(code));
            }
        }
        assert!(product(&linear, &x).iter().all(|y| y.is_finite()));
    }
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut x = noise(3, 3 * width);
        let clean = product(&linear, &x);
        x[width + 40] = bad;
        let y = product(&linear, &x);
        assert!(y[out..2 * out].iter().all(|y| !y.is_finite()), "{bad}");
        assert_eq!(
            bits(&y[..out]),
            bits(&clean[..out]),
            "another row is untouched"
        );
        assert_eq!(bits(&y[2 * out..]), bits(&clean[2 * out..]));
    }
}

#[test]
fn maps_together_are_maps_alone_whatever_their_kinds() {
    let (t, width) = (37, 256);
    let made: Vec<Linear> = FORMATS
        .iter()
        .map(|&(format, ggml)| {
            let bytes = matrix(ggml, 48, width);
            Linear::with_int8_activations(format, &bytes, 48, width).unwrap()
        })
        .collect();
    let single = made[1].to_f32().unwrap();
    let x = Tensor::from_vec(noise(9, t * width), (t, width), &Device::Cpu).unwrap();
    let maps = [&made[0], &single, &made[2], &made[4]];
    let together = Linear::forward_all(maps, &x).unwrap();
    for (map, together) in maps.iter().zip(&together) {
        let alone = map.forward(&x).unwrap();
        let of = |y: &Tensor| bits(&y.flatten_all().unwrap().to_vec1().unwrap());
        assert_eq!(of(&alone), of(together));
    }
    let [] = Linear::forward_all([], &x).unwrap();
    assert!(Linear::forward_all([&made[0]], &x.narrow(1, 0, 32).unwrap()).is_err());
}

#[test]
fn a_rounded_product_is_close_to_the_exact_one() {
    for (format, ggml) in FORMATS {
        let (t, out, width) = (11, 40, 768);
        let bytes = matrix(ggml, out, width);
        let rounded = Linear::with_int8_activations(format, &bytes, out, width).unwrap();
        let exact = Linear::new(format, &bytes, out, width).unwrap();
        assert!(!exact.rounds_activations());
        let x = noise(5, t * width);
        let (rounded, exact) = (product(&rounded, &x), product(&exact, &x));
        let error: f32 = rounded
            .iter()
            .zip(&exact)
            .map(|(a, b)| (a - b).powi(2))
            .sum();
        let size: f32 = exact.iter().map(|y| y.powi(2)).sum();
        assert!(
            (error / size).sqrt() < 0.01,
            "{format:?}: {}",
            (error / size).sqrt()
        );
    }
}
