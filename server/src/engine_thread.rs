//! The thread that owns the engine: commands in over a bounded channel, events out to whom they concern.
//!
//! It knows no text, no store and no gRPC. What the engine's queue for context has no room for is held here, in order, until
//! steps have made room; a request that it has no room for is answered at once. The thread parks while there is nothing to do.
//! Start at `Worker::run`.

#[cfg(test)]
mod tests;

use std::{
    collections::{HashMap, VecDeque},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread::JoinHandle,
    time::Instant,
};

use engine::{
    Command, Digest, DocumentId, Engine, Event, Full, ModelInfo, Newest, Rejected, RequestId, Seq,
    SessionError, SessionId, Usage, Version,
};
use tokio::sync::{Semaphore, mpsc, oneshot, watch};

use crate::{
    config::Cuda,
    metrics::{Metrics, Watch},
    snapshots::{Disk, Gauge, Job, Place, without_disk},
    states::Account,
    status::Error,
};

/// Messages that wait for the thread.
const MAILBOX: usize = 256;
/// The most tokens of one command.
const PIECE: usize = 1024;
/// Context commands that are held because the engine's queue is full; beyond it the mailbox is not emptied.
const HELD: usize = 1024;

/// What a session's clients may know of it, as of the newest event.
#[derive(Clone, Debug, Default)]
pub struct Progress {
    /// The last accepted chunk.
    pub accepted: u64,
    /// The newest version; none until the engine has opened the session.
    pub newest: Option<Newest>,
    /// How many publications were announced, repeated ones included.
    pub announced: u64,
    /// Why the session could not be opened, or why no more context can be taken.
    pub failed: Option<SessionError>,
    /// How many publications were refused.
    pub refusals: u64,
    /// Why the last of them was.
    pub refused: Option<SessionError>,
    /// Whether the session is gone.
    pub closed: bool,
}

impl Progress {
    /// All chunks up to this one are in the newest version.
    #[must_use]
    pub fn applied(&self) -> u64 {
        self.newest.map_or(0, |newest| newest.seq.0)
    }

    /// The newest version; 0 is the bare model.
    #[must_use]
    pub fn version(&self) -> u64 {
        self.newest.map_or(0, |newest| newest.version.0)
    }

    /// What keeps the session from a version that was asked for when so many publications had been refused.
    #[must_use]
    pub fn trouble(&self, refusals: u64) -> Option<&SessionError> {
        let refused = self.refused.as_ref().filter(|_| self.refusals > refusals);
        self.failed.as_ref().or(refused)
    }
}

/// Where a session's events go.
#[derive(Debug)]
pub struct Link {
    /// The newest of what happened.
    pub progress: watch::Sender<Progress>,
    /// Tokens that the engine may still be given unread.
    pub credit: Semaphore,
    /// Its permits when nothing is unread.
    pub full_credit: usize,
    /// The most tokens of one command: what is unread of an open window never keeps so many from coming.
    pub piece: usize,
    /// What the engine may count of states for the session.
    account: Mutex<Account>,
}

impl Link {
    /// A link of a session that has told nothing yet, whose open window holds up to `window` tokens, and behind it up to
    /// `unread`.
    #[must_use]
    pub fn new(window: usize, unread: usize, account: Account) -> Self {
        let full_credit = window.saturating_add(unread).min(Semaphore::MAX_PERMITS);
        Self {
            progress: watch::Sender::default(),
            credit: Semaphore::new(full_credit),
            full_credit,
            piece: unread.clamp(1, PIECE),
            account: Mutex::new(account),
        }
    }

    /// What the engine may count of states for the session.
    pub fn account(&self) -> MutexGuard<'_, Account> {
        // No change under this lock can panic half-way.
        self.account.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives tokens back, never more than there were: a fork or a forgotten document may be counted twice.
    fn refund(&self, tokens: usize) {
        let missing = self
            .full_credit
            .saturating_sub(self.credit.available_permits());
        self.credit.add_permits(tokens.min(missing));
    }
}

/// An answer to a request.
#[derive(Debug)]
pub enum Reply {
    /// Something happened.
    Event(Event),
    /// The engine has no room for the request.
    Overloaded,
}

/// A version without a document, or why the document could not be forgotten.
pub type Forgotten = Result<(Version, Digest), SessionError>;

