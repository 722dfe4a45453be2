//! A loaded generator: its sites, and what concerns all of them at once.
//!
//! Start at [`Generator::load`]; [`Generator::read_out`] turns a state into the core that serving needs, at once or
//! with other work in between ([`CoreReading`]).

use std::{fs::File, io::Read, ops::Range, path::Path};

use candle_core::Tensor;
use rayon::prelude::*;

use crate::{
    checkpoint,
    config::{Config, ReadOut},
    cores::{Core, SiteCore},
    error::Error,
    export::{self, PeftExport},
    gate::{Gate, Gates, SiteGate},
    read_out,
    site::{BaseShape, Site, SiteId},
    state::{Keeps, State, Window},
    trace::Trace,
};

/// Longest adapter_config.json that is read, in bytes.
const MAX_CONFIG: u64 = 1 << 20;

/// A trained generator of one base.
#[derive(Debug)]
pub struct Generator {
    config: Config,
    sites: Vec<Site>,
    digest: String,
    parameters: usize,
    /// Shared by all that begin with it.
    empty: State,
    gate: Option<Gate>,
}

/// A core that is being read out of a state, site by site.
#[derive(Debug)]
pub struct CoreReading {
    state: State,
    gated: bool,
    /// Of the first sites.
    read: Vec<(SiteCore, Option<SiteGate>)>,
}

impl CoreReading {
    /// What is read out.
    #[must_use]
    pub fn state(&self) -> &State {
        &self.state
    }

    /// Whether with gates.
    #[must_use]
    pub fn is_gated(&self) -> bool {
        self.gated
    }

    /// The state, when it is done with.
    #[must_use]
    pub fn into_state(self) -> State {
        self.state
    }
}

impl Generator {
    /// Reads adapter_config.json and adapter_model.safetensors from a folder and holds them against the base.
    /// Weights stay in the file's own format (bf16, f16, f32). A [`crate::GATE_FILE`] beside them is read as well.
    ///
    /// # Errors
    /// One that names the file, key or tensor that is missing, foreign, malformed or of the wrong shape.
    pub fn load(dir: &Path, base: &BaseShape) -> Result<Self, Error> {
        let mut generator = Self::load_ungated(dir, base)?;
        let Self {
            config,
            sites,
            digest,
            ..
        } = &generator;
        generator.gate = Gate::load(dir, config, sites, digest)?;
        Ok(generator)
    }

    /// The same without a gate, whether or not there is a file of one.
    ///
    /// # Errors
    /// As [`Generator::load`].
    pub fn load_ungated(dir: &Path, base: &BaseShape) -> Result<Self, Error> {
        let path = dir.join("adapter_config.json");
        let mut json = Vec::new();
        let file = File::open(&path).map_err(|source| checkpoint::io(&path, source))?;
        file.take(MAX_CONFIG + 1)
            .read_to_end(&mut json)
            .map_err(|source| checkpoint::io(&path, source))?;
        if json.len() as u64 > MAX_CONFIG {
            return Err(Error::Malformed {
                path,
                detail: format!("it is longer than {MAX_CONFIG} bytes"),
            });
        }
        let config = Config::parse(&json)?;
        let mut digest = blake3::Hasher::new();
        digest
            .update(&(json.len() as u64).to_le_bytes())
            .update(&json);
        let (sites, parameters) = checkpoint::read(
            &dir.join("adapter_model.safetensors"),
            &config,
            base,
            &mut digest,
        )?;
        let empty = State::new(keeps(&config, &sites))?;
        Ok(Self {
            config,
            sites,
            empty,
            gate: None,
            digest: digest.finalize().to_hex().to_string(),
            parameters,
        })
    }

