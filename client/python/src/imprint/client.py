"""The blocking client.

A `Client` may be used by several threads; an `IngestStream` or a `Generation` by one. The asyncio client
is the same in `imprint.aio`. Start at `Client`.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from types import TracebackType
from typing import Protocol

import grpc

from imprint import _wire, types
from imprint.errors import StatusError, StreamClosed, of_rpc
from imprint.v1 import context_pb2, generation_pb2

_MAX_MESSAGE_BYTES = 16 << 20


class Client:
    """A connection to a server. Close it, or use it in a `with`."""

    sessions: Sessions
    """Creates, lists, changes and ends sessions, and tends their documents."""
    models: Models
    """Tells what models the server has."""

    def __init__(
        self,
        endpoint: str = "127.0.0.1:7461",
        *,
        key: str | None = None,
        timeout_s: float | None = None,
        credentials: grpc.ChannelCredentials | None = None,
    ) -> None:
        """Connects lazily.

        endpoint: `host:port`, `http://host:port` or, for TLS, `https://host:port`. key: the bearer key of a
        tenant. timeout_s: of each call that is given none of its own; streams of `ingest` have none.
        credentials: TLS other than the system's roots.
        """
        target, tls = _wire.endpoint(endpoint)
        options = [
            ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
            ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
        ]
        if tls or credentials is not None:
            self._channel = grpc.secure_channel(target, credentials or grpc.ssl_channel_credentials(), options)
        else:
            self._channel = grpc.insecure_channel(target, options)
        self._metadata = _wire.credentials(key)
        self._timeout_s = timeout_s
        self.sessions = Sessions(self)
        self.models = Models(self)

    def close(self) -> None:
        """Ends all calls and the connection."""
        self._channel.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _unary(
        self, method: _wire.Method[_wire.Request, _wire.Response], request: _wire.Request, timeout_s: float | None
    ) -> _wire.Response:
        call = self._channel.unary_unary(method.path, method.write, method.read)
        try:
            response = call(
                request,
                metadata=self._metadata,
                timeout=self._timeout_s if timeout_s is None else timeout_s,
            )
        except grpc.RpcError as error:
            raise of_rpc(error) from None
        return response

    def ingest(self, session_id: str, *, next_seq: int | None = None, max_in_flight: int = 32) -> IngestStream:
        """Opens a stream of context into a session.

        next_seq: the `seq` of the first chunk; None asks the session, which continues where its last stream
        ended. max_in_flight: chunks that may wait for `accepted` before `send` blocks.
        """
        if max_in_flight < 1:
            raise ValueError("max_in_flight is at least 1")
        if next_seq is None:
            next_seq = self.sessions.get(session_id).accepted_seq + 1
        return IngestStream(self._channel, self._metadata, session_id, next_seq, max_in_flight)

    def generate(
        self,
        prompt: types.Prompt,
        *,
        session_id: str = "",
        model: str = "",
        max_tokens: int = 0,
        stop: Sequence[str] = (),
        sampling: types.Sampling | None = None,
        logprobs: bool = False,
        top_logprobs: int = 0,
        min_applied_seq: int = 0,
        min_adapter_version: int = 0,
        adapter_scale: float | None = None,
        timeout_s: float | None = None,
    ) -> Generation:
        """Continues a prompt, piece by piece; without a session the bare model does.

        max_tokens: 0 leaves it to the server. min_applied_seq, min_adapter_version: how fresh the adapter
        must be. adapter_scale: strength of the whole imprint, 0 to 8; None: as much of it as the prompt means.
        """
        request = _wire.generate(
            prompt,
            _wire.adapter(session_id, min_applied_seq, min_adapter_version, adapter_scale),
            model,
            sampling,
            stop,
            max_tokens,
            logprobs,
            top_logprobs,
        )
        call = self._channel.unary_stream(_wire.GENERATE.path, _wire.GENERATE.write, _wire.GENERATE.read)
        responses = call(
            request,
            metadata=self._metadata,
            timeout=self._timeout_s if timeout_s is None else timeout_s,
        )
        return Generation(responses)

    def ask(
        self,
        question: str,
        *,
        session_id: str = "",
        model: str = "",
        max_tokens: int = 64,
        stop: Sequence[str] = ("\n",),
        sampling: types.Sampling | None = None,
        min_applied_seq: int = 0,
        min_adapter_version: int = 0,
        adapter_scale: float | None = None,
        timeout_s: float | None = None,
    ) -> types.Answer:
        """Puts a question in the format of the generator and returns the whole answer, up to a line's end."""
        return self.generate(
            types.Question(question),
            session_id=session_id,
            model=model,
            max_tokens=max_tokens,
            stop=stop,
            sampling=sampling,
            min_applied_seq=min_applied_seq,
            min_adapter_version=min_adapter_version,
            adapter_scale=adapter_scale,
            timeout_s=timeout_s,
        ).answer()

    def score(
        self,
        prompt: types.Prompt,
        continuations: Sequence[types.Continuation],
        *,
        session_id: str = "",
        model: str = "",
        min_applied_seq: int = 0,
        min_adapter_version: int = 0,
        adapter_scale: float | None = None,
        timeout_s: float | None = None,
    ) -> types.Score:
        """Returns how likely each of 1 to 64 continuations of the prompt is, independently of each other."""
        selection = _wire.adapter(session_id, min_applied_seq, min_adapter_version, adapter_scale)
        request = _wire.score(prompt, continuations, selection, model)
        return _wire.scores(self._unary(_wire.SCORE, request, timeout_s))

    def export_adapter(
        self, session_id: str, directory: str | os.PathLike[str], *, timeout_s: float | None = None
    ) -> types.Export:
        """Writes the session's newest adapter into a folder as a PEFT LoRA, checked by size and SHA-256."""
        call = self._channel.unary_stream(_wire.EXPORT.path, _wire.EXPORT.write, _wire.EXPORT.read)
        responses = call(
            _wire.EXPORT.request(session_id=session_id),
            metadata=self._metadata,
            timeout=self._timeout_s if timeout_s is None else timeout_s,
        )
        writer = _wire.ExportWriter(directory)
        try:
            for response in responses:
                writer.take(response)
            return writer.finish()
        except grpc.RpcError as error:
            raise of_rpc(error) from None
        finally:
            responses.cancel()
            writer.abandon()


