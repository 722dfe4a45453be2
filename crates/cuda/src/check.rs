//! The check of a device: every kernel against its twin, read-outs against their definitions, golden cases, graphs against the eager forward.
//!
//! What `imprint-cuda check` prints and what a GPU is judged by; the tests run it on the software device at sizes of their own. Fails
//! where a device is not right, never skips. Start at [`run`].

mod kernels;
mod models;
mod read_outs;

use std::path::Path;

use half::bf16;

use crate::{Device, Error};

/// How large the cases are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scale {
    /// For the software device.
    Tiny,
    /// Mistral 7B's, a few rows of each.
    Real,
}

/// One comparison.
#[derive(Clone, Debug)]
pub struct Line {
    /// What was compared.
    pub what: String,
    /// ‖got − want‖ / ‖want‖; infinite where a result is not a number.
    pub error: f64,
    /// The largest that passes.
    pub tolerance: f64,
}

impl Line {
    /// Whether it passed.
    pub fn holds(&self) -> bool {
        self.error <= self.tolerance
    }
}

/// A last bit of bf16 at every element.
const ROUNDED: f64 = 4e-3;
/// Weights of attention are rounded to bf16, too.
const ATTENDED: f64 = 6e-3;
/// bf16 weights and inputs of products through whole models; the golden cases have 7.1e-3 to 1.04e-2 on the software device.
const THROUGH: f64 = 1.2e-2;
/// The same with cores that were read out of what was told: 9.6e-3 to 1.65e-2 (q = R, where small singular values become 1, too). Rounding
/// these cases' f32 weights to bf16 is the most of it: of weights that bf16 holds it is 1.1e-2 there and below 1e-2 else.
const TOLD: f64 = 1.8e-2;

/// SplitMix64, as normal numbers (sums of twelve uniform ones).
struct Noise(u64);

impl Noise {
    fn uniform(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    }

    fn normal(&mut self) -> f64 {
        (0..12).map(|_| self.uniform()).sum::<f64>() - 6.0
    }

    fn floats(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| self.normal() as f32).collect()
    }

    fn bf16s(&mut self, len: usize, deviation: f64) -> Vec<bf16> {
        (0..len)
            .map(|_| bf16::from_f64(self.normal() * deviation))
            .collect()
    }
}

fn error_of<T: Copy, U: Copy>(
    got: &[T],
    want: &[U],
    wide: impl Fn(T) -> f64,
    wide_too: impl Fn(U) -> f64,
) -> f64 {
    if got.len() != want.len() {
        return f64::INFINITY;
    }
    let (mut apart, mut size) = (0.0, 0.0);
    for (got, want) in got.iter().zip(want) {
        apart += (wide(*got) - wide_too(*want)).powi(2);
        size += wide_too(*want).powi(2);
    }
    match (apart / size).sqrt() {
        error if error.is_finite() => error,
        _ if apart == 0.0 => 0.0,
        _ => f64::INFINITY,
    }
}

fn between(got: &[bf16], want: &[bf16]) -> f64 {
    error_of(got, want, bf16::to_f64, bf16::to_f64)
}

/// Runs all checks; `golden`: the folder of the reference cases.
///
/// # Errors
/// What the device refuses. A wrong number is a line, not an error.
pub fn run(
    device: &Device,
    scale: Scale,
    golden: Option<&Path>,
    say: &mut dyn FnMut(Line),
) -> Result<(), Error> {
    let mut line = |what: String, error, tolerance| {
        say(Line {
            what,
            error,
            tolerance,
        })
    };
    kernels::rows(device, scale, &mut line)?;
    kernels::quantised(device, scale, &mut line)?;
    kernels::attention(device, scale, &mut line)?;
    kernels::cores(device, scale, &mut line)?;
    read_outs::read_outs(device, scale, &mut line)?;
    models::whole(device, scale, &mut line)?;
    if let Some(folder) = golden {
        models::golden_cases(device, folder, &mut line)?;
    }
    Ok(())
}

type Say<'a> = dyn FnMut(String, f64, f64) + 'a;
