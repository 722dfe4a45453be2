"""What a GPU machine without a network needs to train the generator: base, tokenizer, data, in pieces that travel.

Reads the default model's GGUF and the data folder, writes into OUT: `base.0.safetensors` ... `base.2.safetensors` (quantised blocks as
they are, about 32 MB each), `tokenizer.json`, `data.jsonl.xz` (texts and questions to train on; what occurs in an evaluation file is left
out) and `held_out.jsonl.xz` (some of them, kept back for the validation figure). Start at `main`.

    python gpu/train/prepare.py MODEL.gguf ../shared/data OUT     # needs gguf, tokenizers, safetensors, zstandard
"""

from __future__ import annotations

import hashlib
import io
import json
import lzma
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import zstandard
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

# Characters of a piece of plain text: room for eight windows of 256 tokens and what comes after them.
PIECE = 12_000
PIECES = 9_000
CONTEXTS = 60_000
# What is held out of them for the validation figure.
HELD_CONTEXTS = 300
HELD_TEXTS = 100
# Files that the base is cut into.
PARTS = 3


def rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a zstd file of JSON lines."""
    with path.open("rb") as file:
        for line in io.TextIOWrapper(zstandard.ZstdDecompressor().stream_reader(file), encoding="utf-8"):
            yield json.loads(line)


def key(text: str) -> str:
    """What a text is recognised by, whatever its spaces and capitals."""
    return hashlib.sha256(" ".join(text.lower().split()).encode()).hexdigest()


def write(path: Path, items: list[dict[str, Any]]) -> None:
    """JSON lines, compressed with what every Python can read."""
    with lzma.open(path, "wt", preset=6, encoding="utf-8") as file:
        for item in items:
            file.write(json.dumps(item, ensure_ascii=False) + "\n")


def base(reader: gguf.GGUFReader, out: Path) -> None:
    """All tensors with their blocks as bytes [rows, bytes]; name|type|columns is the key."""
    parts: list[dict[str, np.ndarray]] = [{} for _ in range(PARTS)]
    total = sum(tensor.n_bytes for tensor in reader.tensors)
    done = 0
    for tensor in reader.tensors:
        columns = int(tensor.shape[0])
        count = int(np.prod(tensor.shape)) // columns
        blocks = np.ascontiguousarray(tensor.data).view(np.uint8).reshape(count, -1)
        parts[done * PARTS // total][f"{tensor.name}|{tensor.tensor_type.name}|{columns}"] = blocks
        done += tensor.n_bytes
    for number, part in enumerate(parts):
        save_file(part, out / f"base.{number}.safetensors")


def tokenizer(reader: gguf.GGUFReader) -> Tokenizer:
    """The tokenizer that the file describes: byte-level BPE, digits apart."""
    tokens, merges, kinds = (
        reader.fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "merges", "token_type")
    )
    pairs = [tuple(merge.split(" ")) for merge in merges]
    made = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=pairs))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    made.decoder = decoders.ByteLevel()
    control = 3
    made.add_special_tokens([AddedToken(token, special=True) for token, kind in zip(tokens, kinds) if kind == control])
    return made


def answers(row: dict[str, Any]) -> list[str]:
    """A row's answers, whether it has one or several."""
    found = row["answers"]
    return found if isinstance(found, list) else [found]


def questions(path: Path, banned: set[str], limit: int, rng: random.Random) -> list[dict[str, Any]]:
    """Contexts with their questions; none whose context or question is banned."""
    contexts: dict[str, dict[str, Any]] = {}
    for row in rows(path):
        context, question, first = row["context"].strip(), row["question"].strip(), (answers(row) or [""])[0].strip()
        if not 120 <= len(context) <= 4000 or not first or len(first) > 120:
            continue
        if key(context) in banned or key(question) in banned:
            continue
        entry = contexts.setdefault(context, {"kind": "qa", "task": row.get("task", ""), "context": context, "pairs": []})
        entry["pairs"].append([question, first])
    items = list(contexts.values())
    rng.shuffle(items)
    for item in items:
        rng.shuffle(item["pairs"])
        item["pairs"] = item["pairs"][:6]
    return items[:limit]


def main() -> None:
    """Writes all files."""
    model, data, out = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
    out.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    reader = gguf.GGUFReader(model)
    base(reader, out)
    tokenizer(reader).save(str(out / "tokenizer.json"))

    banned: set[str] = set()
    for path in sorted((data / "eval").glob("*.jsonl.zst")):
        for row in rows(path):
            banned.update(key(row[name]) for name in ("context", "question", "text") if isinstance(row.get(name), str))
    # What checkpoints are chosen by is no evaluation row: it is cut off the training rows.
    items = questions(data / "train/qa_train.jsonl.zst", banned, CONTEXTS, rng)
    texts = [row["text"] for row in rows(data / "train/corpus_train.jsonl.zst") if key(row["text"]) not in banned]
    texts = rng.sample(texts, min(PIECES + HELD_TEXTS, len(texts)))
    held = items[:HELD_CONTEXTS] + [{"kind": "text", "text": text[:PIECE]} for text in texts[:HELD_TEXTS]]
    write(out / "held_out.jsonl.xz", held)
    items = items[HELD_CONTEXTS:]
    for text in texts[HELD_TEXTS:]:
        start = rng.randrange(max(1, len(text) - PIECE))
        items.append({"kind": "text", "text": text[start : start + PIECE]})
    rng.shuffle(items)
    write(out / "data.jsonl.xz", items)
    for path in sorted(out.iterdir()):
        print(f"{path.name}: {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