class Sessions:
    """Sessions of the caller's tenant; `Client.sessions`."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def create(
        self,
        *,
        model: str = "",
        strategy: types.Strategy = types.Strategy.DEFAULT,
        window: int = 0,
        labels: Mapping[str, str] | None = None,
        ttl: timedelta | None = None,
        request_id: str = "",
        timeout_s: float | None = None,
    ) -> types.Session:
        """Creates an empty session. The same call again under one request_id returns the same session."""
        request = _wire.create(model, strategy, window, labels, ttl, request_id)
        return _wire.session(self._client._unary(_wire.CREATE, request, timeout_s).session)

    def get(self, session_id: str, *, timeout_s: float | None = None) -> types.Session:
        """Returns a session as it is now."""
        return _wire.session(self._client._unary(_wire.GET, _wire.get(session_id), timeout_s).session)

    def list(self, *, page_size: int = 0, timeout_s: float | None = None) -> Iterator[types.Session]:
        """Yields all sessions, oldest first, a page (page_size; 0 leaves it to the server) at a time."""
        token = ""
        while True:
            page = self._client._unary(_wire.LIST, _wire.page(page_size, token), timeout_s)
            yield from (_wire.session(session) for session in page.sessions)
            token = page.next_page_token
            if not token:
                return

    def update(
        self,
        session_id: str,
        *,
        labels: Mapping[str, str] | None = None,
        ttl: timedelta | None = None,
        keep_forever: bool = False,
        timeout_s: float | None = None,
    ) -> types.Session:
        """Changes what is given: labels (all of them), ttl; keep_forever takes the ttl away."""
        request = _wire.update(session_id, labels, ttl, keep_forever)
        return _wire.session(self._client._unary(_wire.UPDATE, request, timeout_s).session)

    def delete(self, session_id: str, *, timeout_s: float | None = None) -> None:
        """Ends a session and frees all it holds."""
        self._client._unary(_wire.DELETE, _wire.delete(session_id), timeout_s)

    def fork(
        self,
        session_id: str,
        *,
        labels: Mapping[str, str] | None = None,
        ttl: timedelta | None = None,
        timeout_s: float | None = None,
    ) -> types.Session:
        """Creates a session with a copy of another's documents, state, `seq` and adapter version."""
        request = _wire.fork(session_id, labels, ttl)
        return _wire.session(self._client._unary(_wire.FORK, request, timeout_s).session)

    def documents(self, session_id: str, *, timeout_s: float | None = None) -> Sequence[types.Document]:
        """Returns the documents of a session in the order in which they were begun."""
        response = self._client._unary(_wire.DOCUMENTS, _wire.documents(session_id), timeout_s)
        return tuple(_wire.document(document) for document in response.documents)

    def forget(self, session_id: str, document_id: str, *, timeout_s: float | None = None) -> types.Forgotten:
        """Forgets a document; returns the version from which on it is forgotten."""
        response = self._client._unary(_wire.FORGET, _wire.forget(session_id, document_id), timeout_s)
        return types.Forgotten(response.adapter_version, response.state_digest)


