//! A report: examples with their answers, and what they come to per method.
//!
//! Figures are recomputed from the examples alone; intervals are bootstraps over contexts, as questions on one context are not
//! independent. Start at [`Report`].

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    fs::File,
    io::BufReader,
    path::Path,
};

use serde::{Deserialize, Serialize};

use crate::{
    Error, Form, Method, Task, metrics,
    tasks::{Case, Question},
};

/// What was run.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct About {
    /// The task.
    pub task: Task,
    /// How questions were put.
    pub form: Form,
    /// Seed of all draws.
    pub seed: u64,
    /// Questions for each point, at most.
    pub limit: u32,
    /// Name of the data file.
    pub data: Option<String>,
    /// blake3 of the data file.
    pub data_digest: Option<String>,
    /// Rows of it that were skipped.
    pub malformed: u64,
    /// Digest of the frozen model's files.
    pub model_digest: String,
    /// Digest of the generator.
    pub generator_digest: Option<String>,
    /// Tokens that fit the model's window.
    pub context_length: usize,
    /// The device that forwards ran on, in bf16; none: the processor.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
    /// Methods that this task or model cannot have.
    pub skipped: Vec<Method>,
    /// What method `lora` was tuned to, for each point of the series; empty where it was not run.
    #[serde(default)]
    pub lora: Vec<Tuned>,
}

/// How method `lora` fine-tunes at one point of the series.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Tuned {
    /// The point.
    pub label: String,
    /// Rank of the adapter.
    pub rank: usize,
    /// Learning rate.
    pub rate: f64,
    /// Steps on all of a context.
    pub steps: usize,
    /// Other cases that settings were judged on.
    pub cases: usize,
    /// All settings that were judged.
    pub tried: Vec<Tried>,
}

/// A setting of method `lora`, judged.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Tried {
    /// Learning rate.
    pub rate: f64,
    /// Steps.
    pub steps: usize,
    /// Nats a token of the answers: total over total.
    pub answer_nll: f64,
}

impl std::fmt::Display for Tuned {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "lora at {}: rank {}, {} steps of AdamW at {}, the best for {} other cases of ",
            self.label, self.rank, self.steps, self.rate, self.cases
        )?;
        for (number, tried) in self.tried.iter().enumerate() {
            let comma = if number == 0 { "" } else { ", " };
            let Tried {
                rate,
                steps,
                answer_nll,
            } = tried;
            write!(f, "{comma}{steps} at {rate}: {answer_nll:.3}")?;
        }
        Ok(())
    }
}

/// One context, for people.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Context {
    /// Its tokens, all documents.
    pub tokens: usize,
    /// Its documents.
    pub documents: usize,
    /// The beginning of its text.
    pub text: String,
}

/// Letters of a context that a report keeps.
const LETTERS: usize = 4000;

impl Context {
    pub(crate) fn of(case: &Case) -> Self {
        let text = case
            .context
            .iter()
            .flat_map(|document| document.text.chars().chain("\n\n".chars()));
        Self {
            tokens: case
                .context
                .iter()
                .map(|document| document.tokens.len())
                .sum(),
            documents: case.context.len(),
            text: text.take(LETTERS).collect(),
        }
    }
}

/// A question and its answers.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Example {
    /// Index of its context in the report.
    pub context: usize,
    /// The row's own name.
    pub id: String,
    /// The point of the series.
    pub label: String,
    /// Where that point lies.
    pub x: Option<f64>,
    /// The question.
    pub question: String,
    /// Right answers.
    pub references: Vec<String>,
    /// By method.
    pub answers: BTreeMap<String, Answer>,
}

impl Example {
    pub(crate) fn new(context: usize, question: &Question) -> Self {
        Self {
            context,
            id: question.id.clone(),
            label: question.label.clone(),
            x: question.x,
            question: question.shown.clone(),
            references: question.references.clone(),
            answers: BTreeMap::new(),
        }
    }

    /// Holds answers of imprints against the bare model's.
    pub(crate) fn compare(&mut self) {
        let bare = self
            .answers
            .get(Method::None.name())
            .and_then(|answer| answer.text.clone());
        for method in Method::ALL {
            if let Some(answer) = self.answers.get_mut(method.name())
                && method.compares_to_bare()
                && let (Some(bare), Some(text)) = (&bare, &answer.text)
            {
                answer.kept = Some(f64::from(u8::from(text == bare)));
            }
        }
    }
}

