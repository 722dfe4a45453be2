//! The pace of running answers: how many other tokens may run beside them.
//!
//! The time between two tokens of an answer is that of a step, whatever else the step does. So what runs beside answers is held
//! to a share of the time that the answers take by themselves: measured, because it depends on machine, model, batch and kernels.
//! No clock: it is told how long forwards took. Steps without anything beside the answers are the measure; where none comes by
//! itself, one in [`FRESH`] is kept free. Start at [`Pace::bulk`].

#[cfg(test)]
mod tests;

use std::time::Duration;

/// A step beside answers may take so many times what the answers take alone.
const SLOWDOWN: f64 = 1.7;
/// Tokens beside answers before anything is known.
const UNKNOWN: usize = 32;
/// Steps after which the measure is taken again.
const FRESH: u64 = 32;
/// Weight of a new measurement of answers alone.
const WEIGHT: f64 = 0.25;
/// What a measurement of answers with others beside them still counts for after the next one. They are noisy, and few tokens the more.
const MEMORY: f64 = 0.95;
/// No measurement counts for more than so many times what is known: it may be that the process was kept waiting.
const OUTLIER: f64 = 8.0;
/// Classes of batches: of 1, 2, 3-4, 5-8, .. answers.
const CLASSES: usize = 24;

/// What forwards have taken.
#[derive(Clone, Debug, Default)]
pub(crate) struct Pace {
    /// By how many answers run: seconds of a forward of theirs alone, and the step that it was last measured in.
    alone: [Option<(f64, u64)>; CLASSES],
    /// Seconds that tokens beside answers have added, and those tokens, the newest counting most.
    added: f64,
    tokens: f64,
    /// Whether the clock goes: a caller's may stand still.
    ticks: bool,
}

impl Pace {
    /// How many tokens may run beside so many answers in this step; `spent` has gone by since their last tokens. At most `most`,
    /// and in a step that is not to measure the answers alone at least 2, which is one for each who is owed one.
    pub(crate) fn bulk(&self, decode: usize, most: usize, spent: Duration, step: u64) -> usize {
        let alone = self.alone.get(class(decode)).copied().flatten();
        let Some((alone, _)) = alone.filter(|(_, at)| step.saturating_sub(*at) < FRESH) else {
            return if self.ticks { 0 } else { most.min(UNKNOWN) };
        };
        if self.tokens == 0.0 {
            return most.min(UNKNOWN);
        }
        // A token takes some time, whatever the clock's grain.
        let token = (self.added / self.tokens).max(alone * 1e-3);
        let left = (alone * (SLOWDOWN - 1.0) - spent.as_secs_f64()).max(0.0);
        // The cast saturates.
        ((left / token) as usize).clamp(2, most.max(2))
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
            self.added = MEMORY * self.added + (took - alone).min(OUTLIER * alone);
            self.tokens = MEMORY * self.tokens + bulk as f64;
        }
    }
}

fn class(decode: usize) -> usize {
    (usize::BITS - decode.saturating_sub(1).leading_zeros()) as usize
}

fn mix(known: f64, new: f64) -> f64 {
    known + WEIGHT * (new.min(OUTLIER * known) - known)
}
