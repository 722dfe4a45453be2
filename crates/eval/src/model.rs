//! The frozen model, asked: cores of contexts, likelihoods of answers, greedy answers.
//!
//! The forward that serves, in batches over cases; a prompt's beginning that several questions share is read once. Knows no task, no
//! method, and not where the forwards run (`seat`). Start at [`Model::hear`].

use std::{
    collections::HashSet,
    ops::Range,
    time::{Duration, Instant},
};

use generator::{Adapter, Core, Generator, State, Strategy, Trace};
use lm::{Lm, Row, TokenId, text::Text};

use relevance::Spoken;

use crate::{
    Error,
    prompt::Document,
    seat::{BLOCK, STEP, Seat},
};

/// Rows of logits of one forward: V floats each.
const ROWS: usize = 160;
/// Tokens whose keys and values are held at once, unless one group needs more.
const HELD: usize = 12 * 1024;
/// Empty lines that an answer may begin with; they are skipped.
const SKIPPED: usize = 4;

/// A model with what it takes to talk to it.
pub(crate) struct Model<'a> {
    seat: Seat<'a>,
    text: &'a Text,
    /// Tokens whose text has a line's end in it.
    breaks: HashSet<TokenId>,
    eos: Vec<TokenId>,
}

/// Questions that share the beginning of their prompt, and the imprint that the model runs with.
pub(crate) struct Group<'a> {
    pub(crate) core: Option<&'a Core>,
    /// Strength of the core.
    pub(crate) scale: f32,
    pub(crate) prefix: Vec<TokenId>,
    pub(crate) asks: Vec<Ask<'a>>,
}

/// One question.
pub(crate) struct Ask<'a> {
    /// The rest of the prompt, at least one token.
    pub(crate) tail: Vec<TokenId>,
    /// The answer that is scored.
    pub(crate) answer: &'a [TokenId],
    /// Other answers that are scored.
    pub(crate) options: &'a [Vec<TokenId>],
    /// Tokens that are generated at most; 0: none.
    pub(crate) max_tokens: usize,
    /// Whether the answer's log-probabilities are kept whole.
    pub(crate) keep: bool,
    /// Kept ones that this question's are compared with.
    pub(crate) bare: Option<&'a [Vec<f32>]>,
}

/// What came of a question.
#[derive(Debug, Default)]
pub(crate) struct Heard {
    /// Of each token of the answer.
    pub(crate) logprobs: Vec<f64>,
    /// Tokens of it that were the likeliest of their place.
    pub(crate) likeliest: usize,
    /// KL(bare || this) summed over the answer's places, in nats.
    pub(crate) kl: Option<f64>,
    /// For each token of the answer log-probabilities of the vocabulary `[V]`, if kept.
    pub(crate) kept: Vec<Vec<f32>>,
    /// Mean log-probability a token of each option.
    pub(crate) options: Vec<f64>,
    /// The generated tokens.
    pub(crate) tokens: Vec<TokenId>,
    /// This question's share of the time.
    pub(crate) time: Duration,
}

/// What came of a group.
#[derive(Debug)]
pub(crate) struct Answers {
    /// How long the shared beginning took.
    pub(crate) prefix_time: Duration,
    pub(crate) heard: Vec<Heard>,
}

/// A sequence on its way through the model.
struct Sequence<'a> {
    tokens: Vec<TokenId>,
    /// Position of its first token.
    offset: usize,
    fed: usize,
    /// Its first token whose logits are wanted.
    wanted: usize,
    blocks: &'a [u32],
    core: Option<&'a Core>,
    scale: f32,
    time: Duration,
}

impl<'a> Model<'a> {
    /// Gets ready to ask.
    pub(crate) fn new(seat: Seat<'a>, text: &'a Text) -> Result<Self, Error> {
        let vocab = u32::try_from(text.vocab_size()).unwrap_or(u32::MAX);
        let mut breaks = HashSet::new();
        for token in (0..vocab).map(TokenId) {
            if text.decode(&[token])?.contains('\n') {
                breaks.insert(token);
            }
        }
        Ok(Self {
            eos: seat.base().config.eos.clone(),
            seat,
            text,
            breaks,
        })
    }

