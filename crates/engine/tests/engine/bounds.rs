//! Bounds: each of `Config` at its edge, one below and one beyond.

use engine::{
    Chosen, Command, Config, DocumentId, Engine, Error, Event, RequestError, RequestId, Seq,
    SessionError, SessionId, Strategy, TenantId,
};
use testkit::Form;

use crate::support::*;

fn rig(change: impl FnOnce(&mut Config)) -> Rig {
    let mut config = config();
    change(&mut config);
    Rig::new(Form::Associative, config)
}

fn refused(rig: &mut Rig, command: Command) -> Vec<SessionError> {
    failures(&rig.ask(command))
}

#[test]
fn a_configuration_that_cannot_work_is_named() {
    let fault = |change: fn(&mut Config)| {
        let mut config = config();
        change(&mut config);
        match Engine::load(std::path::Path::new("/nowhere"), None, config) {
            Err(Error::Config(error)) => error.field,
            other => panic!("{:?}", other.err()),
        }
    };
    assert_eq!(fault(|config| config.kv_blocks = 0), "kv_blocks");
    assert_eq!(fault(|config| config.kv_blocks = usize::MAX), "kv_blocks");
    assert_eq!(fault(|config| config.block_size = 0), "block_size");
    assert_eq!(fault(|config| config.max_running = 0), "max_running");
    assert_eq!(fault(|config| config.max_queued = 0), "max_queued");
    assert_eq!(fault(|config| config.max_commands = 0), "max_commands");
    assert_eq!(fault(|config| config.max_sessions = 0), "max_sessions");
    assert_eq!(fault(|config| config.max_documents = 0), "max_documents");
    assert_eq!(
        fault(|config| config.max_session_tokens = 0),
        "max_session_tokens"
    );
    assert_eq!(
        fault(|config| config.max_queued_tokens = 0),
        "max_queued_tokens"
    );
    assert_eq!(
        fault(|config| config.step_tokens = config.max_running + 1),
        "step_tokens"
    );
    assert_eq!(
        fault(|config| config.max_bulk_beside_decode = 1),
        "max_bulk_beside_decode"
    );
    assert_eq!(
        fault(|config| config.core_budget_bytes = 0),
        "core_budget_bytes"
    );
    assert!(Config::default().check().is_ok());
}

#[test]
fn max_running_requests_run_and_the_next_waits() {
    let mut rig = rig(|config| config.max_running = 2);
    for request in 0..3 {
        rig.push(generate(request, None, &ids(&[1]), 20, 0));
    }
    rig.step();
    let usage = rig.engine.usage();
    assert_eq!((usage.running, usage.queued), (2, 1));
    assert_eq!(
        rig.run()
            .iter()
            .filter(|event| matches!(event, Event::Finished { .. }))
            .count(),
        3
    );
}

#[test]
fn max_queued_requests_wait_and_the_next_comes_back() {
    let mut rig = rig(|config| config.max_queued = 2);
    rig.push(generate(0, None, &ids(&[1]), 20, 0));
    rig.push(generate(1, None, &ids(&[1]), 20, 0));
    let full = rig
        .engine
        .push(generate(2, None, &ids(&[1]), 20, 0))
        .expect_err("the queue is full");
    assert!(matches!(full.0, Command::Generate { .. }));
    rig.step();
    rig.push(full.0);
}

#[test]
fn max_commands_wait_and_the_next_comes_back() {
    let mut rig = rig(|config| config.max_commands = 2);
    rig.push(open(1, Strategy::Parallel));
    rig.push(open(2, Strategy::Parallel));
    assert!(rig.engine.push(open(3, Strategy::Parallel)).is_err());
    rig.step();
    rig.push(open(3, Strategy::Parallel));
}