    /// The same generator, computing in integers at the sites that `rounds` names: maps and dense cores in 8 bits, activations in
    /// int8, wherever inputs are whole blocks of 32. For bases whose linears do the same; what it adds differs from the f32
    /// form's by about the rounding of the base's own products.
    #[must_use]
    pub fn rounded(mut self, rounds: impl Fn(SiteId) -> bool) -> Self {
        let round = |site: Site| {
            if rounds(site.id) {
                site.rounded()
            } else {
                site
            }
        };
        self.sites = self.sites.into_iter().map(round).collect();
        self
    }

    /// The parsed adapter_config.json.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// blake3 over the length of the config file (u64, little-endian), the config file and the weight file, in hex.
    pub fn digest(&self) -> &str {
        &self.digest
    }

    /// What gates are made with, if there is a file of it.
    pub fn gate(&self) -> Option<&Gate> {
        self.gate.as_ref()
    }

    /// The bytes of a [`crate::GATE_FILE`] for this generator.
    ///
    /// # Errors
    /// [`Error::Foreign`] for a gate of other sites.
    pub fn gate_bytes(&self, gate: &Gate) -> Result<Vec<u8>, Error> {
        gate.to_bytes(&self.sites, &self.digest)
    }

    /// Number of trained values.
    pub fn parameters(&self) -> usize {
        self.parameters
    }

    /// Sites in order; an index into this slice is what every other call takes.
    pub fn sites(&self) -> &[Site] {
        &self.sites
    }

    /// Index of a site, if that linear is adapted.
    pub fn site_index(&self, id: SiteId) -> Option<usize> {
        self.sites.binary_search_by_key(&id, Site::id).ok()
    }

    /// An open window into which nothing has been written.
    ///
    /// # Errors
    /// [`Error::Tensor`] if its sums cannot be allocated.
    pub fn new_window(&self) -> Result<Window, Error> {
        Window::new(keeps(&self.config, &self.sites), false)
    }

    /// An open window that keeps what every token writes, for a [`Trace`].
    ///
    /// # Errors
    /// As [`Generator::new_window`].
    pub fn new_traced_window(&self) -> Result<Window, Error> {
        Window::new(keeps(&self.config, &self.sites), true)
    }

    /// The trace of a document of which nothing has been read.
    pub fn new_trace(&self) -> Trace {
        Trace::new(self.sites.len(), self.config.skip_first)
    }

    /// The state of what some tokens of a document wrote: their sums from an empty state, in the order of the document; bits do not
    /// depend on how the ranges are cut. Tokens that wrote nothing (the ends of windows) add nothing.
    ///
    /// # Errors
    /// [`Error::Foreign`] for a trace of another generator.
    pub fn recall(&self, trace: &Trace, tokens: &[Range<usize>]) -> Result<State, Error> {
        trace.recall(keeps(&self.config, &self.sites), tokens)
    }

    /// The empty state: the bare model. It takes no memory of its own until something is added.
    ///
    /// # Errors
    /// As [`State::try_clone`].
    pub fn new_state(&self) -> Result<State, Error> {
        self.empty.try_clone()
    }

    /// Reads the core out of a state; an empty state gives a core of zeros, which is the bare model. Equal
    /// states give equal bits, however many threads run.
    ///
    /// # Errors
    /// [`Error::NotFinite`], [`Error::NotPositive`] or [`Error::NotConverged`] of the first site that cannot be read
    /// out; [`Error::Foreign`] for a state of another generator.
    pub fn read_out(&self, state: &State) -> Result<Core, Error> {
        self.read(state, false)
    }

    /// The same core with gates, for text that may not concern it; without, if the generator has none.
    ///
    /// # Errors
    /// As [`Generator::read_out`].
    pub fn read_out_gated(&self, state: &State) -> Result<Core, Error> {
        self.read(state, true)
    }

    fn read(&self, state: &State, gated: bool) -> Result<Core, Error> {
        let mut read_out = self.begin_read_out(state.try_clone()?, gated)?;
        let core = self.go_on(&mut read_out, self.sites.len())?;
        Ok(core.expect("all sites were read"))
    }

