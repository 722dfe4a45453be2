//! A recipe: everything that makes a training run, read from TOML and checked.
//!
//! The doc comments are the manual; unknown keys are refused. Start at [`Recipe::load`].

use std::{
    fs,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use crate::Error;

/// A training run.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// Seed of everything random.
    #[serde(default)]
    pub seed: u64,
    /// Length of the run: one of the two.
    pub length: Length,
    /// Where the generator starts: a checkpoint's folder (relative to the recipe), or `generator` below.
    pub start: Option<PathBuf>,
    /// A new generator, initialised from statistics of the base.
    pub generator: Option<NewGenerator>,
    /// Longer keys than those of `start`.
    pub grow: Option<Grow>,
    /// Keys of adapter_config.json that this run changes or adds (`prompt_format`, `fastlora_window`, ...).
    #[serde(default)]
    pub config: toml::Table,
    /// What is trained on.
    pub data: Data,
    /// What a step is made of: one of these, drawn by its `chance`.
    pub layout: Vec<Layout>,
    /// What is minimised.
    #[serde(default)]
    pub loss: Losses,
    /// How.
    #[serde(default)]
    pub optimizer: Optimizer,
    /// What activations and frozen weights are. Masters, moments, sums and losses are f32 either way. On the processor `f32` runs the
    /// kernels that serve, `bf16` candle's operations, which are slower there; on a device both are candle's.
    #[serde(default, skip_serializing_if = "Compute::is_f32")]
    pub compute: Compute,
    /// When the held-out figure is taken.
    #[serde(default)]
    pub validation: Validation,
    /// Minutes between checkpoints to resume from.
    #[serde(default = "save_minutes")]
    pub save_minutes: f64,
}

/// What activations are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Compute {
    /// f32.
    #[default]
    F32,
    /// bfloat16.
    Bf16,
}

fn save_minutes() -> f64 {
    5.0
}

/// How long a run lasts.
#[derive(Clone, Copy, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields, rename_all = "snake_case")]
pub enum Length {
    /// So many optimiser steps: the same run on any machine.
    Steps(u64),
    /// So many minutes of training, validation not counted.
    Minutes(f64),
}

/// A generator that does not exist yet.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct NewGenerator {
    /// What a token writes.
    pub form: Form,
    /// How a core is read out.
    pub read_out: ReadOut,
    /// Adapted linears of a layer: `down_proj`, `o_proj`, ...
    pub modules: Vec<String>,
    /// Adapted layers, from 0.
    pub layers: Vec<usize>,
    /// R1, size of keys.
    pub r1: usize,
    /// R2, size of values.
    pub r2: usize,
    /// Largest rank of a core (svd read-out).
    #[serde(default = "max_rank")]
    pub max_rank: usize,
    /// W, tokens of a window.
    pub window: usize,
    /// `parallel` or `sequential`.
    #[serde(default)]
    pub strategy: Strategy,
    /// White: from statistics of the base; random: normal weights, B zero.
    #[serde(default)]
    pub init: Init,
    /// Strength of the initial value map: B = Pᵀ amplitude rms(h behind the layer) / rms(h behind the last).
    #[serde(default = "amplitude")]
    pub amplitude: f64,
    /// Damping of the whitening, in parts of the mean eigenvalue.
    #[serde(default = "damping")]
    pub damping: f64,
    /// Initial lambda of a ridge read-out.
    #[serde(default = "ridge")]
    pub ridge: f64,
    /// Contexts of one window that the statistics are taken from.
    #[serde(default = "contexts")]
    pub contexts: usize,
}

fn max_rank() -> usize {
    128
}
fn amplitude() -> f64 {
    2.0
}
fn damping() -> f64 {
    0.05
}
fn ridge() -> f64 {
    0.1
}
fn contexts() -> usize {
    96
}

/// Keys that a generator is given beside its own: whitened directions of the sites' inputs that its keys leave out.
#[derive(Clone, Copy, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Grow {
    /// R1, size of keys; at least that of `start`.
    pub r1: usize,
    /// Damping of the whitening, in parts of the mean eigenvalue.
    #[serde(default = "damping")]
    pub damping: f64,
    /// Contexts of one window that the statistics are taken from.
    #[serde(default = "contexts")]
    pub contexts: usize,
}

/// What a token writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Form {
    /// arXiv 2411.05877.
    Published,
    /// Ours.
    Associative,
}

/// How a core is read out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ReadOut {
    /// The polar factor of rank `max_rank`.
    Svd,
    /// S / |S|.
    Frobenius,
    /// S over its largest singular value.
    Spectral,
    /// (G + lambda I)⁻¹ S.
    Ridge,
}

