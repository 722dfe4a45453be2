//! `imprint bench append`: what a session's next window costs while it grows, and how soon a few tokens are visible.
//!
//! The engine in a plain loop. One session is told a document window by window, each until a version holds it; a growing cost would be one
//! of publishing, of digests or of budgets, as the windows are alike. Then a few tokens come into an open window, again and again, each time
//! with a version asked for. Start at [`run`].

use std::{
    io::Write,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::Result;
use engine::{Config, DocumentId, Seq, SessionId, TokenId};
use serde_json::{Value, json};

use crate::{
    driver::Driver,
    machine::{self, Machine},
    output::{progress, write_json},
    serve::figures::Spread,
};

/// Windows that are told before anything is timed, in a session of their own.
const WARM_UP: usize = 4;

/// What to measure.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// Windows that the session is told.
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(20..=100_000))]
    pub windows: u32,
    /// Tokens of a window (the generator's own without it).
    #[arg(long, value_parser = clap::value_parser!(u16).range(4..=1024))]
    pub window: Option<u16>,
    /// Windows of a document.
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..))]
    pub windows_per_document: u32,
    /// Tokens that come into an open window at a time.
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u16).range(1..=64))]
    pub tail: u16,
    /// How many times.
    #[arg(long, default_value_t = 40, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub tails: u32,
    /// Write the figures as JSON to FILE, or to standard output without one; otherwise they are printed as lines.
    #[arg(long, value_name = "FILE", num_args = 0..=1, default_missing_value = "-")]
    pub json: Option<PathBuf>,
}

/// A session that is being told a document.
struct Told {
    session: SessionId,
    seq: Seq,
    document: DocumentId,
    at: usize,
}

impl Told {
    /// The next tokens, until a version holds them.
    fn append(
        &mut self,
        driver: &mut Driver,
        tokens: usize,
        ends: bool,
        publish: bool,
    ) -> Result<Duration> {
        let vocab = driver.model().vocab.max(1);
        let told: Vec<_> = (self.at..self.at + tokens)
            .map(|at| TokenId(u32::try_from(at.wrapping_mul(7919) % vocab).unwrap_or(0)))
            .collect();
        self.at += tokens;
        self.seq = Seq(self.seq.0 + 1);
        let begun = Instant::now();
        driver.tell(self.session, self.seq, self.document, &told, ends)?;
        driver.see(self.session, self.seq, publish)?;
        if ends {
            self.document = DocumentId(self.document.0 + 1);
        }
        Ok(begun.elapsed())
    }
}

/// Measures and prints or writes what came out. `threads` are those that the engine computes on.
///
/// # Errors
/// There is no generator, the engine breaks or refuses, or the file cannot be written.
pub fn run(args: &Args, model: &Path, generator: Option<&Path>, threads: usize) -> Result<()> {
    let machine = Machine::here(threads);
    let mut driver = Driver::load(model, generator, Config::default())?;
    let window = match args.window {
        Some(window) => window.into(),
        None => driver.window()?,
    };
    let begin = |driver: &mut Driver| -> Result<Told> {
        Ok(Told {
            session: driver.open(window)?,
            seq: Seq(0),
            document: DocumentId(1),
            at: 0,
        })
    };
    let mut out = progress(args.json.as_deref());
    let mut warm = begin(&mut driver)?;
    for _ in 0..WARM_UP {
        warm.append(&mut driver, window, false, false)?;
    }
    driver.close(warm.session)?;
    let mut told = begin(&mut driver)?;
    let (windows, per_document) = (args.windows as usize, args.windows_per_document as usize);
    let mut times = Vec::with_capacity(windows);
    // Tenths, so that one sees it grow or not as it goes.
    let tenth = windows.div_ceil(10);
    let mut tenths = Vec::new();
    for number in 1..=windows {
        let ends = number.is_multiple_of(per_document);
        times.push(told.append(&mut driver, window, ends, false)?);
        if number.is_multiple_of(tenth) || number == windows {
            let from = number - (number - 1) % tenth;
            let spread = Spread::new(times[from - 1..].iter().copied());
            writeln!(
                out,
                "windows {from} to {number}: p50 {:.1} ms, p90 {:.1} ms",
                spread.percentile(50.0),
                spread.percentile(90.0)
            )?;
            tenths.push((from, number, spread));
        }
    }
    let mut tails = Vec::with_capacity(args.tails as usize);
    let mut read_out = Duration::ZERO;
    for _ in 0..args.tails {
        let tail = usize::from(args.tail);
        if told.at % window + tail >= window {
            // The window would close: that is another cost.
            told.append(&mut driver, window - told.at % window, false, false)?;
        }
        let before = driver.usage().read_out;
        tails.push(told.append(&mut driver, tail, false, true)?);
        read_out += driver.usage().read_out - before;
    }
    let read_out_ms = read_out.as_secs_f64() * 1e3 / f64::from(args.tails);
    let tails = Spread::new(tails);
    writeln!(
        out,
        "{} tokens into an open window, visible: p50 {:.1} ms, p99 {:.1} ms; of the mean {:.1} ms in the read-out",
        args.tail,
        tails.percentile(50.0),
        tails.percentile(99.0),
        read_out_ms,
    )?;
    let Some(path) = &args.json else {
        return Ok(());
    };
    let tenths: Vec<Value> = tenths
        .iter()
        .map(|(from, to, spread)| {
            json!({"from": from, "to": to, "p50_ms": spread.percentile(50.0), "p90_ms": spread.percentile(90.0)})
        })
        .collect();
    let report = json!({
        "machine": machine,
        "commit": machine::commit(),
        "model": driver.model().digest,
        "window": window,
        "windows_per_document": per_document,
        "windows": tenths,
        "tail": {"tokens": args.tail, "p50_ms": tails.percentile(50.0), "p99_ms": tails.percentile(99.0), "read_out_ms": read_out_ms},
    });
    write_json(path, &report)
}
