//! Cores on the device, and the way in: an arena of slots, copies on a stream of their own, events between the two.
//!
//! A core that is brought in waits for the steps before it, which may still read the slot, and only steps that need it wait for it; so
//! nobody else does. Which session has which slot is the engine's knowledge. Start at [`Slots::bring`].

use half::bf16;

use crate::{Buffer, Device, Error, Event, Pinned, SideStream, View, error::fits};

/// An arena of slots, [slots, size] bf16.
pub struct Slots {
    device: Device,
    arena: Buffer<bf16>,
    size: usize,
    side: SideStream,
    /// The steps so far are done with the slots.
    read: Event,
    /// By slot: what was brought last is there.
    ready: Vec<Event>,
}

impl Slots {
    /// `count` slots of `size` elements, all zeros: a core that does nothing.
    ///
    /// # Errors
    /// [`Error::Call`] without enough memory.
    pub fn new(device: &Device, count: usize, size: usize) -> Result<Self, Error> {
        Ok(Self {
            device: device.clone(),
            arena: device.zeros(
                count
                    .checked_mul(size)
                    .ok_or_else(|| crate::error::shape("an arena beyond what can be addressed"))?,
            )?,
            size,
            side: device.side_stream()?,
            read: device.event(false)?,
            ready: (0..count)
                .map(|_| device.event(false))
                .collect::<Result<_, _>>()?,
        })
    }

    /// Slots.
    pub fn count(&self) -> usize {
        self.ready.len()
    }

    /// Elements of a slot.
    pub fn size(&self) -> usize {
        self.size
    }

    pub(crate) fn arena(&self) -> View<'_, bf16> {
        self.arena.view()
    }

    /// One slot, for a read-out to write.
    ///
    /// # Errors
    /// [`Error::Shape`] if there is none of that number.
    pub fn slot(&self, slot: usize) -> Result<View<'_, bf16>, Error> {
        fits(slot < self.count(), || {
            format!("slot {slot} of {}", self.count())
        })?;
        self.arena.view().part(slot * self.size, self.size)
    }

    /// Begins to copy a core from the host into a slot, beside the steps. `from` stays as it is until [`Self::wait`] returns.
    ///
    /// # Errors
    /// [`Error::Shape`] if slot or size do not fit; [`Error::Call`].
    pub fn bring(&mut self, slot: usize, from: &Pinned<bf16>) -> Result<(), Error> {
        fits(from.values().len() == self.size, || {
            format!(
                "a core of {} elements, not {}",
                from.values().len(),
                self.size
            )
        })?;
        let to = self.slot(slot)?;
        self.read.record()?;
        self.side.wait_for(&self.read)?;
        self.side.copy_in(to, from)?;
        self.ready[slot].record_on(&self.side)
    }

    /// Later steps wait until the core in a slot is there.
    ///
    /// # Errors
    /// [`Error::Shape`] if there is no such slot; [`Error::Call`].
    pub fn need(&self, slot: usize) -> Result<(), Error> {
        fits(slot < self.count(), || {
            format!("slot {slot} of {}", self.count())
        })?;
        self.device.wait_for(&self.ready[slot])
    }

    /// Waits until the core in a slot is there.
    ///
    /// # Errors
    /// As [`Self::need`].
    pub fn wait(&self, slot: usize) -> Result<(), Error> {
        fits(slot < self.count(), || {
            format!("slot {slot} of {}", self.count())
        })?;
        self.ready[slot].synchronize()
    }

    /// Sets a slot to zeros, behind the steps so far.
    ///
    /// # Errors
    /// [`Error::Shape`] if there is no such slot; [`Error::Call`].
    pub fn clear(&self, slot: usize) -> Result<(), Error> {
        // What was being brought in lands first.
        self.need(slot)?;
        self.slot(slot)?.clear(&self.device)
    }

    /// Copies a core out to the host, behind the steps so far, and waits for it.
    ///
    /// # Errors
    /// As [`Self::bring`].
    pub fn keep(&mut self, slot: usize, to: &mut Pinned<bf16>) -> Result<(), Error> {
        fits(to.values().len() == self.size, || {
            format!("room for {} elements, not {}", to.values().len(), self.size)
        })?;
        let from = self.slot(slot)?;
        self.read.record()?;
        self.side.wait_for(&self.read)?;
        self.side.copy_out(to, from)?;
        self.ready[slot].record_on(&self.side)?;
        self.ready[slot].synchronize()
    }
}
