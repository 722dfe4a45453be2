//! Sums on the device, of open windows and of states, until somebody on the host asks for them.
//!
//! They have names; who clones a window or a state shares what goes by its name until one of the two writes. A name that nobody has any more
//! gives its memory back. Where sums are more than the device has room for, those used longest ago wait on the host. Start at
//! [`Windows::write_to`]; [`Windows::gather`] has states.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Weak},
};

use cuda::{Error, Model, Sums};
use generator::{PlainSums, State, Window};

/// All sums that have names.
pub(crate) struct Windows {
    next: u64,
    open: BTreeMap<u64, Open>,
    spare: Vec<Sums>,
    /// Most of them on the device.
    limit: usize,
    clock: u64,
}

struct Open {
    name: Weak<u64>,
    sums: At,
    /// Its newest token, where that waits for its successor to write.
    pending: Option<u32>,
    used: u64,
}

enum At {
    Device(Sums),
    Host(Values),
}

/// Sums of all sites as numbers.
#[derive(Clone)]
struct Values {
    s: Vec<f32>,
    g: Option<Vec<f32>>,
    mass: Option<Vec<f64>>,
}

impl Values {
    fn of(sums: &Sums) -> Result<Self, Error> {
        Ok(Self {
            s: sums.s.read()?,
            g: sums.g.as_ref().map(cuda::Buffer::read).transpose()?,
            mass: sums.mass.as_ref().map(cuda::Buffer::read).transpose()?,
        })
    }

    fn put(&self, sums: &Sums, model: &Model) -> Result<(), Error> {
        let device = model.device();
        sums.s.view().write(device, &self.s)?;
        if let (Some(to), Some(g)) = (&sums.g, &self.g) {
            to.view().write(device, g)?;
        }
        match (&sums.mass, &self.mass) {
            (Some(to), Some(mass)) => to.view().write(device, mass),
            _ => Ok(()),
        }
    }
}

impl Windows {
    pub(crate) fn new(limit: usize) -> Self {
        Self {
            next: 0,
            open: BTreeMap::new(),
            spare: Vec::new(),
            limit: limit.max(1),
            clock: 0,
        }
    }

    /// Most windows that one pass may write to.
    pub(crate) fn limit(&self) -> usize {
        self.limit
    }

    /// The name of a window that this pass writes to; its sums are on the device and its own from here on. `busy` has the names of
    /// this pass so far.
    ///
    /// # Errors
    /// [`Error::Shape`] for a window that another machine has written into, or too many of them; [`Error::Call`].
    pub(crate) fn write_to(
        &mut self,
        model: &Model,
        window: &mut Window,
        busy: &mut BTreeSet<u64>,
    ) -> Result<u64, Error> {
        self.clock += 1;
        self.sweep(model)?;
        let name = match window.elsewhere() {
            Some(name) if Arc::strong_count(name) == 1 => **name,
            Some(name) => {
                // Its clone keeps what there is.
                let name = **name;
                busy.insert(name);
                self.here(model, name, busy)?;
                let copy = self.memory(model, busy)?;
                let (At::Device(from), pending) = self.get(name)? else {
                    return Err(gone());
                };
                copy.copy_from(model.device(), from)?;
                busy.remove(&name);
                self.add(window, copy, pending)
            }
            None if window.tokens() == 0 => {
                let sums = self.memory(model, busy)?;
                sums.clear(model.device())?;
                self.add(window, sums, None)
            }
            None => return Err(gone()),
        };
        busy.insert(name);
        self.here(model, name, busy)?;
        Ok(name)
    }

    /// What goes by a name, and its pending token.
    fn get(&self, name: u64) -> Result<(&At, Option<u32>), Error> {
        let open = self.open.get(&name).ok_or_else(gone)?;
        Ok((&open.sums, open.pending))
    }

    /// The sums of a window that this pass writes to.
    ///
    /// # Errors
    /// [`Error::Shape`] if there are none.
    pub(crate) fn sums(&self, name: u64) -> Result<&Sums, Error> {
        match self.get(name)? {
            (At::Device(sums), _) => Ok(sums),
            (At::Host(_), _) => Err(gone()),
        }
    }

    /// The token that waits for its successor.
    pub(crate) fn pending(&self, name: u64) -> Option<u32> {
        self.open.get(&name)?.pending
    }

    /// From now on this token waits for its successor.
    pub(crate) fn set_pending(&mut self, name: u64, token: Option<u32>) {
        if let Some(open) = self.open.get_mut(&name) {
            open.pending = token;
        }
    }

    /// Makes one sum of all that is here of a state.
    ///
    /// # Errors
    /// [`Error::Shape`] for a state of another machine; [`Error::Call`].
    pub(crate) fn gather(&mut self, model: &Model, state: &mut State) -> Result<(), Error> {
        self.clock += 1;
        if state.elsewhere().len() < 2 {
            return self.sweep(model);
        }
        let busy = BTreeSet::new();
        let sums = self.memory(model, &busy)?;
        sums.clear(model.device())?;
        for part in state.elsewhere() {
            let of_part = self.sums_of(model, part.name())?;
            sums.add(model.device(), of_part, part.weight())?;
        }
        state.gathered(&self.name(sums, None));
        self.sweep(model)
    }

