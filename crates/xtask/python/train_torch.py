"""One training step of tiny random models: loss and gradients in torch's autograd against the trainer's.

`make` writes for each case a base, a generator, a recipe and a batch; `imprint train --probe` takes loss and gradients of
that batch; `check` takes them again in torch, from the formulas, and compares. Start at `loss_of`.

    python train_torch.py make FOLDER
    imprint train --model FOLDER/CASE/base --config FOLDER/CASE/recipe.toml --probe FOLDER/CASE/batch.json --out FOLDER/CASE/out
    python train_torch.py check FOLDER/CASE
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from architectures import SMALL, VOCAB, build
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

R1, R2, RANK, WINDOW = 14, 10, 4, 16
LAYERS = [1, 2]
MODULES = {"o_proj": ("self_attn", 64, 64), "down_proj": ("mlp", 96, 64)}
# Each case: form, read-out.
CASES = {
    "ridge": ("associative", "ridge"),
    "svd": ("published", "svd"),
    "frobenius": ("published", "frobenius"),
    "spectral": ("published", "spectral"),
}
# weight, share of the teacher, fixed divisor or None.
LOSSES = {
    "reconstruction": (0.7, 0.0, 20.0),
    "completion": (1.3, 0.8, None),
    "answer": (1.0, 0.0, None),
    "negative": (0.6, 1.0, None),
}
# Relative errors of the loss and of each gradient: torch in f64, ours in f32.
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-4, 2e-3


def key(layer: int, module: str, tensor: str) -> str:
    """The name of a tensor in a checkpoint."""
    return f"base_model.model.model.layers.{layer}.base_layer.{MODULES[module][0]}.{module}.fastlora_{tensor}"


def make(folder: Path) -> None:
    """Writes all cases."""
    for seed, (name, (form, read_out)) in enumerate(CASES.items()):
        case = folder / name
        random = torch.Generator().manual_seed(seed)
        model = build("llama", {"tie_word_embeddings": True})
        with torch.no_grad():
            for weight in model.parameters():
                noise = torch.randn(weight.shape, generator=random)
                weight.copy_(0.3 * noise + 1 if weight.dim() == 1 else noise * (1.2 / weight.shape[1] ** 0.5))
        model.save_pretrained(case / "base")
        words = {f"w{number}": number for number in range(VOCAB)}
        tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="w1", eos_token="w2", unk_token="w0").save_pretrained(
            case / "base"
        )
        hidden, tensors = SMALL["hidden_size"], {}
        for layer in LAYERS:
            for module, (_, inputs, outputs) in MODULES.items():
                shapes = {"A1": (R1, inputs), "A3": (R2, hidden), "B": (outputs, R2)}
                shapes |= {"A3n": (R2, hidden)} if form == "associative" else {"A2": (R1, hidden)}
                for part, shape in shapes.items():
                    tensors[key(layer, module, part + ".weight")] = torch.randn(shape, generator=random) / shape[1] ** 0.5
                gain = 1 + 0.2 * torch.randn(hidden, generator=random)
                tensors[key(layer, module, "hidden_state_norm.weight")] = gain
                if read_out == "ridge":
                    tensors[key(layer, module, "ridge")] = torch.tensor([0.3])
        generator = case / "generator"
        generator.mkdir(parents=True)
        save_file(tensors, generator / "adapter_model.safetensors")
        config: dict[str, Any] = {
            "peft_type": "FASTLORA", "base_model_name_or_path": "tiny", "fastlora_r": R2, "fastlora_inter_size": R1,
            "fastlora_max_rank": R2 if read_out == "ridge" else RANK, "fastlora_alpha": 15, "fastlora_window": WINDOW,
            "fastlora_norm": read_out, "fastlora_param": list(MODULES), "fastlora_layers": LAYERS, "fastlora_strategy": "parallel",
        }  # fmt: skip
        if form == "associative":
            config |= {"fastlora_key": "site_input_tied_A1", "fastlora_value": "next_token_embedding+A3n_hidden"}
            config |= {"fastlora_skip_first": 1, "fastlora_skip_last": 1}
        (generator / "adapter_config.json").write_text(json.dumps(config))
        losses = "".join(
            f"[loss.{kind}]\nweight = {weight}\nteacher = {teacher}\nat_least = 1\n" + (f"tokens = {tokens}\n" if tokens else "")
            for kind, (weight, teacher, tokens) in LOSSES.items()
        )
        (case / "recipe.toml").write_text(
            'start = "generator"\nlength = { steps = 1 }\n[data]\nfolder = "."\nquery = 16\nmix = { facts = 1 }\n'
            "[[layout]]\nchance = 1\nwindows = 1\nqueries = [{ reconstruction = 1 }]\n" + losses
        )
        ids = lambda count: torch.randint(3, VOCAB, (count,), generator=random).tolist()  # noqa: E731
        queries = [(12, 11, "reconstruction", 0, 0), (9, 8, "completion", 1, 2), (10, 4, "answer", 1, 1), (7, 6, "negative", 0, 0)]
        batch = {
            "windows": [ids(16), ids(13), ids(9)],
            "groups": [[0], [1, 2]],
            "queries": [
                {"tokens": ids(count), "scored": scored, "kind": kind, "core": core, "window": window}
                for count, scored, kind, core, window in queries
            ],
        }
        (case / "batch.json").write_text(json.dumps({"batches": [batch]}))


def rms(z: torch.Tensor) -> torch.Tensor:
    """z [T, D] / sqrt(mean z^2 + 1e-6)."""
    return z / (z.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()


def core_of(p: dict[str, torch.Tensor], read_out: str, writes: list[tuple[torch.Tensor, ...]]) -> torch.Tensor:
    """N [R1, R2] of the windows' (x [T, Din], h [T, D], e [T, D])."""
    s, g = torch.zeros(R1, R2).double(), torch.zeros(R1, R1).double()
    for x, h, e in writes:
        n = p["hidden_state_norm"] * rms(h)
        if read_out == "ridge":
            k = (x @ p["A1"].T)[1:-1]
            v = (rms(e)[2:] @ p["A3"].T) + (n @ p["A3n"].T)[1:-1]
        else:
            k, v = n @ p["A2"].T, n @ p["A3"].T
        s, g = s + k.T @ v, g + k.T @ k
    if read_out == "ridge":
        return torch.linalg.solve(g + p["log_ridge"].exp() * torch.eye(R1).double(), s)
    if read_out == "frobenius":
        return s / s.norm()
    u, values, v = torch.linalg.svd(s, full_matrices=False)
    if read_out == "spectral":
        return s / values[0]
    return u[:, :RANK] @ v[:RANK]