/// How windows see each other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Strategy {
    /// Each is read by the bare model.
    #[default]
    Parallel,
    /// Each is read by the model adapted with those before it.
    Sequential,
}

/// How a new generator begins.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Init {
    /// Whitened keys, principal directions of the embeddings as values.
    #[default]
    White,
    /// Normal numbers.
    Random,
}

/// What is trained on.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Data {
    /// The folder of the files below, relative to the recipe; `--data` overrides it.
    pub folder: PathBuf,
    /// Plain text: rows with `text`.
    pub corpus: Option<String>,
    /// Questions: rows with `context`, `question`, `answers`.
    pub qa: Option<String>,
    /// Dialogues: rows with `turns` of `speaker` and `text`, some with `personas`.
    pub dialogues: Option<String>,
    /// Rows of few-shot tasks: `task`, `input`, `output`.
    pub fewshot: Option<String>,
    /// A folder of evaluation files, relative to `folder`: rows that occur there are dropped.
    pub held_out: Option<PathBuf>,
    /// Share of malformed rows from which a file is refused.
    #[serde(default = "malformed")]
    pub malformed: f64,
    /// Pieces of text that are kept in memory.
    #[serde(default = "pieces")]
    pub pieces: usize,
    /// Characters of a piece.
    #[serde(default = "piece_chars")]
    pub piece_chars: usize,
    /// At most so many pieces of one document.
    #[serde(default = "pieces_per_document")]
    pub pieces_per_document: usize,
    /// Contexts with questions that are kept in memory.
    #[serde(default = "qa_contexts")]
    pub qa_contexts: usize,
    /// Dialogues that are kept in memory.
    #[serde(default = "dialogue_contexts")]
    pub dialogue_contexts: usize,
    /// Windows of few-shot examples that are put together.
    #[serde(default = "fewshot_contexts")]
    pub fewshot_contexts: usize,
    /// Length of a question's context, in characters.
    #[serde(default = "qa_chars")]
    pub qa_chars: [usize; 2],
    /// Characters of an answer at most.
    #[serde(default = "answer_chars")]
    pub answer_chars: usize,
    /// Questions of one context that are kept.
    #[serde(default = "questions")]
    pub questions: usize,
    /// Tasks of which only this share is kept, e.g. `boolq = 0.05`.
    #[serde(default)]
    pub thin: std::collections::BTreeMap<String, f64>,
    /// Share of the questions that are asked in the chat template; the others in the checkpoint's `prompt_format`.
    #[serde(default)]
    pub chat: f64,
    /// Tokens of a context window at most (W of the generator if not given).
    pub window: Option<usize>,
    /// Tokens of a query: spans of text have as many, questions are cut to leave room for the answer.
    #[serde(default = "query")]
    pub query: usize,
    /// What a document ends with before it is read.
    #[serde(default = "suffix")]
    pub suffix: String,
    /// How often each kind of context is drawn, where a layout does not say.
    pub mix: Mix,
}

fn malformed() -> f64 {
    0.01
}
fn pieces() -> usize {
    9000
}
fn piece_chars() -> usize {
    6000
}
fn pieces_per_document() -> usize {
    3
}
fn qa_contexts() -> usize {
    14_000
}
fn dialogue_contexts() -> usize {
    6000
}
fn fewshot_contexts() -> usize {
    4000
}
fn qa_chars() -> [usize; 2] {
    [250, 1400]
}
fn answer_chars() -> usize {
    120
}
fn questions() -> usize {
    4
}
fn query() -> usize {
    64
}
fn suffix() -> String {
    "\n\n".to_owned()
}

/// Kinds of contexts, in proportion.
#[derive(Clone, Copy, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Mix {
    /// Plain text.
    #[serde(default)]
    pub corpus: f64,
    /// Paragraphs with questions.
    #[serde(default)]
    pub qa: f64,
    /// Synthetic packs of facts.
    #[serde(default)]
    pub facts: f64,
    /// Dialogues, or what a speaker says of himself.
    #[serde(default)]
    pub dialogues: f64,
    /// Examples of a few-shot task.
    #[serde(default)]
    pub fewshot: f64,
}

impl Mix {
    /// By [`crate::batch`]'s order of sources.
    pub(crate) fn shares(&self) -> [f64; 5] {
        [
            self.corpus,
            self.qa,
            self.facts,
            self.dialogues,
            self.fewshot,
        ]
    }
}