#[test]
fn max_sessions_are_open_and_the_next_is_refused() {
    let mut rig = rig(|config| config.max_sessions = 2);
    rig.open(1, Strategy::Parallel);
    rig.open(2, Strategy::Parallel);
    assert_eq!(
        refused(&mut rig, open(3, Strategy::Parallel)),
        [SessionError::TooManySessions { limit: 2 }]
    );
    assert_eq!(
        refused(&mut rig, fork(1, 3)),
        [SessionError::TooManySessions { limit: 2 }]
    );
    rig.ask(Command::Close {
        session: SessionId(1),
    });
    rig.open(3, Strategy::Parallel);
}

#[test]
fn max_documents_are_kept_and_the_next_is_refused() {
    let mut rig = rig(|config| config.max_documents = 2);
    rig.open(1, Strategy::Parallel);
    for document in 1..3 {
        assert_eq!(
            refused(
                &mut rig,
                ingest(1, document, document, &ids(&[1, 2, 3]), true)
            ),
            []
        );
    }
    rig.ask(fork(1, 2));
    assert_eq!(
        refused(&mut rig, ingest(1, 3, 3, &ids(&[1]), true)),
        [SessionError::TooManyDocuments { limit: 2 }]
    );
    rig.ask(forget(2, 1));
    assert_eq!(refused(&mut rig, ingest(2, 3, 3, &ids(&[1]), true)), []);
}

#[test]
fn max_session_tokens_are_taken_and_one_more_is_refused() {
    let mut rig = rig(|config| config.max_session_tokens = 10);
    rig.open(1, Strategy::Parallel);
    assert_eq!(refused(&mut rig, ingest(1, 1, 1, &ids(&[1; 9]), false)), []);
    assert_eq!(refused(&mut rig, publish(1, 1, &ids(&[1]))), []);
    let too_many = SessionError::TooManyTokens {
        tokens: 11,
        limit: 10,
    };
    assert_eq!(
        refused(&mut rig, publish(1, 1, &ids(&[1, 1]))),
        std::slice::from_ref(&too_many)
    );
    rig.ask(fork(1, 2));
    assert_eq!(
        refused(&mut rig, ingest(1, 2, 1, &ids(&[1, 1]), false)),
        [too_many]
    );
    assert_eq!(refused(&mut rig, ingest(2, 2, 1, &ids(&[1]), true)), []);
}

#[test]
fn max_queued_tokens_wait_and_the_next_chunk_comes_back() {
    let mut rig = rig(|config| config.max_queued_tokens = 30);
    rig.open(1, Strategy::Parallel);
    rig.push(ingest(1, 1, 1, &ids(&[1; 20]), false));
    rig.push(ingest(1, 2, 1, &ids(&[1; 10]), false));
    assert!(rig.engine.push(ingest(1, 3, 1, &ids(&[1]), false)).is_err());
    rig.run();
    rig.push(ingest(1, 3, 1, &ids(&[1; 30]), false));
    assert_eq!(failures(&rig.run()), []);
    let beyond = refused(&mut rig, ingest(1, 4, 1, &ids(&[1; 31]), false));
    assert_eq!(
        beyond,
        [SessionError::TooManyTokens {
            tokens: 31,
            limit: 30
        }]
    );
}

#[test]
fn state_budget_bytes_are_kept() {
    let state_bytes = rig(|_| {})
        .engine
        .model()
        .generator
        .as_ref()
        .expect("there is one")
        .state_bytes;
    let mut rig = rig(|config| config.state_budget_bytes = 6 * state_bytes);
    let used = |rig: &Rig| rig.engine.usage().state_bytes / state_bytes;
    rig.open(1, Strategy::Parallel);
    // The fold, one of each document, and three while one is open.
    assert_eq!(
        refused(&mut rig, ingest(1, 1, 1, &ids(&[1, 2, 3]), false)),
        []
    );
    assert_eq!(used(&rig), 5);
    assert_eq!(refused(&mut rig, ingest(1, 2, 1, &[], true)), []);
    assert_eq!(used(&rig), 2);
    assert_eq!(
        refused(&mut rig, ingest(1, 3, 2, &ids(&[1, 2, 3]), true)),
        []
    );
    assert_eq!(used(&rig), 3);
    let over = |states: usize| SessionError::StateBudget {
        bytes: states * state_bytes,
        limit: 6 * state_bytes,
    };
    // Who is at rest makes room for who is told something.
    assert_eq!(refused(&mut rig, fork(1, 2)), []);
    assert_eq!(refused(&mut rig, fork(1, 3)), []);
    rig.step();
    assert_eq!(used(&rig), 6);
    assert_eq!(
        refused(&mut rig, ingest(2, 4, 3, &ids(&[1]), true)),
        [over(7)]
    );
    assert_eq!(refused(&mut rig, ingest(3, 4, 3, &[], true)), [over(7)]);
    rig.ask(forget(1, 1));
    assert_eq!(refused(&mut rig, ingest(1, 4, 3, &ids(&[1]), false)), []);
    rig.open(4, Strategy::Parallel);
    assert_eq!(
        refused(&mut rig, ingest(4, 1, 1, &ids(&[1]), true)),
        [over(11)]
    );
}

