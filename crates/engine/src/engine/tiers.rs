//! Tiers: which sessions leave memory, and how they come back when somebody asks for them.
//!
//! Sessions at rest leave when a budget is short, the one that was spoken of longest ago first: sums and traces when those are short, all
//! when cores are. Nothing waits for that: what leaves follows from the log, so it can go at once; a snapshot saves reading the log
//! again. What asks for a session that is away waits here, outside of the queue that requests start from, in order; all else
//! goes on. A few sessions come back at a time; the first in line comes even where there is no room, so none waits for ever. Start
//! at [`Engine::tend`].

use std::{
    collections::{BTreeSet, VecDeque},
    time::Instant,
};

use super::{Engine, is_request};
use crate::{
    command::Command,
    error::{RequestError, SessionError},
    event::{Event, Rejected},
    ids::{Digest, SessionId},
    request::Request,
    session::{Context, Session},
    snapshot::{Need, Snapshot},
};

/// Sessions that come back at a time.
const WAKING: usize = 4;
/// Snapshots that are being kept at a time.
const SAVING: usize = 4;
/// Sessions that every step looks at; others that hold nothing sleep.
const AWAKE: usize = 1024;

/// A session that is asked for and not in memory.
#[derive(Debug, Default)]
pub(super) struct Waking {
    /// What is asked for.
    need: Need,
    stage: Stage,
    /// What `Wanted` said.
    asked: Need,
    /// Its place in line.
    turn: u64,
    /// What it was told meanwhile, in order.
    commands: VecDeque<Command>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Stage {
    #[default]
    Waits,
    /// For `Restored`.
    Asked,
    /// Its log, again.
    Reads,
}

impl Engine {
    /// A session, in memory or not.
    fn known(&self, id: SessionId) -> Option<&Session> {
        self.sessions.get(&id).or_else(|| self.asleep.get(&id))
    }

    pub(super) fn is_known(&self, id: SessionId) -> bool {
        self.known(id).is_some()
    }

    /// Commands that wait for their sessions.
    pub(super) fn kept_back(&self) -> impl Iterator<Item = &Command> {
        self.waking.values().flat_map(|waking| &waking.commands)
    }

    /// Whether somebody has yet to answer `Wanted`.
    #[must_use]
    pub fn waits(&self) -> bool {
        self.waking
            .values()
            .any(|waking| waking.stage == Stage::Asked)
    }

    /// Whether the next step has something to do here.
    pub(super) fn stirs(&self) -> bool {
        let under_way = |stage| self.waking.values().any(|waking| waking.stage == stage);
        let back = self.waking.iter().any(|(id, waking)| {
            let session = self
                .sessions
                .get(id)
                .filter(|_| waking.stage == Stage::Reads);
            session.is_some_and(|session| !session.gone().any() || session.unmade.is_some())
        });
        back || (under_way(Stage::Waits) && !under_way(Stage::Asked) && !under_way(Stage::Reads))
    }

    /// Passes a command on if its session is here; else keeps it until it is.
    pub(super) fn pass(&mut self, command: Command) -> Option<Command> {
        let (id, need) = match &command {
            Command::Ingest { session, .. } | Command::Forget { session, .. } => (
                *session,
                Need {
                    core: true,
                    sums: true,
                },
            ),
            Command::Fork { from, .. } => (
                *from,
                Need {
                    core: true,
                    sums: true,
                },
            ),
            Command::Publish {
                session,
                provisional,
                ..
            } => {
                // Of a session at rest there is nothing to publish but what is.
                let sums = !provisional.is_empty();
                (*session, Need { core: false, sums })
            }
            Command::Export { session, .. } => (
                *session,
                Need {
                    core: true,
                    sums: false,
                },
            ),
            Command::Close { session } => {
                // A copy that was asked for before is made before.
                let copies = |command: &Command| matches!(command, Command::Fork { .. });
                let waking = self.waking.get_mut(session);
                match waking.filter(|waking| waking.commands.iter().any(copies)) {
                    Some(waking) => waking.commands.push_back(command),
                    None => return Some(command),
                }
                return None;
            }
            Command::Open { .. }
            | Command::Restored { .. }
            | Command::Saved { .. }
            | Command::Evict { .. }
            | Command::Generate { .. }
            | Command::Score { .. }
            | Command::Cancel { .. } => return Some(command),
        };
        let Some(gone) = self.known(id).map(Session::gone) else {
            return Some(command);
        };
        self.touch(id);
        let behind = self.waking.contains_key(&id);
        let need = need.within(gone);
        if need.any() || behind {
            self.want(id, need).commands.push_back(command);
            return None;
        }
        self.awake(id);
        Some(command)
    }

