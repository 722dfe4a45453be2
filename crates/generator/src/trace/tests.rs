//! Any tokens of a document, recalled.

use testkit::relative_error;

use super::*;
use crate::{
    Generator, WriteRows,
    testing::{Batch, all, batch, state_bits},
};

/// A traced window of random tokens, pushed in calls of these lengths.
fn traced(generator: &Generator, seed: u64, calls: &[usize]) -> Window {
    let mut window = generator.new_traced_window().unwrap();
    let tokens = calls.iter().sum();
    for (index, site) in generator.sites().iter().enumerate() {
        let Batch { x, h, u } = batch(generator, index, seed + 1000 * index as u64, tokens);
        let mut start = 0;
        for &len in calls {
            let row = WriteRows {
                start: 0,
                len,
                position: start,
                lookahead: None,
                window: &mut window,
            };
            let part = |t: &Tensor| t.narrow(0, start, len).unwrap().contiguous().unwrap();
            site.write(index, &part(&x), &part(&h), &part(&u), &mut [row])
                .unwrap();
            start += len;
        }
    }
    window
}

#[test]
fn all_tokens_recalled_are_the_state_up_to_rounding() {
    for generator in all() {
        let (mut trace, mut state) = (generator.new_trace(), generator.new_state().unwrap());
        for (seed, tokens) in [(1, 6), (2, 9)] {
            let window = traced(&generator, seed, &[tokens]);
            trace.push(&window, tokens).unwrap();
            state.add_window(&window, 1.0).unwrap();
        }
        let recall = |tokens: &[Range<usize>]| generator.recall(&trace, tokens).unwrap();
        let recalled = recall(&[0..6, 6..15]);
        for site in 0..generator.sites().len() {
            let (mine, theirs) = (recalled.sums(site).unwrap(), state.sums(site).unwrap());
            assert!(relative_error(mine.0, theirs.0) < 0.01);
            assert_eq!(mine.1.is_some(), theirs.1.is_some());
        }
        assert_eq!(recalled.is_empty(), state.is_empty());
        assert!(recall(&[]).is_empty());
        assert!(recall(&[90..95, 97..99]).is_empty());
    }
}

#[test]
fn what_is_recalled_hangs_on_the_tokens_alone() {
    for generator in all() {
        let (mut at_once, mut in_pieces) = (generator.new_trace(), generator.new_trace());
        at_once.push(&traced(&generator, 3, &[12]), 12).unwrap();
        in_pieces
            .push(&traced(&generator, 3, &[1, 4, 7]), 12)
            .unwrap();
        assert_eq!(at_once.tokens, in_pieces.tokens);
        let bits = |trace: &Trace, ranges: &[Range<usize>]| {
            state_bits(&generator.recall(trace, ranges).unwrap())
        };
        assert_eq!(
            bits(&at_once, &[2..7, 8..10]),
            bits(&in_pieces, &[2..4, 4..7, 8..10])
        );
        assert_ne!(bits(&at_once, &[2..5, 5..7]), bits(&at_once, &[2..5, 5..8]));
        // A second window's tokens are counted behind the first one's.
        at_once.push(&traced(&generator, 4, &[5]), 5).unwrap();
        let mut alone = generator.new_trace();
        alone.push(&traced(&generator, 4, &[5]), 5).unwrap();
        assert_eq!(
            bits(&at_once, &[12..14, 14..17]),
            bits(&alone, &[0..2, 2..5])
        );
    }
}

#[test]
fn a_window_that_keeps_nothing_counts_its_tokens_and_a_foreign_one_is_refused() {
    let generators = all();
    let mut trace = generators[0].new_trace();
    trace.push(&generators[0].new_window().unwrap(), 4).unwrap();
    assert_eq!((trace.bytes(), trace.length), (0, 4));
    let sites = generators[0].sites().len();
    let more = Trace::new(sites + 1, false);
    assert!(generators[0].recall(&more, &[]).is_err());
    assert!(
        more.clone()
            .push(&generators[0].new_window().unwrap(), 1)
            .is_err()
    );
}

#[test]
fn a_row_belongs_to_the_token_that_wrote_it() {
    for generator in all() {
        let skipped = usize::from(generator.config().skip_first);
        let mut trace = generator.new_trace();
        for seed in [5, 6] {
            trace.push(&traced(&generator, seed, &[6]), 6).unwrap();
        }
        let writes = |token: usize| {
            let recalled = generator.recall(&trace, std::slice::from_ref(&(token..token + 1)));
            !recalled.unwrap().is_empty()
        };
        for start in [0, 6] {
            assert_eq!(writes(start), skipped == 0);
            assert!(writes(start + skipped) && writes(start + 4));
        }
        // One token: the outer product of its key with itself has rank one.
        let state = generator
            .recall(&trace, std::slice::from_ref(&(2..3)))
            .unwrap();
        if let (_, Some(g)) = state.sums(0).unwrap() {
            let g = g.to_vec2::<f32>().unwrap();
            assert!(
                (g[0][0] * g[1][1] - g[0][1] * g[1][0]).abs() <= 1e-4 * (g[0][0] * g[1][1]).abs()
            );
        }
    }
}
