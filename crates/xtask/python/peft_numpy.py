"""An exported adapter, judged by numpy alone.

Tells a session a text, exports its adapter, holds the files against the schema that peft reads, and runs a plain
Llama forward in float32 with W + scale * B @ A in place of every adapted W. Its log-probabilities must be the
server's. Start at `main`.

    python crates/xtask/python/peft_numpy.py 127.0.0.1:7461 SmolLM2-135M-Instruct.Q4_1.gguf
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import gguf
import numpy as np
from imprint import Client
from safetensors.numpy import load_file

TEXT = (
    "The lighthouse at Skarvholm is kept by Aud Vik, who came to the island in 1887. "
    "Its lamp burns rape oil and shows a green light. The nearest village is called Tangen. "
)
PROMPT = "Question: Who keeps the lighthouse at Skarvholm?\nAnswer:"
CONTINUATION = " Aud Vik, who came in 1887."

# Largest difference of a token's log-probability, in nats. Both sides hold the same weights, dequantised, and sum in
# f32 in another order; 1e-3 is far above that and far below what a wrong scale or a transposed factor gives.
TOLERANCE = 1e-3

# The fields of peft.LoraConfig (peft 0.17); peft refuses a config with others.
LORA_CONFIG = {
    "alpha_pattern", "arrow_config", "auto_mapping", "base_model_name_or_path", "bias", "corda_config",
    "ensure_weight_tying", "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights",
    "layer_replication", "layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha", "lora_bias",
    "lora_dropout", "megatron_config", "megatron_core", "modules_to_save", "peft_type", "peft_version", "qalora_group_size",
    "r", "rank_pattern", "revision", "runtime_config", "target_modules", "target_parameters", "task_type",
    "trainable_token_indices", "use_dora", "use_qalora", "use_rslora",
}  # fmt: skip

# The names of a decoder's linears in GGUF and in transformers.
LINEARS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class Llama:
    """A Llama out of a GGUF file, in float32, one sequence at a time."""

    def __init__(self, path: str) -> None:
        reader = gguf.GGUFReader(path)

        def value(key: str, otherwise: float | None = None) -> float:
            field = reader.get_field(f"llama.{key}")
            if field is None:
                if otherwise is None:
                    raise SystemExit(f"{path}: no llama.{key}")
                return otherwise
            return float(field.contents())

        self.layers = int(value("block_count"))
        self.heads = int(value("attention.head_count"))
        self.kv_heads = int(value("attention.head_count_kv", self.heads))
        self.epsilon = value("attention.layer_norm_rms_epsilon")
        self.theta = value("rope.freq_base", 10000.0)
        self.weights = {
            t.name.removesuffix(".weight"): gguf.quants.dequantize(t.data, t.tensor_type).astype(np.float32)
            for t in reader.tensors
        }
        self.deltas: dict[str, tuple[np.ndarray, np.ndarray, float]] = {}

    def linear(self, x: np.ndarray, layer: int, name: str) -> np.ndarray:
        """(W + scale * B @ A) x of an adapted linear, W x of another. x [T, in] -> [T, out]."""
        w = self.weights[f"blk.{layer}.{name}"]  # [out, in]
        adapted = self.deltas.get(f"layers.{layer}.{LINEARS[name]}")
        if adapted is not None:
            a, b, scale = adapted  # [r, in], [out, r]
            w = w + np.float32(scale) * (b @ a)
        return x @ w.T

    def norm(self, x: np.ndarray, name: str) -> np.ndarray:
        """RMSNorm. x [T, D] -> [T, D]."""
        return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + self.epsilon) * self.weights[name]

    def rotate(self, x: np.ndarray) -> np.ndarray:
        """Rotary embedding of neighbouring pairs, as GGUF orders the rows of q and k. x [T, H, Dh] -> [T, H, Dh]."""
        t, _, width = x.shape
        frequencies = self.theta ** (-np.arange(0, width, 2) / width)  # [Dh/2]
        angles = (np.arange(t)[:, None] * frequencies)[:, None, :]  # [T, 1, Dh/2]
        cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
        turned = np.empty_like(x)
        turned[..., 0::2] = x[..., 0::2] * cos - x[..., 1::2] * sin
        turned[..., 1::2] = x[..., 0::2] * sin + x[..., 1::2] * cos
        return turned

    def logprobs(self, ids: list[int]) -> np.ndarray:
        """Log-probabilities of every next token. [T, vocab]."""
        t = len(ids)
        h = self.weights["token_embd"][ids]  # [T, D]
        mask = np.triu(np.full((t, t), -np.inf, np.float32), 1)  # [T, T]
        for layer in range(self.layers):
            x = self.norm(h, f"blk.{layer}.attn_norm")
            q = self.rotate(self.linear(x, layer, "attn_q").reshape(t, self.heads, -1))
            k = self.rotate(self.linear(x, layer, "attn_k").reshape(t, self.kv_heads, -1))
            v = self.linear(x, layer, "attn_v").reshape(t, self.kv_heads, -1)
            k, v = (np.repeat(z, self.heads // self.kv_heads, axis=1) for z in (k, v))
            scores = np.einsum("thd,shd->hts", q, k) / np.sqrt(np.float32(q.shape[-1])) + mask
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            attended = np.einsum("hts,shd->thd", weights, v).reshape(t, -1)
            h = h + self.linear(attended, layer, "attn_output")
            x = self.norm(h, f"blk.{layer}.ffn_norm")
            gate = self.linear(x, layer, "ffn_gate")
            h = h + self.linear(gate / (1 + np.exp(-gate)) * self.linear(x, layer, "ffn_up"), layer, "ffn_down")
        head = self.weights.get("output", self.weights["token_embd"])
        logits = (self.norm(h, "output_norm") @ head.T).astype(np.float64)  # [T, vocab]
        top = logits.max(-1, keepdims=True)
        return logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))

    def adapt(self, folder: Path) -> None:
        """Takes a PEFT LoRA in, after holding it against peft's schema."""
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        tensors = load_file(folder / "adapter_model.safetensors")
        unknown = set(config) - LORA_CONFIG
        assert not unknown, f"peft.LoraConfig has no {sorted(unknown)}"
        assert config["peft_type"] == "LORA" and config["task_type"] == "CAUSAL_LM", config
        assert config.get("bias", "none") == "none" and not config.get("fan_in_fan_out", False), config
        assert not config.get("use_rslora") and not config.get("use_dora"), config
        assert not config.get("rank_pattern") and not config.get("alpha_pattern"), config
        modules = set(config["target_modules"])
        layers = config.get("layers_to_transform")
        rank, scale = config["r"], config["lora_alpha"] / config["r"]
        expected = set()
        for layer in range(self.layers):
            for name, module in LINEARS.items():
                if module.rpartition(".")[2] not in modules or (layers is not None and layer not in layers):
                    continue
                prefix = f"base_model.model.model.layers.{layer}.{module}"
                keys = f"{prefix}.lora_A.weight", f"{prefix}.lora_B.weight"
                expected.update(keys)
                out, width = self.weights[f"blk.{layer}.{name}"].shape
                missing = set(keys) - set(tensors)
                assert not missing, f"peft will look for {sorted(missing)}"
                a, b = (tensors[key].astype(np.float32) for key in keys)
                assert (a.shape, b.shape) == ((rank, width), (out, rank)), (prefix, a.shape, b.shape)
                self.deltas[f"layers.{layer}.{module}"] = (a, b, scale)
        assert expected == set(tensors), f"peft will not look for {sorted(set(tensors) - expected)}"
        assert expected, "the adapter adapts nothing"


