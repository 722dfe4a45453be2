//! Laws of the row-wise operations.

use candle_core::{Device, Tensor};
use proptest::prelude::*;

use super::{reference, rms_norm, silu_mul};
use crate::{
    gradients::{check, var},
    noise::noise,
};

fn of(seed: u64, rows: usize, columns: usize) -> Tensor {
    Tensor::from_vec(noise(seed, rows * columns), (rows, columns), &Device::Cpu).unwrap()
}

fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

fn bits(tensor: &Tensor) -> Vec<u32> {
    values(tensor).into_iter().map(f32::to_bits).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn a_normed_row_is_its_reference(t in 0usize..5, d in 1usize..700, with_gain: bool) {
        let (x, gain) = (of(1, t, d), noise(2, d));
        let gain_tensor = Tensor::from_slice(&gain, d, &Device::Cpu).unwrap();
        let y = rms_norm(&x, with_gain.then_some(&gain_tensor), 1e-5).unwrap();
        prop_assert_eq!(y.dims2().unwrap(), (t, d));
        let gain = if with_gain { gain } else { vec![1.0; d] };
        let want: Vec<f32> = values(&x).chunks_exact(d).flat_map(|x| reference(x, &gain, 1e-5)).collect();
        for (y, want) in values(&y).into_iter().zip(want) {
            prop_assert!((y - want).abs() <= 2e-6 * want.abs() + 1e-30, "{} for {}", y, want);
        }
    }

    #[test]
    fn a_gated_value_is_its_formula(t in 0usize..5, f in 1usize..70, large in 1f32..200.0) {
        let gate = (of(1, t, f) * f64::from(large)).unwrap();
        let up = of(2, t, f);
        let y = values(&silu_mul(&gate, &up).unwrap());
        for ((y, gate), up) in y.into_iter().zip(values(&gate)).zip(values(&up)) {
            let (gate, up) = (f64::from(gate), f64::from(up));
            let want = gate / (1.0 + (-gate).exp()) * up;
            prop_assert!((f64::from(y) - want).abs() <= 1e-6 * want.abs() + 1e-30, "{} for {}", y, want);
        }
    }
}

#[test]
fn a_row_of_a_large_call_is_the_row_alone_bit_for_bit() {
    let (x, up) = (of(1, 97, 577), of(2, 97, 577));
    let (normed, gated) = (
        bits(&rms_norm(&x, None, 1e-5).unwrap()),
        bits(&silu_mul(&x, &up).unwrap()),
    );
    for row in [0, 13, 14, 96] {
        let (x, up) = (x.narrow(0, row, 1).unwrap(), up.narrow(0, row, 1).unwrap());
        assert_eq!(
            bits(&rms_norm(&x, None, 1e-5).unwrap()),
            normed[row * 577..][..577]
        );
        assert_eq!(bits(&silu_mul(&x, &up).unwrap()), gated[row * 577..][..577]);
    }
}

#[test]
fn a_gain_or_a_gate_of_another_width_is_refused() {
    let (x, gain) = (
        of(1, 2, 8),
        Tensor::ones(7, candle_core::DType::F32, &Device::Cpu).unwrap(),
    );
    assert!(
        rms_norm(&x, Some(&gain), 1e-5)
            .unwrap_err()
            .to_string()
            .contains("gain of 7 for rows of 8")
    );
    assert!(silu_mul(&x, &of(1, 2, 7)).is_err());
}

#[test]
fn the_gradient_of_a_norm_is_its_differences() {
    let x = var(1, &[3, 37]);
    let gain = var(2, &[37]).detach();
    check(&[&x], 3e-3, || rms_norm(&x, Some(&gain), 1e-5));
    check(&[&x], 3e-3, || rms_norm(&x, None, 1e-5));
}

#[test]
fn gradients_of_a_gated_value_are_its_differences() {
    let (gate, up) = (var(1, &[3, 37]), var(2, &[3, 37]));
    check(&[&gate, &up], 2e-3, || silu_mul(&gate, &up));
}
