//! Laws of the frozen product: a row alone = the row in a batch = the row over the dequantised matrix, bit for bit.

use candle_core::{
    Device, Tensor,
    quantized::{GgmlDType, QTensor},
};
use proptest::prelude::*;

use super::{Linear, reference};
use crate::{
    WeightFormat,
    gradients::{check, var},
    noise::noise,
};

const FORMATS: [WeightFormat; 8] = [
    WeightFormat::F32,
    WeightFormat::F16,
    WeightFormat::BF16,
    WeightFormat::Q8_0,
    WeightFormat::Q4_0,
    WeightFormat::Q4_1,
    WeightFormat::Q4K,
    WeightFormat::Q6K,
];

fn ggml(format: WeightFormat) -> GgmlDType {
    match format {
        WeightFormat::F32 => GgmlDType::F32,
        WeightFormat::F16 => GgmlDType::F16,
        WeightFormat::BF16 => GgmlDType::BF16,
        WeightFormat::Q8_0 => GgmlDType::Q8_0,
        WeightFormat::Q4_0 => GgmlDType::Q4_0,
        WeightFormat::Q4_1 => GgmlDType::Q4_1,
        WeightFormat::Q4K => GgmlDType::Q4K,
        WeightFormat::Q6K => GgmlDType::Q6K,
        WeightFormat::Q8 => unreachable!("not among the formats of files"),
    }
}

/// A matrix in this format, as ours and as candle's.
fn matrix(format: WeightFormat, out: usize, width: usize) -> (Linear, QTensor) {
    let values =
        Tensor::from_vec(noise(out as u64, out * width), (out, width), &Device::Cpu).unwrap();
    let theirs = QTensor::quantize(&values, ggml(format)).unwrap();
    let ours = Linear::new(format, &theirs.data().unwrap(), out, width).unwrap();
    (ours, theirs)
}

/// The same for activations in int8.
fn in_int8(format: WeightFormat, out: usize, width: usize) -> Linear {
    let theirs = matrix(format, out, width).1;
    Linear::with_int8_activations(format, &theirs.data().unwrap(), out, width).unwrap()
}

fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

fn rows_of(t: usize, width: usize) -> Tensor {
    Tensor::from_vec(noise(7, t * width), (t, width), &Device::Cpu).unwrap()
}

#[test]
fn every_format_decodes_to_the_values_that_candle_reads() {
    for format in FORMATS {
        for (out, width) in [(16, 256), (37, 512), (1, 768)] {
            let (ours, theirs) = matrix(format, out, width);
            let theirs = values(&theirs.dequantize(&Device::Cpu).unwrap());
            assert_eq!(
                values(&ours.dequantize().unwrap()),
                theirs,
                "{format:?} [{out}, {width}]"
            );
            assert_eq!(
                values(&in_int8(format, out, width).dequantize().unwrap()),
                theirs,
                "{format:?} in quads"
            );
            let ids = [out as u32 - 1, 0];
            let rows = [&theirs[(out - 1) * width..], &theirs[..width]].concat();
            assert_eq!(
                values(&ours.rows(&ids).unwrap()),
                rows,
                "rows of {format:?} [{out}, {width}]"
            );
        }
    }
}

#[test]
fn a_row_in_a_batch_is_the_row_alone_bit_for_bit() {
    let both = FORMATS.map(|format| [(format, false), (format, true)]);
    for (format, int8) in both.into_iter().flatten() {
        // Odd widths in panels and pairs of panels; 530 rows take several row parts.
        for (out, width, t) in [
            (37, 512, 37),
            (49, 768, 530),
            (2048, 256, 9),
            (16, 256, 3),
            (1, 256, 2),
        ] {
            let linear = if int8 {
                in_int8(format, out, width)
            } else {
                matrix(format, out, width).0
            };
            let x = rows_of(t, width);
            let together = values(&linear.forward(&x).unwrap());
            for row in [0, t / 2, t - 1] {
                let alone = values(&linear.forward(&x.narrow(0, row, 1).unwrap()).unwrap());
                assert_eq!(
                    bits(&alone),
                    bits(&together[row * out..][..out]),
                    "{format:?} [{out}, {width}] row {row} of {t}, int8: {int8}"
                );
            }
        }
    }
}

#[test]
fn a_quantised_product_is_the_dequantised_one_bit_for_bit() {
    for format in FORMATS {
        let (linear, _) = matrix(format, 45, 512);
        let single = linear.to_f32().unwrap();
        assert_eq!(single.format(), WeightFormat::F32);
        for t in [1, 2, 3, 4, 5, 8, 13] {
            let x = rows_of(t, 512);
            let (quantised, single) = (linear.forward(&x).unwrap(), single.forward(&x).unwrap());
            assert_eq!(
                bits(&values(&quantised)),
                bits(&values(&single)),
                "{format:?}, {t} rows"
            );
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn a_product_is_its_reference_at_any_size(t in 0usize..30, out in 1usize..70, width in 1usize..600) {
        let w = noise(3, out * width);
        let linear = Linear::from_tensor(&Tensor::from_slice(&w, (out, width), &Device::Cpu).unwrap()).unwrap();
        let x = rows_of(t, width);
        let y = linear.forward(&x).unwrap();
        prop_assert_eq!(y.dims2().unwrap(), (t, out));
        prop_assert_eq!(bits(&values(&y)), bits(&reference(&values(&x), &w, t, out, width)));
    }
}

#[test]
fn a_matrix_whose_bytes_are_not_those_of_its_shape_is_refused() {
    let of = |format, bytes: usize, out, width| {
        Linear::new(format, &vec![0; bytes], out, width)
            .unwrap_err()
            .to_string()
    };
    assert!(of(WeightFormat::Q4_1, 19, 1, 32).contains("expected Some(20)"));
    assert!(of(WeightFormat::Q4_1, 20, 1, 33).contains("whole blocks"));
    assert!(of(WeightFormat::F32, 8, usize::MAX, 2).contains("expected None"));
    assert!(of(WeightFormat::F32, 0, 0, 2).contains("no weights"));
    assert!(of(WeightFormat::F16, 0, 2, 0).contains("no weights"));
    assert!(Linear::new(WeightFormat::Q4_1, &[0; 20], 1, 32).is_ok());
}

#[test]
fn rows_outside_of_a_table_and_inputs_of_another_width_are_refused() {
    let (linear, _) = matrix(WeightFormat::Q8_0, 5, 64);
    assert!(
        linear
            .rows(&[4, 5])
            .unwrap_err()
            .to_string()
            .contains("row 5 of a table of 5 rows")
    );
    assert!(
        linear
            .forward(&rows_of(2, 32))
            .unwrap_err()
            .to_string()
            .contains("64 inputs got rows of 32")
    );
}

#[test]
fn four_bit_weights_stay_four_bits_in_memory() {
    let (linear, _) = matrix(WeightFormat::Q4_1, 64, 256);
    assert_eq!(linear.bytes(), 64 * 256 / 32 * 20);
}

#[test]
fn the_gradient_of_a_frozen_map_is_its_differences() {
    let (x, w) = (var(1, &[5, 9]), var(2, &[21, 9]));
    let map = Linear::from_tensor(&w).unwrap();
    check(&[&x], 2e-3, || map.forward(&x));
}

#[test]
fn nothing_is_recorded_for_an_input_that_is_not_tracked() {
    let (x, w) = (var(1, &[5, 9]), var(2, &[21, 9]));
    let map = Linear::from_tensor(&w).unwrap();
    assert!(!map.forward(&x.detach()).unwrap().track_op());
    assert!(map.turned.get().is_none());
}