    /// Takes note that a session was spoken of.
    pub(super) fn touch(&mut self, id: SessionId) {
        let step = self.steps;
        if let Some(session) = self
            .sessions
            .get_mut(&id)
            .or_else(|| self.asleep.get_mut(&id))
        {
            session.used = step;
        }
    }

    fn want(&mut self, id: SessionId, need: Need) -> &mut Waking {
        let turn = self.next_turn;
        self.next_turn += 1;
        let waking = self.waking.entry(id).or_insert_with(|| Waking {
            turn,
            ..Waking::default()
        });
        waking.need = waking.need.and(need);
        waking
    }

    /// Moves a session to those that steps look at.
    fn awake(&mut self, id: SessionId) {
        if let Some(session) = self.asleep.remove(&id) {
            self.sessions.insert(id, session);
        }
    }

    /// Puts a request in line, or aside until its session is here.
    pub(super) fn line_up(&mut self, request: Request) {
        let Some(id) = request.adapter.session else {
            self.waiting.push_back(request);
            return;
        };
        self.touch(id);
        if self.serves(&request) && !self.short {
            self.tiers.hits += 1;
            self.start_line(id, request);
            return;
        }
        self.tiers.misses += 1;
        let need = self.lacks(&request);
        if need.any() {
            self.want(id, need);
        }
        self.parked.push_back(request);
    }

    fn start_line(&mut self, id: SessionId, request: Request) {
        self.awake(id);
        let composes = |session: &Session| session.composes(&request.adapter.chosen);
        if self.sessions.get(&id).is_some_and(composes) {
            self.tiers.promoted_host += 1;
        }
        // In order of arrival, also of those that did not have to wait.
        let place = self
            .waiting
            .partition_point(|other| other.number < request.number);
        self.waiting.insert(place, request);
    }

    fn lacks(&self, request: &Request) -> Need {
        let adapter = &request.adapter;
        let session = adapter.session.filter(|_| adapter.scale != 0.0);
        let session = session.and_then(|id| self.known(id));
        session.map_or(Need::default(), |session| session.lacks(&adapter.chosen))
    }

    /// Whether a request's session is here, and what it was told to forget is forgotten.
    fn serves(&self, request: &Request) -> bool {
        let forgets = |command: &Command| matches!(command, Command::Forget { .. });
        let waking = request.adapter.session.and_then(|id| self.waking.get(&id));
        let forgets = waking.is_some_and(|waking| waking.commands.iter().any(forgets));
        !forgets && !self.lacks(request).any()
    }

    /// Takes out of memory what has to go, and brings back what is asked for.
    pub(super) fn tend(&mut self, now: Instant, events: &mut Vec<Event>) {
        self.come_back(now, events);
        self.relieve(events);
        self.bring_back(events);
        self.come_back(now, events);
    }

