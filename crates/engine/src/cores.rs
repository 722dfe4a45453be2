//! The budget of cores: what versions, windows and running requests hold, each core counted once.
//!
//! A core is counted from the moment it is held until the last holder lets it go; copies cost nothing. Whether another one
//! may come is asked before. Start at [`CoreBudget::check`].

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use generator::Core;

use crate::error::SessionError;

/// All cores of an engine.
#[derive(Debug)]
pub(crate) struct CoreBudget {
    used: Arc<AtomicUsize>,
    limit: usize,
}

/// A core that counts. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct HeldCore(Arc<Counted>);

#[derive(Debug)]
struct Counted {
    core: Core,
    bytes: usize,
    used: Arc<AtomicUsize>,
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.used.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

impl HeldCore {
    pub(crate) fn core(&self) -> &Core {
        &self.0.core
    }

    pub(crate) fn bytes(&self) -> usize {
        self.0.bytes
    }
}

impl CoreBudget {
    /// Nothing held yet, and at most `limit` bytes.
    pub(crate) fn new(limit: usize) -> Self {
        Self {
            used: Arc::default(),
            limit,
        }
    }

    /// Bytes that are held.
    pub(crate) fn used(&self) -> usize {
        self.used.load(Ordering::Relaxed)
    }

    /// Whether a core may come to be held in the place of another one, which goes if nobody else holds it.
    pub(crate) fn check(
        &self,
        core: &Core,
        instead_of: Option<&HeldCore>,
    ) -> Result<(), SessionError> {
        let goes = instead_of
            .filter(|held| Arc::strong_count(&held.0) == 1)
            .map_or(0, HeldCore::bytes);
        let bytes = (self.used().saturating_sub(goes)).saturating_add(core.bytes());
        let limit = self.limit;
        if bytes > limit {
            Err(SessionError::CoreBudget { bytes, limit })
        } else {
            Ok(())
        }
    }

    /// Holds a core, whether it fits or not.
    pub(crate) fn hold(&self, core: Core) -> HeldCore {
        let (bytes, used) = (core.bytes(), Arc::clone(&self.used));
        used.fetch_add(bytes, Ordering::Relaxed);
        HeldCore(Arc::new(Counted { core, bytes, used }))
    }
}
