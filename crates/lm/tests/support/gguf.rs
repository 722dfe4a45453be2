//! Tiny models as GGUF files, with candle's writer.
//!
//! Start at [`write_gguf`].

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

use std::{collections::HashMap, fs::File, path::Path};

use candle_core::{
    DType, Device, Tensor,
    quantized::{
        GgmlDType, QTensor,
        gguf_file::{self, Value},
    },
};
use testkit::TinySpec;

/// The weights of a model by their names.
pub(crate) type Weights = HashMap<String, Tensor>;

/// The weights of a tiny model in the HF layout.
pub(crate) fn tensors(dir: &Path) -> Weights {
    candle_core::safetensors::load(dir.join("model.safetensors"), &Device::Cpu).unwrap()
}

/// llama.cpp's name of a tensor.
fn own_name(name: &str) -> String {
    let mut own = name.replace("model.layers.", "blk.");
    for (theirs, ours) in [
        ("model.embed_tokens", "token_embd"),
        ("model.norm", "output_norm"),
        ("lm_head", "output"),
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "ffn_norm"),
        ("self_attn.q_norm", "attn_q_norm"),
        ("self_attn.k_norm", "attn_k_norm"),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
    ] {
        own = own.replace(theirs, ours);
    }
    own
}

/// llama.cpp's order of q and k rows: the halves of a head interleaved.
fn interleaved(weight: &Tensor, heads: usize) -> Tensor {
    let (rows, columns) = weight.dims2().unwrap();
    let split = weight
        .reshape((heads, 2, rows / heads / 2, columns))
        .unwrap();
    split
        .transpose(1, 2)
        .unwrap()
        .contiguous()
        .unwrap()
        .reshape((rows, columns))
        .unwrap()
}

/// Writes the weights as GGUF, matrices in `format`, with candle's writer.
pub(crate) fn write_gguf(
    path: &Path,
    spec: &TinySpec,
    weights: &Weights,
    format: GgmlDType,
    extra: &[(&str, Value)],
) {
    let name = spec.architecture;
    let key = |suffix: &str| format!("{name}.{suffix}");
    let number = |n: usize| Value::U32(n as u32);
    let mut metadata = vec![
        (
            "general.architecture".to_owned(),
            Value::String(name.to_owned()),
        ),
        (key("block_count"), number(spec.layers)),
        (key("context_length"), number(spec.context_length)),
        (key("embedding_length"), number(spec.hidden)),
        (key("feed_forward_length"), number(spec.intermediate)),
        (key("attention.head_count"), number(spec.heads)),
        (key("attention.head_count_kv"), number(spec.kv_heads)),
        (key("attention.key_length"), number(spec.head_dim())),
        (key("attention.layer_norm_rms_epsilon"), Value::F32(1e-5)),
        (key("rope.freq_base"), Value::F32(10_000.0)),
    ];
    metadata.retain(|(key, _)| extra.iter().all(|(other, _)| other != key));
    metadata.extend(
        extra
            .iter()
            .map(|(key, value)| ((*key).to_owned(), value.clone())),
    );
    let mut tensors = Vec::new();
    for (name, weight) in weights {
        let mut weight = weight.to_dtype(DType::F32).unwrap();
        if spec.architecture == "llama" && name.ends_with("q_proj.weight") {
            weight = interleaved(&weight, spec.heads);
        } else if spec.architecture == "llama" && name.ends_with("k_proj.weight") {
            weight = interleaved(&weight, spec.kv_heads);
        }
        let format = if weight.rank() == 2 {
            format
        } else {
            GgmlDType::F32
        };
        tensors.push((own_name(name), QTensor::quantize(&weight, format).unwrap()));
    }
    let metadata: Vec<(&str, &Value)> = metadata
        .iter()
        .map(|(key, value)| (key.as_str(), value))
        .collect();
    let tensors: Vec<(&str, &QTensor)> = tensors
        .iter()
        .map(|(name, tensor)| (name.as_str(), tensor))
        .collect();
    gguf_file::write(&mut File::create(path).unwrap(), &metadata, &tensors).unwrap();
}