    /// What waited for sessions that are here goes on.
    fn come_back(&mut self, now: Instant, events: &mut Vec<Event>) {
        let back = self.waking.iter().filter_map(|(&id, waking)| {
            let session = self.sessions.get(&id)?;
            let here = waking.stage == Stage::Reads && session.unmade.is_some();
            (here || !session.gone().within(waking.need).any()).then_some(id)
        });
        let back: Vec<_> = back.collect();
        for &id in &back {
            let Some(waking) = self.waking.remove(&id) else {
                continue;
            };
            let failed = self
                .sessions
                .get_mut(&id)
                .and_then(|session| session.unmade.take());
            if let Some(reason) = failed {
                self.not_restored(id, waking, &reason, events);
                continue;
            }
            for command in waking.commands {
                if let Some(command) = self.pass(command) {
                    self.take(command, now, events);
                }
            }
        }
        for request in std::mem::take(&mut self.parked) {
            match request.adapter.session {
                Some(id) if !self.serves(&request) => {
                    // It may need more than what has come.
                    let need = self.lacks(&request);
                    if need.any() {
                        self.want(id, need);
                    }
                    self.parked.push_back(request);
                }
                // Others would go before those that wait for room. Those whose session has come go on, or it would leave again.
                Some(id) if self.short && !back.contains(&id) => self.parked.push_back(request),
                Some(id) => self.start_line(id, request),
                None => self.waiting.push_back(request),
            }
        }
    }

    /// All that waited for a session is refused. It is away as it was; who asks again tries again.
    fn not_restored(
        &mut self,
        id: SessionId,
        waking: Waking,
        reason: &str,
        events: &mut Vec<Event>,
    ) {
        let error = || RequestError::NotRestored {
            session: id,
            reason: reason.to_owned(),
        };
        let refused = |session, rejected| Event::SessionFailed {
            session,
            rejected,
            error: SessionError::ReadOut {
                reason: reason.to_owned(),
            },
        };
        for command in waking.commands {
            events.push(match command {
                Command::Ingest { session, seq, .. } => refused(session, Rejected::Ingest { seq }),
                Command::Publish { session, seq, .. } => {
                    refused(session, Rejected::Publish { seq })
                }
                Command::Forget { session, document } => {
                    refused(session, Rejected::Forget { document })
                }
                Command::Fork { from, to } => refused(to, Rejected::Fork { from }),
                Command::Export { request, .. } => Event::Failed {
                    request,
                    error: error(),
                },
                Command::Close { session } => {
                    self.close(session, events);
                    continue;
                }
                _ => continue,
            });
        }
        let (failed, parked): (VecDeque<_>, _) = std::mem::take(&mut self.parked)
            .into_iter()
            .partition(|request| request.adapter.session == Some(id));
        self.parked = parked;
        events.extend(failed.into_iter().map(|request| Event::Failed {
            request: request.id,
            error: error(),
        }));
    }

    /// Sessions that are to stay: requests are about to start with them, or something asks for them.
    fn pinned(&self) -> BTreeSet<SessionId> {
        let waiting = self
            .waiting
            .iter()
            .filter_map(|request| request.adapter.session);
        waiting.chain(self.waking.keys().copied()).collect()
    }

    /// Sessions at rest that may leave, longest unspoken of first.
    fn restful(&self, may: impl Fn(&Session) -> bool) -> VecDeque<SessionId> {
        let pinned = self.pinned();
        let rest = self
            .sessions
            .iter()
            .filter(|(id, session)| may(session) && session.at_rest() && !pinned.contains(id));
        let mut rest: Vec<_> = rest.map(|(&id, session)| (session.used, id)).collect();
        rest.sort_unstable();
        rest.into_iter().map(|(_, id)| id).collect()
    }

    /// Bytes that states take in memory.
    pub(super) fn resident_bytes(&self) -> usize {
        let sessions = self.sessions.values();
        sessions.fold(0, |sum, session| {
            sum.saturating_add(session.resident_bytes())
        })
    }

    /// Keeps the budgets: what is at rest leaves.
    fn relieve(&mut self, events: &mut Vec<Event>) {
        self.make_host_room(0, self.traces.limit() / 8, events);
        // Versions that may come in this step, and cores that are made for requests.
        let coming = self.sessions.values().filter(|session| {
            let core = session.newest().core.as_ref();
            !session.at_rest() && core.is_none_or(|core| !core.is_alone())
        });
        let composed = self.waiting.iter().take(self.config.max_running);
        let composed = composed.filter(|request| !request.adapter.chosen.parts.is_empty());
        let coming = coming.count().saturating_add(composed.count());
        let half = (self.config.core_budget_bytes / 2).max(self.bounds.core_bytes);
        self.make_slot_room(
            coming.saturating_mul(self.bounds.core_bytes).min(half),
            events,
        );
        if self.sessions.len() > AWAKE {
            let bare = self.restful(|session| {
                session.newest().core.is_none() && session.resident_bytes() == 0
            });
            let over = self.sessions.len() - AWAKE;
            for id in bare.into_iter().take(over) {
                self.sleep(id);
            }
        }
        self.save(events);
    }

