//! The loss at scored positions: cross-entropy of the next token, or the divergence from a teacher, through the head.
//!
//! ```text
//! s = softmax(W h_t)    ce_t = -ln s[target_t]    kl_t = Σ_i p_i (ln p_i - ln s_i), p = softmax(W g_t) of the teacher's g_t
//! loss_t = (1 - share_t) ce_t + share_t kl_t      d loss_t / d(W h_t) = s - (1 - share_t) 1[target_t] - share_t p
//! ```
//!
//! Of a teacher that is known by its k likeliest tokens all others are one: kl_t = Σ_k p_i (ln p_i - ln s_i) + p_r (ln p_r - ln s_r), and
//! in the gradient a token j among the others has p_r s_j / s_r in place of p_j.
//!
//! Logits exist for a few hundred positions at a time: for a vocabulary of 49,152 those of a whole batch would be
//! the largest tensor of a training step. The gradient of h is made on the way, as a loss is always followed by one.
//! Start at [`score`].

#[cfg(test)]
mod tests;

use candle_core::{Result, Tensor, bail};
use rayon::prelude::*;

use crate::{
    Linear,
    floats::{Floats, tensor},
    plain::{self, known},
    recorded::recorded1,
    simd::{Isa, Kernel, LANES, exp, lanes, of_lanes, run},
};

/// What a teacher says at some of the scored positions.
#[derive(Clone, Debug)]
pub struct Teacher {
    /// At M positions.
    pub says: Says,
    /// For each of the N scored positions which of the M it is, and the share of the divergence in its loss, 0 ..= 1.
    pub at: Vec<Option<(usize, f32)>>,
}

/// A teacher's words at M positions. Not differentiated.
#[derive(Clone, Debug)]
pub enum Says {
    /// Input of its head [M, D], whose head is that of the scored model.
    Hidden(Tensor),
    /// Its likeliest tokens.
    Likeliest(Likeliest),
}

/// The k likeliest tokens of M positions, with their probabilities; what is left of 1 belongs to all others together.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Likeliest {
    /// k
    pub count: usize,
    /// [M, k], the likeliest first.
    pub tokens: Vec<u32>,
    /// [M, k]
    pub probabilities: Vec<f32>,
}

impl Likeliest {
    /// M
    pub fn len(&self) -> usize {
        self.tokens.len() / self.count.max(1)
    }

    /// Whether there is no position.
    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    /// Tokens and probabilities of a position, `[k]` each.
    pub(crate) fn row(&self, row: usize) -> (&[u32], &[f32]) {
        let here = row * self.count..(row + 1) * self.count;
        (&self.tokens[here.clone()], &self.probabilities[here])
    }

    fn fits(&self, vocab: usize) -> bool {
        (1..=vocab).contains(&self.count)
            && self.tokens.len() == self.probabilities.len()
            && self.tokens.len().is_multiple_of(self.count)
            && self.tokens.iter().all(|&token| (token as usize) < vocab)
    }
}

/// The k likeliest tokens by the head [V, D] of hidden states [M, D], lower ids first among equals.
///
/// # Errors
/// If the shapes do not fit, or for a k that is not from 1 to V.
pub fn likeliest(head: &Linear, hidden: &Tensor, k: usize) -> Result<Likeliest> {
    let ((m, d), vocab) = (hidden.dims2()?, head.out_features());
    if d != head.in_features() || !(1..=vocab).contains(&k) {
        bail!(
            "{k} likeliest of {vocab} tokens for hidden states {:?}",
            hidden.shape()
        )
    }
    let mut found = Likeliest {
        count: k,
        ..Likeliest::default()
    };
    for from in (0..m).step_by(ROWS) {
        let here = hidden.detach().narrow(0, from, ROWS.min(m - from))?;
        let logits = head.forward(&here)?; // [m', V]
        let logits = logits.to_dtype(candle_core::DType::F32)?;
        let logits: Vec<f32> = logits.flatten_all()?.to_vec1()?;
        let rows: Vec<Vec<(u32, f32)>> = logits
            .par_chunks_exact(vocab)
            .map(|logits| first(logits, k))
            .collect();
        for (token, p) in rows.into_iter().flatten() {
            found.tokens.push(token);
            found.probabilities.push(p);
        }
    }
    Ok(found)
}

