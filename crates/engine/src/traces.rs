//! The budget of traces: what single tokens of complete and open documents wrote.
//!
//! A trace is a convenience: a document without one is still told, forgotten and meant, as a whole. So nothing is ever refused for want of
//! room; the document that does not fit goes on without a trace. Start at [`HeldTrace::push`].

use generator::{Error, Generator, Trace, Window};

use crate::budget::{Budget, Held};

/// All traces of an engine.
#[derive(Debug)]
pub(crate) struct TraceBudget(Budget);

/// A trace that counts.
pub(crate) type HeldTrace = Held<Trace>;

impl TraceBudget {
    /// Nothing held yet, and at most `limit` bytes.
    pub(crate) fn new(limit: usize) -> Self {
        Self(Budget::new(limit))
    }

    /// Bytes that are held.
    pub(crate) fn used(&self) -> usize {
        self.0.used()
    }

    /// The trace of a document of which nothing is read; none if there is no room for any.
    pub(crate) fn begin(&self, generator: &Generator) -> Option<HeldTrace> {
        if self.used() >= self.0.limit() {
            return None;
        }
        self.hold(generator.new_trace())
    }

    /// Holds a trace that was there before, whether it fits or not: a session that was away is as it was.
    pub(crate) fn hold_anyway(&self, trace: Trace) -> HeldTrace {
        let bytes = trace.bytes();
        self.0.hold(trace, bytes)
    }

    /// Bytes that may be held.
    pub(crate) fn limit(&self) -> usize {
        self.0.limit()
    }

    fn hold(&self, trace: Trace) -> Option<HeldTrace> {
        let bytes = trace.bytes();
        (self.used().saturating_add(bytes) <= self.0.limit()).then(|| self.0.hold(trace, bytes))
    }
}

impl HeldTrace {
    pub(crate) fn trace(&self) -> &Trace {
        self.value()
    }

    /// With a further window of so many tokens; none if that does not fit, unless it was there before.
    pub(crate) fn push(
        mut self,
        window: &Window,
        tokens: usize,
        budget: &TraceBudget,
        before: bool,
    ) -> Result<Option<Self>, Error> {
        if let Some(own) = self.own() {
            own.push(window, tokens)?;
            let bytes = own.bytes();
            self.recount(bytes);
            return Ok((before || budget.used() <= budget.0.limit()).then_some(self));
        }
        // A fork goes its own way.
        let mut trace = self.trace().clone();
        trace.push(window, tokens)?;
        if before {
            return Ok(Some(budget.hold_anyway(trace)));
        }
        Ok(budget.hold(trace))
    }
}
