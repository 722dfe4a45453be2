//! JSON lines, compressed with zstd or not, one row at a time.
//!
//! A row that cannot be used is skipped and counted; a larger share of them than allowed refuses the file. Knows no
//! task and keeps nothing. Start at [`read`].

use std::{
    fs::File,
    io::{self, BufRead, BufReader, Read},
    path::Path,
};

use ruzstd::decoding::{FrameDecoder, StreamingDecoder};
use serde_json::{Map, Value};

use crate::Error;

/// The longest row, in bytes.
const MAX_ROW: u64 = 1 << 26;
/// The largest window of a zstd frame that is decoded: as zstd writes without `--ultra --long`.
const MAX_WINDOW: u64 = 1 << 27;
/// How a zstd frame begins.
const MAGIC: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];

/// What a file held.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Count {
    pub(crate) rows: u64,
    pub(crate) malformed: u64,
}

/// Hands every row of a file to `take`, which says what is wrong with one that it cannot use.
pub(crate) fn read(
    path: &Path,
    allowed: f64,
    mut take: impl FnMut(&Map<String, Value>) -> Result<(), String>,
) -> Result<Count, Error> {
    let damaged = |detail: String| Error::Damaged {
        path: path.to_owned(),
        detail,
    };
    let mut lines = open(path)?;
    let (mut count, mut first) = (Count::default(), None);
    let mut line = Vec::new();
    loop {
        line.clear();
        let read = (&mut lines)
            .take(MAX_ROW + 1)
            .read_until(b'\n', &mut line)
            .map_err(|source| damaged(format!("behind row {}: {source}", count.rows)))?;
        if read == 0 {
            break;
        }
        if read as u64 > MAX_ROW {
            return Err(damaged(format!(
                "row {} is longer than {MAX_ROW} bytes",
                count.rows + 1
            )));
        }
        if line.trim_ascii().is_empty() {
            continue;
        }
        count.rows += 1;
        let taken = match serde_json::from_slice(&line) {
            Ok(Value::Object(row)) => take(&row),
            Ok(_) => Err("no JSON object".to_owned()),
            Err(error) => Err(error.to_string()),
        };
        if let Err(detail) = taken {
            count.malformed += 1;
            first.get_or_insert((count.rows, detail.chars().take(200).collect::<String>()));
        }
    }
    if let Some((first, detail)) = first
        && (count.malformed as f64 > allowed * count.rows as f64)
    {
        return Err(Error::Malformed {
            path: path.to_owned(),
            malformed: count.malformed,
            rows: count.rows,
            allowed,
            first,
            detail,
        });
    }
    Ok(count)
}

/// blake3 of the file as it lies on disk.
pub(crate) fn digest(path: &Path) -> Result<blake3::Hash, Error> {
    let io = |source| Error::io(path, source);
    let mut hasher = blake3::Hasher::new();
    hasher
        .update_reader(File::open(path).map_err(io)?)
        .map_err(io)?;
    Ok(hasher.finalize())
}

fn open(path: &Path) -> Result<Box<dyn BufRead>, Error> {
    let io = |source| Error::io(path, source);
    let mut file = BufReader::with_capacity(1 << 16, File::open(path).map_err(io)?);
    if file.fill_buf().map_err(io)?.starts_with(&MAGIC) {
        let frames = Frames(Some(Source::Between(file)));
        return Ok(Box::new(BufReader::with_capacity(1 << 16, frames)));
    }
    Ok(Box::new(file))
}

/// The frames of a zstd file, one behind the other; `None` once reading has failed.
struct Frames<R: BufRead>(Option<Source<R>>);

enum Source<R: BufRead> {
    Between(R),
    Inside(Box<StreamingDecoder<R, FrameDecoder>>),
}

impl<R: BufRead> Read for Frames<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if buffer.is_empty() {
            return Ok(0);
        }
        loop {
            match self.0.take() {
                None => return Err(io::Error::other("reading has failed before")),
                Some(Source::Between(mut rest)) => {
                    if rest.fill_buf()?.is_empty() {
                        self.0 = Some(Source::Between(rest));
                        return Ok(0);
                    }
                    let decoder = StreamingDecoder::new_with_max_window_size(rest, MAX_WINDOW);
                    let decoder = Box::new(decoder.map_err(io::Error::other)?);
                    self.0 = Some(Source::Inside(decoder));
                }
                Some(Source::Inside(mut decoder)) => match decoder.read(buffer)? {
                    0 => self.0 = Some(Source::Between(decoder.into_inner())),
                    read => {
                        self.0 = Some(Source::Inside(decoder));
                        return Ok(read);
                    }
                },
            }
        }
    }
}

#[cfg(test)]
mod tests;
