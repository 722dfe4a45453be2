//! Medians, ratios within a repetition, and what is left out of them.

use super::*;

fn samples(ours: &[f64], other: &[f64]) -> Samples {
    let mut samples = Samples::default();
    for (ours, other) in ours.iter().zip(other) {
        samples.begin();
        samples.add("ours", *ours);
        samples.add("other", *other);
    }
    samples
}

#[test]
fn a_median_lies_in_the_middle_whatever_the_order_and_the_count() {
    assert_eq!(Figure::of(&[3.0, 1.0, 2.0]).unwrap().median, 2.0);
    assert_eq!(Figure::of(&[4.0, 1.0, 2.0, 3.0]).unwrap().median, 2.5);
    assert_eq!(Figure::of(&[7.0]).unwrap().values, [7.0]);
    assert_eq!(Figure::of(&[]), None);
}

#[test]
fn a_ratio_is_taken_within_each_repetition() {
    // The machine was half as fast in the second repetition: both fell, the ratio did not.
    let mut samples = samples(&[100.0, 50.0, 104.0], &[50.0, 25.0, 50.0]);
    samples.ratio("speed", "ours", "other", Direction::Speed);
    samples.ratio("time", "ours", "other", Direction::Time);
    samples.ratio("absent", "ours", "nobody", Direction::Speed);
    assert_eq!(samples.ratios["speed"].values, [2.0, 2.0, 2.08]);
    assert_eq!(samples.ratios["speed"].median, 2.0);
    assert_eq!(samples.ratios["time"].median, 0.5);
    assert!(!samples.ratios.contains_key("absent"));
}

#[test]
fn the_first_repetition_only_warms_up() {
    let mut samples = samples(&[1.0, 100.0], &[1.0, 50.0]);
    samples.drop_first();
    samples.ratio("speed", "ours", "other", Direction::Speed);
    assert_eq!(samples.rates["ours"], [100.0]);
    assert_eq!(samples.ratios["speed"].values, [2.0]);
}
