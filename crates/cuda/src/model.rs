//! A decoder on the device: one forward for prefill, ingest and decode, and a graph of it for each size of a decode batch.
//!
//! The forward is `lm`'s, in bf16 with f32 sums, and is held against it by tests; it is a function of its own because a graph can hold
//! only what neither allocates nor waits. Which rows run is [`crate::Batch`]'s matter. Start at [`Model::forward`].

mod bucket;
mod layer;

use half::bf16;

pub use bucket::{Bucket, splits_for};

use crate::{
    Batch, Buffer, Device, Error, Form, GeneratorShape, Limits, Shape, Slots, Source, error::fits,
    ops, weights::Weights,
};

/// eps of every rms in a generator.
const EPS: f32 = 1e-6;

/// Memory that a model is given.
#[derive(Clone, Copy, Debug)]
pub struct Memory {
    /// Blocks of the cache.
    pub cache_blocks: usize,
    /// Tokens of a block.
    pub block_size: usize,
    /// Most rows of a step.
    pub rows: usize,
    /// Most rows of a step whose logits are wanted.
    pub logits: usize,
    /// Slots for cores.
    pub slots: usize,
    /// Most parts that a decode batch splits keys into, summed over its rows.
    pub parts: usize,
}

/// A decoder with its generator, cache, slots and the memory of a step.
pub struct Model {
    device: Device,
    shape: Shape,
    generator: Option<GeneratorShape>,
    memory: Memory,
    weights: Weights,
    cos: Buffer<f32>,
    sin: Buffer<f32>,
    /// Per layer k and v, [blocks block_size, Hkv Dh] each.
    cache: Vec<[Buffer<bf16>; 2]>,
    slots: Option<Slots>,
    work: Work,
    /// What the last pass wrote, where that is kept.
    written: Option<Written>,
}

/// Keys and values of all rows of a pass, [sites, rows, R1] and [sites, rows, R2].
struct Written {
    keys: Buffer<bf16>,
    values: Buffer<bf16>,
}

/// Activations of a step, [rows, ..] each.
struct Work {
    /// The residual stream and what is to be added to it, [rows, D] f32: all else is rounded to bf16 where a product takes it.
    h: Buffer<f32>,
    y: Buffer<f32>,
    x: Buffer<bf16>,
    /// [rows, (H + 2 Hkv) Dh]: rounded once, behind norm and rotation.
    qkv: Buffer<f32>,
    q: Buffer<bf16>,
    heads: Buffer<bf16>,
    gate_up: Buffer<bf16>,
    middle: Buffer<bf16>,
    wanted: Buffer<bf16>,
    /// [logits, V]
    logits: Buffer<f32>,
    /// `[logits]` each.
    drawn: Buffer<u32>,
    logprobs: Buffer<f32>,
    /// [logits, ceil(V / 32)]: tokens that penalties are for.
    seen: Buffer<u32>,
    /// A quantised linear's weights, for products with many rows.
    dequantised: Option<Buffer<bf16>>,
    /// [parts, H, Dh], [parts, H, 2]
    sums: Buffer<f32>,
    extents: Buffer<f32>,
    site: Option<SiteWork>,
}

/// What sites need beside that.
struct SiteWork {
    /// A1 x, [rows, R1]: keys and queries of the associative form.
    a: Buffer<f32>,
    /// [rows, q]
    b: Buffer<f32>,
    /// Both of rows that are grouped, as products take them.
    a_grouped: Buffer<bf16>,
    b_grouped: Buffer<bf16>,
    /// [rows, R2]
    c: Buffer<bf16>,
    /// [rows, 2], where cores may have gates.
    doubts: Option<Buffer<f32>>,
    /// Normed residual, [rows, D].
    n: Buffer<bf16>,
    /// Normed embedding of each row's successor, [rows, D].
    next: Buffer<bf16>,
    /// Per place keys [rows, R1] of the published form, and values [rows, R2]: in f32, as small singular values of their sums become 1, too.
    keys: Vec<Buffer<f32>>,
    values: Vec<Buffer<f32>>,
}

