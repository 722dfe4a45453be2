//! Figures, ratios, and how they are told: JSON for programs, a table for people.
//!
//! Start at `Samples`, then `Report`.

use std::{collections::BTreeMap, fmt::Write as _, path::Path};

use anyhow::Result;
use engine::ModelInfo;
use serde::Serialize;

use crate::{
    machine::Machine,
    output::{print, write_json},
};

/// What was measured: for each name its tokens a second, one value a repetition.
#[derive(Debug, Default)]
pub(crate) struct Samples {
    repetitions: usize,
    rates: BTreeMap<&'static str, Vec<f64>>,
    ratios: BTreeMap<&'static str, Figure>,
}

/// What a ratio of two figures says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Direction {
    /// Ours over the other, in tokens a second: above 1 ours is faster.
    Speed,
    /// Ours over the other, in seconds for the same tokens: above 1 ours costs more.
    Time,
}

/// A median and what it is the median of.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct Figure {
    /// The median.
    pub(crate) median: f64,
    /// Its values, in the order in which they were measured.
    pub(crate) values: Vec<f64>,
}

impl Figure {
    fn of(values: &[f64]) -> Option<Self> {
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        let (low, high) = (
            sorted.get(sorted.len().checked_sub(1)? / 2)?,
            sorted.get(sorted.len() / 2)?,
        );
        Some(Self {
            median: f64::midpoint(*low, *high),
            values: values.to_vec(),
        })
    }
}

impl Samples {
    /// Begins a repetition.
    pub(crate) fn begin(&mut self) {
        self.repetitions += 1;
    }

    /// Adds a figure of this repetition.
    pub(crate) fn add(&mut self, name: &'static str, rate: f64) {
        self.rates.entry(name).or_default().push(rate);
    }

    /// Forgets the first repetition.
    pub(crate) fn drop_first(&mut self) {
        self.repetitions = self.repetitions.saturating_sub(1);
        for values in self.rates.values_mut() {
            values.drain(..values.len().min(1));
        }
    }

    /// Adds the ratio of two figures, repetition by repetition, if both were measured.
    pub(crate) fn ratio(
        &mut self,
        name: &'static str,
        ours: &str,
        other: &str,
        direction: Direction,
    ) {
        let (Some(ours), Some(other)) = (self.rates.get(ours), self.rates.get(other)) else {
            return;
        };
        let ratios = ours.iter().zip(other).map(|(ours, other)| match direction {
            Direction::Speed => ours / other,
            Direction::Time => other / ours,
        });
        self.ratios
            .extend(Figure::of(&ratios.collect::<Vec<_>>()).map(|figure| (name, figure)));
    }
}

/// How much of what was measured.
#[derive(Debug, Serialize)]
pub(crate) struct Settings {
    pub(crate) repetitions: u16,
    pub(crate) prefill_tokens: u16,
    pub(crate) ingest_windows: u16,
    pub(crate) decode_prompt_tokens: usize,
    pub(crate) decode_tokens: u16,
    pub(crate) activations: String,
    pub(crate) batch: usize,
    pub(crate) wide_batch: usize,
    pub(crate) batch_prefill_tokens: usize,
}

/// The model of a measurement.
#[derive(Debug, Serialize)]
struct Model {
    architecture: String,
    parameters: u64,
    weight_format: String,
    digest: String,
    generator_digest: Option<String>,
    window: Option<usize>,
}

/// All of a measurement.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    commit: String,
    optimised: bool,
    machine: Machine,
    model: Model,
    settings: Settings,
    peers: Vec<String>,
    /// Tokens a second.
    figures: BTreeMap<&'static str, Figure>,
    /// Medians of the ratios within a repetition.
    ratios: BTreeMap<&'static str, f64>,
    /// The ratios of each repetition.
    ranges: BTreeMap<&'static str, Figure>,
}

impl Report {
    /// Puts it together.
    pub(crate) fn new(
        machine: Machine,
        commit: String,
        model: &ModelInfo,
        settings: Settings,
        peers: Vec<String>,
        samples: Samples,
    ) -> Self {
        let generator = model.generator.as_ref();
        let figures = samples
            .rates
            .iter()
            .filter_map(|(name, values)| Some((*name, Figure::of(values)?)));
        Self {
            commit,
            optimised: !cfg!(debug_assertions),
            machine,
            model: Model {
                architecture: format!("{:?}", model.architecture).to_lowercase(),
                parameters: model.parameters,
                weight_format: model.weight_format.clone(),
                digest: model.digest.clone(),
                generator_digest: generator.map(|generator| generator.digest.clone()),
                window: generator.map(|generator| generator.window),
            },
            settings,
            peers,
            figures: figures.collect(),
            ratios: samples
                .ratios
                .iter()
                .map(|(name, figure)| (*name, figure.median))
                .collect(),
            ranges: samples.ratios,
        }
    }

    /// Writes it as JSON to a file (`-` is standard output), or as a table to standard output.
    pub(crate) fn write(&self, json: Option<&Path>) -> Result<()> {
        match json {
            Some(path) => write_json(path, self),
            None => print(&self.table()),
        }
    }

    /// For people: figures with their spread, then ratios.
    fn table(&self) -> String {
        let machine = &self.machine;
        let mut text = format!("{} ({} threads)", machine.cpu, machine.threads);
        text += &format!(
            ", commit {}, {} repetitions",
            self.commit, self.settings.repetitions
        );
        text += if self.optimised {
            "\n"
        } else {
            ", dev profile\n"
        };
        for peer in &self.peers {
            text += &format!("beside {peer}\n");
        }
        let mut section =
            |heading: &str, figures: &BTreeMap<&'static str, Figure>, digits: usize| {
                // Writing to a String cannot fail.
                let _ = writeln!(
                    text,
                    "\n{heading:<36} {:>9} {:>9} {:>9}",
                    "median", "least", "most"
                );
                for (name, Figure { median, values }) in figures {
                    let least = values.iter().copied().fold(f64::INFINITY, f64::min);
                    let most = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                    let _ = writeln!(
                        text,
                        "{name:<36} {median:>9.digits$} {least:>9.digits$} {most:>9.digits$}"
                    );
                }
            };
        section("tokens a second", &self.figures, 1);
        section("ratios", &self.ranges, 3);
        text += "\n..._vs_...: above 1 ours is faster; ingest..._vs_... and read_outs_vs_...: the time that ours takes.\n";
        text
    }
}

#[cfg(test)]
mod tests;
