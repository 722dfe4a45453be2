"""An exported adapter, loaded by peft onto the same model in transformers.

Tells a session a text, exports its adapter, lets transformers dequantise the GGUF and peft load the files as it would
any LoRA. Its log-probabilities must be the server's. Start at `main`.

    python crates/xtask/python/peft_torch.py 127.0.0.1:7461 SmolLM2-135M-Instruct.Q4_1.gguf
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from imprint import Client
from peft import PeftModel
from peft_numpy import CONTINUATION, PROMPT, TEXT, TOLERANCE
from transformers import AutoModelForCausalLM


def logprobs(model: torch.nn.Module, prompt: list[int], told_of: list[int]) -> torch.Tensor:
    """Log-probabilities of the tokens behind the prompt. [len(told_of)]."""
    ids = torch.tensor([prompt + told_of])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0].double()  # [T, vocab]
    places = torch.log_softmax(logits[len(prompt) - 1 : -1], -1)  # [len(told_of), vocab]
    return places.gather(1, torch.tensor(told_of)[:, None])[:, 0]


def main() -> None:
    """Compares, and fails where the two sides differ."""
    endpoint, path = sys.argv[1], Path(sys.argv[2])
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    with Client(endpoint, timeout_s=300) as client, tempfile.TemporaryDirectory() as folder:
        session = client.sessions.create(labels={"for": "peft"})
        with client.ingest(session.session_id) as stream:
            stream.send(TEXT, end_of_document=True)
        export = client.export_adapter(session.session_id, folder)
        prompt, told_of = (
            [token.token_id for token in client.score([1], [text]).scores[0].tokens] for text in (PROMPT, CONTINUATION)
        )
        bare, told = (
            torch.tensor([t.logprob for t in client.score(prompt, [told_of], session_id=name).scores[0].tokens]).double()
            for name in ("", session.session_id)
        )
        client.sessions.delete(session.session_id)
        worst = {"bare": (logprobs(model, prompt, told_of) - bare).abs().max().item()}
        adapted = PeftModel.from_pretrained(model, folder).eval()
        worst["adapted"] = (logprobs(adapted, prompt, told_of) - told).abs().max().item()
    moved = (told - bare).abs().max().item()
    print(
        f"rank {export.rank}; log-probabilities of {len(told_of)} tokens: bare {bare.sum():.4f}, adapted {told.sum():.4f}; "
        f"peft differs by at most {worst['bare']:.2e} (bare), {worst['adapted']:.2e} (adapted) nats a token; "
        f"allowed {TOLERANCE:.0e}"
    )
    assert moved > 0.1, f"the adapter moved no log-probability by more than {moved}: nothing was compared"
    assert max(worst.values()) <= TOLERANCE, worst


if __name__ == "__main__":
    main()
