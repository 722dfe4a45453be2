//! A request for an answer, checked: every field that is not as it must be is named.
//!
//! Start at [`generate`]; [`adapter`] waits for the version that was asked for.

use std::{
    hash::{BuildHasher, RandomState},
    time::Instant,
};

use engine::{Chosen, Sampling, TokenId};
use imprint_proto::v1::{self, continuation, prompt::Form};
use lm::text::Message;
use relevance::Asked;

use super::super::{Shared, at};
use crate::{
    auth::Tenant,
    edge::Phase,
    grpc::reached,
    sessions::session::{User, checked},
    status::{Error, Violation},
};

/// Tokens of an answer if the client does not say.
const DEFAULT_TOKENS: usize = 256;
/// Stop strings of a request.
const STOPS: usize = 16;
/// Bytes of a stop string.
const STOP_BYTES: usize = 256;
/// The likeliest tokens beside each.
const TOP_LOGPROBS: u32 = 20;
/// Continuations of a request.
const CONTINUATIONS: usize = 64;
/// The greatest strength of an imprint.
const SCALE: f32 = 8.0;

/// Which adapter, and how fresh.
pub(super) struct Adapter {
    /// Empty: the bare model.
    session: String,
    min_seq: u64,
    min_version: u64,
    /// None: how far the prompt concerns what was told.
    scale: Option<f32>,
}

impl Adapter {
    /// Strength of the session's imprint for a prompt, and what it is to be made of.
    pub(super) fn meant(&self, user: Option<&User>, asked: Option<&Asked>) -> (f32, Chosen) {
        match (self.scale, user, asked) {
            (Some(scale), _, _) => (scale, Chosen::default()),
            (None, Some(user), Some(asked)) => user.session().meant(asked),
            (None, _, _) => (1.0, Chosen::default()),
        }
    }
}

/// A prompt's tokens, and what it asks if it is no list of ids.
#[derive(Default)]
pub(super) struct Prompt {
    pub(super) tokens: Vec<TokenId>,
    pub(super) asked: Option<Asked>,
}

impl From<Vec<TokenId>> for Prompt {
    fn from(tokens: Vec<TokenId>) -> Self {
        Self {
            tokens,
            asked: None,
        }
    }
}

/// A checked request for a continuation.
pub(super) struct Generate {
    pub(super) adapter: Adapter,
    pub(super) prompt: Prompt,
    pub(super) sampling: Sampling,
    pub(super) stop: Vec<String>,
    pub(super) max_tokens: usize,
    pub(super) logprobs: bool,
}

/// A checked request for scores.
pub(super) struct Score {
    pub(super) adapter: Adapter,
    pub(super) prompt: Prompt,
    pub(super) continuations: Vec<Vec<TokenId>>,
}

/// Gathers what is wrong with a request.
#[derive(Default)]
struct Check(Vec<Violation>);

impl Check {
    fn wrong(&mut self, field: impl Into<String>, why: impl Into<String>) {
        self.0.push(Violation::new(field, why));
    }

    /// The value, or `default`; a violation if `fits` denies it.
    fn number(
        &mut self,
        field: &str,
        value: Option<f32>,
        default: f32,
        must: &str,
        fits: impl Fn(f32) -> bool,
    ) -> f32 {
        let value = value.unwrap_or(default);
        if !fits(value) {
            self.wrong(field, format!("is {value}, not {must}"));
        }
        value
    }

    /// The tokens, or none and what is wrong with them.
    fn tokens(&mut self, tokens: Result<Vec<TokenId>, Error>) -> Result<Vec<TokenId>, Error> {
        match tokens {
            Err(Error::Invalid(violations)) => {
                self.0.extend(violations);
                Ok(Vec::new())
            }
            other => other,
        }
    }

    fn done(self) -> Result<(), Error> {
        if self.0.is_empty() {
            Ok(())
        } else {
            Err(Error::Invalid(self.0))
        }
    }
}

