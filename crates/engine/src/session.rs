//! A session: ordered documents, the fold of what was read of them, and the newest version.
//!
//! Tokens queue up in their documents (`take`); the engine runs [`Session::row`]s until nothing is wanted (`rows`), and
//! [`Session::settle`] does all that needs no forward: windows close, documents are folded, versions appear (`versions`). A
//! publish and a forget that needs reading again (`forget`) are *barriers*: places in the log that reading stops at until
//! they are answered.
//!
//! The fold: total = left fold over documents in log order of the left fold over each one's windows, every sum from an
//! empty state. Whatever way leads to a version, its additions are these, in this order; so equal digests are equal bits.
//! Start at [`Session::settle`].

mod forget;
mod rest;
mod rows;
mod take;
mod versions;

use std::{collections::VecDeque, sync::Arc};

use generator::{Generator, State, Strategy};

pub(crate) use self::versions::{Fold, Folding};
use crate::{
    blocks::{BlockAllocator, Blocks},
    cores::{CoreBudget, HeldCore},
    digest::StateHash,
    document::{Document, Place},
    error::SessionError,
    event::{Event, Newest},
    ids::{Digest, DocumentId, Seq, SessionId, TenantId, TokenId, Version},
    machine::Machine,
    reading::Reading,
    snapshot::Need,
    traces::{HeldTrace, TraceBudget},
};

/// A published version. Immutable; a copy costs nothing.
#[derive(Clone, Debug)]
pub(crate) struct Published {
    pub(crate) version: Version,
    /// All chunks up to this one are in it.
    pub(crate) seq: Seq,
    pub(crate) digest: Digest,
    /// None is the bare model.
    pub(crate) core: Option<HeldCore>,
    /// Context tokens in it.
    pub(crate) tokens: usize,
    /// The sums that it was read out of, where a provisional end is in them and a gate may ask for them.
    pub(crate) sums: Option<Arc<State>>,
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
    /// The most bytes of one core.
    pub(crate) core_bytes: usize,
    /// Bytes of a token in a trace.
    pub(crate) trace_row_bytes: usize,
    pub(crate) max_documents: usize,
    pub(crate) max_session_tokens: usize,
}

/// What settling needs of the engine.
pub(crate) struct Context<'a> {
    pub(crate) generator: &'a Generator,
    pub(crate) machine: &'a dyn Machine,
    pub(crate) allocator: &'a mut BlockAllocator,
    pub(crate) cores: &'a CoreBudget,
    pub(crate) traces: &'a TraceBudget,
    pub(crate) events: &'a mut Vec<Event>,
    /// Whether another portion may be read out now.
    pub(crate) portion: &'a mut dyn FnMut() -> bool,
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
        /// Whether somebody is to be told if the version does not fit.
        asked: bool,
    },
    /// What was read before is being read again without a document; versions do not appear until this one. A fork owes
    /// nobody the name.
    Reread { forgotten: Option<DocumentId> },
    /// All is being read again, as something of it has left memory. Nobody is told.
    Remade,
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
    /// Whose it is.
    pub(crate) tenant: TenantId,
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
    /// The next version, while its core is being read out. Nothing is read meanwhile.
    folding: Option<Folding>,
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
    /// What has left memory.
    gone: Need,
    /// Why what has left could not be made again.
    pub(crate) unmade: Option<String>,
    /// The state that a snapshot is kept of, and what of it.
    pub(crate) kept: Option<(Digest, Need)>,
    /// When it was last spoken of: the lowest leaves first.
    pub(crate) used: u64,
}

impl Session {
    /// An empty session at version 0.
    pub(crate) fn new(
        (id, tenant): (SessionId, TenantId),
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
            sums: None,
        };
        Ok(Self {
            id,
            tenant,
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
            folding: None,
            newest,
            blocks: Blocks::default(),
            failed: None,
            refused: None,
            turn: None,
            last_step: 0,
            yielded: false,
            gone: Need::default(),
            unmade: None,
            kept: None,
            used: 0,
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
            tenant: self.tenant,
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
            folding: None,
            newest: self.newest.clone(),
            blocks: Blocks::default(),
            failed: self.failed.clone(),
            refused: self.refused.clone(),
            turn: None,
            last_step: 0,
            yielded: false,
            gone: self.gone,
            unmade: None,
            kept: None,
            used: self.used,
        })
    }

    pub(crate) fn newest(&self) -> &Published {
        &self.newest
    }

    /// Whether its next version is being read out: it goes on without a forward.
    pub(crate) fn is_folding(&self) -> bool {
        self.folding.is_some()
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

    /// Bytes that its states may come to take, `more` documents added, while it is told something and cannot rest: what is held
    /// when all is read, the open window's sums and a provisional end's sums and state. 0 for a session that can rest: others take
    /// its place.
    pub(crate) fn owed_bytes(&self, more: usize) -> usize {
        if more == 0 && !self.is_behind() {
            return 0;
        }
        self.states(self.documents.len() + more, true)
    }

    /// Bytes that its states take in memory now, or may come to take while it goes on reading.
    pub(crate) fn resident_bytes(&self) -> usize {
        if self.gone.sums && !self.is_rereading() {
            return 0;
        }
        self.states(
            self.documents.len(),
            self.is_behind() || self.is_rereading(),
        )
    }

    /// Bytes of all its states when they are in memory.
    pub(crate) fn whole_bytes(&self) -> usize {
        self.states(self.documents.len(), true)
    }

    fn states(&self, documents: usize, behind: bool) -> usize {
        let states = match (documents, self.strategy, behind) {
            (0, ..) => 0,
            (_, Strategy::Sequential, false) => 3,
            (_, Strategy::Sequential, true) => 5,
            (documents, Strategy::Concat | Strategy::Parallel, false) => {
                documents.saturating_add(1)
            }
            (documents, Strategy::Concat | Strategy::Parallel, true) => documents.saturating_add(4),
        };
        states.saturating_mul(self.bounds.state_bytes)
    }

    /// Whether a document is open or unread. One that is read again is not: nothing of it is provisional.
    fn is_behind(&self) -> bool {
        let mut rest = self
            .documents
            .get(self.current..)
            .unwrap_or_default()
            .iter();
        self.tail.is_some() || rest.any(|document| !document.complete || document.waiting() > 0)
    }

    /// Bytes of what single tokens wrote, as far as it is kept.
    pub(crate) fn trace_bytes(&self) -> usize {
        let reading = self.reading.as_ref().map(|reading| &reading.trace);
        let traces = self.documents.iter().map(|document| &document.trace);
        let traces = traces.chain(reading).flatten();
        traces.map(HeldTrace::bytes).sum()
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
        let sums = self.newest.sums.as_ref().map_or(0, |sums| sums.bytes());
        folded + reading + sums + documents.sum::<usize>()
    }

    fn open_document(&self) -> Option<&Document> {
        self.documents.last().filter(|document| !document.complete)
    }

    /// The newest version, and what the session takes.
    fn facts(&self) -> Newest {
        let Published {
            version,
            seq,
            digest,
            tokens,
            ref core,
            ..
        } = self.newest;
        Newest {
            seq,
            version,
            digest,
            tokens,
            state_bytes: self.state_bytes(),
            trace_bytes: self.trace_bytes(),
            core_bytes: core.as_ref().map_or(0, HeldCore::bytes),
        }
    }

    /// That it is open, with what its newest version holds.
    pub(crate) fn opened(&self) -> Event {
        let (session, newest) = (self.id, self.facts());
        Event::Opened { session, newest }
    }
}
