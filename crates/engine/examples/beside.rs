//! The time between two tokens of an answer, quiet and beside a long ingest.
//!
//! `cargo run --example beside -- MODEL.gguf GENERATOR [answers] [ingested tokens]` prints percentiles of both in milliseconds, and how
//! fast context was read. Answers and context are arbitrary tokens. Start at `main`.
#![expect(clippy::print_stdout, reason = "figures for who runs it")]

use std::{
    error::Error,
    path::Path,
    time::{Duration, Instant},
};

use engine::{
    Chosen, Command, Config, DocumentId, Engine, Event, RequestId, Sampling, Seq, SessionId,
    Strategy, TenantId, TokenId,
};

/// Tokens of an answer.
const ANSWER: usize = 1000;
/// Tokens of a chunk.
const CHUNK: usize = 1024;

fn tokens(count: usize, from: u32) -> Vec<TokenId> {
    let count = u32::try_from(count).unwrap_or(u32::MAX);
    (0..count)
        .map(|at| TokenId(1000 + (from + at * 7919) % 30_000))
        .collect()
}

/// Sees to it that so many answers run; the number of the last one.
fn answers(engine: &mut Engine, wanted: usize, mut number: u64) -> u64 {
    let usage = engine.usage();
    for _ in usage.running + usage.queued..wanted {
        number += 1;
        let ask = Command::Generate {
            request: RequestId(number),
            tenant: TenantId(1),
            session: None,
            adapter_scale: 1.0,
            chosen: Chosen::default(),
            prompt: tokens(16, 100 * u32::try_from(number).unwrap_or(0)),
            max_tokens: ANSWER,
            sampling: Sampling::default(),
            eos: Vec::new(),
        };
        if engine.push(ask).is_err() {
            break;
        }
    }
    number
}

/// One step; milliseconds since the last tokens, if it drew some.
fn step(
    engine: &mut Engine,
    last: &mut Instant,
    read: &mut usize,
) -> Result<Option<f64>, Box<dyn Error>> {
    let mut events = Vec::new();
    engine.step(Instant::now, &mut events)?;
    let mut drew = false;
    for event in events {
        match event {
            Event::Token { .. } => drew = true,
            Event::Encoded { tokens, .. } => *read += tokens,
            _ => {}
        }
    }
    if !drew {
        return Ok(None);
    }
    let now = Instant::now();
    let gap = now - std::mem::replace(last, now);
    Ok(Some(gap.as_secs_f64() * 1e3))
}

fn report(name: &str, mut gaps: Vec<f64>, seconds: Duration, read: usize) -> f64 {
    gaps.sort_by(f64::total_cmp);
    let at = |part: f64| gaps[((gaps.len() - 1) as f64 * part) as usize];
    println!(
        "{name}: {} gaps, p50 {:.1} p90 {:.1} p99 {:.1} max {:.1} ms; {:.0} context tokens/s",
        gaps.len(),
        at(0.5),
        at(0.9),
        at(0.99),
        at(1.0),
        read as f64 / seconds.as_secs_f64(),
    );
    at(0.99)
}

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [model, generator, rest @ ..] = arguments.as_slice() else {
        return Err("MODEL GENERATOR [answers] [ingested tokens]".into());
    };
    let number = |index: usize, default| {
        rest.get(index)
            .map_or(Ok(default), |text| text.parse::<usize>())
    };
    let (wanted, context) = (number(0, 1)?, number(1, 20_000)?);
    let mut engine = Engine::load(
        Path::new(model),
        Some(Path::new(generator)),
        Config::default(),
    )?;
    let session = SessionId(1);
    let opened = engine.push(Command::Open {
        session,
        tenant: TenantId(1),
        strategy: Strategy::Parallel,
        window: 256,
    });
    opened.map_err(|_| "the queue is full")?;

    let (mut last, mut read) = (Instant::now(), 0);
    let mut request = 0;
    let mut quiet = Vec::new();
    let start = Instant::now();
    while quiet.len() < 300 {
        request = answers(&mut engine, wanted, request);
        quiet.extend(step(&mut engine, &mut last, &mut read)?);
    }
    let quiet = report("quiet ", quiet.split_off(20), start.elapsed(), read);

    let mut beside = Vec::new();
    let (start, mut told, mut seq) = (Instant::now(), 0, 0);
    while read < context {
        request = answers(&mut engine, wanted, request);
        while told < context {
            let count = CHUNK.min(context - told);
            seq += 1;
            let chunk = Command::Ingest {
                session,
                seq: Seq(seq),
                document: DocumentId(1 + told as u64 / 4096),
                tokens: tokens(count, u32::try_from(told)?),
                end_of_document: (told + count) % 4096 == 0 || told + count == context,
            };
            if engine.push(chunk).is_err() {
                break;
            }
            told += count;
        }
        beside.extend(step(&mut engine, &mut last, &mut read)?);
    }
    let beside = report("beside", beside, start.elapsed(), read);
    println!("p99 beside / quiet: {:.2}", beside / quiet);
    Ok(())
}
