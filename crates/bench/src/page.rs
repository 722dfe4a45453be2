//! `imprint bench report`: tables and a plot of what the other verbs wrote as JSON, so that no figure is copied by hand.
//!
//! Reads `bench offline`, `serve`, `start`, `beside`, `append`, `sessions` and what the peers' scripts wrote. Start at [`run`].

mod plot;
mod tables;

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use self::{
    plot::{Plot, Series},
    tables::{is_load, number, tables},
};

/// Between these lines of a file stands what this verb wrote into it.
const BEGIN: &str = "<!-- bench report: begin -->";
const END: &str = "<!-- bench report: end -->";

/// What to make of which files.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// Files that `bench ... --json` wrote, and the peers' scripts.
    #[arg(required = true)]
    pub files: Vec<PathBuf>,
    /// Draw the latencies of loads against their rates into FILE.
    #[arg(long, value_name = "FILE")]
    pub svg: Option<PathBuf>,
    /// Put the tables between the marked lines of FILE, as of the README, instead of printing them.
    #[arg(long, value_name = "FILE")]
    pub into: Option<PathBuf>,
}

/// Makes the tables and the plot. What is to be printed, if anything is.
///
/// # Errors
/// A file cannot be read or written, is no JSON, or has no place for the tables.
pub fn run(args: &Args) -> Result<String> {
    let mut all = Vec::new();
    for path in &args.files {
        let text = fs::read_to_string(path)
            .with_context(|| format!("{} cannot be read", path.display()))?;
        let value: Value = serde_json::from_str(&text)
            .with_context(|| format!("{} is no JSON", path.display()))?;
        all.push(value);
    }
    if let Some(path) = &args.svg {
        let svg = latencies(&all).context("no loads at two rates or more: nothing to draw")?;
        write(path, &svg)?;
    }
    let tables = tables(&all);
    let Some(path) = &args.into else {
        return Ok(tables);
    };
    let old =
        fs::read_to_string(path).with_context(|| format!("{} cannot be read", path.display()))?;
    let new = placed(&old, &tables).with_context(|| path.display().to_string())?;
    write(path, &new)?;
    Ok(String::new())
}

fn write(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).with_context(|| format!("{} cannot be written", path.display()))
}

/// The text with the tables between its marks.
fn placed(old: &str, tables: &str) -> Result<String> {
    let begin = old.find(BEGIN).context(format!("no line {BEGIN}"))? + BEGIN.len();
    let end = old.find(END).context(format!("no line {END}"))?;
    ensure!(begin <= end, "{END} stands before {BEGIN}");
    Ok(format!(
        "{}\n\n{}\n\n{}",
        &old[..begin],
        tables.trim(),
        &old[end..]
    ))
}

/// Percentiles of loads at rates against these; nothing of fewer than two rates.
fn latencies(all: &[Value]) -> Option<String> {
    let mut loads: Vec<_> = all
        .iter()
        .filter(|value| is_load(value))
        .filter_map(|load| Some((load["request_rate"].as_f64()?, load)))
        .collect();
    loads.sort_by(|a, b| a.0.total_cmp(&b.0));
    if loads.len() < 2 {
        return None;
    }
    let series = [
        ("TTFT p50", "p50_ttft_ms"),
        ("TTFT p99", "p99_ttft_ms"),
        ("ITL p50", "p50_itl_ms"),
        ("ITL p99", "p99_itl_ms"),
    ]
    .map(|(name, key)| Series {
        name,
        points: loads
            .iter()
            .map(|(rate, load)| (*rate, number(load, key)))
            .collect(),
    });
    let plot = Plot {
        title: "Latency under load",
        x: "requests a second",
        y: "ms",
        series: series.into(),
    };
    Some(plot.svg())
}

#[cfg(test)]
mod tests;