#[test]
fn a_sequential_session_is_charged_for_what_reading_again_takes_however_many_documents_it_has() {
    let mut rig = rig(|_| {});
    rig.open(1, Strategy::Sequential);
    for document in 1..4 {
        rig.ask(ingest(1, document, document, &ids(&[1, 2, 3, 4]), true));
    }
    let state_bytes = rig
        .engine
        .model()
        .generator
        .as_ref()
        .expect("there is one")
        .state_bytes;
    let used = |rig: &Rig| rig.engine.usage().state_bytes / state_bytes;
    assert_eq!(used(&rig), 3);
    rig.push(forget(1, 1));
    while !rig.engine.idle() {
        rig.step();
        assert_eq!(used(&rig), 3);
    }
    rig.ask(ingest(1, 4, 4, &ids(&[1]), false));
    assert_eq!(used(&rig), 5);
}

/// A rig whose sessions 1 and 2 hold a core each and have document 9 open, and that has room for no other; with the bytes of one.
fn two_cores() -> (Rig, usize) {
    let mut probe = rig(|_| {});
    probe.open(1, Strategy::Parallel);
    probe.ask(ingest(1, 1, 1, &ids(&[5; 6]), true));
    let core = probe.engine.usage().core_bytes;
    assert!(core > 0);
    let mut rig = rig(|config| config.core_budget_bytes = 2 * core);
    for session in 1..3 {
        rig.open(session, Strategy::Parallel);
        rig.ask(ingest(session, 1, 1, &ids(&[5; 6]), true));
        rig.ask(ingest(session, 1, 9, &[], false));
    }
    assert_eq!(rig.engine.usage().core_bytes, 2 * core);
    (rig, core)
}

#[test]
fn core_budget_bytes_are_kept_and_a_version_that_does_not_fit_comes_later() {
    let (mut rig, core) = two_cores();
    rig.open(3, Strategy::Parallel);
    // Nobody asked for a version: none comes, and nobody is told.
    let read = rig.ask(ingest(3, 1, 1, &ids(&[5; 6]), true));
    let left_out = |events: &[Event], seq| {
        let [.., Event::Read { session, seq: read }] = events else {
            return false;
        };
        failures(events).is_empty() && (*session, *read) == (SessionId(3), Seq(seq))
    };
    assert!(left_out(&read, 1), "{read:?}");
    let over = SessionError::CoreBudget {
        bytes: 3 * core,
        limit: 2 * core,
    };
    assert_eq!(
        refused(&mut rig, publish(3, 1, &[])),
        std::slice::from_ref(&over)
    );
    rig.ask(ingest(3, 2, 2, &ids(&[5; 6]), false));
    let read = rig.ask(unasked(3, 2));
    assert!(left_out(&read, 2), "{read:?}");
    assert_eq!(
        refused(&mut rig, publish(3, 2, &ids(&[7; 3]))),
        std::slice::from_ref(&over)
    );
    // Publishes that are answered together are answered to who asked.
    for seq in 3..6 {
        rig.push(ingest(3, seq, 2, &ids(&[5; 1]), false));
        rig.push(match seq {
            4 => publish(3, seq, &[]),
            _ => unasked(3, seq),
        });
    }
    let refusals = rig.run();
    let refusals = refusals
        .iter()
        .filter(|event| matches!(event, Event::SessionFailed { .. }));
    assert_eq!(refusals.count(), 1);
    // A fork and a version in the place of another take nothing.
    assert_eq!(refused(&mut rig, fork(1, 4)), []);
    rig.ask(ingest(2, 2, 9, &ids(&[6; 6]), false));
    assert_eq!(refused(&mut rig, publish(2, 2, &[])), []);
    assert_eq!(rig.engine.usage().core_bytes, 2 * core);
    rig.ask(Command::Close {
        session: SessionId(2),
    });
    rig.open(5, Strategy::Parallel);
    rig.push(ingest(5, 1, 1, &ids(&[5; 6]), true));
    rig.push(ingest(5, 2, 2, &ids(&[5; 9]), false));
    let late = rig.imprint(3);
    rig.ask(Command::Close {
        session: SessionId(1),
    });
    rig.ask(Command::Close {
        session: SessionId(4),
    });
    assert_eq!(late, rig.imprint(5));
    rig.assert_all_blocks_come_back([3, 5]);
}

