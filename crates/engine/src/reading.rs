//! Reading: how far a document has been encoded, and what it has written so far.
//!
//! Closed windows are summed in the state, the open one has its own sums and its KV in the session's blocks. A provisional
//! end is a copy of a reading that is thrown away. Start at [`Reading`].

use generator::{Error, Generator, State, Window};

use crate::{
    cores::HeldCore,
    digest::{DocumentHash, DocumentName},
    ids::TokenId,
    traces::{HeldTrace, TraceBudget},
};

/// How far a document has been read.
#[derive(Debug)]
pub(crate) struct Reading {
    /// Sums of the closed windows.
    pub(crate) state: State,
    /// Sums of the open window.
    pub(crate) sums: Window,
    /// First token of the open window in its document.
    pub(crate) start: usize,
    /// Tokens of the open window that have passed.
    pub(crate) len: usize,
    /// Of these the first so many have their KV in the session's blocks.
    pub(crate) cached: usize,
    /// What the open window is read with, once `ready`; none is the bare model.
    pub(crate) core: Option<HeldCore>,
    /// Whether `core` is known.
    pub(crate) ready: bool,
    /// Of the tokens that have passed.
    pub(crate) hash: DocumentHash,
    /// The document as if it ended with its closed windows.
    pub(crate) closed: DocumentName,
    /// What the tokens of the closed windows wrote, if that is kept.
    pub(crate) trace: Option<HeldTrace>,
    /// Whether it had that trace before it left memory.
    pub(crate) before: bool,
}

impl Reading {
    /// Nothing read; what tokens write is kept in `trace`, if there is one.
    pub(crate) fn new(generator: &Generator, trace: Option<HeldTrace>) -> Result<Self, Error> {
        Ok(Self {
            state: generator.new_state()?,
            sums: window(generator, trace.is_some())?,
            start: 0,
            len: 0,
            cached: 0,
            core: None,
            ready: false,
            hash: DocumentHash::default(),
            closed: DocumentHash::default().name(),
            trace,
            before: false,
        })
    }

    /// Tokens of the document that have passed.
    pub(crate) fn position(&self) -> usize {
        self.start + self.len
    }

    /// An independent copy over the same KV.
    pub(crate) fn try_clone(&self) -> Result<Self, Error> {
        Ok(Self {
            state: self.state.try_clone()?,
            sums: self.sums.try_clone()?,
            start: self.start,
            len: self.len,
            cached: self.cached,
            core: self.core.clone(),
            ready: self.ready,
            hash: self.hash.clone(),
            closed: self.closed,
            trace: self.trace.clone(),
            before: self.before,
        })
    }

    /// Takes note that the next tokens have written and have their KV.
    pub(crate) fn passed(&mut self, tokens: &[TokenId]) {
        self.len += tokens.len();
        self.cached = self.len;
        self.hash.push(tokens);
    }

    /// The sums as if the document ended here: those of its closed windows, then the open one's. A window of fewer than
    /// `least` tokens has written nothing and adds nothing.
    pub(crate) fn folded(&self, least: usize) -> Result<State, Error> {
        let mut state = self.state.try_clone()?;
        if self.len >= least {
            state.add_window(&self.sums, 1.0)?;
        }
        Ok(state)
    }

    /// Closes the open window and opens the next.
    pub(crate) fn close_window(
        &mut self,
        generator: &Generator,
        least: usize,
        traces: &TraceBudget,
    ) -> Result<(), Error> {
        self.sums.settle()?;
        if let Some(trace) = self.trace.take() {
            self.trace = trace.push(&self.sums, self.len, traces, self.before)?;
        }
        if self.len >= least {
            self.state.add_window(&self.sums, 1.0)?;
        }
        self.sums = window(generator, self.trace.is_some())?;
        self.closed = self.hash.name();
        self.start = self.position();
        (self.len, self.cached) = (0, 0);
        (self.core, self.ready) = (None, false);
        Ok(())
    }
}

fn window(generator: &Generator, traced: bool) -> Result<Window, Error> {
    let window = if traced {
        generator.new_traced_window()?
    } else {
        generator.new_window()?
    };
    Ok(window.gathering())
}
