//! A session: ordered documents, the fold of what was read of them, and the newest version.
//!
//! Tokens queue up in their documents; the engine runs [`Session::row`]s until nothing is wanted, and
//! [`Session::settle`] does all that needs no forward: windows close, documents are folded, versions appear. A publish
//! and a forget that needs reading again are *barriers*: places in the log that reading stops at until they are
//! answered.
//!
//! The fold: total = left fold over documents in log order of the left fold over each one's windows, every sum from an
//! empty state. Whatever way leads to a version, its additions are these, in this order; so equal digests are equal bits.
//! Start at [`Session::settle`].

use std::{cmp::Ordering, collections::VecDeque};

use generator::{Core, Generator, State, Strategy};

use crate::{
    blocks::{BlockAllocator, Blocks},
    digest::StateHash,
    document::{Document, Place},
    error::SessionError,
    event::{Event, Rejected},
    ids::{Digest, DocumentId, Seq, SessionId, TokenId, Version},
    reading::Reading,
};

/// A published version. Immutable; a copy costs nothing.
#[derive(Clone, Debug)]
pub(crate) struct Published {
    pub(crate) version: Version,
    /// All chunks up to this one are in it.
    pub(crate) seq: Seq,
    pub(crate) digest: Digest,
    /// None is the bare model.
    pub(crate) core: Option<Core>,
    /// Context tokens in it.
    pub(crate) tokens: usize,
}

/// What the sessions of an engine have in common.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bounds {
    pub(crate) vocab: usize,
    /// Tokens that one window can hold: what the model's context and the cache hold.
    pub(crate) window_limit: usize,
    /// A window of fewer tokens writes nothing.
    pub(crate) least: usize,
    /// Bytes of one state.
    pub(crate) state_bytes: usize,
    pub(crate) max_documents: usize,
    pub(crate) max_session_tokens: usize,
}

/// What settling needs of the engine.
pub(crate) struct Context<'a> {
    pub(crate) generator: &'a Generator,
    pub(crate) allocator: &'a mut BlockAllocator,
    pub(crate) events: &'a mut Vec<Event>,
}

/// Where reading stops until a version is published.
#[derive(Debug)]
struct Barrier {
    place: Place,
    asks: Asks,
}

#[derive(Debug)]
enum Asks {
    Publish {
        seq: Seq,
        provisional: Vec<TokenId>,
    },
    /// What was read before is being read again without a document; versions do not appear until this one. A fork owes
    /// nobody the name.
    Reread {
        forgotten: Option<DocumentId>,
    },
}

/// A provisional end of the open document.
#[derive(Debug)]
struct Tail {
    reading: Reading,
    tokens: Vec<TokenId>,
    /// Index in the document of the first of the tokens.
    from: usize,
}

/// A session.
#[derive(Debug)]
pub(crate) struct Session {
    id: SessionId,
    strategy: Strategy,
    /// Tokens of a full window.
    window: usize,
    bounds: Bounds,
    /// Of the fixed parts.
    hash: StateHash,
    documents: Vec<Document>,
    /// The first document that is not complete and read.
    current: usize,
    next_number: u64,
    /// The fold of all documents before the current one.
    folded: State,
    /// Of the current document; none before its first row.
    reading: Option<Reading>,
    tail: Option<Tail>,
    barriers: VecDeque<Barrier>,
    /// Where the tokens of each chunk end, in order.
    marks: VecDeque<(Place, Seq)>,
    /// All chunks up to this one have been read.
    read: Seq,
    /// Whether a window or a document has closed since the last version.
    due: bool,
    newest: Published,
    /// Blocks of the open window.
    blocks: Blocks,
    failed: Option<String>,
    /// Why a chunk was refused. Nothing behind it is taken: no version has a hole.
    refused: Option<SessionError>,
    /// The session's turn to be read; the lowest first.
    pub(crate) turn: Option<u64>,
    /// The step that read of it last.
    pub(crate) last_step: u64,
    /// Whether the open window, while it had its turn, has given its blocks to a request: once is enough.
    pub(crate) yielded: bool,
}

