//! What the demonstration measured, what follows from it, and how it looks on a terminal.
//!
//! Values and text only; no call is made here. Lines fit 100 columns. Start at [`Report`].

use std::cmp::Ordering;

use serde::Serialize;

use crate::cli::{Align, bytes, table};

/// Who is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arm {
    /// The bare model, which knows nothing of the text.
    Bare,
    /// The model with the session's imprint; nothing of the text in the prompt.
    Imprinted,
    /// The bare model with the whole text in the prompt.
    InContext,
    /// The control: the model with another session's imprint, of another text.
    Foreign,
}

/// All that was measured.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Report {
    /// The model's name on the server.
    pub model: String,
    /// Its parameters.
    pub parameters: u64,
    /// How its weights are held.
    pub weight_format: String,
    /// Parameters of the generator.
    pub generator_parameters: u64,
    /// The versions that the chunks of the text became.
    pub versions: Vec<Version>,
    /// Tokens of the text in the last version.
    pub context_tokens: u64,
    /// Bytes of state that further reading needs.
    pub state_bytes: u64,
    /// Bytes of the core that answering needs.
    pub core_bytes: u64,
    /// The questions with all answers.
    pub questions: Vec<Question>,
    /// Totals of each arm, in the order of [`Arm::ALL`].
    pub totals: Vec<ArmTotal>,
    /// What did not happen as it should; empty if the demonstration succeeded.
    pub failures: Vec<String>,
}

/// A version of the adapter, as it appeared.
#[derive(Debug, Clone, Serialize)]
pub struct Version {
    /// The chunk that it came with.
    pub seq: u64,
    /// The version.
    pub adapter_version: u64,
    /// Digest of its state, in hex.
    pub state_digest: String,
    /// Context tokens in it.
    pub tokens: u64,
    /// From sending the chunk to the version's arrival, in milliseconds.
    pub ms: f64,
}

/// A question with the answers of all arms.
#[derive(Debug, Clone, Serialize)]
pub struct Question {
    /// What was asked.
    pub question: String,
    /// What the text says.
    pub true_answer: String,
    /// The answers, in the order of [`Arm::ALL`].
    pub answers: Vec<Answer>,
}

/// An arm's answer to one question.
#[derive(Debug, Clone, Serialize)]
pub struct Answer {
    /// Whose it is.
    pub arm: Arm,
    /// The greedy answer up to the end of its line.
    pub text: String,
    /// Whether it holds the true answer.
    pub hit: bool,
    /// Log-probability of the true answer and the line's end, in nats.
    pub logprob: f64,
    /// Tokens in the prompt.
    pub prompt_tokens: u32,
    /// From the request to the first token, by the client's clock, in milliseconds.
    pub first_token_ms: f64,
    /// The adapter version that it ran with; 0 is the bare model.
    pub adapter_version: u64,
}

/// Totals of an arm.
#[derive(Debug, Clone, Serialize)]
pub struct ArmTotal {
    /// Whose they are.
    pub arm: Arm,
    /// Answers that held the true one.
    pub hits: usize,
    /// Mean log-probability of the true answers, in nats.
    pub mean_logprob: f64,
    /// Mean tokens in the prompt.
    pub mean_prompt_tokens: f64,
    /// Median time to the first token, in milliseconds.
    pub median_first_token_ms: f64,
}

impl Arm {
    /// All arms, in the order in which they are asked and shown.
    pub const ALL: [Self; 4] = [Self::Bare, Self::Imprinted, Self::InContext, Self::Foreign];

    /// Its name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Bare => "bare",
            Self::Imprinted => "imprinted",
            Self::InContext => "in-context",
            Self::Foreign => "foreign",
        }
    }
}

impl Report {
    /// Sums up, and lists under `failures` what should have come out and did not.
    pub(super) fn judge(&mut self) {
        self.totals = Arm::ALL
            .map(|arm| ArmTotal::of(arm, &self.questions))
            .to_vec();
        let [bare, imprinted, _, foreign] = Arm::ALL.map(|arm| self.mean_logprob(arm));
        for (other, mean) in [
            ("the bare model", bare),
            ("another text's imprint", foreign),
        ] {
            // NaN is above nothing.
            if imprinted.partial_cmp(&mean) != Some(Ordering::Greater) {
                self.failures.push(format!(
                    "the imprint gives the true answers {imprinted:.2} nats, not more than {other}'s {mean:.2}"
                ));
            }
        }
        let answers = self.questions.iter().flat_map(|question| &question.answers);
        let newest = self.versions.last().map(|version| version.adapter_version);
        for answer in answers {
            let wrong = match answer.arm {
                Arm::Bare | Arm::InContext => answer.adapter_version != 0,
                Arm::Imprinted => Some(answer.adapter_version) != newest,
                Arm::Foreign => answer.adapter_version == 0,
            };
            if wrong {
                self.failures.push(format!(
                    "an answer of {} ran with version {}",
                    answer.arm.name(),
                    answer.adapter_version
                ));
            }
        }
    }

    fn mean_logprob(&self, arm: Arm) -> f64 {
        let total = self.totals.iter().find(|total| total.arm == arm);
        total.map_or(f64::NAN, |total| total.mean_logprob)
    }

    pub(super) fn opening(&self) -> String {
        format!(
            "{}, {} parameters, weights as {}; generator of {} parameters; all frozen\n\n\
             A text that no model has read is streamed in, over gRPC, in chunks that end anywhere:",
            self.model,
            millions(self.parameters),
            self.weight_format,
            millions(self.generator_parameters),
        )
    }

