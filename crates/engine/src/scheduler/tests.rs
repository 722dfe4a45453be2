use proptest::{collection::vec, prelude::*};

use super::*;

proptest! {
    #[test]
    fn a_plan_keeps_the_budget_and_gives_nobody_more_than_asked(
        spare in 2usize..600, bulk in 2usize..600, decode in 0usize..40, prefill in vec(1usize..400, 0..8), context in vec(1usize..400, 0..8),
    ) {
        let Plan { prefill: given, context: read } = plan(decode + spare, bulk, decode, &prefill, &context);
        prop_assert!(given.iter().chain(&read).sum::<usize>() <= spare);
        prop_assert_eq!((given.len(), read.len()), (prefill.len(), context.len()));
        prop_assert!(given.iter().zip(&prefill).all(|(given, asked)| given <= asked));
        prop_assert!(read.iter().zip(&context).all(|(given, asked)| given <= asked));
    }

    #[test]
    fn no_class_starves(
        spare in 2usize..600, bulk in 2usize..600, decode in 0usize..40, prefill in vec(1usize..4000, 0..8), context in vec(1usize..4000, 0..8),
    ) {
        let Plan { prefill: given, context: read } = plan(decode + spare, bulk, decode, &prefill, &context);
        prop_assert!(prefill.is_empty() || given[0] > 0);
        prop_assert!(context.is_empty() || read[0] > 0);
    }

    #[test]
    fn no_token_of_the_budget_is_left_while_somebody_asks(
        spare in 2usize..600, bulk in 2usize..600, decode in 0usize..40, prefill in vec(1usize..400, 0..8), context in vec(1usize..400, 0..8),
    ) {
        let Plan { prefill: given, context: read } = plan(decode + spare, bulk, decode, &prefill, &context);
        let asked: usize = prefill.iter().chain(&context).sum();
        prop_assert_eq!(given.iter().chain(&read).sum::<usize>(), asked.min(if decode > 0 { spare.min(bulk) } else { spare }));
    }

    #[test]
    fn beside_running_answers_bulk_is_limited(
        spare in 2usize..600, bulk in 2usize..600, decode in 1usize..40, prefill in vec(1usize..400, 0..8), context in vec(1usize..400, 0..8),
    ) {
        let Plan { prefill: given, context: read } = plan(decode + spare, bulk, decode, &prefill, &context);
        prop_assert!(given.iter().chain(&read).sum::<usize>() <= bulk);
    }

    #[test]
    fn who_came_first_is_served_first(spare in 2usize..600, prefill in vec(1usize..400, 2..8)) {
        let Plan { prefill: given, .. } = plan(spare, 2, 0, &prefill, &[]);
        for index in 1..prefill.len() {
            prop_assert!(given[index] == 0 || given[index - 1] == prefill[index - 1]);
        }
    }
}
