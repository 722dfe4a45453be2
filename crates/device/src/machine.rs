//! A step's rows on the device: which pass they run in, with whose core in which slot, writing to whose sums, by which graph.
//!
//! A pass is one forward; a step is one pass unless it has more rows, cores or windows than there is room for. Rows of one token each
//! whose logits are wanted run by the graph of the smallest bucket that holds them, all others by the kernels one by one.
//! Start at [`Accelerator::load`].

use std::{
    cell::{Cell, RefCell},
    collections::BTreeSet,
    path::Path,
    rc::Rc,
};

use cuda::{
    Batch, Bucket, Capacity, Device, Error, Form, Limits, Memory, Model, Rows, Write,
    ops::seen_words, splits_for,
};
use engine::{Base, Config, Draw, Machine, Output, Slot, TokenId};
use generator::{Core, Gate, Generator, State};
use lm::Row;

use crate::{Libraries, cores::Cores, load::Files, read_out::Reader, windows::Windows};

/// What of a machine is given to an engine.
#[derive(Clone, Debug)]
pub struct Options {
    /// The driver and cuBLAS.
    pub libraries: Libraries,
    /// Which device, from 0.
    pub ordinal: i32,
    /// Cores in device memory.
    pub slots: usize,
    /// Cores in pinned host memory behind them.
    pub pinned: usize,
    /// Matrices of GGUF's Q4_0, Q4_1 and Q8_0 stay as they are.
    pub quantised: bool,
    /// Sums in device memory: of open windows, and of what sessions have read.
    pub windows: usize,
}

/// Longest tables of rotary angles that are made: 2^17 positions.
const MAX_POSITIONS: usize = 1 << 17;
/// Most rows of logits of a pass: V floats each.
const MAX_LOGITS: usize = 512;
/// The largest bucket.
const MAX_BUCKET: usize = 256;

/// A frozen model with its generator on a device.
pub struct Accelerator {
    base: Base,
    generator: Option<Generator>,
    /// How tokens write.
    form: Option<Form>,
    skip_first: bool,
    model: Model,
    batch: Batch,
    /// By size, ascending.
    buckets: Vec<Bucket>,
    sizes: Vec<usize>,
    /// Of the eager batch.
    room: Room,
    limits: Limits,
    cores: Option<Cores>,
    windows: RefCell<Windows>,
    /// None where the processor reads out.
    reader: Option<Reader>,
    /// Whether windows may ask for what single tokens wrote.
    traces: bool,
}

/// What one pass can hold.
#[derive(Clone, Copy, Debug, Default)]
struct Room {
    rows: usize,
    sequences: usize,
    logits: usize,
}

/// A row as the device takes it.
struct Span {
    tokens: Vec<u32>,
    position: usize,
    slot: Option<u32>,
    /// The window that it writes to, its first row that does, and how many do.
    write: Option<(u64, usize, usize)>,
}

pub(crate) fn failed(error: Error) -> engine::Error {
    engine::Error::Machine {
        detail: error.to_string(),
    }
}

pub(crate) fn of_state(error: &Error) -> generator::Error {
    generator::Error::Device {
        detail: error.to_string(),
    }
}

impl Accelerator {
    /// Loads a model and, for sessions, a generator made for it; takes all memory that steps of `config` will need, and captures a graph
    /// for each bucket of up to `max_running` rows.
    ///
    /// # Errors
    /// A file that is missing, damaged or made for another base; what the device has no form or no memory for.
    pub fn load(
        model: &Path,
        generator: Option<&Path>,
        config: &Config,
        options: &Options,
    ) -> Result<Self, engine::Error> {
        let files = Files::open(model, generator)?;
        Self::on(files, config, options)
    }

