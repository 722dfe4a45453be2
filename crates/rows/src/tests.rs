//! Files as they may be.

use std::path::PathBuf;

use super::{Count, Error, collect, digest, each, read};
use crate::frames::{MAGIC, MAX_WINDOW};

fn file(bytes: &[u8]) -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("rows.jsonl.zst");
    std::fs::write(&path, bytes).unwrap();
    (folder, path)
}

/// The texts of a file's rows, taken one by one.
fn texts(bytes: &[u8], allowed: f64) -> Result<(Vec<String>, Count), Error> {
    let (_folder, path) = file(bytes);
    let mut texts = Vec::new();
    let count = read(&path, allowed, |row| {
        let text = row.get("text").and_then(|text| text.as_str());
        texts.push(text.ok_or("no `text`")?.to_owned());
        Ok(())
    })?;
    Ok((texts, count))
}

/// The numbers of a file's rows, kept.
fn numbers(bytes: &[u8], allowed: f64) -> Result<super::Rows<u64>, Error> {
    let (_folder, path) = file(bytes);
    collect(&path, allowed, |line| {
        let row: serde_json::Value =
            serde_json::from_str(line).map_err(|error| error.to_string())?;
        row["n"].as_u64().ok_or_else(|| "no n".to_owned())
    })
}

fn compressed(text: &str) -> Vec<u8> {
    ruzstd::encoding::compress_to_vec(text.as_bytes(), ruzstd::encoding::CompressionLevel::Fastest)
}

#[test]
fn frames_follow_each_other_within_a_row_and_plain_files_are_read_too() {
    let (one, two) = ("{\"text\":\"a\"}\n{\"te", "xt\":\"b\"}\n\n{\"text\":\"c\"}");
    let mut frames = compressed(one);
    frames.extend(compressed(two));
    for bytes in [frames, format!("{one}{two}").into_bytes()] {
        let (texts, count) = texts(&bytes, 0.0).unwrap();
        assert_eq!(texts, ["a", "b", "c"]);
        assert_eq!((count.rows, count.malformed), (3, 0));
    }
}

#[test]
fn what_is_kept_is_in_the_files_order_with_its_digest() {
    let lines = "{\"n\":1}\n\n{\"n\":2}\n";
    let plain = numbers(lines.as_bytes(), 0.0).unwrap();
    assert_eq!(plain.rows, [1, 2]);
    let mut frames = compressed(lines);
    frames.extend(compressed("{\"n\":3}"));
    let kept = numbers(&frames, 0.0).unwrap();
    assert_eq!(kept.rows, [1, 2, 3]);
    assert_eq!(kept.digest, blake3::hash(&frames));
    let (_folder, path) = file(&frames);
    assert_eq!(digest(&path).unwrap(), kept.digest);
}

#[test]
fn malformed_rows_are_counted_and_too_many_refused_with_the_first() {
    let bytes = b"{\"text\":\"a\"}\nnonsense\n{\"text\":1}\n[]\n{\"text\":\"b\"}\n\xff\xfe\n";
    let (taken, count) = texts(bytes, 0.7).unwrap();
    assert_eq!(taken, ["a", "b"]);
    assert_eq!((count.rows, count.malformed), (6, 4));
    let refused = texts(bytes, 0.5).unwrap_err();
    let Error::Malformed {
        malformed,
        rows,
        first,
        ..
    } = refused
    else {
        panic!("{refused}")
    };
    assert_eq!((malformed, rows, first), (4, 6, 2));
}

#[test]
fn kept_rows_are_refused_above_the_threshold_and_not_at_it() {
    let bytes = b"{\"n\":1}\nnonsense\n{\"n\":2}\n{\"m\":3}\n\xff\xfe\n";
    let kept = numbers(bytes, 0.6).unwrap();
    assert_eq!((kept.rows.as_slice(), kept.malformed), (&[1, 2][..], 3));
    let refused = numbers(bytes, 0.59).unwrap_err();
    let Error::Malformed {
        malformed,
        rows,
        first,
        ..
    } = refused
    else {
        panic!("{refused}")
    };
    assert_eq!((malformed, rows, first), (3, 5, 2));
}

#[test]
fn a_file_without_a_usable_row_is_not_kept_whatever_the_threshold() {
    let said = numbers(b"{\"m\":1}\n", 1.0).unwrap_err().to_string();
    assert!(said.contains("row 1") && said.contains("no n"), "{said}");
    let empty = numbers(b"\n", 1.0).unwrap_err();
    assert!(matches!(empty, Error::Damaged { .. }), "{empty}");
    // Who keeps nothing may look at such a file.
    assert!(texts(b"{\"m\":1}\n", 1.0).unwrap().0.is_empty());
}

#[test]
fn a_truncated_or_damaged_frame_is_an_error_not_a_shorter_file() {
    let whole = compressed(&"{\"n\":1}\n".repeat(200));
    let mut behind = whole.clone();
    behind.extend(b"garbage behind the frame");
    for bytes in [&whole[..whole.len() - 4], &whole[..6], &behind] {
        for damaged in [
            numbers(bytes, 1.0).unwrap_err(),
            texts(bytes, 1.0).unwrap_err(),
        ] {
            assert!(matches!(damaged, Error::Damaged { .. }), "{damaged}");
        }
    }
}

#[test]
fn a_frame_may_ask_for_the_largest_window_and_for_no_larger_one() {
    // A frame header with a window of 2^(10 + exponent) (1 + mantissa / 8) bytes, and one raw block.
    let row = b"{\"n\":1}";
    let frame = |mantissa: u8| {
        let exponent = u8::try_from(MAX_WINDOW.trailing_zeros() - 10).unwrap();
        let mut frame = MAGIC.to_vec();
        frame.extend([0, exponent << 3 | mantissa]);
        frame.extend([1 | u8::try_from(row.len()).unwrap() << 3, 0, 0]);
        frame.extend(row);
        frame
    };
    assert_eq!(numbers(&frame(0), 0.0).unwrap().rows, [1]);
    let refused = numbers(&frame(1), 0.0).unwrap_err();
    assert!(matches!(refused, Error::Damaged { .. }), "{refused}");
}

#[test]
fn no_more_rows_are_read_than_may_be_kept() {
    let (_folder, path) = file(b"1\n\n2\n3\n");
    let mut seen = 0;
    let mut count = |most| {
        each(&path, most, |_| {
            seen += 1;
            Ok(())
        })
        .map(|lines| lines.count.rows)
    };
    assert_eq!(count(3).unwrap(), 3);
    assert!(matches!(count(2), Err(Error::Damaged { .. })));
    assert_eq!(seen, 3 + 2);
}
