//! `imprint bench serve`: a load on a server over gRPC, and what its clients felt.
//!
//! An open loop: arrivals come at their times (Poisson, or of a file), whatever became of those before them, and every latency counts
//! from the time that was meant. Sessions are made and told their facts first; then their questions come, Zipf over sessions, and
//! new facts among them. Output is in the terms of `vllm bench serve`. Start at [`run`].

mod arrivals;
pub(crate) mod facts;
pub(crate) mod figures;
mod load;
mod scrape;

use std::{collections::BTreeMap, path::PathBuf, sync::Arc, time::Duration};

use anyhow::{Context, Result, ensure};
use imprint_client::{Client, Key, Options, v1::Model};
use serde_json::{Map, Value, json};

use self::{
    arrivals::{Plan, Shape},
    figures::{Figures, Goal},
    load::{Load, Settings, Told},
};
use crate::{
    child::Child,
    machine::{self, Machine},
    output::{print, write_json},
};

/// Sessions that a server of ours has room for without being told.
const SESSIONS: usize = 256;

/// What load to put on a server.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// The server; without it one of our own is started on a free port and ended behind the measurement.
    #[arg(long, value_name = "URL")]
    pub endpoint: Option<String>,
    /// The bearer key, for a server with keys.
    #[arg(long, env = "IMPRINT_KEY", hide_env_values = true)]
    pub key: Option<Key>,
    /// What the figures call the server, where it is another's.
    #[arg(long, default_value = "imprint", value_name = "NAME")]
    pub backend: String,
    /// Where the server tells its metrics, for what it counts beside the load; a server of our own is asked by itself.
    #[arg(long, value_name = "URL")]
    pub metrics: Option<String>,
    /// Arrivals a second, of a Poisson process.
    #[arg(
        long,
        default_value_t = 4.0,
        value_name = "RPS",
        conflicts_with = "trace"
    )]
    pub request_rate: f64,
    /// Arrivals at the times in FILE instead: seconds from the beginning, one a line.
    #[arg(long, value_name = "FILE")]
    pub trace: Option<PathBuf>,
    /// So many arrivals, all of them at once: as fast as `--max-concurrency` lets them.
    #[arg(long, value_name = "N", conflicts_with_all = ["trace", "request_rate"])]
    pub burst: Option<u32>,
    /// How long arrivals are measured.
    #[arg(long, default_value_t = 30.0)]
    pub seconds: f64,
    /// How long arrivals come before that and are not counted; none before a burst.
    #[arg(long, default_value_t = 5.0)]
    pub warm_up_seconds: f64,
    /// How long to wait for answers behind the last arrival; what has not ended then is counted as failed.
    #[arg(long, default_value_t = 60.0)]
    pub drain_seconds: f64,
    /// Sessions, each with facts of its own; 0 asks the bare model.
    #[arg(long, default_value_t = 16)]
    pub sessions: u16,
    /// How unequally sessions are asked: the k-th in proportion to 1 / k^ZIPF; 0: all alike.
    #[arg(long, default_value_t = 1.0)]
    pub zipf: f64,
    /// Facts that a session is told before the load, some 25 tokens each.
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u16).range(1..=4096))]
    pub facts: u16,
    /// Share of the arrivals that tell a session something new instead of asking.
    #[arg(long, default_value_t = 0.1)]
    pub ingest_share: f64,
    /// Facts that such an arrival tells.
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..=4096))]
    pub told_facts: u16,
    /// The most tokens of an answer.
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    pub output_tokens: u32,
    /// Facts go into the prompts of the bare model, not into imprints.
    #[arg(long)]
    pub in_context: bool,
    /// Calls at once; what finds no place waits, and its time counts.
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u16).range(1..))]
    pub max_concurrency: u16,
    /// Connections that the calls share.
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..=256))]
    pub connections: u16,
    /// What an answer must meet to count for goodput, in milliseconds: `ttft:200,tpot:50,e2el:1000`.
    #[arg(long, value_delimiter = ',', value_name = "GOAL", value_parser = goal)]
    goodput: Vec<Goal>,
    /// All of the load follows from it.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Write the figures as JSON to FILE, or to standard output without one; otherwise a table is printed.
    #[arg(long, value_name = "FILE", num_args = 0..=1, default_missing_value = "-")]
    pub json: Option<PathBuf>,
    /// Write contexts, questions and times to FILE, for peers that are asked the same.
    #[arg(long, value_name = "FILE")]
    pub workload: Option<PathBuf>,
}

fn goal(text: &str) -> Result<Goal, String> {
    text.parse().map_err(|error| format!("{error:#}"))
}

/// Puts the load on a server and prints or writes what came of it. `flags` are those of `imprint serve` for a server of our own.
///
/// # Errors
/// Arguments that cannot be, no server, sessions that cannot be made, a file that cannot be written. A call of the load that fails
/// is counted, and no error.
pub async fn run(args: &Args, flags: &[String]) -> Result<()> {
    let measured = measure(args, flags).await?;
    match args.json.as_deref() {
        None => print(&measured.text()),
        Some(path) => write_json(path, &Value::Object(measured.json(args))),
    }
}

/// All of a measurement.
struct Measured {
    machine: Machine,
    model: Model,
    told: Told,
    figures: Figures,
    /// What the server counted meanwhile.
    server: BTreeMap<String, f64>,
    memory: Option<(u64, u64)>,
}

