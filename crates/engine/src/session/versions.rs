//! Versions: windows and documents close, barriers are met, and what was read is folded and published.
//!
//! Beside running answers a core is read out a portion at a time, over several steps. What is begun is known by its digest and thrown away
//! when another one is wanted: so whatever comes in between, a version is what it would be if it were read out at once. Start at
//! [`Session::settle`].

use std::{sync::Arc, task::Poll};

use generator::{Core, CoreReading, Generator, State, Strategy};

use super::{Asks, Barrier, Context, Published, Session, Tail};
use crate::{
    command::Chosen,
    cores::CoreBudget,
    digest::{DocumentName, StateHash},
    error::SessionError,
    event::{Event, Rejected},
    ids::{Digest, Seq, Version},
    machine::Machine,
    reading::Reading,
};

impl Session {
    /// Does all that needs no forward.
    pub(crate) fn settle(&mut self, cx: &mut Context<'_>) {
        if self.failed.is_none()
            && let Err(error) = self.try_settle(cx)
        {
            self.fail(&error.to_string(), cx);
        }
    }

    fn try_settle(&mut self, cx: &mut Context<'_>) -> Result<(), generator::Error> {
        while let Poll::Ready(more) = self.settle_once(cx)? {
            if !more {
                self.folding = None;
                return Ok(());
            }
        }
        Ok(())
    }

    /// Says whether there was something to do; pending while the next version is being read out.
    fn settle_once(&mut self, cx: &mut Context<'_>) -> Result<Poll<bool>, generator::Error> {
        if self.tail.is_some() {
            return self.settle_tail(cx);
        }
        if self.close(cx)? {
            self.due = true;
            return Ok(Poll::Ready(true));
        }
        let front = self.barriers.front();
        if front.is_some_and(|barrier| self.read_place() >= barrier.place) {
            return Ok(self.meet_barrier(cx)?.map(|()| true));
        }
        if self.due && self.rereading().is_none() {
            self.settle_window()?;
            let Poll::Ready(fold) = self.fold_on(cx)? else {
                return Ok(Poll::Pending);
            };
            self.publish_fold(fold, Seq(0), false, cx);
        }
        Ok(Poll::Ready(false))
    }

    /// Brings what the open window gathers into its sums.
    pub(super) fn settle_window(&mut self) -> Result<(), generator::Error> {
        match &mut self.reading {
            Some(reading) => reading.sums.settle(),
            None => Ok(()),
        }
    }

    /// Closes the window or the document that is read to its end. Says whether there was one.
    fn close(&mut self, cx: &mut Context<'_>) -> Result<bool, generator::Error> {
        let Some(document) = self.documents.get_mut(self.current) else {
            return Ok(false);
        };
        let position = self.reading.as_ref().map_or(0, Reading::position);
        let ended = document.complete && position == document.tokens.len();
        if let Some(reading) = &mut self.reading
            && (reading.len == self.window || (ended && reading.len > 0))
        {
            reading.close_window(cx.generator, self.bounds.least, cx.traces)?;
            cx.machine.gather(&mut reading.state)?;
            cx.allocator.release(&mut self.blocks);
            (self.turn, self.yielded) = (None, false);
            return Ok(true);
        }
        if !ended {
            return Ok(false);
        }
        if let Some(Reading {
            state, hash, trace, ..
        }) = self.reading.take()
        {
            if !state.is_empty() {
                self.folded.add(&state, 1.0)?;
                cx.machine.gather(&mut self.folded)?;
            }
            document.hash = hash.name();
            document.state = (self.strategy != Strategy::Sequential).then_some(state);
            document.trace = trace;
        }
        self.current += 1;
        Ok(true)
    }

    /// Answers the barrier at the front, or begins the provisional end that it asks for. Pending while the version is being read out.
    fn meet_barrier(&mut self, cx: &mut Context<'_>) -> Result<Poll<()>, generator::Error> {
        let here = self.read_place();
        let Some(barrier) = self.barriers.front_mut() else {
            return Ok(Poll::Ready(()));
        };
        if let Asks::Publish { provisional, .. } = &mut barrier.asks {
            // If the document was forgotten or has ended without them, they are no more.
            let here = barrier.place == here && here.document != self.next_number;
            let tokens = std::mem::take(provisional);
            if here && !tokens.is_empty() {
                let reading = match &self.reading {
                    // Nothing of it is ever recalled.
                    Some(reading) => Reading {
                        trace: None,
                        ..reading.try_clone()?
                    },
                    None => Reading::new(cx.generator, None)?,
                };
                self.folding = None;
                self.tail = Some(Tail {
                    from: reading.position(),
                    reading,
                    tokens,
                });
                return Ok(Poll::Ready(()));
            }
            self.settle_window()?;
            let Poll::Ready(fold) = self.fold_on(cx)? else {
                return Ok(Poll::Pending);
            };
            let (seq, asked) = self.answered();
            self.publish_fold(fold, seq, asked, cx);
            return Ok(Poll::Ready(()));
        }
        let Some(Barrier { asks, .. }) = self.barriers.pop_front() else {
            return Ok(Poll::Ready(()));
        };
        match asks {
            // Met above.
            Asks::Publish { .. } => {}
            Asks::Reread { forgotten } => {
                self.renew_without(cx)?;
                cx.events.push(match forgotten {
                    Some(document) => self.forgotten(document),
                    None => self.applied(),
                });
            }
            Asks::Remade => self.remade(cx)?,
        }
        Ok(Poll::Ready(()))
    }

