//! Each kernel against its twin, at sizes of tests and at a row or two of the real shapes; each twin against the CPU's own operation.

use candle_core::{DType, Tensor};
use cuda::{
    Blocks, Device, Kernel,
    ops::{
        self, Attention, Cache, Draw, Heads, Parts, Product, Quantised, Rotation, Sequences,
        SiteCores, SiteGates,
    },
    twin,
};
use half::bf16;
use proptest::prelude::*;
use testkit::{Random, relative_error_of, values};

use crate::{error, noise, with_device};

/// A difference of the last bit of bf16, in the worst case of all elements.
const LAST_BIT: f64 = 4e-3;

/// The same numbers as [`noise`] gives, before they are rounded.
fn floats(random: &mut Random, len: usize, deviation: f64) -> Vec<f32> {
    (0..len)
        .map(|_| (random.normal() * deviation) as f32)
        .collect()
}

fn apart(got: &[f32], want: &[f32]) -> f64 {
    let wide = |values: &[f32]| values.iter().map(|x| f64::from(*x)).collect::<Vec<_>>();
    relative_error_of(&wide(got), &wide(want))
}

#[test]
fn every_kernel_takes_what_it_is_declared_to_take() {
    with_device(|device| {
        for kernel in Kernel::ALL {
            assert_eq!(
                device.declared_kinds(*kernel).unwrap(),
                kernel.kinds(),
                "{}",
                kernel.name()
            );
        }
    });
}

#[test]
fn norms_are_those_of_their_twins() {
    with_device(|device| {
        let mut random = Random::new(1);
        for (rows, d) in [(1, 8), (3, 576), (2, 4096), (5, 2056)] {
            let [x, gain] = [rows * d, d].map(|len| noise(&mut random, len, 2.0));
            let [x_at, gain_at] = [&x, &gain].map(|values| device.upload(values).unwrap());
            let mut numbers = || {
                (0..rows * d)
                    .map(|_| random.normal() as f32)
                    .collect::<Vec<_>>()
            };
            let (mut h, y) = (numbers(), numbers());
            let [h_at, y_at] = [&h, &y].map(|values| device.upload(values).unwrap());
            let out = device.alloc::<bf16>(rows * d).unwrap();
            ops::rms_norm(
                device,
                out.view(),
                x_at.view(),
                Some(gain_at.view()),
                rows,
                d,
                1e-5,
            )
            .unwrap();
            assert!(
                error(
                    &out.read().unwrap(),
                    &twin::rms_norm(&x, Some(&gain), d, 1e-5)
                ) < LAST_BIT
            );
            ops::rms_norm(device, out.view(), x_at.view(), None, rows, d, 1e-6).unwrap();
            assert!(error(&out.read().unwrap(), &twin::rms_norm(&x, None, d, 1e-6)) < LAST_BIT);
            ops::norm_residual(
                device,
                out.view(),
                h_at.view(),
                gain_at.view(),
                rows,
                d,
                1e-5,
            )
            .unwrap();
            let want = twin::norm_residual(&h, &gain, d, 1e-5);
            assert!(error(&out.read().unwrap(), &want) < LAST_BIT);
            ops::add_rms_norm(
                device,
                out.view(),
                h_at.view(),
                y_at.view(),
                gain_at.view(),
                rows,
                d,
                1e-5,
            )
            .unwrap();
            let want = twin::add_rms_norm(&mut h, &y, &gain, d, 1e-5);
            assert!(error(&out.read().unwrap(), &want) < LAST_BIT);
            assert_eq!(h_at.read().unwrap(), h);
        }
    });
}

#[test]
fn heads_are_normed_where_they_lie() {
    with_device(|device| {
        let (rows, dh, stride) = (3, 16, 7 * 16);
        let mut random = Random::new(2);
        let (mut x, gain) = (
            floats(&mut random, rows * stride, 1.0),
            noise(&mut random, dh, 1.0),
        );
        let (x_at, gain_at) = (device.upload(&x).unwrap(), device.upload(&gain).unwrap());
        ops::head_norm(
            device,
            x_at.view(),
            gain_at.view(),
            rows,
            2,
            4,
            dh,
            stride,
            1e-6,
        )
        .unwrap();
        twin::head_norm(&mut x, &gain, 2, 4, stride, 1e-6);
        assert!(apart(&x_at.read().unwrap(), &x) < 1e-6);
    });
}

