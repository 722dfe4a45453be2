//! The algebra of states.

use proptest::prelude::*;
use testkit::{GeneratorSpec, relative_error};

use super::*;
use crate::{
    Generator, WriteRows,
    testing::{
        Batch, all, associative, batch, published, state, state_bits, tiny, window, window_bits,
    },
};

fn push(generator: &Generator, window: &mut Window, seed: u64, len: usize) {
    for (index, site) in generator.sites().iter().enumerate() {
        let Batch { x, h, u } = batch(generator, index, seed, len);
        let position = window.site(index).unwrap().position;
        let row = WriteRows {
            start: 0,
            len,
            position,
            lookahead: None,
            window,
        };
        site.write(index, &x, &h, &u, &mut [row]).unwrap();
    }
}

#[test]
fn a_forked_window_and_its_original_go_separate_ways() {
    for generator in [published("svd"), associative()] {
        let mut original = window(&generator, 1, 6);
        let before = window_bits(&generator, &original);
        let mut fork = original.try_clone().unwrap();
        push(&generator, &mut fork, 2, 4);
        assert_eq!(window_bits(&generator, &original), before);
        assert_ne!(window_bits(&generator, &fork), before);
        let forked = window_bits(&generator, &fork);
        push(&generator, &mut original, 3, 4);
        assert_eq!(window_bits(&generator, &fork), forked);
        // The same tokens after the fork: the same bits, pending token included.
        let mut again = window(&generator, 1, 6).try_clone().unwrap();
        push(&generator, &mut again, 3, 4);
        assert_eq!(
            window_bits(&generator, &original),
            window_bits(&generator, &again)
        );
    }
}

#[test]
fn a_forked_state_and_its_original_go_separate_ways() {
    for generator in all() {
        let mut original = state(&generator, &[(1, 6)]);
        let before = state_bits(&original);
        let mut fork = original.try_clone().unwrap();
        fork.add_window(&window(&generator, 2, 9), 1.0).unwrap();
        assert_eq!(state_bits(&original), before);
        let forked = state_bits(&fork);
        assert_eq!(forked, state_bits(&state(&generator, &[(1, 6), (2, 9)])));
        original.add(&fork, 2.0).unwrap();
        assert_eq!(state_bits(&fork), forked);
    }
}

#[test]
fn an_empty_state_takes_what_is_added_and_goes_its_own_way() {
    for generator in all() {
        let mut original = state(&generator, &[(1, 6)]);
        let before = state_bits(&original);
        let mut sum = generator.new_state().unwrap();
        sum.add(&original, 1.0).unwrap();
        assert_eq!(state_bits(&sum), before);
        original.add_window(&window(&generator, 2, 9), 1.0).unwrap();
        assert_eq!(state_bits(&sum), before);
        sum.add_window(&window(&generator, 2, 9), 1.0).unwrap();
        assert_eq!(state_bits(&sum), state_bits(&original));
    }
}

#[test]
fn a_state_can_be_added_to_itself() {
    let generator = associative();
    let mut twice = state(&generator, &[(1, 6)]);
    let once = twice.try_clone().unwrap();
    twice.add(&once, 1.0).unwrap();
    let mut doubled = generator.new_state().unwrap();
    doubled.add(&once, 2.0).unwrap();
    assert_eq!(state_bits(&twice), state_bits(&doubled));
}

#[test]
fn nothing_and_a_weight_of_zero_add_nothing() {
    let generator = associative();
    let mut sums = state(&generator, &[(1, 6)]);
    let before = state_bits(&sums);
    sums.add(&state(&generator, &[(2, 6)]), 0.0).unwrap();
    sums.add(&generator.new_state().unwrap(), 1.0).unwrap();
    assert_eq!(state_bits(&sums), before);
    let mut empty = generator.new_state().unwrap();
    empty.add(&sums, 0.0).unwrap();
    assert!(empty.is_empty());
}

#[test]
fn a_weight_that_is_not_finite_and_a_foreign_state_are_refused_and_change_nothing() {
    let generator = associative();
    let mut sums = state(&generator, &[(1, 6)]);
    let (before, other) = (state_bits(&sums), state(&generator, &[(2, 6)]));
    for weight in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        assert!(matches!(
            sums.add(&other, weight),
            Err(Error::Weight { .. })
        ));
        assert!(matches!(
            sums.add_window(&window(&generator, 2, 6), weight),
            Err(Error::Weight { .. })
        ));
    }
    let narrow = tiny(&GeneratorSpec {
        r2: 5,
        ..GeneratorSpec::default()
    });
    let single = tiny(&GeneratorSpec {
        layers: Some(vec![1]),
        ..GeneratorSpec::default()
    });
    for foreign in [narrow, single, published("svd")] {
        assert!(matches!(
            sums.add(&state(&foreign, &[(1, 6)]), 1.0),
            Err(Error::Foreign { .. })
        ));
    }
    assert_eq!(state_bits(&sums), before);
}