def loss_of(case: Path, read_out: str, p: dict[tuple[int, str], dict[str, torch.Tensor]]) -> torch.Tensor:
    """The loss of the case's batch, from the formulas."""
    model = AutoModelForCausalLM.from_pretrained(case / "base", attn_implementation="eager", dtype=torch.float64).eval()
    model.requires_grad_(False)
    batch = json.loads((case / "batch.json").read_text())["batches"][0]
    layers = model.model.layers
    linear = lambda layer, module: getattr(getattr(layers[layer], MODULES[module][0]), module)  # noqa: E731

    def run(ids: list[int], cores: dict[tuple[int, str], torch.Tensor] | None) -> tuple[torch.Tensor, dict[Any, Any]]:
        seen: dict[Any, Any] = {}
        hooks = []
        for layer in LAYERS:
            keep = lambda _m, args, kwargs, at=layer: seen.__setitem__(at, (args[0] if args else kwargs["hidden_states"])[0])  # noqa: E731
            hooks.append(layers[layer].register_forward_pre_hook(keep, with_kwargs=True))
            for module in MODULES:

                def add(_m: Any, args: Any, y: torch.Tensor, at: tuple[int, str] = (layer, module)) -> torch.Tensor | None:
                    seen[at] = args[0][0]
                    if cores is None:
                        return None
                    return y + (15 / R2) * ((args[0] @ p[at]["A1"].T) @ cores[at]) @ p[at]["B"].T

                hooks.append(linear(layer, module).register_forward_hook(add))
        logits = model(input_ids=torch.tensor([ids])).logits[0]
        for hook in hooks:
            hook.remove()
        return logits, seen

    with torch.no_grad():
        passes = [(run(window, None)[1], model.model.embed_tokens(torch.tensor(window))) for window in batch["windows"]]
    cores = [
        {
            at: core_of(tensors, read_out, [(seen[at], seen[at[0]], e) for seen, e in (passes[w] for w in group)])
            * tensors["log_amplitude"].exp()
            for at, tensors in p.items()
        }
        for group in batch["groups"]
    ]
    sums: dict[str, tuple[torch.Tensor, int]] = {}
    for query in batch["queries"]:
        ids, scored, kind = query["tokens"], query["scored"], query["kind"]
        log_s = torch.log_softmax(run(ids[:-1], cores[query["core"]])[0][-scored:], -1)
        ce = -log_s.gather(1, torch.tensor(ids[-scored:])[:, None])[:, 0]
        share = LOSSES[kind][1]
        loss = (1 - share) * ce
        if share > 0:
            before = [] if kind == "negative" else batch["windows"][query["window"]]
            with torch.no_grad():
                log_p = torch.log_softmax(run(before + ids[:-1], None)[0][-scored:], -1)
            loss = loss + share * (log_p.exp() * (log_p - log_s)).sum(-1)
        total, count = sums.get(kind, (torch.zeros(()).double(), 0))
        sums[kind] = (total + loss.sum(), count + scored)
    parts = [LOSSES[kind][0] * total / (LOSSES[kind][2] or count) for kind, (total, count) in sums.items()]
    return torch.stack(parts).sum()


