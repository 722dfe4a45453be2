//! Sessions: who has one, under which name, and until when.
//!
//! The registry: look-ups scoped by tenant, idempotent creation, pages, expiry. What happens to a chunk stands in
//! [`session`], how it reaches the engine in `feed`. Time is an argument where it decides. Start at [`Sessions::create`].

mod feed;
mod name;
pub mod session;
#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, HashMap},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

use engine::{Command, SessionId, Strategy};
use lm::text::Text;
use store::Store;

use crate::{
    auth::Tenant,
    engine_thread::{Attach, Handle, Link, Progress},
    states::Account,
    status::Error,
};
pub(crate) use session::Writer;
pub use session::{About, Rules, Session};

/// The most sessions of a page.
const PAGE: usize = 1000;
/// Sessions of a page if the client does not say.
const DEFAULT_PAGE: usize = 100;

/// What a client asks of a new session, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// How windows are folded.
    pub strategy: Strategy,
    /// Tokens in a window.
    pub window: usize,
    /// The client's labels.
    pub labels: BTreeMap<String, String>,
    /// How long it outlives its last use.
    pub ttl: Option<Duration>,
}

/// All sessions of a server.
pub struct Sessions {
    engine: Handle,
    text: Text,
    store: Arc<dyn Store>,
    rules: Arc<Rules>,
    names: name::Names,
    next: AtomicU64,
    registry: Mutex<Registry>,
    /// The most sessions.
    limit: usize,
}

#[derive(Default)]
struct Registry {
    /// Oldest first.
    sessions: BTreeMap<SessionId, Arc<Session>>,
    names: HashMap<String, SessionId>,
    /// What was created under a client's own name for the request.
    requests: HashMap<(Tenant, String), (Wanted, SessionId)>,
}

/// Sessions of a tenant.
pub struct Page {
    /// Oldest first.
    pub sessions: Vec<Arc<Session>>,
    /// Whether there are others behind them.
    pub more: bool,
}

impl Sessions {
    /// No sessions yet.
    #[must_use]
    pub fn new(
        engine: Handle,
        text: Text,
        store: Arc<dyn Store>,
        rules: Rules,
        limit: usize,
    ) -> Self {
        Self {
            engine,
            text,
            store,
            rules: Arc::new(rules),
            names: name::Names::default(),
            next: AtomicU64::new(1),
            registry: Mutex::default(),
            limit,
        }
    }

    /// The registry. Each change of it is whole before the lock is let go, so a panic elsewhere leaves it whole.
    fn registry(&self) -> MutexGuard<'_, Registry> {
        self.registry.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Creates a session, or returns the one that the same request created before.
    ///
    /// # Errors
    /// [`Error::RequestReused`], [`Error::TooManySessions`], what the engine says of the window, [`Error::EngineStopped`].
    pub async fn create(
        &self,
        tenant: &Tenant,
        request: &str,
        wanted: Wanted,
    ) -> Result<Arc<Session>, Error> {
        let (session, new) = {
            let mut registry = self.registry();
            let key = (tenant.clone(), request.to_owned());
            // One whose time is over is no answer any more.
            let now = Instant::now();
            let over = registry
                .requests
                .get(&key)
                .and_then(|(_, id)| registry.sessions.get(id))
                .filter(|session| !request.is_empty() && session.expired(now))
                .cloned();
            if let Some(over) = over {
                self.remove(&mut registry, &over);
            }
            let before = registry.requests.get(&key).filter(|_| !request.is_empty());
            if let Some((first, id)) = before {
                if *first != wanted {
                    return Err(Error::RequestReused(request.to_owned()));
                }
                let session = registry.sessions.get(id).cloned();
                let session = session.ok_or_else(|| Error::RequestReused(request.to_owned()))?;
                session.touch(now);
                (session, false)
            } else {
                let about = About::new(wanted.labels.clone(), wanted.ttl);
                let account = Account::new(self.rules.states.clone(), wanted.strategy);
                let (strategy, window) = (wanted.strategy, wanted.window);
                let session = self.session(tenant, strategy, window, about, account, None);
                let session = Arc::new(session);
                self.insert(&mut registry, &session)?;
                if !request.is_empty() {
                    registry.requests.insert(key, (wanted, session.id));
                }
                (session, true)
            }
        };
        if new {
            let opened = self.open(&session).await;
            if let Err(error) = opened {
                self.delete(&session);
                return Err(error);
            }
        }
        session.opened().await?;
        Ok(session)
    }

