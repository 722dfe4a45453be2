//! What can go wrong for a caller, and what a caller is told.
//!
//! One enum, and one `match` that maps each variant to its gRPC code, reason and details; no variant is left to a default.
//! Start at [`Error`].

#[cfg(test)]
mod tests;

use std::{collections::HashMap, time::Duration};

use engine::{RequestError, SessionError};
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, FieldViolation, StatusExt};

/// The `domain` of our ErrorInfo.
pub const DOMAIN: &str = "imprint";
/// When to try again if the server is full.
const RETRY: Duration = Duration::from_millis(500);
/// The longest that a caller is told to wait.
const MAX_RETRY: Duration = Duration::from_secs(60);

/// Characters of a client's text that are told back.
const ECHO: usize = 64;
/// Violations that are told.
const VIOLATIONS: usize = 16;
/// Characters of a message that may quote what a client sent.
const MESSAGE: usize = 256;

/// The beginning of a client's text, as much as is told back.
#[must_use]
pub fn echo(text: &str) -> String {
    cut(text, ECHO)
}

fn cut(text: &str, characters: usize) -> String {
    text.chars().take(characters).collect()
}

/// A field that is not as it must be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// Path of the field in the request.
    pub field: String,
    /// What is wrong with it.
    pub why: String,
}

impl Violation {
    /// A violation of this field.
    pub fn new(field: impl Into<String>, why: impl Into<String>) -> Self {
        Self {
            field: field.into(),
            why: why.into(),
        }
    }
}

