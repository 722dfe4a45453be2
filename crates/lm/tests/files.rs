//! Weight files: what GGUF says equals what the HF layout says, quantised or not; and files that are cut,
//! lying, incomplete or unsupported are errors that say so.

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

#[path = "support/gguf.rs"]
mod gguf;

use std::{
    fs,
    path::{Path, PathBuf},
};

use candle_core::{
    DType, Device, Tensor,
    quantized::{GgmlDType, QTensor, gguf_file::Value},
};
use gguf::{Weights, tensors, write_gguf};
use lm::{Lm, LoadOptions, RopeScaling, TokenId};
use proptest::prelude::*;
use serde_json::json;
use testkit::{TinySpec, relative_error, tiny_base};

fn logits(lm: &Lm) -> Tensor {
    let tokens: Vec<TokenId> = (0..40)
        .map(|i| TokenId(i * 37 % lm.config().vocab as u32))
        .collect();
    lm.logits(&tokens, None, 1.0).unwrap()
}

fn load(path: &Path) -> Lm {
    Lm::load(path, LoadOptions::default()).unwrap()
}

fn refusal(path: &Path) -> String {
    Lm::load(path, LoadOptions::default())
        .map(|_| ())
        .unwrap_err()
        .to_string()
}

#[test]
fn a_gguf_file_says_what_the_hf_layout_says() {
    let dir = tempfile::tempdir().unwrap();
    for architecture in ["llama", "qwen2", "qwen3"] {
        for tied in [true, false] {
            let spec = TinySpec {
                architecture,
                tied,
                head_dim: Some(10),
                ..TinySpec::default()
            };
            tiny_base(dir.path(), &spec);
            let path = dir.path().join("model.gguf");
            write_gguf(&path, &spec, &tensors(dir.path()), GgmlDType::F32, &[]);
            let (folder, gguf) = (load(dir.path()), load(&path));
            assert_eq!(folder.parameters(), gguf.parameters());
            let same = relative_error(&logits(&gguf), &logits(&folder));
            assert!(same < 1e-6, "{architecture}, tied {tied}: {same:.1e}");
        }
    }
}

#[test]
fn rope_freqs_of_gguf_are_llama3_scaling() {
    let dir = tempfile::tempdir().unwrap();
    let scaling = json!({
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 200,
    });
    let spec = TinySpec {
        rope_scaling: Some(scaling),
        ..TinySpec::default()
    };
    tiny_base(dir.path(), &spec);
    let folder = load(dir.path());
    let mut config = folder.config().clone();
    let scaled = config.rope_frequencies();
    config.rope_scaling = RopeScaling::None;
    let divisors: Vec<f32> = config
        .rope_frequencies()
        .iter()
        .zip(&scaled)
        .map(|(plain, f)| (plain / f) as f32)
        .collect();
    let mut weights = tensors(dir.path());
    weights.insert(
        "rope_freqs.weight".into(),
        Tensor::new(divisors, &Device::Cpu).unwrap(),
    );
    let path = dir.path().join("model.gguf");
    write_gguf(&path, &spec, &weights, GgmlDType::F32, &[]);
    let error = relative_error(&logits(&load(&path)), &logits(&folder));
    assert!(error < 1e-5, "{error:.1e}");
}

