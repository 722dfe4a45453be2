//! What the thread does: commands in, steps, events out to whom they concern.
//!
//! What the engine's queue for context has no room for is held here, in order, until steps have made room; a request that it has no room for is
//! answered at once. Start at [`Worker::run`].

#[cfg(test)]
mod tests;

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
    time::Instant,
};

use engine::{
    Command, DocumentId, Engine, Event, Full, Newest, Rejected, RequestId, Seq, SessionError,
    SessionId, Usage,
};
use tokio::sync::{mpsc, oneshot};

use super::{Attach, Forgotten, Link, Message, Progress, Reply};
use crate::{
    metrics::Watch,
    snapshots::{Disk, Gauge, Job, without_disk},
    states::Account,
};

/// Context commands that are held because the engine's queue is full; beyond it the mailbox is not emptied.
const HELD: usize = 1024;

/// What the thread needs of an engine; the tests put another in its place.
pub(super) trait Machine {
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

pub(super) struct Worker<M> {
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
    pub(super) disk: Option<Disk>,
    /// What is kept there.
    pub(super) gauge: Gauge,
}

impl<M: Machine> Worker<M> {
    pub(super) fn new(engine: M, messages: mpsc::Receiver<Message>, watch: Watch) -> Self {
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
    pub(super) fn run(mut self) {
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
