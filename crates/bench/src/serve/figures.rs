//! What came of a load, in the terms and the layout of `vllm bench serve`, so that figures can be laid side by side.
//!
//! Reads outcomes, sends nothing. Start at [`Figures::new`].

use std::{collections::BTreeMap, fmt::Write as _, time::Duration};

use anyhow::{Context, Result, bail};
use serde_json::{Map, Value, json};

use super::{arrivals::Kind, load::Outcome};

/// A bound on a latency, in milliseconds: `ttft:200`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Goal {
    metric: Metric,
    ms: f64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Metric {
    Ttft,
    Tpot,
    E2el,
}

impl std::str::FromStr for Goal {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let (name, ms) = text
            .split_once(':')
            .context("a goal is ttft:MS, tpot:MS or e2el:MS")?;
        let metric = match name {
            "ttft" => Metric::Ttft,
            "tpot" => Metric::Tpot,
            "e2el" => Metric::E2el,
            other => bail!("`{other}` is none of ttft, tpot, e2el"),
        };
        let ms: f64 = ms.parse().context("milliseconds")?;
        anyhow::ensure!(ms > 0.0 && ms.is_finite(), "{ms} ms are no goal");
        Ok(Self { metric, ms })
    }
}

/// Some durations, as milliseconds in rising order.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Spread(Vec<f64>);

#[expect(
    clippy::cast_precision_loss,
    reason = "numbers of samples are far below 2^52"
)]
impl Spread {
    pub(crate) fn new(durations: impl IntoIterator<Item = Duration>) -> Self {
        let mut values: Vec<_> = durations
            .into_iter()
            .map(|duration| duration.as_secs_f64() * 1e3)
            .collect();
        values.sort_by(f64::total_cmp);
        Self(values)
    }

    pub(crate) fn mean(&self) -> f64 {
        self.0.iter().sum::<f64>() / self.0.len().max(1) as f64
    }

    pub(crate) fn deviation(&self) -> f64 {
        let mean = self.mean();
        let squares = self.0.iter().map(|value| (value - mean).powi(2));
        (squares.sum::<f64>() / self.0.len().max(1) as f64).sqrt()
    }

    /// Between the two samples next to it, as numpy does; 0 of none. `percent` in 0 ... 100.
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a place in the list"
    )]
    pub(crate) fn percentile(&self, percent: f64) -> f64 {
        let place = percent / 100.0 * self.0.len().saturating_sub(1) as f64;
        let (low, part) = (place as usize, place.fract());
        let of = |index: usize| self.0.get(index).copied();
        match (of(low), of(low + 1)) {
            (Some(low), Some(high)) => (high - low).mul_add(part, low),
            (Some(low), None) => low,
            (None, _) => 0.0,
        }
    }
}

/// What the measured arrivals came to.
#[derive(Debug)]
pub(crate) struct Figures {
    pub(crate) duration: Duration,
    pub(crate) completed: usize,
    failed: usize,
    input_tokens: u64,
    cached_tokens: u64,
    pub(crate) output_tokens: u64,
    right: usize,
    /// Requests that met all goals; none without goals.
    good: Option<usize>,
    pub(crate) ttft: Spread,
    tpot: Spread,
    itl: Spread,
    e2el: Spread,
    /// From an arrival's time to when it was sent: what this process, or its bound on requests at once, held back.
    held: Spread,
    ingested: usize,
    ingest_failed: usize,
    ingest_tokens: u64,
    visible: Spread,
    errors: BTreeMap<String, usize>,
}

