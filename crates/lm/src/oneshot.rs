//! A whole context or a whole prompt at once, without an engine: for tests, evaluation and training.
//!
//! Brings its own cache for each call. Start at [`Lm::encode`].

use candle_core::Tensor;
use generator::{Core, State, Strategy, Trace, windows};

use crate::{Error, KvCache, Lm, Row, TokenId};

/// How a context of known length is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Windows {
    /// Windows of so many tokens from the start on, as a stream cuts them.
    Fixed(usize),
    /// The fewest windows of at most so many tokens, all of one length but the last.
    Equalised(usize),
}

/// Windows that bare rows read together share a forward up to so many tokens.
const BATCH_TOKENS: usize = 1024;
const BLOCK_TOKENS: usize = 32;

impl Lm {
    /// The state of a context. `Concat` is one window whatever `cut` says; `Parallel` reads each window with the
    /// bare model, `Sequential` with the core of the windows before it. A BOS, if wanted, is the caller's to add.
    ///
    /// # Errors
    /// [`Error::NoGenerator`] without a generator, else what [`Lm::forward`] says of a row.
    pub fn encode(
        &self,
        context: &[TokenId],
        strategy: Strategy,
        cut: Windows,
    ) -> Result<State, Error> {
        self.read(context, strategy, cut, None)
    }

    /// The same with what each token wrote.
    ///
    /// # Errors
    /// As [`Lm::encode`].
    pub fn encode_traced(
        &self,
        context: &[TokenId],
        strategy: Strategy,
        cut: Windows,
    ) -> Result<(State, Trace), Error> {
        let generator = self.generator().ok_or(Error::NoGenerator { row: 0 })?;
        let mut trace = generator.new_trace();
        let state = self.read(context, strategy, cut, Some(&mut trace))?;
        Ok((state, trace))
    }

    fn read(
        &self,
        context: &[TokenId],
        strategy: Strategy,
        cut: Windows,
        mut trace: Option<&mut Trace>,
    ) -> Result<State, Error> {
        let generator = self.generator().ok_or(Error::NoGenerator { row: 0 })?;
        let length = context.len();
        let ranges: Vec<_> = match (strategy, cut) {
            (Strategy::Concat, _) => windows::fixed(length, length).collect(),
            (Strategy::Parallel | Strategy::Sequential, Windows::Fixed(window)) => {
                windows::fixed(length, window).collect()
            }
            (Strategy::Parallel | Strategy::Sequential, Windows::Equalised(window)) => {
                windows::equalised(length, window).collect()
            }
        };
        let spans: Vec<&[TokenId]> = ranges.into_iter().map(|range| &context[range]).collect();
        let mut state = generator.new_state()?;
        match strategy {
            Strategy::Concat | Strategy::Parallel => {
                let longest = spans.iter().map(|span| span.len()).max().unwrap_or(1);
                for group in spans.chunks((BATCH_TOKENS / longest).max(1)) {
                    self.read_windows(group, None, &mut state, trace.as_deref_mut())?;
                }
            }
            Strategy::Sequential => {
                for span in &spans {
                    let core = generator.read_out(&state)?;
                    self.read_windows(
                        std::slice::from_ref(span),
                        Some(&core),
                        &mut state,
                        trace.as_deref_mut(),
                    )?;
                }
            }
        }
        Ok(state)
    }

    /// Reads whole windows in one forward and adds them to the state.
    fn read_windows(
        &self,
        spans: &[&[TokenId]],
        core: Option<&Core>,
        state: &mut State,
        mut trace: Option<&mut Trace>,
    ) -> Result<(), Error> {
        let generator = self.generator().ok_or(Error::NoGenerator { row: 0 })?;
        let tables = block_tables(spans);
        let kv = KvCache::new(
            self.config(),
            tables.iter().map(Vec::len).sum(),
            BLOCK_TOKENS,
        )?;
        let mut open = spans
            .iter()
            .map(|_| match trace {
                Some(_) => generator.new_traced_window(),
                None => generator.new_window(),
            })
            .collect::<Result<Vec<_>, _>>()?;
        let mut rows: Vec<Row<'_>> = Vec::with_capacity(spans.len());
        for ((tokens, blocks), window) in spans.iter().zip(&tables).zip(&mut open) {
            rows.push(Row {
                tokens,
                position: 0,
                blocks,
                core,
                scale: 1.0,
                window: Some(window),
                lookahead: None,
                logits: 0,
            });
        }
        self.forward(&mut rows, &kv)?;
        for (window, tokens) in open.iter().zip(spans) {
            state.add_window(window, 1.0)?;
            if let Some(trace) = &mut trace {
                trace.push(window, tokens.len())?;
            }
        }
        Ok(())
    }

    /// Logits at every token, [T, V].
    ///
    /// # Errors
    /// What [`Lm::forward`] says of the row.
    pub fn logits(
        &self,
        tokens: &[TokenId],
        core: Option<&Core>,
        scale: f32,
    ) -> Result<Tensor, Error> {
        let (logits, _) = self.run(tokens, core, scale)?;
        Ok(logits)
    }

    /// The input of each decoder layer and, last, that of the head (behind the final norm), [T, D] each.
    ///
    /// # Errors
    /// What [`Lm::forward`] says of the row.
    pub fn hidden_states(
        &self,
        tokens: &[TokenId],
        core: Option<&Core>,
        scale: f32,
    ) -> Result<Vec<Tensor>, Error> {
        let (_, hidden) = self.run(tokens, core, scale)?;
        Ok(hidden)
    }

    fn run(
        &self,
        tokens: &[TokenId],
        core: Option<&Core>,
        scale: f32,
    ) -> Result<(Tensor, Vec<Tensor>), Error> {
        let tables = block_tables(&[tokens]);
        let kv = KvCache::new(
            self.config(),
            tables.iter().map(Vec::len).sum::<usize>().max(1),
            BLOCK_TOKENS,
        )?;
        let mut hidden = Vec::with_capacity(self.config().layers + 1);
        let mut rows: Vec<Row<'_>> = Vec::with_capacity(1);
        for blocks in &tables {
            rows.push(Row {
                tokens,
                position: 0,
                blocks,
                core,
                scale,
                window: None,
                lookahead: None,
                logits: tokens.len(),
            });
        }
        let output = self.forward_traced(&mut rows, &kv, Some(&mut hidden))?;
        let logits = output.logits.ok_or(Error::EmptyRow { row: 0 })?; // [T, V]
        Ok((logits, hidden))
    }
}

/// Blocks for each span, none shared.
fn block_tables(spans: &[&[TokenId]]) -> Vec<Vec<u32>> {
    let mut next = 0;
    let mut table = |span: &&[TokenId]| {
        let first = next;
        next += span.len().div_ceil(BLOCK_TOKENS) as u32;
        (first..next).collect()
    };
    spans.iter().map(&mut table).collect()
}
