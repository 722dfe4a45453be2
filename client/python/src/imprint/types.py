"""What the clients take and return: plain values, read-only, without protobuf in them.

The fields are those of `proto/imprint/v1/*.proto`, whose comments say more; times are `datetime` (UTC)
and `timedelta`. Start at `Session` and `Answer`.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import TypeAlias


class Strategy(enum.IntEnum):
    """How the windows of a context become one state."""

    DEFAULT = 0
    """The strategy that the generator was trained for."""
    CONCAT = 1
    """One window: a whole document is encoded at once."""
    PARALLEL = 2
    """Each window is encoded by the bare model; the states are summed."""
    SEQUENTIAL = 3
    """Each window is encoded by the model that carries the windows before it."""


class FinishReason(enum.IntEnum):
    """Why a generation ended."""

    UNSPECIFIED = 0
    """A reason that this client does not know."""
    EOS = 1
    """The model ended the text."""
    STOP = 2
    """A stop string was met; the text ends before it."""
    LENGTH = 3
    """`max_tokens` were produced, or the model's window is full."""
    SHUTDOWN = 4
    """The server is shutting down."""


@dataclass(frozen=True, slots=True)
class Session:
    """A session as it was when the server answered."""

    session_id: str
    model: str
    strategy: Strategy
    window: int
    """Tokens in a window."""
    labels: Mapping[str, str]
    ttl: timedelta | None
    create_time: datetime
    update_time: datetime
    expire_time: datetime | None
    adapter_version: int
    """The newest adapter version; 0 is the bare model."""
    state_digest: str
    accepted_seq: int
    """The `seq` of the last accepted chunk."""
    applied_seq: int
    """Chunks up to here are in the newest version."""
    context_tokens: int
    documents: int
    state_bytes: int
    core_bytes: int
    trace_bytes: int
    """Bytes of what single tokens of the documents wrote, which answers to questions are composed of."""
    forked_from: str


@dataclass(frozen=True, slots=True)
class Document:
    """A document of a session."""

    document_id: str
    tokens: int
    complete: bool
    first_seq: int
    last_seq: int


@dataclass(frozen=True, slots=True)
class Applied:
    """A version of the adapter is published."""

    seq: int
    """All chunks up to here are in the version."""
    adapter_version: int
    state_digest: str
    tokens: int
    """Context tokens in the version."""


@dataclass(frozen=True, slots=True)
class Forgotten:
    """A document is forgotten."""

    adapter_version: int
    state_digest: str


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a conversation."""

    role: str
    """`system`, `user` or `assistant`."""
    content: str


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt that is put into the question format of the generator."""

    text: str


Prompt: TypeAlias = str | Question | Sequence[int] | Sequence[Message]
"""Plain text, a question, token ids, or a conversation for the model's chat template."""

Continuation: TypeAlias = str | Sequence[int]
"""Text, or token ids."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn; None leaves a value to the server."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token and how likely it was."""

    token_id: int
    text: str
    logprob: float
    """In nats."""


@dataclass(frozen=True, slots=True)
class Delta:
    """Text and tokens that follow what came before."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    top_logprobs: tuple[tuple[TokenLogprob, ...], ...]


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens read and written."""

    prompt_tokens: int
    completion_tokens: int
    context_tokens: int
    """Context tokens in the adapter, none of them in the prompt."""
    cached_tokens: int = 0
    """Of the prompt's tokens those that were read before, by an earlier request that began with them."""


@dataclass(frozen=True, slots=True)
class Timings:
    """Where the time of a request went, by the server's clock."""

    queue: timedelta
    prefill: timedelta
    decode: timedelta


@dataclass(frozen=True, slots=True)
class Finished:
    """The end of a generation."""

    finish_reason: FinishReason
    usage: Usage
    adapter_version: int
    state_digest: str
    """Of that version, or of the documents of it that the prompt means."""
    timings: Timings
    adapter_scale: float
    """Strength that the imprint had; 0 is the bare model."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole generation."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    finished: Finished


@dataclass(frozen=True, slots=True)
class ContinuationScore:
    """How likely a continuation is."""

    logprob: float
    """Sum over its tokens, in nats."""
    tokens: tuple[TokenLogprob, ...]
    greedy: bool
    """Whether greedy decoding would have produced it."""


@dataclass(frozen=True, slots=True)
class Score:
    """How likely the continuations of a prompt are, in the order of the call."""

    scores: tuple[ContinuationScore, ...]
    adapter_version: int
    prompt_tokens: int
    adapter_scale: float
    """Strength that the imprint had; 0 is the bare model."""
    cached_tokens: int = 0
    """Of the prompt's tokens those that were read before, by an earlier request that began with them."""


@dataclass(frozen=True, slots=True)
class Site:
    """An adapted linear of a layer."""

    layer: int
    module: str
    r1: int
    r2: int
    rank: int


@dataclass(frozen=True, slots=True)
class Generator:
    """A trained generator network."""

    write: str
    read_out: str
    sites: tuple[Site, ...]
    window: int
    strategy: Strategy
    digest: str
    parameters: int
    prompt_format: str


@dataclass(frozen=True, slots=True)
class Model:
    """A frozen model with its generator."""

    name: str
    architecture: str
    parameters: int
    layers: int
    hidden_size: int
    vocab_size: int
    context_length: int
    weight_format: str
    digest: str
    generator: Generator | None


@dataclass(frozen=True, slots=True)
class Export:
    """A PEFT LoRA on disk."""

    directory: Path
    files: tuple[Path, ...]
    adapter_version: int
    state_digest: str
    rank: int
