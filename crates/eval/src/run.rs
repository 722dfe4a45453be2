//! `imprint eval run`: one task, all methods side by side, one report.
//!
//! Cases go in chunks; within a chunk the next case's context is the foreign one. Start at [`run`].

mod adapting;

use std::{
    collections::BTreeMap,
    fs::File,
    io::BufWriter,
    ops::Range,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use engine::Machine;
use generator::Core;
use indicatif::{ProgressBar, ProgressStyle};
use lm::{Activations, Lm, LoadOptions, TokenId, text::Text};
use relevance::Spoken;

use crate::{
    Error, Form, Method, Task, bm25,
    cost::Costs,
    method::{Prompted, Whose},
    metrics,
    model::{Answers, Ask, Group, Model},
    prompt::{Document, Prompts},
    report::{About, Answer, Context, Example, Report, Tuned},
    seat::{Seat, settings},
    tasks::{self, Case, LaidOut, Question, Wanted},
};

/// What to evaluate.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// The task
    #[arg(long, value_name = "TASK")]
    pub task: Task,
    /// The rows: JSON lines, compressed with zstd or not. Task facts makes its own
    #[arg(long, value_name = "FILE")]
    pub data: Option<PathBuf>,
    /// Questions (text, msc, persona_chat and forget: rows) for each point of a series
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub limit: u32,
    /// Seed of all draws: the same seed gives the same figures on one machine
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Write the report as JSON to FILE; without it only the table is printed
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// The methods [default: all that the task has, but lora, which takes long]
    #[arg(long, value_name = "METHOD", value_delimiter = ',')]
    pub methods: Vec<Method>,
    /// Context lengths in tokens, each a point of a series: 256,1k,4k. Up to 256 a context is one document alone, beyond it
    /// documents are joined
    #[arg(long, value_name = "LENGTH", value_delimiter = ',', value_parser = length)]
    pub context_tokens: Vec<usize>,
    /// Questions for a context [default: one for each document in it, at most 16]
    #[arg(long, value_name = "N")]
    pub questions: Option<usize>,
    /// Examples in a few-shot context (metaicl)
    #[arg(long, value_name = "K", value_delimiter = ',', default_value = "16")]
    pub shots: Vec<usize>,
    /// Facts in a context (facts)
    #[arg(
        long,
        value_name = "N",
        value_delimiter = ',',
        default_value = "1,2,4,8,32"
    )]
    pub facts: Vec<usize>,
    /// Tokens of other text behind the facts (facts)
    #[arg(long, value_name = "TOKENS", default_value = "0", value_parser = length)]
    pub distance_tokens: usize,
    /// Windows told (stream)
    #[arg(
        long,
        value_name = "N",
        value_delimiter = ',',
        default_value = "1,2,4,8,16"
    )]
    pub windows: Vec<usize>,
    /// How questions are put
    #[arg(long, value_name = "FORM", default_value = "plain")]
    pub form: Form,
    /// Ask with the whole imprint at full strength. By default a question gets what it means of it, as when serving: the
    /// strength, and of several documents those that speak of its words
    #[arg(long)]
    pub whole: bool,
    /// What activations are rounded to where weights are quantised: f32 (nothing) or int8, the default when serving
    #[arg(long, value_name = "PROFILE", default_value_t)]
    pub activations: Activations,
    /// The share of malformed rows that is put up with, from 0 to 1
    #[arg(long, value_name = "SHARE", default_value_t = 0.02)]
    pub max_malformed: f64,
}

/// The largest length that can be asked for.
const LONGEST: usize = 1 << 20;

/// 512, 1k, 16k.
fn length(text: &str) -> Result<usize, String> {
    let (digits, unit) = match text.strip_suffix(['k', 'K']) {
        Some(digits) => (digits, 1024),
        None => (text, 1),
    };
    let number: usize = digits
        .parse()
        .map_err(|_| "it is no length, such as 512, 1k or 16k".to_owned())?;
    number
        .checked_mul(unit)
        .filter(|&tokens| tokens <= LONGEST)
        .ok_or_else(|| format!("it is more than {LONGEST}"))
}

