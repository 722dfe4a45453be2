//! Laws of the accumulated outer products: in place, token after token, cut anywhere.

use candle_core::{Device, Tensor};
use proptest::prelude::*;

use super::{accumulate_outer, reference};
use crate::noise::noise;

fn of(seed: u64, rows: usize, columns: usize) -> Tensor {
    Tensor::from_vec(noise(seed, rows * columns), (rows, columns), &Device::Cpu).unwrap()
}

fn bits(tensor: &Tensor) -> Vec<u32> {
    let values: Vec<f32> = tensor.flatten_all().unwrap().to_vec1().unwrap();
    values.iter().map(|v| v.to_bits()).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn any_cut_of_the_tokens_gives_the_bits_of_one_call(
        t in 0usize..300, cuts in proptest::collection::vec(0usize..300, 0..4), r1 in 1usize..50, r2 in 1usize..50,
    ) {
        let (k, v) = (of(1, t, r1), of(2, t, r2));
        let (once, often) = (of(3, r1, r2), of(3, r1, r2));
        accumulate_outer(&[(&once, &v)], &k, 0..t).unwrap();
        let mut cuts: Vec<_> = cuts.into_iter().map(|cut| cut.min(t)).chain([0, t]).collect();
        cuts.sort_unstable();
        for pair in cuts.windows(2) {
            accumulate_outer(&[(&often, &v)], &k, pair[0]..pair[1]).unwrap();
        }
        prop_assert_eq!(bits(&once), bits(&often));
        let mut want = noise(3, r1 * r2);
        reference(&mut want, &noise(1, t * r1), &noise(2, t * r2), r1, r2);
        prop_assert_eq!(bits(&once), want.iter().map(|v| v.to_bits()).collect::<Vec<_>>());
    }
}

#[test]
fn several_sums_take_the_same_keys_and_a_key_may_be_a_value() {
    let (k, v) = (of(1, 20, 17), of(4, 20, 5));
    let (squares, products) = (of(2, 17, 17), of(3, 17, 5));
    accumulate_outer(&[(&products, &v), (&squares, &k)], &k, 3..20).unwrap();
    let (keys, values) = (noise(1, 20 * 17), noise(4, 20 * 5));
    let mut want = noise(2, 17 * 17);
    reference(&mut want, &keys[3 * 17..], &keys[3 * 17..], 17, 17);
    assert_eq!(
        bits(&squares),
        want.iter().map(|v| v.to_bits()).collect::<Vec<_>>()
    );
    let mut want = noise(3, 17 * 5);
    reference(&mut want, &keys[3 * 17..], &values[3 * 5..], 17, 5);
    assert_eq!(
        bits(&products),
        want.iter().map(|v| v.to_bits()).collect::<Vec<_>>()
    );
}

#[test]
fn other_shapes_and_rows_beyond_the_tokens_leave_all_sums_untouched() {
    let (acc, k, v) = (of(1, 8, 6), of(2, 5, 8), of(3, 5, 6));
    let before = bits(&acc);
    let call = |sums: &[(&Tensor, &Tensor)], k: &Tensor, rows| accumulate_outer(sums, k, rows);
    assert!(call(&[(&acc, &k)], &v, 0..5).is_err());
    assert!(call(&[(&acc, &v), (&acc, &k)], &k, 0..5).is_err());
    assert!(call(&[(&acc, &v)], &k, 2..6).is_err());
    #[expect(
        clippy::reversed_empty_ranges,
        reason = "what a confused caller could pass"
    )]
    let reversed = 3..2;
    assert!(call(&[(&acc, &v)], &k, reversed).is_err());
    assert_eq!(bits(&acc), before);
}
