"""Answer likelihoods of an evaluation, computed a second time with transformers.

`make` writes a few rows of squad's form; `imprint eval run` judges a model on them; `check` puts the same questions, with the context
in the prompt and without, to the same GGUF as transformers dequantises it, with a tokenizer built here out of the GGUF's metadata.
Start at `check`.

    python eval_reference.py make ROWS.jsonl
    python eval_reference.py check REPORT.json SmolLM2-135M-Instruct.Q4_1.gguf
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from gguf import GGUFReader
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM

# Largest difference of an answer's mean negative log-likelihood, in nats a token; both sides compute in f32.
TOLERANCE = 1e-3

# Invented for this check: a place, what is said of it, and questions with their answers.
PLACES: list[tuple[str, list[tuple[str, str]]]] = [
    (
        "Harrow Quay is a small harbour on the northern shore. Its lighthouse was built in 1871 by Ida Fenwick, "
        "who had the tower painted green. Since 1950 the lamp is electric.",
        [("Who built the lighthouse of Harrow Quay?", "Ida Fenwick"), ("What colour is the tower?", "green")],
    ),
    (
        "The bakers of Ostrel close their shops on Wednesdays. On that day they meet in the old mill, where 14 of them "
        "play in a brass band led by Tomas Reyl.",
        [("When do the bakers of Ostrel close?", "Wednesdays"), ("Who leads the brass band?", "Tomas Reyl")],
    ),
    (
        "In the museum of Dunmarrow stands a clock with 3 hands. The third one shows the tide at Port Selby, 40 miles "
        "away, and is made of whalebone.",
        [("What does the third hand show?", "the tide at Port Selby"), ("What is it made of?", "whalebone")],
    ),
    (
        "Every spring the school of Lower Kestle sends a balloon across the strait. The one of 2009 came down in a "
        "vineyard near Aubrac; its finder, a cooper, answered with a barrel of vinegar.",
        [("Where did the balloon of 2009 come down?", "in a vineyard near Aubrac"), ("Who found it?", "a cooper")],
    ),
]


def make(path: Path) -> None:
    """Writes the rows."""
    with path.open("w", encoding="utf-8") as file:
        for place, (context, asked) in enumerate(PLACES):
            for number, (question, answer) in enumerate(asked):
                row = {"id": f"{place}-{number}", "context": context, "question": question, "answers": [answer]}
                file.write(json.dumps(row) + "\n")


def tokenizer(path: Path) -> Tokenizer:
    """SmolLM2's: a byte-level BPE that reads digits one by one."""
    fields = GGUFReader(path).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"].contents()]
    made = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=merges))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    made.decoder = decoders.ByteLevel()
    kinds = fields["tokenizer.ggml.token_type"].contents()
    control = 3
    made.add_special_tokens([AddedToken(token, special=True) for token, kind in zip(tokens, kinds) if kind == control])
    return made


def check(report: dict, path: Path) -> None:
    """Compares every answer, and fails where the two sides differ."""
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    encode = tokenizer(path).encode
    worst = {"none": 0.0, "in_context": 0.0}
    sums = {"none": [0.0, 0.0], "in_context": [0.0, 0.0]}
    count = 0
    for example in report["examples"]:
        context = report["contexts"][example["context"]]["text"]
        answer = encode(f" {example['references'][0].strip()}\n").ids
        for method, told in (("none", ""), ("in_context", context)):
            prompt = encode(told).ids + encode(f"Question: {example['question']}\nAnswer:").ids
            ours = example["answers"][method]
            assert (len(prompt), len(answer)) == (ours["prompt_tokens"], ours["tokens"]), (method, example["id"])
            ids = torch.tensor([prompt + answer])
            with torch.no_grad():
                logits = model(input_ids=ids).logits[0].double()  # [T, vocab]
            places = torch.log_softmax(logits[len(prompt) - 1 : -1], -1)  # [answer, vocab]
            theirs = -places.gather(1, torch.tensor(answer)[:, None]).sum().item()
            worst[method] = max(worst[method], abs(theirs - ours["nll"]) / len(answer))
            sums[method][0] += theirs
            sums[method][1] += len(answer)
        count += 1
    assert count > 0, "the report has no example"
    for method, (nll, tokens) in sums.items():
        ours = report["methods"][method]["answer_nll"]
        print(
            f"{method}: {count} answers, transformers {nll / tokens:.5f}, imprint {ours:.5f} nats a token; "
            f"an answer differs by at most {worst[method]:.2e}, allowed {TOLERANCE:.0e}"
        )
        assert abs(nll / tokens - ours) <= TOLERANCE, method
    assert max(worst.values()) <= TOLERANCE, worst


def main() -> None:
    """Makes or checks."""
    if sys.argv[1] == "make":
        make(Path(sys.argv[2]))
    else:
        check(json.loads(Path(sys.argv[2]).read_text(encoding="utf-8")), Path(sys.argv[3]))


if __name__ == "__main__":
    main()
