//! Packs are drawn by their random numbers alone, and never about what recall is judged on.

use super::{ATTRIBUTES, pack};
use crate::{batch::tests::format, random::Random};

#[test]
fn equal_random_numbers_make_equal_packs() {
    let format = format(96, 48);
    let drawn = |seed| pack(&mut Random::new(seed, "facts"), &format, 2, 0.0).unwrap();
    assert_eq!(drawn(1), drawn(1));
    assert_ne!(drawn(1), drawn(2));
}

#[test]
fn a_code_is_never_told() {
    assert!(
        ATTRIBUTES
            .iter()
            .all(|attribute| !attribute.contains("code"))
    );
}
