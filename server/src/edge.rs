//! What every call passes on its way in: the bearer key becomes a tenant, a draining server refuses, and a message that cannot be
//! read is the caller's fault, not ours.
//!
//! Also the call's own deadline; and how each call ended is counted. Start at [`Edge`].

mod counted;

use std::{
    convert::Infallible,
    sync::Arc,
    task::{Context, Poll},
    time::{Duration, Instant},
};

use tokio::sync::watch;
use tonic::{
    Code, Request, Status,
    body::Body,
    codegen::{BoxFuture, Service, http},
    metadata::MetadataMap,
    server::NamedService,
};

use crate::{
    auth::{Keys, Tenant},
    metrics::Metrics,
    status::Error,
};

/// How the server's end goes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// It serves.
    #[default]
    Running,
    /// It takes no new calls; running ones go on.
    Draining,
    /// Running ones end now.
    Over,
}

/// A service behind the edge.
#[derive(Clone, Debug)]
pub struct Edge<S> {
    inner: S,
    keys: Keys,
    phase: watch::Receiver<Phase>,
    metrics: Arc<Metrics>,
}

impl<S> Edge<S> {
    /// Puts the edge before a service.
    pub fn new(inner: S, keys: Keys, phase: watch::Receiver<Phase>, metrics: Arc<Metrics>) -> Self {
        Self {
            inner,
            keys,
            phase,
            metrics,
        }
    }

    /// The same edge before another service.
    pub fn before<T>(&self, inner: T) -> Edge<T> {
        Edge {
            inner,
            keys: self.keys.clone(),
            phase: self.phase.clone(),
            metrics: Arc::clone(&self.metrics),
        }
    }
}

impl<S: NamedService> NamedService for Edge<S> {
    const NAME: &'static str = S::NAME;
}

impl<S> Service<http::Request<Body>> for Edge<S>
where
    S: Service<http::Request<Body>, Response = http::Response<Body>, Error = Infallible>
        + NamedService,
    S::Future: Send + 'static,
{
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<Self::Response, Infallible>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, mut request: http::Request<Body>) -> Self::Future {
        let metadata = MetadataMap::from_headers(request.headers().clone());
        let phase = *self.phase.borrow();
        let call = self.metrics.call(S::NAME);
        let checked = if phase == Phase::Running {
            self.keys.tenant(&metadata)
        } else {
            Err(Error::ShuttingDown)
        };
        match checked {
            Ok(tenant) => {
                request.extensions_mut().insert(tenant);
                let answer = self.inner.call(request);
                Box::pin(async move { Ok(counted::counted(blame(answer.await?), call)) })
            }
            Err(error) => {
                let refused = Status::from(error).into_http();
                Box::pin(async move { Ok(counted::counted(refused, call)) })
            }
        }
    }
}

/// Whether a status is tonic's own about a message that could not be decoded (tonic-prost gives prost's text as INTERNAL).
fn is_malformed(code: Code, message: &str) -> bool {
    code == Code::Internal && message.starts_with("failed to decode Protobuf message")
}

/// Whether a status is tonic's own about a message over the limit.
fn is_too_large(code: Code, message: &str) -> bool {
    code == Code::OutOfRange && message.starts_with("Error, decoded message length too large")
}

/// Turns an unreadable request into the caller's error.
fn blame(response: http::Response<Body>) -> http::Response<Body> {
    match Status::from_header_map(response.headers()) {
        Some(status)
            if is_malformed(status.code(), status.message())
                || is_too_large(status.code(), status.message()) =>
        {
            readable(status).into_http()
        }
        _ => response,
    }
}

/// As `blame`, for a message of a stream.
#[must_use]
pub fn readable(status: Status) -> Status {
    if is_malformed(status.code(), status.message()) {
        Error::Malformed(status.message().to_owned()).into()
    } else if is_too_large(status.code(), status.message()) {
        Error::TooLarge(status.message().to_owned()).into()
    } else {
        status
    }
}

/// Who calls.
///
/// # Errors
/// [`Error::Unauthenticated`] for a call that did not pass the edge.
pub fn tenant<T>(request: &Request<T>) -> Result<Tenant, Error> {
    request
        .extensions()
        .get::<Tenant>()
        .cloned()
        .ok_or(Error::Unauthenticated)
}

/// When the call must be answered, by its `grpc-timeout`: a little before the caller gives up, so that the answer still says why.
#[must_use]
pub fn deadline<T>(request: &Request<T>) -> Option<Instant> {
    let timeout = request.metadata().get("grpc-timeout")?.to_str().ok()?;
    let timeout = parse_timeout(timeout)?;
    let margin = (timeout / 10).min(Duration::from_millis(100));
    Instant::now().checked_add(timeout - margin)
}

/// A `grpc-timeout`: up to eight digits and a unit.
fn parse_timeout(timeout: &str) -> Option<Duration> {
    let (digits, unit) = timeout.split_at_checked(timeout.len().checked_sub(1)?)?;
    if digits.len() > 8 || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let count: u64 = digits.parse().ok()?;
    match unit {
        "H" => Some(Duration::from_secs(count * 3600)),
        "M" => Some(Duration::from_secs(count * 60)),
        "S" => Some(Duration::from_secs(count)),
        "m" => Some(Duration::from_millis(count)),
        "u" => Some(Duration::from_micros(count)),
        "n" => Some(Duration::from_nanos(count)),
        _ => None,
    }
}

#[cfg(test)]
mod tests;
