//! What few tokens wrote, before it is in the sums: adding to sums costs their whole size, however few tokens it is for.
//!
//! The sums are one chain of additions over the tokens, so it changes no bit when they are added. Start at [`Gathered::push`].

use std::ops::Range;

use candle_core::{Device, Tensor};
use kernels::Floats;

use super::Sums;
use crate::error::Error;

/// Tokens that are gathered at most: a sixteenth of the sums of 256 keys.
const MOST: usize = 16;

/// Rows k [n, R1] and v [n, R2] of tokens, in order.
#[derive(Clone, Debug, Default)]
pub(super) struct Gathered {
    k: Vec<f32>,
    v: Vec<f32>,
    tokens: usize,
}

impl Gathered {
    pub(super) fn is_empty(&self) -> bool {
        self.tokens == 0
    }

    /// Takes the rows of `range`, if there is room for them; says whether there was. k [T, R1], v [T, R2].
    pub(super) fn push(
        &mut self,
        k: &Tensor,
        v: &Tensor,
        range: Range<usize>,
    ) -> Result<bool, Error> {
        if self.tokens + range.len() > MOST {
            return Ok(false);
        }
        for (all, rows) in [(&mut self.k, k), (&mut self.v, v)] {
            let rows = rows.narrow(0, range.start, range.len())?.contiguous()?; // [n, R]
            all.extend_from_slice(&Floats::of(&rows)?);
        }
        self.tokens += range.len();
        Ok(true)
    }

    /// Adds them to the sums.
    pub(super) fn settle(&mut self, sums: &mut Sums) -> Result<(), Error> {
        let Self { k, v, tokens } = std::mem::take(self);
        if tokens == 0 {
            return Ok(());
        }
        let rows = |values: Vec<f32>| {
            let width = values.len() / tokens;
            Tensor::from_vec(values, (tokens, width), &Device::Cpu)
        };
        sums.accumulate(&rows(k)?, &rows(v)?, 0..tokens) // [n, R1], [n, R2]
    }
}