#[test]
fn rows_are_gathered_gated_and_shifted_as_by_their_twins() {
    with_device(|device| {
        let mut random = Random::new(3);
        let (d, f) = (24, 14_336);
        let table = noise(&mut random, 7 * d, 1.0);
        let index = [6, 0, 7, 3, u32::MAX];
        let (table_at, index_at) = (
            device.upload(&table).unwrap(),
            device.upload(&index).unwrap(),
        );
        let out = device.alloc(index.len() * d).unwrap();
        ops::gather_rows(
            device,
            out.view(),
            table_at.view(),
            index_at.view(),
            index.len(),
            d,
        )
        .unwrap();
        let want = twin::gather_rows(&table, &index, d);
        assert_eq!(out.read().unwrap(), want);
        let residual = device.alloc(index.len() * d).unwrap();
        ops::gather_residual(
            device,
            residual.view(),
            table_at.view(),
            index_at.view(),
            index.len(),
            d,
        )
        .unwrap();
        let want: Vec<f32> = want.iter().map(|value| value.to_f32()).collect();
        assert_eq!(residual.read().unwrap(), want);

        let gate_up = noise(&mut random, 2 * 2 * f, 3.0);
        let (gate_up_at, m) = (
            device.upload(&gate_up).unwrap(),
            device.alloc(2 * f).unwrap(),
        );
        ops::silu_mul(device, m.view(), gate_up_at.view(), 2, f).unwrap();
        assert!(error(&m.read().unwrap(), &twin::silu_mul(&gate_up, f)) < LAST_BIT);

        let (k, v) = (
            floats(&mut random, 70 * 40, 1.0),
            floats(&mut random, 70 * 24, 2.0),
        );
        let (k_at, v_at) = (device.upload(&k).unwrap(), device.upload(&v).unwrap());
        let mass = device.upload(&[3.0]).unwrap();
        ops::add_mass(device, mass.view(), k_at.view(), v_at.view(), 70, 40, 24).unwrap();
        let want = 3.0 + twin::mass(&k, &v, 40, 24);
        assert!((mass.read().unwrap()[0] - want).abs() < 1e-5 * want);

        let (mut x, bias) = (
            floats(&mut random, 5 * 33, 1.0),
            noise(&mut random, 33, 1.0),
        );
        let (x_at, bias_at) = (device.upload(&x).unwrap(), device.upload(&bias).unwrap());
        ops::add_bias(device, x_at.view(), bias_at.view(), 5, 33).unwrap();
        twin::add_bias(&mut x, &bias);
        assert_eq!(x_at.read().unwrap(), x);

        // One more than a block takes.
        let wide = floats(&mut random, 2056, 1.0);
        let (wide_at, narrow) = (device.upload(&wide).unwrap(), device.alloc(2056).unwrap());
        ops::narrow(device, narrow.view(), wide_at.view(), 2056).unwrap();
        assert_eq!(narrow.read().unwrap(), twin::narrow(&wide));
        let mut sum = floats(&mut random, 2056, 1.0);
        let sum_at = device.upload(&sum).unwrap();
        ops::add_scaled(device, sum_at.view(), wide_at.view(), -0.3).unwrap();
        twin::add_scaled(&mut sum, &wide, -0.3);
        assert_eq!(sum_at.read().unwrap(), sum);
        let masses = device.upload(&[1.0, 2.0, 3.0]).unwrap();
        let more = device.upload(&[4.0, -8.0, 0.5]).unwrap();
        ops::add_scaled_masses(device, masses.view(), more.view(), 0.5).unwrap();
        assert_eq!(masses.read().unwrap(), [3.0, -2.0, 3.25]);
    });
}

fn tables(dh: usize, max: usize) -> (Vec<f32>, Vec<f32>) {
    let angles = (0..max * dh / 2)
        .map(|i| (i / (dh / 2)) as f32 / 10_000f32.powf((i % (dh / 2)) as f32 * 2.0 / dh as f32));
    angles.map(|angle| (angle.cos(), angle.sin())).unzip()
}

