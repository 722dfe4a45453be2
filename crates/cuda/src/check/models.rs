//! Whole models: a random one against itself, and the published cases.

use std::path::Path;

use super::{Noise, Say, Scale, THROUGH, TOLD, error_of};
use crate::{
    Batch, Bucket, Capacity, Device, Error, Files, GeneratorShape, Memory, Model, Rows, Shape,
    Source, Write,
    ops::{Draw, Emitted, Heads},
    read_out::{Kind, ReadOut, Sites},
};

/// A random model of two layers: chunks = at once, a graph of decode = a prompt, a row in a batch = the row alone.
pub(super) fn whole(device: &Device, scale: Scale, say: &mut Say<'_>) -> Result<(), Error> {
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
        draw: Some(Draw::greedy()),
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
pub(super) fn golden_cases(device: &Device, folder: &Path, say: &mut Say<'_>) -> Result<(), Error> {
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
            draw: Some(Draw::greedy()),
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
            count: generator.sites(layers),
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
            TOLD,
        );
    }
    Ok(())
}