    /// Takes the publish away that is answered now: up to which chunk, and whether somebody is to be told if it does not fit.
    fn answered(&mut self) -> (Seq, bool) {
        match self.barriers.pop_front() {
            Some(Barrier {
                asks: Asks::Publish { seq, asked, .. },
                ..
            }) => (seq, asked),
            _ => (Seq(0), false),
        }
    }

    /// Closes the provisional window that is full, or publishes the provisional end that is read. Says whether there was
    /// something to do; pending while the version is being read out.
    fn settle_tail(&mut self, cx: &mut Context<'_>) -> Result<Poll<bool>, generator::Error> {
        let Some(tail) = &mut self.tail else {
            return Ok(Poll::Ready(false));
        };
        if tail.reading.position() < tail.from + tail.tokens.len() {
            if tail.reading.len < self.window {
                return Ok(Poll::Ready(false));
            }
            tail.reading
                .close_window(cx.generator, self.bounds.least, cx.traces)?;
            cx.machine.gather(&mut tail.reading.state)?;
            // The next provisional window takes the open one's place in the cache.
            if let Some(reading) = &mut self.reading {
                reading.cached = 0;
            }
            return Ok(Poll::Ready(true));
        }
        tail.reading.sums.settle()?;
        let Poll::Ready(fold) = self.fold_on(cx)? else {
            return Ok(Poll::Pending);
        };
        self.tail = None;
        let (seq, asked) = self.answered();
        self.publish_fold(fold, seq, asked, cx);
        Ok(Poll::Ready(true))
    }

    /// Name and tokens of all documents that were read, and of this one behind them.
    pub(super) fn digest_with(&self, last: Option<DocumentName>) -> (Digest, usize) {
        let mut hash = self.hash.clone();
        let documents = self.documents.iter().take(self.current);
        let documents = documents.map(|document| document.hash);
        let mut tokens = 0;
        for document in documents.chain(last) {
            hash.push(&document);
            tokens += document.tokens();
        }
        (hash.finish(), tokens)
    }

    /// The fold of all that was read, as if the log ended behind `reading`; none if the newest version is that already.
    pub(super) fn fold(
        &self,
        reading: Option<&Reading>,
        machine: &dyn Machine,
    ) -> Result<Option<Fold>, generator::Error> {
        let (digest, tokens) = self.digest_with(reading.map(|reading| reading.hash.name()));
        if digest == self.newest.digest {
            return Ok(None);
        }
        let mut folding = self.begin_fold((digest, tokens), reading, machine)?;
        while !folding.is_done() {
            folding.go_on(machine)?;
        }
        Ok(Some(folding.done()))
    }

    /// Goes on with the fold of all that was read, up to a provisional end if there is one, as long as portions are given.
    fn fold_on(&mut self, cx: &mut Context<'_>) -> Result<Poll<Option<Fold>>, generator::Error> {
        let tail = self.tail.as_ref().map(|tail| &tail.reading);
        let reading = tail.or(self.reading.as_ref());
        let (digest, tokens) = self.digest_with(reading.map(|reading| reading.hash.name()));
        if digest == self.newest.digest {
            return Ok(Poll::Ready(None));
        }
        let begun = self.folding.as_ref();
        if begun.is_none_or(|folding| folding.digest != digest) {
            let folding = self.begin_fold((digest, tokens), reading, cx.machine)?;
            self.folding = Some(folding);
        }
        while let Some(folding) = self.folding.as_mut().filter(|folding| !folding.is_done()) {
            if !(cx.portion)() {
                return Ok(Poll::Pending);
            }
            folding.go_on(cx.machine)?;
        }
        Ok(Poll::Ready(self.folding.take().map(Folding::done)))
    }