/// Loads a model with its generator on a device, by the settings that an evaluation needs.
pub type Loading<'a> = &'a dyn Fn(&engine::Config) -> Result<Box<dyn Machine>, engine::Error>;

/// Tokens of a device's cache of keys and values, unless somebody says how many.
pub const CACHE_TOKENS: usize = 1 << 16;

/// Evaluates a model with its generator, on the processor or on `device`.
///
/// # Errors
/// Options, rows, model or generator that cannot work, a method that the device does not have, or a report that cannot be written.
pub fn run(
    args: &Args,
    model: &Path,
    generator: Option<&Path>,
    device: Option<Loading<'_>>,
) -> Result<Report, Error> {
    if !(0.0..=1.0).contains(&args.max_malformed) {
        return Err(Error::Option {
            option: "--max-malformed",
            detail: "a share is from 0 to 1".to_owned(),
        });
    }
    for (option, values) in [("--shots", &args.shots), ("--windows", &args.windows)] {
        if let Some(wrong) = values.iter().find(|value| !(1..=4096).contains(*value)) {
            return Err(Error::Option {
                option,
                detail: format!("{wrong} is not from 1 to 4096"),
            });
        }
    }
    // A report that cannot be written is better known before the hours than behind them.
    let json = match &args.json {
        Some(path) => Some((
            path,
            File::create(path).map_err(|source| Error::io(path, source))?,
        )),
        None => None,
    };
    let text = Text::load(model)?;
    let report = match device {
        Some(load) => {
            let settings = settings(CACHE_TOKENS);
            evaluate_on(args, load(&settings)?, &settings, &text)?
        }
        None => {
            let options = LoadOptions {
                activations: args.activations,
                ..LoadOptions::default()
            };
            let mut lm = Lm::load(model, options)?;
            if let Some(generator) = generator {
                lm.attach_generator(generator)?;
            }
            evaluate(args, &lm, &text)?
        }
    };
    if let Some((path, file)) = json {
        let mut file = BufWriter::new(file);
        serde_json::to_writer(&mut file, &report)
            .map_err(std::io::Error::from)
            .and_then(|()| std::io::Write::flush(&mut file))
            .map_err(|source| Error::io(path, source))?;
    }
    Ok(report)
}

/// The same with a model that is loaded, on the processor.
///
/// # Errors
/// As [`run`].
pub fn evaluate(args: &Args, lm: &Lm, text: &Text) -> Result<Report, Error> {
    judge(args, Seat::processor(lm, None)?, text)
}

/// The same on a device that was loaded with `settings`.
///
/// # Errors
/// As [`run`].
pub fn evaluate_on(
    args: &Args,
    machine: Box<dyn Machine>,
    settings: &engine::Config,
    text: &Text,
) -> Result<Report, Error> {
    judge(args, Seat::device(machine, settings), text)
}

