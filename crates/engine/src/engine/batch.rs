//! A step's batch: which requests start, who runs how many tokens in whose blocks, the forward, and what came of it.
//!
//! KV blocks are lent as they are needed: to a request when it starts for the tokens that are known of it, then one by one; to
//! an open window what its next row needs. When there are none, somebody gives up all of its own, and is computed again later with
//! the same result:
//!
//! - A running request takes from open windows (from those that rest, read longest ago first, then from those with a turn, from each
//!   window once), then from the running request that gives way first (`scheduler::gives_way`), which may be itself.
//! - A window takes from those whose turn comes after its own. If there is too little, it waits, and while it does no request starts;
//!   if that takes too long, all running requests but the first to come give way.
//!
//! So there is always one who gets on. Of the running requests the one that came first gives way to windows alone, each of which has
//! given way once before; a window that may keep its blocks comes to its end. Whenever a request starts it has the blocks
//! for all that is known of it, so unless it gives way to an earlier one it draws a token or scores a continuation before it needs more:
//! the first to come ends, and then there is another first. A window's written sums stay where they are when it gives way.
//! `Config` and `enqueue` keep what one alone needs below the whole. Start at [`Engine::batch`].

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use super::Engine;
use crate::{
    error::Error,
    event::{Event, Finish},
    ids::{SessionId, TenantId},
    machine::Output,
    request::Request,
    scheduler,
    session::{Context, Session},
};

/// Requests of one step at most whose core had to be read out first.
const COMPOSED: usize = 2;

/// Waiting requests whose cores the machine is told of.
const ANNOUNCED: usize = 8;

/// Steps that the first window waits for blocks before it takes them.
const PATIENCE: u32 = 16;

/// The rows of a step.
#[derive(Debug, Default)]
pub(super) struct Batch {
    /// Tokens of each running request, in their order; 0 rests.
    pub(super) requests: Vec<usize>,
    /// Tokens of each session that reads.
    pub(super) sessions: BTreeMap<SessionId, usize>,
    /// Running answers, of a token each.
    pub(super) decode: usize,
    /// Tokens of prompts, and as many as could have run.
    pub(super) prefill: usize,
    pub(super) prefill_asked: usize,
}

impl Batch {
    /// Tokens beside running answers.
    pub(super) fn bulk(&self) -> usize {
        let all = self.requests.iter().chain(self.sessions.values());
        all.sum::<usize>() - self.decode
    }
}

impl Engine {
    /// Sees to it that each running request has the blocks for what is known of it: those that came first before the others.
    pub(super) fn secure(&mut self) {
        let (missing, waited) = self.window_waits;
        if waited >= PATIENCE {
            while self.allocator.free() < missing && self.running.len() > 1 {
                self.preempt();
            }
            let first = self.sessions.values_mut().filter(|one| one.turn.is_some());
            if let Some(first) = first.min_by_key(|session| session.turn) {
                first.yielded = true;
            }
            self.window_waits = (missing, 0);
        }
        let mut order: Vec<u64> = self.running.iter().map(|one| one.number).collect();
        order.sort_unstable();
        for number in order {
            let place = |running: &[Request]| running.iter().position(|one| one.number == number);
            // Gone, if an earlier one took its blocks.
            let Some(index) = place(&self.running) else {
                continue;
            };
            let request = &self.running[index];
            let missing = self.allocator.missing(&request.blocks, request.len());
            if missing == 0 {
                continue;
            }
            if !self.room(missing) {
                while self.allocator.free() < missing && place(&self.running).is_some() {
                    self.preempt();
                }
            }
            if let Some(index) = place(&self.running) {
                let request = &mut self.running[index];
                let length = request.len();
                self.allocator.grow(&mut request.blocks, length);
            }
        }
    }

    /// Takes the blocks of the running request that gives way; it waits where it would if it had never started.
    fn preempt(&mut self) {
        let running: Vec<_> = self.running.iter().map(Request::place).collect();
        let Some(index) = scheduler::gives_way(&running) else {
            return;
        };
        let mut request = self.running.remove(index);
        request.give_back(&mut self.allocator);
        self.preempted += 1;
        let place = self
            .waiting
            .partition_point(|other| other.number < request.number);
        self.waiting.insert(place, request);
    }

