"""Between values and messages: what both clients share.

Methods with their types, requests built from arguments, values read from answers. No call is made here.
Start at `Method`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import BinaryIO, Generic, Protocol, TypeVar

from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.timestamp_pb2 import Timestamp

from imprint import types
from imprint.errors import DamagedExport
from imprint.v1 import context_pb2, generation_pb2, model_pb2, session_pb2, types_pb2


class _Message(Protocol):
    def SerializeToString(self) -> bytes: ...


Request = TypeVar("Request", bound=_Message)
Response = TypeVar("Response")


@dataclass(frozen=True)
class Method(Generic[Request, Response]):
    """A method of the contract: its path, and how its answer is read."""

    path: str
    request: type[Request]
    read: Callable[[bytes], Response]

    def write(self, message: Request) -> bytes:
        """The bytes of a request."""
        return message.SerializeToString()


_SESSION = "/imprint.v1.SessionService/"
CREATE = Method(
    _SESSION + "CreateSession",
    session_pb2.CreateSessionRequest,
    session_pb2.CreateSessionResponse.FromString,
)
GET = Method(_SESSION + "GetSession", session_pb2.GetSessionRequest, session_pb2.GetSessionResponse.FromString)
LIST = Method(
    _SESSION + "ListSessions",
    session_pb2.ListSessionsRequest,
    session_pb2.ListSessionsResponse.FromString,
)
UPDATE = Method(
    _SESSION + "UpdateSession",
    session_pb2.UpdateSessionRequest,
    session_pb2.UpdateSessionResponse.FromString,
)
DELETE = Method(
    _SESSION + "DeleteSession",
    session_pb2.DeleteSessionRequest,
    session_pb2.DeleteSessionResponse.FromString,
)
FORK = Method(
    _SESSION + "ForkSession",
    session_pb2.ForkSessionRequest,
    session_pb2.ForkSessionResponse.FromString,
)
DOCUMENTS = Method(
    _SESSION + "ListDocuments",
    session_pb2.ListDocumentsRequest,
    session_pb2.ListDocumentsResponse.FromString,
)
FORGET = Method(
    _SESSION + "ForgetDocument",
    session_pb2.ForgetDocumentRequest,
    session_pb2.ForgetDocumentResponse.FromString,
)
INGEST = Method(
    "/imprint.v1.ContextService/Ingest",
    context_pb2.IngestRequest,
    context_pb2.IngestResponse.FromString,
)
GENERATE = Method(
    "/imprint.v1.GenerationService/Generate",
    generation_pb2.GenerateRequest,
    generation_pb2.GenerateResponse.FromString,
)
SCORE = Method(
    "/imprint.v1.GenerationService/Score",
    generation_pb2.ScoreRequest,
    generation_pb2.ScoreResponse.FromString,
)
MODELS = Method(
    "/imprint.v1.ModelService/ListModels",
    model_pb2.ListModelsRequest,
    model_pb2.ListModelsResponse.FromString,
)
MODEL = Method(
    "/imprint.v1.ModelService/GetModel",
    model_pb2.GetModelRequest,
    model_pb2.GetModelResponse.FromString,
)
EXPORT = Method(
    "/imprint.v1.AdapterService/ExportAdapter",
    model_pb2.ExportAdapterRequest,
    model_pb2.ExportAdapterResponse.FromString,
)


def endpoint(address: str) -> tuple[str, bool]:
    """The channel's target and whether it uses TLS: `host:port`, `http://host:port`, `https://host:port`."""
    scheme, separator, rest = address.partition("://")
    if not separator:
        return address, False
    if scheme not in ("http", "https"):
        raise ValueError(f"endpoint {address!r}: the scheme is neither http nor https")
    return rest.rstrip("/"), scheme == "https"


def credentials(key: str | None) -> tuple[tuple[str, str], ...]:
    """The metadata of every call."""
    return () if key is None else (("authorization", f"Bearer {key}"),)


# Requests.

_STRATEGIES: Mapping[types.Strategy, types_pb2.Strategy] = {
    types.Strategy.DEFAULT: types_pb2.STRATEGY_UNSPECIFIED,
    types.Strategy.CONCAT: types_pb2.STRATEGY_CONCAT,
    types.Strategy.PARALLEL: types_pb2.STRATEGY_PARALLEL,
    types.Strategy.SEQUENTIAL: types_pb2.STRATEGY_SEQUENTIAL,
}


def create(
    model: str,
    strategy: types.Strategy,
    window: int,
    labels: Mapping[str, str] | None,
    ttl: timedelta | None,
    request_id: str,
) -> session_pb2.CreateSessionRequest:
    """CreateSession."""
    return session_pb2.CreateSessionRequest(
        model=model,
        strategy=_STRATEGIES[strategy],
        window=window,
        labels=labels,
        ttl=ttl,
        request_id=request_id,
    )


