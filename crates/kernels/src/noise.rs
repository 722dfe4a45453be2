//! Numbers for tests: reproducible, around zero, without structure.

/// n values in -1 .. 1 from a seed (splitmix64).
pub(crate) fn noise(seed: u64, n: usize) -> Vec<f32> {
    (1..=n as u64)
        .map(|i| {
            let mut z = seed
                .wrapping_mul(0x2545_f491_4f6c_dd1d)
                .wrapping_add(i.wrapping_mul(0x9e37_79b9_7f4a_7c15));
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            ((z ^ (z >> 31)) >> 40) as f32 / 8_388_608.0 - 1.0
        })
        .collect()
}
