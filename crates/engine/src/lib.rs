//! The engine: what runs next. STUB of the public face.
//! One thread owns it; commands in (`push`), events out (`step`), `step` the only mutation.
#![allow(missing_docs, unused_variables, unused_imports, dead_code, clippy::allow_attributes_without_reason, clippy::unimplemented, clippy::new_ret_no_self)]
use std::{path::{Path, PathBuf}, sync::Arc, time::{Duration, Instant}};
pub use lm::TokenId;
pub use generator::Strategy;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)] pub struct SessionId(pub u64);
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)] pub struct DocumentId(pub u64);
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)] pub struct RequestId(pub u64);
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)] pub struct Seq(pub u64);
/// 0 is the bare model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)] pub struct Version(pub u64);
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)] pub struct Digest(pub [u8; 32]);

/// Budgets and bounds; all documented, all checked.
#[derive(Clone, Debug)]
pub struct Config {
    pub step_tokens: usize,          // token budget of a step
    pub kv_blocks: usize, pub block_size: usize,
    pub max_running: usize,          // rows decoding at once
    pub max_queued: usize,           // requests waiting
    pub max_sessions: usize,
    pub max_documents: usize,        // per session
    pub max_session_tokens: usize,
    pub max_queued_tokens: usize,    // context tokens of all sessions that wait to be encoded
    pub state_budget_bytes: usize,
    pub dequantize: bool,
}
impl Default for Config { fn default() -> Self { unimplemented!() } }

pub enum Command {
    Open { session: SessionId, strategy: Strategy, window: usize },
    /// Copy of all documents, states, open window, versions.
    Fork { from: SessionId, to: SessionId },
    Close { session: SessionId },
    /// Tokens of a document. With them all text up to and including `seq` is in.
    /// A document other than the open one begins a new one (the open one must have ended).
    Ingest { session: SessionId, seq: Seq, document: DocumentId, tokens: Vec<TokenId>, end_of_document: bool },
    /// A version of all that has come, `provisional` being the held-back end of the open document.
    /// Answered by Applied (with the newest version, if nothing has come since).
    Publish { session: SessionId, seq: Seq, provisional: Vec<TokenId> },
    Forget { session: SessionId, document: DocumentId },
    Generate { request: RequestId, session: Option<SessionId>, adapter_scale: f32, prompt: Vec<TokenId>, max_tokens: usize, sampling: Sampling, eos: Vec<TokenId> },
    Score { request: RequestId, session: Option<SessionId>, adapter_scale: f32, prompt: Vec<TokenId>, continuations: Vec<Vec<TokenId>> },
    Export { request: RequestId, session: SessionId },
    Cancel { request: RequestId },
}
#[derive(Clone, Debug)]
pub struct Sampling { pub temperature: f32, pub top_k: usize, pub top_p: f32, pub min_p: f32, pub repetition_penalty: f32, pub seed: u64, pub logprobs: bool, pub top_logprobs: usize }

pub enum Event {
    /// A version is published; all chunks up to `seq` are in it.
    Applied { session: SessionId, seq: Seq, version: Version, digest: Digest, tokens: usize, state_bytes: usize, core_bytes: usize },
    /// So many of the session's queued context tokens have been encoded (flow control).
    Encoded { session: SessionId, tokens: usize },
    Forgotten { session: SessionId, document: DocumentId, version: Version, digest: Digest, tokens: usize, state_bytes: usize, core_bytes: usize },
    /// An ingest, publish or forget could not be done; nothing of it is applied.
    SessionFailed { session: SessionId, error: SessionError },
    Token { request: RequestId, token: TokenId, logprob: Option<f32>, top: Vec<(TokenId, f32)> },
    Finished { request: RequestId, reason: Finish, version: Version, digest: Option<Digest>, prompt_tokens: usize, completion_tokens: usize, context_tokens: usize, timings: Timings },
    Scored { request: RequestId, scores: Vec<Vec<(TokenId, f32)>>, greedy: Vec<bool>, version: Version },
    Exported { request: RequestId, config_json: Vec<u8>, safetensors: Vec<u8>, rank: usize, version: Version, digest: Digest },
    Failed { request: RequestId, error: RequestError },
}
#[derive(Clone, Copy, Debug, PartialEq, Eq)] pub enum Finish { Eos, Length, Cancelled }
#[derive(Clone, Copy, Debug, Default)] pub struct Timings { pub queue: Duration, pub prefill: Duration, pub decode: Duration }
#[derive(Clone, Debug, thiserror::Error)] #[non_exhaustive] pub enum RequestError { #[error("stub")] Stub /* UnknownSession, ContextLength{..}, TokenOutOfRange, NoVersion, SessionClosed ... */ }
#[derive(Clone, Debug, thiserror::Error)] #[non_exhaustive] pub enum SessionError { #[error("stub")] Stub /* DocumentTooLong, StateBudget, TooManyDocuments, ... */ }
#[derive(Debug, thiserror::Error)] #[non_exhaustive] pub enum Error { #[error(transparent)] Lm(#[from] lm::Error) }
/// The queue is full: the command comes back.
pub struct Full(pub Command);

#[derive(Clone, Debug)]
pub struct ModelInfo { /* everything proto Model and Generator need: architecture, parameters, layers, hidden, vocab, context_length, weight_format, digest, eos ids, bos, generator: Option<GeneratorInfo{write, read_out, sites:(layer,module,r1,r2,rank), window, strategy, digest, parameters, prompt_format, document_suffix, bos}> */ }

pub struct Engine {}
impl Engine {
    pub fn load(model: &Path, generator: Option<&Path>, config: Config) -> Result<Self, Error> { unimplemented!() }
    pub fn model(&self) -> &Arc<ModelInfo> { unimplemented!() }
    /// Queues a command, or says that the queue it belongs to is full.
    pub fn push(&mut self, command: Command, now: Instant) -> Result<(), Box<Full>> { unimplemented!() }
    /// Whether a step would do anything.
    pub fn idle(&self) -> bool { unimplemented!() }
    /// One iteration over a ragged batch. A bad request is an Event; `Err` means a broken engine.
    pub fn step(&mut self, now: Instant, events: &mut Vec<Event>) -> Result<(), Error> { unimplemented!() }
}
