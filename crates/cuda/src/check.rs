//! The check of a device: every kernel against its twin, read-outs against their definitions, golden cases, graphs against the eager forward.
//!
//! What `imprint-cuda check` prints and what a GPU is judged by; the tests run it on the software device at sizes of their own. Fails
//! where a device is not right, never skips. Start at [`run`].

use std::path::Path;

use half::bf16;

use crate::{
    Batch, Bucket, Capacity, Device, Error, Files, GeneratorShape, Memory, Model, Rows, Shape,
    Source, Write,
    ops::{self, Attention, Cache, Emitted, Heads, Parts, Rotation, Sequences, SiteCores},
    read_out::{ITERATIONS, Kind, ReadOut, Sites},
    twin,
};

/// How large the cases are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scale {
    /// For the software device.
    Tiny,
    /// Mistral 7B's, a few rows of each.
    Real,
}

/// One comparison.
#[derive(Clone, Debug)]
pub struct Line {
    /// What was compared.
    pub what: String,
    /// ‖got − want‖ / ‖want‖; infinite where a result is not a number.
    pub error: f64,
    /// The largest that passes.
    pub tolerance: f64,
}

impl Line {
    /// Whether it passed.
    pub fn holds(&self) -> bool {
        self.error <= self.tolerance
    }
}

/// A last bit of bf16 at every element.
const ROUNDED: f64 = 4e-3;
/// Weights of attention are rounded to bf16, too.
const ATTENDED: f64 = 6e-3;
/// Activations in bf16 through whole models.
const THROUGH: f64 = 2e-2;

/// SplitMix64, as normal numbers (sums of twelve uniform ones).
struct Noise(u64);

impl Noise {
    fn uniform(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    }

    fn normal(&mut self) -> f64 {
        (0..12).map(|_| self.uniform()).sum::<f64>() - 6.0
    }

    fn bf16s(&mut self, len: usize, deviation: f64) -> Vec<bf16> {
        (0..len)
            .map(|_| bf16::from_f64(self.normal() * deviation))
            .collect()
    }
}

fn error_of<T: Copy, U: Copy>(
    got: &[T],
    want: &[U],
    wide: impl Fn(T) -> f64,
    wide_too: impl Fn(U) -> f64,
) -> f64 {
    if got.len() != want.len() {
        return f64::INFINITY;
    }
    let (mut apart, mut size) = (0.0, 0.0);
    for (got, want) in got.iter().zip(want) {
        apart += (wide(*got) - wide_too(*want)).powi(2);
        size += wide_too(*want).powi(2);
    }
    match (apart / size).sqrt() {
        error if error.is_finite() => error,
        _ if apart == 0.0 => 0.0,
        _ => f64::INFINITY,
    }
}

fn between(got: &[bf16], want: &[bf16]) -> f64 {
    error_of(got, want, bf16::to_f64, bf16::to_f64)
}

/// Runs all checks; `golden`: the folder of the reference cases.
///
/// # Errors
/// What the device refuses. A wrong number is a line, not an error.
pub fn run(
    device: &Device,
    scale: Scale,
    golden: Option<&Path>,
    say: &mut dyn FnMut(Line),
) -> Result<(), Error> {
    let mut line = |what: String, error, tolerance| {
        say(Line {
            what,
            error,
            tolerance,
        })
    };
    rows(device, scale, &mut line)?;
    attention(device, scale, &mut line)?;
    cores(device, scale, &mut line)?;
    read_outs(device, scale, &mut line)?;
    whole(device, scale, &mut line)?;
    if let Some(folder) = golden {
        golden_cases(device, folder, &mut line)?;
    }
    Ok(())
}

type Say<'a> = dyn FnMut(String, f64, f64) + 'a;

