//! What rows write and what they add: formulas, and the laws of cutting and batching.

use candle_core::{DType, Device};
use proptest::prelude::*;
use testkit::{Form, GeneratorSpec, matmul, relative_error_of, transpose, values};

use super::*;
use crate::{
    Generator, Write,
    testing::{Batch, all, associative, batch, bits, published, state, tiny, window_bits},
};

/// Writes one window of a batch's rows in calls of the given lengths. `known`: each call knows its successor.
fn written(
    generator: &Generator,
    index: usize,
    rows: &Batch,
    calls: &[usize],
    known: bool,
) -> Window {
    let mut window = generator.new_window().unwrap();
    let mut position = 0;
    for len in calls {
        let cut = |t: &Tensor| t.narrow(0, position, *len).unwrap();
        let end = position + len;
        let lookahead =
            (known && end < rows.u.dim(0).unwrap()).then(|| rows.u.narrow(0, end, 1).unwrap());
        let row = WriteRows {
            start: 0,
            len: *len,
            position,
            lookahead,
            window: &mut window,
        };
        generator.sites()[index]
            .write(
                index,
                &cut(&rows.x),
                &cut(&rows.h),
                &cut(&rows.u),
                &mut [row],
            )
            .unwrap();
        position = end;
    }
    window
}

fn lengths(cuts: &[usize], tokens: usize) -> Vec<usize> {
    let mut ends: Vec<_> = cuts
        .iter()
        .map(|cut| cut % (tokens + 1))
        .chain([tokens])
        .collect();
    ends.sort_unstable();
    let mut start = 0;
    ends.into_iter()
        .map(|end| end - std::mem::replace(&mut start, end))
        .collect()
}

/// z / sqrt(mean z^2 + 1e-6), row by row.
fn rms(z: &[f64], width: usize) -> Vec<f64> {
    let norm = |row: &[f64]| (row.iter().map(|z| z * z).sum::<f64>() / width as f64 + 1e-6).sqrt();
    z.chunks(width)
        .flat_map(|row| {
            let norm = norm(row);
            row.iter().map(move |z| z / norm)
        })
        .collect()
}

/// a [T, in] Wᵀ, in f64.
fn apply(linear: &Linear, a: &[f64]) -> Vec<f64> {
    let (outputs, inputs) = (linear.out_features(), linear.in_features());
    let w = transpose(&values(&linear.dequantize().unwrap()), outputs, inputs);
    matmul(a, &w, a.len() / inputs, inputs, outputs)
}

#[test]
fn sums_are_those_of_the_formulas() {
    const T: usize = 9;
    for generator in [published("svd"), associative()] {
        let site = &generator.sites()[1];
        let (r1, r2, _) = site.ranks();
        let rows = batch(&generator, 1, 7, T);
        let hidden = rows.h.dim(1).unwrap();
        let gain = values(&site.gain);
        let n: Vec<f64> = rms(&values(&rows.h), hidden)
            .iter()
            .enumerate()
            .map(|(i, z)| z * gain[i % hidden])
            .collect();
        let (k, v, from) = match &site.writer {
            Writer::Published { a2, a3 } => (apply(a2, &n), apply(a3, &n), 0),
            Writer::Associative { a3, a3n } => {
                let (own, brought) = (apply(a3n, &n), apply(a3, &values(&rows.u)));
                // The first token is skipped and the last has no successor.
                let v = (0..T - 1).flat_map(|t| {
                    (0..r2)
                        .map(|j| own[t * r2 + j] + brought[(t + 1) * r2 + j])
                        .collect::<Vec<_>>()
                });
                (apply(&site.a1, &values(&rows.x)), v.collect(), 1)
            }
        };
        let to = v.len() / r2;
        let (k, v) = (&k[from * r1..to * r1], &v[from * r2..]);
        let kt = transpose(k, to - from, r1);
        let window = written(&generator, 1, &rows, &[T], false);
        let (s, g) = window.sums(1).unwrap();
        let error = relative_error_of(&values(s), &matmul(&kt, v, r1, to - from, r2));
        assert!(error < 1e-6, "S of {:?}: {error}", generator.config().write);
        if let Some(g) = g {
            let error = relative_error_of(&values(g), &matmul(&kt, k, r1, to - from, r1));
            assert!(error < 1e-6, "G: {error}");
        }
        assert_eq!(g.is_some(), generator.config().write == Write::Associative);
    }
}

#[test]
fn a_window_of_two_tokens_of_the_associative_form_writes_nothing() {
    let generator = associative();
    let window = written(&generator, 0, &batch(&generator, 0, 3, 2), &[2], false);
    let mut state = generator.new_state().unwrap();
    state.add_window(&window, 1.0).unwrap();
    assert!(state.is_empty() && generator.read_out(&state).unwrap().is_zero());
    let window = written(&generator, 0, &batch(&generator, 0, 3, 3), &[3], false);
    state.add_window(&window, 1.0).unwrap();
    assert!(!state.is_empty());
}