/// What a step reads and asks.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Layout {
    /// How often it is drawn, in proportion to the others.
    pub chance: f64,
    /// Windows of context.
    pub windows: usize,
    /// Windows whose sums are added to one core; the others of a group are distractors for a query. Or `prefix`.
    #[serde(default = "one")]
    pub group: usize,
    /// Windows of one document, one behind the other: window i is asked about with the core of those before it
    /// (completion), and spans of windows up to i with the core of those up to i (reconstruction): the published scheme.
    #[serde(default)]
    pub prefix: bool,
    /// The queries of each window of plain text, each drawn in proportion; a question's context has as many questions.
    pub queries: Vec<Ask>,
    /// Share of the questions (of `qa` and `dialogues`) that are asked with the core of a context that they do not concern,
    /// as negatives.
    #[serde(default)]
    pub foreign: f64,
    /// In place of `data.mix`.
    pub mix: Option<Mix>,
}

fn one() -> usize {
    1
}

/// What a query of plain text is, in proportion.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Ask {
    /// A span of the window.
    #[serde(default)]
    pub reconstruction: f64,
    /// The text behind the window.
    #[serde(default)]
    pub completion: f64,
    /// The text behind that, from position 0.
    #[serde(default)]
    pub far: f64,
    /// A span of another document.
    #[serde(default)]
    pub negative: f64,
}

/// What is minimised: for each kind of query weight * Σ loss / divisor, the divisor being `tokens` or, without it, the
/// number of scored tokens but at least `at_least`.
#[derive(Clone, Copy, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Losses {
    /// Spans of the context.
    pub reconstruction: Term,
    /// What follows the context.
    pub completion: Term,
    /// Answers to questions.
    pub answer: Term,
    /// Text that the context does not concern: divergence from the bare model.
    pub negative: Term,
    /// Teachers are known by so many of their likeliest tokens, all others being one; what they say of rows' questions is kept, so
    /// that a question that is drawn again needs no teacher. Not given: by all tokens, and nothing is kept.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub teacher_top_k: Option<usize>,
}

/// One term of the loss.
#[derive(Clone, Copy, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Term {
    /// 0: not in the loss.
    pub weight: f64,
    /// Share of the divergence from the in-context teacher (negatives: always 1), the rest is cross-entropy.
    pub teacher: f64,
    /// Fixed divisor.
    pub tokens: Option<f64>,
    /// Smallest divisor.
    pub at_least: f64,
}

impl Default for Term {
    fn default() -> Self {
        Self {
            weight: 1.0,
            teacher: 0.0,
            tokens: None,
            at_least: 60.0,
        }
    }
}

impl Default for Losses {
    fn default() -> Self {
        Self {
            reconstruction: Term::default(),
            completion: Term {
                teacher: 0.8,
                ..Term::default()
            },
            answer: Term::default(),
            negative: Term {
                teacher: 1.0,
                ..Term::default()
            },
            teacher_top_k: None,
        }
    }
}

/// AdamW. Every tensor is its initial root mean square times a parameter of rms 1, so `lr` is relative.
#[derive(Clone, Copy, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Optimizer {
    /// Relative learning rate.
    pub lr: f64,
    /// Factor on it for ln lambda and ln amplitude.
    pub scalars: f64,
    /// Steps until it is reached.
    pub warmup: u64,
    /// How it falls.
    pub schedule: Schedule,
    /// The part of the run in which it falls.
    pub tail: f64,
    /// What is left of it at the end.
    pub floor: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Decoupled decay of the weights.
    pub weight_decay: f64,
    /// Largest norm of the gradient of all parameters; 0: no bound.
    pub clip: f64,
    /// Batches whose gradients are added to one step.
    pub accumulate: usize,
}

impl Default for Optimizer {
    fn default() -> Self {
        Self {
            lr: 1e-2,
            scalars: 3.0,
            warmup: 20,
            schedule: Schedule::Linear,
            tail: 0.4,
            floor: 0.02,
            beta1: 0.9,
            beta2: 0.98,
            weight_decay: 0.0,
            clip: 1.0,
            accumulate: 1,
        }
    }
}

/// How the learning rate falls in the tail of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Schedule {
    /// Not at all.
    Constant,
    /// In a straight line.
    Linear,
    /// As half a cosine.
    Cosine,
}

impl Optimizer {
    /// Factor on `lr` at a step (from 0) with `progress` 0 ..= 1 of the run behind it.
    pub fn factor(&self, step: u64, progress: f64) -> f64 {
        let warm = ((step + 1) as f64 / self.warmup.max(1) as f64).min(1.0);
        let left = if self.tail > 0.0 {
            ((1.0 - progress) / self.tail).clamp(0.0, 1.0)
        } else {
            1.0
        };
        let fall = match self.schedule {
            Schedule::Constant => 1.0,
            Schedule::Linear => left,
            Schedule::Cosine => 0.5 * (1.0 - (std::f64::consts::PI * left).cos()),
        };
        warm * fall.max(self.floor)
    }
}

