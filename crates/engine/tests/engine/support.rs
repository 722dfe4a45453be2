//! A tiny model of each form and an engine that runs until it is idle.
//!
//! Start at [`Rig`].

use std::{
    cell::Cell,
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::LazyLock,
    time::{Duration, Instant},
};

use candle_core::{DType, Device, Tensor};
use engine::{
    Base, Chosen, Command, Config, Digest, DocumentId, Engine, Event, Host, Machine, Newest,
    RequestId, Sampling, Seq, SessionError, SessionId, Slot, Snapshot, Strategy, TenantId, TokenId,
    Version,
};
use generator::{Core, CoreReading, GATE_FILE, Gate, Generator, State};
use proptest::{prelude::*, strategy::Strategy as _};
use testkit::{Form, GeneratorSpec, TinySpec};

/// Tokens that fit the tiny model.
pub(crate) const CONTEXT: usize = 48;
/// Tokens of a window.
pub(crate) const WINDOW: usize = 8;
/// Size of the vocabulary.
pub(crate) const VOCAB: u32 = 40;

struct Models {
    _dir: tempfile::TempDir,
    base: PathBuf,
    associative: PathBuf,
    published: PathBuf,
}

static MODELS: LazyLock<Models> = LazyLock::new(|| {
    let dir = tempfile::tempdir().expect("a folder for the models");
    let spec = TinySpec {
        vocab: VOCAB as usize,
        context_length: CONTEXT,
        ..TinySpec::default()
    };
    let [base, associative, published] =
        ["base", "associative", "published"].map(|name| dir.path().join(name));
    testkit::tiny_base(&base, &spec);
    let generator = GeneratorSpec {
        window: WINDOW,
        ..GeneratorSpec::default()
    };
    testkit::tiny_generator(&associative, &spec, &generator);
    gate(&associative, &base);
    let generator = GeneratorSpec {
        form: Form::Published,
        modules: vec!["o_proj"],
        ..generator
    };
    testkit::tiny_generator(&published, &spec, &generator);
    Models {
        _dir: dir,
        base,
        associative,
        published,
    }
});

/// Gives a generator a gate.
fn gate(folder: &Path, base: &Path) {
    let lm = lm::Lm::load(base, lm::LoadOptions::default()).expect("the tiny base");
    let generator = Generator::load(folder, &lm.shape()).expect("a tiny generator");
    let keys = generator.sites().iter().map(|site| {
        let (r1, _, _) = site.ranks();
        Tensor::eye(r1, DType::F32, &Device::Cpu).and_then(|eye| eye / r1 as f64)
    });
    let keys = keys.collect::<Result<_, _>>().expect("small tensors");
    let gate = Gate::new(0.65, 0.2, keys).expect("numbers in range");
    let bytes = generator.gate_bytes(&gate).expect("a gate of its sites");
    std::fs::write(folder.join(GATE_FILE), bytes).expect("the gate's file");
}

/// The processor, but for portions of a site each.
struct ByPortions(Host);

impl Machine for ByPortions {
    fn base(&self) -> &Base {
        self.0.base()
    }
    fn generator(&self) -> Option<&Generator> {
        self.0.generator()
    }
    fn forward(
        &mut self,
        rows: &mut [lm::Row<'_>],
        slots: &[Option<Slot>],
    ) -> Result<Vec<f32>, engine::Error> {
        self.0.forward(rows, slots)
    }
    fn announce(&mut self, slot: Slot, core: &Core) -> Result<(), engine::Error> {
        self.0.announce(slot, core)
    }
    fn free(&mut self, slot: Slot) -> Result<(), engine::Error> {
        self.0.free(slot)
    }
    fn traces(&self) -> bool {
        self.0.traces()
    }
    fn gate(&self) -> Option<&Gate> {
        self.0.gate()
    }
    fn read_out(&self, state: &State) -> Result<Core, generator::Error> {
        self.0.read_out(state)
    }
    fn read_on(&self, reading: &mut CoreReading) -> Result<Option<Core>, generator::Error> {
        let generator = self.0.generator().expect("it has one");
        generator.go_on(reading, 1)
    }
}

/// A small configuration with room for everything.
pub(crate) fn config() -> Config {
    Config {
        step_tokens: 24,
        kv_blocks: 64,
        block_size: 4,
        max_running: 8,
        ..Config::default()
    }
}

/// Configurations that cut rows short and let windows take each other's blocks.
pub(crate) fn configs() -> impl proptest::strategy::Strategy<Value = Config> {
    let rates = prop_oneof![Just(0), Just(200), Just(usize::MAX)];
    (10usize..80, 12usize..40, rates).prop_map(|(step_tokens, kv_blocks, rate)| Config {
        step_tokens,
        kv_blocks,
        snapshot_bytes_per_token: rate,
        ..config()
    })
}

pub(crate) fn forms() -> impl proptest::strategy::Strategy<Value = Form> {
    prop_oneof![Just(Form::Associative), Just(Form::Published)]
}

pub(crate) fn strategies() -> impl proptest::strategy::Strategy<Value = Strategy> {
    prop_oneof![
        Just(Strategy::Parallel),
        Just(Strategy::Sequential),
        Just(Strategy::Concat)
    ]
}

pub(crate) fn tokens(
    size: std::ops::Range<usize>,
) -> impl proptest::strategy::Strategy<Value = Vec<TokenId>> {
    prop::collection::vec((0..VOCAB).prop_map(TokenId), size)
}

/// What a version is: the same in two sessions if and only if they hold the same.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Imprint {
    pub(crate) digest: Digest,
    pub(crate) tokens: usize,
    /// The exported adapter's bytes; none if there is none.
    pub(crate) adapter: Option<Vec<u8>>,
    /// Bits of a probe's log-probabilities.
    pub(crate) answers: Vec<u32>,
}

