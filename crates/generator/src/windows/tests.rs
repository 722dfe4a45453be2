//! Laws of cutting.

use proptest::prelude::*;

use super::*;

#[test]
fn seventy_tokens_at_sixteen_become_five_windows_of_fourteen() {
    let cut: Vec<_> = equalised(70, 16).collect();
    assert_eq!(cut, [0..14, 14..28, 28..42, 42..56, 56..70]);
}

#[test]
fn a_stream_of_74_at_32_has_a_tail_of_10() {
    let cut: Vec<_> = fixed(74, 32).collect();
    assert_eq!(cut, [0..32, 32..64, 64..74]);
}

#[test]
fn no_tokens_make_no_windows() {
    assert_eq!(
        fixed(0, 16).count() + equalised(0, 16).count() + equalised(0, 0).count(),
        0
    );
}

proptest! {
    #[test]
    fn windows_cover_the_context_once_and_none_is_empty_or_too_long(tokens in 0_usize..5000, window in 1_usize..600) {
        for cut in [fixed(tokens, window).collect::<Vec<_>>(), equalised(tokens, window).collect()] {
            let mut next = 0;
            for range in &cut {
                prop_assert_eq!(range.start, next);
                prop_assert!(!range.is_empty() && range.len() <= window);
                next = range.end;
            }
            prop_assert_eq!(next, tokens);
            prop_assert_eq!(cut.len(), tokens.div_ceil(window));
        }
    }
}