    /// Makes room for so many bytes of states and of traces, as far as sessions at rest can give it. Says whether there is.
    fn make_host_room(&mut self, states: usize, traces: usize, events: &mut Vec<Event>) -> bool {
        let (state_limit, trace_limit) = (self.config.state_budget_bytes, self.traces.limit());
        let mut resident = self.resident_bytes();
        let short = |engine: &Self, resident: usize| {
            resident.saturating_add(states) > state_limit
                || engine.traces.used().saturating_add(traces) > trace_limit
        };
        if short(self, resident) {
            for id in self.restful(|session| session.resident_bytes() > 0) {
                if !short(self, resident) {
                    break;
                }
                let states_fit = resident.saturating_add(states) <= state_limit;
                let Some(session) = self.sessions.get(&id) else {
                    continue;
                };
                if !states_fit || session.trace_bytes() > 0 {
                    resident = resident.saturating_sub(session.resident_bytes());
                    self.leave_host(id, events);
                }
            }
        }
        !short(self, resident)
    }

    /// Makes room for so many bytes of cores, as far as sessions at rest can give it. Says whether there is.
    fn make_slot_room(&mut self, bytes: usize, events: &mut Vec<Event>) -> bool {
        let limit = self.config.core_budget_bytes;
        let short = |engine: &Self| engine.cores.used().saturating_add(bytes) > limit;
        if short(self) {
            let alone = |session: &Session| {
                let core = session.newest().core.as_ref();
                core.is_some_and(|core| core.is_alone())
            };
            for id in self.restful(alone) {
                if !short(self) {
                    break;
                }
                self.leave_slot(id, events);
            }
        }
        !short(self)
    }

    /// Takes a session out of memory, if it is at rest and nothing asks for it: sums and traces, and the core if it is that of all that the
    /// session was told.
    pub(super) fn evict(&mut self, id: SessionId, core: bool, events: &mut Vec<Event>) {
        let rests = self.sessions.get(&id).is_some_and(Session::at_rest);
        if !rests || self.pinned().contains(&id) {
            return;
        }
        self.leave_host(id, events);
        if core {
            self.leave_slot(id, events);
        }
    }

    /// Takes sums and traces of a session at rest out of memory.
    fn leave_host(&mut self, id: SessionId, events: &mut Vec<Event>) {
        self.keep(id, events);
        let (Some(generator), Some(session)) =
            (self.machine.generator(), self.sessions.get_mut(&id))
        else {
            return;
        };
        // An empty state costs nothing; if even that cannot be had, the session stays.
        if session.resident_bytes() > 0 && session.leave_host(generator).is_ok() {
            self.tiers.evicted_host += 1;
        }
    }

    /// Takes all of a session at rest out of memory but its log. Nothing of one whose newest version is not of all that it was told.
    fn leave_slot(&mut self, id: SessionId, events: &mut Vec<Event>) {
        if !self.sessions.get(&id).is_some_and(Session::is_current) {
            return;
        }
        self.leave_host(id, events);
        if let Some(session) = self.sessions.get_mut(&id) {
            session.leave_slot();
            self.tiers.evicted_slots += u64::from(session.gone().core);
        }
        self.sleep(id);
    }

    fn sleep(&mut self, id: SessionId) {
        if let Some(session) = self.sessions.remove(&id) {
            self.asleep.insert(id, session);
        }
    }

