//! Leaving: which sessions go out of memory when a budget is short, and what of them is kept.
//!
//! Sessions at rest leave, the one that was spoken of longest ago first: sums and traces when those are short, all when cores are. Nothing
//! waits for that: what leaves follows from the log, so it can go at once; a snapshot saves reading the log again. Start at
//! [`Engine::relieve`].

use std::collections::{BTreeSet, VecDeque};

use super::super::Engine;
use crate::{
    event::Event,
    ids::{Digest, SessionId},
    session::Session,
    snapshot::Need,
};

/// Snapshots that are being kept at a time, however large they are, and at most.
const SAVING: std::ops::Range<usize> = 4..32;
/// Of the budgets of states and cores, what those beyond the first few may take while they are written: one part in so many.
const WRITTEN_PART: usize = 16;
/// Sessions that every step looks at; others that hold nothing sleep.
const AWAKE: usize = 1024;

impl Engine {
    /// Keeps the budgets: what is at rest leaves.
    pub(super) fn relieve(&mut self, events: &mut Vec<Event>) {
        self.make_host_room(0, self.traces.limit() / 8, events);
        // Who needs a slot makes room when it does; what was held all the same goes back here.
        self.make_slot_room(0, events);
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
    pub(super) fn make_host_room(
        &mut self,
        states: usize,
        traces: usize,
        events: &mut Vec<Event>,
    ) -> bool {
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
    pub(in crate::engine) fn make_slot_room(
        &mut self,
        bytes: usize,
        events: &mut Vec<Event>,
    ) -> bool {
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

    /// Bytes that states take in memory.
    pub(in crate::engine) fn resident_bytes(&self) -> usize {
        let sessions = self.sessions.values();
        sessions.fold(0, |sum, session| {
            sum.saturating_add(session.resident_bytes())
        })
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

    /// Sessions that are to stay: requests are about to start with them, or something asks for them.
    fn pinned(&self) -> BTreeSet<SessionId> {
        let waiting = self
            .waiting
            .iter()
            .filter_map(|request| request.adapter.session);
        waiting.chain(self.waking.keys().copied()).collect()
    }

    /// Takes a session out of memory, if it is at rest and nothing asks for it: sums and traces, and the core if it is that of all that the
    /// session was told.
    pub(in crate::engine) fn evict(&mut self, id: SessionId, core: bool, events: &mut Vec<Event>) {
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
            && self.may_save()
            && (beyond(self.resident_bytes(), self.config.state_budget_bytes)
                || beyond(self.traces.used(), self.traces.limit())
                || beyond(self.cores.used(), self.config.core_budget_bytes));
        if !presses {
            return;
        }
        for id in self.restful(is_fresh) {
            if !self.may_save() {
                return;
            }
            self.keep(id, events);
        }
    }

    /// Whether another snapshot may be begun: what is being written is memory beyond the budgets.
    fn may_save(&self) -> bool {
        let budgets =
            (self.config.state_budget_bytes).saturating_add(self.config.core_budget_bytes);
        let written: usize = self.saving.values().sum();
        let some = self.saving.len() < SAVING.end && written < budgets / WRITTEN_PART;
        some || self.saving.len() < SAVING.start
    }

    /// Has a session at rest kept as a snapshot, if that is worth it and was not done for this version.
    fn keep(&mut self, id: SessionId, events: &mut Vec<Event>) {
        let rate = self.config.snapshot_bytes_per_token;
        if rate == 0 || !self.may_save() || self.saving.contains_key(&id) {
            return;
        }
        let session = self.sessions.get_mut(&id);
        let Some(session) = session.filter(|session| is_fresh(session)) else {
            return;
        };
        // Looked at once a version, whether it is worth it or not.
        session.kept = Some((session.newest().digest, Need::default()));
        if let Some(snapshot) = session.snapshot(rate, &*self.machine) {
            self.saving.insert(id, snapshot.bytes());
            events.push(Event::Save {
                session: id,
                snapshot,
            });
        }
    }

    pub(in crate::engine) fn saved(&mut self, id: SessionId, digest: Digest, kept: Need) {
        self.saving.remove(&id);
        let session = self
            .sessions
            .get_mut(&id)
            .or_else(|| self.asleep.get_mut(&id));
        if let Some(session) = session.filter(|session| session.newest().digest == digest) {
            session.kept = Some((digest, kept));
        }
    }
}

/// Whether no snapshot was made of its newest version.
fn is_fresh(session: &Session) -> bool {
    let digest = session.newest().digest;
    !session.gone().core && session.kept.is_none_or(|(of, _)| of != digest)
}