#[test]
fn heads_are_rotated_and_appended_to_the_cache() {
    with_device(|device| {
        let mut random = Random::new(4);
        for heads in [
            Heads {
                queries: 4,
                keys: 2,
                dim: 16,
            },
            Heads {
                queries: 32,
                keys: 8,
                dim: 128,
            },
        ] {
            let (slots, rows) = (12, 4);
            let (cos, sin) = tables(heads.dim, 40);
            let qkv = floats(&mut random, rows * heads.stride(), 1.0);
            let [mut k, mut v] =
                [(); 2].map(|()| noise(&mut random, slots * heads.keys * heads.dim, 1.0));
            let (positions, cache_slots) = ([0, 39, 7, 5], [3, 11, u32::MAX, 0]);
            let qkv_at = device.upload(&qkv).unwrap();
            let q_at = device.zeros(rows * heads.queries * heads.dim).unwrap();
            let [k_at, v_at] = [&k, &v].map(|values| device.upload(values).unwrap());
            let [cos_at, sin_at] = [&cos, &sin].map(|values| device.upload(values).unwrap());
            let [positions_at, slots_at] =
                [&positions, &cache_slots].map(|values| device.upload(values).unwrap());
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
                q_at.view(),
                qkv_at.view(),
                cache,
                rotation,
                positions_at.view(),
                slots_at.view(),
                rows,
                heads,
            )
            .unwrap();
            let q = twin::rope_append(
                &qkv,
                &mut k,
                &mut v,
                &cos,
                &sin,
                &positions,
                &cache_slots,
                heads,
            );
            for (got, want) in [(q_at, &q), (k_at, &k), (v_at, &v)] {
                assert!(error(&got.read().unwrap(), want) < 1e-4);
            }
        }
    });
}

/// Attention of ragged sequences on the device, with a cache of noise, and by the twin.
fn attend(
    seed: u64,
    heads: Heads,
    sequences: &[(usize, usize)],
    block_size: usize,
    window: usize,
    splits: usize,
) -> f64 {
    let mut random = Random::new(seed);
    let rows: usize = sequences
        .iter()
        .map(|(length, _)| (*length).max(usize::from(splits > 1)))
        .sum();
    let max_blocks = sequences
        .iter()
        .map(|(length, position)| (length + position).div_ceil(block_size))
        .max()
        .unwrap()
        .max(1);
    let blocks = sequences.len() * max_blocks;
    let attention = Attention {
        heads,
        block_size,
        window,
        splits,
    };
    let q = noise(&mut random, rows * heads.queries * heads.dim, 1.0);
    let [k, v] = [(); 2].map(|()| {
        noise(
            &mut random,
            blocks * block_size * heads.keys * heads.dim,
            1.0,
        )
    });
    // Blocks in an order that no sequence would have by chance.
    let table: Vec<u32> = (0..blocks).map(|i| (blocks - 1 - i) as u32).collect();
    let mut start = 0;
    let described: Vec<_> = sequences
        .iter()
        .zip(table.chunks(max_blocks))
        .map(|(&(length, position), blocks)| {
            let sequence = twin::Sequence {
                start,
                length,
                position,
                blocks: blocks.to_vec(),
            };
            start += length.max(usize::from(splits > 1));
            sequence
        })
        .collect();
    let want = twin::attend(&q, &k, &v, &described, &attention);

    let mut found = f64::INFINITY;
    with_device(|device| {
        let tile = ops::queries_of_tile(heads, splits);
        let tiles: Vec<u32> = described
            .iter()
            .enumerate()
            .flat_map(|(index, sequence)| {
                (0..sequence.length.div_ceil(tile).max(1))
                    .flat_map(move |i| [index as u32, (i * tile) as u32])
            })
            .collect();
        let numbers = |of: &dyn Fn(&twin::Sequence) -> usize| {
            let values: Vec<u32> = described
                .iter()
                .map(|sequence| of(sequence) as u32)
                .collect();
            device.upload(&values).unwrap()
        };
        let [starts, lengths, positions] = [
            numbers(&|s| s.start),
            numbers(&|s| s.length),
            numbers(&|s| s.position),
        ];
        let (tiles_at, table_at) = (
            device.upload(&tiles).unwrap(),
            device.upload(&table).unwrap(),
        );
        let [q_at, k_at, v_at] = [&q, &k, &v].map(|values| device.upload(values).unwrap());
        let out = device
            .zeros::<bf16>(rows * heads.queries * heads.dim)
            .unwrap();
        let sums = device
            .alloc(rows * heads.queries * splits * heads.dim)
            .unwrap();
        let extents = device.alloc(rows * heads.queries * splits * 2).unwrap();
        let on_device = Sequences {
            tiles: tiles_at.view(),
            starts: starts.view(),
            lengths: lengths.view(),
            positions: positions.view(),
            blocks: table_at.view(),
            count: sequences.len(),
            tile_count: tiles.len() / 2,
        };
        let cache = Cache {
            k: k_at.view(),
            v: v_at.view(),
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
            &on_device,
            &attention,
            rows,
        )
        .unwrap();
        found = error(&out.read().unwrap(), &want);
    });
    found
}

