//! What this crate's tests share: tiny generators on random bases, and random rows.

use std::path::Path;

use candle_core::Tensor;
use testkit::{Form, GeneratorSpec, Random, TinySpec, tiny_generator};

use crate::{BaseShape, Generator, State, Window, WriteRows};

/// The sizes of a tiny base.
pub(crate) fn shape(base: &TinySpec) -> BaseShape {
    BaseShape {
        layers: base.layers,
        hidden: base.hidden,
        intermediate: base.intermediate,
        query: base.heads * base.head_dim(),
        key_value: base.kv_heads * base.head_dim(),
        vocab: base.vocab,
    }
}

/// A random generator of that spec, loaded from a folder that is gone afterwards.
pub(crate) fn tiny(spec: &GeneratorSpec) -> Generator {
    let dir = tempfile::tempdir().unwrap();
    let base = TinySpec::default();
    tiny_generator(dir.path(), &base, spec);
    Generator::load(dir.path(), &shape(&base)).unwrap()
}

pub(crate) fn published(norm: &'static str) -> Generator {
    tiny(&GeneratorSpec {
        form: Form::Published,
        norm: Some(norm),
        ..GeneratorSpec::default()
    })
}

pub(crate) fn associative() -> Generator {
    tiny(&GeneratorSpec::default())
}

/// One random generator of each read-out.
pub(crate) fn all() -> [Generator; 4] {
    [
        published("svd"),
        published("frobenius"),
        published("spectral"),
        associative(),
    ]
}

/// What a site sees of a batch of T rows: x [T, Din], h [T, D], u [T, D].
pub(crate) struct Batch {
    pub(crate) x: Tensor,
    pub(crate) h: Tensor,
    pub(crate) u: Tensor,
}

pub(crate) fn batch(generator: &Generator, site: usize, seed: u64, tokens: usize) -> Batch {
    let inputs = generator.sites()[site].a1.in_features();
    let hidden = generator.sites()[site].gain.dims()[0];
    let mut random = Random::new(seed);
    let x = random.tensor(&[tokens, inputs], 0.0, 1.0);
    let h = random.tensor(&[tokens, hidden], 0.0, 3.0);
    let u = crate::normed_embeddings(&random.tensor(&[tokens, hidden], 0.0, 0.1)).unwrap();
    Batch { x, h, u }
}

/// A window that holds `tokens` random tokens at every site.
pub(crate) fn window(generator: &Generator, seed: u64, tokens: usize) -> Window {
    let mut window = generator.new_window().unwrap();
    for (index, site) in generator.sites().iter().enumerate() {
        let Batch { x, h, u } = batch(generator, index, seed + 1000 * index as u64, tokens);
        let row = WriteRows {
            start: 0,
            len: tokens,
            position: 0,
            lookahead: None,
            window: &mut window,
        };
        site.write(index, &x, &h, &u, &mut [row]).unwrap();
    }
    window
}

/// The state of documents, a window each: (seed, tokens).
pub(crate) fn state(generator: &Generator, documents: &[(u64, usize)]) -> State {
    let mut state = generator.new_state().unwrap();
    for (seed, tokens) in documents {
        state
            .add_window(&window(generator, *seed, *tokens), 1.0)
            .unwrap();
    }
    state
}

/// All sums of a state, bit by bit.
pub(crate) fn state_bits(state: &State) -> Vec<u32> {
    (0..state.len())
        .flat_map(|site| sums_bits(state.sums(site).unwrap()))
        .collect()
}

/// All sums of a window, bit by bit.
pub(crate) fn window_bits(generator: &Generator, window: &Window) -> Vec<u32> {
    (0..generator.sites().len())
        .flat_map(|site| sums_bits(window.sums(site).unwrap()))
        .collect()
}

fn sums_bits((s, g): (&Tensor, Option<&Tensor>)) -> Vec<u32> {
    [Some(s), g].into_iter().flatten().flat_map(bits).collect()
}

pub(crate) fn bits(t: &Tensor) -> Vec<u32> {
    t.flatten_all()
        .unwrap()
        .to_vec1::<f32>()
        .unwrap()
        .into_iter()
        .map(f32::to_bits)
        .collect()
}

/// The tensors of a safetensors file.
pub(crate) fn tensors(path: &Path) -> std::collections::HashMap<String, Tensor> {
    candle_core::safetensors::load(path, &candle_core::Device::Cpu).unwrap()
}