impl Session {
    /// An empty session at version 0.
    pub(crate) fn new(
        id: SessionId,
        strategy: Strategy,
        window: usize,
        hash: StateHash,
        bounds: Bounds,
        generator: &Generator,
    ) -> Result<Self, generator::Error> {
        let window = if strategy == Strategy::Concat {
            bounds.window_limit
        } else {
            window
        };
        let newest = Published {
            version: Version(0),
            seq: Seq(0),
            digest: hash.finish(),
            core: None,
            tokens: 0,
        };
        Ok(Self {
            id,
            strategy,
            window,
            bounds,
            hash,
            documents: Vec::new(),
            current: 0,
            next_number: 0,
            folded: generator.new_state()?,
            reading: None,
            tail: None,
            barriers: VecDeque::new(),
            marks: VecDeque::new(),
            read: Seq(0),
            due: false,
            newest,
            blocks: Blocks::default(),
            failed: None,
            refused: None,
            turn: None,
            last_step: 0,
            yielded: false,
        })
    }

    /// A session of another name with the same documents, sums and newest version, and the same tokens still to be read. Publishes
    /// that are owed are not copied, nor is KV: it is rebuilt when it is needed.
    pub(crate) fn fork(&self, id: SessionId) -> Result<Self, generator::Error> {
        let reading = match &self.reading {
            Some(reading) => Some(Reading {
                cached: 0,
                ..reading.try_clone()?
            }),
            None => None,
        };
        let rereads = self
            .barriers
            .iter()
            .filter(|barrier| matches!(barrier.asks, Asks::Reread { .. }));
        Ok(Self {
            id,
            strategy: self.strategy,
            window: self.window,
            bounds: self.bounds,
            hash: self.hash.clone(),
            documents: self
                .documents
                .iter()
                .map(Document::try_clone)
                .collect::<Result<_, _>>()?,
            current: self.current,
            next_number: self.next_number,
            folded: self.folded.try_clone()?,
            reading,
            tail: None,
            barriers: rereads
                .map(|barrier| Barrier {
                    place: barrier.place,
                    asks: Asks::Reread { forgotten: None },
                })
                .collect(),
            marks: self.marks.clone(),
            read: self.read,
            due: self.due,
            newest: self.newest.clone(),
            blocks: Blocks::default(),
            failed: self.failed.clone(),
            refused: self.refused.clone(),
            turn: None,
            last_step: 0,
            yielded: false,
        })
    }

    pub(crate) fn newest(&self) -> &Published {
        &self.newest
    }

    /// Blocks that the open window holds.
    pub(crate) fn held_blocks(&self) -> usize {
        self.blocks.len()
    }

    /// Tokens that wait to be encoded for the first time.
    pub(crate) fn waiting_tokens(&self) -> usize {
        self.documents
            .get(self.current..)
            .unwrap_or_default()
            .iter()
            .map(Document::waiting)
            .sum()
    }

    /// Bytes that its states may come to take, `more` documents added.
    pub(crate) fn budget_bytes(&self, more: usize) -> usize {
        let documents = self.documents.len() + more;
        let states = match (documents, self.strategy) {
            (0, _) => 0,
            (_, Strategy::Sequential) => 5,
            (documents, Strategy::Concat | Strategy::Parallel) => documents.saturating_add(4),
        };
        states.saturating_mul(self.bounds.state_bytes)
    }

    /// Bytes of the sums that it has now.
    fn state_bytes(&self) -> usize {
        let reading = self
            .reading
            .as_ref()
            .map_or(0, |reading| reading.state.bytes() + reading.sums.bytes());
        let documents = self
            .documents
            .iter()
            .filter_map(|document| document.state.as_ref())
            .map(State::bytes);
        let folded = if self.folded.is_empty() {
            0
        } else {
            self.folded.bytes()
        };
        folded + reading + documents.sum::<usize>()
    }

    /// Why a chunk was refused before, as an error.
    pub(crate) fn takes_chunks(&self) -> Result<(), SessionError> {
        self.refused.clone().map_or(Ok(()), Err)
    }

