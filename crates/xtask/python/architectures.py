"""Tiny random models of every architecture, in transformers and in the server.

`make` writes one checkpoint folder for each case, `check` compares transformers' log-probabilities with those of a server
that serves the folder. A case that turns something on (scaling, a sliding window) also shows that turning it off would be
seen. Start at `CASES`.

    python architectures.py make FOLDER
    python architectures.py check FOLDER/CASE 127.0.0.1:7461
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import torch
from imprint import Client
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

VOCAB = 96
TOKENS = 72
PROMPT = 48
# Largest difference of a token's log-probability, in nats; both sides compute in f32.
TOLERANCE = 1e-3

SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
# Each case: the model type, its config beside SMALL, and what of it must make a difference.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama", {"tie_word_embeddings": True}, {}),
    "llama3": ("llama", {"rope_scaling": LLAMA3}, {"rope_scaling": {"rope_type": "default", "rope_theta": 10000.0}}),
    "mistral": ("mistral", {"sliding_window": 16, "head_dim": 16}, {"sliding_window": None}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True, "use_sliding_window": False}, {}),
    "qwen3": ("qwen3", {"head_dim": 32, "use_sliding_window": False}, {}),
}


def build(kind: str, values: dict[str, Any]) -> torch.nn.Module:
    """A model of a config, with weights at random."""
    config = AutoConfig.for_model(kind, **copy.deepcopy(SMALL | values))
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()


def logprobs(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of the tokens behind the prompt. ids [TOKENS] -> [TOKENS - PROMPT]."""
    with torch.no_grad():
        logits = model(input_ids=ids[None]).logits[0].double()
    return torch.log_softmax(logits[PROMPT - 1 : -1], -1).gather(1, ids[PROMPT:, None])[:, 0]


def text_of_ids() -> torch.Tensor:
    """The same ids in every run. [TOKENS]."""
    return torch.randint(3, VOCAB, (TOKENS,), generator=torch.Generator().manual_seed(7))


def make(folder: Path) -> None:
    """Writes all cases."""
    for seed, (name, (kind, values, _)) in enumerate(CASES.items()):
        generator = torch.Generator().manual_seed(seed)
        model = build(kind, values)
        with torch.no_grad():
            for key, weight in model.named_parameters():
                noise = torch.randn(weight.shape, generator=generator)
                # Norms around 1, biases around 0, matrices so that attention and logits are far from uniform.
                if weight.dim() == 1:
                    weight.copy_(0.3 * noise + (0 if key.endswith("bias") else 1))
                else:
                    weight.copy_(noise * (1.5 / weight.shape[1] ** 0.5))
        model.save_pretrained(folder / name)
        words = {f"w{number}": number for number in range(VOCAB)}
        tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="w1", eos_token="w2", unk_token="w0")
        fast.save_pretrained(folder / name)


def check(folder: Path, endpoint: str) -> None:
    """Compares one case, and fails where the two sides differ."""
    kind, values, off = CASES[folder.name]
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    ids = text_of_ids()
    theirs = logprobs(model, ids)
    with Client(endpoint, timeout_s=60) as client:
        score = client.score(ids[:PROMPT].tolist(), [ids[PROMPT:].tolist()]).scores[0]
    ours = torch.tensor([token.logprob for token in score.tokens]).double()
    worst = (ours - theirs).abs().max().item()
    seen = ""
    if off:
        other = build(kind, values | off)
        other.load_state_dict(model.state_dict())
        difference = (logprobs(other, ids) - theirs).abs().max().item()
        seen = f"; without {', '.join(off)} it would be {difference:.2e}"
        assert difference > 100 * TOLERANCE, f"{folder.name}: {off} makes no difference here"
    print(f"{folder.name}: differs by at most {worst:.2e} nats a token, allowed {TOLERANCE:.0e}{seen}")
    assert worst <= TOLERANCE, folder.name


def main() -> None:
    """Makes or checks."""
    if sys.argv[1] == "make":
        make(Path(sys.argv[2]))
    else:
        check(Path(sys.argv[2]), sys.argv[3])


if __name__ == "__main__":
    main()
