//! The engine itself: takes commands, forms the batch of a step, runs the forward, hands the results round.
//!
//! What a session or a request makes of its part stands in their own files, who runs how much in the scheduler's. Start at
//! [`Engine::step`].
//!
//! KV blocks: a request gets all it can come to need when it starts, an open window what its next row needs. What an open
//! window holds can be taken from it between steps (its tokens are then run again, without writing). A window takes from
//! those whose turn comes after its own, so the first always goes on. A request takes from those that rest, read longest
//! ago first, then from those with a turn, from each window once. While the first window waits for blocks, no request
//! starts: those that run end, so it gets them. So neither waits for ever.

use std::{
    collections::{BTreeMap, VecDeque},
    path::Path,
    sync::Arc,
    time::Instant,
};

use generator::{Generator, Strategy};
use lm::{KvCache, Lm, LoadOptions};

use crate::{
    blocks::{BlockAllocator, Blocks},
    command::{Command, Sampling},
    config::Config,
    digest::StateHash,
    error::{ConfigError, Error, RequestError, SessionError},
    event::{Event, Finish, Rejected},
    ids::{DocumentId, RequestId, SessionId, TokenId, Version},
    model::ModelInfo,
    request::{Pin, Request, Work},
    sampling::Sampler,
    scheduler,
    session::{Bounds, Context, Session},
};

/// The queue that the command belongs to is full: the command comes back.
#[derive(Debug)]
pub struct Full(pub Command);

/// What is in use, against the bounds of `Config`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Open sessions.
    pub sessions: usize,
    /// Requests that run.
    pub running: usize,
    /// Requests that wait to run.
    pub queued: usize,
    /// Context tokens that wait to be encoded.
    pub queued_tokens: usize,
    /// Free blocks of the KV cache.
    pub free_blocks: usize,
    /// All blocks of the KV cache.
    pub blocks: usize,
    /// Bytes that the states of the open sessions may come to take.
    pub state_bytes: usize,
}

/// One frozen model with its sessions and requests. One thread owns it.
pub struct Engine {
    lm: Lm,
    kv: KvCache,
    model: Arc<ModelInfo>,
    config: Config,
    bounds: Bounds,
    allocator: BlockAllocator,
    commands: VecDeque<Command>,
    sessions: BTreeMap<SessionId, Session>,
    waiting: VecDeque<Request>,
    running: Vec<Request>,
    /// Whether the window whose turn it is waits for blocks.
    window_waits: bool,
    next_turn: u64,
    steps: u64,
}

/// Whether the states may grow by another document's.
type Begins<'a> = &'a dyn Fn() -> Result<(), SessionError>;

/// The rows of a step.
#[derive(Debug, Default)]
struct Batch {
    /// Tokens of each running request, in their order; 0 rests.
    requests: Vec<usize>,
    /// Tokens of each session that reads.
    sessions: BTreeMap<SessionId, usize>,
}

impl Engine {
    /// Loads a model and, for sessions, a generator made for it.
    ///
    /// # Errors
    /// A bound that cannot work, or a file that is missing, damaged or made for another base.
    pub fn load(model: &Path, generator: Option<&Path>, config: Config) -> Result<Self, Error> {
        config.check()?;
        let mut lm = Lm::load(
            model,
            LoadOptions {
                dequantize: config.dequantize,
            },
        )?;
        if let Some(generator) = generator {
            lm.attach_generator(generator)?;
        }
        let allocator = BlockAllocator::new(config.kv_blocks, config.block_size);
        let (state_bytes, least) = match lm.generator() {
            Some(generator) => (generator.new_state()?.bytes(), least_written(generator)),
            None => (0, 1),
        };
        let bounds = Bounds {
            vocab: lm.config().vocab,
            window_limit: lm.config().context_length.min(allocator.capacity_tokens()),
            least,
            state_bytes,
            max_documents: config.max_documents,
            max_session_tokens: config.max_session_tokens,
        };
        if bounds.window_limit < least {
            let value = config.kv_blocks;
            return Err(ConfigError {
                field: "kv_blocks",
                value,
                least: least.div_ceil(config.block_size),
                most: usize::MAX,
            }
            .into());
        }
        let kv = KvCache::new(lm.config(), config.kv_blocks, config.block_size)?;
        let model = Arc::new(ModelInfo::new(&lm, state_bytes));
        Ok(Self {
            lm,
            kv,
            model,
            config,
            bounds,
            allocator,
            commands: VecDeque::new(),
            sessions: BTreeMap::new(),
            waiting: VecDeque::new(),
            running: Vec::new(),
            window_waits: false,
            next_turn: 0,
            steps: 0,
        })
    }

