//! Where tests find the real model and the reference vectors.
//!
//! Nothing is fetched here: a missing file is a panic that says how to get it.

use std::{
    env,
    io::{self, Write},
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

/// What a variable names; a relative path counts from the root of the repository, wherever a test runs.
fn named(variable: &str) -> Option<PathBuf> {
    env::var_os(variable).map(|path| repository_root().join(path))
}

/// SmolLM2-135M-Instruct, Q4_1, as GGUF: `$IMPRINT_TEST_MODEL`, else where `imprint model pull` puts it.
///
/// # Panics
/// If the file is not there.
#[must_use]
pub fn smollm2_gguf() -> PathBuf {
    let path = named("IMPRINT_TEST_MODEL").unwrap_or_else(|| {
        let home = named("IMPRINT_HOME").unwrap_or_else(|| {
            let user =
                env::var_os("HOME").expect("HOME, IMPRINT_HOME or IMPRINT_TEST_MODEL is set");
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

/// The folder of the reference vectors: `$IMPRINT_GOLDEN_DIR`, else `../shared/golden` beside the
/// repository. `None`, and a line that says so, if nobody named one and the default is not there: the
/// vectors are no part of the repository.
///
/// # Panics
/// If `$IMPRINT_GOLDEN_DIR` is no folder.
#[must_use]
pub fn golden_dir() -> Option<PathBuf> {
    if let Some(path) = named("IMPRINT_GOLDEN_DIR") {
        assert!(
            path.is_dir(),
            "IMPRINT_GOLDEN_DIR: no folder at {}",
            path.display()
        );
        return Some(path);
    }
    found(repository_root().join("../shared/golden"))
}

/// The part of the reference vectors with that name, where the folder has it.
#[must_use]
pub fn golden_part(name: &str) -> Option<PathBuf> {
    found(golden_dir()?.join(name))
}

/// The folder of the associative form's vectors: `generator-smollm2` beside [`golden_dir`], else beside
/// the default one.
#[must_use]
pub fn associative_dir() -> Option<PathBuf> {
    let beside = golden_dir()?.join("../generator-smollm2");
    if beside.is_dir() {
        return Some(beside);
    }
    found(repository_root().join("../shared/generator-smollm2"))
}

fn found(path: PathBuf) -> Option<PathBuf> {
    if path.exists() {
        return Some(path);
    }
    report(&format!(
        "no reference vectors at {}: nothing compared",
        path.display()
    ));
    None
}

/// Writes a line that shows even where a test passes (the test harness holds back what is printed).
pub fn report(line: &str) {
    // A closed stderr is no reason to fail a test.
    let _ = writeln!(io::stderr(), "{line}");
}
