//! Beside answers cores are read out a portion at a time: what comes of it is what would have come at once.
//!
//! A machine of portions of one site, and a clock that leaves time for one portion a step.

use engine::{Chosen, Command, Event, RequestId, SessionId, Strategy, TokenId};
use testkit::Form;

use crate::support::*;

/// An answer that goes on, with a session of its own or bare, until it is cancelled.
fn endless(request: u64) -> Command {
    let mut ask = generate(request, None, &ids(&[5, 6, 2, 8]), 40, request);
    if let Command::Generate { eos, .. } = &mut ask {
        eos.clear();
    }
    ask
}

/// A rig in which an answer runs and the pace of it is known.
fn beside_an_answer() -> Rig {
    let mut rig = Rig::by_portions(Form::Associative, config());
    rig.open(1, Strategy::Parallel);
    rig.push(endless(1));
    for _ in 0..4 {
        rig.step();
    }
    rig
}

fn some(count: usize, from: u32) -> Vec<TokenId> {
    (0..count as u32)
        .map(|at| TokenId((from + 3 * at) % VOCAB))
        .collect()
}

fn applied(event: &Event) -> bool {
    matches!(event, Event::Applied { .. })
}

fn encoded(events: &[Event]) -> usize {
    let tokens = events.iter().map(|event| match event {
        Event::Encoded { tokens, .. } => *tokens,
        _ => 0,
    });
    tokens.sum()
}

/// Steps until so many tokens are read; no version may have come.
fn read(rig: &mut Rig, tokens: usize) {
    let mut left = tokens;
    for _ in 0..30 {
        let events = rig.step();
        assert!(!events.iter().any(applied), "{events:?}");
        left -= encoded(&events);
        if left == 0 {
            return;
        }
    }
    panic!("{left} of {tokens} tokens are not read");
}

#[test]
fn a_version_comes_over_some_steps_and_each_of_them_draws_a_token() {
    let mut rig = beside_an_answer();
    let told = some(WINDOW, 1);
    rig.push(ingest(1, 1, 1, &told, true));
    read(&mut rig, WINDOW);
    let mut steps = 0;
    loop {
        let events = rig.step();
        steps += 1;
        let drew = |event: &Event| matches!(event, Event::Token { .. });
        assert!(events.iter().any(drew), "{events:?}");
        if events.iter().any(applied) {
            break;
        }
        // It goes on without anything to read, and is not done before the answer is.
        assert!(!rig.engine.idle());
    }
    assert_eq!(steps, 2, "of two sites one a step");
    rig.run();
    let mut alone = Rig::new(Form::Associative, config());
    alone.open(1, Strategy::Parallel);
    alone.ask(ingest(1, 1, 1, &told, true));
    assert_eq!(rig.imprint(1), alone.imprint(1));
}

#[test]
fn without_answers_a_version_comes_with_the_step_that_read_it() {
    let mut rig = Rig::by_portions(Form::Associative, config());
    rig.open(1, Strategy::Parallel);
    rig.push(ingest(1, 1, 1, &some(WINDOW, 1), true));
    let events = rig.step();
    assert_eq!(encoded(&events), WINDOW);
    assert!(events.iter().any(applied), "{events:?}");
}

#[test]
fn what_is_forgotten_while_it_is_read_out_is_in_no_version() {
    let mut rig = beside_an_answer();
    let (first, second) = (some(12, 1), some(WINDOW, 2));
    rig.push(ingest(1, 1, 1, &first, true));
    // The first window's version comes; that of the end is begun.
    let mut left = 12;
    while left > 0 {
        left -= encoded(&rig.step());
    }
    rig.step();
    rig.push(ingest(1, 2, 2, &second, true));
    rig.push(forget(1, 1));
    let events = rig.run();
    let forgotten = events
        .iter()
        .position(|event| matches!(event, Event::Forgotten { .. }));
    let after = &events[forgotten.expect("it is forgotten")..];
    let mut alone = Rig::new(Form::Associative, config());
    alone.open(1, Strategy::Parallel);
    alone.ask(ingest(1, 1, 2, &second, true));
    let mut known = vec![alone.imprint(1).digest];
    alone.ask(forget(1, 2));
    known.push(alone.imprint(1).digest);
    for event in after {
        if let Event::Applied { newest, .. } | Event::Forgotten { newest, .. } = event {
            assert!(known.contains(&newest.digest), "{event:?}");
        }
    }
    let mut alone = Rig::new(Form::Associative, config());
    alone.open(1, Strategy::Parallel);
    alone.ask(ingest(1, 1, 2, &second, true));
    assert_eq!(rig.imprint(1), alone.imprint(1));
}