/// What a method made of a question.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Answer {
    /// Negative log-likelihood of the scored answer, nats, summed.
    pub nll: f64,
    /// Its tokens.
    pub tokens: usize,
    /// Those that were the likeliest of their place.
    pub likeliest: usize,
    /// KL to the bare model over its places, nats, summed.
    pub kl: Option<f64>,
    /// The greedy answer.
    pub text: Option<String>,
    /// F1 of it.
    pub f1: Option<f64>,
    /// 1 if it is a reference.
    pub em: Option<f64>,
    /// ROUGE-L recall of it.
    pub rouge_l: Option<f64>,
    /// 1 if the likeliest option (by token) is the right one.
    pub choice: Option<f64>,
    /// 1 if it is the bare model's answer, letter by letter.
    pub kept: Option<f64>,
    /// Strength that the imprint had.
    #[serde(default)]
    pub strength: Option<f32>,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Those of them that are context.
    pub context_tokens: usize,
    /// Operations of answering, counted from shapes.
    pub query_flops: f64,
    /// Operations of reading the context once.
    pub context_flops: f64,
    /// Floats kept of the context: a core, or keys and values.
    pub state_floats: usize,
    /// Seconds of answering, its share of the batches it was in.
    pub query_seconds: f64,
    /// Seconds of reading the context once.
    pub context_seconds: f64,
}

/// A figure with its 95 % interval.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Interval {
    /// The lower end.
    pub low: f64,
    /// The upper end.
    pub high: f64,
}

/// What a method comes to.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Figures {
    /// Questions that it answered.
    pub questions: usize,
    /// Nats a token of the scored answers: total over total.
    pub answer_nll: f64,
    /// Its interval.
    pub answer_nll_interval: Option<Interval>,
    /// Share of the scored tokens that were the likeliest of their place.
    pub token_accuracy: f64,
    /// Mean F1.
    pub f1: Option<f64>,
    /// Its interval.
    pub f1_interval: Option<Interval>,
    /// Share of exact matches.
    pub em: Option<f64>,
    /// Its interval.
    pub em_interval: Option<Interval>,
    /// Mean ROUGE-L recall.
    pub rouge_l: Option<f64>,
    /// Share of right choices among options.
    pub choice: Option<f64>,
    /// Its interval.
    pub choice_interval: Option<Interval>,
    /// KL(bare || this), nats a scored token.
    pub kl_to_bare: Option<f64>,
    /// Share of greedy answers that are the bare model's.
    pub kept: Option<f64>,
    /// Mean strength of the imprint.
    #[serde(default)]
    pub strength: Option<f64>,
    /// Mean tokens of a prompt.
    pub prompt_tokens: f64,
    /// Mean operations of answering a question.
    pub query_flops: f64,
    /// Mean operations of reading a context once.
    pub context_flops: f64,
    /// Mean floats kept of a context.
    pub state_floats: f64,
    /// Mean seconds of answering, in batches.
    pub query_seconds: f64,
    /// Mean seconds of reading a context once.
    pub context_seconds: f64,
    /// Their median over contexts; none where a context is not read.
    #[serde(default)]
    pub median_context_seconds: Option<f64>,
    /// (none - x) / (none - in_context), of answer_nll.
    pub gap_closed: Option<f64>,
    /// Its interval.
    pub gap_closed_interval: Option<Interval>,
    /// min(none_styled, foreign) - x, nats: what neither style nor a foreign context brings.
    pub content_gain: Option<f64>,
    /// Its interval.
    pub content_gain_interval: Option<Interval>,
    /// content_gain / that of in_context.
    pub content_gain_ratio: Option<f64>,
    /// Its interval.
    pub content_gain_ratio_interval: Option<Interval>,
    /// f1 / the better of in_context and in_context_styled.
    pub f1_ratio: Option<f64>,
    /// Its interval.
    pub f1_ratio_interval: Option<Interval>,
}

/// A point of a series.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Point {
    /// Its name.
    pub label: String,
    /// Where it lies.
    pub x: Option<f64>,
    /// Its figures by method.
    pub methods: BTreeMap<String, Figures>,
}

/// What a run came to.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Report {
    /// What was run.
    pub about: About,
    /// Figures over all questions, by method.
    pub methods: BTreeMap<String, Figures>,
    /// Figures of each point, in the order of the run.
    pub series: Vec<Point>,
    /// The contexts.
    pub contexts: Vec<Context>,
    /// The questions with their answers.
    pub examples: Vec<Example>,
}

