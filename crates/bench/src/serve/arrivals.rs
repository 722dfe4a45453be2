//! When something is asked, of which session: an open loop that does not wait for answers.
//!
//! All of it follows from a seed, before anything is sent. Start at [`Plan::new`].

use std::{path::Path, time::Duration};

use anyhow::{Context, Result, ensure};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// The most arrivals of a run.
const MOST: usize = 1 << 20;

/// What an arrival does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Asks a question.
    Ask,
    /// Tells something new.
    Ingest,
}

/// Something to be sent.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Arrival {
    /// When, from the beginning of the load.
    pub(crate) at: Duration,
    /// Of which session.
    pub(crate) session: usize,
    pub(crate) kind: Kind,
    /// A number of its own to choose a question or a text by.
    pub(crate) draw: u64,
}

/// Random numbers of a seed, for one purpose.
pub(crate) struct Random(ChaCha8Rng);

impl Random {
    pub(crate) fn new(seed: u64, purpose: u64) -> Self {
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        random.set_stream(purpose);
        Self(random)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0.next_u64()
    }

    /// In [0, 1).
    #[expect(clippy::cast_precision_loss, reason = "53 bits are exact")]
    pub(crate) fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1_u64 << 53) as f64
    }

    /// One of so many, all alike; 0 of none. The bias is below count / 2^64.
    #[expect(clippy::cast_possible_truncation, reason = "the result is below count")]
    pub(crate) fn below(&mut self, count: usize) -> usize {
        ((u128::from(self.next()) * count as u128) >> 64) as usize
    }
}

/// Which of so many sessions, the first the most often: the k-th in proportion to 1 / k^exponent.
pub(crate) struct Zipf {
    /// Rising to 1.
    cumulative: Vec<f64>,
}

impl Zipf {
    #[expect(
        clippy::cast_precision_loss,
        reason = "numbers of sessions are far below 2^52"
    )]
    pub(crate) fn new(sessions: usize, exponent: f64) -> Self {
        let mut sum = 0.0;
        let mut cumulative: Vec<_> = (1..=sessions)
            .map(|rank| {
                sum += (rank as f64).powf(-exponent);
                sum
            })
            .collect();
        for value in &mut cumulative {
            *value /= sum;
        }
        Self { cumulative }
    }

    pub(crate) fn draw(&self, random: &mut Random) -> usize {
        let unit = random.unit();
        self.cumulative
            .partition_point(|value| *value <= unit)
            .min(self.cumulative.len().saturating_sub(1))
    }
}

/// How much arrives, and how it is spread.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    pub(crate) sessions: usize,
    pub(crate) zipf: f64,
    pub(crate) ingest_share: f64,
    pub(crate) seed: u64,
}

/// All that will be sent, in order.
#[derive(Debug)]
pub(crate) struct Plan(pub(crate) Vec<Arrival>);

impl Plan {
    /// Puts sessions and kinds to times.
    pub(crate) fn new(times: impl IntoIterator<Item = Duration>, shape: Shape) -> Self {
        let zipf = Zipf::new(shape.sessions, shape.zipf);
        let mut random = Random::new(shape.seed, 1);
        let arrivals = times.into_iter().map(|at| {
            let session = zipf.draw(&mut random);
            let kind = if random.unit() < shape.ingest_share {
                Kind::Ingest
            } else {
                Kind::Ask
            };
            let draw = random.next();
            Arrival {
                at,
                session,
                kind,
                draw,
            }
        });
        Self(arrivals.collect())
    }
}

/// Times of a Poisson process of `rate` a second, all below `until`.
pub(crate) fn poisson(rate: f64, until: Duration, seed: u64) -> Result<Vec<Duration>> {
    let expected = rate * until.as_secs_f64();
    #[expect(
        clippy::cast_precision_loss,
        reason = "a bound, whatever its last digits"
    )]
    let most = MOST as f64 / 2.0;
    ensure!(
        rate > 0.0 && expected < most,
        "{rate} requests a second for {until:?} are none, or too many"
    );
    let mut random = Random::new(seed, 2);
    let mut times = Vec::new();
    let mut at = 0.0;
    loop {
        at -= (1.0 - random.unit()).ln() / rate;
        if at >= until.as_secs_f64() || times.len() >= MOST {
            return Ok(times);
        }
        times.push(Duration::from_secs_f64(at));
    }
}

/// Times of a file, in seconds from the beginning, one a line; lines that begin with `#` say nothing.
pub(crate) fn trace(path: &Path, until: Duration) -> Result<Vec<Duration>> {
    let text = std::fs::read_to_string(path)
        .with_context(|| format!("{} cannot be read", path.display()))?;
    parse_trace(&text, until).with_context(|| path.display().to_string())
}

fn parse_trace(text: &str, until: Duration) -> Result<Vec<Duration>> {
    let lines = text.lines().enumerate().filter(|(_, line)| {
        let line = line.trim();
        !line.is_empty() && !line.starts_with('#')
    });
    let mut times = Vec::new();
    for (number, line) in lines {
        let seconds: Option<f64> = line.trim().parse().ok();
        let time = seconds.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
        let time = time.with_context(|| format!("line {}: {line:?} are no seconds", number + 1))?;
        ensure!(times.len() < MOST, "more than {MOST} arrivals");
        times.push(time);
    }
    times.sort();
    times.retain(|time| *time < until);
    ensure!(!times.is_empty(), "nothing arrives within {until:?}");
    Ok(times)
}

#[cfg(test)]
mod tests;