/// Checks a request for a continuation.
///
/// # Errors
/// [`Error::Invalid`] with all violations; [`Error::UnknownModel`], [`Error::NoPromptFormat`], [`Error::Text`].
pub(super) fn generate(shared: &Shared, request: v1::GenerateRequest) -> Result<Generate, Error> {
    shared.check_model(&request.model)?;
    let mut check = Check::default();
    let adapter = adapter_of(&mut check, request.adapter);
    let asked = request.sampling.unwrap_or_default();
    let temperature = check.number(
        "sampling.temperature",
        asked.temperature,
        0.0,
        "from 0 to 100",
        |v| (0.0..=100.0).contains(&v),
    );
    let top_p = check.number("sampling.top_p", asked.top_p, 1.0, "in (0, 1]", |v| {
        v > 0.0 && v <= 1.0
    });
    let min_p = check.number("sampling.min_p", asked.min_p, 0.0, "in [0, 1)", |v| {
        (0.0..1.0).contains(&v)
    });
    let penalty = check.number(
        "sampling.repetition_penalty",
        asked.repetition_penalty,
        1.0,
        "in (0, 10]",
        |v| v > 0.0 && v <= 10.0,
    );
    if request.stop.len() > STOPS {
        check.wrong(
            "stop",
            format!("has {} strings, more than {STOPS}", request.stop.len()),
        );
    }
    for (index, stop) in request.stop.iter().enumerate().take(STOPS) {
        if stop.is_empty() || stop.len() > STOP_BYTES {
            check.wrong(
                format!("stop[{index}]"),
                format!("has {} bytes, not 1 to {STOP_BYTES}", stop.len()),
            );
        }
    }
    if request.top_logprobs > TOP_LOGPROBS {
        check.wrong(
            "top_logprobs",
            format!("is {}, more than {TOP_LOGPROBS}", request.top_logprobs),
        );
    }
    if request.top_logprobs > 0 && !request.logprobs {
        check.wrong("top_logprobs", "needs `logprobs`");
    }
    let prompt = prompt(shared, &mut check, request.prompt)?;
    check.done()?;
    Ok(Generate {
        adapter,
        prompt,
        sampling: Sampling {
            temperature,
            top_k: asked.top_k.unwrap_or(0) as usize,
            top_p,
            min_p,
            repetition_penalty: penalty,
            seed: asked
                .seed
                .unwrap_or_else(|| RandomState::new().hash_one(0_u8)),
            logprobs: request.logprobs,
            top_logprobs: request.top_logprobs as usize,
        },
        stop: request.stop,
        max_tokens: if request.max_tokens == 0 {
            DEFAULT_TOKENS
        } else {
            request.max_tokens as usize
        },
        logprobs: request.logprobs,
    })
}

/// Checks a request for scores.
///
/// # Errors
/// As [`generate`].
pub(super) fn score(shared: &Shared, request: v1::ScoreRequest) -> Result<Score, Error> {
    shared.check_model(&request.model)?;
    let mut check = Check::default();
    let adapter = adapter_of(&mut check, request.adapter);
    let given = request.continuations.len();
    if !(1..=CONTINUATIONS).contains(&given) {
        check.wrong(
            "continuations",
            format!("are {given}, not 1 to {CONTINUATIONS}"),
        );
    }
    let prompt = prompt(shared, &mut check, request.prompt)?;
    let mut continuations = Vec::new();
    for (index, continuation) in request
        .continuations
        .into_iter()
        .enumerate()
        .take(CONTINUATIONS)
    {
        let field = format!("continuations[{index}]");
        let tokens = match continuation.form {
            None => {
                check.wrong(field, "has no form");
                continue;
            }
            Some(continuation::Form::Text(text)) => {
                if bounded(&mut check, &field, text.len(), shared.prompt_bytes) {
                    shared.text.encode(&text)?
                } else {
                    continue;
                }
            }
            Some(continuation::Form::TokenIds(ids)) => {
                if bounded(
                    &mut check,
                    &field,
                    ids.ids.len().saturating_mul(4),
                    shared.prompt_bytes,
                ) {
                    check.tokens(checked(
                        &format!("{field}.token_ids"),
                        &ids.ids,
                        shared.engine.model().vocab,
                    ))?
                } else {
                    continue;
                }
            }
        };
        continuations.push(tokens);
    }
    check.done()?;
    Ok(Score {
        adapter,
        prompt,
        continuations,
    })
}

/// Bytes of text that a prompt brings to the tokenizer.
pub(super) fn bytes(prompt: Option<&v1::Prompt>) -> usize {
    match prompt.and_then(|prompt| prompt.form.as_ref()) {
        None | Some(Form::TokenIds(_)) => 0,
        Some(Form::Text(text) | Form::Question(text)) => text.len(),
        // A template may put a line around each message.
        Some(Form::Chat(chat)) => chat
            .messages
            .iter()
            .map(|message| message.role.len() + message.content.len() + 16)
            .sum(),
    }
}

/// Bytes of text that continuations bring to the tokenizer.
pub(super) fn continuation_bytes(continuations: &[v1::Continuation]) -> usize {
    let bytes = |one: &v1::Continuation| match &one.form {
        Some(continuation::Form::Text(text)) => text.len(),
        Some(continuation::Form::TokenIds(_)) | None => 0,
    };
    continuations.iter().map(bytes).sum()
}

/// Whether something is there and not too long.
fn bounded(check: &mut Check, field: &str, bytes: usize, limit: usize) -> bool {
    if bytes == 0 {
        check.wrong(field, "is empty");
    } else if bytes > limit {
        check.wrong(field, format!("has {bytes} bytes, more than {limit}"));
    }
    (1..=limit).contains(&bytes)
}

fn adapter_of(check: &mut Check, adapter: Option<v1::AdapterSelection>) -> Adapter {
    let adapter = adapter.unwrap_or_default();
    let scale = adapter.adapter_scale;
    check.number("adapter.adapter_scale", scale, 1.0, "from 0 to 8", |v| {
        (0.0..=SCALE).contains(&v)
    });
    if adapter.session_id.is_empty()
        && (adapter.min_applied_seq > 0 || adapter.min_adapter_version > 0)
    {
        check.wrong("adapter.session_id", "is required to wait for its versions");
    }
    Adapter {
        session: adapter.session_id,
        min_seq: adapter.min_applied_seq,
        min_version: adapter.min_adapter_version,
        scale,
    }
}