impl Report {
    pub(crate) fn new(
        about: About,
        methods: &[Method],
        contexts: Vec<Context>,
        examples: Vec<Example>,
    ) -> Self {
        let mut labels: Vec<(String, Option<f64>)> = Vec::new();
        for example in &examples {
            if !labels.iter().any(|(label, _)| *label == example.label) {
                labels.push((example.label.clone(), example.x));
            }
        }
        let series = labels
            .into_iter()
            .map(|(label, x)| {
                let of_it = examples.iter().filter(|example| example.label == label);
                Point {
                    methods: figures(&of_it.collect::<Vec<_>>(), methods, about.seed),
                    label,
                    x,
                }
            })
            .collect();
        let all: Vec<&Example> = examples.iter().collect();
        Self {
            methods: figures(&all, methods, about.seed),
            about,
            series,
            contexts,
            examples,
        }
    }

    /// Reads a report that `imprint eval run` wrote.
    ///
    /// # Errors
    /// [`Error::Io`] or [`Error::Report`].
    pub fn read(path: &Path) -> Result<Self, Error> {
        let file = File::open(path).map_err(|source| Error::io(path, source))?;
        serde_json::from_reader(BufReader::new(file)).map_err(|source| Error::Report {
            path: path.to_owned(),
            source,
        })
    }

    /// The tables as Markdown: one for each point of the series.
    #[must_use]
    pub fn markdown(&self) -> String {
        let mut text = String::new();
        for point in &self.series {
            table(&mut text, self.about.task, point);
        }
        for tuned in &self.about.lora {
            // Writing to a String does not fail.
            let _ = writeln!(text, "\n{tuned}.");
        }
        text
    }
}

/// Sums over the questions of one context under one method.
#[derive(Clone, Copy, Debug, Default)]
struct Sums {
    nll: f64,
    tokens: f64,
    f1: f64,
    em: f64,
    generated: f64,
    choice: f64,
    chosen: f64,
}

impl Sums {
    fn add(&mut self, answer: &Answer) {
        self.nll += answer.nll;
        self.tokens += float(answer.tokens);
        if let (Some(f1), Some(em)) = (answer.f1, answer.em) {
            self.f1 += f1;
            self.em += em;
            self.generated += 1.0;
        }
        if let Some(choice) = answer.choice {
            self.choice += choice;
            self.chosen += 1.0;
        }
    }

    fn scaled(&mut self, other: &Self, times: f64) {
        self.nll += other.nll * times;
        self.tokens += other.tokens * times;
        self.f1 += other.f1 * times;
        self.em += other.em * times;
        self.generated += other.generated * times;
        self.choice += other.choice * times;
        self.chosen += other.chosen * times;
    }

    fn nll(&self) -> Option<f64> {
        over(self.nll, self.tokens)
    }
}

fn over(sum: f64, count: f64) -> Option<f64> {
    (count > 0.0).then(|| sum / count)
}

#[expect(clippy::cast_precision_loss, reason = "counts are far below 2^52")]
fn float(count: usize) -> f64 {
    count as f64
}

/// Sums by method, in the order of [`Method::ALL`].
type All = [Sums; Method::ALL.len()];

fn of(all: &All, method: Method) -> &Sums {
    &all[Method::ALL
        .iter()
        .position(|other| *other == method)
        .unwrap_or(0)]
}

/// What a method's own context is measured against, where the style of an answer is no knowledge.
fn content_gain(all: &All, method: Method) -> Option<f64> {
    let foreign = if method.imprint().is_some() {
        Method::ImprintForeign
    } else {
        Method::InContextForeign
    };
    if !matches!(
        method,
        Method::Imprint | Method::ImprintSnippet | Method::InContext | Method::InContextStyled
    ) {
        return None;
    }
    let foreign = of(all, foreign).nll()?;
    let styled = of(all, Method::NoneStyled).nll();
    Some(styled.map_or(foreign, |styled| styled.min(foreign)) - of(all, method).nll()?)
}

fn content_gain_ratio(all: &All, method: Method) -> Option<f64> {
    let whole = content_gain(all, Method::InContext)?;
    content_gain(all, method)
        .filter(|_| whole > 0.0)
        .map(|gain| gain / whole)
}

fn gap_closed(all: &All, method: Method) -> Option<f64> {
    let none = of(all, Method::None).nll()?;
    let whole = none - of(all, Method::InContext).nll()?;
    let own = of(all, method).nll()?;
    (method != Method::None && whole != 0.0).then(|| (none - own) / whole)
}

fn f1(all: &All, method: Method) -> Option<f64> {
    over(of(all, method).f1, of(all, method).generated)
}

