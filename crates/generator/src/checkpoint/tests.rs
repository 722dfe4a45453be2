//! Real checkpoints load; truncated, lying, foreign and mismatched ones are refused by name.

use std::{collections::HashMap, fs, path::PathBuf};

use candle_core::DType;
use proptest::prelude::*;
use safetensors::tensor::TensorView;
use tempfile::TempDir;
use testkit::{Form, GeneratorSpec, TinySpec, tiny_generator};

use super::*;
use crate::{
    Generator, Module,
    testing::{shape, tensors},
};

/// A tiny generator in a folder of its own.
fn folder() -> (TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    tiny_generator(dir.path(), &TinySpec::default(), &GeneratorSpec::default());
    let weights = dir.path().join("adapter_model.safetensors");
    (dir, weights)
}

fn load(dir: &TempDir) -> Result<Generator, Error> {
    Generator::load(dir.path(), &shape(&TinySpec::default()))
}

/// Loads the tiny generator after a change of its tensors.
fn changed(change: impl FnOnce(&mut HashMap<String, Tensor>)) -> Result<Generator, Error> {
    let (dir, weights) = folder();
    let mut all = tensors(&weights);
    change(&mut all);
    candle_core::safetensors::save(&all, &weights).unwrap();
    load(&dir)
}

const SITE: &str = "base_model.model.model.layers.1.base_layer.mlp.down_proj.fastlora_";

fn named(tensor: &str) -> String {
    format!("{SITE}{tensor}")
}

#[test]
fn the_shipped_generator_loads_in_its_own_format() {
    let dir = testkit::repository_root().join("models/smollm2-135m-instruct");
    let base = BaseShape {
        layers: 30,
        hidden: 576,
        intermediate: 1536,
        query: 576,
        key_value: 192,
        vocab: 49152,
    };
    let generator = Generator::load(&dir, &base).unwrap();
    let layers: Vec<_> = generator
        .sites()
        .iter()
        .map(|site| site.id().layer)
        .collect();
    assert_eq!(layers, [9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29]);
    assert!(
        generator
            .sites()
            .iter()
            .all(|site| site.ranks() == (256, 256, 256))
    );
    assert!(
        generator
            .sites()
            .iter()
            .all(|site| site.a1.format() == WeightFormat::BF16 && site.ridge.unwrap() > 0.0)
    );
    // A1 393,216 + A3, A3n, B 147,456 each + norm 576 + ridge 1, of 11 sites.
    assert_eq!(
        generator.parameters(),
        11 * (393_216 + 3 * 147_456 + 576 + 1)
    );
    assert_eq!(
        generator.digest(),
        Generator::load(&dir, &base).unwrap().digest()
    );
    assert_eq!(
        generator.site_index(SiteId {
            layer: 13,
            module: Module::DownProj
        }),
        Some(2)
    );
    assert_eq!(
        generator.site_index(SiteId {
            layer: 13,
            module: Module::OProj
        }),
        None
    );
}

#[test]
fn half_precision_checkpoints_load_and_differ_in_digest() {
    let digests = [DType::F32, DType::F16, DType::BF16].map(|dtype| {
        let loaded = changed(|all| {
            all.values_mut()
                .for_each(|t| *t = t.to_dtype(dtype).unwrap())
        })
        .unwrap();
        loaded.digest().to_owned()
    });
    assert!(digests[0] != digests[1] && digests[1] != digests[2] && digests[0] != digests[2]);
}

#[test]
fn both_spellings_of_the_ridge_are_read() {
    let spelt = changed(|all| {
        let ridge = all.remove(&named("ridge")).unwrap();
        all.insert(named("ridge.weight"), ridge);
    });
    assert_eq!(
        spelt.unwrap().sites()[1].ridge,
        load(&folder().0).unwrap().sites()[1].ridge
    );
}

#[test]
fn a_tensor_under_both_spellings_is_foreign() {
    let fault = changed(|all| {
        let ridge = all[&named("ridge")].clone();
        all.insert(named("ridge.weight"), ridge);
    });
    assert!(
        matches!(fault.unwrap_err(), Error::Tensors { missing, foreign } if missing.is_empty() && foreign.len() == 1)
    );
}

#[test]
fn missing_and_foreign_tensors_are_named() {
    let fault = changed(|all| {
        let a1 = all.remove(&named("A1.weight")).unwrap();
        all.insert(
            "base_model.model.model.layers.1.mlp.down_proj.lora_A.weight".to_owned(),
            a1,
        );
    });
    let message = fault.unwrap_err().to_string();
    assert!(
        message.contains(&named("A1")) && message.contains("lora_A.weight"),
        "{message}"
    );
}

#[test]
fn a_generator_of_another_base_is_refused() {
    let (dir, _) = folder();
    let wider = shape(&TinySpec {
        hidden: 64,
        ..TinySpec::default()
    });
    let fault = Generator::load(dir.path(), &wider).unwrap_err();
    assert!(matches!(fault, Error::Shape { .. }), "{fault}");
    let shallower = shape(&TinySpec {
        layers: 1,
        ..TinySpec::default()
    });
    let fault = Generator::load(dir.path(), &shallower).unwrap_err();
    assert!(
        matches!(&fault, Error::Tensors { foreign, .. } if foreign[0].contains("layers.1.")),
        "{fault}"
    );
}

