//! What the server counts of itself, for Prometheus: names in the spirit of vLLM's, no label that grows with sessions or tenants.
//!
//! Recording is an atomic addition; nothing is kept of single requests once they have ended. The engine's thread tells tokens and
//! usage ([`Watch`]), the edge tells how calls end ([`Call`]). How it is written stands in `text`, who asks for it in `http`.
//! Start at [`Metrics`].

mod histogram;
pub mod http;
#[cfg(test)]
mod tests;
mod text;
mod watch;

use std::sync::{
    Arc, Mutex, PoisonError,
    atomic::{AtomicI64, AtomicU64, Ordering},
};

use engine::Usage;
use imprint_proto::v1::FinishReason;
use tonic::Code;

use self::histogram::Histogram;
pub use self::watch::Watch;

/// Seconds to a first token.
const FIRST: &[f64] = &[
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0,
];
/// Seconds between two tokens.
const BETWEEN: &[f64] = &[
    0.001, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0,
    7.5, 10.0,
];
/// Seconds of a whole answer.
const WHOLE: &[f64] = &[
    0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0,
    240.0,
];

/// The services of the contract, the only ones that calls are counted of.
const SERVICES: [&str; 5] = [
    "imprint.v1.AdapterService",
    "imprint.v1.ContextService",
    "imprint.v1.GenerationService",
    "imprint.v1.ModelService",
    "imprint.v1.SessionService",
];
/// The codes of gRPC by number, as they are spelled in its specification.
const CODES: [&str; 17] = [
    "OK",
    "CANCELLED",
    "UNKNOWN",
    "INVALID_ARGUMENT",
    "DEADLINE_EXCEEDED",
    "NOT_FOUND",
    "ALREADY_EXISTS",
    "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",
    "FAILED_PRECONDITION",
    "ABORTED",
    "OUT_OF_RANGE",
    "UNIMPLEMENTED",
    "INTERNAL",
    "UNAVAILABLE",
    "DATA_LOSS",
    "UNAUTHENTICATED",
];

/// How a generation ended, as the label says it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// By itself, as this reason has it.
    Finished(FinishReason),
    /// The reader went away.
    Abort,
    /// With an error.
    Error,
}

const ENDS: [&str; 5] = ["stop", "length", "shutdown", "abort", "error"];

impl End {
    fn index(self) -> usize {
        match self {
            Self::Finished(FinishReason::Eos | FinishReason::Stop) => 0,
            Self::Finished(FinishReason::Length) => 1,
            Self::Finished(FinishReason::Shutdown) => 2,
            Self::Abort => 3,
            Self::Error | Self::Finished(FinishReason::Unspecified) => 4,
        }
    }
}

/// What only grows.
#[derive(Debug, Default)]
struct Counter(AtomicU64);

impl Counter {
    fn add(&self, more: usize) {
        self.0.fetch_add(more as u64, Ordering::Relaxed);
    }

    fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// All that is counted.
#[derive(Debug)]
pub struct Metrics {
    /// The model's name on this server.
    model: String,
    usage: Mutex<Usage>,
    prompt_tokens: Counter,
    generation_tokens: Counter,
    ingest_tokens: Counter,
    versions: Counter,
    steps: Counter,
    ends: [Counter; ENDS.len()],
    first: Histogram,
    between: Histogram,
    per_token: Histogram,
    whole: Histogram,
    queue: Histogram,
    calls: [AtomicI64; SERVICES.len()],
    codes: [[Counter; CODES.len()]; SERVICES.len()],
}

impl Metrics {
    /// Nothing counted yet, of a server of the model of this name.
    #[must_use]
    pub fn new(model: &str) -> Self {
        Self {
            model: model.to_owned(),
            usage: Mutex::default(),
            prompt_tokens: Counter::default(),
            generation_tokens: Counter::default(),
            ingest_tokens: Counter::default(),
            versions: Counter::default(),
            steps: Counter::default(),
            ends: Default::default(),
            first: Histogram::new(FIRST),
            between: Histogram::new(BETWEEN),
            per_token: Histogram::new(BETWEEN),
            whole: Histogram::new(WHOLE),
            queue: Histogram::new(FIRST),
            calls: Default::default(),
            codes: Default::default(),
        }
    }

    /// A generation has ended.
    pub fn ended(&self, end: End) {
        self.ends[end.index()].add(1);
    }

    /// A call of this service begins; none is counted of services that are not of the contract.
    #[must_use]
    pub fn call(self: &Arc<Self>, service: &str) -> Call {
        let service = SERVICES.iter().position(|name| *name == service);
        if let Some(service) = service {
            self.calls[service].fetch_add(1, Ordering::Relaxed);
        }
        Call {
            metrics: Arc::clone(self),
            service,
            code: Code::Cancelled,
        }
    }

    fn set_usage(&self, usage: Usage) {
        // A plain value: whole whatever panicked meanwhile.
        *self.usage.lock().unwrap_or_else(PoisonError::into_inner) = usage;
    }

    /// What was in use a moment ago.
    #[must_use]
    pub fn usage(&self) -> Usage {
        *self.usage.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A call under way. Dropped without a code it was cancelled: its client has gone.
#[derive(Debug)]
pub struct Call {
    metrics: Arc<Metrics>,
    service: Option<usize>,
    code: Code,
}

impl Call {
    /// The call's answer carries this code.
    pub fn ends(&mut self, code: Code) {
        self.code = code;
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        if let Some(service) = self.service {
            self.metrics.calls[service].fetch_sub(1, Ordering::Relaxed);
            self.metrics.codes[service][self.code as usize].add(1);
        }
    }
}
