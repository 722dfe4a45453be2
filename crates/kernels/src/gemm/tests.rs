//! The product at odd sizes, in both layouts, against its reference.

use std::sync::Mutex;

use proptest::prelude::*;

use super::{Begin, Product, Right, products, reference, spread};
use crate::noise::noise;

/// x, w, out, K, N.
type Operands = (Vec<f32>, Vec<f32>, Vec<f32>, usize, usize);

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn products_are_their_reference_bit_for_bit(
        sizes in proptest::collection::vec((0usize..40, 0usize..300, 1usize..60), 1..4),
        columns: bool,
        again: bool,
    ) {
        let begin = if again { Begin::Out } else { Begin::Zero };
        let data: Vec<_> = sizes.iter().map(|&(m, k, n)| (noise(1, m * k), noise(2, k * n), noise(3, m * n), k, n)).collect();
        let of = |data: &mut Vec<Operands>, run: &dyn Fn(&mut [Product<'_>])| {
            let mut all: Vec<_> = data
                .iter_mut()
                .map(|(x, w, out, k, n)| {
                    let w = if columns { Right::Columns(w) } else { Right::Steps(w) };
                    Product { x, w, out, k: *k, n: *n, begin }
                })
                .collect();
            run(&mut all);
        };
        let (mut fast, mut plain) = (data.clone(), data);
        of(&mut fast, &products);
        of(&mut plain, &|all| all.iter_mut().for_each(reference));
        for (fast, plain) in fast.iter().zip(&plain) {
            prop_assert_eq!(&fast.2, &plain.2);
        }
    }

    #[test]
    fn every_item_is_run_once(items in 0usize..500, grain in 1usize..5, work in 0usize..100_000_000) {
        let seen = Mutex::new(vec![0; items]);
        spread(items, grain, work, |range| {
            assert!(range.start.is_multiple_of(grain) || range.is_empty());
            for item in range {
                seen.lock().unwrap()[item] += 1;
            }
        });
        prop_assert_eq!(seen.into_inner().unwrap(), vec![1; items]);
    }
}

#[test]
fn rows_that_take_several_parts_are_the_reference_too() {
    let (m, k, n) = (531, 300, 40);
    let (x, w) = (noise(1, m * k), noise(2, k * n));
    let (mut fast, mut plain) = (vec![0.0; m * n], vec![0.0; m * n]);
    products(&mut [Product {
        x: &x,
        w: Right::Steps(&w),
        out: &mut fast,
        k,
        n,
        begin: Begin::Zero,
    }]);
    reference(&mut Product {
        x: &x,
        w: Right::Steps(&w),
        out: &mut plain,
        k,
        n,
        begin: Begin::Zero,
    });
    assert_eq!(fast, plain);
}
