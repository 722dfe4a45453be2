//! Measurements of a device with a random model of a real shape: decode, prefill, ingest, read-outs, swaps, each beside its floor.
//!
//! Floors are counted from what must be read or computed, at rates measured in the same run. Random numbers everywhere: zeros run
//! faster. Start at [`run`].

use half::bf16;

use crate::{
    Batch, Bucket, Capacity, Device, Error, Event, Form, GeneratorShape, Memory, Model, Rows,
    Shape, Source, View, Write,
    ops::{self, Draw, Emitted, MOST_ROWS, Matrix, Product, QUANTISED_BLOCK, Quantised},
    read_out::{ITERATIONS, Kind, ReadOut, Sites},
};

/// What is measured with.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The decoder.
    pub shape: Shape,
    /// Its generator.
    pub generator: GeneratorShape,
    /// Decode batches.
    pub batches: Vec<usize>,
    /// Tokens in the cache before each decode row.
    pub context: usize,
    /// Tokens of a prefill.
    pub prompt: usize,
    /// Steps of each measurement; the median counts.
    pub steps: usize,
    /// Rows and columns of the product whose rate is the ceiling.
    pub ceiling: usize,
}

impl Plan {
    /// Mistral 7B with the published generator: about 75 GB of device memory, some minutes.
    pub fn mistral_7b() -> Self {
        Self {
            shape: Shape::mistral_7b(),
            generator: GeneratorShape::published_7b(),
            batches: vec![1, 8, 64, 256],
            context: 1024,
            prompt: 4096,
            steps: 50,
            ceiling: 8192,
        }
    }

    /// The same on a model of a few kilobytes: whether the program runs, not how fast.
    pub fn tiny() -> Self {
        Self {
            shape: Shape::tiny(),
            generator: GeneratorShape {
                r1: 16,
                r2: 16,
                rank: 8,
                ..GeneratorShape::published_7b()
            },
            batches: vec![1, 3],
            context: 20,
            prompt: 24,
            steps: 2,
            ceiling: 32,
        }
    }
}

/// One measurement, as a line of JSON.
#[derive(Clone, Debug)]
pub struct Figure {
    /// What was measured.
    pub name: String,
    /// Median milliseconds.
    pub ms: f64,
    /// Milliseconds of the slowest tenth.
    pub ms_p90: f64,
    /// Milliseconds that it takes at least, at the measured rates; 0 where none was worked out.
    pub floor_ms: f64,
}

impl Figure {
    /// `{"name": ..., "ms": ..., "ms_p90": ..., "floor_ms": ..., "over_floor": ...}`
    pub fn json(&self) -> String {
        let over = if self.floor_ms > 0.0 {
            self.ms / self.floor_ms
        } else {
            0.0
        };
        format!(
            "{{\"name\": \"{}\", \"ms\": {:.4}, \"ms_p90\": {:.4}, \"floor_ms\": {:.4}, \"over_floor\": {over:.3}}}",
            self.name, self.ms, self.ms_p90, self.floor_ms
        )
    }
}

struct Clock<'a> {
    device: &'a Device,
    from: Event,
    to: Event,
    steps: usize,
}

impl Clock<'_> {
    /// Each step between two events of the device, after three that do not count.
    fn time(
        &self,
        name: impl Into<String>,
        floor_ms: f64,
        mut step: impl FnMut() -> Result<(), Error>,
    ) -> Result<Figure, Error> {
        for _ in 0..3 {
            step()?;
        }
        let mut times = Vec::with_capacity(self.steps);
        for _ in 0..self.steps {
            self.device.synchronize()?;
            self.from.record()?;
            step()?;
            self.to.record()?;
            self.to.synchronize()?;
            times.push(f64::from(self.to.since(&self.from)?));
        }
        times.sort_by(f64::total_cmp);
        let at = |part: f64| {
            times
                .get(((times.len() as f64 * part) as usize).min(times.len().saturating_sub(1)))
                .copied()
                .unwrap_or(0.0)
        };
        Ok(Figure {
            name: name.into(),
            ms: at(0.5),
            ms_p90: at(0.9),
            floor_ms,
        })
    }
}