/// A session's sums on the device: per site S [R1, R2] and, in the associative form, G [R1, R1], layer after layer, f32.
pub struct Sums {
    /// [sites, R1, R2]
    pub s: Buffer<f32>,
    /// [sites, R1, R1]
    pub g: Option<Buffer<f32>>,
    /// Σ ||k_t|| ||v_t|| `[sites]`, in the published form: what the rounding of S is measured with.
    pub mass: Option<Buffer<f64>>,
}

impl Sums {
    /// Sets all to zeros.
    ///
    /// # Errors
    /// [`Error::Call`] where the driver refuses.
    pub fn clear(&self, device: &Device) -> Result<(), Error> {
        self.s.view().clear(device)?;
        if let Some(g) = &self.g {
            g.view().clear(device)?;
        }
        match &self.mass {
            Some(mass) => mass.view().clear(device),
            None => Ok(()),
        }
    }

    /// Adds others of the same sizes, times a weight.
    ///
    /// # Errors
    /// [`Error::Shape`] for other sizes; [`Error::Call`].
    pub fn add(&self, device: &Device, from: &Self, weight: f32) -> Result<(), Error> {
        ops::add_scaled(device, self.s.view(), from.s.view(), weight)?;
        if let (Some(g), Some(from)) = (&self.g, &from.g) {
            ops::add_scaled(device, g.view(), from.view(), weight)?;
        }
        match (&self.mass, &from.mass) {
            (Some(mass), Some(from)) => {
                let weight = f64::from(weight).abs();
                ops::add_scaled_masses(device, mass.view(), from.view(), weight)
            }
            _ => Ok(()),
        }
    }

    /// Takes the values of others of the same sizes.
    ///
    /// # Errors
    /// [`Error::Shape`] for other sizes; [`Error::Call`].
    pub fn copy_from(&self, device: &Device, from: &Self) -> Result<(), Error> {
        self.s.view().copy_from(device, from.s.view())?;
        if let (Some(g), Some(from)) = (&self.g, &from.g) {
            g.view().copy_from(device, from.view())?;
        }
        match (&self.mass, &from.mass) {
            (Some(mass), Some(from)) => mass.view().copy_from(device, from.view()),
            _ => Ok(()),
        }
    }
}

/// Rows of a batch that write: `len` from `first` on.
pub struct Write<'a> {
    /// First row.
    pub first: usize,
    /// Rows.
    pub len: usize,
    /// Where to.
    pub sums: &'a Sums,
}