#[test]
fn quantised_weights_are_what_their_blocks_expand_to() {
    use GgmlDType::{BF16, F16, Q4_0, Q4_1, Q4K, Q6K, Q8_0};
    let spec = TinySpec {
        hidden: 256,
        intermediate: 512,
        layers: 1,
        ..TinySpec::default()
    };
    let dir = tempfile::tempdir().unwrap();
    let formats = [
        (Q8_0, "Q8_0"),
        (Q4_0, "Q4_0"),
        (Q4_1, "Q4_1"),
        (Q4K, "Q4_K"),
        (Q6K, "Q6_K"),
        (F16, "F16"),
        (BF16, "BF16"),
    ];
    for (format, name) in formats {
        tiny_base(dir.path(), &spec);
        let weights = tensors(dir.path());
        let path = dir.path().join("model.gguf");
        write_gguf(&path, &spec, &weights, format, &[]);
        // The HF layout with what candle makes of the blocks.
        let expanded: Weights = weights
            .into_iter()
            .map(|(name, weight)| {
                let format = if weight.rank() == 2 {
                    format
                } else {
                    GgmlDType::F32
                };
                (
                    name,
                    QTensor::quantize(&weight, format)
                        .unwrap()
                        .dequantize(&Device::Cpu)
                        .unwrap(),
                )
            })
            .collect();
        candle_core::safetensors::save(&expanded, dir.path().join("model.safetensors")).unwrap();
        let want = logits(&load(dir.path()));
        let kept = load(&path);
        assert_eq!(kept.weight_format(), name);
        let error = relative_error(&logits(&kept), &want);
        assert!(error < 1e-5, "{name}: {error:.1e}");
        let whole = Lm::load(
            &path,
            LoadOptions {
                dequantize: true,
                ..LoadOptions::default()
            },
        )
        .unwrap();
        let error = relative_error(&logits(&whole), &want);
        assert!(error < 1e-5, "{name} dequantised: {error:.1e}");
    }
}

#[test]
fn the_digest_is_blake3_of_config_and_weights_so_another_config_is_another_base() {
    let dir = tempfile::tempdir().unwrap();
    tiny_base(dir.path(), &TinySpec::default());
    let config = dir.path().join("config.json");
    let digest = || {
        let mut bytes = fs::read(&config).unwrap();
        bytes.extend(fs::read(dir.path().join("model.safetensors")).unwrap());
        blake3::hash(&bytes).to_hex().to_string()
    };
    let before = load(dir.path()).digest().to_owned();
    assert_eq!(before, digest());
    let mut keys: serde_json::Value = serde_json::from_slice(&fs::read(&config).unwrap()).unwrap();
    keys["rope_theta"] = json!(500_000.0);
    fs::write(&config, keys.to_string()).unwrap();
    assert_ne!(load(dir.path()).digest(), before);
    assert_eq!(load(dir.path()).digest(), digest());
}

#[test]
fn the_digest_of_a_gguf_file_is_its_own_blake3() {
    let dir = tempfile::tempdir().unwrap();
    let spec = TinySpec::default();
    tiny_base(dir.path(), &spec);
    let path = dir.path().join("model.gguf");
    write_gguf(&path, &spec, &tensors(dir.path()), GgmlDType::F32, &[]);
    let bytes = fs::read(&path).unwrap();
    assert_eq!(load(&path).digest(), blake3::hash(&bytes).to_hex().as_str());
}

#[test]
fn a_bias_that_the_architecture_has_no_place_for_is_refused_by_name() {
    for name in [
        "model.layers.1.self_attn.o_proj.bias",
        "model.layers.0.mlp.down_proj.bias",
    ] {
        let dir = tempfile::tempdir().unwrap();
        let spec = TinySpec {
            architecture: "qwen2",
            ..TinySpec::default()
        };
        tiny_base(dir.path(), &spec);
        load(dir.path());
        let mut weights = tensors(dir.path());
        let bias = Tensor::zeros(spec.hidden, DType::F32, &Device::Cpu).unwrap();
        weights.insert(name.to_owned(), bias);
        candle_core::safetensors::save(&weights, dir.path().join("model.safetensors")).unwrap();
        let refused = refusal(dir.path());
        assert!(refused.contains(name), "{refused}");
    }
}

#[test]
fn unsupported_values_are_named_with_their_key() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("config.json");
    for (key, value, named) in [
        ("hidden_act", json!("gelu"), "hidden_act = gelu"),
        ("model_type", json!("mamba"), "model_type = mamba"),
        (
            "rope_scaling",
            json!({"rope_type": "yarn", "factor": 4.0}),
            "rope_scaling.rope_type = yarn",
        ),
        (
            "rope_scaling",
            json!({"type": "linear", "factor": 4.0}),
            "rope_scaling.rope_type = linear",
        ),
        ("mlp_bias", json!(true), "mlp_bias = true"),
        (
            "partial_rotary_factor",
            json!(0.5),
            "partial_rotary_factor = 0.5",
        ),
        ("num_hidden_layers", json!(0), "a number of layers of 0"),
        ("num_hidden_layers", json!(u64::MAX), "a number of layers"),
        (
            "num_key_value_heads",
            json!(3),
            "4 heads over 3 key/value heads",
        ),
        ("head_dim", json!(7), "odd head size of 7"),
        ("hidden_size", json!("wide"), "hidden_size is not a size"),
        ("vocab_size", json!(null), "it has no vocab_size"),
        ("rms_norm_eps", json!(-1.0), "a norm eps of -1"),
    ] {
        tiny_base(dir.path(), &TinySpec::default());
        let mut config: serde_json::Value =
            serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        config[key] = value;
        fs::write(&path, config.to_string()).unwrap();
        let error = refusal(dir.path());
        assert!(
            error.contains(named) && error.contains("config.json"),
            "{key}: {error}"
        );
    }
}

