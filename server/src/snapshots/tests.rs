//! Every job is answered, whatever becomes of the files.

use std::{path::Path, sync::mpsc, time::Duration};

use super::*;

const DIGEST: Digest = Digest([3; 32]);
const SESSION: SessionId = SessionId(1);
const BOTH: Need = Need {
    core: true,
    sums: true,
};

/// A core of no sites, and the sums of no documents.
fn snapshot() -> Snapshot {
    Snapshot::read(DIGEST, Some(&[0; 8]), Some(&[0; 9])).unwrap()
}

fn disk(dir: &Path, budget_bytes: u64) -> (Disk, Gauge, mpsc::Receiver<Command>) {
    let (answers, heard) = mpsc::channel();
    let place = Place {
        dir: dir.to_owned(),
        budget_bytes,
    };
    let made_with = ("base".to_owned(), "generator".to_owned());
    let gauge = Gauge::default();
    let disk = Disk::start(place, made_with, gauge.clone(), move |command| {
        answers.send(command).is_ok()
    });
    (disk.unwrap(), gauge, heard)
}

fn save(disk: &Disk, heard: &mpsc::Receiver<Command>) -> Need {
    let snapshot = snapshot();
    disk.send(Job::Save {
        session: SESSION,
        snapshot,
    })
    .unwrap();
    match heard.recv_timeout(Duration::from_secs(20)).unwrap() {
        Command::Saved {
            session: SESSION,
            digest: DIGEST,
            kept,
        } => kept,
        other => panic!("{other:?}"),
    }
}

fn want(disk: &Disk, heard: &mpsc::Receiver<Command>, need: Need) -> Need {
    disk.send(Job::Want {
        session: SESSION,
        digest: DIGEST,
        need,
    })
    .unwrap();
    match heard.recv_timeout(Duration::from_secs(20)).unwrap() {
        Command::Restored {
            session: SESSION,
            snapshot,
        } => snapshot.map_or(Need::default(), |snapshot| snapshot.holds()),
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_is_saved_is_restored_as_far_as_it_is_needed_until_it_is_removed() {
    let dir = tempfile::tempdir().unwrap();
    let (disk, gauge, heard) = disk(&dir.path().join("snapshots"), 1 << 20);
    assert_eq!(want(&disk, &heard, BOTH), Need::default());
    assert_eq!(save(&disk, &heard), BOTH);
    assert_eq!(want(&disk, &heard, BOTH), BOTH);
    let core = Need {
        core: true,
        sums: false,
    };
    assert_eq!(want(&disk, &heard, core), core);
    assert_eq!((gauge.kept().files, gauge.kept().read), (2, 3));
    disk.send(Job::Remove { session: SESSION }).unwrap();
    assert_eq!(want(&disk, &heard, BOTH), Need::default());
    assert_eq!(gauge.kept().bytes, 0);
}

#[test]
fn a_folder_that_cannot_be_had_and_a_budget_that_is_too_small_are_answered() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("a-file");
    std::fs::write(&file, []).unwrap();
    let (no_folder, _, heard) = disk(&file, 1 << 20);
    assert_eq!(save(&no_folder, &heard), Need::default());
    let (small, _, heard) = disk(dir.path(), 10);
    assert_eq!(save(&small, &heard), Need::default());
    assert_eq!(want(&small, &heard, BOTH), Need::default());
}

#[test]
fn a_damaged_file_is_not_restored() {
    let dir = tempfile::tempdir().unwrap();
    let (disk, gauge, heard) = disk(dir.path(), 1 << 20);
    save(&disk, &heard);
    let folder = std::fs::read_dir(dir.path()).unwrap().next().unwrap();
    for file in std::fs::read_dir(folder.unwrap().path()).unwrap() {
        let path = file.unwrap().path();
        if path.extension().is_some_and(|of| of == "snapshot") {
            std::fs::write(path, b"imprsnap and what not").unwrap();
        }
    }
    assert_eq!(want(&disk, &heard, BOTH), Need::default());
    assert_eq!(gauge.kept().refused, 2);
}

#[test]
fn what_nobody_keeps_is_answered_all_the_same() {
    let snapshot = snapshot();
    let saved = without_disk(&Job::Save {
        session: SESSION,
        snapshot,
    });
    assert!(matches!(saved, Some(Command::Saved { kept, .. }) if !kept.any()));
    let restored = without_disk(&Job::Want {
        session: SESSION,
        digest: DIGEST,
        need: BOTH,
    });
    assert!(matches!(
        restored,
        Some(Command::Restored { snapshot: None, .. })
    ));
}
