//! Context: streamed in any chunks = at once; forgotten = never had; a fork is a session of its own.

use engine::{
    Command, DocumentId, Event, Newest, Seq, SessionError, SessionId, Strategy, TokenId, Version,
};
use proptest::{collection::vec, prelude::*, sample::Index, strategy::Strategy as _};
use testkit::Form;

use crate::support::*;

/// A document with what happens while it comes.
#[derive(Clone, Debug)]
struct Told {
    tokens: Vec<TokenId>,
    cuts: Vec<Index>,
    /// After which chunks a version is asked for, and with which provisional end.
    publishes: Vec<(Index, Vec<TokenId>)>,
    /// Steps between chunks.
    steps: usize,
    /// The end comes by itself, without a token.
    ends_late: bool,
}

fn told() -> impl proptest::strategy::Strategy<Value = Told> {
    let publishes = vec((any::<Index>(), tokens(0..20)), 0..3);
    (
        tokens(0..28),
        vec(any::<Index>(), 0..5),
        publishes,
        0usize..4,
        any::<bool>(),
    )
        .prop_map(|(tokens, cuts, publishes, steps, ends_late)| Told {
            tokens,
            cuts,
            publishes,
            steps,
            ends_late,
        })
}

/// Tells a session all of it, as it says.
fn tell(rig: &mut Rig, session: u64, documents: &[Told]) {
    let mut seq = 0;
    for (number, told) in (1..).zip(documents) {
        let chunks = testkit::cut(&told.tokens, &told.cuts);
        for (index, chunk) in chunks.iter().enumerate() {
            seq += 1;
            let last = index + 1 == chunks.len();
            rig.push(ingest(session, seq, number, chunk, last && !told.ends_late));
            for (_, provisional) in told
                .publishes
                .iter()
                .filter(|(at, _)| !last && at.index(chunks.len()) == index)
            {
                rig.push(publish(session, seq, provisional));
            }
            for _ in 0..told.steps {
                let events = rig.step();
                assert_eq!(failures(&events), []);
            }
        }
        if told.ends_late {
            seq += 1;
            rig.push(ingest(session, seq, number, &[], true));
        }
    }
    let events = rig.run();
    assert_eq!(failures(&events), []);
}

