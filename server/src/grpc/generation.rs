//! GenerationService: what a session answers.
//!
//! A request is checked field by field, waits for the version that it asks for, and goes to the engine. One task a generation
//! turns tokens into text until the engine, a stop string, the deadline, the reader or the server's end says enough. Start at
//! [`Service`].

mod ask;
mod stop;
#[cfg(test)]
mod tests;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use engine::{Command, Event, Finish, RequestId, TokenId};
use imprint_proto::v1::{
    self, generate_response::Message, generation_service_server::GenerationService,
};
use lm::text::{Text, TextDecoder};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, async_trait};

use self::stop::Stops;
use super::{Shared, at, count, duration, reached};
use crate::{
    edge::{Phase, deadline, tenant},
    engine_thread::{Handle, Reply},
    metrics::{End, Metrics},
    places::Place,
    sessions::session::{INLINE_BYTES, User},
    status::Error,
};

/// Messages that wait for the reader; more is folded into one.
const ANSWERS: usize = 8;
/// How long the engine may take to say how a cancelled request ended.
const FAREWELL: Duration = Duration::from_secs(5);

/// The service.
pub struct Service(pub Arc<Shared>);

type Answer = Result<v1::GenerateResponse, Status>;

impl Service {
    /// Checks a request with so many bytes to tokenise, on a thread for blocking work if they are many.
    async fn checked<T: Send + 'static>(
        &self,
        bytes: usize,
        check: impl FnOnce(&Shared) -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        if bytes <= INLINE_BYTES {
            return check(&self.0);
        }
        let shared = Arc::clone(&self.0);
        tokio::task::spawn_blocking(move || check(&shared))
            .await
            .map_err(|_| Error::Internal("tokenising panicked"))?
    }
}

#[async_trait]
impl GenerationService for Service {
    type GenerateStream = ReceiverStream<Answer>;

    async fn generate(
        &self,
        request: Request<v1::GenerateRequest>,
    ) -> Result<Response<Self::GenerateStream>, Status> {
        let arrived = Instant::now();
        let (tenant, deadline) = (tenant(&request)?, deadline(&request));
        let place = self.0.admit(&tenant, deadline)?;
        let request = request.into_inner();
        let bytes = ask::bytes(request.prompt.as_ref());
        let ask = self.checked(bytes, |shared| ask::generate(shared, request));
        let ask = ask.await?;
        let user = ask::adapter(&self.0, &tenant, &ask.adapter, deadline).await?;
        let (scale, chosen) = ask.adapter.meant(user.as_ref(), ask.prompt.asked.as_ref());
        let request = self.0.request_id();
        let command = Command::Generate {
            request,
            tenant: tenant.id(),
            session: user.as_ref().map(|user| user.session().id),
            adapter_scale: scale,
            chosen,
            prompt: ask.prompt.tokens,
            max_tokens: ask.max_tokens,
            sampling: ask.sampling,
            eos: self.0.engine.model().eos.clone(),
        };
        // All tokens and the end: the engine never waits for a reader.
        let room = ask.max_tokens.min(self.0.engine.model().context_length) + 2;
        let waited = arrived.elapsed();
        let replies = self.0.engine.request(command, arrived, room).await?;
        let (answers, receiver) = mpsc::channel(ANSWERS + 1);
        // One place is kept for an error: whatever the reader has left unread, it learns that the answer is cut short.
        let last = answers.clone().try_reserve_owned();
        let last = last.map_err(|_| Error::Internal("a new queue is full"))?;
        let run = Run {
            engine: self.0.engine.clone(),
            text: self.0.text.clone(),
            request,
            metrics: Arc::clone(&self.0.metrics),
            answers,
            phase: self.0.phase.clone(),
            deadline,
            waited,
            logprobs: ask.logprobs,
            scale: used(scale, user.as_ref()),
            guards: (place, user),
        };
        tokio::spawn(run.run(replies, Stops::new(ask.stop), last));
        Ok(Response::new(ReceiverStream::new(receiver)))
    }