/// A snapshot as bytes: of which state, core, sums.
pub(crate) type Kept = (Digest, Option<Vec<u8>>, Option<Vec<u8>>);

pub(crate) struct Rig {
    pub(crate) engine: Engine,
    clock: Instant,
    /// Whether time goes by within a step.
    ticks: bool,
    next_request: u64,
    /// What is kept of sessions that leave memory. The rig answers for it at the end of the step that asks.
    pub(crate) disk: BTreeMap<SessionId, Kept>,
    /// Every so many answers the disk has lost what it kept; the others in turn come from another session. 0: never.
    pub(crate) faults: usize,
    asked: usize,
    /// What the disk was asked for. Its events are not handed on: those of snapshots would hold slots.
    moves: Vec<&'static str>,
}

impl Rig {
    pub(crate) fn new(form: Form, config: Config) -> Self {
        let generator = match form {
            Form::Associative => &MODELS.associative,
            Form::Published => &MODELS.published,
        };
        let engine =
            Engine::load(&MODELS.base, Some(generator), config).expect("the tiny model loads");
        Self {
            engine,
            clock: Instant::now(),
            ticks: false,
            next_request: 1 << 32,
            disk: BTreeMap::new(),
            faults: 0,
            asked: 0,
            moves: Vec::new(),
        }
    }

    /// The same on a machine that reads cores out site by site, and with a clock that goes by a millisecond whenever it is read: where
    /// answers run a step has time for one portion.
    pub(crate) fn by_portions(form: Form, config: Config) -> Self {
        let generator = match form {
            Form::Associative => &MODELS.associative,
            Form::Published => &MODELS.published,
        };
        let engine = Engine::on(config, |config| {
            let host = Host::load(&MODELS.base, Some(generator), config)?;
            Ok(Box::new(ByPortions(host)))
        });
        Self {
            engine: engine.expect("the tiny model loads"),
            ticks: true,
            ..Self::new(form, self::config())
        }
    }

    pub(crate) fn bare(config: Config) -> Self {
        let engine = Engine::load(&MODELS.base, None, config).expect("the tiny model loads");
        Self {
            engine,
            clock: Instant::now(),
            ticks: false,
            next_request: 1 << 32,
            disk: BTreeMap::new(),
            faults: 0,
            asked: 0,
            moves: Vec::new(),
        }
    }

    pub(crate) fn push(&mut self, command: Command) {
        self.engine.push(command).expect("the queue has room");
    }

    pub(crate) fn step(&mut self) -> Vec<Event> {
        self.clock += Duration::from_millis(1);
        let mut events = Vec::new();
        let (now, ticks) = (Cell::new(self.clock), self.ticks);
        let clock = || {
            now.set(now.get() + Duration::from_millis(ticks.into()));
            now.get()
        };
        self.engine
            .step(clock, &mut events)
            .expect("the engine is sound");
        self.clock = now.get();
        for event in &events {
            self.keep(event);
        }
        events.retain(|event| !matches!(event, Event::Save { .. } | Event::Wanted { .. }));
        events
    }

