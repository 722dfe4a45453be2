//! `imprint bench sessions`: many sessions, few of them in memory.
//!
//! The engine in a plain loop beside a thread that keeps snapshots, as the server has them. Sessions are told a context each, some at
//! a time; then they are asked, at random. What is timed is the time to the first token of an ask, from `push`, whatever has to
//! come back for it. Start at [`run`].

use std::{
    collections::HashMap,
    io::Write,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use engine::{Chosen, Config, DocumentId, Event, Part, RequestId, SessionId, TokenId};
use serde::Serialize;

use crate::{
    driver::Driver,
    machine::{self, Machine},
    output::{progress, write_json},
    serve::figures::Spread,
};

/// Sessions that are told something at once, where the states that they may come to hold fit.
const TOLD_AT_ONCE: usize = 16;
/// States that a session may come to hold while it is told one document.
const STATES_TOLD: usize = 5;
/// Tokens of a question.
const QUESTION: usize = 12;
/// Active sessions of a sweep, in slots.
const SWEEP: [f64; 6] = [0.5, 1.0, 2.0, 4.0, 8.0, 20.0];

/// What to measure.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// Write the figures as JSON to FILE, or to standard output without one; otherwise a table is printed.
    #[arg(long, value_name = "FILE", num_args = 0..=1, default_missing_value = "-")]
    pub json: Option<PathBuf>,
    /// Sessions.
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub sessions: u32,
    /// Instead of so many sessions, half as many as there are slots, as many, 2, 4, 8 and 20 times as many.
    #[arg(long)]
    pub sweep: bool,
    /// The fewest tokens of a session's context.
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u16).range(2..=1024))]
    pub context_from: u16,
    /// The most tokens of a session's context.
    #[arg(long, default_value_t = 40, value_parser = clap::value_parser!(u16).range(2..=1024))]
    pub context_to: u16,
    /// Asks (as many as there are sessions without it).
    #[arg(long)]
    pub asks: Option<u32>,
    /// Whom an ask is about: the k-th session with a chance that falls with k to this power; 0 makes all equal.
    #[arg(long, default_value_t = 0.0)]
    pub zipf: f64,
    /// Asks under way at once.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=32))]
    pub at_once: u16,
    /// Asks name a part of their session's context, as questions that the server chooses sentences for do: their core is made of what single
    /// tokens wrote.
    #[arg(long)]
    pub named: bool,
    /// Tokens of an answer.
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u16).range(1..=512))]
    pub answer_tokens: u16,
    /// Cores that fit in memory (the engine's default budget without it).
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    pub slots: Option<u32>,
    /// Bytes of states in memory (the engine's default without it).
    #[arg(long)]
    pub state_bytes: Option<usize>,
    /// Bytes of snapshots for each token of a session from which on it is read again instead; 0 keeps none.
    #[arg(long, default_value_t = 128 << 10)]
    pub snapshot_bytes_per_token: usize,
    /// Bytes of snapshots on disk.
    #[arg(long, default_value_t = 4 << 30)]
    pub disk_bytes: u64,
    /// Folder of the snapshots.
    #[arg(long, value_name = "DIR", default_value = "target/snapshots")]
    pub snapshots: PathBuf,
}

#[derive(Debug, Serialize)]
struct Report {
    machine: Machine,
    commit: String,
    model: String,
    context_tokens: (u16, u16),
    zipf: f64,
    named: bool,
    at_once: u16,
    answer_tokens: u16,
    snapshot_bytes_per_token: usize,
    runs: Vec<Run>,
}

/// One number of sessions.
#[derive(Debug, Serialize)]
struct Run {
    sessions: usize,
    slots: usize,
    created_s: f64,
    resident_bytes_created: u64,
    asks: usize,
    asked_s: f64,
    ttft_p50_ms: f64,
    ttft_p99_ms: f64,
    tokens_per_s: f64,
    hits: u64,
    misses: u64,
    from_disk: u64,
    read_again: u64,
    slot_sessions: usize,
    slot_bytes: usize,
    host_sessions: usize,
    host_bytes: usize,
    asleep_sessions: usize,
    disk_files: usize,
    disk_bytes: u64,
    /// Of the process, the model included.
    resident_bytes: u64,
}