    fn session(
        &self,
        tenant: &Tenant,
        strategy: Strategy,
        window: usize,
        about: About,
        account: Account,
        forked_from: Option<String>,
    ) -> Session {
        let id = SessionId(self.next.fetch_add(1, Ordering::Relaxed));
        let open = if strategy == Strategy::Concat {
            self.engine.model().context_length
        } else {
            window
        };
        let link = Link::new(open, self.rules.unread_tokens, account);
        Session::new(
            self.names.next(SystemTime::now()),
            id,
            tenant.clone(),
            strategy,
            window,
            forked_from,
            about,
            session::Rooms {
                engine: self.engine.clone(),
                text: self.text.clone(),
                store: Arc::clone(&self.store),
                rules: Arc::clone(&self.rules),
                link: Arc::new(link),
            },
        )
    }

    fn has_room(&self, registry: &Registry) -> Result<(), Error> {
        if registry.sessions.len() >= self.limit {
            return Err(Error::TooManySessions { limit: self.limit });
        }
        Ok(())
    }

    fn insert(&self, registry: &mut Registry, session: &Arc<Session>) -> Result<(), Error> {
        self.has_room(registry)?;
        registry.names.insert(session.name.clone(), session.id);
        registry.sessions.insert(session.id, Arc::clone(session));
        Ok(())
    }

    async fn open(&self, session: &Arc<Session>) -> Result<(), Error> {
        self.store.create(&session.name)?;
        let command = Command::Open {
            session: session.id,
            tenant: session.tenant.id(),
            strategy: session.strategy,
            window: session.window,
        };
        session.start_feed(0);
        self.engine
            .send(command, Attach::Session(session.link()))
            .await?;
        session.opened().await
    }

    /// The tenant's session of this name, touched.
    ///
    /// # Errors
    /// [`Error::UnknownSession`], also for another tenant's session and one whose time is over.
    pub fn get(&self, tenant: &Tenant, name: &str) -> Result<Arc<Session>, Error> {
        self.get_at(tenant, name, Instant::now())
    }

    fn get_at(&self, tenant: &Tenant, name: &str, now: Instant) -> Result<Arc<Session>, Error> {
        let registry = self.registry();
        let session = registry
            .names
            .get(name)
            .and_then(|id| registry.sessions.get(id));
        let session = session
            .filter(|session| session.tenant == *tenant && !session.expired(now))
            .ok_or_else(|| Error::UnknownSession(name.to_owned()))?;
        // Under the lock: its time is not found over between look-up and use.
        session.touch(now);
        Ok(Arc::clone(session))
    }

    /// A page of the tenant's sessions.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a token that is not ours.
    pub fn list(&self, tenant: &Tenant, size: u32, token: &str) -> Result<Page, Error> {
        let after = if token.is_empty() {
            0
        } else {
            self.names.read_page(tenant.name(), token)?
        };
        let size = match size as usize {
            0 => DEFAULT_PAGE,
            size => size.min(PAGE),
        };
        let now = Instant::now();
        let registry = self.registry();
        let behind = registry
            .sessions
            .range(SessionId(after.saturating_add(1))..)
            .map(|(_, session)| session);
        let mut mine = behind.filter(|session| session.tenant == *tenant && !session.expired(now));
        let sessions: Vec<_> = mine.by_ref().take(size).cloned().collect();
        let more = mine.next().is_some();
        Ok(Page { sessions, more })
    }

