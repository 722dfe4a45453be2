"""What can go wrong: one class for each thing that a caller can act on.

A failed call raises the `StatusError` of its gRPC code, with the details that the server attached
(google.rpc.ErrorInfo, BadRequest, RetryInfo) decoded. Start at `status_error`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import grpc
from google.protobuf.message import DecodeError
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status

_DETAILS = "grpc-status-details-bin"


class ImprintError(Exception):
    """Anything that this package raises on purpose."""


class StreamClosed(ImprintError):
    """Something was sent on an ingest stream that is closed."""


class DamagedExport(ImprintError):
    """An exported file is not what the server announced: other name, size or SHA-256."""


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One field of a request that the server did not accept."""

    field: str
    """The field's path, e.g. `sampling.temperature`."""
    description: str
    """Why it was not accepted."""


class StatusError(ImprintError):
    """The server, or the way to it, ended a call with a status other than OK."""

    code: grpc.StatusCode
    """The gRPC code."""
    message: str
    """The status message, for people."""
    reason: str
    """ErrorInfo's reason, for programs, e.g. `SEQ_GAP`; empty if the server gave none."""
    metadata: Mapping[str, str]
    """ErrorInfo's metadata, e.g. `expected_seq`."""
    violations: tuple[FieldViolation, ...]
    """BadRequest's field violations."""
    retry_after_s: float | None
    """RetryInfo's delay in seconds; None if the server gave none."""

    def __init__(
        self,
        code: grpc.StatusCode,
        message: str,
        *,
        reason: str = "",
        metadata: Mapping[str, str] | None = None,
        violations: Iterable[FieldViolation] = (),
        retry_after_s: float | None = None,
    ) -> None:
        self.code = code
        self.message = message
        self.reason = reason
        self.metadata = dict(metadata or {})
        self.violations = tuple(violations)
        self.retry_after_s = retry_after_s
        fields = "".join(f"; {v.field}: {v.description}" for v in self.violations)
        super().__init__(f"{code.name}{f' ({reason})' if reason else ''}: {message}{fields}")


class Cancelled(StatusError):
    """The call was cancelled."""


class InvalidArgument(StatusError):
    """A field of the request is wrong; `violations` says which."""


class DeadlineExceeded(StatusError):
    """The call's timeout passed."""


class NotFound(StatusError):
    """There is no such session, document or model (a foreign session looks like an unknown one)."""


class AlreadyExists(StatusError):
    """The `seq` or `request_id` is used already, with another content."""


class FailedPrecondition(StatusError):
    """The session is not in the state that the call needs, e.g. a gap in `seq`."""


class ResourceExhausted(StatusError):
    """A bound of the server is reached; `retry_after_s` says when to come back."""


class Unauthenticated(StatusError):
    """The key is missing or unknown."""


class Unavailable(StatusError):
    """The server cannot be reached or is shutting down."""


_CLASSES: Mapping[grpc.StatusCode, type[StatusError]] = {
    grpc.StatusCode.CANCELLED: Cancelled,
    grpc.StatusCode.INVALID_ARGUMENT: InvalidArgument,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.ALREADY_EXISTS: AlreadyExists,
    grpc.StatusCode.FAILED_PRECONDITION: FailedPrecondition,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ResourceExhausted,
    grpc.StatusCode.UNAUTHENTICATED: Unauthenticated,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
}


def status_error(
    code: grpc.StatusCode, message: str, trailers: Iterable[tuple[str, str | bytes]]
) -> StatusError:
    """The error of a status and its trailing metadata. Details that do not decode are left out."""
    reason = ""
    metadata: dict[str, str] = {}
    violations: list[FieldViolation] = []
    retry_after_s: float | None = None
    for key, value in trailers:
        if key != _DETAILS or not isinstance(value, bytes):
            continue
        try:
            details = Status.FromString(value).details
            for detail in details:
                info = ErrorInfo()
                request = BadRequest()
                retry = RetryInfo()
                if detail.Unpack(info):
                    reason, metadata = info.reason, dict(info.metadata)
                elif detail.Unpack(request):
                    violations += [FieldViolation(v.field, v.description) for v in request.field_violations]
                elif detail.Unpack(retry):
                    retry_after_s = retry.retry_delay.ToTimedelta().total_seconds()
        except DecodeError:
            continue
    return _CLASSES.get(code, StatusError)(
        code,
        message,
        reason=reason,
        metadata=metadata,
        violations=violations,
        retry_after_s=retry_after_s,
    )


def of_rpc(error: grpc.RpcError) -> StatusError:
    """The error of a failed call, blocking or asyncio."""
    if isinstance(error, grpc.aio.AioRpcError):
        return status_error(error.code(), error.details() or "", list(error.trailing_metadata() or ()))
    if isinstance(error, grpc.Call):
        return status_error(error.code(), error.details() or "", list(error.trailing_metadata() or ()))
    return StatusError(grpc.StatusCode.UNKNOWN, str(error))