fn rows(device: &Device, scale: Scale, say: &mut Say<'_>) -> Result<(), Error> {
    let (rows, d, f, vocab) = if scale == Scale::Real {
        (67, 4096, 14_336, 32_000)
    } else {
        (3, 136, 48, 700)
    };
    let mut noise = Noise(1);
    let (mut h, y, gain) = (
        noise.bf16s(rows * d, 1.0),
        noise.bf16s(rows * d, 1.0),
        noise.bf16s(d, 1.0),
    );
    let (h_at, y_at, gain_at, x_at) = (
        device.upload(&h)?,
        device.upload(&y)?,
        device.upload(&gain)?,
        device.alloc::<bf16>(rows * d)?,
    );
    ops::rms_norm(
        device,
        x_at.view(),
        h_at.view(),
        Some(gain_at.view()),
        rows,
        d,
        1e-5,
    )?;
    say(
        format!("rms_norm [{rows}, {d}]"),
        between(&x_at.read()?, &twin::rms_norm(&h, Some(&gain), d, 1e-5)),
        ROUNDED,
    );
    ops::add_rms_norm(
        device,
        x_at.view(),
        h_at.view(),
        y_at.view(),
        gain_at.view(),
        rows,
        d,
        1e-5,
    )?;
    let want = twin::add_rms_norm(&mut h, &y, &gain, d, 1e-5);
    say(
        format!("add_rms_norm [{rows}, {d}]"),
        between(&x_at.read()?, &want),
        ROUNDED,
    );
    say(
        "the residual behind it".into(),
        between(&h_at.read()?, &h),
        0.0,
    );
    let gate_up = noise.bf16s(rows * 2 * f, 2.0);
    let (gate_up_at, m_at) = (device.upload(&gate_up)?, device.alloc(rows * f)?);
    ops::silu_mul(device, m_at.view(), gate_up_at.view(), rows, f)?;
    say(
        format!("silu_mul [{rows}, {f}]"),
        between(&m_at.read()?, &twin::silu_mul(&gate_up, f)),
        ROUNDED,
    );
    let index: Vec<u32> = (0..rows as u32)
        .map(|i| (i * 17) % (rows as u32 + 1))
        .collect();
    let index_at = device.upload(&index)?;
    ops::gather_rows(device, x_at.view(), y_at.view(), index_at.view(), rows, d)?;
    say(
        format!("gather_rows [{rows}, {d}]"),
        between(&x_at.read()?, &twin::gather_rows(&y, &index, d)),
        0.0,
    );
    let logits: Vec<f32> = (0..rows * vocab).map(|_| noise.normal() as f32).collect();
    let temperatures: Vec<f32> = (0..rows)
        .map(|i| if i % 3 == 0 { 0.0 } else { 0.7 })
        .collect();
    let (logits_at, temperatures_at, drawn) = (
        device.upload(&logits)?,
        device.upload(&temperatures)?,
        device.alloc(rows)?,
    );
    ops::sample(
        device,
        drawn.view(),
        logits_at.view(),
        temperatures_at.view(),
        index_at.view(),
        rows,
        vocab,
    )?;
    let want = twin::sample(&logits, &temperatures, &index, vocab);
    let wrong = drawn
        .read()?
        .iter()
        .zip(&want)
        .filter(|(got, want)| got != want)
        .count();
    // Two numbers that differ in the last bit of a logarithm may change places.
    say(
        format!("sample [{rows}, {vocab}], part of other tokens"),
        wrong as f64 / rows as f64,
        0.02,
    );
    Ok(())
}