fn judge(args: &Args, seat: Seat<'_>, text: &Text) -> Result<Report, Error> {
    let prompts = Prompts::new(text, seat.generator(), args.form);
    let wanted = Wanted {
        limit: args.limit as usize,
        seed: args.seed,
        context_tokens: args.context_tokens.clone(),
        questions: args.questions,
        shots: args.shots.clone(),
        facts: args.facts.clone(),
        distance_tokens: args.distance_tokens,
        windows: args.windows.clone(),
        max_malformed: args.max_malformed,
    };
    let LaidOut {
        cases,
        malformed,
        digest,
    } = tasks::lay_out(args.task, args.data.as_deref(), &wanted, &prompts)?;
    let (methods, skipped) = methods(&args.methods, &seat, &cases)?;
    let base = seat.base().clone();
    let generator_digest = seat
        .generator()
        .map(|generator| generator.digest().to_owned());
    let device = seat.lm().is_none().then(|| "cuda".to_owned());
    let mut judge = Judge {
        costs: Costs::new(&base.config, seat.generator()),
        lm: seat.lm(),
        model: Model::new(seat, text)?,
        prompts: &prompts,
        methods: &methods,
        whole: args.whole,
        seed: args.seed,
        tuned: Vec::new(),
    };
    if methods.contains(&Method::Lora) {
        let others = adapting::wanted(&wanted);
        let others = tasks::lay_out(args.task, args.data.as_deref(), &others, &prompts)?;
        judge.tuned = judge.tune(&cases, &adapting::unseen(others.cases, &cases))?;
    }
    let bar = ProgressBar::new(cases.len() as u64);
    if let Ok(style) = ProgressStyle::with_template("{bar:40} {pos}/{len} cases, {eta} left") {
        bar.set_style(style);
    }
    let (mut contexts, mut examples) = (Vec::new(), Vec::new());
    for chunk in chunks(&cases) {
        let first = contexts.len();
        examples.extend(judge.chunk(chunk, first)?);
        contexts.extend(chunk.iter().map(Context::of));
        bar.inc(chunk.len() as u64);
    }
    bar.finish_and_clear();
    let about = About {
        task: args.task,
        form: args.form,
        seed: args.seed,
        limit: args.limit,
        data: args
            .data
            .as_deref()
            .and_then(Path::file_name)
            .map(|name| name.to_string_lossy().into_owned()),
        data_digest: digest,
        malformed,
        model_digest: base.digest,
        generator_digest,
        context_length: base.config.context_length,
        device,
        skipped,
        lora: judge.tuned,
    };
    Ok(Report::new(about, &methods, contexts, examples))
}

/// The methods that are run, and those of all that the task cannot have.
fn methods(
    asked: &[Method],
    seat: &Seat<'_>,
    cases: &[Case],
) -> Result<(Vec<Method>, Vec<Method>), Error> {
    let styled = cases.iter().any(|case| case.styled.is_some());
    let looked_up = cases.iter().any(|case| {
        case.questions
            .iter()
            .any(|question| question.query.is_some())
    });
    let generator = seat.generator().is_some();
    let has = |method: &Method| {
        (!method.styled() || styled)
            && (method.prompted() != Prompted::Passage || looked_up)
            && (generator || !method.takes_generator())
    };
    let lacks = |method: &&Method| method.imprint().is_some() || method.on_demand();
    if !generator && let Some(method) = asked.iter().find(lacks) {
        return Err(Error::NoGenerator {
            method: method.name(),
        });
    }
    if seat.lm().is_none()
        && let Some(method) = asked.iter().find(|method| method.trains())
    {
        return Err(Error::Device {
            what: format!("method {}", method.name()),
            detail: "it follows gradients, on the processor alone".to_owned(),
        });
    }
    let wanted: Vec<Method> = Method::ALL
        .into_iter()
        .filter(|method| asked.contains(method) || (asked.is_empty() && !method.on_demand()))
        .collect();
    let (run, skipped): (Vec<_>, Vec<_>) = wanted.into_iter().partition(has);
    if run.is_empty() {
        return Err(Error::Option {
            option: "--methods",
            detail: "the task has none of them".to_owned(),
        });
    }
    Ok((run, skipped))
}

/// Cases of a chunk at most.
const CHUNK: usize = 20;
/// Tokens of scored answers in a chunk: the bare model's distributions over them are held.
const CHUNK_ROWS: usize = 2000;

/// Cases that are worked on together. None is alone, unless all are: a foreign context takes another case.
fn chunks(cases: &[Case]) -> Vec<&[Case]> {
    let mut chunks = Vec::new();
    let mut rest = cases;
    while !rest.is_empty() {
        let mut rows = 0;
        let fits = |case: &&Case| {
            rows += case
                .questions
                .iter()
                .map(|question| question.answer.len())
                .sum::<usize>();
            rows <= CHUNK_ROWS
        };
        let mut count = rest
            .iter()
            .take(CHUNK)
            .take_while(fits)
            .count()
            .max(2)
            .min(rest.len());
        if rest.len() - count == 1 {
            count += 1;
        }
        let (chunk, later) = rest.split_at(count);
        chunks.push(chunk);
        rest = later;
    }
    chunks
}

/// A prompt in two parts.
struct Prompt {
    /// What the questions on one context share.
    prefix: Vec<TokenId>,
    tail: Vec<TokenId>,
    /// Tokens of it that are context.
    context_tokens: usize,
}

