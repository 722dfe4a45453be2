//! Arrivals have the statistics that they are named after.

use super::*;

const SHAPE: Shape = Shape {
    sessions: 8,
    zipf: 1.0,
    ingest_share: 0.25,
    seed: 3,
};

#[test]
fn poisson_arrivals_have_the_rate_and_the_spread_of_a_poisson_process() {
    let until = Duration::from_secs(2_000);
    let times = poisson(10.0, until, 1).unwrap();
    // 20,000 expected with a deviation of 141: five of them.
    assert!(times.len().abs_diff(20_000) < 707, "{}", times.len());
    assert!(times.is_sorted() && times.last().unwrap() < &until);
    let gaps: Vec<_> = times
        .windows(2)
        .map(|pair| (pair[1] - pair[0]).as_secs_f64())
        .collect();
    let mean = gaps.iter().sum::<f64>() / gaps.len() as f64;
    let variance = gaps.iter().map(|gap| (gap - mean).powi(2)).sum::<f64>() / gaps.len() as f64;
    // Exponential: the deviation is the mean. A steady stream would have none.
    assert!(
        (variance.sqrt() / mean - 1.0).abs() < 0.05,
        "{variance} {mean}"
    );
    // And no memory: a gap says nothing of the next.
    let products = gaps
        .windows(2)
        .map(|pair| (pair[0] - mean) * (pair[1] - mean));
    let correlation = products.sum::<f64>() / gaps.len() as f64 / variance;
    assert!(correlation.abs() < 0.05, "{correlation}");
}

#[test]
fn zipf_draws_the_kth_session_in_proportion_to_one_over_k() {
    let (zipf, mut random) = (Zipf::new(4, 1.0), Random::new(5, 0));
    let mut counts = [0_u32; 4];
    for _ in 0..100_000 {
        counts[zipf.draw(&mut random)] += 1;
    }
    let sum = 1.0 + 1.0 / 2.0 + 1.0 / 3.0 + 1.0 / 4.0;
    for (rank, count) in (1_u32..).zip(counts) {
        let want = 100_000.0 / f64::from(rank) / sum;
        assert!((f64::from(count) - want).abs() < 0.03 * want, "{counts:?}");
    }
    // Exponent 0: all alike.
    let uniform = Zipf::new(4, 0.0);
    let mut counts = [0_u32; 4];
    for _ in 0..100_000 {
        counts[uniform.draw(&mut random)] += 1;
    }
    assert!(
        counts.iter().all(|count| count.abs_diff(25_000) < 700),
        "{counts:?}"
    );
}

#[test]
fn a_plan_follows_from_its_seed_and_keeps_its_shares() {
    let times = || poisson(100.0, Duration::from_secs(100), 7).unwrap();
    let (one, same) = (Plan::new(times(), SHAPE), Plan::new(times(), SHAPE));
    assert_eq!(one.0, same.0);
    let other = Plan::new(times(), Shape { seed: 4, ..SHAPE });
    assert_ne!(one.0, other.0);
    let told = one.0.iter().filter(|one| one.kind == Kind::Ingest).count();
    // A quarter of some 10,000, five deviations.
    assert!(
        told.abs_diff(one.0.len() / 4) < 220,
        "{told} of {}",
        one.0.len()
    );
    assert!(one.0.iter().all(|arrival| arrival.session < 8));
}

#[test]
fn a_rate_that_cannot_be_is_refused() {
    for rate in [0.0, -1.0, f64::NAN, f64::INFINITY, 1e9] {
        assert!(poisson(rate, Duration::from_secs(10), 1).is_err(), "{rate}");
    }
}

#[test]
fn a_trace_is_read_in_order_and_cut_at_the_end_and_a_bad_line_is_named() {
    let until = Duration::from_secs(5);
    let times = parse_trace("# seconds\n0.5\n\n 0.25 \n7\n", until).unwrap();
    assert_eq!(
        times,
        [Duration::from_millis(250), Duration::from_millis(500)]
    );
    for bad in ["0.1\nsoon", "-1", "nan", "1e300"] {
        assert!(parse_trace(bad, until).is_err(), "{bad}");
    }
    let error = parse_trace("0.1\nsoon", until).unwrap_err();
    assert!(error.to_string().starts_with("line 2"), "{error}");
    assert!(parse_trace("9", until).is_err());
}