    /// Copies what is here of a state into the state itself.
    ///
    /// # Errors
    /// As [`Self::gather`].
    pub(crate) fn land(&mut self, model: &Model, state: &mut State) -> Result<(), Error> {
        self.gather(model, state)?;
        let Some(part) = state.elsewhere().first() else {
            return Ok(());
        };
        let (read, weight) = (self.read(part.name())?, part.weight());
        let weighted = |values: &[f32]| values.iter().map(|value| weight * value).collect();
        let sites = state.site_count().max(1);
        let part = |values: &[f32], site: usize| -> Vec<f32> {
            let len = values.len() / sites;
            weighted(&values[site * len..(site + 1) * len])
        };
        let site = |site: usize| PlainSums {
            s: part(&read.s, site),
            g: read.g.as_ref().map(|g| part(g, site)),
            mass: read
                .mass
                .as_ref()
                .map_or(0.0, |mass| f64::from(weight).abs() * mass[site]),
        };
        let sums = (0..sites).map(site).collect();
        state.land(sums).map_err(|error| Error::Shape {
            what: error.to_string(),
        })?;
        self.sweep(model)
    }

    /// The sums that go by a name, brought to the device if they are not there.
    ///
    /// # Errors
    /// As [`Self::gather`].
    pub(crate) fn sums_of(&mut self, model: &Model, name: u64) -> Result<&Sums, Error> {
        self.here(model, name, &BTreeSet::from([name]))?;
        self.sums(name)
    }

    /// The sums that go by a name, as numbers.
    fn read(&self, name: u64) -> Result<Values, Error> {
        match self.get(name)?.0 {
            At::Device(sums) => Values::of(sums),
            At::Host(values) => Ok(values.clone()),
        }
    }

    fn add(&mut self, window: &mut Window, sums: Sums, pending: Option<u32>) -> u64 {
        let name = self.name(sums, pending);
        window.set_elsewhere(Arc::clone(&name));
        *name
    }

    /// Gives sums a name.
    fn name(&mut self, sums: Sums, pending: Option<u32>) -> Arc<u64> {
        let name = Arc::new(self.next);
        self.next += 1;
        let open = Open {
            name: Arc::downgrade(&name),
            sums: At::Device(sums),
            pending,
            used: self.clock,
        };
        self.open.insert(*name, open);
        name
    }

    /// Gives back, as zeros, what nobody has a name for.
    pub(crate) fn sweep(&mut self, model: &Model) -> Result<(), Error> {
        let dead: Vec<u64> = self
            .open
            .iter()
            .filter(|(_, open)| open.name.strong_count() == 0)
            .map(|(&name, _)| name)
            .collect();
        for name in dead {
            if let Some(Open {
                sums: At::Device(sums),
                ..
            }) = self.open.remove(&name)
            {
                sums.clear(model.device())?;
                self.spare.push(sums);
            }
        }
        Ok(())
    }

    /// Sees to it that a window's sums are on the device.
    fn here(&mut self, model: &Model, name: u64, busy: &BTreeSet<u64>) -> Result<(), Error> {
        let clock = self.clock;
        let open = self.open.get_mut(&name).ok_or_else(gone)?;
        open.used = clock;
        if matches!(open.sums, At::Device(_)) {
            return Ok(());
        }
        let sums = self.memory(model, busy)?;
        let open = self.open.get_mut(&name).ok_or_else(gone)?;
        if let At::Host(values) = &open.sums {
            values.put(&sums, model)?;
        }
        open.sums = At::Device(sums);
        Ok(())
    }

    /// Memory for sums: what is spare, what there is room for, or that of the window written longest ago.
    fn memory(&mut self, model: &Model, busy: &BTreeSet<u64>) -> Result<Sums, Error> {
        if let Some(sums) = self.spare.pop() {
            return Ok(sums);
        }
        let here = |open: &Open| matches!(open.sums, At::Device(_));
        if self.open.values().filter(|open| here(open)).count() < self.limit {
            return model.new_sums();
        }
        let idle = self.open.iter_mut();
        let idle = idle.filter(|(name, open)| here(open) && !busy.contains(name));
        let (_, oldest) = idle
            .min_by_key(|(_, open)| open.used)
            .ok_or_else(|| Error::Shape {
                what: format!("more than {} windows written in a pass", self.limit),
            })?;
        let At::Device(sums) = &oldest.sums else {
            return Err(gone());
        };
        let values = Values::of(sums)?;
        match std::mem::replace(&mut oldest.sums, At::Host(values)) {
            At::Device(sums) => Ok(sums),
            At::Host(_) => Err(gone()),
        }
    }
}

fn gone() -> Error {
    Error::Shape {
        what: "a window whose sums are not here".into(),
    }
}