    async fn score(
        &self,
        request: Request<v1::ScoreRequest>,
    ) -> Result<Response<v1::ScoreResponse>, Status> {
        let (tenant, deadline) = (tenant(&request)?, deadline(&request));
        let place = self.0.admit(&tenant, deadline)?;
        let request = request.into_inner();
        let bytes = ask::bytes(request.prompt.as_ref())
            .saturating_add(ask::continuation_bytes(&request.continuations));
        let ask = self
            .checked(bytes, |shared| ask::score(shared, request))
            .await?;
        let user = ask::adapter(&self.0, &tenant, &ask.adapter, deadline).await?;
        let (scale, chosen) = ask.adapter.meant(user.as_ref(), ask.prompt.asked.as_ref());
        let adapter_scale = used(scale, user.as_ref());
        let request = self.0.request_id();
        let command = Command::Score {
            request,
            tenant: tenant.id(),
            session: user.as_ref().map(|user| user.session().id),
            adapter_scale: scale,
            chosen,
            prompt: ask.prompt.tokens,
            continuations: ask.continuations,
        };
        let mut replies = self.0.engine.request(command, Instant::now(), 1).await?;
        let mut cancel = CancelOnDrop {
            engine: &self.0.engine,
            request: Some(request),
        };
        let mut phase = self.0.phase.clone();
        let reply = tokio::select! {
            reply = replies.recv() => reply,
            () = at(deadline) => return Err(Error::Deadline("scoring").into()),
            () = reached(&mut phase, Phase::Over) => return Err(Error::ShuttingDown.into()),
        };
        cancel.request = None;
        drop((place, user));
        let Some(Reply::Event(Event::Scored {
            scores,
            greedy,
            version,
            prompt_tokens,
            cached_tokens,
            ..
        })) = reply
        else {
            return Err(unexpected(reply).into());
        };
        let scores = scores
            .into_iter()
            .zip(greedy)
            .map(|(tokens, greedy)| v1::ContinuationScore {
                logprob: tokens.iter().map(|(_, logprob)| f64::from(*logprob)).sum(),
                tokens: tokens
                    .into_iter()
                    .map(|(token, logprob)| token_logprob(&self.0.text, token, logprob))
                    .collect(),
                greedy,
            });
        let scores = scores.collect();
        Ok(Response::new(v1::ScoreResponse {
            scores,
            adapter_version: version.0,
            prompt_tokens: count(prompt_tokens),
            cached_tokens: count(cached_tokens),
            adapter_scale,
        }))
    }
}

/// The strength that an imprint has: none without a session.
fn used(scale: f32, user: Option<&User>) -> f32 {
    if user.is_some() { scale } else { 0.0 }
}

/// Cancels the request unless it has ended: a client that goes away drops the call's future.
struct CancelOnDrop<'a> {
    engine: &'a Handle,
    request: Option<RequestId>,
}

impl Drop for CancelOnDrop<'_> {
    fn drop(&mut self) {
        if let Some(request) = self.request {
            self.engine.cancel(request);
        }
    }
}

/// The error of a reply that is not the one asked for.
fn unexpected(reply: Option<Reply>) -> Error {
    match reply {
        Some(Reply::Event(Event::Failed { error, .. })) => Error::Request(error),
        Some(Reply::Event(_)) => Error::Internal("the engine answered something else"),
        Some(Reply::Overloaded) => Error::Busy { what: "requests" },
        None => Error::EngineStopped,
    }
}

/// A token as text of its own.
fn token_logprob(text: &Text, token: TokenId, logprob: f32) -> v1::TokenLogprob {
    // A token that the tokenizer does not know has no text, as in `text_of`.
    v1::TokenLogprob {
        token_id: token.0,
        text: text.decode(&[token]).unwrap_or_default(),
        logprob,
    }
}

/// One generation under way.
struct Run {
    engine: Handle,
    text: Text,
    request: RequestId,
    metrics: Arc<Metrics>,
    answers: mpsc::Sender<Answer>,
    phase: watch::Receiver<Phase>,
    deadline: Option<Instant>,
    /// From arrival to the engine.
    waited: Duration,
    logprobs: bool,
    /// Strength of the imprint.
    scale: f32,
    /// Held to the end: the place among the running requests, and the session.
    guards: (Place, Option<User>),
}