def get(session_id: str) -> session_pb2.GetSessionRequest:
    """GetSession."""
    return session_pb2.GetSessionRequest(session_id=session_id)


def page(page_size: int, page_token: str) -> session_pb2.ListSessionsRequest:
    """ListSessions."""
    return session_pb2.ListSessionsRequest(page_size=page_size, page_token=page_token)


def update(
    session_id: str, labels: Mapping[str, str] | None, ttl: timedelta | None, keep_forever: bool
) -> session_pb2.UpdateSessionRequest:
    """UpdateSession: the mask names what was given."""
    if ttl is not None and keep_forever:
        raise ValueError("a session has either a ttl or none: not both ttl and keep_forever")
    paths = ["labels"] if labels is not None else []
    if ttl is not None or keep_forever:
        paths.append("ttl")
    return session_pb2.UpdateSessionRequest(
        session=session_pb2.Session(session_id=session_id, labels=labels, ttl=ttl),
        update_mask=FieldMask(paths=paths),
    )


def delete(session_id: str) -> session_pb2.DeleteSessionRequest:
    """DeleteSession."""
    return session_pb2.DeleteSessionRequest(session_id=session_id)


def fork(
    session_id: str, labels: Mapping[str, str] | None, ttl: timedelta | None
) -> session_pb2.ForkSessionRequest:
    """ForkSession."""
    return session_pb2.ForkSessionRequest(session_id=session_id, labels=labels, ttl=ttl)


def documents(session_id: str) -> session_pb2.ListDocumentsRequest:
    """ListDocuments."""
    return session_pb2.ListDocumentsRequest(session_id=session_id)


def forget(session_id: str, document_id: str) -> session_pb2.ForgetDocumentRequest:
    """ForgetDocument."""
    return session_pb2.ForgetDocumentRequest(session_id=session_id, document_id=document_id)


def ingest_open(session_id: str) -> context_pb2.IngestRequest:
    """The first message of an ingest stream."""
    return context_pb2.IngestRequest(open=context_pb2.IngestOpen(session_id=session_id))


def ingest_chunk(
    seq: int,
    text: str | None,
    token_ids: Sequence[int] | None,
    document_id: str,
    end_of_document: bool,
) -> context_pb2.IngestRequest:
    """A chunk: text or ids."""
    if text is not None and token_ids is not None:
        raise ValueError("a chunk is text or token_ids, not both")
    if text is None and token_ids is None:
        if not end_of_document:
            raise ValueError("a chunk needs text or token_ids")
        text = ""
    return context_pb2.IngestRequest(
        chunk=context_pb2.IngestChunk(
            seq=seq,
            text=text,
            token_ids=None if token_ids is None else types_pb2.TokenIds(ids=token_ids),
            document_id=document_id,
            end_of_document=end_of_document,
        )
    )


def ingest_flush() -> context_pb2.IngestRequest:
    """Asks for a version of all that has come."""
    return context_pb2.IngestRequest(flush=context_pb2.IngestFlush())


def _ids(items: Sequence[int] | Sequence[types.Message]) -> list[int] | None:
    ids = [item for item in items if isinstance(item, int)]
    return ids if len(ids) == len(items) else None


def prompt(value: types.Prompt) -> types_pb2.Prompt:
    """A prompt in the form that its type says."""
    if isinstance(value, str):
        return types_pb2.Prompt(text=value)
    if isinstance(value, types.Question):
        return types_pb2.Prompt(question=value.text)
    ids = _ids(value)
    if ids is not None:
        return types_pb2.Prompt(token_ids=types_pb2.TokenIds(ids=ids))
    messages = [item for item in value if isinstance(item, types.Message)]
    if len(messages) != len(value):
        raise TypeError("a prompt is a str, a Question, a sequence of int or a sequence of Message")
    chat = [types_pb2.ChatMessage(role=m.role, content=m.content) for m in messages]
    return types_pb2.Prompt(chat=types_pb2.ChatMessages(messages=chat))


def adapter(
    session_id: str, min_applied_seq: int, min_adapter_version: int, adapter_scale: float | None
) -> generation_pb2.AdapterSelection:
    """Which adapter a request runs with."""
    return generation_pb2.AdapterSelection(
        session_id=session_id,
        min_applied_seq=min_applied_seq,
        min_adapter_version=min_adapter_version,
        adapter_scale=adapter_scale,
    )