/// Whom a command's events concern.
#[derive(Debug)]
pub enum Attach {
    /// Nobody new.
    Nobody,
    /// A session that begins with this command.
    Session(Arc<Link>),
    /// A request, and when it arrived. The channel holds all that can come: it is never full.
    Request(mpsc::Sender<Reply>, Instant),
    /// Who asked for a document to be forgotten.
    Forget(oneshot::Sender<Forgotten>),
}

/// A command with whom it concerns.
#[derive(Debug)]
pub struct Message {
    /// The command.
    pub command: Command,
    /// Whom its events concern.
    pub attach: Attach,
}

/// The way to the thread.
#[derive(Clone, Debug)]
pub struct Handle {
    mailbox: mpsc::Sender<Message>,
    model: Arc<ModelInfo>,
    broken: watch::Receiver<bool>,
}

impl Handle {
    #[cfg(test)]
    pub(crate) fn new(
        mailbox: mpsc::Sender<Message>,
        model: Arc<ModelInfo>,
        broken: watch::Receiver<bool>,
    ) -> Self {
        Self {
            mailbox,
            model,
            broken,
        }
    }

    /// What the engine serves.
    #[must_use]
    pub fn model(&self) -> &Arc<ModelInfo> {
        &self.model
    }

    /// Becomes true once the engine is broken or gone.
    #[must_use]
    pub fn broken(&self) -> watch::Receiver<bool> {
        self.broken.clone()
    }

    /// Sends a command; waits while the mailbox is full.
    ///
    /// # Errors
    /// [`Error::EngineStopped`].
    pub async fn send(&self, command: Command, attach: Attach) -> Result<(), Error> {
        self.mailbox
            .send(Message { command, attach })
            .await
            .map_err(|_| Error::EngineStopped)
    }

    /// Sends a request that arrived then, and returns where its replies come, at most `replies` of them.
    ///
    /// # Errors
    /// [`Error::EngineStopped`].
    pub async fn request(
        &self,
        command: Command,
        arrived: Instant,
        replies: usize,
    ) -> Result<mpsc::Receiver<Reply>, Error> {
        let (sender, receiver) = mpsc::channel(replies.max(1));
        self.send(command, Attach::Request(sender, arrived)).await?;
        Ok(receiver)
    }

    /// Cancels a request. Never waits: a full mailbox is emptied by a task of its own.
    pub fn cancel(&self, request: RequestId) {
        let message = Message {
            command: Command::Cancel { request },
            attach: Attach::Nobody,
        };
        if let Err(mpsc::error::TrySendError::Full(message)) = self.mailbox.try_send(message) {
            let mailbox = self.mailbox.clone();
            tokio::spawn(async move { mailbox.send(message).await });
        }
    }
}

/// Loads the engine on its own thread and returns the way to it once it is loaded. What leaves memory is kept in `place`, if there is one.
///
/// # Errors
/// What the engine says of model, generator and configuration; [`Error::EngineStopped`] if the thread cannot be had.
pub async fn start(
    model: PathBuf,
    generator: Option<PathBuf>,
    (settings, cuda): (engine::Config, Option<Cuda>),
    metrics: Arc<Metrics>,
    place: Option<Place>,
) -> Result<(Handle, JoinHandle<()>), StartError> {
    let (mailbox, messages) = mpsc::channel(MAILBOX);
    let (loaded, load) = oneshot::channel();
    let (flag, broken) = watch::channel(false);
    let mine = mailbox.downgrade();
    let body = move || {
        let flag = Flag(flag);
        let loading = match cuda {
            None => Engine::load(&model, generator.as_deref(), settings),
            Some(cuda) => on_device(&model, generator.as_deref(), settings, cuda),
        };
        let engine = match loading {
            Ok(engine) => engine,
            Err(error) => {
                drop(loaded.send(Err(error)));
                return;
            }
        };
        if loaded.send(Ok(Arc::clone(engine.model()))).is_ok() {
            let gauge = Gauge::default();
            let keeper = gauge.clone();
            let disk = place.and_then(|place| keep(place, engine.model(), keeper, mine));
            let mut worker = Worker::new(engine, messages, Watch::new(metrics));
            (worker.disk, worker.gauge) = (disk, gauge);
            worker.run();
        }
        drop(flag);
    };
    let thread = std::thread::Builder::new()
        .name("engine".to_owned())
        .spawn(body)
        .map_err(StartError::Thread)?;
    let model = load.await.map_err(|_| StartError::Panicked)??;
    Ok((
        Handle {
            mailbox,
            model,
            broken,
        },
        thread,
    ))
}

