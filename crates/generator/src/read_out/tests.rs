//! Read-outs against their definitions, at the edges where the published one fails.

use candle_core::DType;
use proptest::prelude::*;
use testkit::{Form, GeneratorSpec, Random, relative_error, relative_error_of, solve, values};

use super::*;
use crate::{
    Core, Generator, State,
    testing::{all, associative, bits, published, state, tiny},
};

/// The state of one site's sums, the same at both sites of a tiny generator.
fn of(s: &Tensor, g: Option<&Tensor>, mass: Option<f64>) -> State {
    State::of(vec![(s.clone(), g.cloned(), mass); 2], 100)
}

fn matrix(generator: &Generator, state: &State) -> Tensor {
    generator
        .read_out(state)
        .unwrap()
        .matrix(0)
        .unwrap()
        .unwrap()
}

/// Σ over `tokens` of random k v, k k; k [T, R1] and v [T, R2] of deviation 1.
fn sums(seed: u64, r1: usize, r2: usize, tokens: usize) -> (Tensor, Tensor) {
    let mut random = Random::new(seed);
    let (k, v) = (
        random.tensor(&[tokens, r1], 0.0, 1.0),
        random.tensor(&[tokens, r2], 0.0, 1.0),
    );
    let kt = k.t().unwrap();
    (kt.matmul(&v).unwrap(), kt.matmul(&k).unwrap())
}

fn singular_values(n: &Tensor) -> Vec<f64> {
    decompose(finite(n).unwrap().unwrap().as_ref())
        .unwrap()
        .values
}

#[test]
fn an_empty_state_is_the_bare_model() {
    for generator in all() {
        let core = generator.read_out(&generator.new_state().unwrap()).unwrap();
        assert!(core.is_zero() && core.bytes() == 0 && core.matrix(0).unwrap().is_none());
        let weight = generator.delta_weight(0, &core).unwrap();
        assert!(values(&weight).iter().all(|value| *value == 0.0));
    }
}

#[test]
fn sums_of_zeros_that_were_written_do_nothing() {
    for generator in all() {
        let (r1, r2, _) = generator.sites()[0].ranks();
        let zeros = |columns| Tensor::zeros((r1, columns), DType::F32, &Device::Cpu).unwrap();
        let ridge = generator.config().read_out == ReadOut::Ridge;
        let g = ridge.then(|| zeros(r1));
        let core = generator
            .read_out(&of(&zeros(r2), g.as_ref(), Some(0.0)))
            .unwrap();
        let n = core.matrix(0).unwrap();
        assert!(n.is_none_or(|n| values(&n).iter().all(|value| *value == 0.0)));
    }
}

#[test]
fn svd_keeps_the_rank_and_lifts_every_kept_value_to_one() {
    let generator = published("svd");
    let (s, _) = sums(1, 12, 10, 50);
    let core = generator.read_out(&of(&s, None, Some(500.0))).unwrap();
    let kept = singular_values(&core.matrix(0).unwrap().unwrap());
    for (index, value) in kept.iter().enumerate() {
        assert!(
            (value - f64::from(u8::from(index < 6))).abs() < 1e-6,
            "sigma_{index} = {value}"
        );
    }
    // N projects onto the leading directions of S: N Nᵀ S has the leading singular values of S.
    let n = core.matrix(0).unwrap().unwrap();
    let projected = n.matmul(&n.t().unwrap()).unwrap().matmul(&s).unwrap();
    let (projected, all) = (singular_values(&projected), singular_values(&s));
    for (index, value) in projected.iter().enumerate().take(6) {
        assert!(
            (value - all[index]).abs() < 1e-4 * all[0],
            "sigma_{index}: {value} for {}",
            all[index]
        );
    }
}

#[test]
fn svd_stores_the_smaller_of_its_forms() {
    // 6 (12 + 10) values as factors are more than 12 x 10; 2 (12 + 10) are fewer.
    let (s, _) = sums(1, 12, 10, 50);
    let dense = published("svd").read_out(&of(&s, None, Some(1.0))).unwrap();
    assert_eq!(dense.bytes(), 2 * 12 * 10 * 4);
    let thin = tiny(&GeneratorSpec {
        form: Form::Published,
        rank: 2,
        ..GeneratorSpec::default()
    });
    let core = thin.read_out(&of(&s, None, Some(1.0))).unwrap();
    assert_eq!(core.bytes(), 2 * 2 * (12 + 10) * 4);
}

