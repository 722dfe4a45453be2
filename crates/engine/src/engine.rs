//! The engine itself: takes commands, forms the batch of a step, runs the forward, hands the results round.
//!
//! What commands make of sessions and requests, and how a batch is formed, stand in the files beside this one; what a session
//! or a request makes of its part in their own, who runs how much in the scheduler's. Start at [`Engine::step`].

mod batch;
mod requests;
mod sessions;
mod tiers;

use std::{
    collections::{BTreeMap, VecDeque},
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use generator::Generator;

use self::{sessions::Begins, tiers::Waking};
use crate::{
    blocks::BlockAllocator,
    command::Command,
    config::Config,
    cores::CoreBudget,
    error::{ConfigError, Error},
    event::{Event, Rejected},
    ids::{SessionId, TenantId},
    load::{Before, Load},
    machine::{Host, Machine},
    model::ModelInfo,
    pace::{Pace, Portions},
    request::{Adapter, Request},
    scheduler::Turns,
    session::{Bounds, Context, Session},
    tiers::Tiers,
    traces::TraceBudget,
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
    /// Blocks of the KV cache that nobody holds.
    pub free_blocks: usize,
    /// Of these the ones whose keys and values are kept for prompts that begin with the same tokens.
    pub kept_blocks: usize,
    /// All blocks of the KV cache.
    pub blocks: usize,
    /// Bytes that the states of the open sessions may come to take.
    pub state_bytes: usize,
    /// Bytes of the traces of complete and open documents.
    pub trace_bytes: usize,
    /// Bytes of the cores that versions, windows and running requests hold.
    pub core_bytes: usize,
    /// What of the sessions is where.
    pub tiers: Tiers,
    /// Since the engine was loaded: prompt tokens of the requests that started.
    pub prompt_tokens: u64,
    /// Of these the ones whose keys and values were there already.
    pub cached_tokens: u64,
    /// How many times a running request had to give up its blocks, to be computed again.
    pub preempted: u64,
    /// Since the engine was loaded: how long read-outs of versions, and of cores for requests, took, with all that was settled beside
    /// them (windows that closed, sums).
    pub read_out: Duration,
    /// How long a request that came now would wait until its prompt is read, by what was measured; 0 where nothing was.
    pub wait: Duration,
}

/// One frozen model with its sessions and requests. One thread owns it.
pub struct Engine {
    machine: Box<dyn Machine>,
    model: Arc<ModelInfo>,
    config: Config,
    bounds: Bounds,
    allocator: BlockAllocator,
    cores: CoreBudget,
    traces: TraceBudget,
    commands: VecDeque<Command>,
    /// Those that a step may have something to do with.
    sessions: BTreeMap<SessionId, Session>,
    /// Those that hold nothing and are asked for nothing.
    asleep: BTreeMap<SessionId, Session>,
    /// Those that are asked for and not here.
    waking: BTreeMap<SessionId, Waking>,
    /// Those of which a snapshot is being kept, and its bytes.
    saving: BTreeMap<SessionId, usize>,
    /// Requests whose sessions are not here, in order of arrival.
    parked: VecDeque<Request>,
    /// Whether a session that is asked for finds no room.
    short: bool,
    /// In order of arrival; those that had to give up their blocks are among them.
    waiting: VecDeque<Request>,
    /// In order of their turns.
    running: Vec<Request>,
    /// Requests that have come.
    arrived: u64,
    /// The blocks that the window whose turn it is waits for; 0 if it does not, and for how many steps it has.
    window_waits: (usize, u32),
    /// Whose turn it is to have prompts and context read.
    turns: Turns,
    /// The tenant of which the last request started.
    last_started: TenantId,
    pace: Pace,
    /// Whether what runs beside answers was put off for read-outs in the last step: in the next one it comes first.
    put_off: bool,
    load: Load,
    /// When running answers had their last tokens.
    drawn: Option<Instant>,
    next_turn: u64,
    steps: u64,
    /// Counters alone.
    tiers: Tiers,
    /// Of the requests that started.
    prompt_tokens: u64,
    /// Of the requests that started.
    cached_tokens: u64,
    preempted: u64,
    read_out: Duration,
}

impl Engine {
    /// Loads a model and, for sessions, a generator made for it.
    ///
    /// # Errors
    /// A bound that cannot work, or a file that is missing, damaged or made for another base.
    pub fn load(model: &Path, generator: Option<&Path>, config: Config) -> Result<Self, Error> {
        Self::on(config, |config| {
            Ok(Box::new(Host::load(model, generator, config)?))
        })
    }

    /// The same on a machine of the caller's, which is made once the bounds are known to be ones that can work.
    ///
    /// # Errors
    /// A bound that cannot work, or what `machine` says.
    pub fn on(
        config: Config,
        machine: impl FnOnce(&Config) -> Result<Box<dyn Machine>, Error>,
    ) -> Result<Self, Error> {
        config.check()?;
        let machine = machine(&config)?;
        let allocator = BlockAllocator::new(config.kv_blocks, config.block_size);
        let (state_bytes, least) = match machine.generator() {
            Some(generator) => (generator.new_state()?.bytes(), least_written(generator)),
            None => (0, 1),
        };
        let core_bytes = machine.generator().map_or(0, Generator::core_bytes);
        let trace_row_bytes = machine.generator().map_or(0, Generator::trace_bytes);
        let bounds = Bounds {
            vocab: machine.base().config.vocab,
            window_limit: (machine.base().config.context_length).min(allocator.capacity_tokens()),
            least,
            state_bytes,
            core_bytes,
            trace_row_bytes,
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
        let model = Arc::new(ModelInfo::new(&*machine, state_bytes));
        let trace_budget = if machine.traces() {
            config.trace_budget_bytes
        } else {
            0
        };
        Ok(Self {
            machine,
            model,
            cores: CoreBudget::new(config.core_budget_bytes),
            traces: TraceBudget::new(trace_budget),
            config,
            bounds,
            allocator,
            commands: VecDeque::new(),
            sessions: BTreeMap::new(),
            asleep: BTreeMap::new(),
            waking: BTreeMap::new(),
            saving: BTreeMap::new(),
            parked: VecDeque::new(),
            short: false,
            waiting: VecDeque::new(),
            running: Vec::new(),
            arrived: 0,
            window_waits: (0, 0),
            turns: Turns::default(),
            last_started: TenantId::default(),
            pace: Pace::default(),
            put_off: false,
            load: Load::default(),
            drawn: None,
            next_turn: 0,
            steps: 0,
            tiers: Tiers::default(),
            prompt_tokens: 0,
            cached_tokens: 0,
            preempted: 0,
            read_out: Duration::ZERO,
        })
    }

    /// What is served.
    pub fn model(&self) -> &Arc<ModelInfo> {
        &self.model
    }

    /// The most bytes that a core takes; 0 without a generator.
    #[must_use]
    pub fn core_bytes(&self) -> usize {
        self.bounds.core_bytes
    }

    /// What is in use.
    pub fn usage(&self) -> Usage {
        Usage {
            sessions: self.sessions.len() + self.asleep.len(),
            running: self.running.len(),
            queued: self.queued(),
            queued_tokens: self.queued_tokens(),
            free_blocks: self.allocator.free(),
            kept_blocks: self.allocator.kept(),
            blocks: self.allocator.total(),
            state_bytes: self.resident_bytes(),
            core_bytes: self.cores.used(),
            trace_bytes: self.traces.used(),
            tiers: self.tiers(),
            prompt_tokens: self.prompt_tokens,
            cached_tokens: self.cached_tokens,
            preempted: self.preempted,
            read_out: self.read_out,
            wait: self.wait(),
        }
    }

    /// Requests that wait to run.
    fn queued(&self) -> usize {
        let commands = self.commands.iter().chain(self.kept_back());
        let asked = commands.filter(|command| is_request(command)).count();
        self.waiting.len() + self.parked.len() + asked
    }

    fn tiers(&self) -> Tiers {
        let count = |has: fn(&Session) -> bool| {
            let sessions = self.sessions.values();
            sessions.filter(|session| has(session)).count()
        };
        let host = self.resident_bytes().saturating_add(self.traces.used());
        Tiers {
            slot_sessions: count(|session| session.newest().core.is_some()),
            slot_bytes: self.cores.used(),
            host_sessions: count(|session| session.resident_bytes() > 0),
            host_bytes: host,
            asleep_sessions: self.asleep.len(),
            waking_sessions: self.waking.len(),
            ..self.tiers
        }
    }

    fn wait(&self) -> Duration {
        let come = self.running.iter().chain(&self.waiting).chain(&self.parked);
        let mut before = Before {
            tokens: come.clone().map(Request::unread).sum(),
            requests: come.count(),
            places: self.config.max_running,
        };
        for command in &self.commands {
            if let Command::Generate { prompt, .. } | Command::Score { prompt, .. } = command {
                before.tokens = before.tokens.saturating_add(prompt.len());
                before.requests += 1;
            }
        }
        self.load.wait(before)
    }

    /// Bytes that the states of sessions that cannot rest may come to take.
    fn owed_bytes(&self) -> usize {
        let sessions = self.sessions.values();
        sessions.fold(0, |sum, session| sum.saturating_add(session.owed_bytes(0)))
    }

    fn queued_tokens(&self) -> usize {
        let commands = self.commands.iter().chain(self.kept_back());
        let queued = commands.map(|command| match command {
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
        let commands = match &command {
            // Those that wait for their sessions do not keep out what brings these back, or ends them.
            Command::Restored { .. } | Command::Saved { .. } => 0,
            Command::Cancel { .. } | Command::Close { .. } => self.commands.len(),
            _ => self.commands.len() + self.kept_back().count(),
        };
        let full = commands >= self.config.max_commands
            || match &command {
                Command::Ingest { tokens, .. } => {
                    // One that never fits is taken, and then refused by an event.
                    let (tokens, limit) = (tokens.len(), self.config.max_queued_tokens);
                    tokens > 0
                        && tokens <= limit
                        && self.queued_tokens().saturating_add(tokens) > limit
                }
                command if is_request(command) => self.queued() >= self.config.max_queued,
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
                .all(|session| session.wants().is_none() && !session.is_folding())
            && !self.stirs()
    }

    /// Takes the queued commands and runs one forward over a ragged batch. `now` is the caller's clock, read when the
    /// step begins, between portions of read-outs, and before and behind its forward: how long these take decides how much runs beside
    /// answers.
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
            if let Some(command) = self.pass(command) {
                self.take(command, start, events);
            }
        }
        self.tend(start, events);
        let mut portions = self.portions(start);
        let begun = now();
        self.settle(&mut || portions.more(now()), events);
        self.secure();
        // Requests have their own.
        portions.owe();
        self.admit(&mut || portions.more(now()), start, events);
        let ready = now();
        let spent = self.drawn.map_or(Duration::ZERO, |drawn| {
            ready.saturating_duration_since(drawn)
        });
        self.pace.read_out(&portions, ready);
        if portions.given() > 0 {
            self.read_out += ready.saturating_duration_since(begun);
        }
        let batch = self.batch((spent, portions.given()), events);
        self.announce()?;
        let output = self.forward(&batch)?;
        let done = now();
        let took = done.saturating_duration_since(ready);
        self.pace.saw(batch.decode, batch.bulk(), took, self.steps);
        let all = spent.saturating_add(took);
        self.load.step(batch.prefill, batch.prefill_asked, all);
        self.hand_round(&batch, &output, done, events);
        if self.running.is_empty() {
            let mut portions = Portions::all();
            self.settle(&mut || portions.more(now()), events);
            if portions.given() > 0 {
                self.read_out += now().saturating_duration_since(done);
            }
        }
        for slot in self.cores.freed() {
            self.machine.free(slot)?;
        }
        // Where answers run, their tokens go out before versions are read out; the next step does it, and knows what it took.
        self.drawn = (!self.running.is_empty()).then_some(done);
        Ok(())
    }

    fn take(&mut self, command: Command, now: Instant, events: &mut Vec<Event>) {
        match command {
            Command::Open {
                session,
                tenant,
                strategy,
                window,
            } => match self.open(session, tenant, strategy, window) {
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
                asked,
            } => {
                let done = self
                    .session(session)
                    .and_then(|session| session.publish(seq, provisional, asked));
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
                tenant,
                session,
                adapter_scale: scale,
                chosen,
                prompt,
                max_tokens,
                sampling,
                eos,
            } => {
                let asked = self.generation(&prompt, max_tokens, sampling, eos);
                let adapter = Adapter {
                    session,
                    scale,
                    chosen,
                };
                self.enqueue((request, tenant), adapter, prompt, asked, now, events);
            }
            Command::Score {
                request,
                tenant,
                session,
                adapter_scale: scale,
                chosen,
                prompt,
                continuations,
            } => {
                let asked = self.scoring(&prompt, continuations);
                let adapter = Adapter {
                    session,
                    scale,
                    chosen,
                };
                self.enqueue((request, tenant), adapter, prompt, asked, now, events);
            }
            Command::Export { request, session } => {
                events.push(match self.export(request, session) {
                    Ok(exported) => exported,
                    Err(error) => Event::Failed { request, error },
                })
            }
            Command::Evict { session, core } => self.evict(session, core, events),
            Command::Restored { session, snapshot } => self.restored(session, snapshot, events),
            Command::Saved {
                session,
                digest,
                kept,
            } => self.saved(session, digest, kept),
            Command::Cancel { request } => self.cancel(request, now, events),
        }
    }

    /// What may be read out in this step: all of it where no answer waits for its next token.
    fn portions(&self, start: Instant) -> Portions {
        let decode = self.running.iter().filter(|one| one.decodes()).count();
        match self.drawn {
            Some(drawn) if decode > 0 => self.pace.portions(decode, drawn, self.put_off),
            _ if decode > 0 => self.pace.portions(decode, start, self.put_off),
            _ => Portions::all(),
        }
    }

    /// Does all that needs no forward, but for read-outs that no portion is left for. Who has read longest ago comes first.
    fn settle(&mut self, portion: &mut dyn FnMut() -> bool, events: &mut Vec<Event>) {
        let stir = |session: &Session| !session.at_rest() || session.turn.is_some();
        let stirring = self.sessions.iter().filter(|(_, session)| stir(session));
        let mut ids: Vec<_> = stirring
            .map(|(&id, session)| (session.last_step, id))
            .collect();
        ids.sort_unstable();
        for (_, id) in ids {
            // Its version may come now: whoever rests makes room, those among them whose own has just come.
            if self.sessions.get(&id).is_some_and(Session::takes_slot) {
                self.make_slot_room(self.bounds.core_bytes, events);
            }
            let (Some(generator), Some(session)) =
                (self.machine.generator(), self.sessions.get_mut(&id))
            else {
                continue;
            };
            session.settle(&mut Context {
                generator,
                machine: &*self.machine,
                allocator: &mut self.allocator,
                cores: &self.cores,
                traces: &self.traces,
                events,
                portion: &mut *portion,
            });
            if session.wants().is_none() {
                session.turn = None;
            } else if session.turn.is_none() {
                session.turn = Some(self.next_turn);
                self.next_turn += 1;
            }
        }
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
