//! Names of prefixes: what must be the same for keys and values to be the same, bit for bit.
//!
//! A block's name is a chain of hashes: over whose it is, what it was computed with (the state digest and the strength of the
//! imprint; neither for the bare model) and all tokens up to its end. KV depends on nothing else: no kernel's result
//! depends on the batch or on how a sequence was cut. The frozen model is no part of it, as a cache has one. Tenants never
//! share: who could would learn from the time to a first token what others ask. Start at [`PrefixKey::root`].

#[cfg(test)]
mod tests;

use crate::ids::{Digest, TenantId, TokenId};

/// The name of a prefix.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct PrefixKey([u8; 32]);

impl PrefixKey {
    /// Of no token. `adapter` is the digest of what the core was read out of, and its strength; none is the bare model.
    pub(crate) fn root(tenant: TenantId, adapter: Option<(Digest, f32)>) -> Self {
        let mut hasher = blake3::Hasher::new();
        hasher
            .update(b"imprint prefix 1")
            .update(&tenant.0.to_le_bytes());
        if let Some((Digest(digest), scale)) = adapter {
            hasher.update(&digest).update(&scale.to_le_bytes());
        }
        Self(*hasher.finalize().as_bytes())
    }

    /// Of the prefix before it and these tokens.
    pub(crate) fn then(self, tokens: &[TokenId]) -> Self {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&self.0);
        for token in tokens {
            hasher.update(&token.0.to_le_bytes());
        }
        Self(*hasher.finalize().as_bytes())
    }
}
