//! Laws of attention over a paged cache: a query is itself in any batch, chunk and tile.

use candle_core::{Device, Tensor};
use proptest::prelude::*;

use super::{AttentionRow, kv_append, paged_attention, reference, self_attention};
use crate::{
    gradients::{check, var},
    noise::noise,
};

fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

/// One sequence in a cache whose blocks lie in disorder, beside memory that must not be read.
struct Sequence {
    keys: Tensor,
    values: Tensor,
    /// K and V [L, Hkv, Dh] as they were appended.
    rows: [Vec<f32>; 2],
    blocks: Vec<u32>,
    kv_heads: usize,
    dh: usize,
}

impl Sequence {
    fn new(seed: u64, length: usize, kv_heads: usize, dh: usize, block_size: usize) -> Self {
        let count = length.div_ceil(block_size);
        // Every other block from the last one down; those between hold NaN.
        let total = 2 * count + 3;
        let blocks: Vec<u32> = (0..count).map(|i| (total - 1 - 2 * i) as u32).collect();
        let of = |seed| noise(seed, length * kv_heads * dh);
        let rows = [of(seed), of(seed + 1)];
        let slots: Vec<u32> = (0..length)
            .map(|i| blocks[i / block_size] * block_size as u32 + (i % block_size) as u32)
            .collect();
        let [keys, values] = [&rows[0], &rows[1]].map(|rows| {
            let cache = Tensor::full(f32::NAN, (total, block_size, kv_heads, dh), &Device::Cpu)
                .unwrap()
                .contiguous()
                .unwrap();
            let rows = Tensor::from_slice(rows, (length, kv_heads, dh), &Device::Cpu).unwrap();
            kv_append(&cache, &rows, &slots).unwrap();
            cache
        });
        Self {
            keys,
            values,
            rows,
            blocks,
            kv_heads,
            dh,
        }
    }

    fn attend(
        &self,
        q: &Tensor,
        start: usize,
        len: usize,
        position: usize,
        window: Option<usize>,
    ) -> Vec<f32> {
        let row = AttentionRow {
            start,
            len,
            position,
            blocks: &self.blocks,
        };
        let out =
            values(&paged_attention(q, &self.keys, &self.values, &[row], 0.3, window).unwrap());
        let width = out.len() / q.dim(0).unwrap();
        out[start * width..][..len * width].to_vec()
    }