/// Measures and prints or writes what came out. `threads` are those that the engine computes on.
///
/// # Errors
/// There is no generator, the engine breaks or refuses, or the file cannot be written.
pub fn run(args: &Args, model: &Path, generator: Option<&Path>, threads: usize) -> Result<()> {
    if args.context_from > args.context_to || !(0.0..=10.0).contains(&args.zipf) {
        bail!("context tokens go from fewer to more, and the power from 0 to 10");
    }
    let generator = generator.context("there is no generator: nothing can be told")?;
    let machine = Machine::here(threads);
    let mut config = Config {
        snapshot_bytes_per_token: args.snapshot_bytes_per_token,
        max_sessions: 1 << 20,
        prefix_cache: false,
        ..Config::default()
    };
    if let Some(bytes) = args.state_bytes {
        config.state_budget_bytes = bytes;
    }
    let probe = Driver::load(model, Some(generator), config.clone())?;
    let (name, core) = (probe.model().digest.clone(), probe.core_bytes().max(1));
    drop(probe);
    if let Some(slots) = args.slots {
        config.core_budget_bytes = core.saturating_mul(slots as usize);
    }
    let slots = config.core_budget_bytes / core;
    let counts: Vec<usize> = if args.sweep {
        let times = |times| ((slots as f64 * times) as usize).max(1);
        SWEEP.into_iter().map(times).collect()
    } else {
        vec![args.sessions as usize]
    };
    // Each as it is done; beside JSON, for people.
    let mut table = progress(args.json.as_deref());
    writeln!(table, "{HEAD}")?;
    let mut runs = Vec::new();
    for count in counts {
        let mut driver = Driver::load(model, Some(generator), config.clone())?;
        driver.keep(&args.snapshots, args.disk_bytes)?;
        let run = Bench {
            driver,
            random: Random(1),
            sessions: Vec::new(),
        }
        .run(args, count, slots)?;
        writeln!(table, "{}", run.row())?;
        runs.push(run);
    }
    let Some(path) = &args.json else {
        return Ok(());
    };
    let report = Report {
        machine,
        commit: machine::commit(),
        model: name,
        context_tokens: (args.context_from, args.context_to),
        zipf: args.zipf,
        named: args.named,
        at_once: args.at_once,
        answer_tokens: args.answer_tokens,
        snapshot_bytes_per_token: args.snapshot_bytes_per_token,
        runs,
    };
    write_json(path, &report)
}

const HEAD: &str = "sessions  slots  created s  asks  TTFT p50 ms  p99 ms  tokens/s  hits  disk  read again  slots MB  host MB  disk MB  RSS MB";

impl Run {
    fn row(&self) -> String {
        let mb = |bytes: u64| bytes / 1_000_000;
        format!(
            "{:8}  {:5}  {:9.1}  {:4}  {:11.1}  {:6.1}  {:8.1}  {:4}  {:4}  {:10}  {:8}  {:7}  {:7}  {:6}",
            self.sessions,
            self.slots,
            self.created_s,
            self.asks,
            self.ttft_p50_ms,
            self.ttft_p99_ms,
            self.tokens_per_s,
            self.hits,
            self.from_disk,
            self.read_again,
            mb(self.slot_bytes as u64),
            mb(self.host_bytes as u64),
            mb(self.disk_bytes),
            mb(self.resident_bytes),
        )
    }
}

/// An engine with its disk, and what its sessions were told: as many tokens each.
struct Bench {
    driver: Driver,
    random: Random,
    sessions: Vec<(SessionId, usize)>,
}

/// What came of asking.
struct Asked {
    first: Vec<Duration>,
    took: Duration,
    tokens: usize,
}

impl Bench {
    fn tokens(&mut self, count: usize) -> Vec<TokenId> {
        let vocab = self.driver.model().vocab as u64;
        let token = |_| TokenId(u32::try_from(self.random.below(vocab)).unwrap_or(0));
        (0..count).map(token).collect()
    }

    fn run(mut self, args: &Args, count: usize, slots: usize) -> Result<Run> {
        let begun = Instant::now();
        self.create(args, count)?;
        let created = begun.elapsed();
        let resident_bytes_created = resident();
        let before = self.driver.usage().tiers;
        let asks = args.asks.map_or(count, |asks| asks as usize);
        let asked = self.ask(args, asks)?;
        let first = Spread::new(asked.first);
        let tiers = self.driver.usage().tiers;
        let (disk_files, disk_bytes) = self.driver.kept();
        Ok(Run {
            sessions: count,
            slots,
            created_s: created.as_secs_f64(),
            resident_bytes_created,
            asks,
            asked_s: asked.took.as_secs_f64(),
            ttft_p50_ms: first.percentile(50.0),
            ttft_p99_ms: first.percentile(99.0),
            tokens_per_s: asked.tokens as f64 / asked.took.as_secs_f64().max(f64::MIN_POSITIVE),
            hits: tiers.hits - before.hits,
            misses: tiers.misses - before.misses,
            from_disk: tiers.promoted_disk - before.promoted_disk,
            read_again: tiers.reread - before.reread,
            slot_sessions: tiers.slot_sessions,
            slot_bytes: tiers.slot_bytes,
            host_sessions: tiers.host_sessions,
            host_bytes: tiers.host_bytes,
            asleep_sessions: tiers.asleep_sessions,
            disk_files,
            disk_bytes,
            resident_bytes: resident(),
        })
    }