    /// Has sessions that are next to leave kept, once three quarters of a budget are taken.
    fn save(&mut self, events: &mut Vec<Event>) {
        let rate = self.config.snapshot_bytes_per_token;
        let beyond = |used: usize, limit: usize| used > limit / 4 * 3;
        let presses = rate > 0
            && self.saving.len() < SAVING
            && (beyond(self.resident_bytes(), self.config.state_budget_bytes)
                || beyond(self.traces.used(), self.traces.limit())
                || beyond(self.cores.used(), self.config.core_budget_bytes));
        if !presses {
            return;
        }
        for id in self.restful(is_fresh) {
            if self.saving.len() >= SAVING {
                return;
            }
            self.keep(id, events);
        }
    }

    /// Has a session at rest kept as a snapshot, if that is worth it and was not done for this version.
    fn keep(&mut self, id: SessionId, events: &mut Vec<Event>) {
        let rate = self.config.snapshot_bytes_per_token;
        if rate == 0 || self.saving.len() >= SAVING || self.saving.contains(&id) {
            return;
        }
        let session = self.sessions.get_mut(&id);
        let Some(session) = session.filter(|session| is_fresh(session)) else {
            return;
        };
        // Looked at once a version, whether it is worth it or not.
        session.kept = Some((session.newest().digest, Need::default()));
        if let Some(snapshot) = session.snapshot(rate) {
            self.saving.insert(id);
            events.push(Event::Save {
                session: id,
                snapshot,
            });
        }
    }

    /// Begins to bring sessions back, in the order in which they were asked for.
    fn bring_back(&mut self, events: &mut Vec<Event>) {
        self.short = false;
        loop {
            let stages = self.waking.values().map(|waking| waking.stage);
            let under_way = stages.filter(|stage| *stage != Stage::Waits).count();
            let waits = self
                .waking
                .iter()
                .filter(|(_, waking)| waking.stage == Stage::Waits);
            let Some((&id, _)) = waits.min_by_key(|(_, waking)| waking.turn) else {
                return;
            };
            if under_way >= WAKING {
                return;
            }
            if !self.has_room(id, events) && (under_way > 0 || !self.waiting.is_empty()) {
                // Who comes now stands behind it: what holds the room ends, and is not begun anew.
                self.short = true;
                return;
            }
            self.begin_to_wake(id, events);
        }
    }

    /// What sessions that are coming back have yet to take: bytes of states and of cores.
    fn coming_back(&self) -> (usize, usize) {
        let (mut states, mut cores) = (0usize, 0usize);
        for (&id, waking) in &self.waking {
            let Some(session) = self.known(id).filter(|_| waking.stage != Stage::Waits) else {
                continue;
            };
            if session.gone().core {
                cores = cores.saturating_add(self.bounds.core_bytes);
            }
            if waking.asked.sums && waking.stage == Stage::Asked {
                states = states.saturating_add(session.whole_bytes());
            }
        }
        (states, cores)
    }

    /// Whether there is room for what comes back of a session, others having left for it.
    fn has_room(&mut self, id: SessionId, events: &mut Vec<Event>) -> bool {
        let Some(session) = self.known(id) else {
            return true;
        };
        let gone = session.gone();
        let (states_coming, cores_coming) = self.coming_back();
        let (states, tokens) = if gone.sums {
            (session.whole_bytes(), session.traced_tokens())
        } else {
            (0, 0)
        };
        let row = self.bounds.trace_row_bytes;
        let host = self.make_host_room(
            states.saturating_add(states_coming),
            tokens.saturating_mul(row),
            events,
        );
        let core = if gone.core { self.bounds.core_bytes } else { 0 };
        self.make_slot_room(core.saturating_add(cores_coming), events) && host
    }

    fn begin_to_wake(&mut self, id: SessionId, events: &mut Vec<Event>) {
        let Some(session) = self.known(id) else {
            self.waking.remove(&id);
            return;
        };
        let (digest, gone) = (session.newest().digest, session.gone());
        let kept = session.kept.filter(|(of, _)| *of == digest);
        let kept = kept.map_or(Need::default(), |(_, kept)| kept);
        let Some(waking) = self.waking.get_mut(&id) else {
            return;
        };
        let need = waking.need.within(gone);
        // A core can be read out of the sums.
        let enough = (kept.sums || !need.sums) && (kept.core || kept.sums || !need.core);
        if need.any() && enough {
            let need = Need {
                core: need.core && kept.core,
                sums: need.sums || !kept.core,
            };
            (waking.stage, waking.asked) = (Stage::Asked, need);
            events.push(Event::Wanted {
                session: id,
                digest,
                need,
            });
            return;
        }
        waking.stage = Stage::Reads;
        self.read_again(id, events);
    }

