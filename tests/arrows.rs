//! The arrows between rooms, held against `cargo metadata`. A new one brings its reason into ARCHITECTURE.md.

use std::collections::{BTreeMap, BTreeSet};

use cargo_metadata::{DependencyKind, MetadataCommand};

/// Each room with the rooms that it may use. `testkit` may be used in the tests of any but its own.
const ARROWS: [(&str, &[&str]); 17] = [
    ("imprint-proto", &[]),
    ("kernels", &[]),
    ("relevance", &[]),
    ("rows", &[]),
    ("store", &[]),
    ("testkit", &[]),
    ("xtask", &[]),
    ("generator", &["kernels"]),
    ("lm", &["generator", "kernels"]),
    // In its tests alone: what runs on a device is held against the CPU's forward, sites and operations.
    ("cuda", &["lm", "generator", "kernels"]),
    ("engine", &["lm", "generator", "kernels"]),
    ("device", &["engine", "lm", "generator", "cuda"]),
    ("imprint-client", &["imprint-proto"]),
    (
        "bench",
        &[
            "engine",
            "lm",
            "generator",
            "kernels",
            "store",
            "imprint-client",
        ],
    ),
    (
        "eval",
        &[
            "engine",
            "lm",
            "generator",
            "kernels",
            "relevance",
            "rows",
            // In its tests alone: an evaluation on a device is held against one on the processor.
            "device",
        ],
    ),
    ("train", &["lm", "generator", "kernels", "rows"]),
    // Of the rooms below the engine only lm, and of it only `lm::text`; `client`, `bench`, `train` and `eval` are main.rs's.
    (
        "server",
        &[
            "engine",
            "lm",
            "relevance",
            "store",
            "imprint-proto",
            "imprint-client",
            "bench",
            "train",
            "eval",
            // Under the feature `cuda` alone.
            "device",
        ],
    ),
];

#[test]
fn rooms_use_only_the_rooms_that_they_may() {
    let metadata = MetadataCommand::new().no_deps().exec().unwrap();
    let allowed: BTreeMap<_, BTreeSet<_>> = ARROWS
        .into_iter()
        .map(|(room, uses)| (room, uses.iter().copied().collect()))
        .collect();
    let rooms: BTreeSet<String> = metadata
        .packages
        .iter()
        .map(|package| package.name.to_string())
        .collect();
    for package in &metadata.packages {
        let name = package.name.to_string();
        let may = allowed
            .get(name.as_str())
            .unwrap_or_else(|| panic!("`{name}` has no line in tests/arrows.rs"));
        for dependency in package
            .dependencies
            .iter()
            .filter(|dependency| rooms.contains(&dependency.name))
        {
            let test =
                dependency.kind == DependencyKind::Development && dependency.name == "testkit";
            assert!(
                test && name != "testkit" || may.contains(dependency.name.as_str()),
                "`{name}` may not use `{}`",
                dependency.name
            );
        }
    }
}

#[test]
fn server_uses_no_more_of_lm_than_its_text_and_names_client_and_tools_in_main_alone() {
    let folder = testkit::repository_root().join("server/src");
    let mut folders = vec![folder];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            let source = std::fs::read_to_string(&path).unwrap();
            let others = source.match_indices("lm::").filter(|(at, _)| {
                let word = source[..*at]
                    .chars()
                    .next_back()
                    .is_some_and(|c| c.is_alphanumeric() || c == '_');
                !word
                    && !source[*at..].starts_with("lm::text::")
                    && !source[*at..].starts_with("lm::text`")
            });
            assert_eq!(
                others.count(),
                0,
                "{} uses more of lm than lm::text",
                path.display()
            );
            if path.file_name().is_none_or(|name| name != "main.rs") {
                assert!(
                    ["imprint_client::", "bench::", "train::", "eval::"]
                        .iter()
                        .all(|room| !source.contains(room)),
                    "{}",
                    path.display()
                );
            }
        }
    }
}