    /// Begins to read a core out of a state, with gates if they are asked for and the generator has some; [`Generator::go_on`] does it.
    ///
    /// # Errors
    /// [`Error::Foreign`] for a state of another generator.
    pub fn begin_read_out(&self, state: State, gated: bool) -> Result<CoreReading, Error> {
        if state.len() != self.sites.len() {
            return Err(Error::Foreign {
                detail: format!("a state of {} sites, not {}", state.len(), self.sites.len()),
            });
        }
        Ok(CoreReading {
            state,
            gated,
            read: Vec::with_capacity(self.sites.len()),
        })
    }

    /// Sites that are read out at the same time.
    #[must_use]
    pub fn side_by_side() -> usize {
        rayon::current_num_threads()
    }

    /// Reads the next `sites` sites, side by side; the core once it has been called for all of them. However it is cut, the bits are
    /// those of [`Generator::read_out`].
    ///
    /// # Errors
    /// As [`Generator::read_out`]; what was begun is then of no more use.
    pub fn go_on(&self, read_out: &mut CoreReading, sites: usize) -> Result<Option<Core>, Error> {
        let CoreReading { state, gated, read } = read_out;
        state.check_here()?;
        if state.is_empty() {
            return Ok(Some(Core::of(self.sites.iter().map(|_| SiteCore::Zero))));
        }
        let gate = self.gate.as_ref().filter(|_| *gated);
        let first = read.len();
        let next = self.sites.get(first..).unwrap_or_default();
        let next = &next[..sites.min(next.len())];
        let one = |(at, site): (usize, &Site)| {
            let index = first + at;
            let (s, g, mass) = state.parts(index)?;
            let keys = gate.and_then(|gate| gate.keys(index));
            read_out::read_out(self.config.read_out, site, s, g, mass, keys)
        };
        let new: Vec<Result<_, Error>> = next.par_iter().enumerate().map(one).collect();
        for one in new {
            read.push(one?);
        }
        if read.len() < self.sites.len() {
            return Ok(None);
        }
        let (sites, gates) = std::mem::take(read)
            .into_iter()
            .unzip::<_, _, Vec<_>, Vec<_>>();
        Ok(Some(Core {
            gates: gate.map(|gate| Gates::new(gate, gates)),
            ..Core::of(sites)
        }))
    }

    /// The full weight delta (alpha / R2) B Nᵀ A1 [Dout, Din] of a site, f32 (tests, merging).
    ///
    /// # Errors
    /// [`Error::Foreign`] for a core of another generator or a site that is not there.
    pub fn delta_weight(&self, site: usize, core: &Core) -> Result<Tensor, Error> {
        export::delta_weight(self.site(site)?, core.site(site)?)
    }

    /// adapter_config.json and adapter_model.safetensors of a PEFT LoRA that does what the core does.
    ///
    /// # Errors
    /// [`Error::Foreign`] for a core of another generator.
    pub fn export_peft(&self, core: &Core) -> Result<PeftExport, Error> {
        if core.sites.len() != self.sites.len() {
            return Err(Error::Foreign {
                detail: format!(
                    "a core of {} sites, not {}",
                    core.sites.len(),
                    self.sites.len()
                ),
            });
        }
        export::export(&self.config, &self.sites, core)
    }

    fn site(&self, index: usize) -> Result<&Site, Error> {
        let none = || Error::Foreign {
            detail: format!("{} sites, none with index {index}", self.sites.len()),
        };
        self.sites.get(index).ok_or_else(none)
    }
}

/// Which sums the sites' states have.
fn keeps(config: &Config, sites: &[Site]) -> impl Iterator<Item = Keeps> {
    let (gram, mass) = (
        config.read_out == ReadOut::Ridge,
        config.read_out == ReadOut::Svd,
    );
    sites.iter().map(move |site| {
        let (r1, r2, _) = site.ranks();
        Keeps { r1, r2, gram, mass }
    })
}

#[cfg(test)]
mod tests;