fn attention(device: &Device, scale: Scale, say: &mut Say<'_>) -> Result<(), Error> {
    let heads = if scale == Scale::Real {
        Heads {
            queries: 32,
            keys: 8,
            dim: 128,
        }
    } else {
        Heads {
            queries: 4,
            keys: 2,
            dim: 16,
        }
    };
    let long = if scale == Scale::Real { 1000 } else { 90 };
    let block_size = 16;
    // (queries, position of the first) of each sequence; parts of keys.
    let cases: [(Vec<(usize, usize)>, usize); 3] = [
        (vec![(70, 0), (33, long / 2), (1, 3)], 1),
        ((0..5).map(|i| (1, i * long / 4)).collect(), 2),
        (vec![(1, long), (1, 0)], 32),
    ];
    let mut noise = Noise(2);
    for (spans, splits) in cases {
        let rows: usize = spans.iter().map(|(length, _)| length).sum();
        let max_blocks = spans
            .iter()
            .map(|(length, position)| (length + position).div_ceil(block_size))
            .max()
            .unwrap_or(1);
        let slots = spans.len() * max_blocks * block_size;
        let mut qkv = noise.bf16s(rows * heads.stride(), 1.0);
        let (mut k, mut v) = (
            noise.bf16s(slots * heads.keys * heads.dim, 1.0),
            noise.bf16s(slots * heads.keys * heads.dim, 1.0),
        );
        let positions = long + 128;
        let angle = |i: usize| {
            (i / (heads.dim / 2)) as f32
                * 1e6f32.powf(-((i % (heads.dim / 2)) as f32) * 2.0 / heads.dim as f32)
        };
        let (cos, sin): (Vec<f32>, Vec<f32>) = (0..positions * heads.dim / 2)
            .map(|i| (angle(i).cos(), angle(i).sin()))
            .unzip();
        let table: Vec<u32> = (0..(spans.len() * max_blocks) as u32).rev().collect();
        let attention = Attention {
            heads,
            block_size,
            window: 0,
            splits,
        };
        let tile = ops::queries_of_tile(heads, splits);
        let (mut start, mut tiles, mut row_positions, mut places) =
            (0, Vec::new(), Vec::new(), Vec::new());
        let mut sequences = Vec::new();
        for (i, (&(length, position), blocks)) in
            spans.iter().zip(table.chunks(max_blocks)).enumerate()
        {
            tiles.extend(
                (0..length)
                    .step_by(tile)
                    .flat_map(|first| [i as u32, first as u32]),
            );
            row_positions.extend((position..position + length).map(|at| at as u32));
            places.extend(
                (position..position + length).map(|at| {
                    blocks[at / block_size] * block_size as u32 + (at % block_size) as u32
                }),
            );
            sequences.push(twin::Sequence {
                start,
                length,
                position,
                blocks: blocks.to_vec(),
            });
            start += length;
        }
        let numbers = |of: &dyn Fn(&twin::Sequence) -> usize| {
            device.upload(&sequences.iter().map(|s| of(s) as u32).collect::<Vec<_>>())
        };
        let (starts, lengths, firsts) = (
            numbers(&|s| s.start)?,
            numbers(&|s| s.length)?,
            numbers(&|s| s.position)?,
        );
        let (tiles_at, table_at, positions_at, places_at) = (
            device.upload(&tiles)?,
            device.upload(&table)?,
            device.upload(&row_positions)?,
            device.upload(&places)?,
        );
        let (qkv_at, k_at, v_at, cos_at, sin_at) = (
            device.upload(&qkv)?,
            device.upload(&k)?,
            device.upload(&v)?,
            device.upload(&cos)?,
            device.upload(&sin)?,
        );
        let out = device.zeros::<bf16>(rows * heads.queries * heads.dim)?;
        let (sums, extents) = (
            device.alloc(rows * heads.queries * splits * heads.dim)?,
            device.alloc(rows * heads.queries * splits * 2)?,
        );
        let cache = Cache {
            k: k_at.view(),
            v: v_at.view(),
        };
        let rotation = Rotation {
            cos: cos_at.view(),
            sin: sin_at.view(),
        };
        ops::rope_append(
            device,
            qkv_at.view(),
            cache,
            rotation,
            positions_at.view(),
            places_at.view(),
            rows,
            heads,
        )?;
        twin::rope_append(
            &mut qkv,
            &mut k,
            &mut v,
            &cos,
            &sin,
            &row_positions,
            &places,
            heads,
        );
        say(
            format!("rope_append {spans:?}: rows"),
            between(&qkv_at.read()?, &qkv),
            1e-3,
        );
        say(
            "its keys and values".into(),
            between(&k_at.read()?, &k).max(between(&v_at.read()?, &v)),
            1e-3,
        );
        let ragged = Sequences {
            tiles: tiles_at.view(),
            starts: starts.view(),
            lengths: lengths.view(),
            positions: firsts.view(),
            blocks: table_at.view(),
            count: spans.len(),
            tile_count: tiles.len() / 2,
        };
        let parts = Parts {
            sums: sums.view(),
            extents: extents.view(),
        };
        ops::attend(
            device,
            out.view(),
            Some(parts),
            qkv_at.view(),
            cache,
            &ragged,
            &attention,
            rows,
        )?;
        let want = twin::attend(&qkv, &k, &v, &sequences, &attention);
        say(
            format!("attend {spans:?} in {splits}"),
            between(&out.read()?, &want),
            ATTENDED,
        );
    }
    Ok(())
}

