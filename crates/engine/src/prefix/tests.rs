use proptest::{collection::vec, prelude::*};

use super::*;

type Named = (u64, Option<(u8, f32)>, Vec<Vec<u32>>);

fn named() -> impl Strategy<Value = Named> {
    let adapter = (0u8..2, prop_oneof![Just(1.0f32), Just(0.5)]);
    (
        0u64..2,
        proptest::option::of(adapter),
        vec(vec(0u32..3, 2), 0..3),
    )
}

fn key((tenant, adapter, blocks): &Named) -> PrefixKey {
    let adapter = adapter.map(|(digest, scale)| (Digest([digest; 32]), scale));
    let root = PrefixKey::root(TenantId(*tenant), adapter);
    blocks.iter().fold(root, |key, block| {
        key.then(&block.iter().copied().map(TokenId).collect::<Vec<_>>())
    })
}

proptest! {
    #[test]
    fn names_are_equal_if_and_only_if_all_that_they_name_is(a in named(), b in named()) {
        prop_assert_eq!(key(&a) == key(&b), a == b);
    }
}
