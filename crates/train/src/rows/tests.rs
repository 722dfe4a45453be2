//! Files as they may be.

use std::{fs, path::Path};

use super::{Count, read};
use crate::Error;

fn file(bytes: &[u8]) -> (tempfile::TempDir, std::path::PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("rows.jsonl.zst");
    fs::write(&path, bytes).unwrap();
    (dir, path)
}

fn texts(path: &Path, allowed: f64) -> Result<(Vec<String>, Count), Error> {
    let mut texts = Vec::new();
    let count = read(path, allowed, |row| {
        let text = row
            .get("text")
            .and_then(|text| text.as_str())
            .ok_or("no `text`")?;
        texts.push(text.to_owned());
        Ok(())
    })?;
    Ok((texts, count))
}

fn compressed(text: &str) -> Vec<u8> {
    ruzstd::encoding::compress_to_vec(text.as_bytes(), ruzstd::encoding::CompressionLevel::Fastest)
}

#[test]
fn frames_follow_each_other_and_plain_files_are_read_too() {
    let (one, two) = ("{\"text\":\"a\"}\n{\"te", "xt\":\"b\"}\n\n{\"text\":\"c\"}");
    let mut frames = compressed(one);
    frames.extend(compressed(two));
    for bytes in [frames, format!("{one}{two}").into_bytes()] {
        let (_dir, path) = file(&bytes);
        let (texts, count) = texts(&path, 0.0).unwrap();
        assert_eq!(texts, ["a", "b", "c"]);
        assert_eq!(
            count,
            Count {
                rows: 3,
                malformed: 0
            }
        );
    }
}

#[test]
fn malformed_rows_are_counted_and_too_many_refused_with_the_first() {
    let (_dir, path) =
        file(b"{\"text\":\"a\"}\nnonsense\n{\"text\":1}\n[]\n{\"text\":\"b\"}\n\xff\xfe\n");
    let (texts_read, count) = texts(&path, 0.7).unwrap();
    assert_eq!(texts_read, ["a", "b"]);
    assert_eq!(
        count,
        Count {
            rows: 6,
            malformed: 4
        }
    );
    match texts(&path, 0.5).unwrap_err() {
        Error::Malformed {
            malformed,
            rows,
            first,
            ..
        } => assert_eq!((malformed, rows, first), (4, 6, 2)),
        other => panic!("{other}"),
    }
}

#[test]
fn a_damaged_frame_is_an_error_and_no_end() {
    let mut bytes = compressed(&"{\"text\":\"a long enough row to be cut\"}\n".repeat(500));
    bytes.truncate(bytes.len() - 5);
    let (_dir, path) = file(&bytes);
    assert!(matches!(texts(&path, 1.0), Err(Error::Damaged { .. })));
}
