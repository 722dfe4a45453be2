//! `imprint bench start`: how long a server takes from its start to its first answer, and what memory it holds.
//!
//! Each repetition starts a server of our own, asks it at once, tells a session something and asks that. The first repetition, which may
//! find the model's file outside of the file cache, is not counted. Start at [`run`].

use std::{
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::Result;
use imprint_client::{
    Client, IngestOptions, Options, prompt,
    v1::{CreateSessionRequest, GenerateRequest},
};
use serde_json::json;

use crate::{child::Child, machine, machine::Machine, serve::facts};

/// Facts that the session is told.
const FACTS: usize = 16;

/// How to measure.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// Starts, after one that is not counted.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..=1000))]
    pub repetitions: u16,
    /// Write the figures as JSON to FILE, or to standard output without one; otherwise a table is printed.
    #[arg(long, value_name = "FILE", num_args = 0..=1, default_missing_value = "-")]
    pub json: Option<PathBuf>,
}

/// One start. Durations from the start of the process.
#[derive(Clone, Copy, Debug)]
struct Started {
    listening: Duration,
    first_token: Duration,
    first_answer: Duration,
    /// Resident bytes once it listens, behind the session's answer, and the most.
    memory: [u64; 3],
}

const NAMES: [&str; 6] = [
    "listening_ms",
    "first_token_ms",
    "first_answer_ms",
    "resident_listening_mb",
    "resident_after_session_mb",
    "resident_most_mb",
];

impl Started {
    /// As `NAMES` has them.
    #[expect(
        clippy::cast_precision_loss,
        reason = "bytes of memory are far below 2^52"
    )]
    fn figures(&self) -> [f64; NAMES.len()] {
        let ms = |duration: Duration| duration.as_secs_f64() * 1e3;
        let [listening, told, most] = self.memory.map(|bytes| bytes as f64 / 1e6);
        [
            ms(self.listening),
            ms(self.first_token),
            ms(self.first_answer),
            listening,
            told,
            most,
        ]
    }
}

/// Measures and prints, or writes, what came out. `flags` are those of `imprint serve`.
///
/// # Errors
/// The server does not start or does not answer, or the file cannot be written.
pub async fn run(args: &Args, flags: &[String]) -> Result<()> {
    let machine = Machine::here(std::thread::available_parallelism()?.get());
    let mut all = Vec::new();
    for repetition in 0..=args.repetitions {
        let started = once(flags).await?;
        if repetition > 0 {
            all.push(started.figures());
        }
    }
    let columns = NAMES.iter().enumerate().map(|(place, name)| {
        let mut values: Vec<_> = all.iter().map(|figures| figures[place]).collect();
        values.sort_by(f64::total_cmp);
        (*name, values)
    });
    let columns: Vec<_> = columns.collect();
    if let Some(path) = &args.json {
        let figures: serde_json::Map<_, _> = columns
            .into_iter()
            .map(|(name, values)| (name.to_owned(), json!(values)))
            .collect();
        let value = json!({
            "commit": machine::commit(),
            "optimised": !cfg!(debug_assertions),
            "machine": machine,
            "figures": figures,
        });
        return crate::output::write_json(path, &value);
    }
    let mut text = format!(
        "{}, commit {}, {} starts\n{:<28} {:>9} {:>9} {:>9}\n",
        machine.cpu,
        machine::commit(),
        all.len(),
        "",
        "median",
        "least",
        "most"
    );
    for (name, values) in columns {
        let median = values[values.len() / 2];
        let (least, most) = (values[0], values[values.len() - 1]);
        text += &format!("{name:<28} {median:>9.1} {least:>9.1} {most:>9.1}\n");
    }
    crate::output::print(&text)
}

async fn once(flags: &[String]) -> Result<Started> {
    let began = Instant::now();
    let child = Child::start(flags, None)?;
    let memory = || child.memory().unwrap_or_default();
    let listening = memory().0;
    let client = Client::connect(&child.endpoint, Options::default()).await?;
    let request = GenerateRequest {
        prompt: Some(prompt::text("The capital of France is")),
        max_tokens: 8,
        ..GenerateRequest::default()
    };
    let mut answer = client.generate(request).await?;
    let mut first_token = None;
    while answer.next().await?.is_some() {
        first_token.get_or_insert_with(|| began.elapsed());
    }
    let first_answer = began.elapsed();

    if client.get_model("").await?.generator.is_some() {
        let session = client.create_session(CreateSessionRequest::default());
        let session = session.await?.session_id;
        let facts = facts::facts(0, 0, 0, FACTS);
        let mut ingest = client.ingest(&session, IngestOptions::default()).await?;
        ingest.last_text(facts::text(&facts)).await?;
        ingest.finish().await?;
        let request = GenerateRequest {
            adapter: Some(prompt::adapter(&session)),
            prompt: Some(prompt::text(&facts[0].question)),
            max_tokens: 16,
            ..GenerateRequest::default()
        };
        client.generate(request).await?.text().await?;
    }
    let (now, most) = memory();
    Ok(Started {
        listening: child.ready,
        first_token: first_token.unwrap_or(first_answer),
        first_answer,
        memory: [listening, now, most],
    })
}
