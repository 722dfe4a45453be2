//! Sampling: from one row of logits to one token.
//!
//! Pure but for the request's own stream of random numbers. Logits that are not numbers count as impossible, infinite
//! ones as the largest number. Start at [`Sampler::draw`].

#[cfg(test)]
mod tests;

use std::{cmp::Ordering, collections::HashSet};

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::{command::Sampling, error::RequestError, ids::TokenId, machine::Draw};

/// Most tokens that can be asked for beside each token.
const MAX_TOP_LOGPROBS: usize = 64;

/// A drawn token.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Drawn {
    pub(crate) token: TokenId,
    /// Of the untouched distribution, if asked for.
    pub(crate) logprob: Option<f32>,
    /// The likeliest of the untouched distribution, likeliest first, if asked for.
    pub(crate) top: Vec<(TokenId, f32)>,
}

/// Draws the tokens of one request.
#[derive(Debug)]
pub(crate) struct Sampler {
    sampling: Sampling,
    random: ChaCha8Rng,
    /// Tokens of prompt and answer, where a penalty asks for them.
    seen: HashSet<u32>,
}

impl Sampler {
    /// Checks the values first.
    pub(crate) fn new(sampling: Sampling, prompt: &[TokenId]) -> Result<Self, RequestError> {
        check(&sampling)?;
        let random = ChaCha8Rng::seed_from_u64(sampling.seed);
        let mut sampler = Self {
            sampling,
            random,
            seen: HashSet::new(),
        };
        for &token in prompt {
            sampler.see(token);
        }
        Ok(sampler)
    }

    fn see(&mut self, token: TokenId) {
        if self.sampling.repetition_penalty != 1.0 {
            self.seen.insert(token.0);
        }
    }

    /// How a machine may draw the next token in this one's place; none if it also asks for the likeliest beside it.
    pub(crate) fn by_machine(&self) -> Option<Draw<'_>> {
        (self.sampling.top_logprobs == 0).then(|| Draw {
            sampling: &self.sampling,
            point: if self.sampling.temperature == 0.0 {
                0.0
            } else {
                point(&mut self.random.clone())
            },
            seen: &self.seen,
        })
    }

    /// Takes the token that a machine has drawn so.
    pub(crate) fn take(&mut self, token: TokenId, logprob: Option<f32>) -> Drawn {
        if self.sampling.temperature != 0.0 {
            point(&mut self.random);
        }
        self.see(token);
        Drawn {
            token,
            logprob: logprob.filter(|_| self.sampling.logprobs),
            top: Vec::new(),
        }
    }

    /// logits `[V]` of the place that the token is drawn for, V at least 1.
    pub(crate) fn draw(&mut self, logits: &[f32]) -> Drawn {
        let mut scores: Vec<f32> = logits.iter().map(|&logit| tamed(logit)).collect();
        let (logprobs, tops) = (self.sampling.logprobs, self.sampling.top_logprobs);
        let normaliser = (logprobs || tops > 0).then(|| log_sum_exp(&scores));
        let top = match normaliser {
            Some(normaliser) => {
                let best = likeliest(&scores, tops).into_iter();
                best.map(|id| (token_id(id), logprob(scores[id], normaliser)))
                    .collect()
            }
            None => Vec::new(),
        };
        let untouched = logprobs.then(|| scores.clone());
        self.penalise(&mut scores);
        let id = if self.sampling.temperature == 0.0 {
            argmax(&scores)
        } else {
            self.random_id(&scores)
        };
        let token = token_id(id);
        self.see(token);
        let logprob = match (untouched, normaliser) {
            (Some(untouched), Some(normaliser)) => Some(logprob(untouched[id], normaliser)),
            _ => None,
        };
        Drawn {
            token,
            logprob,
            top,
        }
    }

    fn penalise(&self, scores: &mut [f32]) {
        let penalty = self.sampling.repetition_penalty;
        for &token in &self.seen {
            if let Some(score) = scores.get_mut(token as usize) {
                *score = tamed(if *score > 0.0 {
                    *score / penalty
                } else {
                    *score * penalty
                });
            }
        }
    }

    /// Each filter keeps a beginning of the tokens in order of likelihood, so the shortest of the beginnings is what all
    /// of them keep.
    fn random_id(&mut self, scores: &[f32]) -> usize {
        let Sampling {
            temperature,
            top_k,
            top_p,
            min_p,
            ..
        } = self.sampling;
        let best = scores[argmax(scores)];
        // Differences first: a tiny temperature overflows nothing but what is impossible anyway.
        let weight =
            |score: f32| ((f64::from(score) - f64::from(best)) / f64::from(temperature)).exp();
        let point = point(&mut self.random);
        if top_k == 0 && top_p == 1.0 && min_p == 0.0 {
            let weights = scores.iter().map(|&score| weight(score));
            return pick(weights.clone().enumerate(), point * weights.sum::<f64>());
        }
        let most = if top_k == 0 {
            scores.len()
        } else {
            top_k.min(scores.len())
        };
        let sum_of_all: f64 = scores.iter().map(|&score| weight(score)).sum();
        // Few tokens hold nearly all of the probability: order more of them only while they do not reach top_p.
        let mut ordered = 256.min(most);
        loop {
            let order = likeliest(scores, ordered);
            let weights: Vec<f64> = order.iter().map(|&id| weight(scores[id])).collect();
            let total = if most == scores.len() {
                sum_of_all
            } else {
                weights.iter().sum()
            };
            let whole = ordered == most;
            let by_top_p = if top_p == 1.0 {
                whole.then_some(ordered)
            } else {
                reach(&weights, f64::from(top_p) * total)
            };
            // The likeliest weighs 1.
            let by_min_p = weights.iter().position(|&weight| weight < f64::from(min_p));
            let known =
                whole || (most == scores.len() && (by_top_p.is_some() || by_min_p.is_some()));
            if known {
                let kept = by_top_p
                    .unwrap_or(ordered)
                    .min(by_min_p.unwrap_or(ordered))
                    .max(1);
                let mass: f64 = weights[..kept].iter().sum();
                return pick(order.into_iter().zip(weights).take(kept), point * mass);
            }
            ordered = ordered.saturating_mul(8).min(most);
        }
    }
}