/// The k largest of the logits `[V]`, as probabilities.
fn first(logits: &[f32], k: usize) -> Vec<(u32, f32)> {
    let mut order: Vec<(u32, f32)> = (0..).zip(logits.iter().copied()).collect();
    let larger = |a: &(u32, f32), b: &(u32, f32)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
    if k < order.len() {
        order.select_nth_unstable_by(k - 1, larger);
        order.truncate(k);
    }
    order.sort_unstable_by(larger);
    let largest = order.first().map_or(0.0, |(_, z)| f64::from(*z));
    let sum: f64 = logits.iter().map(|z| (f64::from(*z) - largest).exp()).sum();
    for (_, z) in &mut order {
        *z = ((f64::from(*z) - largest).exp() / sum) as f32;
    }
    order
}

/// What is left for all tokens but these.
pub(crate) fn rest(probabilities: &[f32]) -> f32 {
    let sum: f64 = probabilities.iter().copied().map(f64::from).sum();
    (1.0 - sum).max(0.0) as f32
}

/// Losses of N positions.
#[derive(Clone, Debug)]
pub struct Scores {
    /// `[N]`, in nats; differentiable in the hidden states.
    pub loss: Tensor,
    /// Cross-entropy of the true token.
    pub ce: Vec<f32>,
    /// Divergence from the teacher, where there is one, else 0.
    pub kl: Vec<f32>,
    /// Whether the likeliest token is the true one.
    pub right: Vec<bool>,
}

/// Positions whose logits exist at once.
const ROWS: usize = 240;

