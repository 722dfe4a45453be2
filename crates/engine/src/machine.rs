//! The seam between what runs next and where it runs: forwards, sums of open windows, read-outs, and copies of cores.
//!
//! The engine holds sessions, states and cores as values in host memory, and addresses; a machine has the frozen model, the cache of
//! keys and values, and what of the others it needs near it. Start at [`Machine`]; [`Host`] is the processor.

use std::{collections::HashSet, path::Path};

use generator::{Core, CoreReading, Gate, Generator, State};
use lm::{KvCache, Lm, LoadOptions, Row};

use crate::{command::Sampling, config::Config, cores::Slot, error::Error, ids::TokenId};

/// What is known of a frozen model.
#[derive(Clone, Debug)]
pub struct Base {
    /// Sizes and switches; a machine may have room for fewer positions than the model.
    pub config: lm::Config,
    /// blake3 over the files that make the function, in hex.
    pub digest: String,
    /// Number of weights.
    pub parameters: u64,
    /// How most weights are held, e.g. `Q4_1` or `BF16`.
    pub weight_format: String,
}

/// How the token behind a row is drawn, by a machine that can.
#[derive(Clone, Copy, Debug)]
pub struct Draw<'a> {
    /// What the request asks for; its seed is spent already.
    pub sampling: &'a Sampling,
    /// The random number that decides, in [0, 1).
    pub point: f64,
    /// Tokens that occurred, where a penalty is for them.
    pub seen: &'a HashSet<u32>,
}

/// What rows give.
#[derive(Clone, Debug, Default)]
pub struct Output {
    /// Of rows that ask for logits and were not drawn, V floats each, in order.
    pub logits: Vec<f32>,
    /// For each row its token, with the log-probability that was asked for, if the machine drew it.
    pub drawn: Vec<Option<(TokenId, Option<f32>)>>,
}

/// Where forwards run. One thread uses it; a call returns when its result is there.
pub trait Machine {
    /// The frozen model.
    fn base(&self) -> &Base;

    /// The generator, if there is one: its sites and what concerns states as values.
    fn generator(&self) -> Option<&Generator>;

    /// Runs rows; of each, `slots` has the address of its core. Keys and values go into the rows' blocks, what tokens write to their
    /// windows, or to where those have a name for it. Gives the logits that rows ask for, V floats each, in order.
    ///
    /// # Errors
    /// A row that cannot run, or a machine that is broken.
    fn forward(&mut self, rows: &mut [Row<'_>], slots: &[Option<Slot>]) -> Result<Vec<f32>, Error>;

    /// The same, and draws the tokens of rows where `draws` says how, one entry a row. A machine that cannot, or not so, gives their logits.
    ///
    /// # Errors
    /// As [`Self::forward`].
    fn forward_and_draw(
        &mut self,
        rows: &mut [Row<'_>],
        slots: &[Option<Slot>],
        _draws: &[Option<Draw<'_>>],
    ) -> Result<Output, Error> {
        Ok(Output {
            logits: self.forward(rows, slots)?,
            drawn: vec![None; rows.len()],
        })
    }

    /// Says that rows with this core are likely to come soon.
    ///
    /// # Errors
    /// A machine that is broken.
    fn announce(&mut self, slot: Slot, core: &Core) -> Result<(), Error>;

    /// Nobody holds the core at this address any more, and nothing of it may stay.
    ///
    /// # Errors
    /// A machine that is broken.
    fn free(&mut self, slot: Slot) -> Result<(), Error>;

    /// Whether windows also hold what single tokens have written, where they are asked to.
    fn traces(&self) -> bool;

    /// Makes one sum of all that the machine holds of a state, so that it takes no more memory for each window.
    ///
    /// # Errors
    /// A state of another machine, or a machine that is broken.
    fn gather(&self, _: &mut State) -> Result<(), generator::Error> {
        Ok(())
    }

    /// Sees to it that a state has all its sums itself, to be written or read by others.
    ///
    /// # Errors
    /// As [`Self::gather`].
    fn land(&self, _: &mut State) -> Result<(), generator::Error> {
        Ok(())
    }

    /// What gates are made with, if the generator has one and cores with gates run here.
    fn gate(&self) -> Option<&Gate> {
        None
    }

    /// Reads the core out of a state.
    ///
    /// # Errors
    /// As [`Generator::read_out`].
    fn read_out(&self, state: &State) -> Result<Core, generator::Error>;

    /// Reads a portion of a core that was begun ([`Generator::begin_read_out`]): as much as keeps answers waiting for a small part of a
    /// token's time, or all of it where that is no more. The core when it is done, with the bits of a read-out at once. One with gates
    /// is of a state that has [landed](Self::land), and the processor reads it out.
    ///
    /// # Errors
    /// As [`Generator::read_out`].
    fn read_on(&self, reading: &mut CoreReading) -> Result<Option<Core>, generator::Error> {
        match self.generator().filter(|_| reading.is_gated()) {
            Some(generator) => generator.go_on(reading, Generator::side_by_side()),
            None => self.read_out(reading.state()).map(Some),
        }
    }
}

/// The processor.
#[derive(Debug)]
pub struct Host {
    lm: Lm,
    kv: KvCache,
    base: Base,
}

impl Host {
    /// Loads a model and, for sessions, a generator made for it.
    ///
    /// # Errors
    /// A file that is missing, damaged or made for another base.
    pub fn load(model: &Path, generator: Option<&Path>, config: &Config) -> Result<Self, Error> {
        let mut lm = Lm::load(
            model,
            LoadOptions {
                dequantize: config.dequantize,
                activations: config.activations,
            },
        )?;
        if let Some(generator) = generator {
            lm.attach_generator(generator)?;
        }
        let base = Base {
            config: lm.config().clone(),
            digest: lm.digest().to_owned(),
            parameters: lm.parameters(),
            weight_format: lm.weight_format().to_owned(),
        };
        let kv = KvCache::new(lm.config(), config.kv_blocks, config.block_size)?;
        Ok(Self { lm, kv, base })
    }

    fn own_generator(&self) -> Result<&Generator, generator::Error> {
        let missing = || generator::Error::Foreign {
            detail: "there is no generator".to_owned(),
        };
        self.lm.generator().ok_or_else(missing)
    }
}

impl Machine for Host {
    fn base(&self) -> &Base {
        &self.base
    }

    fn generator(&self) -> Option<&Generator> {
        self.lm.generator()
    }

    /// Rows bring their cores along: a slot is the same memory.
    fn forward(&mut self, rows: &mut [Row<'_>], _: &[Option<Slot>]) -> Result<Vec<f32>, Error> {
        match self.lm.forward(rows, &self.kv)?.logits {
            Some(logits) => Ok(logits.flatten_all()?.to_vec1()?),
            None => Ok(Vec::new()),
        }
    }

    fn announce(&mut self, _: Slot, _: &Core) -> Result<(), Error> {
        Ok(())
    }

    fn free(&mut self, _: Slot) -> Result<(), Error> {
        Ok(())
    }

    fn traces(&self) -> bool {
        true
    }

    fn gate(&self) -> Option<&Gate> {
        self.lm.generator()?.gate()
    }

    fn read_out(&self, state: &State) -> Result<Core, generator::Error> {
        self.own_generator()?.read_out(state)
    }

    fn read_on(&self, reading: &mut CoreReading) -> Result<Option<Core>, generator::Error> {
        let generator = self.own_generator()?;
        generator.go_on(reading, Generator::side_by_side())
    }
}
