//! What a recipe will cost, before it runs: parameters, operations, memory and time.
//!
//! Operations are two for each multiply-add of a matrix product. Start at [`Estimate::of`].

use std::{fmt, time::Instant};

use candle_core::{Device, Tensor};
use generator::Trainee;
use lm::Lm;

use crate::{
    Error,
    compute::Place,
    recipe::{Layout, Length, Recipe},
};

/// Operations per second of a GPU, assumed: a tenth of what an H200's data sheet says of bf16. No GPU has run this yet.
const ASSUMED: f64 = 1e14;

/// What a run will cost.
#[derive(Clone, Debug)]
pub(crate) struct Estimate {
    parameters: usize,
    checkpoint_bytes: usize,
    tokens: f64,
    operations: f64,
    memory_bytes: f64,
    step_seconds: f64,
    /// Whether the time is that of an assumed speed.
    assumed: bool,
    length: Length,
}

/// Tokens of an average batch.
#[derive(Clone, Copy, Default)]
struct Tokens {
    context: f64,
    query: f64,
    scored: f64,
    taught: f64,
}

fn tokens(layout: &Layout, recipe: &Recipe, window: usize) -> Tokens {
    let (windows, query) = (layout.windows as f64, recipe.data.query as f64);
    if layout.prefix {
        let asked = (2.0 * windows - 1.0) * window as f64;
        return Tokens {
            context: windows * window as f64,
            query: asked,
            scored: asked,
            taught: if recipe.loss.completion.teacher > 0.0 {
                asked / 2.0
            } else {
                0.0
            },
        };
    }
    let mix = layout.mix.as_ref().unwrap_or(&recipe.data.mix);
    let text = mix.corpus / mix.shares().iter().sum::<f64>();
    let asked = windows * layout.queries.len() as f64 * query;
    let shares = layout.queries.iter().map(|ask| {
        let all = ask.reconstruction + ask.completion + ask.far + ask.negative;
        let completion = if recipe.loss.completion.teacher > 0.0 {
            ask.completion + ask.far
        } else {
            0.0
        };
        (completion + ask.negative) / all.max(1e-9)
    });
    let taught = shares.sum::<f64>() / layout.queries.len() as f64;
    // Contexts of questions and packs fill about two thirds of a window, questions half of a query, answers a tenth.
    Tokens {
        context: windows * window as f64 * (text + 0.67 * (1.0 - text)),
        query: asked * (text + 0.5 * (1.0 - text)),
        scored: asked * (text + 0.1 * (1.0 - text)),
        taught: asked * text * taught,
    }
}

