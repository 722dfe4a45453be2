//! The thread that owns the engine: commands in over a bounded channel, events out to whom they concern.
//!
//! It knows no text, no store and no gRPC. The thread parks while there is nothing to do; what it does stands in `worker`. Start at
//! [`Handle`].

mod worker;

use std::{
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread::JoinHandle,
    time::Instant,
};

use engine::{Command, Digest, Engine, Event, ModelInfo, Newest, RequestId, SessionError, Version};
use tokio::sync::{Semaphore, mpsc, oneshot, watch};

use self::worker::Worker;
use crate::{
    config::Cuda,
    machine::on_device,
    metrics::{Metrics, Watch},
    snapshots::{Disk, Gauge, Place},
    states::Account,
    status::Error,
};

/// Messages that wait for the thread.
const MAILBOX: usize = 256;
/// The most tokens of one command.
const PIECE: usize = 1024;

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
            Some(cuda) => Engine::on(settings, |settings| {
                on_device(&model, generator.as_deref(), settings, &cuda)
            }),
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
