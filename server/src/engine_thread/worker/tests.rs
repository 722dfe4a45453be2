//! The thread against an engine with room for little: nothing is lost, nothing overtakes, nothing waits for ever.

use std::{collections::VecDeque, sync::Arc, time::Instant};

use engine::{
    Chosen, Command, Digest, DocumentId, Event, Full, Newest, RequestId, Sampling, Seq, SessionId,
    Strategy, TenantId, TokenId, Usage, Version,
};
use tokio::sync::mpsc;

use super::{HELD, Machine, Worker};
use crate::{
    engine_thread::{Attach, Link, Message, Reply},
    metrics::{Metrics, Watch},
    states::{Account, States},
};

/// Holds so many context tokens at once. It reads them only in whole windows of four, or when asked for a version.
struct Small {
    room: usize,
    waiting: VecDeque<(SessionId, Seq, usize)>,
    published: Vec<(SessionId, Seq)>,
    requests: bool,
    seen: Vec<Seq>,
}

impl Small {
    fn tokens(&self) -> usize {
        self.waiting.iter().map(|(_, _, tokens)| tokens).sum()
    }
}

impl Machine for Small {
    fn push(&mut self, command: Command) -> Result<(), Box<Full>> {
        match &command {
            Command::Ingest {
                session,
                seq,
                tokens,
                ..
            } => {
                if self.tokens() + tokens.len() > self.room {
                    return Err(Box::new(Full(command)));
                }
                self.seen.push(*seq);
                self.waiting.push_back((*session, *seq, tokens.len()));
            }
            Command::Publish { session, seq, .. } => self.published.push((*session, *seq)),
            Command::Generate { .. } if !self.requests => return Err(Box::new(Full(command))),
            _ => {}
        }
        Ok(())
    }

    fn idle(&self) -> bool {
        self.tokens() < 4 && self.published.is_empty()
    }

    fn waits(&self) -> bool {
        false
    }

    fn step(&mut self, events: &mut Vec<Event>) -> Result<(), engine::Error> {
        if self.idle() {
            return Ok(());
        }
        self.published.clear();
        for (session, seq, tokens) in self.waiting.drain(..) {
            events.push(Event::Encoded { session, tokens });
            let (version, digest) = (Version(seq.0), Digest([0; 32]));
            let newest = Newest {
                seq,
                version,
                digest,
                tokens,
                state_bytes: 0,
                trace_bytes: 0,
                core_bytes: 0,
            };
            events.push(Event::Applied { session, newest });
        }
        Ok(())
    }

    fn usage(&self) -> Usage {
        Usage::default()
    }
}

fn ingest(session: u64, seq: u64, tokens: usize) -> Message {
    let command = Command::Ingest {
        session: SessionId(session),
        seq: Seq(seq),
        document: DocumentId(0),
        tokens: vec![TokenId(0); tokens],
        end_of_document: false,
    };
    Message {
        command,
        attach: Attach::Nobody,
    }
}

fn generate(request: u64, replies: mpsc::Sender<Reply>) -> Message {
    let command = Command::Generate {
        request: RequestId(request),
        tenant: TenantId(0),
        session: None,
        adapter_scale: 1.0,
        chosen: Chosen::default(),
        prompt: vec![TokenId(0)],
        max_tokens: 1,
        sampling: Sampling::default(),
        eos: Vec::new(),
    };
    Message {
        command,
        attach: Attach::Request(replies, Instant::now()),
    }
}

fn worker(room: usize) -> (Worker<Small>, mpsc::Sender<Message>) {
    let (sender, messages) = mpsc::channel(2 * HELD);
    let engine = Small {
        room,
        waiting: VecDeque::new(),
        published: Vec::new(),
        requests: false,
        seen: Vec::new(),
    };
    let watch = Watch::new(Arc::new(Metrics::new("small")));
    (Worker::new(engine, messages, watch), sender)
}

fn link() -> Link {
    let states = States::new(usize::MAX, 1);
    Link::new(4, 12, Account::new(states, Strategy::Parallel))
}

fn open(worker: &mut Worker<Small>, session: u64) -> Arc<Link> {
    let link = Arc::new(link());
    let command = Command::Open {
        session: SessionId(session),
        tenant: TenantId(0),
        strategy: Strategy::Parallel,
        window: 4,
    };
    worker.take(Message {
        command,
        attach: Attach::Session(Arc::clone(&link)),
    });
    link
}

/// Works until nothing is left to do.
fn settle(worker: &mut Worker<Small>) {
    for _ in 0..100 {
        worker.retry();
        let mut events = Vec::new();
        worker.engine.step(&mut events).unwrap();
        for event in events {
            worker.dispatch(event);
        }
    }
    assert!(worker.held.is_empty() && worker.engine.idle());
}

#[test]
fn what_the_engine_has_no_room_for_is_held_and_comes_in_order() {
    let (mut worker, _sender) = worker(6);
    let link = open(&mut worker, 1);
    for seq in 1..=9 {
        worker.take(ingest(1, seq, 3));
    }
    assert_eq!(worker.held.len(), 7);
    settle(&mut worker);
    assert_eq!(worker.engine.seen, (1..=9).map(Seq).collect::<Vec<_>>());
    // The last three tokens are less than a window, and nobody asked for them.
    assert_eq!(link.progress.borrow().applied(), 8);
}

#[test]
fn open_windows_that_fill_the_queue_are_read_rather_than_waited_for() {
    let (mut worker, _sender) = worker(5);
    let (first, second) = (open(&mut worker, 1), open(&mut worker, 2));
    first.credit.try_acquire_many(3).unwrap().forget();
    worker.take(ingest(1, 1, 3)); // less than a window: the engine idles
    worker.take(ingest(2, 1, 3)); // no room
    assert_eq!(worker.held.len(), 1);
    settle(&mut worker);
    assert_eq!(worker.engine.seen.len(), 2);
    drop(second);
}

#[test]
fn a_request_without_room_is_answered_at_once_and_forgotten() {
    let (mut worker, _sender) = worker(6);
    let (replies, mut answers) = mpsc::channel(1);
    worker.take(generate(7, replies));
    assert!(matches!(answers.try_recv(), Ok(Reply::Overloaded)));
    assert!(worker.requests.is_empty());
}

#[test]
fn credit_comes_back_as_tokens_are_read_and_never_exceeds_what_it_was() {
    let (mut worker, _sender) = worker(100);
    let link = open(&mut worker, 1);
    link.credit.try_acquire_many(10).unwrap().forget();
    worker.dispatch(Event::Encoded {
        session: SessionId(1),
        tokens: 4,
    });
    assert_eq!(link.credit.available_permits(), 10);
    worker.dispatch(Event::Encoded {
        session: SessionId(1),
        tokens: 400,
    });
    assert_eq!(link.credit.available_permits(), 16);
}

#[test]
fn a_fork_begins_with_what_its_source_has_unread() {
    let (mut worker, _sender) = worker(100);
    let source = open(&mut worker, 1);
    source.credit.try_acquire_many(3).unwrap().forget();
    worker.take(ingest(1, 1, 3));
    let copy = Arc::new(link());
    let (from, to) = (SessionId(1), SessionId(2));
    worker.take(Message {
        command: Command::Fork { from, to },
        attach: Attach::Session(Arc::clone(&copy)),
    });
    assert_eq!(copy.credit.available_permits(), 13);
    assert_eq!(worker.told.get(&to), Some(&Seq(1)));
}