/// An engine whose forwards run on a GPU.
#[cfg(feature = "cuda")]
fn on_device(
    model: &Path,
    generator: Option<&Path>,
    settings: engine::Config,
    cuda: Cuda,
) -> Result<Engine, engine::Error> {
    let options = device::Options {
        libraries: device::Libraries {
            driver: cuda.driver,
            cublas: cuda.cublas,
        },
        ordinal: cuda.ordinal,
        slots: cuda.slots,
        pinned: cuda.pinned,
        windows: cuda.windows,
    };
    Engine::on(settings, |settings| {
        let machine = device::Accelerator::load(model, generator, settings, &options)?;
        Ok(Box::new(machine))
    })
}

/// The same in a program that has none.
#[cfg(not(feature = "cuda"))]
fn on_device(
    _: &Path,
    _: Option<&Path>,
    _: engine::Config,
    _: Cuda,
) -> Result<Engine, engine::Error> {
    Err(engine::Error::Machine {
        detail: "this program was built without the feature `cuda`".to_owned(),
    })
}

/// Starts what keeps snapshots; its answers come through the mailbox, which it does not keep open.
fn keep(
    place: Place,
    model: &ModelInfo,
    gauge: Gauge,
    mailbox: mpsc::WeakSender<Message>,
) -> Option<Disk> {
    let generator = model.generator.as_ref()?;
    let made_with = (model.digest.clone(), generator.digest.clone());
    let answer = move |command| {
        let message = Message {
            command,
            attach: Attach::Nobody,
        };
        let mailbox = mailbox.upgrade();
        mailbox.is_some_and(|mailbox| mailbox.blocking_send(message).is_ok())
    };
    Disk::start(place, made_with, gauge, answer)
        .inspect_err(|error| tracing::warn!(%error, "no snapshots: sessions that leave memory are read again"))
        .ok()
}