#[test]
fn chunks_of_prefill_attend_to_what_they_see() {
    let tiny = Heads {
        queries: 4,
        keys: 2,
        dim: 16,
    };
    for (seed, sequences) in [
        (5, vec![(1, 0)]),
        (6, vec![(40, 0), (3, 70), (33, 31)]),
        (7, vec![(65, 1), (2, 0)]),
    ] {
        let found = attend(seed, tiny, &sequences, 16, 0, 1);
        assert!(found < 6e-3, "{sequences:?}: {found}");
    }
    // Three query heads a KV head (SmolLM2), Mistral's heads, and a window that hides whole tiles of keys.
    assert!(
        attend(
            8,
            Heads {
                queries: 9,
                keys: 3,
                dim: 64
            },
            &[(23, 10)],
            16,
            0,
            1
        ) < 6e-3
    );
    assert!(
        attend(
            9,
            Heads {
                queries: 8,
                keys: 2,
                dim: 128
            },
            &[(17, 50)],
            32,
            0,
            1
        ) < 6e-3
    );
    assert!(attend(10, tiny, &[(40, 100)], 8, 37, 1) < 6e-3);
}

#[test]
fn decode_attends_the_same_however_its_keys_are_split() {
    for splits in [2, 5] {
        for (seed, heads) in [
            (
                11,
                Heads {
                    queries: 4,
                    keys: 2,
                    dim: 16,
                },
            ),
            (
                12,
                Heads {
                    queries: 8,
                    keys: 2,
                    dim: 128,
                },
            ),
            (
                13,
                Heads {
                    queries: 9,
                    keys: 3,
                    dim: 64,
                },
            ),
        ] {
            // Of no queries: a row that pads its bucket. Of position 0: splits that see no key.
            let found = attend(
                seed,
                heads,
                &[(1, 0), (1, 99), (0, 0), (1, 31)],
                16,
                0,
                splits,
            );
            assert!(found < 6e-3, "{heads:?} in {splits}: {found}");
        }
    }
    assert!(
        attend(
            14,
            Heads {
                queries: 4,
                keys: 2,
                dim: 16
            },
            &[(1, 150)],
            16,
            64,
            3
        ) < 6e-3
    );
}

#[test]
fn each_row_gets_the_core_of_its_slot() {
    with_device(|device| {
        let mut random = Random::new(15);
        for (r1, r2, rank) in [(16, 24, 8), (1024, 1024, 128), (64, 32, 0), (8, 8, 136)] {
            let (slots, rows, offset) = (3, 5, 32);
            let size = SiteCores::size(r1, r2, rank) + offset + 8;
            let (arena, a) = (
                noise(&mut random, slots * size, 0.2),
                floats(&mut random, rows * r1, 1.0),
            );
            let (chosen, scales) = ([2, -1, 0, 2, 1], [1.0, 1.0, 0.5, 2.0, 0.0]);
            let (arena_at, a_at) = (device.upload(&arena).unwrap(), device.upload(&a).unwrap());
            let (chosen_at, scales_at) = (
                device.upload(&chosen).unwrap(),
                device.upload(&scales).unwrap(),
            );
            let (b, c) = (
                device.alloc(rows * rank.max(1)).unwrap(),
                device.alloc(rows * r2).unwrap(),
            );
            let cores = SiteCores {
                arena: arena_at.view(),
                slot_size: size,
                offset,
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
            )
            .unwrap();
            let shape = twin::CoreShape {
                slot_size: size,
                offset,
                r1,
                r2,
                rank,
            };
            let want = twin::apply_cores(&a, &arena, &chosen, &scales, shape);
            let got = c.read().unwrap();
            assert!(error(&got, &want) < LAST_BIT, "{r1} {r2} {rank}");
            assert!(
                got[r2..2 * r2].iter().all(|x| *x == bf16::ZERO),
                "a row without a core"
            );
        }
    });
}

