//! What is kept comes back whole or not at all, and there is never more of it than may be.

use proptest::{collection::vec, prelude::*};

use super::*;

const STATE: [u8; 32] = [7; 32];

fn key(session: u64, part: u8) -> Key {
    Key { session, part }
}

fn open(dir: &Path, limit: u64) -> Snapshots {
    Snapshots::open(dir, limit, "base", "generator").unwrap()
}

#[test]
fn what_is_put_is_got_and_what_is_removed_is_not() {
    let dir = tempfile::tempdir().unwrap();
    let mut snapshots = open(dir.path(), 10_000);
    for part in 0..2 {
        assert!(snapshots.put(key(1, part), STATE, &[part; 100]).unwrap());
    }
    assert!(snapshots.put(key(2, 0), STATE, &[]).unwrap());
    assert_eq!(snapshots.get(key(1, 1), STATE).unwrap().unwrap(), [1; 100]);
    assert_eq!(snapshots.get(key(2, 0), STATE).unwrap().unwrap(), []);
    snapshots.remove(1);
    assert_eq!(snapshots.get(key(1, 1), STATE).unwrap(), None);
    let kept = snapshots.kept();
    assert_eq!((kept.files, kept.bytes), (1, HEAD as u64));
}

#[test]
fn what_was_used_longest_ago_makes_room() {
    let dir = tempfile::tempdir().unwrap();
    let mut snapshots = open(dir.path(), 3 * (HEAD as u64 + 100));
    for session in 1..4 {
        snapshots.put(key(session, 0), STATE, &[0; 100]).unwrap();
    }
    snapshots.get(key(1, 0), STATE).unwrap().unwrap();
    snapshots.put(key(4, 0), STATE, &[0; 100]).unwrap();
    let here = [1, 2, 3, 4].map(|session| snapshots.get(key(session, 0), STATE).unwrap().is_some());
    assert_eq!(here, [true, false, true, true]);
    // What is larger than all that may be leaves the others alone.
    assert!(!snapshots.put(key(5, 0), STATE, &[0; 1000]).unwrap());
    assert_eq!((snapshots.kept().files, snapshots.kept().dropped), (3, 1));
}

#[test]
fn a_file_of_another_base_generator_state_or_format_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let mut snapshots = open(dir.path(), 10_000);
    let refused = |snapshots: &mut Snapshots, change: &dyn Fn(&mut Vec<u8>)| {
        snapshots.put(key(1, 0), STATE, &[1; 50]).unwrap();
        let path = snapshots.path(key(1, 0));
        let mut bytes = fs::read(&path).unwrap();
        change(&mut bytes);
        fs::write(&path, bytes).unwrap();
        let error = snapshots.get(key(1, 0), STATE).unwrap_err();
        // It is gone: it is not asked for again.
        assert_eq!(snapshots.get(key(1, 0), STATE).unwrap(), None);
        error
    };
    let foreign = |error| match error {
        SnapshotError::Foreign { what, .. } => what,
        error => panic!("{error}"),
    };
    for (at, what) in [(12, "base"), (44, "generator"), (76, "state")] {
        assert_eq!(
            foreign(refused(&mut snapshots, &|bytes| bytes[at] ^= 1)),
            what
        );
    }
    let error = refused(&mut snapshots, &|bytes| bytes[8] = 2);
    assert!(
        matches!(error, SnapshotError::Format { found: 2, .. }),
        "{error}"
    );
    let error = refused(&mut snapshots, &|bytes| bytes[0] = 0);
    assert!(matches!(error, SnapshotError::NotOne { .. }), "{error}");
    snapshots.put(key(1, 0), STATE, &[1; 50]).unwrap();
    assert_eq!(
        foreign(snapshots.get(key(1, 0), [8; 32]).unwrap_err()),
        "state"
    );
}

proptest! {
    #[test]
    fn no_changed_or_cut_file_comes_back(payload in vec(any::<u8>(), 0..60), at in any::<prop::sample::Index>(), to in any::<u8>(), cut in any::<bool>()) {
        let dir = tempfile::tempdir().unwrap();
        let mut snapshots = open(dir.path(), 10_000);
        snapshots.put(key(1, 0), STATE, &payload).unwrap();
        let path = snapshots.path(key(1, 0));
        let mut bytes = fs::read(&path).unwrap();
        let at = at.index(bytes.len());
        let same = !cut && bytes[at] == to;
        if cut {
            bytes.truncate(at);
        } else {
            bytes[at] = to;
        }
        fs::write(&path, &bytes).unwrap();
        prop_assert_eq!(snapshots.get(key(1, 0), STATE).is_ok(), same);
        // Nor does one that has grown.
        snapshots.put(key(1, 0), STATE, &payload).unwrap();
        let mut bytes = fs::read(&path).unwrap();
        bytes.push(to);
        fs::write(&path, bytes).unwrap();
        prop_assert!(snapshots.get(key(1, 0), STATE).is_err());
    }
}

#[test]
fn what_an_ended_process_has_left_is_swept_and_what_a_living_one_has_is_not() {
    let dir = tempfile::tempdir().unwrap();
    let mut living = open(dir.path(), 10_000);
    living.put(key(1, 0), STATE, &[1]).unwrap();
    let left = dir.path().join("1-0");
    fs::create_dir(&left).unwrap();
    fs::write(left.join("lock"), []).unwrap();
    fs::write(left.join("1-0.snapshot"), [1; 10]).unwrap();
    let foreign = dir.path().join("not-ours");
    fs::create_dir(&foreign).unwrap();
    let other = open(dir.path(), 10_000);
    assert!(!left.exists() && foreign.exists());
    assert_eq!(living.get(key(1, 0), STATE).unwrap().unwrap(), [1]);
    let mine = living.dir.clone();
    drop(living);
    assert!(!mine.exists() && other.dir.exists());
}
