//! Sessions that leave memory and come back: nobody can tell but by the figures.
//!
//! The law over all interleavings stands in `mixed`; here are the ways of leaving and coming back one by one, and the bounds.

use engine::{
    Chosen, Command, Config, DocumentId, Event, Need, Part, RequestError, RequestId, Sampling,
    SessionId, Snapshot, Strategy, TenantId,
};
use proptest::{collection::vec, prelude::*};
use testkit::Form;

use crate::support::*;

pub(crate) fn rig(rate: usize, change: impl FnOnce(&mut Config)) -> Rig {
    let mut config = Config {
        snapshot_bytes_per_token: rate,
        ..config()
    };
    change(&mut config);
    Rig::new(Form::Associative, config)
}

/// A session of two documents.
pub(crate) fn tell(rig: &mut Rig, session: u64, strategy: Strategy) {
    rig.open(session, strategy);
    rig.ask(ingest(
        session,
        1,
        1,
        &ids(&[5, 6, 7, 8, 9, 3, 1, 2, 4]),
        true,
    ));
    rig.ask(ingest(
        session,
        2,
        2,
        &ids(&[session as u32, 6, 7, 3, 9, 2]),
        true,
    ));
}

/// An answer made of some tokens of the first document.
pub(crate) fn meant(request: u64, session: u64) -> Command {
    let part = Part {
        document: DocumentId(1),
        tokens: vec![1..3, 4..5],
        around: Vec::new(),
    };
    Command::Generate {
        request: RequestId(request),
        tenant: TenantId(0),
        session: Some(SessionId(session)),
        adapter_scale: 1.0,
        chosen: Chosen {
            parts: vec![part],
            ..Chosen::default()
        },
        prompt: ids(&[3, 4, 5]),
        max_tokens: 6,
        sampling: Sampling {
            logprobs: true,
            ..Sampling::default()
        },
        eos: Vec::new(),
    }
}

#[test]
fn a_session_that_has_left_answers_as_if_it_had_not() {
    for (rate, faults) in [(0, 0), (usize::MAX, 0), (usize::MAX, 1), (usize::MAX, 2)] {
        for strategy in [Strategy::Parallel, Strategy::Sequential, Strategy::Concat] {
            let (mut stays, mut leaves) = (rig(0, |_| {}), rig(rate, |_| {}));
            leaves.faults = faults;
            for rig in [&mut stays, &mut leaves] {
                tell(rig, 1, strategy);
                tell(rig, 2, strategy);
            }
            // What the disk may mistake for the other's.
            leaves.ask(evict(2, true));
            let mut left = 0;
            for (turn, core) in [true, false, true, true, false].into_iter().enumerate() {
                leaves.ask(evict(1, core));
                let usage = leaves.engine.usage().tiers;
                left += usize::from(usage.asleep_sessions > 1);
                let request = 10 + turn as u64;
                let ask = match turn {
                    0 | 3 => generate(request, Some(1), &ids(&[3, 4, 5]), 6, 7),
                    1 | 2 => meant(request, 1),
                    _ => ingest(1, 3, 3, &ids(&[4, 4, 5, 6, 1]), true),
                };
                let (mine, theirs) = (leaves.ask(ask.clone()), stays.ask(ask));
                assert_eq!(answer(&mine, request), answer(&theirs, request));
                assert_eq!(failures(&mine), []);
            }
            assert_eq!(left, 3);
            assert_eq!(leaves.imprint(1), stays.imprint(1));
            leaves.ask(evict(1, true));
            for rig in [&mut stays, &mut leaves] {
                rig.ask(forget(1, 2));
            }
            assert_eq!(leaves.imprint(1), stays.imprint(1));
            leaves.ask(evict(1, true));
            for rig in [&mut stays, &mut leaves] {
                rig.ask(fork(1, 3));
                rig.ask(Command::Close {
                    session: SessionId(1),
                });
            }
            assert_eq!(leaves.imprint(3), stays.imprint(3));
            let tiers = leaves.engine.usage().tiers;
            assert_eq!(
                tiers.promoted_disk > 0,
                rate > 0 && faults != 1,
                "{tiers:?}"
            );
            assert_eq!(tiers.reread > 0, rate == 0 || faults > 0, "{tiers:?}");
            leaves.assert_all_blocks_come_back([2, 3]);
        }
    }
}