    /// What is served.
    pub fn model(&self) -> &Arc<ModelInfo> {
        &self.model
    }

    /// What is in use.
    pub fn usage(&self) -> Usage {
        Usage {
            sessions: self.sessions.len(),
            running: self.running.len(),
            queued: self.waiting.len()
                + self
                    .commands
                    .iter()
                    .filter(|command| is_request(command))
                    .count(),
            queued_tokens: self.queued_tokens(),
            free_blocks: self.allocator.free(),
            blocks: self.allocator.total(),
            state_bytes: self.state_bytes(),
        }
    }

    fn state_bytes(&self) -> usize {
        self.sessions.values().fold(0, |sum, session| {
            sum.saturating_add(session.budget_bytes(0))
        })
    }

    fn queued_tokens(&self) -> usize {
        let queued = self.commands.iter().map(|command| match command {
            Command::Ingest { tokens, .. } => tokens.len(),
            _ => 0,
        });
        queued.sum::<usize>()
            + self
                .sessions
                .values()
                .map(Session::waiting_tokens)
                .sum::<usize>()
    }

    /// Queues a command for the next step.
    ///
    /// # Errors
    /// The command comes back if its queue is full; it fits later, after steps.
    pub fn push(&mut self, command: Command) -> Result<(), Box<Full>> {
        let full = self.commands.len() >= self.config.max_commands
            || match &command {
                Command::Ingest { tokens, .. } => {
                    // One that never fits is taken, and then refused by an event.
                    let (tokens, limit) = (tokens.len(), self.config.max_queued_tokens);
                    tokens > 0
                        && tokens <= limit
                        && self.queued_tokens().saturating_add(tokens) > limit
                }
                command if is_request(command) => self.usage().queued >= self.config.max_queued,
                _ => false,
            };
        if full {
            return Err(Box::new(Full(command)));
        }
        self.commands.push_back(command);
        Ok(())
    }

    /// Whether a step would do nothing.
    pub fn idle(&self) -> bool {
        self.commands.is_empty()
            && self.waiting.is_empty()
            && self.running.is_empty()
            && self
                .sessions
                .values()
                .all(|session| session.wants().is_none())
    }

    /// Takes the queued commands and runs one forward over a ragged batch. `now` is the caller's clock, read when the
    /// step begins and when its forward is done.
    ///
    /// # Errors
    /// A broken engine. A bad command is an event.
    pub fn step(
        &mut self,
        now: impl Fn() -> Instant,
        events: &mut Vec<Event>,
    ) -> Result<(), Error> {
        self.steps += 1;
        let start = now();
        while let Some(command) = self.commands.pop_front() {
            self.take(command, start, events);
        }
        self.settle(events);
        self.admit(start, events);
        let batch = self.batch(events);
        let logits = self.forward(&batch)?;
        self.hand_round(&batch, &logits, now(), events);
        self.settle(events);
        Ok(())
    }

