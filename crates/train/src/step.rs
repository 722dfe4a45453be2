//! One batch through the model: its loss, what it was made of, and with it the gradients.
//!
//! Contexts are read without gradients; cores and queries are differentiable in the trainee's tensors; teachers run on
//! the contexts' own keys and values. Start at [`Model::losses`].

use std::{cell::RefCell, ops::Range};

use candle_core::{DType, Tensor, backprop::GradStore};
use generator::{Adapted, Seen, SiteId, Trainee};
use kernels::{Likeliest, Says, Teacher};
use lm::{KvCache, Lm, Row, text::TokenId};

use crate::{
    Error,
    batch::{Batch, Kind, Query},
    recipe::{Losses, Strategy, Term},
    teacher::{Key, Said, key},
};

/// Sums over the scored tokens of one kind of query.
#[derive(Clone, Copy, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub(crate) struct Figures {
    pub(crate) tokens: u64,
    pub(crate) ce: f64,
    pub(crate) kl: f64,
    pub(crate) right: u64,
}

impl Figures {
    pub(crate) fn add(&mut self, other: &Self) {
        self.tokens += other.tokens;
        self.ce += other.ce;
        self.kl += other.kl;
        self.right += other.right;
    }

    /// Nats per token of what the kind is measured by.
    pub(crate) fn mean(&self, kind: Kind) -> f64 {
        let sum = if kind == Kind::Negative {
            self.kl
        } else {
            self.ce
        };
        sum / self.tokens.max(1) as f64
    }
}

/// What came of a batch.
pub(crate) struct Outcome {
    /// Weighted, divided and summed; `None` if nothing was scored.
    pub(crate) loss: Option<Tensor>,
    /// By [`Kind::ALL`].
    pub(crate) figures: [Figures; 4],
}

impl Outcome {
    /// The loss as a number; 0 if nothing was scored.
    pub(crate) fn value(&self) -> Result<f64, Error> {
        Ok(match &self.loss {
            Some(loss) => loss.to_dtype(DType::F64)?.to_scalar()?,
            None => 0.0,
        })
    }

    pub(crate) fn backward(&self) -> Result<Option<GradStore>, Error> {
        Ok(self.loss.as_ref().map(Tensor::backward).transpose()?)
    }
}

/// The frozen model, and how contexts are read.
pub(crate) struct Model<'a> {
    pub(crate) lm: &'a Lm,
    pub(crate) strategy: Strategy,
    pub(crate) losses: Losses,
    /// What teachers said, where they are known by their likeliest tokens.
    pub(crate) said: Option<RefCell<Said>>,
}

/// What the windows of a batch left: one after the other in `order`.
struct Read {
    seen: Vec<Seen>,
    /// Normed embeddings [T, D].
    u: Tensor,
    /// Rows of each window.
    windows: Vec<Range<usize>>,
}

/// A prompt is a list of places of one token each: sequences that share a beginning name the same.
const BLOCK: usize = 1;

