//! One session: a chunk is checked, tokenised, committed to the log, and only then acknowledged and fed to the engine.
//!
//! One writer at a time: chunks of several streams are serialised by a lock. All that can fail or wait comes before the commit;
//! behind it nothing does, so a client that goes away in mid-stream leaves whole chunks. The open document's tokenizer lives
//! here, not in a stream: any stream continues it. Start at [`Session::take`].

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant, SystemTime},
};

use engine::{Command, DocumentId, Seq, SessionError, SessionId, Strategy, TokenId, Version};
use lm::text::{DocumentTokenizer, Text};
use store::{Appended, Chunk, Content, Place, Store};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, SemaphorePermit, mpsc, oneshot, watch};

use super::{
    feed::{self, Item},
    states::States,
};
use crate::{
    auth::Tenant,
    engine_thread::{Attach, Handle, Link, Progress},
    status::{Error, Violation},
};

/// Text beyond so many bytes is tokenised on a thread for blocking work.
pub(crate) const INLINE_BYTES: usize = 16 << 10;
/// Tokens' room that an item takes by itself: what has few tokens, or none, takes memory, too.
const ITEM: usize = 16;

/// What all sessions of a server have in common.
#[derive(Clone, Debug)]
pub struct Rules {
    /// Bytes of a chunk's content.
    pub chunk_bytes: usize,
    /// Context tokens of a session, as the engine bounds them.
    pub session_tokens: usize,
    /// Tokens of a document with strategy concat, where a document is one window.
    pub concat_tokens: usize,
    /// Documents of a session that are not forgotten, as the engine bounds them.
    pub documents: usize,
    /// Context tokens of a session that are accepted and wait for the engine.
    pub waiting_tokens: usize,
    /// Context tokens that the engine holds unread, over those of the open window.
    pub unread_tokens: usize,
    /// States that all sessions may have, as the engine bounds them.
    pub states: States,
    /// How long after the last chunk a version is published unasked.
    pub idle_publish: Option<Duration>,
    /// Ids are below this: the model's, which may be more than the tokenizer's.
    pub vocab: usize,
    /// What stands before the text at the context's start.
    pub bos: Option<TokenId>,
    /// What is put behind a text document.
    pub document_suffix: String,
}

/// What a client may change of a session, and when it was used.
#[derive(Clone, Debug)]
pub struct About {
    /// The client's labels.
    pub labels: BTreeMap<String, String>,
    /// How long it outlives its last use.
    pub ttl: Option<Duration>,
    /// When it was last used, for its expiry.
    pub used: Instant,
    /// When it was last used, for people.
    pub used_time: SystemTime,
    /// Calls that use it now: it does not expire under them.
    users: usize,
}

impl About {
    /// Labels and time to live of a session that is used now.
    #[must_use]
    pub fn new(labels: BTreeMap<String, String>, ttl: Option<Duration>) -> Self {
        Self {
            labels,
            ttl,
            used: Instant::now(),
            used_time: SystemTime::now(),
            users: 0,
        }
    }
}

/// A document that is not forgotten.
#[derive(Clone, Debug)]
pub struct Document {
    /// The client's name for it.
    pub name: String,
    /// The engine's number for it.
    pub id: DocumentId,
    /// Tokens of it that are accepted; a held-back end of the text is not counted.
    pub tokens: usize,
    /// Whether its end has come.
    pub complete: bool,
    /// The first `seq` that spoke of it.
    pub first_seq: u64,
    /// The last `seq` that spoke of it.
    pub last_seq: u64,
}

/// What a session works with.
pub(super) struct Rooms {
    pub(super) engine: Handle,
    pub(super) text: Text,
    pub(super) store: Arc<dyn Store>,
    pub(super) rules: Arc<Rules>,
    pub(super) link: Arc<Link>,
}

/// One session.
pub struct Session {
    /// Its name for clients.
    pub name: String,
    /// Its number in the engine.
    pub id: SessionId,
    /// Whose it is.
    pub tenant: Tenant,
    /// How its windows are folded.
    pub strategy: Strategy,
    /// Tokens in a window.
    pub window: usize,
    /// When it was created.
    pub created: SystemTime,
    /// The session that it was forked from.
    pub forked_from: Option<String>,
    rooms: Rooms,
    about: Mutex<About>,
    documents: Mutex<Vec<Document>>,
    writer: tokio::sync::Mutex<Writer>,
    feed: mpsc::UnboundedSender<Item>,
    /// Taken by `start_feed`.
    items: Mutex<Option<mpsc::UnboundedReceiver<Item>>>,
    /// Tokens that may still wait in the feed: its bound.
    room: Arc<Semaphore>,
    /// Its part of all sessions' states.
    states: Mutex<Option<OwnedSemaphorePermit>>,
}