fn tell_at_once<'a>(
    rig: &mut Rig,
    session: u64,
    documents: impl IntoIterator<Item = &'a [TokenId]>,
) {
    for (number, tokens) in (1..).zip(documents) {
        rig.push(ingest(session, number, number, tokens, true));
    }
    assert_eq!(failures(&rig.run()), []);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn streamed_in_any_chunks_and_publishes_is_at_once(
        form in forms(), strategy in strategies(), configs in [configs(), configs()], documents in vec(told(), 0..4),
    ) {
        let [here, there] = configs;
        let mut streamed = Rig::new(form, here);
        streamed.open(1, strategy);
        tell(&mut streamed, 1, &documents);
        let mut whole = Rig::new(form, there);
        whole.open(9, strategy);
        tell_at_once(&mut whole, 9, documents.iter().map(|told| &told.tokens[..]));
        prop_assert_eq!(streamed.imprint(1), whole.imprint(9));
        streamed.assert_all_blocks_come_back([1]);
    }

    #[test]
    fn a_provisional_version_is_that_of_a_document_that_ends_there(
        form in forms(), strategy in strategies(), before in tokens(0..20), tokens_so_far in tokens(1..20), provisional in tokens(0..20), rest in tokens(0..9),
    ) {
        let mut rig = Rig::new(form, config());
        rig.open(1, strategy);
        rig.open(2, strategy);
        rig.push(ingest(1, 1, 1, &before, true));
        rig.push(ingest(1, 2, 2, &tokens_so_far, false));
        let events = rig.ask(publish(1, 3, &provisional));
        let ended = [&before[..], &[&tokens_so_far[..], &provisional[..]].concat()].map(<[TokenId]>::to_vec);
        tell_at_once(&mut rig, 2, ended.iter().map(|tokens| &tokens[..]));
        let (seq, digest) = last_applied(&events);
        prop_assert_eq!(seq, Seq(3));
        let provisional_export = rig.export(1);
        let provisional_answers = rig.probe(Some(1));
        let as_if = rig.imprint(2);
        prop_assert_eq!((digest, provisional_export, provisional_answers), (as_if.digest, as_if.adapter, as_if.answers));
        // The provisional end leaves nothing behind.
        rig.push(ingest(1, 4, 2, &rest, true));
        rig.open(3, strategy);
        let really = [before, [tokens_so_far, rest].concat()];
        tell_at_once(&mut rig, 3, really.iter().map(|tokens| &tokens[..]));
        prop_assert_eq!(rig.imprint(1), rig.imprint(3));
    }

    #[test]
    fn forgetting_a_document_is_as_if_it_had_never_come(
        form in forms(), strategy in strategies(), config in configs(), documents in vec(told(), 1..4), which in any::<Index>(),
        open in any::<bool>(), steps in 0usize..5,
    ) {
        let mut rig = Rig::new(form, config);
        rig.open(1, strategy);
        let which = which.index(documents.len());
        let (last, others) = documents.split_last().expect("there is one");
        for (number, told) in (1..).zip(others) {
            rig.push(ingest(1, number, number, &told.tokens, true));
        }
        let number = documents.len() as u64;
        rig.push(ingest(1, number, number, &last.tokens, !open));
        for _ in 0..steps {
            rig.step();
        }
        let events = rig.ask(forget(1, which as u64 + 1));
        let forgotten = events.iter().any(|event| matches!(event, Event::Forgotten { .. }));
        prop_assert!(forgotten, "{:?}", events);
        let kept = documents.iter().enumerate().filter(|&(index, _)| index != which).map(|(_, told)| &told.tokens[..]);
        rig.open(2, strategy);
        tell_at_once(&mut rig, 2, kept);
        prop_assert_eq!(rig.imprint(1), rig.imprint(2));
        rig.assert_all_blocks_come_back([1, 2]);
    }

    #[test]
    fn a_session_that_has_forgotten_everything_answers_as_the_bare_model(
        form in forms(), strategy in strategies(), documents in vec(tokens(1..28), 1..4),
    ) {
        let mut rig = Rig::new(form, config());
        rig.open(1, strategy);
        tell_at_once(&mut rig, 1, documents.iter().map(|tokens| &tokens[..]));
        let before = rig.ask(publish(1, 0, &[]));
        for number in 1..=documents.len() as u64 {
            rig.push(forget(1, number));
        }
        let events = rig.run();
        let Some(Event::Forgotten { newest: Newest { version, tokens: 0, .. }, .. }) = events.last() else { panic!("{events:?}") };
        prop_assert!(*version > last_version(&before));
        prop_assert_eq!(rig.probe(Some(1)), rig.probe(None));
        prop_assert_eq!(rig.export(1), None);
    }

    #[test]
    fn a_fork_and_its_origin_go_their_own_ways(
        form in forms(), strategy in strategies(), config in configs(), common in tokens(1..28), ends in [tokens(1..12), tokens(1..12)], steps in 0usize..5,
    ) {
        let mut rig = Rig::new(form, config);
        rig.open(1, strategy);
        rig.push(ingest(1, 1, 1, &common, false));
        for _ in 0..steps {
            rig.step();
        }
        rig.push(fork(1, 2));
        rig.push(ingest(1, 2, 1, &ends[0], true));
        rig.push(ingest(2, 2, 1, &ends[1], true));
        prop_assert_eq!(failures(&rig.run()), []);
        for (session, end) in [(3, &ends[0]), (4, &ends[1])] {
            rig.open(session, strategy);
            tell_at_once(&mut rig, session, [&[&common[..], end].concat()[..]]);
            let (forked, alone) = (rig.imprint(session - 2), rig.imprint(session));
            prop_assert_eq!(forked, alone);
        }
        rig.assert_all_blocks_come_back(1..5);
    }

    #[test]
    fn each_ingested_token_is_reported_encoded_once(
        form in forms(), strategy in strategies(), config in configs(), documents in vec(told(), 1..4), which in any::<Index>(),
    ) {
        let mut rig = Rig::new(form, config);
        rig.open(1, strategy);
        let mut events = Vec::new();
        for (number, told) in (1..).zip(&documents) {
            rig.push(ingest(1, number, number, &told.tokens, true));
            events.extend(rig.step());
        }
        rig.push(forget(1, which.index(documents.len()) as u64 + 1));
        events.extend(rig.run());
        let encoded: usize = events.iter().map(|event| match event { Event::Encoded { tokens, .. } => *tokens, _ => 0 }).sum();
        prop_assert_eq!(encoded, documents.iter().map(|told| told.tokens.len()).sum::<usize>());
        prop_assert_eq!(rig.engine.usage().queued_tokens, 0);
    }
}

fn last_applied(events: &[Event]) -> (Seq, engine::Digest) {
    let applied = events.iter().rev().find_map(|event| match event {
        Event::Applied { newest, .. } => Some((newest.seq, newest.digest)),
        _ => None,
    });
    applied.expect("a version is published")
}