#[test]
fn a_session_that_is_closed_while_it_is_read_out_leaves_nothing() {
    let mut rig = beside_an_answer();
    rig.push(ingest(1, 1, 1, &some(WINDOW, 1), true));
    read(&mut rig, WINDOW);
    rig.step();
    let events = rig.ask(Command::Close {
        session: SessionId(1),
    });
    assert!(!events.iter().any(applied), "{events:?}");
    let usage = rig.engine.usage();
    assert_eq!((usage.core_bytes, usage.sessions), (0, 0));
    rig.assert_all_blocks_come_back([]);
}

/// A request that asks for gates.
fn gated(request: u64) -> Command {
    let mut ask = generate(request, Some(1), &ids(&[5, 6, 2, 8]), 3, 1);
    if let Command::Generate { chosen, eos, .. } = &mut ask {
        *chosen = Chosen {
            gated: true,
            ..Chosen::default()
        };
        eos.clear();
    }
    ask
}

/// What a request was pinned to.
fn digest(events: &[Event], request: u64) -> Option<engine::Digest> {
    events.iter().find_map(|event| match event {
        Event::Finished {
            request: of,
            digest,
            ..
        } if *of == RequestId(request) => *digest,
        _ => None,
    })
}

#[test]
fn a_core_made_for_a_request_comes_over_some_steps_and_never_of_what_was_forgotten() {
    let mut rig = Rig::by_portions(Form::Associative, config());
    rig.open(1, Strategy::Parallel);
    rig.ask(ingest(1, 1, 1, &some(12, 1), true));
    rig.ask(ingest(1, 2, 2, &some(12, 2), true));
    let all = rig.ask(gated(10));
    let mut alone = Rig::new(Form::Associative, config());
    alone.open(1, Strategy::Parallel);
    alone.ask(ingest(1, 1, 2, &some(12, 2), true));
    let rest = alone.ask(gated(10));

    rig.push(endless(1));
    for _ in 0..4 {
        rig.step();
    }
    rig.push(gated(11));
    rig.step();
    assert_eq!(rig.engine.usage().running, 1, "its core has a site to go");
    let events = rig.run();
    assert_eq!(answer(&events, 11), answer(&all, 10));
    assert_eq!(digest(&events, 11), digest(&all, 10));

    rig.push(endless(2));
    for _ in 0..4 {
        rig.step();
    }
    rig.push(gated(12));
    rig.step();
    rig.push(forget(1, 1));
    let events = rig.run();
    assert_eq!(answer(&events, 12), answer(&rest, 10));
    assert_eq!(digest(&events, 12), digest(&rest, 10));
}

#[test]
fn read_outs_and_prompts_take_turns_beside_answers() {
    let mut rig = beside_an_answer();
    for session in 2..12 {
        rig.push(open(session, Strategy::Parallel));
        rig.push(ingest(
            session,
            1,
            1,
            &some(WINDOW - 1, session as u32),
            true,
        ));
    }
    // They are read, and read out, one after the other while a prompt comes.
    for _ in 0..6 {
        rig.step();
    }
    rig.push(generate(50, None, &ids(&[7; 2]), 1, 0));
    let finished = |event: &Event| {
        matches!(
            event,
            Event::Finished {
                request: RequestId(50),
                ..
            }
        )
    };
    let mut versions = 0;
    let steps = (1..100).find(|_| {
        let events = rig.step();
        versions += events.iter().filter(|event| applied(event)).count();
        events.iter().any(finished)
    });
    assert!(steps.is_some_and(|steps| steps <= 6), "{steps:?}");
    assert!(versions < 10, "nobody waited for all of them");
    let events = rig.run();
    versions += events.iter().filter(|event| applied(event)).count();
    assert!(versions >= 8, "{versions}");
}
