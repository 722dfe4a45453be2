//! The engine in a plain loop, with a clock beside it.
//!
//! Knows what to time, not what to make of it. Start at `Driver`.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use engine::{
    Chosen, Command, Config, DocumentId, Engine, Event, ModelInfo, RequestId, Sampling, Seq,
    SessionId, Strategy, TenantId, TokenId, Usage,
};

use crate::disk::Disk;

/// An engine, the numbers of what was given to it, and where its snapshots go, if they are kept.
pub(crate) struct Driver {
    engine: Engine,
    disk: Option<Disk>,
    events: Vec<Event>,
    numbers: u64,
}

impl Driver {
    /// Loads a model and its generator.
    pub(crate) fn load(model: &Path, generator: Option<&Path>, config: Config) -> Result<Self> {
        let engine = Engine::load(model, generator, config).context("the engine does not load")?;
        Ok(Self {
            engine,
            disk: None,
            events: Vec::new(),
            numbers: 0,
        })
    }

    /// Keeps what leaves memory in a folder, of at most so many bytes.
    pub(crate) fn keep(&mut self, dir: &Path, bytes: u64) -> Result<()> {
        let model = self.engine.model();
        let generator = model.generator.as_ref();
        let generator = generator.map_or("", |generator| &generator.digest);
        self.disk = Some(Disk::start(dir, bytes, &model.digest, generator)?);
        Ok(())
    }

    /// What is measured.
    pub(crate) fn model(&self) -> &ModelInfo {
        self.engine.model()
    }

    /// What is in use.
    pub(crate) fn usage(&self) -> Usage {
        self.engine.usage()
    }

    /// The most bytes that a core takes.
    pub(crate) fn core_bytes(&self) -> usize {
        self.engine.core_bytes()
    }

    /// Files and bytes of snapshots, as of the disk's last answer.
    pub(crate) fn kept(&self) -> (usize, u64) {
        self.disk.as_ref().map_or((0, 0), Disk::kept)
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

    /// One step, behind a wait for the disk if there is nothing else to do. What the engine asks of the disk goes there.
    pub(crate) fn step(&mut self, mut seen: impl FnMut(&Event) -> Result<()>) -> Result<()> {
        if let Some(disk) = &mut self.disk {
            let waits = self.engine.idle() && self.engine.waits();
            let mut answers: Vec<_> = waits
                .then(|| disk.wait())
                .transpose()?
                .into_iter()
                .collect();
            answers.extend(disk.answers());
            for answer in answers {
                self.push(answer)?;
            }
        }
        if self.engine.idle() {
            bail!("the engine has nothing to do and has not answered");
        }
        let mut events = std::mem::take(&mut self.events);
        self.engine
            .step(Instant::now, &mut events)
            .context("the engine broke")?;
        for event in events.drain(..) {
            match (event, &self.disk) {
                (event @ (Event::Save { .. } | Event::Wanted { .. }), Some(disk)) => {
                    disk.ask(event)?;
                }
                (Event::Failed { error, .. }, _) => bail!("a request failed: {error}"),
                (Event::SessionFailed { error, .. }, _) => bail!("a session failed: {error}"),
                (event, _) => seen(&event)?,
            }
        }
        self.events = events;
        Ok(())
    }

    /// Steps until `done` has seen what it waits for.
    fn until(&mut self, mut done: impl FnMut(&Event) -> Result<bool>) -> Result<()> {
        let mut reached = false;
        while !reached {
            self.step(|event| {
                reached |= done(event)?;
                Ok(())
            })?;
        }
        Ok(())
    }

    /// Asks for an answer of so many tokens.
    pub(crate) fn generate(
        &mut self,
        session: Option<SessionId>,
        chosen: Chosen,
        prompt: &[TokenId],
        max_tokens: usize,
    ) -> Result<RequestId> {
        let request = RequestId(self.number());
        self.push(Command::Generate {
            request,
            tenant: TenantId::default(),
            session,
            adapter_scale: 1.0,
            chosen,
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
            self.generate(session, Chosen::default(), prompt, 1)?;
            left += 1;
        }
        self.until(|event| {
            left -= usize::from(matches!(event, Event::Finished { .. }));
            Ok(left == 0)
        })?;
        Ok(start.elapsed())
    }

    /// Tokens of the generator's windows.
    pub(crate) fn window(&self) -> Result<usize> {
        let generator = self.engine.model().generator.as_ref();
        let generator = generator.context("there is no generator: nothing can be ingested")?;
        Ok(generator.window)
    }

    /// A new session.
    pub(crate) fn open(&mut self, window: usize) -> Result<SessionId> {
        let session = SessionId(self.number());
        self.push(Command::Open {
            session,
            tenant: TenantId::default(),
            strategy: Strategy::Parallel,
            window,
        })?;
        self.until(|event| Ok(matches!(event, Event::Opened { .. })))?;
        Ok(session)
    }

    /// Tells a session something; waits for nothing.
    pub(crate) fn tell(
        &mut self,
        session: SessionId,
        seq: Seq,
        document: DocumentId,
        tokens: &[TokenId],
        end_of_document: bool,
    ) -> Result<()> {
        self.push(Command::Ingest {
            session,
            seq,
            document,
            tokens: tokens.to_vec(),
            end_of_document,
        })
    }

    /// Asks for a version that holds all chunks up to this one, if it would not come by itself, and waits for it.
    pub(crate) fn see(&mut self, session: SessionId, seq: Seq, publish: bool) -> Result<()> {
        if publish {
            self.push(Command::Publish {
                session,
                seq,
                provisional: Vec::new(),
                asked: true,
            })?;
        }
        self.until(|event| Ok(matches!(event, Event::Applied { session: of, newest } if *of == session && newest.seq >= seq)))
    }

    /// New sessions that have each been told one document, side by side, and how long telling took: until the versions
    /// that hold all of it.
    pub(crate) fn ingest(
        &mut self,
        documents: &[&[TokenId]],
    ) -> Result<(Vec<SessionId>, Duration)> {
        let window = self.window()?;
        let mut sessions = Vec::new();
        for _ in documents {
            sessions.push(self.open(window)?);
        }
        let start = Instant::now();
        for (session, document) in sessions.iter().zip(documents) {
            self.tell(*session, Seq(1), DocumentId(1), document, true)?;
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
            self.generate(*session, Chosen::default(), prompt, tokens)?;
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
