//! What is held out is found again, however it is spaced.

use std::fs;

use super::HeldOut;
use crate::Error;

fn folder() -> (tempfile::TempDir, HeldOut) {
    let dir = tempfile::tempdir().unwrap();
    let rows = "{\"context\":\"The harbour of Lima, where the ships of the line lay.\",\"answers\":[\"Lima\",{\"t\":\"An answer of some length, deep inside\"}]}\n";
    fs::write(dir.path().join("dev.jsonl"), rows).unwrap();
    let held_out = HeldOut::of(Some(dir.path())).unwrap();
    (dir, held_out)
}

#[test]
fn a_text_is_known_by_its_letters_and_a_short_one_is_not() {
    let (_dir, held_out) = folder();
    assert!(held_out.has("the HARBOUR of Lima -- where the  ships of the line lay"));
    assert!(held_out.has("An answer of some length deep inside"));
    assert!(!held_out.has("Lima"));
    assert!(!held_out.has("The harbour of Lima, where other ships of the line lay."));
}

#[test]
fn an_evaluation_file_is_refused_under_any_name() {
    let (dir, held_out) = folder();
    let copy = dir.path().join("training.jsonl");
    fs::copy(dir.path().join("dev.jsonl"), &copy).unwrap();
    let digest = rows::digest(&copy).unwrap();
    assert!(matches!(
        held_out.refuse(&copy, &digest),
        Err(Error::HeldOut { .. })
    ));
    assert!(held_out.refuse(&copy, &blake3::hash(b"other")).is_ok());
    assert!(held_out.refuse_share(&copy, 50, 100).is_err());
    assert!(held_out.refuse_share(&copy, 49, 100).is_ok());
}

#[test]
fn a_folder_without_evaluation_files_is_a_mistake() {
    let dir = tempfile::tempdir().unwrap();
    assert!(matches!(
        HeldOut::of(Some(dir.path())),
        Err(Error::NoData { .. })
    ));
    assert!(
        !HeldOut::of(None)
            .unwrap()
            .has("anything that is long enough to be known")
    );
}