/// The next number of a stream, in [0, 1).
fn point(random: &mut ChaCha8Rng) -> f64 {
    (random.next_u64() >> 11) as f64 / (1u64 << 53) as f64
}

/// Log-probability of `token` under logits `[V]`, and whether it is the likeliest (the lowest id among equals).
pub(crate) fn score(logits: &[f32], token: TokenId) -> (f32, bool) {
    let scores: Vec<f32> = logits.iter().map(|&logit| tamed(logit)).collect();
    let own = scores.get(token.0 as usize).copied().unwrap_or(f32::MIN);
    (
        logprob(own, log_sum_exp(&scores)),
        argmax(&scores) == token.0 as usize,
    )
}

fn check(sampling: &Sampling) -> Result<(), RequestError> {
    let Sampling {
        temperature,
        top_p,
        min_p,
        repetition_penalty,
        top_logprobs,
        ..
    } = *sampling;
    let fields = [
        (
            "temperature",
            temperature,
            temperature.is_finite() && temperature >= 0.0,
            "finite and at least 0",
        ),
        (
            "top_p",
            top_p,
            top_p > 0.0 && top_p <= 1.0,
            "above 0 and at most 1",
        ),
        (
            "min_p",
            min_p,
            (0.0..1.0).contains(&min_p),
            "at least 0 and below 1",
        ),
        (
            "repetition_penalty",
            repetition_penalty,
            repetition_penalty.is_finite() && repetition_penalty > 0.0,
            "finite and above 0",
        ),
        (
            "top_logprobs",
            top_logprobs as f32,
            top_logprobs <= MAX_TOP_LOGPROBS,
            "at most 64",
        ),
    ];
    match fields.into_iter().find(|&(_, _, fits, _)| !fits) {
        Some((field, value, _, range)) => Err(RequestError::Sampling {
            field,
            value,
            range,
        }),
        None => Ok(()),
    }
}

/// A finite number in its place: what is no number is the least.
fn tamed(logit: f32) -> f32 {
    if logit.is_nan() {
        f32::MIN
    } else {
        logit.clamp(f32::MIN, f32::MAX)
    }
}

/// The largest, the first among equals.
fn argmax(scores: &[f32]) -> usize {
    let better = |best: usize, id: usize| if scores[id] > scores[best] { id } else { best };
    (1..scores.len()).fold(0, better)
}

/// The so many largest, largest first, the lowest id first among equals.
fn likeliest(scores: &[f32], count: usize) -> Vec<usize> {
    let count = count.min(scores.len());
    if count == 0 {
        return Vec::new();
    }
    let order = |a: &usize, b: &usize| {
        scores[*b]
            .partial_cmp(&scores[*a])
            .unwrap_or(Ordering::Equal)
            .then(a.cmp(b))
    };
    let mut ids: Vec<usize> = (0..scores.len()).collect();
    ids.select_nth_unstable_by(count - 1, order);
    ids.truncate(count);
    ids.sort_unstable_by(order);
    ids
}

/// How many of the weights it takes to reach a sum; none if all of them do not.
fn reach(weights: &[f64], sum: f64) -> Option<usize> {
    let mut reached = 0.0;
    weights
        .iter()
        .position(|weight| {
            reached += weight;
            reached >= sum
        })
        .map(|index| index + 1)
}

/// The entry in whose stretch the point lies; the last one with a stretch if rounding left the point behind all.
fn pick(weighted: impl Iterator<Item = (usize, f64)>, point: f64) -> usize {
    let mut reached = 0.0;
    let mut last = 0;
    for (id, weight) in weighted {
        if weight > 0.0 {
            reached += weight;
            last = id;
            if point < reached {
                return id;
            }
        }
    }
    last
}

fn log_sum_exp(scores: &[f32]) -> f64 {
    let best = f64::from(scores[argmax(scores)]);
    best + scores
        .iter()
        .map(|&score| (f64::from(score) - best).exp())
        .sum::<f64>()
        .ln()
}

fn logprob(score: f32, normaliser: f64) -> f32 {
    (f64::from(score) - normaliser) as f32
}

fn token_id(id: usize) -> TokenId {
    TokenId(u32::try_from(id).unwrap_or(u32::MAX))
}
