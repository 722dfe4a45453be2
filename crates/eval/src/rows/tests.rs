use std::path::PathBuf;

use serde_json::Value;

use super::*;

fn file(folder: &tempfile::TempDir, bytes: &[u8]) -> PathBuf {
    let path = folder.path().join("rows.jsonl");
    std::fs::write(&path, bytes).unwrap();
    path
}

fn number(line: &str) -> Result<u64, String> {
    let row: Value = serde_json::from_str(line).map_err(|error| error.to_string())?;
    row["n"].as_u64().ok_or_else(|| "no n".to_owned())
}

fn compressed(text: &str) -> Vec<u8> {
    ruzstd::encoding::compress_to_vec(text.as_bytes(), ruzstd::encoding::CompressionLevel::Fastest)
}

#[test]
fn plain_and_compressed_files_hold_the_same_rows_and_several_frames_are_one_file() {
    let folder = tempfile::tempdir().unwrap();
    let lines = "{\"n\":1}\n\n{\"n\":2}\n";
    let plain = read(&file(&folder, lines.as_bytes()), 0.0, number).unwrap();
    assert_eq!(plain.rows, [1, 2]);

    let mut frames = compressed(lines);
    frames.extend(compressed("{\"n\":3}"));
    let read_back = read(&file(&folder, &frames), 0.0, number).unwrap();
    assert_eq!(read_back.rows, [1, 2, 3]);
    assert_ne!(read_back.digest, plain.digest);
}

#[test]
fn malformed_rows_are_skipped_and_counted_up_to_the_threshold_and_refused_above_it() {
    let folder = tempfile::tempdir().unwrap();
    let path = file(
        &folder,
        b"{\"n\":1}\nnonsense\n{\"n\":2}\n{\"m\":3}\n\xff\xfe\n",
    );
    let rows = read(&path, 0.6, number).unwrap();
    assert_eq!(
        (rows.rows.as_slice(), rows.malformed),
        ([1, 2].as_slice(), 3)
    );

    let refused = read(&path, 0.59, number).unwrap_err();
    let Error::Malformed {
        malformed,
        lines,
        line,
        ..
    } = refused
    else {
        panic!("{refused}")
    };
    assert_eq!((malformed, lines, line), (3, 5, 2));
}

#[test]
fn a_file_of_another_format_is_refused_with_the_first_fault_whatever_the_threshold() {
    let folder = tempfile::tempdir().unwrap();
    let path = file(&folder, b"{\"m\":1}\n");
    let said = read(&path, 1.0, number).unwrap_err().to_string();
    assert!(said.contains("line 1") && said.contains("no n"), "{said}");
    let empty = read(&file(&folder, b"\n"), 1.0, number).unwrap_err();
    assert!(matches!(empty, Error::Damaged { .. }), "{empty}");
}

#[test]
fn a_truncated_or_damaged_frame_is_an_error_not_a_shorter_file() {
    let folder = tempfile::tempdir().unwrap();
    let whole = compressed(&"{\"n\":1}\n".repeat(200));
    for bytes in [&whole[..whole.len() - 4], &whole[..6]] {
        let damaged = read(&file(&folder, bytes), 0.0, number).unwrap_err();
        assert!(matches!(damaged, Error::Damaged { .. }), "{damaged}");
    }
    let mut behind = whole;
    behind.extend(b"garbage behind the frame");
    let damaged = read(&file(&folder, &behind), 0.0, number).unwrap_err();
    assert!(matches!(damaged, Error::Damaged { .. }), "{damaged}");
}