    /// The same model on the processor with the deltas of `adapter`, in place of imprints.
    pub(crate) fn with<'b>(
        &self,
        lm: &'b Lm,
        adapter: &'b (dyn Adapter + Sync),
    ) -> Result<Model<'b>, Error>
    where
        'a: 'b,
    {
        Ok(Model {
            seat: Seat::processor(lm, Some(adapter))?,
            text: self.text,
            breaks: self.breaks.clone(),
            eos: self.eos.clone(),
        })
    }

    /// Where it runs.
    pub(crate) fn seat(&self) -> &Seat<'a> {
        &self.seat
    }

    /// The text of generated tokens. An embedding may have rows that the tokenizer has no token for: they have no text.
    pub(crate) fn spelled(&self, tokens: &[TokenId]) -> Result<String, Error> {
        let known = |token: &TokenId| (token.0 as usize) < self.text.vocab_size();
        let tokens: Vec<TokenId> = tokens.iter().copied().filter(known).collect();
        Ok(self.text.decode(&tokens)?)
    }

    fn generator(&self) -> Result<&Generator, Error> {
        let generator = self.seat.generator();
        Ok(generator.ok_or(lm::Error::NoGenerator { row: 0 })?)
    }

    /// The sums of documents, each in windows of its own (the generator's own window and strategy).
    pub(crate) fn states(
        &mut self,
        context: &[&Document],
        bos: &[TokenId],
    ) -> Result<Vec<(State, Trace)>, Error> {
        if self.generator()?.config().strategy == Strategy::Sequential && context.len() > 1 {
            return Err(Error::Strategy {
                documents: context.len(),
            });
        }
        let state = |document: &&Document| {
            let tokens: Vec<TokenId> = bos.iter().chain(&document.tokens).copied().collect();
            self.seat.read(&tokens)
        };
        context.iter().map(state).collect()
    }

    /// What a document speaks of, token by token.
    pub(crate) fn spoken(&self, document: &Document, bos: usize) -> Result<Spoken, Error> {
        let mut spoken = Spoken::default();
        spoken.hear("", bos);
        let mut decoder = self.text.decoder();
        for &token in &document.tokens {
            spoken.hear(&decoder.push(token)?, 1);
        }
        Ok(spoken)
    }

    /// The state of nothing.
    pub(crate) fn empty(&self) -> Result<State, Error> {
        Ok(self.generator()?.new_state()?)
    }

    /// The state of some tokens of a document.
    pub(crate) fn recall(&self, trace: &Trace, tokens: &[Range<usize>]) -> Result<State, Error> {
        Ok(self.generator()?.recall(trace, tokens)?)
    }

    /// The core of sums added up.
    pub(crate) fn core<'s>(&self, states: impl Iterator<Item = &'s State>) -> Result<Core, Error> {
        self.seat.read_out(&self.total(states)?)
    }

    /// The same core with gates; none if the generator has none.
    pub(crate) fn gated_core<'s>(
        &self,
        states: impl Iterator<Item = &'s State>,
    ) -> Result<Option<Core>, Error> {
        let generator = self.generator()?;
        if generator.gate().is_some() && !self.seat.gates() {
            return Err(Error::Device {
                what: "the gate for text that goes on".to_owned(),
                detail: "--whole asks without it".to_owned(),
            });
        }
        let core = generator.read_out_gated(&self.total(states)?)?;
        Ok(core.is_gated().then_some(core))
    }

    fn total<'s>(&self, states: impl Iterator<Item = &'s State>) -> Result<State, Error> {
        let mut total = self.empty()?;
        for state in states {
            total.add(state, 1.0)?;
        }
        Ok(total)
    }

    /// How many tokens of prompt leave room for a question's answers in the model's window.
    pub(crate) fn room(&self, answer: usize, options: &[Vec<TokenId>], max_tokens: usize) -> usize {
        let longest = options.iter().map(Vec::len).max().unwrap_or(0);
        let behind = longest.max(answer).max(max_tokens + SKIPPED);
        self.seat
            .base()
            .config
            .context_length
            .saturating_sub(behind)
    }

    /// Asks all questions of all groups.
    pub(crate) fn hear(&mut self, groups: &[Group<'_>]) -> Result<Vec<Answers>, Error> {
        let mut answers = Vec::with_capacity(groups.len());
        let mut rest = groups;
        while !rest.is_empty() {
            let mut held = 0;
            let fits = |group: &&Group<'_>| {
                held += blocks_of(group) * BLOCK;
                held <= HELD
            };
            let count = rest.iter().take_while(fits).count().max(1);
            let (now, later) = rest.split_at(count);
            let heard = self.hear_at_once(now);
            self.seat.let_go()?;
            answers.extend(heard?);
            rest = later;
        }
        Ok(answers)
    }

    fn hear_at_once(&mut self, groups: &[Group<'_>]) -> Result<Vec<Answers>, Error> {
        let mut next = 0_u32;
        let mut take = |count: usize| -> Vec<u32> {
            let first = next;
            next = next.saturating_add(u32::try_from(count).unwrap_or(u32::MAX));
            (first..next).collect()
        };
        // Whole blocks of the beginning are shared; what is left of it, every question reads itself.
        let shared: Vec<Vec<u32>> = groups
            .iter()
            .map(|group| take(group.prefix.len() / BLOCK))
            .collect();
        let mut tables: Vec<Vec<u32>> = Vec::new();
        for (group, shared) in groups.iter().zip(&shared) {
            for ask in &group.asks {
                let mut table = shared.clone();
                table.extend(take(own_blocks(group, ask)));
                tables.push(table);
            }
        }
        self.seat.reserve(next as usize)?;

        let mut beginnings: Vec<Sequence<'_>> = groups
            .iter()
            .zip(&shared)
            .map(|(group, shared)| Sequence {
                tokens: group.prefix[..shared.len() * BLOCK].to_vec(),
                offset: 0,
                fed: 0,
                wanted: usize::MAX,
                blocks: shared,
                core: group.core,
                scale: group.scale,
                time: Duration::ZERO,
            })
            .collect();
        self.feed(&mut beginnings, |_, _, _| {})?;

        let asks: Vec<(&Group<'_>, &Ask<'_>)> = groups
            .iter()
            .flat_map(|group| group.asks.iter().map(move |ask| (group, ask)))
            .collect();
        let mut heard: Vec<Heard> = asks.iter().map(|_| Heard::default()).collect();
        let prompts: Vec<usize> = asks
            .iter()
            .map(|(group, ask)| group.prefix.len() + ask.tail.len())
            .collect();
        let mut first: Vec<TokenId> = vec![TokenId(0); asks.len()];

        // Prompt and answer in one go; the first row of logits begins the generated answer as well.
        let mut scored: Vec<Sequence<'_>> = Vec::with_capacity(asks.len());
        for (((group, ask), table), &prompt) in asks.iter().zip(&tables).zip(&prompts) {
            let offset = group.prefix.len() / BLOCK * BLOCK;
            let mut tokens = group.prefix[offset..].to_vec();
            tokens.extend(&ask.tail);
            tokens.extend(&ask.answer[..ask.answer.len().saturating_sub(1)]);
            scored.push(Sequence {
                tokens,
                offset,
                fed: 0,
                wanted: prompt - 1 - offset,
                blocks: table,
                core: group.core,
                scale: group.scale,
                time: Duration::ZERO,
            });
        }
        self.feed(&mut scored, |index, place, logits| {
            let (_, ask) = asks[index];
            if place == 0 {
                first[index] = likeliest(logits);
            }
            let Some(&token) = ask.answer.get(place) else {
                return;
            };
            let heard = &mut heard[index];
            let total = log_sum_exp(logits);
            heard.logprobs.push(logprob(logits, token, total));
            heard.likeliest += usize::from(likeliest(logits) == token);
            if let Some(bare) = ask.bare.and_then(|bare| bare.get(place)) {
                *heard.kl.get_or_insert(0.0) += divergence(bare, logits, total);
            }
            if ask.keep {
                let kept = logits
                    .iter()
                    .map(|&logit| (f64::from(logit) - total) as f32);
                heard.kept.push(kept.collect());
            }
        })?;
        for (heard, sequence) in heard.iter_mut().zip(&scored) {
            heard.time = sequence.time;
        }

        self.choose(&asks, &tables, &prompts, &mut heard)?;
        self.generate(&asks, &tables, &prompts, first, &mut heard)?;

        let mut heard = heard.into_iter();
        Ok(groups
            .iter()
            .zip(beginnings)
            .map(|(group, beginning)| Answers {
                prefix_time: beginning.time,
                heard: heard.by_ref().take(group.asks.len()).collect(),
            })
            .collect())
    }

    /// Scores the options, the first of each question side by side, then the second, and so on: they share their place.
    fn choose(
        &mut self,
        asks: &[(&Group<'_>, &Ask<'_>)],
        tables: &[Vec<u32>],
        prompts: &[usize],
        heard: &mut [Heard],
    ) -> Result<(), Error> {
        let most = asks.iter().map(|(_, ask)| ask.options.len()).max();
        for number in 0..most.unwrap_or(0) {
            let mut who = Vec::new();
            let mut sequences: Vec<Sequence<'_>> = Vec::new();
            for (index, (group, ask)) in asks.iter().enumerate() {
                let (Some(option), Some(&last)) = (ask.options.get(number), ask.tail.last()) else {
                    continue;
                };
                let mut tokens = vec![last];
                tokens.extend(&option[..option.len().saturating_sub(1)]);
                who.push(index);
                sequences.push(Sequence {
                    tokens,
                    offset: prompts[index] - 1,
                    fed: 0,
                    wanted: 0,
                    blocks: &tables[index],
                    core: group.core,
                    scale: group.scale,
                    time: Duration::ZERO,
                });
            }
            let mut sums = vec![0.0; who.len()];
            self.feed(&mut sequences, |index, place, logits| {
                let option = &asks[who[index]].1.options[number];
                if let Some(&token) = option.get(place) {
                    sums[index] += logprob(logits, token, log_sum_exp(logits));
                }
            })?;
            for ((&index, sum), sequence) in who.iter().zip(sums).zip(&sequences) {
                let tokens = asks[index].1.options[number].len().max(1);
                heard[index].options.push(sum / float(tokens));
                heard[index].time += sequence.time;
            }
        }
        Ok(())
    }

    /// Greedy answers: lines' ends in front are skipped, then the first one ends the answer, as does an end of text.
    fn generate(
        &mut self,
        asks: &[(&Group<'_>, &Ask<'_>)],
        tables: &[Vec<u32>],
        prompts: &[usize],
        first: Vec<TokenId>,
        heard: &mut [Heard],
    ) -> Result<(), Error> {
        let mut next = first;
        let mut fed = vec![0_usize; asks.len()];
        let mut open: Vec<usize> = (0..asks.len())
            .filter(|&index| asks[index].1.max_tokens > 0)
            .collect();
        loop {
            open.retain(|&index| {
                let token = next[index];
                let answer = &mut heard[index].tokens;
                if self.eos.contains(&token) {
                    return false;
                }
                if !self.breaks.contains(&token) {
                    answer.push(token);
                } else if !answer.is_empty() || fed[index] >= SKIPPED {
                    return false;
                }
                answer.len() < asks[index].1.max_tokens
                    && fed[index] + 1 < asks[index].1.max_tokens + SKIPPED
            });
            if open.is_empty() {
                return Ok(());
            }
            let mut sequences: Vec<Sequence<'_>> = open
                .iter()
                .map(|&index| Sequence {
                    tokens: vec![next[index]],
                    offset: prompts[index] + fed[index],
                    fed: 0,
                    wanted: 0,
                    blocks: &tables[index],
                    core: asks[index].0.core,
                    scale: asks[index].0.scale,
                    time: Duration::ZERO,
                })
                .collect();
            self.feed(&mut sequences, |row, _, logits| {
                next[open[row]] = likeliest(logits);
            })?;
            for (&index, sequence) in open.iter().zip(&sequences) {
                heard[index].time += sequence.time;
                fed[index] += 1;
            }
        }
    }

    /// Feeds all sequences to the end, in forwards of bounded size. `sink` gets the index of the sequence, which of its wanted rows
    /// it is, and the logits `[V]`. A forward's time is shared by its tokens.
    fn feed(
        &mut self,
        sequences: &mut [Sequence<'_>],
        mut sink: impl FnMut(usize, usize, &[f32]),
    ) -> Result<(), Error> {
        loop {
            let (mut tokens, mut logits) = (0, 0);
            let mut taken: Vec<(usize, usize, usize)> = Vec::new();
            for (index, sequence) in sequences.iter().enumerate() {
                let left = sequence.tokens.len() - sequence.fed;
                // A sequence stops where its rows of logits would be too many, and goes on with the next forward.
                let silent = sequence.wanted.saturating_sub(sequence.fed);
                let count = left
                    .min(STEP - tokens)
                    .min(silent.saturating_add(ROWS - logits));
                if count == 0 {
                    continue;
                }
                let rows = count.saturating_sub(silent);
                tokens += count;
                logits += rows;
                taken.push((index, count, rows));
                if tokens == STEP || logits == ROWS {
                    break;
                }
            }
            if taken.is_empty() {
                return Ok(());
            }
            let mut rows: Vec<Row<'_>> = taken
                .iter()
                .map(|&(index, count, rows)| {
                    let sequence = &sequences[index];
                    Row {
                        tokens: &sequence.tokens[sequence.fed..sequence.fed + count],
                        position: sequence.offset + sequence.fed,
                        blocks: sequence.blocks,
                        core: sequence.core,
                        scale: sequence.scale,
                        window: None,
                        lookahead: None,
                        logits: rows,
                    }
                })
                .collect();
            let start = Instant::now();
            let all = self.seat.forward(&mut rows)?; // [wanted V]
            let time = start.elapsed();
            let vocab = self.seat.base().config.vocab;
            let mut all = all.chunks_exact(vocab.max(1));
            for &(index, count, rows) in &taken {
                let sequence = &sequences[index];
                let before = (sequence.fed + count - rows).saturating_sub(sequence.wanted);
                for (place, row) in all.by_ref().take(rows).enumerate() {
                    sink(index, before + place, row);
                }
            }
            for (index, count, _) in taken {
                sequences[index].fed += count;
                sequences[index].time += time.mul_f64(float(count) / float(tokens));
            }
        }
    }
}

/// Blocks that a question needs beside the shared ones.
fn own_blocks(group: &Group<'_>, ask: &Ask<'_>) -> usize {
    let longest = ask.options.iter().map(Vec::len).max().unwrap_or(0);
    let behind = longest.max(ask.answer.len()).max(ask.max_tokens + SKIPPED);
    (group.prefix.len() % BLOCK + ask.tail.len() + behind).div_ceil(BLOCK)
}

fn blocks_of(group: &Group<'_>) -> usize {
    let own: usize = group.asks.iter().map(|ask| own_blocks(group, ask)).sum();
    group.prefix.len() / BLOCK + own
}

#[expect(clippy::cast_precision_loss, reason = "token counts are small")]
fn float(count: usize) -> f64 {
    count as f64
}

/// ln Σ e^z.
fn log_sum_exp(logits: &[f32]) -> f64 {
    let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&z| f64::from(z - most).exp()).sum();
    f64::from(most) + sum.ln()
}