    fn read_again(&mut self, id: SessionId, events: &mut Vec<Event>) {
        self.awake(id);
        let (Some(generator), Some(session)) =
            (self.machine.generator(), self.sessions.get_mut(&id))
        else {
            return;
        };
        if !session.gone().any() {
            return;
        }
        self.tiers.reread += 1;
        session.reread();
        // A log without tokens is read at once.
        session.settle(&mut Context {
            generator,
            machine: &*self.machine,
            allocator: &mut self.allocator,
            cores: &self.cores,
            traces: &self.traces,
            events,
        });
    }

    pub(super) fn saved(&mut self, id: SessionId, digest: Digest, kept: Need) {
        self.saving.remove(&id);
        let session = self
            .sessions
            .get_mut(&id)
            .or_else(|| self.asleep.get_mut(&id));
        if let Some(session) = session.filter(|session| session.newest().digest == digest) {
            session.kept = Some((digest, kept));
        }
    }

    pub(super) fn restored(
        &mut self,
        id: SessionId,
        snapshot: Option<Snapshot>,
        events: &mut Vec<Event>,
    ) {
        let Some(waking) = self
            .waking
            .get_mut(&id)
            .filter(|waking| waking.stage == Stage::Asked)
        else {
            return; // It was closed meanwhile.
        };
        let asked = waking.asked;
        // It may need more by now.
        waking.stage = Stage::Waits;
        self.awake(id);
        let (Some(generator), Some(session)) =
            (self.machine.generator(), self.sessions.get_mut(&id))
        else {
            return;
        };
        let came = snapshot.map(|snapshot| {
            session.install(
                snapshot,
                (generator, &*self.machine),
                &self.cores,
                &self.traces,
            )
        });
        if matches!(came, Some(Ok(()))) && !session.gone().within(asked).any() {
            self.tiers.promoted_disk += 1;
            return;
        }
        // What was to be there is not, or is of no use.
        session.kept = None;
        if let Some(waking) = self.waking.get_mut(&id) {
            waking.stage = Stage::Reads;
        }
        self.read_again(id, events);
    }

    /// Forgets that a session is asked for. What waits for it is refused as the session's end says.
    pub(super) fn leave(&mut self, id: SessionId, events: &mut Vec<Event>) -> Option<Session> {
        self.saving.remove(&id);
        let waking = self.waking.remove(&id).unwrap_or_default();
        for command in waking.commands {
            match command {
                Command::Export { request, .. } => events.push(Event::Failed {
                    request,
                    error: RequestError::SessionClosed { session: id },
                }),
                Command::Fork { from, to } => events.push(Event::SessionFailed {
                    session: to,
                    rejected: Rejected::Fork { from },
                    error: SessionError::UnknownSession { session: from },
                }),
                _ => {}
            }
        }
        self.sessions
            .remove(&id)
            .or_else(|| self.asleep.remove(&id))
    }

    /// Takes an export that waits for its session out.
    pub(super) fn take_kept_back(&mut self, request: crate::ids::RequestId) -> bool {
        let of = |command: &Command| {
            is_request(command)
                && matches!(command, Command::Export { request: of, .. } if *of == request)
        };
        let mut found = false;
        for waking in self.waking.values_mut() {
            let before = waking.commands.len();
            waking.commands.retain(|command| !of(command));
            found |= waking.commands.len() < before;
        }
        found
    }
}

/// Whether no snapshot was made of its newest version.
fn is_fresh(session: &Session) -> bool {
    let digest = session.newest().digest;
    !session.gone().core && session.kept.is_none_or(|(of, _)| of != digest)
}
