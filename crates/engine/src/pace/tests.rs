use proptest::prelude::*;

use super::*;

/// A machine: milliseconds of a forward of so many answers and tokens beside them.
#[derive(Clone, Copy, Debug)]
struct Machine {
    alone: f64,
    token: f64,
    fixed: f64,
}

impl Machine {
    fn takes(self, bulk: usize) -> Duration {
        let fixed = if bulk > 0 { self.fixed } else { 0.0 };
        Duration::from_secs_f64((self.alone + fixed + self.token * bulk as f64) / 1e3)
    }
}

/// So many steps with as much beside an answer as may be; tokens and times of each.
fn run(pace: &mut Pace, machine: Machine, from: u64, steps: u64) -> Vec<(usize, f64)> {
    let step = |step| {
        let bulk = pace.bulk(1, 512, Duration::ZERO, step);
        let took = machine.takes(bulk);
        pace.saw(1, bulk, took, step);
        (bulk, took.as_secs_f64() * 1e3)
    };
    (from..from + steps).map(step).collect()
}

proptest! {
    #[test]
    fn whatever_the_machine_a_step_beside_answers_takes_less_than_twice_theirs(
        alone in 1.0f64..100.0, token in 0.01f64..5.0, fixed in 0.0f64..0.3, faster in 0.3f64..3.0,
    ) {
        let machine = Machine { alone, token, fixed: fixed * alone };
        let mut pace = Pace::default();
        run(&mut pace, machine, 0, 300);
        let later = run(&mut pace, machine, 300, 300);
        let least = machine.takes(2).as_secs_f64() * 1e3;
        for &(bulk, took) in &later {
            prop_assert!(took <= (1.75 * alone).max(least), "{bulk} tokens took {took} of {alone}");
        }
        let tokens: usize = later.iter().map(|(bulk, _)| bulk).sum();
        // As much is done as the bound allows, or nearly: of 0.7 of the answers' time each. A token is taken for no cheaper than a thousandth
        // of that time.
        let most = (0.7 * alone - machine.fixed) / token.max(1e-3 * alone);
        prop_assert!(tokens as f64 >= 300.0 * (0.8 * most.min(512.0) - 1.0), "{tokens} of {most} a step");
        // Another machine, as if kernels or neighbours had changed.
        let machine = Machine { alone: alone * faster, token: token * faster, fixed: machine.fixed * faster };
        run(&mut pace, machine, 600, 600);
        let least = machine.takes(2).as_secs_f64() * 1e3;
        for (_, took) in run(&mut pace, machine, 1200, 100) {
            prop_assert!(took <= (1.8 * machine.alone).max(least));
        }
    }

    #[test]
    fn a_cost_that_does_not_hang_on_the_tokens_is_not_taken_for_theirs(
        alone in 5.0f64..100.0, share in 0.005f64..0.03, fixed in 0.1f64..0.4, noise in 0.0f64..0.05, seed in 0u64..1000,
    ) {
        let machine = Machine { alone, token: share * alone, fixed: fixed * alone };
        let mut pace = Pace::default();
        let mut random = testkit::Random::new(seed);
        let mut tokens = 0;
        for step in 0..900 {
            let bulk = pace.bulk(1, 512, Duration::ZERO, step);
            let took = machine.takes(bulk).mul_f64(1.0 + noise * (2.0 * random.uniform() - 1.0));
            pace.saw(1, bulk, took, step);
            tokens += if step < 300 { 0 } else { bulk };
        }
        let most = (0.7 * alone - machine.fixed) / machine.token;
        prop_assert!(tokens as f64 >= 600.0 * (0.7 * most - 1.5), "{} of {most} a step", tokens as f64 / 600.0);
    }

    #[test]
    fn bulk_keeps_its_bounds(decode in 0usize..100_000, most in 0usize..600, spent in 0u64..1000, took in 0u64..1000, bulk in 0usize..600) {
        let mut pace = Pace::default();
        for step in 0..200 {
            pace.saw(decode, if step % 3 == 0 { 0 } else { bulk }, Duration::from_millis(took), step);
            prop_assert!(pace.bulk(decode, most, Duration::from_millis(spent), step) <= most.max(2));
        }
    }
}

#[test]
fn what_was_spent_before_is_not_spent_again() {
    let machine = Machine {
        alone: 20.0,
        token: 0.5,
        fixed: 0.0,
    };
    let mut pace = Pace::default();
    run(&mut pace, machine, 0, 100);
    let after = |spent| pace.bulk(1, 512, Duration::from_millis(spent), 100);
    assert!(after(0) >= 27, "{}", after(0));
    assert!(after(7) < after(0) / 2 + 2);
    assert_eq!(after(14), 2);
}

#[test]
fn a_clock_that_stands_still_measures_nothing() {
    let mut pace = Pace::default();
    for step in 0..1000 {
        assert_eq!(pace.bulk(1, 512, Duration::ZERO, step), UNKNOWN);
        pace.saw(1, UNKNOWN, Duration::ZERO, step);
    }
}

#[test]
fn a_step_that_was_kept_waiting_is_one_step() {
    let machine = Machine {
        alone: 10.0,
        token: 0.5,
        fixed: 1.0,
    };
    let mut pace = Pace::default();
    run(&mut pace, machine, 0, 200);
    let before = pace.bulk(1, 512, Duration::ZERO, 201);
    pace.saw(1, before, Duration::from_secs(3), 201);
    let after = pace.bulk(1, 512, Duration::ZERO, 202);
    assert!(after >= before / 2, "{before} then {after}");
}

#[test]
fn read_outs_take_the_time_that_is_left_and_one_portion_in_any_case() {
    let machine = Machine {
        alone: 10.0,
        token: 0.5,
        fixed: 1.0,
    };
    let (mut pace, start) = (Pace::default(), Instant::now());
    let at = |ms: u64| start + Duration::from_millis(ms);
    // Where nothing is known of a clock, all that there is.
    let mut all = pace.portions(1, start, true);
    assert!((0..100).all(|_| all.more(start)));
    run(&mut pace, machine, 0, 100);
    // Portions of 3 ms: two of them end within the 7 that may be taken.
    let mut first = pace.portions(1, start, false);
    assert!(first.more(at(0)));
    pace.read_out(&first, at(3));
    let mut second = pace.portions(1, start, false);
    let given = [0, 3, 6].map(|ms| second.more(at(ms)));
    assert_eq!((given, second.given()), ([true, true, false], 2));
    // However late it is, one; none where others come first.
    let mut late = pace.portions(1, start, false);
    assert_eq!([50, 51].map(|ms| late.more(at(ms))), [true, false]);
    assert!(!pace.portions(1, start, true).more(start));
    assert!(
        !pace.is_over(1, Duration::from_millis(2)) && pace.is_over(1, Duration::from_millis(6))
    );
}