#[test]
fn what_is_needed_is_asked_for_and_no_more() {
    let mut rig = rig(usize::MAX, |_| {});
    tell(&mut rig, 1, Strategy::Parallel);
    assert_eq!(rig.moves(evict(1, true)), ["save"]);
    let tiers = rig.engine.usage().tiers;
    assert_eq!(
        (tiers.slot_bytes, tiers.host_bytes, tiers.asleep_sessions),
        (0, 0, 1)
    );
    let plain = |request| generate(request, Some(1), &ids(&[3, 4, 5]), 2, 7);
    assert_eq!(rig.moves(plain(1)), ["core wanted"]);
    let tiers = rig.engine.usage().tiers;
    assert!(tiers.slot_bytes > 0 && tiers.host_bytes == 0, "{tiers:?}");
    assert_eq!(rig.moves(plain(2)), [] as [&str; 0]);
    assert_eq!(rig.moves(meant(3, 1)), ["sums wanted"]);
    assert!(rig.engine.usage().tiers.host_bytes > 0);
    // A publication of what is there already needs nothing, and nothing is kept twice.
    assert_eq!(rig.moves(evict(1, true)), [] as [&str; 0]);
    assert_eq!(rig.moves(publish(1, 2, &[])), [] as [&str; 0]);
    let tiers = rig.engine.usage().tiers;
    assert_eq!((tiers.hits, tiers.misses), (1, 2));
    assert_eq!((tiers.promoted_disk, tiers.reread), (2, 0));
}

#[test]
fn a_snapshot_that_costs_more_than_reading_again_is_not_kept() {
    let sizes = {
        let mut rig = rig(usize::MAX, |_| {});
        tell(&mut rig, 1, Strategy::Parallel);
        let usage = rig.engine.usage();
        (usage.core_bytes, 15)
    };
    // The core of 15 tokens just fits, the sums do not.
    for (rate, kept) in [
        (sizes.0.div_ceil(sizes.1), true),
        (sizes.0 / sizes.1 - 1, false),
    ] {
        let mut rig = rig(rate, |_| {});
        tell(&mut rig, 1, Strategy::Parallel);
        assert_eq!(rig.moves(evict(1, true)).len(), usize::from(kept));
        if kept {
            let (_, core, sums) = &rig.disk[&SessionId(1)];
            assert_eq!((core.is_some(), sums.is_some()), (true, false));
        }
    }
}

#[test]
fn of_a_session_that_was_told_nothing_nothing_is_kept() {
    let mut rig = rig(usize::MAX, |_| {});
    rig.open(1, Strategy::Parallel);
    assert_eq!(rig.moves(evict(1, true)), [] as [&str; 0]);
    assert_eq!(
        rig.moves(generate(1, Some(1), &ids(&[3]), 2, 7)),
        [] as [&str; 0]
    );
}

#[test]
fn others_go_on_while_a_session_is_waited_for_and_order_is_kept() {
    let mut rig = rig(usize::MAX, |_| {});
    tell(&mut rig, 1, Strategy::Parallel);
    tell(&mut rig, 2, Strategy::Parallel);
    rig.ask(evict(1, true));
    let kept = std::mem::take(&mut rig.disk);
    // A disk that does not answer yet.
    let step = |rig: &mut Rig| {
        let mut events = Vec::new();
        let now = std::time::Instant::now();
        rig.engine.step(|| now, &mut events).expect("it is sound");
        events
    };
    rig.push(generate(1, Some(1), &ids(&[3, 4, 5]), 3, 7));
    rig.push(generate(2, Some(2), &ids(&[3, 4, 5]), 3, 7));
    rig.push(forget(1, 1));
    rig.push(generate(3, Some(1), &ids(&[3, 4, 5]), 3, 7));
    rig.push(generate(4, Some(1), &ids(&[3, 4, 5]), 3, 7));
    let mut events = Vec::new();
    for _ in 0..40 {
        events.extend(step(&mut rig));
    }
    assert_eq!(answer(&events, 2).len(), 3);
    assert!(answer(&events, 1).is_empty() && rig.engine.waits() && rig.engine.idle());
    assert_eq!(rig.engine.usage().queued, 3);
    rig.push(Command::Cancel {
        request: RequestId(4),
    });
    let cancelled = step(&mut rig);
    assert!(
        matches!(
            &cancelled[..],
            [Event::Finished {
                request: RequestId(4),
                ..
            }]
        ),
        "{cancelled:?}"
    );
    let (digest, core, sums) = &kept[&SessionId(1)];
    let snapshot = Snapshot::read(*digest, core.as_deref(), sums.as_deref());
    rig.push(Command::Restored {
        session: SessionId(1),
        snapshot: snapshot.ok(),
    });
    let events = rig.run();
    // What was to be forgotten is forgotten before anybody answers.
    let mut forgotten = rig_told_the_second_alone();
    let want = forgotten.ask(generate(1, Some(1), &ids(&[3, 4, 5]), 3, 7));
    assert_eq!(answer(&events, 1), answer(&want, 1));
    assert_eq!(answer(&events, 3), answer(&want, 1));
    assert_eq!(rig.engine.usage().queued, 0);
}

