//! Where an evaluation's forwards run: the processor, or a device behind the engine's seam.
//!
//! One way to ask, whoever answers: rows with cores by address, states that land, read-outs. The processor takes a cache as large
//! as is asked for and runs with a trained adapter, too; a device has what it was loaded with. Start at [`Seat`].

use std::collections::BTreeMap;

use engine::{Base, Machine, Slot};
use generator::{Adapter, Core, Gate, Generator, State, Strategy, Trace, Window, windows};
use lm::{KvCache, Lm, Row, TokenId};

use crate::Error;

/// Tokens of a KV block.
pub(crate) const BLOCK: usize = 16;
/// Tokens of one forward.
pub(crate) const STEP: usize = 1024;
/// Rows that a device decodes by one graph.
const RUNNING: usize = 64;

/// What a device has to be loaded with, for a cache of so many tokens. No prompt and no window is longer than it.
#[must_use]
pub fn settings(cache_tokens: usize) -> engine::Config {
    engine::Config {
        step_tokens: STEP,
        max_running: RUNNING,
        kv_blocks: cache_tokens.div_ceil(BLOCK),
        block_size: BLOCK,
        // Questions get sentences.
        trace_budget_bytes: 1,
        ..engine::Config::default()
    }
}

/// A model where its forwards run.
pub(crate) struct Seat<'a> {
    machine: Box<dyn Machine + 'a>,
    /// Blocks of its cache.
    blocks: usize,
    /// On the processor the model itself.
    lm: Option<&'a Lm>,
    adapter: Option<&'a (dyn Adapter + Sync)>,
    cores: Cores,
}

/// Addresses of cores, none given twice.
#[derive(Default)]
struct Cores {
    next: u64,
    known: BTreeMap<*const Core, Slot>,
}

impl<'a> Seat<'a> {
    /// On the processor, with the deltas of `adapter` in place of imprints if there is one.
    pub(crate) fn processor(
        lm: &'a Lm,
        adapter: Option<&'a (dyn Adapter + Sync)>,
    ) -> Result<Self, Error> {
        Ok(Self {
            machine: Box::new(Processor::new(lm, adapter, 1)?),
            blocks: 1,
            lm: Some(lm),
            adapter,
            cores: Cores::default(),
        })
    }

    /// On a device that was loaded with [`settings`].
    pub(crate) fn device(machine: Box<dyn Machine + 'a>, settings: &engine::Config) -> Self {
        Self {
            machine,
            blocks: settings.kv_blocks,
            lm: None,
            adapter: None,
            cores: Cores::default(),
        }
    }

    /// The frozen model.
    pub(crate) fn base(&self) -> &Base {
        self.machine.base()
    }