impl Model<'_> {
    /// The loss of a batch. `adapt`: with the cores of its contexts, else the bare model (figures only);
    /// `teach`: with the teachers that the losses call for.
    pub(crate) fn losses(
        &self,
        trainee: &Trainee,
        batch: &Batch,
        adapt: bool,
    ) -> Result<Outcome, Error> {
        let taught: Vec<usize> = (0..batch.queries.len())
            .filter(|&query| adapt && self.taught(batch.queries[query].kind))
            .collect();
        let known: Vec<Option<Likeliest>> = taught
            .iter()
            .map(|&query| self.known(batch, query))
            .collect();
        let asked: Vec<usize> = taught
            .iter()
            .zip(&known)
            .filter(|(_, known)| known.is_none())
            .map(|(&query, _)| query)
            .collect();
        let slots = batch.windows.iter().map(Vec::len).sum::<usize>();
        let behind = asked
            .iter()
            .map(|&query| batch.queries[query].tokens.len())
            .sum::<usize>();
        let kv = self.lm.training_cache((slots + behind).max(1), BLOCK)?;
        let from_windows = asked
            .iter()
            .any(|&query| batch.queries[query].kind != Kind::Negative);

        let mut cores = Vec::new(); // [J, R1, R2] of each site
        let mut places = Vec::new();
        if adapt && !batch.windows.is_empty() {
            let read;
            (read, places) = self.read(trainee, batch, &kv, from_windows)?;
            cores = trainee.cores(&read.seen, &read.u, &read.windows, &batch.groups)?;
        }
        let says = self.ask(batch, &asked, &places, slots, &kv)?;
        let teacher = self.teacher(batch, &taught, known, says)?;
        drop(kv);

        let sequences: Vec<(&[TokenId], usize)> = batch
            .queries
            .iter()
            .map(|query| (&query.tokens[..query.tokens.len() - 1], query.scored))
            .collect();
        let of_row: Vec<Option<usize>> = batch
            .queries
            .iter()
            .map(|query| adapt.then_some(query.core))
            .collect();
        let adapted = Adapted::new(trainee, &cores, &of_row);
        let hidden = self
            .lm
            .differentiable(&sequences, adapt.then_some(&adapted as _))?;
        let Some(hidden) = hidden else {
            return Ok(Outcome {
                loss: None,
                figures: Default::default(),
            });
        }; // [N, D]
        self.score(batch, &hidden, teacher.as_ref())
    }

    fn term(&self, kind: Kind) -> Term {
        match kind {
            Kind::Reconstruction => self.losses.reconstruction,
            Kind::Completion => self.losses.completion,
            Kind::Answer => self.losses.answer,
            Kind::Negative => self.losses.negative,
        }
    }

    fn taught(&self, kind: Kind) -> bool {
        kind == Kind::Negative || self.term(kind).teacher > 0.0
    }

    /// Reads all windows; the places in the cache of each.
    fn read(
        &self,
        trainee: &Trainee,
        batch: &Batch,
        kv: &KvCache,
        fill: bool,
    ) -> Result<(Read, Vec<Vec<u32>>), Error> {
        let sites: Vec<SiteId> = trainee.sites().iter().map(|site| site.id).collect();
        let mut next = 0;
        let places: Vec<Vec<u32>> = batch
            .windows
            .iter()
            .map(|window| {
                let first = next;
                next += window.len() as u32;
                (first..next).collect()
            })
            .collect();
        let rounds = match self.strategy {
            Strategy::Parallel => vec![(0..batch.windows.len()).collect()],
            Strategy::Sequential => rounds(batch),
        };
        let frozen = trainee.detached();
        let mut windows = vec![0..0; batch.windows.len()];
        let (mut parts, mut tokens): (Vec<Vec<Seen>>, Vec<TokenId>) = (Vec::new(), Vec::new());
        for (number, round) in rounds.iter().enumerate() {
            // The core of the windows that were read before, each in the group that ends with them.
            let (mut cores, mut of_row) = (Vec::new(), vec![None; round.len()]);
            if number > 0 {
                let before: Vec<Vec<usize>> = round.iter().map(|&w| before(batch, w)).collect();
                let u = self.lm.normed_embeddings(&tokens)?; // [T, D]
                cores = frozen.cores(&joined(&parts)?, &u, &windows, &before)?;
                of_row = (0..round.len()).map(Some).collect();
            }
            let mut rows: Vec<Row<'_>> = round
                .iter()
                .map(|&window| Row {
                    tokens: &batch.windows[window],
                    position: 0,
                    blocks: &places[window],
                    core: None,
                    scale: 1.0,
                    window: None,
                    lookahead: None,
                    logits: 0,
                })
                .collect();
            let adapted = Adapted::new(&frozen, &cores, &of_row);
            let adapter = (number > 0).then_some(&adapted as _);
            parts.push(self.lm.observe(&mut rows, kv, &sites, adapter, fill)?);
            for &window in round {
                let first = tokens.len();
                tokens.extend(&batch.windows[window]);
                windows[window] = first..tokens.len();
            }
        }
        let read = Read {
            seen: joined(&parts)?,
            u: self.lm.normed_embeddings(&tokens)?,
            windows,
        };
        Ok((read, places))
    }

    /// The name of what is said of a query, if that is kept: of a row's question, which is drawn again. Spans of text are not.
    fn key(&self, batch: &Batch, query: usize) -> Option<Key> {
        let query = &batch.queries[query];
        let context: &[TokenId] = match query.kind {
            Kind::Answer => &batch.windows[query.window],
            Kind::Negative if query.scored + 1 < query.tokens.len() => &[],
            Kind::Negative | Kind::Reconstruction | Kind::Completion => return None,
        };
        Some(key(context, &query.tokens, query.scored))
    }

    /// What a teacher said of a query before.
    fn known(&self, batch: &Batch, query: usize) -> Option<Likeliest> {
        let said = self.said.as_ref()?.borrow();
        let known = said.get(&self.key(batch, query)?)?;
        (known.len() == batch.queries[query].scored).then(|| known.clone())
    }

    /// The teacher of all taught queries, of what was known and what is said now of the others, in order.
    fn teacher(
        &self,
        batch: &Batch,
        taught: &[usize],
        known: Vec<Option<Likeliest>>,
        says: Option<Tensor>,
    ) -> Result<Option<Teacher>, Error> {
        if taught.is_empty() {
            return Ok(None);
        }
        let says = match (&self.said, says) {
            (None, Some(hidden)) => Says::Hidden(hidden),
            (None, None) => return Ok(None),
            (Some(said), hidden) => {
                let mut said = said.borrow_mut();
                let now = match hidden {
                    Some(hidden) => kernels::likeliest(self.lm.head(), &hidden, said.count)?,
                    None => Likeliest::default(),
                };
                let mut all = Likeliest {
                    count: said.count,
                    ..Likeliest::default()
                };
                let mut from = 0;
                for (&query, known) in taught.iter().zip(known) {
                    let own = known.unwrap_or_else(|| {
                        let here = from..from + batch.queries[query].scored * said.count;
                        from = here.end;
                        let own = Likeliest {
                            count: said.count,
                            tokens: now.tokens[here.clone()].to_vec(),
                            probabilities: now.probabilities[here].to_vec(),
                        };
                        if let Some(key) = self.key(batch, query) {
                            said.put(key, own.clone());
                        }
                        own
                    });
                    all.tokens.extend(own.tokens);
                    all.probabilities.extend(own.probabilities);
                }
                Says::Likeliest(all)
            }
        };
        let mut at = Vec::new();
        let (mut row, mut asked) = (0, taught.iter().peekable());
        for (index, query) in batch.queries.iter().enumerate() {
            let here = asked.next_if_eq(&&index).is_some();
            let share = if query.kind == Kind::Negative {
                1.0
            } else {
                self.term(query.kind).teacher as f32
            };
            for _ in 0..query.scored {
                at.push(here.then_some((row, share)));
                row += usize::from(here);
            }
        }
        Ok(Some(Teacher { says, at }))
    }

    /// What teachers have for the head: the in-context model on the query's own window, the bare one on a negative. [M, D]
    fn ask(
        &self,
        batch: &Batch,
        asked: &[usize],
        places: &[Vec<u32>],
        mut next: usize,
        kv: &KvCache,
    ) -> Result<Option<Tensor>, Error> {
        if asked.is_empty() {
            return Ok(None);
        }
        let blocks: Vec<Vec<u32>> = asked
            .iter()
            .map(|&query| {
                let query = &batch.queries[query];
                let mut blocks = match query.kind {
                    Kind::Negative => Vec::new(),
                    Kind::Reconstruction | Kind::Completion | Kind::Answer => {
                        places[query.window].clone()
                    }
                };
                blocks.extend(next as u32..(next + query.tokens.len()) as u32);
                next += query.tokens.len();
                blocks
            })
            .collect();
        let mut rows: Vec<Row<'_>> = asked
            .iter()
            .zip(&blocks)
            .map(|(&query, blocks)| {
                let query = &batch.queries[query];
                Row {
                    tokens: &query.tokens[..query.tokens.len() - 1],
                    position: blocks.len() - query.tokens.len(),
                    blocks,
                    core: None,
                    scale: 1.0,
                    window: None,
                    lookahead: None,
                    logits: query.scored,
                }
            })
            .collect();
        Ok(self.lm.hidden(&mut rows, kv)?) // [M, D]
    }

    fn score(
        &self,
        batch: &Batch,
        hidden: &Tensor,
        teacher: Option<&Teacher>,
    ) -> Result<Outcome, Error> {
        let scored = |query: &Query| query.tokens.len() - query.scored..query.tokens.len();
        let targets: Vec<u32> = batch
            .queries
            .iter()
            .flat_map(|query| query.tokens[scored(query)].iter().map(|token| token.0))
            .collect();
        let scores = kernels::score(self.lm.head(), hidden, &targets, teacher)?;
        let mut figures = [Figures::default(); 4];
        let mut kinds = Vec::with_capacity(targets.len());
        for query in &batch.queries {
            kinds.extend(std::iter::repeat_n(query.kind, query.scored));
        }
        for (index, kind) in kinds.iter().enumerate() {
            figures[*kind as usize].add(&Figures {
                tokens: 1,
                ce: f64::from(scores.ce[index]),
                kl: f64::from(scores.kl[index]),
                right: u64::from(scores.right[index]),
            });
        }
        let factor = |kind: Kind| {
            let term = self.term(kind);
            let count = figures[kind as usize].tokens as f64;
            term.weight / term.tokens.unwrap_or(count.max(term.at_least))
        };
        let factors: Vec<f32> = kinds.iter().map(|kind| factor(*kind) as f32).collect();
        let factors = Tensor::from_vec(factors, targets.len(), hidden.device())?
            .to_dtype(scores.loss.dtype())?; // [N]
        Ok(Outcome {
            loss: Some((scores.loss * factors)?.sum_all()?),
            figures,
        })
    }
}

