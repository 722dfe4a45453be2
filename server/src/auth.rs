//! Who calls: bearer keys and the tenants behind them.
//!
//! Keys are kept and compared as hashes, so neither the time of a comparison nor a dump of this table tells one. Start at
//! [`Keys::tenant`].

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use engine::TenantId;
use tonic::metadata::MetadataMap;

use crate::status::Error;

/// The fewest bytes of a key.
const KEY_BYTES: usize = 16;

/// A tenant: every look-up is scoped by it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Tenant(Arc<str>);

impl Tenant {
    /// The tenant of this name.
    #[must_use]
    pub fn new(name: &str) -> Self {
        Self(name.into())
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.0
    }

    /// Its number, of its name. Who runs the server chose the names, so nobody looks for two with one number.
    #[must_use]
    pub fn id(&self) -> TenantId {
        let hash = blake3::hash(self.0.as_bytes());
        let (number, _) = hash
            .as_bytes()
            .split_first_chunk()
            .unwrap_or((&[0; 8], &[]));
        TenantId(u64::from_le_bytes(*number))
    }
}

/// Why a key cannot be used; none of them shows the key.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum KeysError {
    /// A key that can be guessed.
    #[error("a key of tenant `{tenant}` in `keys` is shorter than {KEY_BYTES} bytes")]
    Short {
        /// Its tenant.
        tenant: String,
    },
    /// A key that no header can carry.
    #[error("a key of tenant `{tenant}` in `keys` holds something else than visible ASCII")]
    Unprintable {
        /// Its tenant.
        tenant: String,
    },
    /// A key without a tenant.
    #[error("a key in `keys` has an empty tenant")]
    NoTenant,
}

/// The keys of a server.
#[derive(Clone, Debug)]
pub struct Keys {
    tenants: HashMap<blake3::Hash, Tenant>,
    anyone: Tenant,
}

impl Keys {
    /// Keys with their tenants' names.
    ///
    /// # Errors
    /// [`KeysError`] if one cannot be used.
    pub fn new(keys: &BTreeMap<String, String>) -> Result<Self, KeysError> {
        let mut tenants = HashMap::new();
        for (key, tenant) in keys {
            if tenant.is_empty() {
                return Err(KeysError::NoTenant);
            }
            if key.len() < KEY_BYTES {
                return Err(KeysError::Short {
                    tenant: tenant.clone(),
                });
            }
            if !key.bytes().all(|byte| byte.is_ascii_graphic()) {
                return Err(KeysError::Unprintable {
                    tenant: tenant.clone(),
                });
            }
            tenants.insert(blake3::hash(key.as_bytes()), Tenant::new(tenant));
        }
        Ok(Self {
            tenants,
            anyone: Tenant::new(""),
        })
    }

    /// Whether there are none: then everybody is one tenant.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.tenants.is_empty()
    }

    /// The tenant behind a call's `authorization: Bearer <key>`.
    ///
    /// # Errors
    /// [`Error::Unauthenticated`] without a key, or with one that is not ours.
    pub fn tenant(&self, metadata: &MetadataMap) -> Result<Tenant, Error> {
        if self.is_empty() {
            return Ok(self.anyone.clone());
        }
        let header = metadata
            .get("authorization")
            .and_then(|value| value.to_str().ok());
        let (scheme, key) = header
            .and_then(|header| header.split_once(' '))
            .ok_or(Error::Unauthenticated)?;
        if !scheme.eq_ignore_ascii_case("bearer") {
            return Err(Error::Unauthenticated);
        }
        self.tenants
            .get(&blake3::hash(key.trim().as_bytes()))
            .cloned()
            .ok_or(Error::Unauthenticated)
    }
}
