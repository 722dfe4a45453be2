//! The kernels' text, run thread by thread on the software device (soft/), against their twins; and all that is built on them.
//!
//! Start at [`with_device`].

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

mod kernels;
mod model;
mod program;
mod read_out;

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::{Mutex, OnceLock},
    time::SystemTime,
};

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

/// The software device, compiled where its text is newer than the library.
fn software() -> &'static Path {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(|| {
        let here = Path::new(env!("CARGO_MANIFEST_DIR"));
        let library = Path::new(env!("CARGO_TARGET_TMPDIR")).join("libcuda_software.so");
        let changed = |path: &Path| {
            fs::metadata(path)
                .and_then(|data| data.modified())
                .unwrap_or(SystemTime::UNIX_EPOCH)
        };
        let files = ["kernels", "soft"].map(|folder| fs::read_dir(here.join(folder)).unwrap());
        let newest = files
            .into_iter()
            .flatten()
            .map(|file| changed(&file.unwrap().path()))
            .max()
            .unwrap();
        if changed(&library) <= newest {
            let made = library.with_extension(std::process::id().to_string());
            let status = Command::new("c++")
                .args([
                    "-std=c++20",
                    "-O2",
                    "-march=native",
                    "-shared",
                    "-fPIC",
                    "-w",
                    "-o",
                ])
                .arg(&made)
                .arg(here.join("soft/device.cpp"))
                .status()
                .unwrap();
            assert!(status.success());
            fs::rename(made, &library).unwrap();
        }
        library
    })
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
