//! The demonstration: the whole job once, measured while one looks on.
//!
//! A text that no model has read is streamed into a session, each chunk becomes a version of the
//! session's adapter, and then the same ten questions go to four: the bare model, the imprinted model,
//! the bare model with the text in its prompt, and, as the control, the model with the imprint of
//! another text. Hits and misses are shown alike; nothing is recorded beforehand. It fails when a
//! call fails, when a version is missing, or when the imprint does not make the true answers likelier
//! than the bare model and than the control. It starts no server: the program does. Start at [`run`].

pub(crate) mod almanac;
mod report;

use std::time::{Duration, Instant};

use serde::Serialize;

use crate::{
    Client, Error, IngestOptions,
    cli::{Failure, Output, quiet_pipe},
    prompt, v1,
};
use almanac::{FACTS, Fact, HARBOUR, OBSERVATORY};
pub use report::{Answer, Arm, ArmTotal, Question, Report, Version};

/// The most tokens of an answer; the true ones have up to about eight.
const MAX_TOKENS: u32 = 24;

/// How to demonstrate.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct Options {
    /// Answer with one JSON document
    #[arg(long)]
    pub json: bool,
    /// The bearer key, for a server that asks for one.
    #[arg(skip)]
    pub key: Option<crate::Key>,
    /// How long a version may let itself be waited for; 120 s if absent.
    #[arg(skip)]
    pub patience: Option<Duration>,
}

/// Runs the demonstration against the server at `endpoint` and writes to standard output what it
/// measures: for people as it goes, or one JSON document at the end.
///
/// # Errors
/// [`Failure::Client`] if a call fails; [`Failure::Demo`], after everything has been shown, if the
/// imprint did not do what it should. A closed pipe is no failure; the report is then empty.
pub async fn run(endpoint: &str, options: Options) -> Result<Report, Failure> {
    let mut output = Output::stdout(options.json);
    quiet_pipe(run_with(endpoint, options, &mut output).await)
}

async fn run_with(
    endpoint: &str,
    options: Options,
    output: &mut Output,
) -> Result<Report, Failure> {
    let connect = crate::Options {
        key: options.key,
        call_timeout: Duration::from_secs(600),
        ..crate::Options::default()
    };
    let client = Client::connect(endpoint, connect).await?;
    let mut sessions = Vec::new();
    let patience = options.patience.unwrap_or(Duration::from_secs(120));
    let shown = show(&client, patience, &mut sessions, output).await;
    let mut removed = Ok(());
    for session in &sessions {
        removed = removed.and(client.delete_session(session).await);
    }
    let report = shown?;
    removed?;
    if output.json() {
        output.document(&report)?;
    } else {
        output.line(report.closing())?;
    }
    if report.failures.is_empty() {
        Ok(report)
    } else {
        Err(Failure::Demo(report.failures))
    }
}

/// Shows all of it; `sessions` names those that it created, also when it fails.
async fn show(
    client: &Client,
    patience: Duration,
    sessions: &mut Vec<String>,
    output: &mut Output,
) -> Result<Report, Failure> {
    let model = client.get_model("").await?;
    let Some(generator) = &model.generator else {
        let what = format!("the server runs {} without a generator", model.name);
        return Err(Failure::Demo(vec![what]));
    };
    let format = match generator.prompt_format.as_str() {
        "" => "Question: {question}\nAnswer:",
        format => format,
    };
    let mut report = Report {
        model: model.name.clone(),
        parameters: model.parameters,
        weight_format: model.weight_format.clone(),
        generator_parameters: generator.parameters,
        ..Report::default()
    };
    if !output.json() {
        output.line(report.opening())?;
    }

    let harbour = client
        .create_session(v1::CreateSessionRequest::default())
        .await?
        .session_id;
    sessions.push(harbour.clone());
    tell(client, &harbour, patience, &mut report, output).await?;
    let foreign = client
        .create_session(v1::CreateSessionRequest::default())
        .await?
        .session_id;
    sessions.push(foreign.clone());
    let mut ingest = client
        .ingest(
            &foreign,
            IngestOptions {
                patience,
                ..IngestOptions::default()
            },
        )
        .await?;
    ingest.document("observatory");
    ingest.last_text(OBSERVATORY).await?;
    if ingest.finish().await?.is_none() {
        report
            .failures
            .push("the control got no version".to_owned());
    }

    let state = client.get_session(&harbour).await?;
    report.state_bytes = state.state_bytes;
    report.core_bytes = state.core_bytes;
    report.context_tokens = state.context_tokens;
    if !output.json() {
        output.line(report.between())?;
    }
    for (i, fact) in FACTS.iter().enumerate() {
        let mut answers = Vec::with_capacity(Arm::ALL.len());
        for arm in Arm::ALL {
            let (session, prompt) = match arm {
                Arm::Bare => ("", prompt::question(fact.question)),
                Arm::Imprinted => (harbour.as_str(), prompt::question(fact.question)),
                Arm::InContext => {
                    let asked = format.replace("{question}", fact.question);
                    ("", prompt::text(format!("{}\n\n{asked}", HARBOUR.concat())))
                }
                Arm::Foreign => (foreign.as_str(), prompt::question(fact.question)),
            };
            answers.push(answer(client, arm, session, prompt, fact).await?);
        }
        let question = Question {
            question: fact.question.to_owned(),
            true_answer: fact.answer.to_owned(),
            answers,
        };
        if !output.json() {
            output.line(question.shown(i + 1))?;
        }
        report.questions.push(question);
    }
    report.judge();
    if !output.json() {
        output.line(report.table())?;
    }
    Ok(report)
}