def generate(
    value: types.Prompt,
    selection: generation_pb2.AdapterSelection,
    model: str,
    sampling: types.Sampling | None,
    stop: Sequence[str],
    max_tokens: int,
    logprobs: bool,
    top_logprobs: int,
) -> generation_pb2.GenerateRequest:
    """Generate."""
    drawn = sampling or types.Sampling()
    return generation_pb2.GenerateRequest(
        model=model,
        adapter=selection,
        prompt=prompt(value),
        sampling=generation_pb2.Sampling(
            temperature=drawn.temperature,
            top_k=drawn.top_k,
            top_p=drawn.top_p,
            min_p=drawn.min_p,
            repetition_penalty=drawn.repetition_penalty,
            seed=drawn.seed,
        ),
        stop=stop,
        max_tokens=max_tokens,
        logprobs=logprobs,
        top_logprobs=top_logprobs,
    )


def score(
    value: types.Prompt,
    continuations: Iterable[types.Continuation],
    selection: generation_pb2.AdapterSelection,
    model: str,
) -> generation_pb2.ScoreRequest:
    """Score."""
    return generation_pb2.ScoreRequest(
        model=model,
        adapter=selection,
        prompt=prompt(value),
        continuations=[
            generation_pb2.Continuation(text=c)
            if isinstance(c, str)
            else generation_pb2.Continuation(token_ids=types_pb2.TokenIds(ids=c))
            for c in continuations
        ],
    )


# Values.