/// Tokens and log-probabilities that the device draws of logits [T, V], `seen` of each row.
fn drawn(
    device: &Device,
    logits: &[f32],
    draws: &[Draw],
    seen: &[Vec<u32>],
) -> (Vec<u32>, Vec<f32>) {
    let (rows, vocab) = (draws.len(), logits.len() / draws.len());
    let mut bits = vec![0u32; rows * ops::seen_words(vocab)];
    for (row, seen) in seen.iter().enumerate() {
        for token in seen {
            bits[row * ops::seen_words(vocab) + *token as usize / 32] |= 1 << (token % 32);
        }
    }
    let words: Vec<u32> = draws.iter().flat_map(Draw::words).collect();
    let (out, logprobs) = (device.zeros(rows).unwrap(), device.zeros(rows).unwrap());
    ops::draw(
        device,
        out.view(),
        logprobs.view(),
        device.upload(logits).unwrap().view(),
        device.upload(&words).unwrap().view(),
        device.upload(&bits).unwrap().view(),
        rows,
        vocab,
    )
    .unwrap();
    (out.read().unwrap(), logprobs.read().unwrap())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]
    #[test]
    fn tokens_are_drawn_as_by_the_twin(
        seed in any::<u64>(),
        vocab in 1usize..400,
        temperature in prop_oneof![Just(0f32), Just(1e-3), 0.3f32..3.0],
        top_k in prop_oneof![Just(0u32), 1u32..60, Just(1000)],
        top_p in prop_oneof![Just(1f32), 0.01f32..1.0],
        min_p in prop_oneof![Just(0f32), 0f32..0.9],
        penalty in prop_oneof![Just(1f32), 0.5f32..2.0],
        // Few values, so that many are equal; and what is no number, or beyond all.
        levels in prop_oneof![Just(0u32), 1u32..6],
        odd in any::<bool>(),
    ) {
        let mut random = Random::new(seed);
        let mut logits = floats(&mut random, 3 * vocab, 2.0);
        if levels > 0 {
            logits.iter_mut().for_each(|x| *x = (*x).round().clamp(-(levels as f32), levels as f32));
        }
        if odd {
            for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                logits[random.below(3 * vocab)] = value;
            }
        }
        let seen: Vec<Vec<u32>> = (0..3)
            .map(|_| (0..vocab as u32).filter(|_| random.below(4) == 0).collect())
            .collect();
        let draws = [0.0, 0.37, 0.999_999].map(|point| Draw {
            temperature, top_k, top_p, min_p, penalty, point, logprob: true,
        });
        with_device(|device| {
            let (tokens, logprobs) = drawn(device, &logits, &draws, &seen);
            for (row, draw) in draws.iter().enumerate() {
                let own = &logits[row * vocab..(row + 1) * vocab];
                let (token, logprob) = twin::draw(own, draw, &seen[row]);
                assert_eq!(tokens[row], token, "row {row}");
                assert!((logprobs[row] - logprob).abs() <= 1e-5 * logprob.abs().max(1.0));
            }
        });
    }
}

#[test]
fn gates_close_rows_as_by_their_twin() {
    with_device(|device| {
        let mut random = Random::new(21);
        let (rows, r1, r2, core) = (4, 40, 24, 32);
        let slot_size = core + SiteGates::size(r1);
        let mut arena = vec![bf16::ZERO; 3 * slot_size];
        // The last slot has no gate.
        let gates: Vec<(Vec<bf16>, f32)> = [0.7f32, 0.3, 0.0]
            .into_iter()
            .map(|rest| (noise(&mut random, r1 * r1, 0.05), rest))
            .collect();
        for (slot, (known, rest)) in arena.chunks_exact_mut(slot_size).zip(&gates) {
            slot[core..core + r1 * r1].copy_from_slice(known);
            let bits = rest.to_bits();
            slot[core + r1 * r1] = bf16::from_bits(bits as u16);
            slot[core + r1 * r1 + 1] = bf16::from_bits((bits >> 16) as u16);
        }
        let slots = [1, -1, 2, 0];
        let a = floats(&mut random, rows * r1, 1.0);
        let mut c = noise(&mut random, rows * r2, 1.0);
        let before = c.clone();
        let mut doubts = vec![0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.3, 2.0];
        let [arena_at, c_at] = [&arena, &c].map(|values| device.upload(values).unwrap());
        let [a_at, doubts_at] = [&a, &doubts].map(|values| device.upload(values).unwrap());
        let slots_at = device.upload(&slots).unwrap();
        let of_site = SiteGates {
            arena: arena_at.view(),
            slot_size,
            offset: core,
            r1,
            r2,
            threshold: 0.6,
            width: 0.25,
        };
        for _ in 0..2 {
            ops::close_gates(
                device,
                c_at.view(),
                doubts_at.view(),
                a_at.view(),
                &of_site,
                slots_at.view(),
                rows,
            )
            .unwrap();
            twin::close_gates(&mut c, &mut doubts, &a, &gates, &slots, (0.6, 0.25));
        }
        let got = c_at.read().unwrap();
        assert!(error(&got, &c) < LAST_BIT);
        assert!(apart(&doubts_at.read().unwrap(), &doubts) < 1e-5);
        assert_eq!(got[r2..3 * r2], before[r2..3 * r2], "no core, and no gate");
        assert!(got[..r2] != before[..r2] && got[3 * r2..] != before[3 * r2..]);
    });
}

