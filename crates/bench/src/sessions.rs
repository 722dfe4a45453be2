//! `imprint bench sessions`: many sessions, few of them in memory.
//!
//! The engine in a plain loop beside a thread that keeps snapshots, as the server has them. Sessions are told a context each, some at
//! a time; then they are asked, at random. What is timed is the time to the first token of an ask, from `push`, whatever has to
//! come back for it. Start at [`run`].

mod disk;

use std::{
    collections::HashMap,
    io::{self, Write as _},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use engine::{
    Chosen, Command, Config, DocumentId, Engine, Event, RequestId, Sampling, Seq, SessionId,
    Strategy, TenantId, TokenId,
};
use serde::Serialize;

use self::disk::Disk;
use crate::machine::{self, Machine};

/// Sessions that are told something at once.
const TOLD_AT_ONCE: usize = 16;
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
    #[arg(long, default_value_t = 32 << 10)]
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
    let mut runs = Vec::new();
    let mut name = String::new();
    let mut times = SWEEP.into_iter().filter(|_| args.sweep);
    loop {
        let next = times.next();
        if args.sweep && next.is_none() {
            break;
        }
        let mut bench = Bench::load(args, model, generator)?;
        name = bench.engine.model().digest.clone();
        let count = match next {
            Some(times) => ((bench.slots as f64 * times) as usize).max(1),
            None => args.sessions as usize,
        };
        runs.push(bench.run(args, count)?);
        if next.is_none() {
            break;
        }
    }
    let report = Report {
        machine,
        commit: machine::commit(),
        model: name,
        context_tokens: (args.context_from, args.context_to),
        zipf: args.zipf,
        at_once: args.at_once,
        answer_tokens: args.answer_tokens,
        snapshot_bytes_per_token: args.snapshot_bytes_per_token,
        runs,
    };
    let text = match &args.json {
        Some(_) => serde_json::to_string_pretty(&report)? + "\n",
        None => table(&report),
    };
    match args.json.as_deref().filter(|path| *path != Path::new("-")) {
        Some(path) => {
            std::fs::write(path, text).with_context(|| format!("writing {}", path.display()))
        }
        None => io::stdout()
            .write_all(text.as_bytes())
            .context("writing to standard output"),
    }
}

fn table(report: &Report) -> String {
    let mut text = String::from(
        "sessions  slots  created s  asks  TTFT p50 ms  p99 ms  tokens/s  hits  disk  read again  slots MB  host MB  disk MB  RSS MB\n",
    );
    let mb = |bytes: u64| bytes / 1_000_000;
    for run in &report.runs {
        text.push_str(&format!(
            "{:8}  {:5}  {:9.1}  {:4}  {:11.1}  {:6.1}  {:8.1}  {:4}  {:4}  {:10}  {:8}  {:7}  {:7}  {:6}\n",
            run.sessions,
            run.slots,
            run.created_s,
            run.asks,
            run.ttft_p50_ms,
            run.ttft_p99_ms,
            run.tokens_per_s,
            run.hits,
            run.from_disk,
            run.read_again,
            mb(run.slot_bytes as u64),
            mb(run.host_bytes as u64),
            mb(run.disk_bytes),
            mb(run.resident_bytes),
        ));
    }
    text
}

/// An engine with its disk.
struct Bench {
    engine: Engine,
    disk: Disk,
    slots: usize,
    random: Random,
    vocab: u64,
    events: Vec<Event>,
}

impl Bench {
    fn load(args: &Args, model: &Path, generator: &Path) -> Result<Self> {
        let load = |config| {
            Engine::load(model, Some(generator), config).context("the engine does not load")
        };
        let mut config = Config {
            snapshot_bytes_per_token: args.snapshot_bytes_per_token,
            max_sessions: 1 << 20,
            prefix_cache: false,
            ..Config::default()
        };
        if let Some(bytes) = args.state_bytes {
            config.state_budget_bytes = bytes;
        }
        let probe = load(config.clone())?;
        let core = probe.core_bytes().max(1);
        let info = probe.model().clone();
        drop(probe);
        if let Some(slots) = args.slots {
            config.core_budget_bytes = core.saturating_mul(slots as usize);
        }
        let slots = config.core_budget_bytes / core;
        let made_with = info
            .generator
            .as_ref()
            .map_or("", |generator| &generator.digest);
        Ok(Self {
            engine: load(config)?,
            disk: Disk::start(&args.snapshots, args.disk_bytes, &info.digest, made_with)?,
            slots,
            random: Random(1),
            vocab: info.vocab as u64,
            events: Vec::new(),
        })
    }

    fn tokens(&mut self, count: usize) -> Vec<TokenId> {
        let vocab = self.vocab;
        let token = |_| TokenId(u32::try_from(self.random.below(vocab)).unwrap_or(0));
        (0..count).map(token).collect()
    }

    fn push(&mut self, command: Command) -> Result<()> {
        self.engine
            .push(command)
            .ok()
            .context("a queue of the engine is full")
    }