    /// Starts requests, while there are places and blocks, and portions for the cores that have to be read out first. A tenant of which
    /// none runs gets place and blocks from one of which more than one does.
    pub(super) fn admit(
        &mut self,
        portion: &mut dyn FnMut() -> bool,
        now: Instant,
        events: &mut Vec<Event>,
    ) {
        let mut composed = 0;
        while self.window_waits.0 == 0 {
            let mut running: BTreeMap<TenantId, usize> = BTreeMap::new();
            for request in &self.running {
                *running.entry(request.tenant).or_default() += 1;
            }
            let waiting = self.waiting.iter().map(|request| request.tenant);
            let Some(index) = scheduler::next_to_start(waiting, &running, self.last_started) else {
                return;
            };
            let has_place = self.running.len() < self.config.max_running;
            if has_place && self.start(index, (&mut composed, portion), now, events) {
                continue;
            }
            let none_runs = self
                .waiting
                .get(index)
                .is_some_and(|request| !running.contains_key(&request.tenant));
            if composed > COMPOSED || !none_runs || running.values().all(|&runs| runs < 2) {
                return;
            }
            self.preempt();
        }
    }

    /// Starts the request at this place in the line, if there are blocks; says whether there were.
    fn start(
        &mut self,
        index: usize,
        (composed, portion): (&mut usize, &mut dyn FnMut() -> bool),
        now: Instant,
        events: &mut Vec<Event>,
    ) -> bool {
        let Some(next) = self.waiting.get(index) else {
            return false;
        };
        let length = next.len();
        // Those that run need another block soon: who starts now is not to make way for them at once.
        let spared = self.running.len();
        let composes = !next.has_started() && next.adapter.chosen.is_composed();
        if composes {
            // A core is read out only for a request that is sure to start.
            let blocks = self.allocator.blocks_for(length);
            if *composed >= COMPOSED || !self.room(blocks + spared) {
                *composed += usize::from(*composed == COMPOSED);
                return false;
            }
            if !self.compose(index, portion) {
                *composed = COMPOSED + 1;
                return false;
            }
            *composed += 1;
            self.make_slot_room(self.bounds.core_bytes, events);
        }
        let Some(mut request) = self.waiting.remove(index) else {
            return false;
        };
        if !request.has_started() {
            request.pin = self.pin(&mut request);
        }
        request.reuse(&mut self.allocator);
        let missing = self.allocator.missing(&request.blocks, length);
        if !self.room(missing + spared) || !self.allocator.grow(&mut request.blocks, length) {
            request.give_back(&mut self.allocator);
            self.waiting.insert(index, request);
            return false;
        }
        self.last_started = request.tenant;
        if !request.has_started() {
            request.start(now);
            self.prompt_tokens += request.prompt_tokens() as u64;
            self.cached_tokens += request.cached() as u64;
        }
        if request.asks_nothing() {
            self.allocator.release(&mut request.blocks);
            events.push(request.finished(Finish::Length, now));
        } else {
            self.running.push(request);
        }
        true
    }

    /// Makes room for a request by taking from windows; says whether there is.
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

