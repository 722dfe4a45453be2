"""Trains a generator of the associative form on a GPU, from what `prepare.py` wrote.

The mathematics are those of `crates/generator` (sites at mlp.down_proj, tied keys, next-token values, ridge read-out); the export is a checkpoint
that `imprint serve --generator` loads. Goes on from WORK/state.pt if that is there, so that a run can be cut into commands of some minutes;
`--total-minutes` is the length of the whole schedule. Start at `main`.

    python train.py DATA WORK --minutes 9 --total-minutes 26 --rank 512
    python train.py DATA WORK --export OUT          # the best checkpoint so far, in shards of at most 12 MB
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

# What the matrix products of the base run in; a CPU without bf16 units takes f32.
COMPUTE = torch.bfloat16 if torch.cuda.is_available() else torch.float32
# SmolLM2-135M-Instruct.
LAYERS, D, HEADS, KV_HEADS, DH, FF, VOCAB = 30, 576, 9, 3, 64, 1536, 49152
ROPE_THETA, RMS_EPS, SITE_EPS = 1e5, 1e-5, 1e-6
WINDOW, QUERY = 256, 96
DIGEST = "5f4fa13bfc6dd4a91fd00e22974a9c4e9ed628fd7d7f307398ddf30260d6b2c3"
QUESTION = ("Question: ", "\nAnswer:", "\n")
CHAT = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n<|im_start|>user\n",
    "<|im_end|>\n<|im_start|>assistant\n",
    "<|im_end|>",
)
# Kinds of queries, and their weights in the loss.
REC, COM, ANSWER, NEGATIVE = range(4)
NAMES = ("reconstruction", "completion", "answer", "negative")
WEIGHTS = (0.7, 1.3, 1.0, 0.6)


def dequantise(blocks: torch.Tensor, kind: str, columns: int) -> torch.Tensor:
    """Blocks as bytes [rows, n] -> f32 [rows, columns]."""
    rows = blocks.shape[0]
    if kind == "F32":
        return blocks.view(torch.float32)
    if kind == "Q8_0":  # d: f16, 32 x i8
        block = blocks.reshape(rows, -1, 34)
        scale = block[..., :2].contiguous().view(torch.float16).float()
        return (scale * block[..., 2:].contiguous().view(torch.int8).float()).reshape(rows, columns)
    if kind == "Q4_1":  # d, m: f16, 16 bytes: low nibbles first, then high ones
        block = blocks.reshape(rows, -1, 20)
        scale, least = (block[..., i : i + 2].contiguous().view(torch.float16).float() for i in (0, 2))
        nibbles = torch.cat([block[..., 4:] & 15, block[..., 4:] >> 4], -1).float()
        return (scale * nibbles + least).reshape(rows, columns)
    raise ValueError(kind)


def rms(x: torch.Tensor, eps: float) -> torch.Tensor:
    """x / rms(x) over the last axis, in f32."""
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


class Base:
    """The frozen model: weights in COMPUTE, residual in f32."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        """Reads all parts."""
        self.device, self.dtype = device, COMPUTE
        weights: dict[str, torch.Tensor] = {}
        for part in sorted(folder.glob("base.*.safetensors")):
            for name, blocks in load_file(part).items():
                name, kind, columns = name.split("|")
                weights[name] = dequantise(blocks, kind, int(columns)).to(device)
        self.embedding = weights["token_embd.weight"]  # [V, D] f32
        self.head = self.embedding.to(self.dtype)
        self.final = weights["output_norm.weight"].reshape(-1)
        self.layers: list[dict[str, torch.Tensor]] = []
        for i in range(LAYERS):
            part = {
                name: weights[f"blk.{i}.{name}.weight"]
                for name in ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down")
            }
            for name, heads in (("attn_q", HEADS), ("attn_k", KV_HEADS)):  # GGUF interleaves the halves that RoPE turns
                part[name] = part[name].reshape(heads, DH // 2, 2, D).transpose(1, 2).reshape(heads * DH, D)
            self.layers.append(
                {
                    "attn_norm": part["attn_norm"].reshape(-1),
                    "ffn_norm": part["ffn_norm"].reshape(-1),
                    "qkv": torch.cat([part[f"attn_{c}"] for c in "qkv"]).to(self.dtype),
                    "o": part["attn_output"].to(self.dtype),
                    "gate_up": torch.cat([part["ffn_gate"], part["ffn_up"]]).to(self.dtype),
                    "down": part["ffn_down"].to(self.dtype),
                }
            )
        angles = torch.arange(2048, device=device)[:, None] * ROPE_THETA ** (-torch.arange(0, DH, 2, device=device) / DH)
        self.cos, self.sin = (torch.cat([f(angles)] * 2, -1).to(self.dtype) for f in (torch.cos, torch.sin))

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """ids [B, T] -> [B, T, D] f32."""
        return self.embedding[ids]

    def turn(self, x: torch.Tensor) -> torch.Tensor:
        """Rotary embedding of x [B, H, T, Dh] from position 0."""
        a, b = x.chunk(2, -1)
        t = x.shape[2]
        return x * self.cos[:t] + torch.cat([-b, a], -1) * self.sin[:t]

    def run(self, h: torch.Tensor, first: int, last: int, site: Any = None, seen: Any = None) -> torch.Tensor:
        """Layers first .. last of h [B, T, D]; site(layer, x) is added at down_proj, seen(layer, h, x) sees its input."""
        batch, t, _ = h.shape
        for i in range(first, last):
            w = self.layers[i]
            n = (rms(h, RMS_EPS) * w["attn_norm"]).to(self.dtype)
            q, k, v = F.linear(n, w["qkv"]).split([HEADS * DH, KV_HEADS * DH, KV_HEADS * DH], -1)
            q = self.turn(q.view(batch, t, HEADS, DH).transpose(1, 2))
            k = self.turn(k.view(batch, t, KV_HEADS, DH).transpose(1, 2))
            v = v.view(batch, t, KV_HEADS, DH).transpose(1, 2)
            a = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            middle = h + F.linear(a.transpose(1, 2).reshape(batch, t, D), w["o"])
            gate, up = F.linear((rms(middle, RMS_EPS) * w["ffn_norm"]).to(self.dtype), w["gate_up"]).chunk(2, -1)
            x = F.silu(gate) * up  # [B, T, FF]
            if seen:
                seen(i, h, x)
            y = F.linear(x, w["down"])
            if site:
                y = y + site(i, x)
            h = middle + y
        return h

    def logits(self, h: torch.Tensor) -> torch.Tensor:
        """h [N, D] -> [N, V] f32."""
        return F.linear((rms(h, RMS_EPS) * self.final).to(self.dtype), self.head).float()


class Generator(torch.nn.Module):
    """All sites, stacked: n sites with R keys and R values each. Parameters have unit rms; `scale` holds the sizes."""

    def __init__(self, layers: list[int], rank: int) -> None:
        """Shapes only; `whiten` or `load` gives values."""
        super().__init__()
        self.at, self.rank = layers, rank
        n = len(layers)
        for name, shape in (("A1", (rank, FF)), ("A3", (rank, D)), ("A3n", (rank, D)), ("B", (D, rank))):
            self.register_parameter(name, torch.nn.Parameter(torch.zeros(n, *shape)))
            self.register_buffer(f"scale_{name}", torch.ones(n, 1, 1))
        self.gain = torch.nn.Parameter(torch.ones(n, 1, D))
        self.log_lambda = torch.nn.Parameter(torch.full((n,), math.log(0.1)))
        self.log_amplitude = torch.nn.Parameter(torch.zeros(n))

    def put(self, name: str, value: torch.Tensor) -> None:
        """Stores a tensor as (rms) x (unit-rms parameter)."""
        size = value.square().mean((1, 2), keepdim=True).sqrt()
        if name == "A3n":  # begins at zero, moves on A3's scale
            size = self.scale_A3.clone()
        getattr(self, f"scale_{name}").copy_(size)
        getattr(self, name).data.copy_(value / size)

    def w(self, name: str) -> torch.Tensor:
        """A tensor as it acts, f32."""
        return getattr(self, name) * getattr(self, f"scale_{name}")

    @torch.no_grad()
    def whiten(self, base: Base, contexts: torch.Tensor, counts: torch.Tensor) -> None:
        """Initialises from statistics of the base: contexts [C, W] token ids, counts [V] of tokens."""
        moments: dict[int, list[torch.Tensor]] = {i: [] for i in self.at}
        sizes = torch.zeros(LAYERS + 1, device=base.device)
        seen_tokens = 0
        for part in contexts.split(16):
            def seen(i: int, h: torch.Tensor, x: torch.Tensor) -> None:
                sizes[i] += rms_of(h[:, 8:]) * len(part) / len(contexts)
                if i in moments:
                    z = x[:, 8:].reshape(-1, FF).float()
                    old = moments[i] or [0.0, 0.0]
                    moments[i] = [old[0] + z.t() @ z, old[1] + z.sum(0)]

            h = base.run(base.embed(part), 0, LAYERS, seen=seen)
            sizes[LAYERS] += rms_of(h[:, 8:]) * len(part) / len(contexts)
            seen_tokens += part[:, 8:].numel()
        keys = []
        for i in self.at:
            second, total = moments[i][0] / seen_tokens, moments[i][1] / seen_tokens
            values, vectors = principal(second - torch.outer(total, total), total, self.rank)
            keys.append(vectors / (values + 0.05 * values.mean()).sqrt()[:, None] / math.sqrt(self.rank))
        e = rms(base.embedding, SITE_EPS)
        share = counts / counts.sum()
        mean = (share[:, None] * e).sum(0)
        weight = (counts > 0) * share.sqrt()
        weight = weight / weight.sum()
        _, directions = principal((e - mean).t() @ ((e - mean) * weight[:, None]), mean, self.rank)
        n = len(self.at)
        self.put("A1", torch.stack(keys))
        self.put("A3", directions.expand(n, -1, -1).clone())
        self.put("A3n", torch.zeros(n, self.rank, D, device=base.device))
        self.put("B", torch.stack([directions.t() * 2.0 * sizes[i + 1] / sizes[LAYERS] for i in self.at]))

    def cores(self, x: torch.Tensor, h: torch.Tensor, u: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """x [n, P, T, FF], h [n, P, T, D] (over its rms), u [P, T, D], mask [P, T] -> N [n, P, R, R] f32."""
        n, p, t, _ = x.shape
        low = lambda z: z.to(COMPUTE)
        k = torch.matmul(x.flatten(1, 2), low(self.w("A1")).transpose(1, 2)).view(n, p, t, -1).float()
        v = torch.matmul(low(u).reshape(1, p * t, D).expand(n, -1, -1), low(self.w("A3")).transpose(1, 2))
        v = v + torch.matmul(h.flatten(1, 2), low(self.w("A3n") * self.gain).transpose(1, 2))
        v = v.view(n, p, t, -1).float()
        k = k * mask[None, :, :, None]
        g, s = k.transpose(2, 3) @ k, k.transpose(2, 3) @ v
        g = g + self.log_lambda.exp()[:, None, None, None] * torch.eye(self.rank, device=g.device)
        factor = torch.linalg.cholesky(g)
        return torch.cholesky_solve(s, factor) * self.log_amplitude.exp()[:, None, None, None]

    def site(self, cores: torch.Tensor) -> Any:
        """What the sites add to rows of a batch [P, rows of a session x T, ...] flattened to [P q, T, ...]."""
        a1, b, cores = (z.to(COMPUTE) for z in (self.w("A1"), self.w("B"), cores))
        index = {layer: j for j, layer in enumerate(self.at)}

        def add(layer: int, x: torch.Tensor) -> torch.Tensor | float:
            if layer not in index:
                return 0.0
            j = index[layer]
            z = torch.bmm(F.linear(x.reshape(cores.shape[1], -1, FF), a1[j]), cores[j])
            return F.linear(z, b[j]).reshape(*x.shape[:-1], D)

        return add

    def export(self, out: Path) -> None:
        """A checkpoint: config, and weights in shards that `cat`-like tools need not touch: each is a safetensors file."""
        out.mkdir(parents=True, exist_ok=True)
        amplitude = self.log_amplitude.exp()[:, None, None]
        tensors: dict[str, torch.Tensor] = {}
        for j, layer in enumerate(self.at):
            stem = f"base_model.model.model.layers.{layer}.base_layer.mlp.down_proj.fastlora_"
            for name in ("A1", "A3", "A3n"):
                tensors[f"{stem}{name}.weight"] = self.w(name)[j]
            tensors[f"{stem}B.weight"] = (self.w("B") * amplitude)[j]
            tensors[f"{stem}hidden_state_norm.weight"] = self.gain[j, 0]
            tensors[f"{stem}ridge"] = self.log_lambda[j].exp().reshape(1)
        small = {
            key: value.detach().to(torch.float32 if key.endswith("ridge") else torch.bfloat16).cpu().contiguous()
            for key, value in tensors.items()
        }
        config = {
            "peft_type": "FASTLORA",
            "base_model_name_or_path": "HuggingFaceTB/SmolLM2-135M-Instruct",
            "fastlora_r": self.rank,
            "fastlora_inter_size": self.rank,
            "fastlora_max_rank": self.rank,
            "fastlora_alpha": self.rank,
            "fastlora_window": WINDOW,
            "fastlora_norm": "ridge",
            "fastlora_merge": "pre-norm-sum",
            "fastlora_param": ["down_proj"],
            "target_modules": ["down_proj"],
            "fastlora_layers": self.at,
            "fastlora_key": "site_input_tied_A1",
            "fastlora_value": "next_token_embedding+A3n_hidden",
            "fastlora_skip_first": 1,
            "fastlora_skip_last": 1,
            "fastlora_strategy": "parallel",
            "bos": False,
            "document_suffix": "\n\n",
            "prompt_format": "Question: {question}\nAnswer:",
            "base_digest": DIGEST,
        }
        (out / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
        shard: dict[str, torch.Tensor] = {}
        number, size = 0, 0
        for key, value in [*small.items(), ("", None)]:
            if shard and (value is None or size + value.nbytes > 12e6):
                save_file(shard, out / f"part.{number}.safetensors")
                shard, size, number = {}, 0, number + 1
            if value is not None:
                shard[key], size = value, size + value.nbytes


def rms_of(h: torch.Tensor) -> torch.Tensor:
    """Mean rms of rows."""
    return h.float().square().mean(-1).sqrt().mean()


def principal(covariance: torch.Tensor, mean: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Largest eigenvalues [rank] and eigenvectors [rank, d] with the mean's direction projected out."""
    along = mean / mean.norm()
    c = covariance - torch.outer(along, along @ covariance)
    c = c - torch.outer(c @ along, along)
    values, vectors = torch.linalg.eigh((c + c.t()) / 2)
    return values.flip(0)[:rank].clamp_min(1e-12), vectors.flip(1)[:, :rank].t().contiguous()