/// Why a call has no answer.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The request itself is wrong, in these fields.
    #[error("{}", .0.iter().take(VIOLATIONS).map(|violation| format!("{} {}", violation.field, violation.why)).collect::<Vec<_>>().join("; "))]
    Invalid(Vec<Violation>),
    /// The message is no Protobuf, or holds text that is not UTF-8.
    #[error("the message cannot be read: {0}")]
    Malformed(String),
    /// The message is larger than the server reads.
    #[error("the message is too large: {0}")]
    TooLarge(String),
    /// No bearer key, or one that is not ours.
    #[error("a bearer key is required")]
    Unauthenticated,
    /// The caller has no such session.
    #[error("no session `{}`", echo(.0))]
    UnknownSession(String),
    /// The server has no such model.
    #[error("no model `{}`", echo(.0))]
    UnknownModel(String),
    /// The session has no such document.
    #[error("no document `{}`", echo(.0))]
    UnknownDocument(String),
    /// Another request came under this `request_id` before.
    #[error("another request came as `{}` before", echo(.0))]
    RequestReused(String),
    /// The server holds all the sessions it may.
    #[error("the server holds all the {limit} sessions it may")]
    TooManySessions {
        /// The most sessions.
        limit: usize,
    },
    /// The server is busy with all the calls it may be.
    #[error("the server is busy with all the {what} it may be")]
    Busy {
        /// The calls.
        what: &'static str,
    },
    /// Too much comes before the request: its time would be over before its turn.
    #[error("the wait would be {} ms, longer than the deadline leaves", .wait.as_millis())]
    TooLate {
        /// The wait, by what was measured.
        wait: Duration,
    },
    /// The session's log refuses.
    #[error(transparent)]
    Store(#[from] store::Error),
    /// The engine refuses context.
    #[error(transparent)]
    Context(SessionError),
    /// The engine refuses a request.
    #[error(transparent)]
    Request(RequestError),
    /// Text cannot be tokenised, or a conversation not be rendered.
    #[error(transparent)]
    Text(#[from] lm::text::Error),
    /// The server runs without a generator.
    #[error(
        "the server runs without a generator: there are no sessions, only the bare model answers"
    )]
    NoGenerator,
    /// The generator's config names no format for questions.
    #[error("the generator names no format for questions; use `text` or `chat`")]
    NoPromptFormat,
    /// A chunk that the request wants in its adapter has not come.
    #[error("chunk {want} has not come by the deadline; {accepted} is the last")]
    NotArrived {
        /// The chunk.
        want: u64,
        /// The last one that came.
        accepted: u64,
    },
    /// The deadline is over.
    #[error("the deadline is over: {0}")]
    Deadline(&'static str),
    /// The server ends.
    #[error("the server is shutting down")]
    ShuttingDown,
    /// The engine is broken or gone.
    #[error("the engine has stopped")]
    EngineStopped,
    /// Something that should not be.
    #[error("internal: {0}")]
    Internal(&'static str),
}

/// Code, reason, metadata, field violations and retry delay of an error.
struct Answer {
    code: Code,
    reason: &'static str,
    metadata: Vec<(&'static str, String)>,
    violations: Vec<Violation>,
    retry: Option<Duration>,
}

fn answer(code: Code, reason: &'static str) -> Answer {
    Answer {
        code,
        reason,
        metadata: Vec::new(),
        violations: Vec::new(),
        retry: None,
    }
}

impl Answer {
    fn with(mut self, key: &'static str, value: impl ToString) -> Self {
        self.metadata.push((key, echo(&value.to_string())));
        self
    }

    fn field(mut self, field: &str, why: impl Into<String>) -> Self {
        self.violations.push(Violation::new(field, why));
        self
    }

    fn retry(mut self) -> Self {
        self.retry = Some(RETRY);
        self
    }
}

/// What a person reads of an error. The log's names are bounded, but not as tightly as what is told back.
fn message(error: &Error) -> String {
    match error {
        Error::Store(store) => match store {
            store::Error::UnknownSession(name) => {
                store::Error::UnknownSession(echo(name)).to_string()
            }
            store::Error::SessionExists(name) => {
                store::Error::SessionExists(echo(name)).to_string()
            }
            store::Error::UnknownDocument(name) => {
                store::Error::UnknownDocument(echo(name)).to_string()
            }
            store::Error::NameUsed(name) => store::Error::NameUsed(echo(name)).to_string(),
            store::Error::MixedContent(name) => store::Error::MixedContent(echo(name)).to_string(),
            store::Error::Gap { .. }
            | store::Error::Conflict { .. }
            | store::Error::EmptyChunk
            | store::Error::NameTooLong { .. }
            | store::Error::Full { .. } => store.to_string(),
        },
        Error::Text(_) | Error::Malformed(_) | Error::TooLarge(_) => {
            cut(&error.to_string(), MESSAGE)
        }
        error => error.to_string(),
    }
}

/// The one place where an error becomes a code.
fn map(error: &Error) -> Answer {
    use Code::{
        AlreadyExists, DeadlineExceeded, FailedPrecondition, Internal, InvalidArgument, NotFound,
        ResourceExhausted, Unauthenticated, Unavailable,
    };
    let text = message(error);
    match error {
        Error::Invalid(violations) => Answer {
            violations: violations.iter().take(VIOLATIONS).cloned().collect(),
            ..answer(InvalidArgument, "INVALID_ARGUMENT")
        },
        Error::Malformed(_) => answer(InvalidArgument, "MALFORMED_MESSAGE").field("", text),
        Error::TooLarge(_) => answer(ResourceExhausted, "MESSAGE_TOO_LARGE").field("", text),
        Error::Unauthenticated => answer(Unauthenticated, "UNAUTHENTICATED"),
        Error::UnknownSession(session) => {
            answer(NotFound, "SESSION_NOT_FOUND").with("session_id", session)
        }
        Error::UnknownModel(model) => answer(NotFound, "MODEL_NOT_FOUND").with("model", model),
        Error::UnknownDocument(document) => {
            answer(NotFound, "DOCUMENT_NOT_FOUND").with("document_id", document)
        }
        Error::RequestReused(request) => {
            answer(AlreadyExists, "REQUEST_ID_REUSED").with("request_id", request)
        }
        Error::TooManySessions { limit } => answer(ResourceExhausted, "TOO_MANY_SESSIONS")
            .with("limit", limit)
            .retry(),
        Error::Busy { what } => answer(ResourceExhausted, "BUSY").with("what", what).retry(),
        Error::TooLate { wait } => Answer {
            // Until what comes before is done.
            retry: Some((*wait).clamp(RETRY, MAX_RETRY)),
            ..answer(ResourceExhausted, "WAIT_EXCEEDS_DEADLINE").with("wait_ms", wait.as_millis())
        },
        Error::Store(store) => match store {
            store::Error::UnknownSession(session) => {
                answer(NotFound, "SESSION_NOT_FOUND").with("session_id", session)
            }
            store::Error::SessionExists(session) => {
                answer(Internal, "SESSION_EXISTS").with("session_id", session)
            }
            store::Error::UnknownDocument(name) => {
                answer(NotFound, "DOCUMENT_NOT_FOUND").with("document_id", name)
            }
            store::Error::Gap { want, got } => answer(FailedPrecondition, "SEQ_GAP")
                .with("expected_seq", want)
                .with("seq", got),
            store::Error::Conflict { seq } => {
                answer(AlreadyExists, "SEQ_CONFLICT").with("seq", seq)
            }
            store::Error::EmptyChunk => {
                answer(InvalidArgument, "EMPTY_CHUNK").field("chunk.content", text)
            }
            store::Error::NameTooLong { bytes, limit } => {
                answer(InvalidArgument, "DOCUMENT_ID_TOO_LONG")
                    .with("bytes", bytes)
                    .with("limit", limit)
                    .field("chunk.document_id", text)
            }
            store::Error::NameUsed(name) => {
                answer(FailedPrecondition, "DOCUMENT_CLOSED").with("document_id", name)
            }
            store::Error::MixedContent(name) => answer(InvalidArgument, "MIXED_CONTENT")
                .with("document_id", name)
                .field("chunk.content", text),
            store::Error::Full { what, limit } => answer(ResourceExhausted, "SESSION_FULL")
                .with("what", what)
                .with("limit", limit),
        },
        Error::Context(context) => match context {
            SessionError::UnknownSession { .. } => answer(NotFound, "SESSION_NOT_FOUND"),
            SessionError::SessionExists { .. } => answer(Internal, "SESSION_EXISTS"),
            SessionError::TooManySessions { limit } => {
                answer(ResourceExhausted, "TOO_MANY_SESSIONS")
                    .with("limit", limit)
                    .retry()
            }
            SessionError::NoGenerator => answer(FailedPrecondition, "NO_GENERATOR"),
            SessionError::Window {
                tokens,
                least,
                limit,
            } => answer(InvalidArgument, "WINDOW_OUT_OF_RANGE")
                .with("tokens", tokens)
                .with("least", least)
                .with("limit", limit)
                .field("window", text),
            SessionError::UnknownDocument { .. } => answer(NotFound, "DOCUMENT_NOT_FOUND"),
            SessionError::DocumentClosed { .. } => answer(FailedPrecondition, "DOCUMENT_CLOSED"),
            SessionError::DocumentOpen { .. } => answer(Internal, "DOCUMENT_OPEN"),
            SessionError::NoOpenDocument => answer(Internal, "NO_OPEN_DOCUMENT"),
            SessionError::DocumentTooLong { tokens, limit } => {
                answer(FailedPrecondition, "DOCUMENT_TOO_LONG")
                    .with("tokens", tokens)
                    .with("limit", limit)
            }
            SessionError::TooManyDocuments { limit } => answer(ResourceExhausted, "SESSION_FULL")
                .with("what", "documents")
                .with("limit", limit),
            SessionError::TooManyTokens { tokens, limit } => {
                answer(ResourceExhausted, "SESSION_FULL")
                    .with("what", "tokens")
                    .with("tokens", tokens)
                    .with("limit", limit)
            }
            SessionError::StateBudget { bytes, limit } => answer(ResourceExhausted, "STATE_BUDGET")
                .with("bytes", bytes)
                .with("limit", limit)
                .retry(),
            SessionError::CoreBudget { bytes, limit } => answer(ResourceExhausted, "CORE_BUDGET")
                .with("bytes", bytes)
                .with("limit", limit)
                .retry(),
            SessionError::ReadOut { .. } => answer(Internal, "READ_OUT"),
            SessionError::TokenOutOfRange { token, vocab } => {
                answer(InvalidArgument, "TOKEN_OUT_OF_RANGE")
                    .with("token", token.0)
                    .with("vocab_size", vocab)
                    .field("chunk.token_ids", text)
            }
        },
        Error::Request(request) => match request {
            RequestError::UnknownSession { .. } | RequestError::SessionClosed { .. } => {
                answer(NotFound, "SESSION_NOT_FOUND")
            }
            RequestError::NotRestored { .. } => answer(Unavailable, "NOT_RESTORED").retry(),
            RequestError::RequestExists => answer(Internal, "REQUEST_EXISTS"),
            RequestError::ContextLength { tokens, limit } => {
                answer(InvalidArgument, "CONTEXT_LENGTH")
                    .with("tokens", tokens)
                    .with("limit", limit)
                    .field("prompt", text)
            }
            RequestError::CacheLength { tokens, limit } => answer(InvalidArgument, "CACHE_LENGTH")
                .with("tokens", tokens)
                .with("limit", limit)
                .field("prompt", text),
            RequestError::TokenOutOfRange { token, vocab } => {
                answer(InvalidArgument, "TOKEN_OUT_OF_RANGE")
                    .with("token", token.0)
                    .with("vocab_size", vocab)
                    .field("prompt.token_ids", text)
            }
            RequestError::EmptyPrompt => {
                answer(InvalidArgument, "EMPTY_PROMPT").field("prompt", text)
            }
            RequestError::NoContinuation => {
                answer(InvalidArgument, "NO_CONTINUATION").field("continuations", text)
            }
            RequestError::EmptyContinuation { index } => {
                answer(InvalidArgument, "EMPTY_CONTINUATION")
                    .field(&format!("continuations[{index}]"), text)
            }
            RequestError::Sampling { field, .. } => {
                answer(InvalidArgument, "SAMPLING").field(field, text)
            }
            RequestError::NoVersion { .. } => answer(FailedPrecondition, "NO_VERSION"),
            RequestError::NoGenerator => answer(FailedPrecondition, "NO_GENERATOR"),
            RequestError::Cancelled => answer(Code::Cancelled, "CANCELLED"),
            RequestError::Export { .. } => answer(Internal, "EXPORT"),
        },
        Error::Text(error) => match error {
            lm::text::Error::File(_) | lm::text::Error::Unsupported { .. } => {
                answer(Internal, "TOKENIZER_FILE")
            }
            lm::text::Error::Tokenizer { .. } => answer(Internal, "TOKENIZER"),
            lm::text::Error::UnknownToken { token, vocab } => {
                answer(InvalidArgument, "TOKEN_OUT_OF_RANGE")
                    .with("token", token.0)
                    .with("vocab_size", vocab)
            }
            lm::text::Error::NoChatTemplate => answer(FailedPrecondition, "NO_CHAT_TEMPLATE"),
            lm::text::Error::Template { .. } => {
                answer(InvalidArgument, "CHAT_TEMPLATE").field("prompt.chat", text)
            }
        },
        Error::NoGenerator => answer(FailedPrecondition, "NO_GENERATOR"),
        Error::NoPromptFormat => answer(FailedPrecondition, "NO_PROMPT_FORMAT"),
        Error::NotArrived { want, accepted } => answer(FailedPrecondition, "SEQ_NOT_ARRIVED")
            .with("seq", want)
            .with("accepted_seq", accepted),
        Error::Deadline(_) => answer(DeadlineExceeded, "DEADLINE_EXCEEDED"),
        Error::ShuttingDown => answer(Unavailable, "SHUTTING_DOWN").retry(),
        Error::EngineStopped => answer(Unavailable, "ENGINE_STOPPED"),
        Error::Internal(_) => answer(Internal, "INTERNAL"),
    }
}

impl From<Error> for Status {
    fn from(error: Error) -> Self {
        let Answer {
            code,
            reason,
            metadata,
            violations,
            retry,
        } = map(&error);
        let metadata: HashMap<String, String> = metadata
            .into_iter()
            .map(|(key, value)| (key.to_owned(), value))
            .collect();
        let mut details = ErrorDetails::with_error_info(reason, DOMAIN, metadata);
        if !violations.is_empty() {
            let violations: Vec<_> = violations
                .into_iter()
                .map(|Violation { field, why }| FieldViolation::new(field, why))
                .collect();
            details.set_bad_request(violations);
        }
        if retry.is_some() {
            details.set_retry_info(retry);
        }
        Self::with_error_details(code, message(&error), details)
    }
}