def _time(seconds: int, nanos: int) -> datetime:
    return datetime.fromtimestamp(seconds, tz=timezone.utc) + timedelta(microseconds=nanos // 1000)


def _span(seconds: int, nanos: int) -> timedelta:
    return timedelta(seconds=seconds, microseconds=nanos // 1000)


def _strategy(value: int) -> types.Strategy:
    try:
        return types.Strategy(value)
    except ValueError:
        return types.Strategy.DEFAULT


def session(m: session_pb2.Session) -> types.Session:
    """A session."""
    return types.Session(
        session_id=m.session_id,
        model=m.model,
        strategy=_strategy(m.strategy),
        window=m.window,
        labels=dict(m.labels),
        ttl=_span(m.ttl.seconds, m.ttl.nanos) if m.HasField("ttl") else None,
        create_time=_time(m.create_time.seconds, m.create_time.nanos),
        update_time=_time(m.update_time.seconds, m.update_time.nanos),
        expire_time=_time(m.expire_time.seconds, m.expire_time.nanos) if m.HasField("expire_time") else None,
        adapter_version=m.adapter_version,
        state_digest=m.state_digest,
        accepted_seq=m.accepted_seq,
        applied_seq=m.applied_seq,
        context_tokens=m.context_tokens,
        documents=m.documents,
        state_bytes=m.state_bytes,
        core_bytes=m.core_bytes,
        trace_bytes=m.trace_bytes,
        forked_from=m.forked_from,
    )


def document(m: session_pb2.Document) -> types.Document:
    """A document."""
    return types.Document(m.document_id, m.tokens, m.complete, m.first_seq, m.last_seq)


def applied(m: context_pb2.IngestApplied) -> types.Applied:
    """A published version."""
    return types.Applied(m.seq, m.adapter_version, m.state_digest, m.tokens)


def _logprob(m: types_pb2.TokenLogprob) -> types.TokenLogprob:
    return types.TokenLogprob(m.token_id, m.text, m.logprob)


def delta(m: generation_pb2.GenerateDelta) -> types.Delta:
    """A piece of an answer."""
    return types.Delta(
        text=m.text,
        token_ids=tuple(m.token_ids),
        logprobs=tuple(_logprob(t) for t in m.logprobs),
        top_logprobs=tuple(tuple(_logprob(t) for t in top.tokens) for top in m.top_logprobs),
    )


def finished(m: generation_pb2.GenerateFinished) -> types.Finished:
    """The end of an answer."""
    try:
        reason = types.FinishReason(m.finish_reason)
    except ValueError:
        reason = types.FinishReason.UNSPECIFIED
    t = m.timings
    return types.Finished(
        finish_reason=reason,
        usage=types.Usage(
            m.usage.prompt_tokens, m.usage.completion_tokens, m.usage.context_tokens, m.usage.cached_tokens
        ),
        adapter_version=m.adapter_version,
        state_digest=m.state_digest,
        timings=types.Timings(
            queue=_span(t.queue.seconds, t.queue.nanos),
            prefill=_span(t.prefill.seconds, t.prefill.nanos),
            decode=_span(t.decode.seconds, t.decode.nanos),
        ),
        adapter_scale=m.adapter_scale,
    )


def scores(m: generation_pb2.ScoreResponse) -> types.Score:
    """Scores."""
    return types.Score(
        scores=tuple(
            types.ContinuationScore(s.logprob, tuple(_logprob(t) for t in s.tokens), s.greedy) for s in m.scores
        ),
        adapter_version=m.adapter_version,
        prompt_tokens=m.prompt_tokens,
        adapter_scale=m.adapter_scale,
        cached_tokens=m.cached_tokens,
    )


def model(m: model_pb2.Model) -> types.Model:
    """A model."""
    g = m.generator
    return types.Model(
        name=m.name,
        architecture=m.architecture,
        parameters=m.parameters,
        layers=m.layers,
        hidden_size=m.hidden_size,
        vocab_size=m.vocab_size,
        context_length=m.context_length,
        weight_format=m.weight_format,
        digest=m.digest,
        generator=types.Generator(
            write=g.write,
            read_out=g.read_out,
            sites=tuple(types.Site(s.layer, s.module, s.r1, s.r2, s.rank) for s in g.sites),
            window=g.window,
            strategy=_strategy(g.strategy),
            digest=g.digest,
            parameters=g.parameters,
            prompt_format=g.prompt_format,
        )
        if m.HasField("generator")
        else None,
    )


class Collected:
    """An answer put together from its pieces."""

    def __init__(self) -> None:
        self.text = ""
        self.token_ids: list[int] = []
        self.logprobs: list[types.TokenLogprob] = []
        self.finished: types.Finished | None = None

    def take(self, m: generation_pb2.GenerateResponse) -> types.Delta | None:
        """Takes a message; the piece that it holds, if it is one."""
        if m.HasField("finished"):
            self.finished = finished(m.finished)
            return None
        piece = delta(m.delta)
        self.text += piece.text
        self.token_ids += piece.token_ids
        self.logprobs += piece.logprobs
        return piece

    def answer(self, end: types.Finished) -> types.Answer:
        """The whole answer."""
        return types.Answer(self.text, tuple(self.token_ids), tuple(self.logprobs), end)


class ExportWriter:
    """Writes an export into a folder: each file under another name first, checked, then renamed.

    Nothing but `adapter_config.json` and `adapter_model.safetensors` is ever written.
    """

    _NAMES = ("adapter_config.json", "adapter_model.safetensors")

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self._directory = Path(directory)
        self._directory.mkdir(parents=True, exist_ok=True)
        self._files: list[Path] = []
        self._open: tuple[model_pb2.ExportedFile, BinaryIO] | None = None
        self._hash = hashlib.sha256()
        self._size = 0
        self._end: model_pb2.ExportFinished | None = None

    def _part(self, name: str) -> Path:
        return self._directory / f".{name}.part"

    def _close(self) -> None:
        if self._open is None:
            return
        announced, file = self._open
        file.close()
        self._open = None
        if self._size != announced.size or self._hash.hexdigest() != announced.sha256.lower():
            self._part(announced.name).unlink()
            raise DamagedExport(
                f"{announced.name}: {self._size} bytes of SHA-256 {self._hash.hexdigest()} came, "
                f"{announced.size} of {announced.sha256} were announced"
            )
        target = self._directory / announced.name
        os.replace(self._part(announced.name), target)
        self._files.append(target)

    def take(self, m: model_pb2.ExportAdapterResponse) -> None:
        """Takes a message. DamagedExport if a file is not what was announced."""
        if m.HasField("file"):
            self._close()
            if m.file.name not in self._NAMES or self._directory / m.file.name in self._files:
                raise DamagedExport(f"an export holds no file of the name {m.file.name!r}, or it came twice")
            announced = model_pb2.ExportedFile()
            announced.CopyFrom(m.file)
            self._open = (announced, self._part(m.file.name).open("wb"))
            self._hash, self._size = hashlib.sha256(), 0
        elif m.HasField("data"):
            if self._open is None or self._size + len(m.data) > self._open[0].size:
                raise DamagedExport("bytes came that no file was announced for")
            self._open[1].write(m.data)
            self._hash.update(m.data)
            self._size += len(m.data)
        elif m.HasField("finished"):
            self._close()
            self._end = model_pb2.ExportFinished()
            self._end.CopyFrom(m.finished)

    def finish(self) -> types.Export:
        """The export, once all of it has come. DamagedExport if something is missing."""
        if self._end is None or len(self._files) != len(self._NAMES):
            raise DamagedExport("the export ended before all its files had come")
        return types.Export(
            directory=self._directory,
            files=tuple(self._files),
            adapter_version=self._end.adapter_version,
            state_digest=self._end.state_digest,
            rank=self._end.rank,
        )

    def abandon(self) -> None:
        """Removes what is unfinished."""
        if self._open is not None:
            announced, file = self._open
            file.close()
            self._open = None
            self._part(announced.name).unlink(missing_ok=True)
