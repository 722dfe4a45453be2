use std::collections::HashSet;

use generator::Strategy;
use proptest::{collection::vec, prelude::*};

use super::*;

fn digest(documents: &[Vec<u32>]) -> Digest {
    let mut state = StateHash::new("base", "generator", Strategy::Parallel, 256);
    for tokens in documents {
        let mut document = DocumentHash::default();
        document.push(&ids(tokens));
        state.push(&document.name());
    }
    state.finish()
}

fn ids(tokens: &[u32]) -> Vec<TokenId> {
    tokens.iter().copied().map(TokenId).collect()
}

proptest! {
    #[test]
    fn the_cut_of_a_document_into_chunks_is_no_part_of_it(tokens in vec(any::<u32>(), 0..40), at in any::<prop::sample::Index>()) {
        let (head, tail) = tokens.split_at(at.index(tokens.len() + 1));
        let (mut whole, mut cut) = (DocumentHash::default(), DocumentHash::default());
        whole.push(&ids(&tokens));
        cut.push(&ids(head));
        cut.push(&ids(tail));
        prop_assert_eq!(whole.name(), cut.name());
    }

    #[test]
    fn different_documents_have_different_digests(a in vec(vec(0u32..3, 1..4), 0..4), b in vec(vec(0u32..3, 1..4), 0..4)) {
        prop_assert_eq!(digest(&a) == digest(&b), a == b);
    }
}

#[test]
fn a_document_without_a_token_is_no_part_of_it() {
    assert_eq!(digest(&[vec![], vec![1, 2], vec![]]), digest(&[vec![1, 2]]));
}

#[test]
fn base_generator_strategy_and_window_are_part_of_it() {
    let of = |base, generator, strategy, window| {
        StateHash::new(base, generator, strategy, window).finish()
    };
    let digests = HashSet::from([
        of("a", "bc", Strategy::Parallel, 8),
        of("ab", "c", Strategy::Parallel, 8),
        of("a", "bd", Strategy::Parallel, 8),
        of("a", "bc", Strategy::Sequential, 8),
        of("a", "bc", Strategy::Concat, 8),
        of("a", "bc", Strategy::Parallel, 9),
    ]);
    assert_eq!(digests.len(), 6);
}

#[test]
fn a_digest_shows_in_hex() {
    assert_eq!(Digest([0xa5; 32]).to_string(), "a5".repeat(32));
}