/// Streams the harbour's text in, a chunk at a time, and shows the version that each one becomes.
async fn tell(
    client: &Client,
    session: &str,
    patience: Duration,
    report: &mut Report,
    output: &mut Output,
) -> Result<(), Failure> {
    let mut ingest = client
        .ingest(
            session,
            IngestOptions {
                patience,
                ..IngestOptions::default()
            },
        )
        .await?;
    ingest.document("harbour");
    let mut newest = 0;
    for (i, chunk) in HARBOUR.iter().enumerate() {
        let sent = Instant::now();
        let last = i + 1 == HARBOUR.len();
        let (seq, applied) = if last {
            let seq = ingest.last_text(*chunk).await?;
            (seq, ingest.finish().await?)
        } else {
            let seq = ingest.text(*chunk).await?;
            (seq, ingest.flush().await?)
        };
        let Some(applied) = applied.filter(|applied| applied.seq >= seq) else {
            report
                .failures
                .push(format!("chunk {seq} became no version"));
            continue;
        };
        if applied.adapter_version <= newest {
            report
                .failures
                .push(format!("chunk {seq} became no new version"));
        }
        newest = applied.adapter_version;
        let version = Version {
            seq,
            adapter_version: applied.adapter_version,
            state_digest: applied.state_digest,
            tokens: applied.tokens,
            ms: ms(sent.elapsed()),
        };
        if !output.json() {
            output.line(version.shown(chunk))?;
        }
        report.versions.push(version);
    }
    Ok(())
}

/// One greedy answer and the log-probability of the true one.
async fn answer(
    client: &Client,
    arm: Arm,
    session: &str,
    prompt: v1::Prompt,
    fact: &Fact,
) -> Result<Answer, Failure> {
    let adapter = v1::AdapterSelection {
        // The server would leave out what does not concern the question: the control is the whole.
        adapter_scale: (arm == Arm::Foreign).then_some(1.0),
        ..prompt::adapter(session)
    };
    let asked = Instant::now();
    let mut generation = client
        .generate(v1::GenerateRequest {
            adapter: Some(adapter.clone()),
            prompt: Some(prompt.clone()),
            stop: vec!["\n".to_owned()],
            max_tokens: MAX_TOKENS,
            ..v1::GenerateRequest::default()
        })
        .await?;
    let mut first_token_ms = None;
    let mut text = String::new();
    while let Some(delta) = generation.next().await? {
        first_token_ms.get_or_insert_with(|| ms(asked.elapsed()));
        text.push_str(&delta.text);
    }
    // An answer whose first token ends the line has no delta: its first token is its end.
    let first_token_ms = first_token_ms.unwrap_or_else(|| ms(asked.elapsed()));
    let finished = generation
        .finished()
        .ok_or_else(|| Error::protocol("a generation ended without `finished`"))?;
    if finished.finish_reason() == v1::FinishReason::Shutdown {
        return Err(Failure::Demo(vec!["the server shut down".to_owned()]));
    }
    let scored = client
        .score(v1::ScoreRequest {
            adapter: Some(adapter),
            prompt: Some(prompt),
            continuations: vec![v1::Continuation {
                form: Some(v1::continuation::Form::Text(format!(" {}\n", fact.answer))),
            }],
            ..v1::ScoreRequest::default()
        })
        .await?;
    let score = scored
        .scores
        .first()
        .ok_or_else(|| Error::protocol("a continuation got no score"))?;
    Ok(Answer {
        arm,
        hit: report::holds(&text, fact.key),
        text,
        logprob: score.logprob,
        prompt_tokens: finished.usage.unwrap_or_default().prompt_tokens,
        first_token_ms,
        adapter_version: finished.adapter_version,
    })
}

fn ms(span: Duration) -> f64 {
    span.as_secs_f64() * 1e3
}

impl Serialize for Arm {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

#[cfg(test)]
mod tests;
