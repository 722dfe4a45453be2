//! What the engine is told.
//!
//! A command only queues; the next step takes all of them, in order. Answers are events. Start at [`Command`].

use std::ops::Range;

use generator::Strategy;

use crate::{
    ids::{Digest, DocumentId, RequestId, Seq, SessionId, TenantId, TokenId},
    snapshot::{Need, Snapshot},
};

/// A thing to do. Commands of a session take effect in the order of their `push`.
#[derive(Clone, Debug)]
pub enum Command {
    /// Opens an empty session. Answered by `Opened`, or `SessionFailed`.
    Open {
        /// Its name; no other open session may have it.
        session: SessionId,
        /// Whose it is; a fork is its source's.
        tenant: TenantId,
        /// How its windows become one state.
        strategy: Strategy,
        /// Tokens in a window; not used by concat, whose window is the document.
        window: usize,
    },
    /// Opens `to` with a copy of all documents, states, the open window and the newest version of `from`, and with
    /// the tokens that still wait to be encoded. Publishes that `from` still owes are not copied. Answered by
    /// `Opened { session: to }`, or by `SessionFailed { session: to }`.
    Fork {
        /// The session to copy.
        from: SessionId,
        /// The copy's name.
        to: SessionId,
    },
    /// Ends a session and frees all it holds, at once. Its requests fail with `SessionClosed`. An unknown session is ignored.
    Close {
        /// The session.
        session: SessionId,
    },
    /// Tokens of a document, possibly none. A document other than the open one begins a new one (the open one must have
    /// ended). Answered by `Encoded` as they are read, and by `Applied` when a version holds them; or by `SessionFailed`, and then nothing
    /// of it is applied, and every further one is refused with the same error, so that no version has a hole: what came before
    /// is published and answers as ever.
    Ingest {
        /// The session.
        session: SessionId,
        /// With these tokens all that the session was told up to and including `seq` is in. Never falls.
        seq: Seq,
        /// The document.
        document: DocumentId,
        /// Its next tokens.
        tokens: Vec<TokenId>,
        /// Whether the document ends behind them.
        end_of_document: bool,
    },
    /// Asks for a version of all that has come, as if the open document ended behind `provisional`. Closes nothing. Answered by
    /// `Applied`, with the newest version if nothing has come since; or by `SessionFailed`. Publishes that wait while more come may be
    /// answered together, by the last one's seq. One that nobody asked for is left out if its core does not fit.
    Publish {
        /// The session.
        session: SessionId,
        /// What the version holds, `provisional` included.
        seq: Seq,
        /// The held-back end of the open document; must be empty if no document is open.
        provisional: Vec<TokenId>,
        /// Whether somebody asked for it, and is to be told if its core does not fit.
        asked: bool,
    },
    /// Forgets a document: the state is folded again without it, as if it had never come. Concat and parallel publish at once, from the
    /// other documents' own sums; sequential reads the remaining documents again from the start and publishes once, at
    /// the end (older versions run until then). Answered by `Forgotten`, or by `SessionFailed`.
    Forget {
        /// The session.
        session: SessionId,
        /// The document.
        document: DocumentId,
    },
    /// Asks for a continuation of a prompt. Answered by `Token`s and one `Finished`, or by `Failed`.
    Generate {
        /// The request's name.
        request: RequestId,
        /// Who asks: what it computes is reused for this tenant alone.
        tenant: TenantId,
        /// Whose adapter; none is the bare model. The newest version when the request starts to run stays its version to the end.
        session: Option<SessionId>,
        /// Strength of the imprint; 0 is the bare model.
        adapter_scale: f32,
        /// What its imprint is made of.
        chosen: Chosen,
        /// The prompt; at least one token.
        prompt: Vec<TokenId>,
        /// At most so many tokens; cut to what fits the model's context.
        max_tokens: usize,
        /// How tokens are drawn.
        sampling: Sampling,
        /// Tokens that end the answer; the one that did is not among its `Token`s.
        eos: Vec<TokenId>,
    },
    /// Asks how likely continuations of a prompt are. Answered by `Scored`, or by `Failed`.
    Score {
        /// The request's name.
        request: RequestId,
        /// As in `Generate`.
        tenant: TenantId,
        /// As in `Generate`.
        session: Option<SessionId>,
        /// As in `Generate`.
        adapter_scale: f32,
        /// As in `Generate`.
        chosen: Chosen,
        /// What comes before each continuation; at least one token.
        prompt: Vec<TokenId>,
        /// At least one, each of at least one token, scored independently of each other.
        continuations: Vec<Vec<TokenId>>,
    },
    /// Asks for a session's newest version as a PEFT LoRA. Answered by `Exported`, or by `Failed`.
    Export {
        /// The request's name.
        request: RequestId,
        /// The session.
        session: SessionId,
    },
    /// Takes a session out of memory before a budget asks for it: sums and traces of its documents, and the newest version's core if
    /// `core` says so. Nothing of one that is told something or asked for something now. It comes back when it is asked for. Not
    /// answered.
    Evict {
        /// The session.
        session: SessionId,
        /// Whether the core leaves, too.
        core: bool,
    },
    /// Answers `Wanted`: what has been kept of a session, as far as it can be had. What is missing or does not belong is made again from
    /// the session's log.
    Restored {
        /// The session.
        session: SessionId,
        /// What there is.
        snapshot: Option<Snapshot>,
    },
    /// Answers `Save`: whether the snapshot is kept.
    Saved {
        /// The session.
        session: SessionId,
        /// The state that it is of.
        digest: Digest,
        /// What is kept.
        kept: Need,
    },
    /// Ends a request at once and frees what it holds. A generation is answered by `Finished` with `Cancelled`, the others by
    /// `Failed` with `Cancelled`; an unknown request (it may just have ended) is ignored.
    Cancel {
        /// The request.
        request: RequestId,
    },
}