def check(case: Path) -> None:
    """Compares one case, and fails where the two sides differ."""
    _, read_out = CASES[case.name]
    stored = load_file(case / "generator" / "adapter_model.safetensors")
    p: dict[tuple[int, str], dict[str, torch.Tensor]] = {}
    for layer in LAYERS:
        for module in MODULES:
            prefix, parts = key(layer, module, ""), {}
            for name, tensor in stored.items():
                if name.startswith(prefix):
                    part = name.removeprefix(prefix).removesuffix(".weight")
                    if part == "ridge":
                        part, tensor = "log_ridge", tensor.log()
                    parts[part] = tensor.double().requires_grad_()
            parts["log_amplitude"] = torch.zeros(1).double().requires_grad_()
            p[layer, module] = parts
    loss = loss_of(case, read_out, p)
    loss.backward()
    ours = load_file(case / "out" / "probe.safetensors")
    worst = 0.0
    for (layer, module), parts in p.items():
        for part, tensor in parts.items():
            mine = ours[f"layers.{layer}.{MODULES[module][0]}.{module}.{part}"].double()
            error = ((mine - tensor.grad).norm() / tensor.grad.norm()).item()
            worst = max(worst, error)
            assert error <= GRADIENT_TOLERANCE, f"{case.name} {layer} {module} {part}: {error:.2e}"
    told = json.loads((case / "out" / "probe.json").read_text())["batches"][0]["loss"]
    apart = abs(told - loss.item()) / loss.item()
    assert apart <= LOSS_TOLERANCE, f"{case.name}: loss {told} for {loss.item()}"
    print(f"{case.name}: loss {loss.item():.6f} differs by {apart:.1e}, gradients by at most {worst:.1e} (relative)")


def main() -> None:
    """Does what the command line says."""
    if sys.argv[1:2] == ["make"] and len(sys.argv) == 3:
        make(Path(sys.argv[2]))
    elif sys.argv[1:2] == ["check"] and len(sys.argv) == 3:
        check(Path(sys.argv[2]))
    else:
        raise SystemExit(__doc__)


if __name__ == "__main__":
    main()