    /// The sums of all that was read, as if the log ended behind `reading`, with the digest and the tokens of that.
    fn begin_fold(
        &self,
        (digest, tokens): (Digest, usize),
        reading: Option<&Reading>,
        machine: &dyn Machine,
    ) -> Result<Folding, generator::Error> {
        let mut total = self.folded.try_clone()?;
        if let Some(reading) = reading {
            let state = reading.folded(self.bounds.least)?;
            if !state.is_empty() {
                total.add(&state, 1.0)?;
            }
        }
        let mut folding = Folding::begin((digest, tokens), total, false, machine)?;
        // What an open window has written so far is summed nowhere else.
        let open = reading.is_some_and(|reading| reading.len > 0);
        folding.keeps = open && machine.gate().is_some();
        Ok(folding)
    }

    /// The newest version with gates, to be read out. None if its sums are not there: another document was read since, or they have left memory.
    pub(crate) fn gated_fold(
        &self,
        machine: &dyn Machine,
    ) -> Result<Option<Folding>, generator::Error> {
        let Some(gate) = machine.gate() else {
            return Ok(None);
        };
        let closed = self.reading.as_ref().map(|reading| reading.closed);
        let mut total = if let Some(sums) = &self.newest.sums {
            sums.try_clone()?
        } else if !self.gone.sums && self.digest_with(closed).0 == self.newest.digest {
            let mut total = self.folded.try_clone()?;
            let open = self.reading.as_ref().map(|reading| &reading.state);
            if let Some(state) = open.filter(|state| !state.is_empty()) {
                total.add(state, 1.0)?;
            }
            total
        } else {
            return Ok(None);
        };
        if total.is_empty() {
            return Ok(None);
        }
        machine.land(&mut total)?;
        let name = StateHash::gated(gate, &self.newest.digest);
        Folding::begin((name, self.newest.tokens), total, true, machine).map(Some)
    }

    /// The fold of some of the documents, or of some of their tokens, in the order of the log, to be read out: where whole documents are named,
    /// that of a session that was told these alone. None if it would be that of all, or one of them is not there, or its own sums
    /// are not (it is not read to its end, or the session is sequential). A document without a trace is taken whole.
    pub(crate) fn fold_of(
        &self,
        chosen: &Chosen,
        (generator, machine): (&Generator, &dyn Machine),
    ) -> Result<Option<Folding>, generator::Error> {
        let mut parts = Vec::with_capacity(chosen.parts.len());
        for document in &self.documents {
            if let Some(part) = chosen
                .parts
                .iter()
                .find(|part| part.document == document.id)
            {
                let Some(state) = &document.state else {
                    return Ok(None);
                };
                let trace = document.trace.as_ref().filter(|_| !part.tokens.is_empty());
                parts.push((document, state, trace.map(|trace| (trace.trace(), part))));
            }
        }
        let whole = parts.iter().all(|(.., part)| part.is_none());
        if parts.is_empty()
            || parts.len() != chosen.parts.len()
            || (whole && parts.len() == self.documents.len())
        {
            return Ok(None);
        }
        let (mut hash, mut tokens) = (self.hash.clone(), 0);
        let mut total = generator.new_state()?;
        for (document, state, part) in parts {
            hash.push(&document.hash);
            let Some((trace, part)) = part else {
                tokens += document.hash.tokens();
                total.add(state, 1.0)?;
                continue;
            };
            tokens += part
                .around
                .iter()
                .map(ExactSizeIterator::len)
                .sum::<usize>();
            for (ranges, weight) in [(&part.tokens, 1.0), (&part.around, chosen.beside)] {
                hash.push_part(ranges, weight);
                total.add(&generator.recall(trace, ranges)?, weight)?;
            }
        }
        Folding::begin((hash.finish(), tokens), total, false, machine).map(Some)
    }

    /// Makes a fold the newest version, if its core fits; without one the newest stays. Chunks up to `seq`, and all that were
    /// read, are in it. No version is due then, whether it came or not; if not, who `asked` is told.
    fn publish_fold(&mut self, fold: Option<Fold>, seq: Seq, asked: bool, cx: &mut Context<'_>) {
        let core = fold.as_ref().and_then(|fold| fold.core.as_ref());
        let fits = core.map_or(Ok(()), |core| {
            cx.cores.check(core, self.newest.core.as_ref())
        });
        let session = self.id;
        let Err(error) = fits else {
            self.make_newest(fold, seq, cx.cores);
            cx.events.push(self.applied());
            return;
        };
        self.due = false;
        self.note_read();
        cx.events.push(Event::Read {
            session,
            seq: self.read.max(seq),
        });
        if asked {
            cx.events.push(Event::SessionFailed {
                session,
                rejected: Rejected::Publish { seq },
                error,
            });
        }
    }

