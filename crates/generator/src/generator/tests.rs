//! Reference vectors of the read-outs: printed states in, deltas and N out.

use std::{collections::HashMap, fs, path::Path};

use serde_json::Value;
use testkit::{associative_dir, golden_dir, relative_error};

use super::*;
use crate::testing::tensors;

/// The base of a case, as far as a generator must know it.
fn base(path: &Path) -> BaseShape {
    let config: Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    let size = |key: &str| config[key].as_u64().map(|size| size as usize);
    let heads = size("num_attention_heads").unwrap();
    let head = size("head_dim").unwrap_or_else(|| size("hidden_size").unwrap() / heads);
    BaseShape {
        layers: size("num_hidden_layers").unwrap(),
        hidden: size("hidden_size").unwrap(),
        intermediate: size("intermediate_size").unwrap(),
        query: heads * head,
        key_value: size("num_key_value_heads").unwrap() * head,
        vocab: size("vocab_size").unwrap(),
    }
}

/// The largest error of a case's deltas over all strategies and sites, and how many there are.
fn worst(generator: &Generator, expected: &HashMap<String, Tensor>) -> (f64, usize) {
    let mut errors = Vec::new();
    for strategy in ["concat", "parallel", "sequential", "sequential-long"] {
        let named = |site: &Site, what: &str| {
            let SiteId { layer, module } = site.id();
            expected[&format!("{strategy}.exact.layer.{layer}.{}.{what}", module.name())].clone()
        };
        // The cases give S alone: what a read-out makes of its rounding has tests of its own.
        let sums = generator
            .sites()
            .iter()
            .map(|site| (named(site, "state"), None, Some(0.0)))
            .collect();
        let core = generator.read_out(&State::of(sums, 70)).unwrap();
        for (index, site) in generator.sites().iter().enumerate() {
            errors.push(relative_error(
                &generator.delta_weight(index, &core).unwrap(),
                &named(site, "delta"),
            ));
        }
    }
    (errors.iter().copied().fold(0.0, f64::max), errors.len())
}

#[test]
fn golden_states_give_golden_deltas() {
    let Some(folder) = golden_dir() else { return };
    let mut cases: Vec<_> = fs::read_dir(&folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    cases.retain(|case| case.join("generator").is_dir());
    cases.sort();
    assert!(!cases.is_empty(), "no case in {}", folder.display());
    for case in cases {
        let generator = Generator::load(
            &case.join("generator"),
            &base(&case.join("base/config.json")),
        )
        .unwrap();
        let (error, count) = worst(&generator, &tensors(&case.join("expected.safetensors")));
        assert!(
            count > 0 && error < 1e-4,
            "{}: {error:.1e} over {count} deltas",
            case.display()
        );
    }
}

#[test]
fn golden_sums_of_the_first_generator_give_golden_ridges() {
    let Some(folder) = associative_dir() else {
        return;
    };
    let expected = tensors(&folder.join("expected.safetensors"));
    let base = BaseShape {
        layers: 30,
        hidden: 576,
        intermediate: 1536,
        query: 576,
        key_value: 192,
        vocab: 49152,
    };
    let generator = Generator::load(&folder, &base).unwrap();
    for layer in [9, 29] {
        let of = |what: &str| expected[&format!("layer.{layer}.{what}")].clone();
        let sums = generator
            .sites()
            .iter()
            .map(|_| (of("S"), Some(of("G")), None))
            .collect();
        let core = generator.read_out(&State::of(sums, 52)).unwrap();
        let index = generator
            .site_index(SiteId {
                layer,
                module: crate::Module::DownProj,
            })
            .unwrap();
        let error = relative_error(&core.matrix(index).unwrap().unwrap(), &of("N"));
        assert!(error < 1e-3, "layer {layer}: {error:.1e}");
    }
}