impl Estimate {
    pub(crate) fn of(
        recipe: &Recipe,
        lm: &Lm,
        trainee: &Trainee,
        place: Place,
    ) -> Result<Self, Error> {
        let config = lm.config();
        let window = recipe.data.window.unwrap_or(trainee.config().window);
        let all: f64 = recipe.layout.iter().map(|layout| layout.chance).sum();
        let mut mean = Tokens::default();
        for layout in &recipe.layout {
            let (share, tokens) = (layout.chance / all, tokens(layout, recipe, window));
            mean.context += share * tokens.context;
            mean.query += share * tokens.query;
            mean.scored += share * tokens.scored;
            mean.taught += share * tokens.taught;
        }
        let head = (config.vocab * config.hidden) as f64;
        let layer = (config.hidden * (2 * config.query_features() + 2 * config.kv_features())
            + 3 * config.hidden * config.intermediate) as f64;
        let layers = config.layers as f64;
        let lowest = trainee
            .sites()
            .iter()
            .map(|site| site.id.layer)
            .min()
            .unwrap_or(0);
        let above = (config.layers - lowest) as f64;
        let written: f64 = trainee
            .sites()
            .iter()
            .map(|site| (site.a1.elem_count() + site.a3.elem_count() * 2) as f64)
            .sum();
        let asked: f64 = trainee
            .sites()
            .iter()
            .map(|site| (site.a1.elem_count() + site.b.elem_count()) as f64)
            .sum();
        let operations = 2.0
            * (mean.context * (layers * layer + 2.0 * written)
                + mean.query * ((layers + above) * layer + 3.0 * asked)
                + mean.scored * 2.0 * head
                + mean.taught * (layers * layer + head));
        // Activations that the way back needs, the weights in both directions, masters and moments.
        let kept = mean.query * above * (10 * config.hidden + 4 * config.intermediate) as f64;
        let seen: usize = trainee
            .sites()
            .iter()
            .map(|site| site.a1.dim(1).unwrap_or(0) + config.hidden)
            .sum();
        let logits = (2 * 240 * config.vocab) as f64;
        let turned = above * layer + head;
        let parameters = trainee.parameters();
        let floats =
            2.0 * kept + mean.context * seen as f64 + logits + turned + 6.0 * parameters as f64;
        let plain = place.is_plain(recipe.compute);
        let mut memory_bytes = 4.0 * floats + lm.parameters() as f64;
        if plain {
            // Operation by operation more is kept: activations twice, once of them in f32 for norms and gates, scores of attention
            // three times; frozen weights once more, as they are multiplied.
            let pairs =
                mean.query * recipe.data.query as f64 * (config.heads * config.layers) as f64;
            let size = recipe.compute.dtype().size_in_bytes() as f64;
            memory_bytes += (4.0 + size) * kept + 12.0 * pairs + size * lm.parameters() as f64;
        }
        let speed = match place {
            Place::Cpu => speed()?,
            Place::Cuda(_) => ASSUMED,
        };
        Ok(Self {
            parameters,
            checkpoint_bytes: 2 * parameters,
            tokens: mean.context + mean.query,
            operations,
            memory_bytes,
            assumed: place != Place::Cpu,
            step_seconds: operations / speed * recipe.optimizer.accumulate as f64,
            length: recipe.length,
        })
    }
}

/// Operations per second of matrix products of the trainer's own kind, measured.
fn speed() -> Result<f64, Error> {
    let (t, width) = (480, 1024);
    let x = Tensor::ones((t, width), candle_core::DType::F32, &Device::Cpu)?;
    let w = Tensor::ones((width, width), candle_core::DType::F32, &Device::Cpu)?;
    let map = kernels::Linear::from_tensor(&w)?;
    map.forward(&x)?;
    let (began, mut rounds) = (Instant::now(), 0.0);
    while began.elapsed().as_secs_f64() < 0.3 {
        map.forward(&x)?;
        rounds += 1.0;
    }
    Ok(rounds * 2.0 * (t * width * width) as f64 / began.elapsed().as_secs_f64())
}

impl fmt::Display for Estimate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (seconds, steps) = match self.length {
            Length::Steps(steps) => (steps as f64 * self.step_seconds, steps as f64),
            Length::Minutes(minutes) => (60.0 * minutes, 60.0 * minutes / self.step_seconds),
        };
        writeln!(
            f,
            "parameters         {:.2} M",
            self.parameters as f64 / 1e6
        )?;
        writeln!(
            f,
            "checkpoint         {:.1} MB",
            self.checkpoint_bytes as f64 / 1e6
        )?;
        writeln!(f, "operations a step  {:.0} GFLOP", self.operations / 1e9)?;
        writeln!(f, "tokens a step      {:.0}", self.tokens)?;
        writeln!(
            f,
            "memory             about {:.1} GB",
            self.memory_bytes / 1e9
        )?;
        writeln!(
            f,
            "time               about {:.1} s a step, {:.0} steps in {:.0} min, {:.2} M tokens",
            self.step_seconds,
            steps,
            seconds / 60.0,
            steps * self.tokens / 1e6
        )?;
        if self.assumed {
            writeln!(
                f,
                "                   at an assumed {:.0} TFLOP/s, measured nowhere",
                ASSUMED / 1e12
            )?;
        }
        Ok(())
    }
}
