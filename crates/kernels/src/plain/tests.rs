use candle_core::{DType, Device, Tensor, Var};
use proptest::prelude::*;

use super::*;
use crate::{AttentionRow, Linear, noise::noise};

/// Largest difference in parts of the largest value.
fn apart(a: &Tensor, b: &Tensor) -> f64 {
    let of = |x: &Tensor| -> Vec<f64> {
        let x = x.to_dtype(DType::F64).unwrap().flatten_all().unwrap();
        x.to_vec1().unwrap()
    };
    assert_eq!(a.shape(), b.shape());
    let (a, b) = (of(a), of(b));
    let size = a.iter().fold(1e-6, |size: f64, a| size.max(a.abs()));
    let most = a.iter().zip(&b).map(|(a, b)| (a - b).abs());
    most.fold(0.0, f64::max) / size
}

/// Holds `f` by plain operations on variables of `dtype` against the kernels, results and gradients of all variables.
fn like_the_kernels(
    dtype: DType,
    tolerance: f64,
    shapes: &[&[usize]],
    f: impl Fn(&[Tensor]) -> Result<Tensor>,
) {
    let run = |dtype: DType| {
        let variables: Vec<Var> = shapes
            .iter()
            .enumerate()
            .map(|(seed, shape)| {
                let values = noise(seed as u64 + 1, shape.iter().product());
                let values = Tensor::from_vec(values, *shape, &Device::Cpu).unwrap();
                Var::from_tensor(&values.to_dtype(dtype).unwrap()).unwrap()
            })
            .collect();
        let tensors: Vec<Tensor> = variables.iter().map(|v| v.as_tensor().clone()).collect();
        let y = f(&tensors).unwrap();
        let c = Tensor::from_vec(noise(99, y.elem_count()), y.shape(), &Device::Cpu).unwrap();
        let loss = (&y * c.to_dtype(y.dtype()).unwrap()).unwrap();
        let gradients = loss.sum_all().unwrap().backward().unwrap();
        let gradients: Vec<Tensor> = variables
            .iter()
            .map(|v| gradients.get(v).unwrap().clone())
            .collect();
        (y, gradients)
    };
    let ((want, want_back), (got, got_back)) = (run(DType::F32), run(dtype));
    assert!(apart(&want, &got) < tolerance, "{}", apart(&want, &got));
    for (number, (want, got)) in want_back.iter().zip(&got_back).enumerate() {
        let apart = apart(want, got);
        assert!(apart < tolerance, "gradient {number}: {apart}");
    }
}

/// In f64 the two differ by the kernels' own rounding, in bf16 by its 8 bits.
const TYPES: [(DType, f64); 2] = [(DType::F64, 2e-5), (DType::BF16, 6e-2)];

#[test]
fn norms_gates_sums_and_rotations_are_those_of_the_kernels() {
    let gain = Tensor::from_vec(noise(7, 24), 24, &Device::Cpu).unwrap();
    let angles = |seed| Tensor::from_vec(noise(seed, 9 * 4), (9, 4), &Device::Cpu).unwrap();
    let (cos, sin) = (angles(8), angles(9));
    for (dtype, tolerance) in TYPES {
        like_the_kernels(dtype, tolerance, &[&[5, 24]], |x| {
            crate::rms_norm(&x[0], Some(&gain), 1e-6)
        });
        like_the_kernels(dtype, tolerance, &[&[5, 24]], |x| {
            crate::rms_norm(&x[0], None, 1e-6)
        });
        like_the_kernels(dtype, tolerance, &[&[5, 24], &[5, 24]], |x| {
            crate::silu_mul(&x[0], &x[1])
        });
        like_the_kernels(dtype, tolerance, &[&[5, 24], &[5, 24]], |x| {
            crate::add(&x[0], &x[1])
        });
        like_the_kernels(dtype, tolerance, &[&[5, 24]], |x| {
            crate::add_bias(&x[0], &gain)
        });
        like_the_kernels(dtype, tolerance, &[&[5, 3, 8]], |x| {
            crate::rope(&x[0], &cos, &sin, &[0, 1, 8, 2, 2])
        });
    }
}

#[test]
fn products_are_those_of_the_kernels_and_frozen_weights_have_no_gradient() {
    let w = Tensor::from_vec(noise(7, 10 * 24), (10, 24), &Device::Cpu).unwrap();
    for (dtype, tolerance) in TYPES {
        // Weights of a map stay where they were made.
        let maps = [DType::F32, dtype].map(|_| Linear::from_tensor(&w).unwrap());
        like_the_kernels(dtype, tolerance, &[&[5, 24]], |x| {
            maps[usize::from(x[0].dtype() == dtype)].forward(&x[0])
        });
        like_the_kernels(dtype, tolerance, &[&[5, 24], &[10, 24]], |x| {
            crate::linear_trained(&x[0], &x[1])
        });
    }
    let map = Linear::from_tensor(&w).unwrap();
    let x = |dtype| Tensor::ones((2, 24), dtype, &Device::Cpu).unwrap();
    map.forward(&x(DType::F64)).unwrap();
    map.forward(&x(DType::F32)).unwrap();
    let error = map.forward(&x(DType::BF16)).unwrap_err().to_string();
    assert!(error.contains("F64") && error.contains("BF16"), "{error}");
}