/// A question under a method, and the group and place where its answer will be.
struct Place {
    case: usize,
    question: usize,
    method: Method,
    group: usize,
    ask: usize,
    prompt_tokens: usize,
    context_tokens: usize,
    prefix_tokens: usize,
    /// Strength of the imprint, under a method that has one.
    strength: Option<f32>,
}

/// Questions that are asked together.
#[derive(Default)]
struct Batch<'a> {
    groups: Vec<Group<'a>>,
    places: Vec<Place>,
}

/// Cases that are worked on together.
struct Chunk<'a> {
    cases: &'a [Case],
    /// The case whose context is foreign to each.
    foreign: Vec<Option<usize>>,
    /// Of each case's own context; empty where no method needs one.
    imprints: Vec<Imprint>,
}

/// The strength of an imprint, and a core where it is not the whole one.
type Meant = (f32, Option<Arc<Core>>);

/// A case's context as an imprint.
struct Imprint {
    whole: Core,
    /// How long the whole took.
    time: Duration,
    /// What it is to questions: by case and question.
    meant: BTreeMap<(usize, usize), Meant>,
    /// Floats of its documents' own sums, which cores are composed of.
    state_floats: usize,
}

impl Imprint {
    /// Strength and core for a question.
    fn of(&self, case: usize, question: usize) -> (f32, &Core) {
        match self.meant.get(&(case, question)) {
            Some((strength, core)) => (*strength, core.as_deref().unwrap_or(&self.whole)),
            None => (1.0, &self.whole),
        }
    }

    /// Floats that have to be kept for such questions: the core, or what it is composed of.
    fn floats(&self) -> usize {
        if self.meant.values().any(|(_, core)| core.is_some()) {
            self.state_floats
        } else {
            self.whole.bytes() / size_of::<f32>()
        }
    }
}

impl Chunk<'_> {
    fn whose(&self, case: usize, whose: Whose) -> Option<usize> {
        match whose {
            Whose::Own => Some(case),
            Whose::Foreign => self.foreign[case],
        }
    }
}

/// Log-probabilities of the bare model over the answers' places, by case and question.
type Bare = BTreeMap<(usize, usize), Vec<Vec<f32>>>;

/// Asks and judges.
struct Judge<'a> {
    model: Model<'a>,
    /// The model as `lora` follows its gradients; a device has none.
    lm: Option<&'a Lm>,
    costs: Costs,
    prompts: &'a Prompts<'a>,
    methods: &'a [Method],
    whole: bool,
    seed: u64,
    /// Settings of method `lora` for each point of the series.
    tuned: Vec<Tuned>,
}