fn f1_ratio(all: &All, method: Method) -> Option<f64> {
    let plain = f1(all, Method::InContext)?;
    let best = f1(all, Method::InContextStyled).map_or(plain, |styled| styled.max(plain));
    f1(all, method).filter(|_| best > 0.0).map(|own| own / best)
}

/// The figures of all methods over some examples.
fn figures(examples: &[&Example], methods: &[Method], seed: u64) -> BTreeMap<String, Figures> {
    let places: BTreeSet<usize> = examples.iter().map(|example| example.context).collect();
    let places: BTreeMap<usize, usize> = places
        .into_iter()
        .enumerate()
        .map(|(place, context)| (context, place))
        .collect();
    let mut clusters: Vec<All> = vec![All::default(); places.len()];
    for example in examples {
        let Some(cluster) = places
            .get(&example.context)
            .and_then(|&place| clusters.get_mut(place))
        else {
            continue;
        };
        for (sums, method) in cluster.iter_mut().zip(Method::ALL) {
            if let Some(answer) = example.answers.get(method.name()) {
                sums.add(answer);
            }
        }
    }
    let total = summed(&clusters, |_| 1.0);
    let interval = |figure: &dyn Fn(&All) -> Option<f64>| {
        figure(&total)?;
        let [low, high] = metrics::interval(clusters.len(), seed, |times| {
            figure(&summed(&clusters, |place| f64::from(times[place])))
        })?;
        Some(Interval { low, high })
    };
    let mut all = BTreeMap::new();
    for &method in methods {
        let answers: Vec<&Answer> = examples
            .iter()
            .filter_map(|example| example.answers.get(method.name()))
            .collect();
        let sums = of(&total, method);
        let Some(answer_nll) = sums.nll() else {
            continue;
        };
        let mean = |figure: &dyn Fn(&Answer) -> f64| {
            over(
                answers.iter().map(|answer| figure(answer)).sum(),
                float(answers.len()),
            )
            .unwrap_or(0.0)
        };
        let some = |figure: &dyn Fn(&Answer) -> Option<f64>| {
            let values: Vec<f64> = answers.iter().filter_map(|answer| figure(answer)).collect();
            over(values.iter().sum(), float(values.len()))
        };
        let (kl, kl_tokens) = answers
            .iter()
            .filter_map(|answer| Some((answer.kl?, answer.tokens)))
            .fold((0.0, 0), |(sum, count), (kl, tokens)| {
                (sum + kl, count + tokens)
            });
        all.insert(
            method.name().to_owned(),
            Figures {
                questions: answers.len(),
                answer_nll,
                answer_nll_interval: interval(&|all| of(all, method).nll()),
                token_accuracy: mean(&|answer| float(answer.likeliest)) * float(answers.len())
                    / sums.tokens,
                f1: over(sums.f1, sums.generated),
                f1_interval: interval(&|all| f1(all, method)),
                em: over(sums.em, sums.generated),
                em_interval: interval(&|all| over(of(all, method).em, of(all, method).generated)),
                rouge_l: some(&|answer| answer.rouge_l),
                choice: over(sums.choice, sums.chosen),
                choice_interval: interval(&|all| {
                    over(of(all, method).choice, of(all, method).chosen)
                }),
                kl_to_bare: over(kl, float(kl_tokens)),
                kept: some(&|answer| answer.kept),
                strength: some(&|answer| answer.strength.map(f64::from)),
                prompt_tokens: mean(&|answer| float(answer.prompt_tokens)),
                query_flops: mean(&|answer| answer.query_flops),
                context_flops: mean(&|answer| answer.context_flops),
                state_floats: mean(&|answer| float(answer.state_floats)),
                query_seconds: mean(&|answer| answer.query_seconds),
                context_seconds: mean(&|answer| answer.context_seconds),
                median_context_seconds: median_context_seconds(examples, method),
                gap_closed: gap_closed(&total, method),
                gap_closed_interval: interval(&|all| gap_closed(all, method)),
                content_gain: content_gain(&total, method),
                content_gain_interval: interval(&|all| content_gain(all, method)),
                content_gain_ratio: content_gain_ratio(&total, method),
                content_gain_ratio_interval: interval(&|all| content_gain_ratio(all, method)),
                f1_ratio: f1_ratio(&total, method),
                f1_ratio_interval: interval(&|all| f1_ratio(all, method)),
            },
        );
    }
    all
}

