//! Kernels against their twins.

use half::{bf16, f16};

use super::{ATTENDED, Noise, ROUNDED, Say, Scale, between, error_of};
use crate::{
    Device, Error,
    ops::{
        self, Attention, Cache, Draw, Heads, MOST_ROWS, Parts, QUANTISED_BLOCK, Quantised,
        Rotation, Sequences, SiteCores,
    },
    twin,
};

pub(super) fn rows(device: &Device, scale: Scale, say: &mut Say<'_>) -> Result<(), Error> {
    let (rows, d, f, vocab) = if scale == Scale::Real {
        (67, 4096, 14_336, 32_000)
    } else {
        (3, 136, 48, 700)
    };
    let mut noise = Noise(1);
    let (h, y, gain) = (
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
    let wide = |values: &[bf16]| values.iter().map(|x| x.to_f32()).collect::<Vec<f32>>();
    let (mut residual, more) = (wide(&h), wide(&y));
    let (residual_at, more_at) = (device.upload(&residual)?, device.upload(&more)?);
    ops::add_rms_norm(
        device,
        x_at.view(),
        residual_at.view(),
        more_at.view(),
        gain_at.view(),
        rows,
        d,
        1e-5,
    )?;
    let want = twin::add_rms_norm(&mut residual, &more, &gain, d, 1e-5);
    say(
        format!("add_rms_norm [{rows}, {d}]"),
        between(&x_at.read()?, &want),
        ROUNDED,
    );
    say(
        "the residual behind it".into(),
        error_of(&residual_at.read()?, &residual, f64::from, f64::from),
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
    let wide_rows = noise.floats(rows * d);
    let wide_at = device.upload(&wide_rows)?;
    ops::narrow(device, x_at.view(), wide_at.view(), rows * d)?;
    say(
        format!("narrow [{rows}, {d}]"),
        between(&x_at.read()?, &twin::narrow(&wide_rows)),
        0.0,
    );
    let mut sum = noise.floats(rows * d);
    let sum_at = device.upload(&sum)?;
    ops::add_scaled(device, sum_at.view(), wide_at.view(), 0.3)?;
    twin::add_scaled(&mut sum, &wide_rows, 0.3);
    say(
        format!("add_scaled [{rows}, {d}]"),
        error_of(&sum_at.read()?, &sum, f64::from, f64::from),
        0.0,
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
    let logits = noise.floats(rows * vocab);
    // All filters alone and together, no two rows alike.
    let filters = [
        (0, 1.0, 0.0),
        (40, 1.0, 0.0),
        (0, 0.9, 0.0),
        (0, 1.0, 0.02),
        (200, 0.95, 0.01),
    ];
    let (mut draws, mut bits, mut seen) = (Vec::new(), Vec::new(), Vec::new());
    for row in 0..rows {
        let (top_k, top_p, min_p) = filters[row % filters.len()];
        let draw = Draw {
            temperature: if row % 7 == 6 { 0.0 } else { 0.8 },
            top_k,
            top_p,
            min_p,
            penalty: if row % 3 == 1 { 1.3 } else { 1.0 },
            point: noise.uniform(),
            logprob: true,
        };
        let tokens: Vec<u32> = (0..vocab as u32).filter(|token| token % 5 == 2).collect();
        let mut words = vec![0u32; ops::seen_words(vocab)];
        for token in &tokens {
            words[*token as usize / 32] |= 1 << (token % 32);
        }
        bits.extend(words);
        seen.push(if draw.penalty == 1.0 {
            Vec::new()
        } else {
            tokens
        });
        draws.push(draw);
    }
    let words: Vec<u32> = draws.iter().flat_map(Draw::words).collect();
    let (logits_at, draws_at, seen_at) = (
        device.upload(&logits)?,
        device.upload(&words)?,
        device.upload(&bits)?,
    );
    let (drawn, logprobs) = (device.alloc(rows)?, device.alloc(rows)?);
    ops::draw(
        device,
        drawn.view(),
        logprobs.view(),
        logits_at.view(),
        draws_at.view(),
        seen_at.view(),
        rows,
        vocab,
    )?;
    let (drawn, logprobs) = (drawn.read()?, logprobs.read()?);
    let (mut others, mut apart) = (0, 0.0f64);
    for (row, (draw, seen)) in draws.iter().zip(&seen).enumerate() {
        let (token, logprob) = twin::draw(&logits[row * vocab..(row + 1) * vocab], draw, seen);
        others += usize::from(token != drawn[row]);
        apart = apart.max(f64::from(logprob - logprobs[row]).abs());
    }
    say(
        format!("draw [{rows}, {vocab}]: other tokens"),
        others as f64,
        0.0,
    );
    say("their log-probabilities".into(), apart, 1e-5);
    Ok(())
}

pub(super) fn quantised(device: &Device, scale: Scale, say: &mut Say<'_>) -> Result<(), Error> {
    let (out, features) = if scale == Scale::Real {
        (14_336, 4096)
    } else {
        (40, 96)
    };
    let mut noise = Noise(4);
    for bits in [4, 8] {
        let blocks = out * features / QUANTISED_BLOCK;
        let codes: Vec<u32> = (0..blocks * bits)
            .map(|_| (noise.uniform() * 4_294_967_296.0) as u32)
            .collect();
        let half = |x: f64| u32::from(f16::from_f64(x).to_bits());
        let scales: Vec<u32> = (0..blocks)
            .map(|_| half(noise.normal() * 0.01) | half(noise.normal() * 0.05) << 16)
            .collect();
        let plain = twin::dequantise(&codes, &scales, bits);
        let (codes_at, scales_at) = (device.upload(&codes)?, device.upload(&scales)?);
        let w = Quantised {
            codes: codes_at.view(),
            scales: scales_at.view(),
            bits,
            out,
            features,
        };
        let rounded = device.alloc(out * features)?;
        ops::dequantise(device, rounded.view(), &w)?;
        say(
            format!("dequantise [{out}, {features}] of {bits} bits"),
            between(&rounded.read()?, &twin::narrow(&plain)),
            0.0,
        );
        let x = noise.bf16s(MOST_ROWS * features, 1.0);
        let (x_at, y) = (device.upload(&x)?, device.alloc::<f32>(MOST_ROWS * out)?);
        ops::multiply_quantised(device, y.view(), x_at.view(), &w, MOST_ROWS)?;
        let want = twin::multiply(&x, &plain, features);
        say(
            format!("multiply_quantised [{MOST_ROWS}, {features}] [{out}, {features}]"),
            error_of(&y.read()?, &want, f64::from, f64::from),
            1e-4,
        );
    }
    Ok(())
}

pub(super) fn attention(device: &Device, scale: Scale, say: &mut Say<'_>) -> Result<(), Error> {
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
        let qkv = noise.floats(rows * heads.stride());
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
        let q_at = device.zeros::<bf16>(rows * heads.queries * heads.dim)?;
        ops::rope_append(
            device,
            q_at.view(),
            qkv_at.view(),
            cache,
            rotation,
            positions_at.view(),
            places_at.view(),
            rows,
            heads,
        )?;
        let q = twin::rope_append(
            &qkv,
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
            between(&q_at.read()?, &q),
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
            q_at.view(),
            cache,
            &ragged,
            &attention,
            rows,
        )?;
        let want = twin::attend(&q, &k, &v, &sequences, &attention);
        say(
            format!("attend {spans:?} in {splits}"),
            between(&out.read()?, &want),
            ATTENDED,
        );
    }
    Ok(())
}

pub(super) fn cores(device: &Device, scale: Scale, say: &mut Say<'_>) -> Result<(), Error> {
    let (rows, slots, shapes) = if scale == Scale::Real {
        (64, 9, [(1024, 1024, 128), (256, 256, 0)])
    } else {
        (5, 3, [(64, 32, 8), (16, 24, 0)])
    };
    let mut noise = Noise(3);
    for (r1, r2, rank) in shapes {
        let size = SiteCores::size(r1, r2, rank);
        let (arena, a) = (noise.bf16s(slots * size, 0.1), noise.floats(rows * r1));
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
