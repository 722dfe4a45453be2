//! The frames of a zstd file, one behind the other, as one stream of bytes.
//!
//! What is damaged is an error, never a shorter file. Start at [`Frames`].

use std::io::{self, BufRead, Read};

use ruzstd::decoding::{FrameDecoder, StreamingDecoder};

/// How a zstd frame begins.
pub(crate) const MAGIC: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];
/// The largest window of a frame, for which decoding takes a buffer of that size: what `zstd -d` decodes without an option, and
/// the largest that its `--ultra -22` and a plain `--long` write.
pub(crate) const MAX_WINDOW: u64 = 1 << 27;

/// Reads frame by frame; `None` once reading has failed.
pub(crate) struct Frames<R: BufRead>(Option<Source<R>>);

enum Source<R: BufRead> {
    /// Before a frame, or at the end.
    Between(R),
    Inside(Box<StreamingDecoder<R, FrameDecoder>>),
}

impl<R: BufRead> Frames<R> {
    pub(crate) fn new(source: R) -> Self {
        Self(Some(Source::Between(source)))
    }
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
