//! The load itself: each arrival is sent at its time, whatever became of those before it.
//!
//! All times are from the arrival's intended time on, not from when it could be sent: what waits for a free place, a slow server or
//! this process counts as waiting (coordinated omission). Start at [`Load::run`].

#[cfg(test)]
mod tests;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use imprint_client::{
    Client, Error, IngestOptions, prompt,
    v1::{CreateSessionRequest, GenerateRequest, Prompt, Usage},
};
use tokio::{
    sync::{Mutex, Semaphore},
    task::JoinSet,
};

use super::{
    arrivals::{Arrival, Kind, Plan},
    facts::{self, Fact},
};

/// Sessions that are told their context side by side before the load begins.
const TOLD_AT_ONCE: usize = 8;

/// What became of an arrival. Times are from the beginning of the load.
#[derive(Clone, Debug)]
pub(crate) struct Outcome {
    pub(crate) kind: Kind,
    /// When it should have been sent.
    pub(crate) at: Duration,
    /// When it was.
    pub(crate) sent: Duration,
    /// When the first token came.
    pub(crate) first: Option<Duration>,
    /// When the last token came.
    pub(crate) last: Option<Duration>,
    /// Between messages with tokens in them.
    pub(crate) gaps: Vec<Duration>,
    /// When it had ended: the answer, or the version with what was told.
    pub(crate) ended: Duration,
    pub(crate) prompt_tokens: u64,
    /// Of these the ones that the server had read before.
    pub(crate) cached_tokens: u64,
    /// Tokens of the answer, or of what was told.
    pub(crate) tokens: u64,
    /// Whether the answer holds what was asked for.
    pub(crate) right: bool,
    /// Why there is no answer: a gRPC code and its reason.
    pub(crate) error: Option<String>,
}

impl Outcome {
    fn new(arrival: &Arrival) -> Self {
        Self {
            kind: arrival.kind,
            at: arrival.at,
            sent: arrival.at,
            first: None,
            last: None,
            gaps: Vec::new(),
            ended: arrival.at,
            prompt_tokens: 0,
            cached_tokens: 0,
            tokens: 0,
            right: false,
            error: None,
        }
    }

    /// A piece of the answer came. An engine that names no tokens counts them at the end; its pieces of text are timed instead.
    fn saw(&mut self, tokens: usize, text: &str, now: Duration) {
        if tokens == 0 && (text.is_empty() || self.tokens > 0) {
            return;
        }
        match self.last {
            None => self.first = Some(now),
            Some(last) => self.gaps.push(now.saturating_sub(last)),
        }
        self.last = Some(now);
        self.tokens += tokens as u64;
    }

    /// What the engine has counted.
    fn used(&mut self, usage: &Usage) {
        self.prompt_tokens = u64::from(usage.prompt_tokens);
        self.cached_tokens = u64::from(usage.cached_tokens);
        if self.tokens == 0 {
            self.tokens = u64::from(usage.completion_tokens);
        }
    }

    /// What was still running when nobody waited any longer.
    pub(crate) fn unfinished(arrival: &Arrival, ended: Duration) -> Self {
        Self {
            ended,
            error: Some("Unfinished".to_owned()),
            ..Self::new(arrival)
        }
    }
}

/// A session, and what it was told.
struct Target {
    session: String,
    context: String,
    facts: Vec<Fact>,
    /// Context tokens in its newest version. Held while something is told: chunks of a session come one after the other.
    told: Mutex<u64>,
}

/// How much is asked.
#[derive(Clone, Debug)]
pub(crate) struct Settings {
    pub(crate) sessions: usize,
    pub(crate) facts: usize,
    pub(crate) told_facts: usize,
    pub(crate) output_tokens: u32,
    pub(crate) in_context: bool,
    /// Whether the generator names a format for questions; without one they go as plain text.
    pub(crate) question_format: bool,
    pub(crate) max_concurrency: usize,
    pub(crate) drain: Duration,
    pub(crate) seed: u64,
}

/// Clients and sessions of a run.
pub(crate) struct Load {
    clients: Vec<Client>,
    targets: Vec<Target>,
    settings: Settings,
}

/// What telling the sessions their contexts took, before the load.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Told {
    pub(crate) tokens: u64,
    pub(crate) took: Duration,
}