impl Model {
    /// Loads weights and takes all memory that steps will need.
    ///
    /// # Errors
    /// [`Error::Unsupported`] and [`Error::Shape`] for what has no form here; [`Error::File`]; [`Error::Call`] without enough memory.
    pub fn load(
        device: &Device,
        shape: Shape,
        source: &Source,
        generator: Option<(GeneratorShape, &Source)>,
        memory: Memory,
    ) -> Result<Self, Error> {
        shape.check()?;
        if let Some((generator, _)) = &generator {
            generator.check(shape.layers)?;
        }
        let Memory {
            cache_blocks,
            block_size,
            rows,
            logits,
            slots,
            parts,
        } = memory;
        fits(
            cache_blocks > 0
                && block_size > 0
                && rows > 0
                && cache_blocks
                    .checked_mul(block_size)
                    .is_some_and(|n| n < u32::MAX as usize),
            || format!("{memory:?}"),
        )?;
        let weights = Weights::load(
            device,
            &shape,
            source,
            generator
                .as_ref()
                .map(|(generator, source)| (generator, *source)),
        )?;
        let angle = |position: usize| {
            shape
                .frequencies
                .iter()
                .map(move |frequency| position as f64 * frequency)
        };
        let table = |of: fn(f64) -> f64| -> Vec<f32> {
            (0..shape.positions)
                .flat_map(angle)
                .map(|angle| of(angle) as f32)
                .collect()
        };
        let heads = shape.heads;
        let width = cache_blocks * block_size * heads.keys * heads.dim;
        let generator = generator.map(|(generator, _)| generator);
        let site = match &generator {
            None => None,
            Some(GeneratorShape {
                r1,
                r2,
                rank,
                places,
                gate,
                ..
            }) => Some(SiteWork {
                a: device.zeros(rows * r1)?,
                b: device.zeros(rows * (*rank).max(1))?,
                a_grouped: device.zeros(rows * r1)?,
                b_grouped: device.zeros(rows * (*rank).max(1))?,
                c: device.zeros(rows * r2)?,
                doubts: gate.map(|_| device.zeros(rows * 2)).transpose()?,
                n: device.zeros(rows * shape.hidden)?,
                next: device.zeros(rows * shape.hidden)?,
                keys: places
                    .iter()
                    .map(|_| device.zeros(rows * r1))
                    .collect::<Result<_, _>>()?,
                values: places
                    .iter()
                    .map(|_| device.zeros(rows * r2))
                    .collect::<Result<_, _>>()?,
            }),
        };
        let queries = heads.queries * heads.dim;
        let parts = parts.max(1) * heads.queries;
        let work = Work {
            h: device.zeros(rows * shape.hidden)?,
            x: device.zeros(rows * shape.hidden)?,
            y: device.zeros(rows * shape.hidden)?,
            qkv: device.zeros(rows * heads.stride())?,
            q: device.zeros(rows * queries)?,
            heads: device.zeros(rows * queries)?,
            gate_up: device.zeros(rows * 2 * shape.intermediate)?,
            middle: device.zeros(rows * shape.intermediate)?,
            wanted: device.zeros(logits.max(1) * shape.hidden)?,
            logits: device.zeros(logits.max(1) * shape.vocab)?,
            drawn: device.zeros(logits.max(1))?,
            logprobs: device.zeros(logits.max(1))?,
            seen: device.zeros(logits.max(1) * ops::seen_words(shape.vocab))?,
            dequantised: match weights.most_quantised() {
                0 => None,
                elements => Some(device.alloc(elements)?),
            },
            sums: device.zeros(parts * heads.dim)?,
            extents: device.zeros(parts * 2)?,
            site,
        };
        Ok(Self {
            device: device.clone(),
            memory,
            cos: device.upload(&table(f64::cos))?,
            sin: device.upload(&table(f64::sin))?,
            cache: (0..shape.layers)
                .map(|_| Ok([device.zeros(width)?, device.zeros(width)?]))
                .collect::<Result<_, Error>>()?,
            slots: generator
                .as_ref()
                .map(|generator| {
                    let sites = generator.sites(shape.layers);
                    Slots::new(device, slots.max(1), generator.slot_size(sites))
                })
                .transpose()?,
            weights,
            work,
            written: None,
            generator,
            shape,
        })
    }

    /// The device that it is on.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// What batches are checked against.
    pub fn limits(&self) -> Limits {
        Limits {
            vocab: self.shape.vocab,
            positions: self.shape.positions,
            cache_blocks: self.memory.cache_blocks,
            block_size: self.memory.block_size,
            slots: self.slots.as_ref().map_or(0, Slots::count),
            heads: self.shape.heads,
            scale: self
                .generator
                .as_ref()
                .map_or(0.0, |generator| generator.scale),
        }
    }

    /// Slots for cores, where there is a generator.
    pub fn slots(&self) -> Option<&Slots> {
        self.slots.as_ref()
    }

    /// The same, to bring cores in.
    pub fn slots_mut(&mut self) -> Option<&mut Slots> {
        self.slots.as_mut()
    }

    /// Empty sums for one session.
    ///
    /// # Errors
    /// [`Error::Unsupported`] without a generator; [`Error::Call`].
    pub fn new_sums(&self) -> Result<Sums, Error> {
        let Some(generator) = &self.generator else {
            return Err(Error::Unsupported {
                what: "sums without a generator".into(),
            });
        };
        let GeneratorShape { r1, r2, form, .. } = generator;
        let sites = generator.sites(self.shape.layers);
        let g = *form == Form::Associative;
        Ok(Sums {
            s: self.device.zeros(sites * r1 * r2)?,
            g: g.then(|| self.device.zeros(sites * r1 * r1)).transpose()?,
            mass: (!g).then(|| self.device.zeros(sites)).transpose()?,
        })
    }