/// When the held-out figure is taken, on rows of the training files that are never trained on.
#[derive(Clone, Copy, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Validation {
    /// Steps between figures; 0: by minutes.
    pub steps: u64,
    /// Minutes of training between figures.
    pub minutes: f64,
    /// Contexts of each kind.
    pub contexts: usize,
}

impl Default for Validation {
    fn default() -> Self {
        Self {
            steps: 0,
            minutes: 12.0,
            contexts: 24,
        }
    }
}

impl Recipe {
    /// Reads and checks a recipe.
    ///
    /// # Errors
    /// [`Error::Io`] or [`Error::Recipe`], naming key and value.
    pub fn load(path: &Path) -> Result<Self, Error> {
        let text = fs::read_to_string(path).map_err(|source| Error::io(path, source))?;
        let refuse = |detail: String| Error::Recipe {
            path: path.to_owned(),
            detail,
        };
        let mut recipe: Self = toml::from_str(&text).map_err(|error| refuse(error.to_string()))?;
        recipe.check().map_err(refuse)?;
        let beside = path.parent().unwrap_or(Path::new(""));
        recipe.data.folder = beside.join(&recipe.data.folder);
        recipe.start = recipe.start.map(|start| beside.join(start));
        Ok(recipe)
    }

    /// What is wrong with it.
    fn check(&self) -> Result<(), String> {
        let within = |key: &str, value: f64, least: f64, most: f64| {
            if value.is_finite() && (least..=most).contains(&value) {
                Ok(())
            } else {
                Err(format!(
                    "`{key}` = {value} is not within {least} ..= {most}"
                ))
            }
        };
        match self.length {
            Length::Steps(steps) => within("length.steps", steps as f64, 1.0, 1e9)?,
            Length::Minutes(minutes) => within("length.minutes", minutes, 0.01, 1e6)?,
        }
        if self.start.is_some() == self.generator.is_some() {
            return Err("exactly one of `start` and `[generator]` says where it begins".to_owned());
        }
        if let Some(new) = &self.generator {
            for (key, size) in [("r1", new.r1), ("r2", new.r2), ("max_rank", new.max_rank)] {
                within(&format!("generator.{key}"), size as f64, 1.0, 65_536.0)?;
            }
            within("generator.window", new.window as f64, 3.0, 65_536.0)?;
            within("generator.contexts", new.contexts as f64, 1.0, 4096.0)?;
            within("generator.ridge", new.ridge, 1e-9, 1e9)?;
            within("generator.damping", new.damping, 0.0, 1e6)?;
            within("generator.amplitude", new.amplitude, -1e6, 1e6)?;
            if new.modules.is_empty() || new.layers.is_empty() {
                return Err("`generator` adapts no linear".to_owned());
            }
            if new.form == Form::Published && new.read_out == ReadOut::Ridge {
                return Err(
                    "`generator.read_out` = ridge belongs to the associative form".to_owned(),
                );
            }
        }
        if let Some(grow) = &self.grow {
            within("grow.r1", grow.r1 as f64, 1.0, 65_536.0)?;
            within("grow.damping", grow.damping, 0.0, 1e6)?;
            within("grow.contexts", grow.contexts as f64, 1.0, 4096.0)?;
            if self.start.is_none() {
                return Err("`grow` needs a `start` to grow from".to_owned());
            }
        }
        let data = &self.data;
        for (key, share) in [("malformed", data.malformed), ("chat", data.chat)] {
            within(&format!("data.{key}"), share, 0.0, 1.0)?;
        }
        for (task, share) in &data.thin {
            within(&format!("data.thin.{task}"), *share, 0.0, 1.0)?;
        }
        within("data.query", data.query as f64, 4.0, 4096.0)?;
        within("data.pieces", data.pieces as f64, 1.0, 1e6)?;
        within("data.piece_chars", data.piece_chars as f64, 64.0, 1e7)?;
        within("data.qa_contexts", data.qa_contexts as f64, 1.0, 1e7)?;
        within("data.questions", data.questions as f64, 1.0, 64.0)?;
        within(
            "data.dialogue_contexts",
            data.dialogue_contexts as f64,
            1.0,
            1e7,
        )?;
        within(
            "data.fewshot_contexts",
            data.fewshot_contexts as f64,
            1.0,
            1e7,
        )?;
        if let Some(window) = data.window {
            within("data.window", window as f64, 3.0, 65_536.0)?;
        }
        if self.layout.is_empty() {
            return Err("no `[[layout]]`".to_owned());
        }
        for layout in &self.layout {
            within("layout.chance", layout.chance, 0.0, 1e6)?;
            within("layout.windows", layout.windows as f64, 1.0, 1024.0)?;
            within("layout.foreign", layout.foreign, 0.0, 1.0)?;
            within(
                "layout.group",
                layout.group as f64,
                1.0,
                layout.windows as f64,
            )?;
            if !layout.prefix && layout.windows % layout.group != 0 {
                return Err(format!(
                    "`layout.windows` = {} is no multiple of `layout.group` = {}",
                    layout.windows, layout.group
                ));
            }
            if !layout.prefix && (layout.queries.is_empty() || layout.queries.len() > 64) {
                return Err("`layout.queries` has none, or more than 64".to_owned());
            }
            for ask in &layout.queries {
                for share in [ask.reconstruction, ask.completion, ask.far, ask.negative] {
                    within("layout.queries", share, 0.0, 1e6)?;
                }
            }
            self.check_mix(layout.mix.as_ref().unwrap_or(&data.mix))?;
        }
        if self.layout.iter().all(|layout| layout.chance == 0.0) {
            return Err("every `layout.chance` is 0".to_owned());
        }
        let losses = &self.loss;
        for (key, term) in [
            ("reconstruction", losses.reconstruction),
            ("completion", losses.completion),
            ("answer", losses.answer),
            ("negative", losses.negative),
        ] {
            within(&format!("loss.{key}.weight"), term.weight, 0.0, 1e6)?;
            within(&format!("loss.{key}.teacher"), term.teacher, 0.0, 1.0)?;
            within(&format!("loss.{key}.at_least"), term.at_least, 1.0, 1e9)?;
            if let Some(tokens) = term.tokens {
                within(&format!("loss.{key}.tokens"), tokens, 1.0, 1e9)?;
            }
        }
        if let Some(k) = losses.teacher_top_k {
            within("loss.teacher_top_k", k as f64, 1.0, 1024.0)?;
        }
        let o = &self.optimizer;
        within("optimizer.lr", o.lr, 0.0, 1e3)?;
        within("optimizer.scalars", o.scalars, 0.0, 1e3)?;
        within("optimizer.tail", o.tail, 0.0, 1.0)?;
        within("optimizer.floor", o.floor, 0.0, 1.0)?;
        within("optimizer.beta1", o.beta1, 0.0, 0.999_999)?;
        within("optimizer.beta2", o.beta2, 0.0, 0.999_999)?;
        within("optimizer.weight_decay", o.weight_decay, 0.0, 1e3)?;
        within("optimizer.clip", o.clip, 0.0, 1e6)?;
        within("optimizer.accumulate", o.accumulate as f64, 1.0, 1024.0)?;
        within("validation.minutes", self.validation.minutes, 0.0, 1e6)?;
        within(
            "validation.contexts",
            self.validation.contexts as f64,
            1.0,
            4096.0,
        )?;
        within("save_minutes", self.save_minutes, 0.0, 1e6)
    }

