"""The client for asyncio: the same as `imprint.client`, with `await`.

All of it belongs to the event loop that it was made in. Start at `AsyncClient`.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from datetime import timedelta
from types import TracebackType

import grpc
import grpc.aio

from imprint import _wire, types
from imprint.errors import StatusError, StreamClosed, of_rpc
from imprint.v1 import context_pb2, generation_pb2

_MAX_MESSAGE_BYTES = 16 << 20


class AsyncClient:
    """A connection to a server. Close it, or use it in an `async with`."""

    sessions: AsyncSessions
    """Creates, lists, changes and ends sessions, and tends their documents."""
    models: AsyncModels
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
            self._channel = grpc.aio.secure_channel(target, credentials or grpc.ssl_channel_credentials(), options)
        else:
            self._channel = grpc.aio.insecure_channel(target, options)
        self._metadata = _wire.credentials(key)
        self._timeout_s = timeout_s
        self.sessions = AsyncSessions(self)
        self.models = AsyncModels(self)

    async def close(self) -> None:
        """Ends all calls and the connection."""
        await self._channel.close()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def _unary(
        self, method: _wire.Method[_wire.Request, _wire.Response], request: _wire.Request, timeout_s: float | None
    ) -> _wire.Response:
        call = self._channel.unary_unary(method.path, method.write, method.read)
        try:
            response = await call(
                request,
                metadata=self._metadata,
                timeout=self._timeout_s if timeout_s is None else timeout_s,
            )
        except grpc.RpcError as error:
            raise of_rpc(error) from None
        return response

    def ingest(
        self, session_id: str, *, next_seq: int | None = None, max_in_flight: int = 32
    ) -> AsyncIngestStream:
        """Prepares a stream of context into a session; `async with` opens it.

        next_seq: the `seq` of the first chunk; None asks the session, which continues where its last stream
        ended. max_in_flight: chunks that may wait for `accepted` before `send` waits.
        """
        if max_in_flight < 1:
            raise ValueError("max_in_flight is at least 1")
        return AsyncIngestStream(self, session_id, next_seq, max_in_flight)

    def _ingest_call(
        self,
    ) -> grpc.aio.StreamStreamCall[context_pb2.IngestRequest, context_pb2.IngestResponse]:
        call = self._channel.stream_stream(_wire.INGEST.path, _wire.INGEST.write, _wire.INGEST.read)
        return call(metadata=self._metadata)

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
    ) -> AsyncGeneration:
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
        return AsyncGeneration(responses)

    async def ask(
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
        return await self.generate(
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

    async def score(
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
        return _wire.scores(await self._unary(_wire.SCORE, request, timeout_s))

    async def export_adapter(
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
            async for response in responses:
                writer.take(response)
            return writer.finish()
        except grpc.RpcError as error:
            raise of_rpc(error) from None
        finally:
            responses.cancel()
            writer.abandon()


class AsyncSessions:
    """Sessions of the caller's tenant; `AsyncClient.sessions`."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    async def create(
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
        return _wire.session((await self._client._unary(_wire.CREATE, request, timeout_s)).session)

    async def get(self, session_id: str, *, timeout_s: float | None = None) -> types.Session:
        """Returns a session as it is now."""
        return _wire.session((await self._client._unary(_wire.GET, _wire.get(session_id), timeout_s)).session)

    async def list(self, *, page_size: int = 0, timeout_s: float | None = None) -> AsyncIterator[types.Session]:
        """Yields all sessions, oldest first, a page (page_size; 0 leaves it to the server) at a time."""
        token = ""
        while True:
            page = await self._client._unary(_wire.LIST, _wire.page(page_size, token), timeout_s)
            for session in page.sessions:
                yield _wire.session(session)
            token = page.next_page_token
            if not token:
                return

    async def update(
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
        return _wire.session((await self._client._unary(_wire.UPDATE, request, timeout_s)).session)

    async def delete(self, session_id: str, *, timeout_s: float | None = None) -> None:
        """Ends a session and frees all it holds."""
        await self._client._unary(_wire.DELETE, _wire.delete(session_id), timeout_s)

    async def fork(
        self,
        session_id: str,
        *,
        labels: Mapping[str, str] | None = None,
        ttl: timedelta | None = None,
        timeout_s: float | None = None,
    ) -> types.Session:
        """Creates a session with a copy of another's documents, state, `seq` and adapter version."""
        request = _wire.fork(session_id, labels, ttl)
        return _wire.session((await self._client._unary(_wire.FORK, request, timeout_s)).session)

    async def documents(self, session_id: str, *, timeout_s: float | None = None) -> Sequence[types.Document]:
        """Returns the documents of a session in the order in which they were begun."""
        response = await self._client._unary(_wire.DOCUMENTS, _wire.documents(session_id), timeout_s)
        return tuple(_wire.document(document) for document in response.documents)

    async def forget(self, session_id: str, document_id: str, *, timeout_s: float | None = None) -> types.Forgotten:
        """Forgets a document; returns the version from which on it is forgotten."""
        response = await self._client._unary(_wire.FORGET, _wire.forget(session_id, document_id), timeout_s)
        return types.Forgotten(response.adapter_version, response.state_digest)


class AsyncModels:
    """Models of the server; `AsyncClient.models`."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    async def list(self, *, timeout_s: float | None = None) -> Sequence[types.Model]:
        """Returns the models; the default first."""
        response = await self._client._unary(_wire.MODELS, _wire.MODELS.request(), timeout_s)
        return tuple(_wire.model(model) for model in response.models)

    async def get(self, name: str = "", *, timeout_s: float | None = None) -> types.Model:
        """Returns one model; the empty name is the default's."""
        response = await self._client._unary(_wire.MODEL, _wire.MODEL.request(name=name), timeout_s)
        return _wire.model(response.model)


class AsyncGeneration:
    """An answer while it comes: iterate over its pieces, or take `answer()`. Ends early by `cancel()`."""

    def __init__(
        self,
        responses: grpc.aio.UnaryStreamCall[generation_pb2.GenerateRequest, generation_pb2.GenerateResponse],
    ) -> None:
        self._responses = responses
        self._collected = _wire.Collected()

    async def __aiter__(self) -> AsyncIterator[types.Delta]:
        try:
            async for response in self._responses:
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

    async def answer(self) -> types.Answer:
        """Waits for the end and returns the whole answer."""
        async for _ in self:
            pass
        if self._collected.finished is None:
            raise StatusError(grpc.StatusCode.INTERNAL, "the answer ended without its last message")
        return self._collected.answer(self._collected.finished)

    def cancel(self) -> None:
        """Tells the server to stop; the task that iterates is then cancelled, as asyncio has it."""
        self._responses.cancel()

    async def __aenter__(self) -> AsyncGeneration:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.cancel()


class AsyncIngestStream:
    """A stream of context into a session. Use it in an `async with`.

    Chunks are numbered by the stream. Leaving the block closes the stream, which publishes what has come;
    leaving it by an exception cancels it, and what was accepted stays.
    """

    def __init__(
        self, client: AsyncClient, session_id: str, next_seq: int | None, max_in_flight: int
    ) -> None:
        self._client = client
        self._session_id = session_id
        self._next_seq = next_seq or 0
        self._ask_seq = next_seq is None
        self._accepted_seq = self._next_seq - 1
        self._max_in_flight = max_in_flight
        self._changed = asyncio.Condition()
        self._writing = asyncio.Lock()
        self._applied: types.Applied | None = None
        self._applied_count = 0
        self._error: StatusError | None = None
        self._closing = False
        self._ended = False
        self._call: (
            grpc.aio.StreamStreamCall[context_pb2.IngestRequest, context_pb2.IngestResponse] | None
        ) = None
        self._reader: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Opens the stream; `async with` does."""
        if self._ask_seq:
            self._next_seq = (await self._client.sessions.get(self._session_id)).accepted_seq + 1
            self._accepted_seq = self._next_seq - 1
        self._call = self._client._ingest_call()
        self._reader = asyncio.create_task(self._read(self._call))
        await self._write(_wire.ingest_open(self._session_id))

    async def _read(
        self, call: grpc.aio.StreamStreamCall[context_pb2.IngestRequest, context_pb2.IngestResponse]
    ) -> None:
        error: StatusError | None = None
        try:
            async for response in call:
                async with self._changed:
                    if response.HasField("accepted"):
                        self._accepted_seq = max(self._accepted_seq, response.accepted.seq)
                    elif response.HasField("applied"):
                        self._applied = _wire.applied(response.applied)
                        self._applied_count += 1
                    self._changed.notify_all()
        except grpc.RpcError as rpc:
            error = of_rpc(rpc)
        except asyncio.CancelledError:
            if not call.cancelled():
                raise
        async with self._changed:
            self._error = error
            self._ended = True
            self._changed.notify_all()

    async def _write(self, message: context_pb2.IngestRequest) -> None:
        if self._call is None:
            raise StreamClosed("the ingest stream is not open: use it in an async with")
        try:
            await self._call.write(message)
        except (grpc.RpcError, asyncio.InvalidStateError):
            # The call is over. The reader knows why, if there is a reason.
            async with self._changed:
                await self._changed.wait_for(lambda: self._ended)
                self._check()

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
        return self._accepted_seq

    @property
    def applied(self) -> types.Applied | None:
        """The newest version that this stream has heard of."""
        return self._applied

    async def send(
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
        async with self._writing:
            async with self._changed:
                self._check()
                await self._changed.wait_for(
                    lambda: self._ended or self._next_seq - self._accepted_seq <= self._max_in_flight
                )
                self._check()
            seq = self._next_seq
            message = _wire.ingest_chunk(seq, text, token_ids, document_id, end_of_document)
            self._next_seq += 1
            await self._write(message)
        return seq

    async def flush(self, *, timeout_s: float | None = None) -> types.Applied | None:
        """Asks for a version of all that was sent and waits for it; None if the session was never told anything.

        TimeoutError after timeout_s.
        """
        async with self._writing:
            self._check()
            last, heard = self._next_seq - 1, self._applied_count
            if last == 0:
                return None

        async def ask() -> None:
            async with self._writing:
                # A write to a call that the server has just ended fails without the server's reason: chunks first.
                async with self._changed:
                    await self._changed.wait_for(lambda: self._ended or self._accepted_seq >= last)
                    self._check()
                await self._write(_wire.ingest_flush())

        def published() -> bool:
            fresh = self._applied_count != heard
            return self._ended or (fresh and self._applied is not None and self._applied.seq >= last)

        async def wait() -> None:
            await ask()
            async with self._changed:
                await self._changed.wait_for(published)

        try:
            await asyncio.wait_for(wait(), timeout_s)
        except asyncio.TimeoutError:
            raise TimeoutError(f"no version with seq {last} was published within {timeout_s} s") from None
        if self._applied is None or self._applied.seq < last:
            self._check()
            raise StreamClosed("the ingest stream ended before the version came")
        return self._applied

    async def close(self) -> types.Applied | None:
        """Ends the stream, waits until all is published and returns the last version, if there is one."""
        async with self._writing:
            if not self._closing and self._call is not None and not self._ended:
                self._closing = True
                await self._call.done_writing()
        if self._reader is not None:
            await self._reader
        if self._error is not None:
            raise self._error
        return self._applied

    async def cancel(self) -> None:
        """Ends the stream at once; what was accepted stays."""
        self._closing = True
        if self._call is not None:
            self._call.cancel()
        if self._reader is not None:
            await self._reader

    async def __aenter__(self) -> AsyncIngestStream:
        await self.open()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            await self.close()
        else:
            await self.cancel()