    /// What the disk is asked for in the course of a command.
    pub(crate) fn moves(&mut self, command: Command) -> Vec<&'static str> {
        self.moves.clear();
        self.ask(command);
        std::mem::take(&mut self.moves)
    }

    /// Does what a disk does.
    fn keep(&mut self, event: &Event) {
        match event {
            Event::Save { session, snapshot } => {
                self.moves.push("save");
                let kept = snapshot.holds();
                let core = snapshot.core_bytes().expect("a core has bytes");
                let sums = snapshot.sums_bytes().expect("sums have bytes");
                let digest = snapshot.digest();
                self.disk.insert(*session, (digest, core, sums));
                self.push(Command::Saved {
                    session: *session,
                    digest,
                    kept,
                });
            }
            Event::Wanted { session, need, .. } => {
                self.asked += 1;
                self.moves.push(match (need.core, need.sums) {
                    (true, false) => "core wanted",
                    (false, true) => "sums wanted",
                    _ => "both wanted",
                });
                let fault = self.faults > 0 && self.asked.is_multiple_of(self.faults);
                let from = match fault {
                    true if (self.asked / self.faults).is_multiple_of(2) => None,
                    true => self.disk.keys().find(|other| *other != session),
                    false => Some(session),
                };
                let snapshot =
                    from.and_then(|from| self.disk.get(from))
                        .map(|(digest, core, sums)| {
                            let core = core.as_deref().filter(|_| need.core);
                            let sums = sums.as_deref().filter(|_| need.sums);
                            Snapshot::read(*digest, core, sums).expect("it is as it was written")
                        });
                self.push(Command::Restored {
                    session: *session,
                    snapshot,
                });
            }
            _ => {}
        }
    }

    /// Steps until there is nothing to do. An engine that is never done is stuck.
    pub(crate) fn run(&mut self) -> Vec<Event> {
        let mut events = Vec::new();
        for _ in 0..20_000 {
            if self.engine.idle() {
                return events;
            }
            events.extend(self.step());
        }
        panic!("the engine is never idle: {:?}", self.engine.usage());
    }

    pub(crate) fn ask(&mut self, command: Command) -> Vec<Event> {
        self.push(command);
        self.run()
    }

    pub(crate) fn request(&mut self) -> RequestId {
        self.next_request += 1;
        RequestId(self.next_request)
    }

    pub(crate) fn open(&mut self, session: u64, strategy: Strategy) {
        let events = self.ask(open(session, strategy));
        let opened = |event: &Event| matches!(event, Event::Opened { session: of, newest: Newest { version: Version(0), seq: Seq(0), .. } } if of.0 == session);
        assert!(events.iter().any(opened), "{events:?}");
    }

    /// Publishes and returns what the newest version is.
    pub(crate) fn imprint(&mut self, session: u64) -> Imprint {
        let events = self.ask(publish(session, 1, &[]));
        let applied = events.iter().rev().find_map(|event| match event {
            Event::Applied { newest, .. } => Some((newest.digest, newest.tokens)),
            _ => None,
        });
        let (digest, tokens) = applied.unwrap_or_else(|| panic!("no version: {events:?}"));
        let adapter = self.export(session);
        Imprint {
            digest,
            tokens,
            adapter,
            answers: self.probe(Some(session)),
        }
    }

    pub(crate) fn export(&mut self, session: u64) -> Option<Vec<u8>> {
        let request = self.request();
        let events = self.ask(Command::Export {
            request,
            session: SessionId(session),
        });
        match &events[..] {
            [Event::Exported { safetensors, .. }] => Some(safetensors.clone()),
            [Event::Failed { .. }] => None,
            _ => panic!("{events:?}"),
        }
    }

    /// Bits of the log-probabilities of two continuations.
    pub(crate) fn probe(&mut self, session: Option<u64>) -> Vec<u32> {
        let request = self.request();
        let continuations = vec![ids(&[7, 3, 9]), ids(&[1])];
        let events = self.ask(Command::Score {
            request,
            tenant: TenantId(0),
            session: session.map(SessionId),
            adapter_scale: 1.0,
            chosen: Chosen::default(),
            prompt: ids(&[5, 6, 2, 8]),
            continuations,
        });
        match &events[..] {
            [Event::Scored { scores, .. }] => scores
                .iter()
                .flatten()
                .map(|(_, logprob)| logprob.to_bits())
                .collect(),
            _ => panic!("{events:?}"),
        }
    }

    /// Nothing is held once all sessions are closed.
    pub(crate) fn assert_all_blocks_come_back(&mut self, sessions: impl IntoIterator<Item = u64>) {
        for session in sessions {
            self.push(Command::Close {
                session: SessionId(session),
            });
        }
        self.run();
        let usage = self.engine.usage();
        assert_eq!(
            (
                usage.free_blocks,
                usage.sessions,
                usage.state_bytes,
                usage.core_bytes
            ),
            (usage.blocks, 0, 0, 0),
            "{usage:?}"
        );
    }
}