#[test]
fn a_core_that_a_running_request_is_pinned_to_counts_and_what_is_forgotten_goes_all_the_same() {
    let (mut rig, core) = two_cores();
    rig.push(generate(1, Some(1), &ids(&[1, 2, 3]), 40, 0));
    rig.step();
    rig.push(ingest(1, 2, 9, &ids(&[6; 6]), false));
    rig.push(publish(1, 2, &[]));
    let mut events = Vec::new();
    while rig.engine.usage().running > 0 && failures(&events).is_empty() {
        events.extend(rig.step());
    }
    let over = SessionError::CoreBudget {
        bytes: 3 * core,
        limit: 2 * core,
    };
    assert_eq!(failures(&events), [over]);
    rig.push(forget(1, 1));
    let events = rig.step();
    assert!(
        events
            .iter()
            .any(|event| matches!(event, Event::Forgotten { .. })),
        "{events:?}"
    );
    assert_eq!(rig.engine.usage().running, 1, "it is still pinned");
    assert_eq!(rig.engine.usage().core_bytes, 3 * core);
    rig.run();
    assert_eq!(rig.engine.usage().core_bytes, 2 * core);
}

#[test]
fn max_bulk_beside_decode_is_all_that_runs_beside_an_answer() {
    let mut rig = rig(|config| config.max_bulk_beside_decode = 3);
    rig.open(1, Strategy::Parallel);
    let mut ask = generate(1, None, &ids(&[1]), 8, 0);
    let Command::Generate { eos, .. } = &mut ask else {
        panic!("it generates")
    };
    eos.clear();
    rig.push(ask);
    rig.step();
    rig.push(ingest(1, 1, 1, &ids(&[4; 40]), false));
    rig.push(generate(2, None, &ids(&[2; 30]), 1, 0));
    let mut read = Vec::new();
    while !rig.engine.idle() {
        let events = rig.step();
        let encoded = events.iter().map(|event| match event {
            Event::Encoded { tokens, .. } => *tokens,
            _ => 0,
        });
        let decodes = events
            .iter()
            .any(|event| matches!(event, Event::Token { request, .. } if request.0 == 1));
        read.push((decodes, encoded.sum::<usize>()));
    }
    assert!(read.iter().filter(|(decodes, _)| *decodes).count() >= 6);
    assert!(
        read.iter()
            .all(|&(decodes, tokens)| !decodes || tokens <= 3),
        "{read:?}"
    );
    assert!(read.iter().any(|&(decodes, tokens)| !decodes && tokens > 3));
}

