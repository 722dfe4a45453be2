//! The kernels' text, run thread by thread on the software device (soft/), against their twins; and all that is built on them.
//!
//! Start at [`with_device`].

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

mod kernels;
mod model;
mod program;
mod read_out;

use std::{path::Path, sync::Mutex};

use cuda::{Device, Libraries};
use half::bf16;
use testkit::Random;

/// Runs `work` on a software device of its own; nothing of it may be a violation.
fn with_device(work: impl FnOnce(&Device)) {
    with_device_that_refuses(|device| {
        let before = device.violations().len();
        work(device);
        device.synchronize().unwrap();
        assert_eq!(device.violations()[before..], [] as [String; 0]);
        assert!(device.failed_drop().is_none());
    });
}

/// The same for work that is refused.
fn with_device_that_refuses(work: impl FnOnce(&Device)) {
    static ONE: Mutex<()> = Mutex::new(());
    // A test that failed before says so itself.
    let _one = ONE
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner);
    work(&Device::open(&Libraries::from(software()), 0).unwrap());
}

fn software() -> &'static Path {
    testkit::software_device(Path::new(env!("CARGO_TARGET_TMPDIR")))
}

/// Normal numbers in bf16.
fn noise(random: &mut Random, len: usize, deviation: f64) -> Vec<bf16> {
    (0..len)
        .map(|_| bf16::from_f64(random.normal() * deviation))
        .collect()
}

/// ‖got − want‖ / ‖want‖; not a number: infinite.
fn error(got: &[bf16], want: &[bf16]) -> f64 {
    let wide = |values: &[bf16]| values.iter().map(|x| x.to_f64()).collect::<Vec<_>>();
    let error = testkit::relative_error_of(&wide(got), &wide(want));
    if error.is_nan() { f64::INFINITY } else { error }
}
