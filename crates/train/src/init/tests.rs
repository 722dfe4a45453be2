//! Principal directions, and that a white generator recalls before it is trained.

use faer::Mat;
use testkit::Random;

use super::principal;

#[test]
fn principal_directions_diagonalise_the_covariance_without_its_mean() {
    let (n, mut random) = (9, Random::new(4));
    let m = Mat::from_fn(n, n, |_, _| random.next_u64() as f64 / 2f64.powi(63) - 1.0);
    let c = &m * m.transpose();
    let mean: Vec<f64> = (0..n).map(|i| i as f64 - 2.0).collect();
    let (values, vectors) = principal(c.clone(), &mean).unwrap();
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
