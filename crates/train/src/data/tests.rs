//! Rows become tokens once; what is held out does not become any.

use std::{fs, path::Path};

use super::{Pool, cache};
use crate::{Error, batch::tests::format, recipe::Recipe};

fn recipe() -> Recipe {
    let text = "start = \"x\"\nlength = { steps = 1 }\nlayout = []\n[data]\nfolder = \"x\"\ncorpus = \"text.jsonl\"\nqa = \"qa.jsonl\"\nheld_out = \"eval\"\nqa_chars = [10, 200]\npiece_chars = 400\nmix = { corpus = 1 }\n";
    toml::from_str(text).unwrap()
}

/// 300 documents and paragraphs: some of each hash to validation.
fn write(folder: &Path) {
    fs::create_dir_all(folder.join("eval")).unwrap();
    let words = |n: usize| {
        (0..40)
            .map(|i| format!("word{} ", n * 7 + i))
            .collect::<String>()
    };
    let text: String = (0..300)
        .map(|n| format!("{{\"text\":\"{}\"}}\n", words(n)))
        .collect();
    fs::write(folder.join("text.jsonl"), text).unwrap();
    let qa: String = (0..300)
        .map(|n| format!("{{\"context\":\"In the year {n} the mill of the village burnt down.\",\"question\":\"What burnt down in the year {n}, of all things?\",\"answers\":[\"the mill\"]}}\n"))
        .collect();
    fs::write(folder.join("qa.jsonl"), qa).unwrap();
    let dev = "{\"context\":\"in the year 7 the mill of the village burnt down\",\"question\":\"what burnt down in the YEAR 8 of all things\"}\n";
    fs::write(folder.join("eval/dev.jsonl"), dev).unwrap();
}

fn load(folder: &Path, home: &Path) -> Result<Pool, Error> {
    Pool::load(&recipe(), folder, &format(64, 24), "base", home, &|_| {})
}

#[test]
fn what_is_held_out_is_dropped_and_counted() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path());
    let pool = load(dir.path(), &dir.path().join("home")).unwrap();
    assert_eq!(
        (pool.told.rows, pool.told.malformed, pool.told.held_out),
        (600, 0, 2)
    );
    assert_eq!(pool.train.asked.len() + pool.validation.asked.len(), 298);
    assert!(!pool.validation.asked.is_empty() && pool.validation.pieces.len() >= 2);
    let text = format(64, 24).text;
    for asked in pool.train.asked.iter().chain(&pool.validation.asked) {
        assert!(asked.context.len() < 64);
        let question = &asked.questions[0];
        let said = text.decode(&question.tokens).unwrap();
        let answer = text
            .decode(&question.tokens[question.tokens.len() - question.scored..])
            .unwrap();
        assert!(
            said.ends_with("A: the mill\n") && answer == " the mill\n",
            "{said:?} {answer:?}"
        );
    }
}

#[test]
fn a_validation_text_is_never_trained_on() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path());
    let pool = load(dir.path(), &dir.path().join("home")).unwrap();
    for asked in &pool.validation.asked {
        assert!(
            !pool
                .train
                .asked
                .iter()
                .any(|other| other.context == asked.context)
        );
    }
    for piece in &pool.validation.pieces {
        assert!(!pool.train.pieces.contains(piece));
    }
}

#[test]
fn cached_tokens_are_the_same_and_a_damaged_cache_is_made_again() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path());
    let home = dir.path().join("home");
    let pool = load(dir.path(), &home).unwrap();
    let file = fs::read_dir(home.join("tokens"))
        .unwrap()
        .next()
        .unwrap()
        .unwrap()
        .path();
    assert_eq!(cache::read(&file), Some(pool.clone()));
    assert_eq!(load(dir.path(), &home).unwrap(), pool);
    let mut bytes = fs::read(&file).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    fs::write(&file, bytes).unwrap();
    assert_eq!(cache::read(&file), None);
    assert_eq!(load(dir.path(), &home).unwrap(), pool);
    // Other rows, other tokens.
    fs::write(dir.path().join("eval/more.jsonl"), "{}\n").unwrap();
    load(dir.path(), &home).unwrap();
    assert_eq!(fs::read_dir(home.join("tokens")).unwrap().count(), 2);
}

#[test]
fn an_evaluation_file_is_not_trained_on() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path());
    fs::copy(
        dir.path().join("qa.jsonl"),
        dir.path().join("eval/copy.jsonl"),
    )
    .unwrap();
    let error = load(dir.path(), &dir.path().join("home")).unwrap_err();
    assert!(matches!(error, Error::HeldOut { .. }), "{error}");
}
