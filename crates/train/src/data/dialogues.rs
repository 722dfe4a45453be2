//! Dialogues: what was said before is told, or what a speaker says of himself; then an utterance is wanted.
//!
//! Speakers are named as the rows name them, a line for each turn. Start at [`Pool::dialogues`].

use std::path::Path;

use lm::text::TokenId;
use rayon::prelude::*;
use serde::Deserialize;
use serde_json::{Map, Value};

use super::{Asked, CHUNK, Format, Pool, Question, validates};
use crate::{Error, held_out::HeldOut, random::Random, recipe::Recipe};

/// Turns of the running dialogue that a prompt shows.
const SHOWN: usize = 4;
/// Dialogues for validation.
const VALIDATION: usize = 256;

#[derive(Clone, Debug, Deserialize)]
struct Turn {
    speaker: String,
    text: String,
}

#[derive(Clone, Debug, Deserialize)]
struct Row {
    turns: Vec<Turn>,
    #[serde(default)]
    personas: Vec<Vec<String>>,
}

/// A dialogue with what is drawn for it, so that tokenising can be shared out.
struct Drawn {
    row: Row,
    /// A speaker's persona is told.
    persona: Option<usize>,
    seed: u64,
}

fn parse(row: &Map<String, Value>) -> Result<Row, String> {
    serde_json::from_value(Value::Object(row.clone())).map_err(|error| error.to_string())
}

impl Pool {
    pub(super) fn dialogues(
        &mut self,
        recipe: &Recipe,
        path: &Path,
        format: &Format,
        held_out: &HeldOut,
    ) -> Result<(), Error> {
        let mut random = Random::new(recipe.seed, "dialogues");
        let mut dropped = 0;
        let (mut train, mut validation) = (Vec::new(), Vec::new());
        let count = rows::read(path, recipe.data.malformed, |row| {
            // The file's other rows are no dialogues.
            if !row.contains_key("turns") {
                return Ok(());
            }
            let row = parse(row)?;
            if row.turns.len() < 3 {
                return Ok(());
            }
            // Small talk recurs: a dialogue is held out if half of it is.
            let known = row.turns.iter().filter(|turn| held_out.has(&turn.text));
            if 2 * known.count() >= row.turns.len() {
                dropped += 1;
                return Ok(());
            }
            let personas = row.personas.len() >= 2 && !row.personas.iter().any(Vec::is_empty);
            let drawn = Drawn {
                persona: (personas && random.chance(0.5)).then(|| random.below(2)),
                seed: random.next(),
                row,
            };
            let said: String = drawn
                .row
                .turns
                .iter()
                .map(|turn| turn.text.as_str())
                .collect();
            if validates(&said) {
                validation.push(drawn);
            } else {
                train.push(drawn);
            }
            Ok(())
        })?;
        self.count(path, held_out, dropped, count)?;
        random.shuffle(&mut train);
        train.truncate(recipe.data.dialogue_contexts);
        validation.truncate(VALIDATION);
        for (drawn, split) in [(train, &mut self.train), (validation, &mut self.validation)] {
            for chunk in drawn.chunks(CHUNK) {
                let asked: Vec<Option<Asked>> = chunk
                    .par_iter()
                    .map(|drawn| asked(drawn, format, recipe.data.questions))
                    .collect::<Result<_, Error>>()?;
                split.dialogues.extend(asked.into_iter().flatten());
            }
        }
        if self.train.dialogues.is_empty() || self.validation.dialogues.is_empty() {
            return Err(Error::NoData {
                what: "dialogues",
                detail: format!("{} has too few that fit into a window", path.display()),
            });
        }
        Ok(())
    }
}

fn line(speaker: &str, text: &str) -> String {
    format!("{speaker}: {}\n", text.trim())
}

/// `None` if too little of the dialogue is left to be asked.
fn asked(drawn: &Drawn, format: &Format, questions: usize) -> Result<Option<Asked>, Error> {
    let Drawn { row, persona, seed } = drawn;
    let turns = &row.turns;
    let mut random = Random::of_state(*seed);
    let suffix = format.text.encode_plain(&format.suffix)?;
    let mut context: Vec<TokenId> = Vec::new();
    let mut wanted = Vec::new();
    let mut first = 2;
    if let Some(speaker) = persona {
        let mut names: Vec<&str> = turns.iter().map(|turn| turn.speaker.as_str()).collect();
        names.sort_unstable();
        names.dedup();
        let (Some(name), Some(facts)) = (names.get(*speaker), row.personas.get(*speaker)) else {
            return Ok(None);
        };
        for fact in facts {
            context.extend(format.text.encode_plain(&line(name, fact))?);
        }
        wanted.extend((2..turns.len()).filter(|&turn| turns[turn].speaker == **name));
    } else {
        // The beginning of the dialogue is told, as much of it as fits and leaves two turns.
        let mut told = 0;
        for turn in &turns[..turns.len() - 2] {
            let tokens = format.text.encode_plain(&line(&turn.speaker, &turn.text))?;
            if context.len() + tokens.len() + suffix.len() >= format.window {
                break;
            }
            context.extend(tokens);
            told += 1;
        }
        first = told;
        wanted.extend(told.max(2)..turns.len());
    }
    context.extend(suffix);
    if wanted.is_empty() || context.len() >= format.window || context.len() < 24 {
        return Ok(None);
    }
    random.shuffle(&mut wanted);
    wanted.truncate(questions);
    let questions: Vec<Question> = wanted
        .into_iter()
        .map(|turn| {
            let shown = turn
                .saturating_sub(SHOWN)
                .max(first.min(turn) * usize::from(persona.is_none()));
            let mut prompt: String = turns[shown..turn]
                .iter()
                .map(|turn| line(&turn.speaker, &turn.text))
                .collect();
            prompt.push_str(&turns[turn].speaker);
            prompt.push(':');
            format.continuation(&prompt, &format!(" {}\n", turns[turn].text.trim()))
        })
        .collect::<Result<_, Error>>()?;
    Ok(Some(Asked { context, questions }))
}