impl Judge<'_> {
    /// All methods on all questions of a chunk; `first` is the number of its first case.
    fn chunk(&mut self, cases: &[Case], first: usize) -> Result<Vec<Example>, Error> {
        let contexts: Vec<_> = cases.iter().map(|case| case.context.clone()).collect();
        let foreign: Vec<_> = (0..cases.len())
            .map(|index| tasks::foreign(index, &contexts))
            .collect();
        let chunk = Chunk {
            cases,
            imprints: self.imprints(cases, &foreign)?,
            foreign,
        };
        let mut examples: Vec<Vec<Example>> = Vec::with_capacity(cases.len());
        for (index, case) in cases.iter().enumerate() {
            let questions = case.questions.iter();
            examples.push(
                questions
                    .map(|question| Example::new(first + index, question))
                    .collect(),
            );
        }
        // The bare model first: the others are compared with it.
        let mut bare = Bare::new();
        let compares = self.methods.iter().any(|method| method.compares_to_bare());
        for alone in [true, false] {
            let methods = self.methods.iter().copied();
            let methods = methods
                .filter(|method| *method != Method::Lora && (*method == Method::None) == alone);
            let all = 0..cases.len();
            let Batch { groups, places } =
                self.batch(&chunk, methods, all, &bare, alone && compares)?;
            let mut answers = self.model.hear(&groups)?;
            for place in &places {
                let answer = self.judged(place, &chunk, &answers)?;
                examples[place.case][place.question]
                    .answers
                    .insert(place.method.name().to_owned(), answer);
            }
            drop(groups);
            if alone && compares {
                for place in &places {
                    let kept = &mut answers[place.group].heard[place.ask].kept;
                    bare.insert((place.case, place.question), std::mem::take(kept));
                }
            }
        }
        if self.methods.contains(&Method::Lora) {
            self.adapt(&chunk, first, &bare, &mut examples)?;
        }
        let mut examples: Vec<Example> = examples.into_iter().flatten().collect();
        for example in &mut examples {
            example.compare();
        }
        Ok(examples)
    }

    /// All questions of some cases of a chunk under some methods. `keep`: their distributions are kept.
    fn batch<'b>(
        &self,
        chunk: &'b Chunk<'_>,
        methods: impl Iterator<Item = Method>,
        cases: Range<usize>,
        bare: &'b Bare,
        keep: bool,
    ) -> Result<Batch<'b>, Error> {
        let mut batch = Batch::default();
        for method in methods {
            for index in cases.clone() {
                let case = &chunk.cases[index];
                let imprint = match method.imprint().map(|whose| chunk.whose(index, whose)) {
                    // There is no foreign context.
                    Some(None) => continue,
                    imprint => imprint.flatten(),
                };
                let imprint = imprint.and_then(|other| chunk.imprints.get(other));
                let told = match method.prompted() {
                    Prompted::Context(whose) => match chunk.whose(index, whose) {
                        None => continue,
                        Some(other) => &chunk.cases[other],
                    },
                    Prompted::Truncated | Prompted::Nothing | Prompted::Passage => case,
                };
                for (number, question) in case.questions.iter().enumerate() {
                    let Some(prompt) = self.prompt(method, case, told, question)? else {
                        continue;
                    };
                    let Prompt {
                        prefix,
                        tail,
                        context_tokens,
                    } = prompt;
                    let mut place = Place {
                        case: index,
                        question: number,
                        method,
                        group: 0,
                        ask: 0,
                        prompt_tokens: prefix.len() + tail.len(),
                        context_tokens,
                        prefix_tokens: prefix.len(),
                        strength: None,
                    };
                    let (scale, core) = match imprint.map(|imprint| imprint.of(index, number)) {
                        Some((scale, core)) => (scale, Some(core)),
                        None => (1.0, None),
                    };
                    place.strength = core.map(|_| scale);
                    // What begins alike is read once, by whichever methods.
                    let alike = |group: &Group<'_>| {
                        same_core(group.core, core)
                            && group.scale.to_bits() == scale.to_bits()
                            && group.prefix == prefix
                    };
                    let found = batch.groups.iter().rposition(alike);
                    place.group = match found.filter(|_| !prefix.is_empty()) {
                        Some(group) => group,
                        None => {
                            batch.groups.push(Group {
                                core,
                                scale,
                                prefix,
                                asks: Vec::new(),
                            });
                            batch.groups.len() - 1
                        }
                    };
                    let asks = &mut batch.groups[place.group].asks;
                    place.ask = asks.len();
                    asks.push(Ask {
                        tail,
                        answer: &question.answer,
                        options: &question.options,
                        max_tokens: question.max_tokens,
                        keep,
                        bare: bare
                            .get(&(index, number))
                            .filter(|_| method.compares_to_bare())
                            .map(Vec::as_slice),
                    });
                    batch.places.push(place);
                }
            }
        }
        Ok(batch)
    }

    /// Each case's own context as an imprint, with what it is to its own questions and to those that it is foreign to; none
    /// without a method that needs one.
    fn imprints(
        &mut self,
        cases: &[Case],
        foreign: &[Option<usize>],
    ) -> Result<Vec<Imprint>, Error> {
        let needs = |whose| {
            self.methods
                .iter()
                .any(|method| method.imprint() == Some(whose))
        };
        let (own, other) = (needs(Whose::Own), needs(Whose::Foreign));
        if !own && !other {
            return Ok(Vec::new());
        }
        let imprint = |(index, case): (usize, &Case)| {
            let start = Instant::now();
            let documents: Vec<&Document> = case.context.iter().map(AsRef::as_ref).collect();
            let states = self.model.states(&documents, self.prompts.bos())?;
            let whole = self.model.core(states.iter().map(|(state, _)| state))?;
            let time = start.elapsed();
            let spoken: Vec<Spoken> = documents
                .iter()
                .map(|document| self.model.spoken(document, self.prompts.bos().len()))
                .collect::<Result<_, _>>()?;
            let spoken: Vec<&Spoken> = spoken.iter().collect();
            let mut meant = BTreeMap::new();
            let mut gated: Option<Arc<Core>> = None;
            let askers = (0..cases.len()).filter(|&asker| {
                (own && asker == index) || (other && foreign[asker] == Some(index))
            });
            for asker in askers.filter(|_| !self.whole) {
                for (number, question) in cases[asker].questions.iter().enumerate() {
                    let Some(asked) = &question.asked else {
                        continue;
                    };
                    let what = relevance::meant(&spoken, asked);
                    let core = match what.parts.filter(|_| what.strength > 0.0) {
                        Some(parts) => {
                            let mut total = self.model.empty()?;
                            for part in &parts {
                                let (state, trace) = &states[part.document];
                                if part.tokens.is_empty() {
                                    total.add(state, 1.0)?;
                                }
                                for (tokens, weight) in
                                    [(&part.tokens, 1.0), (&part.around, what.beside)]
                                {
                                    total.add(&self.model.recall(trace, tokens)?, weight)?;
                                }
                            }
                            Some(Arc::new(self.model.core(std::iter::once(&total))?))
                        }
                        None if what.gated => {
                            if gated.is_none() {
                                let states = states.iter().map(|(state, _)| state);
                                gated = self.model.gated_core(states)?.map(Arc::new);
                            }
                            gated.clone()
                        }
                        None => None,
                    };
                    meant.insert((asker, number), (what.strength, core));
                }
            }
            let bytes = states
                .iter()
                .map(|(state, trace)| state.bytes() + trace.bytes())
                .sum::<usize>();
            Ok(Imprint {
                whole,
                time,
                meant,
                state_floats: bytes / size_of::<f32>(),
            })
        };
        cases.iter().enumerate().map(imprint).collect()
    }

    /// A question's prompt. None where the case lacks what the method needs, or the model's window is too small.
    fn prompt(
        &self,
        method: Method,
        case: &Case,
        told: &Case,
        question: &Question,
    ) -> Result<Option<Prompt>, Error> {
        let frame = if method.styled() {
            match &case.styled {
                Some(frame) => frame,
                None => return Ok(None),
            }
        } else {
            &case.frame
        };
        let context: Vec<TokenId> = match method.prompted() {
            Prompted::Context(_) | Prompted::Truncated => {
                let tokens = told.context.iter().flat_map(|document| &document.tokens);
                tokens.copied().collect()
            }
            Prompted::Passage => match self.passage(case, question)? {
                Some(passage) => passage,
                None => return Ok(None),
            },
            Prompted::Nothing => Vec::new(),
        };
        let around = frame.head.len() + frame.between.len() + question.body.len();
        let room = self.model.room(
            question.answer.len(),
            &question.options,
            question.max_tokens,
        );
        // A question that leaves no room cannot be asked of this model.
        let Some(room) = room.checked_sub(around) else {
            return Ok(None);
        };
        let mut kept = context.len().min(room);
        if method.prompted() == Prompted::Truncated {
            let rows = question.answer.len();
            let fed = around + rows.saturating_sub(1);
            let budget =
                self.imprint_cost(case) / questions(case) + self.costs.pass(0, fed, rows, true);
            kept = self.costs.affordable(budget, fed, rows, kept);
        }
        // The newest tokens.
        let context = &context[context.len() - kept..];
        let (mut prefix, mut tail) = (Vec::new(), Vec::new());
        let beginning = if kept > 0 && method.prompted() != Prompted::Passage {
            &mut prefix
        } else {
            &mut tail
        };
        beginning.extend(&frame.head);
        beginning.extend(context);
        tail.extend(&frame.between);
        tail.extend(&question.body);
        let prompt = Prompt {
            prefix,
            tail,
            context_tokens: kept,
        };
        Ok((!prompt.tail.is_empty()).then_some(prompt))
    }

    /// The passage of a case's own context that a question's words speak of most.
    fn passage(&self, case: &Case, question: &Question) -> Result<Option<Vec<TokenId>>, Error> {
        let Some(query) = &question.query else {
            return Ok(None);
        };
        let passages: Vec<&str> = case
            .context
            .iter()
            .flat_map(|document| tasks::passages(&document.text))
            .collect();
        match bm25::best(query, &passages) {
            Some(best) => Ok(Some(self.prompts.document(passages[best])?.tokens)),
            None => Ok(None),
        }
    }

    /// Operations of reading a case's context into a core.
    fn imprint_cost(&self, case: &Case) -> f64 {
        let window = self
            .model
            .seat()
            .generator()
            .map_or(usize::MAX, |generator| generator.config().window.max(1));
        let windows = case.context.iter().flat_map(|document| {
            let tokens = document.tokens.len();
            (0..tokens.div_ceil(window)).map(move |index| window.min(tokens - index * window))
        });
        self.costs.imprint(windows)
    }

    fn judged(
        &self,
        place: &Place,
        chunk: &Chunk<'_>,
        answers: &[Answers],
    ) -> Result<Answer, Error> {
        let case = &chunk.cases[place.case];
        let question = &case.questions[place.question];
        let group = &answers[place.group];
        let heard = &group.heard[place.ask];
        let method = place.method;
        let mut answer = Answer {
            nll: -heard.logprobs.iter().sum::<f64>(),
            tokens: heard.logprobs.len(),
            likeliest: heard.likeliest,
            kl: heard.kl,
            prompt_tokens: place.prompt_tokens,
            context_tokens: place.context_tokens,
            query_seconds: heard.time.as_secs_f64(),
            strength: place.strength,
            ..Answer::default()
        };
        if question.max_tokens > 0 {
            let text = self.model.spelled(&heard.tokens)?.trim().to_owned();
            answer.f1 = Some(metrics::f1(&text, &question.references));
            answer.em = Some(f64::from(u8::from(metrics::exact(
                &text,
                &question.references,
            ))));
            answer.rouge_l = Some(metrics::rouge_l_recall(&text, &question.references));
            answer.text = Some(text);
        }
        if let Some(right) = question.right {
            let chosen = heard
                .options
                .iter()
                .enumerate()
                .max_by(|(i, a), (j, b)| a.total_cmp(b).then(j.cmp(i)))
                .map(|(index, _)| index);
            answer.choice = Some(f64::from(u8::from(chosen == Some(right))));
        }
        let rows = question.answer.len();
        let fed = place.prompt_tokens + rows.saturating_sub(1);
        answer.query_flops = self.costs.pass(
            place.prefix_tokens,
            fed - place.prefix_tokens,
            rows,
            method.imprint().is_some(),
        );
        if let (Some(_), Some(imprint)) = (method.imprint(), chunk.imprints.get(place.case)) {
            answer.context_flops = self.imprint_cost(case);
            answer.context_seconds = imprint.time.as_secs_f64();
            answer.state_floats = imprint.floats();
        }
        if place.prefix_tokens > 0 {
            answer.context_flops += self.costs.pass(0, place.prefix_tokens, 0, false);
            answer.context_seconds += group.prefix_time.as_secs_f64();
            answer.state_floats += self.costs.kv_floats(place.prefix_tokens);
        }
        Ok(answer)
    }
}

#[expect(clippy::cast_precision_loss, reason = "questions of a case are few")]
fn questions(case: &Case) -> f64 {
    case.questions.len().max(1) as f64
}

fn same_core(a: Option<&Core>, b: Option<&Core>) -> bool {
    match (a, b) {
        (None, None) => true,
        (Some(a), Some(b)) => std::ptr::eq(a, b),
        (Some(_), None) | (None, Some(_)) => false,
    }
}
