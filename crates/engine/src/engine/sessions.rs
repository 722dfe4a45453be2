//! What commands make of sessions: opened, copied, told, forgetting, closed.
//!
//! Start at [`Engine::ingest`].

use generator::Strategy;

use super::Engine;
use crate::{
    digest::StateHash,
    error::{RequestError, SessionError},
    event::Event,
    ids::{DocumentId, SessionId, TenantId},
    session::{Bounds, Context, Session},
};

/// Whether the states may grow by another document's.
pub(super) type Begins<'a> = &'a dyn Fn() -> Result<(), SessionError>;

impl Engine {
    pub(super) fn insert(&mut self, id: SessionId, session: Session) -> Event {
        let opened = session.opened();
        self.sessions.insert(id, session);
        opened
    }

    fn room_for(&self, session: SessionId) -> Result<(), SessionError> {
        if self.is_known(session) {
            return Err(SessionError::SessionExists { session });
        }
        let limit = self.config.max_sessions;
        if self.sessions.len() + self.asleep.len() >= limit {
            Err(SessionError::TooManySessions { limit })
        } else {
            Ok(())
        }
    }

    pub(super) fn open(
        &self,
        id: SessionId,
        tenant: TenantId,
        strategy: Strategy,
        window: usize,
    ) -> Result<Session, SessionError> {
        self.room_for(id)?;
        let generator = self.machine.generator().ok_or(SessionError::NoGenerator)?;
        let Bounds {
            least,
            window_limit: limit,
            ..
        } = self.bounds;
        // A document of concat is its own window: there is no other size.
        let window = if strategy == Strategy::Concat {
            0
        } else {
            window
        };
        if strategy != Strategy::Concat && !(least..=limit).contains(&window) {
            return Err(SessionError::Window {
                tokens: window,
                least,
                limit,
            });
        }
        let hash = StateHash::new(
            &self.machine.base().digest,
            generator.digest(),
            strategy,
            window,
        );
        Session::new((id, tenant), strategy, window, hash, self.bounds, generator)
            .map_err(|error| SessionError::from_state(&error))
    }

    pub(super) fn fork(&self, from: SessionId, to: SessionId) -> Result<Session, SessionError> {
        let session = self
            .sessions
            .get(&from)
            .ok_or(SessionError::UnknownSession { session: from })?;
        self.room_for(to)?;
        within_budget(
            self.owed_bytes(),
            session.owed_bytes(0),
            self.config.state_budget_bytes,
        )?;
        session
            .fork(to)
            .map_err(|error| SessionError::from_state(&error))
    }

    pub(super) fn session(&mut self, id: SessionId) -> Result<&mut Session, SessionError> {
        self.sessions
            .get_mut(&id)
            .ok_or(SessionError::UnknownSession { session: id })
    }

    /// Runs `ingest` for so many tokens.
    pub(super) fn ingest(
        &mut self,
        id: SessionId,
        tokens: usize,
        ingest: impl FnOnce(&mut Session, Begins<'_>) -> Result<(), SessionError>,
    ) -> Result<(), SessionError> {
        let (used, budget, limit) = (
            self.owed_bytes(),
            self.config.state_budget_bytes,
            self.config.max_queued_tokens,
        );
        let session = self.session(id)?;
        session.takes_chunks()?;
        let more = session.owed_bytes(1) - session.owed_bytes(0);
        let done = if tokens > limit {
            Err(SessionError::TooManyTokens { tokens, limit })
        } else {
            ingest(session, &|| within_budget(used, more, budget))
        };
        if let Err(error) = &done {
            session.refuse(error);
        }
        done
    }

    pub(super) fn forget(
        &mut self,
        id: SessionId,
        document: DocumentId,
        events: &mut Vec<Event>,
    ) -> Result<(), SessionError> {
        let session = self
            .sessions
            .get_mut(&id)
            .ok_or(SessionError::UnknownSession { session: id })?;
        let generator = self.machine.generator().ok_or(SessionError::NoGenerator)?;
        session.forget(
            document,
            &mut Context {
                generator,
                machine: &*self.machine,
                allocator: &mut self.allocator,
                cores: &self.cores,
                traces: &self.traces,
                events,
                portion: &mut || true,
            },
        )
    }

    pub(super) fn close(&mut self, id: SessionId, events: &mut Vec<Event>) {
        let Some(mut session) = self.leave(id, events) else {
            return;
        };
        session.evict(&mut self.allocator);
        for request in self.remove_requests(|request| request.adapter.session == Some(id)) {
            events.push(Event::Failed {
                request: request.id,
                error: RequestError::SessionClosed { session: id },
            });
        }
    }
}

fn within_budget(used: usize, more: usize, limit: usize) -> Result<(), SessionError> {
    let bytes = used.saturating_add(more);
    if bytes > limit {
        Err(SessionError::StateBudget { bytes, limit })
    } else {
        Ok(())
    }
}
