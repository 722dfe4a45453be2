//! What commands make of requests: checked, put in line, cancelled; and the version that one is pinned to.
//!
//! Start at [`Engine::enqueue`].

use std::time::Instant;

use super::Engine;
use crate::{
    command::{Chosen, Sampling},
    error::RequestError,
    event::{Event, Finish},
    ids::{RequestId, SessionId, TenantId, TokenId, Version},
    machine::Machine,
    request::{Adapter, Pin, Request, Work},
    sampling::Sampler,
    session::{Fold, Folding, Session},
};

impl Engine {
    pub(super) fn cancel(&mut self, id: RequestId, now: Instant, events: &mut Vec<Event>) {
        if self.take_kept_back(id) {
            events.push(Event::Failed {
                request: id,
                error: RequestError::Cancelled,
            });
        }
        for request in self.remove_requests(|request| request.id == id) {
            events.push(if request.generates() {
                request.finished(Finish::Cancelled, now)
            } else {
                Event::Failed {
                    request: id,
                    error: RequestError::Cancelled,
                }
            });
        }
    }

    /// Takes requests out of the queues, and their blocks back.
    pub(super) fn remove_requests(&mut self, ends: impl Fn(&Request) -> bool) -> Vec<Request> {
        let (mut ended, waiting): (Vec<Request>, _) = std::mem::take(&mut self.waiting)
            .into_iter()
            .partition(&ends);
        self.waiting = waiting.into();
        let parked = std::mem::take(&mut self.parked);
        let (parked, others): (Vec<_>, _) = parked.into_iter().partition(&ends);
        self.parked = others.into();
        ended.extend(parked);
        ended.extend(self.running.extract_if(.., |request| ends(request)));
        for request in &mut ended {
            self.allocator.release(&mut request.blocks);
        }
        ended
    }

    /// The work of a generation and the tokens that the cache must hold for it.
    pub(super) fn generation(
        &self,
        prompt: &[TokenId],
        max_tokens: usize,
        sampling: Sampling,
        eos: Vec<TokenId>,
    ) -> Result<(Work, usize), RequestError> {
        self.check_prompt(prompt)?;
        let limit = self.model.context_length;
        let room = limit.saturating_sub(prompt.len());
        if room == 0 {
            return Err(RequestError::ContextLength {
                tokens: prompt.len().saturating_add(1),
                limit,
            });
        }
        let max_tokens = max_tokens.min(room);
        let sampler = Box::new(Sampler::new(sampling, prompt)?);
        Ok((
            Work::Generate {
                sampler,
                eos,
                max_tokens,
                drawn: 0,
            },
            prompt.len() + max_tokens,
        ))
    }

    pub(super) fn scoring(
        &self,
        prompt: &[TokenId],
        continuations: Vec<Vec<TokenId>>,
    ) -> Result<(Work, usize), RequestError> {
        self.check_prompt(prompt)?;
        if let Some(index) = continuations.iter().position(Vec::is_empty) {
            return Err(RequestError::EmptyContinuation { index });
        }
        for continuation in &continuations {
            self.check_tokens(continuation)?;
        }
        let longest = continuations
            .iter()
            .map(Vec::len)
            .max()
            .ok_or(RequestError::NoContinuation)?;
        let (tokens, limit) = (
            prompt.len().saturating_add(longest),
            self.model.context_length,
        );
        if tokens > limit {
            return Err(RequestError::ContextLength { tokens, limit });
        }
        Ok((
            Work::Score {
                continuations,
                scores: Vec::new(),
                greedy: Vec::new(),
            },
            tokens,
        ))
    }

    fn check_prompt(&self, prompt: &[TokenId]) -> Result<(), RequestError> {
        if prompt.is_empty() {
            Err(RequestError::EmptyPrompt)
        } else {
            self.check_tokens(prompt)
        }
    }

    fn check_tokens(&self, tokens: &[TokenId]) -> Result<(), RequestError> {
        let vocab = self.model.vocab;
        match tokens.iter().find(|token| token.0 as usize >= vocab) {
            Some(&token) => Err(RequestError::TokenOutOfRange { token, vocab }),
            None => Ok(()),
        }
    }