#[test]
fn a_context_shorter_than_the_rank_does_not_fill_up_with_noise() {
    // Sums rounded to f32 have full rank; only as many directions may count as tokens were written.
    for tokens in 1..6 {
        let generator = published("svd");
        let core = generator
            .read_out(&state(&generator, &[(3, tokens)]))
            .unwrap();
        for site in 0..2 {
            let energy: f64 = singular_values(&core.matrix(site).unwrap().unwrap())
                .iter()
                .map(|value| value * value)
                .sum();
            assert!(
                (energy - tokens as f64).abs() < 1e-5,
                "{tokens} tokens fill {energy} directions"
            );
        }
    }
}

#[test]
fn rounding_noise_of_much_that_cancelled_is_not_lifted() {
    // sigma_2 is 1e-4 of sigma_1, but a mass of 1e6 has passed through the sums: it is noise.
    let mut s = Tensor::zeros((12, 10), DType::F32, &Device::Cpu)
        .unwrap()
        .to_vec2::<f32>()
        .unwrap();
    (s[0][0], s[1][1]) = (1.0, 1e-4);
    let s = Tensor::new(s, &Device::Cpu).unwrap();
    let rank = |mass| {
        let kept = singular_values(&matrix(&published("svd"), &of(&s, None, Some(mass))));
        kept.into_iter().filter(|value| *value > 0.5).count()
    };
    assert_eq!((rank(1.0), rank(1e4)), (2, 1));
}

#[test]
fn singular_values_below_a_millionth_of_the_largest_are_noise() {
    let rank = |second: f32| {
        let mut s = vec![0_f32; 12 * 10];
        (s[0], s[11]) = (1.0, second);
        let s = Tensor::from_vec(s, (12, 10), &Device::Cpu).unwrap();
        let kept = singular_values(&matrix(&published("svd"), &of(&s, None, Some(0.0))));
        kept.into_iter().filter(|value| *value > 0.5).count()
    };
    assert_eq!((rank(1e-5), rank(1e-7)), (2, 1));
}

#[test]
fn frobenius_and_spectral_divide_by_their_norms() {
    let (s, _) = sums(2, 12, 10, 30);
    let largest = singular_values(&s)[0];
    let squares: f64 = values(&s).iter().map(|value| value * value).sum();
    for (norm, by) in [("frobenius", squares.sqrt()), ("spectral", largest)] {
        let n = matrix(&published(norm), &of(&s, None, None));
        let want: Vec<f64> = values(&s).iter().map(|value| value / by).collect();
        let error = relative_error_of(&values(&n), &want);
        assert!(error < 1e-6, "{norm}: {error}");
    }
}

#[test]
fn ridge_solves_its_equation() {
    let generator = associative();
    let lambda = generator.sites()[0].ridge.unwrap();
    let (s, g) = sums(3, 12, 10, 40);
    let mut system = values(&g);
    for i in 0..12 {
        system[i * 12 + i] += lambda;
    }
    let want = solve(&system, &values(&s), 12, 10);
    let error = relative_error_of(&values(&matrix(&generator, &of(&s, Some(&g), None))), &want);
    assert!(error < 1e-6, "{error}");
}

#[test]
fn ridge_uses_both_triangles_alike() {
    let generator = associative();
    let (s, g) = sums(3, 12, 10, 40);
    let skew = Random::new(5).tensor(&[12, 12], 0.0, 1e-3);
    let (up, down) = ((&g + &skew).unwrap(), (&g - &skew).unwrap());
    let skewed = (&g + (&skew - skew.t().unwrap()).unwrap()).unwrap();
    let n = |g: &Tensor| matrix(&generator, &of(&s, Some(g), None));
    assert!(relative_error(&n(&skewed), &n(&g)) < 1e-6);
    assert!(relative_error(&n(&up), &n(&down)) > 1e-6);
}

#[test]
fn ridge_is_truncated_only_where_that_is_smaller() {
    let (s, g) = sums(3, 12, 10, 40);
    let whole = matrix(&associative(), &of(&s, Some(&g), None));
    let thin = tiny(&GeneratorSpec {
        rank: 3,
        ..GeneratorSpec::default()
    });
    let core = thin.read_out(&of(&s, Some(&g), None)).unwrap();
    assert_eq!(core.bytes(), 2 * 3 * (12 + 10) * 4);
    let (kept, all) = (
        singular_values(&core.matrix(0).unwrap().unwrap()),
        singular_values(&whole),
    );
    for (index, value) in kept.iter().enumerate() {
        let want = if index < 3 { all[index] } else { 0.0 };
        assert!(
            (value - want).abs() < 1e-6 * all[0],
            "sigma_{index} = {value}, not {want}"
        );
    }
}