    /// Sessions that are each told one document, until a version holds it, some at a time.
    fn create(&mut self, args: &Args, count: usize) -> Result<()> {
        let generator = self.driver.model().generator.as_ref();
        let state = generator.map_or(1, |generator| generator.state_bytes.max(1));
        let fit = Config::default().state_budget_bytes;
        let fit = args.state_bytes.unwrap_or(fit) / STATES_TOLD / state;
        while self.sessions.len() < count {
            let some = TOLD_AT_ONCE
                .min(fit.max(1))
                .min(count - self.sessions.len());
            let span = u64::from(args.context_to - args.context_from) + 1;
            let mut documents = Vec::with_capacity(some);
            for _ in 0..some {
                let length = u64::from(args.context_from) + self.random.below(span);
                documents.push(self.tokens(usize::try_from(length)?));
            }
            let told: Vec<&[TokenId]> = documents.iter().map(Vec::as_slice).collect();
            let (sessions, _) = self.driver.ingest(&told)?;
            let lengths = told.iter().map(|document| document.len());
            self.sessions.extend(sessions.into_iter().zip(lengths));
        }
        Ok(())
    }

    /// What an ask about a session of so many tokens names: the second quarter of them.
    fn chosen(args: &Args, length: usize) -> Chosen {
        if !args.named {
            return Chosen::default();
        }
        let named = length / 4..(length / 2).max(length / 4 + 1);
        let part = Part {
            document: DocumentId(1),
            tokens: vec![named],
            around: Vec::new(),
        };
        Chosen {
            parts: vec![part],
            ..Chosen::default()
        }
    }

    /// Asks about random sessions.
    fn ask(&mut self, args: &Args, asks: usize) -> Result<Asked> {
        let count = self.sessions.len();
        let mut chances = Vec::with_capacity(count);
        let mut sum = 0.0;
        for rank in 1..=count {
            sum += (rank as f64).powf(-args.zipf);
            chances.push(sum);
        }
        // The popular ones are not those that were told last.
        let mut order: Vec<usize> = (0..count).collect();
        for index in (1..order.len()).rev() {
            let other = usize::try_from(self.random.below(index as u64 + 1))?;
            order.swap(index, other);
        }
        let begun = Instant::now();
        let (mut sent, mut ended, mut tokens) = (0, 0, 0);
        let mut waiting: HashMap<RequestId, Instant> = HashMap::new();
        let mut first = Vec::with_capacity(asks);
        while ended < asks {
            while sent < asks && sent - ended < usize::from(args.at_once) {
                let at = self.random.unit() * sum;
                let rank = chances
                    .partition_point(|chance| *chance < at)
                    .min(count - 1);
                let prompt = self.tokens(QUESTION);
                let (session, length) = self.sessions[order[rank]];
                let chosen = Self::chosen(args, length);
                let (now, most) = (Instant::now(), args.answer_tokens.into());
                let request = self.driver.generate(Some(session), chosen, &prompt, most)?;
                waiting.insert(request, now);
                sent += 1;
            }
            self.driver.step(|event| {
                match event {
                    Event::Token { request, .. } => {
                        tokens += 1;
                        first.extend(waiting.remove(request).map(|pushed| pushed.elapsed()));
                    }
                    Event::Finished { .. } => ended += 1,
                    _ => {}
                }
                Ok(())
            })?;
        }
        Ok(Asked {
            first,
            took: begun.elapsed(),
            tokens,
        })
    }
}

/// Bytes of this process in memory; 0 where the system does not tell.
fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kb = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
    kb.map_or(0, |kb| kb * 1024)
}

/// SplitMix64: the same asks in every run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    /// From 0 to below this.
    fn below(&mut self, end: u64) -> u64 {
        self.next() % end.max(1)
    }

    /// From 0 to below 1.
    fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1_u64 << 53) as f64
    }
}
