//! Traces: what single tokens of a document wrote, kept so that the state of any of them can be made again.
//!
//! A state is a sum; nothing can be taken out of it again. What goes into it are one key and one value a token and site, and these are
//! few: R1 + R2 values, against R1 R2 (and R1 R1) for the sums, so that a sentence costs less than the sums that it ends in. They are
//! kept in bf16: a state of them is that of the tokens up to this rounding. Start at [`Trace`].

use std::ops::Range;

use candle_core::{Device, Tensor};
use half::{bf16, slice::HalfFloatSliceExt};
use kernels::Floats;

use crate::{
    error::Error,
    state::{Keeps, State, Sums, Window},
};

/// What tokens wrote at one site, row after row.
#[derive(Clone, Debug, Default)]
pub(crate) struct Rows {
    /// [n, R1]
    pub(crate) k: Vec<bf16>,
    /// [n, R2]
    pub(crate) v: Vec<bf16>,
}

impl Rows {
    /// Adds the rows of `range`. k [T, R1], v [T, R2].
    pub(crate) fn push(
        &mut self,
        k: &Tensor,
        v: &Tensor,
        range: Range<usize>,
    ) -> Result<(), Error> {
        for (kept, rows) in [(&mut self.k, k), (&mut self.v, v)] {
            let rows = rows.narrow(0, range.start, range.len())?.contiguous()?;
            let rows = Floats::of(&rows)?;
            let start = kept.len();
            kept.resize(start + rows.len(), bf16::ZERO);
            kept[start..].convert_from_f32_slice(&rows);
        }
        Ok(())
    }
}

/// What the tokens of a document wrote, at every site.
#[derive(Clone, Debug)]
pub struct Trace {
    sites: Vec<Rows>,
    /// Of each row, the token's index in the document, ascending.
    tokens: Vec<usize>,
    /// Tokens of the windows so far.
    length: usize,
    /// Whether a window's first token writes nothing.
    skip_first: bool,
}

impl Trace {
    pub(crate) fn new(sites: usize, skip_first: bool) -> Self {
        Self {
            sites: vec![Rows::default(); sites],
            tokens: Vec::new(),
            length: 0,
            skip_first,
        }
    }

    /// Rows of its sites, the tokens they are of, tokens of its windows, and whether a window's first token writes nothing.
    pub(crate) fn parts(&self) -> (&[Rows], &[usize], usize, bool) {
        (&self.sites, &self.tokens, self.length, self.skip_first)
    }

    pub(crate) fn of_parts(
        sites: Vec<Rows>,
        tokens: Vec<usize>,
        length: usize,
        skip_first: bool,
    ) -> Self {
        Self {
            sites,
            tokens,
            length,
            skip_first,
        }
    }

    /// Adds what a traced window of so many tokens has kept. One of [`crate::Generator::new_window`] has kept nothing: its tokens are
    /// counted and add nothing.
    ///
    /// # Errors
    /// [`Error::Foreign`] for a window of another generator; the trace is as it was.
    pub fn push(&mut self, window: &Window, tokens: usize) -> Result<(), Error> {
        let sites = window.sites();
        let rows: Vec<&Rows> = sites.iter().filter_map(|site| site.rows.as_ref()).collect();
        if sites.len() != self.sites.len() {
            return Err(Error::Foreign {
                detail: format!("{} sites, not {}", sites.len(), self.sites.len()),
            });
        }
        let start = self.length;
        self.length += tokens;
        if rows.len() < sites.len() {
            return Ok(());
        }
        for (mine, theirs) in self.sites.iter_mut().zip(rows) {
            mine.k.extend_from_slice(&theirs.k);
            mine.v.extend_from_slice(&theirs.v);
        }
        let first = start + usize::from(self.skip_first);
        self.tokens.extend(first..first + window.writes());
        Ok(())
    }

    /// Bytes that it takes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        let rows = |site: &Rows| (site.k.len() + site.v.len()) * size_of::<bf16>();
        self.sites.iter().map(rows).sum::<usize>() + size_of_val(self.tokens.as_slice())
    }

    /// Rows of the tokens of some ranges, each run of neighbours as one range, ascending.
    fn rows(&self, tokens: &[Range<usize>]) -> Vec<Range<usize>> {
        let mut runs: Vec<Range<usize>> = Vec::new();
        for (row, token) in self.tokens.iter().enumerate() {
            if !tokens.iter().any(|range| range.contains(token)) {
                continue;
            }
            match runs.last_mut() {
                Some(run) if run.end == row => run.end = row + 1,
                _ => runs.push(row..row + 1),
            }
        }
        runs
    }

    pub(crate) fn recall(
        &self,
        keeps: impl Iterator<Item = Keeps>,
        tokens: &[Range<usize>],
    ) -> Result<State, Error> {
        let runs = self.rows(tokens);
        let keeps: Vec<Keeps> = keeps.collect();
        if keeps.len() != self.sites.len() {
            return Err(Error::Foreign {
                detail: format!("a trace of {} sites, not {}", self.sites.len(), keeps.len()),
            });
        }
        let mut sites = Vec::with_capacity(keeps.len());
        for (rows, keeps) in self.sites.iter().zip(keeps) {
            let width = (keeps.r1, keeps.r2);
            if (rows.k.len(), rows.v.len())
                != (self.tokens.len() * width.0, self.tokens.len() * width.1)
            {
                return Err(Error::Foreign {
                    detail: format!(
                        "a trace whose rows are not {} and {} wide",
                        width.0, width.1
                    ),
                });
            }
            let mut sums = Sums::new(keeps)?;
            for run in &runs {
                let k = floats(&rows.k, run, width.0)?; // [n, R1]
                let v = floats(&rows.v, run, width.1)?; // [n, R2]
                sums.accumulate(&k, &v, 0..run.len())?;
            }
            sites.push(sums);
        }
        let writes = runs.iter().map(|run| run.len() as u64).sum();
        Ok(State::from_sums(sites, writes))
    }
}

/// Some rows as a tensor [n, width].
fn floats(values: &[bf16], rows: &Range<usize>, width: usize) -> Result<Tensor, Error> {
    let values = &values[rows.start * width..rows.end * width];
    let values = values.to_f32_vec();
    Ok(Tensor::from_vec(values, (rows.len(), width), &Device::Cpu)?)
}

#[cfg(test)]
mod tests;
