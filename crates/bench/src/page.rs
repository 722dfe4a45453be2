//! `imprint bench report`: tables and a plot of what the other verbs wrote as JSON, so that no figure is copied by hand.
//!
//! Reads `bench serve`, `bench start`, `bench offline` and what the peers' scripts wrote. Start at [`run`].

mod plot;

use std::{
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use self::plot::{Plot, Series};

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

fn number(value: &Value, name: &str) -> f64 {
    value[name].as_f64().unwrap_or(f64::NAN)
}

/// A load of ours or of a peer.
fn is_load(value: &Value) -> bool {
    value["output_throughput"].is_number()
}

/// All files' tables, one kind after the other.
fn tables(all: &[Value]) -> String {
    let mut text = String::new();
    // Writing to a String cannot fail.
    let loads: Vec<_> = all.iter().filter(|value| is_load(value)).collect();
    if !loads.is_empty() {
        text += "| load | answered tok/s | answers/s | TTFT p50, p99 ms | ITL p50, p99 ms | TPOT p50 ms | right | failed |\n";
        text += "|---|---|---|---|---|---|---|---|\n";
        for load in loads {
            let n = |name: &str| number(load, name);
            let _ = writeln!(
                text,
                "| {} | {:.1} | {:.2} | {:.0}, {:.0} | {:.0}, {:.0} | {:.0} | {}/{} | {} |",
                label(load),
                n("output_throughput"),
                n("request_throughput"),
                n("p50_ttft_ms"),
                n("p99_ttft_ms"),
                n("p50_itl_ms"),
                n("p99_itl_ms"),
                n("p50_tpot_ms"),
                load["answers_right"],
                load["completed"],
                load["failed"],
            );
        }
    }
    for start in all
        .iter()
        .filter(|value| value["figures"]["listening_ms"].is_array())
    {
        text += "\n| from start to | median | least | most |\n|---|---|---|---|\n";
        if let Some(figures) = start["figures"].as_object() {
            for (name, values) in figures {
                let values = values.as_array().map(Vec::as_slice).unwrap_or_default();
                let mut values: Vec<_> = values.iter().filter_map(Value::as_f64).collect();
                values.sort_by(f64::total_cmp);
                if let (Some(least), Some(most)) = (values.first(), values.last()) {
                    let median = values[values.len() / 2];
                    let name = name.replace('_', " ");
                    let _ = writeln!(text, "| {name} | {median:.0} | {least:.0} | {most:.0} |");
                }
            }
        }
    }
    for offline in all.iter().filter(|value| value["ratios"].is_object()) {
        text += "\n| ratio | median |\n|---|---|\n";
        if let Some(ratios) = offline["ratios"].as_object() {
            for (name, ratio) in ratios {
                let median = ratio["median"].as_f64().or_else(|| ratio.as_f64());
                let _ = writeln!(
                    text,
                    "| {} | {:.2} |",
                    name.replace('_', " "),
                    median.unwrap_or(f64::NAN)
                );
            }
        }
    }
    text
}

/// What a load was.
fn label(load: &Value) -> String {
    let mut label = load["backend"].as_str().unwrap_or("?").to_owned();
    if let Some(sessions) = load["num_sessions"].as_u64() {
        label += &format!(", {sessions} sessions");
    }
    if let Some(slots) = load["slots"].as_u64() {
        label += &format!(", {slots} slots");
    }
    if load["in_context"] == true {
        label += ", in prompts";
    }
    match load["request_rate"].as_f64() {
        Some(rate) => label += &format!(", {rate}/s"),
        None => {
            if let Some(concurrency) = load["max_concurrency"].as_u64() {
                label += &format!(", {concurrency} at once");
            }
        }
    }
    if let Some(share) = load["ingest_share"].as_f64().filter(|share| *share > 0.0) {
        label += &format!(", {:.0} % telling", share * 100.0);
    }
    label
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