    fn check_mix(&self, mix: &Mix) -> Result<(), String> {
        let shares = [
            ("corpus", mix.corpus, self.data.corpus.is_some()),
            ("qa", mix.qa, self.data.qa.is_some()),
            ("facts", mix.facts, true),
            ("dialogues", mix.dialogues, self.data.dialogues.is_some()),
            ("fewshot", mix.fewshot, self.data.fewshot.is_some()),
        ];
        for (kind, share, there) in shares {
            if !share.is_finite() || share < 0.0 {
                return Err(format!("`mix.{kind}` = {share} is no share"));
            }
            if share > 0.0 && !there {
                return Err(format!(
                    "`mix.{kind}` draws from a file that `data` does not name"
                ));
            }
        }
        if shares.iter().all(|(_, share, _)| *share == 0.0) {
            return Err("a `mix` that draws nothing".to_owned());
        }
        Ok(())
    }

    /// Checks it again, after a change.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn checked(&self) -> Result<(), String> {
        self.check()
    }

    /// Digest of everything that makes the run but its length and its saving.
    pub fn digest(&self) -> String {
        let mut same = self.clone();
        same.length = Length::Steps(0);
        same.save_minutes = 0.0;
        same.data.folder = PathBuf::new();
        let text = serde_json::to_vec(&same).unwrap_or_default();
        blake3::hash(&text).to_hex().to_string()
    }
}

#[cfg(test)]
mod tests;