fn last_version(events: &[Event]) -> Version {
    let applied = events.iter().rev().find_map(|event| match event {
        Event::Applied { newest, .. } => Some(newest.version),
        _ => None,
    });
    applied.expect("a version is published")
}

/// `count` tokens that differ.
fn some(count: usize) -> Vec<TokenId> {
    (0..count)
        .map(|index| TokenId((index * 7 % VOCAB as usize) as u32))
        .collect()
}

#[test]
fn a_window_that_closes_publishes_and_a_publish_closes_nothing() {
    let mut rig = Rig::new(Form::Associative, config());
    rig.open(1, Strategy::Parallel);
    let versions = |events: &[Event]| -> Vec<(u64, u64, usize)> {
        let applied = events.iter().filter_map(|event| match event {
            Event::Applied { newest, .. } => Some((newest.seq.0, newest.version.0, newest.tokens)),
            _ => None,
        });
        applied.collect()
    };
    let tokens = some(2 * WINDOW);
    assert_eq!(versions(&rig.ask(ingest(1, 1, 1, &tokens[..5], false))), []);
    assert_eq!(versions(&rig.ask(publish(1, 1, &[]))), [(1, 1, 5)]);
    // Nothing has come since: the same version again.
    assert_eq!(versions(&rig.ask(publish(1, 1, &[]))), [(1, 1, 5)]);
    assert_eq!(
        versions(&rig.ask(ingest(1, 2, 1, &tokens[5..9], false))),
        [(1, 2, WINDOW)]
    );
    assert_eq!(
        versions(&rig.ask(publish(1, 2, &tokens[9..12]))),
        [(2, 3, 12)]
    );
    assert_eq!(
        versions(&rig.ask(ingest(1, 3, 1, &tokens[9..12], true))),
        [(3, 3, 12)]
    );
}

#[test]
fn a_session_with_an_imprint_answers_otherwise_than_the_bare_model() {
    for (form, strategy) in [
        (Form::Associative, Strategy::Parallel),
        (Form::Published, Strategy::Sequential),
    ] {
        let mut rig = Rig::new(form, config());
        rig.open(1, strategy);
        tell_at_once(&mut rig, 1, [&some(20)[..]]);
        assert_ne!(rig.probe(Some(1)), rig.probe(None));
    }
}

#[test]
fn sequential_windows_are_read_with_the_imprint_of_those_before() {
    let mut rig = Rig::new(Form::Published, config());
    rig.open(1, Strategy::Parallel);
    rig.open(2, Strategy::Sequential);
    for session in [1, 2] {
        tell_at_once(&mut rig, session, [&some(WINDOW)[..]]);
    }
    assert_eq!(rig.probe(Some(1)), rig.probe(Some(2)));
    for session in [1, 2] {
        rig.ask(ingest(session, 2, 2, &some(WINDOW), true));
    }
    assert_ne!(rig.probe(Some(1)), rig.probe(Some(2)));
}

#[test]
fn what_a_session_cannot_take_is_refused_whole() {
    let mut rig = Rig::new(Form::Associative, config());
    rig.open(1, Strategy::Parallel);
    tell_at_once(&mut rig, 1, [&some(9)[..]]);
    rig.ask(ingest(1, 2, 2, &some(3), false));
    let before = rig.imprint(1);
    let refused = |rig: &mut Rig, command: Command| match failures(&rig.ask(command)).as_slice() {
        [error] => error.clone(),
        other => panic!("{other:?}"),
    };
    let token = TokenId(VOCAB);
    // One that was refused a chunk takes no more: a copy for each.
    rig.ask(fork(1, 2));
    rig.ask(fork(1, 3));
    assert_eq!(
        refused(&mut rig, ingest(2, 3, 3, &some(1), false)),
        SessionError::DocumentOpen {
            open: DocumentId(2)
        }
    );
    assert_eq!(
        refused(&mut rig, ingest(3, 3, 2, &[TokenId(1), token], true)),
        SessionError::TokenOutOfRange {
            token,
            vocab: VOCAB as usize
        }
    );
    assert_eq!(
        refused(&mut rig, publish(1, 3, &[token])),
        SessionError::TokenOutOfRange {
            token,
            vocab: VOCAB as usize
        }
    );
    assert_eq!(
        refused(&mut rig, forget(1, 7)),
        SessionError::UnknownDocument {
            document: DocumentId(7)
        }
    );
    assert_eq!(
        refused(&mut rig, open(1, Strategy::Parallel)),
        SessionError::SessionExists {
            session: SessionId(1)
        }
    );
    assert_eq!(
        refused(&mut rig, fork(5, 6)),
        SessionError::UnknownSession {
            session: SessionId(5)
        }
    );
    assert_eq!(
        refused(&mut rig, fork(1, 1)),
        SessionError::SessionExists {
            session: SessionId(1)
        }
    );
    assert_eq!(
        refused(&mut rig, ingest(5, 1, 1, &some(1), true)),
        SessionError::UnknownSession {
            session: SessionId(5)
        }
    );
    assert_eq!(
        refused(&mut rig, publish(5, 1, &[])),
        SessionError::UnknownSession {
            session: SessionId(5)
        }
    );
    assert_eq!(
        refused(&mut rig, forget(5, 1)),
        SessionError::UnknownSession {
            session: SessionId(5)
        }
    );
    for session in 1..=3 {
        assert_eq!(rig.imprint(session), before);
    }
    rig.ask(ingest(1, 3, 2, &[], true));
    assert_eq!(
        refused(&mut rig, publish(1, 3, &some(1))),
        SessionError::NoOpenDocument
    );
    assert_eq!(
        refused(&mut rig, ingest(1, 4, 2, &some(1), false)),
        SessionError::DocumentClosed {
            document: DocumentId(2)
        }
    );
    assert_eq!(rig.imprint(1), before);
}

