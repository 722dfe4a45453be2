//! Where figures go: standard output, or a file of JSON.
//!
//! Start at [`write_json`].

use std::{
    fs,
    io::{self, Write},
    path::Path,
};

use anyhow::{Context, Result};
use serde::Serialize;

/// Writes figures to a file; `-` is standard output.
pub(crate) fn write_json(path: &Path, value: &impl Serialize) -> Result<()> {
    let text = serde_json::to_string_pretty(value)? + "\n";
    if path == Path::new("-") {
        return print(&text);
    }
    fs::write(path, text).with_context(|| format!("{} cannot be written", path.display()))
}

/// Prints a text.
pub(crate) fn print(text: &str) -> Result<()> {
    io::stdout()
        .lock()
        .write_all(text.as_bytes())
        .context("standard output is gone")
}

/// Where one is told how far a measurement is: beside JSON, standard error.
pub(crate) fn progress(json: Option<&Path>) -> Box<dyn Write> {
    match json {
        Some(_) => Box::new(io::stderr()),
        None => Box::new(io::stdout()),
    }
}