/// Fills memory with random bits of small numbers, by doubling what is there.
fn noise(device: &Device, to: View<'_, bf16>) -> Result<(), Error> {
    let mut state = 7u64;
    let mut draw = || {
        state = state
            .wrapping_mul(0x5851_f42d_4c95_7f2d)
            .wrapping_add(0x1405_7b7e_f767_814f);
        bf16::from_f64(((state >> 33) as f64 / (1u64 << 31) as f64 - 0.5) * 0.1)
    };
    let seed: Vec<bf16> = (0..to.len().min(1 << 20)).map(|_| draw()).collect();
    to.write(device, &seed)?;
    let mut done = seed.len();
    while done < to.len() {
        let len = done.min(to.len() - done);
        to.part(done, len)?.copy_from(device, to.part(0, len)?)?;
        done += len;
    }
    Ok(())
}

/// Measures everything, in order; each figure is said as soon as it is there.
///
/// # Errors
/// What the device refuses; not enough memory above all.
pub fn run(device: &Device, plan: &Plan, say: &mut dyn FnMut(&Figure)) -> Result<(), Error> {
    let clock = Clock {
        device,
        from: device.event(true)?,
        to: device.event(true)?,
        steps: plan.steps,
    };
    let (bytes_per_ms, flops_per_ms) = ceilings(device, plan, &clock, say)?;
    quantised(device, plan, &clock, bytes_per_ms, say)?;
    let Plan {
        shape,
        generator,
        batches,
        context,
        prompt,
        ..
    } = plan;
    let largest = batches.iter().copied().max().unwrap_or(1);
    let block_size = 16;
    let per = (context + 64).div_ceil(block_size);
    let rows = largest.max(*prompt);
    let memory = Memory {
        cache_blocks: largest * per + prompt.div_ceil(block_size),
        block_size,
        rows,
        logits: largest,
        slots: largest,
        parts: largest.max(32) * 32,
    };
    let source = Source::Random(1);
    let mut model = Model::load(
        device,
        shape.clone(),
        &source,
        Some((generator.clone(), &source)),
        memory,
    )?;
    if let Some(slots) = model.slots() {
        (0..slots.count()).try_for_each(|slot| noise(device, slots.slot(slot)?))?;
    }
    prefill(
        device,
        plan,
        &model,
        &clock,
        flops_per_ms,
        largest * per,
        say,
    )?;
    decode(device, plan, &model, &clock, bytes_per_ms, per, say)?;
    swap(device, plan, &mut model, &clock, per, say)?;
    drop(model);
    read_outs(device, plan, &clock, say)
}

/// Bytes read and written, and operations of bf16 products, a millisecond.
fn ceilings(
    device: &Device,
    plan: &Plan,
    clock: &Clock<'_>,
    say: &mut dyn FnMut(&Figure),
) -> Result<(f64, f64), Error> {
    let n = plan.ceiling;
    let (a, b, c) = (
        device.alloc::<bf16>(n * n * 4)?,
        device.alloc::<bf16>(n * n * 4)?,
        device.alloc::<bf16>(n * n)?,
    );
    noise(device, a.view())?;
    noise(device, b.view())?;
    let copy = clock.time("ceiling: a copy on the device", 0.0, || {
        b.view().copy_from(device, a.view())
    })?;
    say(&copy);
    let product = Product::linear(n, n, n);
    let gemm = clock.time(format!("ceiling: a bf16 product of {n}"), 0.0, || {
        ops::multiply(
            device,
            &product,
            Matrix::dense(a.view(), n),
            Matrix::dense(b.view(), n),
            Matrix::dense(c.view(), n),
        )
    })?;
    say(&gemm);
    Ok((
        2.0 * (a.view().len() * 2) as f64 / copy.ms.max(1e-9),
        2.0 * (n as f64).powi(3) / gemm.ms.max(1e-9),
    ))
}

