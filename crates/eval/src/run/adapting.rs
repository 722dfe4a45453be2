//! Method `lora`: its setting is tuned on other cases, then an adapter is trained for each case and asked.
//!
//! Start at [`Judge::tune`] and [`Judge::adapt`].

use std::{
    collections::HashSet,
    time::{Duration, Instant},
};

use indicatif::ProgressBar;
use lm::Lm;

use super::{Bare, Chunk, Judge};
use crate::{
    Error, Method,
    lora::{Lora, Training},
    prompt::Document,
    random::Draws,
    report::{Example, Tried, Tuned},
    tasks::{Case, Wanted},
};

/// Learning rates that are tried.
const RATES: [f64; 2] = [3e-4, 1e-3];
/// Numbers of steps that are tried with each, ascending.
const STEPS: [usize; 4] = [4, 8, 16, 32];
/// Cases of each point that a setting is judged on.
const CASES: usize = 4;
/// Questions that a case has at most, where nobody says how many.
const QUESTIONS: usize = 16;

/// The point of a series that a case belongs to: that of its first question.
fn point(case: &Case) -> &str {
    case.questions
        .first()
        .map_or("", |question| &question.label)
}

/// What is wanted of a task to tune on: other draws, and enough of them that some are left when what is judged is taken out.
pub(super) fn wanted(wanted: &Wanted) -> Wanted {
    let questions = wanted.questions.unwrap_or(QUESTIONS).max(1);
    Wanted {
        seed: Draws::new(wanted.seed, "validation").below(usize::MAX) as u64,
        limit: wanted.limit.saturating_add(CASES.saturating_mul(questions)),
        ..wanted.clone()
    }
}

/// The first cases of each point that are not judged: no question of those is asked, no context of those is told. Answers are only
/// scored.
pub(super) fn unseen(drawn: Vec<Case>, judged: &[Case]) -> Vec<Case> {
    let texts = |case: &Case| -> Vec<String> {
        let texts = case.context.iter().map(|document| document.text.clone());
        texts.collect()
    };
    let told: HashSet<Vec<String>> = judged.iter().map(texts).collect();
    let asked: HashSet<(&str, &[_])> = judged
        .iter()
        .flat_map(|case| &case.questions)
        .map(|question| (question.shown.as_str(), question.answer.as_slice()))
        .collect();
    let mut kept: Vec<Case> = Vec::new();
    for mut case in drawn {
        if told.contains(&texts(&case)) {
            continue;
        }
        case.questions.retain(|question| {
            !asked.contains(&(question.shown.as_str(), question.answer.as_slice()))
        });
        for question in &mut case.questions {
            question.max_tokens = 0;
            question.options.clear();
        }
        let alike = kept.iter().filter(|other| point(other) == point(&case));
        if !case.questions.is_empty() && alike.count() < CASES {
            kept.push(case);
        }
    }
    kept
}

impl<'a> Judge<'a> {
    /// The setting for each point of `cases` that brings the answers of `others` the highest likelihood.
    pub(super) fn tune(&mut self, cases: &[Case], others: &[Case]) -> Result<Vec<Tuned>, Error> {
        let mut points: Vec<&str> = Vec::new();
        for case in cases {
            if !points.contains(&point(case)) {
                points.push(point(case));
            }
        }
        let bar = ProgressBar::new((points.len() * CASES * RATES.len()) as u64);
        bar.set_message("tuning lora");
        let tuned = points
            .into_iter()
            .map(|label| {
                let others: Vec<&Case> =
                    others.iter().filter(|case| point(case) == label).collect();
                self.tune_point(label, &others, &bar)
            })
            .collect();
        bar.finish_and_clear();
        tuned
    }