class Models:
    """Models of the server; `Client.models`."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def list(self, *, timeout_s: float | None = None) -> Sequence[types.Model]:
        """Returns the models; the default first."""
        response = self._client._unary(_wire.MODELS, _wire.MODELS.request(), timeout_s)
        return tuple(_wire.model(model) for model in response.models)

    def get(self, name: str = "", *, timeout_s: float | None = None) -> types.Model:
        """Returns one model; the empty name is the default's."""
        response = self._client._unary(_wire.MODEL, _wire.MODEL.request(name=name), timeout_s)
        return _wire.model(response.model)


class _Responses(Protocol):
    def __iter__(self) -> Iterator[generation_pb2.GenerateResponse]: ...

    def cancel(self) -> object: ...


class Generation:
    """An answer while it comes: iterate over its pieces, or take `answer()`. Ends early by `cancel()`."""

    def __init__(self, responses: _Responses) -> None:
        self._responses = responses
        self._collected = _wire.Collected()

    def __iter__(self) -> Iterator[types.Delta]:
        try:
            for response in self._responses:
                piece = self._collected.take(response)
                if piece is not None:
                    yield piece
        except grpc.RpcError as error:
            raise of_rpc(error) from None

    @property
    def text(self) -> str:
        """The text so far."""
        return self._collected.text

    @property
    def finished(self) -> types.Finished | None:
        """The end, once it has come."""
        return self._collected.finished

    def answer(self) -> types.Answer:
        """Waits for the end and returns the whole answer."""
        for _ in self:
            pass
        if self._collected.finished is None:
            raise StatusError(grpc.StatusCode.INTERNAL, "the answer ended without its last message")
        return self._collected.answer(self._collected.finished)

    def cancel(self) -> None:
        """Tells the server to stop; iterating then raises Cancelled."""
        self._responses.cancel()

    def __enter__(self) -> Generation:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.cancel()