/// How a generation goes on.
enum Step {
    Reply(Reply),
    Stopped,
    Gone,
    Late,
    Over,
}

impl Run {
    async fn run(
        mut self,
        mut replies: mpsc::Receiver<Reply>,
        mut stops: Stops,
        last: mpsc::OwnedPermit<Answer>,
    ) {
        let end = match self.generate(&mut replies, &mut stops).await {
            Ok(end) => end,
            Err(error) => {
                self.engine.cancel(self.request);
                last.send(Err(error.into()));
                End::Error
            }
        };
        self.metrics.ended(end);
        drop(self.guards);
    }

    async fn generate(
        &mut self,
        replies: &mut mpsc::Receiver<Reply>,
        stops: &mut Stops,
    ) -> Result<End, Error> {
        let mut decoder = self.text.decoder();
        let mut drawn = 0;
        loop {
            let step = tokio::select! {
                biased;
                () = self.answers.closed() => Step::Gone,
                () = reached(&mut self.phase, Phase::Over) => Step::Over,
                () = at(self.deadline) => Step::Late,
                reply = replies.recv() => Step::Reply(reply.ok_or(Error::EngineStopped)?),
            };
            let mut delta = v1::GenerateDelta::default();
            let mut next = Some(step);
            let ended = loop {
                let step = match next.take() {
                    Some(step) => step,
                    // All that has come meanwhile goes into one message.
                    None => match replies.try_recv() {
                        Ok(reply) => Step::Reply(reply),
                        Err(_) => break None,
                    },
                };
                match step {
                    Step::Reply(Reply::Event(Event::Token {
                        token,
                        logprob,
                        top,
                        ..
                    })) => {
                        drawn += 1;
                        let stopped = stops.push(&text_of(&mut decoder, token)?, &mut delta.text);
                        self.note(&mut delta, token, logprob, top);
                        if stopped {
                            break Some(Step::Stopped);
                        }
                    }
                    other => break Some(other),
                }
            };
            let finished = match ended {
                None => None,
                Some(Step::Gone) => {
                    self.engine.cancel(self.request);
                    return Ok(End::Abort);
                }
                Some(Step::Late) => {
                    self.deliver(delta).await?;
                    return Err(Error::Deadline("generating"));
                }
                Some(Step::Over) => {
                    self.engine.cancel(self.request);
                    end_text(
                        std::mem::replace(&mut decoder, self.text.decoder()),
                        stops,
                        &mut delta.text,
                    )?;
                    let reason = v1::FinishReason::Shutdown;
                    Some(self.farewell(replies, reason, drawn).await?)
                }
                Some(Step::Stopped) => {
                    self.engine.cancel(self.request);
                    let reason = v1::FinishReason::Stop;
                    Some(self.farewell(replies, reason, drawn).await?)
                }
                Some(Step::Reply(Reply::Event(event @ Event::Finished { .. }))) => {
                    let stopped = end_text(
                        std::mem::replace(&mut decoder, self.text.decoder()),
                        stops,
                        &mut delta.text,
                    )?;
                    let reason = stopped.then_some(v1::FinishReason::Stop);
                    Some(finished(event, reason, drawn, self.waited, self.scale)?)
                }
                Some(Step::Reply(reply)) => {
                    self.deliver(delta).await?;
                    return Err(unexpected(Some(reply)));
                }
            };
            self.deliver(delta).await?;
            if let Some(finished) = finished {
                let end = End::Finished(finished.finish_reason());
                self.send(Message::Finished(finished)).await?;
                return Ok(end);
            }
        }
    }

    fn note(
        &self,
        delta: &mut v1::GenerateDelta,
        token: TokenId,
        logprob: Option<f32>,
        top: Vec<(TokenId, f32)>,
    ) {
        delta.token_ids.push(token.0);
        if let Some(logprob) = logprob.filter(|_| self.logprobs) {
            delta
                .logprobs
                .push(token_logprob(&self.text, token, logprob));
        }
        if !top.is_empty() {
            let tokens = top
                .into_iter()
                .map(|(token, logprob)| token_logprob(&self.text, token, logprob))
                .collect();
            delta.top_logprobs.push(v1::TopLogprobs { tokens });
        }
    }

