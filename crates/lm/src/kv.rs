//! The paged cache of keys and values.
//!
//! Only memory: which sequence owns which block is the caller's knowledge. Start at [`KvCache`].

use candle_core::{DType, Device, Tensor};

use crate::{Config, Error};

/// Paged KV of all layers: per layer K and V [blocks, block_size, Hkv, Dh] f32. Memory is touched only as
/// blocks are used.
#[derive(Debug)]
pub struct KvCache {
    layers: Vec<LayerCache>,
    blocks: usize,
    block_size: usize,
}

/// K and V of a layer, [blocks, block_size, Hkv, Dh] each.
#[derive(Debug)]
pub(crate) struct LayerCache {
    pub(crate) k: Tensor,
    pub(crate) v: Tensor,
}

impl KvCache {
    /// A cache of `blocks` blocks of `block_size` tokens for a model of this shape.
    ///
    /// # Errors
    /// [`Error::Cache`] if a size is 0 or the whole is beyond what can be addressed.
    pub fn new(config: &Config, blocks: usize, block_size: usize) -> Result<Self, Error> {
        Self::of(config, blocks, block_size, &(Device::Cpu, DType::F32))
    }

    /// The same on a device and in a type.
    pub(crate) fn of(
        config: &Config,
        blocks: usize,
        block_size: usize,
        (device, dtype): &(Device, DType),
    ) -> Result<Self, Error> {
        let refused = |what: &str| Error::Cache {
            what: what.to_owned(),
        };
        if blocks == 0 || block_size == 0 {
            return Err(refused("a size of 0"));
        }
        let slots = blocks
            .checked_mul(block_size)
            .filter(|&slots| u32::try_from(slots).is_ok());
        let slots = slots.ok_or_else(|| refused("more tokens than a slot number can name"))?;
        let bytes = slots
            .checked_mul(config.kv_features())
            .and_then(|n| n.checked_mul(config.layers))
            .and_then(|n| n.checked_mul(4));
        if bytes.is_none_or(|bytes| bytes > isize::MAX as usize) {
            return Err(refused("more bytes than can be addressed"));
        }
        // One storage for all layers' K and one for their V: what is as large as this the allocator takes fresh from the system, and
        // leaves untouched. A layer by itself (12.6 MB by default) would lie in memory that loading has used and freed, and be cleared:
        // 160 MB more of resident memory at the start, and 0.2 s.
        let shape = (
            config.layers,
            blocks,
            block_size,
            config.kv_heads,
            config.head_dim,
        );
        let k = Tensor::zeros(shape, *dtype, device)?;
        let v = Tensor::zeros(shape, *dtype, device)?;
        let layers = (0..config.layers)
            .map(|layer| {
                Ok(LayerCache {
                    k: k.get(layer)?,
                    v: v.get(layer)?,
                })
            })
            .collect::<Result<_, Error>>()?;
        Ok(Self {
            layers,
            blocks,
            block_size,
        })
    }

    /// Tokens of a block.
    pub fn block_size(&self) -> usize {
        self.block_size
    }

    /// Number of blocks.
    pub fn blocks(&self) -> usize {
        self.blocks
    }

    /// Bytes of one block over all layers, K and V.
    pub fn block_bytes(config: &Config, block_size: usize) -> usize {
        block_size
            .saturating_mul(config.kv_features())
            .saturating_mul(8)
            .saturating_mul(config.layers)
    }

    /// The layers' caches, if they are of this model's shape.
    pub(crate) fn layers(&self, config: &Config) -> Result<&[LayerCache], Error> {
        let fits = |layer: &LayerCache| {
            layer
                .k
                .dims4()
                .is_ok_and(|(_, _, heads, dim)| (heads, dim) == (config.kv_heads, config.head_dim))
        };
        if self.layers.len() != config.layers || !self.layers.iter().all(fits) {
            return Err(Error::Cache {
                what: "made for another model".to_owned(),
            });
        }
        Ok(&self.layers)
    }
}
