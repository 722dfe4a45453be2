//! Preemption: when blocks run out somebody gives up all of its own, and nobody's answer shows it.
//!
//! A block has four tokens.

use engine::{
    Chosen, Command, Config, Event, Finish, RequestId, SessionId, Strategy, TenantId, TokenId,
    Version,
};
use proptest::{collection::vec, prelude::*};
use testkit::Form;

use crate::support::*;

fn rig(kv_blocks: usize, prefix_cache: bool) -> Rig {
    let config = Config {
        kv_blocks,
        prefix_cache,
        ..config()
    };
    Rig::new(Form::Associative, config)
}

/// An answer of exactly so many tokens.
fn endless(request: u64, session: Option<u64>, prompt: &[TokenId], max_tokens: usize) -> Command {
    let mut ask = generate(request, session, prompt, max_tokens, request);
    if let Command::Generate { eos, .. } = &mut ask {
        eos.clear();
    }
    ask
}

fn score(request: u64, prompt: &[TokenId], continuations: Vec<Vec<TokenId>>) -> Command {
    Command::Score {
        request: RequestId(request),
        tenant: TenantId(0),
        session: None,
        adapter_scale: 1.0,
        chosen: Chosen::default(),
        prompt: prompt.to_vec(),
        continuations,
    }
}

fn scores(events: &[Event], request: u64) -> Vec<Vec<(TokenId, u32)>> {
    let scored = events.iter().find_map(|event| match event {
        Event::Scored {
            request: of,
            scores,
            ..
        } if of.0 == request => Some(scores),
        _ => None,
    });
    let bits = |&(token, logprob): &(TokenId, f32)| (token, logprob.to_bits());
    let scored = scored.expect("it is scored");
    scored
        .iter()
        .map(|one| one.iter().map(bits).collect())
        .collect()
}

#[test]
fn requests_start_on_what_they_need_now_and_the_last_to_come_gives_way() {
    for prefix_cache in [true, false] {
        let (mut rig, mut alone) = (rig(6, prefix_cache), rig(64, false));
        // Two blocks each to begin with, five each in the end.
        for request in 1..3 {
            rig.push(endless(request, None, &ids(&[request as u32; 6]), 14));
        }
        let mut events = rig.step();
        assert_eq!(rig.engine.usage().running, 2);
        while rig.engine.usage().preempted == 0 {
            events.extend(rig.step());
        }
        let usage = rig.engine.usage();
        assert_eq!((usage.running, usage.queued), (1, 1));
        let before = answer(&events, 2).len();
        assert!(
            before > 0 && answer(&events, 1).len() < 14,
            "it had begun, and the first goes on"
        );
        events.extend(rig.run());
        for request in 1..3 {
            let lone = alone.ask(endless(request, None, &ids(&[request as u32; 6]), 14));
            assert_eq!(answer(&events, request).len(), 14);
            assert_eq!(answer(&events, request), answer(&lone, request));
        }
        rig.assert_all_blocks_come_back([]);
    }
}

#[test]
fn who_gave_way_goes_on_with_its_version() {
    let mut rig = rig(8, true);
    rig.open(1, Strategy::Parallel);
    rig.ask(ingest(1, 1, 1, &ids(&[7; 6]), true));
    rig.push(endless(1, None, &ids(&[1; 8]), 16));
    rig.push(endless(2, Some(1), &ids(&[2; 8]), 16));
    let mut events = rig.step();
    rig.push(ingest(1, 2, 2, &ids(&[9; 6]), true));
    events.extend(rig.run());
    assert!(rig.engine.usage().preempted > 0);
    let versions = events.iter().filter_map(|event| match event {
        Event::Finished {
            request,
            version,
            reason: Finish::Length,
            ..
        } => Some((request.0, *version)),
        _ => None,
    });
    assert_eq!(
        versions.collect::<Vec<_>>(),
        [(1, Version(0)), (2, Version(1))]
    );
    let mut alone = self::rig(64, false);
    alone.open(1, Strategy::Parallel);
    alone.ask(ingest(1, 1, 1, &ids(&[7; 6]), true));
    let lone = alone.ask(endless(2, Some(1), &ids(&[2; 8]), 16));
    assert_eq!(answer(&events, 2), answer(&lone, 2));
}

