//! Where tests find the real model and the reference vectors.
//!
//! Nothing is fetched here: a missing file is a panic that says how to get it.

use std::{
    env,
    path::{Path, PathBuf},
};

/// The root folder of the repository.
#[must_use]
pub fn repository_root() -> PathBuf {
    let crates = Path::new(env!("CARGO_MANIFEST_DIR")).parent();
    let root = crates
        .and_then(Path::parent)
        .expect("testkit lies in crates/testkit");
    root.to_path_buf()
}

/// SmolLM2-135M-Instruct, Q4_1, as GGUF: `$IMPRINT_TEST_MODEL`, else where `imprint model pull` puts it.
///
/// # Panics
/// If the file is not there.
#[must_use]
pub fn smollm2_gguf() -> PathBuf {
    let path = env::var_os("IMPRINT_TEST_MODEL")
        .map(PathBuf::from)
        .unwrap_or_else(|| {
            let home = env::var_os("IMPRINT_HOME")
                .map(PathBuf::from)
                .unwrap_or_else(|| {
                    let user = env::var_os("HOME")
                        .expect("HOME, IMPRINT_HOME or IMPRINT_TEST_MODEL is set");
                    PathBuf::from(user).join(".cache/imprint")
                });
            home.join("models/smollm2-135m-instruct/SmolLM2-135M-Instruct.Q4_1.gguf")
        });
    assert!(
        path.is_file(),
        "the tests need the default model at {}: run `cargo run --release -- model pull`, or point IMPRINT_TEST_MODEL at it",
        path.display()
    );
    path
}

/// The reference vectors: `$IMPRINT_GOLDEN_DIR`, else `../shared/golden` beside the repository.
///
/// # Panics
/// If the folder is not there.
#[must_use]
pub fn golden_dir() -> PathBuf {
    let path = env::var_os("IMPRINT_GOLDEN_DIR")
        .map_or_else(|| repository_root().join("../shared/golden"), PathBuf::from);
    assert!(
        path.is_dir(),
        "no reference vectors at {}: set IMPRINT_GOLDEN_DIR",
        path.display()
    );
    path
}