class IngestStream:
    """A stream of context into a session. Use it in a `with`, or `close` it.

    Chunks are numbered by the stream. Leaving the `with` closes the stream, which publishes what has come;
    leaving it by an exception cancels it, and what was accepted stays.
    """

    def __init__(
        self,
        channel: grpc.Channel,
        metadata: tuple[tuple[str, str], ...],
        session_id: str,
        next_seq: int,
        max_in_flight: int,
    ) -> None:
        self._requests: queue.SimpleQueue[context_pb2.IngestRequest | None] = queue.SimpleQueue()
        self._requests.put(_wire.ingest_open(session_id))
        self._changed = threading.Condition()
        self._next_seq = next_seq
        self._accepted_seq = next_seq - 1
        self._max_in_flight = max_in_flight
        self._applied: types.Applied | None = None
        self._applied_count = 0
        self._error: StatusError | None = None
        self._closing = False
        self._ended = False
        call = channel.stream_stream(_wire.INGEST.path, _wire.INGEST.write, _wire.INGEST.read)
        self._responses = call(iter(self._requests.get, None), metadata=metadata)
        self._reader = threading.Thread(target=self._read, name="imprint-ingest", daemon=True)
        self._reader.start()

    def _read(self) -> None:
        error: StatusError | None = None
        try:
            for response in self._responses:
                with self._changed:
                    if response.HasField("accepted"):
                        self._accepted_seq = max(self._accepted_seq, response.accepted.seq)
                    elif response.HasField("applied"):
                        self._applied = _wire.applied(response.applied)
                        self._applied_count += 1
                    self._changed.notify_all()
        except grpc.RpcError as rpc:
            error = of_rpc(rpc)
        with self._changed:
            self._error = error
            self._ended = True
            self._changed.notify_all()
        self._requests.put(None)

    def _check(self) -> None:
        if self._error is not None:
            raise self._error
        if self._ended or self._closing:
            raise StreamClosed("the ingest stream is closed")

    @property
    def next_seq(self) -> int:
        """The `seq` of the next chunk."""
        return self._next_seq

    @property
    def accepted_seq(self) -> int:
        """The `seq` up to which the server has accepted chunks."""
        with self._changed:
            return self._accepted_seq

    @property
    def applied(self) -> types.Applied | None:
        """The newest version that this stream has heard of."""
        with self._changed:
            return self._applied

    def send(
        self,
        text: str | None = None,
        *,
        token_ids: Sequence[int] | None = None,
        document_id: str = "",
        end_of_document: bool = False,
    ) -> int:
        """Sends a piece of a document and returns its `seq`; waits while too many are not accepted yet.

        A chunk may end within a word. An empty document_id continues the open document.
        """
        with self._changed:
            self._check()
            message = _wire.ingest_chunk(self._next_seq, text, token_ids, document_id, end_of_document)
            while self._next_seq - self._accepted_seq > self._max_in_flight:
                self._changed.wait()
                self._check()
            seq = self._next_seq
            self._next_seq += 1
            self._requests.put(message)
        return seq

    def flush(self, *, timeout_s: float | None = None) -> types.Applied | None:
        """Asks for a version of all that was sent and waits for it; None if the session was never told anything.

        TimeoutError after timeout_s.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        with self._changed:
            self._check()
            last, heard = self._next_seq - 1, self._applied_count
            if last == 0:
                return None
            self._requests.put(_wire.ingest_flush())
            while self._applied is None or self._applied_count == heard or self._applied.seq < last:
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    raise TimeoutError(f"no version with seq {last} was published within {timeout_s} s")
                self._changed.wait(left)
                self._check()
            return self._applied

    def close(self) -> types.Applied | None:
        """Ends the stream, waits until all is published and returns the last version, if there is one."""
        with self._changed:
            if not self._closing:
                self._closing = True
                self._requests.put(None)
        self._reader.join()
        if self._error is not None:
            raise self._error
        return self._applied

    def cancel(self) -> None:
        """Ends the stream at once; what was accepted stays."""
        with self._changed:
            self._closing = True
        self._responses.cancel()
        self._reader.join()

    def __enter__(self) -> IngestStream:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.cancel()
