//! The engine in a plain loop, with a clock beside it.
//!
//! Knows what to time, not what to make of it. Start at `Driver`.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use engine::{
    Activations, Chosen, Command, Config, DocumentId, Engine, Event, ModelInfo, RequestId,
    Sampling, Seq, SessionId, Strategy, TenantId, TokenId,
};

/// An engine and the numbers of what was given to it.
pub(crate) struct Driver {
    engine: Engine,
    events: Vec<Event>,
    numbers: u64,
}

impl Driver {
    /// Loads a model and its generator with the engine's default bounds. What is measured again is computed again.
    pub(crate) fn load(
        model: &Path,
        generator: Option<&Path>,
        activations: Activations,
    ) -> Result<Self> {
        let config = Config {
            activations,
            prefix_cache: false,
            ..Config::default()
        };
        let engine = Engine::load(model, generator, config).context("the engine does not load")?;
        Ok(Self {
            engine,
            events: Vec::new(),
            numbers: 0,
        })
    }

    /// What is measured.
    pub(crate) fn model(&self) -> &ModelInfo {
        self.engine.model()
    }

    fn number(&mut self) -> u64 {
        self.numbers += 1;
        self.numbers
    }

    fn push(&mut self, command: Command) -> Result<()> {
        self.engine
            .push(command)
            .ok()
            .context("a queue of the engine is full: measure less at once")
    }

    /// Steps until `done` has seen what it waits for.
    fn until(&mut self, mut done: impl FnMut(&Event) -> Result<bool>) -> Result<()> {
        let mut events = std::mem::take(&mut self.events);
        let mut reached = false;
        while !reached {
            if self.engine.idle() {
                bail!("the engine has nothing to do and has not answered");
            }
            self.engine
                .step(Instant::now, &mut events)
                .context("the engine broke")?;
            for event in events.drain(..) {
                match &event {
                    Event::Failed { error, .. } => bail!("a request failed: {error}"),
                    Event::SessionFailed { error, .. } => bail!("a session failed: {error}"),
                    other => reached |= done(other)?,
                }
            }
        }
        self.events = events;
        Ok(())
    }

    fn generate(
        &mut self,
        session: Option<SessionId>,
        prompt: &[TokenId],
        max_tokens: usize,
    ) -> Result<RequestId> {
        let request = RequestId(self.number());
        self.push(Command::Generate {
            request,
            tenant: TenantId::default(),
            session,
            adapter_scale: 1.0,
            chosen: Chosen::default(),
            prompt: prompt.to_vec(),
            max_tokens,
            sampling: Sampling::default(),
            eos: Vec::new(),
        })?;
        Ok(request)
    }

    /// Prompts read side by side, each with the adapter of its session or bare, until each has its first token.
    pub(crate) fn prefill<'a>(
        &mut self,
        prompts: impl IntoIterator<Item = (Option<SessionId>, &'a [TokenId])>,
    ) -> Result<Duration> {
        let start = Instant::now();
        let mut left = 0_usize;
        for (session, prompt) in prompts {
            self.generate(session, prompt, 1)?;
            left += 1;
        }
        self.until(|event| {
            left -= usize::from(matches!(event, Event::Finished { .. }));
            Ok(left == 0)
        })?;
        Ok(start.elapsed())
    }

    /// New sessions that have each been told one document, side by side, and how long telling took: until the versions
    /// that hold all of it.
    pub(crate) fn ingest(
        &mut self,
        documents: &[&[TokenId]],
    ) -> Result<(Vec<SessionId>, Duration)> {
        let generator = self
            .engine
            .model()
            .generator
            .as_ref()
            .context("there is no generator: nothing can be ingested")?;
        let window = generator.window;
        let mut sessions = Vec::new();
        for _ in documents {
            let session = SessionId(self.number());
            self.push(Command::Open {
                session,
                tenant: TenantId::default(),
                strategy: Strategy::Parallel,
                window,
            })?;
            self.until(|event| Ok(matches!(event, Event::Opened { .. })))?;
            sessions.push(session);
        }
        let start = Instant::now();
        for (session, document) in sessions.iter().zip(documents) {
            self.push(Command::Ingest {
                session: *session,
                seq: Seq(1),
                document: DocumentId(1),
                tokens: document.to_vec(),
                end_of_document: true,
            })?;
        }
        let mut left = documents.len();
        self.until(|event| {
            left -=
                usize::from(matches!(event, Event::Applied { newest, .. } if newest.seq == Seq(1)));
            Ok(left == 0)
        })?;
        Ok((sessions, start.elapsed()))
    }

    /// Ends a session.
    pub(crate) fn close(&mut self, session: SessionId) -> Result<()> {
        self.push(Command::Close { session })
    }

    /// One answer of `tokens` tokens for each row, all decoding side by side. How long the decoding took, from the step
    /// that gave the last row its first token to the end, and how many tokens came in it.
    pub(crate) fn decode(
        &mut self,
        rows: &[Option<SessionId>],
        prompt: &[TokenId],
        tokens: usize,
    ) -> Result<(usize, Duration)> {
        for session in rows {
            self.generate(*session, prompt, tokens)?;
        }
        let (mut begun, mut ended, mut timed) = (std::collections::HashSet::new(), 0, 0);
        let mut start = None;
        self.until(|event| {
            match event {
                Event::Token { request, .. } => {
                    timed += usize::from(start.is_some());
                    begun.insert(*request);
                    if begun.len() == rows.len() && start.is_none() {
                        start = Some(Instant::now());
                    }
                }
                Event::Finished { .. } => ended += 1,
                _ => {}
            }
            Ok(ended == rows.len())
        })?;
        let start = start.context("a row ended without a token")?;
        Ok((timed, start.elapsed()))
    }
}
