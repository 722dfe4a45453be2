"""What needs no server: errors decoded, requests built, exports checked."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path

import grpc
import pytest
from google.protobuf.any_pb2 import Any
from google.protobuf.duration_pb2 import Duration
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status

from imprint import Client, DamagedExport, ResourceExhausted, Unauthenticated, Unavailable, _wire
from imprint.v1 import model_pb2


class KeyedServer(grpc.GenericRpcHandler):
    """Answers every call with the details that a server may attach, or with a missing key."""

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[bytes, bytes]:
        """Handles one call."""
        keyed = ("authorization", "Bearer secret") in tuple(handler_call_details.invocation_metadata)

        def answer(request: bytes, context: grpc.ServicerContext) -> bytes:
            if not keyed:
                context.abort(grpc.StatusCode.UNAUTHENTICATED, "no key")
            status = Status(code=grpc.StatusCode.RESOURCE_EXHAUSTED.value[0], message="full")
            details = (
                ErrorInfo(reason="SESSIONS_FULL", domain="imprint", metadata={"limit": "3"}),
                BadRequest(field_violations=[BadRequest.FieldViolation(field="labels", description="too many")]),
                RetryInfo(retry_delay=Duration(seconds=1, nanos=500_000_000)),
            )
            for detail in details:
                status.details.add().Pack(detail)
            context.set_trailing_metadata((("grpc-status-details-bin", status.SerializeToString()),))
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "full")
            return b""

        return grpc.unary_unary_rpc_method_handler(answer)


@pytest.fixture
def keyed() -> Iterator[str]:
    """A server that wants the key `secret`."""
    server = grpc.server(futures.ThreadPoolExecutor(1), handlers=[KeyedServer()])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None)


def test_the_key_is_sent_and_details_are_decoded(keyed: str) -> None:
    with Client(keyed, timeout_s=10) as client, pytest.raises(Unauthenticated):
        client.sessions.create()
    with Client(f"http://{keyed}", key="secret", timeout_s=10) as client:
        with pytest.raises(ResourceExhausted) as full:
            client.sessions.create()
    error = full.value
    assert (error.reason, error.metadata, error.retry_after_s) == ("SESSIONS_FULL", {"limit": "3"}, 1.5)
    assert [(v.field, v.description) for v in error.violations] == [("labels", "too many")]
    assert "SESSIONS_FULL" in str(error) and "labels: too many" in str(error)


def test_details_that_do_not_decode_are_left_out() -> None:
    from imprint.errors import status_error

    broken = Status(code=8, details=[Any(type_url="type.googleapis.com/google.rpc.ErrorInfo", value=b"\xff")])
    for trailer in (b"\xff\xff", broken.SerializeToString()):
        error = status_error(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", [("grpc-status-details-bin", trailer)])
        assert isinstance(error, ResourceExhausted) and error.reason == ""


def test_nobody_listening_is_unavailable() -> None:
    with Client("127.0.0.1:1", timeout_s=10) as client, pytest.raises(Unavailable):
        client.models.list()


def test_an_unknown_scheme_is_refused() -> None:
    with pytest.raises(ValueError, match="neither http nor https"):
        Client("ftp://127.0.0.1:7461")


def _file(name: str, data: bytes, sha256: str | None = None) -> list[model_pb2.ExportAdapterResponse]:
    digest = hashlib.sha256(data).hexdigest() if sha256 is None else sha256
    file = model_pb2.ExportedFile(name=name, size=len(data), sha256=digest)
    return [model_pb2.ExportAdapterResponse(file=file), model_pb2.ExportAdapterResponse(data=data)]


FINISHED = model_pb2.ExportAdapterResponse(finished=model_pb2.ExportFinished(adapter_version=1, rank=2))


@pytest.mark.parametrize(
    "messages",
    [
        pytest.param(_file("../elsewhere", b"x"), id="another name"),
        pytest.param([*_file("adapter_config.json", b"{}", "00"), FINISHED], id="another digest"),
        pytest.param([*_file("adapter_config.json", b"{}"), FINISHED], id="a file is missing"),
        pytest.param(_file("adapter_config.json", b"{}") + _file("adapter_model.safetensors", b"w"), id="no end"),
        pytest.param([model_pb2.ExportAdapterResponse(data=b"x")], id="no file"),
        pytest.param(
            [*_file("adapter_config.json", b"{}"), model_pb2.ExportAdapterResponse(data=b"x")], id="too many bytes"
        ),
    ],
)
def test_a_damaged_export_is_refused(messages: list[model_pb2.ExportAdapterResponse], tmp_path: Path) -> None:
    writer = _wire.ExportWriter(tmp_path / "adapter")
    with pytest.raises(DamagedExport):
        for message in messages:
            writer.take(message)
        writer.finish()
    writer.abandon()
    assert not list((tmp_path / "adapter").glob(".*.part"))
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_whole_export_is_written(tmp_path: Path) -> None:
    writer = _wire.ExportWriter(tmp_path)
    for message in [*_file("adapter_config.json", b"{}"), *_file("adapter_model.safetensors", b"w"), FINISHED]:
        writer.take(message)
    assert writer.finish().rank == 2
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == b"w"