    fn take(&mut self, command: Command, now: Instant, events: &mut Vec<Event>) {
        match command {
            Command::Open {
                session,
                strategy,
                window,
            } => match self.open(session, strategy, window) {
                Ok(opened) => events.push(self.insert(session, opened)),
                Err(error) => events.push(Event::SessionFailed {
                    session,
                    rejected: Rejected::Open,
                    error,
                }),
            },
            Command::Fork { from, to } => match self.fork(from, to) {
                Ok(forked) => events.push(self.insert(to, forked)),
                Err(error) => {
                    events.push(Event::SessionFailed {
                        session: to,
                        rejected: Rejected::Fork { from },
                        error,
                    });
                }
            },
            Command::Close { session } => self.close(session, events),
            Command::Ingest {
                session,
                seq,
                document,
                tokens,
                end_of_document,
            } => {
                let ingest = |one: &mut Session, begins: Begins<'_>| {
                    one.ingest(seq, document, &tokens, end_of_document, begins)
                };
                if let Err(error) = self.ingest(session, tokens.len(), ingest) {
                    if !tokens.is_empty() {
                        events.push(Event::Encoded {
                            session,
                            tokens: tokens.len(),
                        });
                    }
                    events.push(Event::SessionFailed {
                        session,
                        rejected: Rejected::Ingest { seq },
                        error,
                    });
                }
            }
            Command::Publish {
                session,
                seq,
                provisional,
            } => {
                let done = self
                    .session(session)
                    .and_then(|session| session.publish(seq, provisional));
                if let Err(error) = done {
                    events.push(Event::SessionFailed {
                        session,
                        rejected: Rejected::Publish { seq },
                        error,
                    });
                }
            }
            Command::Forget { session, document } => {
                if let Err(error) = self.forget(session, document, events) {
                    events.push(Event::SessionFailed {
                        session,
                        rejected: Rejected::Forget { document },
                        error,
                    });
                }
            }
            Command::Generate {
                request,
                session,
                adapter_scale,
                prompt,
                max_tokens,
                sampling,
                eos,
            } => {
                let asked = self.generation(&prompt, max_tokens, sampling, eos);
                self.enqueue(request, session, adapter_scale, prompt, asked, now, events);
            }
            Command::Score {
                request,
                session,
                adapter_scale,
                prompt,
                continuations,
            } => {
                let asked = self.scoring(&prompt, continuations);
                self.enqueue(request, session, adapter_scale, prompt, asked, now, events);
            }
            Command::Export { request, session } => {
                events.push(match self.export(request, session) {
                    Ok(exported) => exported,
                    Err(error) => Event::Failed { request, error },
                })
            }
            Command::Cancel { request } => self.cancel(request, now, events),
        }
    }

    fn insert(&mut self, id: SessionId, session: Session) -> Event {
        let opened = session.opened();
        self.sessions.insert(id, session);
        opened
    }

    fn room_for(&self, session: SessionId) -> Result<(), SessionError> {
        if self.sessions.contains_key(&session) {
            return Err(SessionError::SessionExists { session });
        }
        let limit = self.config.max_sessions;
        if self.sessions.len() >= limit {
            Err(SessionError::TooManySessions { limit })
        } else {
            Ok(())
        }
    }

    fn open(
        &self,
        id: SessionId,
        strategy: Strategy,
        window: usize,
    ) -> Result<Session, SessionError> {
        self.room_for(id)?;
        let generator = self.lm.generator().ok_or(SessionError::NoGenerator)?;
        let Bounds {
            least,
            window_limit: limit,
            ..
        } = self.bounds;
        // A document of concat is its own window: there is no other size.
        let window = if strategy == Strategy::Concat {
            0
        } else {
            window
        };
        if strategy != Strategy::Concat && !(least..=limit).contains(&window) {
            return Err(SessionError::Window {
                tokens: window,
                least,
                limit,
            });
        }
        let hash = StateHash::new(self.lm.digest(), generator.digest(), strategy, window);
        Session::new(id, strategy, window, hash, self.bounds, generator)
            .map_err(|error| SessionError::from_state(&error))
    }

    fn fork(&self, from: SessionId, to: SessionId) -> Result<Session, SessionError> {
        let session = self
            .sessions
            .get(&from)
            .ok_or(SessionError::UnknownSession { session: from })?;
        self.room_for(to)?;
        within_budget(
            self.state_bytes(),
            session.budget_bytes(0),
            self.config.state_budget_bytes,
        )?;
        session
            .fork(to)
            .map_err(|error| SessionError::from_state(&error))
    }

    fn session(&mut self, id: SessionId) -> Result<&mut Session, SessionError> {
        self.sessions
            .get_mut(&id)
            .ok_or(SessionError::UnknownSession { session: id })
    }

    /// Runs `ingest` for so many tokens.
    fn ingest(
        &mut self,
        id: SessionId,
        tokens: usize,
        ingest: impl FnOnce(&mut Session, Begins<'_>) -> Result<(), SessionError>,
    ) -> Result<(), SessionError> {
        let (used, budget, limit) = (
            self.state_bytes(),
            self.config.state_budget_bytes,
            self.config.max_queued_tokens,
        );
        let session = self.session(id)?;
        session.takes_chunks()?;
        let more = session.budget_bytes(1) - session.budget_bytes(0);
        let done = if tokens > limit {
            Err(SessionError::TooManyTokens { tokens, limit })
        } else {
            ingest(session, &|| within_budget(used, more, budget))
        };
        if let Err(error) = &done {
            session.refuse(error);
        }
        done
    }

    fn forget(
        &mut self,
        id: SessionId,
        document: DocumentId,
        events: &mut Vec<Event>,
    ) -> Result<(), SessionError> {
        let session = self
            .sessions
            .get_mut(&id)
            .ok_or(SessionError::UnknownSession { session: id })?;
        let generator = self.lm.generator().ok_or(SessionError::NoGenerator)?;
        session.forget(
            document,
            &mut Context {
                generator,
                allocator: &mut self.allocator,
                events,
            },
        )
    }

    fn close(&mut self, id: SessionId, events: &mut Vec<Event>) {
        let Some(mut session) = self.sessions.remove(&id) else {
            return;
        };
        session.evict(&mut self.allocator);
        for request in self.remove_requests(|request| request.session == Some(id)) {
            events.push(Event::Failed {
                request: request.id,
                error: RequestError::SessionClosed { session: id },
            });
        }
    }

    fn cancel(&mut self, id: RequestId, now: Instant, events: &mut Vec<Event>) {
        for request in self.remove_requests(|request| request.id == id) {
            events.push(if request.generates() {
                request.finished(Finish::Cancelled, now)
            } else {
                Event::Failed {
                    request: id,
                    error: RequestError::Cancelled,
                }
            });
        }
    }

    /// Takes requests out of the queues, and their blocks back.
    fn remove_requests(&mut self, ends: impl Fn(&Request) -> bool) -> Vec<Request> {
        let (ended, waiting): (Vec<Request>, _) = std::mem::take(&mut self.waiting)
            .into_iter()
            .partition(&ends);
        self.waiting = waiting.into();
        let mut ended = ended;
        ended.extend(self.running.extract_if(.., |request| ends(request)));
        for request in &mut ended {
            self.allocator.release(&mut request.blocks);
        }
        ended
    }

    /// The work of a generation and the tokens that the cache must hold for it.
    fn generation(
        &self,
        prompt: &[TokenId],
        max_tokens: usize,
        sampling: Sampling,
        eos: Vec<TokenId>,
    ) -> Result<(Work, usize), RequestError> {
        self.check_prompt(prompt)?;
        let limit = self.model.context_length;
        let room = limit.saturating_sub(prompt.len());
        if room == 0 {
            return Err(RequestError::ContextLength {
                tokens: prompt.len().saturating_add(1),
                limit,
            });
        }
        let max_tokens = max_tokens.min(room);
        let sampler = Box::new(Sampler::new(sampling, prompt)?);
        Ok((
            Work::Generate {
                sampler,
                eos,
                max_tokens,
                drawn: 0,
            },
            prompt.len() + max_tokens,
        ))
    }

    fn scoring(
        &self,
        prompt: &[TokenId],
        continuations: Vec<Vec<TokenId>>,
    ) -> Result<(Work, usize), RequestError> {
        self.check_prompt(prompt)?;
        if let Some(index) = continuations.iter().position(Vec::is_empty) {
            return Err(RequestError::EmptyContinuation { index });
        }
        for continuation in &continuations {
            self.check_tokens(continuation)?;
        }
        let longest = continuations
            .iter()
            .map(Vec::len)
            .max()
            .ok_or(RequestError::NoContinuation)?;
        let (tokens, limit) = (
            prompt.len().saturating_add(longest),
            self.model.context_length,
        );
        if tokens > limit {
            return Err(RequestError::ContextLength { tokens, limit });
        }
        Ok((
            Work::Score {
                continuations,
                scores: Vec::new(),
                greedy: Vec::new(),
            },
            tokens,
        ))
    }

    fn check_prompt(&self, prompt: &[TokenId]) -> Result<(), RequestError> {
        if prompt.is_empty() {
            Err(RequestError::EmptyPrompt)
        } else {
            self.check_tokens(prompt)
        }
    }

    fn check_tokens(&self, tokens: &[TokenId]) -> Result<(), RequestError> {
        let vocab = self.model.vocab;
        match tokens.iter().find(|token| token.0 as usize >= vocab) {
            Some(&token) => Err(RequestError::TokenOutOfRange { token, vocab }),
            None => Ok(()),
        }
    }

    #[expect(
        clippy::too_many_arguments,
        reason = "the parts of a command, taken apart once"
    )]
    fn enqueue(
        &mut self,
        id: RequestId,
        session: Option<SessionId>,
        scale: f32,
        prompt: Vec<TokenId>,
        asked: Result<(Work, usize), RequestError>,
        now: Instant,
        events: &mut Vec<Event>,
    ) {
        let known = self
            .waiting
            .iter()
            .chain(&self.running)
            .any(|request| request.id == id);
        let checked = asked.and_then(|(work, length)| {
            let limit = self.allocator.capacity_tokens();
            if known {
                Err(RequestError::RequestExists)
            } else if let Some(session) =
                session.filter(|session| !self.sessions.contains_key(session))
            {
                Err(RequestError::UnknownSession { session })
            } else if !scale.is_finite() {
                Err(RequestError::Sampling {
                    field: "adapter_scale",
                    value: scale,
                    range: "finite",
                })
            } else if length > limit {
                Err(RequestError::CacheLength {
                    tokens: length,
                    limit,
                })
            } else {
                Ok((work, length))
            }
        });
        match checked {
            Ok((work, length)) => self
                .waiting
                .push_back(Request::new(id, session, scale, prompt, length, work, now)),
            Err(error) => events.push(Event::Failed { request: id, error }),
        }
    }

    fn export(&self, request: RequestId, id: SessionId) -> Result<Event, RequestError> {
        let session = self
            .sessions
            .get(&id)
            .ok_or(RequestError::UnknownSession { session: id })?;
        let generator = self.lm.generator().ok_or(RequestError::NoGenerator)?;
        let newest = session.newest();
        let core = newest
            .core
            .as_ref()
            .ok_or(RequestError::NoVersion { session: id })?;
        let export = generator
            .export_peft(core)
            .map_err(|error| RequestError::Export {
                reason: error.to_string(),
            })?;
        Ok(Event::Exported {
            request,
            config_json: export.config_json,
            safetensors: export.safetensors,
            rank: export.rank,
            version: newest.version,
            digest: newest.digest,
        })
    }

    fn settle(&mut self, events: &mut Vec<Event>) {
        let Some(generator) = self.lm.generator() else {
            return;
        };
        let mut cx = Context {
            generator,
            allocator: &mut self.allocator,
            events,
        };
        for session in self.sessions.values_mut() {
            session.settle(&mut cx);
            if session.wants().is_none() {
                session.turn = None;
            } else if session.turn.is_none() {
                session.turn = Some(self.next_turn);
                self.next_turn += 1;
            }
        }
    }

    /// Starts requests in order of arrival, while there are places and blocks.
    fn admit(&mut self, now: Instant, events: &mut Vec<Event>) {
        while self.running.len() < self.config.max_running && !self.window_waits {
            let Some(length) = self.waiting.front().map(|request| request.length) else {
                return;
            };
            let mut blocks = Blocks::default();
            let yields = |_, session: &Session| session.turn.is_none() || !session.yielded;
            for id in self.evict_for(self.allocator.blocks_for(length), yields) {
                if let Some(session) = self.sessions.get_mut(&id) {
                    session.yielded = session.turn.is_some();
                }
            }
            if !self.allocator.grow(&mut blocks, length) {
                return;
            }
            let Some(mut request) = self.waiting.pop_front() else {
                return;
            };
            request.blocks = blocks;
            request.start(self.pin(&request), now);
            if request.asks_nothing() {
                self.allocator.release(&mut request.blocks);
                events.push(request.finished(Finish::Length, now));
            } else {
                self.running.push(request);
            }
        }
    }

    /// The newest version of the request's session; the bare model for scale 0.
    fn pin(&self, request: &Request) -> Pin {
        let session = request.session.and_then(|id| self.sessions.get(&id));
        match session.map(Session::newest) {
            Some(newest) if request.scale != 0.0 && newest.version != Version(0) => Pin {
                version: newest.version,
                digest: Some(newest.digest),
                core: newest.core.clone(),
                tokens: newest.tokens,
            },
            _ => Pin::default(),
        }
    }

    /// Takes blocks from open windows that may be taken from until so many are free, if that is possible at all: from those
    /// without a turn first, the one read longest ago first; then from the last turns.
    fn evict_for(
        &mut self,
        blocks: usize,
        from: impl Fn(SessionId, &Session) -> bool,
    ) -> Vec<SessionId> {
        let mut evicted = Vec::new();
        if self.allocator.free() >= blocks {
            return evicted;
        }
        let holders = self
            .sessions
            .iter()
            .filter(|&(&id, session)| session.held_blocks() > 0 && from(id, session));
        let order = |session: &Session| {
            (
                session.turn.map_or(0, |turn| u64::MAX - turn),
                session.last_step,
            )
        };
        let mut holders: Vec<_> = holders
            .map(|(&id, session)| (order(session), id, session.held_blocks()))
            .collect();
        let held: usize = holders.iter().map(|&(.., held)| held).sum();
        if self.allocator.free() + held < blocks {
            return evicted;
        }
        holders.sort_unstable();
        for (_, id, _) in holders {
            if self.allocator.free() >= blocks {
                break;
            }
            if let Some(session) = self.sessions.get_mut(&id) {
                session.evict(&mut self.allocator);
                evicted.push(id);
            }
        }
        evicted
    }

    /// Decides who runs how many tokens, and gets windows their blocks.
    fn batch(&mut self, events: &mut Vec<Event>) -> Batch {
        let decode = self
            .running
            .iter()
            .filter(|request| request.decodes())
            .count();
        let prefill: Vec<usize> = self
            .running
            .iter()
            .filter(|request| !request.decodes())
            .map(Request::wants)
            .collect();
        let mut turns: Vec<_> = self
            .sessions
            .iter()
            .filter_map(|(&id, session)| Some((session.turn?, id, session.wants()?)))
            .collect();
        turns.sort_unstable();
        let context: Vec<usize> = turns.iter().map(|&(.., tokens)| tokens).collect();
        let plan = scheduler::plan(self.config.step_tokens, decode, &prefill, &context);
        let mut prefill = plan.prefill.into_iter();
        let requests = self.running.iter().map(|request| {
            if request.decodes() {
                1
            } else {
                prefill.next().unwrap_or(0)
            }
        });
        let mut batch = Batch {
            requests: requests.collect(),
            sessions: BTreeMap::new(),
        };
        self.window_waits = false;
        for ((turn, id, _), tokens) in turns.into_iter().zip(plan.context) {
            if tokens == 0 {
                break;
            }
            let Some(session) = self.sessions.get(&id) else {
                continue;
            };
            let missing = session.missing_blocks(tokens, &self.allocator);
            self.evict_for(missing, |id, other| {
                !batch.sessions.contains_key(&id) && other.turn.is_none_or(|other| other > turn)
            });
            if self.allocator.free() < missing {
                self.window_waits = batch.sessions.is_empty();
                break;
            }
            let (Some(generator), Some(session)) =
                (self.lm.generator(), self.sessions.get_mut(&id))
            else {
                continue;
            };
            if session.prepare(
                tokens,
                &mut Context {
                    generator,
                    allocator: &mut self.allocator,
                    events,
                },
            ) {
                batch.sessions.insert(id, tokens);
            }
        }
        batch
    }

    /// Runs the rows. Logits of all rows that asked for some, V floats each, requests in order.
    fn forward(&mut self, batch: &Batch) -> Result<Vec<f32>, Error> {
        let mut rows = Vec::new();
        for (request, &tokens) in self.running.iter().zip(&batch.requests) {
            if tokens > 0 {
                rows.push(request.row(tokens));
            }
        }
        for (id, session) in &mut self.sessions {
            if let Some(row) = batch
                .sessions
                .get(id)
                .and_then(|&tokens| session.row(tokens))
            {
                rows.push(row);
            }
        }
        if rows.is_empty() {
            return Ok(Vec::new());
        }
        match self.lm.forward(&mut rows, &self.kv)?.logits {
            Some(logits) => Ok(logits.flatten_all()?.to_vec1()?),
            None => Ok(Vec::new()),
        }
    }

    fn hand_round(&mut self, batch: &Batch, logits: &[f32], now: Instant, events: &mut Vec<Event>) {
        let vocab = self.model.vocab;
        let mut rest = logits;
        let mut tokens = batch.requests.iter();
        let allocator = &mut self.allocator;
        self.running.retain_mut(|request| {
            let Some(&tokens) = tokens.next().filter(|&&tokens| tokens > 0) else {
                return true;
            };
            let (own, others) = rest
                .split_at_checked(request.logits(tokens) * vocab)
                .unwrap_or((rest, &[]));
            rest = others;
            let ended = request.took(tokens, own, vocab, now, events);
            if ended {
                allocator.release(&mut request.blocks);
            }
            !ended
        });
        for (id, &tokens) in &batch.sessions {
            if let Some(session) = self.sessions.get_mut(id) {
                session.ran(tokens, self.steps, events);
            }
        }
    }
}

fn within_budget(used: usize, more: usize, limit: usize) -> Result<(), SessionError> {
    let bytes = used.saturating_add(more);
    if bytes > limit {
        Err(SessionError::StateBudget { bytes, limit })
    } else {
        Ok(())
    }
}

fn is_request(command: &Command) -> bool {
    matches!(
        command,
        Command::Generate { .. } | Command::Score { .. } | Command::Export { .. }
    )
}

/// The shortest window of which a token writes.
fn least_written(generator: &Generator) -> usize {
    let config = generator.config();
    1 + usize::from(config.skip_first) + usize::from(config.skip_last)
}