/// A linear whose weights stay quantised, of one row and of as many as read them for once.
fn quantised(
    device: &Device,
    plan: &Plan,
    clock: &Clock<'_>,
    bytes_per_ms: f64,
    say: &mut dyn FnMut(&Figure),
) -> Result<(), Error> {
    let (out, features) = (
        2 * plan.shape.intermediate,
        plan.shape.hidden / QUANTISED_BLOCK * QUANTISED_BLOCK,
    );
    let blocks = out * features / QUANTISED_BLOCK;
    let x = device.alloc::<bf16>(MOST_ROWS * features)?;
    let y = device.alloc::<bf16>(MOST_ROWS * out)?;
    noise(device, x.view())?;
    for bits in [4, 8] {
        let mut state = 9u32;
        let mut draw = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            state.rotate_left(16)
        };
        let codes: Vec<u32> = (0..blocks * bits).map(|_| draw()).collect();
        // Scales of about a hundredth, without a minimum.
        let scales: Vec<u32> = (0..blocks).map(|_| 0x2000 | draw() & 0x3ff).collect();
        let (codes, scales) = (device.upload(&codes)?, device.upload(&scales)?);
        let w = Quantised {
            codes: codes.view(),
            scales: scales.view(),
            bits,
            out,
            features,
        };
        let floor = (blocks * (4 * bits + 4)) as f64 / bytes_per_ms;
        for rows in [1, MOST_ROWS] {
            let name = format!("quantised linear [{out}, {features}] of {bits} bits, {rows} rows");
            say(&clock.time(name, floor, || {
                ops::multiply_quantised(device, y.view(), x.view(), &w, rows)
            })?);
        }
        let rounded = device.alloc::<bf16>(out * features)?;
        let floor = floor + (2 * out * features) as f64 / bytes_per_ms;
        let name = format!("dequantise [{out}, {features}] of {bits} bits");
        say(&clock.time(name, floor, || ops::dequantise(device, rounded.view(), &w))?);
    }
    Ok(())
}

fn text(len: usize, vocab: usize) -> Vec<u32> {
    (0..len as u64)
        .map(|i| (i * i * 7 + i * 131) as u32 % vocab as u32)
        .collect()
}

fn row<'a>(tokens: &'a [u32], position: usize, blocks: &'a [u32], slot: Option<u32>) -> Rows<'a> {
    Rows {
        tokens,
        position,
        blocks,
        slot,
        scale: 1.0,
        lookahead: Some(0),
        logits: 1,
        draw: Some(Draw::greedy()),
    }
}

/// One long prompt: bare, with a core, and told to a session.
fn prefill(
    device: &Device,
    plan: &Plan,
    model: &Model,
    clock: &Clock<'_>,
    flops_per_ms: f64,
    first_block: usize,
    say: &mut dyn FnMut(&Figure),
) -> Result<(), Error> {
    let Plan { shape, prompt, .. } = plan;
    let tokens = text(*prompt, shape.vocab);
    let blocks: Vec<u32> = (0..prompt.div_ceil(16))
        .map(|i| (first_block + i) as u32)
        .collect();
    let mut batch = Batch::new(
        device,
        Capacity {
            rows: *prompt,
            sequences: 1,
            blocks: blocks.len(),
            splits: 1,
        },
        shape.heads,
    )?;
    // Each weight of a layer once a token, and half of all pairs of query and key twice.
    let linear =
        2.0 * (shape.weights_of_step() - shape.vocab * shape.hidden) as f64 * *prompt as f64;
    let pairs = 2.0
        * (shape.layers * shape.heads.queries * shape.heads.dim) as f64
        * (*prompt as f64).powi(2);
    let floor = (linear + pairs) / flops_per_ms;
    for (name, slot) in [("bare", None), ("one core", Some(0))] {
        batch.fill(device, &[row(&tokens, 0, &blocks, slot)], &model.limits())?;
        say(
            &clock.time(format!("prefill of {prompt}, {name}"), floor, || {
                model.forward(&batch, &[])
            })?,
        );
    }
    let sums = model.new_sums()?;
    batch.fill(
        device,
        &[Rows {
            logits: 0,
            ..row(&tokens, 0, &blocks, None)
        }],
        &model.limits(),
    )?;
    say(
        &clock.time(format!("prefill of {prompt}, no logits"), floor, || {
            model.forward(&batch, &[])
        })?,
    );
    let writes = [Write {
        first: 0,
        len: *prompt,
        sums: &sums,
    }];
    say(&clock.time(format!("ingest of {prompt}"), floor, || {
        model.forward(&batch, &writes)
    })?);
    Ok(())
}