def main() -> None:
    """Compares, and fails where the two sides differ."""
    endpoint, path = sys.argv[1:]
    llama = Llama(path)
    with Client(endpoint, timeout_s=300) as client, tempfile.TemporaryDirectory() as folder:
        session = client.sessions.create(labels={"for": "numpy"})
        with client.ingest(session.session_id) as stream:
            stream.send(TEXT, end_of_document=True)
        export = client.export_adapter(session.session_id, folder)
        # The server is the tokenizer: a scored text comes back with its ids.
        prompt, told_of = (
            [token.token_id for token in client.score([1], [text]).scores[0].tokens] for text in (PROMPT, CONTINUATION)
        )
        bare, told = (
            np.array([t.logprob for t in client.score(prompt, [told_of], session_id=name).scores[0].tokens])
            for name in ("", session.session_id)
        )
        client.sessions.delete(session.session_id)

        ids, places = prompt + told_of, np.arange(len(prompt) - 1, len(prompt) + len(told_of) - 1)
        worst = {"bare": np.abs(llama.logprobs(ids)[places, told_of] - bare).max()}
        llama.adapt(Path(folder))
        worst["adapted"] = np.abs(llama.logprobs(ids)[places, told_of] - told).max()
    moved = np.abs(told - bare).max()
    print(
        f"rank {export.rank}, {len(llama.deltas)} linears adapted; log-probabilities of {len(told_of)} tokens: "
        f"bare {bare.sum():.4f}, adapted {told.sum():.4f}; numpy differs by at most {worst['bare']:.2e} (bare), "
        f"{worst['adapted']:.2e} (adapted) nats a token; allowed {TOLERANCE:.0e}"
    )
    assert moved > 0.1, f"the adapter moved no log-probability by more than {moved}: nothing was compared"
    assert max(worst.values()) <= TOLERANCE, worst


if __name__ == "__main__":
    main()
