//! A file is whole or the one before.

use std::fs;

use super::write_whole;

#[test]
fn a_file_that_cannot_be_written_leaves_the_one_before() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("folder/file");
    write_whole(&path, b"before").unwrap();
    // Where the new file would be written stands a folder.
    fs::create_dir(dir.path().join("folder/file.new")).unwrap();
    assert!(write_whole(&path, b"after").is_err());
    assert_eq!(fs::read(&path).unwrap(), b"before");
    fs::remove_dir(dir.path().join("folder/file.new")).unwrap();
    write_whole(&path, b"after").unwrap();
    assert_eq!(fs::read(&path).unwrap(), b"after");
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_leaves_the_file_before_and_nothing_beside() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("file");
    write_whole(&path, b"before").unwrap();
    // Whatever is written to /dev/full finds no room.
    std::os::unix::fs::symlink("/dev/full", dir.path().join("file.new")).unwrap();
    let error = write_whole(&path, b"after").unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::StorageFull);
    assert_eq!(fs::read(&path).unwrap(), b"before");
    assert!(fs::symlink_metadata(dir.path().join("file.new")).is_err());
}