#[test]
fn unsupported_gguf_values_are_named_with_their_key() {
    let dir = tempfile::tempdir().unwrap();
    let spec = TinySpec::default();
    tiny_base(dir.path(), &spec);
    let weights = tensors(dir.path());
    let path = dir.path().join("model.gguf");
    for (extra, format, named) in [
        (
            ("general.architecture", Value::String("mamba".into())),
            GgmlDType::F32,
            "general.architecture = mamba",
        ),
        (
            ("llama.expert_count", Value::U32(8)),
            GgmlDType::F32,
            "llama.expert_count = 8",
        ),
        (
            ("llama.rope.scaling.type", Value::String("yarn".into())),
            GgmlDType::F32,
            "llama.rope.scaling.type = yarn",
        ),
        (
            ("llama.rope.dimension_count", Value::U32(4)),
            GgmlDType::F32,
            "llama.rope.dimension_count = 4",
        ),
        (
            ("llama.attention.head_count", Value::String("4".into())),
            GgmlDType::F32,
            "head_count is not a whole number",
        ),
        (
            ("general.name", Value::String("x".into())),
            GgmlDType::Q5_0,
            "is in Q5_0",
        ),
    ] {
        let spec = TinySpec {
            intermediate: 64,
            ..spec.clone()
        };
        let mut weights = weights.clone();
        if format == GgmlDType::Q5_0 {
            tiny_base(dir.path(), &spec);
            weights = tensors(dir.path());
        }
        write_gguf(&path, &spec, &weights, format, &[extra]);
        let error = refusal(&path);
        assert!(error.contains(named), "{named}: {error}");
    }
}

#[test]
fn missing_and_misshapen_tensors_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let spec = TinySpec::default();
    let name = "model.layers.1.mlp.up_proj.weight";
    let changed = |change: &dyn Fn(&mut Weights)| {
        tiny_base(dir.path(), &spec);
        let mut weights = tensors(dir.path());
        change(&mut weights);
        candle_core::safetensors::save(&weights, dir.path().join("model.safetensors")).unwrap();
        let gguf = dir.path().join("model.gguf");
        write_gguf(&gguf, &spec, &weights, GgmlDType::F32, &[]);
        (refusal(dir.path()), refusal(&gguf))
    };
    let (folder, gguf) = changed(&|weights| drop(weights.remove(name)));
    assert_eq!(folder, format!("the weights have no tensor {name}"));
    assert_eq!(gguf, "the weights have no tensor blk.1.ffn_up.weight");
    let (folder, gguf) = changed(&|weights| {
        weights.insert(
            name.to_owned(),
            Tensor::zeros((47, 32), DType::F32, &Device::Cpu).unwrap(),
        );
    });
    assert_eq!(
        folder,
        format!("the tensor {name} is [47, 32], not [48, 32]")
    );
    assert_eq!(
        gguf,
        "the tensor blk.1.ffn_up.weight is [47, 32], not [48, 32]"
    );
    tiny_base(dir.path(), &spec);
    let mut weights = tensors(dir.path());
    weights.insert(
        name.to_owned(),
        Tensor::zeros((48, 32), DType::U32, &Device::Cpu).unwrap(),
    );
    candle_core::safetensors::save(&weights, dir.path().join("model.safetensors")).unwrap();
    let folder = refusal(dir.path());
    assert!(folder.contains("is in U32"), "{folder}");
}

