use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::*;
use crate::ids::{TenantId, TokenId};

/// Names of the prefixes of one chain, a block each.
fn names() -> Vec<PrefixKey> {
    let root = PrefixKey::root(TenantId(0), None);
    (0..40)
        .scan(root, |name, token| {
            *name = name.then(&[TokenId(token)]);
            Some(*name)
        })
        .collect()
}

proptest! {
    #[test]
    fn blocks_are_lent_twice_only_under_their_name_and_all_come_back(
        total in 1usize..24, size in 1usize..5, asks in prop::collection::vec((0usize..6, 0usize..40, proptest::bool::ANY), 0..60),
    ) {
        let (mut allocator, names) = (BlockAllocator::new(total, size), names());
        let mut held: Vec<Blocks> = (0..6).map(|_| Blocks::default()).collect();
        for (who, tokens, named) in asks {
            let blocks = &mut held[who];
            let (before, free) = (blocks.as_slice().to_vec(), allocator.free());
            if tokens == 0 {
                // All that it held is full, of the same prefix in all of them.
                for (index, name) in names.iter().enumerate().take(if named { before.len() } else { 0 }) {
                    allocator.name(blocks, index, *name);
                }
                allocator.release(blocks);
                prop_assert_eq!(blocks.len(), 0);
            } else if named && before.is_empty() {
                while allocator.share(blocks, &names[blocks.len()]) {}
            } else if allocator.grow(blocks, tokens) {
                prop_assert!(blocks.len() * size >= tokens);
                prop_assert!(blocks.as_slice().starts_with(&before));
            } else {
                prop_assert!(free < tokens.div_ceil(size) - before.len());
                prop_assert_eq!(blocks.as_slice(), &before[..]);
            }
            let mut lent: BTreeMap<u32, BTreeSet<usize>> = BTreeMap::new();
            for blocks in &held {
                let mine: BTreeSet<_> = blocks.as_slice().iter().collect();
                prop_assert_eq!(mine.len(), blocks.len());
                for (index, &block) in blocks.as_slice().iter().enumerate() {
                    lent.entry(block).or_default().insert(index);
                }
            }
            // A block has one place in all sequences that hold it: its name's.
            prop_assert!(lent.values().all(|places| places.len() == 1));
            prop_assert_eq!(lent.len() + allocator.free(), total);
            prop_assert!(lent.keys().all(|&block| (block as usize) < total));
            prop_assert!(allocator.named.len() <= total && allocator.kept() <= allocator.free());
        }
        for blocks in &mut held {
            allocator.release(blocks);
        }
        prop_assert_eq!(allocator.free(), total);
    }
}

#[test]
fn what_rested_longest_goes_first_and_ends_go_before_beginnings() {
    let (mut allocator, names) = (BlockAllocator::new(4, 1), names());
    let (mut first, mut second) = (Blocks::default(), Blocks::default());
    assert!(allocator.grow(&mut first, 3));
    for (index, name) in names.iter().enumerate().take(3) {
        allocator.name(&first, index, *name);
    }
    allocator.release(&mut first);
    assert_eq!((allocator.free(), allocator.kept()), (4, 3));
    assert!(allocator.grow(&mut second, 2), "a blank one, and the end");
    let mut known = |index: usize| allocator.share(&mut first, &names[index]);
    assert_eq!((known(0), known(1), known(2)), (true, true, false));
}