#[test]
fn draws_come_from_the_softmax_and_rows_that_want_none_are_left_alone() {
    with_device(|device| {
        // Two tokens of odds 3 : 1, at sixteen points.
        let draws: Vec<Draw> = (0..16)
            .map(|i| Draw {
                temperature: 1.0,
                point: (f64::from(i) + 0.5) / 16.0,
                ..Draw::greedy()
            })
            .collect();
        let logits = [3f32.ln(), 0.0].repeat(16);
        let (tokens, _) = drawn(device, &logits, &draws, &vec![Vec::new(); 16]);
        assert_eq!(tokens, [[0; 12].as_slice(), &[1; 4]].concat());

        let (out, logprobs) = (
            device.upload(&[7u32]).unwrap(),
            device.upload(&[3f32]).unwrap(),
        );
        let nothing = device.zeros::<u32>(Draw::greedy().words().len()).unwrap();
        ops::draw(
            device,
            out.view(),
            logprobs.view(),
            device.upload(&[0f32, 1.0]).unwrap().view(),
            nothing.view(),
            device.zeros(1).unwrap().view(),
            1,
            2,
        )
        .unwrap();
        assert_eq!(
            (out.read().unwrap()[0], logprobs.read().unwrap()[0]),
            (7, 3.0)
        );
    });
}

#[test]
fn a_product_is_the_cpus() {
    with_device(|device| {
        let mut random = Random::new(17);
        let (m, n, k) = (5, 7, 24);
        let (x, w) = (
            noise(&mut random, m * k, 1.0),
            noise(&mut random, n * k, 1.0),
        );
        let (x_at, w_at, y) = (
            device.upload(&x).unwrap(),
            device.upload(&w).unwrap(),
            device.alloc::<f32>(m * n).unwrap(),
        );
        let matrix = ops::Matrix::<bf16>::dense;
        let wide_matrix = ops::Matrix::<f32>::dense;
        let product = Product::linear(m, n, k);
        ops::multiply(
            device,
            &product,
            matrix(x_at.view(), k),
            matrix(w_at.view(), k),
            wide_matrix(y.view(), n),
        )
        .unwrap();
        // S += Kᵀ V: the transposed one is A.
        let s = device.upload(&vec![1.0f32; k * k]).unwrap();
        let outer = Product {
            a_transposed: true,
            b_transposed: false,
            m: k,
            n: k,
            k: m,
            alpha: 1.0,
            beta: 1.0,
            batch: 1,
        };
        ops::multiply(
            device,
            &outer,
            matrix(x_at.view(), k),
            matrix(x_at.view(), k),
            wide_matrix(s.view(), k),
        )
        .unwrap();
        let tensor = |values: &[bf16], shape: (usize, usize)| {
            Tensor::from_slice(values, shape, &candle_core::Device::Cpu)
                .unwrap()
                .to_dtype(DType::F32)
                .unwrap()
        };
        let (x, w) = (tensor(&x, (m, k)), tensor(&w, (n, k)));
        let want = x.matmul(&w.t().unwrap()).unwrap();
        let wide = |values: Vec<f32>| values.into_iter().map(f64::from).collect::<Vec<_>>();
        assert!(relative_error_of(&wide(y.read().unwrap()), &values(&want)) < 1e-5);
        let want = (x.t().unwrap().matmul(&x).unwrap() + 1.0).unwrap();
        assert!(relative_error_of(&wide(s.read().unwrap()), &values(&want)) < 1e-5);
        // What does not fit is refused, not computed.
        let short = Product::linear(m + 1, n, k);
        assert!(
            ops::multiply(
                device,
                &short,
                matrix(x_at.view(), k),
                matrix(w_at.view(), k),
                wide_matrix(y.view(), n)
            )
            .is_err()
        );
    });
}

