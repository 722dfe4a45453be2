//! Tokens drawn where their logits lie.
//!
//! How is told by [`Draw`]; what it means is `engine::sampling`'s, and the twin's.

use super::{fits, holds, of};
use crate::{Device, Error, Kernel, View};

/// How a row's token is drawn.
#[derive(Clone, Copy, Debug)]
pub struct Draw {
    /// 0 takes the likeliest token, the lowest id among equals.
    pub temperature: f32,
    /// Only the so many likeliest tokens; 0: all.
    pub top_k: u32,
    /// Only the likeliest tokens that together reach this probability; 1: all.
    pub top_p: f32,
    /// Only tokens at least this fraction as likely as the likeliest; 0: all.
    pub min_p: f32,
    /// Divides positive and multiplies negative logits of tokens that are marked as seen; 1: none.
    pub penalty: f32,
    /// The random number that decides, in [0, 1).
    pub point: f64,
    /// Whether the token's log-probability is wanted, before penalty, temperature and filters.
    pub logprob: bool,
}

impl Draw {
    /// Words of a draw on the device.
    pub(crate) const WORDS: usize = 8;

    /// The likeliest token.
    pub fn greedy() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            penalty: 1.0,
            point: 0.0,
            logprob: false,
        }
    }

    /// As kernels/draw.cu reads it.
    pub fn words(&self) -> [u32; Self::WORDS] {
        let point = self.point.to_bits();
        [
            1 | u32::from(self.logprob) << 1,
            self.temperature.to_bits(),
            self.top_k,
            self.top_p.to_bits(),
            self.min_p.to_bits(),
            self.penalty.to_bits(),
            point as u32,
            (point >> 32) as u32,
        ]
    }
}

/// Words that have a bit for each of so many tokens.
pub fn seen_words(vocab: usize) -> usize {
    vocab.div_ceil(32)
}

/// out `[T]` tokens and logprobs `[T]`, as the draws [T, 8] want them, of logits [T, V]; seen [T, ceil(V / 32)] has the bits of the tokens
/// that penalties are for. Rows whose words are zeros are left alone.
///
/// # Errors
/// [`Error::Shape`], [`Error::Call`].
#[expect(
    clippy::too_many_arguments,
    reason = "operands and sizes of one kernel"
)]
pub fn draw(
    device: &Device,
    out: View<'_, u32>,
    logprobs: View<'_, f32>,
    logits: View<'_, f32>,
    draws: View<'_, u32>,
    seen: View<'_, u32>,
    rows: usize,
    vocab: usize,
) -> Result<(), Error> {
    holds("out", out, rows)?;
    holds("logprobs", logprobs, rows)?;
    holds("logits", logits, rows * vocab)?;
    holds("draws", draws, rows * Draw::WORDS)?;
    holds("seen", seen, rows * seen_words(vocab))?;
    fits(vocab > 0, || "a vocabulary of nothing".into())?;
    let arguments = [
        out.argument(),
        logprobs.argument(),
        logits.argument(),
        draws.argument(),
        seen.argument(),
        of(vocab)?,
    ];
    device.launch(Kernel::Draw, [rows, 1, 1], 1024, 0, &arguments)
}
