//! What can go wrong between a client and its server, with the server's own details decoded.
//!
//! A server's refusal carries a code, a machine-readable reason, the fields that it objects to and
//! when to come back (google.rpc.ErrorInfo, BadRequest, RetryInfo). Start at [`Error`].

use std::{collections::BTreeMap, fmt, io, path::PathBuf, time::Duration};

use tonic::{Code, Status};
use tonic_types::StatusExt as _;

/// Why a call did not do what was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The endpoint is no address that this client can speak to.
    #[error("`{endpoint}` is no endpoint: {reason}")]
    Endpoint {
        /// What was given.
        endpoint: String,
        /// Why it will not do.
        reason: String,
    },
    /// The bearer key holds characters that a header cannot carry.
    #[error("the key holds characters that a header cannot carry")]
    Key,
    /// Nobody answers at the endpoint.
    #[error("no server answers at {endpoint}: {reason}")]
    Unreachable {
        /// The address.
        endpoint: String,
        /// What the transport said.
        reason: String,
    },
    /// The server refused.
    #[error(transparent)]
    Refused(Box<Refusal>),
    /// The server broke the contract of `imprint.v1`.
    #[error("the server broke the contract: {what}")]
    Protocol {
        /// What it did.
        what: String,
    },
    /// The server says nothing more, though an answer is due.
    #[error("the server has said nothing for {} s, though an answer is due", after.as_secs_f64())]
    Silent {
        /// How long it was waited for.
        after: Duration,
    },
    /// The stream was finished; it takes nothing more.
    #[error("the stream is finished")]
    Finished,
    /// A file arrived with other bytes than were announced.
    #[error("{file}: {what}")]
    Integrity {
        /// The file's name.
        file: String,
        /// Announced and found.
        what: String,
    },
    /// A local file could not be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// A server's refusal.
#[derive(Debug, Clone, PartialEq)]
pub struct Refusal {
    /// The gRPC code.
    pub code: Code,
    /// The message for people.
    pub message: String,
    /// `ErrorInfo.reason`, e.g. `SESSION_NOT_FOUND`; empty if the server gave none.
    pub reason: String,
    /// `ErrorInfo.metadata`, e.g. `expected_seq`.
    pub metadata: BTreeMap<String, String>,
    /// `BadRequest.field_violations`.
    pub violations: Vec<Violation>,
    /// `RetryInfo.retry_delay`: worth another try after this long; absent if the server did not say.
    pub retry_delay: Option<Duration>,
}

/// A field that the server objects to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation {
    /// Its path in the request, e.g. `sampling.top_p`.
    pub field: String,
    /// What is wrong with it.
    pub description: String,
}

impl Error {
    /// The server's refusal, if that is what this is.
    #[must_use]
    pub fn refusal(&self) -> Option<&Refusal> {
        match self {
            Self::Refused(refusal) => Some(refusal),
            Self::Endpoint { .. }
            | Self::Key
            | Self::Unreachable { .. }
            | Self::Protocol { .. }
            | Self::Silent { .. }
            | Self::Finished
            | Self::Integrity { .. }
            | Self::Io { .. } => None,
        }
    }

    /// The gRPC code of a refusal.
    #[must_use]
    pub fn code(&self) -> Option<Code> {
        self.refusal().map(|refusal| refusal.code)
    }

    pub(crate) fn protocol(what: impl Into<String>) -> Self {
        Self::Protocol { what: what.into() }
    }
}

impl Refusal {
    /// The `seq` that the server wants next, when a chunk left a gap.
    #[must_use]
    pub fn expected_seq(&self) -> Option<u64> {
        self.metadata.get("expected_seq")?.parse().ok()
    }
}

impl From<Status> for Error {
    fn from(status: Status) -> Self {
        Self::Refused(Box::new(Refusal::from(&status)))
    }
}

impl From<&Status> for Refusal {
    fn from(status: &Status) -> Self {
        let info = status.get_details_error_info();
        let (reason, metadata) = match info {
            Some(info) => (info.reason, info.metadata.into_iter().collect()),
            None => (String::new(), BTreeMap::new()),
        };
        let violations = status
            .get_details_bad_request()
            .map_or_else(Vec::new, |bad| {
                bad.field_violations
                    .into_iter()
                    .map(|violation| Violation {
                        field: violation.field,
                        description: violation.description,
                    })
                    .collect()
            });
        Self {
            code: status.code(),
            message: status.message().to_owned(),
            reason,
            metadata,
            violations,
            retry_delay: status
                .get_details_retry_info()
                .and_then(|info| info.retry_delay),
        }
    }
}

impl std::error::Error for Refusal {}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.message.is_empty() {
            f.write_str(code_name(self.code))?;
        } else {
            f.write_str(&self.message)?;
        }
        let reason = if self.reason.is_empty() {
            code_name(self.code)
        } else {
            &self.reason
        };
        write!(f, " ({reason})")?;
        for Violation { field, description } in &self.violations {
            write!(f, "\n  {field}: {description}")?;
        }
        if let Some(delay) = self.retry_delay {
            write!(f, "\n  worth another try in {:.1} s", delay.as_secs_f64())?;
        }
        Ok(())
    }
}

/// A gRPC code by its name in the standard.
pub(crate) fn code_name(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELLED",
        Code::Unknown => "UNKNOWN",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::AlreadyExists => "ALREADY_EXISTS",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Aborted => "ABORTED",
        Code::OutOfRange => "OUT_OF_RANGE",
        Code::Unimplemented => "UNIMPLEMENTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        Code::DataLoss => "DATA_LOSS",
        Code::Unauthenticated => "UNAUTHENTICATED",
    }
}

#[cfg(test)]
mod tests;
