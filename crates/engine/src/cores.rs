//! The budget of cores: what versions, windows and running requests hold, each core counted once.
//!
//! Whether another one may come is asked before. Start at [`CoreBudget::check`].

use generator::Core;

use crate::{
    budget::{Budget, Held},
    error::SessionError,
};

/// All cores of an engine.
#[derive(Debug)]
pub(crate) struct CoreBudget(Budget);

/// A core that counts.
pub(crate) type HeldCore = Held<Core>;

impl HeldCore {
    pub(crate) fn core(&self) -> &Core {
        self.value()
    }
}

impl CoreBudget {
    /// Nothing held yet, and at most `limit` bytes.
    pub(crate) fn new(limit: usize) -> Self {
        Self(Budget::new(limit))
    }

    /// Bytes that are held.
    pub(crate) fn used(&self) -> usize {
        self.0.used()
    }

    /// Whether a core may come to be held in the place of another one, which goes if nobody else holds it.
    pub(crate) fn check(
        &self,
        core: &Core,
        instead_of: Option<&HeldCore>,
    ) -> Result<(), SessionError> {
        let goes = instead_of
            .filter(|held| held.is_alone())
            .map_or(0, HeldCore::bytes);
        let bytes = (self.used().saturating_sub(goes)).saturating_add(core.bytes());
        let limit = self.0.limit();
        if bytes > limit {
            Err(SessionError::CoreBudget { bytes, limit })
        } else {
            Ok(())
        }
    }

    /// Holds a core, whether it fits or not.
    pub(crate) fn hold(&self, core: Core) -> HeldCore {
        let bytes = core.bytes();
        self.0.hold(core, bytes)
    }
}