class Data:
    """Tokenised texts and questions, and the batches that are drawn from them."""

    ATTRIBUTES = (
        "password;age;phone extension;room number;favourite colour;birthplace;score;weight in grams;job;pet;locker number;badge;"
        "home town;drink;lucky number;year of birth;seat;train;doctor;street;hobby;instrument;supplier;deadline"
    ).split(";")
    WORDS = (
        "red blue green amber silver violet London Cairo Lima Oslo Quito Dakar tea coffee milk juice baker pilot nurse farmer teacher lawyer "
        "cat dog parrot turtle horse falcon rabbit iron copper granite maple cedar walnut storm river harbor lantern compass anchor saddle violin marble"
    ).split()
    SYLLABLES = "ba ko ri ta mel dor vin sha lu pra gen tol zed mi ka fen rul os ter wyn jal bru que nor".split()
    FORMS = ("The {a} of {x} is {v}.", "{x} has the {a} {v}.", "For {x}, the {a} is {v}.", "{x}'s {a} is {v}.", "{x} — {a}: {v}.")

    def __init__(self, folder: Path, seed: int) -> None:
        """Reads and tokenises everything: a few minutes of one core."""
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.rng = random.Random(seed)
        self.held_texts, self.held_questions = self.read(folder / "held_out.jsonl.xz")
        self.texts, self.questions = self.read(folder / "data.jsonl.xz")

    def ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def read(self, path: Path) -> tuple[list[np.ndarray], list[tuple[list[list[int]], list[list[str]]]]]:
        """Texts of at least three windows, and contexts in windows with their questions."""
        with lzma.open(path, "rt", encoding="utf-8") as file:
            items = [json.loads(line) for line in file]
        texts = [item["text"] for item in items if item["kind"] == "text"]
        asked = [item for item in items if item["kind"] == "qa"]
        pieces = [np.array(e.ids, np.int32) for e in self.tokenizer.encode_batch(texts, add_special_tokens=False)]
        contexts = self.tokenizer.encode_batch([item["context"] + "\n\n" for item in asked], add_special_tokens=False)
        windows = [
            [e.ids[i : i + WINDOW] for i in range(0, len(e.ids), WINDOW)]
            for e in contexts
        ]
        return (
            [piece for piece in pieces if len(piece) >= 3 * WINDOW],
            [(w, item["pairs"]) for w, item in zip(windows, asked)],
        )

    def asked(self, question: str, answer: str, rng: random.Random, chat: float = 0.5) -> tuple[list[int], int]:
        """A question with its answer as tokens, and where the answer begins."""
        before, between, after = CHAT if rng.random() < chat else QUESTION
        space = " " if between.endswith(":") else ""
        prompt = self.ids(before + question + between)
        tokens = prompt + self.ids(space + answer + after)
        cut = max(0, len(tokens) - QUERY)
        return tokens[cut:], max(1, len(prompt) - cut)

    def facts(self, rng: random.Random) -> tuple[list[int], list[tuple[list[int], int]]]:
        """A window of invented facts, and questions about them."""
        count = rng.choice([1, 2, 3, 4, 6, 8, 12])
        names = {"".join(rng.choice(self.SYLLABLES) for _ in range(rng.choice([2, 3]))).capitalize() for _ in range(count)}
        one, shared, form = rng.random() < 0.5, rng.choice(self.ATTRIBUTES), rng.choice(self.FORMS)
        told = []
        for name in sorted(names):
            if rng.random() < 0.6:
                value = "".join(rng.choice("0123456789") for _ in range(rng.choice([2, 3, 4, 5])))
            else:
                value = " ".join(rng.choice(self.WORDS) for _ in range(rng.choice([1, 1, 2])))
            told.append((name, shared if one else rng.choice(self.ATTRIBUTES), value))
        rng.shuffle(told)
        text = rng.choice([" ", "\n"]).join(form.format(a=a, x=x, v=v) for x, a, v in told) + "\n\n"
        queries = []
        for x, a, v in rng.sample(told, min(4, len(told))):
            if rng.random() < 0.3:
                start = self.ids(form.split("{v}")[0].format(a=a, x=x).rstrip())
                queries.append((start + self.ids(f" {v}."), len(start)))
            else:
                queries.append(self.asked(f"What is the {a} of {x}?", v, rng))
        return self.ids(text)[:WINDOW], queries

    def batch(self, windows: int, group: int, queries: int) -> dict[str, torch.Tensor]:
        """`windows` windows in sessions of `group`, `queries` queries a session.

        contexts [P, G, W], lengths [P, G], ids [P, Q, T], scored [P, Q, T] (token t is a target), kinds [P, Q],
        teacher [P, Q, W + T] (the window and the query behind it; zeros where there is none).
        """
        rng, sessions = self.rng, windows // group
        contexts = np.zeros((sessions, group, WINDOW), np.int64)
        lengths = np.zeros((sessions, group), np.int64)
        ids = np.zeros((sessions, queries, QUERY), np.int64)
        scored = np.zeros((sessions, queries, QUERY), bool)
        kinds = np.zeros((sessions, queries), np.int64)
        teacher = np.zeros((sessions, queries, WINDOW + QUERY), np.int64)
        for p in range(sessions):
            answerable: list[tuple[list[int], int]] = []
            piece: np.ndarray | None = None
            style = rng.random()
            filled = 0
            if style < 0.35:  # a text, its windows one after another, perhaps among questions' contexts
                piece = rng.choice(self.texts)
                most = min(len(piece) // WINDOW - 1, group)
                share = most if rng.random() < 0.5 else rng.randint(1, most)
                start = rng.randrange(0, len(piece) - (share + 1) * WINDOW + 1)
                for i in range(share):
                    contexts[p, i] = piece[start + i * WINDOW : start + (i + 1) * WINDOW]
                    lengths[p, i] = WINDOW
                filled = share
            while filled < group:
                if rng.random() < (0.8 if style > 0.85 else 0.1):
                    window, asked = self.facts(rng)
                    parts = [window]
                else:
                    parts, pairs = rng.choice(self.questions)
                    asked = [self.asked(q, a, rng) for q, a in pairs[: max(2, queries)]]
                    if len(parts) > group - filled:
                        if group == 1 or rng.random() < 0.5:
                            continue
                        break
                for part in parts:
                    contexts[p, filled, : len(part)] = part
                    lengths[p, filled] = len(part)
                    filled += 1
                answerable += asked
            for q in range(queries):
                roll = rng.random()
                if roll < 0.12:  # nothing that this session was told
                    kinds[p, q] = NEGATIVE
                    if rng.random() < 0.5:
                        _, pairs = rng.choice(self.questions)
                        tokens, begin = self.asked(*rng.choice(pairs), rng)
                    else:
                        other = rng.choice(self.texts)
                        at = rng.randrange(len(other) - QUERY)
                        tokens, begin = list(other[at : at + QUERY]), 1
                elif piece is not None and (roll < 0.75 or not answerable):
                    if rng.random() < 0.5:
                        kinds[p, q] = REC
                        at = start + rng.randrange(0, share * WINDOW - QUERY)
                    else:
                        kinds[p, q] = COM
                        at = start + share * WINDOW
                        teacher[p, q, :WINDOW] = piece[at - WINDOW : at]
                        teacher[p, q, WINDOW:] = piece[at : at + QUERY]
                    tokens, begin = list(piece[at : at + QUERY]), 1
                elif answerable:
                    kinds[p, q] = ANSWER
                    tokens, begin = rng.choice(answerable)
                else:
                    continue
                tokens = tokens[:QUERY]
                ids[p, q, : len(tokens)] = tokens
                scored[p, q, begin : len(tokens)] = True
        names = ("contexts", "lengths", "ids", "scored", "kinds", "teacher")
        return {name: torch.from_numpy(value) for name, value in zip(names, (contexts, lengths, ids, scored, kinds, teacher))}


class Trainer:
    """Base, generator, and the passes over a batch."""

    def __init__(self, base: Base, generator: Generator) -> None:
        self.base, self.generator = base, generator
        self.first = min(generator.at)

    def told(self, contexts: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """contexts [P, G, W], lengths [P, G] -> cores [n, P, R, R]."""
        p, g, w = contexts.shape
        flat, sizes = contexts.reshape(p * g, w), lengths.reshape(-1)
        caught: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

        def seen(i: int, h: torch.Tensor, x: torch.Tensor) -> None:
            if i in self.generator.at:
                caught[i] = (x, rms(h, SITE_EPS).to(COMPUTE))

        with torch.no_grad():
            h = self.base.embed(flat)
            self.base.run(h, 0, max(self.generator.at) + 1, seen=seen)
            u = rms(torch.cat([h[:, 1:], h[:, -1:]], 1), SITE_EPS)
            place = torch.arange(w, device=flat.device)[None]
            mask = ((place > 0) & (place < sizes[:, None] - 1)).float()  # the first and the last token write nothing
            x, n = (torch.stack([caught[i][j] for i in self.generator.at]) for j in (0, 1))
        return self.generator.cores(
            x.view(len(x), p, g * w, FF), n.view(len(n), p, g * w, D), u.view(p, g * w, D), mask.view(p, g * w)
        )

    def answered(self, ids: torch.Tensor, cores: torch.Tensor | None) -> torch.Tensor:
        """ids [P, Q, T] -> final residual [P Q, T, D]; without cores the bare model."""
        flat = ids.reshape(-1, ids.shape[-1])
        with torch.no_grad():
            h = self.base.run(self.base.embed(flat), 0, self.first)
        site = self.generator.site(cores) if cores is not None else None
        return self.base.run(h, self.first, LAYERS, site=site)

    def losses(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        """The weighted loss of a batch, and the mean of each kind."""
        ids, scored, kinds = batch["ids"], batch["scored"], batch["kinds"]
        flat, rows = ids.flatten(0, 1), scored.flatten(0, 1)  # [P Q, T]
        kind = kinds.flatten()[:, None].expand_as(flat)
        before = torch.zeros_like(rows)
        before[:, :-1] = rows[:, 1:]  # the places whose logits are wanted
        h = self.answered(ids, self.told(batch["contexts"], batch["lengths"]))
        logits = self.base.logits(h[before])  # [N, V]
        target, kind = flat[rows], kind[rows]
        loss = F.cross_entropy(logits, target, reduction="none")
        stats = loss.detach().clone()
        with torch.no_grad():
            wanted = [None, None]
            com = (kinds.flatten() == COM).nonzero()[:, 0]
            if len(com):
                seen = batch["teacher"].flatten(0, 1)[com]
                hidden = self.base.run(self.base.embed(seen), 0, LAYERS)[:, WINDOW:]
                wanted[0] = (COM, self.base.logits(hidden[before[com]]))
            negative = (kinds.flatten() == NEGATIVE).nonzero()[:, 0]
            if len(negative):
                hidden = self.answered(flat[negative][None], None)
                wanted[1] = (NEGATIVE, self.base.logits(hidden[before[negative]]))
        for entry in wanted:
            if entry is None:
                continue
            which, teacher = entry
            here = kind == which
            teacher = torch.log_softmax(teacher, -1)
            kl = (teacher.exp() * (teacher - torch.log_softmax(logits[here], -1))).sum(-1)
            loss = loss.clone()
            loss[here] = 0.2 * loss[here] + 0.8 * kl if which == COM else kl
            if which == NEGATIVE:
                stats[here] = kl.detach()
        total = logits.new_zeros(())
        means = {}
        for which, weight in enumerate(WEIGHTS):
            here = kind == which
            if here.any():
                total = total + weight * loss[here].mean()
                means[NAMES[which]] = stats[here].mean().item()
        return total, means

    @torch.no_grad()
    def nll(self, told: list[list[list[int]]], asked: list[tuple[list[int], int]], group: int) -> tuple[float, float, float]:
        """Mean negative log-likelihood of what is asked about each session: bare, told, told something else."""
        device = self.base.device
        sums = [0.0, 0.0, 0.0]
        count = 0
        for at in range(0, len(told), 8):
            some, about = told[at : at + 8], asked[at : at + 8]
            contexts = torch.zeros(len(some), group, WINDOW, dtype=torch.long, device=device)
            lengths = torch.zeros(len(some), group, dtype=torch.long, device=device)
            ids = torch.zeros(len(some), 1, QUERY, dtype=torch.long, device=device)
            scored = torch.zeros(len(some), 1, QUERY, dtype=torch.bool, device=device)
            for p, (windows, (tokens, begin)) in enumerate(zip(some, about)):
                for g, window in enumerate(windows):
                    contexts[p, g, : len(window)] = torch.tensor(window, device=device)
                    lengths[p, g] = len(window)
                ids[p, 0, : len(tokens)] = torch.tensor(tokens, device=device)
                scored[p, 0, begin : len(tokens)] = True
            cores = self.told(contexts, lengths)
            rows = scored.flatten(0, 1)
            before = torch.zeros_like(rows)
            before[:, :-1] = rows[:, 1:]
            for i, core in enumerate((None, cores, cores.roll(1, 1))):
                logits = self.base.logits(self.answered(ids, core)[before])
                sums[i] += F.cross_entropy(logits, ids.flatten(0, 1)[rows], reduction="sum").item()
            count += int(rows.sum())
        return tuple(value / max(count, 1) for value in sums)  # type: ignore[return-value]

    def validate(self, data: Data) -> dict[str, Any]:
        """Held-out figures: answers with 1, 4 and 8 windows in both formats, reconstruction, completion; bare, own, foreign."""
        rng = random.Random(5)
        found: dict[str, Any] = {}
        short = [item for item in data.held_questions if len(item[0]) == 1]
        for group in (1, 4, 8):
            told, asked = [], []
            for i in range(0, len(short) - group + 1, group):
                told.append([part for item in short[i : i + group] for part in item[0]])
                asked.append(rng.choice(short[i : i + group])[1][0])
            for name, chat in (("plain", 0.0), ("chat", 1.0)):
                queries = [data.asked(q, a, rng, chat) for q, a in asked]
                found[f"answers_{group}_{name}"] = self.nll(told, queries, group)
        rec, com, told = [], [], []
        for piece in data.held_texts:
            told.append([piece[:WINDOW].tolist()])
            at = rng.randrange(0, WINDOW - QUERY)
            rec.append((piece[at : at + QUERY].tolist(), 1))
            com.append((piece[WINDOW : WINDOW + QUERY].tolist(), 1))
        found["reconstruction"], found["completion"] = self.nll(told, rec, 1), self.nll(told, com, 1)
        return found


def figure(found: dict[str, Any]) -> float:
    """What a checkpoint is kept by, smaller is better: own NLL, and what a foreign text does to completion."""
    own = sum(found[name][1] for name in found)
    return own + 2.0 * max(0.0, found["completion"][2] - found["completion"][0])


def main() -> None:
    """Trains for some minutes, or exports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--minutes", type=float, default=9.0, help="end this command after so long")
    parser.add_argument("--total-minutes", type=float, default=26.0, help="length of the whole schedule")
    parser.add_argument("--rank", type=int, default=512)
    parser.add_argument("--layers", default="9,11,13,15,17,19,21,23,25,27,29")
    parser.add_argument("--windows", type=int, default=64, help="windows of a step")
    parser.add_argument("--queries", type=int, default=256, help="queries of a step")
    parser.add_argument("--lr", type=float, default=1e-2, help="relative to each tensor's size")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--validate-every", type=float, default=150.0, help="seconds")
    parser.add_argument("--export", type=Path)
    options = parser.parse_args()
    began = time.monotonic()
    options.work.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(options.seed)
    generator = Generator([int(i) for i in options.layers.split(",")], options.rank).to(device)
    if options.export:
        generator.load_state_dict(torch.load(options.work / "best.pt", map_location=device))
        generator.export(options.export)
        return
    base = Base(options.data, device)
    state_file = options.work / "state.pt"
    saved = torch.load(state_file, map_location=device) if state_file.exists() else None
    data = Data(options.data, options.seed + (saved["step"] if saved else 0))
    trainer = Trainer(base, generator)
    if saved is None:
        contexts = torch.from_numpy(np.stack([text[:WINDOW] for text in data.texts[:96]]).astype(np.int64)).to(device)
        counts = np.bincount(np.concatenate(data.texts[:2000]), minlength=VOCAB)
        generator.whiten(base, contexts, torch.from_numpy(counts).float().to(device))
    scalars = [generator.log_lambda, generator.log_amplitude]
    tensors = [p for p in generator.parameters() if not any(p is s for s in scalars)]
    optimizer = torch.optim.AdamW(
        [{"params": tensors, "times": 1.0}, {"params": scalars, "times": 3.0}], lr=options.lr, betas=(0.9, 0.98), weight_decay=0.0
    )
    step, elapsed, tokens, best = 0, 0.0, 0, math.inf
    if saved is not None:
        generator.load_state_dict(saved["generator"])
        optimizer.load_state_dict(saved["optimizer"])
        step, elapsed, tokens, best = saved["step"], saved["elapsed"], saved["tokens"], saved["best"]
    print(f"ready after {time.monotonic() - began:.0f} s, {sum(p.numel() for p in generator.parameters()) / 1e6:.1f} M parameters", flush=True)

    log = (options.work / "metrics.jsonl").open("a")
    last = checked = time.monotonic()

    def keep() -> None:
        part = state_file.with_suffix(".part")
        torch.save(
            {"generator": generator.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "elapsed": elapsed, "tokens": tokens, "best": best},
            part,
        )
        part.replace(state_file)

    def check() -> None:
        nonlocal best
        found = trainer.validate(data)
        line = {"step": step, "minutes": elapsed / 60, "tokens": tokens, "figure": figure(found), "held_out": found}
        print(json.dumps(line), flush=True)
        log.write(json.dumps(line) + "\n")
        log.flush()
        if figure(found) < best:
            best = figure(found)
            torch.save(generator.state_dict(), options.work / "best.pt")
        keep()

    if saved is None:
        check()
    last = time.monotonic()
    while time.monotonic() - began < options.minutes * 60 and elapsed < options.total_minutes * 60:
        progress = elapsed / (options.total_minutes * 60)
        rate = min(1.0, (step + 1) / 50) * max(0.01, 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))
        for group in optimizer.param_groups:
            group["lr"] = options.lr * group["times"] * rate
        size = data.rng.choice([1, 1, 2, 4, 8, 8]) if options.windows >= 8 else 1
        batch = data.batch(options.windows, size, options.queries * size // options.windows)
        loss, means = trainer.losses({name: value.to(device) for name, value in batch.items()})
        if not torch.isfinite(loss):
            torch.save(batch, options.work / "not-finite.pt")
            raise SystemExit(f"the loss is not finite at step {step}; the batch is in {options.work / 'not-finite.pt'}")
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(generator.parameters(), 1.0)
        optimizer.step()
        step += 1
        tokens += batch["contexts"].numel() + batch["ids"].numel()
        now = time.monotonic()
        elapsed, last = elapsed + now - last, now
        if step % 20 == 0:
            line = {"step": step, "minutes": elapsed / 60, "tokens": tokens, "loss": loss.item(), "norm": norm.item(), "group": size, **means}
            log.write(json.dumps(line) + "\n")
            if step % 200 == 0:
                print(json.dumps(line), flush=True)
        if now - checked > options.validate_every:
            check()
            last = checked = time.monotonic()
    check()


if __name__ == "__main__":
    main()
