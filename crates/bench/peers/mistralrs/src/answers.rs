//! mistral.rs, asked for an answer that comes in pieces.
//!
//! Start at [`Answers`].

use std::{path::Path, sync::Arc, time::Instant};

use anyhow::{Context, Result};
use imprint_proto::v1::{FinishReason, GenerateFinished, Sampling, Timings, Usage};
use indexmap::IndexMap;
use mistralrs::{
    GgufModelBuilder, Model, NormalRequest, Request, RequestMessage, Response, SamplingParams,
    StopTokens, TextModelBuilder,
};
use tokio::sync::{Semaphore, mpsc};
use tonic::Status;

/// Tokens of an answer where nothing else is asked for, and at most.
const ANSWER: std::ops::RangeInclusive<u32> = 256..=8192;
/// Answers that are asked for at once: mistral.rs queues as many as come.
const ASKED: usize = 256;
/// Tokens that a character takes at most: one for each of its bytes.
const CHARACTER: usize = 4;

/// What a model is asked with.
pub(crate) enum Asked {
    /// The text, to go on with.
    Text(String),
    /// Messages for its chat template: role and content.
    Chat(Vec<(String, String)>),
}

/// What comes of it, in order; the end comes last, and once.
pub(crate) enum Piece {
    Text(String),
    End(GenerateFinished),
}

/// A loaded model.
pub(crate) struct Answers {
    model: Model,
    places: Arc<Semaphore>,
}

impl Answers {
    /// Loads a GGUF file, or a folder or repository with safetensors.
    pub(crate) async fn load(model: &str, running: usize) -> Result<Self> {
        let path = Path::new(model);
        let gguf = path
            .extension()
            .is_some_and(|extension| extension == "gguf");
        let model = if gguf {
            let folder = path.parent().filter(|folder| folder.as_os_str() != "");
            let folder = folder.unwrap_or(Path::new(".")).display();
            let file = path.file_name().context("a file")?.to_string_lossy();
            let builder = GgufModelBuilder::new(folder, vec![file]);
            builder.with_max_num_seqs(running).build().await?
        } else {
            let builder = TextModelBuilder::new(model);
            builder.with_max_num_seqs(running).build().await?
        };
        Ok(Self {
            model,
            places: Arc::new(Semaphore::new(ASKED)),
        })
    }

    /// Tokens that a prompt and its answer may have.
    pub(crate) fn context_length(&self) -> u32 {
        let length = self.model.max_sequence_length().ok().flatten();
        length.map_or(0, |length| u32::try_from(length).unwrap_or(u32::MAX))
    }

    /// Asks; pieces come until the receiver is dropped.
    pub(crate) async fn ask(
        &self,
        asked: Asked,
        sampling: SamplingParams,
    ) -> Result<mpsc::Receiver<Result<Piece, Status>>, Status> {
        let place = Arc::clone(&self.places).try_acquire_owned();
        let place =
            place.map_err(|_| Status::resource_exhausted("too many answers are asked for"))?;
        // Room for all of an answer: mistral.rs' engine waits for who does not read, and lets everybody wait with it.
        let asked_for = sampling.max_len.unwrap_or_default();
        let most = asked_for + 16;
        let (response, mut responses) = mpsc::channel(most);
        let stops = sampling.stop_toks.is_some();
        let (messages, prompt_tokens) = match asked {
            Asked::Text(text) => {
                let text = either::Either::Right(text);
                let tokens = self.model.tokenize(text, None, true, false, None).await;
                let tokens = tokens.map_err(|no| Status::invalid_argument(no.to_string()))?;
                let length = tokens.len();
                (RequestMessage::CompletionTokens(tokens), length)
            }
            Asked::Chat(messages) => (chat(messages), 0),
        };
        let request = NormalRequest {
            is_streaming: true,
            ..NormalRequest::new_simple(messages, sampling, response, 0, None, None)
        };
        let sender = self.model.inner().get_sender(None);
        let sender = sender.map_err(|no| Status::internal(no.to_string()))?;
        let begun = Instant::now();
        let sent = sender.send(Request::Normal(Box::new(request))).await;
        sent.map_err(|_| Status::unavailable("mistral.rs has ended"))?;

        let (pieces, answer) = mpsc::channel(most);
        tokio::spawn(async move {
            let _place = place;
            let mut usage = Usage {
                prompt_tokens: u32::try_from(prompt_tokens).unwrap_or(u32::MAX),
                ..Usage::default()
            };
            let mut first = None;
            while let Some(response) = responses.recv().await {
                let (text, finish) = match part(response, &mut usage) {
                    Ok(part) => part,
                    Err(status) => {
                        drop(pieces.send(Err(status)).await);
                        return;
                    }
                };
                let first = *first.get_or_insert_with(Instant::now);
                if !text.is_empty() && pieces.send(Ok(Piece::Text(text))).await.is_err() {
                    return;
                }
                if let Some(finish) = finish {
                    let end = finished(&finish, stops, usage, [begun, first]);
                    drop(pieces.send(Ok(Piece::End(end))).await);
                    return;
                }
            }
            // An answer that is cut within a character ends without a word, and short of the tokens of one that are not counted; any other
            // end like that is none.
            let cut = usage.completion_tokens as usize + CHARACTER > asked_for;
            let end = match first.filter(|_| cut) {
                Some(first) => Ok(Piece::End(finished("length", stops, usage, [begun, first]))),
                None => Err(Status::unavailable(
                    "mistral.rs ended before its answer did",
                )),
            };
            drop(pieces.send(end).await);
        });
        Ok(answer)
    }
}

