//! Reading: which tokens run next, what they need, and what has become of them.
//!
//! Start at [`Session::wants`].

use generator::Strategy;

use super::{Asks, Barrier, Context, Session, Tail};
use crate::{
    blocks::BlockAllocator,
    cores::{HeldCore, Slot},
    document::Place,
    event::Event,
    reading::Reading,
};

impl Session {
    /// Gives everything back that it holds of the cache.
    pub(crate) fn evict(&mut self, allocator: &mut BlockAllocator) {
        allocator.release(&mut self.blocks);
        for reading in self
            .reading
            .iter_mut()
            .chain(self.tail.as_mut().map(|tail| &mut tail.reading))
        {
            reading.cached = 0;
        }
    }

    /// How many tokens could run next, if any.
    pub(crate) fn wants(&self) -> Option<usize> {
        self.next().map(|(_, count)| count)
    }

    /// What is read next: the index in the document of the first token to run, and how many may run from there in one row. These
    /// are tokens whose KV is missing while more of their window is to be read, else unread ones.
    pub(super) fn next(&self) -> Option<(usize, usize)> {
        if self.failed.is_some() || self.folding.is_some() {
            return None;
        }
        let (reading, from, end) = match &self.tail {
            Some(Tail {
                reading,
                tokens,
                from,
            }) => (Some(reading), *from, from + tokens.len()),
            None => {
                let document = self.documents.get(self.current)?;
                let stop = self.barriers.front().map(|barrier| barrier.place);
                let stop = stop
                    .filter(|stop| stop.document == document.number)
                    .map(|stop| stop.token);
                let end = document.tokens.len();
                (
                    self.reading.as_ref(),
                    end,
                    stop.map_or(end, |stop| stop.min(end)),
                )
            }
        };
        let (start, len, cached) = reading.map_or((0, 0, 0), |reading| {
            (reading.start, reading.len, reading.cached)
        });
        let position = start + len;
        let unread = end
            .saturating_sub(position)
            .min(self.window.saturating_sub(len));
        if unread == 0 {
            return None;
        }
        if cached == len {
            return Some((position, unread));
        }
        // A row's tokens lie together: those of the document, or the provisional ones.
        let index = start + cached;
        let end = if index < from {
            position.min(from)
        } else {
            position
        };
        Some((index, end - index))
    }

    /// Makes ready for a row of so many tokens: blocks, sums, and in a sequential session the core that the window is
    /// read with. Says whether there are blocks.
    pub(crate) fn prepare(&mut self, tokens: usize, cx: &mut Context<'_>) -> bool {
        let cached = self.cached();
        if !cx.allocator.grow(&mut self.blocks, cached + tokens) {
            return false;
        }
        if let Err(error) = self.ready(cx) {
            self.fail(&error.to_string(), cx);
        }
        self.failed.is_none()
    }

    /// Blocks that are missing for a row of so many tokens.
    pub(crate) fn missing_blocks(&self, tokens: usize, allocator: &BlockAllocator) -> usize {
        allocator.missing(&self.blocks, self.cached() + tokens)
    }

    /// Tokens of the window under way whose KV is there.
    fn cached(&self) -> usize {
        let reading = self
            .tail
            .as_ref()
            .map(|tail| &tail.reading)
            .or(self.reading.as_ref());
        reading.map_or(0, |reading| reading.cached)
    }

    fn ready(&mut self, cx: &Context<'_>) -> Result<(), generator::Error> {
        if self.tail.is_none() && self.reading.is_none() {
            let before = self.is_rereading();
            let trace = if before {
                let document = self.documents.get(self.current);
                let traced = document.is_some_and(|document| document.traced);
                traced.then(|| cx.traces.hold_anyway(cx.generator.new_trace()))
            } else if self.strategy == Strategy::Sequential {
                None
            } else {
                cx.traces.begin(cx.generator)
            };
            let mut reading = Reading::new(cx.generator, trace)?;
            reading.before = before;
            self.reading = Some(reading);
        }
        let reading = self
            .tail
            .as_ref()
            .map(|tail| &tail.reading)
            .or(self.reading.as_ref());
        if reading.is_some_and(|reading| reading.ready) {
            return Ok(());
        }
        let core = match self.strategy {
            Strategy::Concat | Strategy::Parallel => None,
            Strategy::Sequential => match self.fold(reading, cx.machine)? {
                Some(fold) => fold.core.map(|core| cx.cores.hold(core)),
                None => self.newest.core.clone(),
            },
        };
        if let Some(reading) = self
            .tail
            .as_mut()
            .map(|tail| &mut tail.reading)
            .or(self.reading.as_mut())
        {
            (reading.core, reading.ready) = (core, true);
        }
        Ok(())
    }

