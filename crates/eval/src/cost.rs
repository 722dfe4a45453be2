//! What a method costs by count: floating-point operations and floats stored.
//!
//! Counted from shapes, never measured; a multiplication and an addition are two operations. Start at [`Costs::new`].

use generator::Generator;
use lm::Config;

/// Operations of one model's parts.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Costs {
    layers: f64,
    /// Of all linears of one layer, for a token.
    layer: f64,
    /// Of attention in one layer, for a token and a position that it sees.
    pair: f64,
    /// Of the head, for a row of logits.
    head: f64,
    /// Of all sites' deltas, for a token.
    delta: f64,
    /// Of all sites' writes, for a token.
    write: f64,
    /// Of reading the core out of all sites once.
    read_out: f64,
    /// Layers that a context passes through.
    written_layers: f64,
    /// Of all deltas of a low-rank adapter at the sites, for a token.
    lora: f64,
    /// Its floats.
    lora_floats: usize,
    /// Layers from the lowest site on.
    adapted_layers: f64,
    /// Floats of keys and values, for a token.
    kv: usize,
}

#[expect(clippy::cast_precision_loss, reason = "sizes are far below 2^52")]
fn float(size: usize) -> f64 {
    size as f64
}

impl Costs {
    /// Of a model with its generator.
    pub(crate) fn new(config: &Config, generator: Option<&Generator>) -> Self {
        let shape = config.base_shape();
        let (d, f) = (float(config.hidden), float(config.intermediate));
        let (q, kv) = (float(shape.query), float(shape.key_value));
        let mut costs = Self {
            layers: float(config.layers),
            layer: 2.0 * (d * (q + 2.0 * kv) + q * d + 3.0 * d * f),
            pair: 4.0 * q,
            head: 2.0 * d * float(config.vocab),
            delta: 0.0,
            write: 0.0,
            read_out: 0.0,
            written_layers: 0.0,
            lora: 0.0,
            lora_floats: 0,
            adapted_layers: 0.0,
            kv: 2 * shape.key_value * config.layers,
        };
        let Some(generator) = generator else {
            return costs;
        };
        let rank = generator.config().export_rank();
        for site in generator.sites() {
            let (r1, r2, _) = site.ranks();
            let (r1, r2) = (float(r1), float(r2));
            let (outputs, inputs) = shape.linear(site.id().module);
            let (out, input) = (float(outputs), float(inputs));
            costs.delta += 2.0 * (r1 * input + r1 * r2 + r2 * out);
            // Keys, two halves of the values, and the sums S and G.
            costs.write += 2.0 * (r1 * input + 2.0 * r2 * d + r1 * r2 + r1 * r1);
            // A Cholesky factorisation and two triangular solves.
            costs.read_out += r1 * r1 * r1 / 3.0 + 2.0 * r1 * r1 * r2;
            costs.written_layers = costs.written_layers.max(float(site.id().layer + 1));
            let above = float(config.layers - site.id().layer);
            costs.adapted_layers = costs.adapted_layers.max(above);
            costs.lora += 2.0 * float(rank) * (input + out);
            costs.lora_floats += rank * (inputs + outputs);
        }
        costs
    }

    /// A pass over `tokens` tokens behind `before` others, with `rows` rows of logits, with an imprint or without.
    pub(crate) fn pass(&self, before: usize, tokens: usize, rows: usize, imprint: bool) -> f64 {
        let pairs = pairs(before, tokens);
        let delta = if imprint { self.delta } else { 0.0 };
        self.layers * (self.layer * float(tokens) + self.pair * pairs)
            + delta * float(tokens)
            + self.head * float(rows)
    }

    /// Reading windows of so many tokens into a state, and the core out of it.
    pub(crate) fn imprint(&self, windows: impl Iterator<Item = usize>) -> f64 {
        let windows: f64 = windows
            .map(|tokens| {
                self.written_layers * (self.layer * float(tokens) + self.pair * pairs(0, tokens))
                    + self.write * float(tokens)
            })
            .sum();
        windows + self.read_out
    }

    /// What a low-rank adapter adds to a pass over so many tokens.
    pub(crate) fn lora_pass(&self, tokens: usize) -> f64 {
        self.lora * float(tokens)
    }

    /// Steps of gradient descent on windows of so many tokens, each scored: forward through all layers and back to the lowest
    /// site. Frozen weights have no gradient, so that their way back costs what the way forward does.
    pub(crate) fn lora(&self, windows: impl Iterator<Item = usize>, steps: usize) -> f64 {
        let there_and_back = self.layers + self.adapted_layers;
        let step: f64 = windows
            .map(|tokens| {
                float(tokens) * (there_and_back * self.layer + 2.0 * self.head + 3.0 * self.lora)
                    + (there_and_back + self.adapted_layers) * self.pair * pairs(0, tokens)
            })
            .sum();
        step * float(steps)
    }

    /// Floats of a low-rank adapter.
    pub(crate) fn lora_floats(&self) -> usize {
        self.lora_floats
    }

    /// Floats of the keys and values of so many tokens.
    pub(crate) fn kv_floats(&self, tokens: usize) -> usize {
        self.kv * tokens
    }

    /// How many tokens of context in front of a prompt of `prompt` tokens with `rows` rows of logits cost at most `budget`.
    pub(crate) fn affordable(&self, budget: f64, prompt: usize, rows: usize, most: usize) -> usize {
        let fits = |context: usize| self.pass(0, context + prompt, rows, false) <= budget;
        let (mut low, mut high) = (0, most + 1);
        while low + 1 < high {
            let middle = usize::midpoint(low, high);
            if fits(middle) {
                low = middle;
            } else {
                high = middle;
            }
        }
        low
    }
}

/// Pairs of a token and a position that it sees, itself included.
fn pairs(before: usize, tokens: usize) -> f64 {
    float(tokens) * float(before) + float(tokens) * (float(tokens) + 1.0) / 2.0
}