#[test]
fn a_quarter_of_a_million_tokens_are_read_out_exactly() {
    // Keys that share a direction, as real ones do: the condition number of G + lambda I passes 1e6.
    const TOKENS: usize = 262_144;
    let generator = associative();
    let lambda = generator.sites()[0].ridge.unwrap();
    let mut random = Random::new(17);
    let truth = random.tensor(&[12, 10], 0.0, 1.0);
    let (mut s, mut g) = (vec![0_f64; 120], vec![0_f64; 144]);
    let common = values(&random.tensor(&[12], 0.0, 1.0));
    let truth64 = values(&truth);
    for _ in 0..TOKENS {
        let strength = random.normal();
        let k: Vec<f64> = common
            .iter()
            .map(|c| c * strength + 0.01 * random.normal())
            .collect();
        let v: Vec<f64> = (0..10)
            .map(|j| (0..12).map(|i| k[i] * truth64[i * 10 + j]).sum())
            .collect();
        for i in 0..12 {
            (0..10).for_each(|j| s[i * 10 + j] += k[i] * v[j]);
            (0..12).for_each(|j| g[i * 12 + j] += k[i] * k[j]);
        }
    }
    let spread = g.iter().step_by(13).sum::<f64>() / lambda;
    assert!(spread > 1e6, "tr(G) / lambda = {spread}");
    let f32s = |values: &[f64]| values.iter().map(|value| *value as f32).collect::<Vec<_>>();
    let (s32, g32) = (f32s(&s), f32s(&g));
    let tensor = |values: Vec<f32>, columns: usize| {
        Tensor::from_vec(values, (12, columns), &Device::Cpu).unwrap()
    };
    let n = matrix(
        &generator,
        &of(
            &tensor(s32.clone(), 10),
            Some(&tensor(g32.clone(), 12)),
            None,
        ),
    );
    // The exact answer to the sums as f32 has them.
    let mut system: Vec<f64> = g32.iter().map(|value| f64::from(*value)).collect();
    (0..12).for_each(|i| system[i * 13] += lambda);
    let want = solve(
        &system,
        &s32.iter()
            .map(|value| f64::from(*value))
            .collect::<Vec<_>>(),
        12,
        10,
    );
    let error = relative_error_of(&values(&n), &want);
    assert!(error < 1e-5, "{error}");
}

#[test]
fn values_that_are_not_finite_are_an_error() {
    for generator in all() {
        let (r1, r2, _) = generator.sites()[0].ranks();
        let ridge = generator.config().read_out == ReadOut::Ridge;
        let (s, g) = sums(1, r1, r2, 20);
        for bad in [f64::NAN, f64::INFINITY] {
            let poisoned = (&s * bad).unwrap();
            let fault = generator
                .read_out(&of(&poisoned, ridge.then_some(&g), Some(1.0)))
                .unwrap_err();
            assert!(
                matches!(fault, Error::NotFinite { site } if site.layer == 0),
                "{fault}"
            );
        }
        if ridge {
            let fault = generator
                .read_out(&of(&s, Some(&(&g * f64::NAN).unwrap()), None))
                .unwrap_err();
            assert!(matches!(fault, Error::NotFinite { .. }), "{fault}");
        } else if generator.config().read_out == ReadOut::Svd {
            let fault = generator
                .read_out(&of(&s, None, Some(f64::INFINITY)))
                .unwrap_err();
            assert!(matches!(fault, Error::NotFinite { .. }), "{fault}");
        }
    }
}

#[test]
fn more_subtracted_than_added_is_an_error() {
    let generator = associative();
    let mut sum = state(&generator, &[(1, 20)]);
    sum.add(&state(&generator, &[(2, 20)]), -3.0).unwrap();
    assert!(matches!(
        generator.read_out(&sum).unwrap_err(),
        Error::NotPositive { .. }
    ));
}

#[test]
fn a_state_of_another_generator_is_refused() {
    let generator = associative();
    let (s, g) = sums(1, 7, 10, 20);
    assert!(matches!(
        generator.read_out(&of(&s, Some(&g), None)),
        Err(Error::Foreign { .. })
    ));
    let (s, _) = sums(1, 12, 10, 20);
    assert!(matches!(
        generator.read_out(&of(&s, None, None)),
        Err(Error::Foreign { .. })
    ));
    assert!(matches!(
        generator.read_out(&State::of(Vec::new(), 1)),
        Err(Error::Foreign { .. })
    ));
}

