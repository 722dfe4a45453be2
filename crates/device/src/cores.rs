//! Cores on their way: the engine's values in f32, copies of some in pinned memory, of fewer in the device's slots.
//!
//! A core that rows need and that is not in a slot takes that of the one used longest ago, by a copy beside the steps. Addresses are the
//! engine's: an index is used again only with another generation. Start at [`Cores::place`].

use std::{cell::Cell, collections::BTreeMap, rc::Rc};

use candle_core::Tensor;
use cuda::{Error, GeneratorShape, Model, Pinned, ops::SiteGates};
use engine::Slot;
use generator::Core;
use half::bf16;

/// Where cores are.
pub(crate) struct Cores {
    shape: GeneratorShape,
    sites: usize,
    /// The device's slots.
    places: Vec<Place>,
    resident: BTreeMap<Slot, usize>,
    pinned: BTreeMap<Slot, Kept>,
    spare: Vec<Pinned<bf16>>,
    /// Most copies in pinned memory.
    limit: usize,
    /// Grows by one with each pass.
    clock: u64,
    /// Copies that were begun.
    brought: Rc<Cell<u64>>,
}

#[derive(Clone, Copy, Default)]
struct Place {
    core: Option<Slot>,
    /// When rows needed it last.
    used: u64,
    /// Whether steps have been told to wait for its copy.
    awaited: bool,
}

struct Kept {
    memory: Pinned<bf16>,
    used: u64,
    /// The device's slot that it was copied to last.
    to: usize,
}

impl Cores {
    pub(crate) fn new(shape: GeneratorShape, sites: usize, slots: usize, pinned: usize) -> Self {
        Self {
            shape,
            sites,
            places: vec![Place::default(); slots],
            resident: BTreeMap::new(),
            pinned: BTreeMap::new(),
            spare: Vec::new(),
            limit: pinned.max(1),
            clock: 0,
            brought: Rc::default(),
        }
    }

    /// Slots of the device.
    pub(crate) fn count(&self) -> usize {
        self.places.len()
    }

    /// Copies into slots so far.
    pub(crate) fn brought(&self) -> Rc<Cell<u64>> {
        Rc::clone(&self.brought)
    }

    /// A pass begins: what it places stays where it is until the next one begins.
    pub(crate) fn begin(&mut self) {
        self.clock += 1;
    }

    /// The device's slot of a core, for rows of this pass: steps behind wait until it is there.
    ///
    /// # Errors
    /// [`Error::Shape`] if the pass has more cores than there are slots, or the core is of another form; [`Error::Call`].
    pub(crate) fn place(
        &mut self,
        model: &mut Model,
        slot: Slot,
        core: &Core,
    ) -> Result<usize, Error> {
        let at = match self.resident.get(&slot) {
            Some(&at) => at,
            None => {
                let at = self.victim().ok_or_else(|| Error::Shape {
                    what: format!("more cores in a pass than {} slots", self.count()),
                })?;
                self.bring(model, slot, core, at)?;
                at
            }
        };
        let place = &mut self.places[at];
        place.used = self.clock;
        if !place.awaited {
            place.awaited = true;
            if let Some(slots) = model.slots() {
                slots.need(at)?;
            }
        }
        Ok(at)
    }

    /// Begins to bring a core in that will be needed soon, if there is a slot that the last pass did not use.
    ///
    /// # Errors
    /// As [`Self::place`].
    pub(crate) fn announce(
        &mut self,
        model: &mut Model,
        slot: Slot,
        core: &Core,
    ) -> Result<(), Error> {
        if self.resident.contains_key(&slot) {
            return Ok(());
        }
        match self.victim() {
            Some(at) => self.bring(model, slot, core, at),
            None => Ok(()),
        }
    }