#[test]
fn ggufs_blocks_are_the_weights_that_the_cpu_reads_in_them() {
    let mut random = Random::new(20);
    for (name, format) in [
        ("Q4_0", kernels::WeightFormat::Q4_0),
        ("Q4_1", kernels::WeightFormat::Q4_1),
        ("Q8_0", kernels::WeightFormat::Q8_0),
    ] {
        let (out, features) = (6, 96);
        let size = format.block_bytes();
        let mut bytes: Vec<u8> = (0..out * features / 32 * size)
            .map(|_| random.next_u64() as u8)
            .collect();
        for block in bytes.chunks_exact_mut(size) {
            // The upper byte of a half of a size that weights have.
            block[1] = 0x20 | block[1] & 0x83;
            block[3] = if name == "Q4_1" {
                0x20 | block[3] & 0x83
            } else {
                block[3]
            };
        }
        let want = kernels::Linear::new(format, &bytes, out, features).unwrap();
        let want: Vec<f32> = want
            .dequantize()
            .unwrap()
            .flatten_all()
            .unwrap()
            .to_vec1()
            .unwrap();
        let blocks = Blocks::from_gguf(name, &bytes).unwrap();
        let got = twin::dequantise(&blocks.codes, &blocks.scales, blocks.bits);
        assert_eq!(got, want, "{name}");
    }
    assert!(Blocks::from_gguf("Q4_K", &[0; 144]).is_none());
}

#[test]
fn products_with_quantised_weights_are_those_of_their_twins() {
    with_device(|device| {
        let mut random = Random::new(19);
        for (bits, out, features) in [(4, 5, 32), (8, 33, 96), (4, 9, 2080), (8, 8, 1024)] {
            let blocks = out * features / 32;
            let codes: Vec<u32> = (0..blocks * bits)
                .map(|_| random.next_u64() as u32)
                .collect();
            let half = |x: f64| u32::from(half::f16::from_f64(x).to_bits());
            let scales: Vec<u32> = (0..blocks)
                .map(|_| half(random.normal() * 0.02) | half(random.normal() * 0.1) << 16)
                .collect();
            let (codes_at, scales_at) = (
                device.upload(&codes).unwrap(),
                device.upload(&scales).unwrap(),
            );
            let w = Quantised {
                codes: codes_at.view(),
                scales: scales_at.view(),
                bits,
                out,
                features,
            };
            let plain = twin::dequantise(&codes, &scales, bits);
            let rounded = device.alloc(out * features).unwrap();
            ops::dequantise(device, rounded.view(), &w).unwrap();
            assert_eq!(rounded.read().unwrap(), twin::narrow(&plain));
            for rows in [1, 3, 8] {
                let x = noise(&mut random, rows * features, 1.0);
                let x_at = device.upload(&x).unwrap();
                let want = twin::multiply(&x, &plain, features);
                let y = device.alloc::<f32>(rows * out).unwrap();
                ops::multiply_quantised(device, y.view(), x_at.view(), &w, rows).unwrap();
                assert!(apart(&y.read().unwrap(), &want) < 1e-5, "{bits} {rows}");
                let y = device.alloc::<bf16>(rows * out).unwrap();
                ops::multiply_quantised(device, y.view(), x_at.view(), &w, rows).unwrap();
                let want = twin::narrow(&want);
                assert!(error(&y.read().unwrap(), &want) < LAST_BIT, "{bits} {rows}");
            }
            let (x, y) = (
                device.zeros(9 * features).unwrap(),
                device.zeros::<f32>(9 * out).unwrap(),
            );
            assert!(ops::multiply_quantised(device, y.view(), x.view(), &w, 9).is_err());
        }
    });
}