/// Why there is no engine.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// The operating system gives no thread.
    #[error("cannot start the engine's thread")]
    Thread(#[source] std::io::Error),
    /// Loading panicked.
    #[error("the engine panicked while it loaded")]
    Panicked,
    /// Model, generator or configuration do not fit.
    #[error(transparent)]
    Engine(#[from] engine::Error),
}

/// Says that the engine is gone, however the thread ends.
struct Flag(watch::Sender<bool>);

impl Drop for Flag {
    fn drop(&mut self) {
        self.0.send_replace(true);
    }
}

/// What the thread needs of an engine; the tests put another in its place.
trait Machine {
    fn push(&mut self, command: Command) -> Result<(), Box<Full>>;
    fn idle(&self) -> bool;
    /// Whether the engine waits for a snapshot.
    fn waits(&self) -> bool;
    fn step(&mut self, events: &mut Vec<Event>) -> Result<(), engine::Error>;
    fn usage(&self) -> Usage;
}

impl Machine for Engine {
    fn push(&mut self, command: Command) -> Result<(), Box<Full>> {
        Engine::push(self, command)
    }

    fn idle(&self) -> bool {
        Engine::idle(self)
    }

    fn waits(&self) -> bool {
        Engine::waits(self)
    }

    fn step(&mut self, events: &mut Vec<Event>) -> Result<(), engine::Error> {
        Engine::step(self, Instant::now, events)
    }

    fn usage(&self) -> Usage {
        Engine::usage(self)
    }
}

/// What is in use, on disk, too.
fn usage(engine: &impl Machine, gauge: &Gauge) -> Usage {
    let mut usage = engine.usage();
    let kept = gauge.kept();
    usage.tiers.disk_files = kept.files;
    usage.tiers.disk_bytes = kept.bytes;
    usage
}

struct Worker<M> {
    engine: M,
    messages: mpsc::Receiver<Message>,
    sessions: HashMap<SessionId, Arc<Link>>,
    /// The last `seq` that the engine took of a session.
    told: HashMap<SessionId, Seq>,
    requests: HashMap<RequestId, mpsc::Sender<Reply>>,
    forgets: HashMap<(SessionId, DocumentId), oneshot::Sender<Forgotten>>,
    /// Commands about sessions that the engine had no room for, in order.
    held: VecDeque<Command>,
    watch: Watch,
    /// Where snapshots are kept.
    disk: Option<Disk>,
    /// What is kept there.
    gauge: Gauge,
}

impl<M: Machine> Worker<M> {
    fn new(engine: M, messages: mpsc::Receiver<Message>, watch: Watch) -> Self {
        Self {
            engine,
            messages,
            sessions: HashMap::new(),
            told: HashMap::new(),
            requests: HashMap::new(),
            forgets: HashMap::new(),
            held: VecDeque::new(),
            watch,
            disk: None,
            gauge: Gauge::default(),
        }
    }

    /// Works until all senders are gone or the engine breaks.
    fn run(mut self) {
        let mut events = Vec::new();
        loop {
            // What is waited for comes through the mailbox, too.
            let waits = self.engine.waits();
            if self.engine.idle() && (self.held.is_empty() || waits) {
                match self.messages.blocking_recv() {
                    Some(message) => self.take(message),
                    None => return,
                }
            }
            while self.held.len() < HELD || waits {
                match self.messages.try_recv() {
                    Ok(message) => self.take(message),
                    Err(mpsc::error::TryRecvError::Empty) => break,
                    Err(mpsc::error::TryRecvError::Disconnected) => return,
                }
            }
            self.retry();
            if let Err(error) = self.engine.step(&mut events) {
                tracing::error!(
                    error = &error as &dyn std::error::Error,
                    "the engine is broken"
                );
                return;
            }
            let now = Instant::now();
            for event in events.drain(..) {
                self.watch.sees(&event, now);
                self.dispatch(event);
            }
            let idle = self.engine.idle() && self.held.is_empty();
            let (engine, gauge) = (&self.engine, &self.gauge);
            self.watch.stepped(idle, now, || usage(engine, gauge));
        }
    }

    fn take(&mut self, Message { command, attach }: Message) {
        match attach {
            Attach::Nobody => {}
            Attach::Session(link) => match &command {
                Command::Open { session, .. } => drop(self.sessions.insert(*session, link)),
                Command::Fork { from, to } => {
                    // The copy has unread what its source has unread.
                    if let Some(source) = self.sessions.get(from) {
                        let left = source.credit.available_permits();
                        link.credit
                            .forget_permits(source.full_credit.saturating_sub(left));
                    }
                    if let Some(seq) = self.told.get(from).copied() {
                        self.told.insert(*to, seq);
                    }
                    self.sessions.insert(*to, link);
                }
                _ => {}
            },
            Attach::Request(replies, arrived) => match &command {
                Command::Generate { request, .. } => {
                    self.watch.begins(*request, arrived);
                    drop(self.requests.insert(*request, replies));
                }
                Command::Score { request, .. } | Command::Export { request, .. } => {
                    drop(self.requests.insert(*request, replies));
                }
                _ => {}
            },
            Attach::Forget(done) => {
                if let Command::Forget { session, document } = &command {
                    self.forgets.insert((*session, *document), done);
                }
            }
        }
        self.push(command);
    }

    /// Hands a command to the engine, or holds it if the engine or an earlier held one stands in the way.
    fn push(&mut self, command: Command) {
        let request = matches!(
            command,
            Command::Generate { .. }
                | Command::Score { .. }
                | Command::Export { .. }
                | Command::Cancel { .. }
                | Command::Restored { .. }
                | Command::Saved { .. }
        );
        if !request && !self.held.is_empty() {
            self.held.push_back(command);
            return;
        }
        match self.try_push(command) {
            None => {}
            Some(
                Command::Generate { request, .. }
                | Command::Score { request, .. }
                | Command::Export { request, .. },
            ) => {
                self.watch.refused(request);
                if let Some(replies) = self.requests.remove(&request) {
                    // Nobody listens any more: nothing to tell.
                    drop(replies.try_send(Reply::Overloaded));
                }
            }
            Some(command) => self.held.push_back(command),
        }
    }

    /// Hands a command to the engine; it comes back if there is no room for it.
    fn try_push(&mut self, command: Command) -> Option<Command> {
        let ended = match &command {
            Command::Close { session } => Some(*session),
            _ => None,
        };
        let told = match &command {
            Command::Ingest { session, seq, .. } => Some((*session, *seq)),
            _ => None,
        };
        if let Err(full) = self.engine.push(command) {
            return Some(full.0);
        }
        self.told.extend(told);
        if let Some(session) = ended {
            if let Some(link) = self.sessions.remove(&session) {
                link.account().end();
            }
            self.told.remove(&session);
            self.ask_disk(Job::Remove { session });
            self.forgets.retain(|(of, _), _| *of != session);
        }
        None
    }

    /// Tries the held commands again, in order, until one finds no room.
    fn retry(&mut self) {
        for _ in 0..self.held.len() {
            let Some(command) = self.held.pop_front() else {
                return;
            };
            if let Some(command) = self.try_push(command) {
                if self.engine.idle() {
                    self.relieve();
                }
                self.held.push_front(command);
                return;
            }
        }
    }

    /// Windows that wait for more tokens fill the engine's queue, and nothing else is to be done: versions of their
    /// sessions have them read. Versions depend on when one looks, the fold does not.
    fn relieve(&mut self) {
        for (session, link) in &self.sessions {
            let unread = link.credit.available_permits() < link.full_credit;
            let Some(seq) = self.told.get(session).copied().filter(|_| unread) else {
                continue;
            };
            let (session, provisional) = (*session, Vec::new());
            // A publication that finds no room is asked for again, by the next try.
            drop(self.engine.push(Command::Publish {
                session,
                seq,
                provisional,
                asked: false,
            }));
        }
    }

    fn dispatch(&mut self, event: Event) {
        match event {
            Event::Opened { session, newest } | Event::Applied { session, newest } => {
                self.renew(session, newest, |account| account.read(newest.seq.0));
            }
            Event::Read { session, seq } => {
                if let Some(link) = self.sessions.get(&session) {
                    link.account().read(seq.0);
                }
            }
            Event::Encoded { session, tokens } => {
                if let Some(link) = self.sessions.get(&session) {
                    link.refund(tokens);
                }
            }
            Event::Forgotten {
                session,
                document,
                newest,
            } => {
                // What is kept of it is of the document, too.
                self.ask_disk(Job::Remove { session });
                self.renew(session, newest, |account| account.forgotten(newest.seq.0));
                if let Some(done) = self.forgets.remove(&(session, document)) {
                    // Who asked may have gone.
                    drop(done.send(Ok((newest.version, newest.digest))));
                }
            }
            Event::SessionFailed {
                session,
                rejected,
                error,
            } => self.session_failed(session, rejected, error),
            Event::Save { session, snapshot } => self.ask_disk(Job::Save { session, snapshot }),
            Event::Wanted {
                session,
                digest,
                need,
            } => self.ask_disk(Job::Want {
                session,
                digest,
                need,
            }),
            Event::Token { request, .. } => self.reply(request, event, false),
            Event::Finished { request, .. }
            | Event::Scored { request, .. }
            | Event::Exported { request, .. }
            | Event::Failed { request, .. } => self.reply(request, event, true),
        }
    }

    fn ask_disk(&mut self, job: Job) {
        let undone = match &self.disk {
            Some(disk) => disk.send(job).err(),
            None => Some(job),
        };
        if let Some(command) = undone.as_ref().and_then(without_disk) {
            self.push(command);
        }
    }

    /// Takes note of a session's newest version; what it leaves free is free before anybody is told.
    fn renew(&self, session: SessionId, newest: Newest, settle: impl FnOnce(&mut Account)) {
        if let Some(link) = self.sessions.get(&session) {
            settle(&mut link.account());
            if newest.version.0 > link.progress.borrow().version() {
                self.watch.published();
            }
            link.progress.send_modify(|progress| {
                progress.newest = Some(newest);
                progress.announced += 1;
            });
        }
    }

    fn note(&self, session: SessionId, change: impl FnOnce(&mut Progress)) {
        if let Some(link) = self.sessions.get(&session) {
            link.progress.send_modify(change);
        }
    }

    fn session_failed(&mut self, session: SessionId, rejected: Rejected, error: SessionError) {
        tracing::warn!(session = session.0, ?rejected, %error, "the engine refused a session's command");
        match rejected {
            Rejected::Open | Rejected::Fork { .. } | Rejected::Ingest { .. } => {
                self.note(session, |progress| progress.failed = Some(error));
            }
            Rejected::Publish { .. } => {
                self.note(session, |progress| {
                    progress.refusals += 1;
                    progress.refused = Some(error);
                });
            }
            Rejected::Forget { document } => {
                if let Some(done) = self.forgets.remove(&(session, document)) {
                    drop(done.send(Err(error)));
                }
            }
        }
    }

    fn reply(&mut self, request: RequestId, event: Event, last: bool) {
        let Some(replies) = self.requests.get(&request) else {
            return;
        };
        // Who asked may have gone; the request was cancelled then and ends by itself.
        drop(replies.try_send(Reply::Event(event)));
        if last {
            self.requests.remove(&request);
        }
    }
}