    /// Nobody holds the core any more: nothing of it stays.
    ///
    /// # Errors
    /// [`Error::Call`].
    pub(crate) fn free(&mut self, model: &mut Model, slot: Slot) -> Result<(), Error> {
        if let Some(at) = self.resident.remove(&slot) {
            self.places[at] = Place::default();
            if let Some(slots) = model.slots() {
                slots.clear(at)?;
            }
        }
        if let Some(Kept { mut memory, to, .. }) = self.pinned.remove(&slot) {
            if let Some(slots) = model.slots() {
                slots.wait(to)?;
            }
            memory.values_mut().fill(bf16::ZERO);
            self.spare.push(memory);
        }
        Ok(())
    }

    /// Whether nothing is left of any core.
    ///
    /// # Errors
    /// [`Error::Call`].
    pub(crate) fn holds_nothing(&self, model: &Model) -> Result<bool, Error> {
        let zeros = |values: &[bf16]| values.iter().all(|value| *value == bf16::ZERO);
        if let Some(slots) = model.slots() {
            for at in 0..slots.count() {
                if !zeros(&slots.slot(at)?.read(model.device())?) {
                    return Ok(false);
                }
            }
        }
        let spare = self.spare.iter().all(|memory| zeros(memory.values()));
        Ok(spare && self.resident.is_empty() && self.pinned.is_empty())
    }

    /// A free slot, or the one used longest ago; none if this pass uses them all.
    fn victim(&self) -> Option<usize> {
        let order = |place: &Place| (place.core.is_some(), place.used);
        let places = self.places.iter().enumerate();
        let unused = places.filter(|(_, place)| place.core.is_none() || place.used < self.clock);
        unused
            .min_by_key(|(_, place)| order(place))
            .map(|(at, _)| at)
    }

    fn bring(
        &mut self,
        model: &mut Model,
        slot: Slot,
        core: &Core,
        at: usize,
    ) -> Result<(), Error> {
        self.pin(model, slot, core)?;
        let (Some(slots), Some(kept)) = (model.slots_mut(), self.pinned.get_mut(&slot)) else {
            return Err(Error::Unsupported {
                what: "cores without a generator".into(),
            });
        };
        slots.bring(at, &kept.memory)?;
        (kept.to, kept.used) = (at, self.clock);
        if let Some(old) = self.places[at].core.replace(slot) {
            self.resident.remove(&old);
        }
        self.resident.insert(slot, at);
        self.places[at].awaited = false;
        // An announced core is not the next to go.
        self.places[at].used = self.places[at].used.max(self.clock.saturating_sub(1));
        self.brought.set(self.brought.get() + 1);
        Ok(())
    }

    /// Sees to it that a core has its copy in pinned memory.
    fn pin(&mut self, model: &Model, slot: Slot, core: &Core) -> Result<(), Error> {
        if self.pinned.contains_key(&slot) {
            return Ok(());
        }
        if self.pinned.len() >= self.limit
            && let Some((&oldest, _)) = self.pinned.iter().min_by_key(|(_, kept)| kept.used)
            && let Some(Kept { memory, to, .. }) = self.pinned.remove(&oldest)
        {
            // Its last copy may still be under way.
            if let Some(slots) = model.slots() {
                slots.wait(to)?;
            }
            self.spare.push(memory);
        }
        let size = self.shape.slot_size(self.sites);
        let mut memory = match self.spare.pop() {
            Some(memory) => memory,
            None => model.device().pinned(size)?,
        };
        let packed = pack(&self.shape, self.sites, core, memory.values_mut());
        if packed.is_err() {
            memory.values_mut().fill(bf16::ZERO);
            self.spare.push(memory);
            return packed;
        }
        let kept = Kept {
            memory,
            used: self.clock,
            to: 0,
        };
        self.pinned.insert(slot, kept);
        Ok(())
    }
}

