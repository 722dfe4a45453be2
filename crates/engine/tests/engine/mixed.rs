//! Everything at once, at random: no block leaks, and every answer equals that of a session that was told the same alone.

use std::collections::BTreeMap;

use engine::{Command, Config, Digest, Event, Finish, RequestId, SessionId, Strategy, TokenId};
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
    Evict {
        session: Index,
        core: bool,
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
        4 => (any(), prompts(), 1usize..12).prop_map(|(session, prompt, max_tokens)| Act::Generate { session, prompt, max_tokens }),
        1 => any().prop_map(|request| Act::Cancel { request }),
        4 => (any(), proptest::bool::ANY).prop_map(|(session, core)| Act::Evict { session, core }),
        5 => (0usize..6).prop_map(Act::Steps),
    ]
}

/// Prompts that often begin alike.
fn prompts() -> impl proptest::strategy::Strategy<Value = Vec<TokenId>> {
    (0u32..2, 0usize..14, tokens(1..4)).prop_map(|(of, len, rest)| {
        let begin = (1..15).map(|at| TokenId(at * (of + 1) % VOCAB));
        begin.take(len).chain(rest).collect()
    })
}

/// What a session was told, as the test keeps it.
#[derive(Clone, Debug, Default)]
struct Told {
    seq: u64,
    /// (id, tokens, complete)
    documents: Vec<(u64, Vec<TokenId>, bool)>,
    /// The documents whenever they changed, with the provisional tokens.
    history: Vec<Vec<(u64, Vec<TokenId>)>>,
}

impl Told {
    fn open(&mut self, fresh: u64) -> &mut (u64, Vec<TokenId>, bool) {
        if self.documents.last().is_none_or(|last| last.2) {
            self.documents.push((fresh, Vec::new(), false));
        }
        self.documents.last_mut().expect("one is open")
    }

    fn note(&mut self, provisional: &[TokenId]) {
        let documents = self.documents.iter();
        let mut documents: Vec<_> = documents
            .map(|(id, tokens, _)| (*id, tokens.clone()))
            .collect();
        if let Some((_, last)) = documents.last_mut() {
            last.extend_from_slice(provisional);
        }
        self.history.push(documents);
    }

    /// Forgets a document, also in what is still to be published of what was before.
    fn forget(&mut self, index: usize) -> u64 {
        let (id, ..) = self.documents.remove(index);
        for mut documents in self.history.clone() {
            documents.retain(|(of, _)| *of != id);
            if !self.history.contains(&documents) {
                self.history.push(documents);
            }
        }
        id
    }

    /// What a version of so many context tokens may have been told: beginnings of what there was at some time.
    fn beginnings(&self, tokens: usize) -> Vec<Vec<Vec<TokenId>>> {
        let mut found = Vec::new();
        for documents in &self.history {
            let mut left = tokens;
            let mut cut: Vec<Vec<TokenId>> = Vec::new();
            for (_, document) in documents {
                let take = left.min(document.len());
                left -= take;
                cut.extend((take > 0).then(|| document[..take].to_vec()));
            }
            if left == 0 && !found.contains(&cut) {
                found.push(cut);
            }
        }
        found
    }
}

/// Sessions of their own, each told one thing, by what they are: the oracle of a request.
struct Oracle {
    rig: Rig,
    sessions: Vec<(Strategy, Vec<Vec<TokenId>>, Digest)>,
}