fn core_bits(core: &Core) -> Vec<u32> {
    (0..2)
        .flat_map(|site| bits(&core.matrix(site).unwrap().unwrap()))
        .collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, ..ProptestConfig::default() })]
    #[test]
    fn svd_does_not_feel_the_scale_of_a_state(seed in 0_u64..1000, exponent in -20_i32..20) {
        let generator = published("svd");
        let (s, _) = sums(seed, 12, 10, 30);
        let factor = 2_f64.powi(exponent);
        let plain = matrix(&generator, &of(&s, None, Some(300.0)));
        let scaled = matrix(&generator, &of(&(&s * factor).unwrap(), None, Some(300.0 * factor)));
        prop_assert!(relative_error(&scaled, &plain) < 1e-5);
    }

    #[test]
    fn equal_states_give_equal_bits(seed in 0_u64..1000) {
        for generator in all() {
            let first = generator.read_out(&state(&generator, &[(seed, 9), (seed + 1, 5)])).unwrap();
            let second = generator.read_out(&state(&generator, &[(seed, 9), (seed + 1, 5)])).unwrap();
            prop_assert_eq!(core_bits(&first), core_bits(&second));
        }
    }
}

#[test]
fn a_core_that_is_read_out_in_portions_is_the_core_that_is_read_out_at_once() {
    for generator in all() {
        let state = state(&generator, &[(1, 9)]);
        for gated in [false, true] {
            let mut reading = generator
                .begin_read_out(state.try_clone().unwrap(), gated)
                .unwrap();
            let mut portions = 0;
            let core = loop {
                portions += 1;
                if let Some(core) = generator.go_on(&mut reading, 1).unwrap() {
                    break core;
                }
            };
            assert_eq!(portions, generator.sites().len());
            let once = generator.read_out(&state).unwrap();
            for site in 0..portions {
                let [want, got] =
                    [&once, &core].map(|core| core.matrix(site).unwrap().map(|n| bits(&n)));
                assert_eq!(want, got);
            }
        }
        let empty = generator.new_state().unwrap();
        let mut reading = generator.begin_read_out(empty, false).unwrap();
        assert!(
            generator
                .go_on(&mut reading, 1)
                .unwrap()
                .is_some_and(|core| core.is_zero())
        );
    }
}

/// A generator whose sites round, with ranks of whole blocks, and the same in f32.
fn rounding() -> [Generator; 2] {
    let spec = GeneratorSpec {
        r1: 64,
        r2: 32,
        rank: 64,
        modules: vec!["o_proj"],
        ..GeneratorSpec::default()
    };
    let plain = tiny(&spec);
    [tiny(&spec).rounded(|_| true), plain]
}

#[test]
fn a_core_in_8_bits_is_solved_for_in_f32_where_that_is_as_good() {
    let [rounded, plain] = rounding();
    let lambda = plain.sites()[0].ridge.unwrap();
    for (tokens, size) in [(40, 1.0), (400, 1.0), (400, 1e4)] {
        let (s, g) = sums(9, 64, 32, tokens);
        let (s, g) = ((s * size).unwrap(), (g * size).unwrap());
        let state = of(&s, Some(&g), None);
        // What rounding does to the core that f64 gives.
        let want = plain.read_out(&state).unwrap().matrix(0).unwrap().unwrap();
        let in_8_bits = Linear::rounded_of(&want.t().unwrap()).unwrap().unwrap();
        let rounding = relative_error(&in_8_bits.dequantize().unwrap().t().unwrap(), &want);
        let got = rounded.read_out(&state).unwrap();
        assert_eq!(got.bytes(), 2 * in_8_bits.bytes(), "it is kept in 8 bits");
        let error = relative_error(&got.matrix(0).unwrap().unwrap(), &want);
        assert!(
            error < 1.05 * rounding,
            "{tokens} tokens: {error}, rounding {rounding}"
        );
        let site = &rounded.sites()[0];
        let in_f32 = ridge_in_f32(site, &s, Some(&g), None).unwrap();
        let trace = 64.0 * tokens as f64 * size;
        assert_eq!(
            in_f32.is_some(),
            trace < F32_REACH * lambda,
            "{tokens} tokens"
        );
        assert!(
            ridge_in_f32(&plain.sites()[0], &s, Some(&g), None)
                .unwrap()
                .is_none()
        );
    }
}

#[test]
fn what_is_not_finite_is_refused_where_cores_are_in_8_bits_too() {
    let [rounded, _] = rounding();
    let (s, g) = sums(9, 64, 32, 40);
    let nan = |t: &Tensor| (t * f64::NAN).unwrap();
    for (s, g) in [
        (nan(&s), g.clone()),
        (s.clone(), nan(&g)),
        (nan(&s), nan(&g)),
    ] {
        let refused = rounded.read_out(&of(&s, Some(&g), None));
        assert!(
            matches!(refused, Err(Error::NotFinite { .. })),
            "{refused:?}"
        );
    }
    let negative = (&g * -1.0).unwrap();
    let refused = rounded.read_out(&of(&s, Some(&negative), None));
    assert!(
        matches!(refused, Err(Error::NotPositive { .. })),
        "{refused:?}"
    );
}
