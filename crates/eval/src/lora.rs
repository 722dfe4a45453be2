//! Gradient descent on a context: a low-rank adapter at the generator's sites, trained on the context's own tokens.
//!
//! The plain way to bring a context into weights (LoRA, arXiv 2106.09685), at the imprint's rank and places: A normal, B zero,
//! some steps of AdamW on the next-token loss of the context as it is told. Knows no task, no question, and not how many steps
//! are good. Start at [`Training`].

use std::ops::Range;

use candle_core::{Device, Tensor, Var};
use generator::{Adapter, SiteId};
use lm::{Lm, TokenId};

use crate::{Error, prompt::Document, random::Draws};

/// Tokens whose gradients are followed at once, unless one window has more.
const AT_ONCE: usize = 1024;
/// AdamW (arXiv 1711.05101), as torch has it.
const BETAS: [f32; 2] = [0.9, 0.999];
const EPS: f32 = 1e-8;
const DECAY: f32 = 0.01;

/// y = W0 x + B A x at some linears.
#[derive(Debug)]
pub(crate) struct Lora {
    /// With A [r, Din] and B [Dout, r].
    sites: Vec<(SiteId, Tensor, Tensor)>,
}

impl Adapter for Lora {
    fn delta(
        &self,
        id: SiteId,
        x: &Tensor,
        _: &[(usize, Range<usize>)],
    ) -> Result<Option<Tensor>, generator::Error> {
        let Some((_, a, b)) = self.sites.iter().find(|(site, ..)| *site == id) else {
            return Ok(None);
        };
        let c = kernels::linear_trained(x, a)?; // [T, r]
        Ok(Some(kernels::linear_trained(&c, b)?)) // [T, Dout]
    }
}

/// A tensor in training.
struct Master {
    var: Var,
    values: Vec<f32>,
    /// Moments of the gradient.
    first: Vec<f32>,
    second: Vec<f32>,
    /// Sum of the gradients since the last step.
    gradient: Vec<f32>,
}

impl Master {
    fn new(values: Vec<f32>, shape: (usize, usize)) -> Result<Self, Error> {
        let zeros = || vec![0.0; values.len()];
        let (first, second, gradient) = (zeros(), zeros(), zeros());
        Ok(Self {
            var: Var::from_vec(values.clone(), shape, &Device::Cpu)?,
            values,
            first,
            second,
            gradient,
        })
    }

    /// Step number `step`, from 1, with the gradient so far, which is forgotten.
    fn step(&mut self, step: i32, rate: f32) -> Result<(), Error> {
        let [beta1, beta2] = BETAS;
        let (bias1, bias2) = (1.0 - beta1.powi(step), 1.0 - beta2.powi(step));
        let values = self.values.iter_mut().zip(&mut self.gradient);
        let moments = self.first.iter_mut().zip(&mut self.second);
        for ((value, gradient), (first, second)) in values.zip(moments) {
            let g = std::mem::take(gradient);
            *first = beta1 * *first + (1.0 - beta1) * g;
            *second = beta2 * *second + (1.0 - beta2) * g * g;
            *value -= rate * DECAY * *value;
            *value -= rate * (*first / bias1) / ((*second / bias2).sqrt() + EPS);
        }
        self.var.set(&self.tensor()?)?;
        Ok(())
    }

    /// The values as they are, followed by no gradient.
    fn tensor(&self) -> Result<Tensor, Error> {
        Ok(Tensor::from_slice(
            &self.values,
            self.var.shape(),
            &Device::Cpu,
        )?)
    }
}

/// An adapter in training on one context.
pub(crate) struct Training<'a> {
    lm: &'a Lm,
    /// On the variables of `masters`.
    lora: Lora,
    /// A and B of each site.
    masters: Vec<Master>,
    /// Tokens of a window and the one behind it: all but the first are predicted.
    windows: Vec<Vec<TokenId>>,
    steps: i32,
}