impl Load {
    /// Makes the sessions and tells each its context, unless that goes into the prompts.
    pub(crate) async fn prepare(clients: Vec<Client>, settings: Settings) -> Result<(Self, Told)> {
        let began = Instant::now();
        let mut targets = Vec::new();
        let mut tokens = 0;
        let numbers: Vec<_> = (0..settings.sessions).collect();
        for some in numbers.chunks(TOLD_AT_ONCE) {
            let mut telling = JoinSet::new();
            for number in some {
                let client = clients[number % clients.len()].clone();
                telling.spawn(target(client, *number, settings.clone()));
            }
            while let Some(told) = telling.join_next().await {
                let (number, target) = told??;
                tokens += *target.told.lock().await;
                targets.push((number, target));
            }
        }
        targets.sort_by_key(|(number, _)| *number);
        let load = Self {
            clients,
            targets: targets.into_iter().map(|(_, target)| target).collect(),
            settings,
        };
        let took = began.elapsed();
        Ok((load, Told { tokens, took }))
    }

    /// Sends all of a plan and waits for what became of it. In the order of the plan.
    pub(crate) async fn run(self: Arc<Self>, plan: &Plan) -> Vec<Outcome> {
        let places = Arc::new(Semaphore::new(self.settings.max_concurrency));
        let begin = Instant::now();
        let mut running = JoinSet::new();
        for (number, arrival) in plan.0.iter().copied().enumerate() {
            if let Some(time) = begin.checked_add(arrival.at) {
                tokio::time::sleep_until(time.into()).await;
            }
            let (load, places) = (Arc::clone(&self), Arc::clone(&places));
            running.spawn(async move {
                // Nobody closes the semaphore.
                let _place = places.acquire().await;
                (number, load.one(number, &arrival, begin).await)
            });
        }
        let mut outcomes: Vec<_> = vec![None; plan.0.len()];
        let drained = tokio::time::timeout(self.settings.drain, async {
            while let Some(ended) = running.join_next().await {
                if let Ok((number, outcome)) = ended {
                    outcomes[number] = Some(outcome);
                }
            }
        });
        // What is missing is counted below.
        drop(drained.await);
        let ended = begin.elapsed();
        let all = outcomes.into_iter().zip(&plan.0);
        all.map(|(outcome, arrival)| outcome.unwrap_or_else(|| Outcome::unfinished(arrival, ended)))
            .collect()
    }

    async fn one(&self, number: usize, arrival: &Arrival, begin: Instant) -> Outcome {
        let client = &self.clients[number % self.clients.len()];
        let mut outcome = Outcome::new(arrival);
        outcome.sent = begin.elapsed();
        let done = match arrival.kind {
            Kind::Ask => self.ask(client, arrival, begin, &mut outcome).await,
            Kind::Ingest => self.tell(client, arrival, &mut outcome).await,
        };
        outcome.ended = begin.elapsed();
        outcome.error = done.err().map(|error| name(&error));
        outcome
    }

    async fn ask(
        &self,
        client: &Client,
        arrival: &Arrival,
        begin: Instant,
        outcome: &mut Outcome,
    ) -> Result<(), Error> {
        let (request, answer) = self.question(arrival);
        let mut generation = client.generate(request).await?;
        let mut text = String::new();
        while let Some(delta) = generation.next().await? {
            text.push_str(&delta.text);
            outcome.saw(delta.token_ids.len(), &delta.text, begin.elapsed());
        }
        if let Some(usage) = generation.finished().and_then(|finished| finished.usage) {
            outcome.used(&usage);
        }
        outcome.right = !answer.is_empty() && text.contains(&answer);
        Ok(())
    }

    fn question(&self, arrival: &Arrival) -> (GenerateRequest, String) {
        let request = |adapter, prompt: Prompt| GenerateRequest {
            adapter,
            prompt: Some(prompt),
            max_tokens: self.settings.output_tokens,
            ..GenerateRequest::default()
        };
        let Some((target, fact)) = self.fact(arrival) else {
            // No sessions: the bare model, asked for something to say.
            let text = "Once upon a time there was";
            return (request(None, prompt::text(text)), String::new());
        };
        let request = if self.settings.in_context {
            let text = in_context(&target.context, &fact.question);
            request(None, prompt::text(text))
        } else {
            let prompt = if self.settings.question_format {
                prompt::question(&fact.question)
            } else {
                prompt::text(format!("Question: {}\nAnswer:", fact.question))
            };
            request(Some(prompt::adapter(&target.session)), prompt)
        };
        (request, fact.answer.clone())
    }