/// What only the writer touches.
#[derive(Clone, Default)]
pub struct Writer {
    open: Option<Open>,
    /// Number of the next document.
    next_document: u64,
    /// The last accepted chunk.
    accepted: u64,
    /// All chunks up to this one are tokens throughout.
    whole: u64,
    /// Tokens of all documents that are not forgotten.
    tokens: usize,
}

/// The open document.
#[derive(Clone)]
struct Open {
    id: DocumentId,
    /// None for a document of ids.
    tokenizer: Option<DocumentTokenizer>,
    /// Chunks whose text is not yet tokens throughout: `seq` and where its text ends in the document.
    pending: VecDeque<(u64, usize)>,
    /// Bytes of text so far.
    bytes: usize,
    tokens: usize,
}

/// What a chunk comes to, worked out before anything is changed.
struct Plan {
    /// The last tokens of the document that ends because another begins.
    closing: Option<Vec<TokenId>>,
    /// The chunk's tokens, and those that were held back before it.
    tokens: Vec<TokenId>,
    /// The document's tokenizer behind the chunk; none for ids.
    tokenizer: Option<DocumentTokenizer>,
    /// Tokens that are still held back, with the document's suffix.
    held: usize,
}

impl Plan {
    fn count(&self) -> usize {
        self.tokens.len() + self.closing.as_ref().map_or(0, Vec::len)
    }
}

/// A chunk was taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Taken {
    /// Whether it had been taken before.
    pub duplicate: bool,
}

/// Keeps a session from expiring while a call uses it.
pub struct User(Arc<Session>);

impl User {
    /// The session.
    #[must_use]
    pub fn session(&self) -> &Arc<Session> {
        &self.0
    }
}

