//! Percentiles, throughput and goodput against figures worked out by hand.

use super::*;

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

/// An answer of three tokens: meant for 1 s, sent 50 ms late, first token 200 ms after its time.
fn answer() -> Outcome {
    Outcome {
        kind: Kind::Ask,
        at: ms(1000),
        sent: ms(1050),
        first: Some(ms(1200)),
        last: Some(ms(1260)),
        gaps: vec![ms(20), ms(40)],
        ended: ms(1300),
        prompt_tokens: 7,
        cached_tokens: 2,
        tokens: 3,
        right: true,
        error: None,
    }
}

fn near(value: f64, want: f64) {
    assert!((value - want).abs() < 1e-9, "{value} instead of {want}");
}

#[test]
fn percentiles_lie_between_samples_as_numpy_has_them() {
    let spread = Spread::new([ms(40), ms(10), ms(20), ms(30)]);
    near(spread.mean(), 25.0);
    near(spread.percentile(0.0), 10.0);
    near(spread.percentile(50.0), 25.0);
    near(spread.percentile(90.0), 37.0);
    near(spread.percentile(100.0), 40.0);
    near(spread.deviation(), 125.0_f64.sqrt());
    near(Spread::new([ms(5)]).percentile(99.0), 5.0);
    near(Spread::default().percentile(99.0), 0.0);
    near(Spread::default().mean(), 0.0);
}

#[test]
fn latencies_count_from_the_time_that_was_meant() {
    let figures = Figures::new(&[answer()], Duration::ZERO, &[]);
    near(figures.ttft.mean(), 200.0);
    near(figures.tpot.mean(), 30.0);
    near(figures.itl.mean(), 30.0);
    near(figures.e2el.mean(), 300.0);
    near(figures.held.mean(), 50.0);
    near(figures.duration.as_secs_f64(), 0.3);
    near(figures.json()["output_throughput"].as_f64().unwrap(), 10.0);
    near(
        figures.json()["total_token_throughput"].as_f64().unwrap(),
        10.0 / 0.3,
    );
}

#[test]
fn the_warm_up_is_not_counted_and_failures_are_by_their_code() {
    let warm = Outcome {
        at: ms(400),
        tokens: 1000,
        ..answer()
    };
    let refused = Outcome {
        error: Some("ResourceExhausted BUSY".to_owned()),
        ended: ms(1400),
        ..answer()
    };
    let told = Outcome {
        kind: Kind::Ingest,
        tokens: 90,
        ended: ms(1500),
        ..answer()
    };
    let failed_telling = Outcome {
        error: Some("ResourceExhausted BUSY".to_owned()),
        ..told.clone()
    };
    let all = [warm, answer(), refused, told, failed_telling];
    let figures = Figures::new(&all, ms(500), &[]);
    let json = figures.json();
    assert_eq!((figures.completed, figures.output_tokens), (1, 3));
    assert_eq!(json["failed"], 1);
    assert_eq!(json["ingest_failed"], 1);
    assert_eq!(json["errors"]["ResourceExhausted BUSY"], 2);
    near(json["ingest_throughput"].as_f64().unwrap(), 180.0);
    near(json["p99_visible_ms"].as_f64().unwrap(), 500.0);
    let text = figures.text();
    for line in [
        "Failed requests:",
        "ResourceExhausted BUSY",
        "P99 TTFT (ms):",
    ] {
        assert!(text.contains(line), "{text}");
    }
}

#[test]
fn goodput_counts_what_meets_all_goals_at_once() {
    let slow_start = Outcome {
        first: Some(ms(1250)),
        ..answer()
    };
    let slow_tokens = Outcome {
        last: Some(ms(1290)),
        ..answer()
    };
    let refused = Outcome {
        error: Some("Internal".to_owned()),
        ..answer()
    };
    let all = [answer(), slow_start, slow_tokens, refused];
    let good = |goals: &[&str]| {
        let goals: Vec<Goal> = goals.iter().map(|goal| goal.parse().unwrap()).collect();
        Figures::new(&all, Duration::ZERO, &goals).good
    };
    assert_eq!(good(&["ttft:200", "tpot:30"]), Some(1));
    assert_eq!(good(&["ttft:200"]), Some(2));
    assert_eq!(good(&["e2el:300"]), Some(3));
    assert_eq!(good(&[]), None);
    for bad in ["ttft", "ttft:", "ttft:0", "speed:1", "tpot:inf"] {
        assert!(bad.parse::<Goal>().is_err(), "{bad}");
    }
}