#[test]
fn windows_in_one_batch_write_what_each_writes_alone() {
    for generator in [published("svd"), associative()] {
        let rows = batch(&generator, 0, 11, 12);
        let cut = |start, len| Batch {
            x: rows.x.narrow(0, start, len).unwrap(),
            h: rows.h.narrow(0, start, len).unwrap(),
            u: rows.u.narrow(0, start, len).unwrap(),
        };
        let (mut a, mut b) = (
            generator.new_window().unwrap(),
            generator.new_window().unwrap(),
        );
        let next = rows.u.narrow(0, 7, 1).unwrap();
        let both = &mut [
            WriteRows {
                start: 7,
                len: 4,
                position: 0,
                lookahead: None,
                window: &mut b,
            },
            WriteRows {
                start: 2,
                len: 5,
                position: 0,
                lookahead: Some(next.clone()),
                window: &mut a,
            },
        ];
        generator.sites()[0]
            .write(0, &rows.x, &rows.h, &rows.u, both)
            .unwrap();
        let alone = written(&generator, 0, &cut(7, 4), &[4], false);
        assert_eq!(window_bits(&generator, &b), window_bits(&generator, &alone));
        let mut alone = generator.new_window().unwrap();
        let Batch { x, h, u } = cut(2, 5);
        let row = WriteRows {
            start: 0,
            len: 5,
            position: 0,
            lookahead: Some(next),
            window: &mut alone,
        };
        generator.sites()[0]
            .write(0, &x, &h, &u, &mut [row])
            .unwrap();
        assert_eq!(window_bits(&generator, &a), window_bits(&generator, &alone));
    }
}

#[test]
fn rows_that_do_not_continue_their_window_are_refused_and_change_nothing() {
    for generator in [published("svd"), associative()] {
        let rows = batch(&generator, 0, 5, 8);
        let mut window = written(&generator, 0, &batch(&generator, 0, 6, 5), &[5], false);
        let before = window_bits(&generator, &window);
        for (start, len, position) in [
            (0, 8, 0),
            (0, 8, 4),
            (0, 8, 6),
            (1, 8, 5),
            (usize::MAX, 2, 5),
            (9, 0, 5),
        ] {
            let row = WriteRows {
                start,
                len,
                position,
                lookahead: None,
                window: &mut window,
            };
            let fault = generator.sites()[0]
                .write(0, &rows.x, &rows.h, &rows.u, &mut [row])
                .unwrap_err();
            assert!(
                matches!(fault, Error::Position { .. } | Error::Rows { .. }),
                "{fault}"
            );
        }
        assert_eq!(window_bits(&generator, &window), before);
        assert_eq!(window.tokens(), 5);
    }
}

#[test]
fn a_window_of_another_generator_is_refused() {
    let (mine, other) = (
        associative(),
        tiny(&GeneratorSpec {
            r1: 7,
            ..GeneratorSpec::default()
        }),
    );
    let Batch { x, h, u } = batch(&mine, 0, 5, 8);
    let mut window = other.new_window().unwrap();
    let row = WriteRows {
        start: 0,
        len: 8,
        position: 0,
        lookahead: None,
        window: &mut window,
    };
    assert!(matches!(
        mine.sites()[0].write(0, &x, &h, &u, &mut [row]),
        Err(Error::Foreign { .. })
    ));
}

#[test]
fn a_delta_is_the_weight_delta_times_x() {
    for generator in all() {
        let core = generator
            .read_out(&state(&generator, &[(1, 6), (2, 30)]))
            .unwrap();
        let x = batch(&generator, 1, 9, 5).x;
        let rows = [SiteRows {
            start: 0,
            len: 5,
            core: &core,
            scale: 0.5,
        }];
        let delta = generator.sites()[1].delta(1, &x, &rows).unwrap().unwrap();
        let weight = generator.delta_weight(1, &core).unwrap();
        let (outputs, inputs) = weight.dims2().unwrap();
        let half: Vec<f64> = values(&weight).iter().map(|w| 0.5 * w).collect();
        let want = matmul(
            &values(&x),
            &transpose(&half, outputs, inputs),
            5,
            inputs,
            outputs,
        );
        let error = relative_error_of(&values(&delta), &want);
        assert!(error < 1e-5, "{:?}: {error}", generator.config().read_out);
    }
}

#[test]
fn bare_rows_have_no_delta_and_a_bare_batch_none_at_all() {
    let generator = associative();
    let site = &generator.sites()[0];
    let core = generator.read_out(&state(&generator, &[(1, 20)])).unwrap();
    let bare = generator.read_out(&generator.new_state().unwrap()).unwrap();
    let x = batch(&generator, 0, 9, 6).x;
    for rows in [
        vec![],
        vec![SiteRows {
            start: 0,
            len: 6,
            core: &bare,
            scale: 1.0,
        }],
        vec![SiteRows {
            start: 0,
            len: 6,
            core: &core,
            scale: 0.0,
        }],
        vec![SiteRows {
            start: 3,
            len: 0,
            core: &core,
            scale: 1.0,
        }],
    ] {
        assert!(site.delta(0, &x, &rows).unwrap().is_none());
    }
    let mixed = [
        SiteRows {
            start: 0,
            len: 2,
            core: &bare,
            scale: 1.0,
        },
        SiteRows {
            start: 3,
            len: 2,
            core: &core,
            scale: 1.0,
        },
    ];
    let delta = site
        .delta(0, &x, &mixed)
        .unwrap()
        .unwrap()
        .to_vec2::<f32>()
        .unwrap();
    for (row, values) in delta.iter().enumerate() {
        assert_eq!(
            values.iter().any(|value| *value != 0.0),
            (3..5).contains(&row),
            "row {row}"
        );
    }
}