    /// The head of the query at `position`, by the reference.
    fn want(&self, q: &[f32], position: usize, kv_head: usize, window: Option<usize>) -> Vec<f64> {
        let first = window.map_or(0, |window| (position + 1).saturating_sub(window));
        let of = |rows| -> Vec<&[f32]> {
            let rows: &Vec<f32> = rows;
            (first..=position)
                .map(|key| &rows[(key * self.kv_heads + kv_head) * self.dh..][..self.dh])
                .collect()
        };
        reference(q, &of(&self.rows[0]), &of(&self.rows[1]), 0.3)
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn a_query_is_its_reference_at_any_size(
        length in 1usize..90, tail in 1usize..90, kv_heads in 1usize..4, group in 1usize..5,
        dh in 1usize..36, block_size in 1usize..40, window in proptest::option::of(1usize..60),
    ) {
        let len = tail.min(length);
        let position = length - len;
        let sequence = Sequence::new(3, length, kv_heads, dh, block_size);
        let q = Tensor::from_vec(noise(9, len * kv_heads * group * dh), (len, kv_heads * group, dh), &Device::Cpu).unwrap();
        let out = sequence.attend(&q, 0, len, position, window);
        for (i, (out, q)) in out.chunks_exact(dh).zip(values(&q).chunks_exact(dh)).enumerate() {
            let (query, head) = (i / (kv_heads * group), i % (kv_heads * group));
            for (out, want) in out.iter().zip(sequence.want(q, position + query, head / group, window)) {
                prop_assert!((f64::from(*out) - want).abs() < 5e-6, "{} for {} at {} {}", out, want, query, head);
            }
        }
    }

    #[test]
    fn any_cut_into_calls_gives_the_bits_of_one_call(
        length in 2usize..400, cut in 1usize..400, block_size in 1usize..40, window in proptest::option::of(1usize..300),
    ) {
        let cut = cut.min(length - 1);
        let sequence = Sequence::new(5, length, 2, 16, block_size);
        let q = Tensor::from_vec(noise(9, length * 6 * 16), (length, 6, 16), &Device::Cpu).unwrap();
        let once = sequence.attend(&q, 0, length, 0, window);
        let parts = [(0, cut), (cut, length - cut - 1), (length - 1, 1)];
        let parts: Vec<f32> = parts.into_iter().flat_map(|(start, len)| sequence.attend(&q, start, len, start, window)).collect();
        prop_assert_eq!(bits(&once), bits(&parts));
    }
}

#[test]
fn rows_of_a_ragged_call_are_the_rows_alone_and_rows_that_no_entry_names_are_zero() {
    let sequence = Sequence::new(5, 70, 2, 32, 16);
    let q = Tensor::from_vec(noise(9, 40 * 4 * 32), (40, 4, 32), &Device::Cpu).unwrap();
    // The same sequence at several positions, out of order, rows 0 and 30 .. 40 unnamed.
    let spans = [(20, 10, 60), (1, 1, 69), (2, 18, 5), (5, 0, 0)];
    let rows: Vec<_> = spans
        .iter()
        .map(|&(start, len, position)| AttentionRow {
            start,
            len,
            position,
            blocks: &sequence.blocks,
        })
        .collect();
    let out =
        values(&paged_attention(&q, &sequence.keys, &sequence.values, &rows, 0.3, None).unwrap());
    for (start, len, position) in spans {
        assert_eq!(
            bits(&sequence.attend(&q, start, len, position, None)),
            bits(&out[start * 128..][..len * 128])
        );
    }
    assert!(out[..128].iter().chain(&out[30 * 128..]).all(|&v| v == 0.0));
}

#[test]
fn a_long_sequence_in_many_tiles_is_its_reference() {
    let sequence = Sequence::new(5, 3000, 1, 16, 64);
    let q = Tensor::from_vec(noise(9, 40 * 3 * 16), (40, 3, 16), &Device::Cpu).unwrap();
    let out = sequence.attend(&q, 0, 40, 2960, None);
    for (i, (out, q)) in out
        .chunks_exact(16)
        .zip(values(&q).chunks_exact(16))
        .enumerate()
    {
        for (out, want) in out.iter().zip(sequence.want(q, 2960 + i / 3, 0, None)) {
            assert!((f64::from(*out) - want).abs() < 1e-5);
        }
    }
}

#[test]
fn rows_that_reach_out_of_queries_blocks_or_cache_are_refused() {
    let sequence = Sequence::new(5, 20, 1, 16, 8);
    let q = Tensor::from_vec(noise(9, 4 * 16), (4, 1, 16), &Device::Cpu).unwrap();
    let attend = |rows: &[AttentionRow<'_>], window| {
        paged_attention(&q, &sequence.keys, &sequence.values, rows, 1.0, window)
            .map(|_| ())
            .map_err(|error| error.to_string())
    };
    let row = |start, len, position, blocks| AttentionRow {
        start,
        len,
        position,
        blocks,
    };
    let blocks = sequence.blocks.as_slice();
    assert!(attend(&[row(0, 4, 20, blocks)], None).is_ok());
    assert!(
        attend(&[row(0, 4, 21, blocks)], None)
            .unwrap_err()
            .contains("in 3 blocks of 8")
    );
    assert!(attend(&[row(0, 4, usize::MAX, blocks)], None).is_err());
    assert!(
        attend(&[row(1, 4, 0, blocks)], None)
            .unwrap_err()
            .contains("of 4 rows")
    );
    assert!(attend(&[row(usize::MAX, 4, 0, blocks)], None).is_err());
    assert!(
        attend(&[row(0, 4, 0, &[99])], None)
            .unwrap_err()
            .contains("block 99")
    );
    assert!(
        attend(&[row(0, 2, 0, blocks), row(1, 2, 0, blocks)], None)
            .unwrap_err()
            .contains("overlap")
    );
    assert!(attend(&[row(0, 4, 0, blocks)], Some(0)).is_err());
}

#[test]
fn an_append_out_of_the_cache_or_of_another_shape_leaves_it_untouched() {
    let cache = Tensor::zeros((2, 4, 1, 3), candle_core::DType::F32, &Device::Cpu).unwrap();
    let rows = Tensor::ones((2, 1, 3), candle_core::DType::F32, &Device::Cpu).unwrap();
    assert!(
        kv_append(&cache, &rows, &[1, 8])
            .unwrap_err()
            .to_string()
            .contains("slot 8 of a cache of 8")
    );
    assert!(kv_append(&cache, &rows, &[1]).is_err());
    assert!(kv_append(&cache, &rows.reshape((2, 3, 1)).unwrap(), &[1, 2]).is_err());
    assert_eq!(values(&cache), [0.0; 24]);
    kv_append(&cache, &rows, &[7, 0]).unwrap();
    let written = values(&cache);
    assert!(written[..3] == [1.0; 3] && written[21..] == [1.0; 3] && written[3..21] == [0.0; 18]);
}

#[test]
fn attention_to_its_own_keys_is_paged_attention_bit_for_bit() {
    for window in [None, Some(5)] {
        let (q, k, v) = (
            var(1, &[40, 6, 8]),
            var(2, &[40, 2, 8]),
            var(3, &[40, 2, 8]),
        );
        let sequences = [(0, 33), (33, 7)];
        let own = values(&self_attention(&q, &k, &v, &sequences, 0.3, window).unwrap());
        for (start, len) in sequences {
            let blocks = [1, 3, 0];
            let cache = |rows: &Tensor| {
                let cache = Tensor::zeros((4, 16, 2, 8), candle_core::DType::F32, &Device::Cpu);
                let cache = cache.unwrap();
                let slots: Vec<u32> = (0..len)
                    .map(|i| blocks[i / 16] * 16 + (i % 16) as u32)
                    .collect();
                kv_append(&cache, &rows.narrow(0, start, len).unwrap(), &slots).unwrap();
                cache
            };
            let row = AttentionRow {
                start: 0,
                len,
                position: 0,
                blocks: &blocks,
            };
            let alone = q.narrow(0, start, len).unwrap();
            let paged =
                paged_attention(&alone, &cache(&k), &cache(&v), &[row], 0.3, window).unwrap();
            assert_eq!(bits(&values(&paged)), bits(&own[start * 48..][..len * 48]));
        }
    }
}

#[test]
fn gradients_of_attention_are_its_differences() {
    for window in [None, Some(3)] {
        let (q, k, v) = (var(1, &[9, 4, 4]), var(2, &[9, 2, 4]), var(3, &[9, 2, 4]));
        check(&[&q, &k, &v], 4e-3, || {
            self_attention(&q, &k, &v, &[(0, 6), (7, 2)], 0.5, window)
        });
    }
}

#[test]
fn sequences_that_overlap_or_reach_beyond_their_rows_are_refused() {
    let (q, k) = (var(1, &[9, 4, 4]), var(2, &[9, 2, 4]));
    for sequences in [
        [(0, 6), (5, 2)],
        [(0, 6), (7, 3)],
        [(0, 6), (usize::MAX, 3)],
    ] {
        assert!(self_attention(&q, &k, &k, &sequences, 0.5, None).is_err());
    }
    assert!(self_attention(&q, &k, &k, &[(0, 9)], 0.5, Some(0)).is_err());
}
