//! The prefix cache: hits where they may be, none where they may not, and no answer that one changed.
//!
//! A block has four tokens. That answers stay what they are under any interleaving is `mixed`'s to say.

use engine::{Command, Config, Event, RequestId, SessionId, Strategy, TenantId, TokenId};
use proptest::prelude::*;
use testkit::Form;

use crate::support::*;

/// Seventeen tokens: four blocks and the one that is always computed.
fn prompt() -> Vec<TokenId> {
    (3..20).map(TokenId).collect()
}

/// Two sessions of the same digest, 1 and its fork 2, and 3 of another.
fn rig() -> Rig {
    let mut rig = Rig::new(Form::Associative, config());
    for session in [1, 3] {
        rig.open(session, Strategy::Parallel);
        let tokens = ids(&[session as u32 + 5; 9]);
        rig.ask(ingest(session, 1, 1, &tokens, true));
    }
    rig.ask(fork(1, 2));
    rig
}

fn scaled(mut command: Command, scale: f32) -> Command {
    if let Command::Generate { adapter_scale, .. } = &mut command {
        *adapter_scale = scale;
    }
    command
}

fn score(request: u64, prompt: &[TokenId], continuation: &[TokenId]) -> Command {
    Command::Score {
        request: RequestId(request),
        tenant: TenantId(0),
        session: Some(SessionId(1)),
        adapter_scale: 1.0,
        chosen: engine::Chosen::default(),
        prompt: prompt.to_vec(),
        continuations: vec![
            continuation.to_vec(),
            ids(&[30, 31, 32, 33, 34, 35, 36, 37]),
        ],
    }
}

/// Asks first and then `second`; the prompt tokens of the second that were there, and its answer beside that of an engine that
/// was not asked before.
fn after(first: Command, second: Command) -> usize {
    let Command::Generate { request, .. } = second else {
        panic!("it generates")
    };
    let (mut rig, mut fresh) = (rig(), rig());
    rig.ask(first);
    let (hit, cold) = (rig.ask(second.clone()), fresh.ask(second));
    assert_eq!(answer(&hit, request.0), answer(&cold, request.0));
    assert_eq!(cached(&cold, request.0), 0);
    rig.assert_all_blocks_come_back([1, 2, 3]);
    cached(&hit, request.0)
}

#[test]
fn what_was_read_under_the_same_imprint_is_not_read_again() {
    let asked = || generate(1, Some(1), &prompt(), 3, 1);
    assert_eq!(after(asked(), generate(2, Some(1), &prompt(), 3, 2)), 16);
    // The fork's version has the same digest.
    assert_eq!(after(asked(), generate(2, Some(2), &prompt(), 3, 2)), 16);
    // The last token of a prompt is computed, and blocks are whole.
    assert_eq!(
        after(asked(), generate(2, Some(1), &prompt()[..16], 3, 2)),
        12
    );
    let mut other = prompt();
    other[9] = TokenId(39);
    assert_eq!(after(asked(), generate(2, Some(1), &other, 3, 2)), 8);
}

#[test]
fn what_was_read_under_another_imprint_or_by_another_tenant_is_read_again() {
    let asked = |session| generate(1, session, &prompt(), 3, 1);
    let second = |session| generate(2, session, &prompt(), 3, 2);
    let mut pairs = vec![
        (asked(Some(1)), second(Some(3))),
        (asked(Some(1)), second(None)),
        (asked(None), second(Some(1))),
        (asked(Some(1)), scaled(second(Some(1)), 0.5)),
        (scaled(asked(Some(1)), 0.5), second(Some(1))),
        (asked(Some(1)), by(1, second(Some(1)))),
        (by(1, asked(None)), second(None)),
    ];
    for (first, second) in pairs.drain(..) {
        assert_eq!(after(first, second), 0);
    }
    // Strength 0 is the bare model, of whichever session.
    assert_eq!(after(asked(None), scaled(second(Some(3)), 0.0)), 16);
    assert_eq!(after(by(1, asked(None)), by(1, second(None))), 16);
}

#[test]
fn a_new_version_reads_again_and_one_that_forgot_it_does_not() {
    let mut rig = rig();
    let mut next = 10;
    let mut ask = |rig: &mut Rig| {
        next += 1;
        cached(&rig.ask(generate(next, Some(1), &prompt(), 2, 1)), next)
    };
    assert_eq!((ask(&mut rig), ask(&mut rig)), (0, 16));
    rig.ask(ingest(1, 2, 2, &ids(&[8; 9]), true));
    assert_eq!((ask(&mut rig), ask(&mut rig)), (0, 16));
    // What is left is the first version's digest.
    rig.ask(forget(1, 2));
    assert_eq!(ask(&mut rig), 16);
    rig.ask(forget(1, 1));
    assert_eq!(ask(&mut rig), 0);
}

