//! A picture of what was told.

use super::svg;

#[test]
fn each_kind_that_was_told_has_a_curve_and_its_dots() {
    let lines = "{\"step\":1,\"running\":{\"answer\":{\"ce\":3.0}}}\nbroken\n{\"step\":2,\"running\":{\"answer\":{\"ce\":2.0}}}\n{\"step\":2,\"held_out\":{\"answer\":{\"ce\":2.5},\"negative\":{\"kl\":0.5}}}\n";
    let picture = svg(lines);
    assert_eq!(picture.matches("<circle").count(), 2);
    assert!(
        picture.contains("answer")
            && picture.contains("negative")
            && !picture.contains("completion")
    );
    assert!(picture.starts_with("<svg") && picture.ends_with("</svg>\n"));
    assert!(!svg("").contains("NaN"));
}
