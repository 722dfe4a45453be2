//! A step's batch: which requests start, who runs how many tokens in whose blocks, the forward, and what came of it.
//!
//! KV blocks: a request gets all it can come to need when it starts, an open window what its next row needs. What an open
//! window holds can be taken from it between steps (its tokens are then run again, without writing). A window takes from
//! those whose turn comes after its own, so the first always goes on. A request takes from those that rest, read longest
//! ago first, then from those with a turn, from each window once. While the first window waits for blocks, no request
//! starts: those that run end, so it gets them. So neither waits for ever. Start at [`Engine::batch`].

use std::{collections::BTreeMap, time::Instant};

use super::Engine;
use crate::{
    error::Error,
    event::{Event, Finish},
    ids::SessionId,
    request::Request,
    scheduler,
    session::{Context, Session},
};

/// Requests of one step at most whose core has to be read out first: the others' answers wait for it.
const COMPOSED: usize = 2;

/// The rows of a step.
#[derive(Debug, Default)]
pub(super) struct Batch {
    /// Tokens of each running request, in their order; 0 rests.
    pub(super) requests: Vec<usize>,
    /// Tokens of each session that reads.
    pub(super) sessions: BTreeMap<SessionId, usize>,
}

impl Engine {
    /// Starts requests in order of arrival, while there are places and blocks.
    pub(super) fn admit(&mut self, now: Instant, events: &mut Vec<Event>) {
        let mut composed = 0;
        while self.running.len() < self.config.max_running && !self.window_waits {
            let Some(next) = self.waiting.front() else {
                return;
            };
            let length = next.length;
            if !next.adapter.chosen.parts.is_empty() {
                // A core is read out only for a request that is sure to start.
                composed += 1;
                let blocks = self.allocator.blocks_for(length);
                if composed > COMPOSED || !self.room(blocks) {
                    return;
                }
            }
            let Some(mut request) = self.waiting.pop_front() else {
                return;
            };
            request.reuse(self.pin(&request), &mut self.allocator);
            let missing = self.allocator.missing(&request.blocks, length);
            if !self.room(missing) || !self.allocator.grow(&mut request.blocks, length) {
                request.give_back(&mut self.allocator);
                self.waiting.push_front(request);
                return;
            }
            request.start(now);
            self.prompt_tokens += request.prompt_tokens() as u64;
            self.cached_tokens += request.cached() as u64;
            if request.asks_nothing() {
                self.allocator.release(&mut request.blocks);
                events.push(request.finished(Finish::Length, now));
            } else {
                self.running.push(request);
            }
        }
    }

    /// Makes room for a request that starts; says whether there is.
    fn room(&mut self, blocks: usize) -> bool {
        let yields = |_, session: &Session| session.turn.is_none() || !session.yielded;
        for id in self.evict_for(blocks, yields) {
            if let Some(session) = self.sessions.get_mut(&id) {
                session.yielded = session.turn.is_some();
            }
        }
        self.allocator.free() >= blocks
    }

    /// Takes blocks from open windows that may be taken from until so many are free, if that is possible at all: from those
    /// without a turn first, the one read longest ago first; then from the last turns.
    fn evict_for(
        &mut self,
        blocks: usize,
        from: impl Fn(SessionId, &Session) -> bool,
    ) -> Vec<SessionId> {
        let mut evicted = Vec::new();
        if self.allocator.free() >= blocks {
            return evicted;
        }
        let holders = self
            .sessions
            .iter()
            .filter(|&(&id, session)| session.held_blocks() > 0 && from(id, session));
        let order = |session: &Session| {
            (
                session.turn.map_or(0, |turn| u64::MAX - turn),
                session.last_step,
            )
        };
        let mut holders: Vec<_> = holders
            .map(|(&id, session)| (order(session), id, session.held_blocks()))
            .collect();
        let held: usize = holders.iter().map(|&(.., held)| held).sum();
        if self.allocator.free() + held < blocks {
            return evicted;
        }
        holders.sort_unstable();
        for (_, id, _) in holders {
            if self.allocator.free() >= blocks {
                break;
            }
            if let Some(session) = self.sessions.get_mut(&id) {
                session.evict(&mut self.allocator);
                evicted.push(id);
            }
        }
        evicted
    }

