//! The budget of traces: what single tokens of complete and open documents wrote.
//!
//! A trace is a convenience: a document without one is still told, forgotten and meant, as a whole. So nothing is ever refused for want of
//! room; the document that does not fit goes on without a trace. Start at [`HeldTrace::push`].

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use generator::{Error, Generator, Trace, Window};

/// All traces of an engine.
#[derive(Clone, Debug)]
pub(crate) struct TraceBudget {
    used: Arc<AtomicUsize>,
    limit: usize,
}

/// A trace that counts. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct HeldTrace(Arc<Counted>);

#[derive(Debug)]
struct Counted {
    trace: Trace,
    bytes: usize,
    used: Arc<AtomicUsize>,
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.used.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

impl TraceBudget {
    /// Nothing held yet, and at most `limit` bytes.
    pub(crate) fn new(limit: usize) -> Self {
        Self {
            used: Arc::default(),
            limit,
        }
    }

    /// Bytes that are held.
    pub(crate) fn used(&self) -> usize {
        self.used.load(Ordering::Relaxed)
    }

    /// The trace of a document of which nothing is read; none if there is no room for any.
    pub(crate) fn begin(&self, generator: &Generator) -> Option<HeldTrace> {
        if self.used() >= self.limit {
            return None;
        }
        self.hold(generator.new_trace())
    }

    fn hold(&self, trace: Trace) -> Option<HeldTrace> {
        let bytes = trace.bytes();
        let used = Arc::clone(&self.used);
        if self.used().saturating_add(bytes) > self.limit {
            return None;
        }
        used.fetch_add(bytes, Ordering::Relaxed);
        Some(HeldTrace(Arc::new(Counted { trace, bytes, used })))
    }
}

impl HeldTrace {
    pub(crate) fn trace(&self) -> &Trace {
        &self.0.trace
    }

    pub(crate) fn bytes(&self) -> usize {
        self.0.bytes
    }

    /// With a further window of so many tokens; none if that does not fit.
    pub(crate) fn push(
        mut self,
        window: &Window,
        tokens: usize,
        budget: &TraceBudget,
    ) -> Result<Option<Self>, Error> {
        if let Some(own) = Arc::get_mut(&mut self.0) {
            own.trace.push(window, tokens)?;
            let bytes = own.trace.bytes();
            own.used.fetch_add(bytes - own.bytes, Ordering::Relaxed);
            own.bytes = bytes;
            return Ok((budget.used() <= budget.limit).then_some(self));
        }
        // A fork goes its own way.
        let mut trace = self.trace().clone();
        trace.push(window, tokens)?;
        Ok(budget.hold(trace))
    }
}
