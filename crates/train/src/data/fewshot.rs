//! Few-shot tasks: a window of examples is told, more inputs of the same task are asked.
//!
//! Start at [`Pool::fewshot`].

use std::{collections::BTreeMap, path::Path};

use super::{Asked, Format, Pool, string, validates};
use crate::{Error, held_out::HeldOut, random::Random, recipe::Recipe};

/// Characters of an input and of an output at most.
const INPUT: usize = 500;
const OUTPUT: usize = 60;
/// Examples of a window at least, and rows of a task that are kept.
const EXAMPLES: usize = 3;
const KEPT: usize = 4000;
/// Windows for validation.
const VALIDATION: usize = 256;

/// Input and output.
type Example = (String, String);

impl Pool {
    pub(super) fn fewshot(
        &mut self,
        recipe: &Recipe,
        path: &Path,
        format: &Format,
        held_out: &HeldOut,
    ) -> Result<(), Error> {
        let mut dropped = 0;
        let (mut train, mut validation) = (BTreeMap::new(), BTreeMap::new());
        let count = rows::read(path, recipe.data.malformed, |row| {
            let task = string(row, "task")?;
            let (input, output) = (string(row, "input")?.trim(), string(row, "output")?.trim());
            if held_out.has(input) {
                dropped += 1;
                return Ok(());
            }
            if input.is_empty()
                || output.is_empty()
                || input.chars().count() > INPUT
                || output.chars().count() > OUTPUT
            {
                return Ok(());
            }
            let tasks: &mut BTreeMap<String, Vec<Example>> = if validates(input) {
                &mut validation
            } else {
                &mut train
            };
            let rows = tasks.entry(task.to_owned()).or_default();
            if rows.len() < KEPT {
                rows.push((input.to_owned(), output.to_owned()));
            }
            Ok(())
        })?;
        self.count(path, held_out, dropped, count)?;
        let mut random = Random::new(recipe.seed, "fewshot");
        let sizes = [recipe.data.fewshot_contexts, VALIDATION];
        let splits = [(train, &mut self.train), (validation, &mut self.validation)];
        for ((tasks, split), size) in splits.into_iter().zip(sizes) {
            let tasks: Vec<Vec<Example>> = tasks
                .into_values()
                .filter(|rows| rows.len() > EXAMPLES + recipe.data.questions)
                .collect();
            for _ in 0..size {
                let Some(rows) = random.pick(&tasks) else {
                    break;
                };
                let drawn = window(rows, format, recipe.data.questions, &mut random)?;
                split.fewshot.extend(drawn);
            }
        }
        if self.train.fewshot.is_empty() || self.validation.fewshot.is_empty() {
            return Err(Error::NoData {
                what: "few-shot tasks",
                detail: format!("{} has too few rows of a task", path.display()),
            });
        }
        Ok(())
    }
}

/// `None` if too few examples fit.
fn window(
    rows: &[Example],
    format: &Format,
    questions: usize,
    random: &mut Random,
) -> Result<Option<Asked>, Error> {
    // Rows without repetition, the first of them asked.
    let mut order: Vec<usize> = Vec::new();
    while order.len() < (questions + 24).min(rows.len()) {
        let row = random.below(rows.len());
        if !order.contains(&row) {
            order.push(row);
        }
    }
    let (asked, shown) = order.split_at(questions);
    let (mut context, mut count) = (Vec::new(), 0);
    for &row in shown {
        let (input, output) = &rows[row];
        let prompt = format.prompt.replace("{question}", input);
        let tokens = format
            .text
            .encode_plain(&format!("{prompt} {output}\n\n"))?;
        if context.len() + tokens.len() >= format.window {
            break;
        }
        context.extend(tokens);
        count += 1;
    }
    if count < EXAMPLES {
        return Ok(None);
    }
    let questions = asked
        .iter()
        .map(|&row| format.question(&rows[row].0, &rows[row].1, false))
        .collect::<Result<_, Error>>()?;
    Ok(Some(Asked { context, questions }))
}