    fn on(files: Files, config: &Config, options: &Options) -> Result<Self, engine::Error> {
        let cache = config.kv_blocks.saturating_mul(config.block_size);
        let mut of_model = files.tensors.config().clone();
        of_model.context_length = of_model.context_length.min(cache).min(MAX_POSITIONS);
        let digest = files.tensors.digest().to_owned();
        let shape = files.shape(of_model.context_length).map_err(failed)?;
        let generator_shape = files.generator_shape().map_err(failed)?;
        let (weights, generator, trained) = files.sources();
        let device = Device::open(&options.libraries, options.ordinal).map_err(failed)?;
        let multiprocessors = device.description().map_err(failed)?.multiprocessors;

        // One row beside each window's own: a token that waits for its successor runs again with it.
        let room = Room {
            rows: config.step_tokens.saturating_add(options.windows),
            sequences: config.max_running.saturating_add(options.windows),
            logits: MAX_LOGITS.min(config.step_tokens).max(1),
        };
        let sizes: Vec<usize> = buckets(config.max_running.min(room.logits));
        let parts = |rows: &usize| rows * splits_for(*rows, shape.heads.keys, multiprocessors);
        let memory = Memory {
            cache_blocks: config.kv_blocks,
            block_size: config.block_size,
            rows: room.rows,
            logits: room.logits,
            slots: options.slots.max(1),
            parts: sizes.iter().map(parts).max().unwrap_or(0),
        };
        let (form, sites) = match &generator_shape {
            Some(generator) => (Some(generator.form), generator.sites(shape.layers)),
            None => (None, 0),
        };
        let (heads, layers_blocks) = (
            shape.heads,
            of_model.context_length.div_ceil(config.block_size),
        );
        let trained = generator_shape.clone().zip(trained.as_ref());
        let mut model = Model::load(
            &device,
            shape,
            &weights.source(options.quantised),
            trained,
            memory,
        )
        .map_err(failed)?;
        let capacity = Capacity {
            rows: room.rows,
            sequences: room.sequences,
            blocks: layers_blocks,
            splits: 1,
        };
        let batch = Batch::new(&device, capacity, heads).map_err(failed)?;
        let captured = sizes
            .iter()
            .map(|&size| Bucket::capture(&model, size, layers_blocks, multiprocessors));
        let buckets = captured.collect::<Result<_, _>>().map_err(failed)?;
        let reader = match (&generator, &generator_shape) {
            (Some(generator), Some(shape)) => Reader::new(&device, generator, shape),
            _ => Ok(None),
        }
        .map_err(failed)?;
        let traces = config.trace_budget_bytes > 0;
        if traces {
            model.keep_written().map_err(failed)?;
        }
        let cores = generator_shape
            .map(|shape| Cores::new(shape, sites, options.slots.max(1), options.pinned));
        Ok(Self {
            base: Base {
                config: of_model,
                digest,
                parameters: weights.parameters(),
                weight_format: "BF16".to_owned(),
            },
            form,
            skip_first: generator
                .as_ref()
                .is_some_and(|generator| generator.config().skip_first),
            generator,
            limits: model.limits(),
            model,
            batch,
            buckets,
            sizes,
            room,
            cores,
            windows: RefCell::new(Windows::new(options.windows)),
            reader,
            traces,
        })
    }

    /// The device that it runs on.
    pub fn device(&self) -> &Device {
        self.model.device()
    }

    /// Whether nothing of any core is on the device or in pinned memory. Waits.
    ///
    /// # Errors
    /// A device that is broken.
    pub fn holds_no_core(&self) -> Result<bool, engine::Error> {
        match &self.cores {
            Some(cores) => cores.holds_nothing(&self.model).map_err(failed),
            None => Ok(true),
        }
    }

    /// Counts the copies of cores into slots, for who watches.
    pub fn brought(&self) -> Rc<Cell<u64>> {
        self.cores.as_ref().map_or_else(Rc::default, Cores::brought)
    }

