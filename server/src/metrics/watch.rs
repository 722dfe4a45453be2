//! What the engine's thread tells of its requests: when tokens come, how many, and what is in use.
//!
//! Holds a clock for each generation under way. Time is an argument. Start at [`Watch::sees`].

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use engine::{Event, RequestId, Usage};

use super::Metrics;

/// How often a busy engine's usage is told.
const USAGE: Duration = Duration::from_millis(100);

/// The engine's thread's own view of what is counted.
#[derive(Debug)]
pub struct Watch {
    metrics: Arc<Metrics>,
    clocks: HashMap<RequestId, Clock>,
    told: Option<Instant>,
}

#[derive(Debug)]
struct Clock {
    arrived: Instant,
    first: Option<Instant>,
    last: Instant,
    tokens: u32,
}

impl Watch {
    /// Nothing seen yet.
    #[must_use]
    pub fn new(metrics: Arc<Metrics>) -> Self {
        Self {
            metrics,
            clocks: HashMap::new(),
            told: None,
        }
    }

    /// A generation that arrived then goes to the engine.
    pub fn begins(&mut self, request: RequestId, arrived: Instant) {
        self.clocks.insert(
            request,
            Clock {
                arrived,
                first: None,
                last: arrived,
                tokens: 0,
            },
        );
    }

    /// The engine took no such request.
    pub fn refused(&mut self, request: RequestId) {
        self.clocks.remove(&request);
    }

    /// A new version of a session is there.
    pub fn published(&self) {
        self.metrics.versions.add(1);
    }

    /// Something happened, now.
    pub fn sees(&mut self, event: &Event, now: Instant) {
        let metrics = &self.metrics;
        match event {
            Event::Token { request, .. } => {
                metrics.generation_tokens.add(1);
                let Some(clock) = self.clocks.get_mut(request) else {
                    return;
                };
                let since = now.saturating_duration_since(clock.last);
                if clock.first.is_none() {
                    clock.first = Some(now);
                    metrics.first.observe(since);
                } else {
                    metrics.between.observe(since);
                }
                clock.last = now;
                clock.tokens = clock.tokens.saturating_add(1);
            }
            Event::Finished {
                request,
                prompt_tokens,
                timings,
                ..
            } => {
                metrics.prompt_tokens.add(*prompt_tokens);
                let Some(clock) = self.clocks.remove(request) else {
                    return;
                };
                metrics.queue.observe(timings.queue);
                metrics
                    .whole
                    .observe(now.saturating_duration_since(clock.arrived));
                if let Some(first) = clock.first
                    && clock.tokens > 1
                {
                    let decoding = clock.last.saturating_duration_since(first);
                    metrics.per_token.observe(decoding / (clock.tokens - 1));
                }
            }
            Event::Scored { prompt_tokens, .. } => metrics.prompt_tokens.add(*prompt_tokens),
            Event::Encoded { tokens, .. } => metrics.ingest_tokens.add(*tokens),
            Event::Failed { request, .. } => drop(self.clocks.remove(request)),
            Event::Opened { .. }
            | Event::Applied { .. }
            | Event::Read { .. }
            | Event::Forgotten { .. }
            | Event::SessionFailed { .. }
            | Event::Exported { .. }
            | Event::Wanted { .. }
            | Event::Save { .. } => {}
        }
    }

    /// The engine has made a step, and has nothing more to do if `idle`. Usage is told then, and now and then before.
    pub fn stepped(&mut self, idle: bool, now: Instant, usage: impl FnOnce() -> Usage) {
        self.metrics.steps.add(1);
        let due = self
            .told
            .is_none_or(|told| now.saturating_duration_since(told) >= USAGE);
        if idle || due {
            self.told = Some(now);
            self.metrics.set_usage(usage());
        }
    }
}
