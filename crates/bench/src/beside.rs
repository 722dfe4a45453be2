//! `imprint bench beside`: the time between two tokens of an answer, quiet and beside a long ingest.
//!
//! The engine in a plain loop. Answers run all the time, another as soon as one ends; then a session is told documents beside them. Answers and
//! context are arbitrary tokens. A gap is between two tokens of one answer: the first token of an answer ends none, as what it waits for is its
//! prompt. Answers are short, so that the quiet gaps and those beside the ingest are of answers of the same lengths. The ingest is cut off
//! after a while: one step beside it is like the next. Start at [`run`].

use std::{
    collections::HashSet,
    io::Write,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::Result;
use engine::{Chosen, Config, DocumentId, Event, RequestId, Seq, TokenId};
use serde_json::json;

use crate::{
    driver::Driver,
    machine::{self, Machine},
    output::{progress, write_json},
    serve::figures::Spread,
};

/// Tokens of a question and of an answer.
const QUESTION: usize = 16;
const ANSWER: usize = 256;
/// Tokens of a chunk and of a document.
const CHUNK: usize = 1024;
const DOCUMENT: usize = 4096;
/// Gaps that are not counted, and those that are, without an ingest.
const WARM_UP: usize = 20;
const QUIET: usize = 600;
/// Between two words on how far it is.
const NEWS: Duration = Duration::from_secs(10);

/// What to measure.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// Answers that run at once.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=32))]
    pub answers: u16,
    /// Tokens that are told beside them.
    #[arg(long, default_value_t = 100_000, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub context_tokens: u32,
    /// Seconds after which the ingest is cut off.
    #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u16).range(1..))]
    pub seconds: u16,
    /// Write the figures as JSON to FILE, or to standard output without one; otherwise they are printed as lines.
    #[arg(long, value_name = "FILE", num_args = 0..=1, default_missing_value = "-")]
    pub json: Option<PathBuf>,
}

/// Answers under way, and what comes of the steps.
struct Bench {
    driver: Driver,
    wanted: usize,
    running: usize,
    asked: usize,
    /// Answers that have had a token.
    begun: HashSet<RequestId>,
    last: Instant,
    /// Context tokens that are read.
    read: usize,
}

impl Bench {
    fn tokens(&self, count: usize, from: usize) -> Vec<TokenId> {
        let vocab = self.driver.model().vocab.max(1);
        let token = |at: usize| u32::try_from((from + at).wrapping_mul(7919) % vocab);
        (0..count)
            .map(|at| TokenId(token(at).unwrap_or(0)))
            .collect()
    }

    /// One step, all answers running; the time since the last tokens, if it drew another one of an answer.
    fn step(&mut self) -> Result<Option<Duration>> {
        while self.running < self.wanted {
            self.asked += 1;
            let question = self.tokens(QUESTION, 100 * self.asked);
            self.driver
                .generate(None, Chosen::default(), &question, ANSWER)?;
            self.running += 1;
        }
        let (mut drew, mut ended, mut read) = (false, 0, 0);
        let (begun, mut goes_on) = (&mut self.begun, false);
        self.driver.step(|event| {
            match event {
                Event::Token { request, .. } => {
                    drew = true;
                    goes_on |= !begun.insert(*request);
                }
                Event::Finished { request, .. } => {
                    ended += 1;
                    begun.remove(request);
                }
                Event::Encoded { tokens, .. } => read += tokens,
                _ => {}
            }
            Ok(())
        })?;
        self.running -= ended;
        self.read += read;
        if !drew {
            return Ok(None);
        }
        let now = Instant::now();
        let gap = now - std::mem::replace(&mut self.last, now);
        Ok(goes_on.then_some(gap))
    }
}

fn line(name: &str, gaps: &Spread, count: usize) -> String {
    let [half, ninety, most] = [50.0, 90.0, 99.0].map(|percent| gaps.percentile(percent));
    format!("{name}: {count} gaps, p50 {half:.1} p90 {ninety:.1} p99 {most:.1} ms")
}

/// Measures and prints or writes what came out. `threads` are those that the engine computes on.
///
/// # Errors
/// There is no generator, the engine breaks or refuses, or the file cannot be written.
pub fn run(args: &Args, model: &Path, generator: Option<&Path>, threads: usize) -> Result<()> {
    let machine = Machine::here(threads);
    let mut driver = Driver::load(model, generator, Config::default())?;
    let window = driver.window()?;
    let session = driver.open(window)?;
    let mut bench = Bench {
        driver,
        wanted: args.answers.into(),
        running: 0,
        asked: 0,
        begun: HashSet::new(),
        last: Instant::now(),
        read: 0,
    };
    let mut out = progress(args.json.as_deref());
    let mut quiet = Vec::new();
    while quiet.len() < WARM_UP + QUIET {
        quiet.extend(bench.step()?);
    }
    let quiet = Spread::new(quiet.split_off(WARM_UP));
    writeln!(out, "{}", line("quiet ", &quiet, QUIET))?;

    let context = args.context_tokens as usize;
    for (seq, from) in (0..context).step_by(CHUNK).enumerate() {
        let count = CHUNK.min(context - from);
        let document = DocumentId(1 + (from / DOCUMENT) as u64);
        let ends = (from + count).is_multiple_of(DOCUMENT) || from + count == context;
        let tokens = bench.tokens(count, from);
        let seq = Seq(seq as u64 + 1);
        bench.driver.tell(session, seq, document, &tokens, ends)?;
    }
    let (begun, most) = (Instant::now(), Duration::from_secs(args.seconds.into()));
    let (mut beside, mut news) = (Vec::new(), begun);
    while bench.read < context && begun.elapsed() < most {
        beside.extend(bench.step()?);
        if news.elapsed() >= NEWS {
            news = Instant::now();
            let (read, seconds) = (bench.read, begun.elapsed().as_secs_f64());
            writeln!(out, "{seconds:.0} s: {read} of {context} tokens read")?;
        }
    }
    let rate = bench.read as f64 / begun.elapsed().as_secs_f64();
    let count = beside.len();
    let beside = Spread::new(beside);
    let ratio = beside.percentile(99.0) / quiet.percentile(99.0);
    writeln!(
        out,
        "{}; {rate:.0} context tokens/s\np99 beside / quiet: {ratio:.2}",
        line("beside", &beside, count)
    )?;
    let Some(path) = &args.json else {
        return Ok(());
    };
    let of = |gaps: &Spread| json!({"p50_ms": gaps.percentile(50.0), "p90_ms": gaps.percentile(90.0), "p99_ms": gaps.percentile(99.0)});
    let report = json!({
        "machine": machine,
        "commit": machine::commit(),
        "model": bench.driver.model().digest,
        "answers": args.answers,
        "quiet": of(&quiet),
        "beside": of(&beside),
        "context_tokens_read": bench.read,
        "context_tokens_per_s": rate,
        "p99_beside_over_quiet": ratio,
    });
    write_json(path, &report)
}