/// Scores hidden states [N, D] (behind the final norm) at the head [V, D] against the true next tokens.
///
/// # Errors
/// If the shapes do not fit, or a target or a row of the teacher does not exist.
pub fn score(
    head: &Linear,
    hidden: &Tensor,
    targets: &[u32],
    teacher: Option<&Teacher>,
) -> Result<Scores> {
    let ((n, d), vocab) = (hidden.dims2()?, head.out_features());
    if n != targets.len() || d != head.in_features() {
        bail!(
            "{} targets for hidden states {:?} at a head of {} inputs",
            targets.len(),
            hidden.shape(),
            head.in_features()
        )
    }
    if let Some(target) = targets.iter().find(|&&target| target as usize >= vocab) {
        bail!("token {target} of a vocabulary of {vocab}")
    }
    let none = Teacher {
        says: Says::Likeliest(Likeliest {
            count: 1,
            ..Likeliest::default()
        }),
        at: vec![None; n],
    };
    let teacher = teacher.unwrap_or(&none);
    let (m, sound) = match &teacher.says {
        Says::Hidden(hidden) => {
            let (m, own) = hidden.dims2()?;
            (m, own == d)
        }
        Says::Likeliest(tokens) => (tokens.len(), tokens.fits(vocab)),
    };
    let fits =
        |at: &Option<(usize, f32)>| at.is_none_or(|(row, share)| row < m && share.is_finite());
    if !sound || teacher.at.len() != n || !teacher.at.iter().all(fits) {
        bail!(
            "a teacher of {m} at {} of {n} positions, d = {d}",
            teacher.at.len()
        )
    }
    let hidden = hidden.contiguous()?; // [N, D]
    if !known(&hidden) {
        return plain::score(&head.beside(&hidden)?, &hidden, targets, teacher);
    }
    let tracked = hidden.track_op();
    let mut rows: Vec<Row> = Vec::with_capacity(n);
    let mut dh = Vec::with_capacity(if tracked { n * d } else { 0 }); // [N, D]
    {
        let h = hidden.detach();
        let taught = match &teacher.says {
            Says::Hidden(hidden) => Some(hidden.contiguous()?),
            Says::Likeliest(_) => None,
        };
        let (h, taught) = (
            Floats::of(&h)?,
            taught.as_ref().map(Floats::of).transpose()?,
        );
        for from in (0..n).step_by(ROWS) {
            let here = from..n.min(from + ROWS);
            let mut logits = head.values(&h[here.start * d..here.end * d], here.len()); // [n', V]
            let asked: Vec<usize> = here.clone().filter(|&t| teacher.at[t].is_some()).collect();
            let states: Vec<f32> = asked
                .iter()
                .filter_map(|&t| Some((teacher.at[t]?.0, taught.as_ref()?)))
                .flat_map(|(row, taught)| &taught[row * d..][..d])
                .copied()
                .collect();
            let says = head.values(&states, states.len() / d); // [m', V]
            let mut says = says.chunks_exact(vocab);
            let jobs: Vec<Option<(Word<'_>, f32)>> = here
                .clone()
                .map(|t| {
                    let (row, share) = teacher.at[t]?;
                    let word = match &teacher.says {
                        Says::Hidden(_) => Word::Logits(says.next()?),
                        Says::Likeliest(tokens) => {
                            let (tokens, probabilities) = tokens.row(row);
                            Word::Likeliest(tokens, probabilities)
                        }
                    };
                    Some((word, share))
                })
                .collect();
            let done: Vec<Row> = logits
                .par_chunks_exact_mut(vocab)
                .zip(jobs)
                .zip(&targets[here.clone()])
                .map(|((logits, teacher), &target)| {
                    let mut row = Row::default();
                    run(Score {
                        logits,
                        teacher,
                        target: target as usize,
                        row: &mut row,
                    });
                    row
                })
                .collect();
            rows.extend(done);
            if tracked {
                dh.extend(head.back(&logits, here.len())); // [n', D]
            }
        }
    }
    let losses = rows
        .iter()
        .zip(&teacher.at)
        .map(|(row, at)| {
            let share = at.map_or(0.0, |(_, share)| share);
            (1.0 - share) * row.ce + share * row.kl
        })
        .collect();
    let loss = recorded1("score", &hidden, losses, n, move |_, _, dy| {
        let dy = Floats::of(dy)?; // [N]
        let mut dx = dh.clone(); // [N, D]
        for (dx, dy) in dx.chunks_exact_mut(d).zip(&*dy) {
            dx.iter_mut().for_each(|dx| *dx *= dy);
        }
        tensor(dx, (n, d))
    })?;
    Ok(Scores {
        loss,
        ce: rows.iter().map(|row| row.ce).collect(),
        kl: rows.iter().map(|row| row.kl).collect(),
        right: rows.iter().map(|row| row.right).collect(),
    })
}

#[derive(Clone, Copy, Default)]
struct Row {
    ce: f32,
    kl: f32,
    right: bool,
}

/// What a teacher says at one position.
#[derive(Clone, Copy)]
enum Word<'a> {
    /// `[V]`
    Logits(&'a [f32]),
    /// Tokens and probabilities, `[k]` each.
    Likeliest(&'a [u32], &'a [f32]),
}

/// Logits `[V]` of a position become the gradient of its loss; what is learned on the way goes into `row`.
struct Score<'a> {
    logits: &'a mut [f32],
    /// What the teacher says, and its share.
    teacher: Option<(Word<'a>, f32)>,
    target: usize,
    row: &'a mut Row,
}

impl Kernel for Score<'_> {
    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let Self {
            logits,
            teacher,
            target,
            row,
        } = self;
        let true_logit = logits[target];
        let (largest, log_sum) = log_sum(isa, logits);
        row.ce = log_sum - true_logit;
        row.right = true_logit >= largest;
        match teacher {
            None => probabilities(isa, logits, log_sum),
            Some((Word::Likeliest(tokens, probabilities), share)) => {
                row.kl = taught_likeliest(isa, logits, (tokens, probabilities), log_sum, share);
                logits[target] += share;
            }
            Some((Word::Logits(says), share)) => {
                let (_, teacher_sum) = self::log_sum(isa, says);
                // Σ p (ln p - ln s) = Σ p (z' - z) - ln Σ e^z' + ln Σ e^z, the logits being z' and z.
                let apart = taught(isa, logits, says, log_sum, teacher_sum, share);
                row.kl = apart - teacher_sum + log_sum;
                logits[target] += share;
            }
        }
        logits[target] -= 1.0;
    }
}