/// A graph a batch size: no cores, one for all rows, one of its own for each.
fn decode(
    device: &Device,
    plan: &Plan,
    model: &Model,
    clock: &Clock<'_>,
    bytes_per_ms: f64,
    per: usize,
    say: &mut dyn FnMut(&Figure),
) -> Result<(), Error> {
    let Plan {
        shape,
        generator,
        batches,
        context,
        ..
    } = plan;
    let multiprocessors = device.description()?.multiprocessors;
    // Every row has keys of the same text, in blocks of its own.
    let tokens = text(*context, shape.vocab);
    let first: Vec<u32> = (0..per as u32).collect();
    let mut batch = Batch::new(
        device,
        Capacity {
            rows: *context,
            sequences: 1,
            blocks: per,
            splits: 1,
        },
        shape.heads,
    )?;
    batch.fill(device, &[row(&tokens, 0, &first, None)], &model.limits())?;
    model.forward(&batch, &[])?;
    let largest = batches.iter().copied().max().unwrap_or(1);
    for sequence in 1..largest {
        (0..per).try_for_each(|block| model.copy_block(block, sequence * per + block))?;
    }
    let tables: Vec<Vec<u32>> = (0..largest)
        .map(|i| (0..per).map(|block| (i * per + block) as u32).collect())
        .collect();
    for &size in batches {
        let mut bucket = Bucket::capture(model, size, per, multiprocessors)?;
        for (name, cores) in [("none", 0), ("one core", 1), ("all distinct", size)] {
            let spans: Vec<_> = (0..size)
                .map(|i| {
                    row(
                        &tokens[i % context..][..1],
                        *context,
                        &tables[i],
                        (cores > 0).then_some((i % cores.max(1)) as u32),
                    )
                })
                .collect();
            bucket.batch.fill(device, &spans, &model.limits())?;
            let shared = if cores > 0 {
                generator_weights(shape, generator)
            } else {
                0
            };
            let core = cores.min(size) * generator.core_size(shape.layers) * 2;
            let bytes = (shape.weights_of_step() + shared) * 2
                + core
                + size * (context + 1) * shape.kv_bytes();
            say(&clock.time(
                format!("decode of {size}, {context} keys, cores: {name}"),
                bytes as f64 / bytes_per_ms,
                || bucket.launch(),
            )?);
        }
    }
    Ok(())
}

/// A1 and B of all sites.
fn generator_weights(shape: &Shape, generator: &GeneratorShape) -> usize {
    let inputs = generator.places.iter().map(|place| match place {
        crate::Place::Output => shape.heads.queries * shape.heads.dim,
        crate::Place::Down => shape.intermediate,
    });
    shape.layers
        * inputs
            .map(|input| generator.r1 * input + generator.r2 * shape.hidden)
            .sum::<usize>()
}