    /// From now on what single rows write is kept until the next pass that writes.
    ///
    /// # Errors
    /// [`Error::Call`] without enough memory.
    pub fn keep_written(&mut self) -> Result<(), Error> {
        if let Some(generator) = &self.generator {
            let rows = self.memory.rows * generator.sites(self.shape.layers);
            self.written = Some(Written {
                keys: self.device.zeros(rows * generator.r1)?,
                values: self.device.zeros(rows * generator.r2)?,
            });
        }
        Ok(())
    }

    /// Keys [len, R1] and values [len, R2] that rows of the last pass with writes gave to a site, from row `first` on. Waits for them.
    ///
    /// # Errors
    /// [`Error::Shape`] where nothing is kept, or not so much; [`Error::Call`].
    pub fn written(
        &self,
        site: usize,
        first: usize,
        len: usize,
    ) -> Result<(Vec<bf16>, Vec<bf16>), Error> {
        let (Some(written), Some(generator)) = (&self.written, &self.generator) else {
            return Err(crate::error::shape("what was written is not kept"));
        };
        let end = first.checked_add(len);
        fits(end.is_some_and(|end| end <= self.memory.rows), || {
            format!("rows {first} + {len} of {:?}", self.memory)
        })?;
        let read = |from: &Buffer<bf16>, width: usize| {
            let at = (site * self.memory.rows + first) * width;
            from.view().part(at, len * width)?.read(&self.device)
        };
        Ok((
            read(&written.keys, generator.r1)?,
            read(&written.values, generator.r2)?,
        ))
    }