impl Figures {
    /// Of all outcomes those whose time had come after the warm-up.
    pub(crate) fn new(outcomes: &[Outcome], warm_up: Duration, goals: &[Goal]) -> Self {
        let measured: Vec<_> = outcomes
            .iter()
            .filter(|outcome| outcome.at >= warm_up)
            .collect();
        let of = |kind, good: bool| {
            measured
                .iter()
                .copied()
                .filter(move |one| one.kind == kind && one.error.is_none() == good)
        };
        let begin = measured.iter().map(|one| one.at).min();
        let end = measured.iter().map(|one| one.ended).max();
        let mut errors = BTreeMap::new();
        for error in measured.iter().filter_map(|one| one.error.clone()) {
            *errors.entry(error).or_default() += 1;
        }
        let asked = || of(Kind::Ask, true);
        let told = || of(Kind::Ingest, true);
        let good = |one: &&Outcome| {
            goals.iter().all(|goal| {
                let took = match goal.metric {
                    Metric::Ttft => ttft(one),
                    // Of one token there is no time between two: met.
                    Metric::Tpot => Some(tpot(one).unwrap_or_default()),
                    Metric::E2el => Some(one.ended.saturating_sub(one.at)),
                };
                took.is_some_and(|took| took.as_secs_f64() * 1e3 <= goal.ms)
            })
        };
        Self {
            duration: end
                .unwrap_or_default()
                .saturating_sub(begin.unwrap_or_default()),
            completed: asked().count(),
            failed: of(Kind::Ask, false).count(),
            input_tokens: asked().map(|one| one.prompt_tokens).sum(),
            cached_tokens: asked().map(|one| one.cached_tokens).sum(),
            output_tokens: asked().map(|one| one.tokens).sum(),
            right: asked().filter(|one| one.right).count(),
            good: (!goals.is_empty()).then(|| asked().filter(good).count()),
            ttft: Spread::new(asked().filter_map(ttft)),
            tpot: Spread::new(asked().filter_map(tpot)),
            itl: Spread::new(asked().flat_map(|one| one.gaps.iter().copied())),
            e2el: Spread::new(asked().map(|one| one.ended.saturating_sub(one.at))),
            held: Spread::new(measured.iter().map(|one| one.sent.saturating_sub(one.at))),
            ingested: told().count(),
            ingest_failed: of(Kind::Ingest, false).count(),
            ingest_tokens: told().map(|one| one.tokens).sum(),
            visible: Spread::new(told().map(|one| one.ended.saturating_sub(one.at))),
            errors,
        }
    }

    #[expect(clippy::cast_precision_loss, reason = "counts are far below 2^52")]
    fn rate(&self, count: u64) -> f64 {
        let seconds = self.duration.as_secs_f64();
        if seconds > 0.0 {
            count as f64 / seconds
        } else {
            0.0
        }
    }

    fn spreads(&self) -> [(&'static str, &'static str, &Spread); 4] {
        [
            ("ttft", "Time to First Token", &self.ttft),
            (
                "tpot",
                "Time per Output Token (excl. 1st token)",
                &self.tpot,
            ),
            ("itl", "Inter-token Latency", &self.itl),
            ("e2el", "End-to-end Latency", &self.e2el),
        ]
    }

    /// By vLLM's names of them, and ours.
    pub(crate) fn json(&self) -> Map<String, Value> {
        let mut all = Map::new();
        let mut set = |name: &str, value: Value| drop(all.insert(name.to_owned(), value));
        set("duration", json!(self.duration.as_secs_f64()));
        set("completed", json!(self.completed));
        set("failed", json!(self.failed));
        set("total_input_tokens", json!(self.input_tokens));
        set("total_cached_tokens", json!(self.cached_tokens));
        set("total_output_tokens", json!(self.output_tokens));
        set(
            "request_throughput",
            json!(self.rate(self.completed as u64)),
        );
        set(
            "request_goodput",
            json!(self.good.map(|good| self.rate(good as u64))),
        );
        set("output_throughput", json!(self.rate(self.output_tokens)));
        let tokens = self.input_tokens + self.output_tokens;
        set("total_token_throughput", json!(self.rate(tokens)));
        let held = [("held_back", &self.held), ("visible", &self.visible)];
        let spreads = self.spreads().map(|(name, _, spread)| (name, spread));
        for (name, spread) in spreads.into_iter().chain(held) {
            set(&format!("mean_{name}_ms"), json!(spread.mean()));
            set(&format!("median_{name}_ms"), json!(spread.percentile(50.0)));
            set(&format!("std_{name}_ms"), json!(spread.deviation()));
            for percent in [50, 90, 99] {
                let value = spread.percentile(f64::from(percent));
                set(&format!("p{percent}_{name}_ms"), json!(value));
            }
        }
        set("answers_right", json!(self.right));
        set("ingest_completed", json!(self.ingested));
        set("ingest_failed", json!(self.ingest_failed));
        set("total_ingest_tokens", json!(self.ingest_tokens));
        set("ingest_throughput", json!(self.rate(self.ingest_tokens)));
        set("errors", json!(self.errors));
        all
    }