    /// Takes no more chunks: one was refused.
    pub(crate) fn refuse(&mut self, error: &SessionError) {
        self.refused = Some(error.clone());
    }

    /// Takes a chunk in. `begins` asks whether the states may grow by another document's.
    pub(crate) fn ingest(
        &mut self,
        seq: Seq,
        document: DocumentId,
        tokens: &[TokenId],
        end_of_document: bool,
        begins: impl FnOnce() -> Result<(), SessionError>,
    ) -> Result<(), SessionError> {
        self.usable()?;
        self.check_tokens(tokens)?;
        let open = self.open_document();
        if let Some(open) = open.filter(|open| open.id != document) {
            return Err(SessionError::DocumentOpen { open: open.id });
        }
        self.check_lengths(open.map_or(0, |open| open.tokens.len()), tokens.len())?;
        if open.is_none() {
            if self.documents.iter().any(|known| known.id == document) {
                return Err(SessionError::DocumentClosed { document });
            }
            let limit = self.bounds.max_documents;
            if self.documents.len() >= limit {
                return Err(SessionError::TooManyDocuments { limit });
            }
            begins()?;
            self.documents
                .push(Document::new(document, self.next_number));
            self.next_number += 1;
        }
        let Some(open) = self.documents.last_mut() else {
            return Ok(());
        };
        open.tokens.extend_from_slice(tokens);
        open.complete = end_of_document;
        let place = open.end();
        let seq = self.marks.back().map_or(seq, |&(_, last)| seq.max(last));
        match self.marks.back_mut() {
            Some(mark) if mark.0 == place => mark.1 = seq,
            _ => self.marks.push_back((place, seq)),
        }
        Ok(())
    }

    /// Asks for a version of all that has come and `provisional` behind it.
    pub(crate) fn publish(
        &mut self,
        seq: Seq,
        provisional: Vec<TokenId>,
    ) -> Result<(), SessionError> {
        self.usable()?;
        let (seq, provisional) = if self.refused.is_some() {
            let told = self.marks.back().map_or(self.read, |&(_, told)| told);
            (seq.min(told), Vec::new())
        } else {
            (seq, provisional)
        };
        self.check_tokens(&provisional)?;
        if !provisional.is_empty() {
            let Some(open) = self.open_document() else {
                return Err(SessionError::NoOpenDocument);
            };
            self.check_lengths(open.tokens.len(), provisional.len())?;
        }
        let place = self.log_end();
        // The one at the front may be under way; of those behind it one is enough.
        let owed = self
            .barriers
            .iter()
            .rev()
            .take_while(|barrier| matches!(barrier.asks, Asks::Publish { .. }))
            .count();
        let mut least = seq;
        if owed >= 2
            && let Some(Barrier {
                asks: Asks::Publish { seq: earlier, .. },
                ..
            }) = self.barriers.pop_back()
        {
            least = seq.max(earlier);
        }
        self.barriers.push_back(Barrier {
            place,
            asks: Asks::Publish {
                seq: least,
                provisional,
            },
        });
        Ok(())
    }

    /// Forgets a document, as if it had never come.
    pub(crate) fn forget(
        &mut self,
        document: DocumentId,
        cx: &mut Context<'_>,
    ) -> Result<(), SessionError> {
        self.usable()?;
        let Some(index) = self.documents.iter().position(|known| known.id == document) else {
            return Err(SessionError::UnknownDocument { document });
        };
        let rereading = self.rereading();
        let target = rereading.unwrap_or_else(|| self.read_place());
        let removed = self.documents.remove(index);
        if removed.waiting() > 0 {
            cx.events.push(Event::Encoded {
                session: self.id,
                tokens: removed.waiting(),
            });
        }
        let begun = index <= self.current;
        let again = match rereading {
            Some(target) => removed.number <= target.document,
            None => self.strategy == Strategy::Sequential && index < self.current,
        };
        if !begun && !again {
            // No version holds any of it.
            cx.events.push(self.forgotten(document));
            return Ok(());
        }
        let done = if again {
            let at = self.rereads();
            self.barriers.insert(
                at,
                Barrier {
                    place: target,
                    asks: Asks::Reread {
                        forgotten: Some(document),
                    },
                },
            );
            self.leave(index, cx)
        } else {
            let left = self.leave(index, cx);
            left.and_then(|()| self.renew_with_reading(cx.generator, Seq(0)))
                .map(|()| cx.events.push(self.forgotten(document)))
        };
        if let Err(error) = done {
            self.fail(&error.to_string(), cx);
            return Err(SessionError::from_state(&error));
        }
        Ok(())
    }