    pub(super) fn between(&self) -> String {
        "\nNow ten questions. Greedy answers, and the log-probability of the true answer (nats; 0 is \
         certain):\n  \
         bare        the frozen model alone\n  \
         imprinted   the same model with the session's imprint; nothing of the text in the prompt\n  \
         in-context  the frozen model with the whole text in the prompt\n  \
         foreign     the control: with the imprint of another text about another place"
            .to_owned()
    }

    /// The totals of the arms.
    pub(super) fn table(&self) -> String {
        let rows: Vec<[String; 7]> = self
            .totals
            .iter()
            .map(|total| {
                let carried = match total.arm {
                    Arm::Imprinted => [bytes(self.state_bytes), bytes(self.core_bytes)],
                    Arm::Bare | Arm::InContext | Arm::Foreign => ["-".to_owned(), "-".to_owned()],
                };
                let [state, core] = carried;
                [
                    total.arm.name().to_owned(),
                    format!("{}/{}", total.hits, self.questions.len()),
                    format!("{:.2}", total.mean_logprob),
                    format!("{:.1}", total.mean_prompt_tokens),
                    format!("{:.0} ms", total.median_first_token_ms),
                    state,
                    core,
                ]
            })
            .collect();
        let columns = [
            ("TOTALS", Align::Left),
            ("HITS", Align::Right),
            ("MEAN LOG P", Align::Right),
            ("PROMPT TOKENS", Align::Right),
            ("FIRST TOKEN", Align::Right),
            ("STATE", Align::Right),
            ("CORE", Align::Right),
        ];
        format!("\n{}\n", table(columns, &rows))
    }

    /// What it means, and how to go on.
    pub(super) fn closing(&self) -> String {
        let [bare, imprinted, in_context, foreign] = Arm::ALL.map(|arm| {
            self.totals
                .iter()
                .find(|total| total.arm == arm)
                .map_or(0, |total| total.hits)
        });
        let asked = self.questions.len();
        let prompt = |arm: Arm| {
            let total = self.totals.iter().find(|total| total.arm == arm);
            total.map_or(0.0, |total| total.mean_prompt_tokens)
        };
        let nats = self.mean_logprob(Arm::Imprinted) - self.mean_logprob(Arm::Bare);
        let control = self.mean_logprob(Arm::Foreign) - self.mean_logprob(Arm::Bare);
        format!(
            "Right of {asked}: {bare} bare, {imprinted} imprinted, {in_context} in-context, {foreign} \
             foreign; prompts of {:.0} tokens instead of {:.0}.\nThe imprint moves the true answers by \
             {nats:+.2} nats against the bare model, the control by {control:+.2}.\n\n\
             To go on:\n  \
             imprint serve\n  \
             imprint ingest --session new FILE\n  \
             imprint ask --session SESSION \"...\"",
            prompt(Arm::Imprinted),
            prompt(Arm::InContext),
        )
    }
}

impl ArmTotal {
    fn of(arm: Arm, questions: &[Question]) -> Self {
        let answers: Vec<&Answer> = questions
            .iter()
            .flat_map(|question| &question.answers)
            .filter(|answer| answer.arm == arm)
            .collect();
        let mean = |value: fn(&Answer) -> f64| {
            #[expect(clippy::cast_precision_loss, reason = "there are ten questions")]
            let count = answers.len() as f64;
            answers.iter().map(|answer| value(answer)).sum::<f64>() / count
        };
        let mut times: Vec<f64> = answers.iter().map(|answer| answer.first_token_ms).collect();
        times.sort_by(f64::total_cmp);
        Self {
            arm,
            hits: answers.iter().filter(|answer| answer.hit).count(),
            mean_logprob: mean(|answer| answer.logprob),
            mean_prompt_tokens: mean(|answer| f64::from(answer.prompt_tokens)),
            median_first_token_ms: times.get(times.len() / 2).copied().unwrap_or(f64::NAN),
        }
    }
}

impl Version {
    pub(super) fn shown(&self, chunk: &str) -> String {
        let end: String = chunk.trim_end().chars().rev().take(36).collect();
        let end: String = end.chars().rev().collect();
        format!(
            "  chunk {} ..{end}  -> version {}, {} tokens, {:.0} ms",
            self.seq, self.adapter_version, self.tokens, self.ms
        )
    }
}

impl Question {
    pub(super) fn shown(&self, number: usize) -> String {
        let mut text = format!("\n{number:>2}  {}  [{}]", self.question, self.true_answer);
        for answer in &self.answers {
            let said = match answer.text.trim() {
                "" => "(the line ends at once)".to_owned(),
                said => shortened(said, 64),
            };
            text.push_str(&format!(
                "\n    {:<10} {:>8.2}  {}  {said}",
                answer.arm.name(),
                answer.logprob,
                if answer.hit { "hit " } else { "miss" },
            ));
        }
        text
    }
}

/// Whether `text` holds the words of `key` in a row, without regard to case and punctuation.
pub(super) fn holds(text: &str, key: &str) -> bool {
    let words = |text: &str| {
        let words: Vec<String> = text
            .split(|c: char| !c.is_alphanumeric())
            .filter(|word| !word.is_empty())
            .map(str::to_lowercase)
            .collect();
        format!(" {} ", words.join(" "))
    };
    words(text).contains(&words(key))
}

fn shortened(text: &str, chars: usize) -> String {
    if text.chars().count() <= chars {
        return text.to_owned();
    }
    let kept: String = text.chars().take(chars.saturating_sub(2)).collect();
    format!("{kept}..")
}

fn millions(count: u64) -> String {
    #[expect(clippy::cast_precision_loss, reason = "four digits are shown")]
    let count = count as f64;
    format!("{:.1} M", count / 1e6)
}
