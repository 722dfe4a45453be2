//! The pace of running answers: how much else may run beside them.
//!
//! The time between two tokens of an answer is that of a step, whatever else the step does. So what runs beside answers is held
//! to a share of the time that the answers take by themselves: measured, because it depends on machine, model, batch and kernels.
//! Tokens beside answers cost something each, and something for there being any at all: a line is laid through what was measured, and
//! now and then a step takes half as many, so that it has two ends. Read-outs go in portions, as many as there is time for.
//! No clock: it is told how long things took. Steps without anything beside the answers are the measure; where none comes by
//! itself, one in [`FRESH`] is kept free. Start at [`Pace::bulk`].

mod line;
#[cfg(test)]
mod tests;

use std::time::{Duration, Instant};

use self::line::Line;

/// A step beside answers may take so many times what the answers take alone.
const SLOWDOWN: f64 = 1.7;
/// Tokens beside answers before anything is known.
const UNKNOWN: usize = 32;
/// The fewest tokens beside answers: one for each class that is owed one.
const LEAST: usize = 2;
/// Steps after which the measure is taken again.
const FRESH: u64 = 32;
/// One step in so many takes half the tokens.
const HALF: u64 = 8;
/// Weight of a new measurement of answers alone, and of portions.
const WEIGHT: f64 = 0.25;
/// No measurement counts for more than so many times what is known: it may be that the process was kept waiting.
const OUTLIER: f64 = 8.0;
/// Classes of batches: of 1, 2, 3-4, 5-8, .. answers.
const CLASSES: usize = 24;

/// What forwards have taken.
#[derive(Clone, Debug, Default)]
pub(crate) struct Pace {
    /// By how many answers run: seconds of a forward of theirs alone, and the step that it was last measured in.
    alone: [Option<(f64, u64)>; CLASSES],
    /// Seconds that tokens beside answers add.
    added: Line,
    /// Seconds of a portion.
    portion: f64,
    /// Whether the clock goes: a caller's may stand still.
    ticks: bool,
}

impl Pace {
    /// How many tokens may run beside so many answers in this step; `spent` has gone by since their last tokens. At most `most`,
    /// and in a step that is not to measure the answers alone at least [`LEAST`].
    pub(crate) fn bulk(&self, decode: usize, most: usize, spent: Duration, step: u64) -> usize {
        let alone = self.alone.get(class(decode)).copied().flatten();
        let Some((alone, _)) = alone.filter(|(_, at)| step.saturating_sub(*at) < FRESH) else {
            return if self.ticks { 0 } else { most.min(UNKNOWN) };
        };
        let Some((fixed, token)) = self.added.fixed_and_each() else {
            return most.min(UNKNOWN);
        };
        // A token takes some time, whatever the clock's grain.
        let token = token.max(alone * 1e-3);
        let left = alone * (SLOWDOWN - 1.0) - fixed - spent.as_secs_f64();
        // The cast saturates.
        let tokens = (left.max(0.0) / token) as usize;
        let tokens = if step.is_multiple_of(HALF) {
            tokens / 2
        } else {
            tokens
        };
        tokens.clamp(LEAST, most.max(LEAST))
    }

    /// Whether the fewest tokens beside so many answers would take longer than is left for them.
    pub(crate) fn is_over(&self, decode: usize, spent: Duration) -> bool {
        let (fixed, token) = self.added.fixed_and_each().unwrap_or_default();
        let least = fixed + token * LEAST as f64;
        spent.as_secs_f64() + least > self.spare(decode).as_secs_f64()
    }

    /// The time that others may take of a step of so many answers.
    fn spare(&self, decode: usize) -> Duration {
        let alone = self.alone.get(class(decode)).copied().flatten();
        let alone = alone.map_or(0.0, |(alone, _)| alone);
        Duration::from_secs_f64(alone * (SLOWDOWN - 1.0))
    }

    /// What may be read out beside so many answers whose last tokens came then: one portion that is owed in any case, unless others come
    /// first.
    pub(crate) fn portions(&self, decode: usize, drawn: Instant, others_first: bool) -> Portions {
        if !self.ticks {
            return Portions::all();
        }
        Portions {
            until: drawn.checked_add(self.spare(decode)),
            each: Duration::from_secs_f64(self.portion),
            none: others_first,
            owed: true,
            since: None,
            given: 0,
        }
    }

    /// Takes note of what was read out by now.
    pub(crate) fn read_out(&mut self, portions: &Portions, now: Instant) {
        if portions.given > 0 && portions.until.is_some() {
            let took = portions.took(now).as_secs_f64() / portions.given as f64;
            self.portion = if self.portion > 0.0 {
                mix(self.portion, took)
            } else {
                took
            };
        }
    }

    /// Takes note of a forward of so many answers and so many tokens beside them.
    pub(crate) fn saw(&mut self, decode: usize, bulk: usize, took: Duration, step: u64) {
        let took = took.as_secs_f64();
        if took <= 0.0 || decode == 0 {
            return;
        }
        self.ticks = true;
        let Some(alone) = self.alone.get_mut(class(decode)) else {
            return;
        };
        if bulk == 0 {
            let seconds = alone.map_or(took, |(known, _)| mix(known, took));
            *alone = Some((seconds, step));
        } else if let Some((alone, _)) = *alone {
            self.added.saw(bulk as f64, took - alone, alone);
        }
    }
}

/// The portions of read-outs of one step.
#[derive(Debug)]
pub(crate) struct Portions {
    /// When they have to be done; none where nobody waits.
    until: Option<Instant>,
    each: Duration,
    none: bool,
    /// Whether one is given however late it is.
    owed: bool,
    /// When the first was given.
    since: Option<Instant>,
    given: usize,
}

impl Portions {
    /// As many as there are.
    pub(crate) fn all() -> Self {
        Self {
            until: None,
            each: Duration::ZERO,
            none: false,
            owed: true,
            since: None,
            given: 0,
        }
    }

    /// Owes one to others than those that were given some.
    pub(crate) fn owe(&mut self) {
        self.owed = true;
    }

    /// Whether there may be another one.
    pub(crate) fn more(&mut self, now: Instant) -> bool {
        let fits = |until| now.checked_add(self.each).is_some_and(|end| end <= until);
        let more = match self.until {
            None => true,
            Some(until) => !self.none && (self.owed || fits(until)),
        };
        if more {
            self.owed = false;
            self.since.get_or_insert(now);
            self.given += 1;
        }
        more
    }

    /// How long they took, by now.
    fn took(&self, now: Instant) -> Duration {
        let since = self.since.unwrap_or(now);
        now.saturating_duration_since(since)
    }

    /// How many there were.
    pub(crate) fn given(&self) -> usize {
        self.given
    }
}

fn class(decode: usize) -> usize {
    (usize::BITS - decode.saturating_sub(1).leading_zeros()) as usize
}

fn mix(known: f64, new: f64) -> f64 {
    known + WEIGHT * (new.min(OUTLIER * known) - known)
}