/// Seconds of reading a context once, of each context that is read: their median.
fn median_context_seconds(examples: &[&Example], method: Method) -> Option<f64> {
    let of_context: BTreeMap<usize, f64> = examples
        .iter()
        .filter_map(|example| {
            let answer = example.answers.get(method.name())?;
            (answer.context_seconds > 0.0).then_some((example.context, answer.context_seconds))
        })
        .collect();
    let mut seconds: Vec<f64> = of_context.into_values().collect();
    seconds.sort_by(f64::total_cmp);
    let (low, high) = (seconds.len().checked_sub(1)? / 2, seconds.len() / 2);
    Some(f64::midpoint(seconds[low], seconds[high]))
}

fn summed(clusters: &[All], times: impl Fn(usize) -> f64) -> All {
    let mut total = All::default();
    for (place, cluster) in clusters.iter().enumerate() {
        let times = times(place);
        if times > 0.0 {
            for (sum, part) in total.iter_mut().zip(cluster) {
                sum.scaled(part, times);
            }
        }
    }
    total
}

/// One point as a Markdown table.
fn table(text: &mut String, task: Task, point: &Point) {
    for (number, row) in cells(point).into_iter().enumerate() {
        let mut row = row;
        if number == 0
            && let Some(corner) = row.first_mut()
        {
            *corner = format!("{}, {}", task.name(), point.label);
        }
        // Writing to a String does not fail.
        let _ = write!(text, "\n| {} |", row.join(" | "));
        if number == 0 {
            let _ = write!(text, "\n|{}", "---|".repeat(row.len()));
        }
    }
    text.push('\n');
}

/// One point as a table, its head first; columns that no method has are left out.
pub(crate) fn cells(point: &Point) -> Vec<Vec<String>> {
    type Cell = fn(&Figures) -> Option<String>;
    let columns: [(&str, Cell); 14] = [
        ("n", |f| Some(f.questions.to_string())),
        ("NLL", |f| {
            Some(ranged(f.answer_nll, f.answer_nll_interval, 3, 1.0))
        }),
        ("F1", |f| Some(ranged(f.f1?, f.f1_interval, 1, 100.0))),
        ("EM", |f| Some(ranged(f.em?, f.em_interval, 1, 100.0))),
        ("ROUGE-L", |f| {
            f.rouge_l.map(|x| format!("{:.1}", x * 100.0))
        }),
        ("choice", |f| {
            Some(ranged(f.choice?, f.choice_interval, 1, 100.0))
        }),
        ("gap closed", |f| {
            Some(ranged(f.gap_closed?, f.gap_closed_interval, 2, 1.0))
        }),
        ("content gain", |f| {
            Some(ranged(f.content_gain?, f.content_gain_interval, 2, 1.0))
        }),
        ("its ratio", |f| {
            Some(ranged(
                f.content_gain_ratio?,
                f.content_gain_ratio_interval,
                2,
                1.0,
            ))
        }),
        ("KL to bare", |f| f.kl_to_bare.map(|x| format!("{x:.3}"))),
        ("prompt", |f| Some(format!("{:.0}", f.prompt_tokens))),
        ("GFLOP", |f| {
            Some(format!(
                "{:.1} + {:.1}",
                f.context_flops / 1e9,
                f.query_flops / 1e9
            ))
        }),
        ("floats", |f| Some(format!("{:.2} M", f.state_floats / 1e6))),
        ("s a context", |f| {
            f.median_context_seconds.map(|x| format!("{x:.3}"))
        }),
    ];
    let rows: Vec<(&str, &Figures)> = Method::ALL
        .into_iter()
        .filter_map(|method| Some((method.name(), point.methods.get(method.name())?)))
        .collect();
    let columns: Vec<_> = columns
        .into_iter()
        .filter(|(_, cell)| rows.iter().any(|(_, figures)| cell(figures).is_some()))
        .collect();
    let mut head = vec!["method".to_owned()];
    head.extend(columns.iter().map(|(name, _)| (*name).to_owned()));
    let mut table = vec![head];
    for (method, figures) in rows {
        let mut row = vec![method.to_owned()];
        row.extend(
            columns
                .iter()
                .map(|(_, cell)| cell(figures).unwrap_or_default()),
        );
        table.push(row);
    }
    table
}

/// A figure with its interval in brackets.
fn ranged(figure: f64, interval: Option<Interval>, digits: usize, times: f64) -> String {
    let figure = figure * times;
    match interval {
        Some(Interval { low, high }) => {
            let (low, high) = (low * times, high * times);
            format!("{figure:.digits$} [{low:.digits$}, {high:.digits$}]")
        }
        None => format!("{figure:.digits$}"),
    }
}

#[cfg(test)]
mod tests;