    pub(super) fn enqueue(
        &mut self,
        (id, tenant): (RequestId, TenantId),
        mut adapter: Adapter,
        prompt: Vec<TokenId>,
        asked: Result<(Work, usize), RequestError>,
        now: Instant,
        events: &mut Vec<Event>,
    ) {
        let known = self
            .waiting
            .iter()
            .chain(&self.running)
            .chain(&self.parked)
            .any(|request| request.id == id);
        let checked = asked.and_then(|(work, length)| {
            let limit = self.allocator.capacity_tokens();
            if known {
                Err(RequestError::RequestExists)
            } else if let Some(session) = adapter.session.filter(|&session| !self.is_known(session))
            {
                Err(RequestError::UnknownSession { session })
            } else if !adapter.scale.is_finite() {
                Err(RequestError::Sampling {
                    field: "adapter_scale",
                    value: adapter.scale,
                    range: "finite",
                })
            } else if length > limit {
                Err(RequestError::CacheLength {
                    tokens: length,
                    limit,
                })
            } else {
                Ok((work, length))
            }
        });
        match checked {
            Ok((work, _)) => {
                let number = self.arrived;
                self.arrived += 1;
                adapter.chosen.gated &= self.machine.gate().is_some();
                let request = Request::new((id, tenant), adapter, prompt, work, number, now);
                self.line_up(request);
            }
            Err(error) => events.push(Event::Failed { request: id, error }),
        }
    }

    pub(super) fn export(&self, request: RequestId, id: SessionId) -> Result<Event, RequestError> {
        let session = self
            .sessions
            .get(&id)
            .ok_or(RequestError::UnknownSession { session: id })?;
        let generator = self.machine.generator().ok_or(RequestError::NoGenerator)?;
        let newest = session.newest();
        let core = newest
            .core
            .as_ref()
            .ok_or(RequestError::NoVersion { session: id })?;
        let export = generator
            .export_peft(core.core())
            .map_err(|error| RequestError::Export {
                reason: error.to_string(),
            })?;
        Ok(Event::Exported {
            request,
            config_json: export.config_json,
            safetensors: export.safetensors,
            rank: export.rank,
            version: newest.version,
            digest: newest.digest,
        })
    }

    /// The newest version of the request's session, made of what it names; the bare model for scale 0.
    pub(super) fn pin(&self, request: &mut Request) -> Pin {
        let composed = request.composing.take().map(|(_, folding)| folding.done());
        let adapter = &request.adapter;
        let session = adapter.session.and_then(|id| self.sessions.get(&id));
        let Some(session) = session
            .filter(|session| adapter.scale != 0.0 && session.newest().version != Version(0))
        else {
            return Pin::default();
        };
        let newest = session.newest();
        if let Some(Fold {
            digest,
            tokens,
            core,
            ..
        }) = composed.filter(|fold| self.fits(fold))
        {
            return Pin {
                version: newest.version,
                digest: Some(digest),
                core: core.map(|core| self.cores.hold(core)),
                tokens,
            };
        }
        Pin {
            version: newest.version,
            digest: Some(newest.digest),
            core: newest.core.clone(),
            tokens: newest.tokens,
        }
    }

    fn fits(&self, fold: &Fold) -> bool {
        let core = fold.core.as_ref();
        core.is_none_or(|core| self.cores.check(core, None).is_ok())
    }

    /// Reads out what the request at this place in the line is made of, as long as portions are given; says whether that is done. If
    /// the session has a new version meanwhile it is begun again, and then done at once: nothing that was forgotten is answered with,
    /// and nobody waits for ever.
    pub(super) fn compose(&mut self, index: usize, portion: &mut dyn FnMut() -> bool) -> bool {
        let Some(request) = self.waiting.get_mut(index) else {
            return true;
        };
        let adapter = &request.adapter;
        let session = adapter.session.and_then(|id| self.sessions.get(&id));
        let session = session
            .filter(|session| adapter.scale != 0.0 && session.newest().version != Version(0));
        let Some(session) = session else {
            request.composing = None;
            return true;
        };
        let version = session.newest().version;
        let (mut folding, late) = match request.composing.take() {
            Some((at, folding)) if at == version => (folding, false),
            begun => match composed(session, &request.adapter.chosen, &*self.machine) {
                Some(folding) => (folding, begun.is_some()),
                None => return true,
            },
        };
        while !folding.is_done() {
            if !portion() && !late {
                request.composing = Some((version, folding));
                return false;
            }
            if folding.go_on(&*self.machine).is_err() {
                // The newest version is left, whose own read-out went well.
                return true;
            }
        }
        request.composing = Some((version, folding));
        true
    }
}

/// The fold of some of what a session was told, to be read out; none if it cannot be had.
fn composed(session: &Session, chosen: &Chosen, machine: &dyn Machine) -> Option<Folding> {
    let generator = machine.generator()?;
    let folding = if chosen.parts.is_empty() && chosen.gated {
        session.gated_fold(machine)
    } else {
        session.fold_of(chosen, (generator, machine))
    };
    folding.ok().flatten()
}
