//! KV blocks: who holds which part of the cache, and what is worth keeping of what nobody holds.
//!
//! Numbers only; the tensors are `lm`'s. A block that was filled with a known prefix is *named*; others with the same prefix
//! hold it too instead of computing it. A block that nobody holds is free; if it has a name it is kept for the next one who
//! asks, until its memory is needed: then the one that rested longest goes first, ends of prefixes before their beginnings.
//! A named block is never written again while it has its name. Start at [`BlockAllocator::grow`].

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, HashMap};

use crate::prefix::PrefixKey;

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

/// What is known of a block.
#[derive(Clone, Copy, Debug, Default)]
struct Block {
    holders: u32,
    name: Option<PrefixKey>,
    /// When it was let go, while it is kept without a holder.
    since: u64,
}

/// All blocks of a cache.
#[derive(Debug)]
pub(crate) struct BlockAllocator {
    blocks: Vec<Block>,
    /// Those with neither holder nor name. Last in, first out: memory that was touched is used again before new memory.
    blank: Vec<u32>,
    /// Those with a name but no holder, by when they were let go.
    kept: BTreeMap<u64, u32>,
    /// Those with a name.
    named: HashMap<PrefixKey, u32>,
    /// How many times a block was let go.
    released: u64,
    block_size: usize,
}

impl BlockAllocator {
    /// A cache of `blocks` blocks of `block_size` tokens, all free. `Config::check` has seen both.
    pub(crate) fn new(blocks: usize, block_size: usize) -> Self {
        let blank: Vec<u32> = (0..u32::try_from(blocks).unwrap_or(u32::MAX))
            .rev()
            .collect();
        Self {
            blocks: vec![Block::default(); blank.len()],
            blank,
            kept: BTreeMap::new(),
            named: HashMap::new(),
            released: 0,
            block_size,
        }
    }

    /// Tokens of a block.
    pub(crate) fn block_size(&self) -> usize {
        self.block_size
    }

    /// Blocks that hold so many tokens.
    pub(crate) fn blocks_for(&self, tokens: usize) -> usize {
        tokens.div_ceil(self.block_size)
    }

    /// Tokens that the whole cache holds.
    pub(crate) fn capacity_tokens(&self) -> usize {
        self.total() * self.block_size
    }

    /// Blocks that nobody holds.
    pub(crate) fn free(&self) -> usize {
        self.blank.len() + self.kept.len()
    }

    /// Of these the ones that are kept for their name.
    pub(crate) fn kept(&self) -> usize {
        self.kept.len()
    }

    pub(crate) fn total(&self) -> usize {
        self.blocks.len()
    }

    /// How many blocks are missing for `blocks` to hold so many tokens.
    pub(crate) fn missing(&self, blocks: &Blocks, tokens: usize) -> usize {
        self.blocks_for(tokens).saturating_sub(blocks.len())
    }

    /// Lets `blocks` hold so many tokens. All or nothing; says whether it could.
    pub(crate) fn grow(&mut self, blocks: &mut Blocks, tokens: usize) -> bool {
        let missing = self.missing(blocks, tokens);
        if self.free() < missing {
            return false;
        }
        for _ in 0..missing {
            let Some(block) = self.blank.pop().or_else(|| self.forget_oldest()) else {
                return false;
            };
            self.of(block, |block| block.holders = 1);
            blocks.0.push(block);
        }
        true
    }

    /// Takes the name of the block that rested longest.
    fn forget_oldest(&mut self) -> Option<u32> {
        let (_, block) = self.kept.pop_first()?;
        if let Some(name) = self.of(block, |block| block.name.take()).flatten() {
            self.named.remove(&name);
        }
        Some(block)
    }

    /// Adds the block of this name to `blocks`, if there is one; says whether there was.
    pub(crate) fn share(&mut self, blocks: &mut Blocks, name: &PrefixKey) -> bool {
        let Some(&block) = self.named.get(name) else {
            return false;
        };
        let rested = self.of(block, |block| {
            block.holders += 1;
            (block.holders == 1).then_some(block.since)
        });
        if let Some(since) = rested.flatten() {
            self.kept.remove(&since);
        }
        blocks.0.push(block);
        true
    }

    /// Names the block at this index of `blocks`, which is full. Of two with one name the first keeps it.
    pub(crate) fn name(&mut self, blocks: &Blocks, index: usize, name: PrefixKey) {
        let Some(&block) = blocks.0.get(index) else {
            return;
        };
        if let std::collections::hash_map::Entry::Vacant(entry) = self.named.entry(name) {
            entry.insert(block);
            self.of(block, |block| block.name = Some(name));
        }
    }

    /// Takes all blocks of a sequence back.
    pub(crate) fn release(&mut self, blocks: &mut Blocks) {
        for index in blocks.0.drain(..).rev() {
            let since = self.released;
            let left = self.of(index, |block| {
                block.holders -= 1;
                block.since = since;
                (block.holders == 0).then_some(block.name.is_some())
            });
            self.released += 1;
            match left.flatten() {
                Some(true) => drop(self.kept.insert(since, index)),
                Some(false) => self.blank.push(index),
                None => {}
            }
        }
    }

    fn of<T>(&mut self, index: u32, change: impl FnOnce(&mut Block) -> T) -> Option<T> {
        self.blocks.get_mut(index as usize).map(change)
    }
}