pub(crate) fn ids(tokens: &[u32]) -> Vec<TokenId> {
    tokens.iter().copied().map(TokenId).collect()
}

pub(crate) fn open(session: u64, strategy: Strategy) -> Command {
    Command::Open {
        session: SessionId(session),
        tenant: TenantId(0),
        strategy,
        window: WINDOW,
    }
}

pub(crate) fn ingest(
    session: u64,
    seq: u64,
    document: u64,
    tokens: &[TokenId],
    end_of_document: bool,
) -> Command {
    let (session, seq, document) = (SessionId(session), Seq(seq), DocumentId(document));
    Command::Ingest {
        session,
        seq,
        document,
        tokens: tokens.to_vec(),
        end_of_document,
    }
}

pub(crate) fn publish(session: u64, seq: u64, provisional: &[TokenId]) -> Command {
    Command::Publish {
        session: SessionId(session),
        seq: Seq(seq),
        provisional: provisional.to_vec(),
        asked: true,
    }
}

/// As `publish`, but nobody is to be told if it does not fit.
pub(crate) fn unasked(session: u64, seq: u64) -> Command {
    Command::Publish {
        session: SessionId(session),
        seq: Seq(seq),
        provisional: Vec::new(),
        asked: false,
    }
}

pub(crate) fn forget(session: u64, document: u64) -> Command {
    Command::Forget {
        session: SessionId(session),
        document: DocumentId(document),
    }
}

pub(crate) fn evict(session: u64, core: bool) -> Command {
    Command::Evict {
        session: SessionId(session),
        core,
    }
}

pub(crate) fn fork(from: u64, to: u64) -> Command {
    Command::Fork {
        from: SessionId(from),
        to: SessionId(to),
    }
}

pub(crate) fn generate(
    request: u64,
    session: Option<u64>,
    prompt: &[TokenId],
    max_tokens: usize,
    seed: u64,
) -> Command {
    Command::Generate {
        request: RequestId(request),
        tenant: TenantId(0),
        session: session.map(SessionId),
        adapter_scale: 1.0,
        chosen: Chosen::default(),
        prompt: prompt.to_vec(),
        max_tokens,
        sampling: Sampling {
            temperature: 1.0,
            seed,
            logprobs: true,
            ..Sampling::default()
        },
        eos: ids(&[0]),
    }
}

/// The same, asked by another tenant.
pub(crate) fn by(tenant: u64, mut command: Command) -> Command {
    if let Command::Generate { tenant: of, .. }
    | Command::Score { tenant: of, .. }
    | Command::Open { tenant: of, .. } = &mut command
    {
        *of = TenantId(tenant);
    }
    command
}

/// The prompt tokens of a request that were there already.
pub(crate) fn cached(events: &[Event], request: u64) -> usize {
    let of = |event: &Event| match event {
        Event::Finished {
            request: of,
            cached_tokens,
            ..
        }
        | Event::Scored {
            request: of,
            cached_tokens,
            ..
        } if of.0 == request => Some(*cached_tokens),
        _ => None,
    };
    events.iter().find_map(of).expect("it has ended")
}

/// The tokens of a request with the bits of their log-probabilities.
pub(crate) fn answer(events: &[Event], request: u64) -> Vec<(TokenId, u32)> {
    let tokens = events.iter().filter_map(|event| match event {
        Event::Token {
            request: of,
            token,
            logprob,
            ..
        } if of.0 == request => Some((*token, logprob.expect("it was asked for").to_bits())),
        _ => None,
    });
    tokens.collect()
}

pub(crate) fn failures(events: &[Event]) -> Vec<SessionError> {
    let failed = events.iter().filter_map(|event| match event {
        Event::SessionFailed { error, .. } => Some(error.clone()),
        _ => None,
    });
    failed.collect()
}
