//! What a run tells while it goes on: a bar on the terminal, lines of JSON in a file, a page with curves.
//!
//! Start at [`Progress::step`].

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};

use crate::{
    Error,
    batch::Kind,
    checkpoint::{Standing, told},
    curves,
    files::write_whole,
    recipe::Length,
    step::Figures,
};

/// Between lines where nobody sees a bar.
const PAUSE: Duration = Duration::from_secs(60);
/// Of running means the weight that a step keeps.
const KEPT: f64 = 0.95;

/// Tells how a run goes.
pub(crate) struct Progress {
    bar: ProgressBar,
    path: PathBuf,
    file: File,
    length: Length,
    /// When the last line was told.
    told: Option<Instant>,
}

/// Of a file of metrics only what was before a step, so that a resumed run repeats no line.
fn cut(path: &Path, step: u64) -> io::Result<()> {
    let text = match fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    let before = |line: &&str| {
        serde_json::from_str::<Value>(line)
            .is_ok_and(|line| line["step"].as_u64().is_some_and(|at| at <= step))
    };
    let mut kept: String = text.lines().filter(before).collect::<Vec<_>>().join("\n");
    if !kept.is_empty() {
        kept.push('\n');
    }
    write_whole(path, kept.as_bytes())
}

impl Progress {
    /// `step`: where the run resumes; 0 begins anew.
    pub(crate) fn new(folder: &Path, length: Length, step: u64) -> Result<Self, Error> {
        let path = folder.join("metrics.jsonl");
        let opened = cut(&path, step)
            .and_then(|()| OpenOptions::new().create(true).append(true).open(&path));
        let file = opened.map_err(|source| Error::io(&path, source))?;
        let bar = ProgressBar::new(1000);
        let style = ProgressStyle::with_template("{bar:24} {percent}% {elapsed} (eta {eta}) {msg}");
        bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
        bar.enable_steady_tick(Duration::from_secs(1));
        Ok(Self {
            bar,
            path,
            file,
            length,
            told: None,
        })
    }

    /// How much of the run is behind it, 0 ..= 1.
    pub(crate) fn share(length: Length, standing: &Standing) -> f64 {
        let share = match length {
            Length::Steps(steps) => standing.step as f64 / steps.max(1) as f64,
            Length::Minutes(minutes) => standing.seconds / (60.0 * minutes),
        };
        share.clamp(0.0, 1.0)
    }

    /// Something worth a line.
    pub(crate) fn say(&self, line: &str) {
        if self.bar.is_hidden() {
            // Nobody sees a bar: the log does.
            drop(writeln!(io::stderr(), "{line}"));
        } else {
            self.bar.println(line);
        }
    }

    /// After a step that took `seconds`.
    pub(crate) fn step(
        &mut self,
        standing: &Standing,
        loss: f64,
        norm: f64,
        lr: f64,
        seconds: f64,
        tokens: u64,
    ) -> Result<(), Error> {
        let share = Self::share(self.length, standing);
        self.bar.set_position((share * 1000.0) as u64);
        let pace = standing.tokens as f64 / standing.seconds.max(1e-9);
        let mut line = format!("step {} {pace:.0} tok/s", standing.step);
        for (kind, figures) in Kind::ALL.iter().zip(&standing.running) {
            if figures.tokens > 0 {
                line.push_str(&format!(
                    " {} {:.3}",
                    &kind.name()[..3],
                    figures.mean(*kind)
                ));
            }
        }
        if let Some((best, _)) = standing.best {
            line.push_str(&format!(" best {best:.3}"));
        }
        let left = standing.seconds * (1.0 - share) / share.max(1e-9);
        self.bar.set_message(line.clone());
        if self.bar.is_hidden() && self.told.is_none_or(|told| told.elapsed() >= PAUSE) {
            self.told = Some(Instant::now());
            self.say(&format!(
                "{:3.0} % {line} norm {norm:.2} eta {:.0} min",
                share * 100.0,
                left / 60.0
            ));
        }
        self.line(&json!({
            "step": standing.step, "seconds": standing.seconds, "tokens": standing.tokens, "loss": loss,
            "norm": norm, "lr": lr, "step_seconds": seconds, "step_tokens": tokens,
            "running": told(&standing.running),
        }))
    }

    /// A held-out figure.
    pub(crate) fn validated(
        &mut self,
        standing: &Standing,
        figure: f64,
        figures: &Value,
    ) -> Result<(), Error> {
        self.line(&json!({
            "step": standing.step, "seconds": standing.seconds, "tokens": standing.tokens,
            "figure": figure, "held_out": figures,
        }))
    }

    fn line(&mut self, line: &Value) -> Result<(), Error> {
        let written = writeln!(self.file, "{line}").and_then(|()| self.file.flush());
        written.map_err(|source| Error::io(&self.path, source))
    }

    /// Draws the curves so far, into curves.svg beside the metrics. A picture that cannot be drawn stops nothing.
    pub(crate) fn draw(&self) {
        let drawn = fs::read_to_string(&self.path).and_then(|lines| {
            write_whole(
                &self.path.with_file_name("curves.svg"),
                curves::svg(&lines).as_bytes(),
            )
        });
        if let Err(error) = drawn {
            self.say(&format!("no curves: {error}"));
        }
    }

    pub(crate) fn finish(&self) {
        self.bar.finish_and_clear();
    }
}

/// The mean of both, the older one kept.
pub(crate) fn running(mean: &mut Figures, step: &Figures) {
    if step.tokens == 0 {
        return;
    }
    if mean.tokens == 0 {
        *mean = *step;
        return;
    }
    // Means as sums over the tokens of the last step.
    let (old, new) = (mean.tokens as f64, step.tokens as f64);
    let mix = |mean: f64, step: f64| KEPT * mean / old * new + (1.0 - KEPT) * step;
    *mean = Figures {
        tokens: step.tokens,
        ce: mix(mean.ce, step.ce),
        kl: mix(mean.kl, step.kl),
        right: mix(mean.right as f64, step.right as f64).round() as u64,
    };
}

#[cfg(test)]
mod tests;
