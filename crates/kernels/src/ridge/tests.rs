//! The ridge solution against plain loops in f64, at odd sizes and where f32 ends.

use candle_core::{Device, Tensor};
use proptest::prelude::*;

use super::ridge;
use crate::noise::noise;

fn tensor(values: Vec<f32>, rows: usize, columns: usize) -> Tensor {
    Tensor::from_vec(values, (rows, columns), &Device::Cpu).unwrap()
}

fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

/// Σ k kᵀ [R, R] and Σ k vᵀ [R, C] over T tokens of noise.
fn sums(seed: u64, tokens: usize, size: usize, columns: usize) -> (Vec<f32>, Vec<f32>) {
    let (k, v) = (
        noise(seed, tokens * size),
        noise(seed + 1, tokens * columns),
    );
    let (mut g, mut s) = (vec![0.0; size * size], vec![0.0; size * columns]);
    for (k, v) in k.chunks_exact(size).zip(v.chunks_exact(columns)) {
        for i in 0..size {
            for j in 0..size {
                g[i * size + j] += k[i] * k[j];
            }
            for j in 0..columns {
                s[i * columns + j] += k[i] * v[j];
            }
        }
    }
    (g, s)
}

/// The meaning: Gaussian elimination of (G + lambda I) N = S in f64, -> Nᵀ [C, R].
fn reference(g: &[f32], lambda: f64, s: &[f32], size: usize, columns: usize) -> Vec<f64> {
    let mut a: Vec<Vec<f64>> = (0..size)
        .map(|i| {
            let row =
                (0..size).map(|j| 0.5 * (f64::from(g[i * size + j]) + f64::from(g[j * size + i])));
            let mut row: Vec<f64> = row.collect();
            row[i] += lambda;
            row.extend(
                s[i * columns..(i + 1) * columns]
                    .iter()
                    .map(|&s| f64::from(s)),
            );
            row
        })
        .collect();
    for i in 0..size {
        let pivot = a[i].clone();
        for (j, row) in a.iter_mut().enumerate().filter(|(j, _)| *j != i) {
            let _ = j;
            let factor = row[i] / pivot[i];
            row.iter_mut()
                .zip(&pivot)
                .for_each(|(x, p)| *x -= factor * p);
        }
    }
    (0..columns)
        .flat_map(|c| (0..size).map(move |i| (i, c)))
        .map(|(i, c)| a[i][size + c] / a[i][i])
        .collect()
}

fn error(got: &[f32], want: &[f64]) -> f64 {
    assert_eq!(got.len(), want.len());
    let off: f64 = got
        .iter()
        .zip(want)
        .map(|(g, w)| (f64::from(*g) - w).powi(2))
        .sum();
    let all: f64 = want.iter().map(|w| w * w).sum();
    (off / all.max(1e-300)).sqrt()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn it_solves_its_equation_at_any_size(size in 1usize..90, columns in 1usize..40, tokens in 1usize..120, seed in 0u64..1000) {
        let (g, s) = sums(seed, tokens, size, columns);
        let want = reference(&g, 0.5, &s, size, columns);
        let solved = ridge(&tensor(g, size, size), 0.5, &[&tensor(s, size, columns)]).unwrap().unwrap();
        prop_assert_eq!(solved[0].dims(), [columns, size]);
        let error = error(&values(&solved[0]), &want);
        prop_assert!(error < 1e-4, "{error}");
    }

    #[test]
    fn a_side_is_the_same_bits_beside_any_other(size in 1usize..60, columns in 1usize..40, cut in 0usize..40) {
        let (g, s) = sums(7, 50, size, columns);
        let g = tensor(g, size, size);
        let side = tensor(s, size, columns);
        let cut = 1 + cut % columns;
        let part = side.narrow(1, 0, cut).unwrap();
        let both = ridge(&g, 0.1, &[&side, &part]).unwrap().unwrap();
        let (whole, alone) = (values(&both[0]), values(&both[1]));
        prop_assert_eq!(&whole[..cut * size], &alone[..]);
    }
}

#[test]
fn the_shipped_size_is_solved_as_well_as_f32_allows() {
    let (g, s) = sums(3, 400, 256, 8);
    let want = reference(&g, 0.1, &s, 256, 8);
    let solved = ridge(&tensor(g, 256, 256), 0.1, &[&tensor(s, 256, 8)])
        .unwrap()
        .unwrap();
    let error = error(&values(&solved[0]), &want);
    assert!(error < 1e-4, "{error}");
}

#[test]
fn the_two_triangles_are_averaged() {
    let (g, s) = sums(11, 40, 30, 3);
    let side = tensor(s.clone(), 30, 3);
    let mut skewed = g.clone();
    for i in 0..30 {
        for j in 0..i {
            skewed[i * 30 + j] += 0.25;
            skewed[j * 30 + i] -= 0.25;
        }
    }
    let n = |g: Vec<f32>| values(&ridge(&tensor(g, 30, 30), 0.5, &[&side]).unwrap().unwrap()[0]);
    let want = reference(&g, 0.5, &s, 30, 3);
    assert!(error(&n(skewed), &want) < 1e-4);
}

#[test]
fn where_f32_does_not_suffice_there_is_no_result() {
    let solve = |g: &[f32], lambda, s: &[f32]| {
        let size = s.len();
        ridge(
            &tensor(g.to_vec(), size, size),
            lambda,
            &[&tensor(s.to_vec(), size, 1)],
        )
        .unwrap()
    };
    assert!(solve(&[1.0], 0.1, &[1.0]).is_some());
    // Not positive; not finite; two keys that are one key but for what f32 drops beside a lambda below that.
    assert!(solve(&[-1.0], 0.1, &[1.0]).is_none());
    assert!(solve(&[f32::NAN], 0.1, &[1.0]).is_none());
    assert!(solve(&[f32::INFINITY], 0.1, &[1.0]).is_none());
    assert!(solve(&[1.0], 0.1, &[f32::NAN]).is_none());
    assert!(solve(&[1.0], 1e-30, &[f32::MAX]).is_some());
    assert!(solve(&[1e-20], 1e-30, &[f32::MAX]).is_none());
    let big = vec![3e9; 40 * 40];
    assert!(solve(&big, 1e-3, &[1.0; 40]).is_none());
}

#[test]
fn other_shapes_are_refused() {
    let of = |rows, columns| tensor(vec![1.0; rows * columns], rows, columns);
    assert!(ridge(&of(2, 3), 0.1, &[]).is_err());
    assert!(ridge(&of(3, 3), 0.1, &[&of(2, 3)]).is_err());
}