#[test]
fn bytes_are_those_of_the_sums() {
    let generator = associative();
    // Two sites of 12 x 10 and 12 x 12 values, and a mass each.
    assert_eq!(
        state(&generator, &[(1, 6)]).bytes(),
        2 * ((12 * 10 + 12 * 12) * 4 + 8)
    );
    assert_eq!(
        generator.new_window().unwrap().bytes(),
        2 * ((12 * 10 + 12 * 12) * 4 + 8)
    );
}

fn documents() -> impl Strategy<Value = Vec<(u64, usize)>> {
    prop::collection::vec((0_u64..100, 1_usize..12), 1..5)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, ..ProptestConfig::default() })]
    #[test]
    fn the_order_of_documents_matters_only_to_rounding(documents in documents()) {
        let generator = associative();
        let reversed: Vec<_> = documents.iter().copied().rev().collect();
        let (a, b) = (state(&generator, &documents), state(&generator, &reversed));
        for site in 0..generator.sites().len() {
            let ((s, g), (s2, g2)) = (a.sums(site).unwrap(), b.sums(site).unwrap());
            if !a.is_empty() {
                prop_assert!(relative_error(s, s2) < 1e-5 && relative_error(g.unwrap(), g2.unwrap()) < 1e-5);
            }
        }
    }

    #[test]
    fn refolding_without_a_document_is_never_having_had_it(documents in documents(), gone in any::<prop::sample::Index>()) {
        for generator in [associative(), published("svd")] {
            // As the engine keeps them: a state a document, composed in log order.
            let each: Vec<_> = documents.iter().map(|document| state(&generator, &[*document])).collect();
            let gone = gone.index(documents.len());
            let fold = |skip: Option<usize>| {
                let mut sum = generator.new_state().unwrap();
                for (_, document) in each.iter().enumerate().filter(|(index, _)| Some(*index) != skip) {
                    sum.add(document, 1.0).unwrap();
                }
                sum
            };
            let _with = fold(None);
            let mut never = documents.clone();
            never.remove(gone);
            prop_assert_eq!(state_bits(&fold(Some(gone))), state_bits(&state(&generator, &never)));
        }
    }

    #[test]
    fn weights_scale_what_they_weigh(seed in 0_u64..100, exponent in -3_i32..4) {
        let generator = associative();
        let weight = 2_f32.powi(exponent);
        let mut weighted = generator.new_state().unwrap();
        weighted.add(&state(&generator, &[(seed, 9)]), weight).unwrap();
        let plain = state(&generator, &[(seed, 9)]);
        for site in 0..generator.sites().len() {
            let ((s, g), (s1, g1)) = (weighted.sums(site).unwrap(), plain.sums(site).unwrap());
            for (scaled, one) in [(s, s1), (g.unwrap(), g1.unwrap())] {
                let want = (one * f64::from(weight)).unwrap();
                prop_assert_eq!(crate::testing::bits(scaled), crate::testing::bits(&want));
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn a_window_that_gathers_comes_to_the_same_sums(cuts in prop::collection::vec(1usize..20, 1..8)) {
        for generator in all() {
            let mut plain = generator.new_window().unwrap();
            let mut gathering = generator.new_window().unwrap().gathering();
            for (seed, len) in (1..).zip(&cuts) {
                push(&generator, &mut plain, seed, *len);
                push(&generator, &mut gathering, seed, *len);
            }
            let [mut want, mut got] = [(); 2].map(|()| generator.new_state().unwrap());
            want.add_window(&plain, 1.0).unwrap();
            got.add_window(&gathering, 1.0).unwrap();
            prop_assert_eq!(state_bits(&got), state_bits(&want));
            // A fork settles for itself.
            let mut fork = gathering.try_clone().unwrap();
            fork.settle().unwrap();
            push(&generator, &mut gathering, 90, 3);
            push(&generator, &mut fork, 90, 3);
            push(&generator, &mut plain, 90, 3);
            for mut window in [gathering, fork] {
                window.settle().unwrap();
                prop_assert_eq!(window_bits(&generator, &window), window_bits(&generator, &plain));
            }
        }
    }
}

#[test]
fn a_window_gathers_what_few_tokens_write() {
    for generator in all() {
        let mut window = generator.new_window().unwrap().gathering();
        let empty = window_bits(&generator, &window);
        push(&generator, &mut window, 1, 5);
        assert_eq!(window_bits(&generator, &window), empty);
        // Many tokens bring them along.
        push(&generator, &mut window, 2, 40);
        assert_ne!(window_bits(&generator, &window), empty);
    }
}