    /// The model itself, which only the processor has.
    pub(crate) fn lm(&self) -> Option<&'a Lm> {
        self.lm
    }

    pub(crate) fn generator(&self) -> Option<&Generator> {
        self.machine.generator()
    }

    fn generator_or_refuse(&self) -> Result<&Generator, Error> {
        Ok(self.generator().ok_or(lm::Error::NoGenerator { row: 0 })?)
    }

    /// Whether cores with gates run here, where the generator has a gate.
    pub(crate) fn gates(&self) -> bool {
        self.machine.gate().is_some()
    }

    /// Sees to it that the cache has so many blocks. What was in it may be lost.
    ///
    /// # Errors
    /// [`Error::Device`] for more than a device was given.
    pub(crate) fn reserve(&mut self, blocks: usize) -> Result<(), Error> {
        if blocks <= self.blocks {
            return Ok(());
        }
        let Some(lm) = self.lm else {
            return Err(Error::Device {
                what: format!("a prompt or window of {} tokens", blocks * BLOCK),
                detail: format!("its cache has room for {}", self.blocks * BLOCK),
            });
        };
        self.machine = Box::new(Processor::new(lm, self.adapter, blocks)?);
        self.blocks = blocks;
        Ok(())
    }

    /// Runs rows: the logits that they ask for, V floats each, in order.
    pub(crate) fn forward(&mut self, rows: &mut [Row<'_>]) -> Result<Vec<f32>, Error> {
        let slots: Vec<Option<Slot>> = rows
            .iter()
            .map(|row| row.core.map(|core| self.cores.address(core)))
            .collect();
        Ok(self.machine.forward(rows, &slots)?)
    }

    /// The cores that rows have run with since are no longer known by their addresses, which others may come to have.
    pub(crate) fn let_go(&mut self) -> Result<(), Error> {
        for slot in std::mem::take(&mut self.cores.known).into_values() {
            self.machine.free(slot)?;
        }
        Ok(())
    }

    /// Reads the core out of a state.
    pub(crate) fn read_out(&self, state: &State) -> Result<Core, Error> {
        Ok(self.machine.read_out(state)?)
    }

    /// The state of a document, read in windows as a stream cuts it, with what each token wrote.
    pub(crate) fn read(&mut self, document: &[TokenId]) -> Result<(State, Trace), Error> {
        let generator = self.generator_or_refuse()?;
        let (strategy, window) = (generator.config().strategy, generator.config().window);
        let (mut state, mut trace) = (generator.new_state()?, generator.new_trace());
        let window = match strategy {
            Strategy::Concat => document.len(),
            Strategy::Parallel | Strategy::Sequential => window,
        };
        let spans: Vec<&[TokenId]> = windows::fixed(document.len(), window)
            .map(|range| &document[range])
            .collect();
        let longest = spans.iter().map(|span| span.len()).max().unwrap_or(1);
        let together = match strategy {
            Strategy::Concat | Strategy::Parallel => (STEP / longest).max(1),
            // Each is read with the core of those before it.
            Strategy::Sequential => 1,
        };
        for spans in spans.chunks(together) {
            let core = match strategy {
                Strategy::Sequential => Some(self.read_out(&state)?),
                Strategy::Concat | Strategy::Parallel => None,
            };
            let read = self.read_windows(spans, core.as_ref(), &mut state, &mut trace);
            self.let_go()?;
            read?;
        }
        self.machine.land(&mut state)?;
        Ok((state, trace))
    }

    /// Reads whole windows side by side and adds them to the state.
    fn read_windows(
        &mut self,
        spans: &[&[TokenId]],
        core: Option<&Core>,
        state: &mut State,
        trace: &mut Trace,
    ) -> Result<(), Error> {
        let mut next = 0_u32;
        let tables: Vec<Vec<u32>> = spans
            .iter()
            .map(|span| {
                let first = next;
                next = next
                    .saturating_add(u32::try_from(span.len().div_ceil(BLOCK)).unwrap_or(u32::MAX));
                (first..next).collect()
            })
            .collect();
        self.reserve(next as usize)?;
        let mut open: Vec<Window> = Vec::with_capacity(spans.len());
        for _ in spans {
            open.push(self.generator_or_refuse()?.new_traced_window()?);
        }
        let longest = spans.iter().map(|span| span.len()).max().unwrap_or(0);
        for start in (0..longest).step_by(STEP) {
            let mut rows: Vec<Row<'_>> = Vec::with_capacity(spans.len());
            for ((tokens, blocks), window) in spans.iter().zip(&tables).zip(&mut open) {
                let end = tokens.len().min(start + STEP);
                if start >= end {
                    continue;
                }
                rows.push(Row {
                    tokens: &tokens[start..end],
                    position: start,
                    blocks,
                    core,
                    scale: 1.0,
                    window: Some(window),
                    lookahead: tokens.get(end).copied(),
                    logits: 0,
                });
            }
            self.forward(&mut rows)?;
        }
        for (window, tokens) in open.iter().zip(spans) {
            state.add_window(window, 1.0)?;
            trace.push(window, tokens.len())?;
        }
        Ok(self.machine.gather(state)?)
    }
}

impl Cores {
    fn address(&mut self, core: &Core) -> Slot {
        let next = &mut self.next;
        let slot = self
            .known
            .entry(std::ptr::from_ref(core))
            .or_insert_with(|| {
                *next += 1;
                Slot::new(0, *next)
            });
        *slot
    }
}

/// The processor, with a model that is somebody else's.
struct Processor<'a> {
    lm: &'a Lm,
    adapter: Option<&'a (dyn Adapter + Sync)>,
    kv: KvCache,
    base: Base,
}

impl<'a> Processor<'a> {
    fn new(
        lm: &'a Lm,
        adapter: Option<&'a (dyn Adapter + Sync)>,
        blocks: usize,
    ) -> Result<Self, Error> {
        Ok(Self {
            lm,
            adapter,
            kv: KvCache::new(lm.config(), blocks.max(1), BLOCK)?,
            base: Base {
                config: lm.config().clone(),
                digest: lm.digest().to_owned(),
                parameters: lm.parameters(),
                weight_format: lm.weight_format().to_owned(),
            },
        })
    }
}

impl Machine for Processor<'_> {
    fn base(&self) -> &Base {
        &self.base
    }

    fn generator(&self) -> Option<&Generator> {
        self.lm.generator()
    }

    fn forward(
        &mut self,
        rows: &mut [Row<'_>],
        _: &[Option<Slot>],
    ) -> Result<Vec<f32>, engine::Error> {
        let output = match self.adapter {
            Some(adapter) => self.lm.adapted(rows, &self.kv, adapter)?,
            None => self.lm.forward(rows, &self.kv)?,
        };
        match output.logits {
            Some(logits) => Ok(logits.flatten_all()?.to_vec1()?), // [wanted V]
            None => Ok(Vec::new()),
        }
    }

    fn announce(&mut self, _: Slot, _: &Core) -> Result<(), engine::Error> {
        Ok(())
    }

    fn free(&mut self, _: Slot) -> Result<(), engine::Error> {
        Ok(())
    }

    fn traces(&self) -> bool {
        true
    }

    fn gate(&self) -> Option<&Gate> {
        self.lm.generator()?.gate()
    }

    fn read_out(&self, state: &State) -> Result<Core, generator::Error> {
        match self.lm.generator() {
            Some(generator) => generator.read_out(state),
            None => Err(generator::Error::Foreign {
                detail: "there is no generator".to_owned(),
            }),
        }
    }
}

#[cfg(test)]
mod tests;