fn rig_told_the_second_alone() -> Rig {
    let mut rig = rig(0, |_| {});
    rig.open(1, Strategy::Parallel);
    rig.ask(ingest(1, 2, 2, &ids(&[1, 6, 7, 3, 9, 2]), true));
    rig
}

#[test]
fn a_session_that_is_closed_while_it_is_waited_for_fails_what_waits() {
    let mut rig = rig(usize::MAX, |_| {});
    tell(&mut rig, 1, Strategy::Parallel);
    rig.ask(evict(1, true));
    let kept = std::mem::take(&mut rig.disk);
    rig.push(generate(1, Some(1), &ids(&[3]), 3, 7));
    rig.push(Command::Export {
        request: RequestId(2),
        session: SessionId(1),
    });
    rig.push(Command::Close {
        session: SessionId(1),
    });
    let events = rig.run();
    let closed = events.iter().filter(|event| {
        matches!(
            event,
            Event::Failed {
                error: RequestError::SessionClosed { .. },
                ..
            }
        )
    });
    assert_eq!(closed.count(), 2);
    let (digest, core, sums) = &kept[&SessionId(1)];
    let late = Command::Restored {
        session: SessionId(1),
        snapshot: Snapshot::read(*digest, core.as_deref(), sums.as_deref()).ok(),
    };
    rig.ask(late);
    rig.assert_all_blocks_come_back([]);
    assert_eq!(rig.engine.usage().tiers.asleep_sessions, 0);
}

#[test]
fn what_is_said_to_a_copy_waits_until_the_copy_is_made() {
    for rate in [0, usize::MAX] {
        let (mut stays, mut leaves) = (rig(0, |_| {}), rig(rate, |_| {}));
        for rig in [&mut stays, &mut leaves] {
            tell(rig, 1, Strategy::Parallel);
        }
        leaves.ask(evict(1, true));
        let mut said = Vec::new();
        for rig in [&mut stays, &mut leaves] {
            rig.push(fork(1, 2));
            rig.push(ingest(2, 3, 3, &ids(&[22, 15, 19, 39]), true));
            rig.push(fork(2, 3));
            rig.push(generate(7, Some(2), &ids(&[3, 4, 5]), 5, 7));
            rig.push(generate(8, Some(3), &ids(&[3, 4, 5]), 5, 7));
            rig.push(Command::Cancel {
                request: RequestId(8),
            });
            rig.push(forget(3, 1));
            rig.push(Command::Close {
                session: SessionId(1),
            });
            said.push(rig.run());
        }
        for events in &said {
            assert_eq!(failures(events), []);
            assert!(answer(events, 8).is_empty());
            let ends = |request| {
                let ends = events.iter().filter(|event| {
                    matches!(event, Event::Finished { request: of, .. } | Event::Failed { request: of, .. } if of.0 == request)
                });
                ends.count()
            };
            assert_eq!((ends(7), ends(8)), (1, 1));
        }
        for session in [2, 3] {
            assert_eq!(leaves.imprint(session), stays.imprint(session));
        }
        leaves.assert_all_blocks_come_back([2, 3]);
    }
}

#[test]
fn bytes_that_are_no_snapshot_are_refused() {
    let mut rig = rig(usize::MAX, |_| {});
    tell(&mut rig, 1, Strategy::Parallel);
    rig.ask(evict(1, true));
    let (digest, core, sums) = rig.disk[&SessionId(1)].clone();
    let (core, sums) = (core.expect("it is kept"), sums.expect("they are kept"));
    let read = |core: &[u8], sums: &[u8]| Snapshot::read(digest, Some(core), Some(sums));
    assert!(read(&core, &sums).is_ok());
    for cut in (0..sums.len()).step_by(97) {
        assert!(read(&core, &sums[..cut]).is_err());
    }
    assert!(read(&core[..core.len() - 1], &sums).is_err());
    assert!(read(&[&core[..], &[0]].concat(), &sums).is_err());
    assert!(read(&sums, &core).is_err());
}

