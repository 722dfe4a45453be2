//! The budget of states, counted before a chunk is committed: the engine never refuses what was acknowledged.
//!
//! Each session has an account of what the engine may come to count for it while it is told something. It takes before a chunk is committed,
//! and gives all back when the engine says that it has read: a session at rest may leave memory. So it is never below the engine's own
//! count. Start at [`Account::begin`].

#[cfg(test)]
mod tests;

use std::sync::Arc;

use engine::{SessionError, Strategy};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// States that all sessions together may have.
#[derive(Clone, Debug)]
pub struct States {
    free: Arc<Semaphore>,
    all: usize,
    /// Bytes of one.
    bytes: usize,
    /// Bytes of all.
    limit: usize,
}

impl States {
    /// As many states of so many `bytes` as fit the `limit`.
    #[must_use]
    pub fn new(limit: usize, bytes: usize) -> Self {
        let all = (limit / bytes.max(1)).min(Semaphore::MAX_PERMITS);
        Self {
            free: Arc::new(Semaphore::new(all)),
            all,
            bytes,
            limit,
        }
    }

    fn take(&self, states: usize) -> Result<OwnedSemaphorePermit, SessionError> {
        u32::try_from(states)
            .ok()
            .and_then(|states| Arc::clone(&self.free).try_acquire_many_owned(states).ok())
            .ok_or_else(|| {
                let used = self.all.saturating_sub(self.free.available_permits());
                SessionError::StateBudget {
                    bytes: used.saturating_add(states).saturating_mul(self.bytes),
                    limit: self.limit,
                }
            })
    }
}

/// A session's part of the states.
#[derive(Debug)]
pub struct Account {
    states: States,
    strategy: Strategy,
    /// Documents that the engine may still hold.
    documents: usize,
    /// Whether a document is open.
    open: bool,
    /// All is read once the engine has read this chunk, if no document is open.
    last: u64,
    /// The engine has read all chunks up to this one.
    read: u64,
    taken: Option<OwnedSemaphorePermit>,
}

impl Account {
    /// An account of a session without documents.
    #[must_use]
    pub fn new(states: States, strategy: Strategy) -> Self {
        Self {
            states,
            strategy,
            documents: 0,
            open: false,
            last: 0,
            read: 0,
            taken: None,
        }
    }

    /// States of so many documents, as `Config::state_budget_bytes` of the engine counts them; `behind`: one is open or unread.
    fn of(&self, documents: usize, behind: bool) -> usize {
        match (documents, self.strategy, behind) {
            (0, ..) | (_, _, false) => 0,
            (_, Strategy::Sequential, true) => 5,
            (documents, Strategy::Concat | Strategy::Parallel, true) => documents.saturating_add(4),
        }
    }

    fn taken(&self) -> usize {
        self.taken
            .as_ref()
            .map_or(0, OwnedSemaphorePermit::num_permits)
    }

    fn take(&mut self, states: usize) -> Result<(), SessionError> {
        let more = self.states.take(states.saturating_sub(self.taken()))?;
        match self.taken.as_mut() {
            Some(taken) => taken.merge(more),
            None => self.taken = Some(more),
        }
        Ok(())
    }

    /// Gives back what is not needed, now that the engine has read all chunks up to `seq`.
    fn give_back(&mut self, seq: u64) {
        self.read = self.read.max(seq);
        let need = self.of(self.documents, self.is_behind());
        let spare = self.taken().saturating_sub(need);
        drop(self.taken.as_mut().and_then(|taken| taken.split(spare)));
    }

    fn is_behind(&self) -> bool {
        self.open || self.read < self.last
    }

    /// Takes what another document may need, which is to begin with chunk `seq`.
    ///
    /// # Errors
    /// [`SessionError::StateBudget`]: so much is not left; all is as it was.
    pub fn begin(&mut self, seq: u64) -> Result<(), SessionError> {
        self.take(self.of(self.documents + 1, true))?;
        self.documents += 1;
        self.told(seq, true);
        Ok(())
    }

    /// The document that was to begin has not come. What was taken for it serves the next one.
    pub fn abandon(&mut self) {
        self.documents = self.documents.saturating_sub(1);
    }

    /// Takes note of an accepted chunk, and whether its document goes on behind it.
    pub fn told(&mut self, seq: u64, open: bool) {
        (self.last, self.open) = (seq, open);
    }

    /// Takes note that the open document is to be forgotten. The engine was told of the chunks up to `seq` and is not told of
    /// those behind it.
    pub fn ends(&mut self, seq: u64) {
        (self.last, self.open) = (seq, false);
    }

    /// Takes note that the engine has read all chunks up to this one, whether a version holds them or not.
    pub fn read(&mut self, seq: u64) {
        self.give_back(seq);
    }

    /// Takes note that the engine has forgotten a document, and read all chunks up to `seq`.
    pub fn forgotten(&mut self, seq: u64) {
        self.documents = self.documents.saturating_sub(1);
        self.give_back(seq);
    }

    /// Takes for a copy of so many `documents` what it may need.
    ///
    /// # Errors
    /// [`SessionError::StateBudget`]: so much is not left; all is as it was.
    pub fn copy(&self, documents: usize) -> Result<Self, SessionError> {
        let mut copy = Self {
            documents,
            taken: None,
            states: self.states.clone(),
            ..*self
        };
        copy.take(copy.of(documents, copy.is_behind()))?;
        Ok(copy)
    }

    /// Gives all back: the engine has been told that the session ends.
    pub fn end(&mut self) {
        self.taken = None;
    }
}