#[test]
fn groups_of_any_size_give_the_kernels_sums_and_rows_their_own_core() {
    let groups = [vec![0..2, 5..9], vec![], vec![2..3, 3..4], vec![4..4, 4..5]];
    let shared = [vec![0..1, 1..2], vec![0..2, 3..7], vec![]];
    for (dtype, tolerance) in TYPES {
        like_the_kernels(dtype, tolerance, &[&[11, 6], &[4, 6, 5]], |x| {
            crate::apply_trained_cores(&x[0], &x[1], &groups)
        });
        for groups in [groups.as_slice(), &shared] {
            like_the_kernels(dtype, tolerance, &[&[11, 6], &[11, 5]], |x| {
                crate::outer_sums(&x[0], &x[1], groups)
            });
            like_the_kernels(dtype, tolerance, &[&[11, 6]], |x| {
                crate::gram_sums(&x[0], groups)
            });
        }
    }
}

#[test]
fn losses_are_those_of_the_kernels_with_a_teacher_and_without() {
    let w = Tensor::from_vec(noise(7, 40 * 12), (40, 12), &Device::Cpu).unwrap();
    let says = Tensor::from_vec(noise(8, 3 * 12), (3, 12), &Device::Cpu).unwrap();
    let targets = [3, 39, 0, 17, 3];
    let at = vec![None, Some((2, 1.0)), Some((0, 0.3)), None, Some((0, 0.0))];
    for (dtype, tolerance) in TYPES {
        let maps = [DType::F32, dtype].map(|_| Linear::from_tensor(&w).unwrap());
        // Without a teacher, with all of it, with four tokens of it.
        for (taught, few) in [(false, false), (true, false), (true, true)] {
            let scores = |h: &Tensor| {
                let teacher = Teacher {
                    says: if few {
                        let map = Linear::from_tensor(&w).unwrap();
                        Says::Likeliest(crate::likeliest(&map, &says, 4).unwrap())
                    } else {
                        Says::Hidden(says.to_dtype(h.dtype()).unwrap())
                    },
                    at: at.clone(),
                };
                let map = &maps[usize::from(h.dtype() == dtype)];
                crate::score(map, h, &targets, taught.then_some(&teacher))
            };
            like_the_kernels(dtype, tolerance, &[&[5, 12]], |x| Ok(scores(&x[0])?.loss));
            let h = Tensor::from_vec(noise(1, 5 * 12), (5, 12), &Device::Cpu).unwrap();
            let want = scores(&h).unwrap();
            let got = scores(&h.to_dtype(dtype).unwrap()).unwrap();
            let close = |a: &[f32], b: &[f32]| {
                a.iter()
                    .zip(b)
                    .all(|(a, b)| f64::from((a - b).abs()) < tolerance * 6.0)
            };
            assert!(close(&want.ce, &got.ce) && close(&want.kl, &got.kl));
            assert_eq!(want.right, got.right);
            assert_eq!(want.kl[1] > 0.0, taught);
        }
    }
}

#[test]
fn padding_is_bounded() {
    let sequence = |start: usize, len: usize| Sequence {
        start,
        len,
        position: 0,
        keys: (start..start + len).collect(),
    };
    let lengths: Vec<usize> = (0..200).map(|i| 1 + i * 37 % 300).collect();
    let groups = alike(lengths.iter().map(|len| sequence(0, *len)).collect());
    assert_eq!(groups.iter().map(Vec::len).sum::<usize>(), lengths.len());
    let padded = groups.iter().map(|group| {
        let longest = group.iter().map(|s| s.keys.len()).max().unwrap();
        longest * group.len()
    });
    let real: usize = lengths.iter().sum();
    assert!(padded.sum::<usize>() as f64 <= PADDED * real as f64);
    assert!(groups.len() < 30, "{}", groups.len());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn attention_is_the_kernels_whatever_the_sequences(
        lengths in prop::collection::vec(1..7_usize, 1..6),
        window in prop::option::of(1..5_usize),
        per in 1..4_usize,
    ) {
        let (mut start, mut sequences) = (1, Vec::new());
        for len in lengths {
            sequences.push((start, len));
            start += len;
        }
        // The first and the last row are nobody's.
        let (t, heads) = (start + 1, 2 * per);
        for (dtype, tolerance) in TYPES {
            like_the_kernels(dtype, tolerance, &[&[t, heads, 8], &[t, 2, 8], &[t, 2, 8]], |x| {
                crate::self_attention(&x[0], &x[1], &x[2], &sequences, 0.3, window)
            });
        }
    }

    #[test]
    fn a_cache_serves_rows_as_the_kernels_cache_does(
        before in 0..5_usize,
        len in 1..6_usize,
        window in prop::option::of(1..5_usize),
    ) {
        let shape = (4, 3, 2, 8);
        let blocks = [3_u32, 1, 0, 2];
        let slots: Vec<u32> = (0..before + len).map(|at| blocks[at / 3] * 3 + at as u32 % 3).collect();
        let noisy = |seed, t: usize, heads: usize| {
            Tensor::from_vec(noise(seed, t * heads * 8), (t, heads, 8), &Device::Cpu).unwrap()
        };
        let run = |dtype: DType| {
            let caches = [1, 2].map(|seed| {
                let cache = Tensor::zeros(shape, dtype, &Device::Cpu).unwrap();
                let rows = noisy(seed, before + len, 2).to_dtype(dtype).unwrap();
                crate::kv_append(&cache, &rows, &slots).unwrap();
                cache
            });
            let q = noisy(3, len, 4).to_dtype(dtype).unwrap();
            let row = AttentionRow { start: 0, len, position: before, blocks: &blocks };
            crate::paged_attention(&q, &caches[0], &caches[1], &[row], 0.3, window).unwrap()
        };
        let want = run(DType::F32);
        for (dtype, tolerance) in TYPES {
            prop_assert!(apart(&want, &run(dtype)) < tolerance);
        }
    }
}