    /// Whom an arrival asks, and what for; nobody where there are no sessions.
    fn fact(&self, arrival: &Arrival) -> Option<(&Target, &Fact)> {
        let target = self.targets.get(arrival.session)?;
        let place = arrival.draw.checked_rem(target.facts.len() as u64)?;
        Some((target, target.facts.get(usize::try_from(place).ok()?)?))
    }

    async fn tell(
        &self,
        client: &Client,
        arrival: &Arrival,
        outcome: &mut Outcome,
    ) -> Result<(), Error> {
        let Some(target) = self.targets.get(arrival.session) else {
            return Ok(());
        };
        let round = arrival.draw | 1;
        let more = facts::facts(
            self.settings.seed,
            arrival.session,
            round,
            self.settings.told_facts,
        );
        let mut told = target.told.lock().await;
        let tokens = tell(client, &target.session, facts::text(&more)).await?;
        outcome.tokens = tokens.saturating_sub(*told);
        *told = tokens;
        Ok(())
    }

    /// Ends the sessions of this run.
    pub(crate) async fn end(&self) {
        for target in &self.targets {
            if !target.session.is_empty() {
                // A server that has gone has no sessions either.
                drop(self.clients[0].delete_session(&target.session).await);
            }
        }
    }

    /// The texts of a plan, for peers that are asked the same.
    pub(crate) fn workload(&self, plan: &Plan) -> serde_json::Value {
        let contexts: Vec<_> = self.targets.iter().map(|target| &target.context).collect();
        let asked = plan.0.iter().filter(|arrival| arrival.kind == Kind::Ask);
        let requests: Vec<_> = asked
            .filter_map(|arrival| {
                let (target, fact) = self.fact(arrival)?;
                Some(serde_json::json!({
                    "at": arrival.at.as_secs_f64(),
                    "session": arrival.session,
                    "question": fact.question,
                    "prompt": in_context(&target.context, &fact.question),
                    "answer": fact.answer,
                }))
            })
            .collect();
        serde_json::json!({
            "output_tokens": self.settings.output_tokens,
            "max_concurrency": self.settings.max_concurrency,
            "contexts": contexts,
            "requests": requests,
        })
    }
}

/// The same question with its context before it.
fn in_context(context: &str, question: &str) -> String {
    format!("{context}\n\nQuestion: {question}\nAnswer:")
}

/// A new session that knows its facts, with its number.
async fn target(client: Client, number: usize, settings: Settings) -> Result<(usize, Target)> {
    let facts = facts::facts(settings.seed, number, 0, settings.facts);
    let context = facts::text(&facts);
    let (mut session, mut told) = (String::new(), 0);
    if !settings.in_context {
        let request = CreateSessionRequest {
            labels: [("purpose".to_owned(), "bench".to_owned())].into(),
            ..CreateSessionRequest::default()
        };
        let created = client.create_session(request).await;
        session = created.context("a session")?.session_id;
        if !facts.is_empty() {
            told = tell(&client, &session, context.clone())
                .await
                .context("telling a session its context")?;
        }
    }
    let told = Mutex::new(told);
    let target = Target {
        session,
        context,
        facts,
        told,
    };
    Ok((number, target))
}

/// Tells a session a document and waits for the version that holds it: the context tokens in it.
async fn tell(client: &Client, session: &str, text: String) -> Result<u64, Error> {
    let mut ingest = client.ingest(session, IngestOptions::default()).await?;
    ingest.last_text(text).await?;
    let applied = ingest.finish().await?;
    Ok(applied.map_or(0, |applied| applied.tokens))
}

/// What an error is counted as.
fn name(error: &Error) -> String {
    match error {
        Error::Refused(refusal) if refusal.reason.is_empty() => format!("{:?}", refusal.code),
        Error::Refused(refusal) => format!("{:?} {}", refusal.code, refusal.reason),
        Error::Unreachable { .. } => "Unreachable".to_owned(),
        Error::Silent { .. } => "Silent".to_owned(),
        _ => "Protocol".to_owned(),
    }
}
