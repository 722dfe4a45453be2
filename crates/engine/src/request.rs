//! A request: what is to be answered, how far it is, and the version that it is pinned to.
//!
//! Generation and scoring are one thing here: a sequence that is fed to the model, and rows of logits that come back. Start
//! at [`Request::took`].

use std::time::{Duration, Instant};

use crate::{
    blocks::{BlockAllocator, Blocks},
    command::Chosen,
    cores::{HeldCore, Slot},
    event::{Event, Finish, Timings},
    ids::{Digest, RequestId, SessionId, TenantId, TokenId, Version},
    machine::Draw,
    prefix::PrefixKey,
    sampling::{Drawn, Sampler, score},
    session::Folding,
};

/// Most rows of logits that one request asks of a step: they are the largest thing in it (V floats each).
const SCORED_ROWS: usize = 128;

/// The imprint that a request asks for.
#[derive(Clone, Debug, Default)]
pub(crate) struct Adapter {
    /// None is the bare model.
    pub(crate) session: Option<SessionId>,
    pub(crate) scale: f32,
    /// What it is made of.
    pub(crate) chosen: Chosen,
}

/// What a request runs with, from its first token to its last.
#[derive(Clone, Debug, Default)]
pub(crate) struct Pin {
    pub(crate) version: Version,
    pub(crate) digest: Option<Digest>,
    pub(crate) core: Option<HeldCore>,
    /// Context tokens in it.
    pub(crate) tokens: usize,
}

impl Pin {
    /// What there is of a core and its strength, as far as keys and values depend on it.
    fn adapter(&self, scale: f32) -> Option<(Digest, f32)> {
        self.core.as_ref()?;
        Some((self.digest?, scale))
    }
}

/// What is asked.
#[derive(Debug)]
pub(crate) enum Work {
    Generate {
        sampler: Box<Sampler>,
        eos: Vec<TokenId>,
        max_tokens: usize,
        /// Tokens drawn.
        drawn: usize,
    },
    Score {
        continuations: Vec<Vec<TokenId>>,
        /// Of those that are done, and of the one under way.
        scores: Vec<Vec<(TokenId, f32)>>,
        greedy: Vec<bool>,
    },
}

/// A request.
#[derive(Debug)]
pub(crate) struct Request {
    pub(crate) id: RequestId,
    pub(crate) tenant: TenantId,
    pub(crate) adapter: Adapter,
    prompt_tokens: usize,
    /// Tokens to be fed: the prompt, and what follows it as far as it is known.
    sequence: Vec<TokenId>,
    /// Tokens of it whose KV is in the blocks.
    fed: usize,
    /// Tokens of the prompt whose KV was there when it started.
    cached: usize,
    /// Names of the blocks of what has been computed with the pin: of none, of the first, and so on.
    names: Vec<PrefixKey>,
    /// The first so many blocks are known to the cache by their names.
    offered: usize,
    work: Work,
    /// Its place in the order of arrival.
    pub(crate) number: u64,
    arrived: Instant,
    started: Option<Instant>,
    first_token: Option<Instant>,
    pub(crate) pin: Pin,
    /// What it will be pinned to, while its core is being read out, and the session's version then.
    pub(crate) composing: Option<(Version, Folding)>,
    pub(crate) blocks: Blocks,
}

impl Request {
    /// A request that waits. Its tokens are checked; every continuation has one.
    pub(crate) fn new(
        (id, tenant): (RequestId, TenantId),
        adapter: Adapter,
        prompt: Vec<TokenId>,
        work: Work,
        number: u64,
        now: Instant,
    ) -> Self {
        let mut request = Self {
            id,
            tenant,
            adapter,
            prompt_tokens: prompt.len(),
            sequence: prompt,
            fed: 0,
            cached: 0,
            names: Vec::new(),
            offered: 0,
            work,
            number,
            arrived: now,
            started: None,
            first_token: None,
            pin: Pin::default(),
            composing: None,
            blocks: Blocks::default(),
        };
        request.next_continuation();
        request
    }

    /// Tokens of it that are known but not read.
    pub(crate) fn unread(&self) -> usize {
        self.sequence.len() - self.fed
    }

    /// How long it has run by now.
    pub(crate) fn ran(&self, now: Instant) -> Duration {
        self.started.map_or(Duration::ZERO, |started| {
            now.saturating_duration_since(started)
        })
    }

    /// Whose it is, and its place in the order of arrival.
    pub(crate) fn place(&self) -> (TenantId, u64) {
        (self.tenant, self.number)
    }

    /// Whether it has run before: its version is settled then.
    pub(crate) fn has_started(&self) -> bool {
        self.started.is_some()
    }