#[test]
fn rows_outside_of_the_batch_and_foreign_cores_are_refused() {
    let generator = associative();
    let core = generator.read_out(&state(&generator, &[(1, 20)])).unwrap();
    let x = batch(&generator, 0, 9, 6).x;
    for (start, len) in [(0, 7), (6, 1), (usize::MAX, 2)] {
        let fault = generator.sites()[0].delta(
            0,
            &x,
            &[SiteRows {
                start,
                len,
                core: &core,
                scale: 1.0,
            }],
        );
        assert!(matches!(fault, Err(Error::Rows { tokens: 6, .. })));
    }
    let one = tiny(&GeneratorSpec {
        layers: Some(vec![0]),
        ..GeneratorSpec::default()
    });
    let small = one.read_out(&state(&one, &[(1, 20)])).unwrap();
    let fault = generator.sites()[1].delta(
        1,
        &x,
        &[SiteRows {
            start: 0,
            len: 6,
            core: &small,
            scale: 1.0,
        }],
    );
    assert!(matches!(fault, Err(Error::Foreign { .. })));
}

#[test]
fn modules_are_known_by_their_names() {
    for module in Module::ALL {
        assert_eq!(Module::from_name(module.name()), Some(module));
        assert_eq!(
            Module::from_name(&format!("{}.{}", module.block(), module.name())),
            Some(module)
        );
    }
    for name in ["", "proj", "xo_proj", "mlp.o_proj", "o_proj.", "lm_head"] {
        assert_eq!(Module::from_name(name), None, "{name}");
    }
}

#[test]
fn normed_embeddings_have_mean_square_one() {
    let e = Tensor::randn(0_f32, 0.1, (3, 64), &Device::Cpu).unwrap();
    let mean = normed_embeddings(&e)
        .unwrap()
        .sqr()
        .unwrap()
        .mean(1)
        .unwrap()
        .to_vec1::<f32>()
        .unwrap();
    assert!(
        mean.iter().all(|mean| (mean - 1.0).abs() < 1e-3),
        "{mean:?}"
    );
    assert!(normed_embeddings(&Tensor::zeros((1, 4), DType::F32, &Device::Cpu).unwrap()).is_ok());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]
    #[test]
    fn cutting_a_window_into_calls_changes_no_bit(
        seed in 0_u64..1000,
        tokens in 1_usize..24,
        cuts in prop::collection::vec(0_usize..100, 0..5),
        known in any::<bool>(),
        form in 0_usize..3,
    ) {
        let generator = match form {
            0 => published("svd"),
            1 => associative(),
            _ => tiny(&GeneratorSpec { form: Form::Published, norm: Some("frobenius"), ..GeneratorSpec::default() }),
        };
        let rows = batch(&generator, 0, seed, tokens);
        let whole = written(&generator, 0, &rows, &[tokens], false);
        let parts = written(&generator, 0, &rows, &lengths(&cuts, tokens), known);
        prop_assert_eq!(window_bits(&generator, &whole), window_bits(&generator, &parts));
        let mass = |window: &Window| {
            let mut state = generator.new_state().unwrap();
            state.add_window(window, 1.0).unwrap();
            (state.parts(0).unwrap().2.to_bits(), state.is_empty())
        };
        prop_assert_eq!(mass(&whole), mass(&parts));
    }

    #[test]
    fn a_row_in_a_batch_has_the_delta_of_the_row_alone(seed in 0_u64..1000, tokens in 1_usize..12, which in 0_usize..4) {
        let [a, b, c, d] = all();
        let generator = [a, b, c, d].into_iter().nth(which).unwrap();
        let site = &generator.sites()[1];
        let cores = [
            generator.read_out(&state(&generator, &[(seed, 12)])).unwrap(),
            generator.read_out(&state(&generator, &[(seed + 1, 4)])).unwrap(),
        ];
        let x = batch(&generator, 1, seed, tokens).x;
        let rows: Vec<_> = (0..tokens).filter(|t| t % 3 != 2).map(|t| SiteRows { start: t, len: 1, core: &cores[t % 3], scale: 1.0 }).collect();
        let together = site.delta(1, &x, &rows).unwrap().unwrap();
        for row in rows {
            let alone = site.delta(1, &x.narrow(0, row.start, 1).unwrap(), &[SiteRows { start: 0, ..row.clone() }]).unwrap().unwrap();
            prop_assert_eq!(bits(&together.narrow(0, row.start, 1).unwrap()), bits(&alone));
        }
    }
}