impl<'a> Training<'a> {
    /// Gets ready to learn documents, each told by itself behind `bos` and cut into windows of the generator's length.
    pub(crate) fn new(
        lm: &'a Lm,
        context: &[&Document],
        bos: &[TokenId],
        draws: &mut Draws,
    ) -> Result<Self, Error> {
        let generator = lm.generator().ok_or(Error::NoGenerator {
            method: crate::Method::Lora.name(),
        })?;
        let (rank, shape) = (generator.config().export_rank(), lm.shape());
        let (mut sites, mut masters) = (Vec::new(), Vec::new());
        for site in generator.sites() {
            let (out, input) = shape.linear(site.id().module);
            #[expect(clippy::cast_precision_loss, reason = "widths are far below 2^23")]
            let scale = 1.0 / (input as f32).sqrt();
            // What A makes of an input is then of the input's size.
            let a = (0..rank * input).map(|_| scale * draws.normal()).collect();
            let a = Master::new(a, (rank, input))?;
            let b = Master::new(vec![0.0; out * rank], (out, rank))?;
            sites.push((
                site.id(),
                a.var.as_tensor().clone(),
                b.var.as_tensor().clone(),
            ));
            masters.extend([a, b]);
        }
        let window = generator.config().window;
        let window = window.clamp(1, lm.config().context_length.max(1));
        let mut windows = Vec::new();
        for document in context {
            let tokens: Vec<TokenId> = bos.iter().chain(&document.tokens).copied().collect();
            let last = tokens.len().saturating_sub(1);
            for from in (0..last).step_by(window) {
                windows.push(tokens[from..=last.min(from + window)].to_vec());
            }
        }
        Ok(Self {
            lm,
            lora: Lora { sites },
            masters,
            windows,
            steps: 0,
        })
    }

    /// Tokens that each window reads, and predicts.
    pub(crate) fn windows(&self) -> impl Iterator<Item = usize> {
        self.windows.iter().map(|window| window.len() - 1)
    }

    /// A step on all of the context; the loss before it, nats a token. A context without anything to predict teaches nothing.
    pub(crate) fn step(&mut self, rate: f64) -> Result<f64, Error> {
        kernels::on_pool(|| self.stepped(rate))
    }

    fn stepped(&mut self, rate: f64) -> Result<f64, Error> {
        let total: usize = self.windows().sum();
        if total == 0 {
            return Ok(0.0);
        }
        #[expect(
            clippy::cast_precision_loss,
            reason = "token counts are far below 2^52"
        )]
        let share = 1.0 / total as f64;
        let mut loss = 0.0;
        let mut rest = self.windows.as_slice();
        while !rest.is_empty() {
            let mut tokens = 0;
            let fits = |window: &&Vec<TokenId>| {
                tokens += window.len() - 1;
                tokens <= AT_ONCE
            };
            let count = rest.iter().take_while(fits).count().max(1);
            let (now, later) = rest.split_at(count);
            rest = later;
            let sequences: Vec<(&[TokenId], usize)> = now
                .iter()
                .map(|window| (&window[..window.len() - 1], window.len() - 1))
                .collect();
            let targets: Vec<u32> = now
                .iter()
                .flat_map(|window| window[1..].iter().map(|token| token.0))
                .collect();
            let hidden = self.lm.differentiable(&sequences, Some(&self.lora))?;
            let Some(hidden) = hidden else { continue }; // [N, D]
            let scores = kernels::score(self.lm.head(), &hidden, &targets, None)?;
            loss += share * scores.ce.iter().map(|&ce| f64::from(ce)).sum::<f64>();
            let gradients = (scores.loss.sum_all()? * share)?.backward()?;
            for master in &mut self.masters {
                let Some(gradient) = gradients.get(&master.var) else {
                    continue;
                };
                let gradient = gradient.flatten_all()?;
                let gradient = kernels::Floats::of(&gradient)?;
                for (sum, value) in master.gradient.iter_mut().zip(&*gradient) {
                    *sum += value;
                }
            }
        }
        self.steps = self.steps.saturating_add(1);
        for master in &mut self.masters {
            master.step(self.steps, rate as f32)?;
        }
        Ok(loss)
    }

    /// The adapter as it is now.
    pub(crate) fn lora(&self) -> Result<Lora, Error> {
        let tensors = self.masters.chunks_exact(2).zip(&self.lora.sites);
        let sites = tensors
            .map(|(pair, (site, ..))| Ok((*site, pair[0].tensor()?, pair[1].tensor()?)))
            .collect::<Result<_, Error>>()?;
        Ok(Lora { sites })
    }
}

#[cfg(test)]
mod tests;