fn cores(device: &Device, scale: Scale, say: &mut Say<'_>) -> Result<(), Error> {
    let (rows, slots, shapes) = if scale == Scale::Real {
        (64, 9, [(1024, 1024, 128), (256, 256, 0)])
    } else {
        (5, 3, [(64, 32, 8), (16, 24, 0)])
    };
    let mut noise = Noise(3);
    for (r1, r2, rank) in shapes {
        let size = SiteCores::size(r1, r2, rank);
        let (arena, a) = (noise.bf16s(slots * size, 0.1), noise.bf16s(rows * r1, 1.0));
        let chosen: Vec<i32> = (0..rows as i32)
            .map(|i| i * 5 % (slots as i32 + 1) - 1)
            .collect();
        let scales: Vec<f32> = (0..rows).map(|i| i as f32 / rows as f32).collect();
        let (arena_at, a_at, chosen_at, scales_at) = (
            device.upload(&arena)?,
            device.upload(&a)?,
            device.upload(&chosen)?,
            device.upload(&scales)?,
        );
        let (b, c) = (device.alloc(rows * rank.max(1))?, device.alloc(rows * r2)?);
        let cores = SiteCores {
            arena: arena_at.view(),
            slot_size: size,
            offset: 0,
            r1,
            r2,
            rank,
        };
        ops::apply_cores(
            device,
            c.view(),
            b.view(),
            a_at.view(),
            &cores,
            chosen_at.view(),
            scales_at.view(),
            rows,
        )?;
        let want = twin::apply_cores(
            &a,
            &arena,
            &chosen,
            &scales,
            twin::CoreShape {
                slot_size: size,
                offset: 0,
                r1,
                r2,
                rank,
            },
        );
        say(
            format!("apply_cores [{rows}, {r1}] of rank {rank}"),
            between(&c.read()?, &want),
            ROUNDED,
        );
    }
    Ok(())
}

