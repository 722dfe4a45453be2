//! Slots: where the cores are that versions, windows and running requests hold, each counted once.
//!
//! A slot is addressed by its index and a generation that grows whenever it is freed, so that an old address never reaches what stands
//! there now; it is asked for before each use. Who holds a core leases its slot; when the last one lets go, the slot is scrubbed and
//! free, and the machine that runs the forwards is told. A slot is host memory of its core's size; a machine with memory of its own
//! has copies there. Whether another core may come is asked before. Start at
//! [`CoreBudget::check`].

#[cfg(test)]
mod tests;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use generator::Core;

use crate::error::SessionError;

/// All slots of an engine.
#[derive(Debug)]
pub(crate) struct CoreBudget {
    table: Table,
    limit: usize,
}

/// One thread owns the engine; the lock is for a snapshot that is dropped where it was written.
type Table = Arc<Mutex<Slots>>;

#[derive(Debug, Default)]
struct Slots {
    slots: Vec<Entry>,
    free: Vec<usize>,
    /// Freed since somebody asked.
    freed: Vec<Slot>,
    used: usize,
}

#[derive(Debug, Default)]
struct Entry {
    generation: u64,
    core: Option<Core>,
    bytes: usize,
}

/// The address of a core: what a [`crate::Machine`] knows it by. Never used again once it is free.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Slot {
    pub(crate) index: usize,
    pub(crate) generation: u64,
}

/// A core that counts. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct HeldCore(Arc<Lease>);

/// A core that a snapshot holds until it is written: it keeps nobody from taking the core out of its session.
#[derive(Debug)]
pub(crate) struct WrittenCore {
    // Let go before the core is: between the two it counts as held by one more, never by one less.
    _mark: Arc<()>,
    held: HeldCore,
}

#[derive(Debug)]
struct Lease {
    /// As many more as snapshots hold it.
    mark: Arc<()>,
    slot: Slot,
    /// None once it is let go.
    core: Option<Core>,
    bytes: usize,
    table: Table,
}

impl Slot {
    /// The address of the core that stood at an index in one of its generations.
    pub const fn new(index: usize, generation: u64) -> Self {
        Self { index, generation }
    }
}

impl Slots {
    fn put(&mut self, core: Core) -> Slot {
        let bytes = core.bytes();
        let index = self.free.pop().unwrap_or_else(|| {
            self.slots.push(Entry::default());
            self.slots.len() - 1
        });
        let entry = &mut self.slots[index];
        (entry.core, entry.bytes) = (Some(core), bytes);
        self.used += bytes;
        Slot {
            index,
            generation: entry.generation,
        }
    }

    fn entry(&mut self, slot: Slot) -> Option<&mut Entry> {
        let entry = self.slots.get_mut(slot.index)?;
        (entry.generation == slot.generation && entry.core.is_some()).then_some(entry)
    }

    fn uncount(&mut self, slot: Slot) {
        if let Some(entry) = self.entry(slot) {
            let bytes = std::mem::take(&mut entry.bytes);
            self.used -= bytes;
        }
    }

    fn free(&mut self, slot: Slot) {
        let Some(entry) = self.entry(slot) else {
            return;
        };
        if let Some(mut core) = entry.core.take() {
            core.scrub();
        }
        let bytes = std::mem::take(&mut entry.bytes);
        entry.generation += 1;
        self.used -= bytes;
        self.free.push(slot.index);
        self.freed.push(slot);
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        // Before the slot is scrubbed, which asks that nobody else sees it.
        self.core = None;
        locked(&self.table).free(self.slot);
    }
}

impl Clone for WrittenCore {
    fn clone(&self) -> Self {
        self.held.to_be_written()
    }
}

impl WrittenCore {
    /// The core.
    pub(crate) fn core(&self) -> &Core {
        self.held.core()
    }
}

impl HeldCore {
    /// The core, while the slot is what it was.
    pub(crate) fn core(&self) -> &Core {
        let there = locked(&self.0.table).entry(self.0.slot).is_some();
        let core = self.0.core.as_ref().filter(|_| there);
        core.expect("a slot is freed when its last lease ends")
    }

    /// Its address.
    pub(crate) fn slot(&self) -> Slot {
        self.0.slot
    }

    pub(crate) fn bytes(&self) -> usize {
        self.0.bytes
    }

    /// For a snapshot.
    pub(crate) fn to_be_written(&self) -> WrittenCore {
        let held = self.clone();
        WrittenCore {
            _mark: Arc::clone(&self.0.mark),
            held,
        }
    }

    /// Lets it go. What snapshots alone hold now counts no longer: they let it go when they are written.
    pub(crate) fn leave(self) {
        if self.is_alone() {
            locked(&self.0.table).uncount(self.0.slot);
        }
    }

    /// Whether nobody else holds it, but for snapshots that are being written.
    pub(crate) fn is_alone(&self) -> bool {
        let snapshots = Arc::strong_count(&self.0.mark) - 1;
        Arc::strong_count(&self.0) <= 1 + snapshots
    }
}

impl CoreBudget {
    /// Nothing held yet, and at most `limit` bytes.
    pub(crate) fn new(limit: usize) -> Self {
        Self {
            table: Table::default(),
            limit,
        }
    }

    /// Bytes that are held.
    pub(crate) fn used(&self) -> usize {
        locked(&self.table).used
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
        let limit = self.limit;
        if bytes > limit {
            Err(SessionError::CoreBudget { bytes, limit })
        } else {
            Ok(())
        }
    }

    /// Holds a core, whether it fits or not.
    pub(crate) fn hold(&self, core: Core) -> HeldCore {
        let bytes = core.bytes();
        let slot = locked(&self.table).put(core.clone());
        HeldCore(Arc::new(Lease {
            mark: Arc::default(),
            slot,
            core: Some(core),
            bytes,
            table: Arc::clone(&self.table),
        }))
    }

    /// The slots that were freed since this was asked last.
    pub(crate) fn freed(&self) -> Vec<Slot> {
        std::mem::take(&mut locked(&self.table).freed)
    }

    /// Whether this address still reaches a core.
    #[cfg(test)]
    fn reaches(&self, slot: Slot) -> bool {
        locked(&self.table).entry(slot).is_some()
    }
}

fn locked(table: &Table) -> MutexGuard<'_, Slots> {
    // No change under this lock can panic half-way.
    table.lock().unwrap_or_else(PoisonError::into_inner)
}
