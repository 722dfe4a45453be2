//! Tiers: what asks for sessions that are not in memory waits here until they are.
//!
//! It waits outside of the queue that requests start from, in order; all else goes on. Which sessions leave stands in `leaving`, how they come back
//! in `waking`. Start at [`Engine::tend`].

mod leaving;
mod waking;

use std::{collections::VecDeque, time::Instant};

use super::Engine;
use crate::{
    command::Command,
    error::{RequestError, SessionError},
    event::{Event, Rejected},
    ids::SessionId,
    request::Request,
    session::Session,
    snapshot::Need,
};

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

impl Waking {
    /// Whether this session is copied from it as soon as it is here.
    fn makes(&self, id: SessionId) -> bool {
        let makes = |command: &Command| matches!(command, Command::Fork { to, .. } if *to == id);
        self.commands.iter().any(makes)
    }
}

/// The session without which a command cannot be carried out.
fn about(command: &Command) -> Option<SessionId> {
    match command {
        Command::Ingest { session, .. }
        | Command::Forget { session, .. }
        | Command::Publish { session, .. }
        | Command::Export { session, .. }
        | Command::Close { session }
        | Command::Fork { from: session, .. } => Some(*session),
        Command::Generate { session, .. } | Command::Score { session, .. } => *session,
        Command::Open { .. }
        | Command::Restored { .. }
        | Command::Saved { .. }
        | Command::Evict { .. }
        | Command::Cancel { .. } => None,
    }
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

    /// Whether somebody has yet to answer `Wanted`, or `Save` of a session that is asked for.
    #[must_use]
    pub fn waits(&self) -> bool {
        let waking = &mut self.waking.iter();
        waking.any(|(id, waking)| waking.stage == Stage::Asked || self.is_written(*id, waking))
    }

    /// Whether a session has to be written before it can come back: it would be read again instead.
    fn is_written(&self, id: SessionId, waking: &Waking) -> bool {
        waking.stage == Stage::Waits && self.saving.contains_key(&id)
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
        let waits = self
            .waking
            .iter()
            .any(|(id, waking)| waking.stage == Stage::Waits && !self.is_written(*id, waking));
        back || (waits && !under_way(Stage::Asked) && !under_way(Stage::Reads))
    }

    /// Passes a command on if its session is here; else keeps it until it is.
    pub(super) fn pass(&mut self, command: Command) -> Option<Command> {
        // A copy that waits for its source is spoken of as if it were there.
        let source = about(&command).filter(|id| !self.is_known(*id));
        let source = source.and_then(|id| self.waking.values_mut().find(|one| one.makes(id)));
        if let Some(source) = source {
            source.commands.push_back(command);
            return None;
        }
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
                Command::Export { request, .. }
                | Command::Generate { request, .. }
                | Command::Score { request, .. } => Event::Failed {
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

    /// Takes a request that waits among the commands for its session out.
    pub(super) fn take_kept_back(&mut self, request: crate::ids::RequestId) -> bool {
        let of = |command: &Command| match command {
            Command::Export { request: of, .. }
            | Command::Generate { request: of, .. }
            | Command::Score { request: of, .. } => *of == request,
            _ => false,
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