    /// What the engine says of a request that was cancelled: the version that it ran with, and where the time went.
    async fn farewell(
        &self,
        replies: &mut mpsc::Receiver<Reply>,
        reason: v1::FinishReason,
        drawn: u32,
    ) -> Result<v1::GenerateFinished, Error> {
        let end = async {
            loop {
                match replies.recv().await {
                    Some(Reply::Event(Event::Token { .. })) => {}
                    Some(Reply::Event(event @ Event::Finished { .. })) => {
                        return finished(event, Some(reason), drawn, self.waited, self.scale);
                    }
                    other => return Err(unexpected(other)),
                }
            }
        };
        tokio::time::timeout(FAREWELL, end)
            .await
            .map_err(|_| Error::EngineStopped)?
    }

    async fn deliver(&mut self, delta: v1::GenerateDelta) -> Result<(), Error> {
        if delta.token_ids.is_empty() && delta.text.is_empty() {
            return Ok(());
        }
        self.send(Message::Delta(delta)).await
    }

    /// Waits for the reader, but not beyond the deadline, nor for one that does not read while the server ends.
    async fn send(&mut self, message: Message) -> Result<(), Error> {
        let message = Ok(v1::GenerateResponse {
            message: Some(message),
        });
        let message = match self.answers.try_send(message) {
            Ok(()) => return Ok(()),
            Err(
                mpsc::error::TrySendError::Full(message)
                | mpsc::error::TrySendError::Closed(message),
            ) => message,
        };
        tokio::select! {
            // The reader that has gone is noticed when the next step begins.
            sent = self.answers.send(message) => { drop(sent); Ok(()) }
            () = at(self.deadline) => Err(Error::Deadline("the reader is slow")),
            () = reached(&mut self.phase, Phase::Over) => Err(Error::ShuttingDown),
        }
    }
}

/// The text that a token adds. Some models have more rows of logits than their tokenizer has tokens (padded to a round
/// number); such a token has no text.
fn text_of(decoder: &mut TextDecoder, token: TokenId) -> Result<String, Error> {
    match decoder.push(token) {
        Err(lm::text::Error::UnknownToken { .. }) => Ok(String::new()),
        text => Ok(text?),
    }
}

/// Ends the text: what was held back for more bytes or for a stop string comes now. Says whether it held a stop string.
fn end_text(decoder: TextDecoder, stops: &mut Stops, text: &mut String) -> Result<bool, Error> {
    let stopped = stops.push(&decoder.finish()?, text);
    if !stopped {
        text.push_str(&stops.rest());
    }
    Ok(stopped)
}

/// The end of a generation; `reason` if it is not the engine's own.
fn finished(
    event: Event,
    reason: Option<v1::FinishReason>,
    drawn: u32,
    waited: Duration,
    scale: f32,
) -> Result<v1::GenerateFinished, Error> {
    let Event::Finished {
        reason: ended,
        version,
        digest,
        prompt_tokens,
        cached_tokens,
        context_tokens,
        timings,
        ..
    } = event
    else {
        return Err(Error::Internal("the engine answered something else"));
    };
    let reason = match (reason, ended) {
        (Some(reason), _) => reason,
        (None, Finish::Eos) => v1::FinishReason::Eos,
        (None, Finish::Length) => v1::FinishReason::Length,
        (None, Finish::Cancelled) => return Err(Error::Request(engine::RequestError::Cancelled)),
    };
    Ok(v1::GenerateFinished {
        finish_reason: reason.into(),
        usage: Some(v1::Usage {
            prompt_tokens: count(prompt_tokens),
            completion_tokens: drawn,
            context_tokens: context_tokens as u64,
            cached_tokens: count(cached_tokens),
        }),
        adapter_version: version.0,
        state_digest: digest.map(|digest| digest.to_string()).unwrap_or_default(),
        timings: Some(v1::Timings {
            queue: Some(duration(waited + timings.queue)),
            prefill: Some(duration(timings.prefill)),
            decode: Some(duration(timings.decode)),
        }),
        adapter_scale: scale,
    })
}
