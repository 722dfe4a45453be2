//! KV blocks: who holds which part of the cache.
//!
//! Numbers only; the tensors are `lm`'s. Blocks move between the free list and [`Blocks`], which are given back by
//! name: nothing is copied, nothing is shared. Start at [`BlockAllocator::grow`].

#[cfg(test)]
mod tests;

/// The blocks of one sequence, in order.
#[derive(Debug, Default)]
pub(crate) struct Blocks(Vec<u32>);

impl Blocks {
    pub(crate) fn as_slice(&self) -> &[u32] {
        &self.0
    }

    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }
}

/// The free blocks of a cache.
#[derive(Debug)]
pub(crate) struct BlockAllocator {
    /// Last in, first out: memory that was touched is used again before new memory.
    free: Vec<u32>,
    total: usize,
    block_size: usize,
}

impl BlockAllocator {
    /// A cache of `blocks` blocks of `block_size` tokens, all free. `Config::check` has seen both.
    pub(crate) fn new(blocks: usize, block_size: usize) -> Self {
        let free: Vec<u32> = (0..u32::try_from(blocks).unwrap_or(u32::MAX))
            .rev()
            .collect();
        Self {
            total: free.len(),
            free,
            block_size,
        }
    }

    /// Blocks that hold so many tokens.
    pub(crate) fn blocks_for(&self, tokens: usize) -> usize {
        tokens.div_ceil(self.block_size)
    }

    /// Tokens that the whole cache holds.
    pub(crate) fn capacity_tokens(&self) -> usize {
        self.total * self.block_size
    }

    pub(crate) fn free(&self) -> usize {
        self.free.len()
    }

    pub(crate) fn total(&self) -> usize {
        self.total
    }

    /// How many blocks are missing for `blocks` to hold so many tokens.
    pub(crate) fn missing(&self, blocks: &Blocks, tokens: usize) -> usize {
        self.blocks_for(tokens).saturating_sub(blocks.len())
    }

    /// Lets `blocks` hold so many tokens. All or nothing; says whether it could.
    pub(crate) fn grow(&mut self, blocks: &mut Blocks, tokens: usize) -> bool {
        let missing = self.missing(blocks, tokens);
        let Some(rest) = self.free.len().checked_sub(missing) else {
            return false;
        };
        blocks.0.extend(self.free.drain(rest..).rev());
        true
    }

    /// Takes all blocks of a sequence back.
    pub(crate) fn release(&mut self, blocks: &mut Blocks) {
        self.free.extend(blocks.0.drain(..).rev());
    }
}
