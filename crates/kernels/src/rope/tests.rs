//! Laws of rotary positions.

use candle_core::{Device, Tensor};

use super::rope;
use crate::{
    gradients::{check, var},
    noise::noise,
};

const HALF: usize = 4;

fn tables(max: usize) -> (Tensor, Tensor) {
    let angles: Vec<f32> = (0..max * HALF)
        .map(|i| (i / HALF) as f32 / 7f32.powi((i % HALF) as i32))
        .collect();
    let angles = Tensor::from_vec(angles, (max, HALF), &Device::Cpu).unwrap();
    (angles.cos().unwrap(), angles.sin().unwrap())
}

fn heads(t: usize, h: usize) -> Tensor {
    Tensor::from_vec(noise(5, t * h * 2 * HALF), (t, h, 2 * HALF), &Device::Cpu).unwrap()
}

fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

#[test]
fn every_pair_of_channels_turns_by_its_own_angle() {
    let ((cos, sin), x) = (tables(50), heads(3, 2));
    let y = values(&rope(&x, &cos, &sin, &[0, 49, 7]).unwrap());
    let (x, cos, sin) = (values(&x), values(&cos), values(&sin));
    for (row, position) in [0, 49, 7].into_iter().enumerate() {
        for head in 0..2 {
            for i in 0..HALF {
                let (low, high) = (
                    (row * 2 + head) * 2 * HALF + i,
                    (row * 2 + head) * 2 * HALF + i + HALF,
                );
                let (c, s) = (cos[position * HALF + i], sin[position * HALF + i]);
                assert!((y[low] - (x[low] * c - x[high] * s)).abs() < 1e-6);
                assert!((y[high] - (x[high] * c + x[low] * s)).abs() < 1e-6);
            }
        }
    }
    assert_eq!(y[..2 * HALF], x[..2 * HALF], "position 0 turns nothing");
}

#[test]
fn a_row_of_a_large_call_is_the_row_alone_bit_for_bit() {
    let ((cos, sin), x) = (tables(2000), heads(2000, 3));
    let positions: Vec<u32> = (0..2000).rev().collect();
    let together = values(&rope(&x, &cos, &sin, &positions).unwrap());
    for row in [0usize, 999, 1999] {
        let alone = rope(
            &x.narrow(0, row, 1).unwrap(),
            &cos,
            &sin,
            &positions[row..=row],
        )
        .unwrap();
        assert_eq!(values(&alone), together[row * 6 * HALF..][..6 * HALF]);
    }
}

#[test]
fn positions_beyond_the_tables_and_other_widths_are_refused() {
    let ((cos, sin), x) = (tables(5), heads(2, 1));
    assert!(
        rope(&x, &cos, &sin, &[0, 5])
            .unwrap_err()
            .to_string()
            .contains("position 5 is beyond the 5")
    );
    assert!(rope(&x, &cos, &sin, &[0]).is_err());
    assert!(
        rope(
            &heads(2, 1).reshape((2, 2, HALF)).unwrap(),
            &cos,
            &sin,
            &[0, 1]
        )
        .is_err()
    );
    let (longer, _) = tables(6);
    assert!(rope(&x, &longer, &sin, &[0, 1]).is_err());
}

#[test]
fn the_gradient_of_a_rotation_is_its_differences() {
    let ((cos, sin), x) = (tables(50), var(1, &[3, 2, 2 * HALF]));
    check(&[&x], 2e-3, || rope(&x, &cos, &sin, &[0, 49, 7]));
}
