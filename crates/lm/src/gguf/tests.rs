//! The GGUF reader against the real file, against candle's reader, and against damage.

use std::io::Cursor;

use proptest::prelude::*;

use super::{Array, Gguf, Input, Value, read_header};
use crate::files::FileError;

fn read(bytes: &[u8]) -> Result<Gguf, FileError> {
    let path = std::path::Path::new("memory.gguf");
    read_header(&mut Input {
        path,
        inner: Cursor::new(bytes),
        position: 0,
        length: bytes.len() as u64,
    })
}

fn string(text: &str) -> Vec<u8> {
    let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(text.as_bytes());
    bytes
}

/// A file of three keys and two tensors: an F32 [2, 4] and a Q4_0 [1, 32].
fn small() -> Vec<u8> {
    let mut b = b"GGUF".to_vec();
    b.extend(3_u32.to_le_bytes());
    b.extend(2_u64.to_le_bytes());
    b.extend(3_u64.to_le_bytes());
    b.extend(string("general.architecture"));
    b.extend(8_u32.to_le_bytes());
    b.extend(string("llama"));
    b.extend(string("llama.block_count"));
    b.extend(4_u32.to_le_bytes());
    b.extend(7_u32.to_le_bytes());
    b.extend(string("words"));
    b.extend(9_u32.to_le_bytes());
    b.extend(8_u32.to_le_bytes());
    b.extend(2_u64.to_le_bytes());
    b.extend(string("a"));
    b.extend(string("bc"));
    for (name, shape, number, offset) in [("x", [4_u64, 2], 0_u32, 0_u64), ("y", [32, 1], 2, 32)] {
        b.extend(string(name));
        b.extend(2_u32.to_le_bytes());
        for size in shape {
            b.extend(size.to_le_bytes());
        }
        b.extend(number.to_le_bytes());
        b.extend(offset.to_le_bytes());
    }
    b.resize(b.len().next_multiple_of(32) + 32 + 18, 0);
    b
}

#[test]
fn a_small_file_reads_back() {
    let gguf = read(&small()).unwrap();
    assert_eq!(gguf.string("general.architecture").unwrap(), Some("llama"));
    assert_eq!(gguf.u64("llama.block_count").unwrap(), Some(7));
    assert_eq!(
        gguf.value("words"),
        Some(&Value::Array(Array::String(vec!["a".into(), "bc".into()])))
    );
    assert_eq!(gguf.string("absent").unwrap(), None);
    assert!(
        gguf.u64("general.architecture").is_err(),
        "a string is no number"
    );
    let (x, y) = (gguf.tensor("x").unwrap(), gguf.tensor("y").unwrap());
    assert_eq!((x.bytes, y.bytes), (32, 18));
    assert_eq!(y.offset - x.offset, 32);
    assert_eq!(y.offset + y.bytes, small().len() as u64);
}

#[test]
fn a_file_cut_anywhere_is_an_error() {
    let whole = small();
    for length in 0..whole.len() {
        assert!(read(&whole[..length]).is_err(), "cut at {length}");
    }
}

#[test]
fn counts_that_cannot_fit_are_errors_before_anything_is_allocated() {
    for at in [8, 16, 24] {
        let mut bytes = small();
        bytes[at..at + 8].copy_from_slice(&(u64::MAX / 2).to_le_bytes());
        let error = read(&bytes).unwrap_err().to_string();
        assert!(error.contains("memory.gguf is damaged"), "{error}");
    }
}

#[test]
fn overlapping_tensors_are_an_error() {
    // Many tensors over the same bytes would let a small file fill a large memory.
    let mut b = b"GGUF".to_vec();
    b.extend(3_u32.to_le_bytes());
    b.extend(200_u64.to_le_bytes());
    b.extend(0_u64.to_le_bytes());
    for i in 0..200 {
        b.extend(string(&format!("t{i:03}")));
        b.extend(1_u32.to_le_bytes());
        b.extend(1024_u64.to_le_bytes());
        b.extend(0_u32.to_le_bytes());
        b.extend(0_u64.to_le_bytes());
    }
    b.resize(b.len().next_multiple_of(32) + 4096, 0);
    let error = read(&b).unwrap_err().to_string();
    assert!(error.contains("overlap"), "{error}");
}

#[test]
fn the_real_file_reads_as_candle_reads_it() {
    let path = testkit::smollm2_gguf();
    let ours = Gguf::open(&path).unwrap();
    let mut file = std::fs::File::open(&path).unwrap();
    let theirs = candle_core::quantized::gguf_file::Content::read(&mut file).unwrap();
    assert_eq!(ours.metadata.len(), theirs.metadata.len());
    assert_eq!(ours.tensors.len(), theirs.tensor_infos.len());
    for (name, info) in &theirs.tensor_infos {
        let own = ours.tensor(name).unwrap();
        let shape: Vec<u64> = info.shape.dims().iter().rev().map(|&d| d as u64).collect();
        assert_eq!(own.shape, shape, "{name}");
        assert_eq!(
            own.offset,
            theirs.tensor_data_offset + info.offset,
            "{name}"
        );
    }
    let tokens = ours.strings("tokenizer.ggml.tokens").unwrap().unwrap();
    assert_eq!(tokens.len(), 49_152);
    assert_eq!(ours.string("general.architecture").unwrap(), Some("llama"));
}

proptest! {
    #[test]
    fn flipped_bytes_never_panic(flips in prop::collection::vec((0_usize..400, any::<u8>()), 1..6)) {
        let mut bytes = small();
        for (at, to) in flips {
            let length = bytes.len();
            bytes[at % length] = to;
        }
        if let Ok(gguf) = read(&bytes) {
            for name in gguf.tensor_names() {
                let info = gguf.tensor(name).unwrap();
                prop_assert!(info.offset + info.bytes <= bytes.len() as u64);
            }
        }
    }
}