/// What an imprint is made of: some of a session's documents, as if the session had been told these alone, or some of their tokens.
/// Where one of the documents is not read to its end, or the session is sequential, or the core does not fit, it is made of all.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Chosen {
    /// The parts, each of another document; none: all of everything.
    pub parts: Vec<Part>,
    /// With what weight the tokens around those that are named count, added to all of them. Finite, at least 0.
    pub beside: f32,
    /// Whether it is to be held back on tokens that it says nothing of ([`generator::Gate`]): where it is made of all, the generator has
    /// a gate, and its sums are those of the newest version.
    pub gated: bool,
}

impl Chosen {
    /// Whether a core is made for it, or the newest version's own is taken as it is.
    pub(crate) fn is_composed(&self) -> bool {
        self.gated || !self.parts.is_empty()
    }
}

/// A part of what a session was told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// The document.
    pub document: DocumentId,
    /// Tokens of it, ascending; none: all of them. A document of which no single tokens are kept is taken whole.
    pub tokens: Vec<Range<usize>>,
    /// The tokens around them, ascending.
    pub around: Vec<Range<usize>>,
}

/// How tokens are drawn. In this order: repetition penalty, temperature, `top_k`, `top_p`, `min_p`, then one draw.
/// `top_p` and `min_p` look at the distribution that `top_k` leaves.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// 0 takes the likeliest token (the lowest id among equals). Finite, at least 0.
    pub temperature: f32,
    /// Only the so many likeliest tokens; 0 means all.
    pub top_k: usize,
    /// Only the likeliest tokens that together reach this probability; in (0, 1].
    pub top_p: f32,
    /// Only tokens at least this fraction as likely as the likeliest; in [0, 1).
    pub min_p: f32,
    /// Divides positive and multiplies negative logits of tokens that occurred in prompt or answer (arXiv 1909.05858). Finite, above 0.
    pub repetition_penalty: f32,
    /// Seed of the request's own stream of draws: the batch that it runs in changes nothing.
    pub seed: u64,
    /// Whether each token comes with its log-probability, before penalty, temperature and filters.
    pub logprobs: bool,
    /// So many of the likeliest tokens beside each; at most 64.
    pub top_logprobs: usize,
}

impl Default for Sampling {
    /// Greedy.
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            seed: 0,
            logprobs: false,
            top_logprobs: 0,
        }
    }
}