    /// Decides who runs how many tokens, and gets windows their blocks.
    pub(super) fn batch(&mut self, events: &mut Vec<Event>) -> Batch {
        let decode = self
            .running
            .iter()
            .filter(|request| request.decodes())
            .count();
        let prefill: Vec<usize> = self
            .running
            .iter()
            .filter(|request| !request.decodes())
            .map(Request::wants)
            .collect();
        let mut turns: Vec<_> = self
            .sessions
            .iter()
            .filter_map(|(&id, session)| Some((session.turn?, id, session.wants()?)))
            .collect();
        turns.sort_unstable();
        let context: Vec<usize> = turns.iter().map(|&(.., tokens)| tokens).collect();
        let plan = scheduler::plan(
            self.config.step_tokens,
            self.config.max_bulk_beside_decode,
            decode,
            &prefill,
            &context,
        );
        let mut prefill = plan.prefill.into_iter();
        let requests = self.running.iter().map(|request| {
            if request.decodes() {
                1
            } else {
                prefill.next().unwrap_or(0)
            }
        });
        let mut batch = Batch {
            requests: requests.collect(),
            sessions: BTreeMap::new(),
        };
        self.window_waits = false;
        for ((turn, id, _), tokens) in turns.into_iter().zip(plan.context) {
            if tokens == 0 {
                break;
            }
            let Some(session) = self.sessions.get(&id) else {
                continue;
            };
            let missing = session.missing_blocks(tokens, &self.allocator);
            self.evict_for(missing, |id, other| {
                !batch.sessions.contains_key(&id) && other.turn.is_none_or(|other| other > turn)
            });
            if self.allocator.free() < missing {
                self.window_waits = batch.sessions.is_empty();
                break;
            }
            let (Some(generator), Some(session)) =
                (self.lm.generator(), self.sessions.get_mut(&id))
            else {
                continue;
            };
            if session.prepare(
                tokens,
                &mut Context {
                    generator,
                    allocator: &mut self.allocator,
                    cores: &self.cores,
                    traces: &self.traces,
                    events,
                },
            ) {
                batch.sessions.insert(id, tokens);
            }
        }
        batch
    }

    /// Runs the rows. Logits of all rows that asked for some, V floats each, requests in order.
    pub(super) fn forward(&mut self, batch: &Batch) -> Result<Vec<f32>, Error> {
        let mut rows = Vec::new();
        for (request, &tokens) in self.running.iter().zip(&batch.requests) {
            if tokens > 0 {
                rows.push(request.row(tokens));
            }
        }
        for (id, session) in &mut self.sessions {
            if let Some(row) = batch
                .sessions
                .get(id)
                .and_then(|&tokens| session.row(tokens))
            {
                rows.push(row);
            }
        }
        if rows.is_empty() {
            return Ok(Vec::new());
        }
        match self.lm.forward(&mut rows, &self.kv)?.logits {
            Some(logits) => Ok(logits.flatten_all()?.to_vec1()?),
            None => Ok(Vec::new()),
        }
    }

    pub(super) fn hand_round(
        &mut self,
        batch: &Batch,
        logits: &[f32],
        now: Instant,
        events: &mut Vec<Event>,
    ) {
        let vocab = self.model.vocab;
        let mut rest = logits;
        let mut behind = Vec::new();
        let running = std::mem::take(&mut self.running);
        for (mut request, &tokens) in running.into_iter().zip(&batch.requests) {
            if tokens == 0 {
                self.running.push(request);
                continue;
            }
            let (own, others) = rest
                .split_at_checked(request.logits(tokens) * vocab)
                .unwrap_or((rest, &[]));
            rest = others;
            let ended = request.took(tokens, own, vocab, now, events);
            if self.config.prefix_cache {
                request.offer(&mut self.allocator);
            }
            if ended {
                self.allocator.release(&mut request.blocks);
            } else if request.generates() {
                self.running.push(request);
            } else {
                // A score may have thousands of rows to go: its turn ends with the step.
                behind.push(request);
            }
        }
        self.running.append(&mut behind);
        for (id, &tokens) in &batch.sessions {
            if let Some(session) = self.sessions.get_mut(id) {
                session.ran(tokens, self.steps, events);
            }
        }
    }
}