#[test]
fn a_layer_that_the_base_lacks_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let spec = GeneratorSpec {
        layers: Some(vec![0, 7]),
        ..GeneratorSpec::default()
    };
    tiny_generator(
        dir.path(),
        &TinySpec {
            layers: 8,
            ..TinySpec::default()
        },
        &spec,
    );
    assert!(matches!(
        load(&dir).unwrap_err(),
        Error::Layer {
            layer: 7,
            layers: 2
        }
    ));
}

#[test]
fn every_linear_of_a_layer_can_be_a_site() {
    let dir = tempfile::tempdir().unwrap();
    let modules = Module::ALL.map(Module::name).to_vec();
    let spec = GeneratorSpec {
        form: Form::Published,
        modules,
        ..GeneratorSpec::default()
    };
    tiny_generator(dir.path(), &TinySpec::default(), &spec);
    let generator = load(&dir).unwrap();
    let ids: Vec<_> = generator.sites().iter().map(Site::id).collect();
    assert!(ids.is_sorted() && ids.len() == 14);
    assert!(
        ids.iter()
            .enumerate()
            .all(|(index, id)| generator.site_index(*id) == Some(index))
    );
}

#[test]
fn integers_are_no_weights() {
    let fault = changed(|all| {
        let a1 = all[&named("A1.weight")].to_dtype(DType::I64).unwrap();
        all.insert(named("A1.weight"), a1);
    });
    let message = fault.unwrap_err().to_string();
    assert!(
        message.contains("A1") && message.contains("I64"),
        "{message}"
    );
}

#[test]
fn a_ridge_that_is_not_positive_and_a_gain_that_is_not_finite_are_refused() {
    for (tensor, factor) in [
        ("ridge", 0.0),
        ("ridge", -1.0),
        ("ridge", f64::NAN),
        ("hidden_state_norm.weight", f64::INFINITY),
    ] {
        let fault = changed(|all| {
            let scaled = (&all[&named(tensor)] * factor).unwrap();
            all.insert(named(tensor), scaled);
        });
        let fault = fault.unwrap_err();
        assert!(
            matches!(&fault, Error::Values { key, .. } if key.starts_with(SITE)),
            "{tensor} * {factor}: {fault}"
        );
    }
}

#[test]
fn a_missing_file_is_named() {
    let (dir, weights) = folder();
    fs::remove_file(&weights).unwrap();
    assert!(
        load(&dir)
            .unwrap_err()
            .to_string()
            .contains("adapter_model.safetensors")
    );
    fs::remove_file(dir.path().join("adapter_config.json")).unwrap();
    assert!(
        load(&dir)
            .unwrap_err()
            .to_string()
            .contains("adapter_config.json")
    );
}

#[test]
fn a_header_that_lies_about_its_length_is_refused() {
    for size in [u64::MAX, u64::MAX - 8, 1 << 40, MAX_HEADER + 1, 0] {
        let (dir, weights) = folder();
        let mut bytes = fs::read(&weights).unwrap();
        bytes[..8].copy_from_slice(&size.to_le_bytes());
        fs::write(&weights, bytes).unwrap();
        let fault = load(&dir).unwrap_err();
        assert!(matches!(fault, Error::Malformed { .. }), "{size}: {fault}");
    }
}

#[test]
fn shapes_that_overflow_are_refused() {
    let header = format!(
        r#"{{"{}":{{"dtype":"F32","shape":[{max},{max}],"data_offsets":[0,4]}}}}"#,
        named("A1.weight"),
        max = u64::MAX
    );
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.extend([0; 4]);
    let (dir, weights) = folder();
    fs::write(&weights, bytes).unwrap();
    assert!(matches!(load(&dir).unwrap_err(), Error::Malformed { .. }));
}

#[test]
fn a_file_of_another_kind_is_refused() {
    let (dir, weights) = folder();
    fs::write(
        &weights,
        b"GGUF\x03\x00\x00\x00 and so on, for more than a few bytes",
    )
    .unwrap();
    assert!(matches!(load(&dir).unwrap_err(), Error::Malformed { .. }));
    let empty: [(&str, TensorView<'_>); 0] = [];
    fs::write(&weights, safetensors::serialize(empty, None).unwrap()).unwrap();
    assert!(matches!(load(&dir).unwrap_err(), Error::Tensors { .. }));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]
    #[test]
    fn a_truncated_or_lengthened_file_is_refused(cut in any::<proptest::sample::Index>(), longer in any::<bool>()) {
        let (dir, weights) = folder();
        let mut bytes = fs::read(&weights).unwrap();
        if longer { bytes.push(0) } else { bytes.truncate(cut.index(bytes.len())) }
        fs::write(&weights, bytes).unwrap();
        let fault = load(&dir).unwrap_err();
        prop_assert!(matches!(fault, Error::Malformed { .. }), "{}", fault);
    }

    #[test]
    fn a_header_with_a_changed_byte_never_panics(at in any::<proptest::sample::Index>(), byte in any::<u8>()) {
        let (dir, weights) = folder();
        let mut bytes = fs::read(&weights).unwrap();
        let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        bytes[at.index(8 + header)] = byte;
        fs::write(&weights, bytes).unwrap();
        if let Ok(generator) = load(&dir) {
            prop_assert_eq!(generator.sites().len(), 2);
        }
    }
}
