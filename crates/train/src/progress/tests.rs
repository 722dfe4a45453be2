//! Lines that a resumed run repeats are gone before it does.

use std::fs;

use super::{Progress, cut, running};
use crate::{recipe::Length, step::Figures};

#[test]
fn lines_behind_the_state_are_cut_and_broken_ones_with_them() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("metrics.jsonl");
    cut(&path, 5).unwrap();
    fs::write(&path, "{\"step\":4}\n{\"step\":5}\n{\"step\":6}\n{\"ste").unwrap();
    cut(&path, 5).unwrap();
    assert_eq!(
        fs::read_to_string(&path).unwrap(),
        "{\"step\":4}\n{\"step\":5}\n"
    );
    drop(Progress::new(dir.path(), Length::Steps(9), 0).unwrap());
    assert_eq!(fs::read_to_string(&path).unwrap(), "");
}

#[test]
fn a_running_mean_moves_by_a_twentieth() {
    let of = |tokens, ce| Figures {
        tokens,
        ce,
        ..Figures::default()
    };
    let mut mean = Figures::default();
    running(&mut mean, &of(10, 20.0));
    running(&mut mean, &of(5, 30.0));
    assert!((mean.ce / mean.tokens as f64 - (0.95 * 2.0 + 0.05 * 6.0)).abs() < 1e-12);
    let before = mean;
    running(&mut mean, &Figures::default());
    assert_eq!(mean, before);
}
