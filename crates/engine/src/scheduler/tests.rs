use proptest::{collection::vec, prelude::*};

use super::*;

type Asks = Vec<(TenantId, usize)>;

fn asks(tokens: std::ops::Range<usize>) -> impl Strategy<Value = Asks> {
    vec(((0u64..4).prop_map(TenantId), tokens), 0..8)
}

fn turns() -> impl Strategy<Value = Turns> {
    let turn = || {
        (0u64..5, 0..=QUANTUM).prop_map(|(tenant, left)| Turn {
            tenant: TenantId(tenant),
            left,
        })
    };
    (turn(), turn()).prop_map(|(prefill, context)| Turns { prefill, context })
}

proptest! {
    #[test]
    fn a_plan_keeps_the_budget_and_gives_nobody_more_than_asked(
        left in 2usize..600, turns in turns(), prefill in asks(1..400), context in asks(1..400),
    ) {
        let (Plan { prefill: given, context: read }, _) = plan(left, turns, &prefill, &context);
        prop_assert!(given.iter().chain(&read).sum::<usize>() <= left);
        prop_assert_eq!((given.len(), read.len()), (prefill.len(), context.len()));
        prop_assert!(given.iter().zip(&prefill).all(|(given, asked)| *given <= asked.1));
        prop_assert!(read.iter().zip(&context).all(|(given, asked)| *given <= asked.1));
    }

    #[test]
    fn no_class_starves(left in 2usize..600, turns in turns(), prefill in asks(1..4000), context in asks(1..4000)) {
        let (Plan { prefill: given, context: read }, _) = plan(left, turns, &prefill, &context);
        prop_assert!(prefill.is_empty() || given.iter().sum::<usize>() > 0);
        prop_assert!(context.is_empty() || read.iter().sum::<usize>() > 0);
    }

    #[test]
    fn no_token_of_the_budget_is_left_while_somebody_asks(
        left in 2usize..600, turns in turns(), prefill in asks(1..400), context in asks(1..400),
    ) {
        let (Plan { prefill: given, context: read }, _) = plan(left, turns, &prefill, &context);
        let asked: usize = prefill.iter().chain(&context).map(|(_, tokens)| tokens).sum();
        prop_assert_eq!(given.iter().chain(&read).sum::<usize>(), asked.min(left));
    }

    #[test]
    fn of_a_tenant_who_came_first_is_served_first(left in 2usize..600, turns in turns(), prefill in asks(1..400)) {
        let (Plan { prefill: given, .. }, _) = plan(left, turns, &prefill, &[]);
        for (later, &(tenant, _)) in prefill.iter().enumerate() {
            for earlier in 0..later {
                let waits = prefill[earlier].0 == tenant && given[earlier] < prefill[earlier].1;
                prop_assert!(!waits || given[later] == 0);
            }
        }
    }

    #[test]
    fn a_flood_delays_another_tenants_prompt_by_a_turn_for_each_of_its_own(
        left in 2usize..600, turns in turns(), floods in 1u64..5, prompt in 1usize..1000, context in asks(1..400),
    ) {
        // Each of the others always has more; tenant 9 has one prompt.
        let mut asked: Asks = (0..floods).map(|tenant| (TenantId(tenant), usize::MAX / 8)).collect();
        asked.push((TenantId(9), prompt));
        let (mut turns, mut steps) = (turns, 0);
        while asked.last().is_some_and(|last| last.1 > 0) {
            let (Plan { prefill: given, .. }, next) = plan(left, turns, &asked, &context);
            let mine = given.last().copied().unwrap_or(0);
            asked.last_mut().expect("it is there").1 -= mine;
            (turns, steps) = (next, steps + 1);
        }
        // Tokens that prompts get of a step at least.
        let each = (left - (left / 4).max(1)).max(1);
        let mine = prompt.div_ceil(QUANTUM);
        let all = prompt + (mine + 1) * QUANTUM * floods as usize;
        prop_assert!(steps <= all.div_ceil(each) + 1, "{steps} steps of {each} for {all} tokens");
    }

    #[test]
    fn tenants_that_always_ask_get_the_same(left in 2usize..600, turns in turns(), tenants in 1u64..6, steps in 1usize..200) {
        let asked: Asks = (0..tenants).map(|tenant| (TenantId(tenant), usize::MAX / 8)).collect();
        let (mut turns, mut sums) = (turns, vec![0; asked.len()]);
        for _ in 0..steps {
            let (Plan { context: given, .. }, next) = plan(left, turns, &[], &asked);
            sums.iter_mut().zip(given).for_each(|(sum, given)| *sum += given);
            turns = next;
        }
        let (least, most) = (sums.iter().min().unwrap(), sums.iter().max().unwrap());
        prop_assert!(most - least <= 2 * QUANTUM, "{sums:?}");
    }

    #[test]
    fn who_starts_is_the_first_of_a_tenant_with_the_fewest_and_each_has_its_turn(waiting in vec(0u64..4, 1..40)) {
        let mut waiting: Vec<(u64, usize)> = waiting.into_iter().zip(0..).collect();
        let mut last = TenantId(0);
        let mut started: Vec<(u64, usize)> = Vec::new();
        while !waiting.is_empty() {
            let tenants = waiting.iter().map(|&(tenant, _)| TenantId(tenant));
            let index = next_to_start(tenants, &BTreeMap::new(), last).expect("one waits");
            let (tenant, number) = waiting.remove(index);
            prop_assert!(waiting.iter().all(|&(of, other)| of != tenant || other > number));
            // A tenant that starts again has let all others that wait start meanwhile.
            if let Some(before) = started.iter().rposition(|&(of, _)| of == tenant) {
                prop_assert!(waiting.iter().all(|&(of, _)| of == tenant || started[before..].iter().any(|&(other, _)| other == of)));
            }
            started.push((tenant, number));
            last = TenantId(tenant);
        }
    }
}

#[test]
fn a_tenant_with_fewer_that_run_starts_first() {
    let running = BTreeMap::from([(TenantId(1), 2), (TenantId(2), 1)]);
    let next = |waiting: &[u64]| {
        let waiting = waiting.iter().map(|&tenant| TenantId(tenant));
        next_to_start(waiting, &running, TenantId(0))
    };
    assert_eq!(next(&[1, 1, 2, 2]), Some(2));
    assert_eq!(next(&[1, 2, 3]), Some(2));
    assert_eq!(next(&[1]), Some(0));
    assert_eq!(next(&[]), None);
}

#[test]
fn the_last_of_the_tenant_with_the_most_gives_way_and_the_first_of_all_last() {
    let of = |running: &[(u64, u64)]| {
        let running: Vec<_> = running
            .iter()
            .map(|&(tenant, number)| (TenantId(tenant), number))
            .collect();
        gives_way(&running)
    };
    assert_eq!(of(&[(1, 0), (1, 1), (1, 2), (2, 3)]), Some(2));
    assert_eq!(of(&[(1, 5), (2, 3)]), Some(0));
    assert_eq!(of(&[(1, 5), (1, 3), (2, 4)]), Some(0));
    assert_eq!(of(&[(1, 3)]), Some(0));
    assert_eq!(of(&[]), None);
}
