//! Principal directions, and that a white generator recalls before it is trained.

use faer::Mat;
use testkit::Random;

use super::{Grow, beside, principal, without};

#[test]
fn principal_directions_diagonalise_the_covariance_without_its_mean() {
    let (n, mut random) = (9, Random::new(4));
    let m = Mat::from_fn(n, n, |_, _| random.next_u64() as f64 / 2f64.powi(63) - 1.0);
    let c = &m * m.transpose();
    let mean: Vec<f64> = (0..n).map(|i| i as f64 - 2.0).collect();
    let (values, vectors) = principal(&without(&c, &mean)).unwrap();
    assert!(values.windows(2).all(|pair| pair[0] >= pair[1]));
    // The mean's direction carries no variance: it is the last.
    let last: f64 = (0..n).map(|i| vectors[(i, n - 1)] * mean[i]).sum();
    let length = mean.iter().map(|m| m * m).sum::<f64>().sqrt();
    assert!((last.abs() - length).abs() < 1e-9 && values[n - 1] < 1e-9);
    for k in 0..n - 1 {
        let along: f64 = (0..n).map(|i| vectors[(i, k)] * mean[i]).sum();
        assert!(along.abs() < 1e-9);
        let variance: f64 = (0..n)
            .flat_map(|i| (0..n).map(move |j| (i, j)))
            .map(|(i, j)| vectors[(i, k)] * c[(i, j)] * vectors[(j, k)])
            .sum();
        assert!((variance - values[k]).abs() < 1e-9 * values[0]);
    }
}

#[test]
fn keys_that_are_grown_are_uncorrelated_with_those_that_were_there_and_of_their_variance() {
    let (n, r, mut random) = (12, 3, Random::new(5));
    let mut normal = || random.next_u64() as f64 / 2f64.powi(63) - 1.0;
    let m = Mat::from_fn(n, n, |_, _| normal());
    let c = &m * m.transpose();
    let a = Mat::from_fn(r, n, |_, _| normal());
    let grow = Grow {
        r1: 7,
        damping: 0.0,
        contexts: 1,
    };
    let b = beside(&a, &c, &grow).unwrap();
    assert_eq!((b.nrows(), b.ncols()), (4, n));
    let own = &a * &c * a.transpose();
    let mean = (0..r).map(|i| own[(i, i)]).sum::<f64>() / r as f64;
    let (across, new) = (&a * &c * b.transpose(), &b * &c * b.transpose());
    for i in 0..4 {
        for j in 0..r {
            assert!(across[(j, i)].abs() < 1e-4 * mean, "{}", across[(j, i)]);
        }
        for j in 0..4 {
            let want = if i == j { mean } else { 0.0 };
            assert!((new[(i, j)] - want).abs() < 1e-4 * mean, "{}", new[(i, j)]);
        }
    }
}
