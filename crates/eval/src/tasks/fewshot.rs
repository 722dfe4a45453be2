//! Few-shot tasks (MetaICL): k examples are the context, another row's input is asked, its options are scored.
//!
//! Start at [`cases`].

use std::{collections::BTreeMap, path::Path, sync::Arc};

use serde::Deserialize;

use super::{Case, LaidOut, Question, Wanted};
use crate::{Error, prompt::Prompts, random::Draws};

/// Tokens of an answer at most.
const ANSWER: usize = 16;
/// Questions that share one draw of examples.
const QUESTIONS: usize = 4;

#[derive(Clone, Deserialize)]
struct Row {
    task: String,
    input: String,
    output: String,
    #[serde(default)]
    options: Vec<String>,
    #[serde(default)]
    split: String,
    seed: Option<u64>,
}

fn parse(line: &str) -> Result<Row, String> {
    let row: Row = serde_json::from_str(line).map_err(|error| error.to_string())?;
    if row.input.trim().is_empty() || row.output.trim().is_empty() {
        return Err("input or output is empty".to_owned());
    }
    if !row.options.is_empty() && !row.options.contains(&row.output) {
        return Err("the output is none of the options".to_owned());
    }
    Ok(row)
}

/// The rows of a task.
#[derive(Default)]
struct Rows {
    /// By the seed of the official draw; 0 where there is none.
    train: BTreeMap<u64, Vec<Row>>,
    test: Vec<Row>,
}

/// Contexts of k examples, tasks in turns, four questions each. The limit counts questions for each k.
pub(super) fn cases(path: &Path, wanted: &Wanted, prompts: &Prompts<'_>) -> Result<LaidOut, Error> {
    let file = rows::collect(path, wanted.max_malformed, parse)?;
    let mut tasks: BTreeMap<String, Rows> = BTreeMap::new();
    for row in file.rows {
        let task = tasks.entry(row.task.clone()).or_default();
        match row.split.as_str() {
            "test" => task.test.push(row),
            "dev" => {}
            _ => task
                .train
                .entry(row.seed.unwrap_or(0))
                .or_default()
                .push(row),
        }
    }
    let mut draws = Draws::new(wanted.seed, "tests");
    for task in tasks.values_mut() {
        // A task without a test split lends a quarter of its rows to it.
        if task.test.is_empty()
            && let Some(train) = task.train.values_mut().next()
        {
            draws.shuffle(train);
            task.test = train.split_off(train.len() - train.len() / 4);
        }
        draws.shuffle(&mut task.test);
    }
    tasks.retain(|_, rows| !rows.test.is_empty() && !rows.train.is_empty());
    let each = wanted.questions.unwrap_or(QUESTIONS).max(1);
    let mut cases = Vec::new();
    for &shots in &wanted.shots {
        let mut draws = Draws::new(wanted.seed, "shots");
        let mut asked = 0;
        let rounds = wanted.limit.div_ceil(each);
        'all: for round in 0..rounds {
            let before = asked;
            for (name, rows) in &tasks {
                if asked >= wanted.limit {
                    break 'all;
                }
                let tests = rows.test.iter().skip(round * each);
                let questions: Vec<Question> = tests
                    .take(each.min(wanted.limit - asked))
                    .enumerate()
                    .map(|(number, row)| {
                        let id = format!("{name}-{}", round * each + number);
                        question(row, id, shots, prompts)
                    })
                    .collect::<Result<_, _>>()?;
                if questions.is_empty() {
                    continue;
                }
                asked += questions.len();
                let examples = examples(rows, shots, round, &mut draws);
                let told: String = examples.iter().map(|row| shown(row, prompts)).collect();
                cases.push(Case {
                    context: vec![Arc::new(prompts.document(&told)?)],
                    frame: prompts.frame()?,
                    // The context itself demonstrates the format.
                    styled: None,
                    questions,
                });
            }
            if asked == before {
                break;
            }
        }
    }
    Ok(LaidOut {
        cases,
        malformed: file.malformed,
        digest: Some(file.digest.to_hex().to_string()),
    })
}

/// k examples: of an official draw where there is one, else of all training rows.
fn examples<'a>(rows: &'a Rows, shots: usize, round: usize, draws: &mut Draws) -> Vec<&'a Row> {
    let Some(pool) = rows.train.values().nth(round % rows.train.len().max(1)) else {
        return Vec::new();
    };
    let mut order: Vec<usize> = (0..pool.len()).collect();
    draws.shuffle(&mut order);
    order
        .into_iter()
        .take(shots)
        .map(|place| &pool[place])
        .collect()
}

fn shown(row: &Row, prompts: &Prompts<'_>) -> String {
    let asked = prompts.asked(&row.input);
    format!("{asked} {}\n\n", row.output.trim())
}

#[expect(clippy::cast_precision_loss, reason = "shots are few")]
fn question(row: &Row, id: String, shots: usize, prompts: &Prompts<'_>) -> Result<Question, Error> {
    let options = row
        .options
        .iter()
        .map(|option| prompts.answer(option))
        .collect::<Result<_, _>>()?;
    Ok(Question {
        id,
        label: format!("{shots} examples"),
        x: Some(shots as f64),
        shown: row.input.trim().to_owned(),
        query: Some(row.input.clone()),
        asked: Some(prompts.asks(&row.input)),
        body: prompts.question(&row.input)?,
        references: vec![row.output.clone()],
        answer: prompts.answer(&row.output)?,
        options,
        right: row.options.iter().position(|option| *option == row.output),
        max_tokens: ANSWER,
    })
}
