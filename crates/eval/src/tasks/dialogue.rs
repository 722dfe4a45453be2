//! Dialogues: an earlier session or a persona is told, the next utterance is wanted.
//!
//! Speakers are named as the rows name them, a line for each turn; no chat template, as two people talk here and none of them is
//! the assistant. Start at [`msc`] and [`persona_chat`].

use std::{path::Path, sync::Arc};

use serde::Deserialize;

use super::{Case, LaidOut, Question, Wanted};
use crate::{Error, prompt::Prompts, random::Draws};

/// Tokens of an utterance at most.
const UTTERANCE: usize = 32;
/// Turns of the running dialogue that a prompt shows.
const SHOWN: usize = 4;

#[derive(Deserialize)]
struct Turn {
    speaker: String,
    text: String,
}

#[derive(Deserialize)]
struct Session {
    turns: Vec<String>,
}

#[derive(Deserialize)]
struct Row {
    id: Option<String>,
    personas: Vec<Vec<String>>,
    #[serde(default)]
    previous_sessions: Vec<Session>,
    turns: Vec<Turn>,
}

fn parse(line: &str) -> Result<Row, String> {
    let row: Row = serde_json::from_str(line).map_err(|error| error.to_string())?;
    if row.turns.len() < 3 || row.turns.iter().any(|turn| turn.text.trim().is_empty()) {
        return Err("fewer than three turns, or an empty one".to_owned());
    }
    Ok(row)
}

fn parse_session(line: &str) -> Result<Row, String> {
    let row = parse(line)?;
    if row
        .previous_sessions
        .iter()
        .all(|session| session.turns.is_empty())
    {
        return Err("there is no earlier session".to_owned());
    }
    Ok(row)
}

fn parse_persona(line: &str) -> Result<Row, String> {
    let row = parse(line)?;
    if row.personas.len() < 2 || row.personas.iter().any(Vec::is_empty) {
        return Err("there are no two personas".to_owned());
    }
    Ok(row)
}

/// The earlier sessions are told. Two questions a row: an utterance of this session, and a fact about a speaker (`fact`: scored,
/// not generated), which the annotators wrote down after the earlier one. The limit counts rows.
pub(super) fn msc(path: &Path, wanted: &Wanted, prompts: &Prompts<'_>) -> Result<LaidOut, Error> {
    cases(path, wanted, prompts, parse_session, |row, draws| {
        let names = names(row);
        let mut told = String::new();
        for session in &row.previous_sessions {
            for (number, text) in session.turns.iter().enumerate() {
                told.push_str(&format!("{}: {}\n", names[number % 2], text.trim()));
            }
        }
        let speaker = draws.below(2);
        let fact = row
            .personas
            .get(speaker)
            .and_then(|facts| draws.pick(facts))
            .map(|fact| (names[speaker].clone(), fact.clone()));
        (told, None, fact)
    })
}

/// A speaker's persona is told, and an utterance of that speaker is wanted. The limit counts rows.
pub(super) fn persona_chat(
    path: &Path,
    wanted: &Wanted,
    prompts: &Prompts<'_>,
) -> Result<LaidOut, Error> {
    cases(path, wanted, prompts, parse_persona, |row, draws| {
        let names = names(row);
        let speaker = draws.below(2);
        let facts = row.personas.get(speaker).map_or(&[][..], Vec::as_slice);
        let told = facts
            .iter()
            .map(|fact| format!("{}: {}\n", names[speaker], fact.trim()))
            .collect();
        (told, Some(names[speaker].clone()), None)
    })
}

/// The two speakers, in the order of their personas.
fn names(row: &Row) -> [String; 2] {
    let first = row.turns.first().map_or("", |turn| &turn.speaker);
    let second = row
        .turns
        .iter()
        .map(|turn| turn.speaker.as_str())
        .find(|&name| name != first)
        .unwrap_or("");
    let mut names = [first.to_owned(), second.to_owned()];
    names.sort();
    names
}

/// What is told, whose utterance is wanted (none: anyone's), and a fact about someone.
type Told = (String, Option<String>, Option<(String, String)>);

fn cases(
    path: &Path,
    wanted: &Wanted,
    prompts: &Prompts<'_>,
    parse: fn(&str) -> Result<Row, String>,
    tell: impl Fn(&Row, &mut Draws) -> Told,
) -> Result<LaidOut, Error> {
    let file = rows::collect(path, wanted.max_malformed, parse)?;
    let mut draws = Draws::new(wanted.seed, "dialogues");
    let mut order: Vec<usize> = (0..file.rows.len()).collect();
    draws.shuffle(&mut order);
    let mut cases = Vec::new();
    for place in order {
        if cases.len() == wanted.limit {
            break;
        }
        let row = &file.rows[place];
        let (told, whose, fact) = tell(row, &mut draws);
        let places: Vec<usize> = (2..row.turns.len())
            .filter(|&turn| {
                whose
                    .as_ref()
                    .is_none_or(|name| row.turns[turn].speaker == *name)
            })
            .collect();
        let Some(&turn) = draws.pick(&places) else {
            continue;
        };
        let id = row.id.clone().unwrap_or_else(|| place.to_string());
        let mut questions = vec![utterance(row, turn, &id, prompts)?];
        if let Some((name, fact)) = fact {
            questions.push(Question {
                max_tokens: 0,
                references: Vec::new(),
                ..asked(&id, "fact", format!("{name}:"), &fact, prompts)?
            });
        }
        cases.push(Case {
            context: vec![Arc::new(prompts.document(&told)?)],
            frame: prompts.bare_frame(),
            styled: None,
            questions,
        });
    }
    Ok(LaidOut {
        cases,
        malformed: file.malformed,
        digest: Some(file.digest.to_hex().to_string()),
    })
}

fn utterance(row: &Row, turn: usize, id: &str, prompts: &Prompts<'_>) -> Result<Question, Error> {
    let mut prompt = String::new();
    for before in &row.turns[turn.saturating_sub(SHOWN)..turn] {
        prompt.push_str(&format!("{}: {}\n", before.speaker, before.text.trim()));
    }
    let wanted = &row.turns[turn];
    prompt.push_str(&format!("{}:", wanted.speaker));
    asked(id, "utterance", prompt, &wanted.text, prompts)
}

fn asked(
    id: &str,
    label: &str,
    prompt: String,
    answer: &str,
    prompts: &Prompts<'_>,
) -> Result<Question, Error> {
    let answer = answer.trim();
    Ok(Question {
        id: id.to_owned(),
        label: label.to_owned(),
        x: None,
        asked: Some(relevance::Asked::text(&prompt)),
        body: prompts.tokens(&prompt)?,
        query: Some(prompt.clone()),
        shown: prompt,
        references: vec![answer.to_owned()],
        answer: prompts.tokens(&format!(" {answer}\n"))?,
        options: Vec::new(),
        right: None,
        max_tokens: UTTERANCE,
    })
}