    /// Decides who runs how many tokens, and gets windows their blocks. `spent` has gone by since running answers had their last
    /// tokens, and so many portions were read out in it.
    pub(super) fn batch(
        &mut self,
        (spent, portions): (Duration, usize),
        events: &mut Vec<Event>,
    ) -> Batch {
        let decode = self
            .running
            .iter()
            .filter(|request| request.decodes())
            .count();
        let prefill: Vec<_> = self
            .running
            .iter()
            .filter(|request| !request.decodes())
            .map(|request| (request.tenant, request.wants()))
            .collect();
        let mut turns: Vec<_> = self
            .sessions
            .iter()
            .filter_map(|(&id, session)| {
                Some((session.turn?, id, (session.tenant, session.wants()?)))
            })
            .collect();
        turns.sort_unstable();
        let context: Vec<_> = turns.iter().map(|&(.., asked)| asked).collect();
        let mut left = self.config.step_tokens.saturating_sub(decode);
        if decode > 0 {
            let most = self.config.max_bulk_beside_decode.min(left);
            left = self.pace.bulk(decode, most, spent, self.steps).min(left);
            let wanted = !prefill.is_empty() || !context.is_empty();
            self.put_off = wanted && portions > 0 && self.pace.is_over(decode, spent);
            if self.put_off {
                left = 0;
            }
        }
        let (plan, next) = scheduler::plan(left, self.turns, &prefill, &context);
        self.turns = next;
        let (read, asked) = (
            plan.prefill.iter().sum(),
            prefill.iter().map(|(_, tokens)| tokens).sum(),
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
            decode,
            prefill: read,
            prefill_asked: asked,
        };
        let (_, waited) = self.window_waits;
        if plan.context.iter().any(|&tokens| tokens > 0) || turns.is_empty() {
            self.window_waits = (0, 0);
        }
        for ((turn, id, _), tokens) in turns.into_iter().zip(plan.context) {
            if tokens == 0 {
                continue;
            }
            let Some(session) = self.sessions.get(&id) else {
                continue;
            };
            let missing = session.missing_blocks(tokens, &self.allocator);
            self.evict_for(missing, |id, other| {
                !batch.sessions.contains_key(&id) && other.turn.is_none_or(|other| other > turn)
            });
            if self.allocator.free() < missing {
                if batch.sessions.is_empty() {
                    self.window_waits = (missing, waited + 1);
                }
                break;
            }
            let (Some(generator), Some(session)) =
                (self.machine.generator(), self.sessions.get_mut(&id))
            else {
                continue;
            };
            if session.prepare(
                tokens,
                &mut Context {
                    generator,
                    machine: &*self.machine,
                    allocator: &mut self.allocator,
                    cores: &self.cores,
                    traces: &self.traces,
                    events,
                    portion: &mut || true,
                },
            ) {
                batch.sessions.insert(id, tokens);
            }
        }
        batch
    }

    /// Names the cores of the requests that are next to start.
    pub(super) fn announce(&mut self) -> Result<(), Error> {
        for request in self.waiting.iter().take(ANNOUNCED) {
            let session = (request.adapter.session).and_then(|id| self.sessions.get(&id));
            let core = session.and_then(|session| session.newest().core.as_ref());
            if let Some(core) = core.filter(|_| request.adapter.scale != 0.0) {
                self.machine.announce(core.slot(), core.core())?;
            }
        }
        Ok(())
    }

    /// Runs the rows: requests in order, then sessions.
    pub(super) fn forward(&mut self, batch: &Batch) -> Result<Output, Error> {
        let (mut rows, mut slots, mut draws) = (Vec::new(), Vec::new(), Vec::new());
        for (request, &tokens) in self.running.iter().zip(&batch.requests) {
            if tokens > 0 {
                let (row, slot) = request.row(tokens);
                rows.push(row);
                slots.push(slot);
                draws.push(request.draw(tokens));
            }
        }
        for (id, session) in &mut self.sessions {
            if let Some((row, slot)) = batch
                .sessions
                .get(id)
                .and_then(|&tokens| session.row(tokens))
            {
                rows.push(row);
                slots.push(slot);
                draws.push(None);
            }
        }
        if rows.is_empty() {
            return Ok(Output::default());
        }
        self.machine.forward_and_draw(&mut rows, &slots, &draws)
    }

    pub(super) fn hand_round(
        &mut self,
        batch: &Batch,
        output: &Output,
        now: Instant,
        events: &mut Vec<Event>,
    ) {
        let vocab = self.model.vocab;
        let mut rest = output.logits.as_slice();
        let mut drawn = output.drawn.iter();
        let mut behind = Vec::new();
        let running = std::mem::take(&mut self.running);
        for (mut request, &tokens) in running.into_iter().zip(&batch.requests) {
            if tokens == 0 {
                self.running.push(request);
                continue;
            }
            let token = drawn.next().copied().flatten();
            let wanted = if token.is_some() {
                0
            } else {
                request.logits(tokens)
            };
            let (own, others) = rest.split_at_checked(wanted * vocab).unwrap_or((rest, &[]));
            rest = others;
            let ended = request.took(tokens, (token, own), vocab, now, events);
            if self.config.prefix_cache {
                request.offer(&mut self.allocator);
            }
            if ended {
                self.allocator.release(&mut request.blocks);
                self.load.ended(request.ran(now));
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