fn prompt(shared: &Shared, check: &mut Check, prompt: Option<v1::Prompt>) -> Result<Prompt, Error> {
    let limit = shared.prompt_bytes;
    let Some(form) = prompt.and_then(|prompt| prompt.form) else {
        check.wrong("prompt.form", "is required");
        return Ok(Prompt::default());
    };
    let bos = || Shared::bos(&shared.engine, &shared.text);
    match form {
        Form::Text(text) => {
            if !bounded(check, "prompt.text", text.len(), limit) {
                return Ok(Prompt::default());
            }
            let tokens: Vec<_> = bos()
                .into_iter()
                .chain(shared.text.encode(&text)?)
                .collect();
            Ok(Prompt {
                asked: Some(Asked::text(&text)),
                tokens,
            })
        }
        Form::TokenIds(ids) => {
            if !bounded(
                check,
                "prompt.token_ids",
                ids.ids.len().saturating_mul(4),
                limit,
            ) {
                return Ok(Prompt::default());
            }
            let tokens = checked("prompt.token_ids", &ids.ids, shared.engine.model().vocab);
            Ok(check.tokens(tokens)?.into())
        }
        Form::Chat(chat) => {
            let bytes: usize = chat
                .messages
                .iter()
                .map(|message| message.role.len() + message.content.len())
                .sum();
            if !bounded(check, "prompt.chat.messages", bytes, limit) {
                return Ok(Prompt::default());
            }
            let messages = chat.messages.into_iter();
            let messages: Vec<_> = messages
                .map(|message| Message {
                    role: message.role,
                    content: message.content,
                })
                .collect();
            let said = messages.iter().filter(|message| message.role == "user");
            Ok(Prompt {
                asked: Some(Asked::new(
                    said.map(|message| message.content.as_str()),
                    None,
                )),
                tokens: shared.text.encode_chat(&messages)?,
            })
        }
        Form::Question(question) => {
            if !bounded(check, "prompt.question", question.len(), limit) {
                return Ok(Prompt::default());
            }
            let generator = shared.engine.model().generator.as_ref();
            let format = generator
                .and_then(|generator| generator.prompt_format.as_deref())
                .ok_or(Error::NoPromptFormat)?;
            // What a user says holds no special tokens.
            let text = format.replace("{question}", &question);
            Ok(Prompt {
                asked: Some(Asked::new([question.as_str()].into_iter(), Some(format))),
                tokens: bos()
                    .into_iter()
                    .chain(shared.text.encode_plain(&text)?)
                    .collect(),
            })
        }
    }
}

/// Finds the session and waits until its adapter is as fresh as asked for; none for the bare model.
///
/// # Errors
/// [`Error::UnknownSession`]; [`Error::NotArrived`] if a chunk has not come by the deadline, [`Error::Deadline`] if a version
/// has not; what stands in the way of the session's context.
pub(super) async fn adapter(
    shared: &Shared,
    tenant: &Tenant,
    wanted: &Adapter,
    deadline: Option<Instant>,
) -> Result<Option<User>, Error> {
    if wanted.session.is_empty() {
        return Ok(None);
    }
    let session = shared.sessions.get(tenant, &wanted.session)?;
    let user = session.user();
    let deadline = deadline.or_else(|| Instant::now().checked_add(shared.wait));
    let mut progress = session.progress();
    let mut phase = shared.phase.clone();
    let refusals = progress.borrow().refusals;
    let mut asked = 0;
    loop {
        let now = progress.borrow_and_update().clone();
        if now.closed {
            return Err(Error::UnknownSession(wanted.session.clone()));
        }
        if now.applied() >= wanted.min_seq && now.version() >= wanted.min_version {
            return Ok(Some(user));
        }
        if let Some(error) = now.trouble(refusals) {
            return Err(Error::Context(error.clone()));
        }
        // Something has come that is not in the newest version: ask for one, once for each chunk.
        let has_come = now.accepted >= wanted.min_seq && now.accepted > now.applied().max(asked);
        if has_come {
            asked = now.accepted;
            tokio::select! {
                published = session.publish() => drop(published?),
                () = reached(&mut phase, Phase::Over) => return Err(Error::ShuttingDown),
                () = at(deadline) => return Err(Error::Deadline("waiting for the session's version")),
            }
            continue;
        }
        tokio::select! {
            changed = progress.changed() => changed.map_err(|_| Error::EngineStopped)?,
            () = reached(&mut phase, Phase::Over) => return Err(Error::ShuttingDown),
            () = at(deadline) => {
                return Err(if now.accepted < wanted.min_seq {
                    Error::NotArrived { want: wanted.min_seq, accepted: now.accepted }
                } else {
                    Error::Deadline("waiting for the session's version")
                });
            }
        }
    }
}