#[test]
fn a_score_that_gave_way_scores_each_token_once() {
    let continuations = vec![ids(&[5, 6]), ids(&[8; 18]), ids(&[3; 20])];
    let config = Config {
        kv_blocks: 8,
        max_bulk_beside_decode: 2,
        ..config()
    };
    let mut rig = Rig::new(Form::Associative, config);
    rig.push(endless(1, None, &ids(&[1; 4]), 26));
    rig.push(score(2, &ids(&[2; 6]), continuations.clone()));
    let events = rig.run();
    assert!(rig.engine.usage().preempted > 0);
    let lone = self::rig(64, false).ask(score(2, &ids(&[2; 6]), continuations));
    assert_eq!(scores(&events, 2), scores(&lone, 2));
}

#[test]
fn what_gave_way_can_be_cancelled_and_closed() {
    let mut rig = rig(6, true);
    rig.open(1, Strategy::Parallel);
    rig.ask(ingest(1, 1, 1, &ids(&[7; 9]), true));
    for request in 1..4 {
        rig.push(endless(
            request,
            (request == 2).then_some(1),
            &ids(&[request as u32; 4]),
            18,
        ));
    }
    while rig.engine.usage().preempted < 2 {
        rig.step();
    }
    rig.push(Command::Cancel {
        request: RequestId(3),
    });
    rig.push(Command::Close {
        session: SessionId(1),
    });
    let events = rig.step();
    let ends = events.iter().filter(|event| {
        matches!(
            event,
            Event::Finished {
                request: RequestId(3),
                reason: Finish::Cancelled,
                ..
            } | Event::Failed {
                request: RequestId(2),
                ..
            }
        )
    });
    assert_eq!(ends.count(), 2, "{events:?}");
    rig.run();
    rig.assert_all_blocks_come_back([]);
    assert_eq!(rig.engine.usage().queued, 0);
}

#[test]
fn context_gets_its_blocks_from_answers_that_go_on_and_on() {
    let config = Config {
        kv_blocks: 4,
        block_size: 24,
        ..config()
    };
    let mut rig = Rig::new(Form::Associative, config);
    rig.open(1, Strategy::Parallel);
    for request in 1..3 {
        rig.push(endless(request, None, &ids(&[request as u32; 8]), 40));
    }
    // Both hold two blocks from the 17th token on, for 24 steps.
    while rig.engine.usage().free_blocks > 0 {
        rig.step();
    }
    rig.push(ingest(1, 1, 1, &ids(&[7; 20]), true));
    let encoded = |event: &Event| matches!(event, Event::Encoded { .. });
    let waited = (0..100).take_while(|_| !rig.step().iter().any(encoded));
    assert!(waited.count() < 20);
    let usage = rig.engine.usage();
    assert_eq!(
        (usage.preempted, usage.running),
        (1, 1),
        "the first goes on"
    );
    rig.run();
    rig.assert_all_blocks_come_back([1]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// The least that `Config` and the requests allow: one request, or one window, has all blocks to itself.
    #[test]
    fn with_blocks_for_little_more_than_one_all_end_and_answer_as_alone(
        form in forms(), spare in 0usize..6, prefix_cache in proptest::bool::ANY, strategy in strategies(), max_running in 1usize..8,
        asks in vec((tokens(1..16), 1usize..16, proptest::bool::ANY, 0usize..4), 1..10), context in tokens(20..31),
    ) {
        // 30 tokens, or a window (a document of concat) of 32.
        let config = Config { kv_blocks: 8 + spare, prefix_cache, max_running, ..config() };
        let (mut rig, mut alone) = (Rig::new(form, config), Rig::new(form, Config { prefix_cache: false, ..crate::support::config() }));
        for rig in [&mut rig, &mut alone] {
            for session in 1..3 {
                rig.open(session, strategy);
                rig.ask(ingest(session, 1, 1, &context[..session as usize * 9], true));
            }
        }
        let mut events = Vec::new();
        for (request, (prompt, max_tokens, imprinted, steps)) in (0..).zip(&asks) {
            rig.push(endless(request, imprinted.then_some(1), prompt, *max_tokens));
            rig.push(ingest(2, request + 2, 2, &context[..3 * usize::from(request < 8)], false));
            (0..*steps).for_each(|_| events.extend(rig.step()));
        }
        events.extend(rig.run());
        for (request, (prompt, max_tokens, imprinted, _)) in (0..).zip(&asks) {
            let lone = alone.ask(endless(request, imprinted.then_some(1), prompt, *max_tokens));
            prop_assert_eq!(answer(&events, request).len(), *max_tokens);
            prop_assert_eq!(answer(&events, request), answer(&lone, request));
        }
        rig.assert_all_blocks_come_back([1, 2]);
    }
}