impl Oracle {
    /// The session of this digest among those told one of these.
    fn session(
        &mut self,
        strategy: Strategy,
        told: Vec<Vec<Vec<TokenId>>>,
        wanted: Digest,
    ) -> Option<u64> {
        for documents in told {
            let known = self
                .sessions
                .iter()
                .position(|(of, told, _)| (*of, told) == (strategy, &documents));
            let index = known.unwrap_or_else(|| {
                let session = self.sessions.len() as u64;
                self.rig.open(session, strategy);
                for (document, tokens) in (1..).zip(&documents) {
                    self.rig
                        .ask(ingest(session, document, document, tokens, true));
                }
                let digest = self.rig.imprint(session).digest;
                self.sessions.push((strategy, documents.clone(), digest));
                self.sessions.len() - 1
            });
            if self.sessions[index].2 == wanted {
                return Some(index as u64);
            }
        }
        None
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_interleaving_leaks_nothing_and_changes_no_answer(
        form in forms(), strategies in [strategies(), strategies()], config in configs(), faults in 0usize..4, portions in proptest::bool::ANY, acts in vec(act(), 1..40),
    ) {
        let mut rig = if portions { Rig::by_portions(form, config) } else { Rig::new(form, config) };
        rig.faults = faults;
        let mut told: BTreeMap<u64, (Strategy, Told)> = BTreeMap::new();
        for (session, strategy) in (1..).zip(strategies) {
            rig.open(session, strategy);
            told.insert(session, (strategy, Told::default()));
        }
        let mut closed = Vec::new();
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
                    told.note(&[]);
                }
                Act::Publish { session, provisional } => {
                    let Some(session) = pick(&told, session) else { continue };
                    let told = &mut told.get_mut(&session).expect("it is there").1;
                    let open = told.documents.last().is_some_and(|last| !last.2);
                    rig.push(publish(session, told.seq, if open { &provisional } else { &[] }));
                    told.note(if open { &provisional } else { &[] });
                }
                Act::Forget { session, document } => {
                    let Some(session) = pick(&told, session) else { continue };
                    let told = &mut told.get_mut(&session).expect("it is there").1;
                    if !told.documents.is_empty() {
                        let id = told.forget(document.index(told.documents.len()));
                        rig.push(forget(session, id));
                        told.note(&[]);
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
                    closed.extend(told.remove_entry(&session));
                    rig.push(Command::Close { session: SessionId(session) });
                }
                Act::Generate { session, prompt, max_tokens } => {
                    let session = pick(&told, session);
                    let request = fresh();
                    requests.push((request, session, prompt.clone(), max_tokens));
                    rig.push(generate(request, session, &prompt, max_tokens, request));
                }
                Act::Cancel { request } => {
                    if !requests.is_empty() {
                        rig.push(Command::Cancel { request: RequestId(request.get(&requests).0) });
                    }
                }
                Act::Evict { session, core } => {
                    if let Some(session) = pick(&told, session) {
                        rig.push(evict(session, core));
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
        // Every answer is that of a session alone that was told what the answer's version holds, in an engine that keeps nothing.
        let plain = Config { prefix_cache: false, max_sessions: 10_000, ..crate::support::config() };
        let mut oracle = Oracle { rig: Rig::new(form, plain), sessions: Vec::new() };
        for (request, session, prompt, max_tokens) in requests {
            let ran_with = events.iter().find_map(|event| match event {
                &Event::Finished { request: of, reason: Finish::Length | Finish::Eos, digest, context_tokens, .. } if of.0 == request =>
                    Some(digest.map(|digest| (digest, context_tokens))),
                _ => None,
            });
            let session = match ran_with {
                None => continue,
                Some(None) => None,
                Some(Some((digest, tokens))) => {
                    let id = session.expect("it has a digest");
                    let known = told.get(&id).or_else(|| closed.iter().find(|(of, _)| *of == id).map(|(_, told)| told));
                    let (strategy, told) = known.expect("it was told something");
                    let alike = oracle.session(*strategy, told.beginnings(tokens), digest);
                    prop_assert!(alike.is_some(), "a version of {tokens} tokens that nobody was told");
                    alike
                }
            };
            let lone = oracle.rig.ask(generate(request, session, &prompt, max_tokens, request));
            prop_assert_eq!(answer(&events, request), answer(&lone, request));
        }
        rig.assert_all_blocks_come_back(told.into_keys());
    }
}
