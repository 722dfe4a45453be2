//! Floods, budgets for one, and requests that go away: others are answered in time, and nothing stays behind.

use std::time::Duration;

use engine::{Command, Config, Event, Finish, RequestError, RequestId, SessionId, Strategy};
use testkit::Form;

use crate::support::*;

fn endless(request: u64, session: Option<u64>, prompt: &[engine::TokenId]) -> Command {
    let mut ask = generate(request, session, prompt, 40, request);
    if let Command::Generate { eos, .. } = &mut ask {
        eos.clear();
    }
    ask
}

fn ends(events: &[Event], wanted: u64) -> bool {
    events.iter().any(|event| {
        matches!(event, Event::Finished { request, .. } | Event::Failed { request, .. } if request.0 == wanted)
    })
}

#[test]
fn a_flood_of_one_tenant_delays_anothers_prompt_by_a_few_steps() {
    let mut rig = Rig::new(Form::Associative, config());
    for request in 0..60 {
        rig.push(by(
            1,
            endless(request, None, &ids(&[request as u32 % 40; 8])),
        ));
    }
    for _ in 0..5 {
        rig.step();
    }
    assert_eq!(rig.engine.usage().running, 8, "it has all places");
    rig.push(by(2, generate(100, None, &ids(&[7; 40]), 1, 0)));
    let steps = (1..1000).find(|_| ends(&rig.step(), 100));
    // Its own 40 tokens beside eight answers, and a turn of the others. Alone among the others it would wait for 300 steps.
    assert!(steps.is_some_and(|steps| steps <= 12), "{steps:?}");
    assert!(rig.engine.usage().queued > 40);
    rig.run();
    rig.assert_all_blocks_come_back([]);
}

#[test]
fn the_wait_that_is_told_is_about_the_wait_that_comes() {
    let config = Config {
        prefix_cache: false,
        max_running: 20,
        ..config()
    };
    let mut rig = Rig::new(Form::Associative, config);
    assert_eq!(rig.engine.usage().wait, Duration::ZERO);
    for request in 0..40 {
        rig.push(generate(
            request,
            None,
            &ids(&[request as u32 % 40; 40]),
            1,
            0,
        ));
    }
    for _ in 0..10 {
        rig.step();
    }
    let told = rig.engine.usage().wait;
    rig.push(generate(100, None, &ids(&[1]), 1, 0));
    // A step is a millisecond.
    let came = (1..1000).find(|_| ends(&rig.step(), 100));
    let came = Duration::from_millis(came.expect("it ends"));
    assert!(told > came / 2 && told < came * 2, "{told:?} {came:?}");
    assert_eq!(rig.engine.usage().wait, Duration::ZERO);
}

#[test]
fn in_whatever_stage_a_request_is_cancelled_all_of_it_is_gone_with_the_step() {
    for steps in 0..8 {
        let mut config = config();
        config.max_running = 1;
        let mut rig = Rig::new(Form::Associative, config);
        rig.open(1, Strategy::Parallel);
        rig.ask(ingest(1, 1, 1, &ids(&[7; 6]), true));
        let rest = rig.engine.usage();
        // The first is read in two steps and then decodes; the second waits.
        for request in 1..3 {
            rig.push(endless(request, Some(1), &ids(&[request as u32; 30])));
        }
        for _ in 0..steps {
            rig.step();
        }
        // A newer version: the old core is the running request's alone.
        rig.push(forget(1, 1));
        for request in [2, 1] {
            rig.push(Command::Cancel {
                request: RequestId(request),
            });
        }
        let events = rig.step();
        let cancelled = |event: &&Event| {
            matches!(
                event,
                Event::Finished {
                    reason: Finish::Cancelled,
                    ..
                }
            )
        };
        assert_eq!(events.iter().filter(cancelled).count(), 2);
        let usage = rig.engine.usage();
        assert_eq!((usage.running, usage.queued), (0, 0));
        assert_eq!(
            (usage.free_blocks, usage.core_bytes),
            (rest.blocks, 0),
            "after {steps} steps"
        );
        rig.assert_all_blocks_come_back([1]);
    }
}

#[test]
fn a_session_that_is_closed_while_it_reads_and_answers_leaves_nothing() {
    for steps in 0..12 {
        let mut rig = Rig::new(Form::Published, config());
        rig.open(1, Strategy::Sequential);
        rig.ask(ingest(1, 1, 1, &ids(&[7; 20]), true));
        rig.push(endless(1, Some(1), &ids(&[3; 30])));
        rig.push(ingest(1, 2, 2, &ids(&[9; 100]), true));
        for _ in 0..steps {
            rig.step();
        }
        rig.push(Command::Close {
            session: SessionId(1),
        });
        let events = rig.step();
        let closed = |event: &Event| {
            matches!(
                event,
                Event::Failed {
                    error: RequestError::SessionClosed { .. },
                    ..
                }
            )
        };
        assert!(events.iter().any(closed), "{events:?}");
        assert!(rig.engine.idle());
        let usage = rig.engine.usage();
        assert_eq!(
            (
                usage.running,
                usage.queued,
                usage.queued_tokens,
                usage.trace_bytes
            ),
            (0, 0, 0, 0)
        );
        rig.assert_all_blocks_come_back([]);
    }
}

#[test]
fn with_one_block_one_place_and_the_least_steps_everything_has_its_turn() {
    let config = Config {
        kv_blocks: 1,
        block_size: CONTEXT,
        max_running: 1,
        step_tokens: 3,
        max_bulk_beside_decode: 2,
        ..config()
    };
    let (mut rig, mut alone) = (
        Rig::new(Form::Associative, config),
        Rig::new(Form::Associative, crate::support::config()),
    );
    for rig in [&mut rig, &mut alone] {
        rig.open(1, Strategy::Parallel);
    }
    for request in 1..4 {
        rig.push(endless(request, None, &ids(&[request as u32; 5])));
        rig.push(ingest(
            1,
            request,
            request,
            &ids(&[request as u32; 11]),
            true,
        ));
    }
    let events = rig.run();
    for request in 1..4 {
        alone.ask(ingest(
            1,
            request,
            request,
            &ids(&[request as u32; 11]),
            true,
        ));
        let lone = alone.ask(endless(request, None, &ids(&[request as u32; 5])));
        assert_eq!(answer(&events, request).len(), 40);
        assert_eq!(answer(&events, request), answer(&lone, request));
    }
    assert_eq!(rig.imprint(1), alone.imprint(1));
    rig.assert_all_blocks_come_back([1]);
}
