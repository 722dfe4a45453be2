//! Whole sessions on the software device, against the same engine on the processor: told, asked, forgotten, forked, swapped.
//!
//! Both are given the same commands; what they say may differ by bf16 alone. Start at [`both`]. With `IMPRINT_TEST_CUBLAS` it is a GPU.

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

mod draws;
mod gates;
mod machine;

use std::{
    path::{Path, PathBuf},
    sync::{LazyLock, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use candle_core::DType;
use device::{Accelerator, Libraries, Options};
use engine::{
    Chosen, Command, Config, Digest, DocumentId, Engine, Event, RequestId, Sampling, Seq,
    SessionId, Strategy, TenantId, TokenId,
};
use testkit::{Form, GeneratorSpec, TinySpec};

/// Log-probabilities of bf16 activations and cores through three layers, relative; measured: up to 0.010.
const SCORES: f64 = 1.5e-2;
/// A gap between two likely tokens that bf16 may close.
const NATS: f32 = 0.15;
const VOCAB: u32 = 96;
const WINDOW: usize = 16;

struct Models {
    _folder: tempfile::TempDir,
    base: PathBuf,
    associative: PathBuf,
    published: PathBuf,
}

static MODELS: LazyLock<Models> = LazyLock::new(|| {
    let folder = tempfile::tempdir().unwrap();
    let spec = TinySpec {
        layers: 3,
        head_dim: Some(16),
        vocab: VOCAB as usize,
        context_length: 128,
        dtype: DType::BF16,
        rope_scaling: Some(serde_json::json!({
            "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        })),
        ..TinySpec::default()
    };
    let [base, associative, published] =
        ["base", "associative", "published"].map(|name| folder.path().join(name));
    testkit::tiny_base(&base, &spec);
    let generator = GeneratorSpec {
        r1: 16,
        r2: 8,
        rank: 8,
        window: WINDOW,
        // Not in every layer, and not in the last.
        layers: Some(vec![0, 1]),
        ..GeneratorSpec::default()
    };
    testkit::tiny_generator(&associative, &spec, &generator);
    let generator = GeneratorSpec {
        form: Form::Published,
        modules: vec!["o_proj", "down_proj"],
        // Factors are smaller than N: 4 (16 + 16) of 16 x 16.
        r2: 16,
        rank: 4,
        ..generator
    };
    testkit::tiny_generator(&published, &spec, &generator);
    Models {
        _folder: folder,
        base,
        associative,
        published,
    }
});

fn config() -> Config {
    Config {
        step_tokens: 24,
        kv_blocks: 48,
        block_size: 8,
        max_running: 6,
        ..Config::default()
    }
}

/// What an engine said.
#[derive(Clone, Debug, PartialEq)]
enum Said {
    /// A version's digest and tokens.
    Version(Digest, usize),
    /// Tokens of an answer, each with the two likeliest of its place.
    Answer(Vec<(TokenId, Vec<(TokenId, f32)>)>),
    Scores(Vec<f32>),
}

/// An engine and the log of what it said.
struct Rig {
    engine: Engine,
    clock: Instant,
    next: u64,
}

impl Rig {
    fn run(&mut self) -> Vec<Event> {
        let mut events = Vec::new();
        for _ in 0..10_000 {
            if self.engine.idle() {
                return events;
            }
            self.clock += Duration::from_millis(1);
            let now = self.clock;
            self.engine.step(|| now, &mut events).unwrap();
        }
        panic!("the engine is never idle: {:?}", self.engine.usage());
    }

    fn tell(&mut self, command: Command) -> Vec<Event> {
        self.engine.push(command).unwrap();
        let events = self.run();
        let refused = events
            .iter()
            .find(|event| matches!(event, Event::SessionFailed { .. } | Event::Failed { .. }));
        assert!(refused.is_none(), "{refused:?}");
        events
    }

    fn open(&mut self, session: u64, strategy: Strategy) {
        self.tell(Command::Open {
            session: SessionId(session),
            tenant: TenantId(0),
            strategy,
            window: WINDOW,
        });
    }

    /// Without running: what is told stays in line for the next run.
    fn ingest(&mut self, session: u64, seq: u64, document: u64, tokens: &[TokenId], end: bool) {
        let command = Command::Ingest {
            session: SessionId(session),
            seq: Seq(seq),
            document: DocumentId(document),
            tokens: tokens.to_vec(),
            end_of_document: end,
        };
        self.engine.push(command).unwrap();
    }

    fn publish(&mut self, session: u64, seq: u64, provisional: &[TokenId]) -> Said {
        let events = self.tell(Command::Publish {
            session: SessionId(session),
            seq: Seq(seq),
            provisional: provisional.to_vec(),
            asked: true,
        });
        let version = events.iter().rev().find_map(|event| match event {
            Event::Applied {
                session: of,
                newest,
            } if of.0 == session => Some(Said::Version(newest.digest, newest.tokens)),
            _ => None,
        });
        version.unwrap_or_else(|| panic!("no version: {events:?}"))
    }

    fn forget(&mut self, session: u64, document: u64) {
        self.tell(Command::Forget {
            session: SessionId(session),
            document: DocumentId(document),
        });
    }

    /// Answers of several sessions, decoded in one batch.
    fn ask(&mut self, sessions: &[Option<u64>], tokens: usize) -> Vec<Said> {
        self.ask_of(sessions, tokens, &Chosen::default())
    }

    fn ask_of(&mut self, sessions: &[Option<u64>], tokens: usize, chosen: &Chosen) -> Vec<Said> {
        let first = self.next;
        for (i, session) in sessions.iter().enumerate() {
            let command = Command::Generate {
                request: RequestId(first + i as u64),
                tenant: TenantId(0),
                session: session.map(SessionId),
                adapter_scale: 1.0,
                chosen: chosen.clone(),
                prompt: text(40 + i as u32, 5 + i),
                max_tokens: tokens,
                sampling: Sampling {
                    logprobs: true,
                    top_logprobs: 2,
                    ..Sampling::default()
                },
                eos: Vec::new(),
            };
            self.engine.push(command).unwrap();
        }
        self.next += sessions.len() as u64;
        let events = self.run();
        let answer = |request: u64| {
            let tokens = events.iter().filter_map(|event| match event {
                Event::Token {
                    request: of,
                    token,
                    top,
                    ..
                } if of.0 == request => Some((*token, top.clone())),
                _ => None,
            });
            Said::Answer(tokens.collect())
        };
        (first..self.next).map(answer).collect()
    }

    fn score(&mut self, session: Option<u64>, scale: f32) -> Said {
        self.score_of(session, scale, Chosen::default())
    }

    fn score_of(&mut self, session: Option<u64>, scale: f32, chosen: Chosen) -> Said {
        self.next += 1;
        let events = self.tell(Command::Score {
            request: RequestId(self.next - 1),
            tenant: TenantId(0),
            session: session.map(SessionId),
            adapter_scale: scale,
            chosen,
            prompt: text(77, 9),
            continuations: vec![text(78, 7), text(79, 3)],
        });
        match &events[..] {
            [Event::Scored { scores, .. }] => {
                Said::Scores(scores.iter().flatten().map(|(_, nats)| *nats).collect())
            }
            _ => panic!("{events:?}"),
        }
    }
}

fn text(seed: u32, len: usize) -> Vec<TokenId> {
    (0..len as u32)
        .map(|i| TokenId((i * i * 7 + i * (13 + seed) + seed * 31) % VOCAB))
        .collect()
}

/// Runs a script on the processor and on the software device, and holds what was said against each other. Gives what the device said and
/// how many cores were copied into its slots.
fn both(
    form: Form,
    options: impl Fn(&mut Options),
    script: impl Fn(&mut Rig) -> Vec<Said>,
) -> (Vec<Said>, u64) {
    let generator = match form {
        Form::Associative => &MODELS.associative,
        Form::Published => &MODELS.published,
    };
    side_by_side(&MODELS.base, generator, config(), options, script)
}

/// The software device counts for all of a process: one test at a time.
fn one() -> MutexGuard<'static, ()> {
    static ONE: Mutex<()> = Mutex::new(());
    ONE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn side_by_side(
    base: &Path,
    generator: &Path,
    config: Config,
    options: impl Fn(&mut Options),
    script: impl Fn(&mut Rig) -> Vec<Said>,
) -> (Vec<Said>, u64) {
    let _one = one();
    let rig = |engine| Rig {
        engine,
        clock: Instant::now(),
        next: 1,
    };
    let mut host = rig(Engine::load(base, Some(generator), config.clone()).unwrap());
    let want = script(&mut host);
    drop(host);

    let libraries = match testkit::cublas() {
        Some(cublas) => Libraries {
            driver: PathBuf::from("libcuda.so.1"),
            cublas,
        },
        None => Libraries::from(testkit::software_device(Path::new(env!(
            "CARGO_TARGET_TMPDIR"
        )))),
    };
    let mut given = Options {
        libraries,
        ordinal: 0,
        slots: 6,
        pinned: 8,
        windows: 6,
        quantised: false,
    };
    options(&mut given);
    let (mut device, mut before, mut brought) = (None, 0, None);
    let engine = Engine::on(config, |config| {
        let machine = Accelerator::load(base, Some(generator), config, &given)?;
        before = machine.device().violations().len();
        device = Some(machine.device().clone());
        brought = Some(machine.brought());
        Ok(Box::new(machine))
    });
    let mut there = rig(engine.unwrap());
    let got = script(&mut there);
    let device = device.unwrap();
    device.synchronize().unwrap();
    drop(there);
    assert_eq!(device.violations()[before..], [] as [String; 0]);
    assert!(device.failed_drop().is_none());

    assert_eq!(got.len(), want.len());
    for (i, (got, want)) in got.iter().zip(&want).enumerate() {
        agree(i, got, want);
    }
    (got, brought.unwrap().get())
}

/// The device in software, small, with these models.
fn software(base: &Path, generator: &Path, config: &Config) -> Accelerator {
    let options = Options {
        libraries: Libraries::from(testkit::software_device(Path::new(env!(
            "CARGO_TARGET_TMPDIR"
        )))),
        ordinal: 0,
        slots: 2,
        pinned: 2,
        windows: 1,
        quantised: false,
    };
    Accelerator::load(base, Some(generator), config, &options).unwrap()
}

fn agree(i: usize, got: &Said, want: &Said) {
    match (got, want) {
        (Said::Scores(got), Said::Scores(want)) => {
            let wide = |scores: &[f32]| scores.iter().map(|x| f64::from(*x)).collect::<Vec<_>>();
            let error = testkit::relative_error_of(&wide(got), &wide(want));
            assert!(error < SCORES, "{i}: {error} between {got:?} and {want:?}");
        }
        (Said::Answer(got), Said::Answer(want)) => {
            assert_eq!(got.len(), want.len());
            for ((token, _), (expected, top)) in got.iter().zip(want) {
                if token == expected {
                    continue;
                }
                // Where the two likeliest are nearer to each other than bf16 tells apart, either is right, and what follows differs.
                assert!(
                    top[0].1 - top[1].1 < NATS && *token == top[1].0,
                    "{i}: {got:?} and {want:?}"
                );
                return;
            }
        }
        _ => assert_eq!(got, want, "{i}"),
    }
}

/// How far two scores are from each other, in nats.
fn apart(a: &Said, b: &Said) -> f32 {
    let (Said::Scores(a), Said::Scores(b)) = (a, b) else {
        panic!("these are no scores: {a:?}, {b:?}");
    };
    let pairs = a.iter().zip(b).map(|(a, b)| (a - b).abs());
    pairs.fold(0.0, f32::max)
}

#[test]
fn a_bare_model_answers_many_requests_at_once() {
    let (said, _) = both(
        Form::Associative,
        |_| {},
        |rig| {
            let mut said = rig.ask(&[None; 6], 9);
            // More than run at once, so that some wait, and others decode beside their prompts.
            said.extend(rig.ask(&[None; 9], 5));
            said.push(rig.score(None, 1.0));
            said
        },
    );
    let complete = said
        .iter()
        .filter(|said| matches!(said, Said::Answer(tokens) if tokens.len() >= 5));
    assert_eq!(complete.count(), 15);
}

#[test]
fn what_sessions_are_told_in_any_chunks_answers_as_on_the_processor() {
    for (form, strategy) in [
        (Form::Associative, Strategy::Parallel),
        (Form::Associative, Strategy::Sequential),
        (Form::Published, Strategy::Sequential),
        (Form::Published, Strategy::Concat),
    ] {
        let (said, _) = both(
            form,
            |_| {},
            |rig| {
                for session in 1..4 {
                    rig.open(session, strategy);
                }
                // Chunks of one token, of more than a window, and of none; documents of three sessions in the same steps.
                let (a, b, c) = (text(1, 37), text(2, 21), text(3, 9));
                rig.ingest(1, 1, 10, &a[..1], false);
                rig.ingest(2, 1, 20, &b[..5], false);
                rig.ingest(3, 1, 30, &c, false);
                rig.run();
                rig.ingest(1, 2, 10, &a[1..30], false);
                rig.ingest(2, 2, 20, &b[5..6], false);
                rig.run();
                rig.ingest(2, 3, 20, &b[6..], true);
                rig.ingest(1, 3, 10, &a[30..], true);
                rig.ingest(2, 4, 21, &text(4, 12), true);
                // One document stays open: its version is of a provisional end, and what comes behind goes on from before that.
                let mut said = vec![rig.publish(3, 1, &text(5, 11))];
                said.push(rig.score(Some(3), 1.0));
                rig.ingest(3, 2, 30, &text(6, 10), false);
                said.push(rig.publish(3, 2, &[]));
                said.push(rig.publish(1, 3, &[]));
                said.push(rig.publish(2, 4, &[]));
                for session in [None, Some(1), Some(2), Some(3)] {
                    said.push(rig.score(session, 1.0));
                }
                said.push(rig.score(Some(1), 0.5));
                said.extend(rig.ask(&[Some(1), None, Some(2), Some(3), Some(1)], 8));
                said
            },
        );
        // The cores do something, and each session's something else.
        let scores: Vec<&Said> = said
            .iter()
            .filter(|said| matches!(said, Said::Scores(_)))
            .collect();
        for (a, b) in [(1, 2), (1, 3), (2, 3), (1, 4), (2, 5)] {
            assert!(
                apart(scores[a], scores[b]) > 0.5,
                "{form:?} {strategy:?}: {a} and {b}"
            );
        }
    }
}

#[test]
fn forgetting_forking_and_leaving_memory_work_as_on_the_processor() {
    let (said, _) = both(
        Form::Associative,
        |_| {},
        |rig| {
            rig.open(1, Strategy::Parallel);
            rig.ingest(1, 1, 10, &text(1, 25), true);
            rig.ingest(1, 2, 11, &text(2, 30), true);
            rig.ingest(1, 3, 12, &text(3, 7), false);
            let mut said = vec![rig.publish(1, 3, &[])];
            // The fork shares the open window until one of the two goes on.
            rig.tell(Command::Fork {
                from: SessionId(1),
                to: SessionId(2),
            });
            rig.ingest(1, 4, 12, &text(4, 8), true);
            rig.ingest(2, 4, 12, &text(5, 12), true);
            said.push(rig.publish(1, 4, &[]));
            said.push(rig.publish(2, 4, &[]));
            said.push(rig.score(Some(1), 1.0));
            said.push(rig.score(Some(2), 1.0));
            rig.forget(1, 10);
            said.push(rig.publish(1, 4, &[]));
            said.push(rig.score(Some(1), 1.0));
            rig.tell(Command::Evict {
                session: SessionId(1),
                core: true,
            });
            said.push(rig.score(Some(1), 1.0));
            rig.forget(1, 11);
            rig.forget(1, 12);
            said.push(rig.score(Some(1), 1.0));
            said.push(rig.score(None, 1.0));
            said
        },
    );
    let scores: Vec<&Said> = said
        .iter()
        .filter(|said| matches!(said, Said::Scores(_)))
        .collect();
    assert!(apart(scores[0], scores[1]) > 0.5 && apart(scores[0], scores[2]) > 0.5);
    // As it was, but for f32 sums in another order, of which the read-out takes the inverse.
    let again = apart(scores[2], scores[3]);
    assert!(again < NATS, "read again: {again} nats apart");
    assert_eq!(
        scores[4], scores[5],
        "what has forgotten all is the bare model"
    );
}

#[test]
fn some_tokens_of_a_document_can_be_meant_as_on_the_processor() {
    for form in [Form::Associative, Form::Published] {
        let (said, _) = both(
            form,
            |_| {},
            |rig| {
                rig.open(1, Strategy::Parallel);
                // Over the end of a window, in chunks that end within the tokens that will be meant.
                let tokens = text(9, 41);
                rig.ingest(1, 1, 10, &tokens[..13], false);
                rig.run();
                rig.ingest(1, 2, 10, &tokens[13..22], false);
                rig.run();
                rig.ingest(1, 3, 10, &tokens[22..], true);
                rig.ingest(1, 4, 11, &text(3, 18), true);
                let part = |document, tokens: std::ops::Range<usize>| engine::Part {
                    document: DocumentId(document),
                    tokens: vec![tokens],
                    around: Vec::new(),
                };
                let meant = |parts| Chosen {
                    parts,
                    ..Chosen::default()
                };
                let mut said = vec![rig.publish(1, 4, &[])];
                said.push(rig.score(Some(1), 1.0));
                said.push(rig.score_of(Some(1), 1.0, meant(vec![part(10, 8..24)])));
                said.push(rig.score_of(
                    Some(1),
                    1.0,
                    meant(vec![part(10, 30..39), part(11, 2..9)]),
                ));
                said
            },
        );
        assert!(apart(&said[1], &said[2]) > 0.3 && apart(&said[2], &said[3]) > 0.3);
    }
}

#[test]
fn more_sessions_than_slots_and_windows_take_turns() {
    let few = |options: &mut Options| {
        (options.slots, options.pinned, options.windows) = (2, 3, 2);
    };
    let (said, brought) = both(Form::Associative, few, |rig| {
        for session in 1..6 {
            rig.open(session, Strategy::Parallel);
        }
        for (seq, chunk) in [(1, 0), (2, 11), (3, 22)] {
            for session in 1..6 {
                let tokens = text(session as u32, 33);
                rig.ingest(session, seq, session, &tokens[chunk..chunk + 11], seq == 3);
            }
            rig.run();
        }
        let all: Vec<Option<u64>> = (1..6).map(Some).collect();
        let mut said: Vec<Said> = (1..6).map(|session| rig.publish(session, 3, &[])).collect();
        said.extend(rig.ask(&all, 6));
        said.extend((1..6).map(|session| rig.score(Some(session), 1.0)));
        said
    });
    assert!(brought > 10, "{brought} copies into slots");
    assert_eq!(said.len(), 15);
}

#[test]
fn the_default_model_answers_with_the_shipped_generator_as_on_the_processor() {
    let generator = testkit::repository_root().join("models/smollm2-135m-instruct");
    let config = Config {
        step_tokens: 64,
        kv_blocks: 16,
        block_size: 16,
        max_running: 2,
        trace_budget_bytes: 0,
        activations: engine::Activations::F32,
        ..Config::default()
    };
    let few = |options: &mut Options| {
        (options.slots, options.pinned, options.windows) = (2, 2, 2);
    };
    let model = testkit::smollm2_gguf();
    let (said, _) = side_by_side(&model, &generator, config, few, |rig| {
        rig.open(1, Strategy::Parallel);
        rig.ingest(1, 1, 10, &text(1, 20), true);
        let mut said = vec![rig.publish(1, 1, &[])];
        said.extend(rig.ask(&[Some(1), None], 5));
        said
    });
    assert!(matches!(&said[1], Said::Answer(tokens) if tokens.len() == 5));
    assert_ne!(said[1], said[2]);
}
