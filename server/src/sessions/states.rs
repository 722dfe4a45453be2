//! The budget of states, counted before a chunk is committed: the engine never refuses what was acknowledged.
//!
//! Sessions take as many as the engine will come to count, and give them back once the engine has been told; its commands come
//! to it in that order, so the count here is never below its own. Start at [`States::take`].

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

    /// States that a session of so many documents may come to have, as `Config::state_budget_bytes` of the engine counts them.
    pub(super) fn of(strategy: Strategy, documents: usize) -> usize {
        match (documents, strategy) {
            (0, _) => 0,
            (_, Strategy::Sequential) => 5,
            (documents, Strategy::Concat | Strategy::Parallel) => documents.saturating_add(4),
        }
    }

    /// Takes so many, until the permit is dropped.
    ///
    /// # Errors
    /// [`SessionError::StateBudget`]: so many are not left.
    pub(super) fn take(&self, states: usize) -> Result<OwnedSemaphorePermit, SessionError> {
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
