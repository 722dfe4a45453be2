//! Requests: a row in a batch is the row alone; a version is pinned; what ends gives everything back.

use std::ops::Range;

use engine::{
    Chosen, Command, Config, Digest, DocumentId, Event, Finish, Part, RequestError, RequestId,
    Sampling, SessionId, Strategy, TenantId, TokenId, Version,
};
use proptest::{collection::vec, prelude::*, sample::Index};
use testkit::Form;

use crate::support::*;

fn failed(events: &[Event]) -> RequestError {
    match events {
        [Event::Failed { error, .. }] => error.clone(),
        other => panic!("{other:?}"),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn a_request_among_others_is_answered_as_alone(
        form in forms(), config in configs(), contexts in vec(tokens(4..28), 3), prompts in vec(tokens(1..20), 1..7), max_tokens in 1usize..12,
    ) {
        let session = |index: usize| Some(index as u64 % 4).filter(|&session| session > 0);
        let mut together = Rig::new(form, config.clone());
        let mut alone = Rig::new(form, config);
        for rig in [&mut together, &mut alone] {
            for (number, context) in (1..).zip(&contexts) {
                rig.open(number, Strategy::Parallel);
                rig.ask(ingest(number, 1, 1, context, true));
            }
        }
        for (index, prompt) in prompts.iter().enumerate() {
            together.push(generate(index as u64, session(index), prompt, max_tokens, index as u64));
        }
        // Context of another session runs in the same steps.
        together.push(open(4, Strategy::Sequential));
        together.push(ingest(4, 1, 1, &contexts[1], true));
        let events = together.run();
        for (index, prompt) in prompts.iter().enumerate() {
            let id = index as u64;
            let lone = alone.ask(generate(id, session(index), prompt, max_tokens, id));
            prop_assert!(!lone.is_empty());
            prop_assert_eq!(answer(&events, id), answer(&lone, id));
        }
        together.assert_all_blocks_come_back(1..5);
    }

    #[test]
    fn a_score_is_the_sum_of_what_generation_reports(form in forms(), config in configs(), context in tokens(4..28), prompt in tokens(1..20), seed in any::<u64>()) {
        let mut rig = Rig::new(form, config);
        rig.open(1, Strategy::Parallel);
        rig.ask(ingest(1, 1, 1, &context, true));
        let drawn = answer(&rig.ask(generate(1, Some(1), &prompt, 6, seed)), 1);
        prop_assume!(!drawn.is_empty());
        let continuation: Vec<TokenId> = drawn.iter().map(|&(token, _)| token).collect();
        let other = ids(&[3, 1]);
        let events = rig.ask(Command::Score {
            request: RequestId(2), tenant: TenantId(0), session: Some(SessionId(1)), adapter_scale: 1.0, chosen: Chosen::default(), prompt: prompt.clone(),
            continuations: vec![other.clone(), continuation, other],
        });
        let [Event::Scored { scores, .. }] = &events[..] else { panic!("{events:?}") };
        let bits: Vec<(TokenId, u32)> = scores[1].iter().map(|&(token, logprob)| (token, logprob.to_bits())).collect();
        prop_assert_eq!(bits, drawn);
        prop_assert_eq!(&scores[0], &scores[2]);
    }
}

#[test]
fn a_running_answer_keeps_its_version_while_new_ones_appear() {
    let context = |shift: u32| {
        ids(&(0..20)
            .map(|index| (index * 3 + shift) % VOCAB)
            .collect::<Vec<_>>())
    };
    let prompt = ids(&[1, 2, 3]);
    let mut rig = Rig::new(Form::Associative, config());
    rig.open(1, Strategy::Parallel);
    rig.ask(ingest(1, 1, 1, &context(0), true));
    let version = match rig.ask(publish(1, 1, &[]))[..] {
        [Event::Applied { newest, .. }] => newest.version,
        ref other => panic!("{other:?}"),
    };
    let mut ask = generate(1, Some(1), &prompt, 30, 5);
    let Command::Generate { eos, .. } = &mut ask else {
        panic!("it generates")
    };
    eos.clear();
    let alone = answer(&rig.ask(ask.clone()), 1);
    rig.push(ask.clone());
    let mut events = rig.step();
    rig.push(ingest(1, 2, 2, &context(1), true));
    events.extend(rig.run());
    let newest = events
        .iter()
        .filter_map(|event| match event {
            Event::Applied { newest, .. } => Some(newest.version),
            _ => None,
        })
        .max();
    assert!(newest > Some(version));
    let applied = events
        .iter()
        .position(|event| matches!(event, Event::Applied { .. }));
    let finished = events.iter().position(
        |event| matches!(event, Event::Finished { version: with, .. } if *with == version),
    );
    assert!(applied < finished && finished.is_some(), "{events:?}");
    assert_eq!(answer(&events, 1), alone);
    assert_ne!(answer(&rig.ask(ask), 1), alone);
}

#[test]
fn scale_0_and_version_0_are_the_bare_model() {
    let prompt = ids(&[1, 2, 3]);
    let mut rig = Rig::new(Form::Associative, config());
    rig.open(1, Strategy::Parallel);
    let bare = answer(&rig.ask(generate(1, None, &prompt, 9, 3)), 1);
    let empty = rig.ask(generate(2, Some(1), &prompt, 9, 3));
    assert_eq!(answer(&empty, 2), bare);
    assert!(matches!(
        empty.last(),
        Some(Event::Finished {
            version: Version(0),
            digest: None,
            context_tokens: 0,
            ..
        })
    ));
    rig.ask(ingest(1, 1, 1, &ids(&[9; 12]), true));
    let mut ask = generate(3, Some(1), &prompt, 9, 3);
    let Command::Generate { adapter_scale, .. } = &mut ask else {
        panic!("it generates")
    };
    *adapter_scale = 0.0;
    let unscaled = rig.ask(ask);
    assert_eq!(answer(&unscaled, 3), bare);
    assert!(matches!(
        unscaled.last(),
        Some(Event::Finished {
            version: Version(0),
            digest: None,
            ..
        })
    ));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Whichever are chosen: the same bits, the same digest.
    #[test]
    fn an_answer_made_of_some_documents_is_that_of_a_session_told_these_alone(
        form in forms(),
        strategy in prop_oneof![Just(Strategy::Parallel), Just(Strategy::Concat)],
        documents in prop::collection::vec(tokens(3..30), 2..5),
        chosen in prop::collection::vec(any::<bool>(), 5),
        order in any::<bool>(),
    ) {
        let mut rig = Rig::new(form, config());
        rig.open(1, strategy);
        rig.open(2, strategy);
        for (document, tokens) in (1..).zip(&documents) {
            rig.ask(ingest(1, document, document, tokens, true));
        }
        let mut named: Vec<DocumentId> = Vec::new();
        for (document, (tokens, _)) in (1..).zip(documents.iter().zip(&chosen).filter(|(_, chosen)| **chosen)) {
            rig.ask(ingest(2, document, document, tokens, true));
        }
        for (document, (_, chosen)) in (1..).zip(documents.iter().zip(&chosen)) {
            if *chosen {
                named.push(DocumentId(document));
            }
        }
        // The order in which they are named is not that of the log.
        if order {
            named.reverse();
        }
        prop_assume!(!named.is_empty());
        let prompt = ids(&[4, 8, 1]);
        let mut ask = generate(1, Some(1), &prompt, 6, 3);
        choose(&mut ask, whole(named));
        let (some, alone) = (rig.ask(ask), rig.ask(generate(2, Some(2), &prompt, 6, 3)));
        prop_assert_eq!(answer(&some, 1), answer(&alone, 2));
        let made_of = |events: &[Event]| match events.last() {
            Some(&Event::Finished { digest, context_tokens, .. }) => (digest, context_tokens),
            _ => panic!("{events:?}"),
        };
        prop_assert_eq!(made_of(&some), made_of(&alone));
        rig.assert_all_blocks_come_back([1, 2]);
    }
}

/// Makes a generation of these parts.
fn choose(ask: &mut Command, parts: Chosen) {
    if let Command::Generate { chosen, .. } = ask {
        *chosen = parts;
    }
}

/// Whole documents.
fn whole(documents: impl IntoIterator<Item = DocumentId>) -> Chosen {
    Chosen {
        parts: documents
            .into_iter()
            .map(|document| part(document, None, None))
            .collect(),
        ..Chosen::default()
    }
}

fn part(
    document: DocumentId,
    tokens: impl IntoIterator<Item = Range<usize>>,
    around: Option<Range<usize>>,
) -> Part {
    Part {
        document,
        tokens: tokens.into_iter().collect(),
        around: around.into_iter().collect(),
    }
}

/// The digest, the number of context tokens and the answer's tokens with their log-probabilities.
fn made(
    rig: &mut Rig,
    session: u64,
    chosen: Chosen,
) -> (Option<Digest>, usize, Vec<(TokenId, u32)>) {
    let mut ask = generate(1, Some(session), &ids(&[4, 8, 1]), 6, 3);
    choose(&mut ask, chosen);
    if let Command::Generate { sampling, .. } = &mut ask {
        sampling.logprobs = true;
    }
    let events = rig.ask(ask);
    let answer = events.iter().filter_map(|event| match event {
        &Event::Token { token, logprob, .. } => {
            Some((token, logprob.unwrap_or_default().to_bits()))
        }
        _ => None,
    });
    let answer = answer.collect();
    match events.last() {
        Some(&Event::Finished {
            digest,
            context_tokens,
            ..
        }) => (digest, context_tokens, answer),
        other => panic!("{other:?}"),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// However the document came, and in a fork too: the same bits for the same tokens of it.
    #[test]
    fn an_answer_made_of_some_tokens_of_a_document_does_not_hang_on_how_they_came(
        form in forms(),
        strategy in prop_oneof![Just(Strategy::Parallel), Just(Strategy::Concat)],
        configs in [configs(), configs()],
        document in tokens(20..40),
        cut in any::<Index>(),
        from in 0usize..10,
        count in 3usize..10,
        beside in prop_oneof![Just(0.0f32), Just(0.25), Just(1.0)],
    ) {
        let around = 0..document.len();
        let chosen = |tokens: Range<usize>| Chosen {
            parts: vec![part(DocumentId(1), Some(tokens), Some(around.clone()))],
            beside,
            ..Chosen::default()
        };
        let mut answers = Vec::new();
        for (config, at) in configs.into_iter().zip([document.len(), cut.index(document.len())]) {
            let mut rig = Rig::new(form, config);
            rig.open(1, strategy);
            rig.ask(ingest(1, 1, 1, &document[..at], at == document.len()));
            if at < document.len() {
                rig.ask(ingest(1, 2, 1, &document[at..], true));
            }
            rig.ask(ingest(1, 3, 2, &ids(&[7; 9]), true));
            rig.ask(fork(1, 2));
            answers.extend([1, 2].map(|session| made(&mut rig, session, chosen(from..from + count))));
            let other = made(&mut rig, 1, chosen(from + 1..from + count + 1));
            prop_assert_ne!(other.0, answers[0].0);
            rig.assert_all_blocks_come_back([1, 2]);
            prop_assert_eq!(rig.engine.usage().trace_bytes, 0);
        }
        prop_assert!(answers.iter().all(|answer| answer == &answers[0]), "{answers:?}");
        prop_assert_eq!(answers[0].1, document.len());
    }
}

fn gated() -> Chosen {
    Chosen {
        gated: true,
        ..Chosen::default()
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// However it was told, read to its end or to a provisional one, and also when it was away meanwhile.
    #[test]
    fn what_a_gate_leaves_hangs_on_the_state_alone(
        strategy in strategies(),
        configs in [configs(), configs()],
        document in tokens(10..40),
        cut in any::<Index>(),
        away in any::<bool>(),
    ) {
        let mut answers = Vec::new();
        for (config, at) in configs.into_iter().zip([document.len(), cut.index(document.len())]) {
            let mut rig = Rig::new(Form::Associative, config);
            rig.open(1, strategy);
            rig.ask(ingest(1, 1, 1, &document[..at], at == document.len()));
            if at < document.len() {
                rig.ask(ingest(1, 2, 1, &document[at..], false));
                rig.ask(publish(1, 2, &[]));
            } else if away {
                rig.ask(evict(1, true));
            }
            let whole = made(&mut rig, 1, Chosen::default());
            let held = made(&mut rig, 1, gated());
            prop_assert_ne!(whole.0, held.0);
            prop_assert_eq!(whole.1, held.1);
            // Neither disturbs the other.
            prop_assert_eq!(&made(&mut rig, 1, Chosen::default()), &whole);
            prop_assert_eq!(&made(&mut rig, 1, gated()), &held);
            answers.push((whole, held));
        }
        prop_assert_eq!(&answers[0], &answers[1]);
    }
}

#[test]
fn a_gate_holds_back_answers_and_what_it_made_is_not_taken_for_something_else() {
    let mut rig = Rig::new(Form::Associative, config());
    rig.open(1, Strategy::Parallel);
    rig.ask(ingest(
        1,
        1,
        1,
        &ids(&[9, 3, 4, 11, 5, 6, 2, 8, 17, 21]),
        true,
    ));
    let prompt: Vec<_> = (0..20).map(|at| TokenId(at % 7)).collect();
    let mut ask = |gated: bool| {
        let mut ask = generate(1, Some(1), &prompt, 1, 3);
        if let Command::Generate {
            chosen, sampling, ..
        } = &mut ask
        {
            (chosen.gated, sampling.logprobs) = (gated, true);
        }
        let events = rig.ask(ask);
        let logprob = events.iter().find_map(|event| match event {
            Event::Token { logprob, .. } => *logprob,
            _ => None,
        });
        match events.last() {
            Some(&Event::Finished { cached_tokens, .. }) => (cached_tokens, logprob),
            other => panic!("{other:?}"),
        }
    };
    let (whole, held) = (ask(false), ask(true));
    assert_eq!((whole.0, held.0), (0, 0));
    assert_ne!(whole.1, held.1);
    let (again, held_again) = (ask(false), ask(true));
    assert!(again.0 > 0 && held_again.0 > 0);
    assert_eq!((again.1, held_again.1), (whole.1, held.1));
    // A generator without a gate holds nothing back.
    let mut rig = Rig::new(Form::Published, config());
    rig.open(1, Strategy::Parallel);
    rig.ask(ingest(1, 1, 1, &ids(&[9, 3, 4, 11, 5, 6, 2, 8, 17]), true));
    let whole = made(&mut rig, 1, Chosen::default());
    assert_eq!(made(&mut rig, 1, gated()), whole);
}

#[test]
fn all_tokens_of_a_document_are_the_document_up_to_rounding() {
    for form in [Form::Associative, Form::Published] {
        let mut rig = Rig::new(form, config());
        rig.open(1, Strategy::Parallel);
        rig.ask(ingest(
            1,
            1,
            1,
            &ids(&[9, 3, 4, 11, 5, 6, 2, 8, 17, 21, 30]),
            true,
        ));
        rig.ask(ingest(1, 2, 2, &ids(&[7; 9]), true));
        let all = Chosen {
            parts: vec![part(DocumentId(1), [0..4, 4..11], Some(0..11))],
            ..Chosen::default()
        };
        let (some, document) = (
            made(&mut rig, 1, all),
            made(&mut rig, 1, whole([DocumentId(1)])),
        );
        assert_ne!(some.0, document.0);
        for ((token, logprob), (other, wanted)) in some.2.iter().zip(&document.2) {
            assert_eq!(token, other);
            let (logprob, wanted) = (f32::from_bits(*logprob), f32::from_bits(*wanted));
            assert!((logprob - wanted).abs() < 0.02, "{logprob} {wanted}");
        }
        assert_eq!(some.2.len(), document.2.len());
    }
}

#[test]
fn without_room_for_traces_documents_are_taken_whole() {
    let config = || Config {
        trace_budget_bytes: 0,
        ..config()
    };
    let mut rig = Rig::new(Form::Associative, config());
    rig.open(1, Strategy::Parallel);
    for document in 1..3 {
        rig.ask(ingest(
            1,
            document,
            document,
            &ids(&[9, 3, 4, 11, 5, 6, 2, 8, 17]),
            true,
        ));
    }
    let some = Chosen {
        parts: vec![part(DocumentId(1), Some(1..4), Some(0..9))],
        beside: 0.5,
        ..Chosen::default()
    };
    assert_eq!(
        made(&mut rig, 1, some),
        made(&mut rig, 1, whole([DocumentId(1)]))
    );
    assert_eq!(rig.engine.usage().trace_bytes, 0);
}

#[test]
fn requests_that_name_documents_start_two_a_step() {
    let mut rig = Rig::new(Form::Associative, config());
    rig.open(1, Strategy::Parallel);
    for document in 1..3 {
        rig.ask(ingest(1, document, document, &ids(&[9; 12]), true));
    }
    for request in 1..7 {
        let mut ask = generate(request, Some(1), &ids(&[1, 2]), 20, request);
        choose(
            &mut ask,
            whole([DocumentId(1)].into_iter().filter(|_| request < 6)),
        );
        if let Command::Generate { eos, .. } = &mut ask {
            eos.clear();
        }
        rig.push(ask);
    }
    // In order: the one that names none waits for the fifth.
    for running in [2, 4, 6] {
        rig.step();
        assert_eq!(rig.engine.usage().running, running);
    }
    let finished = |event: &&Event| matches!(event, Event::Finished { .. });
    assert_eq!(rig.run().iter().filter(finished).count(), 6);
}

#[test]
fn an_answer_is_made_of_all_documents_where_some_cannot_be_had() {
    let told = |strategy, config| {
        let mut rig = Rig::new(Form::Associative, config);
        rig.open(1, strategy);
        rig.ask(ingest(1, 1, 1, &ids(&[9; 12]), true));
        rig.ask(ingest(1, 2, 2, &ids(&[3, 4, 5, 6, 7, 8, 2, 1, 3]), true));
        rig.ask(ingest(
            1,
            3,
            3,
            &ids(&[11, 12, 13, 14, 15, 16, 17, 18, 19]),
            false,
        ));
        rig.ask(publish(1, 3, &[]));
        rig
    };
    let digest = |rig: &mut Rig, named: &[u64]| {
        let mut ask = generate(1, Some(1), &ids(&[1, 2]), 1, 3);
        choose(&mut ask, whole(named.iter().copied().map(DocumentId)));
        match rig.ask(ask).last() {
            Some(&Event::Finished { digest, .. }) => digest,
            other => panic!("{other:?}"),
        }
    };
    let mut rig = told(Strategy::Parallel, config());
    let whole = digest(&mut rig, &[]);
    assert_ne!(digest(&mut rig, &[2]), whole);
    // One that is open, one that is not there, one named twice.
    for named in [&[2, 3][..], &[2, 9], &[2, 2]] {
        assert_eq!(digest(&mut rig, named), whole, "{named:?}");
    }
    rig.ask(forget(1, 2));
    let whole = digest(&mut rig, &[]);
    assert_eq!(digest(&mut rig, &[2]), whole);
    let core = rig.engine.usage().core_bytes;

    let mut rig = told(Strategy::Sequential, config());
    let whole = digest(&mut rig, &[]);
    assert_eq!(digest(&mut rig, &[2]), whole);

    // A core that does not fit beside the newest one.
    let tight = Config {
        core_budget_bytes: core + core / 2,
        ..config()
    };
    let mut rig = told(Strategy::Parallel, tight);
    let whole = digest(&mut rig, &[]);
    assert_eq!(digest(&mut rig, &[2]), whole);
}

#[test]
fn an_answer_ends_with_its_length_its_end_token_or_the_context() {
    let mut rig = Rig::new(Form::Associative, config());
    let ask = |max_tokens, eos: Vec<TokenId>| Command::Generate {
        request: RequestId(1),
        tenant: TenantId(0),
        session: None,
        adapter_scale: 1.0,
        chosen: Chosen::default(),
        prompt: ids(&[4, 5]),
        max_tokens,
        sampling: Sampling {
            logprobs: true,
            ..Sampling::default()
        },
        eos,
    };
    let finish = |events: &[Event]| match events.last() {
        Some(Event::Finished {
            reason,
            completion_tokens,
            prompt_tokens: 2,
            ..
        }) => (*reason, *completion_tokens),
        other => panic!("{other:?}"),
    };
    let five = rig.ask(ask(5, vec![]));
    assert_eq!(finish(&five), (Finish::Length, 5));
    let tokens: Vec<TokenId> = answer(&five, 1)
        .into_iter()
        .map(|(token, _)| token)
        .collect();
    assert_eq!(tokens.len(), 5);
    let first = tokens
        .iter()
        .position(|&token| token == tokens[4])
        .expect("it is there");
    let ended = rig.ask(ask(5, vec![tokens[4]]));
    assert_eq!(finish(&ended), (Finish::Eos, first));
    assert_eq!(answer(&ended, 1).len(), first);
    assert_eq!(
        finish(&rig.ask(ask(1000, vec![]))),
        (Finish::Length, CONTEXT - 2)
    );
    assert_eq!(finish(&rig.ask(ask(0, vec![]))), (Finish::Length, 0));
}

#[test]
fn requests_that_cannot_be_answered_are_refused() {
    let mut rig = Rig::new(Form::Associative, config());
    rig.open(1, Strategy::Parallel);
    let one = ids(&[1]);
    let long = ids(&[1; CONTEXT]);
    let token = TokenId(VOCAB);
    assert_eq!(
        failed(&rig.ask(generate(1, None, &[], 5, 0))),
        RequestError::EmptyPrompt
    );
    assert_eq!(
        failed(&rig.ask(generate(1, None, &long, 5, 0))),
        RequestError::ContextLength {
            tokens: CONTEXT + 1,
            limit: CONTEXT
        }
    );
    assert_eq!(
        failed(&rig.ask(generate(1, None, &[token], 5, 0))),
        RequestError::TokenOutOfRange {
            token,
            vocab: VOCAB as usize
        }
    );
    assert_eq!(
        failed(&rig.ask(generate(1, Some(9), &one, 5, 0))),
        RequestError::UnknownSession {
            session: SessionId(9)
        }
    );
    for scale in [f32::NAN, f32::INFINITY] {
        let mut ask = generate(1, None, &one, 5, 0);
        let Command::Generate { adapter_scale, .. } = &mut ask else {
            panic!("it generates")
        };
        *adapter_scale = scale;
        assert!(matches!(
            failed(&rig.ask(ask)),
            RequestError::Sampling {
                field: "adapter_scale",
                ..
            }
        ));
    }
    let mut ask = generate(1, None, &one, 5, 0);
    let Command::Generate { sampling, .. } = &mut ask else {
        panic!("it generates")
    };
    sampling.temperature = -1.0;
    assert!(matches!(
        failed(&rig.ask(ask)),
        RequestError::Sampling {
            field: "temperature",
            ..
        }
    ));

    let score = |prompt: &[TokenId], continuations: Vec<Vec<TokenId>>| Command::Score {
        request: RequestId(1),
        tenant: TenantId(0),
        session: None,
        adapter_scale: 1.0,
        chosen: Chosen::default(),
        prompt: prompt.to_vec(),
        continuations,
    };
    assert_eq!(
        failed(&rig.ask(score(&[], vec![one.clone()]))),
        RequestError::EmptyPrompt
    );
    assert_eq!(
        failed(&rig.ask(score(&one, vec![]))),
        RequestError::NoContinuation
    );
    assert_eq!(
        failed(&rig.ask(score(&one, vec![one.clone(), vec![]]))),
        RequestError::EmptyContinuation { index: 1 }
    );
    assert_eq!(
        failed(&rig.ask(score(&one, vec![vec![token]]))),
        RequestError::TokenOutOfRange {
            token,
            vocab: VOCAB as usize
        }
    );
    assert_eq!(
        failed(&rig.ask(score(&one, vec![long.clone()]))),
        RequestError::ContextLength {
            tokens: CONTEXT + 1,
            limit: CONTEXT
        }
    );
    let export = |session| Command::Export {
        request: RequestId(1),
        session: SessionId(session),
    };
    assert_eq!(
        failed(&rig.ask(export(1))),
        RequestError::NoVersion {
            session: SessionId(1)
        }
    );
    assert_eq!(
        failed(&rig.ask(export(9))),
        RequestError::UnknownSession {
            session: SessionId(9)
        }
    );
    // A request that just fits is answered.
    assert!(matches!(
        rig.ask(score(&one, vec![long[1..].to_vec()]))[..],
        [Event::Scored { .. }]
    ));
    assert_eq!(
        answer(&rig.ask(generate(1, None, &long[1..], 5, 1)), 1)
            .len()
            .max(1),
        1
    );
    rig.push(generate(1, None, &one, 5, 0));
    rig.push(generate(1, None, &one, 5, 0));
    let twice = rig.run();
    let refused = twice.iter().filter(|event| {
        matches!(
            event,
            Event::Failed {
                error: RequestError::RequestExists,
                ..
            }
        )
    });
    assert_eq!(refused.count(), 1);
}

#[test]
fn what_is_cancelled_or_loses_its_session_gives_its_blocks_back_at_once() {
    let mut rig = Rig::new(Form::Associative, config());
    rig.open(1, Strategy::Parallel);
    let prompt = ids(&[1, 2, 3]);
    rig.push(generate(1, None, &prompt, 40, 0));
    rig.push(generate(2, Some(1), &prompt, 40, 0));
    rig.push(Command::Score {
        request: RequestId(3),
        tenant: TenantId(0),
        session: Some(SessionId(1)),
        adapter_scale: 1.0,
        chosen: Chosen::default(),
        prompt: prompt.clone(),
        continuations: vec![prompt.clone(); 20],
    });
    rig.step();
    let usage = rig.engine.usage();
    assert_eq!(usage.running, 3);
    assert!(usage.free_blocks < usage.blocks);
    rig.push(Command::Cancel {
        request: RequestId(1),
    });
    rig.push(Command::Cancel {
        request: RequestId(3),
    });
    rig.push(Command::Cancel {
        request: RequestId(77),
    });
    rig.push(Command::Close {
        session: SessionId(1),
    });
    let events = rig.step();
    let ended: Vec<&Event> = events.iter().collect();
    assert!(
        matches!(
            ended[..],
            [
                Event::Finished {
                    request: RequestId(1),
                    reason: Finish::Cancelled,
                    ..
                },
                Event::Failed {
                    request: RequestId(3),
                    error: RequestError::Cancelled
                },
                Event::Failed {
                    request: RequestId(2),
                    error: RequestError::SessionClosed {
                        session: SessionId(1)
                    }
                },
            ]
        ),
        "{ended:?}"
    );
    assert!(rig.engine.idle());
    assert_eq!(rig.engine.usage().free_blocks, usage.blocks);
}

#[test]
fn timings_are_the_callers_clock() {
    let mut rig = Rig::new(Form::Associative, config());
    let mut ask = generate(1, None, &ids(&[1; 40]), 3, 0);
    let Command::Generate { eos, .. } = &mut ask else {
        panic!("it generates")
    };
    eos.clear();
    let events = rig.ask(ask);
    // Steps are a millisecond apart, and the clock stands still within one: 40 tokens of prompt take two steps of 24.
    let Some(Event::Finished { timings, .. }) = events.last() else {
        panic!("{events:?}")
    };
    let millis = [timings.queue, timings.prefill, timings.decode].map(|span| span.as_millis());
    assert_eq!(millis, [0, 1, 2]);
}