    /// The token of the page behind a session.
    #[must_use]
    pub fn page_behind(&self, tenant: &Tenant, last: &Session) -> String {
        self.names.page(tenant.name(), last.id.0)
    }

    /// Begins to copy a session whose writer is held. Nothing of this waits; the copy is there once [`Self::forked`] says so.
    ///
    /// # Errors
    /// [`Error::TooManySessions`], [`Error::Context`] if the copy's states do not fit.
    pub(crate) fn fork(
        &self,
        from: &Arc<Session>,
        writer: &Writer,
        about: About,
    ) -> Result<Arc<Session>, Error> {
        // Before the log is copied; it may be large.
        self.has_room(&self.registry())?;
        let documents = from.document_count();
        let account = from.link().account().copy(documents);
        let copy = self.session(
            &from.tenant,
            from.strategy,
            from.window,
            about,
            account.map_err(Error::Context)?,
            Some(from.name.clone()),
        );
        let copy = Arc::new(copy);
        self.store.fork(&from.name, &copy.name)?;
        let inserted = self.insert(&mut self.registry(), &copy);
        if let Err(error) = inserted {
            self.store.remove(&copy.name)?;
            return Err(error);
        }
        copy.copy_from(writer, from);
        // Behind all that the source was told, and before what it will be told next.
        from.feed_fork(
            Command::Fork {
                from: from.id,
                to: copy.id,
            },
            copy.link(),
        );
        Ok(copy)
    }

    /// Waits until the engine has copied the session.
    ///
    /// # Errors
    /// [`Error::UnknownSession`] if the source ends meanwhile, what the engine says, [`Error::EngineStopped`].
    pub(crate) async fn forked(
        &self,
        from: &Arc<Session>,
        copy: Arc<Session>,
    ) -> Result<Arc<Session>, Error> {
        let opened = copy.opened().await;
        if let Err(error) = opened {
            self.delete(&copy);
            return Err(match error {
                Error::UnknownSession(_) => Error::UnknownSession(from.name.clone()),
                error => error,
            });
        }
        copy.fail_like(from);
        Ok(copy)
    }

    /// Ends a session.
    pub fn delete(&self, session: &Arc<Session>) {
        self.remove(&mut self.registry(), session);
    }

    /// Takes a session out of the registry and ends it. Nothing of this waits.
    fn remove(&self, registry: &mut Registry, session: &Arc<Session>) {
        let was = registry.sessions.remove(&session.id);
        registry.names.remove(&session.name);
        registry.requests.retain(|_, (_, id)| *id != session.id);
        if was.is_some() {
            session.close();
            // A session that could not be opened has no log.
            drop(self.store.remove(&session.name));
        }
    }

    /// Ends the sessions whose time is over.
    pub fn expire(&self, now: Instant) {
        // All under the lock: one that is used between the look and the end would end under its user.
        let mut registry = self.registry();
        let over: Vec<_> = registry
            .sessions
            .values()
            .filter(|session| session.expired(now))
            .cloned()
            .collect();
        for session in over {
            tracing::info!(session = session.name, "a session's time is over");
            self.remove(&mut registry, &session);
        }
    }
}

impl Session {
    /// Waits until the engine has opened the session.
    ///
    /// # Errors
    /// What the engine refuses it for; [`Error::EngineStopped`].
    pub(crate) async fn opened(&self) -> Result<(), Error> {
        let mut progress = self.progress();
        let settled = |progress: &Progress| {
            progress.newest.is_some() || progress.failed.is_some() || progress.closed
        };
        let mut broken = self.engine().broken();
        let settled = tokio::select! {
            settled = progress.wait_for(settled) => settled.map_err(|_| Error::EngineStopped)?.clone(),
            _ = broken.wait_for(|broken| *broken) => return Err(Error::EngineStopped),
        };
        match settled.failed {
            Some(error) if settled.newest.is_none() => Err(Error::Context(error)),
            _ if settled.closed => Err(Error::UnknownSession(self.name.clone())),
            _ => Ok(()),
        }
    }
}
