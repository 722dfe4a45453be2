//! Waking: how sessions come back that somebody asks for.
//!
//! By snapshot if one is kept, or their log is read again. A few come back at a time; the first in line comes even where there is no room, so
//! none waits for ever. Start at [`Engine::bring_back`].

use super::{super::Engine, Stage};
use crate::{
    event::Event,
    ids::SessionId,
    session::Context,
    snapshot::{Need, Snapshot},
};

/// Sessions that come back at a time.
const WAKING: usize = 4;

impl Engine {
    /// Begins to bring sessions back, in the order in which they were asked for.
    pub(super) fn bring_back(&mut self, events: &mut Vec<Event>) {
        self.short = false;
        loop {
            let stages = self.waking.values().map(|waking| waking.stage);
            let under_way = stages.filter(|stage| *stage != Stage::Waits).count();
            let waits = self.waking.iter().filter(|(id, waking)| {
                waking.stage == Stage::Waits && !self.is_written(**id, waking)
            });
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

    pub(in crate::engine) fn restored(
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
            portion: &mut || true,
        });
    }
}
