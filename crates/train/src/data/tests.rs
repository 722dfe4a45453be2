//! Rows become tokens once; what is held out does not become any.

use std::{fs, path::Path};

use super::{Pool, cache};
use crate::{Error, batch::tests::format, recipe::Recipe};

fn recipe() -> Recipe {
    let text = "start = \"x\"\nlength = { steps = 1 }\nlayout = []\n[data]\nfolder = \"x\"\ncorpus = \"text.jsonl\"\nqa = \"qa.jsonl\"\ndialogues = \"chat.jsonl\"\nfewshot = \"tasks.jsonl\"\nheld_out = \"eval\"\nqa_chars = [10, 200]\npiece_chars = 400\nmix = { corpus = 1 }\n";
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
    // Two rows are no dialogues, one is known from an evaluation file.
    let mut chat =
        "{\"task\":\"other\",\"input\":\"x\"}\n{\"turns\":[{\"speaker\":\"A\",\"text\":\"hm\"}]}\n"
            .to_owned();
    chat.push_str("{\"turns\":[{\"speaker\":\"A\",\"text\":\"The evaluation said this before us.\"},{\"speaker\":\"B\",\"text\":\"b\"},{\"speaker\":\"A\",\"text\":\"the evaluation said this before us\"}]}\n");
    for n in 0..300 {
        let personas = match n % 2 {
            0 => "",
            _ => {
                ",\"personas\":[[\"I keep bees and I sell their honey.\"],[\"I mend shoes for a living.\"]]"
            }
        };
        chat.push_str(&format!("{{\"turns\":[{{\"speaker\":\"A\",\"text\":\"Did you see number {n} today?\"}},{{\"speaker\":\"B\",\"text\":\"No, not yet.\"}},{{\"speaker\":\"A\",\"text\":\"Oh.\"}},{{\"speaker\":\"B\",\"text\":\"Ah.\"}}]{personas}}}\n"));
    }
    fs::write(folder.join("chat.jsonl"), chat).unwrap();
    let tasks: String = (0..1200)
        .map(|n| {
            format!(
                "{{\"task\":\"parity\",\"input\":\"{n}\",\"output\":\"{}\"}}\n",
                if n % 2 == 0 { "even" } else { "odd" }
            )
        })
        .collect();
    fs::write(folder.join("tasks.jsonl"), tasks).unwrap();
    let dev = "{\"said\":\"The evaluation said this before us!\"}\n{\"context\":\"in the year 7 the mill of the village burnt down\",\"question\":\"what burnt down in the YEAR 8 of all things\"}\n";
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
        (600 + 303 + 1200, 0, 3)
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

#[test]
fn of_a_dialogue_what_comes_later_is_wanted_and_of_a_persona_what_its_speaker_says() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path());
    let pool = load(dir.path(), &dir.path().join("home")).unwrap();
    let text = format(64, 24).text;
    let all: Vec<_> = [&pool.train, &pool.validation]
        .iter()
        .flat_map(|split| &split.dialogues)
        .collect();
    let (mut personas, mut earlier) = (0, 0);
    for asked in &all {
        assert!(asked.context.len() < 64);
        let told = text.decode(&asked.context).unwrap();
        for question in &asked.questions {
            let said = text.decode(&question.tokens).unwrap();
            let from = question.tokens.len() - question.scored;
            let reply = text.decode(&question.tokens[from..]).unwrap();
            assert!(reply.starts_with(' ') && reply.ends_with('\n'), "{reply:?}");
            assert!(!told.contains(reply.trim()), "{told:?} {reply:?}");
            if told.contains("bees") {
                assert!(said.contains("A:"), "{said:?}");
                assert_eq!(reply, " Oh.\n");
                personas += 1;
            } else if told.contains("shoes") {
                assert_eq!(reply, " Ah.\n");
                personas += 1;
            } else {
                earlier += 1;
            }
        }
    }
    assert!(personas > 50 && earlier > 50, "{personas} {earlier}");
}

#[test]
fn examples_that_are_told_are_not_asked() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path());
    let pool = load(dir.path(), &dir.path().join("home")).unwrap();
    let text = format(64, 24).text;
    assert!(!pool.train.fewshot.is_empty() && !pool.validation.fewshot.is_empty());
    for asked in &pool.train.fewshot {
        let told = text.decode(&asked.context).unwrap();
        for question in &asked.questions {
            let said = text.decode(&question.tokens).unwrap();
            let input = said.split('\n').next().unwrap();
            assert!(
                input.starts_with("Q: ") && !told.contains(&format!("{input}\n")),
                "{told:?} {said:?}"
            );
        }
    }
}