    /// Takes a batch through the model. What `writes` names is added to sums on the way; tokens are drawn of those wanted rows that say how.
    /// Waits for nothing and allocates nothing.
    ///
    /// # Errors
    /// [`Error::Shape`] for more rows than there is memory for, or writes beyond the batch; [`Error::Call`].
    pub fn forward(&self, batch: &Batch, writes: &[Write<'_>]) -> Result<(), Error> {
        self.pass(batch, writes, batch.any_core)
    }

    fn pass(&self, batch: &Batch, writes: &[Write<'_>], adapted: bool) -> Result<(), Error> {
        let (rows, d, device) = (batch.rows, self.shape.hidden, &self.device);
        fits(
            rows > 0 && rows <= self.memory.rows && batch.wanted <= self.memory.logits,
            || format!("{rows} rows, {} logits of {:?}", batch.wanted, self.memory),
        )?;
        fits(
            batch.splits() == 1 || rows * batch.splits() <= self.memory.parts,
            || {
                format!(
                    "{rows} rows in {} parts of {:?}",
                    batch.splits(),
                    self.memory
                )
            },
        )?;
        fits(
            writes.iter().all(|write| {
                write
                    .first
                    .checked_add(write.len)
                    .is_some_and(|end| end <= rows)
            }),
            || "writes beyond the batch".into(),
        )?;
        fits(writes.is_empty() || self.generator.is_some(), || {
            "writes without a generator".into()
        })?;
        let work = &self.work;
        ops::gather_residual(
            device,
            work.h.view(),
            self.weights.embedding.view(),
            batch.tokens()?,
            rows,
            d,
        )?;
        if let (Some(site), false) = (&work.site, writes.is_empty()) {
            ops::gather_rows(
                device,
                site.n.view(),
                self.weights.embedding.view(),
                batch.next()?,
                rows,
                d,
            )?;
            ops::rms_norm(device, site.next.view(), site.n.view(), None, rows, d, EPS)?;
        }
        if let (Some(doubts), true) = (work.site.as_ref().and_then(|s| s.doubts.as_ref()), adapted)
        {
            doubts.view().part(0, rows * 2)?.clear(device)?;
        }
        for (index, layer) in self.weights.layers.iter().enumerate() {
            let gain = layer.input_norm.view();
            if index == 0 {
                ops::norm_residual(
                    device,
                    work.x.view(),
                    work.h.view(),
                    gain,
                    rows,
                    d,
                    self.shape.eps,
                )?;
            } else {
                ops::add_rms_norm(
                    device,
                    work.x.view(),
                    work.h.view(),
                    work.y.view(),
                    gain,
                    rows,
                    d,
                    self.shape.eps,
                )?;
            }
            if !self.layer(index, layer, batch, writes, adapted)? {
                return Ok(());
            }
        }
        ops::add_rms_norm(
            device,
            work.x.view(),
            work.h.view(),
            work.y.view(),
            self.weights.final_norm.view(),
            rows,
            d,
            self.shape.eps,
        )?;
        ops::gather_rows(
            device,
            work.wanted.view(),
            work.x.view(),
            batch.wanted_rows()?,
            batch.wanted,
            d,
        )?;
        let (wanted, vocab) = (batch.wanted, self.shape.vocab);
        let (logits, normed) = (work.logits.view(), work.wanted.view());
        match &self.weights.head {
            Some(head) => self.base(logits, normed, head, wanted, vocab, d)?,
            None => self.linear(logits, normed, &self.weights.embedding, wanted, vocab, d)?,
        }
        ops::draw(
            device,
            work.drawn.view(),
            work.logprobs.view(),
            work.logits.view(),
            batch.draws()?,
            work.seen.view(),
            wanted,
            vocab,
        )
    }

    /// Copies a block of the cache, all layers: what a fork's sequence goes on from.
    ///
    /// # Errors
    /// [`Error::Shape`] if there is no such block; [`Error::Call`].
    pub fn copy_block(&self, from: usize, to: usize) -> Result<(), Error> {
        let len = self.memory.block_size * self.shape.heads.keys * self.shape.heads.dim;
        for side in self.cache.iter().flatten() {
            let part = |block: usize| side.view().part(block.saturating_mul(len), len);
            part(to)?.copy_from(&self.device, part(from)?)?;
        }
        Ok(())
    }

    /// Says which tokens the penalty of a wanted row is for in the next forward: a bit each, of ceil(V / 32) words.
    ///
    /// # Errors
    /// [`Error::Shape`] if there is no such row, or the words are not so many; [`Error::Call`].
    pub fn mark_seen(&self, wanted: usize, words: &[u32]) -> Result<(), Error> {
        let len = ops::seen_words(self.shape.vocab);
        fits(words.len() == len, || {
            format!(
                "{} words for bits of {} tokens",
                words.len(),
                self.shape.vocab
            )
        })?;
        let row = self
            .work
            .seen
            .view()
            .part(wanted.saturating_mul(len), len)?;
        row.write(&self.device, words)
    }

    /// The tokens that the last forward of a batch drew, and their log-probabilities, in the order of its wanted rows; what a row did not
    /// want is anything. Waits for them.
    ///
    /// # Errors
    /// [`Error::Call`] if something before failed.
    pub fn drawn(&self, batch: &Batch) -> Result<(Vec<u32>, Vec<f32>), Error> {
        let drawn = self.work.drawn.view().part(0, batch.wanted)?;
        let logprobs = self.work.logprobs.view().part(0, batch.wanted)?;
        Ok((drawn.read(&self.device)?, logprobs.read(&self.device)?))
    }

    /// The logits [rows, V] of some of the wanted rows of the last forward. Waits for them.
    ///
    /// # Errors
    /// [`Error::Shape`] for rows that a forward cannot have; [`Error::Call`] if something before failed.
    pub fn logits_of(&self, rows: std::ops::Range<usize>) -> Result<Vec<f32>, Error> {
        let vocab = self.shape.vocab;
        let part = self.work.logits.view();
        let part = part.part(rows.start.saturating_mul(vocab), rows.len() * vocab)?;
        part.read(&self.device)
    }

    /// The logits [wanted, V] of the last forward of a batch. Waits for them.
    ///
    /// # Errors
    /// [`Error::Call`] if something before failed.
    pub fn logits(&self, batch: &Batch) -> Result<Vec<f32>, Error> {
        self.logits_of(0..batch.wanted)
    }
}
