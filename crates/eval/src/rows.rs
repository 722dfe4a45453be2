//! JSON lines, compressed with zstd or not, one row at a time.
//!
//! A row that cannot be used is skipped and counted; too many of them mean a file of another task, which is refused. Knows no
//! task. Start at [`read`].

use std::{
    fs::File,
    io::{self, BufRead, BufReader, Read},
    path::Path,
};

use ruzstd::decoding::StreamingDecoder;

use crate::Error;

/// The longest row, in bytes.
const MAX_LINE: u64 = 1 << 26;
/// The most rows of a file.
const MAX_ROWS: usize = 1 << 24;
/// Decoding a frame takes a buffer of its window; zstd's highest level without `--ultra --long` writes 128 MiB.
const MAX_WINDOW: u64 = 1 << 28;
/// How a zstd frame begins.
const MAGIC: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];

/// What a file held.
#[derive(Debug)]
pub struct Rows<R> {
    /// The usable rows, in the order of the file.
    pub rows: Vec<R>,
    /// Rows that were skipped.
    pub malformed: usize,
    /// blake3 of the file as it lies on disk, in hex.
    pub digest: String,
}

/// Reads all rows of a file. `parse` makes one out of a line, or says why it cannot. A share of malformed rows above
/// `threshold` refuses the file, and so does a file without any usable row.
///
/// # Errors
/// [`Error::Io`], [`Error::Damaged`] or [`Error::Malformed`].
pub fn read<R>(
    path: &Path,
    threshold: f64,
    mut parse: impl FnMut(&str) -> Result<R, String>,
) -> Result<Rows<R>, Error> {
    let file = File::open(path).map_err(|source| Error::io(path, source))?;
    let mut digest = blake3::Hasher::new();
    digest
        .update_reader(&file)
        .map_err(|source| Error::io(path, source))?;
    let digest = digest.finalize().to_hex().to_string();

    let damaged = |detail: String| Error::Damaged {
        path: path.to_owned(),
        detail,
    };
    let mut lines = open(path)?;
    let (mut rows, mut malformed, mut count) = (Vec::new(), 0_usize, 0_usize);
    let mut first: Option<(usize, String)> = None;
    let mut line = Vec::new();
    loop {
        line.clear();
        let read = (&mut lines)
            .take(MAX_LINE + 1)
            .read_until(b'\n', &mut line)
            .map_err(|source| damaged(source.to_string()))?;
        if read == 0 {
            break;
        }
        if line.len() as u64 > MAX_LINE {
            return Err(damaged(format!("a line is longer than {MAX_LINE} bytes")));
        }
        count += 1;
        if count > MAX_ROWS {
            return Err(damaged(format!("more than {MAX_ROWS} rows")));
        }
        let parsed = match std::str::from_utf8(&line) {
            Ok(text) if text.trim().is_empty() => {
                count -= 1;
                continue;
            }
            Ok(text) => parse(text.trim()),
            Err(_) => Err("it is no UTF-8".to_owned()),
        };
        match parsed {
            Ok(row) => rows.push(row),
            Err(detail) => {
                malformed += 1;
                first.get_or_insert((count, cut(&detail)));
            }
        }
    }
    if count == 0 {
        return Err(damaged("it is empty".to_owned()));
    }
    #[expect(clippy::cast_precision_loss, reason = "row counts are far below 2^52")]
    let share = malformed as f64 / count as f64;
    if rows.is_empty() || share > threshold {
        let (line, detail) = first.unwrap_or_default();
        return Err(Error::Malformed {
            path: path.to_owned(),
            malformed,
            lines: count,
            threshold,
            line,
            detail,
        });
    }
    Ok(Rows {
        rows,
        malformed,
        digest,
    })
}

/// What is said of a row is told in a line, whatever was in the row.
fn cut(detail: &str) -> String {
    detail.chars().take(200).collect()
}

/// The lines of a file, decompressed if it is compressed.
fn open(path: &Path) -> Result<Box<dyn BufRead>, Error> {
    let file = File::open(path).map_err(|source| Error::io(path, source))?;
    let mut file = BufReader::with_capacity(1 << 16, file);
    let start = file.fill_buf().map_err(|source| Error::io(path, source))?;
    if !start.starts_with(&MAGIC) {
        return Ok(Box::new(file));
    }
    Ok(Box::new(BufReader::with_capacity(
        1 << 16,
        Frames {
            source: Some(Source::Between(file)),
        },
    )))
}

/// The frames of a zstd file, one behind the other.
struct Frames<R: BufRead> {
    /// None once reading has failed.
    source: Option<Source<R>>,
}

enum Source<R: Read> {
    /// Before a frame, or at the end.
    Between(R),
    Inside(Box<StreamingDecoder<R, ruzstd::decoding::FrameDecoder>>),
}

impl<R: BufRead> Read for Frames<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.source.take() {
                None => return Err(io::Error::other("the file is damaged")),
                Some(Source::Between(mut source)) => {
                    if source.fill_buf()?.is_empty() {
                        self.source = Some(Source::Between(source));
                        return Ok(0);
                    }
                    let decoder = StreamingDecoder::new_with_max_window_size(source, MAX_WINDOW)
                        .map_err(io::Error::other)?;
                    self.source = Some(Source::Inside(Box::new(decoder)));
                }
                Some(Source::Inside(mut decoder)) => {
                    let read = decoder.read(buffer)?;
                    if read > 0 {
                        self.source = Some(Source::Inside(decoder));
                        return Ok(read);
                    }
                    self.source = Some(Source::Between(decoder.into_inner()));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