fn read_outs(device: &Device, scale: Scale, say: &mut Say<'_>) -> Result<(), Error> {
    let (r, rank, tokens) = if scale == Scale::Real {
        (1024, 128, 3000)
    } else {
        (72, 16, 200)
    };
    let count = 2;
    let mut noise = Noise(4);
    let floats = |values: &[f64]| values.iter().map(|x| *x as f32).collect::<Vec<_>>();
    // K and V of which S = Kᵀ V, G = Kᵀ K; the products are the device's own, in f64, and are judged by residuals.
    let keys: Vec<f64> = (0..count * tokens * r).map(|_| noise.normal()).collect();
    let keys_at = device.upload(&keys)?;
    let (g64, g) = (
        device.alloc::<f64>(count * r * r)?,
        device.alloc::<f32>(count * r * r)?,
    );
    let gram = ops::Product {
        a_transposed: true,
        b_transposed: false,
        m: r,
        n: r,
        k: tokens,
        alpha: 1.0,
        beta: 0.0,
        batch: count,
    };
    let matrix = |view| ops::Matrix {
        view,
        ld: r,
        stride: tokens * r,
    };
    let square = |view| ops::Matrix {
        view,
        ld: r,
        stride: r * r,
    };
    ops::multiply(
        device,
        &gram,
        matrix(keys_at.view()),
        matrix(keys_at.view()),
        square(g64.view()),
    )?;
    let mut sums = floats(&g64.read()?);
    for at in 0..count * r * r {
        let (row, column) = (at / r % r, at % r);
        sums[at] = sums[at / (r * r) * r * r + row.min(column) * r + row.max(column)];
    }
    g.view().write(device, &sums)?;
    let slot =
        device.zeros::<bf16>(count * SiteCores::size(r, r, 0).max(SiteCores::size(r, r, rank)))?;
    let floors = device.zeros(count)?;
    let to = Emitted {
        slot: slot.view(),
        offset: 0,
        site_size: slot.view().len() / count,
    };

    // N = (G + lambda I)⁻¹ G is I - lambda (G + lambda I)⁻¹: what it is off from G N + lambda N = G.
    let lambda = 50.0;
    let ridge = ReadOut::new(
        device,
        Kind::Ridge,
        Sites {
            count,
            r1: r,
            r2: r,
            rank: 0,
        },
        0,
        &vec![lambda; count],
    )?;
    ridge.run(device, g.view(), Some(g.view()), floors.view(), &to)?;
    ridge.check()?;
    let (n, wide) = (ridge.solution(), device.alloc::<f64>(count * r * r)?);
    ops::widen(device, wide.view(), g.view())?;
    let residual = device.upload(&n.read(device)?)?;
    let product = ops::Product {
        a_transposed: false,
        k: r,
        beta: lambda,
        ..gram
    };
    ops::multiply(
        device,
        &product,
        square(wide.view()),
        square(n),
        square(residual.view()),
    )?;
    let error = error_of(&residual.read()?, &wide.read()?, |x| x, |x| x);
    say(format!("ridge [{r}, {r}]: residual"), error, 1e-10);

    // S = sum of rank-one products of falling strength: kept directions are known to 1e-4 after the iterations of serving.
    let strength: Vec<f64> = (0..r).map(|i| 0.9f64.powi(i.min(400) as i32)).collect();
    let orthogonal = householder(&mut noise, r);
    let s: Vec<f64> = (0..r * r)
        .map(|at| orthogonal(at / r, at % r) * strength[at % r])
        .collect();
    let all: Vec<f32> = (0..count).flat_map(|_| floats(&s)).collect();
    let s_at = device.upload(&all)?;
    let svd = ReadOut::new(
        device,
        Kind::Svd,
        Sites {
            count,
            r1: r,
            r2: r,
            rank,
        },
        ITERATIONS,
        &[],
    )?;
    svd.run(device, s_at.view(), None, floors.view(), &to)?;
    let kept = rank.min(strength.iter().filter(|s| **s > 1e-6).count());
    let found = svd.factors().values.read(device)?;
    let values: Vec<f64> = found[..kept].iter().map(|x| x.max(0.0).sqrt()).collect();
    say(
        format!("svd [{r}, {r}] of rank {rank}: {kept} singular values"),
        error_of(&values, &strength[..kept], |x| x, |x| x),
        1e-4,
    );
    // Uᵀ and V of the slot: Nᵀ N is the projection on the kept columns, as S is an orthogonal matrix with scaled columns.
    let core = slot.read()?;
    let (ut, v) = core[..SiteCores::size(r, r, rank)].split_at(rank * r);
    let first: Vec<f64> = (0..r)
        .map(|i| {
            (0..rank)
                .map(|j| ut[j * r + i].to_f64() * v[j].to_f64())
                .sum()
        })
        .collect();
    let want: Vec<f64> = (0..r).map(|i| orthogonal(i, 0)).collect();
    say(
        format!("svd [{r}, {r}]: the first column of N"),
        error_of(&first, &want, |x| x, |x| x),
        1e-2,
    );
    Ok(())
}

/// Elements of I - 2 w wᵀ / |w|² for a random w: orthogonal, and symmetric.
fn householder(noise: &mut Noise, n: usize) -> impl Fn(usize, usize) -> f64 + use<> {
    let w: Vec<f64> = (0..n).map(|_| noise.normal()).collect();
    let norm: f64 = w.iter().map(|x| x * x).sum();
    move |i, j| f64::from(u8::from(i == j)) - 2.0 * w[i] * w[j] / norm
}