    /// Takes the blocks that begin as it does from the cache: what they hold need not be computed. One token at least is left,
    /// as its logits are asked for.
    pub(crate) fn reuse(&mut self, allocator: &mut BlockAllocator) {
        if self.names.is_empty() {
            let adapter = self.pin.adapter(self.adapter.scale);
            self.names.push(PrefixKey::root(self.tenant, adapter));
        }
        let known = match self.work {
            Work::Generate { .. } => self.sequence.len(),
            Work::Score { .. } => self.prompt_tokens,
        };
        let size = allocator.block_size();
        for index in 0..(known - 1) / size {
            let Some(name) = self.name(index, size) else {
                break;
            };
            if !allocator.share(&mut self.blocks, &name) {
                break;
            }
        }
        self.offered = self.blocks.len();
        self.fed = self.offered * size;
    }

    /// Begins to run, or goes on.
    pub(crate) fn start(&mut self, now: Instant) {
        if self.started.is_none() {
            self.started = Some(now);
            self.cached = self.fed;
        }
    }

    /// Gives its blocks back; what they held is computed again when it goes on, from the prompt and the tokens so far. As decoding and
    /// prefill are one, it goes on as if nothing had been. A score begins the continuation under way again.
    pub(crate) fn give_back(&mut self, allocator: &mut BlockAllocator) {
        allocator.release(&mut self.blocks);
        (self.fed, self.offered) = (0, 0);
        if let Work::Score { scores, greedy, .. } = &mut self.work
            && let (Some(scores), Some(greedy)) = (scores.last_mut(), greedy.last_mut())
        {
            scores.clear();
            *greedy = true;
        }
        if self.started.is_none() {
            self.pin = Pin::default();
            self.names.clear();
        }
    }

    /// Tokens of it that are known: its blocks have to hold them before it goes on.
    pub(crate) fn len(&self) -> usize {
        self.sequence.len()
    }

    /// Tokens of the prompt whose KV was there when it started.
    pub(crate) fn cached(&self) -> usize {
        self.cached
    }

    /// Tokens of the prompt.
    pub(crate) fn prompt_tokens(&self) -> usize {
        self.prompt_tokens
    }

    /// The name of the block at this index, all of whose tokens are known.
    fn name(&mut self, index: usize, size: usize) -> Option<PrefixKey> {
        for known in self.names.len()..index + 2 {
            let tokens = self.sequence.get((known - 1) * size..known * size)?;
            self.names.push(self.names.last()?.then(tokens));
        }
        self.names.get(index + 1).copied()
    }

    /// Names the blocks that have become full, for others to take. What follows the prompt of a score changes from one
    /// continuation to the next; with the prompt's last token it is nobody else's.
    pub(crate) fn offer(&mut self, allocator: &mut BlockAllocator) {
        let lasting = match self.work {
            Work::Generate { .. } => self.fed,
            Work::Score { .. } => self.fed.min(self.prompt_tokens - 1),
        };
        let size = allocator.block_size();
        for index in self.offered..lasting / size {
            if let Some(name) = self.name(index, size) {
                allocator.name(&self.blocks, index, name);
                self.offered = index + 1;
            }
        }
    }

    /// Whether it asks for nothing but the version.
    pub(crate) fn asks_nothing(&self) -> bool {
        matches!(self.work, Work::Generate { max_tokens: 0, .. })
    }

    /// Whether it is a running answer, which feeds one token a step. One that is computed again is not: it is read like a prompt.
    pub(crate) fn decodes(&self) -> bool {
        matches!(self.work, Work::Generate { drawn: 1.., .. })
            && self.sequence.len() - self.fed == 1
    }

    /// How many tokens could run next.
    pub(crate) fn wants(&self) -> usize {
        let rest = self.sequence.len() - self.fed;
        match self.work {
            Work::Generate { .. } => rest,
            Work::Score { .. } => {
                rest.min((self.prompt_tokens - 1).saturating_sub(self.fed) + SCORED_ROWS)
            }
        }
    }

    /// Rows of logits that the next so many tokens ask for.
    pub(crate) fn logits(&self, tokens: usize) -> usize {
        let end = self.fed + tokens;
        match self.work {
            Work::Generate { .. } => usize::from(end == self.sequence.len()),
            Work::Score { .. } => end.saturating_sub(self.fed.max(self.prompt_tokens - 1)),
        }
    }

    /// The next row, of so many tokens, and where its core is.
    pub(crate) fn row(&self, tokens: usize) -> (lm::Row<'_>, Option<Slot>) {
        let end = (self.fed + tokens).min(self.sequence.len());
        let row = lm::Row {
            tokens: &self.sequence[self.fed..end],
            position: self.fed,
            blocks: self.blocks.as_slice(),
            core: self.pin.core.as_ref().map(HeldCore::core),
            scale: self.adapter.scale,
            window: None,
            lookahead: None,
            logits: self.logits(tokens),
        };
        (row, self.pin.core.as_ref().map(HeldCore::slot))
    }

