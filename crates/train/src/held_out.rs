//! What must never be trained on: texts of evaluation files, known by their hashes.
//!
//! A text is compared as its letters and digits in lower case, so that spacing and punctuation hide nothing. Start at
//! [`HeldOut::of`].

use std::{
    collections::{HashMap, HashSet},
    fs,
    path::{Path, PathBuf},
};

use serde_json::Value;

use crate::Error;

/// Texts shorter than this, in letters and digits, say nothing: "what is it?" is in every file.
const SHORTEST: usize = 24;
/// Deepest nesting of a row that is looked into.
const DEEPEST: usize = 8;

/// Texts and files that are held out.
#[derive(Debug, Default)]
pub(crate) struct HeldOut {
    texts: HashSet<[u8; 16]>,
    files: HashMap<blake3::Hash, PathBuf>,
}

impl HeldOut {
    /// All JSON lines of a folder. `None`: nothing is held out.
    pub(crate) fn of(folder: Option<&Path>) -> Result<Self, Error> {
        let mut held_out = Self::default();
        let Some(folder) = folder else {
            return Ok(held_out);
        };
        let io = |source| Error::io(folder, source);
        let mut paths = Vec::new();
        for entry in fs::read_dir(folder).map_err(io)? {
            let path = entry.map_err(io)?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            if name.ends_with(".jsonl") || name.ends_with(".jsonl.zst") {
                paths.push(path);
            }
        }
        paths.sort();
        if paths.is_empty() {
            return Err(Error::NoData {
                what: "evaluation files",
                detail: format!("{} has no .jsonl or .jsonl.zst", folder.display()),
            });
        }
        for path in paths {
            rows::read(&path, 1.0, |row| {
                row.values().for_each(|value| held_out.add(value, DEEPEST));
                Ok(())
            })?;
            held_out.files.insert(rows::digest(&path)?, path);
        }
        Ok(held_out)
    }

    fn add(&mut self, value: &Value, deeper: usize) {
        match value {
            Value::String(text) => self.texts.extend(hash(text)),
            Value::Array(values) if deeper > 0 => {
                values.iter().for_each(|value| self.add(value, deeper - 1));
            }
            Value::Object(values) if deeper > 0 => {
                values
                    .values()
                    .for_each(|value| self.add(value, deeper - 1));
            }
            _ => {}
        }
    }

    /// Whether the text, normalised, occurs in an evaluation file.
    pub(crate) fn has(&self, text: &str) -> bool {
        hash(text).is_some_and(|hash| self.texts.contains(&hash))
    }

    /// Refuses a file that is one of the evaluation files.
    pub(crate) fn refuse(&self, path: &Path, digest: &blake3::Hash) -> Result<(), Error> {
        match self.files.get(digest) {
            Some(file) => Err(Error::HeldOut {
                path: path.to_owned(),
                detail: format!("it is the evaluation file {}", file.display()),
            }),
            None => Ok(()),
        }
    }

    /// Refuses a file most of whose rows are held out.
    pub(crate) fn refuse_share(&self, path: &Path, dropped: u64, rows: u64) -> Result<(), Error> {
        if dropped > 0 && 2 * dropped >= rows {
            return Err(Error::HeldOut {
                path: path.to_owned(),
                detail: format!("{dropped} of its {rows} rows occur in evaluation files"),
            });
        }
        Ok(())
    }

    /// Digest of what is held out.
    pub(crate) fn digest(&self) -> blake3::Hash {
        let mut files: Vec<_> = self.files.keys().map(blake3::Hash::as_bytes).collect();
        files.sort_unstable();
        let mut hasher = blake3::Hasher::new();
        for file in files {
            hasher.update(file);
        }
        hasher.finalize()
    }
}

/// `None` for a text that is too short to be known by.
fn hash(text: &str) -> Option<[u8; 16]> {
    let normal: String = text
        .chars()
        .filter(|c| c.is_alphanumeric())
        .flat_map(char::to_lowercase)
        .collect();
    if normal.chars().count() < SHORTEST {
        return None;
    }
    blake3::hash(normal.as_bytes())
        .as_bytes()
        .first_chunk()
        .copied()
}

#[cfg(test)]
mod tests;