/// A core brought in: by itself, and beside a decode step, which should not feel it.
fn swap(
    device: &Device,
    plan: &Plan,
    model: &mut Model,
    clock: &Clock<'_>,
    per: usize,
    say: &mut dyn FnMut(&Figure),
) -> Result<(), Error> {
    let Some(slots) = model.slots_mut() else {
        return Ok(());
    };
    let last = slots.count() - 1;
    let mut core = device.pinned::<bf16>(slots.size())?;
    slots.keep(last, &mut core)?;
    say(&clock.time(
        format!("swap in of a core of {} bytes", slots.size() * 2),
        0.0,
        || {
            slots.bring(last, &core)?;
            slots.need(last)
        },
    )?);
    let size = plan
        .batches
        .iter()
        .copied()
        .filter(|size| *size <= 64)
        .max()
        .unwrap_or(1);
    let multiprocessors = device.description()?.multiprocessors;
    let mut bucket = Bucket::capture(model, size, per, multiprocessors)?;
    let tokens = text(plan.context + 1, plan.shape.vocab);
    let tables: Vec<Vec<u32>> = (0..size)
        .map(|i| (0..per).map(|block| (i * per + block) as u32).collect())
        .collect();
    let spans: Vec<_> = tables
        .iter()
        .enumerate()
        .map(|(i, blocks)| {
            row(
                &tokens[..1],
                plan.context,
                blocks,
                Some(i.min(last.saturating_sub(1)) as u32),
            )
        })
        .collect();
    bucket.batch.fill(device, &spans, &model.limits())?;
    say(&clock.time(
        format!("decode of {size} while nothing is swapped"),
        0.0,
        || bucket.launch(),
    )?);
    say(&clock.time(
        format!("decode of {size} while a core is swapped in"),
        0.0,
        || {
            if let Some(slots) = model.slots_mut() {
                slots.bring(last, &core)?;
            }
            bucket.launch()
        },
    )?);
    if let Some(slots) = model.slots() {
        slots.wait(last)?;
    }
    Ok(())
}

/// All sites of one session, as a graph.
fn read_outs(
    device: &Device,
    plan: &Plan,
    clock: &Clock<'_>,
    say: &mut dyn FnMut(&Figure),
) -> Result<(), Error> {
    let GeneratorShape { r1, r2, rank, .. } = plan.generator;
    let count = plan.generator.sites(plan.shape.layers);
    // Keys and values of as many random tokens as there are ranks: S and G of full rank.
    let tokens = r1.max(r2);
    let (k, v) = (
        device.alloc::<bf16>(tokens * r1)?,
        device.alloc::<bf16>(tokens * r2)?,
    );
    noise(device, k.view())?;
    noise(device, v.view())?;
    let (s, g) = (
        device.alloc::<f32>(count * r1 * r2)?,
        device.alloc::<f32>(count * r1 * r1)?,
    );
    for site in 0..count {
        let outer = Product {
            a_transposed: true,
            b_transposed: false,
            m: r1,
            n: r2,
            k: tokens,
            alpha: 1.0,
            beta: 0.0,
            batch: 1,
        };
        let (keys, values) = (Matrix::dense(k.view(), r1), Matrix::dense(v.view(), r2));
        ops::multiply(
            device,
            &outer,
            keys,
            values,
            Matrix::dense(s.view().part(site * r1 * r2, r1 * r2)?, r2),
        )?;
        ops::multiply(
            device,
            &Product { n: r1, ..outer },
            keys,
            keys,
            Matrix::dense(g.view().part(site * r1 * r1, r1 * r1)?, r1),
        )?;
    }
    let floors = device.zeros(count)?;
    for (kind, rank, form) in [
        (Kind::Svd, rank, Form::Published),
        (Kind::Ridge, 0, Form::Associative),
        (Kind::Ridge, rank, Form::Associative),
    ] {
        let lambdas = if kind == Kind::Ridge {
            vec![0.1; count]
        } else {
            Vec::new()
        };
        let read_out = ReadOut::new(
            device,
            kind,
            Sites {
                count,
                r1,
                r2,
                rank,
            },
            ITERATIONS,
            &lambdas,
        )?;
        let size = GeneratorShape {
            rank,
            form,
            ..plan.generator.clone()
        }
        .site_size();
        let slot = device.zeros::<bf16>(count * size)?;
        let to = Emitted {
            slot: slot.view(),
            offset: 0,
            site_size: size,
        };
        let read = || read_out.run(device, s.view(), Some(g.view()), floors.view(), &to);
        read()?;
        read_out.check()?;
        let graph = device.capture(read)?;
        say(&clock.time(format!("read-out {kind:?} of {count} sites [{r1}, {r2}], rank {rank}, {ITERATIONS} iterations"), 0.0, || graph.launch())?);
    }
    Ok(())
}
