//! Laws of the sum: candle's own, whatever the size and the layout.

use candle_core::{Device, Tensor};
use proptest::prelude::*;

use super::{INLINE, add};
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

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]
    #[test]
    fn a_sum_is_candles_sum(rows in 1usize..6, columns in prop_oneof![1usize..40, INLINE / 2..INLINE + 9]) {
        let (a, b) = (of(1, rows, columns), of(2, columns, rows));
        let b = b.t().unwrap();
        prop_assert_eq!(values(&add(&a, &b).unwrap()), values(&(&a + &b).unwrap()));
    }
}

#[test]
fn a_sum_of_other_shapes_is_refused() {
    assert!(add(&of(1, 2, 3), &of(2, 3, 2)).is_err());
}

#[test]
fn the_gradient_of_a_sum_is_that_of_both_sides() {
    let (a, b) = (var(1, &[3, 5]), var(2, &[3, 5]));
    check(&[&a, &b], 2e-3, || add(&a, &b));
    check(&[&a], 2e-3, || add(&a, &b.detach()));
}
