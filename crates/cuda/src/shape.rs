//! The shape of a decoder and of its generator, as plain numbers: all that the device must know of either.
//!
//! Start at [`Shape`].

use crate::{
    Error,
    error::fits,
    ops::{Heads, SiteGates},
};

/// The shape of a decoder (Llama, Mistral, Qwen 2 and 3).
#[derive(Clone, Debug)]
pub struct Shape {
    /// Decoder layers.
    pub layers: usize,
    /// D.
    pub hidden: usize,
    /// F.
    pub intermediate: usize,
    /// Heads.
    pub heads: Heads,
    /// V.
    pub vocab: usize,
    /// eps of all norms.
    pub eps: f32,
    /// Rotary frequencies with their scaling, [Dh/2].
    pub frequencies: Vec<f64>,
    /// Positions that rotary tables are made for.
    pub positions: usize,
    /// Only so many keys are visible to a query; 0: all.
    pub window: usize,
    /// The head is the embedding table.
    pub tied: bool,
    /// q, k and v have biases.
    pub attention_bias: bool,
    /// Each head's q and k are normed before the rotation.
    pub qk_norm: bool,
}

impl Shape {
    /// Mistral 7B: 7.24 G weights.
    pub fn mistral_7b() -> Self {
        Self {
            layers: 32,
            hidden: 4096,
            intermediate: 14_336,
            heads: Heads {
                queries: 32,
                keys: 8,
                dim: 128,
            },
            vocab: 32_000,
            eps: 1e-5,
            frequencies: (0..64).map(|i| 1e6f64.powf(-f64::from(i) / 64.0)).collect(),
            positions: 32_768,
            window: 0,
            tied: false,
            attention_bias: false,
            qk_norm: false,
        }
    }

    /// A model of a few kilobytes, for the software device.
    pub(crate) fn tiny() -> Self {
        Self {
            layers: 2,
            hidden: 32,
            intermediate: 48,
            heads: Heads {
                queries: 4,
                keys: 2,
                dim: 16,
            },
            vocab: 96,
            positions: 256,
            frequencies: (0..8).map(|i| 1e4f64.powf(-f64::from(i) / 8.0)).collect(),
            ..Self::mistral_7b()
        }
    }

    /// Weights that a decode step reads: all of them but the embedding table, of which it reads one row a token.
    pub fn weights_of_step(&self) -> usize {
        let attention =
            self.heads.stride() * self.hidden + self.heads.queries * self.heads.dim * self.hidden;
        self.layers * (attention + 3 * self.hidden * self.intermediate) + self.vocab * self.hidden
    }

    /// Bytes that the keys and values of one token take over all layers.
    pub fn kv_bytes(&self) -> usize {
        self.layers * 2 * self.heads.keys * self.heads.dim * 2
    }

    pub(crate) fn check(&self) -> Result<(), Error> {
        let Heads { queries, keys, dim } = self.heads;
        fits(
            keys > 0
                && queries > 0
                && queries.is_multiple_of(keys)
                && self.frequencies.len() * 2 == dim,
            || format!("heads {:?}", self.heads),
        )?;
        fits(
            self.layers > 0 && self.vocab > 0 && self.positions > 0,
            || format!("a decoder of {self:?}"),
        )?;
        fits(
            self.hidden.is_multiple_of(8)
                && self.intermediate.is_multiple_of(8)
                && self.hidden > 0
                && self.intermediate > 0,
            || {
                format!(
                    "sizes {} and {} that are not multiples of 8",
                    self.hidden, self.intermediate
                )
            },
        )?;
        if ![16, 64, 128].contains(&dim) || queries / keys > 16 {
            return Err(Error::Unsupported {
                what: format!("attention of {:?}", self.heads),
            });
        }
        Ok(())
    }
}

/// How a generator's tokens write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// Keys and values from normed hidden states.
    Published,
    /// Keys of the site's own input, values of the next token and the hidden state.
    Associative,
}

/// A linear that a site can sit at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// self_attn.o_proj
    Output,
    /// mlp.down_proj
    Down,
}

impl Place {
    /// Name in a checkpoint.
    pub fn name(self) -> &'static str {
        match self {
            Self::Output => "self_attn.o_proj",
            Self::Down => "mlp.down_proj",
        }
    }
}

/// The shape of a generator: the same places in every layer that it adapts, the same ranks everywhere.
#[derive(Clone, Debug)]
pub struct GeneratorShape {
    /// How tokens write.
    pub form: Form,
    /// Where its sites are, in the order in which a layer computes them.
    pub places: Vec<Place>,
    /// The layers that have sites, ascending; `None`: all.
    pub layers: Option<Vec<usize>>,
    /// R1.
    pub r1: usize,
    /// R2.
    pub r2: usize,
    /// q of the cores; 0: they are kept dense.
    pub rank: usize,
    /// alpha / R2.
    pub scale: f32,
    /// Where gates close and over which width, if cores may have some.
    pub gate: Option<(f32, f32)>,
}

impl GeneratorShape {
    /// The published generator's: o_proj, 1024 by 1024, rank 128.
    pub fn published_7b() -> Self {
        Self {
            form: Form::Published,
            places: vec![Place::Output],
            layers: None,
            r1: 1024,
            r2: 1024,
            rank: 128,
            scale: 64.0 / 1024.0,
            gate: None,
        }
    }

    /// Elements of one site's core.
    pub fn site_size(&self) -> usize {
        crate::ops::SiteCores::size(self.r1, self.r2, self.rank)
    }

    /// Its sites in a decoder of so many layers.
    pub fn sites(&self, layers: usize) -> usize {
        self.layers.as_ref().map_or(layers, Vec::len) * self.places.len()
    }

    /// Index of the first site of a layer, if it has any.
    pub fn first_site(&self, layer: usize) -> Option<usize> {
        let index = match &self.layers {
            Some(layers) => layers.iter().position(|other| *other == layer)?,
            None => layer,
        };
        Some(index * self.places.len())
    }

    /// Elements of a slot that holds the core of so many sites, and its gates behind it.
    pub fn slot_size(&self, sites: usize) -> usize {
        let gate = self.gate.map_or(0, |_| SiteGates::size(self.r1));
        sites * (self.site_size() + gate)
    }

    /// Elements of a core: all sites.
    pub fn core_size(&self, layers: usize) -> usize {
        self.sites(layers) * self.site_size()
    }

    pub(crate) fn check(&self, layers: usize) -> Result<(), Error> {
        let ascend = |named: &Vec<usize>| {
            named.windows(2).all(|pair| pair[0] < pair[1])
                && named.last().is_some_and(|last| *last < layers)
        };
        fits(self.layers.as_ref().is_none_or(ascend), || {
            format!("sites in the layers {:?} of {layers}", self.layers)
        })?;
        let sizes = [self.r1, self.r2]
            .into_iter()
            .chain((self.rank > 0).then_some(self.rank));
        fits(
            sizes.into_iter().all(|n| n > 0 && n.is_multiple_of(8)),
            || {
                format!(
                    "ranks {}, {} and {} that are not multiples of 8",
                    self.r1, self.r2, self.rank
                )
            },
        )?;
        fits(
            !self.places.is_empty()
                && self
                    .places
                    .windows(2)
                    .all(|pair| pair[0] == Place::Output && pair[1] == Place::Down),
            || format!("sites at {:?}", self.places),
        )
    }
}