impl Drop for User {
    fn drop(&mut self) {
        let mut about = self.0.about();
        about.users = about.users.saturating_sub(1);
        about.used = Instant::now();
        about.used_time = SystemTime::now();
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // No change under these locks can panic half-way.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Session {
    #[expect(
        clippy::too_many_arguments,
        reason = "the fields of the type, once, from its one caller"
    )]
    pub(super) fn new(
        name: String,
        id: SessionId,
        tenant: Tenant,
        strategy: Strategy,
        window: usize,
        forked_from: Option<String>,
        about: About,
        rooms: Rooms,
    ) -> Self {
        let (feed, items) = mpsc::unbounded_channel();
        let room = Arc::new(Semaphore::new(rooms.rules.waiting_tokens));
        Self {
            name,
            id,
            tenant,
            strategy,
            window,
            created: SystemTime::now(),
            forked_from,
            rooms,
            about: Mutex::new(about),
            documents: Mutex::default(),
            writer: tokio::sync::Mutex::default(),
            feed,
            items: Mutex::new(Some(items)),
            room,
            states: Mutex::default(),
        }
    }

    /// Begins to feed the engine, which has been told all chunks up to `fed`.
    pub(super) fn start_feed(self: &Arc<Self>, fed: u64) {
        if let Some(items) = locked(&self.items).take() {
            let engine = self.rooms.engine.clone();
            tokio::spawn(feed::run(
                Arc::downgrade(self),
                engine,
                self.link(),
                Seq(fed),
                items,
            ));
        }
    }

    pub(super) fn link(&self) -> Arc<Link> {
        Arc::clone(&self.rooms.link)
    }

    pub(super) fn engine(&self) -> &Handle {
        &self.rooms.engine
    }

    pub(super) fn idle_publish(&self) -> Option<Duration> {
        self.rooms.rules.idle_publish
    }

    /// Gives room in the feed back.
    pub(super) fn free(&self, tokens: usize) {
        self.room.add_permits(tokens);
    }

    /// The newest of what happened, and a wait for the next.
    #[must_use]
    pub fn progress(&self) -> watch::Receiver<Progress> {
        self.rooms.link.progress.subscribe()
    }

    /// Labels, time to live, last use.
    pub fn about(&self) -> MutexGuard<'_, About> {
        locked(&self.about)
    }

    /// Documents that are not forgotten, in the order in which they were begun.
    #[must_use]
    pub fn documents(&self) -> Vec<Document> {
        locked(&self.documents).clone()
    }

    /// How many documents are not forgotten.
    #[must_use]
    pub fn document_count(&self) -> usize {
        locked(&self.documents).len()
    }

    pub(super) fn touch(&self, now: Instant) {
        let mut about = self.about();
        about.used = about.used.max(now);
        about.used_time = SystemTime::now();
    }

    /// Whether its time is over: unused for longer than its `ttl`.
    #[must_use]
    pub fn expired(&self, now: Instant) -> bool {
        let about = self.about();
        about.users == 0
            && about
                .ttl
                .is_some_and(|ttl| now.saturating_duration_since(about.used) >= ttl)
    }

    /// Keeps the session from expiring until the returned value is dropped.
    #[must_use]
    pub fn user(self: &Arc<Self>) -> User {
        self.about().users += 1;
        User(Arc::clone(self))
    }

    /// The right to write; waits for other writers.
    pub(super) async fn writer(&self) -> Result<tokio::sync::MutexGuard<'_, Writer>, Error> {
        let writer = self.writer.lock().await;
        if self.rooms.link.progress.borrow().closed {
            return Err(Error::UnknownSession(self.name.clone()));
        }
        Ok(writer)
    }

    /// Takes a chunk: when this returns, it is in the log, and will become part of the state.
    ///
    /// # Errors
    /// [`Error::Store`] about `seq`, document or bounds, [`Error::Invalid`] about the content, [`Error::Context`] if the
    /// session can take no more. Nothing of the chunk is applied then.
    pub async fn take(&self, seq: u64, chunk: Chunk) -> Result<Taken, Error> {
        let rules = &self.rooms.rules;
        let bytes = chunk.content.bytes();
        if bytes > rules.chunk_bytes {
            let why = format!("has {bytes} bytes, more than {}", rules.chunk_bytes);
            return Err(Error::Invalid(vec![Violation::new(
                field(&chunk.content),
                why,
            )]));
        }
        let mut writer = self.writer().await?;
        let place = match self.rooms.store.check(&self.name, seq, &chunk)? {
            Appended::Duplicate => return Ok(Taken { duplicate: true }),
            Appended::Accepted(place) => place,
        };
        if let Some(error) = self.rooms.link.progress.borrow().failed.clone() {
            return Err(Error::Context(error));
        }
        let plan = self.plan(&writer, &chunk, &place).await?;
        // Waits while the engine is behind: the client is slowed down here.
        let room = self.wait_for_room(plan.count()).await?;
        let end = chunk.end_of_document;
        if place.begins {
            self.grow(self.document_count() + 1)?;
        }
        self.rooms.store.append(&self.name, seq, chunk)?;
        // From here on nothing waits and nothing fails.
        let commands = self.apply(&mut writer, plan, seq, bytes, end, &place);
        self.rooms
            .link
            .progress
            .send_modify(|progress| progress.accepted = seq);
        self.put(Item {
            commands,
            attach: Attach::Nobody,
            room: taken(room),
            states: None,
        });
        Ok(Taken { duplicate: false })
    }

    /// Takes the states of so many documents. If less comes of it, they serve the next ones.
    pub(super) fn grow(&self, documents: usize) -> Result<(), Error> {
        let mut mine = locked(&self.states);
        let have = mine.as_ref().map_or(0, OwnedSemaphorePermit::num_permits);
        let more = States::of(self.strategy, documents).saturating_sub(have);
        let more = self.rooms.rules.states.take(more);
        let more = more.map_err(Error::Context)?;
        match mine.as_mut() {
            Some(mine) => mine.merge(more),
            None => *mine = Some(more),
        }
        Ok(())
    }

    /// States that are not needed for so many documents.
    fn shrink(&self, documents: usize) -> Option<OwnedSemaphorePermit> {
        let mut mine = locked(&self.states);
        let mine = mine.as_mut()?;
        let less = States::of(self.strategy, documents);
        mine.split(mine.num_permits().saturating_sub(less))
    }

    /// Takes no context if `from` takes none.
    pub(super) fn fail_like(&self, from: &Self) {
        let failed = from.rooms.link.progress.borrow().failed.clone();
        if failed.is_some() {
            self.rooms
                .link
                .progress
                .send_modify(|progress| progress.failed = failed);
        }
    }

    /// Waits for an item's room in the feed, which is given back if the permit is dropped.
    async fn wait_for_room(&self, tokens: usize) -> Result<SemaphorePermit<'_>, Error> {
        let room = tokens
            .saturating_add(ITEM)
            .min(self.rooms.rules.waiting_tokens);
        self.room
            .acquire_many(u32::try_from(room).unwrap_or(u32::MAX))
            .await
            .map_err(|_| Error::UnknownSession(self.name.clone()))
    }

    fn put(&self, item: Item) {
        // The receiver ends with the session, and then the item is nobody's.
        if let Err(mpsc::error::SendError(item)) = self.feed.send(item) {
            item.abandon();
        }
    }

    /// Works out what a new chunk comes to.
    async fn plan(&self, writer: &Writer, chunk: &Chunk, place: &Place) -> Result<Plan, Error> {
        let rules = &self.rooms.rules;
        if place.begins && self.document_count() >= rules.documents {
            return Err(Error::Store(store::Error::Full {
                what: "documents",
                limit: rules.documents,
            }));
        }
        let tokenizer = writer.open.as_ref().and_then(|open| open.tokenizer.clone());
        let held = tokenizer.as_ref().map_or(0, DocumentTokenizer::held_bytes);
        let first = writer.next_document == 0;
        let plan = if chunk.content.bytes() + held <= INLINE_BYTES {
            plan(tokenizer, first, rules, &self.rooms.text, chunk, place)?
        } else {
            let (rules, text) = (Arc::clone(rules), self.rooms.text.clone());
            let (chunk, place) = (chunk.clone(), place.clone());
            let work = move || plan(tokenizer, first, &rules, &text, &chunk, &place);
            tokio::task::spawn_blocking(work)
                .await
                .map_err(|_| Error::Internal("tokenising panicked"))??
        };
        let tokens = writer
            .tokens
            .saturating_add(plan.count())
            .saturating_add(plan.held);
        if tokens > rules.session_tokens {
            return Err(Error::Context(SessionError::TooManyTokens {
                tokens,
                limit: rules.session_tokens,
            }));
        }
        if self.strategy == Strategy::Concat {
            let limit = rules.concat_tokens;
            let before = writer.open.as_ref().map_or(0, |open| open.tokens);
            let closed = plan
                .closing
                .as_ref()
                .map_or(0, |closing| before + closing.len());
            let tokens = plan.tokens.len() + plan.held + if place.begins { 0 } else { before };
            if let Some(tokens) = [closed, tokens].into_iter().find(|tokens| *tokens > limit) {
                return Err(Error::Context(SessionError::DocumentTooLong {
                    tokens,
                    limit,
                }));
            }
        }
        Ok(plan)
    }

    /// Makes the plan true, and returns what the engine is to be told.
    fn apply(
        &self,
        writer: &mut Writer,
        plan: Plan,
        seq: u64,
        bytes: usize,
        end: bool,
        place: &Place,
    ) -> Vec<Command> {
        let session = self.id;
        let mut documents = locked(&self.documents);
        let mut commands = Vec::with_capacity(2);
        writer.tokens += plan.count();
        if let (Some(tokens), Some(open)) = (plan.closing, writer.open.take_if(|_| place.begins)) {
            if let Some(last) = documents.last_mut() {
                last.tokens += tokens.len();
                last.complete = true;
            }
            let (seq, document) = (Seq(writer.accepted), open.id);
            commands.push(Command::Ingest {
                session,
                seq,
                document,
                tokens,
                end_of_document: true,
            });
            writer.whole = writer.accepted;
        }
        if place.begins {
            let id = DocumentId(writer.next_document);
            writer.next_document += 1;
            writer.open = Some(Open {
                id,
                tokenizer: None,
                pending: VecDeque::new(),
                bytes: 0,
                tokens: 0,
            });
            let name = place.document.clone();
            documents.push(Document {
                name,
                id,
                tokens: 0,
                complete: false,
                first_seq: seq,
                last_seq: seq,
            });
        }
        writer.accepted = seq;
        // `place` is in an open document: the one that was open, or the one that has just begun.
        let Some(open) = writer.open.as_mut() else {
            return commands;
        };
        open.tokens += plan.tokens.len();
        if let Some(last) = documents.last_mut() {
            last.tokens = open.tokens;
            last.complete = end;
            last.last_seq = seq;
        }
        open.bytes += bytes;
        open.pending.push_back((seq, open.bytes));
        let committed = match &plan.tokenizer {
            Some(tokenizer) if !end => tokenizer.committed_bytes(),
            _ => usize::MAX,
        };
        let before = writer.whole;
        while let Some((seq, _)) = open.pending.pop_front_if(|(_, end)| *end <= committed) {
            writer.whole = seq;
        }
        open.tokenizer = plan.tokenizer;
        let document = open.id;
        if end {
            writer.open = None;
        }
        if place.begins || end || !plan.tokens.is_empty() || writer.whole > before {
            let seq = Seq(writer.whole);
            commands.push(Command::Ingest {
                session,
                seq,
                document,
                tokens: plan.tokens,
                end_of_document: end,
            });
        }
        commands
    }

    /// Asks for a version of all that was accepted; returns the `seq` that will be in it, or `None` if nothing ever was. Waits
    /// for room, as a chunk does; nothing is asked if the wait is given up.
    ///
    /// # Errors
    /// [`Error::Text`] if the held-back end cannot be tokenised; [`Error::UnknownSession`] if the session is gone.
    pub async fn publish(&self) -> Result<Option<u64>, Error> {
        let writer = self.writer().await?;
        let Some((seq, command, tokens)) = self.publication(&writer)? else {
            return Ok(None);
        };
        let room = self.wait_for_room(tokens).await?;
        self.put(Item {
            commands: vec![command],
            attach: Attach::Nobody,
            room: taken(room),
            states: None,
        });
        Ok(Some(seq))
    }

    /// As `publish`, unless somebody writes just now: `false` then. The feed itself asks, so it waits for no room: there is one
    /// such publication at most.
    pub(super) fn try_publish(&self) -> Result<bool, Error> {
        let Ok(writer) = self.writer.try_lock() else {
            return Ok(false);
        };
        if let Some((_, command, _)) = self.publication(&writer)? {
            self.put(Item {
                commands: vec![command],
                attach: Attach::Nobody,
                room: 0,
                states: None,
            });
        }
        Ok(true)
    }

    /// The command for a version of all that was accepted, with its `seq` and its tokens.
    fn publication(&self, writer: &Writer) -> Result<Option<(u64, Command, usize)>, Error> {
        if writer.accepted == 0 {
            return Ok(None);
        }
        let tokenizer = writer
            .open
            .as_ref()
            .and_then(|open| open.tokenizer.as_ref());
        let provisional = match tokenizer {
            Some(tokenizer) => tokenizer.provisional(&self.rooms.rules.document_suffix)?,
            None => Vec::new(),
        };
        let tokens = provisional.len();
        let command = Command::Publish {
            session: self.id,
            seq: Seq(writer.accepted),
            provisional,
        };
        Ok(Some((writer.accepted, command, tokens)))
    }

    /// Forgets a document.
    ///
    /// # Errors
    /// [`Error::UnknownDocument`], what the engine says, [`Error::EngineStopped`].
    pub async fn forget(&self, document: &str) -> Result<(Version, engine::Digest), Error> {
        let mut writer = self.writer().await?;
        let unknown = || Error::UnknownDocument(document.to_owned());
        let (id, tokens) = {
            let documents = locked(&self.documents);
            let known = documents
                .iter()
                .find(|known| known.name == document)
                .ok_or_else(unknown)?;
            (known.id, known.tokens)
        };
        self.rooms
            .store
            .forget(&self.name, document)
            .map_err(|_| unknown())?;
        locked(&self.documents).retain(|known| known.id != id);
        if writer.open.as_ref().is_some_and(|open| open.id == id) {
            writer.open = None;
            writer.whole = writer.accepted;
        }
        writer.tokens = writer.tokens.saturating_sub(tokens);
        let (done, forgotten) = oneshot::channel();
        let command = Command::Forget {
            session: self.id,
            document: id,
        };
        self.put(Item {
            commands: vec![command],
            attach: Attach::Forget(done),
            room: 0,
            states: self.shrink(self.document_count()),
        });
        drop(writer);
        match forgotten.await {
            Ok(done) => done.map_err(Error::Context),
            Err(_) if self.rooms.link.progress.borrow().closed => {
                Err(Error::UnknownSession(self.name.clone()))
            }
            Err(_) => Err(Error::EngineStopped),
        }
    }

    /// Takes over what `from` has, its writer being held, and begins to feed the engine behind it.
    pub(super) fn copy_from(self: &Arc<Self>, writer: &Writer, from: &Self) {
        if let Ok(mut mine) = self.writer.try_lock() {
            *mine = writer.clone();
        }
        *locked(&self.documents) = from.documents();
        self.rooms
            .link
            .progress
            .send_modify(|progress| progress.accepted = writer.accepted);
        self.start_feed(writer.whole);
    }

    /// Feeds the fork of this session, behind all that was fed before.
    pub(super) fn feed_fork(&self, command: Command, link: Arc<Link>) {
        self.put(Item {
            commands: vec![command],
            attach: Attach::Session(link),
            room: 0,
            states: None,
        });
    }

    /// Ends the session: wakes all who wait for it, and tells the engine.
    pub(super) fn close(&self) {
        self.rooms
            .link
            .progress
            .send_modify(|progress| progress.closed = true);
        self.room.close();
        self.rooms.link.credit.close();
        self.put(Item {
            commands: vec![Command::Close { session: self.id }],
            attach: Attach::Nobody,
            room: 0,
            states: locked(&self.states).take(),
        });
    }
}