/// A random model of two layers: chunks = at once, a graph of decode = a prompt, a row in a batch = the row alone.
fn whole(device: &Device, scale: Scale, say: &mut Say<'_>) -> Result<(), Error> {
    let (shape, generator) = match scale {
        Scale::Real => (
            Shape {
                layers: 2,
                positions: 4096,
                ..Shape::mistral_7b()
            },
            GeneratorShape::published_7b(),
        ),
        Scale::Tiny => (
            Shape::tiny(),
            GeneratorShape {
                r1: 16,
                r2: 8,
                rank: 8,
                ..GeneratorShape::published_7b()
            },
        ),
    };
    let (vocab, heads, length): (usize, Heads, usize) = (
        shape.vocab,
        shape.heads,
        if scale == Scale::Real { 300 } else { 75 },
    );
    let memory = Memory {
        cache_blocks: 128,
        block_size: 16,
        rows: 320,
        logits: 320,
        slots: 4,
        parts: 256,
    };
    let source = Source::Random(5);
    let multiprocessors = device.description()?.multiprocessors;
    let model = Model::load(
        device,
        shape,
        &source,
        Some((generator.clone(), &source)),
        memory,
    )?;
    let Some(slots) = model.slots() else {
        return Ok(());
    };
    // So that a delta is a good part of what its linear gives.
    let strength = if scale == Scale::Real { 0.1 } else { 0.5 };
    let mut noise = Noise(6);
    for slot in 0..slots.count() {
        slots
            .slot(slot)?
            .write(device, &noise.bf16s(slots.size(), strength))?;
    }
    let text: Vec<u32> = (0..length as u32)
        .map(|i| (i * i * 7 + i * 131) % vocab as u32)
        .collect();
    let blocks: Vec<u32> = (0..60).collect();
    let per = length.div_ceil(16);
    let row = |tokens, position, blocks, slot| Rows {
        tokens,
        position,
        blocks,
        slot,
        scale: 1.0,
        lookahead: None,
        logits: 1,
        temperature: 0.0,
        seed: 0,
    };
    let mut batch = Batch::new(
        device,
        Capacity {
            rows: 320,
            sequences: 4,
            blocks: per,
            splits: 1,
        },
        heads,
    )?;
    let mut last = |spans: &[Rows<'_>]| -> Result<Vec<f32>, Error> {
        batch.fill(device, spans, &model.limits())?;
        model.forward(&batch, &[])?;
        model.logits(&batch)
    };
    let own = |i: usize| &blocks[i * per..(i + 1) * per];
    let want = last(&[row(&text, 0, own(0), Some(1))])?;
    let bare = last(&[row(&text, 0, own(0), None)])?;
    let f = |x: f32| f64::from(x);
    let change = error_of(&want, &bare, f, f);
    say(
        format!("a core changes logits by {change:.2}"),
        if change > THROUGH { 0.0 } else { f64::INFINITY },
        0.0,
    );
    let cut = length / 3;
    last(&[row(&text[..cut], 0, own(1), Some(1))])?;
    let chunked = last(&[row(&text[cut..], cut, own(1), Some(1))])?;
    say(
        "a prompt in chunks".into(),
        error_of(&chunked, &want, f, f),
        THROUGH,
    );
    // The prompt but for its last token, then that in a graph, beside rows with other cores and none.
    last(&[row(&text[..length - 1], 0, own(0), Some(1))])?;
    let mut bucket = Bucket::capture(&model, 4, per, multiprocessors)?;
    let token = &text[length - 1..];
    bucket.batch.fill(
        device,
        &[
            row(&token[..1], 0, own(1), Some(2)),
            row(token, length - 1, own(0), Some(1)),
            row(&token[..1], 0, own(2), None),
        ],
        &model.limits(),
    )?;
    bucket.launch()?;
    let decoded = model.logits(&bucket.batch)?;
    say(
        "a decode graph".into(),
        error_of(&decoded[vocab..2 * vocab], &want, f, f),
        THROUGH,
    );
    Ok(())
}