    /// For people.
    pub(crate) fn text(&self) -> String {
        let mut text = centred(" Serving Benchmark Result ", '=');
        let mut line = |name: &str, value: String| {
            // Writing to a String cannot fail.
            let _ = writeln!(text, "{name:<40} {value:<10}");
        };
        line("Successful requests:", self.completed.to_string());
        line("Failed requests:", self.failed.to_string());
        line(
            "Benchmark duration (s):",
            format!("{:.2}", self.duration.as_secs_f64()),
        );
        line("Total input tokens:", self.input_tokens.to_string());
        line("Of these cached:", self.cached_tokens.to_string());
        line("Total generated tokens:", self.output_tokens.to_string());
        let rates = [
            ("Request throughput (req/s):", Some(self.completed as u64)),
            (
                "Request goodput (req/s):",
                self.good.map(|good| good as u64),
            ),
            ("Output token throughput (tok/s):", Some(self.output_tokens)),
            (
                "Total token throughput (tok/s):",
                Some(self.input_tokens + self.output_tokens),
            ),
        ];
        for (name, count) in rates {
            if let Some(count) = count {
                line(name, format!("{:.2}", self.rate(count)));
            }
        }
        line(
            "Answers that hold what was asked for:",
            format!("{}/{}", self.right, self.completed),
        );
        for (name, title, spread) in self.spreads() {
            spread_into(&mut text, title, &name.to_uppercase(), spread);
        }
        if self.ingested + self.ingest_failed > 0 {
            text += &centred("Context Told beside It", '-');
            let mut line = |name: &str, value: String| {
                let _ = writeln!(text, "{name:<40} {value:<10}");
            };
            line("Documents told:", self.ingested.to_string());
            line("Failed documents:", self.ingest_failed.to_string());
            line(
                "Ingest throughput (tok/s):",
                format!("{:.2}", self.rate(self.ingest_tokens)),
            );
            spread_into(&mut text, "Time to Visible", "TTV", &self.visible);
        }
        spread_into(&mut text, "Held back before Sending", "held", &self.held);
        if !self.errors.is_empty() {
            text += &centred("Errors", '-');
            for (error, count) in &self.errors {
                let _ = writeln!(text, "{error:<40} {count:<10}");
            }
        }
        text += &centred("", '=');
        text
    }
}

fn ttft(outcome: &Outcome) -> Option<Duration> {
    outcome.first.map(|first| first.saturating_sub(outcome.at))
}

fn tpot(outcome: &Outcome) -> Option<Duration> {
    let between = outcome.last?.saturating_sub(outcome.first?);
    let rest = u32::try_from(outcome.tokens).ok()?.checked_sub(1)?;
    (rest > 0).then(|| between / rest)
}

fn centred(title: &str, with: char) -> String {
    const WIDTH: usize = 51;
    let left = WIDTH.saturating_sub(title.len()) / 2;
    let right = WIDTH.saturating_sub(title.len() + left);
    let line = |count| with.to_string().repeat(count);
    format!("{}{title}{}\n", line(left), line(right))
}

fn spread_into(text: &mut String, title: &str, name: &str, spread: &Spread) {
    *text += &centred(title, '-');
    let rows = [
        (format!("Mean {name} (ms):"), spread.mean()),
        (format!("Median {name} (ms):"), spread.percentile(50.0)),
        (format!("P90 {name} (ms):"), spread.percentile(90.0)),
        (format!("P99 {name} (ms):"), spread.percentile(99.0)),
    ];
    for (name, value) in rows {
        let _ = writeln!(text, "{name:<40} {value:<10.2}");
    }
}

#[cfg(test)]
mod tests;
