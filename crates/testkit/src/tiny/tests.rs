//! Tests of the tiny models: names, shapes and that equal specs give equal files.

use std::path::PathBuf;

use candle_core::Device;

use super::*;

/// A folder of this test alone; the target directory is cleaned by cargo.
fn folder(name: &str) -> PathBuf {
    std::env::temp_dir().join(format!("imprint-testkit-{}-{name}", std::process::id()))
}

#[test]
fn a_sharded_base_has_every_tensor_once_and_equal_specs_give_equal_files() {
    let spec = TinySpec {
        architecture: "qwen3",
        tied: false,
        shards: 3,
        dtype: DType::BF16,
        ..TinySpec::default()
    };
    let (one, two) = (folder("one"), folder("two"));
    tiny_base(&one, &spec);
    tiny_base(&two, &spec);
    let index: Value =
        serde_json::from_slice(&fs::read(one.join("model.safetensors.index.json")).unwrap())
            .unwrap();
    let map = index["weight_map"].as_object().unwrap();
    assert_eq!(map.len(), 3 + spec.layers * 11);
    let mut found = 0;
    for shard in 1..=3 {
        let file = format!("model-{shard:05}-of-00003.safetensors");
        let tensors = safetensors::load(one.join(&file), &Device::Cpu).unwrap();
        found += tensors.len();
        assert!(
            tensors
                .iter()
                .all(|(name, t)| map[name] == file && t.dtype() == DType::BF16)
        );
        assert_eq!(
            fs::read(one.join(&file)).unwrap(),
            fs::read(two.join(&file)).unwrap()
        );
    }
    assert_eq!(found, map.len());
    for dir in [one, two] {
        fs::remove_dir_all(dir).unwrap();
    }
}

#[test]
fn a_generator_of_either_form_has_the_shapes_of_its_sites() {
    let base = TinySpec {
        head_dim: Some(6),
        ..TinySpec::default()
    };
    for (form, extra) in [(Form::Published, "A2"), (Form::Associative, "A3n")] {
        let spec = GeneratorSpec {
            form,
            modules: vec!["o_proj", "down_proj"],
            layers: Some(vec![1]),
            ..GeneratorSpec::default()
        };
        let dir = folder(extra);
        tiny_generator(&dir, &base, &spec);
        let tensors =
            safetensors::load(dir.join("adapter_model.safetensors"), &Device::Cpu).unwrap();
        let dims = |name: &str| {
            tensors[&format!(
                "base_model.model.model.layers.1.base_layer.self_attn.o_proj.fastlora_{name}"
            )]
                .dims()
                .to_vec()
        };
        assert_eq!(dims("A1.weight"), [12, 24]);
        assert_eq!(dims("B.weight"), [32, 10]);
        assert_eq!(
            dims(&format!("{extra}.weight")),
            [if form == Form::Published { 12 } else { 10 }, 32]
        );
        assert_eq!(
            tensors.len(),
            2 * if form == Form::Published { 5 } else { 6 }
        );
        fs::remove_dir_all(dir).unwrap();
    }
}

#[test]
fn bytes_are_spelled_as_gpt2_spells_them() {
    assert_eq!(
        [b' ', b'\n', b'a', 0, 0x7f, 0xad].map(byte_letter),
        ['Ġ', 'Ċ', 'a', 'Ā', 'ġ', 'Ń']
    );
}