    /// The next row, of so many tokens, and where its core is; `prepare` has been asked.
    pub(crate) fn row(&mut self, tokens: usize) -> Option<(lm::Row<'_>, Option<Slot>)> {
        let (index, most) = self.next()?;
        let count = tokens.min(most);
        let document = self.documents.get(self.current)?;
        let (reading, tokens) = match &mut self.tail {
            Some(Tail {
                reading,
                tokens,
                from,
            }) => match index.checked_sub(*from) {
                Some(index) => (reading, tokens.get(index..)?),
                None => (reading, document.tokens.get(index..)?),
            },
            None => (self.reading.as_mut()?, document.tokens.get(index..)?),
        };
        let writes = reading.cached == reading.len;
        let slot = reading.core.as_ref().map(HeldCore::slot);
        let row = lm::Row {
            tokens: tokens.get(..count)?,
            position: index - reading.start,
            blocks: self.blocks.as_slice(),
            core: reading.core.as_ref().map(HeldCore::core),
            scale: 1.0,
            window: writes.then_some(&mut reading.sums),
            // A token writes when its successor runs: so a version never holds more than its digest says.
            lookahead: None,
            logits: 0,
        };
        Some((row, slot))
    }

    /// Takes note that the row of so many tokens has run.
    pub(crate) fn ran(&mut self, tokens: usize, step: u64, events: &mut Vec<Event>) {
        self.last_step = step;
        let Some((index, most)) = self.next() else {
            return;
        };
        let count = tokens.min(most);
        let Some(document) = self.documents.get_mut(self.current) else {
            return;
        };
        let (reading, source) = match &mut self.tail {
            Some(Tail {
                reading,
                tokens,
                from,
            }) => match index.checked_sub(*from) {
                Some(index) => (reading, tokens.get(index..)),
                None => (reading, document.tokens.get(index..)),
            },
            None => match &mut self.reading {
                Some(reading) => (reading, document.tokens.get(index..)),
                None => return,
            },
        };
        if reading.cached < reading.len {
            reading.cached += count;
            return;
        }
        reading.passed(
            source
                .and_then(|source| source.get(..count))
                .unwrap_or_default(),
        );
        if self.tail.is_none() {
            let position = self.reading.as_ref().map_or(0, Reading::position);
            let tokens = position.saturating_sub(document.reported);
            if tokens > 0 {
                document.reported = position;
                events.push(Event::Encoded {
                    session: self.id,
                    tokens,
                });
            }
        }
    }

    pub(super) fn drop_reading(&mut self, allocator: &mut BlockAllocator) {
        (self.reading, self.turn, self.yielded) = (None, None, false);
        if let Some(Tail { tokens, .. }) = self.tail.take()
            && let Some(Barrier {
                asks: Asks::Publish { provisional, .. },
                ..
            }) = self
                .barriers
                .iter_mut()
                .find(|barrier| matches!(barrier.asks, Asks::Publish { .. }))
        {
            // Begun again when the barrier is met again.
            *provisional = tokens;
        }
        allocator.release(&mut self.blocks);
    }

    /// The place behind all that was read.
    pub(super) fn read_place(&self) -> Place {
        match self.documents.get(self.current) {
            Some(document) => Place {
                document: document.number,
                token: self.reading.as_ref().map_or(0, Reading::position),
            },
            None => Place {
                document: self.next_number,
                token: 0,
            },
        }
    }
}
