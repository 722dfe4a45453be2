//! Draws that are the same on every machine for the same seed.
//!
//! Start at [`Draws`].

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// A stream of draws.
pub(crate) struct Draws(ChaCha8Rng);

impl Draws {
    /// The stream of a seed and a purpose: streams of different purposes have nothing to do with each other.
    pub(crate) fn new(seed: u64, purpose: &str) -> Self {
        let mut hash = blake3::Hasher::new();
        hash.update(&seed.to_le_bytes()).update(purpose.as_bytes());
        Self(ChaCha8Rng::from_seed(*hash.finalize().as_bytes()))
    }

    /// A number below `bound`, 0 if that is 0. The bias is below `bound` / 2^64.
    pub(crate) fn below(&mut self, bound: usize) -> usize {
        let wide = u128::from(self.0.next_u64()) * bound as u128;
        usize::try_from(wide >> 64).unwrap_or(0)
    }

    /// A number of the normal distribution of mean 0 and variance 1 (Box and Muller).
    pub(crate) fn normal(&mut self) -> f32 {
        // 53 bits each, in (0, 1].
        let mut unit = || ((self.0.next_u64() >> 11) + 1) as f64 / (1_u64 << 53) as f64;
        let (radius, turn) = ((-2.0 * unit().ln()).sqrt(), unit());
        (radius * (std::f64::consts::TAU * turn).cos()) as f32
    }

    /// The same things in another order.
    pub(crate) fn shuffle<T>(&mut self, things: &mut [T]) {
        for place in (1..things.len()).rev() {
            things.swap(place, self.below(place + 1));
        }
    }

    /// Some one of them.
    pub(crate) fn pick<'a, T>(&mut self, things: &'a [T]) -> Option<&'a T> {
        things.get(self.below(things.len()))
    }
}