    fn tune_point(
        &mut self,
        label: &str,
        cases: &[&Case],
        bar: &ProgressBar,
    ) -> Result<Tuned, Error> {
        if cases.is_empty() {
            return Err(Error::TooFew {
                detail: format!("none is left to tune lora on ({label}); lower --limit"),
            });
        }
        let mut tried = Vec::new();
        for rate in RATES {
            let mut sums = [(0.0, 0_usize); STEPS.len()];
            for (number, case) in cases.iter().enumerate() {
                let mut training = self.training(case, &format!("lora validation {number}"))?;
                let mut done = 0;
                for (steps, (nll, tokens)) in STEPS.into_iter().zip(&mut sums) {
                    while done < steps {
                        training.step(rate)?;
                        done += 1;
                    }
                    let (more, count) = self.likelihood(case, &training.lora()?)?;
                    *nll += more;
                    *tokens += count;
                }
                bar.inc(1);
            }
            for (steps, (nll, tokens)) in STEPS.into_iter().zip(sums) {
                // What is no number is worse than anything.
                #[expect(
                    clippy::cast_precision_loss,
                    reason = "token counts are far below 2^52"
                )]
                let answer_nll = nll / tokens.max(1) as f64;
                tried.push(Tried {
                    rate,
                    steps,
                    answer_nll: if answer_nll.is_finite() {
                        answer_nll
                    } else {
                        f64::MAX
                    },
                });
            }
        }
        let best = tried
            .iter()
            .min_by(|a, b| a.answer_nll.total_cmp(&b.answer_nll))
            .copied();
        let best = best.ok_or(Error::TooFew {
            detail: "no setting of lora was tried".to_owned(),
        })?;
        Ok(Tuned {
            label: label.to_owned(),
            rank: self.rank(),
            rate: best.rate,
            steps: best.steps,
            cases: cases.len(),
            tried,
        })
    }

    fn rank(&self) -> usize {
        let generator = self.model.seat().generator();
        generator.map_or(0, |generator| generator.config().export_rank())
    }

    /// The model that gradients are followed through.
    fn lm(&self) -> Result<&'a Lm, Error> {
        self.lm.ok_or_else(|| Error::Device {
            what: format!("method {}", Method::Lora.name()),
            detail: "it follows gradients, on the processor alone".to_owned(),
        })
    }

    fn training(&self, case: &Case, purpose: &str) -> Result<Training<'a>, Error> {
        let context: Vec<&Document> = case.context.iter().map(AsRef::as_ref).collect();
        let mut draws = Draws::new(self.seed, purpose);
        Training::new(self.lm()?, &context, self.prompts.bos(), &mut draws)
    }

    /// NLL of a case's answers under an adapter, nats, and their tokens.
    fn likelihood(&self, case: &Case, lora: &Lora) -> Result<(f64, usize), Error> {
        let chunk = Chunk {
            cases: std::slice::from_ref(case),
            foreign: vec![None],
            imprints: Vec::new(),
        };
        let bare = Bare::new();
        let batch = self.batch(&chunk, std::iter::once(Method::Lora), 0..1, &bare, false)?;
        let answers = self.model.with(self.lm()?, lora)?.hear(&batch.groups)?;
        let logprobs = answers
            .iter()
            .flat_map(|answers| &answers.heard)
            .flat_map(|heard| &heard.logprobs);
        Ok(logprobs.fold((0.0, 0), |(sum, count), logprob| (sum - logprob, count + 1)))
    }

    /// Trains an adapter for each case of a chunk and lets it answer; `first` is the number of the chunk's first case.
    pub(super) fn adapt(
        &mut self,
        chunk: &Chunk<'_>,
        first: usize,
        bare: &Bare,
        examples: &mut [Vec<Example>],
    ) -> Result<(), Error> {
        for (index, case) in chunk.cases.iter().enumerate() {
            let tuned = self.tuned.iter().find(|tuned| tuned.label == point(case));
            let Some(&Tuned { rate, steps, .. }) = tuned else {
                continue;
            };
            let start = Instant::now();
            let mut training = self.training(case, &format!("lora {}", first + index))?;
            for _ in 0..steps {
                training.step(rate)?;
            }
            let lora = training.lora()?;
            let time = start.elapsed();
            let flops = self.costs.lora(training.windows(), steps);
            self.ask(chunk, index, bare, &lora, (flops, time), examples)?;
        }
        Ok(())
    }

    /// Asks the questions of one case under an adapter that took so many operations and so long.
    fn ask(
        &self,
        chunk: &Chunk<'_>,
        index: usize,
        bare: &Bare,
        lora: &Lora,
        (flops, time): (f64, Duration),
        examples: &mut [Vec<Example>],
    ) -> Result<(), Error> {
        let methods = std::iter::once(Method::Lora);
        let batch = self.batch(chunk, methods, index..index + 1, bare, false)?;
        let answers = self.model.with(self.lm()?, lora)?.hear(&batch.groups)?;
        for place in &batch.places {
            let mut answer = self.judged(place, chunk, &answers)?;
            let rows = chunk.cases[index].questions[place.question].answer.len();
            answer.query_flops += self
                .costs
                .lora_pass(place.prompt_tokens + rows.saturating_sub(1));
            answer.context_flops = flops;
            answer.context_seconds = time.as_secs_f64();
            answer.state_floats = self.costs.lora_floats();
            examples[index][place.question]
                .answers
                .insert(Method::Lora.name().to_owned(), answer);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
