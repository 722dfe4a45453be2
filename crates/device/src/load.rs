//! What a model's files say, in the device's words: shapes, and weights by name.
//!
//! Matrices of GGUF's Q4_0, Q4_1 and Q8_0 stay as they are, if that is asked for; any other format that `lm` reads becomes bf16. What the device has no form for is refused by name. Start at [`Files`].

use std::{cell::RefCell, path::Path};

use cuda::{Blocks, Error, Form, GeneratorShape, Place, Shape, Source, ops::Heads};
use generator::{Generator, Module, ReadOut, Write};
use half::bf16;
use lm::Tensors;

/// A decoder's files, and a generator for it.
pub(crate) struct Files {
    pub(crate) tensors: Tensors,
    pub(crate) generator: Option<Generator>,
    trained: Option<Source>,
}

fn unsupported(what: String) -> Error {
    Error::Unsupported { what }
}

impl Files {
    pub(crate) fn open(model: &Path, generator: Option<&Path>) -> Result<Self, engine::Error> {
        let tensors = Tensors::open(model)?;
        let (mut loaded, mut trained) = (None, None);
        if let Some(folder) = generator {
            let generator = Generator::load(folder, &tensors.config().base_shape())?;
            if !generator.config().names_base(tensors.digest()) {
                return Err(lm::Error::ForeignBase {
                    expected: generator.config().base_digest.join(" or "),
                    found: tensors.digest().to_owned(),
                }
                .into());
            }
            loaded = Some(generator);
            let files = cuda::Files::open(folder).map_err(crate::machine::failed)?;
            trained = Some(Source::Files(files));
        }
        Ok(Self {
            tensors,
            generator: loaded,
            trained,
        })
    }

    /// The decoder's shape, with tables for so many positions.
    pub(crate) fn shape(&self, positions: usize) -> Result<Shape, Error> {
        let config = self.tensors.config();
        if config.output_bias {
            return Err(unsupported("a bias of o_proj".into()));
        }
        Ok(Shape {
            layers: config.layers,
            hidden: config.hidden,
            intermediate: config.intermediate,
            heads: Heads {
                queries: config.heads,
                keys: config.kv_heads,
                dim: config.head_dim,
            },
            vocab: config.vocab,
            eps: config.rms_norm_eps as f32,
            frequencies: config.rope_frequencies(),
            positions,
            window: config.sliding_window.unwrap_or(0),
            tied: config.tied_embeddings,
            attention_bias: config.attention_bias,
            qk_norm: config.qk_norm,
        })
    }

    /// The generator's shape, if there is one.
    pub(crate) fn generator_shape(&self) -> Result<Option<GeneratorShape>, Error> {
        self.generator.as_ref().map(shape_of).transpose()
    }

    /// All weights by name, in bf16, and those of the generator; with how many the decoder has, once they are read.
    pub(crate) fn sources(self) -> (Weights, Option<Generator>, Option<Source>) {
        let Self {
            tensors,
            generator,
            trained,
        } = self;
        (Weights(RefCell::new(tensors).into()), generator, trained)
    }
}

/// A decoder's weights by name.
pub(crate) struct Weights(std::rc::Rc<RefCell<Tensors>>);

impl Weights {
    pub(crate) fn source(&self, quantised: bool) -> Source {
        let tensors = std::rc::Rc::clone(&self.0);
        let values = Box::new(move |name: &str, _| {
            let values = tensors.borrow_mut().read(name);
            let values = values.map_err(|error| unsupported(error.to_string()))?;
            Ok(values.into_iter().map(bf16::from_f32).collect())
        });
        if !quantised {
            return Source::Asked(values);
        }
        let tensors = std::rc::Rc::clone(&self.0);
        let blocks = move |name: &str, _| {
            let raw = tensors
                .borrow_mut()
                .read_as(name, &["Q4_0", "Q4_1", "Q8_0"]);
            let raw = raw.map_err(|error| unsupported(error.to_string()))?;
            Ok(raw.and_then(|(format, bytes)| Blocks::from_gguf(format, &bytes)))
        };
        Source::Quantised(values, Box::new(blocks))
    }

    /// Weights that were read.
    pub(crate) fn parameters(&self) -> u64 {
        self.0.borrow().parameters()
    }
}

fn shape_of(generator: &Generator) -> Result<GeneratorShape, Error> {
    let config = generator.config();
    let form = match (config.write, config.read_out) {
        (Write::Published, ReadOut::Svd | ReadOut::Frobenius | ReadOut::Spectral) => {
            Form::Published
        }
        (Write::Associative, ReadOut::Ridge) => Form::Associative,
        (write, read_out) => {
            return Err(unsupported(format!(
                "{write:?} sums, read out by {read_out:?}"
            )));
        }
    };
    let place = |module: &Module| match module {
        Module::OProj => Ok(Place::Output),
        Module::DownProj => Ok(Place::Down),
        other => Err(unsupported(format!("sites at {}", other.name()))),
    };
    let places = config.modules.iter().map(place);
    let (r1, r2) = (config.r1, config.r2);
    // Kernels take eights; as `generator` has it, N is kept whole where that is smaller.
    let rank = config.max_rank.next_multiple_of(8);
    let dense = matches!(config.read_out, ReadOut::Frobenius | ReadOut::Spectral)
        || config.max_rank * (r1 + r2) >= r1 * r2;
    Ok(GeneratorShape {
        form,
        places: places.collect::<Result<_, _>>()?,
        layers: config.layers.clone(),
        r1,
        r2,
        rank: if dense { 0 } else { rank },
        scale: (config.alpha / r2 as f64) as f32,
        gate: generator.gate().map(generator::Gate::numbers),
    })
}