/// Asks in any order, a step between them; what was answered, and that budgets held.
fn asked(rig: &mut Rig, meant_too: bool, holds: impl Fn(&engine::Usage) -> bool) -> Vec<Event> {
    let mut events = Vec::new();
    for request in 0..40u64 {
        let session = 1 + request * request % 19;
        rig.push(if meant_too && request % 3 == 0 {
            meant(100 + request, session)
        } else {
            generate(100 + request, Some(session), &ids(&[3, 4, 5]), 4, request)
        });
        events.extend(rig.step());
        let usage = rig.engine.usage();
        assert!(holds(&usage), "{usage:?}");
    }
    events.extend(rig.run());
    events
}

#[test]
fn budgets_hold_while_many_more_sessions_answer_than_fit() {
    for (rate, cores) in [
        (0, true),
        (usize::MAX, true),
        (0, false),
        (usize::MAX, false),
    ] {
        let (core, states, traces) = {
            let mut rig = rig(rate, |_| {});
            tell(&mut rig, 1, Strategy::Parallel);
            let usage = rig.engine.usage();
            (usage.core_bytes, usage.state_bytes, usage.trace_bytes)
        };
        // Slots for three, or sums for four and traces for five.
        let mut tight = rig(rate, |config| {
            if cores {
                config.core_budget_bytes = 3 * core;
            } else {
                config.state_budget_bytes = 4 * states;
                config.trace_budget_bytes = 5 * traces;
            }
        });
        let mut roomy = rig(0, |_| {});
        for session in 1..20 {
            tell(&mut tight, session, Strategy::Parallel);
            tell(&mut roomy, session, Strategy::Parallel);
        }
        let whole = states / 3 * 6;
        let mine = asked(&mut tight, !cores, |usage| {
            // What runs keeps its core; beyond the budget one session comes back at a time.
            let held = usage.running * core;
            let slots = !cores || usage.core_bytes <= held.max(3 * core) + core;
            slots && (cores || usage.state_bytes <= 4 * states + whole)
        });
        let theirs = asked(&mut roomy, !cores, |_| true);
        for request in 100..140 {
            assert_eq!(
                answer(&mine, request),
                answer(&theirs, request),
                "{request}"
            );
            assert!(!answer(&mine, request).is_empty());
        }
        tight.step();
        let usage = tight.engine.usage();
        assert!(!cores || usage.core_bytes <= 3 * core, "{usage:?}");
        assert!(cores || usage.state_bytes <= 4 * states, "{usage:?}");
        assert!(
            usage.tiers.evicted_host > 0 && usage.tiers.misses > 0,
            "{usage:?}"
        );
        tight.assert_all_blocks_come_back(1..20);
    }
}

/// What a core of `tell`'s sessions takes.
pub(crate) fn core_bytes() -> usize {
    let mut rig = rig(0, |_| {});
    tell(&mut rig, 1, Strategy::Parallel);
    rig.engine.usage().core_bytes
}

#[test]
fn versions_of_a_burst_come_though_there_are_few_slots() {
    let core = core_bytes();
    for rate in [0, usize::MAX] {
        let mut rig = rig(rate, |config| {
            config.core_budget_bytes = 2 * core;
            config.step_tokens = 200;
        });
        for session in 1..13 {
            rig.open(session, Strategy::Parallel);
        }
        // All of them are read in one step.
        for session in 1..13 {
            rig.push(ingest(session, 1, 1, &ids(&[5, 6, 7, 8, 9, 3]), true));
        }
        let events = rig.run();
        for session in 1..13 {
            let came = events.iter().any(|event| {
                matches!(event, Event::Applied { session: of, newest } if of.0 == session && newest.seq.0 == 1)
            });
            assert!(came, "{session}: {events:?}");
        }
        assert!(rig.engine.usage().core_bytes <= 2 * core);
    }
}