fn chat(messages: Vec<(String, String)>) -> RequestMessage {
    let message = |(role, content)| {
        IndexMap::from([
            ("role".to_owned(), either::Either::Left(role)),
            ("content".to_owned(), either::Either::Left(content)),
        ])
    };
    RequestMessage::Chat {
        messages: messages.into_iter().map(message).collect(),
        enable_thinking: None,
        reasoning_effort: None,
    }
}

/// The text of a response, and why the answer ends with it if it does.
fn part(response: Response, usage: &mut Usage) -> Result<(String, Option<String>), Status> {
    let count = |tokens: usize| u32::try_from(tokens).unwrap_or(u32::MAX);
    let mut counts = None;
    let (text, finish) = match response {
        Response::CompletionChunk(chunk) => {
            let choice = chunk.choices.into_iter().next();
            choice.map(|choice| (choice.text, choice.finish_reason))
        }
        Response::Chunk(chunk) => {
            if let Some(counted) = chunk.usage {
                usage.prompt_tokens = count(counted.prompt_tokens);
                counts = Some(count(counted.completion_tokens));
            }
            let choice = chunk.choices.into_iter().next();
            choice.map(|choice| {
                (
                    choice.delta.content.unwrap_or_default(),
                    choice.finish_reason,
                )
            })
        }
        Response::ValidationError(no) => return Err(Status::invalid_argument(no.to_string())),
        Response::InternalError(no) => return Err(Status::internal(no.to_string())),
        Response::ModelError(no, _) | Response::CompletionModelError(no, _) => {
            return Err(Status::internal(no));
        }
        _ => return Err(Status::internal("mistral.rs answered with something else")),
    }
    .ok_or_else(|| Status::internal("mistral.rs answered with no choice"))?;
    // A response for each token, but within a character: then for several.
    usage.completion_tokens = counts.unwrap_or(usage.completion_tokens + 1);
    Ok((text, finish))
}

fn finished(
    finish: &str,
    stops: bool,
    usage: Usage,
    [begun, first]: [Instant; 2],
) -> GenerateFinished {
    let reason = match finish {
        "length" => FinishReason::Length,
        "stop" if stops => FinishReason::Stop,
        _ => FinishReason::Eos,
    };
    let took = |time: std::time::Duration| prost_types::Duration::try_from(time).ok();
    GenerateFinished {
        finish_reason: reason.into(),
        usage: Some(usage),
        timings: Some(Timings {
            queue: None,
            prefill: took(first - begun),
            decode: took(first.elapsed()),
        }),
        ..GenerateFinished::default()
    }
}

/// How tokens are drawn, in mistral.rs' terms.
pub(crate) fn sampling(
    asked: Option<Sampling>,
    stop: Vec<String>,
    most: u32,
) -> Result<SamplingParams, Status> {
    let asked = asked.unwrap_or_default();
    if asked.seed.is_some() {
        return Err(Status::invalid_argument(
            "sampling.seed: mistral.rs draws with a seed of its own",
        ));
    }
    let share = |value: Option<f32>| value.is_none_or(|value| (0.0..=1.0).contains(&value));
    let penalty = asked.repetition_penalty;
    if !share(asked.top_p) || !share(asked.min_p) {
        return Err(Status::invalid_argument(
            "sampling.top_p and sampling.min_p are from 0 to 1",
        ));
    }
    if penalty.is_some_and(|penalty| !(0.01..=100.0).contains(&penalty)) {
        return Err(Status::invalid_argument(
            "sampling.repetition_penalty is from 0.01 to 100",
        ));
    }
    if most > *ANSWER.end() {
        return Err(Status::invalid_argument(format!(
            "max_tokens is at most {}",
            ANSWER.end()
        )));
    }
    let mut params = match asked.temperature {
        None | Some(0.0) => SamplingParams::deterministic(),
        Some(temperature) if (0.01..=100.0).contains(&temperature) => SamplingParams {
            temperature: Some(temperature.into()),
            top_k: asked.top_k.filter(|&k| k > 0).map(|k| k as usize),
            top_p: asked.top_p.map(f64::from),
            min_p: asked.min_p.map(f64::from),
            ..SamplingParams::neutral()
        },
        Some(_) => {
            return Err(Status::invalid_argument(
                "sampling.temperature is 0, or from 0.01 to 100",
            ));
        }
    };
    params.repetition_penalty = asked.repetition_penalty;
    params.stop_toks = (!stop.is_empty()).then_some(StopTokens::Seqs(stop));
    let most = if most == 0 { *ANSWER.start() } else { most };
    params.max_len = Some(most as usize);
    Ok(params)
}