    /// How a machine may draw the token behind the next row, of so many tokens; none if there is none, or only the logits serve.
    pub(crate) fn draw(&self, tokens: usize) -> Option<Draw<'_>> {
        match &self.work {
            Work::Generate { sampler, .. } if self.logits(tokens) == 1 => sampler.by_machine(),
            Work::Generate { .. } | Work::Score { .. } => None,
        }
    }

    /// Takes what came back for the row of so many tokens: the token that was drawn, or `logits`, V floats for each row of logits that it
    /// asked for. Says whether the request has ended.
    pub(crate) fn took(
        &mut self,
        tokens: usize,
        (drawn_token, logits): (Option<(TokenId, Option<f32>)>, &[f32]),
        vocab: usize,
        now: Instant,
        events: &mut Vec<Event>,
    ) -> bool {
        let rows = self.logits(tokens);
        let first_scored = self.fed.max(self.prompt_tokens - 1) + 1 - self.prompt_tokens;
        self.fed += tokens;
        let known = self.fed == self.sequence.len();
        match &mut self.work {
            Work::Generate {
                sampler,
                eos,
                max_tokens,
                drawn,
            } => {
                if rows == 0 {
                    return false;
                }
                let Drawn {
                    token,
                    logprob,
                    top,
                } = match drawn_token {
                    Some((token, logprob)) => sampler.take(token, logprob),
                    None => sampler.draw(logits),
                };
                self.first_token.get_or_insert(now);
                if eos.contains(&token) {
                    let event = self.finished(Finish::Eos, now);
                    events.push(event);
                    return true;
                }
                *drawn += 1;
                let full = *drawn == *max_tokens;
                self.sequence.push(token);
                events.push(Event::Token {
                    request: self.id,
                    token,
                    logprob,
                    top,
                });
                if full {
                    let event = self.finished(Finish::Length, now);
                    events.push(event);
                }
                full
            }
            Work::Score {
                continuations,
                scores,
                greedy,
            } => {
                let wanted = continuations
                    .get(scores.len() - 1)
                    .and_then(|wanted| wanted.get(first_scored..));
                for (row, &token) in logits.chunks_exact(vocab).zip(wanted.unwrap_or_default()) {
                    let (logprob, likeliest) = score(row, token);
                    if let (Some(scores), Some(greedy)) = (scores.last_mut(), greedy.last_mut()) {
                        scores.push((token, logprob));
                        *greedy &= likeliest;
                    }
                }
                if !known || self.next_continuation() {
                    return false;
                }
                let event = self.scored();
                events.push(event);
                true
            }
        }
    }

    /// Makes the sequence that of the next continuation, if there is one. The prompt's KV stays but for its last token,
    /// whose logits are asked for again. A continuation's own last token need not be fed.
    fn next_continuation(&mut self) -> bool {
        let Work::Score {
            continuations,
            scores,
            greedy,
        } = &mut self.work
        else {
            return false;
        };
        let Some(next) = continuations.get(scores.len()) else {
            return false;
        };
        scores.push(Vec::with_capacity(next.len()));
        greedy.push(true);
        self.sequence.truncate(self.prompt_tokens);
        self.sequence
            .extend_from_slice(&next[..next.len().saturating_sub(1)]);
        self.fed = self.fed.min(self.prompt_tokens - 1);
        true
    }

    /// That an answer has ended.
    pub(crate) fn finished(&self, reason: Finish, now: Instant) -> Event {
        let completion_tokens = match self.work {
            Work::Generate { drawn, .. } => drawn,
            Work::Score { .. } => 0,
        };
        let started = self.started.unwrap_or(now);
        let first_token = self.first_token.unwrap_or(now);
        Event::Finished {
            request: self.id,
            reason,
            version: self.pin.version,
            digest: self.pin.digest,
            prompt_tokens: self.prompt_tokens,
            cached_tokens: self.cached,
            completion_tokens,
            context_tokens: self.pin.tokens,
            timings: Timings {
                queue: started.saturating_duration_since(self.arrived),
                prefill: first_token.saturating_duration_since(started),
                decode: now.saturating_duration_since(first_token),
            },
        }
    }

    fn scored(&mut self) -> Event {
        let (scores, greedy) = match &mut self.work {
            Work::Score { scores, greedy, .. } => (std::mem::take(scores), std::mem::take(greedy)),
            Work::Generate { .. } => (Vec::new(), Vec::new()),
        };
        let (version, prompt_tokens, cached_tokens) =
            (self.pin.version, self.prompt_tokens, self.cached);
        Event::Scored {
            request: self.id,
            scores,
            greedy,
            version,
            prompt_tokens,
            cached_tokens,
        }
    }

    /// Whether it is a generation.
    pub(crate) fn generates(&self) -> bool {
        matches!(self.work, Work::Generate { .. })
    }
}