#[test]
fn a_shard_index_reads_only_beside_itself() {
    let dir = tempfile::tempdir().unwrap();
    tiny_base(dir.path(), &TinySpec::default());
    fs::remove_file(dir.path().join("model.safetensors")).unwrap();
    for file in ["../elsewhere.safetensors", "/etc/passwd", "..", ""] {
        let index = json!({"weight_map": {"model.norm.weight": file}});
        fs::write(
            dir.path().join("model.safetensors.index.json"),
            index.to_string(),
        )
        .unwrap();
        let error = refusal(dir.path());
        assert!(
            error.contains("is not the name of a file beside it"),
            "{file}: {error}"
        );
    }
    assert!(refusal(&dir.path().join("absent.gguf")).contains("cannot read"));
    assert!(refusal(Path::new("/dev/null")).contains("damaged"));
}

/// A tiny model's two weight files.
fn two_files(dir: &Path) -> [PathBuf; 2] {
    let spec = TinySpec {
        layers: 1,
        hidden: 8,
        intermediate: 8,
        heads: 2,
        kv_heads: 1,
        vocab: 16,
        ..TinySpec::default()
    };
    tiny_base(dir, &spec);
    let gguf = dir.join("model.gguf");
    write_gguf(&gguf, &spec, &tensors(dir), GgmlDType::F32, &[]);
    [dir.join("model.safetensors"), gguf]
}

/// What loads the file: the folder for safetensors, itself for GGUF.
fn model_of(file: &Path) -> &Path {
    if file
        .extension()
        .is_some_and(|extension| extension == "gguf")
    {
        file
    } else {
        file.parent().unwrap()
    }
}

#[test]
fn a_file_cut_anywhere_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    for file in two_files(dir.path()) {
        let whole = fs::read(&file).unwrap();
        for length in (0..whole.len()).step_by(7).chain([whole.len() - 1]) {
            fs::write(&file, &whole[..length]).unwrap();
            let error = refusal(model_of(&file));
            assert!(
                error.contains("is damaged"),
                "{} cut at {length}: {error}",
                file.display()
            );
        }
    }
}

#[test]
fn a_header_that_claims_too_much_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let [safetensors, _] = two_files(dir.path());
    let whole = fs::read(&safetensors).unwrap();
    for claim in [u64::MAX, 1 << 40, whole.len() as u64, 3, 0] {
        let mut bytes = whole.clone();
        bytes[..8].copy_from_slice(&claim.to_le_bytes());
        fs::write(&safetensors, bytes).unwrap();
        assert!(refusal(dir.path()).contains("is damaged"), "{claim}");
    }
    let mut longer = whole;
    longer.push(0);
    fs::write(&safetensors, longer).unwrap();
    assert!(
        refusal(dir.path()).contains("is damaged"),
        "a byte too many"
    );
}

#[test]
fn flipped_bytes_never_panic() {
    let dir = tempfile::tempdir().unwrap();
    for file in two_files(dir.path()) {
        let whole = fs::read(&file).unwrap();
        proptest!(ProptestConfig::with_cases(400), |(flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..5))| {
            let mut bytes = whole.clone();
            for (at, to) in flips {
                bytes[at.index(whole.len().min(2000))] = to;
            }
            fs::write(&file, &bytes).unwrap();
            // Whatever comes of it, it is a value.
            let _ = Lm::load(model_of(&file), LoadOptions::default()).is_ok();
        });
    }
}

proptest! {
    #[test]
    fn any_sizes_in_a_config_are_honoured_or_refused(
        key in prop::sample::select(vec![
            "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
            "vocab_size", "intermediate_size", "max_position_embeddings", "eos_token_id",
        ]),
        value in prop_oneof![any::<u64>(), 0_u64..70, Just(1 << 20)],
    ) {
        let dir = tempfile::tempdir().unwrap();
        two_files(dir.path());
        let path = dir.path().join("config.json");
        let mut config: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        let known = config[key] == json!(value);
        config[key] = json!(value);
        fs::write(&path, config.to_string()).unwrap();
        let loaded = Lm::load(dir.path(), LoadOptions::default()).is_ok();
        prop_assert!(!known || loaded);
    }
}
