//! The services of the contract, one file each, and what they share.
//!
//! They check what came, ask sessions and engine, and put the answer into messages; errors become codes in `status`. Start at
//! [`context`] for a chunk's way in, at [`generation`] for an answer's way out.

pub mod adapter;
pub mod context;
pub mod generation;
pub mod model;
pub mod session;

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use engine::{RequestId, TokenId};
use imprint_proto::v1;
use lm::text::Text;
use tokio::sync::watch;

use crate::{
    auth::Tenant,
    edge::Phase,
    engine_thread::Handle,
    metrics::Metrics,
    places::{Place, Places},
    sessions::Sessions,
    status::Error,
};

/// What all services share.
pub struct Shared {
    /// The sessions.
    pub sessions: Sessions,
    /// The way to the engine.
    pub engine: Handle,
    /// Tokenizer and chat template.
    pub text: Text,
    /// The model's name on this server.
    pub model: String,
    /// Bytes of a prompt or of a continuation.
    pub prompt_bytes: usize,
    /// How long a request without a deadline waits for a version.
    pub wait: Duration,
    /// How long an ingest stream may take to say which session it is about.
    pub open_wait: Duration,
    /// What is counted.
    pub metrics: Arc<Metrics>,
    /// Calls of the engine at once.
    pub requests: Arc<Places>,
    /// Ingest streams at once.
    pub streams: Arc<Places>,
    /// How the server's end goes.
    pub phase: watch::Receiver<Phase>,
    /// Number of the next request.
    pub next_request: AtomicU64,
}

impl Shared {
    fn request_id(&self) -> RequestId {
        RequestId(self.next_request.fetch_add(1, Ordering::Relaxed))
    }

    /// What begins a text where model and generator call for it.
    #[must_use]
    pub fn bos(engine: &Handle, text: &Text) -> Option<TokenId> {
        let model = engine.model();
        let wanted = model
            .generator
            .as_ref()
            .and_then(|generator| generator.bos)
            .unwrap_or_else(|| text.adds_bos());
        text.bos().or(model.bos).filter(|_| wanted)
    }

    /// Takes a place for a request, unless by what was measured its time would be over before it had a turn.
    fn admit(&self, tenant: &Tenant, deadline: Option<Instant>) -> Result<Place, Error> {
        let wait = self.metrics.usage().wait;
        if deadline
            .is_some_and(|deadline| deadline.saturating_duration_since(Instant::now()) < wait)
        {
            return Err(Error::TooLate { wait });
        }
        self.requests.take(tenant)
    }

    /// Whether the name is the model's, or empty.
    fn check_model(&self, name: &str) -> Result<(), Error> {
        if name.is_empty() || name == self.model {
            Ok(())
        } else {
            Err(Error::UnknownModel(name.to_owned()))
        }
    }
}

/// Resolves when the phase is reached; never if the server is gone without.
async fn reached(phase: &mut watch::Receiver<Phase>, wanted: Phase) {
    if phase.wait_for(|phase| *phase >= wanted).await.is_err() {
        std::future::pending::<()>().await;
    }
}

/// Resolves at that time; never without one.
async fn at(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline.into()).await,
        None => std::future::pending().await,
    }
}

fn duration(duration: Duration) -> prost_types::Duration {
    let seconds = i64::try_from(duration.as_secs()).unwrap_or(i64::MAX);
    prost_types::Duration {
        seconds,
        nanos: duration.subsec_nanos().cast_signed(),
    }
}

fn timestamp(time: SystemTime) -> prost_types::Timestamp {
    let since = duration(time.duration_since(UNIX_EPOCH).unwrap_or_default());
    prost_types::Timestamp {
        seconds: since.seconds,
        nanos: since.nanos,
    }
}

fn strategy(strategy: engine::Strategy) -> v1::Strategy {
    match strategy {
        engine::Strategy::Concat => v1::Strategy::Concat,
        engine::Strategy::Parallel => v1::Strategy::Parallel,
        engine::Strategy::Sequential => v1::Strategy::Sequential,
    }
}

fn count(number: usize) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}