#[test]
fn the_twins_are_the_cpus_own_operations() {
    let mut random = Random::new(18);
    let cpu = |values: &[bf16], shape: &[usize]| {
        Tensor::from_slice(values, shape, &candle_core::Device::Cpu)
            .unwrap()
            .to_dtype(DType::F32)
            .unwrap()
    };
    let rounded = |got: &[bf16], want: &Tensor| {
        let got: Vec<f64> = got.iter().map(|x| x.to_f64()).collect();
        let found = relative_error_of(&got, &values(want));
        assert!(found < LAST_BIT, "{found}");
    };
    let (rows, d) = (3, 64);
    let (x, gain) = (
        noise(&mut random, rows * d, 1.0),
        noise(&mut random, d, 1.0),
    );
    let want = kernels::rms_norm(&cpu(&x, &[rows, d]), Some(&cpu(&gain, &[d])), 1e-5).unwrap();
    rounded(&twin::rms_norm(&x, Some(&gain), d, 1e-5), &want);
    let halves: Vec<_> = x.chunks_exact(d).map(|row| row.split_at(d / 2)).collect();
    let [gate, up] = [
        halves
            .iter()
            .flat_map(|(g, _)| g.to_vec())
            .collect::<Vec<_>>(),
        halves.iter().flat_map(|(_, u)| u.to_vec()).collect(),
    ];
    let want = kernels::silu_mul(&cpu(&gate, &[rows, d / 2]), &cpu(&up, &[rows, d / 2])).unwrap();
    rounded(&twin::silu_mul(&x, d / 2), &want);

    // Rotation, cache and attention of one sequence of six tokens behind four others.
    let heads = Heads {
        queries: 4,
        keys: 2,
        dim: 16,
    };
    let (block_size, rows, position) = (4, 6, 4);
    let (cos, sin) = tables(heads.dim, 16);
    let qkv = noise(&mut random, rows * heads.stride(), 1.0);
    let [mut k, mut v] =
        [(); 2].map(|()| noise(&mut random, 4 * block_size * heads.keys * heads.dim, 1.0));
    let (positions, blocks) = ((4..10).collect::<Vec<u32>>(), vec![2, 0, 3]);
    let slots: Vec<u32> = positions
        .iter()
        .map(|p| blocks[*p as usize / block_size] * block_size as u32 + p % block_size as u32)
        .collect();
    let parts = |from: usize, count: usize| {
        let values: Vec<_> = qkv
            .chunks_exact(heads.stride())
            .flat_map(|row| row[from * 16..(from + count) * 16].to_vec())
            .collect();
        cpu(&values, &[rows, count, 16])
    };
    let (q, new_k, new_v) = (parts(0, 4), parts(4, 2), parts(6, 2));
    let half =
        |values: &[f32]| Tensor::from_slice(values, (16, 8), &candle_core::Device::Cpu).unwrap();
    let turn = |x: &Tensor| kernels::rope(x, &half(&cos), &half(&sin), &positions).unwrap();
    let shape = [4, block_size, heads.keys, heads.dim];
    let (k_cache, v_cache) = (
        cpu(&k, &shape).copy().unwrap(),
        cpu(&v, &shape).copy().unwrap(),
    );
    kernels::kv_append(&k_cache, &turn(&new_k), &slots).unwrap();
    kernels::kv_append(&v_cache, &new_v, &slots).unwrap();
    let row = kernels::AttentionRow {
        start: 0,
        len: rows,
        position,
        blocks: &blocks,
    };
    let want =
        kernels::paged_attention(&turn(&q), &k_cache, &v_cache, &[row], 0.25, Some(7)).unwrap();
    let wide = |values: &[bf16]| values.iter().map(|x| x.to_f32()).collect::<Vec<_>>();
    let qkv = wide(&qkv);
    let q = twin::rope_append(&qkv, &mut k, &mut v, &cos, &sin, &positions, &slots, heads);
    rounded(&k, &k_cache);
    let sequence = twin::Sequence {
        start: 0,
        length: rows,
        position,
        blocks: blocks.clone(),
    };
    let attention = Attention {
        heads,
        block_size,
        window: 7,
        splits: 1,
    };
    rounded(&twin::attend(&q, &k, &v, &[sequence], &attention), &want);

    // A core, low-rank.
    let (r1, r2, rank) = (16, 24, 8);
    let (a, ut, v) = (
        noise(&mut random, 2 * r1, 1.0),
        noise(&mut random, rank * r1, 1.0),
        noise(&mut random, r2 * rank, 1.0),
    );
    let (u, v_at) = (
        cpu(&ut, &[rank, r1]).t().unwrap().contiguous().unwrap(),
        cpu(&v, &[r2, rank]),
    );
    let core = kernels::CoreRows {
        start: 0,
        len: 1,
        core: kernels::CoreView::LowRank { u: &u, v: &v_at },
        scale: 0.5,
    };
    let want = kernels::apply_cores(&cpu(&a, &[2, r1]), &[core], r2).unwrap();
    let arena: Vec<_> = ut.iter().chain(&v).copied().collect();
    let shape = twin::CoreShape {
        slot_size: arena.len(),
        offset: 0,
        r1,
        r2,
        rank,
    };
    rounded(
        &twin::apply_cores(&wide(&a), &arena, &[0, -1], &[0.5, 1.0], shape),
        &want,
    );
}
