//! Places: how many calls of a kind run at once, all in all and of one tenant.
//!
//! A tenant that asks for more than its part is refused while others are not. Start at [`Places::take`].

#[cfg(test)]
mod tests;

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::{auth::Tenant, status::Error};

/// The places of one kind of call.
#[derive(Debug)]
pub struct Places {
    all: Arc<Semaphore>,
    count: usize,
    /// Of each tenant that has called: no more than there are keys.
    tenants: Mutex<HashMap<Tenant, Arc<Semaphore>>>,
    per_tenant: usize,
    what: &'static str,
}

/// A place, until it is dropped.
#[derive(Debug)]
pub struct Place {
    _of_all: OwnedSemaphorePermit,
    _of_tenant: OwnedSemaphorePermit,
}

impl Places {
    /// So many places, of which a tenant has at most `per_tenant`. `what` is called, in a refusal.
    #[must_use]
    pub fn new(count: usize, per_tenant: usize, what: &'static str) -> Self {
        let (count, per_tenant) = (bounded(count), bounded(per_tenant));
        Self {
            all: Arc::new(Semaphore::new(count)),
            count,
            tenants: Mutex::default(),
            per_tenant,
            what,
        }
    }

    /// Takes a place.
    ///
    /// # Errors
    /// [`Error::Busy`]: none is left, or none for this tenant.
    pub fn take(&self, tenant: &Tenant) -> Result<Place, Error> {
        let mine = {
            // Each change under this lock is whole.
            let mut tenants = self.tenants.lock().unwrap_or_else(PoisonError::into_inner);
            let mine = tenants
                .entry(tenant.clone())
                .or_insert_with(|| Arc::new(Semaphore::new(self.per_tenant)));
            Arc::clone(mine)
        };
        let busy = |_| Error::Busy { what: self.what };
        Ok(Place {
            _of_tenant: mine.try_acquire_owned().map_err(busy)?,
            _of_all: Arc::clone(&self.all).try_acquire_owned().map_err(busy)?,
        })
    }

    /// Resolves when all places are free.
    pub async fn free(&self) {
        // A closed semaphore would be an error; nobody closes it.
        drop(
            self.all
                .acquire_many(u32::try_from(self.count).unwrap_or(u32::MAX))
                .await,
        );
    }
}

/// What a semaphore can hold and one call can wait for.
fn bounded(count: usize) -> usize {
    count.min(Semaphore::MAX_PERMITS).min(u32::MAX as usize)
}