    /// One step, or a wait for the disk; hands what the engine asks of the disk on.
    fn step(&mut self) -> Result<Vec<Event>> {
        if self.engine.idle() && self.engine.waits() {
            let answer = self.disk.wait()?;
            self.push(answer)?;
        }
        for answer in self.disk.answers() {
            self.push(answer)?;
        }
        let mut events = std::mem::take(&mut self.events);
        self.engine
            .step(Instant::now, &mut events)
            .context("the engine broke")?;
        let mut seen = Vec::with_capacity(events.len());
        for event in events.drain(..) {
            match event {
                Event::Save { .. } | Event::Wanted { .. } => self.disk.ask(event)?,
                Event::Failed { error, .. } => bail!("a request failed: {error}"),
                Event::SessionFailed { error, .. } => bail!("a session failed: {error}"),
                event => seen.push(event),
            }
        }
        self.events = events;
        Ok(seen)
    }

    fn run(&mut self, args: &Args, count: usize) -> Result<Run> {
        let begun = Instant::now();
        self.create(args, count)?;
        let created = begun.elapsed();
        let resident_bytes_created = resident();
        let before = self.engine.usage().tiers;
        let asks = args.asks.map_or(count, |asks| asks as usize);
        let (mut times, asked, tokens) = self.ask(args, count, asks)?;
        times.sort_unstable();
        let at = |part: f64| {
            let index =
                ((times.len() as f64 * part).ceil() as usize).clamp(1, times.len().max(1)) - 1;
            times
                .get(index)
                .map_or(0.0, |time: &Duration| time.as_secs_f64() * 1e3)
        };
        let tiers = self.engine.usage().tiers;
        let (disk_files, disk_bytes) = self.disk.kept();
        Ok(Run {
            sessions: count,
            slots: self.slots,
            created_s: created.as_secs_f64(),
            resident_bytes_created,
            asks,
            asked_s: asked.as_secs_f64(),
            ttft_p50_ms: at(0.5),
            ttft_p99_ms: at(0.99),
            tokens_per_s: tokens as f64 / asked.as_secs_f64().max(f64::MIN_POSITIVE),
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

    /// Sessions 0 .. count, each told one document, until a version holds it.
    fn create(&mut self, args: &Args, count: usize) -> Result<()> {
        let window = self
            .engine
            .model()
            .generator
            .as_ref()
            .map_or(0, |generator| generator.window);
        let (mut next, mut under_way) = (0, 0);
        while next < count || under_way > 0 {
            while under_way < TOLD_AT_ONCE && next < count {
                let session = SessionId(next as u64);
                let span = u64::from(args.context_to - args.context_from) + 1;
                let length = u64::from(args.context_from) + self.random.below(span);
                let tokens = self.tokens(usize::try_from(length)?);
                self.push(Command::Open {
                    session,
                    tenant: TenantId::default(),
                    strategy: Strategy::Parallel,
                    window,
                })?;
                self.push(Command::Ingest {
                    session,
                    seq: Seq(1),
                    document: DocumentId(1),
                    tokens,
                    end_of_document: true,
                })?;
                (next, under_way) = (next + 1, under_way + 1);
            }
            for event in self.step()? {
                if matches!(&event, Event::Applied { newest, .. } if newest.seq == Seq(1)) {
                    under_way -= 1;
                }
            }
        }
        Ok(())
    }

    /// Asks about random sessions; the times to the first tokens, the time of all, and tokens drawn.
    fn ask(
        &mut self,
        args: &Args,
        count: usize,
        asks: usize,
    ) -> Result<(Vec<Duration>, Duration, usize)> {
        let mut chances = Vec::with_capacity(count);
        let mut sum = 0.0;
        for rank in 1..=count {
            sum += (rank as f64).powf(-args.zipf);
            chances.push(sum);
        }
        // The popular ones are not those that were told last.
        let mut order: Vec<u64> = (0..count as u64).collect();
        for index in (1..order.len()).rev() {
            let other = usize::try_from(self.random.below(index as u64 + 1))?;
            order.swap(index, other);
        }
        let begun = Instant::now();
        let (mut sent, mut ended, mut tokens) = (0, 0, 0);
        let mut waiting: HashMap<RequestId, Instant> = HashMap::new();
        let mut times = Vec::with_capacity(asks);
        while ended < asks {
            while sent < asks && sent - ended < usize::from(args.at_once) {
                let at = self.random.unit() * sum;
                let rank = chances
                    .partition_point(|chance| *chance < at)
                    .min(count - 1);
                let request = RequestId(sent as u64);
                let prompt = self.tokens(QUESTION);
                self.push(Command::Generate {
                    request,
                    tenant: TenantId::default(),
                    session: Some(SessionId(order[rank])),
                    adapter_scale: 1.0,
                    chosen: Chosen::default(),
                    prompt,
                    max_tokens: args.answer_tokens.into(),
                    sampling: Sampling::default(),
                    eos: Vec::new(),
                })?;
                waiting.insert(request, Instant::now());
                sent += 1;
            }
            for event in self.step()? {
                match event {
                    Event::Token { request, .. } => {
                        tokens += 1;
                        times.extend(waiting.remove(&request).map(|pushed| pushed.elapsed()));
                    }
                    Event::Finished { .. } => ended += 1,
                    _ => {}
                }
            }
        }
        Ok((times, begun.elapsed(), tokens))
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
