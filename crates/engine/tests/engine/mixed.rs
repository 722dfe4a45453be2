//! Everything at once, at random: no block leaks, and every answer equals that of a session that was told the same alone.

use std::collections::BTreeMap;

use engine::{Command, Event, Finish, RequestId, SessionId, Strategy, TokenId};
use proptest::{collection::vec, prelude::*, sample::Index, strategy::Strategy as _};

use crate::support::*;

#[derive(Clone, Debug)]
enum Act {
    Ingest {
        session: Index,
        tokens: Vec<TokenId>,
        end: bool,
    },
    Publish {
        session: Index,
        provisional: Vec<TokenId>,
    },
    Forget {
        session: Index,
        document: Index,
    },
    Fork {
        session: Index,
    },
    Close {
        session: Index,
    },
    Generate {
        session: Index,
        prompt: Vec<TokenId>,
        max_tokens: usize,
    },
    Cancel {
        request: Index,
    },
    Steps(usize),
}

fn act() -> impl proptest::strategy::Strategy<Value = Act> {
    let any = any::<Index>;
    prop_oneof![
        6 => (any(), tokens(0..20), proptest::bool::ANY).prop_map(|(session, tokens, end)| Act::Ingest { session, tokens, end }),
        2 => (any(), tokens(0..12)).prop_map(|(session, provisional)| Act::Publish { session, provisional }),
        2 => (any(), any()).prop_map(|(session, document)| Act::Forget { session, document }),
        1 => any().prop_map(|session| Act::Fork { session }),
        1 => any().prop_map(|session| Act::Close { session }),
        4 => (any(), tokens(1..16), 1usize..12).prop_map(|(session, prompt, max_tokens)| Act::Generate { session, prompt, max_tokens }),
        1 => any().prop_map(|request| Act::Cancel { request }),
        5 => (0usize..6).prop_map(Act::Steps),
    ]
}

/// What a session was told, as the test keeps it.
#[derive(Clone, Debug, Default)]
struct Told {
    seq: u64,
    /// (id, tokens, complete)
    documents: Vec<(u64, Vec<TokenId>, bool)>,
}

impl Told {
    fn open(&mut self, fresh: u64) -> &mut (u64, Vec<TokenId>, bool) {
        if self.documents.last().is_none_or(|last| last.2) {
            self.documents.push((fresh, Vec::new(), false));
        }
        self.documents.last_mut().expect("one is open")
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_interleaving_leaks_nothing_and_changes_no_answer(
        form in forms(), strategies in [strategies(), strategies()], config in configs(), acts in vec(act(), 1..40),
    ) {
        let mut rig = Rig::new(form, config);
        let mut told: BTreeMap<u64, (Strategy, Told)> = BTreeMap::new();
        for (session, strategy) in (1..).zip(strategies) {
            rig.open(session, strategy);
            told.insert(session, (strategy, Told::default()));
        }
        let mut next = 100;
        let mut fresh = || { next += 1; next };
        let (mut events, mut requests) = (Vec::new(), Vec::new());
        let pick = |told: &BTreeMap<u64, (Strategy, Told)>, index: Index| {
            (!told.is_empty()).then(|| *told.keys().nth(index.index(told.len())).expect("it is there"))
        };
        for act in acts {
            match act {
                Act::Ingest { session, tokens, end } => {
                    let Some(session) = pick(&told, session) else { continue };
                    let (strategy, told) = told.get_mut(&session).expect("it is there");
                    let long = told.documents.last().filter(|last| !last.2).map_or(0, |last| last.1.len()) + tokens.len() > 30;
                    let tokens = if *strategy == Strategy::Concat && long { Vec::new() } else { tokens };
                    let id = fresh();
                    told.seq += 1;
                    let seq = told.seq;
                    let open = told.open(id);
                    open.1.extend_from_slice(&tokens);
                    open.2 = end;
                    rig.push(ingest(session, seq, open.0, &tokens, end));
                }
                Act::Publish { session, provisional } => {
                    let Some(session) = pick(&told, session) else { continue };
                    let told = &told[&session].1;
                    let open = told.documents.last().is_some_and(|last| !last.2);
                    rig.push(publish(session, told.seq, if open { &provisional } else { &[] }));
                }
                Act::Forget { session, document } => {
                    let Some(session) = pick(&told, session) else { continue };
                    let told = &mut told.get_mut(&session).expect("it is there").1;
                    if !told.documents.is_empty() {
                        let (id, ..) = told.documents.remove(document.index(told.documents.len()));
                        rig.push(forget(session, id));
                    }
                }
                Act::Fork { session } => {
                    let Some(from) = pick(&told, session) else { continue };
                    let to = fresh();
                    let copy = told[&from].clone();
                    told.insert(to, copy);
                    rig.push(fork(from, to));
                }
                Act::Close { session } => {
                    let Some(session) = pick(&told, session) else { continue };
                    told.remove(&session);
                    rig.push(Command::Close { session: SessionId(session) });
                }
                Act::Generate { session, prompt, max_tokens } => {
                    let session = pick(&told, session);
                    let request = fresh();
                    requests.push((request, prompt.clone(), max_tokens));
                    rig.push(generate(request, session, &prompt, max_tokens, request));
                }
                Act::Cancel { request } => {
                    if !requests.is_empty() {
                        rig.push(Command::Cancel { request: RequestId(request.get(&requests).0) });
                    }
                }
                Act::Steps(steps) => (0..steps).for_each(|_| events.extend(rig.step())),
            }
        }
        events.extend(rig.run());
        prop_assert_eq!(failures(&events), []);

        // Every request has exactly one end.
        for &(request, ..) in &requests {
            let ends = events.iter().filter(|event| matches!(event,
                Event::Finished { request: of, .. } | Event::Failed { request: of, .. } if of.0 == request));
            prop_assert_eq!(ends.count(), 1);
        }
        // What is left of the sessions is what sessions alone are.
        let mut alone = Rig::new(form, crate::support::config());
        for (&session, (strategy, told)) in &told {
            alone.open(session, *strategy);
            for (id, tokens, complete) in &told.documents {
                alone.push(ingest(session, 1, *id, tokens, *complete));
            }
            alone.run();
            let (mixed, lone) = (rig.imprint(session), alone.imprint(session));
            prop_assert_eq!(mixed, lone);
        }
        // Answers of the bare model are those of the bare model alone.
        for (request, prompt, max_tokens) in requests {
            let bare = events.iter().any(|event| matches!(event,
                Event::Finished { request: of, reason: Finish::Length | Finish::Eos, digest: None, .. } if of.0 == request));
            if bare {
                let lone = alone.ask(generate(request, None, &prompt, max_tokens, request));
                prop_assert_eq!(answer(&events, request), answer(&lone, request));
            }
        }
        rig.assert_all_blocks_come_back(told.into_keys());
    }
}