/// The windows that come before one in a group that it is in.
fn before(batch: &Batch, window: usize) -> Vec<usize> {
    let group = batch.groups.iter().find(|group| group.contains(&window));
    let group = group.map_or(&[][..], Vec::as_slice);
    group
        .iter()
        .copied()
        .take_while(|&other| other != window)
        .collect()
}

/// Windows by how many come before them.
fn rounds(batch: &Batch) -> Vec<Vec<usize>> {
    let mut rounds: Vec<Vec<usize>> = Vec::new();
    for window in 0..batch.windows.len() {
        let depth = before(batch, window).len();
        rounds.resize_with(rounds.len().max(depth + 1), Vec::new);
        rounds[depth].push(window);
    }
    rounds
}

/// The same sites, one part's rows behind the other's.
fn joined(parts: &[Vec<Seen>]) -> Result<Vec<Seen>, Error> {
    if let [only] = parts {
        return Ok(only.clone());
    }
    let sites = parts.first().map_or(0, Vec::len);
    let join = |site: usize| -> Result<Seen, Error> {
        let of = |part: fn(&Seen) -> &Tensor| {
            let tensors: Vec<&Tensor> = parts.iter().map(|seen| part(&seen[site])).collect();
            Tensor::cat(&tensors, 0)
        };
        Ok(Seen {
            x: of(|seen| &seen.x)?,
            h: of(|seen| &seen.h)?,
        })
    };
    (0..sites).map(join).collect()
}

#[cfg(test)]
mod tests;