#[test]
fn a_conversation_goes_on_from_its_last_answer() {
    let mut rig = rig();
    let mut ask = generate(1, Some(1), &prompt(), 12, 7);
    if let Command::Generate { eos, .. } = &mut ask {
        eos.clear();
    }
    let first = rig.ask(ask);
    let mut history = prompt();
    history.extend(answer(&first, 1).iter().map(|(token, _)| *token));
    assert_eq!(history.len(), 29);
    history.extend(ids(&[21, 22, 23]));
    let second = rig.ask(generate(2, Some(1), &history, 3, 7));
    // All but the last token of the answer was fed: seven whole blocks.
    assert_eq!(cached(&second, 2), 28);
    let cold = self::rig().ask(generate(2, Some(1), &history, 3, 7));
    assert_eq!(answer(&second, 2), answer(&cold, 2));
}

#[test]
fn a_score_shares_its_prompt_and_never_its_continuations() {
    let mut rig = rig();
    let continuation = ids(&[22, 23, 24, 25, 26, 27, 28, 29]);
    rig.ask(score(1, &prompt(), &continuation));
    assert_eq!(cached(&rig.ask(score(2, &prompt(), &continuation)), 2), 16);
    let mut longer = prompt();
    longer.extend(&continuation);
    let events = rig.ask(generate(3, Some(1), &longer, 3, 7));
    assert_eq!(cached(&events, 3), 16);
    let cold = self::rig().ask(generate(3, Some(1), &longer, 3, 7));
    assert_eq!(answer(&events, 3), answer(&cold, 3));
}

#[test]
fn requests_that_run_at_once_hold_the_same_blocks() {
    let mut config = config();
    config.kv_blocks = 12;
    let mut rig = Rig::new(Form::Associative, config);
    rig.ask(generate(1, None, &prompt(), 1, 1));
    // Alone each takes seven blocks; together four and three each.
    rig.push(generate(2, None, &prompt(), 11, 2));
    rig.push(generate(3, None, &prompt(), 11, 3));
    rig.step();
    assert_eq!(rig.engine.usage().running, 2);
    rig.run();
    rig.assert_all_blocks_come_back([]);
}

#[test]
fn what_is_kept_gives_way_to_what_runs_and_is_kept_only_if_it_may() {
    let mut config = config();
    config.kv_blocks = 8;
    let mut rig = Rig::new(Form::Associative, config.clone());
    let ask = |rig: &mut Rig, request, token| {
        let events = rig.ask(generate(request, None, &ids(&[token; 17]), 1, 1));
        cached(&events, request)
    };
    assert_eq!((ask(&mut rig, 1, 1), ask(&mut rig, 2, 1)), (0, 16));
    assert_eq!(
        (
            rig.engine.usage().free_blocks,
            rig.engine.usage().kept_blocks
        ),
        (8, 4)
    );
    // Three blanks, a kept one for the last of the five: the end of the first prompt.
    assert_eq!(ask(&mut rig, 3, 2), 0);
    assert_eq!(ask(&mut rig, 4, 1), 12);
    let usage = rig.engine.usage();
    assert_eq!((usage.prompt_tokens, usage.cached_tokens), (4 * 17, 28));
    config.prefix_cache = false;
    let mut rig = Rig::new(Form::Associative, config);
    assert_eq!((ask(&mut rig, 1, 1), ask(&mut rig, 2, 1)), (0, 0));
    assert_eq!(rig.engine.usage().kept_blocks, 0);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn however_a_prompt_was_cut_and_cached_before_its_answer_is_the_same(
        step_tokens in 10usize..40, asks in proptest::collection::vec((0usize..3, 1usize..30, tokens(0..4), 1usize..6), 1..12),
    ) {
        let warm = Config { step_tokens, ..config() };
        let mut rig = Rig::new(Form::Published, warm.clone());
        let mut cold = Rig::new(Form::Published, Config { prefix_cache: false, ..warm });
        for (request, (of, len, rest, max_tokens)) in (0..).zip(asks) {
            let mut prompt: Vec<TokenId> = (0..30).map(|at| TokenId((at * (of as u32 + 1)) % VOCAB)).take(len).collect();
            prompt.extend(rest);
            let ask = generate(request, None, &prompt, max_tokens, request);
            let (hit, lone) = (rig.ask(ask.clone()), cold.ask(ask));
            prop_assert_eq!(answer(&hit, request), answer(&lone, request));
            let failed = hit.iter().any(|event| matches!(event, Event::Failed { .. }));
            prop_assert!(!failed);
        }
        rig.assert_all_blocks_come_back([]);
    }
}