#[test]
fn a_score_beside_an_answer_keeps_no_prompt_waiting() {
    let mut rig = rig(|config| config.max_bulk_beside_decode = 4);
    let mut ask = generate(1, None, &ids(&[1]), 40, 0);
    let Command::Generate { eos, .. } = &mut ask else {
        panic!("it generates")
    };
    eos.clear();
    rig.push(ask);
    rig.step();
    // Two scores of 240 rows each.
    for request in 2..4 {
        rig.push(Command::Score {
            request: RequestId(request),
            tenant: TenantId(0),
            session: None,
            adapter_scale: 1.0,
            chosen: Chosen::default(),
            prompt: ids(&[2; 8]),
            continuations: vec![ids(&[3; 31]); 8],
        });
    }
    rig.step();
    rig.push(generate(4, None, &ids(&[5; 8]), 1, 0));
    // A step of each score, and two of its own.
    let events: Vec<_> = (0..4).flat_map(|_| rig.step()).collect();
    let done = |event: &Event| matches!(event, Event::Finished { request, .. } if request.0 == 4);
    assert!(events.iter().any(done), "{events:?}");
    let events = rig.run();
    let scored = |event: &&Event| matches!(event, Event::Scored { .. });
    assert_eq!(events.iter().filter(scored).count(), 2);
}

#[test]
fn a_request_that_the_cache_can_never_hold_is_refused_and_one_that_just_fits_runs() {
    let mut rig = rig(|config| config.kv_blocks = 5);
    rig.open(1, Strategy::Parallel);
    // An open window holds blocks; the request gets them, and the window is rebuilt afterwards.
    rig.ask(ingest(1, 1, 1, &ids(&[3; 5]), false));
    assert!(rig.engine.usage().free_blocks < 5);
    let events = rig.ask(generate(1, None, &ids(&[1; 10]), 11, 0));
    assert!(matches!(
        events[..],
        [Event::Failed {
            error: RequestError::CacheLength {
                tokens: 21,
                limit: 20
            },
            ..
        }]
    ));
    let events = rig.ask(generate(1, None, &ids(&[1; 10]), 10, 0));
    assert!(matches!(events.last(), Some(Event::Finished { .. })));
    rig.ask(ingest(1, 2, 1, &ids(&[4; 5]), true));
    rig.open(2, Strategy::Parallel);
    rig.ask(ingest(2, 1, 1, &ids(&[3, 3, 3, 3, 3, 4, 4, 4, 4, 4]), true));
    assert_eq!(rig.imprint(1), rig.imprint(2));
    rig.assert_all_blocks_come_back([1, 2]);
}

#[test]
fn windows_and_concat_documents_are_as_long_as_the_context_and_the_cache_hold() {
    for (kv_blocks, limit) in [(64, CONTEXT), (5, 20)] {
        let mut rig = rig(|config| config.kv_blocks = kv_blocks);
        let of = |session, window| Command::Open {
            session: SessionId(session),
            tenant: TenantId(0),
            strategy: Strategy::Parallel,
            window,
        };
        // First and last token of a window write nothing: three are the least.
        for window in [0, 2, limit + 1] {
            assert_eq!(
                refused(&mut rig, of(1, window)),
                [SessionError::Window {
                    tokens: window,
                    least: 3,
                    limit
                }]
            );
        }
        assert_eq!(refused(&mut rig, of(1, 3)), []);
        assert_eq!(refused(&mut rig, of(2, limit)), []);
        rig.open(3, Strategy::Concat);
        assert_eq!(
            refused(
                &mut rig,
                ingest(3, 1, 1, &vec![engine::TokenId(1); limit], false)
            ),
            []
        );
        let long = [SessionError::DocumentTooLong {
            tokens: limit + 1,
            limit,
        }];
        assert_eq!(refused(&mut rig, publish(3, 1, &ids(&[1]))), long);
        rig.ask(fork(3, 4));
        assert_eq!(refused(&mut rig, ingest(4, 2, 1, &ids(&[1]), false)), long);
        assert_eq!(refused(&mut rig, ingest(3, 2, 1, &[], true)), []);
        assert_eq!(
            refused(&mut rig, forget(3, 2)),
            [SessionError::UnknownDocument {
                document: DocumentId(2)
            }]
        );
    }
}