    /// Leaves a removed document, which stood at `index`, out of what was read.
    fn leave(&mut self, index: usize, cx: &mut Context<'_>) -> Result<(), generator::Error> {
        match index.cmp(&self.current) {
            Ordering::Greater => return Ok(()),
            Ordering::Equal => {
                self.drop_reading(cx.allocator);
                return Ok(());
            }
            Ordering::Less => {}
        }
        self.folded = cx.generator.new_state()?;
        if self.strategy == Strategy::Sequential {
            self.drop_reading(cx.allocator);
            self.current = 0;
            return Ok(());
        }
        self.current -= 1;
        for document in self.documents.iter().take(self.current) {
            if let Some(state) = document.state.as_ref().filter(|state| !state.is_empty()) {
                self.folded.add(state, 1.0)?;
            }
        }
        Ok(())
    }

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
    fn next(&self) -> Option<(usize, usize)> {
        if self.failed.is_some() {
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
        if let Err(error) = self.ready(cx.generator) {
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

    fn ready(&mut self, generator: &Generator) -> Result<(), generator::Error> {
        if self.tail.is_none() && self.reading.is_none() {
            self.reading = Some(Reading::new(generator)?);
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
            Strategy::Sequential => match self.fold(reading, generator)? {
                Some(fold) => fold.core,
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

    /// The next row, of so many tokens; `prepare` has been asked.
    pub(crate) fn row(&mut self, tokens: usize) -> Option<lm::Row<'_>> {
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
        Some(lm::Row {
            tokens: tokens.get(..count)?,
            position: index - reading.start,
            blocks: self.blocks.as_slice(),
            core: reading.core.as_ref(),
            scale: 1.0,
            window: writes.then_some(&mut reading.sums),
            // A token writes when its successor runs: so a version never holds more than its digest says.
            lookahead: None,
            logits: 0,
        })
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

    /// Does all that needs no forward.
    pub(crate) fn settle(&mut self, cx: &mut Context<'_>) {
        if self.failed.is_none()
            && let Err(error) = self.try_settle(cx)
        {
            self.fail(&error.to_string(), cx);
        }
    }

    fn try_settle(&mut self, cx: &mut Context<'_>) -> Result<(), generator::Error> {
        loop {
            if self.tail.is_some() {
                if !self.settle_tail(cx)? {
                    return Ok(());
                }
            } else if self.close(cx)? {
                self.due = true;
            } else if self
                .barriers
                .front()
                .is_some_and(|barrier| self.read_place() >= barrier.place)
            {
                self.meet_barrier(cx)?;
            } else {
                if self.due && self.rereading().is_none() {
                    self.renew_with_reading(cx.generator, Seq(0))?;
                    cx.events.push(self.applied());
                }
                return Ok(());
            }
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
            reading.close_window(cx.generator, self.bounds.least)?;
            cx.allocator.release(&mut self.blocks);
            (self.turn, self.yielded) = (None, false);
            return Ok(true);
        }
        if !ended {
            return Ok(false);
        }
        if let Some(Reading { state, hash, .. }) = self.reading.take() {
            if !state.is_empty() {
                self.folded.add(&state, 1.0)?;
            }
            document.hash = hash;
            document.state = (self.strategy != Strategy::Sequential).then_some(state);
        }
        self.current += 1;
        Ok(true)
    }

    /// Answers the barrier at the front, or begins the provisional end that it asks for.
    fn meet_barrier(&mut self, cx: &mut Context<'_>) -> Result<(), generator::Error> {
        let here = self.read_place();
        let Some(barrier) = self.barriers.front_mut() else {
            return Ok(());
        };
        if let Asks::Publish { provisional, .. } = &mut barrier.asks {
            // If the document was forgotten or has ended without them, they are no more.
            let here = barrier.place == here && here.document != self.next_number;
            let tokens = std::mem::take(provisional);
            if here && !tokens.is_empty() {
                let reading = match &self.reading {
                    Some(reading) => reading.try_clone()?,
                    None => Reading::new(cx.generator)?,
                };
                self.tail = Some(Tail {
                    from: reading.position(),
                    reading,
                    tokens,
                });
                return Ok(());
            }
        }
        let Some(Barrier { asks, .. }) = self.barriers.pop_front() else {
            return Ok(());
        };
        match asks {
            Asks::Publish { seq, .. } => {
                self.renew_with_reading(cx.generator, seq)?;
                cx.events.push(self.applied());
            }
            Asks::Reread { forgotten } => {
                self.renew_with_reading(cx.generator, Seq(0))?;
                cx.events.push(match forgotten {
                    Some(document) => self.forgotten(document),
                    None => self.applied(),
                });
            }
        }
        Ok(())
    }

    /// Closes the provisional window that is full, or publishes the provisional end that is read. Says whether there was
    /// something to do.
    fn settle_tail(&mut self, cx: &mut Context<'_>) -> Result<bool, generator::Error> {
        let Some(tail) = &mut self.tail else {
            return Ok(false);
        };
        if tail.reading.position() < tail.from + tail.tokens.len() {
            if tail.reading.len < self.window {
                return Ok(false);
            }
            tail.reading.close_window(cx.generator, self.bounds.least)?;
            // The next provisional window takes the open one's place in the cache.
            if let Some(reading) = &mut self.reading {
                reading.cached = 0;
            }
            return Ok(true);
        }
        let Some(Tail { reading, .. }) = self.tail.take() else {
            return Ok(false);
        };
        let seq = match self.barriers.pop_front() {
            Some(Barrier {
                asks: Asks::Publish { seq, .. },
                ..
            }) => seq,
            _ => Seq(0),
        };
        let fold = self.fold(Some(&reading), cx.generator)?;
        self.renew(fold, seq);
        cx.events.push(self.applied());
        Ok(true)
    }

    /// The fold of all that was read, as if the log ended behind `reading`; none if the newest version is that already.
    fn fold(
        &self,
        reading: Option<&Reading>,
        generator: &Generator,
    ) -> Result<Option<Fold>, generator::Error> {
        let mut hash = self.hash.clone();
        let documents = self
            .documents
            .iter()
            .take(self.current)
            .map(|document| &document.hash);
        let mut tokens = 0;
        for document in documents.chain(reading.map(|reading| &reading.hash)) {
            hash.push(document);
            tokens += document.tokens();
        }
        let digest = hash.finish();
        if digest == self.newest.digest {
            return Ok(None);
        }
        let mut total = self.folded.try_clone()?;
        if let Some(reading) = reading {
            let state = reading.folded(self.bounds.least)?;
            if !state.is_empty() {
                total.add(&state, 1.0)?;
            }
        }
        let core = if total.is_empty() {
            None
        } else {
            Some(generator.read_out(&total)?)
        };
        Ok(Some(Fold {
            digest,
            tokens,
            core,
        }))
    }

    fn renew_with_reading(
        &mut self,
        generator: &Generator,
        seq: Seq,
    ) -> Result<(), generator::Error> {
        let fold = self.fold(self.reading.as_ref(), generator)?;
        self.renew(fold, seq);
        Ok(())
    }

    /// Makes a fold the newest version; without one the newest stays. Chunks up to `seq`, and all that were read, are in it.
    fn renew(&mut self, fold: Option<Fold>, seq: Seq) {
        let here = self.read_place();
        while let Some(&(place, seq)) = self.marks.front()
            && place <= here
        {
            self.read = self.read.max(seq);
            self.marks.pop_front();
        }
        self.due = false;
        if let Some(Fold {
            digest,
            tokens,
            core,
        }) = fold
        {
            let version = Version(self.newest.version.0 + 1);
            self.newest = Published {
                version,
                seq: self.newest.seq,
                digest,
                core,
                tokens,
            };
        }
        self.newest.seq = self.newest.seq.max(self.read).max(seq);
    }

    fn drop_reading(&mut self, allocator: &mut BlockAllocator) {
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

    /// Takes no more context. What was asked for is refused.
    fn fail(&mut self, reason: &str, cx: &mut Context<'_>) {
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

    fn usable(&self) -> Result<(), SessionError> {
        match &self.failed {
            Some(reason) => Err(SessionError::ReadOut {
                reason: reason.clone(),
            }),
            None => Ok(()),
        }
    }

    fn check_tokens(&self, tokens: &[TokenId]) -> Result<(), SessionError> {
        let vocab = self.bounds.vocab;
        match tokens.iter().find(|token| token.0 as usize >= vocab) {
            Some(&token) => Err(SessionError::TokenOutOfRange { token, vocab }),
            None => Ok(()),
        }
    }

    /// Whether so many more tokens fit a document that has some, and the session.
    fn check_lengths(&self, document: usize, more: usize) -> Result<(), SessionError> {
        let (tokens, limit) = (document.saturating_add(more), self.bounds.window_limit);
        if self.strategy == Strategy::Concat && tokens > limit {
            return Err(SessionError::DocumentTooLong { tokens, limit });
        }
        let all: usize = self
            .documents
            .iter()
            .map(|document| document.tokens.len())
            .sum();
        let (tokens, limit) = (all.saturating_add(more), self.bounds.max_session_tokens);
        if tokens > limit {
            return Err(SessionError::TooManyTokens { tokens, limit });
        }
        Ok(())
    }

    fn open_document(&self) -> Option<&Document> {
        self.documents.last().filter(|document| !document.complete)
    }

    /// The place behind all that has come.
    fn log_end(&self) -> Place {
        match self.open_document() {
            Some(open) => open.end(),
            None => Place {
                document: self.next_number,
                token: 0,
            },
        }
    }

    /// The place behind all that was read.
    fn read_place(&self) -> Place {
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

    /// While a sequential session reads again: the place up to which it had been read before.
    fn rereading(&self) -> Option<Place> {
        self.barriers
            .iter()
            .take(self.rereads())
            .map(|barrier| barrier.place)
            .max()
    }

    /// How many barriers wait for a second reading; they stand before all others.
    fn rereads(&self) -> usize {
        self.barriers
            .iter()
            .take_while(|barrier| matches!(barrier.asks, Asks::Reread { .. }))
            .count()
    }

    fn core_bytes(&self) -> usize {
        self.newest.core.as_ref().map_or(0, Core::bytes)
    }

    /// That it is open, with what its newest version holds.
    pub(crate) fn opened(&self) -> Event {
        let Published {
            version,
            seq,
            digest,
            tokens,
            ..
        } = self.newest;
        let (state_bytes, core_bytes) = (self.state_bytes(), self.core_bytes());
        Event::Opened {
            session: self.id,
            seq,
            version,
            digest,
            tokens,
            state_bytes,
            core_bytes,
        }
    }

    fn applied(&self) -> Event {
        let Published {
            version,
            seq,
            digest,
            tokens,
            ..
        } = self.newest;
        let (state_bytes, core_bytes) = (self.state_bytes(), self.core_bytes());
        Event::Applied {
            session: self.id,
            seq,
            version,
            digest,
            tokens,
            state_bytes,
            core_bytes,
        }
    }

    fn forgotten(&self, document: DocumentId) -> Event {
        let Published {
            version,
            digest,
            tokens,
            ..
        } = self.newest;
        let (state_bytes, core_bytes) = (self.state_bytes(), self.core_bytes());
        Event::Forgotten {
            session: self.id,
            document,
            version,
            digest,
            tokens,
            state_bytes,
            core_bytes,
        }
    }
}

/// What a version is made of.
struct Fold {
    digest: Digest,
    tokens: usize,
    core: Option<Core>,
}
