//! JSON lines, compressed with zstd or not, one row at a time.
//!
//! A row that cannot be used is skipped and counted; a larger share of them than allowed refuses the file. Knows no
//! task. Start at [`read`], which keeps nothing, or [`collect`], which keeps all.

mod error;
mod frames;

use std::{
    fs::File,
    io::{BufRead, BufReader, Read},
    path::Path,
};

use serde_json::{Map, Value};

pub use error::Error;

/// The longest row, in bytes.
const MAX_ROW: u64 = 1 << 26;
/// The most rows that are kept.
const MAX_KEPT: u64 = 1 << 24;

/// What a file held.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Count {
    /// Lines that are not blank.
    pub rows: u64,
    /// Those of them that were skipped.
    pub malformed: u64,
}

/// All of a file.
#[derive(Debug)]
pub struct Rows<R> {
    /// The usable rows, in the order of the file.
    pub rows: Vec<R>,
    /// Rows that were skipped.
    pub malformed: u64,
    /// blake3 of the file as it lies on disk.
    pub digest: blake3::Hash,
}

/// Hands every row of a file, a JSON object, to `take`, which says what is wrong with one that it cannot use. A share of such
/// rows above `allowed` (0 to 1) refuses the file, behind its end.
///
/// # Errors
/// [`Error::Io`], [`Error::Damaged`] or [`Error::Malformed`].
pub fn read(
    path: &Path,
    allowed: f64,
    mut take: impl FnMut(&Map<String, Value>) -> Result<(), String>,
) -> Result<Count, Error> {
    let lines = each(path, u64::MAX, |line| match serde_json::from_str(line) {
        Ok(Value::Object(row)) => take(&row),
        Ok(_) => Err("no JSON object".to_owned()),
        Err(error) => Err(error.to_string()),
    })?;
    lines.judged(path, allowed)
}

/// Keeps all rows of a file. `parse` makes one out of a line, or says why it cannot. A share of malformed rows above `allowed`
/// (0 to 1) refuses the file, and so does not a single usable one.
///
/// # Errors
/// [`Error::Io`], [`Error::Damaged`] or [`Error::Malformed`].
pub fn collect<R>(
    path: &Path,
    allowed: f64,
    mut parse: impl FnMut(&str) -> Result<R, String>,
) -> Result<Rows<R>, Error> {
    let digest = digest(path)?;
    let mut rows = Vec::new();
    let lines = each(path, MAX_KEPT, |line| {
        rows.push(parse(line)?);
        Ok(())
    })?;
    if lines.count.rows == 0 {
        return Err(Error::damaged(path, "it is empty"));
    }
    // No share that is allowed makes rows out of none: it is a file of something else.
    let allowed = if rows.is_empty() { 0.0 } else { allowed };
    let count = lines.judged(path, allowed)?;
    Ok(Rows {
        rows,
        malformed: count.malformed,
        digest,
    })
}

/// blake3 of a file as it lies on disk.
///
/// # Errors
/// [`Error::Io`].
pub fn digest(path: &Path) -> Result<blake3::Hash, Error> {
    let io = |source| Error::io(path, source);
    let mut hasher = blake3::Hasher::new();
    hasher
        .update_reader(File::open(path).map_err(io)?)
        .map_err(io)?;
    Ok(hasher.finalize())
}

/// The lines of a file, looked at.
struct Lines {
    count: Count,
    /// The first malformed one, from 1, and what is wrong with it.
    first: Option<(u64, String)>,
}

impl Lines {
    fn judged(self, path: &Path, allowed: f64) -> Result<Count, Error> {
        let Count { rows, malformed } = self.count;
        #[expect(clippy::cast_precision_loss, reason = "row counts are far below 2^52")]
        let too_many = malformed as f64 > allowed * rows as f64;
        match self.first {
            Some((first, detail)) if too_many => Err(Error::Malformed {
                path: path.to_owned(),
                malformed,
                rows,
                allowed,
                first,
                detail,
            }),
            Some(_) | None => Ok(self.count),
        }
    }
}

/// Hands the lines that are not blank to `take`, trimmed, at most `most` of them.
fn each(
    path: &Path,
    most: u64,
    mut take: impl FnMut(&str) -> Result<(), String>,
) -> Result<Lines, Error> {
    let (mut count, mut first) = (Count::default(), None);
    let mut source = open(path)?;
    let mut line = Vec::new();
    loop {
        line.clear();
        let read = (&mut source)
            .take(MAX_ROW + 1)
            .read_until(b'\n', &mut line)
            .map_err(|source| {
                Error::damaged(path, format!("behind row {}: {source}", count.rows))
            })?;
        if read == 0 {
            return Ok(Lines { count, first });
        }
        if read as u64 > MAX_ROW {
            let row = count.rows + 1;
            let detail = format!("row {row} is longer than {MAX_ROW} bytes");
            return Err(Error::damaged(path, detail));
        }
        let line = line.trim_ascii();
        if line.is_empty() {
            continue;
        }
        if count.rows == most {
            return Err(Error::damaged(path, format!("more than {most} rows")));
        }
        count.rows += 1;
        let taken = match std::str::from_utf8(line) {
            Ok(line) => take(line),
            Err(_) => Err("it is no UTF-8".to_owned()),
        };
        if let Err(detail) = taken {
            count.malformed += 1;
            // What is said of a row is told in a line, whatever was in the row.
            first.get_or_insert_with(|| (count.rows, detail.chars().take(200).collect()));
        }
    }
}

/// A file's bytes, decompressed if it is compressed.
fn open(path: &Path) -> Result<Box<dyn BufRead>, Error> {
    let io = |source| Error::io(path, source);
    let mut file = BufReader::with_capacity(1 << 16, File::open(path).map_err(io)?);
    if file.fill_buf().map_err(io)?.starts_with(&frames::MAGIC) {
        let frames = frames::Frames::new(file);
        return Ok(Box::new(BufReader::with_capacity(1 << 16, frames)));
    }
    Ok(Box::new(file))
}

#[cfg(test)]
mod tests;
