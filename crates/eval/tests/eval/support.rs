//! A tiny model with its generator, rows of every task, and options as the command line has them.

use std::{fmt::Write as _, path::PathBuf};

use clap::Parser;
use eval::{
    Error,
    report::Report,
    run::{Args, evaluate},
};
use lm::{Lm, LoadOptions, text::Text};
use testkit::{GeneratorSpec, TINY_TOKENIZER_VOCAB, TinySpec, tiny_base, tiny_generator};

#[derive(Parser)]
struct CommandLine {
    #[command(flatten)]
    args: Args,
}

/// Options, as typed.
pub(crate) fn args(line: &str) -> Args {
    CommandLine::try_parse_from(["eval"].into_iter().chain(line.split_whitespace()))
        .unwrap_or_else(|error| panic!("{error}"))
        .args
}

/// What the command line says to options that it does not take.
pub(crate) fn refused(line: &str) -> String {
    let parsed = CommandLine::try_parse_from(["eval"].into_iter().chain(line.split_whitespace()));
    parsed.err().map(|error| error.to_string()).unwrap()
}

/// A tiny model whose every token has a text.
pub(crate) fn spec(context_length: usize) -> TinySpec {
    TinySpec {
        vocab: TINY_TOKENIZER_VOCAB,
        context_length,
        ..TinySpec::default()
    }
}

/// A model in a folder of its own.
pub(crate) struct Tiny {
    pub(crate) folder: tempfile::TempDir,
    pub(crate) lm: Lm,
    pub(crate) text: Text,
}

impl Tiny {
    pub(crate) fn new() -> Self {
        Self::with(spec(512), true)
    }

    pub(crate) fn with(spec: TinySpec, generator: bool) -> Self {
        let sizes = GeneratorSpec {
            document_suffix: Some("\n\n"),
            bos: Some(false),
            ..GeneratorSpec::default()
        };
        Self::of(spec, generator.then_some(sizes))
    }

    pub(crate) fn of(spec: TinySpec, generator: Option<GeneratorSpec>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let (base, made) = (folder.path().join("base"), folder.path().join("generator"));
        tiny_base(&base, &spec);
        let mut lm = Lm::load(&base, LoadOptions::default()).unwrap();
        if let Some(generator) = generator {
            tiny_generator(&made, &spec, &generator);
            lm.attach_generator(&made).unwrap();
        }
        let text = Text::load(&base).unwrap();
        Self { folder, lm, text }
    }

    pub(crate) fn base(&self) -> PathBuf {
        self.folder.path().join("base")
    }

    pub(crate) fn generator(&self) -> PathBuf {
        self.folder.path().join("generator")
    }

    /// Writes rows, and says where.
    pub(crate) fn rows(&self, rows: &[String]) -> PathBuf {
        let path = self.folder.path().join("rows.jsonl");
        std::fs::write(&path, rows.join("\n")).unwrap();
        path
    }

    /// Runs a task on rows.
    pub(crate) fn run(&self, line: &str, rows: &[String]) -> Result<Report, Error> {
        let path = self.rows(rows);
        evaluate(
            &args(&format!("{line} --data {}", path.display())),
            &self.lm,
            &self.text,
        )
    }
}

/// Rows of squad's form: so many documents of a few words, with two questions each.
pub(crate) fn squad(documents: usize) -> Vec<String> {
    let mut rows = Vec::new();
    for number in 0..documents {
        let context = format!("In town {number} the {} is red. It rains.", word(number));
        for what in ["colour", "weather"] {
            rows.push(
                serde_json::json!({
                    "id": format!("{what}-{number}"),
                    "context": context,
                    "question": format!("What {what} in {number}?"),
                    "answers": [format!("{} {number}", word(number + 3)), "red"],
                    "choices": [format!("{} {number}", word(number + 3)), "blue"],
                    "answer_idx": [0],
                })
                .to_string(),
            );
        }
    }
    rows
}

fn word(number: usize) -> &'static str {
    ["house", "garden", "river", "bridge", "mill"][number % 5]
}

pub(crate) fn corpus(documents: usize) -> Vec<String> {
    (0..documents)
        .map(|number| {
            let mut text = String::new();
            for sentence in 0..120 {
                let _ = write!(
                    text,
                    "{} {number} and {} {sentence}. ",
                    word(sentence),
                    word(number)
                );
            }
            serde_json::json!({"id": number.to_string(), "text": text}).to_string()
        })
        .collect()
}

pub(crate) fn metaicl() -> Vec<String> {
    let mut rows = Vec::new();
    for task in ["colours", "animals"] {
        for number in 0..12 {
            for split in ["train", "test"] {
                rows.push(
                    serde_json::json!({
                        "task": task, "input": format!("{task} {split} {number}"), "output": "yes",
                        "options": ["no", "yes"], "split": split, "seed": 100,
                    })
                    .to_string(),
                );
            }
        }
    }
    rows
}

pub(crate) fn dialogues(count: usize) -> Vec<String> {
    (0..count)
        .map(|number| {
            let turn = |speaker: usize, text: String| serde_json::json!({"speaker": format!("Speaker {speaker}"), "text": text});
            serde_json::json!({
                "id": number.to_string(),
                "personas": [[format!("I own {number} dogs.")], [format!("I am {number} years old.")]],
                "previous_sessions": [{"time": "1 day", "turns": [format!("I have {number} dogs."), "Nice!"]}],
                "turns": [
                    turn(1, "Hello.".to_owned()), turn(2, "Hi.".to_owned()),
                    turn(1, format!("My {number} dogs bark.")), turn(2, "Oh no.".to_owned()),
                ],
            })
            .to_string()
        })
        .collect()
}
