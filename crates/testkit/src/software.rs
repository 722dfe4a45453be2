//! The device without a GPU that `crates/cuda` brings along, compiled.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::OnceLock,
    time::SystemTime,
};

use crate::repository_root;

/// The software device as a library in `folder` (a test's `CARGO_TARGET_TMPDIR`), compiled where its text is newer.
///
/// # Panics
/// Without a C++ compiler.
pub fn software_device(folder: &Path) -> &'static Path {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(|| {
        let here = repository_root().join("crates/cuda");
        let library = folder.join("libcuda_software.so");
        let changed = |path: &Path| {
            let data = fs::metadata(path).and_then(|data| data.modified());
            data.unwrap_or(SystemTime::UNIX_EPOCH)
        };
        let texts = ["kernels", "soft"]
            .map(|text| fs::read_dir(here.join(text)).expect("crates/cuda has the kernels' text"));
        let newest = texts
            .into_iter()
            .flatten()
            .filter_map(Result::ok)
            .map(|file| changed(&file.path()))
            .max();
        if newest.is_none_or(|newest| changed(&library) <= newest) {
            // Several test binaries may do it at once.
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
                .expect("a C++ compiler is there");
            assert!(status.success(), "the software device compiles");
            fs::rename(made, &library).expect("the library can be put in its place");
        }
        library
    })
}

/// cuBLAS of a machine with a GPU that tests are to run on: `$IMPRINT_TEST_CUBLAS`.
#[must_use]
pub fn cublas() -> Option<PathBuf> {
    std::env::var_os("IMPRINT_TEST_CUBLAS").map(PathBuf::from)
}