/// The published cases: logits of the base, and behind a context that was told in windows.
fn golden_cases(device: &Device, folder: &Path, say: &mut Say<'_>) -> Result<(), Error> {
    let failed = |error: std::io::Error| Error::File {
        path: folder.to_owned(),
        detail: error.to_string(),
    };
    let mut cases = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        if path.join("generator/adapter_config.json").is_file() {
            cases.push(path);
        }
    }
    cases.sort();
    if cases.is_empty() {
        return Err(Error::File {
            path: folder.to_owned(),
            detail: "no golden case is here".into(),
        });
    }
    for case in cases {
        let name = case
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        let expected = Files::open(&case)?;
        let (shape, generator) = (
            Shape::from_folder(&case.join("base"))?,
            GeneratorShape::from_folder(&case.join("generator"))?,
        );
        let (base, trained) = (
            Source::Files(Files::open(&case.join("base"))?),
            Source::Files(Files::open(&case.join("generator"))?),
        );
        let memory = Memory {
            cache_blocks: 16,
            block_size: 16,
            rows: 80,
            logits: 80,
            slots: 1,
            parts: 1,
        };
        let heads = shape.heads;
        let layers = shape.layers;
        let model = Model::load(
            device,
            shape,
            &base,
            Some((generator.clone(), &trained)),
            memory,
        )?;
        let tokens = |name: &str| -> Result<Vec<u32>, Error> {
            Ok(expected.numbers(name)?.iter().map(|x| *x as u32).collect())
        };
        let (context, query) = (tokens("context")?, tokens("query")?);
        let mut batch = Batch::new(
            device,
            Capacity {
                rows: 80,
                sequences: 8,
                blocks: 2,
                splits: 1,
            },
            heads,
        )?;
        let blocks: Vec<u32> = (0..16).collect();
        let row = |tokens, blocks, slot, logits| Rows {
            tokens,
            position: 0,
            blocks,
            slot,
            scale: 1.0,
            lookahead: None,
            logits,
            temperature: 0.0,
            seed: 0,
        };
        let mut logits = |slot| -> Result<Vec<f32>, Error> {
            batch.fill(
                device,
                &[row(&query, &blocks[..2], slot, query.len())],
                &model.limits(),
            )?;
            model.forward(&batch, &[])?;
            model.logits(&batch)
        };
        let wide = |x: f32| f64::from(x);
        let bare = logits(None)?;
        say(
            format!("{name}: base"),
            error_of(&bare, &expected.numbers("base.logits")?, wide, |x| x),
            THROUGH,
        );

        // `parallel`: equalised windows of at most 16 tokens, all in one batch, into one session's sums.
        let windows = context.len().div_ceil(16);
        let size = context.len().div_ceil(windows);
        let spans: Vec<_> = context
            .chunks(size)
            .enumerate()
            .map(|(i, window)| row(window, &blocks[2 * i..2 * i + 2], None, 0))
            .collect();
        let sums = model.new_sums()?;
        let mut told = Batch::new(
            device,
            Capacity {
                rows: 80,
                sequences: 8,
                blocks: 2,
                splits: 1,
            },
            heads,
        )?;
        told.fill(device, &spans, &model.limits())?;
        model.forward(
            &told,
            &[Write {
                first: 0,
                len: context.len(),
                sums: &sums,
            }],
        )?;
        let sites = Sites {
            count: layers * generator.places.len(),
            r1: generator.r1,
            r2: generator.r2,
            rank: generator.rank,
        };
        let read_out = ReadOut::new(device, Kind::Svd, sites, 24, &[])?;
        let floors = device.zeros(sites.count)?;
        let Some(slots) = model.slots() else { continue };
        let to = Emitted {
            slot: slots.slot(0)?,
            offset: 0,
            site_size: generator.site_size(),
        };
        read_out.run(device, sums.s.view(), None, floors.view(), &to)?;
        read_out.check()?;
        let want = expected.numbers("parallel.exact.logits")?;
        let change = error_of(&bare, &want, wide, |x| x);
        say(
            format!("{name}: parallel (the core changes {change:.2})"),
            error_of(&logits(Some(0))?, &want, wide, |x| x),
            2.0 * THROUGH,
        );
    }
    Ok(())
}

impl Shape {
    /// A model of a few kilobytes, for the software device.
    pub(crate) fn tiny() -> Self {
        Self {
            layers: 2,
            hidden: 32,
            intermediate: 48,
            heads: Heads {
                queries: 4,
                keys: 2,
                dim: 16,
            },
            vocab: 96,
            positions: 256,
            frequencies: (0..8).map(|i| 1e4f64.powf(-f64::from(i) / 8.0)).collect(),
            ..Self::mistral_7b()
        }
    }
}