async fn measure(args: &Args, flags: &[String]) -> Result<Measured> {
    let (times, warm_up) = times(args)?;
    for (name, value) in [("zipf", args.zipf), ("ingest-share", args.ingest_share)] {
        ensure!((0.0..=10.0).contains(&value), "--{name} {value} cannot be");
    }
    let machine = Machine::here(std::thread::available_parallelism()?.get());
    let shape = Shape {
        sessions: usize::from(args.sessions),
        zipf: args.zipf,
        ingest_share: if args.in_context || args.sessions == 0 {
            0.0
        } else {
            args.ingest_share
        },
        seed: args.seed,
    };
    let plan = Plan::new(times, shape);
    let own = if args.endpoint.is_none() {
        let sessions = usize::from(args.sessions);
        let more = (sessions > SESSIONS)
            .then(|| ("IMPRINT_ENGINE_MAX_SESSIONS", (sessions + 16).to_string()));
        Some(Child::start(flags, more)?)
    } else {
        None
    };
    let endpoint = own.as_ref().map(|own| own.endpoint.clone());
    let endpoint = endpoint.or_else(|| args.endpoint.clone());
    let endpoint = endpoint.context("no server")?;
    let metrics = own.as_ref().map(|own| own.metrics.clone());
    let metrics = metrics.or_else(|| args.metrics.clone());

    let mut clients = Vec::new();
    for _ in 0..args.connections {
        let options = Options {
            key: args.key.clone(),
            ..Options::default()
        };
        clients.push(Client::connect(&endpoint, options).await?);
    }
    let model = clients[0].get_model("").await?;
    let (load, told) = Load::prepare(clients, settings(args, &model)?).await?;
    if let Some(path) = &args.workload {
        write_json(path, &load.workload(&plan))?;
    }
    let before = scraped(metrics.as_deref()).await?;
    let load = Arc::new(load);
    let outcomes = Arc::clone(&load).run(&plan).await;
    let after = scraped(metrics.as_deref()).await?;
    let memory = own.as_ref().and_then(Child::memory);
    if own.is_none() {
        load.end().await;
    }
    Ok(Measured {
        machine,
        model,
        told,
        figures: Figures::new(&outcomes, warm_up, &args.goodput),
        server: scrape::change(&before, after),
        memory,
    })
}

fn seconds(name: &str, seconds: f64) -> Result<Duration> {
    Duration::try_from_secs_f64(seconds)
        .ok()
        .filter(|duration| *duration <= Duration::from_secs(86_400))
        .with_context(|| format!("--{name} {seconds} cannot be"))
}

/// When arrivals come, and up to when they only warm up.
fn times(args: &Args) -> Result<(Vec<Duration>, Duration)> {
    if let Some(burst) = args.burst {
        ensure!((1..=1 << 20).contains(&burst), "--burst {burst} cannot be");
        return Ok((vec![Duration::ZERO; burst as usize], Duration::ZERO));
    }
    let warm_up = seconds("warm-up-seconds", args.warm_up_seconds)?;
    let until = warm_up + seconds("seconds", args.seconds)?;
    let times = match &args.trace {
        Some(path) => arrivals::trace(path, until)?,
        None => arrivals::poisson(args.request_rate, until, args.seed)?,
    };
    Ok((times, warm_up))
}

fn settings(args: &Args, model: &Model) -> Result<Settings> {
    let generator = model.generator.as_ref();
    Ok(Settings {
        sessions: args.sessions.into(),
        facts: args.facts.into(),
        told_facts: args.told_facts.into(),
        output_tokens: args.output_tokens,
        in_context: args.in_context,
        question_format: generator.is_some_and(|generator| !generator.prompt_format.is_empty()),
        max_concurrency: args.max_concurrency.into(),
        drain: seconds("drain-seconds", args.drain_seconds)?,
        seed: args.seed,
    })
}

async fn scraped(metrics: Option<&str>) -> Result<BTreeMap<String, f64>> {
    match metrics {
        Some(url) => scrape::scrape(url).await,
        None => Ok(BTreeMap::new()),
    }
}

impl Measured {
    fn text(&self) -> String {
        let Machine { cpu, threads, .. } = &self.machine;
        let mut text = format!(
            "{cpu} ({threads} threads), commit {}, {} ({})\n",
            machine::commit(),
            self.model.name,
            self.model.weight_format
        );
        if self.told.tokens > 0 {
            text += &format!(
                "told before the load: {} context tokens in {:.1} s\n",
                self.told.tokens,
                self.told.took.as_secs_f64()
            );
        }
        text += &self.figures.text();
        if let Some((now, most)) = self.memory {
            text += &format!(
                "the server's memory: {} MB now, {} MB at most\n",
                now / 1_000_000,
                most / 1_000_000
            );
        }
        for (name, value) in &self.server {
            text += &format!("{name} {value}\n");
        }
        text
    }

    fn json(&self, args: &Args) -> Map<String, Value> {
        let mut all = self.figures.json();
        let mut set = |name: &str, value: Value| drop(all.insert(name.to_owned(), value));
        set("backend", json!(args.backend));
        set("model_id", json!(self.model.name));
        set("weight_format", json!(self.model.weight_format));
        set("commit", json!(machine::commit()));
        set("optimised", json!(!cfg!(debug_assertions)));
        set("machine", json!(self.machine));
        let rate = args.burst.is_none() && args.trace.is_none();
        set("request_rate", json!(rate.then_some(args.request_rate)));
        set("max_concurrency", json!(args.max_concurrency));
        set("num_sessions", json!(args.sessions));
        set("zipf", json!(args.zipf));
        set("ingest_share", json!(args.ingest_share));
        set("in_context", json!(args.in_context));
        set("output_len", json!(args.output_tokens));
        set("seed", json!(args.seed));
        set("told_before_tokens", json!(self.told.tokens));
        set("told_before_seconds", json!(self.told.took.as_secs_f64()));
        let (now, most) = self.memory.unzip();
        set("server_resident_bytes", json!(now));
        set("server_resident_bytes_most", json!(most));
        set("server_metrics", json!(self.server));
        all
    }
}
