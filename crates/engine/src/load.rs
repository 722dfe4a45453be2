//! What a request that came now would have to wait for, by what was measured.
//!
//! No clock: it is told how long steps took. Prompts that come before it are read at the speed at which prompts were read when there
//! were more than a step could take; if all places are taken, as many answers have to end as wait before it, at the pace at
//! which answers have ended. Nothing measured, nothing waited. Start at [`Load::wait`].

#[cfg(test)]
mod tests;

use std::time::Duration;

/// What a step still counts for after the next one.
const MEMORY: f64 = 0.95;
/// Weight of the newest request.
const WEIGHT: f64 = 0.1;

/// What steps and requests have taken.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Load {
    /// Tokens of prompts in steps that could not take all, and the seconds of those steps, the newest counting most.
    tokens: f64,
    seconds: f64,
    /// Seconds of a request, from its start to its end.
    request: Option<f64>,
}

/// What comes before a new request.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Before {
    /// Tokens of prompts to be read.
    pub(crate) tokens: usize,
    /// Requests that run or wait.
    pub(crate) requests: usize,
    /// Requests that can run at once.
    pub(crate) places: usize,
}

impl Load {
    /// A step read so many tokens of prompts, of so many that it was asked for.
    pub(crate) fn step(&mut self, read: usize, asked: usize, took: Duration) {
        if read > 0 && read < asked && !took.is_zero() {
            self.tokens = MEMORY * self.tokens + read as f64;
            self.seconds = MEMORY * self.seconds + took.as_secs_f64();
        }
    }

    /// A request has ended that long after its start.
    pub(crate) fn ended(&mut self, took: Duration) {
        let took = took.as_secs_f64();
        self.request = Some(match self.request {
            Some(known) => known + WEIGHT * (took - known),
            None => took,
        });
    }

    /// How long a request that came now would wait until its own prompt is read.
    pub(crate) fn wait(&self, before: Before) -> Duration {
        let reading = if self.tokens > 0.0 {
            before.tokens as f64 * self.seconds / self.tokens
        } else {
            0.0
        };
        let beyond = (before.requests + 1).saturating_sub(before.places);
        let ending = beyond as f64 * self.request.unwrap_or(0.0) / before.places.max(1) as f64;
        Duration::try_from_secs_f64(reading.max(ending)).unwrap_or(Duration::MAX)
    }
}
