use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;

proptest! {
    #[test]
    fn blocks_are_never_lent_twice_and_all_come_back(total in 1usize..24, size in 1usize..5, asks in prop::collection::vec((0usize..6, 0usize..40), 0..60)) {
        let mut allocator = BlockAllocator::new(total, size);
        let mut held: Vec<Blocks> = (0..6).map(|_| Blocks::default()).collect();
        for (who, tokens) in asks {
            let blocks = &mut held[who];
            let (before, free) = (blocks.as_slice().to_vec(), allocator.free());
            if tokens == 0 {
                allocator.release(blocks);
                prop_assert_eq!(blocks.len(), 0);
            } else if allocator.grow(blocks, tokens) {
                prop_assert!(blocks.len() * size >= tokens);
                prop_assert!(blocks.as_slice().starts_with(&before));
            } else {
                prop_assert!(free < tokens.div_ceil(size) - before.len());
                prop_assert_eq!(blocks.as_slice(), &before[..]);
            }
            let lent: Vec<u32> = held.iter().flat_map(|blocks| blocks.as_slice().to_vec()).collect();
            prop_assert_eq!(lent.iter().collect::<BTreeSet<_>>().len(), lent.len());
            prop_assert_eq!(lent.len() + allocator.free(), total);
            prop_assert!(lent.iter().all(|&block| (block as usize) < total));
        }
    }
}