/// The largest of the logits z, and ln Σ e^z.
#[inline(always)]
fn log_sum<I: Isa>(isa: I, logits: &[f32]) -> (f32, f32) {
    let (sixteens, tail) = logits.as_chunks::<LANES>();
    let mut largest = isa.splat(f32::NEG_INFINITY);
    for z in sixteens {
        largest = isa.max(of_lanes(isa, z), largest);
    }
    let largest = lanes(isa, largest)
        .into_iter()
        .chain(tail.iter().copied())
        .fold(f32::NEG_INFINITY, f32::max);
    let mut total = isa.splat(0.0);
    for z in sixteens {
        let e = exp(isa, isa.sub(of_lanes(isa, z), isa.splat(largest)));
        total = isa.add(total, e);
    }
    let mut sum: f32 = lanes(isa, total).iter().sum();
    for z in tail {
        sum += (z - largest).max(-87.0).exp();
    }
    (largest, largest + sum.ln())
}

/// Logits to probabilities, in place.
#[inline(always)]
fn probabilities<I: Isa>(isa: I, logits: &mut [f32], log_sum: f32) {
    let (sixteens, tail) = logits.as_chunks_mut::<LANES>();
    for z in sixteens {
        *z = lanes(isa, exp(isa, isa.sub(of_lanes(isa, z), isa.splat(log_sum))));
    }
    for z in tail {
        *z = (*z - log_sum).max(-87.0).exp();
    }
}

/// Logits z to s - share t in place, t = p for the likeliest tokens and p_r s / s_r for the others; gives the divergence.
#[inline(always)]
fn taught_likeliest<I: Isa>(
    isa: I,
    logits: &mut [f32],
    (tokens, p): (&[u32], &[f32]),
    log_sum: f32,
    share: f32,
) -> f32 {
    let mut apart = 0.0f32;
    for (&token, &p) in tokens.iter().zip(p) {
        if p > 0.0 {
            apart += p * (p.ln() - (logits[token as usize] - log_sum));
        }
    }
    probabilities(isa, logits, log_sum);
    let own: Vec<f32> = tokens.iter().map(|&token| logits[token as usize]).collect();
    for &token in tokens {
        logits[token as usize] = 0.0;
    }
    let (sixteens, tail) = logits.as_chunks::<LANES>();
    let mut others = isa.splat(0.0);
    for s in sixteens {
        others = isa.add(others, of_lanes(isa, s));
    }
    let others: f32 = lanes(isa, others).iter().sum::<f32>() + tail.iter().sum::<f32>();
    let (others, left) = (others.max(f32::MIN_POSITIVE), rest(p));
    if left > 0.0 {
        apart += left * (left.ln() - others.ln());
    }
    let factor = 1.0 - share * left / others;
    let (sixteens, tail) = logits.as_chunks_mut::<LANES>();
    for s in sixteens {
        *s = lanes(isa, isa.mul(of_lanes(isa, s), isa.splat(factor)));
    }
    for s in tail {
        *s *= factor;
    }
    for ((&token, own), p) in tokens.iter().zip(own).zip(p) {
        logits[token as usize] = own - share * p;
    }
    apart
}

/// Logits z to s - share p in place, p of the teacher's logits z'; gives Σ p (z' - z).
#[inline(always)]
fn taught<I: Isa>(
    isa: I,
    logits: &mut [f32],
    says: &[f32],
    log_sum: f32,
    teacher_sum: f32,
    share: f32,
) -> f32 {
    let (sixteens, tail) = logits.as_chunks_mut::<LANES>();
    let (teachers, teacher_tail) = says.as_chunks::<LANES>();
    let mut apart = isa.splat(0.0);
    for (z, t) in sixteens.iter_mut().zip(teachers) {
        let (own, t) = (of_lanes(isa, z), of_lanes(isa, t));
        let s = exp(isa, isa.sub(own, isa.splat(log_sum)));
        let p = exp(isa, isa.sub(t, isa.splat(teacher_sum)));
        apart = isa.fma(p, isa.sub(t, own), apart);
        *z = lanes(isa, isa.fma(isa.splat(-share), p, s));
    }
    let mut apart: f32 = lanes(isa, apart).iter().sum();
    for (z, t) in tail.iter_mut().zip(teacher_tail) {
        let (s, p) = (
            (*z - log_sum).max(-87.0).exp(),
            (t - teacher_sum).max(-87.0).exp(),
        );
        apart += p * (t - *z);
        *z = s - share * p;
    }
    apart
}
