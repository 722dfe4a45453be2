//! One session: what it is, who uses it, and what waits in it. What happens to a chunk is in `take`, to a flush in `versions`.
//!
//! One writer at a time: chunks of several streams are serialised by a lock. All that can fail or wait comes before the commit;
//! behind it nothing does, so a client that goes away in mid-stream leaves whole chunks. The open document's tokenizer lives
//! here, not in a stream: any stream continues it. Start at [`Session::take`].

mod take;
mod versions;

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant, SystemTime},
};

use engine::{Chosen, Command, DocumentId, Part, Seq, SessionId, Strategy, TokenId};
use lm::text::{DocumentTokenizer, Text, TextDecoder};
use relevance::{Asked, Meant, Spoken};
use store::Store;
use tokio::sync::{Semaphore, SemaphorePermit, mpsc, watch};

pub use self::take::{Taken, checked};
use super::feed::{self, Item};
use crate::{
    auth::Tenant,
    engine_thread::{Attach, Handle, Link, Progress},
    states::States,
    status::Error,
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
    /// What it speaks of.
    pub spoken: Arc<Spoken>,
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
    /// The text of its tokens, as they come.
    decoder: TextDecoder,
    /// Chunks whose text is not yet tokens throughout: `seq` and where its text ends in the document.
    pending: VecDeque<(u64, usize)>,
    /// Bytes of text so far.
    bytes: usize,
    tokens: usize,
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

    /// How far the session's imprint is meant by a prompt, from 0 to 1, and what of it is.
    #[must_use]
    pub fn meant(&self, asked: &Asked) -> (f32, Chosen) {
        let documents = locked(&self.documents);
        let spoken: Vec<&Spoken> = documents.iter().map(|document| &*document.spoken).collect();
        let Meant {
            strength,
            parts,
            beside,
            gated,
        } = relevance::meant(&spoken, asked);
        let parts = parts.unwrap_or_default().into_iter().map(|part| {
            let document = documents.get(part.document)?;
            document.complete.then_some(Part {
                document: document.id,
                tokens: part.tokens,
                around: part.around,
            })
        });
        // Of an open document the newest version alone has the end.
        let parts = parts.collect::<Option<Vec<Part>>>().unwrap_or_default();
        let chosen = Chosen {
            parts,
            beside,
            gated,
        };
        (strength, chosen)
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
    pub(crate) async fn writer(&self) -> Result<tokio::sync::MutexGuard<'_, Writer>, Error> {
        let writer = self.writer.lock().await;
        if self.rooms.link.progress.borrow().closed {
            return Err(Error::UnknownSession(self.name.clone()));
        }
        Ok(writer)
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
        });
    }
}

/// Keeps what a permit stands for, and says how much that is.
fn taken(permit: SemaphorePermit<'_>) -> usize {
    let tokens = permit.num_permits();
    permit.forget();
    tokens
}
