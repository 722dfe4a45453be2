//! Values against the serving operations, gradients against finite differences.

use candle_core::{Device, Result, Tensor, Var};

use super::{apply_trained_cores, gram_sums, linear_trained, outer_sums};
use crate::{
    CoreRows, CoreView, Linear, accumulate_outer, apply_cores,
    gradients::{check, var},
};

fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

#[test]
fn a_trained_linear_gives_the_bits_of_a_frozen_one() {
    let (x, w) = (var(1, &[7, 33]), var(2, &[21, 33]));
    let frozen = Linear::from_tensor(w.as_tensor()).unwrap();
    assert_eq!(
        values(&linear_trained(&x, &w).unwrap()),
        values(&frozen.forward(&x).unwrap())
    );
}

#[test]
fn gradients_of_a_trained_linear_are_its_differences() {
    let (x, w) = (var(1, &[5, 9]), var(2, &[7, 9]));
    check(&[&x, &w], 2e-3, || linear_trained(&x, &w));
}

#[test]
fn trained_cores_give_the_bits_of_served_ones() {
    let (a, n) = (var(1, &[9, 12]), var(2, &[2, 12, 10]));
    let rows = |start, len, j: usize, n: &'static [Tensor; 2]| CoreRows {
        start,
        len,
        core: CoreView::Dense(&n[j]),
        scale: 1.0,
    };
    let cores: &'static [Tensor; 2] = Box::leak(Box::new([n.get(0).unwrap(), n.get(1).unwrap()]));
    let served = apply_cores(
        &a,
        &[
            rows(0, 3, 0, cores),
            rows(3, 2, 1, cores),
            rows(6, 3, 0, cores),
        ],
        10,
    )
    .unwrap();
    let trained = apply_trained_cores(&a, &n, &[vec![0..3, 6..9], vec![3..4, 4..5]]).unwrap();
    assert_eq!(values(&served), values(&trained));
}

#[test]
fn gradients_of_trained_cores_are_their_differences() {
    let (a, n) = (var(1, &[6, 5]), var(2, &[2, 5, 4]));
    check(&[&a, &n], 2e-3, || {
        apply_trained_cores(&a, &n, &[vec![0..2, 5..6], vec![2..3, 3..4]])
    });
}

#[test]
fn a_row_in_two_groups_is_refused() {
    let (a, n) = (var(1, &[6, 5]), var(2, &[2, 5, 4]));
    let groups = [vec![0..1, 1..3], vec![2..3, 3..4]];
    assert!(apply_trained_cores(&a, &n, &groups).is_err());
}

#[test]
fn outer_sums_are_those_of_serving() {
    let (k, v) = (var(1, &[9, 6]), var(2, &[9, 5]));
    let sums = outer_sums(&k, &v, &[vec![1..4, 6..9]]).unwrap();
    let served = Tensor::zeros((6, 5), candle_core::DType::F32, &Device::Cpu).unwrap();
    accumulate_outer(&[(&served, v.as_tensor())], &k, 1..4).unwrap();
    accumulate_outer(&[(&served, v.as_tensor())], &k, 6..9).unwrap();
    assert_eq!(values(&sums), values(&served));
}

#[test]
fn gradients_of_outer_sums_are_their_differences() -> Result<()> {
    let (k, v) = (var(1, &[6, 4]), var(2, &[6, 3]));
    // A row may be in many groups, in one, or in none.
    let groups = [vec![0..1, 1..2], vec![0..4, 5..6]];
    check(&[&k, &v], 2e-3, || outer_sums(&k, &v, &groups));
    let k: Var = var(3, &[6, 4]);
    check(&[&k], 2e-3, || gram_sums(&k, &groups));
    let same = outer_sums(&k.detach(), &k.detach(), &groups)?;
    assert_eq!(values(&gram_sums(&k, &groups)?), values(&same));
    Ok(())
}
