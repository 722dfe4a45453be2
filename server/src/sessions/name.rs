//! Names that the server gives: sessions and page tokens.
//!
//! A session's name tells when it was created and nothing else: 48 bits of time and 80 bits that cannot be guessed (a keyed
//! hash of a counter; the key comes from the randomness that the standard library seeds its hash maps with). A page token is
//! bound to its tenant by the same key. Start at [`Names::next`].

use std::{
    hash::{BuildHasher, RandomState},
    sync::atomic::{AtomicU64, Ordering},
    time::{SystemTime, UNIX_EPOCH},
};

use crate::status::{Error, Violation};

/// Crockford's base 32, in small letters.
const LETTERS: &[u8; 32] = b"0123456789abcdefghjkmnpqrstvwxyz";
/// Letters of a name, behind its `s_`.
const LENGTH: u32 = 26;

/// Gives names.
pub(super) struct Names {
    key: [u8; 32],
    count: AtomicU64,
}

impl Default for Names {
    fn default() -> Self {
        let mut key = [0; 32];
        for bytes in key.chunks_mut(8) {
            bytes.copy_from_slice(&RandomState::new().hash_one(0_u8).to_le_bytes());
        }
        Self {
            key,
            count: AtomicU64::new(0),
        }
    }
}

impl Names {
    /// A name that no one has: `s_` and 26 characters.
    pub(super) fn next(&self, now: SystemTime) -> String {
        let count = self.count.fetch_add(1, Ordering::Relaxed);
        let hash = blake3::keyed_hash(&self.key, &count.to_le_bytes());
        let mut random = [0; 16];
        random.copy_from_slice(&hash.as_bytes()[..16]);
        let ms = now
            .duration_since(UNIX_EPOCH)
            .map_or(0, |since| since.as_millis());
        let number = (ms << 80) | (u128::from_le_bytes(random) >> 48); // 26 letters hold 130 bits
        let letter = |place: u32| char::from(LETTERS[(number >> (5 * place) & 31) as usize]);
        let letters: String = (0..LENGTH).rev().map(letter).collect();
        format!("s_{letters}")
    }

    /// The token of the page behind session number `last`.
    pub(super) fn page(&self, tenant: &str, last: u64) -> String {
        let seal = self.seal(tenant, last);
        format!("{last:x}-{}", &seal.to_hex()[..16])
    }

    /// The number in a token.
    pub(super) fn read_page(&self, tenant: &str, token: &str) -> Result<u64, Error> {
        let number = token
            .split_once('-')
            .and_then(|(number, _)| u64::from_str_radix(number, 16).ok());
        number
            .filter(|last| self.page(tenant, *last) == token)
            .ok_or_else(|| {
                Error::Invalid(vec![Violation::new(
                    "page_token",
                    "is not a token of this server for this caller",
                )])
            })
    }

    fn seal(&self, tenant: &str, last: u64) -> blake3::Hash {
        let mut hasher = blake3::Hasher::new_keyed(&self.key);
        hasher.update(b"page");
        hasher.update(&last.to_le_bytes());
        hasher.update(tenant.as_bytes());
        hasher.finalize()
    }
}