    /// How many of the rows fit one pass: at least one.
    fn pass_of(&self, rows: &[Row<'_>], slots: &[Option<Slot>]) -> usize {
        let mut left = self.room;
        let mut windows = self.windows.borrow().limit();
        let mut cores = BTreeSet::new();
        let most = self.cores.as_ref().map_or(0, Cores::count);
        for (count, (row, slot)) in rows.iter().zip(slots).enumerate() {
            let writes = usize::from(row.window.is_some());
            let tokens = row.tokens.len() + writes;
            cores.extend(slot.filter(|_| row.core.is_some() && row.scale != 0.0));
            let fits = tokens <= left.rows
                && left.sequences > 0
                && row.logits <= left.logits
                && writes <= windows
                && cores.len() <= most.max(1);
            if !fits {
                return count.max(1);
            }
            left.rows -= tokens;
            left.sequences -= 1;
            left.logits -= row.logits;
            windows -= writes;
        }
        rows.len()
    }

    /// One forward.
    fn pass(
        &mut self,
        rows: &mut [Row<'_>],
        slots: &[Option<Slot>],
        draws: &[Option<Draw<'_>>],
        output: &mut Output,
    ) -> Result<(), Error> {
        let spans = self.spans(rows, slots)?;
        let drawn: Vec<_> = rows
            .iter()
            .zip(draws)
            .map(|(row, draw)| draw.as_ref().filter(|_| row.logits == 1))
            .collect();
        let taken: Vec<Rows<'_>> = rows
            .iter()
            .zip(&spans)
            .zip(&drawn)
            .map(|((row, span), draw)| Rows {
                tokens: &span.tokens,
                position: span.position,
                blocks: row.blocks,
                slot: span.slot,
                scale: row.scale,
                lookahead: row.lookahead.map(|token| token.0),
                logits: row.logits,
                draw: draw.map(as_drawn),
            })
            .collect();
        let device = self.model.device().clone();
        self.mark_seen(rows, &drawn)?;
        let decode = taken
            .iter()
            .zip(&spans)
            .all(|(row, span)| row.tokens.len() == 1 && row.logits == 1 && span.write.is_none());
        let bucket = self.sizes.iter().position(|size| *size >= taken.len());
        if let Some(bucket) = bucket.filter(|_| decode) {
            let bucket = &mut self.buckets[bucket];
            bucket.batch.fill(&device, &taken, &self.limits)?;
            bucket.launch()?;
            return give(&self.model, &bucket.batch, rows, &drawn, output);
        }
        self.batch.fill(&device, &taken, &self.limits)?;
        {
            let windows = self.windows.borrow();
            let mut writes = Vec::new();
            let mut first = 0;
            for span in &spans {
                if let Some((name, skip, len)) = span.write {
                    writes.push(Write {
                        first: first + skip,
                        len,
                        sums: windows.sums(name)?,
                    });
                }
                first += span.tokens.len();
            }
            self.model.forward(&self.batch, &writes)?;
        }
        give(&self.model, &self.batch, rows, &drawn, output)?;
        self.passed(rows, &spans)
    }

    /// Tells the device of the tokens that penalties are for.
    fn mark_seen(&self, rows: &[Row<'_>], drawn: &[Option<&Draw<'_>>]) -> Result<(), Error> {
        let mut wanted = 0;
        for (row, draw) in rows.iter().zip(drawn) {
            if let Some(draw) = draw
                && draw.sampling.repetition_penalty != 1.0
            {
                let mut words = vec![0u32; seen_words(self.base.config.vocab)];
                for token in draw.seen {
                    if let Some(word) = words.get_mut(*token as usize / 32) {
                        *word |= 1 << (token % 32);
                    }
                }
                self.model.mark_seen(wanted, &words)?;
            }
            wanted += row.logits;
        }
        Ok(())
    }

    /// What rows are to the device: with whose core, and who writes where.
    fn spans(&mut self, rows: &mut [Row<'_>], slots: &[Option<Slot>]) -> Result<Vec<Span>, Error> {
        let mut spans = Vec::with_capacity(rows.len());
        if let Some(cores) = &mut self.cores {
            cores.begin();
        }
        let (mut busy, windows) = (BTreeSet::new(), self.windows.get_mut());
        for (row, slot) in rows.iter_mut().zip(slots) {
            let mut span = Span {
                tokens: row.tokens.iter().map(|token| token.0).collect(),
                position: row.position,
                slot: None,
                write: None,
            };
            if let (Some(core), Some(slot), Some(cores)) = (row.core, slot, &mut self.cores)
                && row.scale != 0.0
                && !core.is_zero()
            {
                span.slot = Some(cores.place(&mut self.model, *slot, core)? as u32);
            }
            if let Some(window) = row.window.as_deref_mut() {
                if window.tokens() != row.position {
                    return Err(Error::Shape {
                        what: format!(
                            "a row at {} of a window of {} tokens",
                            row.position,
                            window.tokens()
                        ),
                    });
                }
                let name = windows.write_to(&self.model, window, &mut busy)?;
                if let Some(token) = windows.pending(name) {
                    // Its keys and values are made once more, now that its successor is known.
                    span.tokens.insert(0, token);
                    span.position -= 1;
                }
                let skip = usize::from(self.skip_first && span.position == 0);
                let waits = self.form == Some(Form::Associative) && row.lookahead.is_none();
                let len = span.tokens.len().saturating_sub(skip + usize::from(waits));
                span.write = Some((name, skip, len));
            }
            spans.push(span);
        }
        Ok(spans)
    }

    /// Takes note of what windows have been written.
    fn passed(&mut self, rows: &mut [Row<'_>], spans: &[Span]) -> Result<(), Error> {
        let windows = self.windows.get_mut();
        let mut start = 0;
        for (row, span) in rows.iter_mut().zip(spans) {
            let first = start;
            start += span.tokens.len();
            let (Some(window), Some((name, skip, len))) = (row.window.as_deref_mut(), span.write)
            else {
                continue;
            };
            let refused = |error: generator::Error| Error::Shape {
                what: error.to_string(),
            };
            if window.is_traced() && len > 0 {
                for site in 0..window.site_count() {
                    let (k, v) = self.model.written(site, first + skip, len)?;
                    window.push_written(site, &k, &v).map_err(refused)?;
                }
            }
            let waits = self.form == Some(Form::Associative) && row.lookahead.is_none();
            windows.set_pending(name, span.tokens.last().copied().filter(|_| waits));
            window.pass(row.tokens.len(), len).map_err(refused)?;
        }
        Ok(())
    }
}

/// As the device takes it.
fn as_drawn(draw: &Draw<'_>) -> cuda::ops::Draw {
    let sampling = draw.sampling;
    cuda::ops::Draw {
        temperature: sampling.temperature,
        top_k: u32::try_from(sampling.top_k).unwrap_or(u32::MAX),
        top_p: sampling.top_p,
        min_p: sampling.min_p,
        penalty: sampling.repetition_penalty,
        point: draw.point,
        logprob: sampling.logprobs,
    }
}

/// What a pass gives: tokens of rows that were drawn, a few bytes each, and the logits of all others.
fn give(
    model: &Model,
    batch: &Batch,
    rows: &[Row<'_>],
    drawn: &[Option<&Draw<'_>>],
    output: &mut Output,
) -> Result<(), Error> {
    let (tokens, logprobs) = if drawn.iter().any(Option::is_some) {
        model.drawn(batch)?
    } else {
        Default::default()
    };
    let mut wanted = 0;
    for (row, draw) in rows.iter().zip(drawn) {
        let drawn = draw.and_then(|draw| {
            let logprob = logprobs.get(wanted).filter(|_| draw.sampling.logprobs);
            Some((TokenId(*tokens.get(wanted)?), logprob.copied()))
        });
        if drawn.is_none() && row.logits > 0 {
            output
                .logits
                .extend(model.logits_of(wanted..wanted + row.logits)?);
        }
        output.drawn.push(drawn);
        wanted += row.logits;
    }
    Ok(())
}

/// 1, 2, 4, ... and the most rows that decode together.
fn buckets(most: usize) -> Vec<usize> {
    let most = most.clamp(1, MAX_BUCKET);
    let mut sizes: Vec<usize> = std::iter::successors(Some(1), |size| Some(size * 2))
        .take_while(|size| *size < most)
        .collect();
    sizes.push(most);
    sizes
}

impl Machine for Accelerator {
    fn base(&self) -> &Base {
        &self.base
    }

    fn generator(&self) -> Option<&Generator> {
        self.generator.as_ref()
    }

    fn forward(
        &mut self,
        rows: &mut [Row<'_>],
        slots: &[Option<Slot>],
    ) -> Result<Vec<f32>, engine::Error> {
        let draws = vec![None; rows.len()];
        Ok(self.forward_and_draw(rows, slots, &draws)?.logits)
    }

    fn forward_and_draw(
        &mut self,
        rows: &mut [Row<'_>],
        slots: &[Option<Slot>],
        draws: &[Option<Draw<'_>>],
    ) -> Result<Output, engine::Error> {
        let mut output = Output::default();
        let (mut rows, mut slots, mut draws) = (rows, slots, draws);
        while !rows.is_empty() {
            let count = self.pass_of(rows, slots);
            let (now, rest) = rows.split_at_mut(count);
            let (own, others) = slots.split_at(count.min(slots.len()));
            let (drawn, left) = draws.split_at(count.min(draws.len()));
            self.pass(now, own, drawn, &mut output).map_err(failed)?;
            (rows, slots, draws) = (rest, others, left);
        }
        Ok(output)
    }

    fn announce(&mut self, slot: Slot, core: &Core) -> Result<(), engine::Error> {
        match &mut self.cores {
            Some(cores) => cores.announce(&mut self.model, slot, core).map_err(failed),
            None => Ok(()),
        }
    }

    fn free(&mut self, slot: Slot) -> Result<(), engine::Error> {
        match &mut self.cores {
            Some(cores) => cores.free(&mut self.model, slot).map_err(failed),
            None => Ok(()),
        }
    }

    fn traces(&self) -> bool {
        self.traces
    }

    fn gate(&self) -> Option<&Gate> {
        self.generator.as_ref()?.gate()
    }

    fn gather(&self, state: &mut State) -> Result<(), generator::Error> {
        let gathered = self.windows.borrow_mut().gather(&self.model, state);
        gathered.map_err(|error| of_state(&error))
    }

    fn land(&self, state: &mut State) -> Result<(), generator::Error> {
        let landed = self.windows.borrow_mut().land(&self.model, state);
        landed.map_err(|error| of_state(&error))
    }

    fn read_out(&self, state: &State) -> Result<Core, generator::Error> {
        match (&self.generator, &self.reader) {
            (Some(generator), Some(reader)) => {
                let windows = &mut *self.windows.borrow_mut();
                reader.read(generator, state, (windows, &self.model))
            }
            (Some(generator), None) => {
                let mut state = state.try_clone()?;
                self.land(&mut state)?;
                generator.read_out(&state)
            }
            (None, _) => Err(generator::Error::Device {
                detail: "there is no generator".to_owned(),
            }),
        }
    }
}