fn logprob(logits: &[f32], token: TokenId, total: f64) -> f64 {
    let own = logits.get(token.0 as usize).copied();
    f64::from(own.unwrap_or(f32::MIN)) - total
}

/// The likeliest token, the lowest id among equals.
fn likeliest(logits: &[f32]) -> TokenId {
    let mut best = (0_u32, f32::NEG_INFINITY);
    for (id, &logit) in (0_u32..).zip(logits) {
        if logit > best.1 {
            best = (id, logit);
        }
    }
    TokenId(best.0)
}

/// KL(bare || this) in nats; `bare` holds log-probabilities `[V]`, `logits` those of this model, `total` their log-sum-exp.
fn divergence(bare: &[f32], logits: &[f32], total: f64) -> f64 {
    bare.iter()
        .zip(logits)
        .map(|(&bare, &logit)| {
            let bare = f64::from(bare);
            bare.exp() * (bare - (f64::from(logit) - total))
        })
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn likelihoods_and_divergences_are_what_one_computes_by_hand() {
        let logits = [0.0, 2f32.ln(), 1e-30];
        let total = log_sum_exp(&logits);
        assert!((total - 4f64.ln()).abs() < 1e-7);
        assert!((logprob(&logits, TokenId(1), total) - 0.5f64.ln()).abs() < 1e-7);
        assert_eq!(likeliest(&logits), TokenId(1));
        let even = [(1f32 / 3.0).ln(); 3];
        let kl = divergence(&even, &logits, total);
        let third = 1.0 / 3.0f64;
        let want = third * ((third / 0.25).ln() * 2.0 + (third / 0.5).ln());
        assert!((kl - want).abs() < 1e-6, "{kl} {want}");
        assert!(divergence(&[0.5f32.ln(), 0.5f32.ln()], &[3.0, 3.0], 3.0 + 2f64.ln()).abs() < 1e-7);
    }
}
