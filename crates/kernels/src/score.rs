//! The loss at scored positions: cross-entropy of the next token, or the divergence from a teacher, through the head.
//!
//! ```text
//! s = softmax(W h_t)    ce_t = -ln s[target_t]    kl_t = Σ_i p_i (ln p_i - ln s_i), p = softmax(W g_t) of the teacher's g_t
//! loss_t = (1 - share_t) ce_t + share_t kl_t      d loss_t / d(W h_t) = s - (1 - share_t) 1[target_t] - share_t p
//! ```
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
    /// Input of the teacher's head [M, D], whose head is that of the scored model. Not differentiated.
    pub hidden: Tensor,
    /// For each of the N scored positions the row of `hidden` and the share of the divergence in its loss, 0 ..= 1.
    pub at: Vec<Option<(usize, f32)>>,
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
        hidden: Tensor::zeros((0, d), hidden.dtype(), hidden.device())?,
        at: vec![None; n],
    };
    let teacher = teacher.unwrap_or(&none);
    let (m, teacher_d) = teacher.hidden.dims2()?;
    let fits =
        |at: &Option<(usize, f32)>| at.is_none_or(|(row, share)| row < m && share.is_finite());
    if teacher_d != d || teacher.at.len() != n || !teacher.at.iter().all(fits) {
        bail!(
            "a teacher of {:?} at {} of {n} positions",
            teacher.hidden.shape(),
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
        let (h, taught) = (hidden.detach(), teacher.hidden.contiguous()?);
        let (h, taught) = (Floats::of(&h)?, Floats::of(&taught)?);
        for from in (0..n).step_by(ROWS) {
            let here = from..n.min(from + ROWS);
            let mut logits = head.values(&h[here.start * d..here.end * d], here.len()); // [n', V]
            let asked: Vec<usize> = here.clone().filter(|&t| teacher.at[t].is_some()).collect();
            let states: Vec<f32> = asked
                .iter()
                .filter_map(|&t| teacher.at[t])
                .flat_map(|(row, _)| &taught[row * d..][..d])
                .copied()
                .collect();
            let says = head.values(&states, asked.len()); // [m', V]
            let mut says = says.chunks_exact(vocab);
            let jobs: Vec<_> = here
                .clone()
                .map(|t| teacher.at[t].and_then(|(_, share)| Some((says.next()?, share))))
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

/// Logits `[V]` of a position become the gradient of its loss; what is learned on the way goes into `row`.
struct Score<'a> {
    logits: &'a mut [f32],
    /// The teacher's logits `[V]`, and its share.
    teacher: Option<(&'a [f32], f32)>,
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
            Some((says, share)) => {
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