/// Lays a core out as the kernels take it: per site Uᵀ [q, R1] and V [R2, q], or Nᵀ [R2, R1]; behind all sites their gates.
fn pack(shape: &GeneratorShape, sites: usize, core: &Core, out: &mut [bf16]) -> Result<(), Error> {
    let failed = |what: String| Error::Shape { what };
    let GeneratorShape { r1, r2, rank, .. } = *shape;
    let size = shape.site_size();
    out.fill(bf16::ZERO);
    let (of_sites, of_gates) = out.split_at_mut(sites * size);
    for (site, out) in (0..sites).zip(of_sites.chunks_exact_mut(size)) {
        let foreign = || {
            failed(format!(
                "the core's site {site} is not of [{r1}, {r2}], rank {rank}"
            ))
        };
        let numbers = |tensor: &Tensor, rows: usize| -> Result<Vec<f32>, Error> {
            let (found, _) = tensor.dims2().map_err(|error| failed(error.to_string()))?;
            if found != rows {
                return Err(foreign());
            }
            let flat = tensor.flatten_all().and_then(|flat| flat.to_vec1());
            flat.map_err(|error| failed(error.to_string()))
        };
        let read = |error: generator::Error| failed(error.to_string());
        if rank == 0 {
            let Some(n) = core.matrix(site).map_err(read)? else {
                continue;
            };
            pack_gate(shape, core, site, of_gates)?;
            let n = numbers(&n, r1)?; // [R1, R2]
            if n.len() != r1 * r2 {
                return Err(foreign());
            }
            for (i, row) in n.chunks_exact(r2).enumerate() {
                for (j, value) in row.iter().enumerate() {
                    out[j * r1 + i] = bf16::from_f32(*value);
                }
            }
            continue;
        }
        let Some((u, v)) = core.low_rank(site).map_err(read)? else {
            if core.matrix(site).map_err(read)?.is_some() {
                return Err(foreign());
            }
            continue;
        };
        pack_gate(shape, core, site, of_gates)?;
        let (u, v) = (numbers(u, r1)?, numbers(v, r2)?); // [R1, q'], [R2, q']
        let own = u.len() / r1;
        if own > rank || u.len() != own * r1 || v.len() != own * r2 {
            return Err(foreign());
        }
        let (out_u, out_v) = out.split_at_mut(rank * r1);
        for (i, row) in u.chunks_exact(own.max(1)).enumerate() {
            for (j, value) in row.iter().enumerate() {
                out_u[j * r1 + i] = bf16::from_f32(*value);
            }
        }
        for (i, row) in v.chunks_exact(own.max(1)).enumerate() {
            for (j, value) in row.iter().enumerate() {
                out_v[i * rank + j] = bf16::from_f32(*value);
            }
        }
    }
    Ok(())
}

/// Lays a site's gate out behind the cores: (G + lambda I)⁻¹ G [R1, R1], then 1 - e in two halves. Nothing where the core has none.
fn pack_gate(
    shape: &GeneratorShape,
    core: &Core,
    site: usize,
    of_gates: &mut [bf16],
) -> Result<(), Error> {
    let size = SiteGates::size(shape.r1);
    let out = of_gates.chunks_exact_mut(size).nth(site);
    let (Some((known, rest)), Some(out)) = (core.gate(site), out) else {
        return Ok(());
    };
    let known = known.flatten_all().and_then(|flat| flat.to_vec1::<f32>());
    let known = known.map_err(|error| Error::Shape {
        what: error.to_string(),
    })?;
    let (matrix, behind) = out.split_at_mut(shape.r1 * shape.r1);
    if known.len() != matrix.len() {
        return Err(Error::Shape {
            what: format!("the gate of site {site} is not of {}", shape.r1),
        });
    }
    for (out, value) in matrix.iter_mut().zip(known) {
        *out = bf16::from_f32(value);
    }
    let bits = rest.to_bits();
    behind[0] = bf16::from_bits(bits as u16);
    behind[1] = bf16::from_bits((bits >> 16) as u16);
    Ok(())
}