#[test]
fn a_core_that_is_still_being_written_makes_room_for_one_other() {
    let core = core_bytes();
    let mut rig = rig(usize::MAX, |config| config.core_budget_bytes = 4 * core);
    let mut events = Vec::new();
    for session in 1..5 {
        tell(&mut rig, session, Strategy::Parallel);
    }
    rig.disk.clear();
    rig.open(5, Strategy::Parallel);
    // The disk takes its time: what it was given stays here.
    rig.push(ingest(5, 1, 1, &ids(&[5, 6, 7, 8, 9, 3]), true));
    let now = std::time::Instant::now();
    for _ in 0..6 {
        rig.engine.step(|| now, &mut events).expect("it is sound");
    }
    let saved = |event: &&Event| matches!(event, Event::Save { .. });
    assert!(events.iter().filter(saved).count() > 0, "{events:?}");
    let tiers = rig.engine.usage().tiers;
    assert_eq!(
        (tiers.slot_sessions, tiers.evicted_slots),
        (4, 1),
        "{tiers:?}"
    );
    assert_eq!(tiers.slot_bytes, 4 * core);
    drop(events);
    assert_eq!(rig.engine.usage().core_bytes, 4 * core);
}

#[test]
fn a_session_that_is_asked_for_while_it_is_written_is_not_read_again() {
    let mut rig = rig(usize::MAX, |_| {});
    tell(&mut rig, 1, Strategy::Parallel);
    let now = std::time::Instant::now();
    let step = |rig: &mut Rig| {
        let mut events = Vec::new();
        rig.engine.step(|| now, &mut events).expect("it is sound");
        events
    };
    rig.push(evict(1, true));
    let snapshot = step(&mut rig).into_iter().find_map(|event| match event {
        Event::Save { snapshot, .. } => Some(snapshot),
        _ => None,
    });
    let snapshot = snapshot.expect("it is worth it");
    rig.push(generate(1, Some(1), &ids(&[3, 4, 5]), 3, 7));
    for _ in 0..3 {
        assert_eq!(step(&mut rig).len(), 0);
    }
    assert!(rig.engine.waits() && rig.engine.idle());
    let core = snapshot.core_bytes().expect("a core has bytes");
    let digest = snapshot.digest();
    rig.disk.insert(SessionId(1), (digest, core, None));
    rig.push(Command::Saved {
        session: SessionId(1),
        digest,
        kept: Need {
            core: true,
            sums: false,
        },
    });
    drop(snapshot);
    assert_eq!(answer(&rig.run(), 1).len(), 3);
    let tiers = rig.engine.usage().tiers;
    assert_eq!((tiers.promoted_disk, tiers.reread), (1, 0), "{tiers:?}");
}

#[test]
fn a_core_that_is_made_for_a_request_finds_room_where_sessions_rest() {
    let core = core_bytes();
    let mut rig = rig(usize::MAX, |config| config.core_budget_bytes = 2 * core);
    let mut roomy = Rig::new(Form::Associative, config());
    for session in 1..4 {
        tell(&mut rig, session, Strategy::Parallel);
        tell(&mut roomy, session, Strategy::Parallel);
    }
    for request in 1..7 {
        let session = 1 + request % 3;
        let (mine, theirs) = (
            rig.ask(meant(request, session)),
            roomy.ask(meant(request, session)),
        );
        assert_eq!(answer(&mine, request), answer(&theirs, request));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn one_slot_serves_any_order_of_sessions(asks in vec((1u64..5, proptest::bool::ANY, 0usize..4), 1..24), rate in prop_oneof![Just(0), Just(usize::MAX)]) {
        let core = {
            let mut rig = rig(0, |_| {});
            tell(&mut rig, 1, Strategy::Parallel);
            rig.engine.usage().core_bytes
        };
        let mut tight = rig(rate, |config| config.core_budget_bytes = core);
        let mut roomy = rig(0, |_| {});
        for session in 1..5 {
            tell(&mut tight, session, Strategy::Parallel);
            tell(&mut roomy, session, Strategy::Parallel);
        }
        let (mut mine, mut theirs) = (Vec::new(), Vec::new());
        for (request, &(session, score, steps)) in (100..).zip(&asks) {
            let seed = if score { 1 } else { request };
            let ask = generate(request, Some(session), &ids(&[3, 4]), 3, seed);
            tight.push(ask.clone());
            theirs.extend(roomy.ask(ask));
            (0..steps).for_each(|_| mine.extend(tight.step()));
        }
        mine.extend(tight.run());
        for request in 100..100 + asks.len() as u64 {
            prop_assert_eq!(answer(&mine, request), answer(&theirs, request));
        }
        tight.assert_all_blocks_come_back(1..5);
    }
}