/// Keeps what a permit stands for, and says how much that is.
fn taken(permit: SemaphorePermit<'_>) -> usize {
    let tokens = permit.num_permits();
    permit.forget();
    tokens
}

fn field(content: &Content) -> &'static str {
    match content {
        Content::Text(_) => "chunk.text",
        Content::Ids(_) => "chunk.token_ids",
    }
}

/// Tokenises a chunk behind what its document holds so far. `first` says that nothing came before it in the session.
fn plan(
    tokenizer: Option<DocumentTokenizer>,
    first: bool,
    rules: &Rules,
    text: &Text,
    chunk: &Chunk,
    place: &Place,
) -> Result<Plan, Error> {
    let suffix = rules.document_suffix.as_str();
    let mut tokens = Vec::new();
    let mut closing = None;
    let mut tokenizer = tokenizer;
    if place.begins {
        let before = tokenizer.take();
        if place.ends_open {
            closing = Some(before.map_or_else(|| Ok(Vec::new()), |before| before.finish(suffix))?);
        }
        if let Content::Text(_) = chunk.content {
            tokenizer = Some(text.document());
            tokens.extend(rules.bos.filter(|_| first));
        }
    }
    match (&chunk.content, tokenizer.as_mut()) {
        (Content::Text(text), Some(tokenizer)) => tokens.extend(tokenizer.push(text)?),
        // An empty text that ends a document of ids.
        (Content::Text(_), None) => {}
        (Content::Ids(ids), _) => tokens.extend(checked("chunk.token_ids", ids, rules.vocab)?),
    }
    let mut held = 0;
    if chunk.end_of_document {
        if let Some(tokenizer) = tokenizer.take() {
            tokens.extend(tokenizer.finish(suffix)?);
        }
    } else if let Some(tokenizer) = &tokenizer {
        held = tokenizer.held_bytes() + suffix.len(); // a token has at least one byte
    }
    Ok(Plan {
        closing,
        tokens,
        tokenizer,
        held,
    })
}

/// Ids of the vocabulary.
///
/// # Errors
/// [`Error::Invalid`] names the first that is none.
pub fn checked(field: &str, ids: &[u32], vocab: usize) -> Result<Vec<TokenId>, Error> {
    let wrong = ids.iter().position(|id| *id as usize >= vocab);
    if let Some((index, id)) = wrong.and_then(|index| Some((index, ids.get(index)?))) {
        let why = format!("is {id}, not below the vocabulary size {vocab}");
        return Err(Error::Invalid(vec![Violation::new(
            format!("{field}.ids[{index}]"),
            why,
        )]));
    }
    Ok(ids.iter().copied().map(TokenId).collect())
}