#[test]
fn behind_a_refused_chunk_none_is_taken_and_what_came_before_goes_on() {
    let mut rig = Rig::new(Form::Associative, config());
    rig.open(1, Strategy::Parallel);
    rig.ask(ingest(1, 1, 1, &some(9), false));
    rig.ask(publish(1, 1, &[]));
    let before = rig.imprint(1);
    let wrong = TokenId(VOCAB);
    // All in one step: nobody has had the time to learn of the first.
    rig.push(ingest(1, 2, 1, &[wrong], false));
    rig.push(ingest(1, 3, 1, &some(3), true));
    rig.push(ingest(1, 4, 2, &some(3), false));
    rig.push(publish(1, 4, &some(1)));
    let events = rig.run();
    let error = SessionError::TokenOutOfRange {
        token: wrong,
        vocab: VOCAB as usize,
    };
    assert_eq!(failures(&events), vec![error.clone(); 3]);
    let applied = events.iter().filter_map(|event| match event {
        Event::Applied { newest, .. } => Some(newest.seq.0),
        _ => None,
    });
    assert_eq!(applied.collect::<Vec<_>>(), [1]);
    assert_eq!(rig.imprint(1), before);
    // A copy has no hole, either.
    rig.ask(fork(1, 2));
    assert_eq!(failures(&rig.ask(ingest(2, 5, 3, &some(3), true))), [error]);
    assert_eq!(rig.imprint(2), before);
}

#[test]
fn a_session_needs_a_generator() {
    let mut rig = Rig::bare(config());
    assert_eq!(
        failures(&rig.ask(open(1, Strategy::Parallel))),
        [SessionError::NoGenerator]
    );
    assert!(rig.engine.model().generator.is_none());
    assert_eq!(rig.probe(None).len(), 4);
}

#[test]
fn a_sequential_session_that_reads_again_publishes_once_at_the_end() {
    let mut rig = Rig::new(Form::Published, config());
    rig.open(1, Strategy::Sequential);
    tell_at_once(&mut rig, 1, [&some(30)[..], &some(20), &some(10)]);
    rig.push(forget(1, 1));
    rig.push(ingest(1, 4, 4, &some(9), true));
    let events = rig.run();
    let published: Vec<_> = events
        .iter()
        .filter(|event| !matches!(event, Event::Encoded { .. }))
        .collect();
    assert!(
        matches!(
            published[..],
            [
                Event::Forgotten {
                    newest: Newest { tokens: 30, .. },
                    ..
                },
                Event::Applied { .. },
                ..
            ]
        ),
        "{published:?}"
    );
}

#[test]
fn only_an_open_window_holds_blocks() {
    let mut rig = Rig::new(Form::Associative, config());
    rig.open(1, Strategy::Parallel);
    let held = |rig: &Rig| rig.engine.usage().blocks - rig.engine.usage().free_blocks;
    rig.ask(ingest(1, 1, 1, &some(5), false));
    assert_eq!(held(&rig), 2);
    rig.ask(publish(1, 1, &some(9)));
    rig.ask(ingest(1, 2, 1, &some(WINDOW - 5), false));
    assert_eq!(held(&rig), 0);
    rig.ask(ingest(1, 3, 1, &some(3), false));
    assert_eq!(held(&rig), 1);
    rig.ask(ingest(1, 4, 1, &[], true));
    assert_eq!(held(&rig), 0);
}