    /// Takes note of the chunks that are read.
    fn note_read(&mut self) {
        let here = self.read_place();
        while let Some((_, seq)) = self.marks.pop_front_if(|(place, _)| *place <= here) {
            self.read = self.read.max(seq);
        }
    }

    pub(super) fn make_newest(&mut self, fold: Option<Fold>, seq: Seq, cores: &CoreBudget) {
        self.note_read();
        self.due = false;
        if let Some(Fold {
            digest,
            tokens,
            core,
            sums,
        }) = fold
        {
            let version = Version(self.newest.version.0 + 1);
            if let Some(core) = self.newest.core.take() {
                core.leave();
            }
            self.newest = Published {
                version,
                seq: self.newest.seq,
                digest,
                core: core.map(|core| cores.hold(core)),
                tokens,
                sums: sums.map(Arc::new),
            };
        }
        self.newest.seq = self.newest.seq.max(self.read).max(seq);
    }

    /// Takes no more context. What was asked for is refused.
    pub(super) fn fail(&mut self, reason: &str, cx: &mut Context<'_>) {
        self.folding = None;
        if self.is_rereading() {
            self.not_remade(reason, cx);
            return;
        }
        self.drop_reading(cx.allocator);
        let tokens = self.waiting_tokens();
        if tokens > 0 {
            cx.events.push(Event::Encoded {
                session: self.id,
                tokens,
            });
        }
        for document in &mut self.documents {
            document.reported = document.tokens.len();
        }
        let (session, error) = (
            self.id,
            SessionError::ReadOut {
                reason: reason.to_owned(),
            },
        );
        let mut rejected: Vec<Rejected> = self
            .barriers
            .drain(..)
            .filter_map(|barrier| match barrier.asks {
                Asks::Publish { seq, .. } => Some(Rejected::Publish { seq }),
                Asks::Remade => None,
                Asks::Reread { forgotten } => {
                    forgotten.map(|document| Rejected::Forget { document })
                }
            })
            .collect();
        if rejected.is_empty() {
            rejected.push(Rejected::Publish {
                seq: self.marks.back().map_or(self.read, |&(_, seq)| seq),
            });
        }
        cx.events
            .extend(rejected.into_iter().map(|rejected| Event::SessionFailed {
                session,
                rejected,
                error: error.clone(),
            }));
        self.marks.clear();
        self.failed = Some(reason.to_owned());
    }

    pub(crate) fn applied(&self) -> Event {
        let (session, newest) = (self.id, self.facts());
        Event::Applied { session, newest }
    }
}

/// The core of summed documents; none of nothing.
pub(super) fn core_of(
    total: &State,
    machine: &dyn Machine,
) -> Result<Option<Core>, generator::Error> {
    (!total.is_empty())
        .then(|| machine.read_out(total))
        .transpose()
}

/// A fold whose core is being read out.
#[derive(Debug)]
pub(crate) struct Folding {
    digest: Digest,
    tokens: usize,
    /// None of nothing.
    reading: Option<CoreReading>,
    core: Option<Core>,
    /// Whether what it is read out of is kept.
    keeps: bool,
}

impl Folding {
    /// The fold of a state of this digest and so many tokens, with gates or without; nothing is read out yet.
    fn begin(
        (digest, tokens): (Digest, usize),
        total: State,
        gated: bool,
        machine: &dyn Machine,
    ) -> Result<Self, generator::Error> {
        let generator = machine.generator().filter(|_| !total.is_empty());
        let reading = generator.map(|generator| generator.begin_read_out(total, gated));
        Ok(Self {
            digest,
            tokens,
            reading: reading.transpose()?,
            core: None,
            keeps: false,
        })
    }

    pub(crate) fn is_done(&self) -> bool {
        self.reading.is_none() || self.core.is_some()
    }

    /// Reads a portion out.
    pub(crate) fn go_on(&mut self, machine: &dyn Machine) -> Result<(), generator::Error> {
        if let Some(reading) = &mut self.reading {
            self.core = machine.read_on(reading)?;
        }
        Ok(())
    }

    /// What it has become.
    pub(crate) fn done(self) -> Fold {
        let sums = self.reading.filter(|_| self.keeps);
        Fold {
            digest: self.digest,
            tokens: self.tokens,
            core: self.core,
            sums: sums.map(CoreReading::into_state),
        }
    }
}

/// What a version is made of.
pub(crate) struct Fold {
    pub(crate) digest: Digest,
    pub(crate) tokens: usize,
    pub(crate) core: Option<Core>,
    /// What it was read out of, where nothing else keeps that.
    pub(crate) sums: Option<State>,
}
