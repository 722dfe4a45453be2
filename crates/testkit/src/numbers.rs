//! Errors between tensors, seeded random numbers and linear algebra in plain f64 loops.
//!
//! Matrices are row-major slices with their sizes beside them; nothing here is fast.

use candle_core::{DType, Device, Tensor};

/// ‖got − want‖ / ‖want‖ in the Frobenius norm, in f64. Zero against zero is 0, anything else against zero is infinite.
///
/// # Panics
/// If the shapes differ or a tensor cannot be read.
#[must_use]
pub fn relative_error(got: &Tensor, want: &Tensor) -> f64 {
    assert_eq!(got.dims(), want.dims(), "tensors of different shapes");
    relative_error_of(&values(got), &values(want))
}

/// [`relative_error`] of plain numbers.
///
/// # Panics
/// If the lengths differ.
#[must_use]
pub fn relative_error_of(got: &[f64], want: &[f64]) -> f64 {
    assert_eq!(got.len(), want.len(), "slices of different lengths");
    let apart = got
        .iter()
        .zip(want)
        .map(|(g, w)| (g - w).powi(2))
        .sum::<f64>()
        .sqrt();
    let size = want.iter().map(|w| w * w).sum::<f64>().sqrt();
    if apart == 0.0 { 0.0 } else { apart / size }
}

/// All numbers of a tensor of any float type and shape, in order, as f64.
///
/// # Panics
/// If the tensor cannot be read.
#[must_use]
pub fn values(tensor: &Tensor) -> Vec<f64> {
    let flat = tensor
        .to_dtype(DType::F64)
        .and_then(|t| t.flatten_all())
        .and_then(|t| t.to_vec1());
    flat.expect("a float tensor converts to f64")
}

/// A seeded f32 tensor of normal numbers on the CPU.
///
/// # Panics
/// If the shape is too large for memory.
#[must_use]
pub fn tensor(seed: u64, shape: &[usize], deviation: f64) -> Tensor {
    Random::new(seed).tensor(shape, 0.0, deviation)
}

/// SplitMix64 (Steele et al., 2014): small, seeded and the same everywhere. Not for secrets.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// Equal seeds give equal numbers.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next 64 bits.
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A whole number in 0..bound; bound is not 0.
    pub fn below(&mut self, bound: usize) -> usize {
        (self.next_u64() % bound as u64) as usize
    }

    /// A number in [0, 1).
    pub fn uniform(&mut self) -> f64 {
        (self.next_u64() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// A number from the standard normal distribution (Box-Muller).
    pub fn normal(&mut self) -> f64 {
        let radius = (-2.0 * (1.0 - self.uniform()).ln()).sqrt();
        radius * (std::f64::consts::TAU * self.uniform()).cos()
    }

    /// Normal numbers as an f32 tensor on the CPU.
    ///
    /// # Panics
    /// If the shape is too large for memory.
    pub fn tensor(&mut self, shape: &[usize], mean: f64, deviation: f64) -> Tensor {
        let count = shape.iter().product();
        let data: Vec<f32> = (0..count)
            .map(|_| (mean + deviation * self.normal()) as f32)
            .collect();
        Tensor::from_vec(data, shape, &Device::Cpu).expect("as many numbers as the shape holds")
    }
}

/// a b for a [m, k] and b [k, n], in plain loops: [m, n].
///
/// # Panics
/// If a slice does not have its size.
#[must_use]
pub fn matmul(a: &[f64], b: &[f64], m: usize, k: usize, n: usize) -> Vec<f64> {
    assert_eq!(
        (a.len(), b.len()),
        (m * k, k * n),
        "sizes of a [m, k] and b [k, n]"
    );
    let mut product = vec![0.0; m * n];
    for i in 0..m {
        for j in 0..n {
            product[i * n + j] = (0..k).map(|l| a[i * k + l] * b[l * n + j]).sum();
        }
    }
    product
}

/// aᵀ for a [m, n]: [n, m].
///
/// # Panics
/// If the slice does not have its size.
#[must_use]
pub fn transpose(a: &[f64], m: usize, n: usize) -> Vec<f64> {
    assert_eq!(a.len(), m * n, "size of a [m, n]");
    (0..n * m).map(|i| a[(i % m) * n + i / m]).collect()
}

/// a⁻¹ b for a [n, n] and b [n, m], by Gauss elimination with row pivots: [n, m].
///
/// # Panics
/// If a slice does not have its size or a is singular.
#[must_use]
pub fn solve(a: &[f64], b: &[f64], n: usize, m: usize) -> Vec<f64> {
    assert_eq!(
        (a.len(), b.len()),
        (n * n, n * m),
        "sizes of a [n, n] and b [n, m]"
    );
    let (mut a, mut b) = (a.to_vec(), b.to_vec());
    for column in 0..n {
        let pivot = (column..n)
            .max_by(|&p, &q| a[p * n + column].abs().total_cmp(&a[q * n + column].abs()));
        let pivot = pivot.expect("at least one row is left");
        assert!(a[pivot * n + column] != 0.0, "a singular matrix");
        for j in 0..n {
            a.swap(column * n + j, pivot * n + j);
        }
        for j in 0..m {
            b.swap(column * m + j, pivot * m + j);
        }
        for row in (0..n).filter(|&row| row != column) {
            let factor = a[row * n + column] / a[column * n + column];
            for j in column..n {
                a[row * n + j] -= factor * a[column * n + j];
            }
            for j in 0..m {
                b[row * m + j] -= factor * b[column * m + j];
            }
        }
    }
    (0..n * m).map(|i| b[i] / a[(i / m) * n + i / m]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn solving_undoes_multiplying() {
        let mut random = Random::new(7);
        let a: Vec<f64> = (0..25).map(|_| random.normal()).collect();
        let x: Vec<f64> = (0..10).map(|_| random.normal()).collect();
        let b = matmul(&a, &x, 5, 5, 2);
        assert!(relative_error_of(&solve(&a, &b, 5, 2), &x) < 1e-9);
        assert_eq!(transpose(&transpose(&x, 5, 2), 2, 5), x);
    }

    #[test]
    fn an_error_is_relative_to_what_is_wanted() {
        let want = tensor(1, &[3, 4], 1.0);
        assert_eq!(relative_error(&want, &want), 0.0);
        let got = (&want * 1.01).expect("a product");
        assert!((relative_error(&got, &want) - 0.01).abs() < 1e-6);
        assert_eq!(relative_error_of(&[1.0], &[0.0]), f64::INFINITY);
    }
}
