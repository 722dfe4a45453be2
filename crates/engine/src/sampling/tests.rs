use proptest::{collection::vec, prelude::*};

use super::*;

fn sampler(sampling: Sampling) -> Sampler {
    Sampler::new(sampling, &[]).expect("the values are in range")
}

fn logits() -> impl Strategy<Value = Vec<f32>> {
    vec(-8.0f32..8.0, 1..600)
}

/// The tokens that can come, found the long way: order all, then filter after filter.
fn allowed(logits: &[f32], sampling: &Sampling) -> Vec<u32> {
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
    if sampling.top_k > 0 {
        order.truncate(sampling.top_k);
    }
    let weight = |id: usize| {
        ((f64::from(logits[id]) - f64::from(logits[order[0]])) / f64::from(sampling.temperature))
            .exp()
    };
    let weights: Vec<f64> = order.iter().map(|&id| weight(id)).collect();
    let total: f64 = weights.iter().sum();
    let (mut reached, mut kept) = (0.0, 0);
    while kept < order.len() && (kept == 0 || reached < f64::from(sampling.top_p) * total) {
        reached += weights[kept];
        kept += 1;
    }
    let kept = (0..kept)
        .filter(|&index| weights[index] >= f64::from(sampling.min_p))
        .map(|index| order[index] as u32);
    kept.collect()
}

proptest! {
    #[test]
    fn temperature_0_takes_the_likeliest_and_the_first_among_equals(logits in vec(-2i8..3, 1..50)) {
        let logits: Vec<f32> = logits.into_iter().map(f32::from).collect();
        let best = logits.iter().copied().fold(f32::MIN, f32::max);
        let first = logits.iter().position(|&logit| logit == best).unwrap();
        prop_assert_eq!(sampler(Sampling::default()).draw(&logits).token, TokenId(first as u32));
    }

    #[test]
    fn only_tokens_that_every_filter_keeps_come(
        logits in logits(), temperature in 0.1f32..3.0, top_k in 0usize..40, top_p in 0.05f32..1.0, min_p in 0.0f32..0.5, seed in any::<u64>(),
    ) {
        let sampling = Sampling { temperature, top_k, top_p, min_p, seed, ..Sampling::default() };
        let allowed = allowed(&logits, &sampling);
        let mut sampler = sampler(sampling);
        for _ in 0..8 {
            let Drawn { token, .. } = sampler.draw(&logits);
            prop_assert!(allowed.contains(&token.0), "{:?} not in {:?}", token, allowed);
        }
    }

    #[test]
    fn the_same_seed_draws_the_same_tokens(logits in vec(logits(), 1..6), seed in any::<u64>()) {
        let sampling = Sampling { temperature: 1.0, seed, ..Sampling::default() };
        let draw = |mut sampler: Sampler| -> Vec<Drawn> { logits.iter().map(|logits| sampler.draw(logits)).collect() };
        prop_assert_eq!(draw(sampler(sampling.clone())), draw(sampler(sampling)));
    }

    #[test]
    fn what_is_no_number_never_comes_and_breaks_nothing(
        kinds in vec(0u8..5, 1..40),
        temperature in prop_oneof![Just(0.0f32), Just(1e-30), 0.1f32..2.0],
        top_p in 0.1f32..=1.0,
        seed in any::<u64>(),
    ) {
        let number = |kind: &u8| [f32::NAN, f32::NEG_INFINITY, f32::INFINITY, 1.0, -1.0][usize::from(*kind)];
        let logits: Vec<f32> = kinds.iter().map(number).collect();
        let sampling = Sampling { temperature, top_p, seed, repetition_penalty: 1.5, logprobs: true, top_logprobs: 3, ..Sampling::default() };
        let drawn = sampler(sampling).draw(&logits);
        let index = drawn.token.0 as usize;
        prop_assert!(index < logits.len());
        prop_assert!(kinds[index] > 1 || kinds.iter().all(|&kind| kind <= 1));
        prop_assert!(drawn.logprob.is_some_and(|logprob| !logprob.is_nan() && logprob <= 0.0));
    }

    #[test]
    fn logprobs_are_those_of_the_untouched_distribution(logits in logits(), seed in any::<u64>()) {
        let sampling = Sampling {
            temperature: 2.0, top_k: 5, repetition_penalty: 3.0, seed, logprobs: true, top_logprobs: 4, ..Sampling::default()
        };
        let prompt: Vec<TokenId> = (0..logits.len() as u32).map(TokenId).collect();
        let Drawn { token, logprob, top } = Sampler::new(sampling, &prompt).unwrap().draw(&logits);
        let sum: f64 = logits.iter().map(|&logit| f64::from(logit).exp()).sum();
        let expected = |token: TokenId| (f64::from(logits[token.0 as usize]).exp() / sum).ln();
        prop_assert!((f64::from(logprob.unwrap()) - expected(token)).abs() < 1e-4);
        prop_assert_eq!(top.len(), 4.min(logits.len()));
        prop_assert!(top.windows(2).all(|pair| pair[0].1 >= pair[1].1));
        prop_assert!(top.iter().all(|&(token, logprob)| (f64::from(logprob) - expected(token)).abs() < 1e-4));
    }

    #[test]
    fn a_score_is_the_log_of_the_softmax(logits in logits(), at in any::<prop::sample::Index>()) {
        let token = at.index(logits.len());
        let sum: f64 = logits.iter().map(|&logit| f64::from(logit).exp()).sum();
        let (logprob, likeliest) = score(&logits, TokenId(token as u32));
        prop_assert!((f64::from(logprob) - (f64::from(logits[token]).exp() / sum).ln()).abs() < 1e-4);
        prop_assert_eq!(likeliest, sampler(Sampling::default()).draw(&logits).token.0 as usize == token);
    }
}

