//! Laws of per-row cores: each row has its own core and nothing of its neighbours'.

use candle_core::{Device, Tensor};
use proptest::prelude::*;

use super::{CoreRows, CoreView, apply_cores, reference};
use crate::{Linear, noise::noise};

fn of(seed: u64, rows: usize, columns: usize) -> Tensor {
    Tensor::from_vec(noise(seed, rows * columns), (rows, columns), &Device::Cpu).unwrap()
}

fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn a_row_has_its_own_core_and_no_core_gives_zero(
        lens in proptest::collection::vec((0usize..9, 0usize..9, any::<bool>()), 1..5),
        r1 in 1usize..70, r2 in 1usize..70, q in 1usize..20,
    ) {
        let t: usize = lens.iter().map(|(gap, len, _)| gap + len).sum::<usize>() + 2;
        let a = of(1, t, r1);
        let cores: Vec<_> = (0..lens.len() as u64).map(|i| (of(10 + i, r1, r2), of(20 + i, r1, q), of(30 + i, r2, q))).collect();
        let (mut rows, mut want, mut start) = (Vec::new(), vec![0.0; t * r2], 0);
        for (&(gap, len, dense), (n, u, v)) in lens.iter().zip(&cores) {
            start += gap;
            let scale = 0.5 + start as f32;
            let core = if dense { CoreView::Dense(n) } else { CoreView::LowRank { u, v } };
            rows.push(CoreRows { start, len, core, scale });
            let own = values(&a.narrow(0, start, len).unwrap());
            let c = if dense {
                reference(&own, &values(n), r1, r2, scale)
            } else {
                let b = reference(&own, &values(u), r1, q, 1.0);
                reference(&b, &values(&v.t().unwrap().contiguous().unwrap()), q, r2, scale)
            };
            want[start * r2..][..len * r2].copy_from_slice(&c);
            start += len;
        }
        prop_assert_eq!(values(&apply_cores(&a, &rows, r2).unwrap()), want);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]
    #[test]
    fn a_core_in_8_bits_is_its_map_for_its_own_rows_beside_cores_in_floats(
        lens in proptest::collection::vec((0usize..4, 0usize..14, any::<bool>()), 1..5), blocks in 1usize..4, r2 in 1usize..70,
    ) {
        let r1 = 32 * blocks;
        let t: usize = lens.iter().map(|(gap, len, _)| gap + len).sum::<usize>() + 1;
        let a = of(1, t, r1);
        let cores: Vec<_> = (0..lens.len() as u64).map(|i| of(10 + i, r1, r2)).collect();
        let rounded: Vec<_> = cores.iter().map(|n| Linear::from_tensor(&n.t().unwrap()).unwrap().rounded()).collect();
        let (mut rows, mut want, mut start) = (Vec::new(), vec![0.0; t * r2], 0);
        for ((&(gap, len, rounds), n), map) in lens.iter().zip(&cores).zip(&rounded) {
            start += gap;
            let scale = 0.5 + start as f32;
            let core = if rounds { CoreView::Rounded(map) } else { CoreView::Dense(n) };
            rows.push(CoreRows { start, len, core, scale });
            let own = values(&a.narrow(0, start, len).unwrap());
            let c = if rounds {
                map.values(&own, len).iter().map(|c| c * scale).collect()
            } else {
                reference(&own, &values(n), r1, r2, scale)
            };
            want[start * r2..][..len * r2].copy_from_slice(&c);
            start += len;
        }
        prop_assert_eq!(values(&apply_cores(&a, &rows, r2).unwrap()), want);
    }
}

#[test]
fn many_rows_of_one_core_in_8_bits_are_its_map() {
    let (a, n) = (of(1, 600, 64), of(2, 64, 48));
    let map = Linear::from_tensor(&n.t().unwrap()).unwrap().rounded();
    let rows = [CoreRows {
        start: 3,
        len: 590,
        core: CoreView::Rounded(&map),
        scale: 1.0,
    }];
    let c = values(&apply_cores(&a, &rows, 48).unwrap());
    let own = values(&a.narrow(0, 3, 590).unwrap());
    assert_eq!(c[3 * 48..593 * 48], map.values(&own, 590));
    assert!(c[..3 * 48].iter().chain(&c[593 * 48..]).all(|&c| c == 0.0));
    let exact = Linear::from_tensor(&n.t().unwrap()).unwrap();
    let refused = [CoreRows {
        core: CoreView::Rounded(&exact),
        ..rows[0].clone()
    }];
    assert!(apply_cores(&a, &refused, 48).is_err());
    assert!(apply_cores(&a, &rows, 47).is_err());
}

#[test]
fn cores_of_other_ranks_and_rows_that_overlap_or_reach_out_are_refused() {
    let (a, n, u) = (of(1, 4, 8), of(2, 8, 6), of(3, 8, 2));
    let rows = |start, len, core| {
        [CoreRows {
            start,
            len,
            core,
            scale: 1.0,
        }]
    };
    assert!(apply_cores(&a, &rows(0, 4, CoreView::Dense(&n)), 6).is_ok());
    assert!(apply_cores(&a, &rows(1, 4, CoreView::Dense(&n)), 6).is_err());
    assert!(apply_cores(&a, &rows(usize::MAX, 2, CoreView::Dense(&n)), 6).is_err());
    assert!(apply_cores(&a, &rows(0, 4, CoreView::Dense(&n)), 5).is_err());
    assert!(apply_cores(&a, &rows(0, 4, CoreView::LowRank { u: &u, v: &u }), 6).is_err());
    let [first] = rows(0, 3, CoreView::Dense(&n));
    let [second] = rows(2, 2, CoreView::Dense(&n));
    assert!(
        apply_cores(&a, &[first, second], 6)
            .unwrap_err()
            .to_string()
            .contains("behind row 3")
    );
}