#[test]
fn draws_follow_the_distribution() {
    let logits = [0.5f32.ln(), 0.3f32.ln(), 0.2f32.ln()];
    for sampling in [
        Sampling {
            temperature: 1.0,
            seed: 7,
            ..Sampling::default()
        },
        Sampling {
            temperature: 1.0,
            seed: 7,
            top_p: 0.999_999,
            ..Sampling::default()
        },
        Sampling {
            temperature: 1.0,
            seed: 7,
            top_k: 3,
            ..Sampling::default()
        },
    ] {
        let mut sampler = sampler(sampling);
        let mut counts = [0u32; 3];
        for _ in 0..20_000 {
            counts[sampler.draw(&logits).token.0 as usize] += 1;
        }
        // Six standard deviations of a binomial of 20,000 draws.
        for (count, share) in counts.into_iter().zip([0.5, 0.3, 0.2]) {
            let deviation = f64::sqrt(20_000.0 * share * (1.0 - share));
            assert!(
                (f64::from(count) - 20_000.0 * share).abs() < 6.0 * deviation,
                "{counts:?}"
            );
        }
    }
}

#[test]
fn a_penalty_holds_back_what_prompt_and_answer_hold() {
    let sampling = Sampling {
        repetition_penalty: 2.0,
        ..Sampling::default()
    };
    let mut sampler = Sampler::new(sampling, &[TokenId(0), TokenId(3)]).unwrap();
    // 0 is penalised from 3.0 to 1.5, so 1 comes; then 1 is penalised too, to 1.25, and 0 is ahead.
    let drawn: Vec<u32> = (0..3)
        .map(|_| sampler.draw(&[3.0, 2.5, 1.0, -1.0]).token.0)
        .collect();
    assert_eq!(drawn, [1, 0, 0]);
}

#[test]
fn values_out_of_range_are_named() {
    let bad = |change: fn(&mut Sampling)| {
        let mut sampling = Sampling::default();
        change(&mut sampling);
        match Sampler::new(sampling, &[]) {
            Err(RequestError::Sampling { field, .. }) => field,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(bad(|sampling| sampling.temperature = -0.5), "temperature");
    assert_eq!(
        bad(|sampling| sampling.temperature = f32::NAN),
        "temperature"
    );
    assert_eq!(
        bad(|sampling| sampling.temperature = f32::INFINITY),
        "temperature"
    );
    assert_eq!(bad(|sampling| sampling.top_p = 0.0), "top_p");
    assert_eq!(bad(|sampling| sampling.top_p = 1.5), "top_p");
    assert_eq!(bad(|sampling| sampling.top_p = f32::NAN), "top_p");
    assert_eq!(bad(|sampling| sampling.min_p = 1.0), "min_p");
    assert_eq!(bad(|sampling| sampling.min_p = -0.1), "min_p");
    assert_eq!(
        bad(|sampling| sampling.repetition_penalty = 0.0),
        "repetition_penalty"
    );
    assert_eq!(
        bad(|sampling| sampling.repetition_penalty = f32::NAN),
        "repetition_penalty"
    );
    assert_eq!(bad(|sampling| sampling.top_logprobs = 65), "top_logprobs");
}
